//! `struct Meta`: everything that is known about the image's metadata, under one lock.
//!
//! Owns: the header's fields, L1 and refcount table in memory, both page caches, the list of
//! allocations in flight, what was freed and when it may be used again. Never: touches guest
//! data; decides when metadata are written (checkpoint.rs). Threads: any, all under the lock that
//! `Qcow2` has around it. Locks: none of its own.
//!
//! Reading a page that is not in memory is I/O under the lock only for those who change metadata;
//! a look-up says [`Miss::Page`] instead, and its caller reads with the lock released. A page that
//! was read that way is put in only if no checkpoint finished meanwhile (`generation`): otherwise
//! an old version could come after a newer one that was written and dropped.

use super::bitmap_dir::Stored;
use super::cache::{ByOffset, Cache};
use super::corrupt::{Broken, corrupt};
use super::header::Header;
use super::mutant::Mutant;
use super::types::{COPIED, Entry, Geometry, OFFSET_MASK, be64};
use crate::block::debug::BlkdebugEvent;
use crate::block::node::Node;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::IovMut;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// A set of cluster numbers.
pub type Clusters = HashSet<u64, ByOffset>;

/// What a look-up could not do.
#[derive(Debug)]
pub enum Miss {
    /// The L2 page at this file offset is not in memory.
    Page(u64),
    /// The image is corrupt; what is wrong.
    Corrupt(Broken),
}

/// Where a run of guest disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// In the file (or external data file), from this offset on.
    Data(u64),
    /// Reads as zeroes.
    Zero,
    /// In the backing file.
    Unallocated,
    /// In the compressed cluster of that many bytes at that file offset.
    Compressed(u64, u64),
}

/// A table that is held in memory whole (L1, refcount table), and what of it must be written.
#[derive(Default)]
pub struct Table {
    /// The entries as they are on disk.
    pub entries: Vec<u64>,
    /// Sectors (64 entries each) that changed.
    pub dirty: BTreeSet<usize>,
    /// It has a new place, where nothing of it is written yet.
    pub moved: bool,
}

impl Table {
    /// Sets entry `i`.
    pub fn set(&mut self, i: usize, value: u64) {
        self.entries[i] = value;
        self.dirty.insert(i / 64);
    }

    /// Sector `s` as bytes, zeroes beyond the end.
    pub fn sector(&self, s: usize) -> Vec<u8> {
        let mut out = vec![0; 512];
        for (i, e) in self.entries.iter().skip(s * 64).take(64).enumerate() {
            out[i * 8..i * 8 + 8].copy_from_slice(&e.to_be_bytes());
        }
        out
    }

    /// All of it as bytes, filled up with zeroes to `len` bytes.
    pub fn bytes(&self, len: u64) -> Vec<u8> {
        let mut out: Vec<u8> = self.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        out.resize(len as usize, 0);
        out
    }
}

/// Host clusters that lost one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// The first cluster's number.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Give the space back to the file system when nothing refers to them any more.
    pub punch: bool,
}

/// See the module's head.
pub struct Meta {
    /// Sizes and shifts.
    pub geo: Geometry,
    /// The header as it is to be.
    pub header: Header,
    /// The file's first sector as it was last written.
    pub sector: Vec<u8>,
    /// The header's fixed fields changed since.
    pub header_dirty: bool,
    /// The active L1 table.
    pub l1: Table,
    /// The refcount table.
    pub reftable: Table,
    /// Pages of L2 tables.
    pub l2: Cache,
    /// Bytes that `l2` may have, however large the disk becomes.
    pub l2_most: u64,
    /// Pages of refcount blocks.
    pub refs: Cache,
    /// Guest clusters that are being allocated: their data are being written.
    pub in_flight: Vec<Range<u64>>,
    /// How many threads wait for a change of it, or for exclusive use.
    pub waiting: usize,
    /// Freed since the last checkpoint began: still reachable on disk.
    pub freed: Vec<Freed>,
    /// Unreachable on disk; requests that looked before that may still be at them.
    pub unreachable: Vec<Freed>,
    /// As `unreachable`, waiting for the requests of epoch `grace_epoch` to end.
    pub grace: Vec<Freed>,
    /// See `grace`.
    pub grace_epoch: usize,
    /// Which of the two user counters a request counts in (0 or 1).
    pub epoch: usize,
    /// Data were linked, or refcounts raised, since the last checkpoint began: it must sync
    /// before it writes pointers.
    pub barrier: bool,
    /// Counts checkpoints that marked pages clean.
    pub generation: u64,
    /// The directory of stored bitmaps, as it is on disk.
    pub stored: Vec<Stored>,
    /// The header has a bitmaps extension that does not count.
    pub stale_extension: bool,
    /// Clusters that hold metadata: guest data never go there.
    pub tables: Clusters,
    /// Where to look for free clusters first: none is free below (that we know).
    pub cursor: u64,
    /// Every cluster from here on is free or unknown; allocation that finds no hole goes here.
    pub tail: u64,
    /// Clusters from here on were never written: they read as zeroes once the file is that long.
    pub fresh: u64,
    /// Where the next compressed cluster goes: an offset in a cluster that others are in; 0: none.
    pub packing: u64,
    /// The refcounts call nothing free that is in use, as far as was looked (holes.rs).
    pub holes_known: bool,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// Length of the file when it was opened.
    pub opened_len: u64,
    /// A bug that the tests asked for.
    pub bug: Option<Mutant>,
    /// When unused pages were last given up.
    pub cleaned: Instant,
    /// Someone has, or waits for, the image for himself: requests wait.
    pub exclusive: bool,
    /// The image was found corrupt: nothing may be written any more.
    pub corrupt: bool,
    /// Whoever wants to know has been told that the image is corrupt.
    pub signaled: bool,
}

