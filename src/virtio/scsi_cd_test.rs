use super::super::scsi_testing::{Bench, LEN};
use super::*;
use crate::event::Event;

const SECTORS: u32 = LEN as u32 / 2048;

fn events(b: &Bench, room: u8) -> Vec<u8> {
    b.ok(&[0x4a, 1, 0, 0, 0x10, 0, 0, 0, room, 0], &[], room.into())
}

fn start_stop(b: &Bench, bits: u8) -> Result<Vec<u8>, Fail> {
    b.run(&[0x1b, 0, 0, 0, bits, 0], &[], 0)
}

#[test]
fn sectors_are_read() {
    let b = Bench::cd();
    b.state.data.lock().unwrap()[4096..6144].fill(7);
    assert_eq!(b.ok(&[0x28, 0, 0, 0, 0, 2, 0, 0, 1, 0], &[], 2048), [7; 2048]);
    assert_eq!(b.ok(&[0xa8, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0], &[], 2048), [7; 2048]);
    // READ CD: user data of any kind of sector, or of mode 1.
    for kind in [0, 8] {
        assert_eq!(b.ok(&[0xbe, kind, 0, 0, 0, 2, 0, 0, 1, 0x10, 0, 0], &[], 2048), [7; 2048]);
    }
    assert_eq!(b.ok(&[0xbe, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0], &[], 2048).len(), 0);
    assert_eq!(b.sense(&[0xbe, 4, 0, 0, 0, 2, 0, 0, 1, 0x10, 0, 0], &[], 2352), Sense::ILLEGAL_MODE);
    assert_eq!(b.sense(&[0xbe, 0, 0, 0, 0, 2, 0, 0, 1, 0xf8, 0, 0], &[], 2352), Sense::INVALID_FIELD);
    assert_eq!(b.sense(&[0xbe, 0, 0, 0, 2, 0, 0, 0, 1, 0x10, 0, 0], &[], 2048), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(b.run(&[0xbe, 0, 0, 0, 0, 2, 0, 0, 2, 0x10, 0, 0], &[], 2048), Err(Fail::Overrun));
    assert_eq!(b.sense(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 2048], 0), Sense::WRITE_PROTECTED);
    assert_eq!(b.sense(&[0x42], &[], 0), Sense::INVALID_OPCODE);
    let capacity = [(SECTORS - 1).to_be_bytes(), 2048u32.to_be_bytes()].concat();
    assert_eq!(b.ok(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8), capacity);
}

