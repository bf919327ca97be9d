use super::super::scsi_testing::{Bench, LEN};
use super::super::scsi_unit::{Address, UnitConfig, UnitKind};
use super::*;
use crate::virtio::testing::Asked;

const BLOCKS: u64 = LEN as u64 / 512;

/// A command of the group of `op` with a first block and a number of blocks.
fn blocks(op: u8, flags: u8, lba: u64, count: u32) -> Vec<u8> {
    let (l, c) = (lba.to_be_bytes(), count.to_be_bytes());
    match op >> 5 {
        0 => vec![op, l[5], l[6], l[7], c[3], 0],
        1 | 2 => vec![op, flags, l[4], l[5], l[6], l[7], 0, c[2], c[3], 0],
        5 => [&[op, flags], &l[4..], &c, &[0, 0]].concat(),
        _ => [&[op, flags], &l[..], &c, &[0, 0]].concat(),
    }
}

fn log(b: &Bench) -> Vec<Asked> {
    std::mem::take(&mut *b.state.log.lock().unwrap())
}

#[test]
fn every_length_of_read_and_write() {
    let b = Bench::disk();
    for (n, (read, write)) in [(0x08, 0x0a), (0x28, 0x2a), (0xa8, 0xaa), (0x88, 0x8a)].into_iter().enumerate()
    {
        let data = vec![n as u8 + 1; 1024];
        let lba = 10 * n as u64 + 3;
        b.ok(&blocks(write, 0, lba, 2), &data, 0);
        assert_eq!(b.bytes(lba as usize * 512, 1024), data);
        assert_eq!(b.ok(&blocks(read, 0, lba, 2), &[], 1024), data);
        assert_eq!(log(&b), [Asked::Write(lba * 512, 1024), Asked::Read(lba * 512, 1024)]);
        assert_eq!(b.run(&blocks(read, 0, lba, 2), &[], 1023), Err(Fail::Overrun));
        assert_eq!(b.run(&blocks(write, 0, lba, 2), &data[..1023], 0), Err(Fail::Overrun));
        assert_eq!(b.sense(&blocks(read, 0, BLOCKS - 1, 2), &[], 1024), Sense::LBA_OUT_OF_RANGE);
        assert_eq!(b.sense(&blocks(write, 0, BLOCKS, 1), &data, 0), Sense::LBA_OUT_OF_RANGE);
    }
    // 0 blocks: 256 in the short commands, none in the others.
    assert_eq!(b.ok(&blocks(0x08, 0, 0, 0), &[], 256 * 512).len(), 256 * 512);
    log(&b);
    assert_eq!(b.ok(&blocks(0x28, 0, BLOCKS, 0), &[], 512).len(), 0);
    assert_eq!(b.sense(&blocks(0x88, 0, u64::MAX, u32::MAX), &[], 512), Sense::LBA_OUT_OF_RANGE);
    assert_eq!(b.sense(&blocks(0x28, 0x20, 0, 1), &[], 512), Sense::INVALID_FIELD, "protection");
    assert_eq!(log(&b), []);
    // FUA
    b.ok(&blocks(0x2a, 8, 0, 1), &[1; 512], 0);
    assert_eq!(log(&b), [Asked::Write(0, 512), Asked::Flush]);
    let invalid = b.unit.handle().stats.get(Stat::Read).invalid;
    assert_eq!(invalid, 5, "counted as such");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let b = Bench::at(Address { target: 0, lun: 0 }, UnitConfig::new(UnitKind::Disk), true);
    for op in [0x0a, 0x2a, 0x8a, 0x41, 0x93] {
        assert_eq!(b.sense(&blocks(op, 0, 0, 1), &[0; 512], 0), Sense::WRITE_PROTECTED);
    }
    assert_eq!(b.sense(&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0), Sense::WRITE_PROTECTED);
    assert_eq!(b.ok(&[0x1a, 8, 8, 0, 255, 0], &[], 255)[2], 0x90);
    assert_eq!(b.ok(&[0x12, 1, 0xb2, 0, 255, 0], &[], 255)[5], 0);
    b.ok(&blocks(0x28, 0, 0, 1), &[], 512);
}

