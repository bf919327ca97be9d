//! The checkpoint: the only writer of metadata while an image is in use.
//!
//! Owns: the order in which things reach the disk, and the release of freed clusters. Never:
//! changes what is allocated or mapped. Threads: any (guest flush, a writer who finds the caches
//! full, close), one at a time under the flush lock. Locks: `flush`, then `Meta` for moments.
//!
//! # The order
//!
//! 1. Under `Meta`: share every dirty page, copy the dirty sectors of L1 and refcount table and
//!    the header, take the list of what was freed. Unlock.
//! 2. Write refcount pages. If anything was linked or any refcount was raised since the last time:
//!    **sync**. If the L1 table moved: write it at its new place; **sync**.
//!    If the refcount table changed: write it; **sync**; if it moved, also write the header;
//!    **sync**.
//! 3. Write L2 pages, L1 sectors, header. **Sync** (only left out when the caller does not need
//!    durability and nothing was freed).
//! 4. Under `Meta`: pages that did not change meanwhile are clean. What was freed before 1 is now
//!    unreachable on disk; when the requests that may have looked it up before are over, it is
//!    punched, and only then its refcount is lowered and it may be allocated again.
//!
//! # Why no crash can lose or corrupt anything
//!
//! Let a *pointer* be an L1 or L2 entry, a refcount-table entry or a header field. Syncs are
//! barriers: what was written before one is on disk when what is written after it may be.
//!
//! * *No pointer to data that is not there.* A cluster is linked in memory after its data were
//!   written; the link sets `barrier`; 3 writes only pointers of the copy made in 1; so the sync
//!   of 2 lies between the data and the pointer.
//! * *No pointer to a table that is not there.* A new L2 table is written (as zeroes or as a
//!   copy), or is known to read as zeroes, before it is entered into L1 in memory; a new refcount
//!   block likewise, and its refcounts are written in 2 before the sync that precedes its table
//!   entry; a moved table is written whole before the header that names it. L2 pages and the L1
//!   entry of a new table may reach the disk in either order: the table is good without the pages.
//! * *No pointer to a cluster with refcount 0.* Raising a refcount sets `barrier`; raised
//!   refcounts are in the pages of 2 or were written earlier; the pointer comes in 3.
//! * *A refcount is lowered on disk only after no pointer is left there*: lowering happens in
//!   memory in step 4, behind the sync of 3, and goes to disk with the next checkpoint.
//! * *A cluster is never punched, or written for its next use, while something can reach it*: on
//!   disk by step 3; in memory because its entry was changed before step 1 and requests that read
//!   the entry before that are waited for (two epochs, as in RCU). And never punched after its
//!   reuse, because it is not allocatable until the punch returned.
//! * *Each write is atomic where it must be*: an entry lies in one 512-byte sector, and so do the
//!   header fields that change together (L1 offset and size; refcount table offset and size).
//!   Any mix of old and new sectors within a step is good, for the pointers of a step do not
//!   depend on one another.
//!
//! Hence a crash can only leak: clusters with refcount > references. On failure of any step the
//! dirty state stays, everything taken is put back, and the next checkpoint does all of it again.
//!
//! An in-place write followed by a flush finds nothing dirty and costs one sync.

use super::Qcow2;
use super::corrupt::corrupt;
use super::meta::{Freed, Meta, write_all};
use super::mutant::Mutant;
use crate::block::debug::BlkdebugEvent;
use crate::block::driver::Flags;
use crate::block::node::Node;
use crate::sys::iov::Iov;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

type Pages = Vec<(u64, Arc<[u8]>)>;
type Sectors = Vec<(u64, Vec<u8>)>;

/// What one checkpoint writes: the copy of step 1.
#[derive(Default)]
struct Work {
    refs: Pages,
    l2: Pages,
    reftable: Sectors,
    reftable_moved: bool,
    l1: Sectors,
    l1_moved: bool,
    /// The file's first sector, if the header changed.
    header: Option<Vec<u8>>,
    barrier: bool,
    freed: Vec<Freed>,
    /// Which sectors of L1 and refcount table were taken, to put them back.
    l1_sectors: Vec<usize>,
    reftable_sectors: Vec<usize>,
}

