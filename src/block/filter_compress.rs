//! The driver `compress`: a filter that has everything that is written stored compressed.
//!
//! Requests are made whole clusters of the format below, since only those are compressed.
//!
//! Owns: nothing. Threads: I/O from any. Locks: none.

use super::driver::{Driver, Flags, Limits, Perm};
use super::node::Edge;
use super::open::{Child, Open, Opening};
use crate::bail;
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::Arc;

/// Options of `compress`.
pub struct CompressPlan {
    /// What is filtered.
    pub file: Child,
}

/// See the module's head.
pub struct Compress {
    file: Arc<Edge>,
    limits: Limits,
}

impl Open for CompressPlan {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let file = cx.child("file", self.file, (Perm::NONE, Perm::ALL))?;
        let node = file.need()?;
        if !node.driver.compresses() {
            bail!("Compression is not supported for underlying format: {}", node.driver.name());
        }
        let cluster = node.driver.info().cluster_size.and_then(|n| u32::try_from(n).ok());
        let request_alignment = cluster.filter(|n| n.is_power_of_two()).unwrap_or(1);
        let limits = Limits { request_alignment, memory_alignment: 1, ..node.limits() };
        Ok(Box::new(Compress { file, limits }))
    }
}

impl Driver for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let (n, node) = (to.len() as u64, self.file.need()?);
        let inside = n.min(node.len().saturating_sub(off)) as usize;
        if inside as u64 == n {
            return node.read(off, to);
        }
        // The last cluster may reach beyond the end.
        node.read(off, &mut to.slice(0, inside))?;
        to.fill(inside, to.len() - inside, 0);
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let node = self.file.need()?;
        let inside = (from.len() as u64).min(node.len().saturating_sub(off)) as usize;
        let flags = flags | Flags::COMPRESSED;
        if inside == from.len() || node.driver.grows() {
            return node.write(off, from, flags);
        }
        // What is beyond the end is padding.
        node.write(off, &from.slice(0, inside), flags)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let node = self.file.need()?;
        node.zero(off, len.min(node.len().saturating_sub(off)), flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        let node = self.file.need()?;
        node.discard(off, len.min(node.len().saturating_sub(off)))
    }
}

#[cfg(test)]
#[path = "filter_compress_test.rs"]
mod tests;
