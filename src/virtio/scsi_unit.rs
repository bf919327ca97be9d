//! A SCSI logical unit: what a disk and a CD drive have in common (SPC-4).
//!
//! Owns: a unit's address, its properties, copies of its medium's length and state, unit attentions,
//! and the commands that every unit has. Never: knows virtio, or an image format. Threads: workers
//! execute commands, several at once; control resizes, changes media, takes it away. Locks: `state`
//! and the tray's, leaves, never across I/O.
//!
//! The guest is hostile: a command's fields are read from a copy, lengths are checked against what
//! the request has room for before anything is done, and data stay in guest memory.

use super::scsi_sense::{Cdb, Fail, Sense};
use crate::block::driver::{Flags, Perm};
use crate::block::handle::{Handle, Request};
use crate::block::stats::Kind as Stat;
use crate::block::tray::{Tray, Unreachable};
use crate::event::ErrorAction;
use crate::sys::iov::{Iov, IovMut};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The longest data of a command in bytes, as for virtio-blk: it cannot be interrupted.
pub const MAX_DATA: u64 = (i32::MAX as u64) & !511;
/// Unit attentions that are kept at most.
const ATTENTIONS: usize = 8;

/// What the commands of a unit are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// A direct access block device (SBC).
    Disk,
    /// A CD or DVD drive that reads (MMC).
    Cd,
}

/// Where a unit is on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Target: 0 to 255.
    pub target: u8,
    /// Logical unit: 0 to 16383.
    pub lun: u16,
}

impl Address {
    /// A single level LUN structure (SAM-5, 4.7.4): peripheral or flat addressing.
    pub fn level(self) -> [u8; 2] {
        let bytes = self.lun.to_be_bytes();
        if self.lun < 256 { bytes } else { [bytes[0] | 0x40, bytes[1]] }
    }

    /// As virtio has it (virtio 1.2, 5.6.6.1).
    pub fn lun(self) -> [u8; 8] {
        let level = self.level();
        [1, self.target, level[0], level[1], 0, 0, 0, 0]
    }
}

/// The properties of `scsi-hd` and `scsi-cd`, with QEMU's names and defaults. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitConfig {
    /// Disk or CD.
    pub kind: UnitKind,
    /// Name for messages.
    pub id: String,
    /// INQUIRY: 8 bytes at most.
    pub vendor: String,
    /// INQUIRY: 16 bytes at most.
    pub product: String,
    /// INQUIRY: 4 bytes at most.
    pub version: String,
    /// VPD page 0x80; "": none.
    pub serial: String,
    /// VPD page 0x83; "": none.
    pub device_id: String,
    /// World wide name in VPD page 0x83; 0: none.
    pub wwn: u64,
    /// Smallest unit of a request.
    pub logical_block_size: u32,
    /// Unit that the storage writes without reading first.
    pub physical_block_size: u32,
    /// Smallest request that makes sense; 0: not told.
    pub min_io_size: u32,
    /// Best size of a request; 0: not told.
    pub opt_io_size: u32,
    /// Unit of discards; `None`: what the image says.
    pub discard_granularity: Option<u32>,
    /// The medium can be taken out.
    pub removable: bool,
    /// Rotations a minute; 1: does not rotate; 0: not told.
    pub rotation_rate: u16,
    /// Longest UNMAP.
    pub max_unmap_size: u64,
    /// Longest transfer.
    pub max_io_size: u64,
    /// Writes can go past the cache one by one (DPO and FUA bits).
    pub dpofua: bool,
    /// The guest may not write.
    pub read_only: bool,
}

impl UnitConfig {
    /// The defaults of a disk or CD drive.
    pub fn new(kind: UnitKind) -> UnitConfig {
        let cd = kind == UnitKind::Cd;
        let block = if cd { 2048 } else { 512 };
        UnitConfig {
            kind,
            id: String::new(),
            vendor: "MINIVMM".into(),
            product: if cd { "CD-ROM" } else { "HARDDISK" }.into(),
            version: "1".into(),
            serial: String::new(),
            device_id: String::new(),
            wwn: 0,
            logical_block_size: block,
            physical_block_size: block,
            min_io_size: 0,
            opt_io_size: 0,
            discard_granularity: None,
            removable: cd,
            rotation_rate: 0,
            max_unmap_size: 1 << 30,
            max_io_size: MAX_DATA,
            dpofua: true,
            read_only: cd,
        }
    }
}

/// Bytes of a medium.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Where they begin.
    pub off: u64,
    /// How many.
    pub len: u64,
    /// How often the tray had moved: which medium is meant.
    moves: u64,
}