impl Meta {
    /// True when the tests asked for this bug. Never in a release build.
    pub fn has_bug(&self, mutant: Mutant) -> bool {
        cfg!(debug_assertions) && self.bug == Some(mutant)
    }

    /// Where the page and the entry of guest cluster `c` in the L2 table at `table` are: page's
    /// file offset, byte in the page.
    pub fn l2_place(&self, table: u64, c: u64) -> (u64, usize) {
        let byte = self.geo.l2_index(c) << self.geo.entry_bits();
        let page = self.geo.page_size();
        (table + (byte & !(page - 1)), (byte & (page - 1)) as usize)
    }

    /// The offset of the L2 table of guest cluster `c`, if there is one, and whether it is ours
    /// alone.
    fn l2_table(&self, c: u64) -> Result<Option<(u64, bool)>, Miss> {
        let index = self.geo.l1_index(c);
        let Some(&entry) = usize::try_from(index).ok().and_then(|i| self.l1.entries.get(i)) else {
            return Ok(None);
        };
        let table = entry & OFFSET_MASK;
        if table == 0 {
            return Ok(None);
        }
        if table & (self.geo.cluster_size() - 1) != 0 {
            let why = format!("L2 table offset {table:#x} unaligned (L1 index: {index:#x})");
            return Err(Miss::Corrupt(why.into()));
        }
        if table.saturating_add(self.geo.cluster_size()) > self.geo.round_up(self.file_len) {
            let why =
                format!("L2 table offset {table:#x} is beyond the end of the file (L1 index: {index:#x})");
            return Err(Miss::Corrupt(why.into()));
        }
        Ok(Some((table, entry & COPIED != 0)))
    }

    /// True when an L2 table is (or, in a corrupt image, seems to be) there for guest cluster `c`.
    pub fn has_l2(&self, c: u64) -> bool {
        !matches!(self.l2_table(c), Ok(None))
    }

    /// Where the disk from byte `off` on is: a run of at least 1 and at most `len` bytes that is
    /// in one piece, or in one state.
    pub fn lookup(&mut self, off: u64, len: u64) -> Result<(Map, u64), Miss> {
        let geo = self.geo;
        let c = geo.cluster(off);
        let Some((table, _)) = self.l2_table(c)? else {
            // All of this table's part of the disk is unallocated.
            let shift = geo.cluster_bits + geo.l2_bits();
            let next = ((off >> shift) + 1) << shift;
            return Ok((Map::Unallocated, len.min(next - off)));
        };
        let (offset, mut at) = self.l2_place(table, c);
        let page = self.l2.get(offset).ok_or(Miss::Page(offset))?;
        let (mut pos, end) = (off, off + len);
        let mut run: Option<Map> = None;
        let mut cluster = c;
        while at < page.len() {
            // Most of a large disk is entries that say nothing, and who looks for data passes them all.
            if matches!(run, None | Some(Map::Unallocated)) {
                let words = geo.entry_bits() - 3;
                let most = (geo.clusters(pos, end - pos).end - cluster) << words;
                let rest = page[at..].chunks_exact(8).take(most as usize);
                let blank = rest.take_while(|word| **word == [0; 8]).count() >> words;
                if blank > 0 {
                    run = Some(Map::Unallocated);
                    cluster += blank as u64;
                    at += blank << geo.entry_bits();
                    pos = end.min(cluster << geo.cluster_bits);
                    if pos == end {
                        break;
                    }
                    continue;
                }
            }
            let entry = decode(&geo, page, at, cluster)?;
            if let Some((from, bytes)) = entry.compressed {
                if run.is_some() {
                    break;
                }
                let stop = end.min((cluster + 1) << geo.cluster_bits);
                return Ok((Map::Compressed(from, bytes), stop - off));
            }
            let stop = end.min((cluster + 1) << geo.cluster_bits);
            while pos < stop {
                let bit = 1u32 << (geo.in_cluster(pos) >> geo.unit_bits());
                let here = if entry.data & bit != 0 {
                    Map::Data(entry.host.unwrap_or(0) + geo.in_cluster(pos))
                } else if entry.zero & bit != 0 {
                    Map::Zero
                } else {
                    Map::Unallocated
                };
                let fits = match (run, here) {
                    (None, _) => true,
                    (Some(Map::Data(first)), Map::Data(now)) => first + (pos - off) == now,
                    (Some(was), now) => was == now,
                };
                if !fits {
                    return Ok((run.unwrap_or(here), pos - off));
                }
                run = run.or(Some(here));
                pos = stop.min((pos | (geo.unit_size() - 1)) + 1);
            }
            if pos == end {
                break;
            }
            cluster += 1;
            at += 1 << geo.entry_bits();
        }
        Ok((run.unwrap_or(Map::Unallocated), pos - off))
    }

