//! The bitmaps extension in the header: writing it where it is, or making a place for it.
//!
//! Owns: the order of these writes, which a power cut may interrupt anywhere: the header stays good,
//! and the extension is not looked at, for the autoclear bit is off meanwhile. Never: turns that bit.
//! Threads: control. Locks: the caller has exclusive use, so that the first sector is nobody else's.

use super::Qcow2;
use super::header::{BitmapsExt, EXT_BITMAPS, Header};
use super::meta::write_all;
use super::open::first_cluster;
use super::types::{be32, be64};
use crate::block::node::Node;
use std::io;

/// Bytes of the extension, with its head.
const LENGTH: usize = 8 + 24;

/// Where things are in the first cluster, as it is on disk.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    /// The extension's head.
    extension: Option<usize>,
    /// The end marker's.
    end: Option<usize>,
    /// The backing file's name.
    name: Option<(usize, usize)>,
}

impl Places {
    /// Of a header that was parsed without an error.
    fn find(first: &[u8]) -> Places {
        let length = if be32(first, 4) == 2 { 72 } else { be32(first, 100) as usize };
        let name = Some((be64(first, 8) as usize, be32(first, 16) as usize)).filter(|n| n.0 != 0);
        let limit = name.map_or(first.len(), |n| n.0.min(first.len()));
        let mut places = Places { extension: None, end: None, name };
        let mut at = length;
        while at + 8 <= limit {
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == 0 {
                places.end = Some(at);
                break;
            }
            if kind == EXT_BITMAPS && len == 24 {
                places.extension = Some(at);
            }
            at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
        }
        places
    }

    /// Where a new extension can go, and the place to move the backing file's name to before.
    fn room(&self, cluster: usize) -> Option<(usize, Option<usize>)> {
        let at = self.end?;
        let behind = at + LENGTH + 8;
        match self.name {
            Some((name, len)) if name < behind => {
                let to = behind.max(name + len);
                (to + len <= cluster).then_some((at, Some(to)))
            }
            _ => (behind <= cluster).then_some((at, None)),
        }
    }
}

/// True when the first cluster has a bitmaps extension.
pub(super) fn is_there(first: &[u8]) -> bool {
    Places::find(first).extension.is_some()
}

fn no_room() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "There is no room in the image's header for bitmaps")
}

/// The header of an image whose clusters are sectors, with the extension and without the names of
/// features, which is written whole or not at all.
fn anew(first: &[u8], ext: BitmapsExt) -> io::Result<Vec<u8>> {
    if first.len() != 512 {
        return Err(no_room());
    }
    let mut header = Header::parse(first)?;
    header.feature_names = None;
    header.bitmaps = Some(ext);
    let mut bytes = header.to_bytes().map_err(|_| no_room())?;
    bytes.resize(512, 0);
    Ok(bytes)
}

impl Qcow2 {
    /// The first cluster in full.
    fn header_cluster(&self, file: &Node) -> io::Result<Vec<u8>> {
        let mut first = first_cluster(file)?;
        first.resize(self.geo.cluster_size() as usize, 0);
        Ok(first)
    }

    /// Whether the extension can be written.
    pub(super) fn extension_fits(&self) -> io::Result<()> {
        let first = self.header_cluster(&*self.file()?)?;
        let places = Places::find(&first);
        if places.extension.is_some() || places.room(first.len()).is_some() {
            return Ok(());
        }
        anew(&first, BitmapsExt { count: 1, size: 32, offset: 0 }).map(drop)
    }

    /// Writes the extension, durably; or takes it out, as far as that is easy. The autoclear bit is
    /// off, on stable storage, and nothing of the header in memory waits to be written.
    pub(super) fn write_extension(&self, to: Option<BitmapsExt>) -> io::Result<()> {
        let file = self.file()?;
        let mut first = self.header_cluster(&file)?;
        let places = Places::find(&first);
        // Writes bytes of the first cluster that are to be there before anything that follows.
        let put = |first: &mut Vec<u8>, at: usize, bytes: &[u8]| -> io::Result<()> {
            first[at..at + bytes.len()].copy_from_slice(bytes);
            write_all(&file, at as u64, bytes)?;
            self.lock().sector.copy_from_slice(&first[..512]);
            file.flush()
        };
        let data = |ext: BitmapsExt| {
            let mut data = u64::from(ext.count).rotate_left(32).to_be_bytes().to_vec();
            data.extend_from_slice(&ext.size.to_be_bytes());
            data.extend_from_slice(&ext.offset.to_be_bytes());
            data
        };
        match (to, places.extension) {
            (Some(ext), Some(at)) => put(&mut first, at + 8, &data(ext)),
            (Some(ext), None) => {
                let Some((at, moved)) = places.room(first.len()) else {
                    let bytes = anew(&first, ext)?;
                    return put(&mut first, 0, &bytes);
                };
                if let (Some(to), Some((name, len))) = (moved, places.name) {
                    let bytes = first[name..name + len].to_vec();
                    put(&mut first, to, &bytes)?;
                    // One sector: the name is found here or there.
                    put(&mut first, 8, &(to as u64).to_be_bytes())?;
                }
                // Behind the end marker nobody looks; then eight bytes of one sector put the end
                // marker behind.
                let mut behind = data(ext);
                behind.resize(LENGTH, 0);
                put(&mut first, at + 8, &behind)?;
                let mut head = EXT_BITMAPS.to_be_bytes().to_vec();
                head.extend_from_slice(&24u32.to_be_bytes());
                put(&mut first, at, &head)
            }
            (None, Some(at)) if places.end == Some(at + LENGTH) => put(&mut first, at, &[0; 8]),
            // Without the bit nobody looks at it.
            (None, _) => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "extension_test.rs"]
mod tests;
