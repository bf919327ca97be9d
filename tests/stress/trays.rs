//! Drives with a tray: a CD drive and a disk whose medium can be taken out, each behind a SCSI controller of its own.
//! The user opens, closes, ejects and exchanges at random; the guest verifies what it reads, and that it is told
//! before it gets to see another medium; and in the end each medium holds what was written to it, and nothing that
//! was meant for another.
//!
//! A guest does one command at a time, so that it knows what came before what.

use super::guest::Guest;
use super::{ANYTHING, Dir, Rng, SECTOR, contents};
use minivmm::block::drive::{Device, Use};
use minivmm::control::vm::Vm;
use minivmm::virtio::scsi::{Scsi, ScsiConfig};
use minivmm::virtio::scsi_unit::{Address, Unit, UnitConfig, UnitKind};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Media of each drive.
pub const MEDIA: usize = 3;

/// The drives, by their names.
pub const DRIVES: [&str; 2] = ["d4", "d5"];

const CD: usize = 0;

/// Sectors of a medium: their number tells which it is, as does what is in the first four.
fn sectors(medium: usize) -> u64 {
    256 + 64 * medium as u64
}

/// What a fresh medium of the CD drive is full of; one of the disk only in its first four sectors.
fn mark(medium: usize) -> u32 {
    0xd15c_0000 + medium as u32
}

fn name(drive: usize, medium: usize) -> String {
    format!("medium{drive}-{medium}")
}

/// Makes the files of all media.
pub fn make_media(dir: &Dir) {
    for drive in 0..DRIVES.len() {
        for medium in 0..MEDIA {
            let marked = if drive == CD { sectors(medium) } else { 4 };
            let mut bytes: Vec<u8> = (0..marked).flat_map(|s| contents(mark(medium), s)).collect();
            bytes.resize((sectors(medium) * SECTOR) as usize, 0);
            std::fs::write(dir.path(&name(drive, medium)), bytes).unwrap();
        }
    }
}

/// An empty drive with its controller.
pub fn drive(vm: &mut Vm, n: usize) -> Guest {
    let cd = n == CD;
    let drive = json!({"id": DRIVES[n], "if": "none", "media": if cd { "cdrom" } else { "disk" }});
    vm.add_drive(drive.as_object().unwrap().clone()).unwrap();
    let id = format!("tray{n}");
    let device = Device {
        id: id.clone(),
        qom_path: format!("/machine/peripheral/{id}"),
        qdev: id.clone(),
        removable: true,
        io_status: true,
    };
    let (how, events) = (Use { read_only: cd, ..Use::default() }, vm.events.clone());
    let model = if cd { "scsi-cd" } else { "scsi-hd" };
    let handle =
        vm.drives.attach_device(&mut vm.graph, Some(DRIVES[n]), model, device, &how, &events).unwrap();
    let kind = if cd { UnitKind::Cd } else { UnitKind::Disk };
    let config = UnitConfig { id: id.clone(), removable: true, ..UnitConfig::new(kind) };
    let scsi = Scsi::new(ScsiConfig { workers: 2, ..ScsiConfig::default() }, format!("{id}.0")).unwrap();
    scsi.bus().attach(Unit::new(Address { target: 0, lun: 0 }, config, handle));
    Guest::new(scsi)
}

/// A step of the user: a command and its arguments, and whether it may fail at a bad moment.
pub fn step(rng: &mut Rng, dir: &Dir) -> Vec<(&'static str, Value)> {
    let n = rng.below(2) as usize;
    let (drive, id, medium) = (DRIVES[n], format!("tray{n}"), rng.below(MEDIA as u64) as usize);
    let (force, file) = (rng.below(3) == 0, dir.path(&name(n, medium)));
    let node = format!("in-{}", name(n, medium));
    match rng.below(8) {
        0 => vec![("blockdev-open-tray", json!({"id": id, "force": force}))],
        1 => vec![("blockdev-close-tray", json!({"device": drive}))],
        2 => vec![("blockdev-remove-medium", json!({"id": id}))],
        3 => vec![("eject", json!({"device": drive, "force": force}))],
        4 => {
            // A node of its own, which it keeps.
            let file = json!({"driver": "file", "filename": file});
            let read_only = n == CD || rng.below(3) == 0;
            let add = json!({"driver": "raw", "node-name": node, "read-only": read_only, "file": file});
            let open = json!({"id": id, "force": true});
            vec![
                ("blockdev-add", add),
                ("blockdev-open-tray", open),
                ("blockdev-remove-medium", json!({"id": id})),
                ("blockdev-insert-medium", json!({"id": id, "node-name": node})),
                ("blockdev-close-tray", json!({"id": id})),
            ]
        }
        5 => vec![("blockdev-del", json!({"node-name": node}))],
        6 => {
            let iops = [0, 40, 400][rng.below(3) as usize];
            let args = json!({"device": drive, "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0,
                              "iops_wr": 0, "group": id});
            vec![("block_set_io_throttle", args)]
        }
        _ => {
            let mode = ["retain", "read-only", "read-write"][if n == CD { 1 } else { rng.below(3) as usize }];
            let args =
                json!({"id": id, "filename": file, "format": "raw", "force": force, "read-only-mode": mode});
            vec![("blockdev-change-medium", args)]
        }
    }
}

