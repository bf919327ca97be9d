//! A look at an image before anything goes where its refcounts say that nothing is.
//!
//! Owns: that look. Never: repairs, or looks for anything else. Threads, locks: as [`Meta`].
//!
//! A refcount of 0 for a cluster in use costs its data as soon as the cluster is handed out again, and
//! nothing could tell afterwards: it is 1 then, as it is to be. (QEMU does not look.) So the first
//! allocation inside of what was there when the image was opened waits until all tables were read. An
//! image that only grows, as a new one does, is never looked at, nor is one with too many tables.

use super::corrupt::{Broken, corrupt};
use super::meta::{Meta, read_padded};
use super::types::{OFFSET_MASK, be64};
use crate::block::node::Node;
use std::io;

/// The most bytes of L2 tables that a guest waits for: 128 GiB of data in clusters of 64 KiB. As many of
/// snapshots' L1 tables: a small file may claim to have 64 GiB and more of those.
const MOST: usize = 16 << 20;

impl Meta {
    /// Before clusters are taken that the image's refcounts call free. Once; later calls do nothing.
    ///
    /// # Errors
    /// Corruption: one of them is in use.
    pub(super) fn look_for_holes(&mut self, file: &Node) -> io::Result<()> {
        if std::mem::replace(&mut self.holes_known, true) || self.geo.external {
            return Ok(());
        }
        file.locked();
        let geo = self.geo;
        let (size, page) = (geo.cluster_size() as usize, geo.page_size() as usize);
        let mut tables = self.l1.entries.clone();
        let mut snapshots = self.snapshot_tables(file)?;
        snapshots.retain(|(offset, _)| *offset != self.header.snapshots_offset);
        if snapshots.iter().map(|(_, len)| len).sum::<u64>() > MOST as u64 {
            return Ok(());
        }
        for (offset, len) in snapshots {
            let mut l1 = vec![0; len as usize];
            read_padded(file, offset, &mut l1)?;
            tables.extend(l1.chunks_exact(8).map(|e| be64(e, 0)));
        }
        tables.iter_mut().for_each(|t| *t &= OFFSET_MASK);
        // What cannot be is found when it is used, as is what cannot be read.
        tables.retain(|t| *t != 0 && t & (geo.cluster_size() - 1) == 0 && *t < self.file_len);
        tables.sort_unstable();
        tables.dedup();
        if tables.len() > MOST / size {
            return Ok(());
        }
        let mut used = Vec::new();
        let mut bytes = vec![0; size];
        for table in tables {
            if read_padded(file, table, &mut bytes).is_err() {
                continue;
            }
            // Memory is newer.
            for (at, old) in (table..).step_by(page).zip(bytes.chunks_mut(page)) {
                if let Some(new) = self.l2.get(at) {
                    old.copy_from_slice(new);
                }
            }
            for entry in bytes.chunks_exact(1 << geo.entry_bits()).filter(|e| e[..8] != [0; 8]) {
                let bitmap = if geo.extended { be64(entry, 8) } else { 0 };
                let Ok(entry) = geo.decode(be64(entry, 0), bitmap) else { continue };
                used.extend(entry.compressed.map(|c| c.0).or(entry.host).map(|at| geo.cluster(at)));
            }
        }
        used.sort_unstable();
        used.dedup();
        for k in used {
            if let Ok(0) = self.refcount(file, k) {
                let place = k << geo.cluster_bits..(k + 1) << geo.cluster_bits;
                let why = format!("cluster {k:#x} is in use but has refcount 0");
                return Err(corrupt(Broken::at(why, &place)));
            }
        }
        Ok(())
    }
}
