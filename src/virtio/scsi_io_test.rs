use super::super::scsi::ScsiConfig;
use super::super::scsi_testing::{Bench, Host, LEN, lun};
use super::super::scsi_unit::{UnitConfig, UnitKind};
use super::*;
use crate::block::handle::OnError;
use crate::block::testing::Rng;
use crate::virtio::testing::Asked;
use std::time::Instant;

fn at(target: u8, lun: u16, kind: UnitKind) -> Bench {
    Bench::at(Address { target, lun }, UnitConfig::new(kind), false)
}

fn read(lba: u8, count: u8) -> [u8; 10] {
    [0x28, 0, 0, 0, 0, lba, 0, 0, count, 0]
}

#[test]
fn a_request_and_its_answer() {
    let b = at(3, 7, UnitKind::Disk);
    let mut host = Host::new(ScsiConfig::default(), &[&b]);
    b.state.data.lock().unwrap()[512..1024].fill(5);
    let reply = host.ask(lun(3, 7), &read(1, 1), &[], 512);
    assert_eq!(reply.ok(), [5; 512]);
    assert_eq!((reply.residual, reply.len), (0, 108 + 512));
    // More room than is needed.
    let reply = host.ask(lun(3, 7), &[0x12, 0, 0, 0, 255, 0], &[], 255);
    assert_eq!((reply.ok().len(), reply.residual), (36, 255 - 36));
    // Less: nothing is done.
    let reply = host.ask(lun(3, 7), &read(1, 2), &[], 1023);
    assert_eq!((reply.response, reply.residual, reply.len), (response::OVERRUN, 1023, 108));
    let reply = host.ask(lun(3, 7), &[0x2a, 0, 0, 0, 0, 1, 0, 0, 1, 0], &[6; 600], 0);
    assert_eq!((reply.ok().len(), reply.residual, reply.len), (0, 88, 108));
    assert_eq!(b.bytes(512, 512), [6; 512]);
    let reply = host.ask(lun(3, 7), &[0xff], &[6; 100], 0);
    assert_eq!((reply.sense(), reply.residual), (Sense::INVALID_OPCODE, 100));
    // Both ways at once was not agreed on.
    let reply = host.ask(lun(3, 7), &read(1, 1), &[1], 512);
    assert_eq!((reply.response, reply.residual), (response::FAILURE, 512));
}

#[test]
fn luns_in_every_form() {
    let units = [at(0, 1, UnitKind::Disk), at(0, 300, UnitKind::Disk), at(2, 0, UnitKind::Cd)];
    let mut host = Host::new(ScsiConfig::default(), &[&units[0], &units[1], &units[2]]);
    let mut ready = |lun: [u8; 8]| {
        let reply = host.ask(lun, &[0], &[], 0);
        (reply.response, reply.status, reply.sense.get(12).copied())
    };
    let good = (response::OK, GOOD, None);
    assert_eq!(ready([1, 0, 0, 1, 0, 0, 0, 0]), good, "peripheral");
    assert_eq!(ready([1, 0, 0x40, 1, 0, 0, 0, 0]), good, "flat");
    assert_eq!(ready([1, 0, 0x41, 0x2c, 0, 0, 0, 0]), good);
    let none = (response::OK, CHECK_CONDITION, Some(0x25));
    assert_eq!(ready([1, 0, 0, 0, 0, 0, 0, 0]), none, "the target is there");
    assert_eq!(ready([1, 0, 1, 1, 0, 0, 0, 0]), none, "another bus");
    assert_eq!(ready([1, 0, 0x80, 1, 0, 0, 0, 0]), none);
    let bad = (response::BAD_TARGET, GOOD, None);
    for lun in [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 1], [0xff; 8]] {
        assert_eq!(ready(lun), bad, "{lun:x?}");
    }
    // Who is there.
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let list = [0, 0, 0, 16, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x41, 0x2c, 0, 0, 0, 0, 0, 0];
    assert_eq!(host.ask(lun(0, 0), &report, &[], 64).ok(), list);
    assert_eq!(host.ask(lun(0, 1), &report, &[], 64).ok(), list);
    assert_eq!(host.ask([1, 0, 0xc1, 1, 0, 0, 0, 0], &report, &[], 64).ok(), list);
    let all = host.ask([0xc1, 1, 0, 0, 0, 0, 0, 0], &report, &[], 64);
    assert_eq!(all.ok()[8..], [lun(0, 1), lun(0, 300), lun(2, 0)].concat());
    let mut short = report;
    short[9] = 15;
    assert_eq!(host.ask(lun(0, 0), &short, &[], 64).sense(), Sense::INVALID_FIELD);
    short[9] = 16;
    assert_eq!(*host.ask(lun(0, 0), &short, &[], 64).ok(), list[..16]);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    assert_eq!(host.ask(lun(0, 0), &inquiry, &[], 36).ok()[0], 0x7f);
    assert_eq!(host.ask([0xc1, 1, 0, 0, 0, 0, 0, 0], &inquiry, &[], 36).ok()[0], 0x1e);
    let sense = host.ask(lun(0, 0), &[3, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!(sense.ok(), Sense::LUN_NOT_SUPPORTED.fixed());
}

#[test]
fn sizes_that_the_driver_chooses() {
    let b = at(0, 0, UnitKind::Disk);
    let mut host = Host::new(ScsiConfig::default(), &[&b]);
    for (cdb, sense) in [(10u32, 0u32), (16, 8), (255, 65535), (0, 18)] {
        host.rig.reset();
        super::super::device::VirtioDevice::write_config(&*host.scsi, 24, &cdb.to_le_bytes());
        super::super::device::VirtioDevice::write_config(&*host.scsi, 20, &sense.to_le_bytes());
        host.rig.start();
        let at = host.rig.free;
        let mut header = vec![0; 19 + cdb as usize];
        header[0] = 1;
        host.rig.poke(at, &header);
        let answer = at + 0x1000;
        host.rig.poke(answer, &[0xee; 40]);
        host.rig.offer(2, &[(at, header.len() as u32, false), (answer, 12 + sense, true)]);
        host.rig.kick(2);
        assert_eq!(host.rig.answer(2).1, 12 + sense);
        let bytes = host.rig.peek(answer, 40);
        // A reset: the unit has something to tell, in what room there is.
        assert_eq!((bytes[10], bytes[11]), (CHECK_CONDITION, response::OK));
        assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()), sense.min(18));
        let whole = Sense::RESET.fixed();
        let len = sense.min(18) as usize;
        assert_eq!(bytes[12..12 + len], whole[..len]);
        assert_eq!(bytes[12 + len], if sense > 18 { 0 } else { 0xee });
    }
}

