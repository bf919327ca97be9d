//! Reading and writing guest data: reserve → write data with no lock → link.
//!
//! Owns: the course of a request. Never: knows how tables are laid out, writes metadata to disk.
//! Threads: any number. Locks: `meta` for look-up, reservation and link; none while data move.
//!
//! A write to clusters that are ours goes in place; the lock is held for the look-up only. Other
//! writes reserve host clusters and enter the guest clusters in the list of what is in flight;
//! whoever wants to allocate, zero or discard one of them waits until it is gone from the list.
//! Readers do not wait: they see the old contents until the link, which comes after the data.

use super::Qcow2;
use super::compress::decompress;
use super::corrupt::corrupt;
use super::meta::{Map, Meta, ZEROES, read_padded};
use super::mutant::Mutant;
use super::types::Entry;
use crate::block::debug::BlkdebugEvent;
use crate::block::driver::Flags;
use crate::block::node::Node;
use crate::sys::buf::CopyBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

/// A reservation: where the data of some guest clusters are to be.
pub(super) struct Plan {
    /// The guest clusters, as they are in the in-flight list.
    pub range: Range<u64>,
    /// Offset of the first one's host cluster.
    pub host: u64,
    /// The host clusters were allocated for this (and are given back on failure).
    pub new: bool,
    /// They read as zeroes already.
    pub fresh: bool,
    /// What must be written in all: the request's part and what is copied around it.
    pub write: Range<u64>,
    /// The request's part.
    pub data: Range<u64>,
}

impl Meta {
    /// True when the host cluster of `entry` is this guest cluster's own to write.
    fn is_ours(&self, entry: &Entry) -> bool {
        entry.host.is_some() && (entry.copied || self.geo.external)
    }

    /// Reserves host clusters for a write of `len` bytes at `off`, or for as much of it as can be
    /// done at once. Nothing of the first cluster is in flight. `None`: it can be written in place
    /// now (its table was not ours alone before).
    fn reserve(&mut self, file: &Node, off: u64, len: u64) -> io::Result<Option<Plan>> {
        let geo = self.geo;
        let c = geo.cluster(off);
        self.ensure_l2(file, c)?;
        // All entries in one page, so that the link can do all or nothing.
        let per_page = geo.page_size() >> geo.entry_bits();
        let mut end = geo.clusters(off, len).end.min((c | (per_page - 1)) + 1);
        for r in &self.in_flight {
            if r.start > c && !self.has_bug(Mutant::NoWait) {
                end = end.min(r.start);
            }
        }
        let first = self.entry(file, c)?;
        let ours = self.is_ours(&first);
        if ours && first.data >> (geo.in_cluster(off) >> geo.unit_bits()) & 1 != 0 {
            return Ok(None);
        }
        if !ours {
            self.may_free(&first)?;
        }
        let mut last = first;
        let mut count = 1;
        while c + count < end {
            let entry = self.entry(file, c + count)?;
            if self.is_ours(&entry) != ours || (!ours && self.may_free(&entry).is_err()) {
                break;
            }
            if ours {
                let next = first.host.map(|h| h + (count << geo.cluster_bits));
                if entry.host != next || entry.data == geo.all_units() {
                    break;
                }
            }
            last = entry;
            count += 1;
        }
        let (host, new, fresh) = if ours {
            (first.host.unwrap_or(0), false, false)
        } else if geo.external {
            (c << geo.cluster_bits, true, false)
        } else {
            let (k, got, fresh) = self.alloc_run(file, count)?;
            if got < count {
                count = got;
                last = self.entry(file, c + count - 1).inspect_err(|_| {
                    self.free(k << geo.cluster_bits, got, false);
                })?;
            }
            (k << geo.cluster_bits, true, fresh)
        };
        if ours {
            self.prepare_own(file, host, count)?;
        }
        // What a new cluster takes over from an old one is copied whole; else whole units.
        let unit = |e: &Entry| match new && (e.data != 0 || e.compressed.is_some()) {
            true => geo.cluster_size(),
            false => geo.unit_size(),
        };
        let mut data = off..(off + len).min((c + count) << geo.cluster_bits);
        // A unit of ours that holds data is written in place, by anyone at any time: no part of it
        // may be copied and written back. The request's own part of it goes in place, too, next.
        let edge = data.end & !(geo.unit_size() - 1);
        if ours
            && edge != data.end
            && !self.has_bug(Mutant::WriteBack)
            && last.data >> (geo.in_cluster(edge) >> geo.unit_bits()) & 1 != 0
        {
            data.end = edge;
        }
        let write = off & !(unit(&first) - 1)..data.end.next_multiple_of(unit(&last));
        self.in_flight.push(c..c + count);
        Ok(Some(Plan { range: c..c + count, host, new, fresh, write, data }))
    }

