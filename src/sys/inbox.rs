//! A queue into a poll(2) loop: any thread posts, one thread polls the descriptor and takes.
//!
//! Threads: any posts; one takes. Locks: its own mutex, a leaf (nothing is called under it).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// The queue and the eventfd that is readable while something is in it.
#[derive(Debug)]
pub struct Inbox<T> {
    queue: Mutex<VecDeque<T>>,
    wake: EventFd,
}

impl<T> Inbox<T> {
    /// An empty inbox. Fails only when the process has no file descriptor left.
    pub fn new() -> io::Result<Inbox<T>> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Inbox { queue: Mutex::new(VecDeque::new()), wake })
    }

    /// Adds `item` and wakes the poll loop. Never blocks for longer than a push.
    pub fn post(&self, item: T) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let first = queue.is_empty();
        queue.push_back(item);
        drop(queue);
        if first {
            // It can fail only with EAGAIN at 2^64 - 2 posts; then it is readable anyway.
            let _ = self.wake.write(1);
        }
    }

    /// Takes all that is there, oldest first.
    pub fn take(&self) -> VecDeque<T> {
        // Drained first: a post after this leaves the descriptor readable.
        let _ = self.wake.read();
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> AsRawFd for Inbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn posts_arrive_in_order_and_wake_the_poller() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let other = inbox.clone();
        let t = std::thread::spawn(move || (0..100).for_each(|n| other.post(n)));
        let mut got = Vec::new();
        while got.len() < 100 {
            let mut fd = libc::pollfd { fd: inbox.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            assert_eq!(unsafe { libc::poll(&mut fd, 1, 5000) }, 1, "no wake-up");
            got.extend(inbox.take());
        }
        t.join().unwrap();
        assert_eq!(got, (0..100).collect::<Vec<_>>());
    }
}
