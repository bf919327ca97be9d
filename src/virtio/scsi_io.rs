//! The request queues of a SCSI controller (virtio 1.2, 5.6.6.1): from a chain to a unit's command
//! and back.
//!
//! Owns: the request format, the order of answers, the list of requests that are being done. Never:
//! knows a SCSI command except REPORT LUNS and what an absent unit answers. Threads: the
//! controller's workers, any number on the same queues; the control worker looks at the list.
//! Locks: `Bus::running`, held for a pop, an end, or while task management sweeps the queues; the
//! queues' own inside it; never across I/O.
//!
//! The driver is hostile: headers are copied out once; data stay in guest memory. Task management
//! must not answer while a request that it speaks of may still touch memory: hence a request enters
//! the list in the same moment in which it leaves the ring, and leaves it after its answer.

use super::device::Worker;
use super::queue::{Chain, Queue};
use super::scsi::Bus;
use super::scsi_sense::{Cdb, Fail, Sense};
use super::scsi_unit::{Address, Unit, give};
use crate::sys::iov::IovMut;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of `struct virtio_scsi_req_cmd` before the CDB: LUN, id, task attribute, priority, CRN.
const HEADER: usize = 19;
/// Bytes of the answer before the sense data: sense length, residual, status qualifier, status,
/// response.
const ANSWER: usize = 12;

/// As for virtio-blk: answers are gathered for so long, …
const BATCH_TIME: Duration = Duration::from_micros(60);
/// … or so many; after a slow request so many are answered one by one.
const BATCH: usize = 32;

/// Values of `response`.
pub(super) mod response {
    pub const OK: u8 = 0;
    pub const OVERRUN: u8 = 1;
    pub const ABORTED: u8 = 2;
    pub const BAD_TARGET: u8 = 3;
    pub const RESET: u8 = 4;
    pub const FAILURE: u8 = 9;
    pub const FUNCTION_SUCCEEDED: u8 = 10;
    pub const FUNCTION_REJECTED: u8 = 11;
    pub const INCORRECT_LUN: u8 = 12;
}

const GOOD: u8 = 0;
const CHECK_CONDITION: u8 = 2;

/// A request that is being done, or that waits for `cont`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Unique among all.
    pub serial: u64,
    queue: u16,
    head: u16,
    pub lun: [u8; 8],
    pub id: u64,
    held: bool,
}

/// The requests that have left the rings and are not answered.
#[derive(Debug, Default)]
pub(super) struct Running {
    entries: Vec<Entry>,
    serial: u64,
    /// Task management waits for some of them.
    pub awaited: bool,
}

impl Running {
    fn enter(&mut self, queue: u16, head: u16, lun: [u8; 8], id: u64) -> u64 {
        // Perhaps it was held, and is tried again.
        self.entries.retain(|e| !(e.held && (e.queue, e.head) == (queue, head)));
        self.serial += 1;
        self.entries.push(Entry { serial: self.serial, queue, head, lun, id, held: false });
        self.serial
    }

    /// Those that `f` is true for.
    pub fn find(&self, f: impl Fn(&Entry) -> bool) -> Vec<u64> {
        self.entries.iter().filter(|e| f(e)).map(|e| e.serial).collect()
    }

    /// Some of them are still there.
    pub fn any(&self, serials: &[u64]) -> bool {
        self.entries.iter().any(|e| serials.contains(&e.serial))
    }

    /// One waits for `cont`: its ring cannot be looked at.
    pub fn any_held(&self) -> bool {
        self.entries.iter().any(|e| e.held)
    }
}

/// The one way of several to write a LUN: a number below 256 by the peripheral method.
pub(super) fn plain(mut lun: [u8; 8]) -> [u8; 8] {
    if lun[2] == 0x40 {
        lun[2] = 0;
    }
    lun
}

/// What a request says before its data.
pub(super) struct Header {
    pub lun: [u8; 8],
    pub id: u64,
    cdb: Cdb,
}

/// The layout that the driver has chosen.
#[derive(Clone, Copy)]
struct Sizes {
    cdb: usize,
    sense: usize,
}

impl Bus {
    pub(super) fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sizes(&self) -> Sizes {
        let (cdb, sense) = (self.cdb_size.load(Ordering::Relaxed), self.sense_size.load(Ordering::Relaxed));
        Sizes { cdb: cdb as usize, sense: sense as usize }
    }

    /// The header of a request; None when it has none, or no place for the answer.
    pub(super) fn header(&self, chain: &Chain) -> Option<Header> {
        let sizes = self.sizes();
        if chain.readable().len() < HEADER + sizes.cdb || chain.writable_len() < ANSWER + sizes.sense {
            return None;
        }
        let mut bytes = [0; HEADER + super::scsi::CDB_MAX as usize];
        chain.readable().copy_to(0, &mut bytes[..HEADER + sizes.cdb]);
        let (mut lun, mut id) = ([0; 8], [0; 8]);
        lun.copy_from_slice(&bytes[..8]);
        let lun = plain(lun);
        id.copy_from_slice(&bytes[8..16]);
        Some(Header { lun, id: u64::from_le_bytes(id), cdb: Cdb::new(&bytes[HEADER..HEADER + sizes.cdb]) })
    }

