//! Stored bitmaps: loaded when the image is opened, stored when it is closed or turns read-only.
//!
//! Owns: when what of them is in the image. Never: the bits (the block layer's
//! [`Bitmap`](crate::block::bitmap::Bitmap)), or the form of the directory (bitmap_dir.rs). Threads:
//! control; no guest request runs meanwhile. Locks: `meta` for moments; exclusive use while the
//! directory changes.
//!
//! # The order
//!
//! * *Before the first write* to an image every bitmap that was good is marked IN_USE, in place and
//!   on stable storage: an entry's flags lie in one sector, so any mix of old and new sectors says of
//!   each bitmap that it is good, which is still true, or in use. From then on a crash loses the
//!   bitmaps, never leaves one that lacks a write: who opens the image finds them inconsistent.
//! * *To store*, data, tables and a new directory go to new clusters; a checkpoint makes them and
//!   their refcounts durable. The autoclear bit is turned off (durable), the extension written
//!   (durable), the bit turned on (durable). Without the bit there are no bitmaps, so a crash in
//!   between loses them and leaks their clusters. The old directory, tables and data are freed then,
//!   like everything freed: first unreachable on disk, then free.
//! * *To remove* one, a directory without it is written in that way.

use super::Qcow2;
use super::bitmap_dir::{
    self as dir, ALL_ONES, MAX_BITMAPS, MAX_DIRECTORY, Stored, check_constraints, data_bytes, entry_size,
};
use super::header::{AUTOCLEAR_BITMAPS, BitmapsExt};
use super::meta::{read_padded, write_all};
use super::mutant::Mutant;
use super::types::OFFSET_MASK;
use crate::block::bitmap::{Bitmap, Refuse};
use crate::block::driver::StoredBitmaps;
use crate::block::node::Node;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Most bytes of all bitmaps of an image in memory.
const MAX_LOADED: u64 = 1 << 30;

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

/// Clusters that were taken for something that may fail before anything refers to them.
#[derive(Default)]
struct Taken(Vec<(u64, u64)>);

