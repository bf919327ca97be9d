use super::super::scsi_testing::{Bench, Host, lun};
use super::super::scsi_unit::{UnitConfig, UnitKind};
use super::*;

fn at(target: u8, lun: u16, kind: UnitKind) -> Bench {
    Bench::at(Address { target, lun }, UnitConfig::new(kind), false)
}

#[test]
fn the_configuration_space() {
    let config = ScsiConfig { num_queues: 3, queue_size: 64, ..ScsiConfig::default() };
    let scsi = Scsi::new(config, "scsi0.0".into()).unwrap();
    assert_eq!(scsi.queue_sizes(), [64; 5]);
    assert_eq!(scsi.features(), F_HOTPLUG | F_CHANGE);
    let read = |at: u64| {
        let mut bytes = [0; 4];
        scsi.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let all: Vec<u32> = (0..10).map(|n| read(4 * n)).collect();
    assert_eq!(all, [3, 62, 0xffff, 128, 16, 96, 32, 255 << 16, 16383, 0]);
    scsi.write_config(20, &16u32.to_le_bytes());
    scsi.write_config(24, &12u32.to_le_bytes());
    assert_eq!((read(20), read(24)), (16, 12));
    // What is too much, elsewhere, or too short, is ignored.
    scsi.write_config(20, &65536u32.to_le_bytes());
    scsi.write_config(24, &256u32.to_le_bytes());
    scsi.write_config(0, &9u32.to_le_bytes());
    scsi.write_config(20, &[9]);
    scsi.write_config(u64::MAX, &[9; 4]);
    assert_eq!((read(0), read(20), read(24)), (3, 16, 12));
    scsi.reset();
    assert_eq!((read(20), read(24)), (96, 32));
    let wrong = |f: &dyn Fn(&mut ScsiConfig)| {
        let mut c = ScsiConfig::default();
        f(&mut c);
        c.check().unwrap_err().desc
    };
    assert!(wrong(&|c| c.num_queues = 0).contains("number of queues"));
    assert!(wrong(&|c| c.queue_size = 100).contains("power of 2"));
    assert!(wrong(&|c| c.queue_size = 2).contains("> 2"));
    assert!(wrong(&|c| c.workers = 65).contains("workers"));
    assert!(wrong(&|c| c.cmd_per_lun = 0).contains("cmd_per_lun"));
}

#[test]
fn places_are_found_as_qemu_finds_them() {
    let scsi = Scsi::new(ScsiConfig::default(), "scsi0.0".into()).unwrap();
    let bus = scsi.bus();
    let place =
        |t: Option<u32>, l: Option<u32>| bus.place(t, l).map(|a| (a.target, a.lun)).map_err(|e| e.desc);
    assert_eq!(place(None, None), Ok((0, 0)));
    let zero = at(0, 0, UnitKind::Disk);
    bus.attach(zero.unit.clone());
    bus.attach(at(0, 1, UnitKind::Disk).unit);
    assert_eq!(place(None, None), Ok((1, 0)));
    assert_eq!(place(None, Some(5)), Ok((0, 5)));
    assert_eq!(place(Some(0), None), Ok((0, 2)));
    assert_eq!(place(Some(255), Some(16383)), Ok((255, 16383)));
    assert_eq!(place(Some(0), Some(1)), Err("lun already used by ''".into()));
    assert_eq!(place(Some(256), None), Err("bad scsi device id: 256".into()));
    assert_eq!(place(None, Some(16384)), Err("bad scsi device lun: 16384".into()));
    (1..=255).for_each(|t| bus.attach(at(t, 0, UnitKind::Disk).unit));
    assert_eq!(place(None, None), Err("no free target".into()));
    bus.detach(&zero.unit);
    assert_eq!(place(None, None), Ok((0, 0)));
}

#[test]
fn units_come_and_go_under_the_driver() {
    let first = at(0, 0, UnitKind::Disk);
    let mut host = Host::new(ScsiConfig::default(), &[&first]);
    host.event_buffers(4);
    let new = at(0, 300, UnitKind::Disk);
    assert_eq!(host.ask(lun(0, 300), &[0], &[], 0).sense(), Sense::LUN_NOT_SUPPORTED);
    host.bus.attach(new.unit.clone());
    assert_eq!(host.event(), (T_TRANSPORT_RESET, [1, 0, 0x41, 0x2c, 0, 0, 0, 0], RESET_RESCAN));
    host.ask(lun(0, 300), &[0], &[], 0).ok();
    assert_eq!(host.ask(lun(0, 0), &[0], &[], 0).sense(), Sense::LUNS_CHANGED);
    host.bus.detach(&new.unit);
    assert_eq!(host.event(), (T_TRANSPORT_RESET, lun(0, 300), RESET_REMOVED));
    assert_eq!(host.ask(lun(0, 300), &[0], &[], 0).sense(), Sense::LUN_NOT_SUPPORTED);
    assert_eq!(host.ask(lun(7, 0), &[0], &[], 0).response, 3, "BAD TARGET");
    // A length that changes below.
    host.ask(lun(0, 0), &[0], &[], 0);
    first.state.data.lock().unwrap().truncate(1 << 19);
    first.unit.handle().resized();
    assert_eq!(host.event(), (T_PARAM_CHANGE, lun(0, 0), 0x2a | 9 << 8));
    assert_eq!(host.ask(lun(0, 0), &[0], &[], 0).sense(), Sense::CAPACITY_CHANGED);
    assert_eq!(
        host.ask(lun(0, 0), &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8).ok()[..4],
        1023u32.to_be_bytes()
    );
}

#[test]
fn a_driver_that_gives_no_buffers_hears_that_it_missed_something() {
    let first = at(0, 0, UnitKind::Disk);
    let mut host = Host::new(ScsiConfig::default(), &[&first]);
    let other = at(1, 0, UnitKind::Disk);
    for _ in 0..EVENTS_MAX {
        host.bus.attach(other.unit.clone());
        host.bus.detach(&other.unit);
    }
    host.event_buffers(EVENTS_MAX as u64 + 1);
    assert_eq!(host.event(), (T_TRANSPORT_RESET | T_EVENTS_MISSED, lun(1, 0), RESET_RESCAN));
    for n in 1..EVENTS_MAX as u32 {
        assert_eq!(host.event().2, [RESET_RESCAN, RESET_REMOVED][n as usize % 2]);
    }
    host.rig.no_answer(1);
    // Nothing is kept for a driver that is not there, or did not ask for it.
    host.rig.reset();
    host.bus.attach(other.unit.clone());
    host.rig.start();
    host.event_buffers(1);
    host.rig.no_answer(1);
    let scsi = Scsi::new(ScsiConfig { hotplug: false, ..ScsiConfig::default() }, "b".into()).unwrap();
    assert_eq!(scsi.features(), F_CHANGE);
}

#[test]
fn a_subscriber_hears_of_media() {
    let cd = at(0, 0, UnitKind::Cd);
    let mut host = Host::new(ScsiConfig::default(), &[&cd]);
    host.event_buffers(2);
    let tray = cd.unit.tray.clone().unwrap();
    tray.set_open(true);
    host.rig.no_answer(1);
    let mut notify = |kind: u32, lun: [u8; 8], wanted: u32| {
        let at = host.rig.free + 0x8000;
        let bytes = [&kind.to_le_bytes()[..], &lun, &wanted.to_le_bytes()].concat();
        host.rig.poke(at, &bytes);
        host.rig.offer(0, &[(at, 16, false), (at + 16, 5, true)]);
        host.rig.kick(0);
        assert_eq!(host.rig.answer(0).1, 5);
        let answer = host.rig.peek(at + 16, 5);
        (u32::from_le_bytes(answer[..4].try_into().unwrap()), answer[4])
    };
    assert_eq!(notify(1, lun(0, 0), 0x7e), (ASYNC_MEDIA_CHANGE, 0), "a query");
    assert_eq!(notify(2, lun(9, 0), 0x7e), (0, 3));
    assert_eq!(notify(2, lun(0, 0), 0x7e), (ASYNC_MEDIA_CHANGE, 0));
    tray.set_open(false);
    assert_eq!(host.event(), (T_ASYNC_NOTIFY, lun(0, 0), ASYNC_MEDIA_CHANGE));
    tray.request_eject(false);
    assert_eq!(host.event(), (T_ASYNC_NOTIFY, lun(0, 0), ASYNC_MEDIA_CHANGE));
}
