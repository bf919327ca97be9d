//! Write-zeroes and discard: clusters change their state, no data move.
//!
//! Owns: which state a cluster gets. Never: lowers refcounts or punches; it only notes what was
//! freed ([`Meta::free`]), the checkpoint does the rest. Threads: any. Locks: `meta`, for one
//! page of L2 entries at a time.

use super::Qcow2;
use super::meta::{Meta, ZEROES};
use super::types::Entry;
use crate::block::driver::Flags;
use crate::block::node::Node;
use crate::sys::iov::Iov;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What is to become of clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Erase {
    /// Read as zeroes; host clusters are kept.
    Zero,
    /// Read as zeroes; host clusters are given up.
    Unmap,
    /// The guest does not need the contents: zeroes where the format can say so.
    Discard,
    /// Nothing is there any more (the disk ends before): not even the backing file shows.
    Cut,
}

fn not_supported() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOTSUP)
}

impl Qcow2 {
    /// Makes `len` bytes at `off` read as zeroes.
    pub(super) fn zero_at(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let raw = self.data_file.is_some();
        if !self.geo.v3 || raw {
            // No zero flag, or an external data file that may have to be good by itself.
            return Err(not_supported());
        }
        if len == 0 {
            return Ok(());
        }
        let unit = self.geo.unit_size();
        let size = self.size.load(Ordering::SeqCst);
        let end = off + len;
        let first = off.next_multiple_of(unit);
        // The rest of the last unit lies beyond the disk's end.
        let last = if end == size { end.next_multiple_of(unit) } else { end & !(unit - 1) };
        let (head, tail) = match first < last {
            true => (off..first, last.min(end)..end),
            false => (off..end, end..end),
        };
        let edges = [head, tail];
        let needs_data = |r: &Range<u64>| -> io::Result<bool> {
            Ok(!r.is_empty() && !self.reads_zero(r.start, r.end - r.start)?)
        };
        if flags.contains(Flags::NO_FALLBACK) && (needs_data(&edges[0])? || needs_data(&edges[1])?) {
            return Err(not_supported());
        }
        for r in &edges {
            if needs_data(r)? {
                self.write_zeroes_at(r.clone())?;
            }
        }
        if first < last {
            let how = if flags.contains(Flags::MAY_UNMAP) { Erase::Unmap } else { Erase::Zero };
            self.erase(first, last - first, how)?;
        }
        Ok(())
    }

    /// Writes zeroes as data.
    pub(super) fn write_zeroes_at(&self, range: Range<u64>) -> io::Result<()> {
        let mut pos = range.start;
        while pos < range.end {
            let n = (range.end - pos).min(ZEROES.len() as u64);
            self.write_at(pos, &Iov::from_slice(&ZEROES[..n as usize]))?;
            pos += n;
        }
        Ok(())
    }

    /// Gives up the whole clusters among `len` bytes at `off`.
    pub(super) fn discard_at(&self, off: u64, len: u64) -> io::Result<()> {
        if !self.geo.v3 && self.backing.node().is_some() {
            // Without the zero flag the backing file's old data would show through.
            return Err(not_supported());
        }
        if self.data_file.is_some() {
            return Err(not_supported());
        }
        let size = self.size.load(Ordering::SeqCst);
        let cluster = self.geo.cluster_size();
        let first = off.next_multiple_of(cluster);
        let end = off + len;
        let last = if end == size { self.geo.round_up(end) } else { end & !(cluster - 1) };
        if first >= last {
            return Ok(());
        }
        self.erase(first, last - first, Erase::Discard)
    }