#[test]
fn capacity() {
    let config = UnitConfig { physical_block_size: 4096, ..UnitConfig::new(UnitKind::Disk) };
    let b = Bench::new(config);
    let last = (BLOCKS - 1) as u32;
    let short = [last.to_be_bytes(), 512u32.to_be_bytes()].concat();
    assert_eq!(b.ok(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8), short);
    let long = b.ok(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], &[], 32);
    assert_eq!((&long[4..12], long[13], long[14]), (&short[..], 3, 0x80));
    assert_eq!(b.sense(&[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[], 8), Sense::INVALID_FIELD);
    assert_eq!(b.sense(&[0x9e, 0x11], &[], 32), Sense::INVALID_OPCODE);
    b.unit.look(3 << 40);
    assert_eq!(b.ok(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8)[..4], [0xff; 4], "ask in 16 bytes");
}

fn unmap(list: &[(u64, u32)]) -> Vec<u8> {
    let described = (list.len() * 16) as u16;
    let mut out = [(described + 6).to_be_bytes(), described.to_be_bytes(), [0; 2], [0; 2]].concat();
    for (lba, count) in list {
        out.extend([&lba.to_be_bytes()[..], &count.to_be_bytes(), &[0; 4]].concat());
    }
    out
}

fn unmap_cdb(len: usize) -> [u8; 10] {
    let len = (len as u16).to_be_bytes();
    [0x42, 0, 0, 0, 0, 0, 0, len[0], len[1], 0]
}

#[test]
fn unmap_gives_up_what_it_says_or_nothing() {
    let config = UnitConfig { max_unmap_size: 100 * 512, ..UnitConfig::new(UnitKind::Disk) };
    let b = Bench::new(config);
    let run = |list: &[u8]| b.run(&unmap_cdb(list.len()), list, 0);
    run(&unmap(&[(8, 8), (100, 0), (BLOCKS - 1, 1)])).unwrap();
    assert_eq!(log(&b), [Asked::Discard(4096, 4096), Asked::Discard(LEN as u64 - 512, 512)]);
    run(&unmap(&[])).unwrap();
    run(&[]).unwrap();
    for (list, want) in [
        (unmap(&[(0, 8), (BLOCKS, 1)]), Sense::LBA_OUT_OF_RANGE),
        (unmap(&[(u64::MAX, u32::MAX)]), Sense::LBA_OUT_OF_RANGE),
        (unmap(&[(0, 51), (60, 50)]), Sense::INVALID_PARAMETER),
        (unmap(&[(0, 8)])[..23].to_vec(), Sense::INVALID_LENGTH),
        (vec![0; 7], Sense::INVALID_LENGTH),
        (vec![0xff; 24], Sense::INVALID_LENGTH),
        (unmap(&vec![(0, 1); 256]), Sense::INVALID_LENGTH),
    ] {
        assert_eq!(run(&list), Err(want.into()), "{:x?}", &list[..8.min(list.len())]);
    }
    assert_eq!(b.run(&unmap_cdb(24), &unmap(&[])[..], 0), Err(Fail::Overrun));
    assert_eq!(log(&b), [], "nothing was done in part");
}