#[test]
fn a_chain_without_header_or_room_breaks_the_device() {
    let b = at(0, 0, UnitKind::Disk);
    let mut host = Host::new(ScsiConfig::default(), &[&b]);
    for pieces in [
        [(50, false), (108, true)],
        [(51, false), (107, true)],
        [(51, false), (0, true)],
        [(0, false), (108, true)],
    ] {
        let at = host.rig.free;
        let mut p: Vec<_> = pieces.iter().map(|(len, write)| (at, *len, *write)).collect();
        p.retain(|piece| piece.1 > 0);
        host.rig.offer(2, &p);
        host.rig.kick(2);
        assert!(host.rig.broken().contains("SCSI request"));
        host.rig.reset();
        host.rig.start();
    }
}

#[test]
fn what_fails_is_held_and_done_again() {
    let b = at(0, 0, UnitKind::Disk);
    b.unit.handle().set_policy(OnError::Stop, OnError::Stop);
    let mut host = Host::new(ScsiConfig::default(), &[&b]);
    b.state.fail(2, libc::ENOSPC);
    let base = host.rig.free;
    for n in 0..3u64 {
        host.offer(
            base + n * 1024,
            lun(0, 0),
            &[0x2a, 0, 0, 0, 0, n as u8, 0, 0, 1, 0],
            &[n as u8 + 1; 512],
            0,
        );
    }
    host.rig.no_answer(2);
    host.rig.pause();
    host.rig.resume();
    host.rig.no_answer(2);
    host.rig.pause();
    host.rig.resume();
    (0..3).for_each(|_| _ = host.rig.answer(2));
    assert_eq!(b.bytes(0, 1536), [[1; 512], [2; 512], [3; 512]].concat());
    // A unit that is taken away while a request of it waits.
    b.state.fail(1, libc::EIO);
    host.offer(base, lun(0, 0), &read(0, 1), &[], 512);
    host.rig.no_answer(2);
    host.rig.pause();
    host.bus.detach(&b.unit);
    host.rig.resume();
    let (_, len) = host.rig.answer(2);
    assert_eq!(host.reply(base, 0, 512, len).response, response::BAD_TARGET);
}

