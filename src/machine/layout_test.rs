use super::*;

#[test]
fn memory_goes_around_the_hole() {
    let small = Layout::new(16 << 20, 39).unwrap();
    assert_eq!((small.low, small.high), (16 << 20, 0));
    assert_eq!(small.ram().collect::<Vec<_>>(), [(0, 16 << 20)]);
    let exact = Layout::new(HOLE, 39).unwrap();
    assert_eq!(exact.ram().count(), 1);
    let five = Layout::new(5 << 30, 39).unwrap();
    assert_eq!(five.ram().collect::<Vec<_>>(), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    assert_eq!(five.mmio64, 6 << 30..(6 + 256) << 30);
    let odd = Layout::new((5 << 30) + 4096, 39).unwrap();
    assert_eq!(odd.mmio64.start, 7 << 30);
}

#[test]
fn the_windows_stay_below_the_end_of_physical_addresses() {
    assert_eq!(Layout::new(32 << 30, 36).unwrap().mmio64, 33 << 30..64 << 30);
    assert_eq!(Layout::new(62 << 30, 36).unwrap().mmio64, 63 << 30..64 << 30);
    assert!(Layout::new((62 << 30) + 1, 36).is_none());
    assert!(Layout::new(u64::MAX, 52).is_none());
    assert!(Layout::new(1 << 30, 200).is_some());
}

#[test]
fn the_memory_map_is_ordered_and_free_of_overlaps() {
    for memory in [16 << 20, 128 << 20, HOLE, 5 << 30] {
        let layout = Layout::new(memory, 40).unwrap();
        let map = layout.e820();
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{map:x?}");
        let ram: u64 = map.iter().filter(|m| m.2 == E820::Ram).map(|m| m.1).sum();
        assert_eq!(ram, memory - (HIGH_RAM - LOW_RAM_END));
    }
}

#[test]
fn fixed_places_do_not_overlap() {
    let mut places = vec![
        (GDT, 0x100),
        (PVH_INFO, ZERO_PAGE - PVH_INFO),
        (ZERO_PAGE, 0x1000),
        (BOOT_STACK & !0xfff, 0x1000),
        (PAGE_TABLES, PAGE_TABLES_END - PAGE_TABLES),
        (CMDLINE, CMDLINE_MAX),
        (LOW_RAM_END, 0x400),
        (ACPI, ACPI_END - ACPI),
        (RESET_VECTOR, 16),
        (MMIO32.start, MMIO32.end - MMIO32.start),
        (ECAM.start, ECAM.end - ECAM.start),
        (IOAPIC, 0x1000),
        (LAPIC, 0x10_0000),
        (IDENTITY_MAP, 0x1000),
        (TSS, 0x3000),
    ];
    places.sort();
    assert!(places.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{places:x?}");
}