impl Qcow2 {
    /// Makes the block layer's bitmaps of the stored ones.
    pub(super) fn load_bitmaps(&self) -> io::Result<()> {
        let file = self.file()?;
        let list = self.lock().stored.clone();
        let len = self.size.load(Ordering::SeqCst);
        let mut all = 0;
        for stored in list.iter().filter(|s| !s.in_use) {
            let table = dir::read_table(&file, &self.geo, stored)?;
            all += (0..)
                .zip(&table)
                .filter(|(_, e)| **e != 0)
                .map(|(n, _)| self.part(stored, len, n))
                .sum::<u64>();
            if all > MAX_LOADED {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("The image's bitmaps have more than {MAX_LOADED} bytes"),
                ));
            }
        }
        let mut bitmaps = Vec::with_capacity(list.len());
        for stored in &list {
            let says = |e: crate::error::Error| invalid(e.desc);
            let bitmap = Bitmap::new(Some(&stored.name), 1 << stored.granularity_bits, len).map_err(says)?;
            bitmap.set_persistent(true);
            bitmap.set_enabled(stored.auto);
            if stored.in_use {
                bitmap.set_inconsistent();
            } else {
                self.load_data(&file, stored, &bitmap)?;
            }
            bitmap.set_read_only(self.read_only());
            bitmaps.push(bitmap);
        }
        self.bitmaps.fill(bitmaps);
        Ok(())
    }

    /// Bytes of data cluster `n` of a bitmap that are in use, for a disk of `len` bytes.
    fn part(&self, stored: &Stored, len: u64, n: u64) -> u64 {
        let size = self.geo.cluster_size();
        size.min(data_bytes(len, stored.granularity_bits.into()).saturating_sub(n * size))
    }

    fn load_data(&self, file: &Node, stored: &Stored, bitmap: &Bitmap) -> io::Result<()> {
        let size = self.geo.cluster_size();
        let table = dir::read_table(file, &self.geo, stored)?;
        let mut buf = vec![0; size as usize];
        for (n, entry) in (0..).zip(&table).filter(|(_, e)| **e != 0) {
            let buf = &mut buf[..self.part(stored, bitmap.len(), n) as usize];
            match entry & OFFSET_MASK {
                0 => buf.fill(if entry & ALL_ONES != 0 { 0xff } else { 0 }),
                offset => read_padded(file, offset, buf)?,
            }
            bitmap.load(n * size * 8, buf);
        }
        Ok(())
    }

    /// Before the first write: every good bitmap in the image is marked as in use.
    pub(super) fn use_bitmaps(&self) -> io::Result<()> {
        let (ext, mut list) = {
            let meta = self.lock();
            (meta.header.bitmaps, meta.stored.clone())
        };
        if let Some(ext) = ext
            && list.iter().any(|s| !s.in_use)
            && !self.has_bug(Mutant::BitmapNotInUse)
        {
            let file = self.file()?;
            list.iter_mut().for_each(|s| s.in_use = true);
            write_all(&file, ext.offset, &dir::bytes(&list))?;
            file.flush()?;
            self.lock().stored = list;
        }
        if ext.is_none() {
            // Whatever became of a directory that could not be replaced: there is none now.
            let (dirty, stale) = {
                let mut meta = self.lock();
                (meta.header_dirty, std::mem::take(&mut meta.stale_extension))
            };
            if dirty {
                self.checkpoint(true)?;
            }
            if stale {
                // A program that knows no bitmaps has written to the image: what is left of them goes.
                self.write_extension(None)?;
            }
        }
        self.bitmaps.all().iter().for_each(|b| b.set_read_only(false));
        Ok(())
    }

    /// Stores what is to be stored. Under exclusive use. What cannot be stored stays as it is in the
    /// image: in use.
    pub(super) fn store_bitmaps(&self) -> io::Result<()> {
        let due = |b: &Arc<Bitmap>| b.persistent() && !b.inconsistent() && !b.read_only();
        let due: Vec<_> = self.bitmaps.all().into_iter().filter(due).collect();
        if due.is_empty() {
            return Ok(());
        }
        let mut list = self.lock().stored.clone();
        let mut taken = Taken::default();
        let mut old: Vec<Stored> = Vec::new();
        let at: HashMap<String, usize> = (0..).zip(&list).map(|(n, s)| (s.name.clone(), n)).collect();
        let mut done = Ok(());
        for bitmap in &due {
            let entry = at.get(bitmap.name().unwrap_or_default());
            done = self.store_one(bitmap, entry.copied(), &mut list, &mut old, &mut taken);
            if done.is_err() {
                break;
            }
        }
        if let Err(e) = done.and_then(|()| self.replace_directory(list, &mut taken)) {
            self.give_back(taken);
            return Err(e);
        }
        self.drop_tables(&old);
        self.drain()
    }

    fn store_one(
        &self,
        bitmap: &Arc<Bitmap>,
        entry: Option<usize>,
        list: &mut Vec<Stored>,
        old: &mut Vec<Stored>,
        taken: &mut Taken,
    ) -> io::Result<()> {
        let name = bitmap.name().unwrap_or_default();
        let len = self.size.load(Ordering::SeqCst);
        let fits = match len {
            0 => Err(invalid("the disk is empty")),
            _ => check_constraints(&self.geo, len, name, bitmap.granularity()),
        };
        if let Err(e) = fits {
            log::error!("Bitmap '{name}' doesn't satisfy the constraints: {e}");
            return Ok(());
        }
        let whole;
        let content = match bitmap.successor() {
            None => bitmap,
            Some(successor) => {
                whole = bitmap.copy().map_err(|e| invalid(e.desc))?;
                whole.merge(&successor);
                &whole
            }
        };
        let (table, entries) = self.store_data(content, taken)?;
        let new = Stored {
            table,
            entries,
            in_use: false,
            auto: bitmap.recording(),
            // 9 to 31, just checked.
            granularity_bits: bitmap.granularity().ilog2() as u8,
            name: name.to_string(),
        };
        match entry.and_then(|at| list.get_mut(at)) {
            Some(entry) => old.push(std::mem::replace(entry, new)),
            None => list.push(new),
        }
        Ok(())
    }

    /// Writes the data and the table of a bitmap; answers the table's offset and entries.
    fn store_data(&self, bitmap: &Bitmap, taken: &mut Taken) -> io::Result<(u64, u32)> {
        let size = self.geo.cluster_size();
        let count = data_bytes(bitmap.len(), bitmap.granularity().ilog2()).div_ceil(size);
        let mut table = vec![0u8; (count * 8) as usize];
        let mut buf = vec![0; size as usize];
        for (n, entry) in (0..).zip(table.chunks_exact_mut(8)) {
            // Whole clusters of clean granules are found quickly.
            let from = (n * size * 8).saturating_mul(bitmap.granularity());
            let end = ((n + 1) * size * 8).saturating_mul(bitmap.granularity());
            if bitmap.next_dirty(from, end, 1).is_none() {
                continue;
            }
            bitmap.save(n * size * 8, &mut buf);
            if buf.iter().all(|b| *b == 0xff) {
                entry.copy_from_slice(&ALL_ONES.to_be_bytes());
                continue;
            }
            let offset = self.take(1, taken)?;
            write_all(&*self.file()?, offset, &buf)?;
            entry.copy_from_slice(&offset.to_be_bytes());
        }
        let offset = self.put(table, taken)?;
        // At most MAX_DATA / 512.
        Ok((offset, count as u32))
    }

    /// Takes `count` adjacent clusters.
    fn take(&self, count: u64, taken: &mut Taken) -> io::Result<u64> {
        let file = self.file()?;
        let mut meta = self.lock();
        let first = match count {
            1 => meta.alloc_run(&file, 1)?.0,
            _ => meta.alloc_tail(&file, count)?.0,
        };
        meta.tables.extend(first..first + count);
        let offset = first << meta.geo.cluster_bits;
        taken.0.push((offset, count));
        Ok(offset)
    }

    /// Writes `bytes` to new clusters.
    fn put(&self, mut bytes: Vec<u8>, taken: &mut Taken) -> io::Result<u64> {
        let whole = self.geo.round_up(bytes.len() as u64);
        let offset = self.take(whole >> self.geo.cluster_bits, taken)?;
        bytes.resize(whole as usize, 0);
        write_all(&*self.file()?, offset, &bytes)?;
        Ok(offset)
    }

    /// What was taken is not needed: nothing on disk refers to it.
    fn give_back(&self, taken: Taken) {
        let mut meta = self.lock();
        taken.0.into_iter().for_each(|(offset, count)| meta.free(offset, count, true));
    }

    /// Makes `list` the directory. See the module's head. On an error before anything of it counts,
    /// `taken` is what to give back.
    fn replace_directory(&self, list: Vec<Stored>, taken: &mut Taken) -> io::Result<()> {
        let mut ext = None;
        if !list.is_empty() {
            let bytes = dir::bytes(&list);
            if list.len() > MAX_BITMAPS || bytes.len() as u64 > MAX_DIRECTORY {
                return Err(invalid("Too many persistent bitmaps"));
            }
            // At most 65535.
            let (count, size) = (list.len() as u32, bytes.len() as u64);
            ext = Some(BitmapsExt { count, size, offset: self.put(bytes, taken)? });
        }
        if self.has_bug(Mutant::DirectoryFirst) {
            self.switch(ext)?;
        }
        // Data, tables and directory with their refcounts.
        self.checkpoint(true)?;
        let old = self.lock().header.bitmaps;
        let was = std::mem::take(taken);
        if let Err(e) = self.switch(ext) {
            // What the image has now is not known but for this: no bitmaps, or the old or new ones,
            // each whole. Nothing is freed, and the next checkpoint says that there are none.
            let mut meta = self.lock();
            meta.header.bitmaps = None;
            meta.header.autoclear &= !AUTOCLEAR_BITMAPS;
            meta.header_dirty = true;
            meta.stored.clear();
            log::error!("qcow2: the bitmap directory is not replaced; clusters may be leaked");
            return Err(e);
        }
        drop(was);
        let mut meta = self.lock();
        meta.stored = list;
        if let Some(old) = old {
            let clusters = meta.geo.round_up(old.size) >> meta.geo.cluster_bits;
            meta.free(old.offset, clusters, true);
        }
        Ok(())
    }

    /// Points the header to another directory: the bit goes, the extension changes, the bit comes.
    fn switch(&self, to: Option<BitmapsExt>) -> io::Result<()> {
        {
            let mut meta = self.lock();
            meta.header.bitmaps = None;
            if meta.header.autoclear & AUTOCLEAR_BITMAPS != 0 && !self.has_bug(Mutant::DirectoryFirst) {
                meta.header.autoclear &= !AUTOCLEAR_BITMAPS;
                meta.header_dirty = true;
            }
        }
        if !self.has_bug(Mutant::DirectoryFirst) {
            self.checkpoint(true)?;
        }
        self.write_extension(to)?;
        if to.is_some() {
            let mut meta = self.lock();
            meta.header.bitmaps = to;
            meta.header.autoclear |= AUTOCLEAR_BITMAPS;
            meta.header_dirty = true;
            drop(meta);
            self.checkpoint(true)?;
        }
        Ok(())
    }

    /// Frees the tables and data of bitmaps that the directory names no more.
    fn drop_tables(&self, list: &[Stored]) {
        let Ok(file) = self.file() else { return };
        for stored in list {
            let table = match dir::read_table(&file, &self.geo, stored) {
                Ok(table) => table,
                Err(e) => {
                    log::warn!("qcow2: clusters of bitmap '{}' are leaked: {e}", stored.name);
                    continue;
                }
            };
            let mut meta = self.lock();
            for offset in table.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0) {
                meta.free(offset, 1, true);
            }
            let clusters = meta.geo.round_up(u64::from(stored.entries) * 8) >> meta.geo.cluster_bits;
            meta.free(stored.table, clusters, true);
        }
    }

    /// The image was stored and turns read-only: its bitmaps do, too.
    pub(super) fn freeze_bitmaps(&self) {
        self.bitmaps.all().iter().filter(|b| b.persistent()).for_each(|b| b.set_read_only(true));
    }

    /// Whether the disk may get another length: a bitmap that cannot be used cannot follow.
    pub(super) fn bitmaps_may_resize(&self) -> io::Result<()> {
        let stored: HashSet<String> = self.lock().stored.iter().map(|s| s.name.clone()).collect();
        let list = self.bitmaps.all();
        let mut known = list.iter().filter(|b| b.name().is_some_and(|n| stored.contains(n)));
        known.try_for_each(|b| b.check(Refuse::Change)).map_err(|e| invalid(e.desc))
    }
}

