use super::*;

const IDENT: Ident = Ident {
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x01_8000,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

fn word(c: &Config, off: usize) -> u32 {
    let mut b = [0; 4];
    c.read(off, &mut b);
    u32::from_le_bytes(b)
}

#[test]
fn the_header_says_who_it_is_and_cannot_be_overwritten() {
    let mut c = Config::new(IDENT);
    let before: Vec<u32> = (0..64).map(|n| word(&c, 4 * n)).collect();
    assert_eq!((before[0], before[2], before[11]), (0x1042_1af4, 0x0180_0001, 0x1100_1af4));
    c.write(0, &[0xff; 256]);
    for (n, before) in before.iter().enumerate() {
        let writable = match n {
            1 => 0x546,
            3 => 0xff,
            15 => 0xff,
            _ => 0,
        };
        assert_eq!(word(&c, 4 * n), before | writable, "register {:x}", 4 * n);
    }
}

#[test]
fn a_bar_tells_its_size_and_keeps_its_kind() {
    for is_64bit in [false, true] {
        let bar = BarSpec { index: 2, size: 0x4000, is_64bit, prefetchable: true };
        let mut c = Config::new(IDENT);
        c.add_bar(&bar, 0xc001_0000);
        let kind = if is_64bit { 0xc } else { 0x8 };
        assert_eq!((word(&c, 0x18), c.bar(&bar)), (0xc001_0000 | kind, 0xc001_0000));
        c.write(0x18, &[0xff; 8]);
        assert_eq!(word(&c, 0x18), 0xffff_c000 | kind);
        assert_eq!(word(&c, 0x1c), if is_64bit { u32::MAX } else { 0 });
        c.write(0x18, &0xd000_1234u32.to_le_bytes());
        c.write(0x1c, &1u32.to_le_bytes());
        assert_eq!(c.bar(&bar), if is_64bit { 0x1_d000_0000 } else { 0xd000_0000 });
    }
}

#[test]
fn capabilities_are_a_list_with_their_own_writable_bits() {
    let mut c = Config::new(IDENT);
    assert_eq!((word(&c, 0x34) & 0xff, word(&c, 4) >> 20 & 1), (0, 0));
    let first = c.add_capability(&Capability { id: 9, body: vec![1, 2, 3], mask: vec![0, 0xf0] });
    let second = c.add_capability(&Capability { id: 0x11, body: vec![4; 10], mask: vec![] });
    assert_eq!((word(&c, 0x34) as usize, word(&c, 4) >> 20 & 1), (first, 1));
    assert_eq!((first % 4, second % 4), (0, 0));
    c.write(first, &[0xff; 8]);
    assert_eq!(word(&c, first), 0x02f2_0109 & 0xff | (second as u32) << 8 | 0x01 << 16 | 0xf2 << 24);
    assert_eq!(word(&c, second), 0x0404_0011);
}

#[test]
fn accesses_at_and_beyond_the_end_are_harmless() {
    let mut c = Config::new(IDENT);
    for off in [250, 255, 256, 4095, usize::MAX - 8] {
        c.write(off, &[0xff; 8]);
        let mut b = [0xaa; 8];
        c.read(off, &mut b);
        assert_eq!(b, [0; 8]);
    }
}
