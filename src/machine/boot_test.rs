use super::super::guest_test::elf;
use super::*;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// A file in the temporary directory that goes away with this.
pub struct Temp(pub PathBuf);

impl Temp {
    pub fn new(bytes: &[u8]) -> Temp {
        static N: AtomicU64 = AtomicU64::new(0);
        let name = format!("minivmm-boot-{}-{}", std::process::id(), N.fetch_add(1, SeqCst));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Temp(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A machine's memory without the machine.
pub struct Ram {
    pub mem: Mem,
    pub layout: Layout,
}

impl Ram {
    pub fn new(bytes: u64) -> Ram {
        let layout = Layout::new(bytes, 40).unwrap();
        Ram { mem: Mem::for_layout(&layout).unwrap(), layout }
    }

    /// Boots `kernel`; its error without the file's name.
    pub fn boot(&self, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Start, String> {
        let (kernel, initrd) = (Temp::new(kernel), initrd.map(Temp::new));
        let config = super::super::BootConfig {
            kernel: kernel.0.clone(),
            initrd: initrd.as_ref().map(|i| i.0.clone()),
            cmdline: cmdline.into(),
        };
        let result = Boot::open(&config).and_then(|mut b| b.load(&self.mem, &self.layout, 0xe_0000, true));
        result.map_err(|e| {
            let named = [Some(&kernel), initrd.as_ref()].into_iter().flatten();
            let names: Vec<String> = named.map(|t| t.0.display().to_string()).collect();
            assert!(names.iter().any(|n| e.desc.contains(n)), "names no file: {e}");
            names.iter().fold(e.desc, |text, name| text.replace(name, "FILE"))
        })
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        assert!(self.mem.read(at, &mut b));
        b
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap())
    }
}

#[test]
fn an_elf_file_starts_at_its_entry_with_boot_params_and_page_tables() {
    let ram = Ram::new(16 << 20);
    let start = ram.boot(&elf(b"code", 0x2000), None, "a=b c").unwrap();
    assert_eq!(start, Start::Long { rip: 0x20_0000, boot_params: layout::ZERO_PAGE });
    assert_eq!(ram.bytes(0x20_0000, 5), b"code\0");
    assert_eq!(ram.bytes(layout::CMDLINE, 6), b"a=b c\0");
    assert_eq!(u64::from(ram.u32(layout::ZERO_PAGE + 0x228)), layout::CMDLINE);
    assert_eq!(ram.u64(layout::ZERO_PAGE + 0x70), 0xe_0000);
    // Walk the tables for every 2 MiB of the first 4 GiB.
    for at in (0..4u64 << 30).step_by(2 << 20) {
        let mut table = layout::PAGE_TABLES;
        for shift in [39, 30] {
            let entry = ram.u64(table + (at >> shift & 511) * 8);
            assert_eq!(entry & 0xfff, 3);
            table = entry & !0xfff;
        }
        assert_eq!(ram.u64(table + (at >> 21 & 511) * 8), at | 0x83);
    }
    // The descriptors that the protocol asks for: 0x10 is 64-bit code, 0x18 data.
    assert_eq!(ram.u64(layout::GDT + 0x10) >> 40 & 0xf09b, 0xa09b);
    assert_eq!(ram.u64(layout::GDT + 0x18) >> 40 & 0xff, 0x93);
}

#[test]
fn what_is_no_kernel_is_named() {
    let ram = Ram::new(16 << 20);
    let with = |head: &[u8]| {
        let mut f = head.to_vec();
        f.resize(4096, 0);
        ram.boot(&f, None, "").unwrap_err()
    };
    assert_eq!(ram.boot(b"", None, "").unwrap_err(), "FILE: not a kernel: it has only 0 bytes");
    assert_eq!(with(b"#!/bin/sh"), "FILE: not a kernel: neither a bzImage nor an ELF file");
    assert_eq!(with(b"\x1f\x8b"), "FILE: not a kernel: it is compressed with gzip: unpack it first");
    assert_eq!(with(b"QFI\xfb"), "FILE: not a kernel: it is a qcow2 disk image");
    let mut arm = vec![0; 0x38];
    arm.extend(b"ARM\x64");
    assert_eq!(with(&arm), "FILE: not a kernel: it is a kernel for arm64, not x86-64");
    let missing = super::super::BootConfig { kernel: "/nowhere/vmlinux".into(), ..Default::default() };
    assert_eq!(Boot::open(&missing).err().unwrap().desc, "/nowhere/vmlinux: No such file or directory");
    let dir = super::super::BootConfig { kernel: "/".into(), ..Default::default() };
    assert_eq!(Boot::open(&dir).err().unwrap().desc, "/: not a regular file");
}

#[test]
fn the_initrd_goes_as_high_as_it_may_or_is_refused_with_numbers() {
    let ram = Ram::new(16 << 20);
    let initrd: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
    ram.boot(&elf(b"code", 0), Some(&initrd), "").unwrap();
    let at = (16 << 20) - 0x2000;
    assert_eq!(u64::from(ram.u32(layout::ZERO_PAGE + 0x218)), at);
    assert_eq!(ram.u32(layout::ZERO_PAGE + 0x21c), 5000);
    assert_eq!(ram.bytes(at, 5000), initrd);
    let e = ram.boot(&elf(b"code", 0), Some(&vec![1; 14 << 20]), "").unwrap_err();
    assert_eq!(
        e,
        "FILE: its 14680064 bytes do not fit between the kernel's end at 0x200004 and 0x1000000 (the guest has 16 MiB)"
    );
    assert_eq!(ram.boot(&elf(b"code", 0), Some(b""), "").unwrap_err(), "FILE: an empty file is no initrd");
    // With more memory than an ELF kernel can be asked to look for it in.
    let big = Ram::new(3 << 30);
    big.boot(&elf(b"code", 0), Some(&initrd), "").unwrap();
    assert_eq!(u64::from(big.u32(layout::ZERO_PAGE + 0x218)), 0x8000_0000 - 0x2000);
}

#[test]
fn a_long_command_line_is_refused_with_numbers() {
    let ram = Ram::new(16 << 20);
    ram.boot(&elf(b"code", 0), None, &"x".repeat(65535)).unwrap();
    assert_eq!(
        ram.boot(&elf(b"code", 0), None, &"x".repeat(65536)).unwrap_err(),
        "the kernel command line has 65536 bytes; FILE takes at most 65535"
    );
    let config =
        super::super::BootConfig { kernel: "/dev/null".into(), cmdline: "a\0b".into(), ..Default::default() };
    assert!(Boot::open(&config).is_err());
}

#[test]
fn a_reset_loads_the_same_again_even_when_the_file_is_gone() {
    let ram = Ram::new(16 << 20);
    let kernel = Temp::new(&elf(b"code", 0x3000));
    let config = super::super::BootConfig { kernel: kernel.0.clone(), ..Default::default() };
    let mut boot = Boot::open(&config).unwrap();
    boot.load(&ram.mem, &ram.layout, 0, true).unwrap();
    drop(kernel);
    assert!(ram.mem.write(0x20_0000, &[0xff; 0x4000]));
    boot.load(&ram.mem, &ram.layout, 0, false).unwrap();
    assert_eq!(ram.bytes(0x20_0000, 4), b"code");
    assert!(ram.bytes(0x20_0004, 0x2ffc).iter().all(|b| *b == 0), "bss is zero again");
    assert_eq!(ram.bytes(0x20_3000, 4), [0xff; 4], "and what is behind it is left alone");
}