#[test]
fn the_table_of_contents_is_one_data_track() {
    let b = Bench::cd();
    let toc =
        |msf: u8, format: u8, start: u8| b.run(&[0x43, msf, format, 0, 0, 0, start, 0, 255, 0], &[], 255);
    let [.., hi, lo] = SECTORS.to_be_bytes();
    let want = [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, hi, lo];
    assert_eq!(toc(0, 0, 0).unwrap(), want);
    assert_eq!(toc(0, 0, 0xaa).unwrap()[..12], [0, 10, 1, 1, 0, 0x14, 0xaa, 0, 0, 0, hi, lo]);
    let msf = toc(2, 0, 1).unwrap();
    // 512 sectors and two seconds of lead-in
    assert_eq!((&msf[8..12], &msf[16..20]), (&[0, 0, 2, 0][..], &[0, 0, 8, 62][..]));
    assert_eq!(toc(0, 1, 0).unwrap(), [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    assert_eq!(toc(0, 0, 2), Err(Sense::INVALID_FIELD.into()));
    assert_eq!(toc(0, 5, 0), Err(Sense::INVALID_FIELD.into()));
    // No medium is too long to be told.
    b.unit.look(u64::MAX);
    assert_eq!(toc(2, 0, 1).unwrap()[16..20], [0, 255, 59, 74]);
    assert_eq!(toc(0, 0, 1).unwrap()[16..20], [0xff; 4]);
    let disc = b.ok(&[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0], &[], 34);
    assert_eq!(disc[..8], [0, 32, 0x0e, 1, 1, 1, 1, 0x20]);
}

#[test]
fn the_configuration_follows_the_medium() {
    let b = Bench::cd();
    let get = |which: u8, start: u8| b.ok(&[0x46, which, 0, start, 0, 0, 0, 1, 0, 0], &[], 256);
    let all = get(0, 0);
    assert_eq!(u32::from_be_bytes(all[..4].try_into().unwrap()) as usize + 4, all.len());
    assert_eq!((&all[6..8], &all[8..12]), (&[0, 8][..], &[0, 0, 3, 8][..]));
    assert_eq!(all[12..20], [0, 0x10, 0, 0, 0, 8, 1, 0], "a CD");
    assert_eq!(get(2, 3)[8..], [0, 3, 3, 4, 0x29, 0, 0, 0]);
    assert_eq!(get(2, 0x20)[..], [0, 0, 0, 4, 0, 0, 0, 8], "no such feature");
    assert!(get(1, 0).len() < all.len(), "DVDs are not read now");
    b.unit.look((CD_MAX + 1) * 2048);
    assert_eq!(get(0, 0)[6..8], [0, 0x10], "a DVD");
    b.unit.tray.as_ref().unwrap().set_open(true);
    assert_eq!(get(0, 0)[6..8], [0, 0]);
    assert_eq!(b.sense(&[0x46, 3, 0, 0, 0, 0, 0, 1, 0, 0], &[], 256), Sense::INVALID_FIELD);
}

#[test]
fn the_users_tray_is_the_guests_news() {
    let b = Bench::cd();
    let tray = b.unit.tray.clone().unwrap();
    assert_eq!(events(&b, 8), [0, 6, 4, 0x10, 0, 2, 0, 0], "a medium, no news");
    tray.request_eject(false);
    assert_eq!(events(&b, 4), [0, 6, 4, 0x10], "no room for it: it stays");
    assert_eq!(events(&b, 8), [0, 6, 4, 0x10, 1, 2, 0, 0], "the user wants it");
    tray.set_open(true);
    assert_eq!(b.sense(&[0], &[], 0), Sense::TRAY_OPEN);
    assert_eq!(b.sense(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[], 2048), Sense::TRAY_OPEN);
    assert_eq!(events(&b, 8)[4..6], [3, 1], "gone");
    assert_eq!(b.ok(&[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], &[], 8)[1], 0x10);
    tray.set_open(false);
    assert_eq!(events(&b, 8)[4..6], [2, 2], "new, and no unit attention before it");
    assert_eq!(b.sense(&[0], &[], 0), Sense::MEDIUM_CHANGED);
    b.ok(&[0], &[], 0);
    // Another class than media; and not polled.
    assert_eq!(b.ok(&[0x4a, 1, 0, 0, 0x02, 0, 0, 0, 8, 0], &[], 8), [0, 2, 0x80, 0x10]);
    assert_eq!(b.sense(&[0x4a, 0, 0, 0, 0x10, 0, 0, 0, 8, 0], &[], 8), Sense::INVALID_FIELD);
    assert!(b.events.take().is_empty(), "the user knows what he did");
}

#[test]
fn the_guest_locks_opens_and_closes() {
    let b = Bench::cd();
    let tray = b.unit.tray.clone().unwrap();
    b.ok(&[0x1e, 0, 0, 0, 1, 0], &[], 0);
    assert!(tray.is_locked());
    assert_eq!(b.ok(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 255, 0], &[], 255)[14], 0x2b, "locked");
    assert_eq!(start_stop(&b, 2), Err(Sense::REMOVAL_PREVENTED.into()));
    assert!(!tray.is_open());
    b.ok(&[0x1e, 0, 0, 0, 0, 0], &[], 0);
    assert_eq!(b.ok(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 255, 0], &[], 255)[14], 0x29);
    start_stop(&b, 0).unwrap();
    start_stop(&b, 0x12).unwrap();
    assert!(!tray.is_open(), "to stop is not to eject, nor with a power condition");
    start_stop(&b, 2).unwrap();
    assert!(tray.is_open());
    start_stop(&b, 3).unwrap();
    let moved = |open| Event::TrayMoved { qom_path: "/machine/peripheral/sd0".into(), open };
    assert_eq!(b.events.take(), [moved(true), moved(false)]);
    assert_eq!(b.sense(&[0], &[], 0), Sense::MEDIUM_CHANGED, "it may be another one");
    b.ok(&[0x1e, 0, 0, 0, 1, 0], &[], 0);
    b.unit.reset_by_driver(Sense::UNIT_RESET);
    assert!(!tray.is_locked());
}

#[test]
fn an_empty_drive_is_a_drive() {
    let b = Bench::cd();
    // As when the medium was removed: the handle has no node, and no length.
    let empty = crate::block::handle::Handle::new(None, Default::default());
    let unit = Unit::new(b.unit.address, b.unit.config.clone(), empty);
    let b = Bench { unit, ..b };
    b.sense(&[0], &[], 0);
    assert_eq!(b.sense(&[0], &[], 0), Sense::NO_MEDIUM);
    for cdb in [[0x25; 1], [0x43; 1], [0x51; 1], [0x28; 1]] {
        assert_eq!(b.sense(&cdb, &[], 0), Sense::NO_MEDIUM);
    }
    assert_eq!(events(&b, 8)[4..6], [0, 0]);
    b.ok(&[0x12, 0, 0, 0, 36, 0], &[], 36);
    b.ok(&[0x1a, 0, 0x3f, 0, 255, 0], &[], 255);
}
