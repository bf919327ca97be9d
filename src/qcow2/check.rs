//! Walking all metadata: the rebuild of refcounts when a dirty image is opened, and a checker for
//! tests that is quicker than starting `qemu-img check` a thousand times.
//!
//! Owns: what refcounts ought to be. Never: changes what guest data are mapped where. Threads: the
//! control thread, before any request. Locks: `meta`, throughout.
//!
//! Time is bounded by what the file holds: an L2 table is walked once even if a corrupt L1 table
//! names it a million times. Memory: about 16 bytes for each cluster in use.

use super::Qcow2;
use super::bitmap_dir::read_table;
use super::cache::ByOffset;
use super::header::INCOMPAT_DIRTY;
use super::meta::{Meta, read_padded};
use super::types::{COMPRESSED, COPIED, OFFSET_MASK, REFTABLE_MASK, be64};
use crate::block::driver::ExtentKind;
use crate::block::node::Node;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::PoisonError;

/// What a check found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong: each could cost data. At most 100 are listed.
    pub errors: Vec<String>,
    /// Clusters with a refcount higher than needed.
    pub leaks: u64,
}

impl Report {
    fn error(&mut self, text: String) {
        if self.errors.len() < 100 {
            self.errors.push(text);
        }
    }
}

/// What a cluster is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Something that nothing else refers to.
    Once = 0,
    /// An L2 table: snapshots share it.
    L2 = 1,
    /// Guest data, compressed or not: snapshots and other compressed clusters share it.
    Data = 2,
}

/// A use and how often that is referred to, in one word: there are many.
#[derive(Clone, Copy)]
struct Uses(u64);

impl Uses {
    fn new(to: Use) -> Uses {
        Uses((to as u64) << 62)
    }

    fn is(self, to: Use) -> bool {
        self.0 >> 62 == to as u64
    }

    fn count(self) -> u64 {
        self.0 & ((1 << 62) - 1)
    }
}

struct Walk<'a> {
    meta: &'a mut Meta,
    file: &'a Node,
    /// What the refcounts ought to be.
    counts: HashMap<u64, Uses, ByOffset>,
    report: Report,
}

