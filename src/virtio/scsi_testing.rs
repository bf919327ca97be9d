//! For tests: units without a controller, and a driver of a controller on rings.

use super::device::VirtioDevice;
use super::scsi::{Bus, Scsi, ScsiConfig};
use super::scsi_sense::{Cdb, Fail, Sense};
use super::scsi_unit::{Address, Unit, UnitConfig, UnitKind};
use super::testing::{FakeState, Rig, fake_disk};
use crate::block::driver::Perm;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::NodeOptions;
use crate::block::tray::Tray;
use crate::event::Events;
use crate::sys::inbox::Inbox;
use crate::sys::iov::{Iov, IovMut};
use std::sync::Arc;

/// Bytes of the media.
pub const LEN: usize = 1 << 20;

/// A unit on a disk in memory.
pub struct Bench {
    pub unit: Arc<Unit>,
    pub state: Arc<FakeState>,
    pub events: Events,
}

pub fn handle(read_only: bool) -> (Arc<Handle>, Arc<FakeState>) {
    let spec = HandleSpec { uses: Perm::ALL, ..HandleSpec::default() };
    fake_disk(LEN, spec, NodeOptions { unmap: true, read_only, ..NodeOptions::default() })
}

impl Bench {
    /// At `address`, with its first unit attention taken.
    pub fn at(address: Address, config: UnitConfig, read_only: bool) -> Bench {
        let (handle, state) = handle(read_only);
        let events: Events = Arc::new(Inbox::new().unwrap());
        handle.set_owner("sd0", "/machine/peripheral/sd0", Some(events.clone()));
        if config.removable {
            handle.set_tray(Tray::new("/machine/peripheral/sd0", events.clone()));
        }
        let bench = Bench { unit: Unit::new(address, config, handle), state, events };
        assert_eq!(bench.sense(&[0], &[], 0), Sense::RESET);
        bench
    }

    pub fn new(config: UnitConfig) -> Bench {
        Bench::at(Address { target: 0, lun: 0 }, config, false)
    }

    pub fn disk() -> Bench {
        Bench::new(UnitConfig::new(UnitKind::Disk))
    }

    pub fn cd() -> Bench {
        Bench::new(UnitConfig::new(UnitKind::Cd))
    }

    pub fn run(&self, cdb: &[u8], out: &[u8], room: usize) -> Result<Vec<u8>, Fail> {
        let mut data = vec![0xee; room];
        let mut input = IovMut::from_slice(&mut data);
        let done = self.unit.execute(&Cdb::new(cdb), &Iov::from_slice(out), &mut input)?;
        drop(input);
        assert!(data[done..].iter().all(|b| *b == 0xee), "more was filled than was said");
        data.truncate(done);
        Ok(data)
    }

    /// What a good command gives.
    pub fn ok(&self, cdb: &[u8], out: &[u8], room: usize) -> Vec<u8> {
        self.run(cdb, out, room).unwrap_or_else(|e| panic!("{cdb:x?}: {e:?}"))
    }

    /// Why a command fails.
    pub fn sense(&self, cdb: &[u8], out: &[u8], room: usize) -> Sense {
        match self.run(cdb, out, room) {
            Err(Fail::Check(sense)) => sense,
            other => panic!("{cdb:x?}: {other:?}"),
        }
    }

    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        self.state.data.lock().unwrap()[at..at + len].to_vec()
    }
}

/// What the driver got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub response: u8,
    pub status: u8,
    pub residual: u32,
    pub sense: Vec<u8>,
    pub data: Vec<u8>,
    /// Bytes written, by the used ring.
    pub len: u32,
}

impl Reply {
    pub fn sense(&self) -> Sense {
        assert_eq!((self.response, self.status), (0, 2), "{self:x?}");
        assert_eq!((self.sense.len(), self.sense[0]), (18, 0x70));
        Sense(self.sense[2], self.sense[12], self.sense[13])
    }

    pub fn ok(&self) -> &[u8] {
        assert_eq!((self.response, self.status), (0, 0), "{self:x?}");
        &self.data
    }
}

/// A controller with its driver.
pub struct Host {
    pub rig: Rig,
    pub bus: Arc<Bus>,
    pub scsi: Arc<Scsi>,
    next_id: u64,
}

/// Virtio's form of an address.
pub fn lun(target: u8, lun: u16) -> [u8; 8] {
    Address { target, lun }.lun()
}