impl StoredBitmaps for Qcow2 {
    fn can_store(&self, name: &str, granularity: u64) -> io::Result<()> {
        if !self.geo.v3 {
            return Err(invalid("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        check_constraints(&self.geo, self.size.load(Ordering::SeqCst), name, granularity)?;
        let list: Vec<_> = self.bitmaps.all().into_iter().filter(|b| b.persistent()).collect();
        if list.len() >= MAX_BITMAPS {
            return Err(invalid("Maximum number of persistent bitmaps is already reached"));
        }
        let names = list.iter().filter_map(|b| b.name()).chain([name]);
        if names.map(|n| entry_size(n.len())).sum::<u64>() > MAX_DIRECTORY {
            return Err(invalid("Not enough space in the bitmap directory"));
        }
        self.extension_fits()
    }

    fn remove_stored(&self, name: &str) -> io::Result<()> {
        let mut list = self.lock().stored.clone();
        let Some(at) = list.iter().position(|s| s.name == name) else { return Ok(()) };
        if self.read_only() {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let _alone = self.exclusive();
        let gone = list.remove(at);
        let mut taken = Taken::default();
        let done = self.replace_directory(list, &mut taken);
        if let Err(e) = done {
            self.give_back(taken);
            let text = format!("Failed to update bitmap extension: {}", crate::error::strerror(&e));
            return Err(io::Error::new(e.kind(), text));
        }
        self.drop_tables(&[gone]);
        self.drain()
    }
}
