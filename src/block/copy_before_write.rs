//! The filter `copy-before-write`: what a backup puts above a disk, so that its target gets the disk
//! as it was when the filter came.
//!
//! A write of the guest first has the old contents of the clusters it touches copied to the target,
//! those that were not copied yet; then it goes down. A cluster is copied once, by whoever comes
//! first, the guest or the job: [`Copies`] is what they share. `to_copy` has the clusters that are
//! still to be copied, and `busy` the ranges that somebody is copying: others wait for those, and
//! then find nothing to do. So what the target gets of a cluster was read while no write of it was
//! under way since the filter came.
//!
//! Owns: which clusters are copied. Never: knows the job. Threads: I/O from any; whoever copies has
//! a ticket of a handle above the filter. Locks: `busy`, for moments, and never across I/O (who waits
//! for a range waits on a condition variable, with a ticket in hand; who has a range waits for nothing
//! but I/O).

use super::bitmap::Bitmap;
use super::chain;
use super::driver::{Driver, Flags, Perm};
use super::filename::names;
use super::mutant::{Bug, Mutant};
use super::node::{Edge, Node, NodeOptions};
use crate::error::Result;
use crate::sys::buf::CopyBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most that is copied in one piece, in bytes.
pub const PIECE: u64 = 1 << 20;

/// How [`Copies`] are made.
#[derive(Clone, Copy)]
pub struct CopyOptions {
    /// Bytes that are copied together, a power of two: at least the target's clusters, or what they
    /// hold besides would be lost.
    pub cluster: u64,
    /// The target's data are compressed.
    pub compress: bool,
    /// A failed copy breaks the copy, not the guest's write (`on-cbw-error=break-snapshot`).
    pub break_snapshot: bool,
}

/// What the filter and the job share. See the module's head.
pub struct Copies {
    options: CopyOptions,
    source: Arc<Edge>,
    target: Arc<Edge>,
    /// Length of the disk when the filter came, in bytes: the copy has no more.
    len: u64,
    to_copy: Arc<Bitmap>,
    /// What guests' writes had copied.
    done: Arc<Bitmap>,
    busy: Mutex<Busy>,
    freed: Condvar,
    /// Nothing lies behind the target.
    alone: bool,
    /// The copy is no more what the disk was.
    broken: AtomicBool,
    bug: Bug,
}

/// What is being copied.
#[derive(Default)]
struct Busy {
    ranges: Vec<Range<u64>>,
    /// How many threads wait for one of them to go.
    waiting: usize,
}

/// Which side of a copy failed.
#[derive(Debug)]
pub enum CopyError {
    /// Reading the disk.
    Source(io::Error),
    /// Writing the target.
    Target(io::Error),
}

/// What copying answers.
pub type Copied<T> = std::result::Result<T, CopyError>;

impl CopyError {
    /// The error itself.
    pub fn into_io(self) -> io::Error {
        match self {
            CopyError::Source(e) | CopyError::Target(e) => e,
        }
    }
}

/// A range that is being copied; dropping it lets the others at it.
struct Claim<'a> {
    copies: &'a Copies,
    range: Range<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut busy = self.copies.lock();
        busy.ranges.retain(|r| *r != self.range);
        if busy.waiting > 0 {
            self.copies.freed.notify_all();
        }
    }
}

impl Copies {
    fn lock(&self) -> MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are copied together.
    pub fn cluster(&self) -> u64 {
        self.options.cluster
    }

    /// Length of what is copied, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The clusters that are still to be copied: those that are dirty. Only before the guest can come
    /// may anybody set one; clearing one that is not to be copied is always right.
    pub fn to_copy(&self) -> &Arc<Bitmap> {
        &self.to_copy
    }

    /// What is still to be copied, in bytes: whole clusters, as QEMU counts them, also the last.
    pub fn left(&self) -> u64 {
        self.to_copy.count()
    }

    /// The disk below the filter, and the target.
    pub fn nodes(&self) -> io::Result<(Arc<Node>, Arc<Node>)> {
        Ok((self.source.need()?, self.target.need()?))
    }

