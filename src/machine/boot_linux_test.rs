use super::super::boot::tests::Ram;
use super::super::cpu_state::Start;
use super::*;

/// A bzImage that is valid as far as a loader can see.
fn bzimage(payload: usize) -> Vec<u8> {
    let setup = 5 * 512;
    let mut f = vec![0; setup + payload];
    f[SETUP_SECTS] = 4;
    let put = |f: &mut Vec<u8>, at: usize, b: &[u8]| f[at..at + b.len()].copy_from_slice(b);
    put(&mut f, SYSSIZE, &((payload / 16) as u32).to_le_bytes());
    put(&mut f, BOOT_FLAG, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut f, MAGIC, b"HdrS\x0f\x02");
    put(&mut f, LOADFLAGS, &[1]);
    put(&mut f, INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
    put(&mut f, KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
    put(&mut f, RELOCATABLE, &[1]);
    put(&mut f, XLOADFLAGS, &[0x3f, 0]);
    put(&mut f, CMDLINE_SIZE, &2047u32.to_le_bytes());
    put(&mut f, PREF_ADDRESS, &0x100_0000u64.to_le_bytes());
    put(&mut f, INIT_SIZE, &0x40_0000u32.to_le_bytes());
    f[setup..].fill(0x90);
    f
}

#[test]
fn a_bzimage_goes_to_its_preferred_address() {
    let ram = Ram::new(64 << 20);
    let start = ram.boot(&bzimage(8192), Some(&[7; 100]), "quiet").unwrap();
    assert_eq!(start, Start::Long { rip: 0x100_0200, boot_params: layout::ZERO_PAGE });
    assert_eq!(ram.bytes(0x100_0000, 8192), [0x90; 8192]);
    let page = ram.bytes(layout::ZERO_PAGE, 4096);
    assert_eq!(&page[MAGIC..MAGIC + 6], b"HdrS\x0f\x02", "the header is the file's");
    assert_eq!(page[TYPE_OF_LOADER], 0xff);
    assert_eq!(page[0x1ef], 0, "the sentinel says that the rest is initialized");
    assert_eq!(u32_at(&page, RAMDISK_IMAGE), (64 << 20) - 4096);
    assert_eq!(u32_at(&page, RAMDISK_SIZE), 100);
    assert_eq!(u32_at(&page, CMD_LINE_PTR), layout::CMDLINE as u32);
    assert_eq!(page[E820_ENTRIES], 4);
    assert_eq!(u32_at(&page, E820_TABLE + 40), layout::HIGH_RAM as u32);
    assert_eq!(u32_at(&page, E820_TABLE + 48), (63 << 20));
    // Nothing of the file's sectors but the header.
    assert!(page[E820_TABLE + 80..].iter().all(|b| *b == 0));
    let (header_end, table) = (MAGIC + 0x6a, E820_TABLE);
    assert!(page[header_end..table].iter().all(|b| *b == 0));
}

#[test]
fn a_relocatable_one_moves_where_memory_is_short() {
    let start = Ram::new(16 << 20).boot(&bzimage(8192), None, "").unwrap();
    assert_eq!(start, Start::Long { rip: 0x20_0200, boot_params: layout::ZERO_PAGE });
}

#[test]
fn what_cannot_start_is_refused_with_the_reason() {
    let ram = Ram::new(16 << 20);
    let good = bzimage(8192);
    let change = |at: usize, bytes: &[u8]| {
        let mut f = good.clone();
        f[at..at + bytes.len()].copy_from_slice(bytes);
        ram.boot(&f, None, "").unwrap_err()
    };
    let old = "FILE: a Linux kernel without 64-bit entry";
    assert!(change(XLOADFLAGS, &[0]).starts_with(old), "32-bit");
    assert!(change(VERSION, &[0x0b]).starts_with(&format!("{old} (boot protocol 2.11)")));
    assert!(change(LOADFLAGS, &[0]).starts_with(old), "zImage");
    assert_eq!(
        change(RELOCATABLE, &[0]),
        "FILE: needs 4 MiB of memory from 0x1000000, but below 3 GiB the guest has 16 MiB"
    );
    assert_eq!(
        change(INIT_SIZE, &(15u32 << 20).to_le_bytes()),
        "FILE: needs 15 MiB of memory from 0x200000, but below 3 GiB the guest has 16 MiB"
    );
    for len in [0x1000, good.len() - 1] {
        assert_eq!(
            ram.boot(&good[..len], None, "").unwrap_err(),
            format!("FILE: truncated: its header promises 10752 bytes, the file has {len}")
        );
    }
    assert_eq!(
        ram.boot(&good, None, &"x".repeat(2048)).unwrap_err(),
        "the kernel command line has 2048 bytes; FILE takes at most 2047"
    );
    ram.boot(&good, None, &"x".repeat(2047)).unwrap();
}

#[test]
fn mutated_headers_never_panic() {
    let seed = 0xdead_beef_cafe_f00du64;
    eprintln!("seed {seed:#x}");
    let mut x = seed;
    let mut rnd = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let (ram, good, mut started) = (Ram::new(16 << 20), bzimage(4096), 0);
    for _ in 0..3000 {
        let mut f = good.clone();
        for _ in 0..1 + rnd() % 3 {
            let at = SETUP_SECTS + rnd() as usize % (HEADER_MAX - SETUP_SECTS);
            let value = [0, 1, 0x7f, 0x80, 0xff, rnd() as u8][rnd() as usize % 6];
            let n = [1, 1, 2, 4, 8][rnd() as usize % 5];
            f[at..at + n].fill(value);
        }
        match ram.boot(&f, Some(b"initrd"), "x") {
            Ok(Start::Long { rip, .. }) => {
                assert!((layout::HIGH_RAM..ram.layout.low).contains(&rip), "{rip:#x}");
                started += 1;
            }
            Ok(other) => panic!("{other:?}"),
            Err(e) => assert!(e.contains("FILE") && !e.contains('\n'), "{e}"),
        }
    }
    assert!(started > 100, "{started}: the mutations leave nothing to load");
}