#[derive(Default)]
struct State {
    attentions: VecDeque<Sense>,
}

/// See the module's head.
pub struct Unit {
    /// Where it is.
    pub address: Address,
    /// Its properties.
    pub config: UnitConfig,
    pub(super) handle: Arc<Handle>,
    pub(super) tray: Option<Arc<Tray>>,
    /// Unit of discards, in bytes.
    pub(super) granularity: u32,
    /// Bytes of the medium. A copy: to ask the handle may mean to wait for control.
    len: AtomicU64,
    /// There is a medium, in an open tray or in a closed one.
    present: AtomicBool,
    /// The medium, or its user, does not write.
    read_only: AtomicBool,
    gone: AtomicBool,
    /// Asynchronous notifications that the driver wants.
    pub(super) subscribed: AtomicU32,
    /// The write cache as the user set it; a reset goes back to it.
    write_cache: bool,
    state: Mutex<State>,
}

impl Unit {
    /// A unit on `handle`. Control thread.
    pub fn new(address: Address, config: UnitConfig, handle: Arc<Handle>) -> Arc<Unit> {
        let image = handle.limits().discard_alignment;
        let granularity = config.discard_granularity.unwrap_or(image).max(config.logical_block_size);
        let unit = Arc::new(Unit {
            address,
            tray: handle.tray(),
            granularity,
            len: AtomicU64::new(0),
            present: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            subscribed: AtomicU32::new(0),
            write_cache: handle.write_cache(),
            state: Mutex::default(),
            config,
            handle,
        });
        unit.look(unit.handle.len());
        unit.attend(Sense::RESET);
        unit
    }

    /// The disk behind it.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies what there is of a medium, `len` bytes long; true when a disk's length has changed
    /// that the guest knows.
    pub fn look(&self, len: u64) -> bool {
        let node = self.handle.node();
        let writes =
            node.as_ref().is_some_and(|n| !n.read_only()) && self.handle.uses().contains(Perm::WRITE);
        self.read_only.store(self.config.read_only || !writes, Ordering::Relaxed);
        let before = self.present.swap(node.is_some(), Ordering::Relaxed);
        let old = self.len.swap(len, Ordering::Relaxed);
        before && node.is_some() && old != len
    }

    /// Something that the guest must hear before its next command.
    pub fn attend(&self, sense: Sense) {
        let mut state = self.state();
        if !state.attentions.contains(&sense) {
            state.attentions.truncate(ATTENTIONS - 1);
            state.attentions.push_back(sense);
        }
    }

    /// It is taken off the bus: whatever fails from now on fails for that.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    /// Back to power-on state.
    pub fn reset(&self) {
        self.subscribed.store(0, Ordering::Relaxed);
        self.reset_by_driver(Sense::RESET);
        if let Some(tray) = &self.tray {
            tray.reset();
        }
    }

    /// A task management function has reset it: as above, but the tray does not move.
    pub fn reset_by_driver(&self, why: Sense) {
        self.handle.set_write_cache(self.write_cache);
        self.state().attentions.clear();
        self.attend(why);
        if let Some(tray) = &self.tray {
            tray.lock(false);
        }
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        self.config.logical_block_size.into()
    }

    /// Blocks of the medium.
    pub(super) fn block_count(&self) -> u64 {
        self.len.load(Ordering::Relaxed) / self.block()
    }

