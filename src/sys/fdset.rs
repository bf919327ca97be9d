//! Fd sets: numbered groups of open files that stand in for file names (`/dev/fdset/N`).
//!
//! Owns: the descriptors that `add-fd` was given. A duplicate that is in use keeps its set alive;
//! the count is in an `Arc`, so that the user may let go on any thread. Never: knows who uses one.
//! Threads: the sets on one thread (control); a [`SetUse`] anywhere. Locks: none.

use crate::error::{Error, Result};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// All fd sets of the process.
#[derive(Debug, Default)]
pub struct FdSets {
    /// By descending id, as `query-fdsets` shows them.
    sets: Vec<FdSet>,
}

/// One set.
#[derive(Debug)]
pub struct FdSet {
    /// Its number.
    pub id: i64,
    /// Its members in the order in which they came.
    pub fds: Vec<SetFd>,
    users: Arc<()>,
}

/// One member of a set.
#[derive(Debug)]
pub struct SetFd {
    /// The descriptor.
    pub fd: OwnedFd,
    /// What the user who added it wrote beside it.
    pub opaque: Option<String>,
}

/// Says that a duplicate from a set is in use; the set stays until all of these are dropped.
#[derive(Clone, Debug)]
pub struct SetUse {
    _users: Arc<()>,
}

/// The number in `/dev/fdset/N`, if `path` is such a name.
pub fn parse(path: &str) -> Option<i64> {
    let digits = path.strip_prefix("/dev/fdset/")?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

impl FdSets {
    /// No sets.
    pub fn new() -> FdSets {
        FdSets::default()
    }

    /// Drops the sets that have no members and no users.
    fn sweep(&mut self) {
        self.sets.retain(|s| !s.fds.is_empty() || Arc::strong_count(&s.users) > 1);
    }

    fn find(&mut self, id: i64) -> Option<&mut FdSet> {
        self.sets.iter_mut().find(|s| s.id == id)
    }

    /// Adds `fd` to set `id`, which is made if it is not there; without an id to a new set with
    /// the lowest free number. Returns the set's number and the descriptor's.
    pub fn add(&mut self, fd: OwnedFd, id: Option<i64>, opaque: Option<String>) -> Result<(i64, RawFd)> {
        self.sweep();
        let id = match id {
            Some(id) if id < 0 => {
                return Err(Error::new("Parameter 'fdset-id' expects a non-negative value"));
            }
            Some(id) => id,
            // From the lowest number up, the first that is not the next set's.
            None => self.sets.iter().rev().fold(0, |free, s| if s.id == free { free + 1 } else { free }),
        };
        let number = fd.as_raw_fd();
        let member = SetFd { fd, opaque };
        match self.find(id) {
            Some(set) => set.fds.push(member),
            None => {
                let at = self.sets.partition_point(|s| s.id > id);
                self.sets.insert(at, FdSet { id, fds: vec![member], users: Arc::new(()) });
            }
        }
        Ok((id, number))
    }

    /// Closes descriptor `fd` of set `id`, or all of that set.
    pub fn remove(&mut self, id: i64, fd: Option<i64>) -> Result<()> {
        self.sweep();
        let found = match (self.find(id), fd) {
            (None, _) => false,
            (Some(set), None) => {
                set.fds.clear();
                true
            }
            (Some(set), Some(fd)) => {
                let before = set.fds.len();
                set.fds.retain(|m| i64::from(m.fd.as_raw_fd()) != fd);
                set.fds.len() < before
            }
        };
        self.sweep();
        if found {
            return Ok(());
        }
        let name = match fd {
            Some(fd) => format!("fdset-id:{id}, fd:{fd}"),
            None => format!("fdset-id:{id}"),
        };
        Err(Error::new(format!("File descriptor named '{name}' not found")))
    }

    /// The sets, by descending number.
    pub fn list(&mut self) -> &[FdSet] {
        self.sweep();
        &self.sets
    }

    /// A duplicate of the newest member of the set that `path` (`/dev/fdset/N`) names whose access
    /// mode is that of `flags` (`O_RDONLY`, `O_WRONLY` or `O_RDWR`) and that has `O_DIRECT` if
    /// `flags` does. The set lives until the returned [`SetUse`] is dropped. Close-on-exec.
    pub fn dup(&mut self, path: &str, flags: i32) -> Result<(OwnedFd, SetUse)> {
        self.sweep();
        let Some(set) = parse(path).and_then(|id| self.find(id)) else {
            return Err(Error::new(format!("Failed to find fdset {path}")));
        };
        for member in set.fds.iter().rev() {
            let has = status_flags(&member.fd)?;
            // QEMU compares the access mode alone and sets the other flags on the duplicate; but
            // status flags belong to the open file, which the giver shares. O_DIRECT must be there.
            let direct = flags & libc::O_DIRECT != 0;
            if has & libc::O_ACCMODE == flags & libc::O_ACCMODE && (!direct || has & libc::O_DIRECT != 0) {
                let users = set.users.clone();
                let fd = member.fd.try_clone().map_err(|e| {
                    Error::from(e).context(format!("Failed to dup() the given fd in fdset {path}: "))
                })?;
                return Ok((fd, SetUse { _users: users }));
            }
        }
        Err(Error::new(format!("Failed to find file descriptor with matching flags=0x{flags:x}")))
    }
}

fn status_flags(fd: &OwnedFd) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument; the descriptor is open.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

#[cfg(test)]
#[path = "fdset_test.rs"]
mod tests;
