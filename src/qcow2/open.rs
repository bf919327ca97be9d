//! Opening an image: header, limits, features, tables into memory, first checks.
//!
//! Owns: what happens before the first request. Never: opens what an image names: the caller reads
//! the header ([`read_header`]), opens backing and data file as its rules allow, and hands them
//! in. Threads: the control thread. Locks: none but those of the new image.
//!
//! Time and memory are bounded by the limits of header.rs and by what the file really holds.

use super::Qcow2;
use super::bitmap_dir::{self, read_table as read_bitmap_table};
use super::cache::Cache;
use super::corrupt::OnCorrupt;
use super::crypt::{self, Unlock};
use super::extension;
use super::header::{self, Header};
use super::meta::{Clusters, Meta, Table, read_padded};
use super::types::{OFFSET_MASK, REFTABLE_MASK, be32, be64};
use crate::block::debug::BlkdebugEvent;
use crate::block::node::{Edge, Node};
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// QEMU's upper bound for an L2 cache that was not asked for by size, in bytes.
const L2_CACHE_MAX: u64 = 32 << 20;
/// A refcount cache holds at least this many clusters, as QEMU's does.
const REFCOUNT_CACHE_CLUSTERS: u64 = 4;
/// Most clusters that snapshot L1 tables may have together before the image is refused.
const MAX_SNAPSHOT_CLUSTERS: u64 = 1 << 20;

/// `blockdev-add`'s options of driver `qcow2` that matter here.
#[derive(Default)]
pub struct Options {
    /// Nothing at all is written to the file.
    pub read_only: bool,
    /// `cache-size`: both caches together, in bytes.
    pub cache_size: Option<u64>,
    /// `l2-cache-size` in bytes.
    pub l2_cache_size: Option<u64>,
    /// `l2-cache-entry-size` in bytes. Checked; pages are never larger than 4 KiB here.
    pub l2_cache_entry_size: Option<u64>,
    /// `refcount-cache-size` in bytes.
    pub refcount_cache_size: Option<u64>,
    /// `pass-discard-request`: space that the guest gives up goes back to the file system
    /// (true if absent; the file node's own `discard` option decides, too).
    pub pass_discard_request: Option<bool>,
    /// `cache-clean-interval` in seconds: pages unused for that long are given up (600 if absent,
    /// 0: never).
    pub cache_clean_interval: Option<u64>,
    /// `encrypt`: how to get at the data of an encrypted image.
    pub encrypt: Option<Unlock>,
    /// For tests of the tests.
    #[doc(hidden)]
    pub bug: Option<super::mutant::Mutant>,
    /// See [`OnCorrupt`].
    pub on_corrupt: Option<OnCorrupt>,
}

/// Reads and checks the header of the image in `file`.
///
/// # Errors
/// QEMU's text for what is wrong.
pub fn read_header(file: &Node) -> io::Result<Header> {
    Header::parse(&first_cluster(file)?)
}

/// The first cluster, or as much of it as there is.
pub(super) fn first_cluster(file: &Node) -> io::Result<Vec<u8>> {
    let have = file.len();
    let mut start = vec![0; 512.min(have) as usize];
    read_padded(file, 0, &mut start)?;
    let size = header::peek_cluster_size(&start)?;
    let mut bytes = vec![0; size.min(have) as usize];
    read_padded(file, 0, &mut bytes)?;
    Ok(bytes)
}

