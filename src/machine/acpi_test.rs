use super::*;
use std::process::Command;

fn full() -> Platform {
    Platform { serial: vec![layout::COM1, (0x2f8, 3)], i8042: true, cmos: true, pci: true }
}

fn word(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

fn table(block: &[u8], at: u64) -> &[u8] {
    let at = (at - layout::ACPI) as usize;
    let len = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
    &block[at..at + len]
}

fn sum(b: &[u8]) -> u8 {
    b.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// RSDP → XSDT → tables, and the FADT's DSDT, as a guest walks them; checks every checksum.
fn walk(block: &[u8]) -> Vec<&[u8]> {
    assert_eq!(&block[..8], b"RSD PTR ");
    assert_eq!((sum(&block[..20]), sum(&block[..36]), block[15]), (0, 0, 2));
    let xsdt = table(block, word(block, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut tables: Vec<_> = xsdt[36..].chunks_exact(8).map(|e| table(block, word(e, 0))).collect();
    let fadt = *tables.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    tables.push(table(block, word(fadt, 140)));
    for t in tables.iter().chain([&xsdt]) {
        assert_eq!(sum(t), 0, "{:?}", std::str::from_utf8(&t[..4]));
    }
    tables
}

fn names(block: &[u8]) -> Vec<String> {
    walk(block).iter().map(|t| String::from_utf8(t[..4].to_vec()).unwrap()).collect()
}

#[test]
fn a_guest_finds_every_table_and_all_sums_are_right() {
    let layout = Layout::new(5 << 30, 40).unwrap();
    let topology = Topology::new(64, Some(1), Some(16), Some(4)).unwrap();
    let block = build(&layout, &topology, &full()).unwrap();
    assert_eq!(names(&block), ["FACP", "APIC", "MCFG", "DSDT"]);
    let small = build(&layout, &Topology::default(), &Platform::default()).unwrap();
    assert_eq!(names(&small), ["FACP", "APIC", "DSDT"]);
    assert!(small.len() < 1024, "{}: a tiny VM need not touch a second page", small.len());
}

#[test]
fn the_madt_names_every_apic() {
    let layout = Layout::new(1 << 30, 40).unwrap();
    let topology = Topology::new(6, Some(2), Some(3), Some(1)).unwrap();
    let block = build(&layout, &topology, &full()).unwrap();
    let madt = walk(&block)[1].to_vec();
    assert_eq!(madt[36..40], 0xfee0_0000u32.to_le_bytes());
    let mut ids = Vec::new();
    for n in 0..6usize {
        let e = &madt[44 + 8 * n..][..8];
        assert_eq!((e[0], e[1], e[4]), (0, 8, 1));
        ids.push((e[2], e[3]));
    }
    assert_eq!(ids, [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)]);
    let io = &madt[44 + 48..];
    assert_eq!((io[0], io[1], &io[4..8]), (1, 12, &0xfec0_0000u32.to_le_bytes()[..]));
}

#[test]
fn the_fadt_points_to_our_registers() {
    let layout = Layout::new(1 << 30, 40).unwrap();
    let block = build(&layout, &Topology::default(), &full()).unwrap();
    let fadt = walk(&block)[0].to_vec();
    let gas = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], word(&fadt, at + 4));
    assert_eq!(gas(116), (1, 8, 1, 0x602), "reset register");
    assert_eq!(fadt[128], 1, "reset value");
    assert_eq!(gas(244), (1, 8, 1, 0x600), "sleep control");
    assert_eq!(gas(256), (1, 8, 1, 0x601), "sleep status");
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 6 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(fadt[109], 0b111);
    let bare = build(&layout, &Topology::default(), &Platform::default()).unwrap();
    assert_eq!(walk(&bare)[0][109], 0b10_0100);
}

/// The reference compiler takes the tables apart, and what it made of the AML compiles again.
#[test]
fn iasl_reads_the_tables() {
    let have = Command::new("iasl").arg("-v").output().is_ok_and(|o| o.status.success());
    if !have {
        eprintln!("skipped: no iasl (apt-get install acpica-tools)");
        return;
    }
    let layout = Layout::new(5 << 30, 40).unwrap();
    let dir = std::env::temp_dir().join(format!("minivmm-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (n, platform) in [full(), Platform::default()].iter().enumerate() {
        let block = build(&layout, &Topology::new(4, None, None, None).unwrap(), platform).unwrap();
        for table in walk(&block) {
            let name = format!("{}{n}", std::str::from_utf8(&table[..4]).unwrap().to_lowercase());
            std::fs::write(dir.join(format!("{name}.aml")), table).unwrap();
            let run = |args: &[&str]| {
                let out = Command::new("iasl").args(args).current_dir(&dir).output().unwrap();
                let text =
                    [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
                assert!(out.status.success(), "{name} {args:?}: {text}");
                text
            };
            run(&["-d", &format!("{name}.aml")]);
            let dsl = std::fs::read_to_string(dir.join(format!("{name}.dsl"))).unwrap();
            for bad in ["Invalid", "Incorrect checksum", "should be", "Unknown", "External ("] {
                assert!(!dsl.contains(bad), "{name}: {bad}:\n{dsl}");
            }
            if name.starts_with("dsdt") {
                let text = run(&["-we", "-p", "again", &format!("{name}.dsl")]);
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}\n{dsl}");
                let device = |d: &str| dsl.contains(&format!("Device ({d})"));
                assert!(device("PWRB") && device("GED"));
                assert_eq!(["PCI0", "COM1", "COM2", "PS2K", "RTC"].map(device), [n == 0; 5]);
                assert!(dsl.contains("Notify (PWRB, 0x80)"), "{dsl}");
            }
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
