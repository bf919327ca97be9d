//! Which parts of a disk are copied, while a guest writes to it: what the filter
//! [`copy-before-write`](super::copy_before_write) and the job above it share.
//!
//! A cluster is copied once, by whoever comes first, the guest or the job. `to_copy` has the clusters
//! that are still to be copied, and `busy` the ranges that somebody is copying: others wait for those,
//! and then find nothing to do. So what the target gets of a cluster was read while no write of it was
//! under way since the filter came. What turns out to need no copy is taken out only where nobody is
//! copying: the next write there waits for nobody, and who copies would find what that wrote.
//!
//! A guest that writes a little has only that copied, in blocks, or it would wait for a whole cluster
//! each time it comes to a new one. `blocks` has these, of clusters that are still to be copied: the
//! job, or other writes, copy the rest. A cluster counts as copied when all of it is.
//!
//! Owns: these books, and the copying itself. Never: decides who copies what when. Threads: any, with a
//! ticket of a handle above the filter. Locks: `busy`, for moments, and never across I/O (who waits for
//! a range waits on a condition variable, with a ticket in hand; who has a range waits for nothing but
//! I/O).

use super::bitmap::Bitmap;
use super::chain;
use super::driver::Flags;
use super::mutant::{Bug, Mutant};
use super::node::{Edge, Node};
use crate::error::Result;
use crate::sys::buf::CopyBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most that is copied in one piece, in bytes.
pub const PIECE: u64 = 1 << 20;

/// The least that a guest's write has copied, in bytes: as pages of memory are, and sectors of disks.
const BLOCK: u64 = 4096;

/// The most blocks of a disk: 4 MiB of bits. Of a disk of more than 128 GiB the blocks are larger.
const MAX_BLOCKS: u64 = 1 << 25;

/// How [`Copies`] are made.
#[derive(Clone, Copy)]
pub struct CopyOptions {
    /// Bytes that are copied together, a power of two: at least the target's clusters, or what they
    /// hold besides would be lost.
    pub cluster: u64,
    /// The target gets all of the disk: what it does not hold in the end may stay so where that reads as
    /// zeroes. Else it may come to lie above another image later, and zeroes must hide what that has.
    pub full: bool,
    /// A guest's write may have a part of a cluster copied. Only if no cluster is left out later on: the
    /// rest of such a cluster is not what the target had there before.
    pub parts: bool,
    /// The target's data are compressed: whole clusters, always.
    pub compress: bool,
    /// A failed copy breaks the copy, not the guest's write (`on-cbw-error=break-snapshot`).
    pub break_snapshot: bool,
}

/// What the filter and the job share. See the module's head.
pub struct Copies {
    pub(super) options: CopyOptions,
    pub(super) source: Arc<Edge>,
    pub(super) target: Arc<Edge>,
    /// Length of the disk when the filter came, in bytes: the copy has no more.
    len: u64,
    to_copy: Arc<Bitmap>,
    /// Which blocks are copied of the clusters in `to_copy`; of other clusters it says nothing.
    blocks: Option<Arc<Bitmap>>,
    /// Clusters of which the target may have got a part when a copy failed.
    torn: Arc<Bitmap>,
    /// Clusters that guests' writes had copied.
    pub(super) done: Arc<Bitmap>,
    /// A guest's write had something copied since somebody last asked.
    helped: AtomicBool,
    busy: Mutex<Busy>,
    freed: Condvar,
    /// Nothing lies behind the target.
    alone: bool,
    /// The copy is no more what the disk was.
    pub(super) broken: AtomicBool,
    pub(super) bug: Bug,
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

/// Bytes of a block of a disk of `len` bytes.
pub(super) fn block_size(len: u64) -> u64 {
    (len / MAX_BLOCKS).next_power_of_two().max(BLOCK)
}

impl Copies {
    /// The books for copying `source`, which goes in at the edge, to `target`: everything is to be copied
    /// at first.
    ///
    /// # Errors
    /// The bitmaps are too large.
    pub(super) fn new(source: &Node, target: &Arc<Node>, options: CopyOptions) -> Result<Copies> {
        let len = source.len();
        let bitmap = |granularity: u64| -> Result<Arc<Bitmap>> {
            let bitmap = Bitmap::new(None, granularity as u32, len)?;
            bitmap.set_enabled(false);
            Ok(bitmap)
        };
        let alone = chain::stands_alone(target);
        let block = block_size(len);
        // What shows through from behind the target would come into the rest of the cluster, which costs
        // more than to copy that.
        let parts = options.parts && alone && !options.compress && block < options.cluster;
        let to_copy = bitmap(options.cluster)?;
        to_copy.mark(0, len);
        Ok(Copies {
            options,
            source: Edge::new("file", None),
            target: Edge::new("target", Some(target.clone())),
            len,
            to_copy,
            blocks: if parts { Some(bitmap(block)?) } else { None },
            torn: bitmap(options.cluster)?,
            done: bitmap(options.cluster)?,
            helped: AtomicBool::new(false),
            busy: Mutex::default(),
            freed: Condvar::new(),
            alone,
            broken: AtomicBool::new(false),
            bug: Bug::here(),
        })
    }

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
    /// may anybody else change them.
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