    /// The medium refuses writes.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    pub(super) fn tray_open(&self) -> bool {
        self.tray.as_ref().is_some_and(|t| t.is_open())
    }

    /// There is a medium that the guest can reach.
    pub(super) fn has_medium(&self) -> bool {
        self.present.load(Ordering::Relaxed) && !self.tray_open()
    }

    pub(super) fn ready(&self) -> Result<(), Fail> {
        self.reach().map(drop)
    }

    /// The medium can be used, as long as the tray has moved no more often than this says.
    fn reach(&self) -> Result<u64, Fail> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(Fail::Gone);
        }
        let moves = self.reach_tray()?;
        if !self.present.load(Ordering::Relaxed) {
            return Err(self.refusal(moves, Sense::NO_MEDIUM));
        }
        if self.block_count() == 0 {
            let cd = self.config.kind == UnitKind::Cd;
            return Err(self.refusal(moves, if cd { Sense::NO_MEDIUM } else { Sense::NOT_READY }));
        }
        Ok(moves)
    }

    /// Why a command fails for what the medium is like: as `sense` says, unless the tray has moved since
    /// it had moved so often, and that is said of another medium than the guest means.
    fn refusal(&self, moves: u64, sense: Sense) -> Fail {
        if self.tray.as_ref().is_none_or(|t| t.moves() == moves) {
            return sense.into();
        }
        // Somebody else may have been told.
        self.reach_tray().err().unwrap_or(Sense::MEDIUM_CHANGED.into())
    }

    /// How often the tray has moved, if what is in it can be reached.
    fn reach_tray(&self) -> Result<u64, Fail> {
        self.tray.as_ref().map_or(Ok(0), |t| t.reach()).map_err(|e| match e {
            Unreachable::Open => Sense::TRAY_OPEN.into(),
            Unreachable::Changed => Sense::MEDIUM_CHANGED.into(),
        })
    }

    /// The bytes that `count` blocks from `lba` on are, if they are on the medium.
    pub(super) fn range(&self, lba: u64, count: u64, kind: Stat) -> Result<Place, Fail> {
        let moves = self.reach()?;
        let end = lba.checked_add(count).filter(|end| *end <= self.block_count());
        if end.is_none() {
            self.handle.invalid(kind);
            return Err(self.refusal(moves, Sense::LBA_OUT_OF_RANGE));
        }
        // Both are below the medium's length in bytes.
        Ok(Place { off: lba * self.block(), len: count * self.block(), moves })
    }

    /// The same for a command that moves or makes that many bytes, all at once.
    pub(super) fn extent(&self, lba: u64, count: u64, kind: Stat) -> Result<Place, Fail> {
        let place = self.range(lba, count, kind)?;
        if place.len > MAX_DATA {
            self.handle.invalid(kind);
            return Err(Sense::INVALID_FIELD.into());
        }
        Ok(place)
    }

    /// Does a request on the medium that a place was found on, and on no other: it may have waited
    /// for a limit, or for the user.
    pub(super) fn submit(&self, on: &Place, request: Request) -> Result<(), Fail> {
        let read = matches!(request, Request::Read(..));
        self.done(read, self.handle.submit_while(|| self.is_on(on), request, true))
    }

    /// The medium is still the one that the place was found on.
    pub(super) fn is_on(&self, place: &Place) -> bool {
        self.tray.as_ref().is_none_or(|t| t.moves() == place.moves)
    }

    /// What becomes of a request below.
    pub(super) fn done(&self, read: bool, result: io::Result<()>) -> Result<(), Fail> {
        let Err(e) = result else { return Ok(()) };
        if self.gone.load(Ordering::SeqCst) {
            return Err(Fail::Gone);
        }
        // The user has just taken it out, and perhaps put in another one: somebody else may have
        // been told of that.
        if e.raw_os_error() == Some(libc::ENOMEDIUM) {
            return Err(self.reach().err().unwrap_or(Sense::MEDIUM_CHANGED.into()));
        }
        match self.handle.on_error(read, &e) {
            ErrorAction::Ignore => Ok(()),
            ErrorAction::Stop => Err(Fail::Hold),
            ErrorAction::Report => Err(Fail::Check(match e.raw_os_error() {
                Some(libc::ENOSPC) => Sense::SPACE_ALLOCATION,
                Some(libc::EPERM | libc::EACCES | libc::EROFS) => Sense::WRITE_PROTECTED,
                Some(libc::ENOMEM) => Sense::TARGET_FAILURE,
                _ if read => Sense::READ_ERROR,
                _ => Sense::WRITE_ERROR,
            })),
        }
    }

    /// READ in all lengths: blocks to `input`.
    pub(super) fn read(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        if cdb.byte(0) != 0x08 {
            no_protection(cdb)?;
        }
        let (lba, count) = cdb.blocks();
        let on = self.extent(lba, count, Stat::Read)?;
        let len = fits(on.len, input.len())?;
        if len > 0 {
            self.submit(&on, Request::Read(on.off, &mut input.slice(0, len)))?;
        }
        Ok(len)
    }

    /// Does a command. `out` is what the driver sends with it, `input` what it wants filled: bytes
    /// that were filled, from the start.
    pub fn execute(&self, cdb: &Cdb, out: &Iov, input: &mut IovMut) -> Result<usize, Fail> {
        // Those that must work whatever has happened (SAM-5, 5.14; MMC-6, 6.5 and 6.6).
        match cdb.byte(0) {
            0x03 => return self.request_sense(cdb, input),
            0x12 => return self.inquiry(cdb, input),
            0x46 | 0x4a if self.config.kind == UnitKind::Cd => {}
            _ => {
                if let Some(sense) = self.take_attention() {
                    return Err(sense.into());
                }
            }
        }
        let result = match self.config.kind {
            UnitKind::Disk => self.disk_command(cdb, out, input),
            UnitKind::Cd => self.cd_command(cdb, out, input),
        };
        match result {
            Err(Fail::Check(Sense::INVALID_OPCODE)) => self.common(cdb, out, input),
            result => result,
        }
    }

    fn take_attention(&self) -> Option<Sense> {
        let changed = |t: &Arc<Tray>| t.take_attention().then_some(Sense::MEDIUM_CHANGED);
        let pending = self.state().attentions.pop_front();
        pending.or_else(|| self.tray.as_ref().and_then(changed))
    }

    fn common(&self, cdb: &Cdb, out: &Iov, input: &mut IovMut) -> Result<usize, Fail> {
        match cdb.byte(0) {
            // TEST UNIT READY
            0x00 => self.ready().map(|()| 0),
            // MODE SELECT, MODE SENSE
            0x15 | 0x55 => self.mode_select(cdb, out),
            0x1a | 0x5a => self.mode_sense(cdb, input),
            // RESERVE, RELEASE: there is one initiator, and it always has what it asks for.
            0x16 | 0x17 | 0x56 | 0x57 => Ok(0),
            // START STOP UNIT
            0x1b => self.start_stop(cdb),
            // SEND DIAGNOSTIC: the default self-test only
            0x1d if cdb.byte(1) & 0x04 != 0 && cdb.be16(3) == 0 => Ok(0),
            0x1d => Err(Sense::INVALID_FIELD.into()),
            // PREVENT ALLOW MEDIUM REMOVAL
            0x1e => {
                if let Some(tray) = &self.tray {
                    tray.lock(cdb.byte(4) & 1 != 0);
                }
                Ok(0)
            }
            // Everything else, PERSISTENT RESERVE IN and OUT among it.
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    fn request_sense(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let sense = self.take_attention().unwrap_or(Sense::NONE);
        match cdb.byte(1) & 1 {
            0 => give(&sense.fixed(), cdb.byte(4).into(), input),
            _ => give(&sense.descriptor(), cdb.byte(4).into(), input),
        }
    }

    fn inquiry(&self, cdb: &Cdb, input: &mut IovMut) -> Result<usize, Fail> {
        let alloc = cdb.be16(3);
        match (cdb.byte(1) & 1, cdb.byte(2)) {
            (0, 0) => give(&self.inquiry_data(), alloc, input),
            (0, _) => Err(Sense::INVALID_FIELD.into()),
            (_, page) => give(&self.vpd(page).ok_or(Sense::INVALID_FIELD)?, alloc, input),
        }
    }

    fn start_stop(&self, cdb: &Cdb) -> Result<usize, Fail> {
        let (start, load_or_eject) = (cdb.byte(4) & 1 != 0, cdb.byte(4) & 2 != 0);
        // With a power condition there is no loading.
        let Some(tray) = self.tray.as_ref().filter(|_| load_or_eject && cdb.byte(4) >> 4 == 0) else {
            return Ok(0);
        };
        if tray.guest_move(!start) { Ok(0) } else { Err(Sense::REMOVAL_PREVENTED.into()) }
    }

    /// FUA, if the command says so.
    pub(super) fn flags(cdb: &Cdb) -> Flags {
        if cdb.byte(0) != 0x0a && cdb.byte(1) & 0x08 != 0 { Flags::FUA } else { Flags::NONE }
    }
}

/// Puts `data` into `input`, as far as the allocation length goes.
pub(super) fn give(data: &[u8], alloc: usize, input: &mut IovMut) -> Result<usize, Fail> {
    // Room is asked for as much as the command speaks of (virtio 1.2, 5.6.6.1).
    fits(alloc as u64, input.len())?;
    let len = data.len().min(alloc);
    input.copy_from(0, &data[..len]);
    Ok(len)
}

/// `len` as a length of a buffer that has room for `room` bytes.
pub(super) fn fits(len: u64, room: usize) -> Result<usize, Fail> {
    usize::try_from(len).ok().filter(|len| *len <= room).ok_or(Fail::Overrun)
}

/// A unit without protection information refuses commands that ask for it.
pub(super) fn no_protection(cdb: &Cdb) -> Result<(), Fail> {
    if cdb.byte(1) & 0xe0 != 0 { Err(Sense::INVALID_FIELD.into()) } else { Ok(()) }
}

#[cfg(test)]
#[path = "scsi_unit_test.rs"]
mod tests;