/// Opens the image in `file` (an edge that has a node). `backing` has a node if the image has a
/// backing file that is to be used; `data_file` is there if and only if the header asks for one.
///
/// A dirty image that is opened for writing gets its refcounts rebuilt.
///
/// # Errors
/// QEMU's text where it has one; the file is unchanged then, unless a repair had begun.
pub fn open(
    file: Arc<Edge>,
    backing: Arc<Edge>,
    data_file: Option<Arc<Edge>>,
    options: Options,
) -> io::Result<Qcow2> {
    let node = file.node().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEDIUM))?;
    let mut first = first_cluster(&node)?;
    let header = Header::parse(&first)?;
    let stale_extension = header.bitmaps.is_none() && extension::is_there(&first);
    first.resize(512, 0);
    if header.incompatible & header::INCOMPAT_CORRUPT != 0 && !options.read_only {
        return Err(refuse("qcow2: Image is corrupt; cannot be opened read/write"));
    }
    match (header.incompatible & header::INCOMPAT_DATA_FILE != 0, &data_file) {
        (true, None) => return Err(refuse("'data-file' is required for this image")),
        (false, Some(_)) => {
            return Err(refuse("'data-file' can only be set for images with an external data file"));
        }
        _ => {}
    }
    let (l2, refs, l2_most) = cache_sizes(&header, &options)?;
    let crypt = crypt::open(&node, &header, options.encrypt.as_ref())?;
    let geo = header.geometry();
    let file_len = node.len();
    let l1 = read_table(&node, "Active L1 table", header.l1_offset, u64::from(header.l1_size))?;
    node.moment(BlkdebugEvent::ReftableLoad);
    let reftable = read_table(
        &node,
        "Reference count table",
        header.reftable_offset,
        u64::from(header.reftable_clusters) << geo.cluster_bits >> 3,
    )?;
    let blocks = reftable.iter().rposition(|e| e & REFTABLE_MASK != 0).map_or(0, |i| i as u64 + 1);
    let clusters = file_len.div_ceil(geo.cluster_size());
    let size = header.size;
    let stored = match &header.bitmaps {
        Some(ext) => bitmap_dir::read(&node, &geo, size, ext)?,
        None => Vec::new(),
    };
    let mut meta = Meta {
        geo,
        header,
        sector: first,
        header_dirty: false,
        l1: Table { entries: l1, ..Table::default() },
        reftable: Table { entries: reftable, ..Table::default() },
        l2: Cache::new((l2 / geo.page_size()) as usize),
        l2_most,
        refs: Cache::new((refs / geo.page_size()) as usize),
        in_flight: Vec::new(),
        waiting: 0,
        freed: Vec::new(),
        unreachable: Vec::new(),
        grace: Vec::new(),
        grace_epoch: 0,
        epoch: 0,
        barrier: false,
        generation: 0,
        stored,
        stale_extension,
        tables: Clusters::default(),
        cursor: 0,
        tail: clusters.min(blocks << geo.block_bits()),
        fresh: clusters,
        packing: 0,
        holes_known: false,
        file_len,
        opened_len: file_len,
        cleaned: Instant::now(),
        bug: options.bug,
        exclusive: false,
        corrupt: false,
        signaled: false,
    };
    if !options.read_only {
        meta.find_tables(&node)?;
    }
    let image = Qcow2::new(file, backing, data_file, size, meta, crypt, options);
    image.load_bitmaps()?;
    if !image.read_only() {
        image.prepare_to_write()?;
    }
    Ok(image)
}

impl Qcow2 {
    /// Repairs what is not right for an image that is written to.
    pub(super) fn prepare_to_write(&self) -> io::Result<()> {
        let (incompatible, autoclear) = {
            let meta = self.lock();
            (meta.header.incompatible, meta.header.autoclear)
        };
        if incompatible & header::INCOMPAT_DIRTY != 0 {
            self.repair()?;
        }
        // No other feature that such a bit stands for is kept up to date by this driver.
        let keep = autoclear & (header::AUTOCLEAR_DATA_FILE_RAW | header::AUTOCLEAR_BITMAPS);
        if autoclear != keep {
            let mut meta = self.lock();
            meta.header.autoclear = keep;
            meta.header_dirty = true;
            drop(meta);
            self.checkpoint(true)?;
        }
        self.use_bitmaps()
    }
}

fn refuse(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// Sizes of L2 and refcount cache in bytes, by QEMU's rules, and what the L2 cache may become when
/// the disk grows.
pub(super) fn cache_sizes(header: &Header, o: &Options) -> io::Result<(u64, u64, u64)> {
    let invalid = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    let geo = header.geometry();
    // What the L2 tables of the whole disk take.
    let whole = (geo.l1_entries(header.size).max(1)).saturating_mul(geo.cluster_size());
    let least = REFCOUNT_CACHE_CLUSTERS * geo.cluster_size();
    let sizes = match (o.cache_size, o.l2_cache_size, o.refcount_cache_size) {
        (Some(_), Some(_), Some(_)) => {
            return invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            );
        }
        (Some(all), Some(l2), None) if l2 > all => {
            return invalid("l2-cache-size may not exceed cache-size");
        }
        (Some(all), None, Some(refs)) if refs > all => {
            return invalid("refcount-cache-size may not exceed cache-size");
        }
        // What the disk cannot use goes to the refcounts.
        (Some(all), Some(l2), None) => (l2, all - l2.min(whole)),
        (Some(all), None, Some(refs)) => (all - refs, refs),
        (Some(all), None, None) if all >= whole + least => (whole, all - whole),
        (Some(all), None, None) => {
            let refs = all.min(least);
            (all - refs, refs)
        }
        (None, l2, refs) => (l2.unwrap_or(L2_CACHE_MAX), refs.unwrap_or(least)),
    };
    if let Some(entry) = o.l2_cache_entry_size
        && (!entry.is_power_of_two() || entry < 512 || entry > geo.cluster_size())
    {
        return invalid(&format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({})",
            geo.cluster_size()
        ));
    }
    let entry = o.l2_cache_entry_size.unwrap_or(geo.cluster_size());
    // QEMU counts entries in 31 bits, and this one it takes as it comes.
    let rest = o.cache_size.is_some() && o.refcount_cache_size.is_some();
    let l2 = if rest { sizes.0 } else { sizes.0.min(whole) };
    if l2 / entry > i32::MAX as u64 {
        return invalid("L2 cache size too big");
    }
    if sizes.1 >> geo.cluster_bits > i32::MAX as u64 {
        return invalid("Refcount cache size too big");
    }
    if o.cache_clean_interval.is_some_and(|i| i > u64::from(u32::MAX)) {
        return invalid("Cache clean interval too big");
    }
    Ok((sizes.0.min(whole), sizes.1.max(32 << 10), sizes.0))
}

