//! The directory of stored bitmaps, and their tables: bytes to checked values and back.
//!
//! Source: QEMU's `docs/interop/qcow2`, section "Bitmaps"; limits and texts are QEMU's. All of it
//! comes from a file that may be hostile: lengths are checked against the file before anything is
//! read, and what a bitmap may take in memory is bounded. No state, no locks, any thread.

use super::header::BitmapsExt;
use super::meta::read_padded;
use super::types::{Geometry, OFFSET_MASK, be32, be64};
use crate::block::bitmap::MAX_NAME;
use crate::block::node::Node;
use std::collections::HashSet;
use std::io;

/// Most bitmaps of an image.
pub const MAX_BITMAPS: usize = 65535;
/// Longest directory in bytes.
pub const MAX_DIRECTORY: u64 = 1024 * 65535;
/// Longest table in entries.
const MAX_TABLE: u64 = 0x800_0000;
/// Most entries of all tables together: more than data that are loaded ever need.
const MAX_ENTRIES: u64 = 1 << 22;
/// Most bytes of one bitmap's data.
const MAX_DATA: u64 = 512 << 20;

/// Directory entry flag: the bitmap was not stored since it was last changed.
const IN_USE: u32 = 1;
/// Directory entry flag: the bitmap notes what is written.
const AUTO: u32 = 2;
/// The only type of bitmap there is.
const DIRTY_TRACKING: u8 = 1;
/// Table entry without an offset: all bits are set.
pub const ALL_ONES: u64 = 1;
/// Reserved bits of a table entry.
const RESERVED: u64 = 0xff00_0000_0000_01fe;

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Offset of its table.
    pub table: u64,
    /// Entries of its table.
    pub entries: u32,
    /// Its data are out of date.
    pub in_use: bool,
    /// It notes what is written.
    pub auto: bool,
    /// log2 of its granularity in bytes.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Bytes that an entry takes whose name has `name` bytes.
pub fn entry_size(name: usize) -> u64 {
    (24 + name as u64).next_multiple_of(8)
}