/// Whatever a driver asks for: every request is answered once, within its buffers, the device
/// stays up, and a disk has only what good writes wrote.
#[test]
fn hostile_commands_are_answered_and_harm_nobody() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5c51_5c51_0b5e_55ed);
    let seconds = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
    eprintln!("SEED={seed} SOAK={seconds}");
    let mut rng = Rng(seed);
    let mut units = vec![at(0, 0, UnitKind::Disk), at(0, 1, UnitKind::Cd), at(1, 0, UnitKind::Disk)];
    let config = ScsiConfig { workers: 2, ..ScsiConfig::default() };
    let mut host = Host::new(config, &[&units[0], &units[1], &units[2]]);
    const OPS: &[u8] = &[
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x16, 0x1a, 0x1b, 0x1d, 0x1e, 0x25, 0x28, 0x2a, 0x2b, 0x2e, 0x2f,
        0x35, 0x41, 0x42, 0x43, 0x46, 0x4a, 0x51, 0x55, 0x5a, 0x5e, 0x88, 0x8a, 0x8e, 0x8f, 0x91, 0x93, 0x9e,
        0xa0, 0xa8, 0xaa, 0xae, 0xaf, 0xbb, 0xbd, 0xbe,
    ];
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut asked, mut good) = (0u64, 0u64);
    while Instant::now() < end {
        let mut cdb: Vec<u8> =
            (0..16).map(|_| if rng.below(3) == 0 { rng.draw() as u8 } else { 0 }).collect();
        cdb[0] =
            if rng.below(20) == 0 { rng.draw() as u8 } else { OPS[rng.below(OPS.len() as u64) as usize] };
        let lun = match rng.below(10) {
            0 => std::array::from_fn(|_| rng.draw() as u8),
            1 => [0xc1, 1, 0, 0, 0, 0, 0, 0],
            n => lun((n % 2) as u8, (n / 2 % 3) as u16),
        };
        // In, out, neither, or both.
        let out = if rng.below(2) == 0 { rng.below(3000) as usize } else { 0 };
        let out: Vec<u8> = (0..out).map(|_| if rng.below(2) == 0 { 0 } else { rng.draw() as u8 }).collect();
        let room = if out.is_empty() || rng.below(20) == 0 { rng.below(9000) as u32 } else { 0 };
        match rng.below(200) {
            0 => units[1].unit.tray.as_ref().map(|t| t.set_open(true)).map(drop).unwrap_or(()),
            1 => units[1].unit.tray.as_ref().map(|t| t.request_eject(true)).unwrap_or(()),
            2 => {
                let gone = units.pop().unwrap();
                host.bus.detach(&gone.unit);
                check(&gone);
                units.push(at(1, 0, UnitKind::Disk));
                host.bus.attach(units[2].unit.clone());
            }
            3 => assert!(matches!(
                host.tmf(rng.below(9) as u32, lun, rng.below(asked + 2)),
                0 | 3 | 10 | 11 | 12
            )),
            _ => {}
        }
        if units[1].unit.tray_open() && rng.below(5) == 0 {
            units[1].unit.tray.as_ref().unwrap().set_open(false);
        }
        let reply = host.ask(lun, &cdb, &out, room);
        let wanted = room.max(out.len() as u32);
        assert!(reply.len >= 108 && reply.len <= 108 + room, "{cdb:x?} {reply:x?}");
        assert!(reply.residual <= wanted, "{cdb:x?} {reply:x?}");
        match reply.response {
            response::OK if reply.status == GOOD => {
                good += 1;
                if room > 0 {
                    assert_eq!(reply.data.len() as u32 + reply.residual, room, "{cdb:x?}");
                }
            }
            response::OK => assert_ne!(reply.sense().0, 0),
            response::OVERRUN | response::BAD_TARGET | response::FAILURE => assert!(reply.data.is_empty()),
            other => panic!("{cdb:x?}: response {other}"),
        }
        asked += 1;
    }
    eprintln!("{asked} commands, {good} good");
    assert_eq!(*host.rig.told.broken.lock().unwrap(), None);
    assert!(good > asked / 20);
    assert!(host.bus.running().find(|_| true).is_empty(), "nothing is left in the list");
    check(&units[0]);
    check(&units[2]);
    let written = |a: &Asked| !matches!(a, Asked::Read(..) | Asked::Flush);
    assert!(!units[1].state.log.lock().unwrap().iter().any(written), "a CD is only read");
}

/// Only whole blocks of the disk were asked for.
fn check(unit: &Bench) {
    for asked in unit.state.log.lock().unwrap().iter() {
        let (off, len) = match *asked {
            Asked::Read(o, l) | Asked::Write(o, l) | Asked::Zero(o, l, _) | Asked::Discard(o, l) => (o, l),
            Asked::Flush => (0, 512),
        };
        assert!(off + len <= LEN as u64 && len > 0 && (off | len) % 512 == 0, "{asked:?}");
    }
}