/// Reads a table of `count` 8-byte entries that must begin in the file.
fn read_table(file: &Node, what: &str, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if offset >= file.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{what} lies beyond the end of the file"),
        ));
    }
    // In pieces: never both forms of a large table at once.
    let mut entries = Vec::with_capacity(count as usize);
    let mut buf = vec![0; 64 << 10];
    while (entries.len() as u64) < count {
        let left = (count - entries.len() as u64) * 8;
        let n = left.min(buf.len() as u64) as usize;
        read_padded(file, offset + entries.len() as u64 * 8, &mut buf[..n])?;
        entries.extend(buf[..n].chunks_exact(8).map(|e| be64(e, 0)));
    }
    Ok(entries)
}

fn once(found: &mut Clusters, k: u64) -> io::Result<()> {
    if found.insert(k) {
        return Ok(());
    }
    let why = format!("metadata overlap at cluster {k:#x}; cannot be opened read/write");
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("qcow2: Image is corrupt: {why}")))
}

impl Meta {
    /// Fills `tables`, so that guest data never overwrite metadata.
    ///
    /// # Errors
    /// Two tables in the same place: the image must not be written.
    pub(super) fn find_tables(&mut self, file: &Node) -> io::Result<()> {
        let mut found = self.fixed_tables(file)?;
        let l2 = self.l1.entries.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0);
        // What is unaligned or beyond the end is found when it is used.
        for k in l2.filter(|o| *o < self.file_len).map(|o| o >> self.geo.cluster_bits) {
            once(&mut found, k)?;
        }
        self.tables = found;
        Ok(())
    }

    /// The clusters of all metadata but L2 tables, the only ones that snapshots share.
    ///
    /// # Errors
    /// As [`Meta::find_tables`].
    pub(super) fn fixed_tables(&self, file: &Node) -> io::Result<Clusters> {
        let mut found = Clusters::default();
        let bits = self.geo.cluster_bits;
        let mut ranges = vec![(0, 1)];
        ranges.push((self.header.reftable_offset, u64::from(self.header.reftable_clusters) << bits));
        ranges.push((self.header.l1_offset, u64::from(self.header.l1_size) * 8));
        ranges.extend(self.header.crypto);
        ranges.extend(self.snapshot_tables(file)?);
        ranges.extend(self.header.bitmaps.iter().map(|ext| (ext.offset, ext.size)));
        ranges.extend(self.stored.iter().map(|s| (s.table, u64::from(s.entries) * 8)));
        for (offset, len) in ranges.into_iter().filter(|r| r.1 > 0) {
            self.geo.clusters(offset, len).try_for_each(|k| once(&mut found, k))?;
        }
        for stored in &self.stored {
            let table = read_bitmap_table(file, &self.geo, stored)?;
            let data = table.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0);
            data.map(|o| o >> bits).try_for_each(|k| once(&mut found, k))?;
        }
        let blocks = self.reftable.entries.iter().map(|e| e & REFTABLE_MASK).filter(|o| *o != 0);
        // As with L2 tables.
        blocks.filter(|o| *o < self.file_len).map(|o| o >> bits).try_for_each(|k| once(&mut found, k))?;
        Ok(found)
    }

    /// Where the snapshot table and the snapshots' L1 tables are: offsets and lengths in bytes.
    pub(super) fn snapshot_tables(&self, file: &Node) -> io::Result<Vec<(u64, u64)>> {
        let mut out = Vec::new();
        let mut at = self.header.snapshots_offset;
        let mut clusters = 0;
        for i in 0..self.header.snapshots {
            let bad = |what: &str| {
                Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("qcow2: Image is corrupt: snapshot table entry {i}: {what}"),
                ))
            };
            if at >= self.file_len {
                return bad("beyond the end of the file");
            }
            let mut entry = [0; 40];
            read_padded(file, at, &mut entry)?;
            let (offset, count) = (be64(&entry, 0), u64::from(be32(&entry, 8)));
            let names = u64::from(be32(&entry, 12) >> 16) + u64::from(be32(&entry, 12) & 0xffff);
            let extra = u64::from(be32(&entry, 36));
            if count * 8 > header::MAX_L1_BYTES || extra > 1024 {
                return bad("too large");
            }
            if offset & (self.geo.cluster_size() - 1) != 0 {
                return bad("L1 table offset is not aligned");
            }
            if offset > OFFSET_MASK - header::MAX_L1_BYTES {
                return bad("L1 table lies outside of any file");
            }
            clusters += (count * 8) >> self.geo.cluster_bits;
            if clusters > MAX_SNAPSHOT_CLUSTERS {
                return bad("L1 tables too large");
            }
            if count > 0 {
                out.push((offset, count * 8));
            }
            at += (40 + extra + names).next_multiple_of(8);
        }
        out.push((self.header.snapshots_offset, at - self.header.snapshots_offset));
        Ok(out)
    }
}
