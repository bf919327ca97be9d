//! Preallocation: giving every guest cluster its host cluster in advance.
//!
//! Owns: the walk. Never: runs while somebody else uses the image (it is new). Threads: the one
//! that creates the image. Locks: `meta` for moments.

use super::Qcow2;
use super::meta::{Meta, write_zeroes};
use super::types::Entry;
use crate::block::driver::Flags;
use crate::block::node::Node;
use std::io;
use std::sync::atomic::Ordering;

/// How much is allocated at creation (`preallocation`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables; the data clusters are holes in the file.
    Metadata,
    /// Also the file system's space.
    Falloc,
    /// Also written, as zeroes.
    Full,
}

/// Host clusters for adjacent guest clusters that had none.
struct Piece {
    first: u64,
    count: u64,
    host: u64,
    fresh: bool,
}

impl Qcow2 {
    /// Allocates all of the disk.
    pub(super) fn preallocate(&self, how: Preallocation) -> io::Result<()> {
        let size = self.size.load(Ordering::SeqCst);
        if how == Preallocation::Off || size == 0 {
            return Ok(());
        }
        let file = self.file()?;
        let data = self.data()?;
        let end = self.geo.clusters(0, size).end;
        let mut c = 0;
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
            let mut len = p.count << self.geo.cluster_bits;
            if self.data_file.is_some() {
                len = len.min(size - p.host);
            }
            match how {
                Preallocation::Falloc => data.zero(p.host, len, Flags::NONE)?,
                Preallocation::Full => write_data(&data, p.host, len)?,
                // An external data file may have had other contents.
                _ if !p.fresh => write_zeroes(&data, p.host, len)?,
                _ => {}
            }
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
        let count = end.min((c | (per_page - 1)) + 1) - c;
        if geo.external {
            return Ok(Piece { first: c, count, host: c << geo.cluster_bits, fresh: false });
        }
        let (k, count, fresh) = self.alloc_run(file, count)?;
        Ok(Piece { first: c, count, host: k << geo.cluster_bits, fresh })
    }

    fn link_piece(&mut self, file: &Node, p: &Piece) -> io::Result<()> {
        for i in 0..p.count {
            let host = p.host + (i << self.geo.cluster_bits);
            // Subclusters stay unallocated, so that a backing file shows through until they are
            // written.
            let data = if self.geo.extended { 0 } else { 1 };
            let entry = Entry { host: Some(host), copied: true, data, ..Entry::default() };
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
