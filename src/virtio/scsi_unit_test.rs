use super::super::scsi_testing::{Bench, LEN};
use super::*;
use crate::block::handle::OnError;
use crate::block::throttle::{Group, Limit, Limits, Which};
use crate::event::Event;
use std::time::Duration;

fn inquiry(page: u8) -> [u8; 6] {
    [0x12, 1, page, 1, 0, 0]
}

#[test]
fn inquiry_says_who_it_is() {
    let b = Bench::disk();
    let data = b.ok(&[0x12, 0, 0, 0, 96, 0], &[], 96);
    assert_eq!(data.len(), 36);
    assert_eq!((data[0], data[1], data[2], data[4]), (0, 0, 5, 31));
    assert_eq!(&data[8..], b"MINIVMM HARDDISK        1   ");
    let cd = Bench::cd();
    let data = cd.ok(&[0x12, 0, 0, 0, 5, 0], &[], 36);
    assert_eq!(data, [5, 0x80, 5, 0x12, 31], "no more than was asked for");
    assert_eq!(cd.sense(&[0x12, 0, 1, 0, 36, 0], &[], 36), Sense::INVALID_FIELD);
    assert_eq!(cd.run(&[0x12, 0, 0, 0, 36, 0], &[], 35), Err(Fail::Overrun));
}

