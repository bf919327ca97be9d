//! Another name for the backing file.
//!
//! The name lies in the first cluster, behind the header's extensions; the first sector says where.
//! The new name goes to a free place there, and to stable storage, before the first sector, in one
//! write, points to it: after a crash the image has the old name or the new one. Only when there is
//! no such place the whole header is written anew.
//!
//! Owns: that order. Never: what the name leads to. Threads: control. Locks: exclusive use.

use super::Qcow2;
use super::header::{Header, MAX_NAME};
use super::meta::write_all;
use super::open::first_cluster;
use std::io;

/// Bytes of the sector that is written whole or not at all.
const SECTOR: usize = 512;

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Where a name of `len` bytes can go in the first cluster, without touching the old one at
/// `old..old + old_len`.
fn place(first: &[u8], header: &Header, old: usize, old_len: usize, len: usize) -> Option<usize> {
    let cluster = usize::try_from(header.geometry().cluster_size()).ok()?;
    let mut at = header.length();
    // Without the end marker the old name's place is the end of the extensions.
    loop {
        let (kind, size) = (be32(first, at)?, be32(first, at + 4)? as usize);
        at += 8;
        if kind == 0 {
            break;
        }
        at += size.next_multiple_of(8);
        if at + 8 > old {
            return None;
        }
    }
    let behind = old.checked_add(old_len)?;
    [at, behind].into_iter().find(|&from| {
        let apart = from + len <= old || from >= behind;
        from >= at && apart && from + len <= cluster
    })
}

/// The header extension that has the backing file's format.
const FORMAT: u32 = 0xe279_2aca;

/// Puts the format of `header` in the place of the one in `first`, if all of that lies in the sector
/// that is written anyway.
fn patch_format(first: &mut [u8], header: &Header) -> bool {
    let Some(new) = header.backing_format.as_deref().map(str::as_bytes) else { return false };
    let mut at = header.length();
    while let (Some(kind), Some(size)) = (be32(first, at), be32(first, at + 4)) {
        let room = (size as usize).next_multiple_of(8);
        let (from, next) = (at + 8, at + 8 + room);
        if kind == 0 || next > SECTOR || next > first.len() {
            return false;
        }
        if kind == FORMAT {
            // The next extension stays where it is.
            if new.len().next_multiple_of(8) != room {
                return false;
            }
            first[at + 4..at + 8].copy_from_slice(&(new.len() as u32).to_be_bytes());
            first[from..next].fill(0);
            first[from..from + new.len()].copy_from_slice(new);
            return true;
        }
        at = next;
    }
    false
}

impl Qcow2 {
    /// Records `name`, and another format if there is one. EINVAL: a name that is empty or too long, or
    /// no format for an image that has no backing file.
    pub(super) fn rename_backing(&self, name: &str, format: Option<&str>) -> io::Result<()> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(invalid());
        }
        let _alone = self.exclusive();
        // So that the header on disk is the header in memory.
        self.drain()?;
        let file = self.file()?;
        let mut first = first_cluster(&file)?;
        let mut header = Header::parse(&first)?;
        let had_one = header.backing_file.is_some();
        if !had_one && format.is_none() || first.len() < SECTOR {
            return Err(invalid());
        }
        let old = u64::from(be32(&first, 8).ok_or_else(invalid)?) << 32
            | u64::from(be32(&first, 12).ok_or_else(invalid)?);
        let old_len = be32(&first, 16).ok_or_else(invalid)? as usize;
        // No old name is in the way of the new one: as if it were an empty one at the end.
        let old = if had_one { old } else { header.geometry().cluster_size() };
        let old = usize::try_from(old).map_err(|_| invalid())?;
        header.backing_file = Some(name.to_string());
        let keeps = format.is_none_or(|f| header.backing_format.as_deref() == Some(f));
        if let Some(format) = format {
            header.backing_format = Some(format.to_string());
        }
        let spot = if keeps || patch_format(&mut first, &header) {
            place(&first, &header, old, old_len, name.len())
        } else {
            None
        };
        match spot {
            Some(at) => {
                if first.len() < at + name.len() {
                    first.resize(at + name.len(), 0);
                }
                first[at..at + name.len()].copy_from_slice(name.as_bytes());
                write_all(&file, at as u64, name.as_bytes())?;
                file.flush()?;
                first[8..16].copy_from_slice(&(at as u64).to_be_bytes());
                first[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
                write_all(&file, 0, &first[..SECTOR])?;
            }
            None => {
                first = header.to_bytes()?;
                if first.len() < SECTOR {
                    first.resize(SECTOR, 0);
                }
                write_all(&file, 0, &first)?;
            }
        }
        {
            let mut meta = self.lock();
            meta.sector = first[..SECTOR].to_vec();
            meta.header.backing_file = Some(name.to_string());
            meta.header.backing_format = header.backing_format;
        }
        file.flush()
    }

    /// Records that there is no backing file. The extension with its format stays in the header, where
    /// it means nothing: the first sector alone changes.
    pub(super) fn forget_backing(&self) -> io::Result<()> {
        let _alone = self.exclusive();
        self.drain()?;
        let file = self.file()?;
        let mut first = first_cluster(&file)?;
        if first.len() < SECTOR {
            first.resize(SECTOR, 0);
        }
        first[8..20].fill(0);
        write_all(&file, 0, &first[..SECTOR])?;
        {
            let mut meta = self.lock();
            meta.sector = first[..SECTOR].to_vec();
            meta.header.backing_file = None;
            meta.header.backing_format = None;
        }
        file.flush()
    }
}

#[cfg(test)]
#[path = "backing_test.rs"]
mod tests;