impl Work {
    /// Step 1.
    fn take(meta: &mut Meta) -> Work {
        let mut w = Work {
            refs: meta.refs.snapshot(),
            l2: meta.l2.snapshot(),
            barrier: std::mem::take(&mut meta.barrier),
            freed: std::mem::take(&mut meta.freed),
            reftable_moved: std::mem::take(&mut meta.reftable.moved),
            l1_moved: std::mem::take(&mut meta.l1.moved),
            ..Work::default()
        };
        if std::mem::take(&mut meta.header_dirty) {
            let mut sector = meta.sector.clone();
            meta.header.patch(&mut sector);
            w.header = Some(sector);
        }
        let size = meta.geo.cluster_size();
        w.reftable_sectors = std::mem::take(&mut meta.reftable.dirty).into_iter().collect();
        let at = meta.header.reftable_offset;
        w.reftable = if w.reftable_moved {
            vec![(at, meta.reftable.bytes(u64::from(meta.header.reftable_clusters) * size))]
        } else {
            w.reftable_sectors.iter().map(|s| (at + *s as u64 * 512, meta.reftable.sector(*s))).collect()
        };
        w.l1_sectors = std::mem::take(&mut meta.l1.dirty).into_iter().collect();
        let at = meta.header.l1_offset;
        w.l1 = if w.l1_moved {
            let len = meta.geo.round_up(meta.l1.entries.len() as u64 * 8);
            vec![(at, meta.l1.bytes(len))]
        } else {
            w.l1_sectors.iter().map(|s| (at + *s as u64 * 512, meta.l1.sector(*s))).collect()
        };
        w
    }

    /// After a failure: all of it is still to be done.
    fn put_back(self, meta: &mut Meta) {
        meta.barrier |= self.barrier;
        meta.header_dirty |= self.header.is_some();
        meta.reftable.moved |= self.reftable_moved;
        meta.l1.moved |= self.l1_moved;
        meta.reftable.dirty.extend(self.reftable_sectors);
        meta.l1.dirty.extend(self.l1_sectors);
        let later = std::mem::replace(&mut meta.freed, self.freed);
        meta.freed.extend(later);
    }

    fn has_pointers(&self) -> bool {
        !self.l2.is_empty() || !self.l1.is_empty() || self.header.is_some()
    }
}

impl Qcow2 {
    /// Makes memory's metadata the disk's. With `durable`, everything that was written before the
    /// call is on stable storage afterwards; without, only the order is kept and pages get clean.
    ///
    /// # Errors
    /// The first I/O error; nothing is lost by it, a later call tries again.
    pub(super) fn checkpoint(&self, durable: bool) -> io::Result<()> {
        self.judge(self.checkpoint_once(durable))
    }

