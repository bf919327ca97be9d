//! A disk's requests (virtio 1.2, 5.2.6): what a chain asks for, and doing it.
//!
//! Owns: the request format, and the order of answers. Never: touches the configuration space or
//! knows an image format. Threads: the disk's workers, any number on the same queues. Locks: none;
//! a queue's own, for the moment of a pop or push, never across I/O.
//!
//! The driver is hostile: header and segments are copied out once and then checked; the data stay
//! in guest memory, are never looked at here, and go to preadv(2) and pwritev(2) where they lie.
//! Whether a write must be durable before its answer (no cache that the driver knows of) is the
//! handle's `write_cache`, which `blk.rs` sets.

use super::blk::Disk;
use super::device::Worker;
use super::queue::{Chain, Queue};
use crate::block::driver::Flags;
use crate::block::stats::Kind;
use crate::event::ErrorAction;
use crate::sys::iov::Iov;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The unit of sector numbers and of the capacity, in bytes, whatever the block size.
pub const SECTOR: u64 = 512;
/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of the serial number that a driver gets.
const ID_LEN: usize = 20;
/// Bytes of one discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// Segments that one discard or write-zeroes request may have.
pub const MAX_SEGMENTS: usize = 32;
/// The longest data of a request in bytes: what fits an int in whole sectors, as in QEMU. A
/// request cannot be interrupted, and chains whose descriptors overlap could be far longer.
const MAX_DATA: u64 = (i32::MAX as u64) & !(SECTOR - 1);
/// The longest discard or write-zeroes segment, in sectors (the same bytes).
pub const MAX_SEGMENT_SECTORS: u32 = (MAX_DATA / SECTOR) as u32;

/// Answers are gathered while there is more to do, for one interrupt; not for longer than this, …
const BATCH_TIME: Duration = Duration::from_micros(60);
/// … not more than this many, and not after a request that took `BATCH_TIME` by itself: so many
/// after it are answered one by one, lest answers wait for the next slow one.
const BATCH: usize = 32;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    off: u64,
    len: u64,
    unmap: bool,
}

/// A request that can be done.
#[derive(Debug, PartialEq, Eq)]
enum Op {
    Read(u64),
    Write(u64),
    Flush,
    GetId,
    Discard(Vec<Range>),
    Zero(Vec<Range>),
}

/// Why a request is not even tried.
#[derive(Debug, PartialEq, Eq)]
enum Bad {
    /// There is no place for an answer, or no header: the driver is broken.
    Chain(&'static str),
    /// Refused with this status; counted as an invalid request of this kind.
    Request(u8, Option<Kind>),
}

/// What to do with the chain afterwards.
enum Outcome {
    Answer(u8),
    Hold,
    Broken(&'static str),
}

/// A thread of the disk. All workers serve all queues.
pub struct DiskWorker {
    disk: Arc<Disk>,
    /// Requests to be answered one by one.
    wary: usize,
}

impl DiskWorker {
    /// Another worker of `disk`.
    pub fn new(disk: Arc<Disk>) -> DiskWorker {
        DiskWorker { disk, wary: 0 }
    }
}

impl Worker for DiskWorker {
    fn on_queue(&mut self, _: u16, q: &Queue) {
        let mut done: Vec<(Chain, usize)> = Vec::new();
        let mut last = Instant::now();
        let mut first = last;
        while let Some(mut chain) = q.pop() {
            match self.disk.run(&mut chain) {
                Outcome::Answer(status) => {
                    let len = chain.writable_len();
                    chain.writable_at(len - 1, 1).copy_from(0, &[status]);
                    done.push((chain, len));
                    let now = Instant::now();
                    self.wary = if now - last >= BATCH_TIME { BATCH } else { self.wary.saturating_sub(1) };
                    last = now;
                    if self.wary > 0 || now - first >= BATCH_TIME || done.len() >= BATCH {
                        q.push_all(done.drain(..));
                        first = now;
                    }
                }
                Outcome::Hold => q.hold(chain),
                Outcome::Broken(why) => q.reject(chain, why),
            }
        }
        if !done.is_empty() {
            q.push_all(done);
        }
    }
}

impl Disk {
    fn run(&self, chain: &mut Chain) -> Outcome {
        let data_in = match chain.writable_len() {
            0 => return Outcome::Broken("a disk request without a status byte"),
            n => n - 1,
        };
        let op = match self.parse(chain.readable(), data_in) {
            Ok(op) => op,
            Err(Bad::Chain(why)) => return Outcome::Broken(why),
            Err(Bad::Request(status, kind)) => {
                if let Some(kind) = kind {
                    self.handle.invalid(kind);
                }
                return Outcome::Answer(status);
            }
        };
        let read = matches!(op, Op::Read(_));
        match self.execute(&op, chain, data_in) {
            Ok(()) => Outcome::Answer(S_OK),
            Err(e) => match self.handle.on_error(read, &e) {
                ErrorAction::Report => Outcome::Answer(S_IOERR),
                ErrorAction::Ignore => Outcome::Answer(S_OK),
                ErrorAction::Stop => Outcome::Hold,
            },
        }
    }

