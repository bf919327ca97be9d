use super::*;
use crate::block::driver::{Driver, Flags};
use crate::block::handle::{HandleSpec, OnError};
use crate::block::node::{Node, NodeOptions};
use crate::block::stats::Kind as Stat;
use crate::block::testing::Rng;
use crate::event::{ErrorAction, Event, Events};
use crate::sys::inbox::Inbox;
use crate::sys::iov::{Iov, IovMut};
use crate::virtio::testing::{Asked, FakeState, HIGH, LOW, Rig, fake_disk, until};
use std::collections::HashMap;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const LEN: usize = 1 << 20;

fn spec() -> HandleSpec {
    HandleSpec { uses: crate::block::driver::Perm::ALL, ..HandleSpec::default() }
}

fn options() -> NodeOptions {
    NodeOptions { unmap: true, ..NodeOptions::default() }
}

fn disk(config: BlkConfig, spec: HandleSpec, options: NodeOptions) -> (Arc<Blk>, Arc<FakeState>) {
    let (handle, state) = fake_disk(LEN, spec, options);
    (Blk::new(config, handle).unwrap(), state)
}

/// A rig whose driver took all features.
fn rig(config: BlkConfig) -> (Rig, Arc<Blk>, Arc<FakeState>) {
    let (blk, state) = disk(config, spec(), options());
    (Rig::new(blk.clone(), blk.features()), blk, state)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// The pieces of a request at `at`: header, then `out`, then `data_in` bytes, then the status.
fn pieces(rig: &Rig, at: u64, kind: u32, sector: u64, out: &[u8], data_in: u32) -> Vec<(u64, u32, bool)> {
    rig.poke(at, &header(kind, sector));
    rig.poke(at + 16, out);
    let (data, status) = (at + 16 + out.len() as u64, at + 16 + out.len() as u64 + u64::from(data_in));
    rig.poke(status, &[0xff]);
    let mut p = vec![(at, 16 + out.len() as u32, false), (data, data_in, true), (status, 1, true)];
    p.retain(|(_, len, _)| *len > 0);
    p
}

/// Does one request on queue 0 and waits for it: status, and what was read.
fn ask(rig: &mut Rig, kind: u32, sector: u64, out: &[u8], data_in: u32) -> (u8, Vec<u8>) {
    let at = rig.free;
    let p = pieces(rig, at, kind, sector, out, data_in);
    let head = rig.offer(0, &p);
    rig.kick(0);
    assert_eq!(rig.answer(0), (head, data_in + 1));
    let data = at + 16 + out.len() as u64;
    (rig.peek(data + u64::from(data_in), 1)[0], rig.peek(data, data_in as usize))
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn log(state: &FakeState) -> Vec<Asked> {
    std::mem::take(&mut *state.log.lock().unwrap())
}

fn config<const N: usize>(blk: &Blk, off: u64) -> [u8; N] {
    let mut bytes = [0; N];
    blk.read_config(off, &mut bytes);
    bytes
}

#[test]
fn the_configuration_space_says_what_was_configured() {
    let c = BlkConfig {
        logical_block_size: 1024,
        physical_block_size: 4096,
        min_io_size: 8192,
        opt_io_size: 65536,
        discard_granularity: Some(16384),
        num_queues: 3,
        queue_size: 64,
        max_discard_sectors: 1000,
        max_write_zeroes_sectors: 2000,
        ..BlkConfig::default()
    };
    let (blk, _) = disk(c, spec(), options());
    assert_eq!(u64::from_le_bytes(config(&blk, 0)), LEN as u64 / 512);
    assert_eq!(u32::from_le_bytes(config(&blk, 12)), 62, "seg_max");
    assert_eq!(u32::from_le_bytes(config(&blk, 20)), 1024, "blk_size");
    assert_eq!(config(&blk, 24), [2, 0], "physical_block_exp");
    assert_eq!(u16::from_le_bytes(config(&blk, 26)), 8, "min_io_size in blocks");
    assert_eq!(u32::from_le_bytes(config(&blk, 28)), 64, "opt_io_size in blocks");
    assert_eq!(config(&blk, 32), [1], "writeback");
    assert_eq!(u16::from_le_bytes(config(&blk, 34)), 3, "num_queues");
    assert_eq!(u32::from_le_bytes(config(&blk, 36)), 1000);
    assert_eq!(u32::from_le_bytes(config(&blk, 40)), 32);
    assert_eq!(u32::from_le_bytes(config(&blk, 44)), 32, "discard_sector_alignment");
    assert_eq!(u32::from_le_bytes(config(&blk, 48)), 2000);
    assert_eq!(config(&blk, 56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(config::<8>(&blk, 59), [0; 8], "half beyond the end");
    assert_eq!(config::<8>(&blk, u64::MAX), [0; 8]);
    assert_ne!(blk.features() & F_MQ, 0);
    // Nothing but writeback can be written, at whatever width and offset.
    for off in (0..70).chain([u64::MAX - 3, 1 << 40]) {
        blk.write_config(off, &[0; 8]);
    }
    assert_eq!(config(&blk, 32), [0]);
    blk.write_config(31, &[0xff; 4]);
    assert_eq!(config(&blk, 32), [1]);
    assert_eq!(u64::from_le_bytes(config(&blk, 0)), LEN as u64 / 512);
}

#[test]
fn impossible_properties_are_refused() {
    let wrong = |f: &dyn Fn(&mut BlkConfig)| {
        let mut c = BlkConfig::default();
        f(&mut c);
        c.check().unwrap_err().desc
    };
    assert_eq!(
        wrong(&|c| c.logical_block_size = 256),
        "parameter logical_block_size must be between 512 and 2097152"
    );
    assert_eq!(
        wrong(&|c| c.physical_block_size = 1000),
        "parameter physical_block_size must be a power of 2"
    );
    assert_eq!(
        wrong(&|c| c.logical_block_size = 4096),
        "logical_block_size > physical_block_size not supported"
    );
    assert_eq!(wrong(&|c| c.min_io_size = 600), "min_io_size must be a multiple of logical_block_size");
    assert_eq!(wrong(&|c| c.queue_size = 2), "invalid queue-size property (2), must be > 2");
    assert_eq!(
        wrong(&|c| c.queue_size = 100),
        "invalid queue-size property (100), must be a power of 2 (max 1024)"
    );
    assert_eq!(wrong(&|c| c.num_queues = 0), "num-queues property must be larger than 0");
    assert!(wrong(&|c| c.workers = 0).contains("workers"));
    assert!(wrong(&|c| c.serial = "x".repeat(21)).contains("serial"));
    assert!(wrong(&|c| c.max_discard_sectors = u32::MAX).contains("max-discard-sectors"));
}

#[test]
fn what_is_written_is_read_however_the_request_is_cut() {
    let (mut rig, _, state) = rig(BlkConfig::default());
    let data: Vec<u8> = (0..1024u32).map(|i| (i * 7 % 251) as u8).collect();
    let at = rig.free;
    rig.poke(at, &header(OUT, 5));
    rig.poke(at + 16, &data);
    // Header and data cut at odd places, one piece beyond the hole, one empty.
    rig.poke(HIGH + 77, &data[300..400]);
    let cut = [
        (at, 3, false),
        (at + 3, 10, false),
        (at + 13, 303, false),
        (HIGH + 77, 100, false),
        (at, 0, false),
        (at + 416, 624, false),
        (at + 2000, 1, true),
    ];
    let head = rig.offer(0, &cut);
    rig.kick(0);
    assert_eq!(rig.answer(0), (head, 1));
    assert_eq!(rig.peek(at + 2000, 1), [OK]);
    assert_eq!(state.data.lock().unwrap()[5 * 512..7 * 512], data);
    assert_eq!(log(&state), [Asked::Write(2560, 1024)], "one request, zero copy, no flush");

    // The status byte at the end of the last data descriptor; through an indirect table.
    rig.poke(at, &header(IN, 5));
    let table = at + 0x4000;
    let cut = [(at, 16, false), (at + 0x1000, 1000, true), (HIGH + 9, 25, true)];
    let head = rig.rings[0].indirect(&cut, table).unwrap();
    rig.rings[0].offer(head);
    rig.kick(0);
    assert_eq!(rig.answer(0), (head, 1025));
    assert_eq!([rig.peek(at + 0x1000, 1000), rig.peek(HIGH + 9, 24)].concat(), data);
    assert_eq!(rig.peek(HIGH + 9 + 24, 1), [OK]);
}

#[test]
fn every_request_type_has_its_answer() {
    let (mut rig, blk, state) = rig(BlkConfig { serial: "disk-1".into(), ..BlkConfig::default() });
    let mut id = b"disk-1".to_vec();
    id.resize(20, 0);
    assert_eq!(ask(&mut rig, GET_ID, 0, &[], 20), (OK, id.clone()));
    assert_eq!(ask(&mut rig, GET_ID, 0, &[], 4), (OK, id[..4].to_vec()));
    assert_eq!(ask(&mut rig, GET_ID, 0, &[], 30).1[..20], id);
    assert_eq!(ask(&mut rig, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(ask(&mut rig, OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(ask(&mut rig, FLUSH, u64::MAX, &[1; 100], 7).0, OK, "only the type matters");
    assert_eq!(log(&state), [Asked::Flush, Asked::Write(0, 512), Asked::Flush]);
    for kind in (0..64).chain([u32::MAX, 1 << 31, 0x100, 0x8000_0001]) {
        if ![IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES].contains(&kind) {
            assert_eq!(ask(&mut rig, kind, 0, &[0; 512], 512).0, UNSUPP, "type {kind}");
        }
    }
    assert_eq!(ask(&mut rig, IN, 0, &[], 0).0, OK, "an empty read");
    assert_eq!(log(&state), []);
    assert_eq!(blk.handle().stats.get(Stat::Read).invalid, 0);
}

#[test]
fn reads_and_writes_beyond_the_rules_are_io_errors() {
    let sectors = LEN as u64 / 512;
    let c = BlkConfig { logical_block_size: 1024, physical_block_size: 1024, ..BlkConfig::default() };
    let (mut rig, blk, state) = rig(c);
    let bad = [
        (sectors, 1024),            // behind the end
        (sectors - 2, 2048),        // across the end
        (1, 1024),                  // in the middle of a block
        (0, 512),                   // half a block
        (0, 1023),                  // not even sectors
        (u64::MAX, 1024),           // sector × 512 overflows
        (u64::MAX / 512, 1024),     // … or comes near
        (u64::MAX / 512 + 1, 1024), // … or is 0 again
        (1 << 55, 1024),
    ];
    for (sector, len) in bad {
        assert_eq!(ask(&mut rig, IN, sector, &[], len).0, IOERR, "read {len} at {sector}");
        assert_eq!(ask(&mut rig, OUT, sector, &vec![1; len as usize], 0).0, IOERR);
    }
    let stat = |k| blk.handle().stats.get(k);
    assert_eq!((stat(Stat::Read).invalid, stat(Stat::Write).invalid), (9, 9));
    assert_eq!((stat(Stat::Read).failed, stat(Stat::Write).failed), (0, 0));
    assert_eq!(log(&state), [], "the disk heard of none of them");
    assert_eq!(ask(&mut rig, IN, sectors - 2, &[], 1024).0, OK);
    assert_eq!(stat(Stat::Read).operations, 1);
}

/// A disk of 16 TiB that is asked for nothing.
struct Huge;

impl Driver for Huge {
    fn name(&self) -> &'static str {
        "huge"
    }
    fn len(&self) -> u64 {
        1 << 44
    }
    fn read(&self, _: u64, to: &mut IovMut) -> io::Result<()> {
        panic!("a read of {} bytes", to.len())
    }
    fn write(&self, _: u64, from: &Iov, _: Flags) -> io::Result<()> {
        panic!("a write of {} bytes", from.len())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_request_longer_than_any_driver_makes_is_refused() {
    // The same 4 MiB many times over: 4 GiB, for which a pause would have to wait.
    for kind in [IN, OUT] {
        let handle = Handle::new(Some(Node::new("huge", Box::new(Huge), options())), spec());
        let blk = Blk::new(BlkConfig { queue_size: 1024, ..BlkConfig::default() }, handle).unwrap();
        let mut rig = Rig::new(blk.clone(), blk.features());
        let at = rig.free;
        rig.poke(at, &header(kind, 0));
        let mut cut = vec![(at, 16, false)];
        cut.extend(std::iter::repeat_n((0, LOW as u32, kind == IN), 1000));
        cut.push((at + 100, 1, true));
        rig.poke(at + 100, &[0xff]);
        let head = rig.offer(0, &cut);
        rig.kick(0);
        assert_eq!(rig.answer(0).0, head);
        assert_eq!(rig.peek(at + 100, 1), [IOERR]);
        let stat = if kind == IN { Stat::Read } else { Stat::Write };
        assert_eq!(blk.handle().stats.get(stat).invalid, 1);
    }
}

#[test]
fn a_request_without_header_or_status_breaks_the_device() {
    type Cut = fn(u64) -> Vec<(u64, u32, bool)>;
    let cases: [(Cut, &str); 5] = [
        (|at| vec![(at, 16, false)], "status"),
        (|at| vec![(at, 16, false), (at, 0, true)], "status"),
        (|at| vec![(at, 15, false), (at, 1, true)], "header"),
        (|at| vec![(at, 0, false), (at, 513, true)], "header"),
        (|at| vec![(at, 16, true), (at, 512, true), (at, 1, true)], "header"),
    ];
    for (cut, why) in cases {
        let (mut rig, _, state) = rig(BlkConfig::default());
        rig.poke(rig.free, &header(IN, 0));
        let cut = cut(rig.free);
        rig.offer(0, &cut);
        rig.kick(0);
        assert!(rig.broken().contains(why), "{why}: {:?}", rig.broken());
        // It does nothing until it is reset, then it works.
        let p = pieces(&rig, rig.free, FLUSH, 0, &[], 0);
        rig.offer(0, &p);
        rig.kick(0);
        rig.no_answer(0);
        assert_eq!(log(&state), []);
        rig.reset();
        rig.start();
        assert_eq!(ask(&mut rig, FLUSH, 0, &[], 0).0, OK);
    }
}

#[test]
fn discard_and_write_zeroes_check_every_segment_first() {
    let (mut rig, blk, state) =
        rig(BlkConfig { max_write_zeroes_sectors: 100, max_discard_sectors: 50, ..BlkConfig::default() });
    state.data.lock().unwrap().fill(7);
    let sectors = LEN as u64 / 512;
    let mut two = segment(8, 8, 0);
    two.extend(segment(32, 2, 0));
    assert_eq!(ask(&mut rig, DISCARD, 99, &two, 0).0, OK);
    assert_eq!(log(&state), [Asked::Discard(4096, 4096), Asked::Discard(16384, 1024)]);
    assert_eq!(ask(&mut rig, ZEROES, 0, &segment(0, 1, 0), 0).0, OK);
    assert_eq!(ask(&mut rig, ZEROES, 0, &segment(1, 1, 1), 0).0, OK);
    assert_eq!(log(&state), [Asked::Zero(0, 512, false), Asked::Zero(512, 512, true)]);
    assert_eq!(state.data.lock().unwrap()[..1025], [vec![0; 1024], vec![7]].concat());

    let (mut good_bad, mut many) = (segment(0, 1, 0), vec![]);
    good_bad.extend(segment(sectors, 1, 0));
    (0..33).for_each(|_| many.extend(segment(0, 1, 0)));
    let refused = [
        (vec![], IOERR),
        (vec![0; 15], IOERR),
        (vec![0; 17], IOERR),
        (many, IOERR),
        (good_bad, IOERR),
        (segment(sectors - 1, 2, 0), IOERR),
        (segment(u64::MAX, 1, 0), IOERR),
        (segment(0, u32::MAX, 0), IOERR),
        (segment(0, 101, 0), IOERR),
        (segment(0, 1, 2), UNSUPP),
        (segment(0, 1, 1 << 31), UNSUPP),
    ];
    for (bytes, status) in &refused {
        assert_eq!(ask(&mut rig, ZEROES, 0, bytes, 0).0, *status, "{bytes:?}");
        assert_eq!(ask(&mut rig, DISCARD, 0, bytes, 0).0, *status, "{bytes:?}");
    }
    assert_eq!(ask(&mut rig, DISCARD, 0, &segment(0, 1, 1), 0).0, UNSUPP, "unmap is for zeroes only");
    assert_eq!(log(&state), []);
    assert_eq!(blk.handle().stats.get(Stat::Unmap).invalid, refused.len() as u64 + 1);
}

#[test]
fn a_read_only_disk_cannot_be_changed() {
    let (blk, state) = disk(BlkConfig { read_only: true, ..BlkConfig::default() }, spec(), options());
    assert_ne!(blk.features() & F_RO, 0);
    assert_eq!(blk.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
    let mut rig = Rig::new(blk.clone(), blk.features());
    assert_eq!(ask(&mut rig, OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(ask(&mut rig, ZEROES, 0, &segment(0, 1, 0), 0).0, UNSUPP);
    assert_eq!(ask(&mut rig, DISCARD, 0, &segment(0, 1, 0), 0).0, UNSUPP);
    assert_eq!(ask(&mut rig, IN, 0, &[], 512), (OK, vec![0; 512]));
    assert_eq!(log(&state), [Asked::Read(0, 512)]);

    // A read-only medium makes a read-only disk.
    let (blk, _) = disk(BlkConfig::default(), spec(), NodeOptions { read_only: true, ..options() });
    assert_ne!(blk.features() & F_RO, 0);
}

#[test]
fn without_a_cache_that_the_driver_can_flush_each_write_is_durable() {
    let write = [Asked::Write(0, 512)];
    let durable = [Asked::Write(0, 512), Asked::Flush];
    let run = |rig: &mut Rig, state: &FakeState| {
        assert_eq!(ask(rig, OUT, 0, &[1; 512], 0).0, OK);
        log(state)
    };
    let (blk, state) = disk(BlkConfig::default(), spec(), options());
    let mut rig = Rig::new(blk.clone(), blk.features() & !(F_FLUSH | F_CONFIG_WCE));
    assert_eq!(run(&mut rig, &state), durable);
    drop(rig);

    let (blk, state) = disk(BlkConfig::default(), spec(), options());
    let mut rig = Rig::new(blk.clone(), blk.features() & !F_CONFIG_WCE);
    assert_eq!(run(&mut rig, &state), write);
    drop(rig);

    // With CONFIG_WCE it is as the user set it, until the driver changes it; a reset undoes that.
    let (blk, state) = disk(BlkConfig::default(), HandleSpec { write_cache: false, ..spec() }, options());
    let mut rig = Rig::new(blk.clone(), blk.features());
    assert_eq!((config(&blk, 32), run(&mut rig, &state)), ([0], durable.to_vec()));
    blk.write_config(32, &[1]);
    assert_eq!((config(&blk, 32), run(&mut rig, &state)), ([1], write.to_vec()));
    rig.reset();
    rig.start();
    assert_eq!((config(&blk, 32), run(&mut rig, &state)), ([0], durable.to_vec()));
    drop(rig);

    let c = BlkConfig { config_wce: false, ..BlkConfig::default() };
    let (blk, _) = disk(c, HandleSpec { write_cache: false, ..spec() }, options());
    assert_eq!(blk.features() & (F_FLUSH | F_CONFIG_WCE), 0);
    blk.write_config(32, &[1]);
    assert_eq!(config(&blk, 32), [0], "what was not offered cannot be written");
}

#[test]
fn a_change_of_length_reaches_the_driver() {
    let (mut rig, blk, state) = rig(BlkConfig::default());
    let sectors = LEN as u64 / 512;
    assert_eq!(ask(&mut rig, IN, sectors, &[], 512).0, IOERR);
    state.data.lock().unwrap().resize(LEN + 512, 9);
    blk.handle().resized();
    assert_eq!(rig.told.config_changes.load(Ordering::SeqCst), 1);
    assert_eq!(u64::from_le_bytes(config(&blk, 0)), sectors + 1);
    assert_eq!(ask(&mut rig, IN, sectors, &[], 512), (OK, vec![9; 512]));
    blk.handle().resized();
    assert_eq!(rig.told.config_changes.load(Ordering::SeqCst), 1, "no change, no interrupt");
    // Shorter than the device knows: an error, not a panic.
    state.data.lock().unwrap().truncate(LEN / 2);
    assert_eq!(ask(&mut rig, IN, sectors, &[], 512).0, IOERR);
}

fn with_events(blk: &Blk) -> Events {
    let events = Arc::new(Inbox::new().unwrap());
    blk.handle().set_owner("d0", "/machine/peripheral/d0/virtio-backend", Some(events.clone()));
    events
}

fn error(events: &Events) -> (bool, ErrorAction, bool) {
    let next = until(|| events.take().pop_front());
    let Event::BlockIoError(e) = next else { panic!("{next:?}") };
    (e.read, e.action, e.nospace)
}

#[test]
fn a_failing_disk_is_reported_or_ignored_as_the_policy_says() {
    let (mut rig, blk, state) = rig(BlkConfig::default());
    let events = with_events(&blk);
    state.fail(3, libc::EIO);
    assert_eq!(ask(&mut rig, IN, 0, &[], 512).0, IOERR);
    assert_eq!(error(&events), (true, ErrorAction::Report, false));
    assert_eq!(ask(&mut rig, OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(error(&events), (false, ErrorAction::Report, false));
    assert_eq!(ask(&mut rig, FLUSH, 0, &[], 0).0, IOERR);
    assert_eq!(error(&events), (false, ErrorAction::Report, false));
    blk.handle().set_policy(OnError::Ignore, OnError::Ignore);
    state.fail(1, libc::ENOSPC);
    assert_eq!(ask(&mut rig, OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(error(&events), (false, ErrorAction::Ignore, true));
    let w = blk.handle().stats.get(Stat::Write);
    assert_eq!((w.failed, w.invalid, w.operations), (2, 0, 0));
}

#[test]
fn a_stopped_request_is_done_again_after_cont_in_order() {
    let (mut rig, blk, state) = rig(BlkConfig { num_queues: 2, ..BlkConfig::default() });
    let events = with_events(&blk);
    state.fail(1, libc::ENOSPC);
    let at = rig.free;
    let mut heads = vec![];
    for n in 0..4u64 {
        let p = pieces(&rig, at + n * 1024, OUT, n, &[n as u8 + 1; 512], 0);
        heads.push(rig.offer(0, &p));
    }
    rig.kick(0);
    // The default for writes: stop when there is no space.
    assert_eq!(error(&events), (false, ErrorAction::Stop, true));
    rig.no_answer(0);
    // Kicks before the pause try nothing; neither do they after it.
    rig.kick(0);
    rig.no_answer(0);
    rig.pause();
    rig.kick(0);
    rig.no_answer(0);
    assert_eq!(log(&state), [Asked::Write(0, 512)], "one try, and nothing after it");
    // cont, but there is still no space.
    state.fail(1, libc::ENOSPC);
    rig.resume();
    assert_eq!(error(&events), (false, ErrorAction::Stop, true));
    rig.pause();
    assert_eq!(log(&state), [Asked::Write(0, 512)]);
    rig.resume();
    for head in heads {
        assert_eq!(rig.answer(0), (head, 1));
    }
    assert_eq!(log(&state), [0, 512, 1024, 1536].map(|off| Asked::Write(off, 512)));
    let data = state.data.lock().unwrap();
    (0..4).for_each(|n| assert_eq!(data[n * 512..][..512], [n as u8 + 1; 512]));
    let statuses = (0..4u64).map(|n| rig.peek(at + n * 1024 + 16 + 512, 1)[0]);
    assert!(statuses.eq([OK; 4]));
}

#[test]
fn a_reset_drops_stopped_requests() {
    let (mut rig, blk, state) = rig(BlkConfig { workers: 3, ..BlkConfig::default() });
    let events = with_events(&blk);
    blk.handle().set_policy(OnError::Stop, OnError::Stop);
    state.fail(2, libc::EIO);
    let at = rig.free;
    for n in 0..2u64 {
        let p = pieces(&rig, at + n * 1024, IN, n, &[], 512);
        rig.offer(0, &p);
    }
    rig.kick(0);
    assert_eq!(error(&events), (true, ErrorAction::Stop, false));
    rig.pause();
    rig.reset();
    log(&state);
    rig.start();
    rig.no_answer(0);
    assert_eq!(log(&state), []);
    state.fail(0, 0);
    assert_eq!(ask(&mut rig, IN, 0, &[], 512).0, OK);
}

#[test]
fn pause_and_reset_wait_for_the_request_in_hand() {
    for workers in [1, 2] {
        let (mut rig, _, state) = rig(BlkConfig { workers, ..BlkConfig::default() });
        state.hold(true);
        let at = rig.free;
        for n in 0..4u64 {
            let p = pieces(&rig, at + n * 1024, OUT, n, &[5; 512], 0);
            rig.offer(0, &p);
            rig.kick(0);
        }
        state.wait_inside(usize::from(workers));
        // The other thread opens the disk a moment after the pause began.
        let other = state.clone();
        let opener = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            other.hold(false);
        });
        rig.pause();
        opener.join().unwrap();
        let seen = rig.rings[0].used_idx();
        assert_eq!(seen, workers, "what was in hand is answered, the rest is not begun");
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(rig.rings[0].used_idx(), seen, "paused");
        rig.resume();
        (0..4).for_each(|_| _ = rig.answer(0));

        state.hold(true);
        let p = pieces(&rig, at, OUT, 0, &[6; 512], 0);
        rig.offer(0, &p);
        rig.kick(0);
        state.wait_inside(1);
        let other = state.clone();
        let opener = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            other.hold(false);
        });
        rig.reset();
        assert_eq!(state.inside.load(Ordering::SeqCst), 0, "no thread is left inside");
        opener.join().unwrap();
        rig.start();
        assert_eq!(ask(&mut rig, IN, 0, &[], 512), (OK, vec![6; 512]));
    }
}

#[test]
fn answers_of_a_fast_disk_share_interrupts_and_those_of_a_slow_one_do_not() {
    let offer = |rig: &mut Rig, n: u64| {
        for i in 0..n {
            let p = pieces(rig, rig.free + i * 1024, IN, i, &[], 512);
            rig.offer(0, &p);
        }
    };
    let (mut rig, _, state) = rig(BlkConfig::default());
    let interrupts = |rig: &mut Rig, n: u64| {
        rig.kick(0);
        (0..n).for_each(|_| _ = rig.answer(0));
        rig.pause();
        rig.resume();
        rig.told.interrupts.swap(0, Ordering::SeqCst) as u64
    };
    state.hold(true);
    offer(&mut rig, 4);
    let other = state.clone();
    let opener = std::thread::spawn(move || {
        other.wait_inside(1);
        std::thread::sleep(std::time::Duration::from_millis(2));
        other.hold(false);
    });
    assert_eq!(interrupts(&mut rig, 4), 4);
    opener.join().unwrap();
    // The machine may be busy: the best of some.
    let best = (0..10).map(|_| {
        offer(&mut rig, 40);
        interrupts(&mut rig, 40)
    });
    assert!(best.min().unwrap() < 20);
}

/// What a request in flight will have done when it is answered.
enum Expect {
    Read(u64, Vec<u8>),
    Nothing,
}

#[test]
fn random_requests_on_several_queues_and_workers_match_a_model() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x1234_5678_9abc_def1);
    eprintln!("SEED={seed}");
    let mut rng = Rng(seed);
    for (queues, workers) in [(1, 1), (1, 4), (3, 2), (2, 4)] {
        let c = BlkConfig { num_queues: queues, workers, queue_size: 64, ..BlkConfig::default() };
        let (mut rig, _, state) = rig(c);
        let mut model = vec![0u8; LEN];
        // Per slot of guest memory: whether it is in flight.
        const SLOT: u64 = 16 << 10;
        let base = rig.free.next_multiple_of(SLOT);
        let slots = (LOW - base) / SLOT;
        let mut in_flight: HashMap<(usize, u16), (u64, std::ops::Range<usize>, Expect)> = HashMap::new();
        let (mut offered, mut answered) = (0, 0);
        const TOTAL: usize = 2000;
        while answered < TOTAL {
            let q = rng.below(queues.into()) as usize;
            let slot = base + rng.below(slots) * SLOT;
            let len = 512 * (1 + rng.below(16)) as usize;
            let off = 512 * rng.below(((LEN - len) / 512 + 1) as u64) as usize;
            let range = off..off + len;
            // Requests in flight at once must not touch the same place: their order is free.
            let clash = in_flight
                .values()
                .any(|(s, r, _)| *s == slot || (r.start < range.end && range.start < r.end));
            if offered < TOTAL && !clash && rig.rings[q].room() > 8 {
                let (kind, out, data_in, expect) = match rng.below(5) {
                    0 | 1 => (IN, vec![], len, Expect::Read(slot, model[range.clone()].to_vec())),
                    2 => {
                        let data: Vec<u8> = (0..len).map(|_| rng.draw() as u8).collect();
                        model[range.clone()].copy_from_slice(&data);
                        (OUT, data, 0, Expect::Nothing)
                    }
                    3 => {
                        model[range.clone()].fill(0);
                        let unmap = rng.below(2) as u32;
                        (ZEROES, segment(off as u64 / 512, len as u32 / 512, unmap), 0, Expect::Nothing)
                    }
                    _ => (FLUSH, vec![], 0, Expect::Nothing),
                };
                let whole = pieces(&rig, slot, kind, off as u64 / 512, &out, data_in as u32);
                let head = if rng.below(3) == 0 {
                    rig.rings[q].indirect(&whole, slot + SLOT - 256).unwrap()
                } else {
                    // Cut the first piece somewhere.
                    let (at, len, write) = whole[0];
                    let cut = rng.below(u64::from(len)) as u32;
                    let mut cut = vec![(at, cut, write), (at + u64::from(cut), len - cut, write)];
                    cut.extend(&whole[1..]);
                    rig.rings[q].chain(&cut).unwrap()
                };
                rig.rings[q].offer(head);
                rig.kick(q);
                in_flight.insert((q, head), (slot, range, expect));
                offered += 1;
            }
            for q in 0..usize::from(queues) {
                while let Some((head, len)) = rig.rings[q].answer() {
                    let (slot, range, expect) = in_flight.remove(&(q, head)).expect("never offered");
                    let data = match &expect {
                        Expect::Read(_, data) => data.len(),
                        Expect::Nothing => 0,
                    };
                    assert_eq!(len as usize, data + 1);
                    if let Expect::Read(at, data) = expect {
                        assert!(rig.peek(at + 16, data.len()) == data, "wrong bytes at {range:?}");
                        assert_eq!(rig.peek(slot + 16 + data.len() as u64, 1), [OK]);
                    }
                    answered += 1;
                }
            }
        }
        assert_eq!(*rig.told.broken.lock().unwrap(), None);
        assert!(*state.data.lock().unwrap() == model);
    }
}