    fn checkpoint_once(&self, durable: bool) -> io::Result<()> {
        let arrived = self.started.load(Ordering::SeqCst);
        let _one = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
        if durable && self.finished.load(Ordering::SeqCst) > arrived {
            // One that began after this call came has done it all.
            return Ok(());
        }
        let id = self.started.fetch_add(1, Ordering::SeqCst) + 1;
        let file = self.file()?;
        let work = {
            let mut meta = self.lock();
            if meta.corrupt {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Work::take(&mut meta)
        };
        match self.write_out(&file, &work, durable) {
            Ok(synced) => {
                if synced && durable {
                    self.finished.store(id, Ordering::SeqCst);
                }
                self.settle(&file, work)
            }
            Err(e) => {
                work.put_back(&mut self.lock());
                Err(e)
            }
        }
    }

    /// Syncs the image file and, if there is one, the external data file (first: it holds data).
    fn sync(&self, file: &Node) -> io::Result<()> {
        if let Some(edge) = &self.data_file {
            self.node(edge)?.flush()?;
        }
        file.moment(BlkdebugEvent::FlushToDisk);
        file.flush()
    }

    /// Steps 2 and 3. Answers whether all of it is on stable storage.
    fn write_out(&self, file: &Node, w: &Work, durable: bool) -> io::Result<bool> {
        if !self.has_bug(Mutant::RefcountsLast) {
            write_pages(file, &w.refs, BlkdebugEvent::RefblockUpdatePart)?;
        }
        if w.l1_moved && !self.has_bug(Mutant::HalfMovedTable) {
            if w.barrier {
                // Should an earlier try have failed behind its header, the new place is the active one.
                self.sync(file)?;
            }
            write_sectors(file, &w.l1, BlkdebugEvent::L1GrowWriteTable)?;
        }
        if self.has_bug(Mutant::TableBeforeBlock) {
            write_sectors(file, &w.reftable, BlkdebugEvent::ReftableUpdate)?;
        }
        let mut synced = false;
        // A moved table needs the sync for itself, too: what set `barrier` when it got its place may
        // have gone with an earlier checkpoint.
        let barrier = w.barrier || w.l1_moved && !self.has_bug(Mutant::MovedUnsynced);
        if barrier && !self.has_bug(Mutant::NoBarrier) && (w.has_pointers() || !w.reftable.is_empty()) {
            self.sync(file)?;
            synced = true;
        }
        if !w.reftable.is_empty() {
            let event = match w.reftable_moved {
                true => BlkdebugEvent::RefblockAllocWriteTable,
                false => BlkdebugEvent::RefblockAllocHookup,
            };
            write_sectors(file, &w.reftable, event)?;
            self.sync(file)?;
            if w.reftable_moved {
                file.moment(BlkdebugEvent::RefblockAllocSwitchTable);
                self.write_header(file, w)?;
                self.sync(file)?;
            }
            synced = true;
        }
        if w.has_pointers() {
            write_pages(file, &w.l2, BlkdebugEvent::L2Update)?;
            match w.l1_moved {
                true => file.moment(BlkdebugEvent::L1GrowActivateTable),
                false => write_sectors(file, &w.l1, BlkdebugEvent::L1Update)?,
            }
            self.write_header(file, w)?;
            synced = false;
        }
        if self.has_bug(Mutant::RefcountsLast) {
            self.sync(file)?;
            write_pages(file, &w.refs, BlkdebugEvent::RefblockUpdatePart)?;
        }
        if !synced && (durable || !w.freed.is_empty()) {
            self.sync(file)?;
            synced = true;
        }
        Ok(synced)
    }

    /// Writes the first sector as it was in step 1, if it changed. Under `Meta`, so that the
    /// corrupt bit, which is written out of turn, is not lost.
    fn write_header(&self, file: &Node, w: &Work) -> io::Result<()> {
        let Some(sector) = &w.header else { return Ok(()) };
        let mut meta = self.lock();
        if meta.corrupt {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        file.locked();
        write_all(file, 0, sector)?;
        meta.sector.clone_from(sector);
        Ok(())
    }

    /// Step 4.
    fn settle(&self, file: &Node, work: Work) -> io::Result<()> {
        let mut meta = self.lock();
        meta.refs.written(&work.refs);
        meta.l2.written(&work.l2);
        // A page can have been made clean, or its table be freed: see the head of meta.rs.
        meta.generation += u64::from(work.has_pointers());
        meta.unreachable.extend(work.freed);
        loop {
            if !meta.grace.is_empty() {
                let busy = self.users[meta.grace_epoch].load(Ordering::SeqCst) != 0;
                if busy && !self.has_bug(Mutant::NoGrace) {
                    // Next time: nobody waits for a slow request here.
                    return Ok(());
                }
                let list = std::mem::take(&mut meta.grace);
                drop(meta);
                self.release(file, list)?;
                meta = self.lock();
            }
            // The other counter must be empty before new requests may count in it.
            let busy = self.users[1 - meta.epoch].load(Ordering::SeqCst) != 0;
            if meta.unreachable.is_empty() || (busy && !self.has_bug(Mutant::NoGrace)) {
                return Ok(());
            }
            meta.grace = std::mem::take(&mut meta.unreachable);
            meta.grace_epoch = meta.epoch;
            meta.epoch = 1 - meta.epoch;
        }
    }

    /// A bug for the tests: what was freed just now is released at once.
    pub(super) fn early_free(&self) {
        if self.has_bug(Mutant::EarlyFree)
            && let Ok(file) = self.file()
        {
            let list = std::mem::take(&mut self.lock().freed);
            let _ = self.release(&file, list);
        }
    }

    /// Lowers the refcounts of clusters that nothing can reach through what was freed; punches
    /// those that nothing refers to at all, then lets them be allocated.
    fn release(&self, file: &Node, list: Vec<Freed>) -> io::Result<()> {
        file.moment(BlkdebugEvent::ClusterFree);
        let mut meta = self.lock();
        let mut last: Vec<Freed> = Vec::new();
        for freed in list {
            for k in freed.first..freed.first + freed.count {
                match meta.refcount(file, k) {
                    // Who knows whose it is, and which other refcounts are wrong.
                    Ok(0) => {
                        return Err(corrupt(format!("cluster {k:#x} was in use but has refcount 0")));
                    }
                    Ok(1) => match last.last_mut() {
                        Some(l) if l.first + l.count == k && l.punch == freed.punch => l.count += 1,
                        _ => last.push(Freed { first: k, count: 1, punch: freed.punch }),
                    },
                    Ok(n) => meta.set_refcount(file, k, n - 1)?,
                    // The cluster is leaked: that is the safe side.
                    Err(e) => log::warn!("qcow2: cluster {k:#x} is leaked: {e}"),
                }
            }
        }
        let (geo, bits) = (meta.geo, meta.geo.cluster_bits);
        drop(meta);
        *self.decompressed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let punch = || {
            for l in last.iter().filter(|l| l.punch && self.punch.load(Ordering::Relaxed)) {
                // A hint: a file system that cannot is no error.
                if let Err(e) = file.discard(l.first << bits, l.count << bits) {
                    log::debug!("qcow2: discard in the image file: {e}");
                }
            }
        };
        if !self.has_bug(Mutant::LatePunch) {
            punch();
        }
        let mut meta = self.lock();
        for l in &last {
            for k in l.first..l.first + l.count {
                if meta.tables.remove(&k) {
                    let at = k << bits;
                    meta.l2.forget(at..at + geo.cluster_size(), geo.page_size());
                }
                meta.set_refcount(file, k, 0)?;
            }
            meta.cursor = meta.cursor.min(l.first);
            // It was written, wherever it lies.
            meta.fresh = meta.fresh.max(l.first + l.count);
        }
        drop(meta);
        if self.has_bug(Mutant::LatePunch) {
            std::thread::yield_now();
            punch();
        }
        Ok(())
    }
}

/// Most bytes of one write of pages.
const WRITE_MAX: usize = 1 << 20;

/// Writes pages, adjacent ones together.
fn write_pages(file: &Node, pages: &Pages, event: BlkdebugEvent) -> io::Result<()> {
    let mut rest = pages.as_slice();
    while let [(start, first), ..] = rest {
        let mut iov = Iov::from_slice(first);
        let mut n = 1;
        while let Some((offset, page)) = rest.get(n)
            && *offset == start + iov.len() as u64
            && iov.len() < WRITE_MAX
        {
            iov.push(page);
            n += 1;
        }
        file.moment(event);
        file.write(*start, &iov, Flags::NONE)?;
        rest = &rest[n..];
    }
    Ok(())
}

fn write_sectors(file: &Node, sectors: &Sectors, event: BlkdebugEvent) -> io::Result<()> {
    for (offset, bytes) in sectors {
        file.moment(event);
        write_all(file, *offset, bytes)?;
    }
    Ok(())
}