    fn execute(&self, op: &Op, chain: &mut Chain, data_in: usize) -> io::Result<()> {
        match op {
            Op::Read(off) => self.handle.read(*off, &mut chain.writable_at(0, data_in)),
            Op::Write(off) => {
                let all = chain.readable();
                self.handle.write(*off, &all.slice(HEADER, all.len() - HEADER), Flags::NONE)
            }
            Op::Flush => self.handle.flush(),
            Op::GetId => {
                let len = data_in.min(ID_LEN);
                chain.writable_at(0, len).copy_from(0, &self.serial[..len]);
                Ok(())
            }
            Op::Discard(ranges) => ranges.iter().try_for_each(|r| self.handle.discard(r.off, r.len)),
            Op::Zero(ranges) => ranges.iter().try_for_each(|r| {
                let unmap = if r.unmap { Flags::MAY_UNMAP } else { Flags::NONE };
                self.handle.zero(r.off, r.len, unmap)
            }),
        }
    }

    /// `data_in`: writable bytes before the status byte.
    fn parse(&self, readable: &Iov, data_in: usize) -> Result<Op, Bad> {
        if readable.len() < HEADER {
            return Err(Bad::Chain("a disk request with a short header"));
        }
        let mut header = [0; HEADER];
        readable.copy_to(0, &mut header);
        let word = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = le64(&header[8..]);
        let data_out = readable.len() - HEADER;
        match word {
            T_IN => {
                let off =
                    self.check(sector, data_in as u64).ok_or(Bad::Request(S_IOERR, Some(Kind::Read)))?;
                Ok(Op::Read(off))
            }
            T_OUT => {
                let bad = Bad::Request(S_IOERR, Some(Kind::Write));
                let off = self.check(sector, data_out as u64).ok_or(bad)?;
                if self.read_only {
                    return Err(Bad::Request(S_IOERR, Some(Kind::Write)));
                }
                Ok(Op::Write(off))
            }
            T_FLUSH => Ok(Op::Flush),
            T_GET_ID => Ok(Op::GetId),
            T_DISCARD if self.discard => {
                Ok(Op::Discard(self.segments(readable, data_out, Kind::Unmap, self.max_discard)?))
            }
            T_WRITE_ZEROES if self.write_zeroes => {
                Ok(Op::Zero(self.segments(readable, data_out, Kind::Write, self.max_zeroes)?))
            }
            _ => Err(Bad::Request(S_UNSUPP, None)),
        }
    }

    /// The byte offset, if `len` bytes at `sector` are whole blocks and lie within the disk.
    fn check(&self, sector: u64, len: u64) -> Option<u64> {
        let block = u64::from(self.block_size);
        let off = sector.checked_mul(SECTOR)?;
        let end = off.checked_add(len)?;
        let whole = off.is_multiple_of(block) && len.is_multiple_of(block);
        (whole && len <= MAX_DATA && end <= self.capacity.load(Ordering::Relaxed) * SECTOR).then_some(off)
    }

    fn segments(&self, readable: &Iov, len: usize, kind: Kind, max: u32) -> Result<Vec<Range>, Bad> {
        if self.read_only || len == 0 || !len.is_multiple_of(SEGMENT) || len / SEGMENT > MAX_SEGMENTS {
            return Err(Bad::Request(S_IOERR, Some(kind)));
        }
        let mut bytes = vec![0; len];
        readable.copy_to(HEADER, &mut bytes);
        let segment = |s: &[u8]| {
            let (sectors, flags) = (le32(&s[8..]), le32(&s[12..]));
            // Virtio 1.2, 5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
            let unmap = flags & 1 != 0;
            if flags & !1 != 0 || (kind == Kind::Unmap && unmap) {
                return Err(Bad::Request(S_UNSUPP, Some(kind)));
            }
            let off = self.check(le64(s), u64::from(sectors) * SECTOR).filter(|_| sectors <= max);
            let off = off.ok_or(Bad::Request(S_IOERR, Some(kind)))?;
            Ok(Range { off, len: u64::from(sectors) * SECTOR, unmap })
        };
        bytes.chunks_exact(SEGMENT).map(segment).collect()
    }
}

/// The first four bytes of `b`, which has them.
fn le32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The first eight bytes of `b`, which has them.
fn le64(b: &[u8]) -> u64 {
    u64::from(le32(b)) | u64::from(le32(&b[4..])) << 32
}
