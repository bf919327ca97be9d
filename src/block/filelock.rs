//! Image locks, as QEMU and qemu-img take them: open-file-description locks on single bytes.
//!
//! For each permission a process uses, it holds a shared lock on byte 100 + its bit; for each it
//! does not let others use, one on byte 200 + its bit. Whoever wants a permission looks for a lock
//! on the other byte. (All locks are shared ones: two users of a permission do not exclude each
//! other, and the look is F_OFD_GETLK with an exclusive one.)
//!
//! Owns: a second open file of the image, which does nothing but hold the locks: the data
//! descriptor can be exchanged without letting go of them. Threads: control. Locks: none (atomics
//! make it `Sync`).

use super::driver::Perm;
use super::file_open::OnOffAuto;
use super::perm::NAMES;
use crate::error::{Result, strerror};
use crate::sys::ofd::{Op, byte, reopen};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

const USES: i64 = 100;
const UNSHARED: i64 = 200;

/// See the module's head.
pub(super) struct Locks {
    /// `None`: not locked (`locking=off`, or the host cannot).
    fd: Option<OwnedFd>,
    path: String,
    uses: AtomicU8,
    shares: AtomicU8,
}

impl Locks {
    /// No lock yet, on the file that `fd` has open; `path` is for messages.
    pub(super) fn new(fd: &OwnedFd, path: &str, wanted: OnOffAuto) -> Result<Locks> {
        let mut locks = Locks {
            fd: None,
            path: path.to_string(),
            uses: AtomicU8::new(0),
            shares: AtomicU8::new(Perm::ALL.0),
        };
        if wanted == OnOffAuto::Off {
            return Ok(locks);
        }
        let own = reopen(fd, libc::O_RDONLY).or_else(|_| fd.try_clone())?;
        match byte(&own, USES, Op::Look) {
            Ok(_) => locks.fd = Some(own),
            Err(e) if wanted == OnOffAuto::On => {
                crate::bail!("'{path}' cannot be locked: {}", strerror(&e));
            }
            Err(e) => log::warn!("'{path}' is not locked: {}", strerror(&e)),
        }
        Ok(locks)
    }

    /// What is held: (uses, shares).
    pub(super) fn held(&self) -> (Perm, Perm) {
        (Perm(self.uses.load(Ordering::Relaxed)), Perm(self.shares.load(Ordering::Relaxed)))
    }

    /// Takes what `uses` and `shares` need and lets go of the rest. On an error (QEMU's text) all
    /// is as it was.
    pub(super) fn set(&self, uses: Perm, shares: Perm) -> io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let old = self.held();
        // First more, then the look at the others (two that do the same at once see each other),
        // then less.
        let more = (uses | old.0, shares & old.1);
        let taken = self.apply(fd, more.0, more.1, false).and_then(|()| self.look(fd, uses, shares));
        if let Err(e) = taken {
            if let Err(e) = self.apply(fd, old.0, old.1, true) {
                log::warn!("'{}': {}", self.path, strerror(&e));
            }
            return Err(e);
        }
        self.uses.store(uses.0, Ordering::Relaxed);
        self.shares.store(shares.0, Ordering::Relaxed);
        self.apply(fd, uses, shares, true)
    }

    fn apply(&self, fd: &OwnedFd, uses: Perm, shares: Perm, let_go: bool) -> io::Result<()> {
        for (bit, (perm, _)) in (0i64..).zip(NAMES) {
            for (at, wanted) in [(USES + bit, uses.contains(perm)), (UNSHARED + bit, !shares.contains(perm))]
            {
                let op = match wanted {
                    true => Op::Lock,
                    false if let_go => Op::Unlock,
                    false => continue,
                };
                byte(fd, at, op).map_err(|e| {
                    let why = strerror(&e);
                    io::Error::new(e.kind(), format!("Failed to lock byte {at}: {why}"))
                })?;
            }
        }
        Ok(())
    }

    fn look(&self, fd: &OwnedFd, uses: Perm, shares: Perm) -> io::Result<()> {
        let refuse = |text: String| {
            // QEMU prints the second half as a hint that does not travel over QMP.
            log::warn!("{text}: Is another process using the image [{}]?", self.path);
            Err(io::Error::new(io::ErrorKind::WouldBlock, text))
        };
        for (bit, (perm, name)) in (0i64..).zip(NAMES) {
            if uses.contains(perm) && byte(fd, UNSHARED + bit, Op::Look)? {
                return refuse(format!("Failed to get \"{name}\" lock"));
            }
        }
        for (bit, (perm, name)) in (0i64..).zip(NAMES) {
            if !shares.contains(perm) && byte(fd, USES + bit, Op::Look)? {
                return refuse(format!("Failed to get shared \"{name}\" lock"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "filelock_test.rs"]
mod tests;
