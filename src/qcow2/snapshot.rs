//! Internal snapshots: list, create, apply, delete.
//!
//! Owns: the snapshot table, and the order of these operations. Never: lowers a refcount itself
//! (what loses a reference goes the way of everything freed). Threads: the control thread; each
//! operation has the image for itself. Locks: `meta` for moments, `flush` in its checkpoints.
//!
//! # The order
//!
//! A snapshot changes refcounts and COPIED flags of all the disk, which no single write can do:
//! between the two, `qemu-img check` calls one or the other an error, with QEMU's own order as
//! with any. So in version 3 images the dirty bit is set, durably, before the first change and
//! cleared with the last: who opens the image after a crash in between rebuilds both from the
//! tables (this driver and QEMU do). In version 2, which has no dirty bit, such a crash in create or
//! delete leaves an
//! image that a check complains of and repairs (tests/qcow2_snapshot.rs looks at every such state,
//! and at those of QEMU's own order); no data are at risk, because
//!
//! * create: refcounts are raised, then flags cleared, then the header names the new snapshot:
//!   before that write nothing refers to the snapshot, and after it every cluster that it has is
//!   counted twice and none is written in place;
//! * delete: the header drops the snapshot first; what only it used is leaked until it is freed;
//! * apply: references of the snapshot's tables are raised, then one header write makes a copy
//!   of its L1 table the active one, then the old tables lose theirs. The flags of the new active
//!   tables are clear until the end, which costs a copy too many at worst.
//!
//! Whatever fails on the way is undone, or, when it has taken effect already, brought to its end,
//! by rebuilding the refcounts as at the opening of a dirty image. An error means: as before.

use super::corrupt::corrupt;
use super::header::{INCOMPAT_DIRTY, MAX_L1_BYTES};
use super::meta::{Clusters, Meta, read_padded, write_all};
use super::mutant::Mutant;
use super::types::{COPIED, OFFSET_MASK, be32, be64};
use super::{Exclusive, Qcow2};
use crate::block::driver::Snapshot;
use crate::block::node::Node;
use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;

