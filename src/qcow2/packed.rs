//! Writing compressed clusters ([`Flags::COMPRESSED`](crate::block::driver::Flags::COMPRESSED)).
//!
//! Owns: where compressed data are put: one after the other, several to a host cluster, which
//! then has as many references. Never: overwrites data in place; a cluster that is there already
//! is written as any other. Threads: any. Locks: `meta` for the reservation and the link; none
//! while compressing and writing, as in io.rs.

use super::Qcow2;
use super::compress::compress;
use super::meta::{Meta, write_all};
use crate::block::debug::BlkdebugEvent;
use crate::block::node::Node;
use crate::sys::iov::Iov;
use std::io;

impl Meta {
    /// `len` bytes of file, less than a cluster, for compressed data: their clusters have one
    /// reference more each. `None`: only where a descriptor cannot point to.
    fn alloc_bytes(&mut self, file: &Node, len: u64) -> io::Result<Option<u64>> {
        file.moment_locked(BlkdebugEvent::ClusterAllocBytes);
        let (geo, at) = (self.geo, self.packing);
        let room = if at == 0 { 0 } else { geo.round_up(at) - at };
        if room >= len && self.add_reference(file, geo.cluster(at)).is_ok() {
            self.packing = at + len;
            return Ok(Some(at));
        }
        let (k, _, _) = self.alloc_run(file, 1)?;
        let next = k << geo.cluster_bits;
        if next + geo.cluster_size() > geo.compressed_limit() {
            self.free(next, 1, false);
            return Ok(None);
        }
        // The rest of the last cluster is used if the new one follows it.
        let whole = room == 0 || next != at + room;
        if whole || room >= len || self.add_reference(file, geo.cluster(at)).is_err() {
            self.packing = next + len;
            return Ok(Some(next));
        }
        self.packing = at + len;
        Ok(Some(at))
    }
}

impl Qcow2 {
    /// Writes all of `from` at `off`: whole clusters that are not there yet compressed, everything
    /// else as data.
    pub(super) fn write_compressed(&self, off: u64, from: &Iov) -> io::Result<()> {
        let cluster = self.geo.cluster_size();
        let size = self.size.load(std::sync::atomic::Ordering::SeqCst);
        let mut pos = 0;
        while pos < from.len() as u64 {
            let here = off + pos;
            let len = (cluster - self.geo.in_cluster(here)).min(from.len() as u64 - pos);
            let piece = from.slice(pos as usize, len as usize);
            // The disk's last cluster is whole when it is written up to the end.
            let whole = self.geo.in_cluster(here) == 0 && (len == cluster || here + len == size);
            // Compressed data would be in plain text.
            let plain = self.data_file.is_none() && self.crypt.is_none();
            if !whole || !plain || !self.write_packed(here, &piece)? {
                self.write_at(here, &piece)?;
            }
            pos += len;
        }
        Ok(())
    }

    /// Writes one cluster compressed. False: it must be written as data.
    fn write_packed(&self, off: u64, from: &Iov) -> io::Result<bool> {
        let geo = self.geo;
        let mut data = from.to_vec();
        data.resize(geo.cluster_size() as usize, 0);
        let method = self.lock().header.compression;
        let Some(packed) = compress(method, &data) else { return Ok(false) };
        let file = self.file()?;
        let c = geo.cluster(off);
        let mut meta = self.lock();
        loop {
            meta = self.wait_for(meta, &(c..c + 1));
            if !meta.wants_checkpoint() {
                break;
            }
            drop(meta);
            self.checkpoint(false)?;
            meta = self.lock();
        }
        if meta.corrupt {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let len = packed.len() as u64;
        let place = meta.ensure_l2(&file, c).and_then(|()| {
            let old = meta.entry(&file, c)?;
            if old.host.is_some() {
                return Ok(None);
            }
            meta.may_free(&old)?;
            meta.alloc_bytes(&file, len)
        });
        if let Ok(Some(_)) = place {
            meta.in_flight.push(c..c + 1);
        }
        drop(meta);
        let Some(at) = self.judge(place)? else { return Ok(false) };
        let flight = self.flight(c..c + 1);
        file.moment(BlkdebugEvent::WriteCompressed);
        let mut done = write_all(&file, at, &packed);
        let mut meta = self.lock();
        if done.is_ok() {
            done = meta.entry(&file, c).and_then(|old| {
                file.moment_locked(BlkdebugEvent::L2UpdateCompressed);
                meta.set_words(&file, c, (geo.encode_compressed(at, len), 0))?;
                meta.free_entry(&old, false);
                meta.barrier = true;
                Ok(())
            });
        }
        if done.is_err() {
            let lost = geo.clusters(at, len);
            meta.free(lost.start << geo.cluster_bits, lost.end - lost.start, false);
        }
        flight.landed(meta);
        self.judge(done)?;
        Ok(true)
    }
}