    /// Changes the state of whole units.
    pub(super) fn erase(&self, off: u64, len: u64, how: Erase) -> io::Result<()> {
        let (mut pos, end) = (off, off + len);
        while pos < end {
            let meta = self.lock();
            let meta = match how {
                // Under exclusive use already.
                Erase::Cut => meta,
                _ => {
                    let per_page = self.geo.page_size() >> self.geo.entry_bits();
                    let c = self.geo.cluster(pos);
                    let stop = self.geo.clusters(pos, end - pos).end.min((c | (per_page - 1)) + 1);
                    self.wait_for(meta, &(c..stop))
                }
            };
            if meta.corrupt {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            if meta.wants_checkpoint() {
                drop(meta);
                self.checkpoint(false)?;
                continue;
            }
            pos = self.erase_page(meta, pos, end, how)?;
        }
        Ok(())
    }

    /// Does what lies in one page of L2 entries; answers where to go on.
    fn erase_page(
        &self,
        mut meta: std::sync::MutexGuard<'_, Meta>,
        off: u64,
        end: u64,
        how: Erase,
    ) -> io::Result<u64> {
        let backing = match how {
            Erase::Cut => 0,
            _ => self.backing.node().map_or(0, |n| n.len()),
        };
        let result = self.file().and_then(|f| meta.erase_page(&f, off, end, how, backing));
        drop(meta);
        self.early_free();
        let (next, data) = self.judge(result)?;
        if let Some(range) = data {
            self.write_zeroes_at(range)?;
        }
        Ok(next)
    }
}

impl Meta {
    /// See [`Qcow2::erase`]. Answers where to go on, and what must be zeroed by writing.
    fn erase_page(
        &mut self,
        file: &Node,
        off: u64,
        end: u64,
        how: Erase,
        backing: u64,
    ) -> io::Result<(u64, Option<Range<u64>>)> {
        let geo = self.geo;
        let mut c = geo.cluster(off);
        let per_page = geo.page_size() >> geo.entry_bits();
        let stop = geo.clusters(off, end - off).end.min((c | (per_page - 1)) + 1);
        if !self.has_l2(c) && off >= backing {
            // Nothing is there, and nothing shows through: all of this table reads as zeroes.
            let shift = geo.cluster_bits + geo.l2_bits();
            return Ok((end.min(((off >> shift) + 1) << shift), None));
        }
        while c < stop {
            let start = off.max(c << geo.cluster_bits);
            let next = end.min((c + 1) << geo.cluster_bits);
            let old = self.entry(file, c)?;
            let shows = start < backing;
            let units = (next - start).div_ceil(geo.unit_size());
            let first = geo.in_cluster(start) >> geo.unit_bits();
            let mask = ((((1u64 << units) - 1) << first) & u64::from(u32::MAX)) as u32;
            if mask != geo.all_units() && old.compressed.is_some() {
                return Ok((next, Some(start..next)));
            }
            if let Some(new) = self.erased(&old, mask, how, shows) {
                if new.compressed.is_none() {
                    self.ensure_l2(file, c)?;
                    self.set_entry(file, c, &new)?;
                }
                if new.host.is_none() {
                    self.free_entry(&old, how != Erase::Zero);
                }
            }
            c += 1;
        }
        Ok((end.min(stop << geo.cluster_bits), None))
    }

    /// What the entry `old` becomes when the units of `mask` are erased; `None`: it may stay.
    fn erased(&self, old: &Entry, mask: u32, how: Erase, shows: bool) -> Option<Entry> {
        let all = self.geo.all_units();
        let empty = old.data == 0 && old.compressed.is_none();
        match how {
            Erase::Cut => (!old.is_unallocated()).then(Entry::default),
            Erase::Discard => {
                let quiet = old.host.is_none() && empty && (old.zero == all || !shows);
                let zero = if self.geo.v3 { all } else { 0 };
                (!quiet).then_some(Entry { zero, ..Entry::default() })
            }
            Erase::Zero | Erase::Unmap => {
                if old.zero & mask == mask && !(how == Erase::Unmap && old.host.is_some()) {
                    return None;
                }
                if old.is_unallocated() && !shows {
                    return None;
                }
                // Partly erased units of a cluster keep it, whoever else has it.
                let whole = mask == all || (old.data & !mask == 0 && old.compressed.is_none());
                let mut new =
                    Entry { data: old.data & !mask, zero: old.zero | mask, compressed: None, ..*old };
                let shared = old.host.is_some() && !old.copied;
                if whole && (how == Erase::Unmap || shared) {
                    (new.host, new.copied) = (None, false);
                }
                (new != *old).then_some(new)
            }
        }
    }
}