#[test]
fn write_same_zeroes_or_repeats() {
    let b = Bench::disk();
    b.state.data.lock().unwrap().fill(9);
    b.ok(&blocks(0x41, 0x08, 2, 4), &[0; 512], 0);
    b.ok(&blocks(0x93, 0, 10, 4), &[0; 512], 0);
    // Without data
    b.ok(&blocks(0x93, 0x09, 20, 2), &[], 0);
    assert_eq!(
        log(&b),
        [Asked::Zero(1024, 2048, true), Asked::Zero(5120, 2048, false), Asked::Zero(10240, 1024, true)]
    );
    assert_eq!(b.bytes(1024, 2048), [0; 2048]);
    let pattern: Vec<u8> = (0..512).map(|i| i as u8).collect();
    b.ok(&blocks(0x93, 0, 100, 1200), &pattern, 0);
    assert_eq!(b.bytes(100 * 512, 1200 * 512), pattern.repeat(1200));
    assert_eq!(b.bytes(1300 * 512, 1), [9]);
    log(&b);
    for (cdb, want) in [
        (blocks(0x93, 0, 0, 0), Sense::INVALID_FIELD),
        (blocks(0x93, 0x10, 0, 1), Sense::INVALID_FIELD),
        (blocks(0x41, 0x02, 0, 1), Sense::INVALID_FIELD),
        (blocks(0x93, 0, BLOCKS - 1, 2), Sense::LBA_OUT_OF_RANGE),
    ] {
        assert_eq!(b.sense(&cdb, &pattern, 0), want);
    }
    assert_eq!(b.run(&blocks(0x41, 1, 0, 1), &[], 0), Err(Fail::Overrun), "NDOB is for 16 bytes only");
    b.unit.look(1 << 50);
    assert_eq!(b.sense(&blocks(0x93, 0, 0, u32::MAX), &pattern, 0), Sense::INVALID_FIELD, "too much at once");
    assert_eq!(log(&b), []);
}

#[test]
fn verify_reads_and_compares() {
    let b = Bench::disk();
    let data: Vec<u8> = (0..LEN / 2).map(|i| (i / 7) as u8).collect();
    b.state.data.lock().unwrap()[..LEN / 2].copy_from_slice(&data);
    let count = LEN as u32 / 2 / 512;
    for op in [0x2f, 0xaf, 0x8f] {
        b.ok(&blocks(op, 0x02, 0, count), &data, 0);
        assert_eq!(b.sense(&blocks(op, 0x02, 1, 1), &data, 0), Sense::MISCOMPARE);
        b.ok(&blocks(op, 0, 0, count), &[], 0);
        b.state.fail(1, libc::EIO);
        assert_eq!(b.sense(&blocks(op, 0, 0, count), &[], 0), Sense::READ_ERROR);
        assert_eq!(b.sense(&blocks(op, 0x04, 0, 1), &data, 0), Sense::INVALID_FIELD);
    }
    log(&b);
    b.ok(&blocks(0x2e, 0x02, 5, 1), &[3; 512], 0);
    assert_eq!(log(&b), [Asked::Write(2560, 512), Asked::Flush, Asked::Read(2560, 512)]);
    assert_eq!(b.bytes(2560, 512), [3; 512]);
}

#[test]
fn caches_are_flushed_and_blocks_looked_up() {
    let b = Bench::disk();
    b.ok(&blocks(0x35, 0, 0, 0), &[], 0);
    assert_eq!(log(&b), [Asked::Flush]);
    b.ok(&blocks(0x2a, 0, 5, 1), &[1; 512], 0);
    b.ok(&blocks(0x91, 0, 5, 5), &[], 0);
    assert_eq!(log(&b), [Asked::Write(2560, 512), Asked::Flush]);
    assert_eq!(b.sense(&blocks(0x35, 0, BLOCKS, 1), &[], 0), Sense::LBA_OUT_OF_RANGE);
    b.ok(&[0x2b, 0, 0, 0, 0, 9, 0, 0, 0, 0], &[], 0);
    let mut cdb = blocks(0x9e, 0x12, 8, 24);
    let status = b.ok(&cdb, &[], 24);
    assert_eq!(status[..8], [0, 0, 0, 20, 0, 0, 0, 0]);
    assert_eq!(status[8..16], 8u64.to_be_bytes());
    assert_eq!((status[16..20].to_vec(), status[20]), ((BLOCKS as u32 - 8).to_be_bytes().to_vec(), 0));
    cdb[2] = 1;
    assert_eq!(b.sense(&cdb, &[], 24), Sense::LBA_OUT_OF_RANGE);
}