    /// A guest's write had something copied since this was last asked.
    pub fn take_help(&self) -> bool {
        self.helped.swap(false, Ordering::Relaxed)
    }

    /// A failed copy of a guest's write broke the copy.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Bytes that are copied together for a guest's write.
    pub fn grain(&self) -> u64 {
        self.blocks.as_ref().map_or(self.options.cluster, |blocks| blocks.granularity())
    }

    /// Nothing of `from..end` is still to be copied. A look without the lock is enough: a bit changes
    /// after the copy, and never back.
    pub fn is_copied(&self, from: u64, end: u64) -> bool {
        self.next(from, end, u64::MAX).is_none()
    }

    /// The next run of what nobody has copied in `from..end`, of at most `max` bytes.
    fn next(&self, from: u64, end: u64, max: u64) -> Option<Range<u64>> {
        let mut at = from;
        loop {
            let run = self.to_copy.next_dirty(at, end, max)?;
            let Some(blocks) = &self.blocks else { return Some(run) };
            match blocks.next_clean(run.start, run.end) {
                None => at = run.end,
                Some(first) => {
                    let stop = blocks.next_dirty(first, run.end, BLOCK);
                    return Some(first..stop.map_or(run.end, |copied| copied.start));
                }
            }
        }
    }

    /// The next range in `from..end`, taken as whole grains, that is to be copied, for the caller alone;
    /// waits for those who copy there now.
    fn claim(&self, from: u64, end: u64, grain: u64) -> Option<Claim<'_>> {
        let (from, end) = (from & !(grain - 1), end.next_multiple_of(grain).min(self.len));
        let mut busy = self.lock();
        loop {
            let mut range = match self.bug.is(Mutant::WholeAgain) && grain == self.options.cluster {
                true => self.to_copy.next_dirty(from, end, PIECE.max(grain))?,
                false => self.next(from, end, PIECE.max(grain))?,
            };
            if self.bug.is(Mutant::NoClaimWait) && !busy.ranges.is_empty() {
                return None;
            }
            let first = busy.ranges.iter().filter(|b| b.start < range.end && range.start < b.end);
            match first.map(|b| b.start).min() {
                // up to there it is free
                Some(start) if start > range.start => range.end = start,
                None => {}
                Some(_) => {
                    busy.waiting += 1;
                    busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
                    busy.waiting -= 1;
                    continue;
                }
            }
            busy.ranges.push(range.clone());
            return Some(Claim { copies: self, range });
        }
    }

    /// Copies the next piece of the clusters that `from..end` touches, of what was not copied yet, or
    /// answers `None`. With a ticket in hand.
    pub fn copy_next(&self, from: u64, end: u64) -> Copied<Option<Range<u64>>> {
        self.copy_some(from, end, self.options.cluster)
    }

    /// The same for a guest's write to `from..end`, which waits for no more than it must.
    pub fn copy_for_write(&self, from: u64, end: u64) -> Copied<Option<Range<u64>>> {
        let copied = self.copy_some(from, end, self.grain())?;
        if let Some(range) = &copied {
            self.helped.store(true, Ordering::Relaxed);
            let mut at = range.start;
            while let Some(clean) = self.to_copy.next_clean(at, range.end) {
                let stop = self.to_copy.next_dirty(clean, range.end, BLOCK);
                at = stop.map_or(range.end, |dirty| dirty.start);
                self.done.mark(clean, at - clean);
            }
        }
        Ok(copied)
    }

    fn copy_some(&self, from: u64, end: u64, grain: u64) -> Copied<Option<Range<u64>>> {
        let (source, target) = self.nodes().map_err(CopyError::Target)?;
        let Some(claim) = self.claim(from, end.min(self.len), grain) else { return Ok(None) };
        let range = claim.range.clone();
        let mut at = range.start;
        let mut done = Ok(());
        while at < range.end && done.is_ok() {
            done = self.copy(&source, &target, at, range.end - at).map(|n| at += n);
        }
        if done.is_err() {
            self.torn.mark(at, range.end - at);
        }
        // Before the claim ends: who waited must find nothing to do. Also what was copied before an error:
        // where many fail there would be no end otherwise.
        self.note(&(range.start..at));
        done.map(|()| Some(range))
    }

