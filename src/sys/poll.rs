//! poll(2) and the signals that end the process, as descriptors.
//!
//! Owns: the system calls. Never: knows who waits. Threads: a [`PollSet`] belongs to one thread.
//! Locks: none.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

/// What one call of poll(2) waits for: filled anew for every turn.
#[derive(Default)]
pub struct PollSet {
    fds: Vec<libc::pollfd>,
    deadline: Option<Instant>,
}

/// Which descriptor of a [`PollSet`], valid until [`PollSet::clear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(usize);

impl PollSet {
    /// Empties the set; keeps its memory.
    pub fn clear(&mut self) {
        self.fds.clear();
        self.deadline = None;
    }

    /// Waits for `events` (`POLLIN`, `POLLOUT`; 0: errors and hang-up only) on `fd`.
    pub fn add(&mut self, fd: RawFd, events: i16) -> Token {
        self.fds.push(libc::pollfd { fd, events, revents: 0 });
        Token(self.fds.len() - 1)
    }

    /// Waits no longer than until `when`; the earliest wins.
    pub fn until(&mut self, when: Instant) {
        self.deadline = Some(self.deadline.map_or(when, |d| d.min(when)));
    }

    /// Waits. A signal ends it early, with nothing ready.
    pub fn wait(&mut self) -> io::Result<()> {
        let timeout = match self.deadline {
            None => -1,
            Some(when) => {
                // Rounded up, so that the deadline has passed when this returns for it.
                let micros = when.saturating_duration_since(Instant::now()).as_micros();
                i32::try_from(micros.div_ceil(1000)).unwrap_or(i32::MAX)
            }
        };
        // SAFETY: the pointer and length are those of one live vector.
        let n = unsafe { libc::poll(self.fds.as_mut_ptr(), self.fds.len() as libc::nfds_t, timeout) };
        if n < 0 {
            self.fds.iter_mut().for_each(|f| f.revents = 0);
            let e = io::Error::last_os_error();
            return if e.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(e) };
        }
        Ok(())
    }

    /// What happened to the descriptor: `POLLIN`, `POLLOUT`, `POLLHUP`, `POLLERR`…; 0 for nothing.
    pub fn ready(&self, token: Token) -> i16 {
        self.fds.get(token.0).map_or(0, |f| f.revents)
    }
}

/// Signals taken from a descriptor instead of by a handler (signalfd(2)).
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks `signals` in this thread, and in all threads started later, and takes them here.
    /// To be called before the first thread is started.
    pub fn block(signals: &[i32]) -> io::Result<Signals> {
        // SAFETY: sigset_t is plain data that sigemptyset initializes; the pointers are to locals;
        // signalfd returns a new descriptor, which nothing else owns.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            signals.iter().for_each(|&s| {
                libc::sigaddset(&mut set, s);
            });
            let rc = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if rc != 0 {
                return Err(io::Error::from_raw_os_error(rc));
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// The next signal that has come, if any.
    pub fn take(&self) -> Option<i32> {
        // SAFETY: a signalfd_siginfo is plain data; the kernel writes at most its size.
        unsafe {
            let mut info: libc::signalfd_siginfo = std::mem::zeroed();
            let size = std::mem::size_of_val(&info);
            let n = libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), size);
            (n == size as isize).then_some(info.ssi_signo as i32)
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
