//! Named threads with small stacks, and what one leaves behind that panics.
//!
//! A thread costs its touched stack (8 to 20 KiB) and 0.1 ms; the stack's size is address space
//! only. Threads: any spawns. Locks: none.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// Stack of a device's or a backend's thread. Deep recursion is a defect there.
pub const SMALL_STACK: usize = 128 << 10;

/// Stack of a thread that makes disk requests: they go down a chain of images by recursion, and
/// the longest chain that can be opened must fit.
pub const IO_STACK: usize = 1 << 20;

/// Starts a thread; the kernel keeps the first 15 bytes of `name`. Errors: EAGAIN when the
/// system's or the cgroup's limit of threads is reached.
pub fn spawn<T: Send + 'static>(
    name: &str,
    stack: usize,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.to_string()).stack_size(stack).spawn(run)
}

/// As [`spawn`], with [`IO_STACK`], for a thread that lives no longer than `scope`.
pub fn spawn_scoped<'s, T: Send + 's>(
    scope: &'s Scope<'s, '_>,
    name: &str,
    run: impl FnOnce() -> T + Send + 's,
) -> io::Result<ScopedJoinHandle<'s, T>> {
    Builder::new().name(name.to_string()).stack_size(IO_STACK).spawn_scoped(scope, run)
}

/// What a mutex has, also after a panic with it in hand: for what is good at any moment.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread's number in the host (gettid(2)).
pub fn id() -> u32 {
    // SAFETY: no arguments, always succeeds; thread numbers are positive.
    (unsafe { libc::gettid() }) as u32
}

/// What a caught panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(s), _) => s,
        (_, Some(s)) => s,
        _ => "panic",
    }
}