impl Host {
    pub fn new(config: ScsiConfig, units: &[&Bench]) -> Host {
        let scsi = Scsi::new(config, "scsi0.0".into()).unwrap();
        let bus = scsi.bus().clone();
        units.iter().for_each(|b| bus.attach(b.unit.clone()));
        let rig = Rig::new(scsi.clone(), scsi.features());
        Host { rig, bus, scsi, next_id: 1 }
    }

    /// The pieces of a request at `at`: header and data, answer, data in.
    pub fn pieces(
        &mut self,
        at: u64,
        lun: [u8; 8],
        cdb: &[u8],
        out: &[u8],
        room: u32,
    ) -> (u64, Vec<(u64, u32, bool)>) {
        let id = self.next_id;
        self.next_id += 1;
        let mut header = [0; 51];
        header[..8].copy_from_slice(&lun);
        header[8..16].copy_from_slice(&id.to_le_bytes());
        header[19..19 + cdb.len()].copy_from_slice(cdb);
        self.rig.poke(at, &header);
        self.rig.poke(at + 51, out);
        let answer = at + 51 + out.len() as u64;
        self.rig.poke(answer, &vec![0xee; 108 + room as usize]);
        let mut p = vec![(at, 51 + out.len() as u32, false), (answer, 108, true)];
        if room > 0 {
            p.push((answer + 108, room, true));
        }
        (id, p)
    }

    /// Offers a request on queue 2 at `at`: its head and id.
    pub fn offer(&mut self, at: u64, lun: [u8; 8], cdb: &[u8], out: &[u8], room: u32) -> (u16, u64) {
        let (id, p) = self.pieces(at, lun, cdb, out, room);
        let head = self.rig.offer(2, &p);
        self.rig.kick(2);
        (head, id)
    }

    /// The answer of a request that was offered at `at`.
    pub fn reply(&self, at: u64, out: usize, room: u32, len: u32) -> Reply {
        let bytes = self.rig.peek(at + 51 + out as u64, 108 + room as usize);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let data = bytes[108..(len as usize).max(108)].to_vec();
        let sense = bytes[12..12 + (word(0) as usize).min(96)].to_vec();
        Reply { response: bytes[11], status: bytes[10], residual: word(4), sense, data, len }
    }

    /// Does a request and waits for it.
    pub fn ask(&mut self, lun: [u8; 8], cdb: &[u8], out: &[u8], room: u32) -> Reply {
        let at = self.rig.free;
        let (head, _) = self.offer(at, lun, cdb, out, room);
        let (answered, len) = self.rig.answer(2);
        assert_eq!(answered, head);
        self.reply(at, out.len(), room, len)
    }

    /// A task management function; its response, when it comes.
    pub fn offer_tmf(&mut self, subtype: u32, lun: [u8; 8], id: u64) -> u64 {
        let at = self.rig.free + 0x8000;
        let mut bytes = [0; 24];
        bytes[4..8].copy_from_slice(&subtype.to_le_bytes());
        bytes[8..16].copy_from_slice(&lun);
        bytes[16..].copy_from_slice(&id.to_le_bytes());
        self.rig.poke(at, &bytes);
        self.rig.poke(at + 24, &[0xee]);
        self.rig.offer(0, &[(at, 24, false), (at + 24, 1, true)]);
        self.rig.kick(0);
        at + 24
    }

    pub fn tmf(&mut self, subtype: u32, lun: [u8; 8], id: u64) -> u8 {
        let at = self.offer_tmf(subtype, lun, id);
        assert_eq!(self.rig.answer(0).1, 1);
        self.rig.peek(at, 1)[0]
    }

    /// Gives the device `n` event buffers.
    pub fn event_buffers(&mut self, n: u64) {
        for i in 0..n {
            let at = self.rig.free + 0x9000 + 16 * i;
            self.rig.offer(1, &[(at, 16, true)]);
        }
        self.rig.kick(1);
    }

    /// The next event: what, where, why.
    pub fn event(&mut self) -> (u32, [u8; 8], u32) {
        let (head, len) = self.rig.answer(1);
        assert_eq!(len, 16);
        let bytes = self.rig.peek(self.rig.descriptor(1, head), 16);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), bytes[4..12].try_into().unwrap(), word(12))
    }
}
