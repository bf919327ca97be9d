//! Where everything lies in the guest's physical address space and on its I/O ports.
//!
//! Owns: every fixed guest address. Never: maps or writes anything. Threads: any. Locks: none.
//!
//! ```text
//!                     0 ┌──────────────────────────────┐
//!                0x6000 │ GDT, PVH start info, memmap  │ ┐ written by boot.rs; usable RAM
//!                0x7000 │ boot_params ("zero page")    │ │ for the guest after it has read them
//!                0x8000 │ boot stack (grows down)      │ │
//!                0x9000 │ page tables: 4 GiB, 2M pages │ │
//!               0x20000 │ kernel command line, ≤ 64 K  │ ┘
//!               0x9fc00 ├──────────────────────────────┤ reserved: EBDA, VGA hole, ROMs
//!               0xe0000 │ ACPI: RSDP first, then tables│
//!               0xffff0 │ reset vector: code that resets│
//!              0x100000 ├──────────────────────────────┤ 1 MiB
//!                       │ kernel … initrd (high end)   │ RAM, up to 3 GiB
//!            0xc0000000 ├──────────────────────────────┤ 3 GiB: the hole begins
//!                       │ BARs, 32-bit window, 512 MiB │
//!            0xe0000000 │ ECAM: 256 buses × 1 MiB      │
//!            0xf0000000 │ (nothing)                    │
//!            0xfec00000 │ IOAPIC                       │
//!            0xfee00000 │ local APICs, MSI             │
//!            0xfffbc000 │ Intel: identity map, TSS     │ (KVM's own, not seen by the guest)
//!           0x100000000 ├──────────────────────────────┤ 4 GiB
//!                       │ the rest of RAM              │
//!                       ├──────────────────────────────┤ next GiB boundary
//!                       │ BARs, 64-bit window          │ to the end of physical addresses,
//!                       └──────────────────────────────┘ at most 256 GiB
//! ```

use std::ops::Range;

/// The GDT for kernels that start in protected or long mode (Linux/x86 boot protocol: CS 0x10, DS 0x18).
pub const GDT: u64 = 0x6000;
/// `hvm_start_info`, followed by its memory map (Xen's PVH protocol). Shares the GDT's page:
/// every page touched before the guest runs costs a page fault of start-up time.
pub const PVH_INFO: u64 = 0x6100;
/// `boot_params` of the Linux/x86 boot protocol; one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; the page below it is the stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, PDPT and four page directories that map the first 4 GiB to itself.
pub const PAGE_TABLES: u64 = 0x9000;
/// End of the boot data that `boot.rs` writes below the command line.
pub const PAGE_TABLES_END: u64 = PAGE_TABLES + 6 * 0x1000;
/// The kernel command line, terminated by a zero byte.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line and its zero byte. Linux itself takes 2048 bytes; other kernels more.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// First address above the conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// RSDP and tables; Linux also looks for the RSDP here by scanning.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI area.
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where software jumps, in real mode at f000:fff0, to have the firmware reset the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM for kernels begins.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Where RAM below 4 GiB ends at the latest.
pub const HOLE: u64 = 0xc000_0000;
/// 4 GiB: where RAM goes on.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// BARs below 4 GiB.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express enhanced configuration space: bus << 20 | device << 15 | function << 12.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers, and the addresses of MSI.
pub const LAPIC: u64 = 0xfee0_0000;
/// Intel without "unrestricted guest": one page for KVM's identity map …
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// … and three for its real-mode TSS.
pub const TSS: u64 = 0xfffb_d000;

/// The first serial port (COM1) and its IOAPIC pin.
pub const COM1: (u16, u8) = (0x3f8, 4);
/// The i8042 keyboard controller: 0x60 and 0x64; pins 1 and 12.
pub const I8042_IRQ: (u8, u8) = (1, 12);
/// CMOS index and data; pin 8.
pub const CMOS: (u16, u8) = (0x70, 8);
/// ACPI: sleep control, sleep status, reset, and the event register (`acpi_pm.rs`).
pub const ACPI_PM: u16 = 0x600;
/// Ports of [`ACPI_PM`].
pub const ACPI_PM_LEN: u16 = 16;
/// The generic event device's IOAPIC pin.
pub const GED_IRQ: u8 = 9;
/// PCI configuration mechanism #1: address and data.
pub const PCI_CONF1: u16 = 0xcf8;
/// INTA# of a function on PCI slot `n` is IOAPIC pin `PCI_IRQ + n % 4`, level, active high
/// (`_PRT` in the ACPI tables says so).
pub const PCI_IRQ: u8 = 16;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u32 = 24;

/// Smallest memory of a guest, in bytes.
pub const MEMORY_MIN: u64 = 16 << 20;
/// Processors at most.
pub const CPUS_MAX: usize = 64;

/// What depends on the size of memory and on the processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM from address 0.
    pub low: u64,
    /// Bytes of RAM from 4 GiB.
    pub high: u64,
    /// BARs above 4 GiB.
    pub mmio64: Range<u64>,
}

impl Layout {
    /// The layout for `memory` bytes of RAM on a processor with `phys_bits` bits of physical
    /// address; None when the memory does not fit.
    pub fn new(memory: u64, phys_bits: u32) -> Option<Layout> {
        const GIB: u64 = 1 << 30;
        let end = 1u64 << phys_bits.clamp(36, 52);
        let (low, high) = (memory.min(HOLE), memory.saturating_sub(HOLE));
        let start = HOLE_END.checked_add(high)?.checked_next_multiple_of(GIB)?;
        // One GiB for BARs must be left, or no device could be reached.
        if start.checked_add(GIB)? > end {
            return None;
        }
        Some(Layout { low, high, mmio64: start..end.min(start + 256 * GIB) })
    }

    /// The ranges of RAM: start and length.
    pub fn ram(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        [(0, self.low), (HOLE_END, self.high)].into_iter().filter(|(_, len)| *len > 0)
    }

    /// The memory map as firmware would report it, in order: start, length, kind.
    pub fn e820(&self) -> Vec<(u64, u64, E820)> {
        let mut map = vec![
            (0, LOW_RAM_END, E820::Ram),
            (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, E820::Reserved),
            (HIGH_RAM, self.low - HIGH_RAM, E820::Ram),
            // Linux believes MCFG only when the range is reserved here or by an ACPI device.
            (ECAM.start, ECAM.end - ECAM.start, E820::Reserved),
        ];
        if self.high > 0 {
            map.push((HOLE_END, self.high, E820::Ram));
        }
        map
    }
}

/// Kinds of memory in the memory map (ACPI 6.5, 15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum E820 {
    /// Usable.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