/// Longest id or name in bytes.
const MAX_TEXT: usize = u16::MAX as usize;
/// Largest snapshot table in bytes (QEMU: 1024 bytes for each of 65536 snapshots).
const MAX_TABLE: u64 = 64 << 20;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    l1_offset: u64,
    l1_size: u32,
    info: Snapshot,
    /// Extra data that this driver does not know.
    unknown: Vec<u8>,
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Entry {
    /// The entry at the beginning of `bytes`, and its length.
    fn parse(bytes: &[u8], disk_size: u64) -> Option<(Entry, usize)> {
        let fixed = bytes.get(..40)?;
        let id_len = (be32(fixed, 12) >> 16) as usize;
        let name_len = (be32(fixed, 12) & 0xffff) as usize;
        let extra_len = be32(fixed, 36) as usize;
        let extra = bytes.get(40..)?.get(..extra_len)?;
        let id = bytes.get(40 + extra_len..)?.get(..id_len)?;
        let name = bytes.get(40 + extra_len + id_len..)?.get(..name_len)?;
        let word = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
        let vm_clock = be64(fixed, 24);
        let entry = Entry {
            l1_offset: be64(fixed, 0),
            l1_size: be32(fixed, 8),
            info: Snapshot {
                id: String::from_utf8_lossy(id).into_owned(),
                name: String::from_utf8_lossy(name).into_owned(),
                date_sec: be32(fixed, 16),
                date_nsec: be32(fixed, 20),
                vm_clock_nsec: vm_clock,
                vm_state_size: word(0).unwrap_or(u64::from(be32(fixed, 32))),
                disk_size: word(8).unwrap_or(disk_size),
                icount: word(16).filter(|n| *n != u64::MAX),
            },
            unknown: extra.get(24..).unwrap_or(&[]).to_vec(),
        };
        Some((entry, (40 + extra_len + id_len + name_len).next_multiple_of(8)))
    }

    /// What a user sees of it.
    pub(super) fn into_info(self) -> Snapshot {
        self.info
    }

    fn write(&self, out: &mut Vec<u8>) {
        let s = &self.info;
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        // Checked to fit when the snapshot was made; read from 16 bits else.
        out.extend_from_slice(&(s.id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(s.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&s.date_sec.to_be_bytes());
        out.extend_from_slice(&s.date_nsec.to_be_bytes());
        out.extend_from_slice(&s.vm_clock_nsec.to_be_bytes());
        let small = u32::try_from(s.vm_state_size).unwrap_or(0);
        out.extend_from_slice(&small.to_be_bytes());
        out.extend_from_slice(&(24 + self.unknown.len() as u32).to_be_bytes());
        out.extend_from_slice(&s.vm_state_size.to_be_bytes());
        out.extend_from_slice(&s.disk_size.to_be_bytes());
        out.extend_from_slice(&s.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend_from_slice(&self.unknown);
        out.extend_from_slice(s.id.as_bytes());
        out.extend_from_slice(s.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Reads the snapshot table: `count` entries at `offset`.
pub(super) fn read_table(file: &Node, offset: u64, count: u32, disk_size: u64) -> io::Result<Vec<Entry>> {
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "The snapshot table is corrupt");
    let mut entries = Vec::new();
    let mut bytes: Vec<u8> = Vec::new();
    let (mut at, mut end) = (0usize, 0u64);
    for _ in 0..count {
        loop {
            if let Some((entry, len)) = Entry::parse(&bytes[at.min(bytes.len())..], disk_size) {
                entries.push(entry);
                at += len;
                break;
            }
            // More of it; never more than the file has.
            if end >= MAX_TABLE || offset + end >= file.len() {
                return Err(broken());
            }
            let more = (end.max(4096)).min(MAX_TABLE - end);
            bytes.resize((end + more) as usize, 0);
            read_padded(file, offset + end, &mut bytes[end as usize..])?;
            end += more;
        }
    }
    Ok(entries)
}

impl Meta {
    /// The clusters that the L2 table at `table` refers to, one by one, and that table itself.
    ///
    /// # Errors
    /// Corruption: metadata are there. `fixed`: those that are no L2 table.
    fn references(&mut self, file: &Node, table: u64, fixed: &Clusters) -> io::Result<Vec<u64>> {
        let geo = self.geo;
        if fixed.contains(&geo.cluster(table)) {
            return Err(corrupt(self.overlap(&(table..table + geo.cluster_size()))));
        }
        let mut out = vec![geo.cluster(table)];
        for page in (table..table + geo.cluster_size()).step_by(geo.page_size() as usize) {
            self.load_l2(file, page)?;
            let words = self.l2.get(page).unwrap_or(&[]).to_vec();
            for at in (0..words.len()).step_by(1 << geo.entry_bits()) {
                let bitmap = if geo.extended { be64(&words, at + 8) } else { 0 };
                let entry = geo.decode(be64(&words, at), bitmap).map_err(corrupt)?;
                self.may_free(&entry)?;
                if let Some((offset, len)) = entry.compressed {
                    out.extend(geo.clusters(offset, len));
                } else if let Some(host) = entry.host.filter(|_| !geo.external) {
                    out.push(geo.cluster(host));
                }
            }
        }
        Ok(out)
    }
}

/// What an operation does with the references of a set of tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Nothing: before something is done that cannot be taken back. Refuses what the others do.
    Look,
    Raise,
    Drop,
}

/// How far an operation got.
#[derive(Default)]
struct Progress {
    /// It has taken effect on disk; what is left is tidying up.
    done: bool,
    /// The L1 table that was the active one before.
    old_l1: Option<Vec<u64>>,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Qcow2 {
    /// All snapshots, oldest first.
    pub(super) fn list_snapshots(&self) -> io::Result<Vec<Entry>> {
        let file = self.file()?;
        let (offset, count, size) = {
            let meta = self.lock();
            (meta.header.snapshots_offset, meta.header.snapshots, meta.header.size)
        };
        read_table(&file, offset, count, size)
    }

    /// Sets the dirty bit, durably, for what follows.
    fn begin(&self) -> io::Result<()> {
        self.set_dirty(true);
        self.checkpoint(true).inspect_err(|_| self.set_dirty(false))
    }

    /// The image for the caller alone, all of it on disk, nothing waiting to be freed.
    fn settled(&self) -> io::Result<Exclusive<'_>> {
        let alone = self.exclusive();
        self.drain()?;
        Ok(alone)
    }

    fn set_dirty(&self, on: bool) {
        let mut meta = self.lock();
        if meta.geo.v3 {
            match on {
                true => meta.header.incompatible |= INCOMPAT_DIRTY,
                false => meta.header.incompatible &= !INCOMPAT_DIRTY,
            }
            meta.header_dirty = true;
        }
    }

    /// Raises or drops all references of the tables in `l1`.
    fn change(&self, l1: &[u64], what: Change) -> io::Result<()> {
        let file = self.file()?;
        let fixed = self.lock().fixed_tables(&file)?;
        // One that is named a million times would keep us for hours.
        let mut seen = HashSet::new();
        for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
            if !seen.insert(table) {
                return Err(corrupt(format!("L2 table {table:#x} is used twice")));
            }
            let mut meta = self.lock();
            let size = meta.geo.cluster_size();
            if table & (size - 1) != 0 || table.saturating_add(size) > meta.geo.round_up(meta.file_len) {
                return Err(corrupt(format!("L2 table offset {table:#x} is not possible")));
            }
            let clusters = meta.references(&file, table, &fixed)?;
            for k in clusters {
                match what {
                    Change::Look => {}
                    Change::Raise => meta.add_reference(&file, k)?,
                    Change::Drop => {
                        let bits = meta.geo.cluster_bits;
                        meta.free(k << bits, 1, true);
                    }
                }
            }
            let due = meta.wants_checkpoint();
            drop(meta);
            if due {
                self.checkpoint(false)?;
            }
        }
        Ok(())
    }

    /// Sets the COPIED flags of the active tables to what the refcounts say.
    fn mark_copied(&self) -> io::Result<()> {
        let file = self.file()?;
        let tables = self.lock().l1.entries.len();
        for i in 0..tables {
            let mut meta = self.lock();
            meta.fix_copied(&file, i, &mut None)?;
            let due = meta.wants_checkpoint();
            drop(meta);
            if due {
                self.checkpoint(false)?;
            }
        }
        Ok(())
    }

    /// Writes `entries` as a new snapshot table and names it in the header (in memory; the next
    /// checkpoint switches). The old one is freed.
    fn put_table(&self, entries: &[Entry]) -> io::Result<()> {
        let file = self.file()?;
        let mut bytes = Vec::new();
        entries.iter().for_each(|e| e.write(&mut bytes));
        if bytes.len() as u64 > MAX_TABLE {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let mut meta = self.lock();
        let geo = meta.geo;
        let old = (meta.header.snapshots_offset, meta.header.snapshots);
        let (mut offset, mut clusters) = (0, 0);
        if !entries.is_empty() {
            clusters = geo.round_up(bytes.len() as u64) >> geo.cluster_bits;
            let (first, _) = meta.alloc_tail(&file, clusters)?;
            offset = first << geo.cluster_bits;
            bytes.resize((clusters << geo.cluster_bits) as usize, 0);
            write_all(&file, offset, &bytes)?;
        }
        let mut len = 0;
        if old.1 > 0 {
            let counted = meta.snapshot_tables(&file)?;
            len = counted.iter().find(|(at, _)| *at == old.0).map_or(0, |(_, n)| *n);
        }
        let first = geo.cluster(offset);
        meta.tables.extend(first..first + clusters);
        if len > 0 {
            meta.free(old.0, geo.round_up(len) >> geo.cluster_bits, false);
        }
        meta.header.snapshots_offset = offset;
        meta.header.snapshots = entries.len() as u32;
        meta.header_dirty = true;
        Ok(())
    }

    /// A place for an L1 table of `count` entries: its offset (0 without entries) and clusters.
    fn place_l1(&self, count: u64) -> io::Result<(u64, u64)> {
        let file = self.file()?;
        let mut meta = self.lock();
        let geo = meta.geo;
        let clusters = geo.round_up(count * 8) >> geo.cluster_bits;
        if clusters == 0 {
            return Ok((0, 0));
        }
        let (first, _) = meta.alloc_tail(&file, clusters)?;
        meta.tables.extend(first..first + clusters);
        Ok((first << geo.cluster_bits, clusters))
    }

    /// Runs the steps of an operation. If one fails before the operation has taken effect on disk,
    /// all is put back; refcounts and flags are rebuilt in any case. Should that fail, too, nothing
    /// is written any more: what memory and disk say may differ then.
    fn guarded(&self, steps: impl FnOnce(&mut Progress) -> io::Result<()>) -> io::Result<()> {
        let before = self.lock().header.clone();
        let mut progress = Progress::default();
        let Err(e) = self.judge(steps(&mut progress)) else { return Ok(()) };
        if !progress.done {
            let mut meta = self.lock();
            meta.header.snapshots = before.snapshots;
            meta.header.snapshots_offset = before.snapshots_offset;
            meta.header.l1_offset = before.l1_offset;
            meta.header.l1_size = before.l1_size;
            meta.header.size = before.size;
            meta.header_dirty = true;
            if let Some(old) = progress.old_l1 {
                meta.l1.entries = old;
                meta.l1.dirty.clear();
                meta.l1.moved = false;
            }
        }
        let repaired = if self.lock().corrupt { Err(eio()) } else { self.repair() };
        match repaired {
            Ok(()) if progress.done => {
                log::warn!("qcow2: after the snapshot operation refcounts had to be rebuilt: {e}");
                Ok(())
            }
            Ok(()) => Err(e),
            Err(repair) => {
                let mut meta = self.lock();
                if !std::mem::replace(&mut meta.corrupt, true) {
                    log::error!(
                        "qcow2: a snapshot operation failed: {e}; nothing is written any more: {repair}"
                    );
                }
                Err(e)
            }
        }
    }

    /// Makes a snapshot of the disk as it is. An empty id gets the next free number.
    pub(super) fn take_snapshot(&self, mut info: Snapshot) -> io::Result<()> {
        self.snapshots_possible()?;
        let _alone = self.settled()?;
        let mut entries = self.list_snapshots()?;
        if info.id.is_empty() {
            let last = entries.iter().filter_map(|e| e.info.id.parse::<u64>().ok()).max();
            info.id = (last.unwrap_or(0).saturating_add(1)).to_string();
        }
        if info.id.len() > MAX_TEXT || info.name.len() > MAX_TEXT {
            return Err(invalid("The snapshot's name is too long".into()));
        }
        if entries.iter().any(|e| e.info.id == info.id) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        if entries.len() >= 65536 {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        info.disk_size = self.size.load(Ordering::SeqCst);
        self.begin()?;
        self.guarded(|_| {
            let l1: Vec<u64> = self.lock().l1.entries.clone();
            let (l1_offset, clusters) = self.place_l1(l1.len() as u64)?;
            if clusters > 0 {
                let mut bytes: Vec<u8> = l1.iter().flat_map(|e| (e & !COPIED).to_be_bytes()).collect();
                bytes.resize((clusters * self.geo.cluster_size()) as usize, 0);
                write_all(&*self.file()?, l1_offset, &bytes)?;
            }
            self.change(&l1, Change::Raise)?;
            self.mark_copied()?;
            self.checkpoint(true)?;
            entries.push(Entry { l1_offset, l1_size: l1.len() as u32, info, unknown: Vec::new() });
            self.put_table(&entries)?;
            self.set_dirty(false);
            self.checkpoint(true)
        })?;
        // The old snapshot table's place: the next checkpoint frees it, if this does not.
        self.drain().or_else(|e| {
            log::warn!("qcow2: after a snapshot was taken: {e}");
            Ok(())
        })
    }

    /// The index of the snapshot with this id, or without one, this name.
    fn find(entries: &[Entry], id: Option<&str>, name: Option<&str>) -> Option<usize> {
        entries.iter().position(|e| {
            id.is_none_or(|id| e.info.id == id)
                && name.is_none_or(|name| e.info.name == name)
                && (id.is_some() || name.is_some())
        })
    }

    /// Deletes a snapshot. ENOENT if there is none of that id and name.
    pub(super) fn drop_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<Snapshot> {
        let _alone = self.settled()?;
        let mut entries = self.list_snapshots()?;
        let found = Self::find(&entries, id, name);
        let gone = entries.remove(found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?);
        let l1 = self.judge(self.read_l1(&gone))?;
        self.judge(self.change(&l1, Change::Look))?;
        self.begin()?;
        self.guarded(|progress| {
            self.put_table(&entries)?;
            self.checkpoint(true)?;
            progress.done = true;
            self.change(&l1, Change::Drop)?;
            let clusters = self.geo.round_up(l1.len() as u64 * 8) >> self.geo.cluster_bits;
            if clusters > 0 {
                self.lock().free(gone.l1_offset, clusters, true);
            }
            self.drain()?;
            self.mark_copied()?;
            self.drain()?;
            self.set_dirty(false);
            self.checkpoint(true)
        })?;
        Ok(gone.info)
    }

    /// Makes the disk what it was when the snapshot was taken; what it is now is lost.
    pub(super) fn go_to_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<()> {
        self.snapshots_possible()?;
        let _alone = self.settled()?;
        let entries = self.list_snapshots()?;
        let found = Self::find(&entries, id, name);
        let to = &entries[found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?];
        let size = to.info.disk_size;
        if size > i64::MAX as u64 - self.geo.cluster_size() {
            return Err(invalid("The snapshot's disk size is too large".into()));
        }
        self.begin()?;
        self.guarded(|progress| {
            let mut l1 = self.read_l1(to)?;
            let need = self.geo.l1_entries(size).max(l1.len() as u64);
            if need * 8 > MAX_L1_BYTES {
                return Err(io::Error::from_raw_os_error(libc::EFBIG));
            }
            l1.resize(need as usize, 0);
            let active = self.lock().l1.entries.clone();
            self.change(&active, Change::Look)?;
            self.change(&l1, Change::Raise)?;
            let (offset, clusters) = self.place_l1(need)?;
            if self.has_bug(Mutant::MovedUnsynced) {
                // What a guest's flush could do just now.
                self.checkpoint(false)?;
            }
            {
                let mut meta = self.lock();
                let clean = l1.iter().map(|e| e & !COPIED).collect();
                let old = std::mem::replace(&mut meta.l1.entries, clean);
                let old_len = old.len() as u64;
                progress.old_l1 = Some(old);
                let bits = meta.geo.cluster_bits;
                meta.tables.extend(l1.iter().map(|e| (e & OFFSET_MASK) >> bits).filter(|k| *k != 0));
                let was = (meta.header.l1_offset, meta.geo.round_up(old_len * 8) >> bits);
                if was.1 > 0 {
                    meta.free(was.0, was.1, false);
                }
                meta.l1.dirty.clear();
                meta.l1.moved = clusters > 0;
                meta.header.l1_offset = offset;
                // At most 4 Mi entries, checked above.
                meta.header.l1_size = need as u32;
                meta.header.size = size;
                meta.header_dirty = true;
            }
            self.checkpoint(true)?;
            progress.done = true;
            self.size.store(size, Ordering::SeqCst);
            self.change(&progress.old_l1.take().unwrap_or_default(), Change::Drop)?;
            self.drain()?;
            self.mark_copied()?;
            self.drain()?;
            self.set_dirty(false);
            self.checkpoint(true)
        })
    }

    fn read_l1(&self, of: &Entry) -> io::Result<Vec<u64>> {
        let len = u64::from(of.l1_size) * 8;
        if len > MAX_L1_BYTES || of.l1_offset & (self.geo.cluster_size() - 1) != 0 {
            return Err(corrupt("a snapshot's L1 table is not where it can be"));
        }
        let mut bytes = vec![0; len as usize];
        read_padded(&*self.file()?, of.l1_offset, &mut bytes)?;
        Ok(bytes.chunks_exact(8).map(|e| be64(e, 0)).collect())
    }

    fn snapshots_possible(&self) -> io::Result<()> {
        if self.data_file.is_some() || self.geo.refcount_order == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        Ok(())
    }
}