#[test]
fn vital_product_data() {
    let config = UnitConfig {
        serial: "abc".into(),
        device_id: "abc".into(),
        wwn: 0x5000_1234_5678_9abc,
        rotation_rate: 1,
        opt_io_size: 65536,
        max_unmap_size: 1 << 20,
        discard_granularity: Some(4096),
        ..UnitConfig::new(UnitKind::Disk)
    };
    let b = Bench::new(config);
    let page = |page: u8| b.ok(&inquiry(page), &[], 256);
    assert_eq!(page(0), [0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(page(0x80), [&[0, 0x80, 0, 3][..], b"abc"].concat());
    let id = [&[0, 0x83, 0, 19, 2, 0, 0, 3][..], b"abc", &[1, 3, 0, 8]].concat();
    assert_eq!(page(0x83), [&id[..], &0x5000_1234_5678_9abc_u64.to_be_bytes()].concat());
    let limits = page(0xb0);
    let word = |at: usize| u32::from_be_bytes(limits[at..at + 4].try_into().unwrap());
    assert_eq!((limits.len(), limits[3], limits[4]), (64, 60, 1));
    assert_eq!((word(8), word(12)), ((MAX_DATA / 512) as u32, 128));
    assert_eq!((word(20), word(24), word(28)), (2048, 255, 8));
    assert_eq!(page(0xb1)[..6], [0, 0xb1, 0, 60, 0, 1]);
    assert_eq!(page(0xb2), [0, 0xb2, 0, 4, 0, 0xe0, 2, 0]);
    assert_eq!(b.sense(&inquiry(0xc0), &[], 256), Sense::INVALID_FIELD);
    let cd = Bench::cd();
    assert_eq!(cd.ok(&inquiry(0), &[], 256), [5, 0, 0, 2, 0, 0x83]);
    for page in [0x80, 0xb0, 0xb1, 0xb2] {
        assert_eq!(cd.sense(&inquiry(page), &[], 256), Sense::INVALID_FIELD);
    }
}

#[test]
fn a_unit_attention_is_told_once_and_before_any_command() {
    let b = Bench::disk();
    b.unit.attend(Sense::CAPACITY_CHANGED);
    b.unit.attend(Sense::LUNS_CHANGED);
    b.unit.attend(Sense::CAPACITY_CHANGED);
    // Asking who it is does not take it.
    b.ok(&[0x12, 0, 0, 0, 36, 0], &[], 36);
    assert_eq!(b.sense(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[], 512), Sense::CAPACITY_CHANGED);
    assert!(b.state.log.lock().unwrap().is_empty(), "the read was not done");
    // REQUEST SENSE does, in either format.
    assert_eq!(b.ok(&[3, 0, 0, 0, 252, 0], &[], 252), Sense::LUNS_CHANGED.fixed());
    assert_eq!(b.ok(&[3, 1, 0, 0, 8, 0], &[], 8), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    b.ok(&[0], &[], 0);
    (0..100u8).for_each(|n| b.unit.attend(Sense(6, 0x7f, n)));
    let kept = (0..).take_while(|_| b.run(&[0], &[], 0).is_err()).count();
    assert_eq!(kept, ATTENTIONS, "a guest that never asks costs no memory");
    b.unit.attend(Sense::CAPACITY_CHANGED);
    b.unit.reset();
    assert_eq!(b.sense(&[0], &[], 0), Sense::RESET);
    b.ok(&[0], &[], 0);
}

#[test]
fn the_write_cache_is_seen_and_set_by_mode_pages() {
    let b = Bench::disk();
    let sense = |control: u8, page: u8| b.ok(&[0x1a, 0, control << 6 | page, 0, 255, 0], &[], 255);
    let current = sense(0, 8);
    assert_eq!((current.len(), current[0], current[2], current[3]), (32, 31, 0x10, 8));
    assert_eq!(current[4..12], [0, 0, 8, 0, 0, 0, 2, 0], "2048 blocks of 512 bytes");
    assert_eq!(current[12..15], [8, 18, 4]);
    assert_eq!(sense(1, 8)[14], 4, "the one thing that can be changed");
    assert_eq!(sense(1, 0x0a)[14..], [0; 10]);
    let all = b.ok(&[0x5a, 8, 0x3f, 0, 0, 0, 0, 1, 0, 0], &[], 256);
    assert_eq!((usize::from(all[1]) + 2, all[7]), (all.len(), 0));
    assert_eq!([all[8], all[20], all[40]], [1, 8, 0x0a]);
    assert_eq!(b.sense(&[0x1a, 0, 0x2a, 0, 255, 0], &[], 255), Sense::INVALID_FIELD);
    assert_eq!(b.sense(&[0x1a, 0, 8, 1, 255, 0], &[], 255), Sense::INVALID_FIELD);
    assert_eq!(b.sense(&[0x1a, 0, 0xc8, 0, 255, 0], &[], 255), Sense::SAVING_NOT_SUPPORTED);

    let select = |list: &[u8]| b.run(&[0x15, 0x10, 0, 0, list.len() as u8, 0], list, 0);
    let mut page = [0; 24];
    (page[4], page[5]) = (8, 18);
    assert!(b.unit.handle.write_cache());
    select(&page).unwrap();
    assert!(!b.unit.handle.write_cache());
    assert_eq!(sense(0, 8)[14], 0);
    b.ok(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[7; 512], 0);
    assert_eq!(b.state.log.lock().unwrap().last(), Some(&crate::virtio::testing::Asked::Flush));
    page[6] = 4;
    select(&page).unwrap();
    assert!(b.unit.handle.write_cache());
    // Ten bytes, with a block descriptor.
    let mut long = vec![0; 36];
    (long[7], long[14], long[16], long[17]) = (8, 2, 8, 18);
    b.ok(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, 36, 0], &long, 0);
    assert!(!b.unit.handle.write_cache());
    b.unit.reset();
    assert!(b.unit.handle.write_cache(), "a reset goes back");
    b.sense(&[0], &[], 0);

    // What cannot be, changes nothing.
    (page[6], page[7]) = (0, 1);
    assert_eq!(select(&page), Err(Sense::INVALID_PARAMETER.into()));
    page[7] = 0;
    for cut in 1..24 {
        let got = select(&page[..cut]);
        if cut == 4 {
            assert_eq!(got, Ok(vec![]), "no page");
        } else {
            assert_eq!(got, Err(Sense::INVALID_LENGTH.into()), "{cut}");
        }
    }
    page[3] = 8;
    assert_eq!(select(&page), Err(Sense::INVALID_PARAMETER.into()), "blocks of another size");
    page[3] = 200;
    assert_eq!(select(&page), Err(Sense::INVALID_PARAMETER.into()));
    assert_eq!(b.run(&[0x15, 0x10, 0, 0, 24, 0], &page[..23], 0), Err(Fail::Overrun));
    assert_eq!(b.sense(&[0x15, 0x11, 0, 0, 24, 0], &page, 0), Sense::INVALID_FIELD);
    assert!(b.unit.handle.write_cache());
}

#[test]
fn errors_below_become_sense_data_or_stop_the_vm() {
    let b = Bench::disk();
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    b.state.fail(1, libc::EIO);
    assert_eq!(b.sense(&read, &[], 512), Sense::READ_ERROR);
    b.state.fail(1, libc::EIO);
    assert_eq!(b.sense(&write, &[0; 512], 0), Sense::WRITE_ERROR);
    b.unit.handle.set_policy(OnError::Report, OnError::Report);
    b.state.fail(1, libc::ENOSPC);
    assert_eq!(b.sense(&write, &[0; 512], 0), Sense::SPACE_ALLOCATION);
    b.unit.handle.set_policy(OnError::Ignore, OnError::Stop);
    b.state.fail(1, libc::EIO);
    b.ok(&read, &[], 512);
    b.state.fail(1, libc::EIO);
    assert_eq!(b.run(&write, &[0; 512], 0), Err(Fail::Hold));
    let told = b.events.take();
    assert_eq!(told.len(), 5);
    assert!(told.iter().all(|e| matches!(e, Event::BlockIoError(_))));
    // A unit that was taken away fails for that, and stops nothing.
    b.unit.leave();
    b.state.fail(1, libc::EIO);
    assert_eq!(b.run(&write, &[0; 512], 0), Err(Fail::Gone));
    assert!(b.events.take().is_empty());
}

#[test]
fn what_is_not_there_is_refused() {
    let b = Bench::disk();
    // PERSISTENT RESERVE IN and OUT, MAINTENANCE IN, COMPARE AND WRITE, and what belongs to CDs.
    for op in [0x5e, 0x5f, 0xa3, 0x89, 0x43, 0x4a, 0xff] {
        assert_eq!(
            b.sense(&[op, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 64),
            Sense::INVALID_OPCODE
        );
    }
    for op in [0x16, 0x17, 0x56, 0x57] {
        b.ok(&[op], &[], 0);
    }
    b.ok(&[0x1d, 4, 0, 0, 0, 0], &[], 0);
    assert_eq!(b.sense(&[0x1d, 0, 0, 0, 8, 0], &[0; 8], 0), Sense::INVALID_FIELD);
    b.ok(&[0x1b, 0, 0, 0, 1, 0], &[], 0);
    b.ok(&[0x1e, 0, 0, 0, 1, 0], &[], 0);
}

#[test]
fn a_new_length_is_seen() {
    let b = Bench::disk();
    assert!(!b.unit.look(LEN as u64), "as before");
    assert!(b.unit.look(2 << 20));
    assert_eq!(b.unit.block_count(), 4096);
    b.unit.look(511);
    assert_eq!(b.sense(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8), Sense::NOT_READY);
    assert_eq!(b.sense(&[0], &[], 0), Sense::NOT_READY);
}

#[test]
fn what_is_found_of_another_medium_is_not_said_of_the_one_that_was_meant() {
    let b = Bench::new(UnitConfig { removable: true, ..UnitConfig::new(UnitKind::Disk) });
    let tray = b.unit.tray.clone().unwrap();
    let moves = tray.moves();
    let refusal = |b: &Bench| b.unit.refusal(moves, Sense::LBA_OUT_OF_RANGE);
    assert_eq!(refusal(&b), Sense::LBA_OUT_OF_RANGE.into());
    tray.set_open(true);
    assert_eq!(refusal(&b), Sense::TRAY_OPEN.into());
    tray.set_open(false);
    assert_eq!(refusal(&b), Sense::MEDIUM_CHANGED.into());
    assert_eq!(refusal(&b), Sense::MEDIUM_CHANGED.into(), "also when another thread's command heard of it");
}

#[test]
fn what_was_meant_for_one_medium_does_not_reach_the_next() {
    let b = Bench::new(UnitConfig { removable: true, ..UnitConfig::new(UnitKind::Disk) });
    let group = Group::new("slow");
    let mut limits = Limits::new(0);
    limits.set(Which::BpsTotal, Limit { avg: 1, ..Limit::default() });
    group.set_limits(limits);
    b.unit.handle().throttle(Some(group.join()));
    let write = |byte: u8| b.run(&[0x2a, 0, 0, 0, 0, 7, 0, 0, 1, 0], &[byte; 512], 0);
    assert_eq!(write(1), Ok(vec![]), "the first need not wait");
    let tray = b.unit.handle().tray().unwrap();
    std::thread::scope(|s| {
        // This one waits for minutes. (If it is late, it hears of the change before.)
        let late = s.spawn(|| write(2));
        std::thread::sleep(Duration::from_millis(100));
        tray.set_open(true);
        b.state.data.lock().unwrap().fill(0xcc);
        tray.set_open(false);
        b.unit.handle().throttle(None);
        assert_eq!(late.join().unwrap(), Err(Sense::MEDIUM_CHANGED.into()));
    });
    assert_eq!(b.bytes(7 * 512, 512), [0xcc; 512]);
    write(3).unwrap();
    assert_eq!(b.bytes(7 * 512, 512), [3; 512]);
}
