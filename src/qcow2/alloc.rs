//! Refcounts, and finding free host clusters.
//!
//! Owns: the allocation part of [`Meta`]. Never: writes refcount blocks to disk (checkpoint.rs
//! does); lowers a refcount of something that is reachable on disk. Threads and locks: as
//! [`Meta`]. Memory's refcounts are what is allocated: a cluster that was freed keeps its
//! refcount here, too, until the checkpoint has made it unreachable, so that no search finds it.
//!
//! Where new clusters come from: holes first (a cursor walks up through the refcount blocks, a
//! few pages per call), else the end of the file. A refcount block, or a bigger refcount table,
//! is made only there, in clusters that it counts itself.

use super::corrupt::corrupt;
use super::header::MAX_REFTABLE_BYTES;
use super::meta::{Meta, read_page, write_zeroes};
use super::types::{REFTABLE_MASK, refcount_get, refcount_set};
use crate::block::debug::BlkdebugEvent;
use crate::block::node::Node;
use std::io;
use std::ops::Range;

/// How many refcount pages one allocation searches before it goes to the end of the file.
const SEARCH_PAGES: u32 = 16;

/// How many clusters are tried at the end of the file before the refcounts are called absurd.
const SEARCH_TAIL: u64 = 1 << 22;

impl Meta {
    /// The page (file offset) and the index in it of the refcount of cluster `k`; `None` where no
    /// refcount block is.
    fn refcount_place(&self, k: u64) -> io::Result<Option<(u64, usize)>> {
        let index = k >> self.geo.block_bits();
        let Some(&entry) = usize::try_from(index).ok().and_then(|i| self.reftable.entries.get(i)) else {
            return Ok(None);
        };
        let block = entry & REFTABLE_MASK;
        if block == 0 {
            return Ok(None);
        }
        let size = self.geo.cluster_size();
        if block & (size - 1) != 0 {
            return Err(corrupt(format!(
                "Refblock offset {block:#x} unaligned (reftable index: {index:#x})"
            )));
        }
        if block.saturating_add(size) > self.geo.round_up(self.file_len) {
            return Err(corrupt(format!(
                "Refblock offset {block:#x} is beyond the end of the file (reftable index: {index:#x})"
            )));
        }
        let i = k & ((1 << self.geo.block_bits()) - 1);
        let order = self.geo.refcount_order;
        let page = ((i << order) >> 3) & !(self.geo.page_size() - 1);
        Ok(Some((block + page, (i - ((page << 3) >> order)) as usize)))
    }

    fn load_refs(&mut self, file: &Node, offset: u64) -> io::Result<()> {
        if !self.refs.has(offset) {
            file.moment_locked(BlkdebugEvent::RefblockLoad);
            let page = read_page(file, offset, self.geo.page_size())?;
            self.refs.insert(offset, page);
        }
        Ok(())
    }

    /// The refcount of cluster `k`.
    ///
    /// # Errors
    /// EIO, or corruption of the refcount table.
    pub fn refcount(&mut self, file: &Node, k: u64) -> io::Result<u64> {
        let Some((page, i)) = self.refcount_place(k)? else { return Ok(0) };
        self.load_refs(file, page)?;
        let order = self.geo.refcount_order;
        Ok(self.refs.get(page).map_or(0, |p| refcount_get(p, order, i)))
    }

