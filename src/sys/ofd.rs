//! Open file descriptions: another one of the same file, and locks on their single bytes.
//!
//! Owns: the system calls. Threads: any. Locks: none.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What [`byte`] does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Takes a shared lock.
    Lock,
    /// Lets go of it.
    Unlock,
    /// Looks whether another open file description holds a lock there.
    Look,
}

/// Locks, unlocks or looks at the byte `at` of the file (F_OFD_SETLK, F_OFD_GETLK). True, for
/// [`Op::Look`], when somebody else holds a lock there. Never waits; EAGAIN when refused.
pub fn byte(fd: &OwnedFd, at: i64, op: Op) -> io::Result<bool> {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    let (kind, command) = match op {
        Op::Lock => (libc::F_RDLCK, libc::F_OFD_SETLK),
        Op::Unlock => (libc::F_UNLCK, libc::F_OFD_SETLK),
        Op::Look => (libc::F_WRLCK, libc::F_OFD_GETLK),
    };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at;
    lock.l_len = 1;
    loop {
        // SAFETY: a valid flock, which F_OFD_GETLK writes to.
        if unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut lock) } == 0 {
            return Ok(op == Op::Look && lock.l_type != libc::F_UNLCK as libc::c_short);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Another open file description of the file that `fd` has open, with `flags` (access mode,
/// O_DIRECT). By descriptor, not by name: the name may be another file by now. Needs /proc.
pub fn reopen(fd: &OwnedFd, flags: i32) -> io::Result<OwnedFd> {
    let path = CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    // SAFETY: a NUL-terminated path; the result is checked.
    let new = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
