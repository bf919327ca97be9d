use super::*;

fn geometry(cluster_bits: u32, extended: bool) -> Geometry {
    Geometry { cluster_bits, refcount_order: 4, extended, external: false, v3: true }
}

#[test]
fn entries_survive_both_ways() {
    for extended in [false, true] {
        let g = geometry(16, extended);
        let zero = g.all_units();
        let list = [
            Entry::default(),
            Entry { host: Some(0x50000), copied: true, data: 1, ..Entry::default() },
            Entry { host: Some(0x50000), copied: false, data: 1, ..Entry::default() },
            Entry { zero, ..Entry::default() },
            Entry { zero, host: Some(0x50000), copied: true, ..Entry::default() },
        ];
        for e in list {
            let (word, bitmap) = g.encode(&e);
            assert_eq!(g.decode(word, bitmap), Ok(e));
        }
    }
}

#[test]
fn subclusters_have_their_own_state() {
    let g = geometry(16, true);
    let e = g.decode(0x70000 | COPIED, 0x0000_0002_0000_0001).unwrap();
    assert_eq!((e.data, e.zero, e.host), (1, 2, Some(0x70000)));
    assert!(g.decode(0x70000 | COPIED, 0x0000_0001_0000_0001).is_err(), "allocated and zero");
    assert!(g.decode(0, 1).is_err(), "allocated nowhere");
    assert_eq!((g.units(), g.unit_size(), g.l2_bits()), (32, 2048, 12));
}

#[test]
fn corrupt_entries_are_refused() {
    let g = geometry(16, false);
    assert!(g.decode(0x50200 | COPIED, 0).is_err(), "unaligned");
    let v2 = Geometry { v3: false, ..g };
    assert!(v2.decode(ZERO, 0).is_err(), "zero flag in version 2");
    let external = Geometry { external: true, ..g };
    assert!(external.decode(COMPRESSED, 0).is_err());
    assert_eq!(external.decode(COPIED, 0).unwrap().host, Some(0), "offset 0 of a data file");
}

/// The specification's x = 62 - (cluster_bits - 8).
#[test]
fn compressed_entries_count_sectors() {
    for bits in 9..=21 {
        let g = geometry(bits, false);
        let word = g.encode_compressed(0x12345, 400);
        let (offset, bytes) = g.decode(word, 0).unwrap().compressed.unwrap();
        assert_eq!(offset, 0x12345);
        assert!(bytes >= 400 && (offset + bytes) % 512 == 0 && bytes < 400 + 512, "{bits}: {bytes}");
    }
    let g = geometry(16, false);
    assert_eq!(g.encode_compressed(0x10000, 512) >> 54 & 0xff, 0, "one sector is zero additional ones");
    assert_eq!(g.encode_compressed(0x10000, 513) >> 54 & 0xff, 1);
}

#[test]
fn refcounts_of_every_width() {
    for order in 0..=6 {
        let max = Geometry { refcount_order: order, ..geometry(9, false) }.refcount_max();
        let mut block = vec![0; 512];
        for i in 0..32 {
            refcount_set(&mut block, order, i, max.wrapping_mul(i as u64 * 7) & max);
        }
        for i in 0..32 {
            assert_eq!(refcount_get(&block, order, i), max.wrapping_mul(i as u64 * 7) & max, "{order} {i}");
        }
    }
    // Bit 0 is the least significant one; wider fields are big-endian.
    let mut block = vec![0; 8];
    refcount_set(&mut block, 0, 1, 1);
    assert_eq!(block[0], 2);
    refcount_set(&mut block, 4, 1, 0x0102);
    assert_eq!(block[2..4], [1, 2]);
}

#[test]
fn sizes_follow_from_the_geometry() {
    let g = geometry(16, false);
    assert_eq!(g.l1_entries(0), 0);
    assert_eq!(g.l1_entries(1), 1);
    assert_eq!(g.l1_entries(512 << 20), 1);
    assert_eq!(g.l1_entries((512 << 20) + 1), 2);
    assert_eq!(g.l1_entries(u64::MAX), 1 << 35);
    assert_eq!(g.round_up(u64::MAX), !0xffff);
    assert_eq!(g.clusters(65535, 2), 0..2);
}
