//! The commands of a disk (SBC-4).
//!
//! Owns: what they mean. Never: common commands (`scsi_unit.rs`), pages (`scsi_pages.rs`). Threads:
//! workers, several at once on one unit. Locks: none.

use super::scsi_sense::{Cdb, Fail, Sense};
use super::scsi_unit::{Place, Unit, fits, give, no_protection};
use crate::block::driver::{ExtentKind, Flags};
use crate::block::handle::Request;
use crate::block::stats::Kind as Stat;
use crate::sys::iov::{Iov, IovMut};
use std::io;

/// UNMAP descriptors that one command may have.
pub(super) const MAX_DESCRIPTORS: u32 = 255;
/// Bytes of an UNMAP parameter list: a header of 8, and 16 for each descriptor.
const UNMAP_MAX: usize = 8 + 16 * MAX_DESCRIPTORS as usize;
/// The unit in which a pattern is written and data are compared, in bytes.
const PIECE: u64 = 256 << 10;

impl Unit {
    pub(super) fn disk_command(&self, cdb: &Cdb, out: &Iov, input: &mut IovMut) -> Result<usize, Fail> {
        match cdb.byte(0) {
            // READ (6), (10), (12), (16)
            0x08 | 0x28 | 0xa8 | 0x88 => self.read(cdb, input),
            // WRITE (6), (10), (12), (16)
            0x0a | 0x2a | 0xaa | 0x8a => self.write(cdb, out, Unit::flags(cdb)),
            // WRITE AND VERIFY (10), (12), (16)
            0x2e | 0xae | 0x8e => {
                if cdb.byte(1) & 0x04 != 0 {
                    return Err(Sense::INVALID_FIELD.into());
                }
                self.write(cdb, out, Flags::FUA)?;
                if cdb.byte(1) & 0x02 != 0 { self.compare(cdb, out) } else { Ok(0) }
            }
            // VERIFY (10), (12), (16)
            0x2f | 0xaf | 0x8f => self.verify(cdb, out),
            0x25 => self.read_capacity_10(cdb, input),
            // SERVICE ACTION IN (16): READ CAPACITY (16), GET LBA STATUS
            0x9e if cdb.byte(1) & 0x1f == 0x10 => self.read_capacity_16(cdb, input),
            0x9e if cdb.byte(1) & 0x1f == 0x12 => self.lba_status(cdb, input),
            // SYNCHRONIZE CACHE (10), (16)
            0x35 | 0x91 => self.synchronize(cdb),
            0x42 => self.unmap(cdb, out),
            // WRITE SAME (10), (16)
            0x41 | 0x93 => self.write_same(cdb, out),
            // SEEK (10)
            0x2b => self.range(cdb.be32(2), 0, Stat::Read).map(|_| 0),
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    fn writable(&self, kind: Stat) -> Result<(), Fail> {
        self.ready()?;
        if self.is_read_only() {
            self.handle.invalid(kind);
            return Err(Sense::WRITE_PROTECTED.into());
        }
        Ok(())
    }

    fn write(&self, cdb: &Cdb, out: &Iov, flags: Flags) -> Result<usize, Fail> {
        if cdb.byte(0) != 0x0a {
            no_protection(cdb)?;
        }
        self.writable(Stat::Write)?;
        let (lba, count) = cdb.blocks();
        let on = self.extent(lba, count, Stat::Write)?;
        let len = fits(on.len, out.len())?;
        if len > 0 {
            self.submit(&on, Request::Write(on.off, &out.slice(0, len), flags))?;
        }
        Ok(0)
    }

    fn verify(&self, cdb: &Cdb, out: &Iov) -> Result<usize, Fail> {
        no_protection(cdb)?;
        match cdb.byte(1) >> 1 & 3 {
            0 => {
                // Can it be read?
                let (lba, count) = cdb.blocks();
                let on = self.extent(lba, count, Stat::Read)?;
                self.pieces(&on, |_, _| Ok(())).map(|()| 0)
            }
            1 => self.compare(cdb, out),
            _ => Err(Sense::INVALID_FIELD.into()),
        }
    }

    fn compare(&self, cdb: &Cdb, out: &Iov) -> Result<usize, Fail> {
        let (lba, count) = cdb.blocks();
        let on = self.extent(lba, count, Stat::Read)?;
        fits(on.len, out.len())?;
        self.pieces(&on, |at, bytes| {
            let mut theirs = vec![0; bytes.len()];
            out.copy_to(at as usize, &mut theirs);
            if theirs == bytes { Ok(()) } else { Err(Sense::MISCOMPARE.into()) }
        })?;
        Ok(0)
    }

    /// Reads what is there piece by piece; `f` gets each with its distance from the start.
    fn pieces(&self, on: &Place, f: impl Fn(u64, &[u8]) -> Result<(), Fail>) -> Result<(), Fail> {
        let mut buffer = vec![0; on.len.min(PIECE) as usize];
        let mut at = 0;
        while at < on.len {
            let piece = &mut buffer[..(on.len - at).min(PIECE) as usize];
            self.submit(on, Request::Read(on.off + at, &mut IovMut::from_slice(piece)))?;
            f(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn synchronize(&self, cdb: &Cdb) -> Result<usize, Fail> {
        let (lba, count) = cdb.blocks();
        // 0 blocks are all from there on.
        let on = self.range(lba, count, Stat::Flush)?;
        self.submit(&on, Request::Flush).map(|()| 0)
    }

    fn unmap(&self, cdb: &Cdb, out: &Iov) -> Result<usize, Fail> {
        // ANCHOR
        if cdb.byte(1) & 1 != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        self.writable(Stat::Unmap)?;
        let len = fits(cdb.be16(7) as u64, out.len())?;
        if len == 0 {
            return Ok(0);
        }
        if !(8..=UNMAP_MAX).contains(&len) {
            return Err(Sense::INVALID_LENGTH.into());
        }
        let mut list = vec![0; len];
        out.copy_to(0, &mut list);
        let (data, described) = (usize::from(be16(&list)), usize::from(be16(&list[2..])));
        if data + 2 > len || described + 8 > len || !described.is_multiple_of(16) {
            return Err(Sense::INVALID_LENGTH.into());
        }
        // All of them are looked at before any is done.
        let mut ranges = Vec::new();
        let mut total = 0;
        for d in list[8..8 + described].chunks_exact(16) {
            let range = self.range(be64(d), be32(&d[8..]).into(), Stat::Unmap)?;
            total += range.len;
            ranges.push(range);
        }
        if total > self.config.max_unmap_size {
            self.handle.invalid(Stat::Unmap);
            return Err(Sense::INVALID_PARAMETER.into());
        }
        for on in ranges.iter().filter(|r| r.len > 0) {
            self.submit(on, Request::Discard(on.off, on.len))?;
        }
        Ok(0)
    }

    fn write_same(&self, cdb: &Cdb, out: &Iov) -> Result<usize, Fail> {
        no_protection(cdb)?;
        let flags = cdb.byte(1);
        let without_data = cdb.byte(0) == 0x93 && flags & 0x01 != 0;
        // ANCHOR, PBDATA and LBDATA
        if flags & 0x16 != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        self.writable(Stat::Write)?;
        let (lba, count) = cdb.blocks();
        // 0 would be all blocks up to the end (WSNZ in the block limits page says no).
        if count == 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let on = self.extent(lba, count, Stat::Write)?;
        let mut block = vec![0; self.config.logical_block_size as usize];
        if !without_data {
            fits(self.block(), out.len())?;
            out.copy_to(0, &mut block);
        }
        if block.iter().all(|b| *b == 0) {
            let unmap = if flags & 0x08 != 0 { Flags::MAY_UNMAP } else { Flags::NONE };
            return self.submit(&on, Request::Zero(on.off, on.len, unmap)).map(|()| 0);
        }
        let pattern = block.repeat((PIECE.min(on.len) as usize / block.len()).max(1));
        let mut at = 0;
        while at < on.len {
            let piece = &pattern[..(on.len - at).min(pattern.len() as u64) as usize];
            self.submit(&on, Request::Write(on.off + at, &Iov::from_slice(piece), Flags::NONE))?;
            at += piece.len() as u64;
        }
        Ok(0)
    }

    pub(super) fn read_capacity_10(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        // Without PMI the address is to be 0.
        if cdb.byte(8) & 1 == 0 && cdb.be32(2) != 0 {
            return Err(Sense::INVALID_FIELD.into());
        }
        self.ready()?;
        let last = u32::try_from(self.block_count() - 1).unwrap_or(u32::MAX);
        let data = [last.to_be_bytes(), self.config.logical_block_size.to_be_bytes()].concat();
        give(&data, data.len(), input)
    }

    fn read_capacity_16(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        self.ready()?;
        let mut data = [0; 32];
        data[..8].copy_from_slice(&(self.block_count() - 1).to_be_bytes());
        data[8..12].copy_from_slice(&self.config.logical_block_size.to_be_bytes());
        let ratio = self.config.physical_block_size / self.config.logical_block_size;
        data[13] = ratio.trailing_zeros() as u8;
        // LBPME: UNMAP and WRITE SAME with UNMAP do something.
        data[14] = if self.is_read_only() { 0 } else { 0x80 };
        give(&data, cdb.be32(10) as usize, input)
    }

    /// What is at a block and how far it goes: one descriptor.
    fn lba_status(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let lba = cdb.be64(2);
        let on = self.range(lba, 1, Stat::Read)?;
        let end = self.block_count() * self.block();
        let len = end.saturating_sub(on.off).clamp(1, u64::from(u32::MAX));
        let (mut blocks, mut state) = (1, 0);
        let found = self.handle.status(on.off, len);
        match found.and_then(|e| {
            if self.is_on(&on) { Ok(e) } else { Err(io::Error::from_raw_os_error(libc::ENOMEDIUM)) }
        }) {
            // A piece of a block is data, and what a backing file may have is too.
            Ok(extent) if extent.len >= self.block() => {
                blocks = (extent.len / self.block()) as u32;
                state = u8::from(extent.kind == ExtentKind::Zero);
            }
            Ok(_) => {}
            Err(e) => self.done(true, Err(e))?,
        }
        let mut data = [0; 24];
        data[..4].copy_from_slice(&20u32.to_be_bytes());
        data[8..16].copy_from_slice(&lba.to_be_bytes());
        data[16..20].copy_from_slice(&blocks.to_be_bytes());
        data[20] = state;
        give(&data, cdb.be32(10) as usize, input)
    }
}

fn be16(b: &[u8]) -> u16 {
    u16::from_be_bytes([b[0], b[1]])
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

fn be64(b: &[u8]) -> u64 {
    u64::from(be32(b)) << 32 | u64::from(be32(&b[4..]))
}

#[cfg(test)]
#[path = "scsi_disk_test.rs"]
mod tests;
