//! bzImage kernels and the `boot_params` page ("zero page") of the Linux/x86 boot protocol.
//!
//! Owns: the checks of an untrusted bzImage, and the page's fields. Never: sets a register.
//! Threads: control. Locks: none. Loading itself is linux-loader's.
//!
//! Source: Linux' Documentation/arch/x86/boot.rst (protocol 2.15) and zero-page.rst.

use super::boot::{Entry, HEAD, Initrd, Kernel, Source};
use super::layout::{self, Layout};
use super::memory::Mem;
use crate::error::Result;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

// Offsets in the file's first sectors, and in the zero page, which mirrors them.
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const ACPI_RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const VID_MODE: usize = 0x1fa;
const BOOT_FLAG: usize = 0x1fe;
const JUMP: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// The header ends here at the latest: the e820 table follows.
const HEADER_MAX: usize = 0x290;
const E820_TABLE: usize = 0x2d0;
const PAGE: usize = 0x1000;

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}

/// True when a file that begins so is a bzImage (or an old zImage).
pub fn is_bzimage(head: &[u8; HEAD]) -> bool {
    head[MAGIC..MAGIC + 4] == *b"HdrS" && u16_at(head, BOOT_FLAG) == 0xaa55
}

/// The setup header, from its first field to its own end.
pub fn header(head: &[u8; HEAD]) -> &[u8] {
    let end = (MAGIC + usize::from(head[JUMP])).min(HEADER_MAX);
    &head[SETUP_SECTS..end]
}

/// Loads the bzImage `source`, which begins with `head`.
pub fn load(source: &mut Source, head: &[u8; HEAD], mem: &Mem, layout: &Layout) -> Result<Kernel> {
    let version = u16_at(head, VERSION);
    let xloadflags = u16_at(head, XLOADFLAGS);
    if version < 0x20c || xloadflags & XLF_KERNEL_64 == 0 || head[LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(source.error(format!(
            "a Linux kernel without 64-bit entry (boot protocol {}.{:02}): only x86-64 kernels since Linux 3.8 start here",
            version >> 8,
            version & 0xff
        )));
    }
    let setup = match head[SETUP_SECTS] {
        0 => 5,
        n => u64::from(n) + 1,
    } * 512;
    let promised = setup + u64::from(u32_at(head, SYSSIZE)) * 16;
    if source.len < promised || source.len <= setup + ENTRY_64 {
        return Err(source
            .error(format!("truncated: its header promises {promised} bytes, the file has {}", source.len)));
    }
    // It unpacks itself in place, into init_size bytes from where it runs.
    let size = (source.len - setup).max(u64::from(u32_at(head, INIT_SIZE)));
    let preferred = u64::from(u32_at(head, PREF_ADDRESS)) | u64::from(u32_at(head, PREF_ADDRESS + 4)) << 32;
    let alignment = u64::from(u32_at(head, KERNEL_ALIGNMENT)).max(0x1000);
    let fits = |at: u64| {
        at >= layout::HIGH_RAM
            && at.is_multiple_of(0x1000)
            && at.checked_add(size).is_some_and(|end| end <= layout.low)
    };
    let lowest = layout::HIGH_RAM.next_multiple_of(alignment);
    let at = match (fits(preferred), head[RELOCATABLE] != 0 && fits(lowest)) {
        (true, _) => preferred,
        (false, true) => lowest,
        (false, false) => {
            let needed = if head[RELOCATABLE] != 0 { lowest.min(preferred) } else { preferred };
            return Err(source.error(format!(
                "needs {} MiB of memory from {needed:#x}, but below 3 GiB the guest has {} MiB",
                size.div_ceil(1 << 20),
                layout.low >> 20
            )));
        }
    };
    BzImage::load(&*mem.map(), Some(GuestAddress(at)), &mut source.file, None)
        .map_err(|e| source.error(e))?;
    Ok(Kernel {
        entry: Entry::Linux64(at + ENTRY_64),
        end: at + size,
        initrd_max: u64::from(u32_at(head, INITRD_ADDR_MAX)),
        cmdline_max: u64::from(u32_at(head, CMDLINE_SIZE)).min(layout::CMDLINE_MAX - 1),
    })
}

/// The `boot_params` page. `header` is that of the bzImage, or empty for an ELF kernel, which then
/// gets what the fields mean by themselves.
pub fn zero_page(
    header: &[u8],
    kernel_end: u64,
    layout: &Layout,
    initrd: Option<Initrd>,
    cmdline_size: u64,
    rsdp: u64,
) -> Vec<u8> {
    const UNKNOWN_LOADER: u8 = 0xff;
    const NORMAL_VIDEO: u16 = 0xffff;
    let mut page = vec![0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    if header.is_empty() {
        put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
        put(MAGIC, b"HdrS");
        put(VERSION, &0x020cu16.to_le_bytes());
        put(LOADFLAGS, &[LOADED_HIGH]);
        put(KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
        put(CMDLINE_SIZE, &(cmdline_size as u32).to_le_bytes());
        put(INIT_SIZE, &((kernel_end - layout::HIGH_RAM) as u32).to_le_bytes());
    } else {
        put(SETUP_SECTS, header);
    }
    put(VID_MODE, &NORMAL_VIDEO.to_le_bytes());
    put(TYPE_OF_LOADER, &[UNKNOWN_LOADER]);
    put(CMD_LINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
    put(ACPI_RSDP, &rsdp.to_le_bytes());
    if let Some((at, len)) = initrd {
        // Below 3 GiB, so that the upper halves stay zero.
        put(RAMDISK_IMAGE, &(at as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(len as u32).to_le_bytes());
        put(EXT_RAMDISK_IMAGE, &[0; 8]);
    }
    let map = layout.e820();
    put(E820_ENTRIES, &[map.len() as u8]);
    for (n, (start, len, kind)) in map.into_iter().enumerate() {
        let entry = [&start.to_le_bytes()[..], &len.to_le_bytes(), &(kind as u32).to_le_bytes()].concat();
        put(E820_TABLE + n * 20, &entry);
    }
    page
}

#[cfg(test)]
#[path = "boot_linux_test.rs"]
mod tests;
