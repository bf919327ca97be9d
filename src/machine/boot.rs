//! Loading a kernel: what kind of file it is, where its parts go, what it is told.
//!
//! Owns: the open kernel and initrd, and the boot data below 1 MiB except ACPI's. Never: sets a
//! register (it says where to start). Threads: control, while no processor runs. Locks: none.
//!
//! Files are read straight into guest memory, each byte once. They stay open, so that a reset can
//! load the same kernel again when its file has been replaced or removed meanwhile.

use super::cpu_state::{Start, gdt};
use super::layout::{self, Layout};
use super::memory::Mem;
use super::{acpi_pm, boot_elf, boot_linux};
use crate::bail;
use crate::error::{Error, Result, strerror};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Enough of a file's beginning to know what it is: all of a bzImage's setup header, and an ELF
/// header with its first program headers.
pub const HEAD: usize = 1024;

/// Real-mode code: `mov dx, reset port; mov al, value; out dx, al; hlt; jmp -3`. Linux on a
/// hardware-reduced platform does not use the ACPI reset register: it takes the machine for one
/// with EFI and, finding none, jumps to the BIOS (`reboot_init` in arch/x86/kernel/reboot.c).
const RESET_CODE: [u8; 9] = {
    let port = (layout::ACPI_PM + acpi_pm::RESET).to_le_bytes();
    [0xba, port[0], port[1], 0xb0, acpi_pm::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// A file to load, and its name for errors.
pub struct Source {
    /// As the user wrote it.
    pub path: PathBuf,
    /// Open for reading.
    pub file: File,
    /// Bytes in it.
    pub len: u64,
}

/// A kernel in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// How it starts.
    pub entry: Entry,
    /// First address behind what it takes up before it knows the memory map.
    pub end: u64,
    /// Last address at which a byte of the initrd may lie.
    pub initrd_max: u64,
    /// Longest command line without its zero byte.
    pub cmdline_max: u64,
}

/// The ways into a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux/x86 boot protocol.
    Linux64(u64),
    /// PVH.
    Pvh(u64),
}

/// An initrd in memory: address and length.
pub type Initrd = (u64, u64);

/// What is to be booted.
pub struct Boot {
    kernel: Source,
    initrd: Option<Source>,
    cmdline: String,
}

impl Source {
    /// Opens `path`.
    pub fn open(path: &Path) -> Result<Source> {
        let fail = |e: std::io::Error| Error::new(format!("{}: {}", path.display(), strerror(&e)));
        // Non-blocking for the sake of a FIFO, whose open would wait for a writer; it means nothing
        // to a regular file.
        let mut options = File::options();
        let file =
            options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            bail!("{}: not a regular file", path.display());
        }
        Ok(Source { path: path.to_owned(), file, len: meta.len() })
    }

    /// An error about this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::new(format!("{}: {what}", self.path.display()))
    }

    /// Its first [`HEAD`] bytes, zeroes behind its end.
    fn head(&self) -> Result<[u8; HEAD]> {
        let (mut head, mut have) = ([0; HEAD], 0);
        while have < HEAD {
            match self.file.read_at(&mut head[have..], have as u64) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error(strerror(&e))),
            }
        }
        Ok(head)
    }
}

impl Boot {
    /// Opens the files of `config`.
    pub fn open(config: &super::BootConfig) -> Result<Boot> {
        let kernel = Source::open(&config.kernel)?;
        let initrd = config.initrd.as_deref().map(Source::open).transpose()?;
        if config.cmdline.contains('\0') {
            bail!("the kernel command line contains a zero byte");
        }
        Ok(Boot { kernel, initrd, cmdline: config.cmdline.clone() })
    }

    /// Loads everything into memory. `clean`: memory is all zeroes so far. `rsdp`: where the ACPI
    /// tables begin.
    pub fn load(&mut self, mem: &Mem, layout: &Layout, rsdp: u64, clean: bool) -> Result<Start> {
        let head = self.kernel.head()?;
        let linux = boot_linux::is_bzimage(&head);
        let kernel = if head.starts_with(b"\x7fELF") {
            boot_elf::load(&mut self.kernel, &head, mem, layout, clean)?
        } else if linux {
            boot_linux::load(&mut self.kernel, &head, mem, layout)?
        } else {
            return Err(self.kernel.error(what_instead(&head, self.kernel.len)));
        };
        let size = self.cmdline.len() as u64;
        if size > kernel.cmdline_max {
            bail!(
                "the kernel command line has {size} bytes; {} takes at most {}",
                self.kernel.path.display(),
                kernel.cmdline_max
            );
        }
        write(mem, layout::CMDLINE, &[self.cmdline.as_bytes(), b"\0"].concat())?;
        let initrd = self.load_initrd(mem, layout, &kernel)?;
        let start = match kernel.entry {
            Entry::Linux64(rip) => {
                let header = if linux { boot_linux::header(&head) } else { &[] };
                let page = boot_linux::zero_page(header, kernel.end, layout, initrd, size, rsdp);
                write(mem, layout::ZERO_PAGE, &page)?;
                write(mem, layout::PAGE_TABLES, &page_tables())?;
                Start::Long { rip, boot_params: layout::ZERO_PAGE }
            }
            Entry::Pvh(rip) => {
                write(mem, layout::PVH_INFO, &boot_elf::start_info(layout, initrd, rsdp))?;
                Start::Pvh { rip, start_info: layout::PVH_INFO }
            }
        };
        write(mem, layout::RESET_VECTOR, &RESET_CODE)?;
        write(mem, layout::GDT, &gdt(&start).map(u64::to_le_bytes).concat())?;
        Ok(start)
    }