    /// Writes the answer of a request; the bytes that are then written in all.
    pub(super) fn answer(&self, chain: &mut Chain, response: u8, result: Result<usize, Sense>) -> usize {
        let sizes = self.sizes();
        let room = chain.readable().len() - HEADER - sizes.cdb;
        let wanted = (chain.writable_len() - ANSWER - sizes.sense).max(room);
        let (status, sense, done) = match result {
            Ok(done) => (GOOD, None, done),
            Err(sense) => (CHECK_CONDITION, Some(sense.fixed()), 0),
        };
        let mut head = vec![0; ANSWER + sizes.sense];
        if let Some(sense) = sense {
            let len = sense.len().min(sizes.sense);
            head[..4].copy_from_slice(&(len as u32).to_le_bytes());
            head[ANSWER..ANSWER + len].copy_from_slice(&sense[..len]);
        }
        let residual = u32::try_from(wanted - done.min(wanted)).unwrap_or(u32::MAX);
        head[4..8].copy_from_slice(&residual.to_le_bytes());
        (head[10], head[11]) = (status, response);
        chain.writable_at(0, head.len()).copy_from(0, &head);
        // What was sent is not written.
        head.len() + if room > 0 { 0 } else { done }
    }

    /// The unit that a LUN field means. `Err(true)`: none, but there are others on that target.
    pub(super) fn resolve(&self, lun: &[u8; 8]) -> Result<Arc<Unit>, bool> {
        // A single level LUN structure by the peripheral or the flat method (SAM-5, 4.7.7).
        let number = u16::from_be_bytes([lun[2], lun[3]]);
        if lun[0] != 1 || lun[4..] != [0; 4] {
            return Err(false);
        }
        let address = match lun[2] >> 6 {
            0 if lun[2] == 0 => Some(Address { target: lun[1], lun: number }),
            1 => Some(Address { target: lun[1], lun: number & 0x3fff }),
            _ => None,
        };
        let shared = || self.units().iter().any(|u| u.address.target == lun[1]);
        address.and_then(|a| self.find(a)).ok_or_else(shared)
    }
}

/// How a request ended.
enum End {
    /// With this response and status; the bytes moved.
    Answer(u8, Result<usize, Sense>),
    Hold,
}

/// A thread of the controller. All workers serve all request queues.
pub struct RequestWorker {
    bus: Arc<Bus>,
    /// Requests to be answered one by one.
    wary: usize,
}

impl RequestWorker {
    /// Another worker of the controller with `bus`.
    pub fn new(bus: Arc<Bus>) -> RequestWorker {
        RequestWorker { bus, wary: 0 }
    }

