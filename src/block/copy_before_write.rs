//! The filter `copy-before-write`: what a backup puts above a disk, so that its target gets the disk
//! as it was when the filter came.
//!
//! A write of the guest first has the old contents of what it touches copied to the target, as far as
//! that was not done yet ([`copies`](super::copies)); then it goes down.
//!
//! Owns: when a guest's write has something copied, and what becomes of it if that fails. Never: knows
//! the job. Threads: I/O from any. Locks: none of its own.

use super::bitmap::Bitmap;
use super::copies::{Copies, CopyOptions};
use super::driver::{Driver, Flags, Perm};
use super::filename::names;
use super::mutant::Mutant;
use super::node::{Edge, Node, NodeOptions};
use crate::error::Result;
use crate::sys::iov::Iov;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// See the module's head. A flush is the disk's alone: the target is flushed when the copy is complete.
pub struct CopyBeforeWrite {
    copies: Arc<Copies>,
    name: String,
}

/// A filter node named `name` with the options `node` that copies to `target` what is written; it is on nothing yet
/// ([`Graph::insert_filter`](super::graph::Graph::insert_filter)). Of `source`, the disk that it is
/// meant for, everything is to be copied at first.
///
/// # Errors
/// The bitmap is too large.
pub fn filter(
    (name, node): (&str, NodeOptions),
    source: &Node,
    target: &Arc<Node>,
    options: CopyOptions,
) -> Result<(Arc<Node>, Arc<Copies>)> {
    let copies = Arc::new(Copies::new(source, target, options)?);
    let whole = Bitmap::new(None, options.cluster as u32, source.len())?;
    whole.set_enabled(false);
    whole.mark(0, source.len());
    let driver = CopyBeforeWrite { copies: copies.clone(), name: name.to_string() };
    let node = Node::new(name, Box::new(driver), node);
    // As queries of QEMU's filter show them, the newest last.
    for bitmap in [copies.to_copy(), &copies.done, &whole] {
        node.insert_bitmap(bitmap.clone())?;
    }
    Ok((node, copies))
}

impl CopyBeforeWrite {
    fn source(&self) -> &Arc<Edge> {
        &self.copies.source
    }

    /// Before `len` bytes at `off` change.
    fn before(&self, off: u64, len: u64) -> io::Result<()> {
        let copies = &self.copies;
        if copies.broken() {
            return Ok(());
        }
        let end = off.saturating_add(len).min(copies.len());
        let grain = copies.grain();
        let (off, end) = match copies.bug.is(Mutant::PartialCluster) {
            true => (off.next_multiple_of(grain), end & !(grain - 1)),
            false => (off, end),
        };
        if off >= end || copies.is_copied(off, end) {
            return Ok(());
        }
        loop {
            match copies.copy_for_write(off, end) {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => {}
                Err(e) if copies.options.break_snapshot => {
                    let e = e.into_io();
                    log::error!(
                        "node '{}': the copy of what was there before a write failed: {e}",
                        self.name
                    );
                    copies.broken.store(true, Ordering::SeqCst);
                    return Ok(());
                }
                Err(e) => return Err(e.into_io()),
            }
        }
    }
}

impl Driver for CopyBeforeWrite {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.source().clone(), self.copies.target.clone()]
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(self.source())
    }

    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "target" {
            // Its backing file may be the very disk that the guest writes to: that must be allowed.
            return (Perm::WRITE, !Perm::RESIZE);
        }
        // Another writer would go past the filter.
        (above.0 | Perm::CONSISTENT_READ, above.1 & !(Perm::WRITE | Perm::RESIZE))
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        if self.copies.bug.is(Mutant::CopyAfterWrite) {
            self.source().need()?.write(off, from, flags)?;
            return self.before(off, from.len() as u64);
        }
        self.before(off, from.len() as u64)?;
        self.source().need()?.write(off, from, flags)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.before(off, len)?;
        self.source().need()?.zero(off, len, flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.before(off, len)?;
        self.source().need()?.discard(off, len)
    }

    fn filename(&self) -> String {
        self.source().node().map(|n| names(&n).shown()).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "copy_before_write_test.rs"]
mod tests;