    /// Puts the initrd as high as the kernel allows, below 3 GiB: out of the way of whatever the
    /// kernel does behind its own end.
    fn load_initrd(&mut self, mem: &Mem, layout: &Layout, kernel: &Kernel) -> Result<Option<Initrd>> {
        let Some(source) = &mut self.initrd else { return Ok(None) };
        if source.len == 0 {
            return Err(source.error("an empty file is no initrd"));
        }
        let end = layout.low.min(kernel.initrd_max.saturating_add(1));
        let at = end.checked_sub(source.len).map(|at| at & !0xfff).filter(|at| *at >= kernel.end);
        let Some(at) = at else {
            return Err(source.error(format!(
                "its {} bytes do not fit between the kernel's end at {:#x} and {end:#x} (the guest has {} MiB)",
                source.len,
                kernel.end,
                (layout.low + layout.high) >> 20
            )));
        };
        read_into(source, 0, mem, at, source.len)?;
        Ok(Some((at, source.len)))
    }
}

/// Reads `len` bytes of `source` from `from` to guest memory at `to`.
fn read_into(source: &mut Source, from: u64, mem: &Mem, to: u64, len: u64) -> Result<()> {
    use std::io::{Seek, SeekFrom};
    source.file.seek(SeekFrom::Start(from)).map_err(|e| source.error(strerror(&e)))?;
    let len = usize::try_from(len).map_err(|e| source.error(e))?;
    mem.map()
        .read_exact_volatile_from(GuestAddress(to), &mut source.file, len)
        .map_err(|e| source.error(format!("cannot be read into guest memory: {e}")))
}

/// Writes boot data. It fails only when the layout is wrong: below 1 MiB there is always RAM.
pub fn write(mem: &Mem, at: u64, data: &[u8]) -> Result<()> {
    match mem.write(at, data) {
        true => Ok(()),
        false => bail!("{} bytes of boot data at {at:#x} do not fit into guest memory", data.len()),
    }
}

/// What a file is that is no kernel we know.
fn what_instead(head: &[u8; HEAD], len: u64) -> String {
    let kind = match head {
        _ if len < HEAD as u64 => return format!("not a kernel: it has only {len} bytes"),
        [0x1f, 0x8b, ..] => "it is compressed with gzip: unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed with xz: unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed with zstd: unpack it first",
        [b'Q', b'F', b'I', 0xfb, ..] => "it is a qcow2 disk image",
        _ if head[0x38..0x3c] == *b"ARM\x64" => "it is a kernel for arm64, not x86-64",
        _ if head[0x38..0x3c] == *b"RSC\x05" => "it is a kernel for RISC-V, not x86-64",
        [b'M', b'Z', ..] => "it is an EFI program, but not a Linux kernel",
        _ => "neither a bzImage nor an ELF file",
    };
    format!("not a kernel: {kind}")
}

/// The page tables of [`layout::PAGE_TABLES`]: the first 4 GiB mapped to themselves by 2 MiB pages.
/// The boot protocol asks only for the kernel and its boot data; with 4 GiB a small guest reaches
/// the devices too without tables of its own.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut out = Vec::with_capacity((layout::PAGE_TABLES_END - layout::PAGE_TABLES) as usize);
    let mut table = |entries: &mut dyn Iterator<Item = u64>| {
        let from = out.len();
        entries.for_each(|e: u64| out.extend(e.to_le_bytes()));
        out.resize(from + 0x1000, 0);
    };
    let page = |n: u64| (layout::PAGE_TABLES + n * 0x1000) | PRESENT_WRITABLE;
    table(&mut [page(1)].into_iter());
    table(&mut (2..6).map(page));
    for gib in 0..4u64 {
        table(&mut (0..512u64).map(|n| gib << 30 | n << 21 | LARGE | PRESENT_WRITABLE));
    }
    out
}

#[cfg(test)]
#[path = "boot_test.rs"]
pub(super) mod tests;
