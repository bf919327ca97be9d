//! Write-zeroes and discard: clusters change their state, no data move.
//!
//! Owns: which state a cluster gets. Never: lowers refcounts or punches; it only notes what was
//! freed ([`Meta::free`]), the checkpoint does the rest. Threads: any. Locks: `meta`, for one
//! page of L2 entries at a time.
//!
//! An external data file has one place for each cluster. If it is the disk by itself
//! (`data-file-raw`), the request goes there and the tables stay. Else the tables say what is zero,
//! and the place is given back while it is in flight, so that it is never punched after its reuse.

use super::Qcow2;
use super::header::AUTOCLEAR_DATA_FILE_RAW;
use super::meta::{Meta, ZEROES};
use super::types::Entry;
use crate::block::driver::Flags;
use crate::block::node::Node;
use crate::sys::iov::Iov;
use std::io;
use std::ops::Range;
use std::sync::MutexGuard;
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
        if !self.geo.v3 {
            // No zero flag.
            return Err(not_supported());
        }
        if self.raw_data() {
            return self.zero_raw(off, len, flags);
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
        let hide = flags.contains(Flags::HIDE);
        let needs_data = |r: &Range<u64>| -> io::Result<bool> {
            Ok(!r.is_empty() && !self.stays_zero(r.start, r.end - r.start, hide)?)
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
            self.erase_as(first, last - first, how, hide)?;
        }
        Ok(())
    }

    /// Up to where zeroes have something to hide, in bytes: the backing file, or one that is not there yet.
    /// A mirror's target is open without its own until the guest is switched over.
    fn hides(&self, meta: &Meta) -> u64 {
        match self.backing.node() {
            Some(backing) => backing.len(),
            None if meta.header.backing_file.is_some() => u64::MAX,
            None => 0,
        }
    }

    /// True when `len` bytes at `off` are known to read as zeroes (false: perhaps), with whatever backing
    /// file there will be; `hide`: also with one that nothing speaks of yet.
    fn stays_zero(&self, off: u64, len: u64, hide: bool) -> io::Result<bool> {
        let hides = if hide { u64::MAX } else { self.hides(&self.lock()) };
        self.reads_zero(off, len, hides)
    }

    /// True when the external data file is the disk by itself: tables do not count.
    pub(super) fn raw_data(&self) -> bool {
        self.data_file.is_some() && self.lock().header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// Makes a part of such a data file read as zeroes. Its tables stay as they are: they say that
    /// the data are there, or zeroes, and both are true.
    fn zero_raw(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let mut meta = self.lock();
        while meta.exclusive {
            meta = self.wait(meta);
        }
        if meta.corrupt {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let _using = self.using(&meta);
        drop(meta);
        self.data()?.zero(off, len, flags)
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
        if self.raw_data() {
            // What it holds then is what the disk holds: zeroes, or nothing is done.
            return match self.punch.load(Ordering::Relaxed) {
                true => self.zero_raw(off, len, Flags::MAY_UNMAP | Flags::NO_FALLBACK),
                false => Err(not_supported()),
            };
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
        self.erase_as(off, len, how, false)
    }

    /// The same; `hide`: zeroes are said to be there where nothing is, whatever lies behind the image.
    fn erase_as(&self, off: u64, len: u64, how: Erase, hide: bool) -> io::Result<()> {
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
            pos = self.erase_page(meta, pos, end, how, hide)?;
        }
        Ok(())
    }

    /// Does what lies in one page of L2 entries; answers where to go on.
    fn erase_page(
        &self,
        mut meta: MutexGuard<'_, Meta>,
        off: u64,
        end: u64,
        how: Erase,
        hide: bool,
    ) -> io::Result<u64> {
        let backing = match how {
            Erase::Cut => 0,
            _ if hide => u64::MAX,
            _ => self.hides(&meta),
        };
        let result = self.file().and_then(|f| meta.erase_page(&f, off, end, how, backing));
        // In an external data file nothing is allocated elsewhere meanwhile, only there again: who
        // wants to has to wait until the space is given back.
        let mut flight = None;
        if let Ok(page) = &result
            && let [first, .., last] | [first @ last] = page.outside.as_slice()
        {
            let clusters = self.geo.cluster(first.start)..self.geo.cluster(last.end - 1) + 1;
            meta.in_flight.push(clusters.clone());
            flight = Some(self.flight(clusters));
        }
        drop(meta);
        self.early_free();
        let page = self.judge(result)?;
        if let Some(flight) = flight {
            self.punch_outside(&page.outside);
            flight.landed(self.lock());
        }
        if let Some(range) = page.write {
            self.write_zeroes_at(range)?;
        }
        Ok(page.next)
    }

    /// Gives the space of those parts of the external data file back to its file system. A hint.
    fn punch_outside(&self, parts: &[Range<u64>]) {
        let Ok(data) = self.data() else { return };
        let have = data.len();
        for r in parts.iter().filter(|r| r.start < have && self.punch.load(Ordering::Relaxed)) {
            let len = r.end.min(have) - r.start;
            // As zeroes, never as anything: until the next checkpoint the disk's tables say that the
            // data are there, and a reader that looked before may be on its way.
            if let Err(e) = data.zero(r.start, len, Flags::MAY_UNMAP | Flags::NO_FALLBACK) {
                log::debug!("qcow2: discard in the data file: {e}");
            }
        }
    }
}

/// What [`Meta::erase_page`] did, and what is left to do.
struct Page {
    /// Where to go on.
    next: u64,
    /// What must be zeroed by writing.
    write: Option<Range<u64>>,
    /// What is not needed any more of an external data file, in order.
    outside: Vec<Range<u64>>,
}

impl Meta {
    /// See [`Qcow2::erase`].
    fn erase_page(&mut self, file: &Node, off: u64, end: u64, how: Erase, backing: u64) -> io::Result<Page> {
        let geo = self.geo;
        let mut c = geo.cluster(off);
        let per_page = geo.page_size() >> geo.entry_bits();
        let stop = geo.clusters(off, end - off).end.min((c | (per_page - 1)) + 1);
        if !self.has_l2(c) && off >= backing {
            // Nothing is there, and nothing shows through: all of this table reads as zeroes.
            let shift = geo.cluster_bits + geo.l2_bits();
            let next = end.min(((off >> shift) + 1) << shift);
            return Ok(Page { next, write: None, outside: Vec::new() });
        }
        let mut outside: Vec<Range<u64>> = Vec::new();
        while c < stop {
            let start = off.max(c << geo.cluster_bits);
            let next = end.min((c + 1) << geo.cluster_bits);
            let old = self.entry(file, c)?;
            let shows = start < backing;
            let units = (next - start).div_ceil(geo.unit_size());
            let first = geo.in_cluster(start) >> geo.unit_bits();
            let mask = ((((1u64 << units) - 1) << first) & u64::from(u32::MAX)) as u32;
            if mask != geo.all_units() && old.compressed.is_some() {
                return Ok(Page { next, write: Some(start..next), outside });
            }
            if let Some(new) = self.erased(&old, mask, how, shows) {
                if new.host.is_none() {
                    self.may_free(&old)?;
                }
                if new.compressed.is_none() {
                    self.ensure_l2(file, c)?;
                    self.set_entry(file, c, &new)?;
                }
                if new.host.is_none() {
                    self.free_entry(&old, how != Erase::Zero);
                    if geo.external && old.host.is_some() && how != Erase::Cut {
                        let end = (c + 1) << geo.cluster_bits;
                        match outside.last_mut() {
                            Some(last) if last.end == c << geo.cluster_bits => last.end = end,
                            _ => outside.push(c << geo.cluster_bits..end),
                        }
                    }
                }
            }
            c += 1;
        }
        Ok(Page { next: end.min(stop << geo.cluster_bits), write: None, outside })
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