    /// How much of the disk from `off` on may be written in place, and where; `None` when the
    /// first byte may not.
    pub fn lookup_in_place(&mut self, off: u64, len: u64) -> Result<Option<(u64, u64)>, Miss> {
        let geo = self.geo;
        let c = geo.cluster(off);
        let Some((table, true)) = self.l2_table(c)? else { return Ok(None) };
        let (offset, mut at) = self.l2_place(table, c);
        let page = self.l2.get(offset).ok_or(Miss::Page(offset))?;
        let (mut pos, end) = (off, off + len);
        let mut first = None;
        let mut cluster = c;
        'page: while at < page.len() && pos < end {
            let entry = decode(&geo, page, at, cluster)?;
            let Some(host) = entry.host.filter(|_| entry.copied || geo.external) else { break };
            let start = *first.get_or_insert(host + geo.in_cluster(off));
            if start + (pos - off) != host + geo.in_cluster(pos) {
                break;
            }
            if !geo.external && (host == 0 || self.tables.contains(&geo.cluster(host))) {
                let inside = host + geo.in_cluster(pos);
                let n = (end - pos).min(geo.cluster_size() - geo.in_cluster(pos));
                return Err(Miss::Corrupt(self.overlap(&(inside..inside + n))));
            }
            let stop = end.min((cluster + 1) << geo.cluster_bits);
            while pos < stop {
                if entry.data & (1 << (geo.in_cluster(pos) >> geo.unit_bits())) == 0 {
                    break 'page;
                }
                pos = stop.min((pos | (geo.unit_size() - 1)) + 1);
            }
            cluster += 1;
            at += 1 << geo.entry_bits();
        }
        Ok(first.filter(|_| pos > off).map(|host| (host, pos - off)))
    }

    /// The entry of guest cluster `c`, loading its page if need be.
    pub fn entry(&mut self, file: &Node, c: u64) -> io::Result<Entry> {
        let Some((table, _)) = self.l2_table(c).map_err(|m| self.broken(m))? else {
            return Ok(Entry::default());
        };
        let (offset, at) = self.l2_place(table, c);
        self.load_l2(file, offset)?;
        let geo = self.geo;
        let entry = match self.l2.get(offset) {
            Some(page) => decode(&geo, page, at, c),
            None => Err(Miss::Page(offset)),
        };
        entry.map_err(|m| self.broken(m))
    }

    /// Changes the entry of guest cluster `c`, whose L2 table is there and ours.
    pub fn set_entry(&mut self, file: &Node, c: u64, entry: &Entry) -> io::Result<()> {
        self.set_words(file, c, self.geo.encode(entry))
    }

    /// As [`Meta::set_entry`], with the words as they are on disk.
    pub fn set_words(&mut self, file: &Node, c: u64, words: (u64, u64)) -> io::Result<()> {
        let Some((table, true)) = self.l2_table(c).map_err(|m| self.broken(m))? else {
            return Err(io::Error::other("qcow2: an L2 table that was prepared is gone"));
        };
        let (offset, at) = self.l2_place(table, c);
        self.load_l2(file, offset)?;
        if let Some(page) = self.l2.get_mut(offset) {
            page[at..at + 8].copy_from_slice(&words.0.to_be_bytes());
            if self.geo.extended {
                page[at + 8..at + 16].copy_from_slice(&words.1.to_be_bytes());
            }
        }
        Ok(())
    }

    /// Sees to it that the L2 page at `offset` is in memory.
    pub fn load_l2(&mut self, file: &Node, offset: u64) -> io::Result<()> {
        if !self.l2.has(offset) {
            file.moment_locked(BlkdebugEvent::L2Load);
            let page = read_page(file, offset, self.geo.page_size())?;
            self.l2.insert(offset, page);
        }
        Ok(())
    }

    /// How many L2 pages are to be read at once where the one at `offset` is missing. Who walks through a
    /// table, as jobs do through a large and sparse disk, gets the rest of it, or as much as is read at
    /// about the price of one page; others that page alone, for they may need no more of it.
    pub fn ahead(&self, offset: u64) -> u64 {
        let (page, table) = (self.geo.page_size(), self.geo.cluster_size());
        let at = offset & (table - 1);
        if at == 0 || !self.l2.has(offset - page) {
            return 1;
        }
        let most = ((table - at) / page).min(AHEAD / page).min(self.l2.capacity() as u64 / 2);
        (1..most).find(|n| self.l2.has(offset + n * page)).unwrap_or(most).max(1)
    }

    /// Sees to it that guest cluster `c` has an L2 table that may be changed: makes a new one, or
    /// copies one that a snapshot shares. Nothing on disk points to it before the checkpoint.
    pub fn ensure_l2(&mut self, file: &Node, c: u64) -> io::Result<()> {
        let (index, size) = (self.geo.l1_index(c) as usize, self.geo.cluster_size());
        match self.l2_table(c).map_err(|m| self.broken(m))? {
            Some((_, true)) => Ok(()),
            None => {
                if index >= self.l1.entries.len() {
                    return Err(io::Error::other("qcow2: the L1 table is too small"));
                }
                let table = self.alloc_table(file)?;
                // Saves reading what is known to be zeroes.
                let (offset, _) = self.l2_place(table, c);
                self.l2.insert(offset, vec![0; self.geo.page_size() as usize].into());
                self.l1.set(index, table | COPIED);
                Ok(())
            }
            Some((old, false)) => {
                file.moment_locked(BlkdebugEvent::L2AllocCowRead);
                let mut copy = Vec::with_capacity(size as usize);
                for offset in (old..old + size).step_by(self.geo.page_size() as usize) {
                    self.load_l2(file, offset)?;
                    copy.extend_from_slice(self.l2.get(offset).unwrap_or(&[]));
                }
                let table = self.alloc_table(file)?;
                file.moment_locked(BlkdebugEvent::L2AllocWrite);
                write_all(file, table, &copy).inspect_err(|_| self.free(table, 1, false))?;
                self.l1.set(index, table | COPIED);
                self.free(old, 1, false);
                Ok(())
            }
        }
    }

    /// A cluster for a table, reading as zeroes.
    fn alloc_table(&mut self, file: &Node) -> io::Result<u64> {
        let (first, _, fresh) = self.alloc_run(file, 1)?;
        let offset = first << self.geo.cluster_bits;
        file.moment_locked(BlkdebugEvent::L2AllocWrite);
        if !fresh
            && !self.has_bug(Mutant::DirtyTable)
            && let Err(e) = write_zeroes(file, offset, self.geo.cluster_size())
        {
            self.free(offset, 1, false);
            return Err(e);
        }
        self.l2.forget(offset..offset + self.geo.cluster_size(), self.geo.page_size());
        self.tables.insert(first);
        self.barrier = true;
        Ok(offset)
    }

    /// Notes that `count` host clusters from file offset `offset` on lost a reference. They stay
    /// allocated until nothing on disk, and no request, can reach them.
    pub fn free(&mut self, offset: u64, count: u64, punch: bool) {
        let first = self.geo.cluster(offset);
        if (first..first + count).contains(&self.geo.cluster(self.packing)) {
            // Its last reference may be on the list: it must not get another.
            self.packing = 0;
        }
        if let Some(last) = self.freed.last_mut()
            && last.first + last.count == first
            && last.punch == punch
        {
            last.count += count;
            return;
        }
        self.freed.push(Freed { first, count, punch });
    }

    /// Before `entry` is changed so that what it points to loses a reference.
    ///
    /// # Errors
    /// Corruption: metadata are there, which no entry may set free.
    pub fn may_free(&self, entry: &Entry) -> io::Result<()> {
        // A compressed cluster may claim more sectors than it needs, whatever follows.
        let at = match (entry.compressed, entry.host) {
            (Some((offset, _)), _) => offset,
            (None, Some(host)) if !self.geo.external => host,
            _ => return Ok(()),
        };
        if !self.tables.contains(&self.geo.cluster(at)) {
            return Ok(());
        }
        let start = at - self.geo.in_cluster(at);
        Err(corrupt(self.overlap(&(start..start + self.geo.cluster_size()))))
    }

    /// Notes that what `entry` points to lost a reference. [`Meta::may_free`] has been asked before.
    pub fn free_entry(&mut self, entry: &Entry, punch: bool) {
        if let Some((offset, bytes)) = entry.compressed {
            let clusters = self.geo.clusters(offset, bytes);
            let first = clusters.start << self.geo.cluster_bits;
            self.free(first, clusters.end - clusters.start, punch);
        } else if let Some(host) = entry.host
            && !self.geo.external
        {
            self.free(host, 1, punch);
        }
    }

    /// True when one of the guest clusters in `range` is being allocated.
    pub fn is_in_flight(&self, range: &Range<u64>) -> bool {
        self.in_flight.iter().any(|r| r.start < range.end && range.start < r.end)
    }

    /// An allocation of exactly this range is over.
    pub fn landed(&mut self, range: &Range<u64>) {
        if let Some(i) = self.in_flight.iter().position(|r| r == range) {
            self.in_flight.swap_remove(i);
        }
    }

    /// What to return for a miss where pages are loaded under the lock: only corruption is left.
    pub fn broken(&self, miss: Miss) -> io::Error {
        match miss {
            Miss::Page(_) => io::Error::from_raw_os_error(libc::EIO),
            Miss::Corrupt(why) => corrupt(why),
        }
    }
}

