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

impl Qcow2 {
    /// Records `name`. The format stays. EINVAL: a name that is empty or too long, or an image
    /// that has none.
    pub(super) fn rename_backing(&self, name: &str) -> io::Result<()> {
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
        if header.backing_file.is_none() || first.len() < SECTOR {
            return Err(invalid());
        }
        let old = u64::from(be32(&first, 8).ok_or_else(invalid)?) << 32
            | u64::from(be32(&first, 12).ok_or_else(invalid)?);
        let old_len = be32(&first, 16).ok_or_else(invalid)? as usize;
        let old = usize::try_from(old).map_err(|_| invalid())?;
        header.backing_file = Some(name.to_string());
        match place(&first, &header, old, old_len, name.len()) {
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
        }
        file.flush()
    }
}

#[cfg(test)]
#[path = "backing_test.rs"]
mod tests;
