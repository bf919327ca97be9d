//! ELF kernels: by their PVH note, or else by their 64-bit entry.
//!
//! Owns: the checks of an untrusted ELF file, and PVH's boot data. Never: sets a register. Threads:
//! control. Locks: none. Loading itself is linux-loader's; what it would refuse without a reason,
//! or not refuse, is found here first.
//!
//! Sources: ELF-64 Object File Format 1.5; Xen's docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h.

use super::boot::{Entry, HEAD, Initrd, Kernel, Source};
use super::layout::{self, Layout};
use super::memory::Mem;
use crate::error::Result;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use std::os::unix::fs::FileExt;
use vm_memory::{Address, Bytes, GuestAddress};

const EHDR: usize = 64;
const PHDR: usize = 56;
const PT_LOAD: u32 = 1;
/// More program headers than any kernel has; their table is read in one piece.
const PHNUM_MAX: usize = 256;

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// A part of the file that goes into memory.
struct Segment {
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

/// Loads the ELF file `source`, which begins with `head`.
pub fn load(
    source: &mut Source,
    head: &[u8; HEAD],
    mem: &Mem,
    layout: &Layout,
    clean: bool,
) -> Result<Kernel> {
    let segments = check(source, head, layout)?;
    let map = mem.map();
    if !clean {
        for s in &segments {
            zero(&map, s.paddr + s.filesz, s.memsz - s.filesz).map_err(|e| source.error(e))?;
        }
    }
    let loaded = Elf::load(&*map, None, &mut source.file, None).map_err(|e| source.error(e))?;
    let end = segments.iter().map(|s| s.paddr + s.memsz).max().unwrap_or(layout::HIGH_RAM);
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(at) => Entry::Pvh(at.raw_value()),
        _ => Entry::Linux64(loaded.kernel_load.raw_value()),
    };
    let (Entry::Pvh(at) | Entry::Linux64(at)) = entry;
    if !segments.iter().any(|s| (s.paddr..s.paddr + s.memsz).contains(&at)) {
        return Err(source.error(format!("its entry point {at:#x} lies outside of all its segments")));
    }
    // Linux keeps initrds of a PVH or ELF start anywhere below 4 GiB; other kernels expect them below 2.
    Ok(Kernel { entry, end, initrd_max: 0x7fff_ffff, cmdline_max: layout::CMDLINE_MAX - 1 })
}