fn decode(geo: &Geometry, page: &[u8], at: usize, c: u64) -> Result<Entry, Miss> {
    let bitmap = if geo.extended { be64(page, at + 8) } else { 0 };
    let entry = geo.decode(be64(page, at), bitmap).map_err(|why| {
        let guest = c << geo.cluster_bits;
        Miss::Corrupt(format!("{why} (guest offset: {guest:#x})").into())
    })?;
    if geo.external && entry.host.is_some_and(|h| h != c << geo.cluster_bits) {
        let guest = c << geo.cluster_bits;
        let why =
            format!("External data file host cluster offset does not match guest cluster offset: {guest:#x}");
        return Err(Miss::Corrupt(why.into()));
    }
    Ok(entry)
}

/// Reads at `offset`; what lies beyond the end of the file reads as zeroes.
pub fn read_padded(file: &Node, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let have = file.len().saturating_sub(offset).min(buf.len() as u64) as usize;
    if have > 0 {
        file.read(offset, &mut IovMut::from_slice(&mut buf[..have]))?;
    }
    buf[have..].fill(0);
    Ok(())
}

/// The most that is read of an L2 table at once, in bytes.
const AHEAD: u64 = 64 << 10;

/// Reads `count` adjacent pages of metadata.
pub fn read_pages(file: &Node, offset: u64, size: u64, count: u64) -> io::Result<Vec<Arc<[u8]>>> {
    let mut all = AlignedBuf::new((size * count) as usize, 4096);
    read_padded(file, offset, &mut all)?;
    Ok(all.chunks_exact(size as usize).map(Arc::from).collect())
}

/// Reads a page of metadata.
pub fn read_page(file: &Node, offset: u64, size: u64) -> io::Result<Arc<[u8]>> {
    let mut page = vec![0; size as usize];
    read_padded(file, offset, &mut page)?;
    Ok(page.into())
}

/// Writes all of `bytes` at `offset`.
pub fn write_all(file: &Node, offset: u64, bytes: &[u8]) -> io::Result<()> {
    use crate::block::driver::Flags;
    use crate::sys::iov::Iov;
    file.write(offset, &Iov::from_slice(bytes), Flags::NONE)
}

/// A piece of zeroes to write from.
pub static ZEROES: [u8; 65536] = [0; 65536];

/// Makes `len` bytes at `offset` read as zeroes, quickly if the file can.
pub fn write_zeroes(file: &Node, offset: u64, len: u64) -> io::Result<()> {
    use crate::block::driver::Flags;
    if len > ZEROES.len() as u64 && file.zero(offset, len, Flags::NO_FALLBACK).is_ok() {
        return Ok(());
    }
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZEROES.len() as u64);
        write_all(file, offset + done, &ZEROES[..n as usize])?;
        done += n;
    }
    Ok(())
}