    /// Takes the next request off the ring and enters it in the list.
    fn take<'q>(&self, q: &'q Queue) -> Option<(Chain<'q>, Option<(Header, u64)>)> {
        let mut running = self.bus.running();
        let chain = q.pop()?;
        let header = self.bus.header(&chain);
        let entered = header.map(|header| {
            let serial = running.enter(q.index(), chain.head(), header.lun, header.id);
            (header, serial)
        });
        Some((chain, entered))
    }

    fn push<'q>(&self, q: &'q Queue, done: &mut Vec<(Chain<'q>, usize)>, serials: &mut Vec<u64>) {
        q.push_all(done.drain(..));
        let mut running = self.bus.running();
        running.entries.retain(|e| !serials.contains(&e.serial));
        serials.clear();
        let awaited = std::mem::take(&mut running.awaited);
        drop(running);
        if awaited {
            self.bus.ring();
        }
    }

    fn run(&self, header: &Header, chain: &mut Chain) -> End {
        let Sizes { cdb, sense } = self.bus.sizes();
        let (out, mut writable) = chain.split();
        let out = out.slice(HEADER + cdb, out.len() - HEADER - cdb);
        let room = writable.len() - ANSWER - sense;
        let mut input = writable.slice(ANSWER + sense, room);
        // Both ways at once needs VIRTIO_SCSI_F_INOUT.
        if room > 0 && !out.is_empty() {
            return End::Answer(response::FAILURE, Ok(0));
        }
        let result = match self.bus.resolve(&header.lun) {
            Ok(_) if header.cdb.byte(0) == 0xa0 => {
                self.report_luns(&header.cdb, Some(header.lun[1]), &mut input)
            }
            Ok(unit) => unit
                .execute(&header.cdb, &out, &mut input)
                .map(|n| n.max(used(&header.cdb, &unit, out.len()))),
            // The REPORT LUNS well-known unit of the whole controller, and of a target.
            Err(_) if header.lun == [0xc1, 1, 0, 0, 0, 0, 0, 0] => {
                self.well_known(&header.cdb, None, &mut input)
            }
            Err(true) if header.lun[2..4] == [0xc1, 1] => {
                self.well_known(&header.cdb, Some(header.lun[1]), &mut input)
            }
            Err(true) => self.absent(&header.cdb, header.lun[1], &mut input),
            Err(false) => Err(Fail::Gone),
        };
        match result {
            Ok(done) => End::Answer(response::OK, Ok(done)),
            Err(Fail::Check(sense)) => End::Answer(response::OK, Err(sense)),
            Err(Fail::Overrun) => End::Answer(response::OVERRUN, Ok(0)),
            Err(Fail::Gone) => End::Answer(response::BAD_TARGET, Ok(0)),
            Err(Fail::Hold) => End::Hold,
        }
    }

    /// REPORT LUNS (SPC-4, 6.33): those of a target, or all in virtio's own form.
    fn report_luns(&self, cdb: &Cdb, target: Option<u8>, input: &mut IovMut) -> Result<usize, Fail> {
        let alloc = cdb.be32(6) as usize;
        if alloc < 16 || cdb.byte(2) > 2 {
            return Err(Sense::INVALID_FIELD.into());
        }
        let mut list = Vec::new();
        // 1: only well-known units, which are not listed.
        if cdb.byte(2) != 1 {
            for unit in self.bus.units().iter() {
                match target {
                    None => list.extend(unit.address.lun()),
                    Some(target) if target == unit.address.target => {
                        list.extend(unit.address.level());
                        list.extend([0; 6]);
                    }
                    Some(_) => {}
                }
            }
        }
        let head = [&(list.len() as u32).to_be_bytes()[..], &[0; 4]].concat();
        give(&[head, list].concat(), alloc, input)
    }

    /// The REPORT LUNS well-known logical unit (SPC-4, 8.2).
    fn well_known(&self, cdb: &Cdb, target: Option<u8>, input: &mut IovMut) -> Result<usize, Fail> {
        match cdb.byte(0) {
            0xa0 => self.report_luns(cdb, target, input),
            0x00 => Ok(0),
            0x03 => give(&Sense::NONE.fixed(), cdb.byte(4).into(), input),
            0x12 if cdb.byte(1) & 1 == 0 => give(&no_unit(0x1e), cdb.be16(3), input),
            0x12 => Err(Sense::INVALID_FIELD.into()),
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    /// A logical unit that is not there, on a target that is (SPC-4, 6.4.2 and 6.39).
    fn absent(&self, cdb: &Cdb, target: u8, input: &mut IovMut) -> Result<usize, Fail> {
        match cdb.byte(0) {
            0xa0 => self.report_luns(cdb, Some(target), input),
            0x12 if cdb.byte(1) & 1 == 0 => give(&no_unit(0x7f), cdb.be16(3), input),
            0x03 => give(&Sense::LUN_NOT_SUPPORTED.fixed(), cdb.byte(4).into(), input),
            _ => Err(Sense::LUN_NOT_SUPPORTED.into()),
        }
    }
}

/// INQUIRY data of something that is no disk: qualifier and type in `kind`.
fn no_unit(kind: u8) -> Vec<u8> {
    let mut data = vec![kind, 0, 5, 0x12, 31, 0, 0, 0];
    data.extend(b"MINIVMM                     ");
    data
}

/// Bytes of what was sent that a command has used, for the residual.
fn used(cdb: &Cdb, unit: &Unit, sent: usize) -> usize {
    if sent == 0 {
        return 0;
    }
    let (_, count) = cdb.blocks();
    let bytes = match cdb.byte(0) {
        // WRITE, WRITE AND VERIFY, VERIFY in all lengths
        0x0a | 0x2a | 0xaa | 0x8a | 0x2e | 0xae | 0x8e | 0x2f | 0xaf | 0x8f => count * unit.block(),
        0x41 | 0x93 => unit.block(),
        0x15 => cdb.byte(4).into(),
        0x42 | 0x55 => cdb.be16(7) as u64,
        _ => 0,
    };
    usize::try_from(bytes).map_or(sent, |n| n.min(sent))
}

impl Worker for RequestWorker {
    fn on_queue(&mut self, _: u16, q: &Queue) {
        let mut done: Vec<(Chain, usize)> = Vec::new();
        let mut serials = Vec::new();
        let mut last = Instant::now();
        let mut first = last;
        while let Some((mut chain, entered)) = self.take(q) {
            let Some((header, serial)) = entered else {
                q.reject(chain, "a SCSI request without a header, or without room for its answer");
                continue;
            };
            match self.run(&header, &mut chain) {
                End::Answer(response, result) => {
                    let len = self.bus.answer(&mut chain, response, result);
                    done.push((chain, len));
                    serials.push(serial);
                    let now = Instant::now();
                    self.wary = if now - last >= BATCH_TIME { BATCH } else { self.wary.saturating_sub(1) };
                    last = now;
                    if self.wary > 0 || now - first >= BATCH_TIME || done.len() >= BATCH {
                        self.push(q, &mut done, &mut serials);
                        first = now;
                    }
                }
                End::Hold => {
                    let mut running = self.bus.running();
                    if let Some(entry) = running.entries.iter_mut().find(|e| e.serial == serial) {
                        entry.held = true;
                    }
                    q.hold(chain);
                }
            }
        }
        if !done.is_empty() {
            self.push(q, &mut done, &mut serials);
        }
    }
}

#[cfg(test)]
#[path = "scsi_io_test.rs"]
mod tests;