    /// Enters what was written into the L2 table: from now on it is read.
    fn link(&mut self, file: &Node, plan: &Plan) -> io::Result<()> {
        let geo = self.geo;
        // All entries are in one page. With it in memory nothing below can fail.
        self.entry(file, plan.range.start)?;
        for (i, c) in plan.range.clone().enumerate() {
            let old = self.entry(file, c)?;
            let start = plan.write.start.max(c << geo.cluster_bits);
            let end = plan.write.end.min((c + 1) << geo.cluster_bits);
            let first = geo.in_cluster(start) >> geo.unit_bits();
            let units = (end - start) >> geo.unit_bits();
            let mask = ((((1u64 << units) - 1) << first) & u64::from(u32::MAX)) as u32;
            let kept = if plan.new { 0 } else { old.data };
            let entry = Entry {
                host: Some(plan.host + ((i as u64) << geo.cluster_bits)),
                copied: true,
                data: kept | mask,
                zero: old.zero & !mask,
                compressed: None,
            };
            self.set_entry(file, c, &entry)?;
            if plan.new {
                self.free_entry(&old, false);
            }
        }
        self.barrier = true;
        Ok(())
    }
}

impl Qcow2 {
    /// Reads `to.len()` bytes at `off`, which lie in the disk.
    pub(super) fn read_at(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let len = to.len() as u64;
        let mut pos = 0;
        while pos < len {
            let mut meta = self.lock();
            while meta.exclusive {
                meta = self.wait(meta);
            }
            pos += self.read_run(meta, off + pos, pos as usize, to, false)?;
        }
        Ok(())
    }

