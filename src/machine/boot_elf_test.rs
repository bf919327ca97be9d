use super::super::boot::tests::Ram;
use super::super::cpu_state::Start;
use super::super::guest_test::elf;
use super::*;

/// The tiny ELF file with a second program header: a note segment with `note` as its content.
fn with_note(note: &[u8]) -> Vec<u8> {
    let mut f = elf(b"code", 0x1000);
    f[56] = 2;
    let at = f.len() as u64;
    let mut ph = vec![4, 0, 0, 0, 4, 0, 0, 0];
    for word in [at, 0, 0, note.len() as u64, note.len() as u64, 4] {
        ph.extend(word.to_le_bytes());
    }
    f[120..176].copy_from_slice(&ph);
    f.extend(note);
    f
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let words = |w: &[u32]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
    // A foreign note before it, with a name that needs padding.
    [&words(&[6, 4, 1])[..], b"Linux\0\0\0", &words(&[7]), &words(&[4, 4, 18]), b"Xen\0", &words(&[entry])]
        .concat()
}

#[test]
fn a_pvh_note_wins_over_the_entry() {
    let ram = Ram::new(5 << 30);
    let start = ram.boot(&with_note(&pvh_note(0x20_0800)), Some(b"initrd"), "console=ttyS0").unwrap();
    assert_eq!(start, Start::Pvh { rip: 0x20_0800, start_info: layout::PVH_INFO });
    let info = layout::PVH_INFO;
    assert_eq!((ram.u32(info), ram.u32(info + 4), ram.u32(info + 12)), (0x336e_c578, 1, 1));
    let module = ram.u64(info + 16);
    assert_eq!((ram.u64(module), ram.u64(module + 8)), (0x7fff_f000, 6));
    assert_eq!(ram.u64(info + 24), layout::CMDLINE);
    assert_eq!(ram.u64(info + 32), 0xe_0000);
    let (map, n) = (ram.u64(info + 40), u64::from(ram.u32(info + 48)));
    let map: Vec<_> = (0..n)
        .map(|n| (ram.u64(map + n * 24), ram.u64(map + n * 24 + 8), ram.u32(map + n * 24 + 16)))
        .collect();
    let expected: Vec<_> = ram.layout.e820().into_iter().map(|(a, l, k)| (a, l, k as u32)).collect();
    assert_eq!(map, expected);
    assert!(info + 88 + n * 24 <= layout::ZERO_PAGE);
    assert_eq!(
        ram.boot(&with_note(&pvh_note(0x10_0000)), None, "").unwrap_err(),
        "FILE: its entry point 0x100000 lies outside of all its segments"
    );
    // A note of somebody else's: the 64-bit entry.
    let foreign = with_note(&pvh_note(0)[..24]);
    assert!(matches!(ram.boot(&foreign, None, ""), Ok(Start::Long { rip: 0x20_0000, .. })));
}

#[test]
fn broken_and_foreign_files_are_refused_with_the_reason() {
    let ram = Ram::new(16 << 20);
    let good = elf(&[0x90; 64], 0x10000);
    assert!(ram.boot(&good, None, "").is_ok());
    let change = |at: usize, bytes: &[u8]| {
        let mut f = good.clone();
        f[at..at + bytes.len()].copy_from_slice(bytes);
        ram.boot(&f, None, "").unwrap_err()
    };
    let q = |v: u64| v.to_le_bytes();
    assert_eq!(change(4, &[1]), "FILE: a 32-bit ELF file: kernels must be 64-bit");
    assert_eq!(change(5, &[2]), "FILE: an ELF file for big-endian machines, not x86-64");
    assert_eq!(change(18, &[183]), "FILE: an ELF file for arm64, not x86-64");
    assert_eq!(change(18, &[3]), "FILE: an ELF file for 32-bit x86, not x86-64");
    assert_eq!(change(18, &[99]), "FILE: an ELF file for machine number 99, not x86-64 (62)");
    assert_eq!(change(16, &[1]), "FILE: an ELF object file: link it first");
    assert_eq!(change(16, &[4]), "FILE: an ELF file of type 4, not an executable");
    assert_eq!(change(24, &q(0x1234)), "FILE: its entry point 0x1234 lies outside of all its segments");
    assert_eq!(
        change(56, &[0, 0]),
        "FILE: broken: 0 ELF program headers of 56 bytes at 0x40 (1 to 256 of 56 can be)"
    );
    assert_eq!(change(64, &[6]), "FILE: broken: no segment to load");
    assert_eq!(
        change(96, &q(100)),
        "FILE: truncated: segment 0 has 100 bytes at 0x1000, but the file has 4160 bytes"
    );
    assert_eq!(
        change(88, &q(0x1000)),
        "FILE: segment 0 goes to 0x1000: below 0x100000 (1 MiB) there is no room for kernels"
    );
    assert_eq!(
        change(88, &q(0xff_ff00)),
        "FILE: segment 0 needs 65536 bytes of memory at 0xffff00, but below 3 GiB the guest has 16 MiB"
    );
    assert!(change(88, &q(u64::MAX - 1)).contains("needs 65536 bytes"));
    assert_eq!(
        change(104, &q(8)),
        "FILE: broken: segment 0 has more bytes in the file (64) than in memory (8)"
    );
    for len in [5, 63, 64, 100, 119, 0x1000, 0x103f] {
        let e = ram.boot(&good[..len], None, "").unwrap_err();
        assert!(e.starts_with("FILE: truncated"), "{len}: {e}");
    }
}

/// Whatever is in the file: an error or a start, never a panic, and nothing outside of the guest.
#[test]
fn mutated_files_never_panic() {
    let seed = 0x2545_f491_4f6c_dd1du64;
    eprintln!("seed {seed:#x}");
    let mut x = seed;
    let mut rnd = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let ram = Ram::new(16 << 20);
    let seeds = [with_note(&pvh_note(0x20_0000)), elf(&[0x90; 64], 0x10000)];
    let mut started = 0;
    for round in 0..3000 {
        let mut f = seeds[round % 2].clone();
        for _ in 0..1 + rnd() % 4 {
            // Mostly in the headers and notes, with values at the edges.
            let at = if rnd() % 4 > 0 {
                rnd() as usize % 176
            } else {
                0x1000 + rnd() as usize % (f.len() - 0x1000)
            };
            let value = [0, 1, 0x7f, 0x80, 0xff, rnd() as u8][rnd() as usize % 6];
            let n = [1, 1, 2, 4, 8][rnd() as usize % 5].min(f.len() - at);
            f[at..at + n].fill(value);
        }
        if rnd() % 8 == 0 {
            f.truncate(rnd() as usize % (f.len() + 1));
        }
        match ram.boot(&f, None, "") {
            Ok(Start::Long { rip, .. } | Start::Pvh { rip, .. }) => {
                assert!((layout::HIGH_RAM..ram.layout.low).contains(&rip), "{rip:#x}");
                started += 1;
            }
            Ok(Start::Idle) => panic!("idle"),
            Err(e) => assert!(e.contains("FILE") && !e.contains('\n'), "{e}"),
        }
    }
    assert!(started > 100, "{started}: the mutations leave nothing to load");
}
