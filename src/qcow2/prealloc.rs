//! Preallocation: giving guest clusters their host clusters in advance.
//!
//! Owns: the walk. Never: touches a cluster that has its place already; runs where requests go (it
//! is for a new image, or for what is behind the end of the disk yet). Threads: the one that creates
//! or grows the image. Locks: `meta` for moments.

use super::Qcow2;
use super::header::Crypt;
use super::meta::{Meta, write_zeroes};
use super::types::Entry;
use crate::block::driver::Flags;
pub use crate::block::driver::Preallocation;
use crate::block::node::Node;
use std::io;
use std::ops::Range;

/// Host clusters for adjacent guest clusters that had none.
struct Piece {
    first: u64,
    count: u64,
    host: u64,
    fresh: bool,
}

impl Qcow2 {
    /// Allocates all clusters that lie in `range` of a disk that is to be `range.end` bytes long,
    /// if they have no place yet. Nobody uses them meanwhile.
    pub(super) fn preallocate(&self, range: Range<u64>, how: Preallocation) -> io::Result<()> {
        if how == Preallocation::Off || range.is_empty() {
            return Ok(());
        }
        let size = range.end;
        if self.crypt.is_some() && !self.geo.v3 {
            // What is allocated is data, and only a write makes encrypted zeroes of it.
            self.write_zeroes_at(range)?;
            return self.checkpoint(true);
        }
        let file = self.file()?;
        let data = self.data()?;
        let end = self.geo.clusters(0, size).end;
        // The cluster that the old end lies in is left as it is: it holds data, or may yet get them.
        let mut c = self.geo.cluster(self.geo.round_up(range.start));
        while c < end {
            let mut meta = self.lock();
            if meta.wants_checkpoint() {
                drop(meta);
                self.checkpoint(false)?;
                continue;
            }
            let piece = meta.take_piece(&file, c, end);
            drop(meta);
            let p = self.judge(piece)?;
            if p.count == 0 {
                c += 1;
                continue;
            }
            let mut len = p.count << self.geo.cluster_bits;
            if self.data_file.is_some() {
                len = len.min(size - p.host);
            }
            let done = match how {
                Preallocation::Falloc => data.zero(p.host, len, Flags::NONE),
                Preallocation::Full => write_data(&data, p.host, len),
                // An external data file may have had other contents; holes in it are as good.
                _ if self.data_file.is_some() => data.zero(p.host, len, Flags::MAY_UNMAP),
                _ if !p.fresh => write_zeroes(&data, p.host, len),
                _ => Ok(()),
            };
            if done.is_err() && self.data_file.is_none() {
                // Nothing refers to them.
                self.lock().free(p.host, p.count, true);
            }
            done?;
            let linked = self.lock().link_piece(&file, &p);
            self.judge(linked)?;
            c = p.first + p.count;
        }
        self.checkpoint(true)
    }
}

impl Meta {
    fn take_piece(&mut self, file: &Node, c: u64, end: u64) -> io::Result<Piece> {
        let geo = self.geo;
        self.ensure_l2(file, c)?;
        let per_page = geo.page_size() >> geo.entry_bits();
        let most = end.min((c | (per_page - 1)) + 1) - c;
        let mut count = 0;
        while count < most {
            let entry = self.entry(file, c + count)?;
            if entry.host.is_some() || entry.compressed.is_some() {
                break;
            }
            count += 1;
        }
        if count == 0 {
            return Ok(Piece { first: c, count, host: 0, fresh: false });
        }
        if geo.external {
            return Ok(Piece { first: c, count, host: c << geo.cluster_bits, fresh: false });
        }
        let (k, count, fresh) = self.alloc_run(file, count)?;
        Ok(Piece { first: c, count, host: k << geo.cluster_bits, fresh })
    }

    fn link_piece(&mut self, file: &Node, p: &Piece) -> io::Result<()> {
        for i in 0..p.count {
            let host = p.host + (i << self.geo.cluster_bits);
            // Subclusters stay what they are: zeroes, or nothing, so that a backing file shows
            // through until they are written. An encrypted disk's clusters are no data either: zeroes
            // in the file are no zeroes on it.
            let (data, zero) = match (self.geo.extended, self.header.crypt) {
                (true, _) => (0, self.entry(file, p.first + i)?.zero),
                (false, Crypt::None) => (1, 0),
                (false, _) => (0, 1),
            };
            let entry = Entry { host: Some(host), copied: true, data, zero, compressed: None };
            self.set_entry(file, p.first + i, &entry)?;
        }
        self.barrier = true;
        Ok(())
    }
}

/// Writes zeroes as data, whatever the file could do instead.
fn write_data(node: &Node, off: u64, len: u64) -> io::Result<()> {
    use super::meta::{ZEROES, write_all};
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZEROES.len() as u64);
        write_all(node, off + done, &ZEROES[..n as usize])?;
        done += n;
    }
    Ok(())
}