impl Walk<'_> {
    /// Counts the only reference to `len` bytes at `offset`.
    fn count(&mut self, what: &str, offset: u64, len: u64) {
        self.count_as(Use::Once, what, offset, len);
    }

    /// Counts a reference to `len` bytes at `offset`.
    fn count_as(&mut self, to: Use, what: &str, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        if offset.checked_add(len).is_none_or(|end| end >> 56 != 0) {
            return self.report.error(format!("{what} at {offset:#x} lies outside of any file"));
        }
        if offset >= self.meta.geo.round_up(self.meta.file_len) {
            self.report.error(format!("{what} at {offset:#x} lies beyond the end of the file"));
        }
        for k in self.meta.geo.clusters(offset, len) {
            let uses = self.counts.entry(k).or_insert(Uses::new(to));
            uses.0 += 1;
            // Refcounts could be set to agree, but a write to the one would destroy the other.
            if !uses.is(to) || to == Use::Once && uses.count() > 1 {
                self.report.error(format!("{what} at {offset:#x} lies where something else is"));
            }
        }
    }

    fn all(&mut self) -> io::Result<()> {
        let h = self.meta.header.clone();
        let size = self.meta.geo.cluster_size();
        self.count("header", 0, size);
        self.count("refcount table", h.reftable_offset, u64::from(h.reftable_clusters) * size);
        for entry in self.meta.reftable.entries.clone() {
            if entry & REFTABLE_MASK != 0 {
                self.count("refcount block", entry & REFTABLE_MASK, size);
            }
        }
        if let Some((offset, len)) = h.crypto {
            self.count("encryption header", offset, len);
        }
        let l1 = self.meta.l1.entries.clone();
        self.count("L1 table", h.l1_offset, l1.len() as u64 * 8);
        self.tables(&l1)?;
        for (offset, len) in self.meta.snapshot_tables(self.file)? {
            self.count("snapshot's table", offset, len);
            if offset != h.snapshots_offset {
                let l1 = read_words(self.file, offset, len)?;
                self.tables(&l1)?;
            }
        }
        self.bitmaps()
    }

    /// The L2 tables of one L1 table, and all they point to.
    fn tables(&mut self, l1: &[u64]) -> io::Result<()> {
        let geo = self.meta.geo;
        let mut seen: HashSet<u64, ByOffset> = HashSet::default();
        for table in l1.iter().map(|e| e & OFFSET_MASK).filter(|t| *t != 0) {
            if table & (geo.cluster_size() - 1) != 0 {
                self.report.error(format!("L2 table at {table:#x} is not aligned"));
                continue;
            }
            self.count_as(Use::L2, "L2 table", table, geo.cluster_size());
            if !seen.insert(table) {
                self.report.error(format!("L2 table at {table:#x} is used twice"));
                continue;
            }
            if self.meta.is_hole(self.file, table, Kind::L2) {
                continue;
            }
            for page in (table..table + geo.cluster_size()).step_by(geo.page_size() as usize) {
                self.meta.load_l2(self.file, page)?;
                let words = self.meta.l2.get(page).unwrap_or(&[]).to_vec();
                for at in (0..words.len()).step_by(1 << geo.entry_bits()) {
                    let word = be64(&words, at);
                    let bitmap = if geo.extended { be64(&words, at + 8) } else { 0 };
                    match geo.decode(word, bitmap) {
                        Err(why) => self.report.error(format!("{why} (entry {word:#x})")),
                        Ok(e) => {
                            if let Some((offset, len)) = e.compressed {
                                self.count_as(Use::Data, "compressed cluster", offset, len);
                            } else if let Some(host) = e.host.filter(|_| !geo.external) {
                                self.count_as(Use::Data, "data cluster", host, geo.cluster_size());
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts refcount blocks, and a bigger table, that were made after the walk.
    fn count_new_tables(&mut self) {
        let geo = self.meta.geo;
        let h = &self.meta.header;
        let first = geo.cluster(h.reftable_offset);
        let table = first..first + u64::from(h.reftable_clusters);
        let blocks = self.meta.reftable.entries.iter().map(|e| e & REFTABLE_MASK).filter(|b| *b != 0);
        for k in table.chain(blocks.map(|b| geo.cluster(b))) {
            self.counts.entry(k).or_insert(Uses(1));
        }
    }

    /// The stored bitmaps' directory, tables and data.
    fn bitmaps(&mut self) -> io::Result<()> {
        let Some(ext) = self.meta.header.bitmaps else { return Ok(()) };
        let geo = self.meta.geo;
        self.count("bitmap directory", ext.offset, ext.size);
        for stored in self.meta.stored.clone() {
            self.count("bitmap table", stored.table, u64::from(stored.entries) * 8);
            for entry in read_table(self.file, &geo, &stored)? {
                if entry & OFFSET_MASK != 0 {
                    self.count("bitmap data", entry & OFFSET_MASK, geo.cluster_size());
                }
            }
        }
        Ok(())
    }

    /// Calls `f` for each cluster of which either a reference or a refcount exists.
    fn compare(
        &mut self,
        mut f: impl FnMut(&mut Meta, &Node, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut clusters: Vec<u64> = self.counts.keys().copied().collect();
        clusters.sort_unstable();
        for k in &clusters {
            let have = self.meta.refcount(self.file, *k)?;
            f(self.meta, self.file, *k, have, self.counts[k].count())?;
        }
        let bits = self.meta.geo.block_bits();
        for i in 0..self.meta.reftable.entries.len() as u64 {
            let block = self.meta.reftable.entries[i as usize] & REFTABLE_MASK;
            if block == 0 || self.meta.is_hole(self.file, block, Kind::Refcounts) {
                continue;
            }
            for k in i << bits..(i + 1) << bits {
                if !self.counts.contains_key(&k) {
                    let have = self.meta.refcount(self.file, k)?;
                    if have != 0 {
                        f(self.meta, self.file, k, have, 0)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a cluster with a table is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    L2,
    Refcounts,
}

impl Meta {
    /// True when the table in the cluster at `offset` is all zeroes because nothing was ever written
    /// there, neither to the file nor in memory. An image file of a few megabytes may name terabytes
    /// of them.
    fn is_hole(&self, file: &Node, offset: u64, kind: Kind) -> bool {
        let size = self.geo.cluster_size();
        let pages = if kind == Kind::L2 { &self.l2 } else { &self.refs };
        let mut places = (offset..offset.saturating_add(size)).step_by(self.geo.page_size() as usize);
        if places.any(|page| pages.has(page)) {
            return false;
        }
        offset >= self.file_len
            || file.status(offset, size).is_ok_and(|e| e.kind == ExtentKind::Zero && e.len >= size)
    }

    /// Compares the COPIED flags of the active L1 entry `i` and its table with the refcounts:
    /// sets them right, or, with a report, notes what is wrong.
    pub(super) fn fix_copied(
        &mut self,
        file: &Node,
        i: usize,
        report: &mut Option<&mut Report>,
    ) -> io::Result<()> {
        let geo = self.geo;
        let entry = self.l1.entries[i];
        let table = entry & OFFSET_MASK;
        if table == 0 || table & (geo.cluster_size() - 1) != 0 {
            return Ok(());
        }
        let once = self.refcount(file, geo.cluster(table))? == 1;
        if once != (entry & COPIED != 0) {
            match report {
                None => self.l1.set(i, entry ^ COPIED),
                Some(r) => r.error(format!("COPIED of L2 table {table:#x} is wrong")),
            }
        }
        if self.is_hole(file, table, Kind::L2) {
            return Ok(());
        }
        for page in (table..table + geo.cluster_size()).step_by(geo.page_size() as usize) {
            self.load_l2(file, page)?;
            let words = self.l2.get(page).unwrap_or(&[]).to_vec();
            for at in (0..words.len()).step_by(1 << geo.entry_bits()) {
                let word = be64(&words, at);
                let host = word & OFFSET_MASK;
                if word & COMPRESSED != 0 || host == 0 || geo.external {
                    continue;
                }
                let once = self.refcount(file, geo.cluster(host))? == 1;
                if once == (word & COPIED != 0) {
                    continue;
                }
                if let Some(r) = report {
                    r.error(format!("COPIED of data cluster {host:#x} is wrong"));
                    continue;
                }
                self.load_l2(file, page)?;
                if let Some(p) = self.l2.get_mut(page) {
                    p[at..at + 8].copy_from_slice(&(word ^ COPIED).to_be_bytes());
                }
            }
        }
        Ok(())
    }
}

fn read_words(file: &Node, offset: u64, len: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; len as usize];
    read_padded(file, offset, &mut bytes)?;
    Ok(bytes.chunks_exact(8).map(|w| be64(w, 0)).collect())
}

impl Qcow2 {
    /// Compares all refcounts with all references, and the COPIED flags with the refcounts.
    /// Meant for an image that nobody uses meanwhile.
    ///
    /// # Errors
    /// I/O errors, or metadata so broken that they cannot be walked.
    pub fn check(&self) -> io::Result<Report> {
        let file = self.file()?;
        let mut meta = self.lock();
        let mut walk =
            Walk { meta: &mut meta, file: &file, counts: HashMap::default(), report: Report::default() };
        walk.all()?;
        let mut report = std::mem::take(&mut walk.report);
        walk.compare(|_, _, k, have, want| {
            match have.cmp(&want) {
                std::cmp::Ordering::Less => {
                    report.error(format!("cluster {k:#x}: refcount {have}, references {want}"));
                }
                std::cmp::Ordering::Greater => report.leaks += 1,
                std::cmp::Ordering::Equal => {}
            }
            Ok(())
        })?;
        for i in 0..meta.l1.entries.len() {
            meta.fix_copied(&file, i, &mut Some(&mut report))?;
        }
        Ok(report)
    }

    /// Rebuilds the refcounts of an image that was left dirty, sets COPIED flags right, and
    /// clears the dirty bit last.
    pub(super) fn repair(&self) -> io::Result<()> {
        let file = self.file()?;
        {
            let mut meta = self.lock();
            // What they say is said by the references, too.
            meta.freed.clear();
            meta.unreachable.clear();
            meta.grace.clear();
            meta.tables.clear();
            // These clusters may be free now, and then anybody's.
            meta.packing = 0;
            // What they say now is said by the references.
            meta.holes_known = true;
            *self.decompressed.lock().unwrap_or_else(PoisonError::into_inner) = None;
            meta.find_tables(&file)?;
            let mut walk =
                Walk { meta: &mut meta, file: &file, counts: HashMap::default(), report: Report::default() };
            walk.all()?;
            if let Some(why) = walk.report.errors.first() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("qcow2: Could not repair dirty image: {why}"),
                ));
            }
            // New refcount blocks go behind everything that is referenced.
            let end = walk.counts.keys().max().map_or(0, |k| k + 1);
            walk.meta.tail = walk.meta.tail.max(end);
            walk.meta.fresh = walk.meta.fresh.max(end);
            let blocks: HashSet<u64> = walk.counts.keys().map(|k| k >> walk.meta.geo.block_bits()).collect();
            for i in blocks {
                walk.meta.make_block(&file, i)?;
            }
            walk.count_new_tables();
            walk.compare(|meta, file, k, have, want| match have == want {
                true => Ok(()),
                false => meta.set_refcount(file, k, want),
            })?;
            for i in 0..meta.l1.entries.len() {
                meta.fix_copied(&file, i, &mut None)?;
            }
            meta.barrier = true;
        }
        self.checkpoint(true)?;
        {
            let mut meta = self.lock();
            meta.header.incompatible &= !INCOMPAT_DIRTY;
            meta.header_dirty = true;
        }
        self.checkpoint(true)
    }
}