    /// Sets the refcount of cluster `k`, whose refcount block exists.
    pub fn set_refcount(&mut self, file: &Node, k: u64, value: u64) -> io::Result<()> {
        if value > self.geo.refcount_max() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "The refcount would exceed what this image's refcount width can hold",
            ));
        }
        let Some((page, i)) = self.refcount_place(k)? else {
            return Err(corrupt(format!("cluster {k:#x} has no refcount block")));
        };
        self.load_refs(file, page)?;
        let order = self.geo.refcount_order;
        if let Some(p) = self.refs.get_mut(page) {
            refcount_set(p, order, i, value);
        }
        Ok(())
    }

    /// Takes up to `want` > 0 adjacent free clusters: their refcounts are 1. Answers the first,
    /// how many, and whether they read as zeroes without having been written.
    ///
    /// # Errors
    /// ENOSPC, EFBIG, I/O errors, corruption.
    pub fn alloc_run(&mut self, file: &Node, want: u64) -> io::Result<(u64, u64, bool)> {
        file.moment_locked(BlkdebugEvent::ClusterAlloc);
        if let Some((first, count)) = self.search(file, want, SEARCH_PAGES)? {
            return Ok((first, count, false));
        }
        match self.alloc_tail(file, want) {
            Ok((first, fresh)) => Ok((first, want, fresh)),
            Err(e) if is_no_space(&e) => {
                // The file cannot grow (a block device, a full disk): any hole will do.
                self.cursor = 0;
                match self.search(file, want, u32::MAX)? {
                    Some((first, count)) => Ok((first, count, false)),
                    None if want > 1 => self.alloc_tail(file, 1).map(|(first, fresh)| (first, 1, fresh)),
                    None => Err(e),
                }
            }
            Err(e) => Err(e),
        }
    }

    /// Walks the cursor to a free cluster below the tail and takes it, with those after it in the
    /// same page.
    fn search(&mut self, file: &Node, want: u64, pages: u32) -> io::Result<Option<(u64, u64)>> {
        let order = self.geo.refcount_order;
        let mut left = pages;
        while self.cursor < self.tail && left > 0 {
            let Some((page, first)) = self.refcount_place(self.cursor)? else {
                // No block: free, but taken only by alloc_tail, which can make a block.
                self.cursor = ((self.cursor >> self.geo.block_bits()) + 1) << self.geo.block_bits();
                continue;
            };
            if !self.refs.has(page) {
                left -= 1;
            }
            self.load_refs(file, page)?;
            let per_page = ((self.geo.page_size() << 3) >> order) as usize;
            let end = per_page.min(first + usize::try_from(self.tail - self.cursor).unwrap_or(per_page));
            let Some(p) = self.refs.get(page) else { break };
            let Some(free) = (first..end).find(|i| refcount_get(p, order, *i) == 0) else {
                self.cursor += (end - first) as u64;
                continue;
            };
            if !self.holes_known {
                self.look_for_holes(file)?;
                continue;
            }
            let stop = end.min(free.saturating_add(usize::try_from(want).unwrap_or(per_page)));
            let count = (free..stop).take_while(|i| refcount_get(p, order, *i) == 0).count();
            let cluster = self.cursor + (free - first) as u64;
            // A corrupt image may call its own tables free.
            if let Some(k) = (cluster..cluster + count as u64).find(|k| self.tables.contains(k)) {
                return Err(corrupt(format!("Metadata cluster {k:#x} has refcount 0")));
            }
            if let Some(p) = self.refs.get_mut(page) {
                (free..free + count).for_each(|i| refcount_set(p, order, i, 1));
            }
            self.barrier = true;
            self.cursor = cluster + count as u64;
            return Ok(Some((cluster, count as u64)));
        }
        Ok(None)
    }

    /// Takes exactly `want` adjacent clusters at the end of the file, with refcount blocks (and a
    /// bigger refcount table) as needed. Answers the first and whether they are fresh.
    ///
    /// # Errors
    /// As [`Meta::alloc_run`]; nothing is changed then.
    pub fn alloc_tail(&mut self, file: &Node, want: u64) -> io::Result<(u64, bool)> {
        let bits = self.geo.block_bits();
        let limit = self.tail + SEARCH_TAIL;
        let mut start = self.tail;
        // What is needed: blocks (indices without one), clusters of a bigger table, `want`.
        let (blocks, table) = loop {
            let (mut blocks, mut table) = (Vec::new(), 0);
            loop {
                let end = start + blocks.len() as u64 + table + want;
                let missing: Vec<u64> = (start >> bits..=(end - 1) >> bits)
                    .filter(|i| self.reftable.entries.get(*i as usize).is_none_or(|e| e & REFTABLE_MASK == 0))
                    .collect();
                let entries = ((end - 1) >> bits) + 1;
                let grow = if entries > self.reftable.entries.len() as u64 {
                    self.bigger_table(entries)?
                } else {
                    0
                };
                if missing.len() == blocks.len() && grow == table {
                    break;
                }
                (blocks, table) = (missing, grow.max(table));
            }
            let end = start + blocks.len() as u64 + table + want;
            match self.last_used(file, start..end)? {
                None => break (blocks, table),
                Some(k) => start = k + 1,
            }
            self.tail = start;
            if start > limit {
                return Err(corrupt("Refcounts beyond the end of the file are not zero"));
            }
        };
        if !self.holes_known && start << self.geo.cluster_bits < self.opened_len {
            self.look_for_holes(file)?;
        }
        let total = blocks.len() as u64 + table + want;
        let end = start + total;
        if !blocks.is_empty() {
            file.moment_locked(BlkdebugEvent::RefblockAlloc);
        }
        if table > 0 {
            file.moment_locked(BlkdebugEvent::ReftableGrow);
        }
        if end > 1 << (56 - self.geo.cluster_bits) {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        self.grow_file(file, end << self.geo.cluster_bits)?;
        let fresh = start >= self.fresh;
        let size = self.geo.cluster_size();
        if !fresh && !blocks.is_empty() {
            let len = blocks.len() as u64 * size;
            file.moment_locked(BlkdebugEvent::RefblockAllocWrite);
            write_zeroes(file, start << self.geo.cluster_bits, len)?;
        }
        // Blocks that exist may have to be read, which can fail: so they come first.
        self.barrier = true;
        let is_new = |k: &u64| blocks.binary_search(&(k >> bits)).is_ok();
        for k in (start..end).filter(|k| !is_new(k)) {
            if let Err(e) = self.set_refcount(file, k, 1) {
                for done in (start..k).filter(|k| !is_new(k)) {
                    // What cannot be taken back is leaked.
                    let _ = self.set_refcount(file, done, 0);
                }
                return Err(e);
            }
        }
        // From here on nothing can fail: new blocks are zeroes, and need not be read.
        if table > 0 {
            self.move_reftable(start + blocks.len() as u64, table);
        }
        for (k, index) in (start..).zip(&blocks) {
            let offset = k << self.geo.cluster_bits;
            self.refs.forget(offset..offset + size, self.geo.page_size());
            self.reftable.set(*index as usize, offset);
            self.tables.insert(k);
        }
        self.tail = end;
        self.fresh = self.fresh.max(end);
        for k in (start..end).filter(is_new) {
            if let Some((page, _)) = self.refcount_place(k)?
                && !self.refs.has(page)
            {
                self.refs.insert(page, vec![0; self.geo.page_size() as usize].into());
            }
            self.set_refcount(file, k, 1)?;
        }
        Ok((end - want, fresh))
    }

    /// The last cluster of `range` that is in use.
    fn last_used(&mut self, file: &Node, range: Range<u64>) -> io::Result<Option<u64>> {
        for k in range.rev() {
            if self.tables.contains(&k) || self.refcount(file, k)? != 0 {
                return Ok(Some(k));
            }
        }
        Ok(None)
    }

    /// How many clusters a refcount table for at least `entries` blocks is to have.
    fn bigger_table(&self, entries: u64) -> io::Result<u64> {
        let per_cluster = self.geo.cluster_size() / 8;
        let max = MAX_REFTABLE_BYTES / self.geo.cluster_size();
        let need = entries.div_ceil(per_cluster);
        if need > max {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        Ok(((entries + entries / 2).div_ceil(per_cluster) + 1).clamp(need, max.max(need)))
    }

    fn move_reftable(&mut self, first: u64, clusters: u64) {
        let old = self.geo.cluster(self.header.reftable_offset);
        let old_clusters = u64::from(self.header.reftable_clusters);
        let entries = clusters * self.geo.cluster_size() / 8;
        self.reftable.entries.resize(entries as usize, 0);
        self.reftable.moved = true;
        self.header.reftable_offset = first << self.geo.cluster_bits;
        // At most 8 MiB of clusters: it fits.
        self.header.reftable_clusters = clusters as u32;
        self.header_dirty = true;
        self.tables.extend(first..first + clusters);
        self.free(old << self.geo.cluster_bits, old_clusters, false);
    }

    /// Makes the file at least `end` bytes long; a little longer, so that not every allocation
    /// costs a system call (close() cuts what was not used), nor a search of the file system.
    pub fn grow_file(&mut self, file: &Node, end: u64) -> io::Result<()> {
        if end <= self.file_len {
            return Ok(());
        }
        let step = (self.file_len / 8).clamp(256 << 10, 16 << 20);
        let roomy = self.geo.round_up(end.max(self.file_len.saturating_add(step)));
        let done = match file.grow(roomy) {
            Ok(()) => roomy,
            Err(_) => match file.resize(end) {
                Ok(()) => end,
                Err(e) => {
                    let full = io::Error::from_raw_os_error(libc::ENOSPC);
                    return Err(if file.driver.grows() { e } else { full });
                }
            },
        };
        self.file_len = done;
        Ok(())
    }

    /// Sees to it that refcount block `index` exists, for a repair: `tail` lies behind everything
    /// that is in use, whatever the refcounts say.
    pub fn make_block(&mut self, file: &Node, index: u64) -> io::Result<()> {
        if self.reftable.entries.get(index as usize).is_some_and(|e| e & REFTABLE_MASK != 0) {
            return Ok(());
        }
        let (k, fresh) = self.alloc_tail(file, 1)?;
        // That may have made the very block, if the tail is in its part of the file.
        if self.reftable.entries.get(index as usize).is_none_or(|e| e & REFTABLE_MASK != 0) {
            return self.set_refcount(file, k, 0);
        }
        let offset = k << self.geo.cluster_bits;
        if !fresh {
            write_zeroes(file, offset, self.geo.cluster_size())?;
        }
        self.refs.forget(offset..offset + self.geo.cluster_size(), self.geo.page_size());
        self.reftable.set(index as usize, offset);
        self.tables.insert(k);
        Ok(())
    }

    /// Raises the refcounts of what `clusters` says by one, for a snapshot or a bitmap that
    /// shares them.
    pub fn add_reference(&mut self, file: &Node, k: u64) -> io::Result<()> {
        let old = self.refcount(file, k)?;
        if old == 0 {
            return Err(corrupt(format!("cluster {k:#x} is in use but has refcount 0")));
        }
        self.set_refcount(file, k, old.saturating_add(1))?;
        self.barrier = true;
        Ok(())
    }
}

/// True when the file cannot grow, but a hole might do.
fn is_no_space(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EFBIG | libc::EDQUOT | libc::ENOTSUP))
}
