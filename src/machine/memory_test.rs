use super::*;
use vm_memory::GuestMemoryRegion;

#[test]
fn memory_lies_around_the_hole_and_is_aligned_for_huge_pages() {
    // 5 GiB are promised, not used: MAP_NORESERVE.
    let mem = Mem::for_layout(&Layout::new(5 << 30, 40).unwrap()).unwrap();
    let map = mem.map();
    assert_eq!(map.num_regions(), 2);
    for region in map.iter() {
        assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
        assert_eq!(region.start_addr().0 % HUGE_PAGE as u64, 0);
    }
    for addr in [0, 0xbfff_fff8, 0x1_0000_0000, 0x1_7fff_fff8] {
        assert!(mem.write(addr, &addr.to_le_bytes()), "{addr:#x}");
    }
    for addr in [0u64, 0xbfff_fff8, 0x1_0000_0000, 0x1_7fff_fff8] {
        let mut b = [0; 8];
        assert!(mem.read(addr, &mut b));
        assert_eq!(u64::from_le_bytes(b), addr);
    }
    for addr in [0xbfff_fffc, 0xc000_0000, 0xffff_fffc, 0x1_8000_0000, u64::MAX - 3] {
        assert!(!mem.read(addr, &mut [0; 8]) && !mem.write(addr, &[0; 8]), "{addr:#x}");
    }
}

#[test]
fn too_much_memory_is_refused_with_its_size() {
    let e = Mem::for_layout(&Layout::new(1 << 51, 52).unwrap()).err().unwrap();
    assert!(e.desc.contains("bytes of guest memory: Cannot allocate memory"), "{e}");
}