    /// Takes whole clusters out of what is to be copied, from the start of a range on, up to the first that
    /// must be copied now, for somebody is at it, or was in vain; answers where that is, or the end.
    pub fn leave_out(&self, range: Range<u64>) -> u64 {
        let busy = self.lock();
        let taken = busy.ranges.iter().filter(|b| b.start < range.end && range.start < b.end);
        let taken = taken.map(|b| b.start).min().filter(|_| !self.bug.is(Mutant::LeaveOutTaken));
        let torn = self.torn.next_dirty(range.start, range.end, BLOCK).map(|t| t.start);
        let stop = match taken.into_iter().chain(torn).min() {
            None => range.end,
            Some(at) => (at & !(self.options.cluster - 1)).max(range.start),
        };
        self.to_copy.clear(range.start, stop - range.start);
        stop
    }

    /// Notes that a range is copied.
    fn note(&self, range: &Range<u64>) {
        let size = self.options.cluster;
        let mut at = range.start;
        while at < range.end {
            let start = at & !(size - 1);
            let end = (start + size).min(self.len);
            let stop = range.end.min(end);
            let Some(blocks) = self.blocks.as_ref().filter(|_| (at, stop) != (start, end)) else {
                // so are those behind it, but for the last, perhaps
                let last = if range.end == self.len { range.end } else { range.end & !(size - 1) };
                self.to_copy.clear(start, last - start);
                at = last;
                continue;
            };
            blocks.mark(at, stop - at);
            // Of two who copy the last two blocks one at least sees both.
            if blocks.next_clean(start, end).is_none() || self.bug.is(Mutant::PartIsWhole) {
                self.to_copy.clear(start, end - start);
            }
            at = stop;
        }
    }

    /// Finds out how many bytes from `off` on need no copy, for they are zeroes in the disk and the
    /// target reads as zeroes there, and counts them as copied. Whole clusters; 0: none.
    ///
    /// It claims nothing: what the guest writes meanwhile is copied before, or was; and what says now that
    /// it is zeroes, and is not copied, always was. What was copied of such a cluster is zeroes in the
    /// target, if that says so. Who is copying there now goes on, and is waited for: none is skipped then.
    pub fn skip_zeroes(&self, off: u64) -> Copied<u64> {
        let (source, target) = self.nodes().map_err(CopyError::Target)?;
        let end = self.len;
        // A bit is that of a whole cluster.
        if off >= end || !off.is_multiple_of(self.options.cluster) || !self.options.full {
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
        Ok(self.leave_out(off..stop) - off)
    }

    /// Copies some of `len` bytes at `off`; answers how many.
    fn copy(&self, source: &Node, target: &Node, off: u64, len: u64) -> Copied<u64> {
        let found = chain::contents(source, off, len).map_err(CopyError::Source)?;
        // whole clusters at once, or a compressed one would be written in two pieces
        let cluster = self.options.cluster;
        let stop = match off + found.len.min(len) {
            stop if stop == off + len || stop.is_multiple_of(cluster) => stop,
            stop if stop & !(cluster - 1) > off && found.zero => stop & !(cluster - 1),
            stop => stop.next_multiple_of(cluster).min(off + len),
        };
        let n = stop - off;
        let hide = if self.options.full { Flags::NONE } else { Flags::HIDE };
        if found.zero && n <= found.len {
            if self.stays_zero(target, off, n).map_err(CopyError::Target)? < n {
                target.zero(off, n, Flags::MAY_UNMAP | hide).map_err(CopyError::Target)?;
            }
            return Ok(n);
        }
        let mut buf = CopyBuf::new(n as usize);
        source.read(off, &mut IovMut::from_slice(&mut buf)).map_err(CopyError::Source)?;
        let flags = if self.options.compress { Flags::COMPRESSED } else { Flags::NONE };
        // a target that detects zeroes has to know, too
        target.write(off, &Iov::from_slice(&buf), flags | hide).map_err(CopyError::Target)?;
        Ok(n)
    }

    /// How many of `len` bytes at `off` of the target read as zeroes and will go on doing so. What shows
    /// through from behind it may not: that may be the very disk, or not be there yet.
    fn stays_zero(&self, target: &Node, off: u64, len: u64) -> io::Result<u64> {
        if !self.options.full {
            return Ok(0);
        }
        let found = chain::contents(target, off, len)?;
        let own = found.depth == 1 || (found.depth == 0 && self.alone);
        Ok(if found.zero && own { found.len } else { 0 })
    }
}
