//! Descriptors that the process was started with.
//!
//! Owns: taking possession of them. Threads: main, before it opens anything. Locks: none.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

static CLAIMED: AtomicBool = AtomicBool::new(false);

/// The descriptors that the process was started with, as the configuration names them.
#[derive(Debug, Default)]
pub struct Inherited(BTreeMap<RawFd, OwnedFd>);

impl Inherited {
    /// Takes possession of all of `numbers`, which the parent process left open, and marks them
    /// close-on-exec. To be called before the process opens anything that stays open; a second call
    /// finds nothing. The error says which of them is not open, or is one of the standard three.
    pub fn claim(numbers: impl IntoIterator<Item = RawFd>) -> Result<Inherited, (RawFd, io::Error)> {
        let mut all = Inherited::default();
        let again = CLAIMED.swap(true, Ordering::SeqCst);
        for n in numbers {
            if all.0.contains_key(&n) {
                continue;
            }
            if n <= 2 || again {
                return Err((n, io::Error::from_raw_os_error(libc::EBADF)));
            }
            // SAFETY: this touches no memory; on a number that is not open it fails.
            if unsafe { libc::fcntl(n, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
                return Err((n, io::Error::last_os_error()));
            }
            // SAFETY: it is open; the process has opened nothing itself, so nothing else owns it;
            // and each number comes here once.
            all.0.insert(n, unsafe { OwnedFd::from_raw_fd(n) });
        }
        Ok(all)
    }

    /// A duplicate of descriptor `n`, for one of those who name it; EBADF for one that was not
    /// claimed. The original is closed when this is dropped.
    pub fn get(&self, n: RawFd) -> io::Result<OwnedFd> {
        match self.0.get(&n) {
            Some(fd) => fd.try_clone(),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }
}