/// Bytes of the bits of a disk of `len` bytes.
pub fn data_bytes(len: u64, granularity_bits: u32) -> u64 {
    len.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// Whether a bitmap of this name and granularity can be stored in an image of `len` bytes.
///
/// # Errors
/// QEMU's text for what is wrong.
pub fn check_constraints(geo: &Geometry, len: u64, name: &str, granularity: u64) -> io::Result<()> {
    let invalid = |text: String| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if granularity > 1 << 31 {
        return invalid(format!("Granularity exceeds maximum ({} bytes)", 1u64 << 31));
    }
    if granularity < 512 {
        return invalid("Granularity is under minimum (512 bytes)".into());
    }
    let bytes = data_bytes(len, granularity.ilog2());
    if bytes > MAX_DATA || bytes > MAX_TABLE.saturating_mul(geo.cluster_size()) {
        return invalid("Too much space will be occupied by the bitmap. Use larger granularity".into());
    }
    if name.len() > MAX_NAME {
        return invalid(format!("Name length exceeds maximum ({MAX_NAME} characters)"));
    }
    Ok(())
}

/// Reads and checks the directory of an image of `len` bytes.
///
/// # Errors
/// What is wrong with it.
pub fn read(file: &Node, geo: &Geometry, len: u64, ext: &BitmapsExt) -> io::Result<Vec<Stored>> {
    if ext.size == 0 {
        return Err(bad("Requested bitmap directory size is zero"));
    }
    if ext.size > MAX_DIRECTORY {
        return Err(bad("Requested bitmap directory size is too big"));
    }
    let inside = |offset: u64, bytes: u64| {
        offset != 0 && offset.checked_add(bytes).is_some_and(|end| end <= geo.round_up(file.len()))
    };
    if !inside(ext.offset, ext.size) {
        return Err(bad("The bitmap directory lies beyond the end of the file"));
    }
    let mut bytes = vec![0; ext.size as usize];
    read_padded(file, ext.offset, &mut bytes)?;
    let mut list: Vec<Stored> = Vec::new();
    let mut names = HashSet::new();
    let mut all = 0;
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let broken = || bad("Broken bitmap directory");
        let fixed = rest.get(..24).ok_or_else(broken)?;
        let (table, entries, flags) = (be64(fixed, 0), be32(fixed, 8), be32(fixed, 12));
        let (kind, granularity_bits) = (fixed[16], fixed[17]);
        let name_len = (be32(fixed, 16) & 0xffff) as usize;
        if be32(fixed, 20) != 0 {
            return Err(bad("Bitmap extra data is not supported"));
        }
        let name = rest.get(24..24 + name_len).ok_or_else(broken)?;
        let shown = String::from_utf8_lossy(name).into_owned();
        let unfit = || bad(format!("Bitmap '{shown}' doesn't satisfy the constraints"));
        let data = u64::from(entries) << geo.cluster_bits;
        let in_use = flags & IN_USE != 0;
        let wrong = entries == 0
            || table & (geo.cluster_size() - 1) != 0
            || !inside(table, u64::from(entries) * 8)
            || u64::from(entries) > MAX_TABLE
            || !(9..=31).contains(&granularity_bits)
            || flags & !(IN_USE | AUTO) != 0
            || name_len > MAX_NAME
            || kind != DIRTY_TRACKING
            || data > MAX_DATA
            // One that is not in use has what the disk needs, and not a cluster more.
            || (!in_use
                && data_bytes(len, granularity_bits.into()).div_ceil(geo.cluster_size())
                    != u64::from(entries));
        if wrong {
            return Err(unfit());
        }
        all += u64::from(entries);
        if all > MAX_ENTRIES {
            return Err(bad(format!(
                "The tables of the image's bitmaps have more than {MAX_ENTRIES} entries"
            )));
        }
        if !names.insert(name) {
            return Err(bad(format!("Bitmap already exists: {shown}")));
        }
        let name = String::from_utf8(name.to_vec()).map_err(|_| unfit())?;
        list.push(Stored { table, entries, in_use, auto: flags & AUTO != 0, granularity_bits, name });
        if list.len() > ext.count as usize {
            return Err(bad("More bitmaps found than specified in header extension"));
        }
        rest = rest.get(entry_size(name_len) as usize..).ok_or_else(broken)?;
    }
    if list.len() != ext.count as usize {
        return Err(bad("Less bitmaps found than specified in header extension"));
    }
    Ok(list)
}

/// The directory as bytes.
pub fn bytes(list: &[Stored]) -> Vec<u8> {
    let mut out = Vec::new();
    for s in list {
        let flags = if s.in_use { IN_USE } else { 0 } | if s.auto { AUTO } else { 0 };
        out.extend_from_slice(&s.table.to_be_bytes());
        out.extend_from_slice(&s.entries.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, s.granularity_bits]);
        // At most 1023 bytes, checked when it was read or made.
        out.extend_from_slice(&(s.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&0u32.to_be_bytes());
        out.extend_from_slice(s.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// The table of a bitmap, whose place was checked when the directory was read.
///
/// # Errors
/// I/O errors; entries that are not possible.
pub fn read_table(file: &Node, geo: &Geometry, stored: &Stored) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; stored.entries as usize * 8];
    read_padded(file, stored.table, &mut bytes)?;
    let table: Vec<u64> = bytes.chunks_exact(8).map(|e| be64(e, 0)).collect();
    let end = geo.round_up(file.len());
    let possible = |entry: &u64| {
        let offset = entry & OFFSET_MASK;
        entry & RESERVED == 0
            && offset & (geo.cluster_size() - 1) == 0
            && (offset == 0 || (entry & ALL_ONES == 0 && offset + geo.cluster_size() <= end))
    };
    match table.iter().find(|e| !possible(e)) {
        None => Ok(table),
        Some(entry) => Err(bad(format!(
            "Could not read bitmap_table table from image for bitmap '{}': entry {entry:#x} is not possible",
            stored.name
        ))),
    }
}

#[cfg(test)]
#[path = "bitmap_dir_test.rs"]
mod tests;