// ---- the guest

/// How a command ended.
#[derive(Debug, PartialEq)]
enum Answer {
    Good(Vec<u8>),
    /// The medium is not there, or may be another one: nothing was done.
    Changed,
    /// It cannot be written.
    Protected,
    /// The guest itself has locked the tray.
    Locked,
}

/// Addresses the one unit.
const LUN: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

fn command(g: &mut Guest, n: usize, cdb: &[u8], out: &[u8], room: usize) -> Answer {
    let at = g.free.next_multiple_of(4096);
    let mut header = [0; 51];
    header[..8].copy_from_slice(&LUN);
    header[19..19 + cdb.len()].copy_from_slice(cdb);
    g.poke(at, &header);
    g.poke(at + 51, out);
    let back = at + 51 + out.len() as u64;
    g.poke(back, &[0xee; 108]);
    let mut pieces = vec![(at, 51 + out.len() as u32, false), (back, 108, true)];
    if room > 0 {
        pieces.push((back + 108, room as u32, true));
    }
    let head = g.rings[2].chain(&pieces).expect("room in the ring");
    g.rings[2].offer(head);
    g.kick(2);
    let since = Instant::now();
    while g.rings[2].answer().is_none_or(|(answered, _)| {
        assert_eq!(answered, head);
        false
    }) {
        assert!(!g.is_broken(), "drive {n} broke at a good request");
        assert!(since.elapsed() < Duration::from_secs(60), "drive {n}: no answer to {cdb:x?}");
        std::thread::sleep(Duration::from_micros(20));
    }
    let head = g.peek(back, 108);
    assert_eq!(head[11], 0, "drive {n}: response to {cdb:x?}");
    if head[10] == 0 {
        return Answer::Good(g.peek(back + 108, room));
    }
    match (head[12 + 2], head[12 + 12]) {
        (2, 0x3a) | (6, 0x28 | 0x29) => Answer::Changed,
        (7, 0x27) => Answer::Protected,
        (5, 0x53) => Answer::Locked,
        sense => panic!("drive {n}: {cdb:x?} failed: {sense:x?}"),
    }
}

/// Which medium is in the drive; None if there is none, or if it changes meanwhile.
fn identify(g: &mut Guest, n: usize, block: u64) -> Option<usize> {
    let ready = command(g, n, &[0; 6], &[], 0);
    let capacity = command(g, n, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8);
    let first = command(g, n, &[0x28, 0, 0, 0, 0, 0, 0, 0, (2048 / block) as u8, 0], &[], 2048);
    let (Answer::Good(_), Answer::Good(capacity), Answer::Good(first)) = (ready, capacity, first) else {
        return None;
    };
    let last = u32::from_be_bytes(capacity[..4].try_into().unwrap());
    let medium = u32::from_le_bytes(first[..4].try_into().unwrap()).wrapping_sub(mark(0)) as usize;
    assert!(medium < MEDIA, "drive {n}: {:x?} is on no medium", &first[..8]);
    assert_eq!((u64::from(last) + 1) * block, sectors(medium) * SECTOR, "drive {n}: medium {medium}");
    Some(medium)
}

