//! The state that a process begins with, made what the rest of the program counts on.
//!
//! Owns: the standard descriptors' existence, the signals that errors are read from instead.
//! Threads: main, first thing. Locks: none.

use std::io;

// The unwinder from the compiler's archive instead of its shared library: to find, map, relocate and
// initialize that library is 5 % of the CPU time of a tiny VM's life.
// SAFETY: declares nothing; it only names what to link.
#[cfg(target_env = "gnu")]
#[link(name = "gcc_eh")]
unsafe extern "C" {}

/// What Rust's runtime does before `main`, as far as it is needed here; to be called first.
///
/// - Descriptors 0 to 2 are open: the next file opened must not become standard error.
/// - A closed pipe or socket is an error of the write (EPIPE), not the end of the process.
/// - So is a file that reaches the limit of its size (EFBIG): it is a guest's disk that is full.
pub fn begin() -> io::Result<()> {
    let mut standard: [libc::pollfd; 3] =
        std::array::from_fn(|n| libc::pollfd { fd: n as i32, events: 0, revents: 0 });
    // SAFETY: one live array of three; no timeout.
    if unsafe { libc::poll(standard.as_mut_ptr(), 3, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in standard.iter().filter(|fd| fd.revents & libc::POLLNVAL != 0) {
        // SAFETY: a constant string. The lowest free number is this one: they come in order.
        let opened = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        if opened != fd.fd {
            return Err(io::Error::last_os_error());
        }
    }
    // One heap for all threads. glibc gives each thread one of its own, which costs five system calls
    // and 20 KiB at its first allocation; threads here allocate little, and seldom at the same time
    // (small blocks come from a cache of each thread anyway).
    // SAFETY: sets a number; no other thread runs yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: to ignore a signal runs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    Ok(())
}

/// Gives back the pages of the heap that start-up has used and freed. It keeps what is free at the
/// heap's end by itself only.
pub fn trim_heap() {
    // SAFETY: it takes the heap's own locks, and moves nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