/// Checks the file's headers; its segments that take up memory.
fn check(source: &Source, head: &[u8; HEAD], layout: &Layout) -> Result<Vec<Segment>> {
    const CLASS_64: u8 = 2;
    const LITTLE: u8 = 1;
    const MACHINE_X86_64: u16 = 62;
    const TYPE_EXEC: u16 = 2;
    const TYPE_DYN: u16 = 3;
    let (len, error) = (source.len, |what: String| Err(source.error(what)));
    if len < EHDR as u64 {
        return error(format!("truncated: an ELF header has {EHDR} bytes, the file {len}"));
    }
    if head[5] != LITTLE {
        return error("an ELF file for big-endian machines, not x86-64".into());
    }
    let machine = u16_at(head, 18);
    if machine != MACHINE_X86_64 {
        let name = match machine {
            3 => "32-bit x86",
            40 => "32-bit ARM",
            183 => "arm64",
            243 => "RISC-V",
            258 => "LoongArch",
            21 => "64-bit PowerPC",
            22 => "S/390",
            n => return error(format!("an ELF file for machine number {n}, not x86-64 ({MACHINE_X86_64})")),
        };
        return error(format!("an ELF file for {name}, not x86-64"));
    }
    if head[4] != CLASS_64 {
        return error("a 32-bit ELF file: kernels must be 64-bit".into());
    }
    match u16_at(head, 16) {
        TYPE_EXEC | TYPE_DYN => {}
        1 => return error("an ELF object file: link it first".into()),
        n => return error(format!("an ELF file of type {n}, not an executable")),
    }
    let (phoff, phentsize, phnum) = (u64_at(head, 32), u16_at(head, 54), usize::from(u16_at(head, 56)));
    if phnum == 0 || phnum > PHNUM_MAX || usize::from(phentsize) != PHDR || phoff < EHDR as u64 {
        return error(format!(
            "broken: {phnum} ELF program headers of {phentsize} bytes at {phoff:#x} (1 to {PHNUM_MAX} of {PHDR} can be)"
        ));
    }
    let table_end = phoff.checked_add((phnum * PHDR) as u64).filter(|end| *end <= len);
    let Some(_) = table_end else {
        return error(format!(
            "truncated: {phnum} program headers at {phoff:#x}, but the file has {len} bytes"
        ));
    };
    let mut table = vec![0; phnum * PHDR];
    source.file.read_exact_at(&mut table, phoff).map_err(|e| source.error(crate::error::strerror(&e)))?;
    let mut segments = Vec::new();
    for (n, ph) in table.chunks_exact(PHDR).enumerate() {
        let (kind, offset) = (u32_at(ph, 0), u64_at(ph, 8));
        let (paddr, filesz, memsz) = (u64_at(ph, 24), u64_at(ph, 32), u64_at(ph, 40));
        match offset.checked_add(filesz) {
            Some(end) if end <= len => {}
            _ => {
                return error(format!(
                    "truncated: segment {n} has {filesz} bytes at {offset:#x}, but the file has {len} bytes"
                ));
            }
        }
        if kind != PT_LOAD || memsz == 0 && filesz == 0 {
            continue;
        }
        if filesz > memsz {
            return error(format!(
                "broken: segment {n} has more bytes in the file ({filesz}) than in memory ({memsz})"
            ));
        }
        if paddr < layout::HIGH_RAM {
            return error(format!(
                "segment {n} goes to {paddr:#x}: below {:#x} (1 MiB) there is no room for kernels",
                layout::HIGH_RAM
            ));
        }
        match paddr.checked_add(memsz) {
            Some(end) if end <= layout.low => {}
            _ => {
                return error(format!(
                    "segment {n} needs {memsz} bytes of memory at {paddr:#x}, but below 3 GiB the guest has {} MiB",
                    layout.low >> 20
                ));
            }
        }
        segments.push(Segment { paddr, filesz, memsz });
    }
    if segments.is_empty() {
        return error("broken: no segment to load".into());
    }
    Ok(segments)
}

/// Sets memory to zero: what a segment has beyond its bytes in the file.
fn zero(map: &vm_memory::GuestMemoryMmap, at: u64, len: u64) -> Result<(), vm_memory::GuestMemoryError> {
    let zeroes = [0; 0x1000];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(0x1000) as usize;
        map.write_slice(&zeroes[..n], GuestAddress(at + done))?;
        done += n as u64;
    }
    Ok(())
}

/// `hvm_start_info` version 1, followed by its module list and memory map, for [`layout::PVH_INFO`].
pub fn start_info(layout: &Layout, initrd: Option<Initrd>, rsdp: u64) -> Vec<u8> {
    const MAGIC: u32 = 0x336e_c578;
    const INFO: u64 = 56;
    const MODULE: u64 = 32;
    let map = layout.e820();
    let modules = layout::PVH_INFO + INFO;
    let memmap = modules + MODULE;
    let mut out = Vec::new();
    for word in [MAGIC, 1, 0, u32::from(initrd.is_some())] {
        out.extend(word.to_le_bytes());
    }
    let modlist = if initrd.is_some() { modules } else { 0 };
    for word in [modlist, layout::CMDLINE, rsdp, memmap, map.len() as u64] {
        out.extend(word.to_le_bytes());
    }
    let (at, len) = initrd.unwrap_or_default();
    for word in [at, len, 0, 0] {
        out.extend(word.to_le_bytes());
    }
    for (start, len, kind) in map {
        for word in [start, len, kind as u64] {
            out.extend(word.to_le_bytes());
        }
    }
    out
}

#[cfg(test)]
#[path = "boot_elf_test.rs"]
mod tests;
