use super::*;

/// Programs `pin`.
fn program(a: &mut Ioapic, pin: u8, entry: u64) -> Messages {
    a.write(IOREGSEL, u32::from(REDTBL + 2 * pin + 1));
    let mut out = a.write(IOWIN, (entry >> 32) as u32);
    a.write(IOREGSEL, u32::from(REDTBL + 2 * pin));
    out.extend(a.write(IOWIN, entry as u32));
    out
}

fn entry(a: &mut Ioapic, pin: u8) -> u64 {
    a.write(IOREGSEL, u32::from(REDTBL + 2 * pin));
    let low = a.read(IOWIN);
    a.write(IOREGSEL, u32::from(REDTBL + 2 * pin + 1));
    u64::from(a.read(IOWIN)) << 32 | u64::from(low)
}

#[test]
fn an_edge_sends_one_message_and_masked_edges_are_lost() {
    let mut a = Ioapic::default();
    assert_eq!(a.set(4, true), None, "masked at power-on");
    a.set(4, false);
    assert!(program(&mut a, 4, 0x03 << 56 | 0x831).is_empty());
    let sent = a.set(4, true).unwrap();
    assert_eq!(sent, Msi { addr: 0xfee0_3004, data: 0x4031 }, "logical destination 3, vector 0x31");
    assert_eq!(a.set(4, true), None, "no edge");
    assert!(a.eoi(0x31).is_empty());
    a.set(4, false);
    assert!(a.set(4, true).is_some());
    for pin in [24, 31, 32, 100, u32::MAX] {
        assert_eq!(a.set(pin, true), None, "{pin}");
    }
}

#[test]
fn a_level_is_sent_again_only_after_its_end() {
    let mut a = Ioapic::default();
    assert!(program(&mut a, 10, LEVEL | MASKED | 0x40).is_empty());
    assert_eq!(a.set(10, true), None);
    let sent = program(&mut a, 10, LEVEL | 0x40);
    assert_eq!(sent, [Msi { addr: 0xfee0_0000, data: 0xc040 }], "high when it is unmasked");
    assert_eq!(entry(&mut a, 10), REMOTE_IRR | LEVEL | 0x40);
    a.set(10, false);
    assert_eq!(a.set(10, true), None, "Remote IRR");
    assert!(a.eoi(0x41).is_empty());
    assert_eq!(a.eoi(0x40), sent, "still high");
    a.set(10, false);
    assert!(a.eoi(0x40).is_empty());
    assert_eq!(entry(&mut a, 10), LEVEL | 0x40);
    assert!(a.set(10, true).is_some());
    assert_eq!(a.write(EOI, 0x40), sent, "the EOI register does the same");
    // Remote IRR is read-only, but goes with the level mode.
    assert!(program(&mut a, 10, LEVEL | 0x40).is_empty());
    assert!(program(&mut a, 10, 0x40).is_empty());
    assert_eq!(entry(&mut a, 10), 0x40);
}

#[test]
fn level_pins_are_routed_for_their_eoi() {
    let mut a = Ioapic::default();
    program(&mut a, 4, 0x30);
    assert!(!a.take_routes_changed() && a.level_routes().is_empty());
    program(&mut a, 5, LEVEL | 0x31);
    assert!(a.take_routes_changed() && !a.take_routes_changed());
    assert_eq!(a.level_routes(), [(5, Msi { addr: 0xfee0_0000, data: 0xc031 })]);
    program(&mut a, 5, LEVEL | MASKED | 0x31);
    assert!(!a.take_routes_changed(), "a mask changes nothing");
    a.set(5, true);
    a.reset();
    assert!(a.take_routes_changed() && a.level_routes().is_empty());
    assert_eq!(program(&mut a, 5, LEVEL | 0x32).len(), 1, "the device still drives the pin");
}

#[test]
fn registers_read_as_specified() {
    let mut a = Ioapic::default();
    a.write(IOREGSEL, 1);
    assert_eq!(a.read(IOWIN), 0x17_0020);
    a.write(IOREGSEL, 0);
    a.write(IOWIN, u32::MAX);
    assert_eq!(a.read(IOWIN), 0x0f00_0000);
    program(&mut a, 23, u64::MAX);
    assert_eq!(entry(&mut a, 23), 0xff00_0000_0001_afff);
    for mode in [3u64, 6, 7] {
        program(&mut a, 3, mode << 8 | 0x50);
        assert_eq!(a.set(3, true), None, "delivery mode {mode}");
        a.set(3, false);
    }
}

#[test]
fn no_sequence_of_accesses_panics_or_floods() {
    let seed = 0x9e37_79b9_7f4a_7c15u64;
    eprintln!("seed {seed:#x}");
    let mut x = seed;
    let mut rnd = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut a = Ioapic::default();
    for _ in 0..200_000 {
        let r = rnd();
        let sent = match r % 5 {
            0 => a.set(r as u32 >> 8 & 0x1f, r >> 40 & 1 == 1).into_iter().collect(),
            1 => a.eoi((r >> 8) as u8),
            2 => a.write(IOREGSEL, (r >> 8) as u32),
            3 => a.write([IOWIN, EOI, 4, 0xfff][r as usize >> 8 & 3], (r >> 16) as u32),
            _ => {
                a.read([IOREGSEL, IOWIN, EOI, r >> 8][r as usize >> 16 & 3]);
                Messages::new()
            }
        };
        assert!(sent.len() <= PINS);
        assert!(sent.iter().all(|m| m.addr & !0xff004 == LAPIC && m.data >> 16 == 0));
        assert!(a.level_routes().len() <= PINS);
    }
}