    /// A failed copy of a guest's write broke the copy.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// The next range in `from..end` that is to be copied, for the caller alone; waits for those who
    /// copy there now.
    fn claim(&self, from: u64, end: u64) -> Option<Claim<'_>> {
        let mut busy = self.lock();
        loop {
            let mut range = self.to_copy.next_dirty(from, end, PIECE.max(self.options.cluster))?;
            // whole clusters, wherever the caller began
            range.start &= !(self.options.cluster - 1);
            range.end = range.end.next_multiple_of(self.options.cluster).min(self.len);
            if self.bug.is(Mutant::NoClaimWait) && !busy.ranges.is_empty() {
                return None;
            }
            let first = busy.ranges.iter().filter(|b| b.start < range.end && range.start < b.end);
            match first.map(|b| b.start).min() {
                None => {
                    busy.ranges.push(range.clone());
                    return Some(Claim { copies: self, range });
                }
                // up to there it is free
                Some(start) if start > range.start => {
                    range.end = start;
                    busy.ranges.push(range.clone());
                    return Some(Claim { copies: self, range });
                }
                Some(_) => {
                    busy.waiting += 1;
                    busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
                    busy.waiting -= 1;
                }
            }
        }
    }

    /// Copies the next piece of what touches `from..end` and was not copied yet, or answers `None`.
    /// With a ticket in hand.
    pub fn copy_next(&self, from: u64, end: u64) -> Copied<Option<Range<u64>>> {
        let (source, target) = self.nodes().map_err(CopyError::Target)?;
        let Some(claim) = self.claim(from, end.min(self.len)) else { return Ok(None) };
        let range = claim.range.clone();
        let mut at = range.start;
        while at < range.end {
            at += self.copy(&source, &target, at, range.end - at)?;
        }
        // before the claim ends: who waited must find nothing to do
        self.to_copy.clear(range.start, range.end - range.start);
        Ok(Some(range))
    }

    /// Finds out how many bytes from `off` on need no copy, for they are zeroes in the disk and the
    /// target reads as zeroes there, and counts them as copied. Whole clusters; 0: none.
    ///
    /// It claims nothing: what the guest writes meanwhile is copied before, or was, and a cluster that
    /// says it is zeroes now, and is not copied, always was.
    pub fn skip_zeroes(&self, off: u64) -> Copied<u64> {
        let (source, target) = self.nodes().map_err(CopyError::Target)?;
        let end = self.len;
        if off >= end {
            return Ok(0);
        }
        let found = chain::contents(&source, off, end - off).map_err(CopyError::Source)?;
        if !found.zero {
            return Ok(0);
        }
        let there = self.stays_zero(&target, off, found.len).map_err(CopyError::Target)?;
        let stop = off + there.min(found.len);
        let stop = if stop >= end { end } else { stop & !(self.options.cluster - 1) };
        if stop <= off {
            return Ok(0);
        }
        self.to_copy.clear(off, stop - off);
        Ok(stop - off)
    }

    /// Copies some of `len` bytes at `off`; answers how many.
    fn copy(&self, source: &Node, target: &Node, off: u64, len: u64) -> Copied<u64> {
        let found = chain::contents(source, off, len).map_err(CopyError::Source)?;
        // whole clusters at once, or a compressed one would be written in two pieces
        let cluster = self.options.cluster;
        let n = match found.len.min(len) {
            n if n == len || n.is_multiple_of(cluster) => n,
            n if n > cluster && found.zero => n - n % cluster,
            n => n.next_multiple_of(cluster).min(len),
        };
        if found.zero && n <= found.len {
            if self.stays_zero(target, off, n).map_err(CopyError::Target)? < n {
                target.zero(off, n, Flags::MAY_UNMAP).map_err(CopyError::Target)?;
            }
            return Ok(n);
        }
        let mut buf = CopyBuf::new(n as usize);
        source.read(off, &mut IovMut::from_slice(&mut buf)).map_err(CopyError::Source)?;
        let flags = if self.options.compress { Flags::COMPRESSED } else { Flags::NONE };
        target.write(off, &Iov::from_slice(&buf), flags).map_err(CopyError::Target)?;
        Ok(n)
    }

    /// How many of `len` bytes at `off` of the target read as zeroes and will go on doing so. What shows
    /// through from behind it may not: that may be the very disk.
    fn stays_zero(&self, target: &Node, off: u64, len: u64) -> io::Result<u64> {
        let found = chain::contents(target, off, len)?;
        let own = found.depth == 1 || (found.depth == 0 && self.alone);
        Ok(if found.zero && own { found.len } else { 0 })
    }
}

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
    let len = source.len();
    let bitmap = || -> Result<Arc<Bitmap>> {
        let bitmap = Bitmap::new(None, options.cluster as u32, len)?;
        bitmap.set_enabled(false);
        Ok(bitmap)
    };
    let (to_copy, done, whole) = (bitmap()?, bitmap()?, bitmap()?);
    to_copy.mark(0, len);
    whole.mark(0, len);
    let copies = Arc::new(Copies {
        options,
        source: Edge::new("file", None),
        target: Edge::new("target", Some(target.clone())),
        len,
        to_copy: to_copy.clone(),
        done: done.clone(),
        busy: Mutex::default(),
        freed: Condvar::new(),
        alone: chain::stands_alone(target),
        broken: AtomicBool::new(false),
        bug: Bug::here(),
    });
    let driver = CopyBeforeWrite { copies: copies.clone(), name: name.to_string() };
    let node = Node::new(name, Box::new(driver), node);
    // As queries of QEMU's filter show them, the newest last.
    for bitmap in [to_copy, done, whole] {
        node.insert_bitmap(bitmap)?;
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
        let end = off.saturating_add(len).min(copies.len);
        let (off, end) = match copies.bug.is(Mutant::PartialCluster) {
            true => (off.next_multiple_of(copies.cluster()), end & !(copies.cluster() - 1)),
            false => (off, end),
        };
        // A look without the lock is enough: bits are only cleared, and that after the copy.
        if off >= end || copies.to_copy.next_dirty(off, end, u64::MAX).is_none() {
            return Ok(());
        }
        loop {
            match copies.copy_next(off, end) {
                Ok(None) => return Ok(()),
                Ok(Some(range)) => copies.done.mark(range.start, range.end - range.start),
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