    /// Reads the run of disk at `off` to position `at` of `to`; answers how long it was. With `flight`,
    /// the caller has an allocation in flight: who wants exclusive use waits for him, not he for that.
    fn read_run<'a>(
        &'a self,
        mut meta: MutexGuard<'a, Meta>,
        off: u64,
        at: usize,
        to: &mut IovMut,
        flight: bool,
    ) -> io::Result<u64> {
        let left = (to.len() - at) as u64;
        let (map, len, using) = loop {
            match meta.lookup(off, left) {
                Ok((map, len)) => break (map, len, self.using(&meta)),
                Err(miss) => meta = self.resolve(meta, miss)?,
            }
            // Without the lock somebody may have got the image for himself.
            while meta.exclusive && !flight {
                meta = self.wait(meta);
            }
        };
        drop(meta);
        let n = len as usize;
        match map {
            Map::Data(host) => {
                let data = self.data()?;
                data.moment(BlkdebugEvent::ReadAio);
                match &self.crypt {
                    None => read_clipped(&data, host, at, n, to)?,
                    Some(payload) => payload.read(&data, host, off, &mut to.slice(at, n))?,
                }
            }
            Map::Zero => to.fill(at, n, 0),
            Map::Unallocated => {
                drop(using);
                self.moment(BlkdebugEvent::ReadBackingAio);
                match self.backing.node() {
                    Some(backing) => read_clipped(&backing, off, at, n, to)?,
                    None => to.fill(at, n, 0),
                }
            }
            Map::Compressed(from, bytes) => {
                let cluster = self.compressed(from, bytes)?;
                let start = self.geo.in_cluster(off) as usize;
                to.copy_from(at, &cluster[start..start + n]);
            }
        }
        Ok(len)
    }

    /// The contents of the compressed cluster of `bytes` bytes at file offset `from`. The caller
    /// is a user: the cluster cannot be reused meanwhile, nor can the cached copy be of another.
    fn compressed(&self, from: u64, bytes: u64) -> io::Result<Arc<[u8]>> {
        let cache = || self.decompressed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((offset, data)) = &*cache()
            && *offset == from
        {
            return Ok(data.clone());
        }
        let mut data = vec![0; bytes as usize];
        let file = self.file()?;
        file.moment(BlkdebugEvent::ReadCompressed);
        read_padded(&file, from, &mut data)?;
        let mut cluster = vec![0; self.geo.cluster_size() as usize];
        let method = self.lock().header.compression;
        decompress(method, &data, &mut cluster)?;
        let cluster: Arc<[u8]> = cluster.into();
        *cache() = Some((from, cluster.clone()));
        Ok(cluster)
    }

    /// Writes all of `from` at `off`, which lies in the disk.
    pub(super) fn write_at(&self, off: u64, from: &Iov) -> io::Result<()> {
        let len = from.len() as u64;
        let mut pos = 0;
        while pos < len {
            let (off, left) = (off + pos, len - pos);
            let mut meta = self.lock();
            while meta.exclusive {
                meta = self.wait(meta);
            }
            if meta.corrupt {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            match meta.lookup_in_place(off, left) {
                Err(miss) => drop(self.resolve(meta, miss)?),
                Ok(Some((host, n))) => {
                    if host + n > meta.file_len && self.data_file.is_none() {
                        let result = self.file().and_then(|f| meta.grow_for(&f, host, n));
                        drop(meta);
                        self.judge(result)?;
                        // Without the lock the cluster may have become someone else's.
                        if !self.has_bug(Mutant::StaleLookup) {
                            continue;
                        }
                        std::thread::sleep(std::time::Duration::from_millis(300));
                        meta = self.lock();
                    }
                    let using = self.using(&meta);
                    drop(meta);
                    let data = self.data()?;
                    data.moment(BlkdebugEvent::WriteAio);
                    match n == from.len() as u64 {
                        true => self.write_data(&data, host, off, from)?,
                        false => {
                            let piece = from.slice(pos as usize, n as usize);
                            self.write_data(&data, host, off, &piece)?;
                        }
                    }
                    drop(using);
                    pos += n;
                }
                Ok(None) => {
                    if meta.wants_checkpoint() {
                        drop(meta);
                        self.checkpoint(false)?;
                        continue;
                    }
                    let c = self.geo.cluster(off);
                    if meta.is_in_flight(&(c..c + 1)) && !self.has_bug(Mutant::NoWait) {
                        drop(self.wait(meta));
                        continue;
                    }
                    pos += self.allocate(meta, pos as usize, off, from)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the part of `from` that begins at `at` and belongs at `off` to newly allocated
    /// clusters, or to own ones that are not data yet; answers how much (0: it goes in place now).
    fn allocate(&self, mut meta: MutexGuard<'_, Meta>, at: usize, off: u64, from: &Iov) -> io::Result<u64> {
        let file = self.file()?;
        let plan = meta.reserve(&file, off, (from.len() - at) as u64);
        drop(meta);
        let Some(plan) = self.judge(plan)? else { return Ok(0) };
        self.carry_out(&plan, at, from)?;
        Ok(plan.data.end - plan.data.start)
    }

    /// Writes a reservation's data and links it, or gives it back.
    pub(super) fn carry_out(&self, plan: &Plan, at: usize, from: &Iov) -> io::Result<()> {
        let file = self.file()?;
        let flight = self.flight(plan.range.clone());
        let early = self.has_bug(Mutant::LinkBeforeData);
        if early {
            self.lock().link(&file, plan)?;
        }
        let mut done = self.fill(plan, at, from);
        let mut meta = self.lock();
        if done.is_ok() && !early {
            done = meta.link(&file, plan);
        }
        if done.is_err() && plan.new && !self.geo.external {
            meta.free(plan.host, plan.range.end - plan.range.start, false);
        }
        flight.landed(meta);
        self.early_free();
        self.judge(done)
    }

    /// Writes a reservation's data: the request's, and around them what was there before.
    fn fill(&self, plan: &Plan, at: usize, from: &Iov) -> io::Result<()> {
        let host = |pos: u64| plan.host + (pos - (plan.range.start << self.geo.cluster_bits));
        let node = self.data()?;
        let head = self.around(plan, plan.write.start..plan.data.start)?;
        let mut end = plan.write.end;
        if self.data_file.is_some() {
            // A raw image does not go on behind its end.
            let size = self.size.load(std::sync::atomic::Ordering::SeqCst);
            end = end.min(size.max(plan.data.end));
        }
        let tail = self.around(plan, plan.data.end..end)?;
        let n = (plan.data.end - plan.data.start) as usize;
        node.moment(BlkdebugEvent::WriteAio);
        if head.is_nothing() && tail.is_nothing() && n == from.len() {
            return self.write_data(&node, host(plan.data.start), plan.data.start, from);
        }
        let mut iov = Iov::new();
        let start = plan.data.start - head.push(&mut iov) as u64;
        iov.append(&from.slice(at, n));
        tail.push(&mut iov);
        if !head.is_nothing() || !tail.is_nothing() {
            node.moment(BlkdebugEvent::CowWrite);
        }
        self.write_data(&node, host(start), start, &iov)
    }

    /// Writes guest data, which are at `guest` on the disk, to `host` in `node`.
    fn write_data(&self, node: &Node, host: u64, guest: u64, from: &Iov) -> io::Result<()> {
        match &self.crypt {
            None => node.write(host, from, Flags::NONE),
            Some(payload) => payload.write(node, host, guest, from),
        }
    }

    /// What is to be written in `range`, beside the request's data.
    fn around(&self, plan: &Plan, range: Range<u64>) -> io::Result<Around> {
        if range.is_empty() {
            return Ok(Around::Nothing);
        }
        let len = (range.end - range.start) as usize;
        let size = self.size.load(std::sync::atomic::Ordering::SeqCst);
        let inside = size.clamp(range.start, range.end) - range.start;
        if self.has_bug(Mutant::NoCopy) {
            return Ok(Around::Zeroes(len));
        }
        let backing = self.backing.node().map_or(0, |n| n.len());
        if inside == 0 || self.reads_zero(range.start, inside, backing)? {
            // A hole reads as zeroes, but is no sector of encrypted zeroes.
            let nothing = plan.fresh && self.crypt.is_none();
            return Ok(if nothing { Around::Nothing } else { Around::Zeroes(len) });
        }
        let mut buf = CopyBuf::new(len);
        let (now, beyond) = buf.split_at_mut(inside as usize);
        beyond.fill(0);
        let mut iov = IovMut::from_slice(now);
        self.moment(BlkdebugEvent::CowRead);
        let mut pos = 0;
        while pos < inside {
            pos += self.read_run(self.lock(), range.start + pos, pos as usize, &mut iov, true)?;
        }
        Ok(Around::Copy(buf))
    }

    /// True when `len` bytes at `off` are known to read as zeroes (false: perhaps), with a backing file of
    /// `backing` bytes.
    pub(super) fn reads_zero(&self, off: u64, len: u64, backing: u64) -> io::Result<bool> {
        let mut pos = 0;
        while pos < len {
            let mut meta = self.lock();
            let (map, n) = loop {
                match meta.lookup(off + pos, len - pos) {
                    Ok(run) => break run,
                    Err(miss) => meta = self.resolve(meta, miss)?,
                }
            };
            match map {
                Map::Zero => {}
                Map::Unallocated if off + pos >= backing => {}
                _ => return Ok(false),
            }
            pos += n;
        }
        Ok(true)
    }
}

/// See [`Qcow2::around`].
enum Around {
    /// Nothing needs to be written.
    Nothing,
    /// So many zeroes.
    Zeroes(usize),
    /// These bytes.
    Copy(CopyBuf),
}

impl Around {
    fn is_nothing(&self) -> bool {
        matches!(self, Around::Nothing)
    }

    /// Adds the bytes to `iov`; answers how many.
    fn push<'a>(&'a self, iov: &mut Iov<'a>) -> usize {
        match self {
            Around::Nothing => 0,
            Around::Zeroes(n) => {
                let mut left = *n;
                while left > 0 {
                    let piece = left.min(ZEROES.len());
                    iov.push(&ZEROES[..piece]);
                    left -= piece;
                }
                *n
            }
            Around::Copy(bytes) => {
                iov.push(bytes);
                bytes.len()
            }
        }
    }
}

/// Reads `n` bytes at `off` to position `at` of `to`; what lies beyond the node's end is zeroes.
pub(super) fn read_clipped(node: &Node, off: u64, at: usize, n: usize, to: &mut IovMut) -> io::Result<()> {
    let have = node.len().saturating_sub(off).min(n as u64) as usize;
    if have == to.len() {
        return node.read(off, to);
    }
    if have > 0 {
        node.read(off, &mut to.slice(at, have))?;
    }
    if have < n {
        to.fill(at + have, n - have, 0);
    }
    Ok(())
}

impl Meta {
    /// True when it is time for a checkpoint before more is changed.
    pub fn wants_checkpoint(&self) -> bool {
        self.l2.is_full() || self.refs.is_full() || self.freed.len() > 4096
    }

    /// Before `count` clusters from `host` on are written that an entry calls its own, whether or not
    /// they hold data: no metadata may be in any of them, and the file must go that far.
    pub fn prepare_own(&mut self, file: &Node, host: u64, count: u64) -> io::Result<()> {
        let len = count << self.geo.cluster_bits;
        if self.geo.external {
            return Ok(());
        }
        if self.geo.clusters(host, len).any(|k| k == 0 || self.tables.contains(&k)) {
            return Err(corrupt(self.overlap(&(host..host + len))));
        }
        if host + len > self.file_len { self.grow_for(file, host, len) } else { Ok(()) }
    }

    /// Makes room in the file for an in-place write behind its end, if the metadata agree that
    /// the cluster is allocated.
    fn grow_for(&mut self, file: &Node, host: u64, len: u64) -> io::Result<()> {
        for k in self.geo.clusters(host, len) {
            if self.refcount(file, k)? == 0 {
                return Err(corrupt(format!(
                    "Data cluster at {host:#x} lies beyond the end of the file and has refcount 0"
                )));
            }
        }
        self.grow_file(file, host.saturating_add(len))?;
        // What is written there must not be cut off when the image is closed.
        self.fresh = self.fresh.max(self.geo.clusters(host, len).end);
        Ok(())
    }
}
