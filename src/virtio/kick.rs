//! How a sleeping worker is woken, without a system call when it does not sleep.
//!
//! Owns: one eventfd a thread, and the flag that says whether its owner sleeps on it. Threads: any
//! wakes; one sleeps. Locks: none. No wake-up is lost: the sleeper sets the flag, *then* looks for
//! work; the waker makes the work visible, *then* looks at the flag; both with a full fence between.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use vmm_sys_util::eventfd::EventFd;

/// A thread's alarm clock.
#[derive(Debug)]
pub struct Kick {
    asleep: AtomicBool,
    fd: EventFd,
}

impl Kick {
    /// Of a thread that is awake.
    pub fn new() -> io::Result<Kick> {
        let fd = EventFd::new(libc::EFD_CLOEXEC)?;
        Ok(Kick { asleep: AtomicBool::new(false), fd })
    }

    /// True between [`Kick::prepare`] and the first wake-up after it.
    pub fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::SeqCst)
    }

    /// Wakes the thread, if it sleeps. The work has been made visible before.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::SeqCst) {
            // It would block only at 2^64 - 2 wake-ups that were not slept through.
            let _ = self.fd.write(1);
        }
    }

    /// The thread is about to sleep. It looks for work once more after this, then polls the
    /// descriptor, or calls [`Kick::rise`].
    pub fn prepare(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Sleeps until somebody wakes the thread; after [`Kick::prepare`]. One system call, where
    /// poll(2) needs a second one to take the wake-up. A signal ends it early.
    pub fn sleep(&self) {
        // An error is the signal; there is no other (eventfd(2)).
        let _ = self.fd.read();
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// The thread does not sleep, or no longer; `readable` is what poll(2) said of the descriptor.
    /// (A waker that cleared the flag may write a moment later: then the next sleep is a short one,
    /// and finds the descriptor readable without having been woken.)
    pub fn rise(&self, readable: bool) {
        self.asleep.store(false, Ordering::SeqCst);
        if readable {
            // It does not block: this thread alone reads, and there is something.
            let _ = self.fd.read();
        }
    }
}

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The way to one task on a thread: which of its queues were kicked, and the thread's clock.
#[derive(Clone, Debug)]
pub struct Waker {
    kick: Arc<Kick>,
    pending: Arc<AtomicU64>,
}

impl Waker {
    /// For a task of the thread that sleeps on `kick`.
    pub fn new(kick: Arc<Kick>) -> Waker {
        Waker { kick, pending: Arc::new(AtomicU64::new(0)) }
    }

    /// Bit of queue `index`: queues 64 apart share one.
    pub fn bit(index: u16) -> u64 {
        1 << (index % 64)
    }

    /// Marks queue `index` and wakes the thread.
    pub fn kick(&self, index: u16) {
        self.kick_all(Waker::bit(index));
    }

    /// Marks all queues of `bits` and wakes the thread.
    pub fn kick_all(&self, bits: u64) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        self.kick.wake();
    }

    /// True when there are marks.
    pub fn is_marked(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0
    }

    /// Marks without waking: by the thread itself.
    pub fn mark(&self, index: u16) {
        self.pending.fetch_or(Waker::bit(index), Ordering::SeqCst);
    }

    /// Takes the marks.
    pub fn take(&self) -> u64 {
        if self.is_marked() { self.pending.swap(0, Ordering::SeqCst) } else { 0 }
    }

    /// True when the thread sleeps.
    pub fn is_asleep(&self) -> bool {
        self.kick.is_asleep()
    }
}
