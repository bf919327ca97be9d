//! A root user of the graph: a guest disk, a job, an export. The only way into it.
//!
//! Owns: a gate, the root edge, what its user does and shares. Never: knows drivers. Threads:
//! I/O from any; everything else on the control thread. Locks: none of its own.

use super::driver::{Extent, Flags, Limits};
use super::gate::Gate;
use super::node::{Edge, Node};
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::Arc;

/// See the module's head. A request takes a ticket, follows the root edge, and is done by the
/// node there; errors are plain [`io::Error`]s (ENOMEDIUM without a node).
pub struct Handle {
    pub(super) gate: Gate,
    pub(super) root: Arc<Edge>,
}

impl Handle {
    fn with<T>(&self, f: impl FnOnce(&Node) -> io::Result<T>) -> io::Result<T> {
        let _ticket = self.gate.enter();
        match self.root.node() {
            Some(node) => f(&node),
            None => Err(io::Error::from_raw_os_error(libc::ENOMEDIUM)),
        }
    }

    /// Length of the disk in bytes; 0 without a medium.
    pub fn len(&self) -> u64 {
        self.with(|n| Ok(n.driver.len())).unwrap_or(0)
    }

    /// True when the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the disk needs and prefers.
    pub fn limits(&self) -> Limits {
        self.with(|n| Ok(n.driver.limits())).unwrap_or_default()
    }

    /// Reads `to.len()` bytes at `off`.
    pub fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.with(|n| n.driver.read(off, to))
    }

    /// Writes all of `from` at `off`.
    pub fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.with(|n| n.driver.write(off, from, flags))
    }

    /// Makes `len` bytes at `off` read as zeroes.
    pub fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.with(|n| n.driver.zero(off, len, flags))
    }

    /// Gives `len` bytes at `off` up; a hint.
    pub fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.with(|n| n.driver.discard(off, len))
    }

    /// Makes all completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.with(|n| n.driver.flush())
    }

    /// What is at `off`.
    pub fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        self.with(|n| n.driver.status(off, len))
    }
}