/// Does commands until `stop`; answers what each medium should hold.
pub fn run_guest(mut g: Guest, n: usize, seed: u64, stop: &AtomicBool, done: &AtomicU64) -> Vec<Vec<u32>> {
    let mut rng = Rng(seed * 16 + n as u64 + 9);
    let mut models: Vec<Vec<u32>> = (0..MEDIA)
        .map(|m| (0..sectors(m)).map(|s| if n == CD || s < 4 { mark(m) } else { 0 }).collect())
        .collect();
    let block = if n == CD { 2048 } else { 512 };
    let (mut known, mut next) = (None, 1);
    g.start(0);
    while !stop.load(Ordering::Relaxed) {
        let Some(medium) = known else {
            known = identify(&mut g, n, block);
            std::thread::sleep(Duration::from_micros(50));
            continue;
        };
        let model: &mut Vec<u32> = &mut models[medium];
        let per = block / SECTOR;
        let blocks = sectors(medium) / per;
        let first = 4 / per + rng.below(blocks - 4 / per);
        let count = 1 + rng.below((blocks - first).min(16));
        let range = (first * per) as usize..((first + count) * per) as usize;
        let cdb = |code: u8| [code, 0, 0, 0, (first >> 8) as u8, first as u8, 0, 0, count as u8, 0];
        let answer = match rng.below(20) {
            0..=9 => command(&mut g, n, &cdb(0x28), &[], (count * block) as usize),
            10..=14 if n != CD => {
                let bytes: Vec<u8> = range.clone().flat_map(|s| contents(next, s as u64)).collect();
                let answer = command(&mut g, n, &cdb(0x2a), &bytes, 0);
                if matches!(answer, Answer::Good(_)) {
                    model[range.clone()].fill(next);
                }
                next += 1;
                answer
            }
            15 if n != CD => {
                // WRITE SAME of zeroes, with UNMAP.
                let mut cdb = cdb(0x41);
                cdb[1] = 8;
                let answer = command(&mut g, n, &cdb, &[0; 512], 0);
                if matches!(answer, Answer::Good(_)) {
                    model[range.clone()].fill(0);
                }
                answer
            }
            16 if n != CD => command(&mut g, n, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0),
            // PREVENT ALLOW MEDIUM REMOVAL
            17 => command(&mut g, n, &[0x1e, 0, 0, 0, (rng.below(3) == 0).into(), 0], &[], 0),
            // GET EVENT STATUS NOTIFICATION; who is asked for the medium gives it.
            18 if n == CD => {
                let answer = command(&mut g, n, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], &[], 8);
                if matches!(&answer, Answer::Good(event) if event[4] & 15 == 1) {
                    command(&mut g, n, &[0x1e, 0, 0, 0, 0, 0], &[], 0);
                    command(&mut g, n, &[0x1b, 0, 0, 0, 2, 0], &[], 0);
                    // It has gone, or one of them was told that it is another.
                    Answer::Changed
                } else {
                    answer
                }
            }
            // START STOP UNIT: the guest's own eject, and load.
            19 if rng.below(4) == 0 => {
                let answer = command(&mut g, n, &[0x1b, 0, 0, 0, 2, 0], &[], 0);
                // Each may be the one that is told of another medium.
                let load = rng.below(2) == 0 && {
                    command(&mut g, n, &[0x1b, 0, 0, 0, 3, 0], &[], 0);
                    true
                };
                if answer == Answer::Locked && !load { answer } else { Answer::Changed }
            }
            _ => command(&mut g, n, &[0; 6], &[], 0),
        };
        match answer {
            Answer::Good(data) if data.len() as u64 == count * block => {
                for (s, got) in range.zip(data.chunks_exact(SECTOR as usize)) {
                    assert!(
                        *got == contents(model[s], s as u64),
                        "drive {n}, medium {medium}: sector {s} is {:x?}…, not {:x}",
                        &got[..8],
                        model[s]
                    );
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            Answer::Good(_) | Answer::Protected | Answer::Locked => {}
            // What follows is perhaps about another one.
            Answer::Changed => known = None,
        }
    }
    models
}

/// The files of the media are what their guest wrote, and nothing else.
pub fn compare(dir: &Dir, n: usize, models: &[Vec<u32>]) {
    for (medium, model) in models.iter().enumerate() {
        let bytes = std::fs::read(dir.path(&name(n, medium))).unwrap();
        assert_eq!(bytes.len(), model.len() * SECTOR as usize);
        for (s, got) in bytes.chunks_exact(SECTOR as usize).enumerate() {
            assert!(
                model[s] == ANYTHING || *got == contents(model[s], s as u64),
                "drive {n}, medium {medium}: sector {s} is {:x?}…, not what the guest wrote there: {:x}",
                &got[..8],
                model[s]
            );
        }
    }
}
