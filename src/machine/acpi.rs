//! The ACPI tables of a hardware-reduced platform.
//!
//! Owns: RSDP, XSDT, FADT, MADT, MCFG and the header of the DSDT, whose content is
//! `acpi_aml.rs`. Never: knows the registers' behaviour (`acpi_pm.rs`). Threads: control. Locks: none.
//!
//! Hardware-reduced (ACPI 6.5, 3.11.1) means no PM1 registers, no SCI, no PM timer and no legacy
//! interrupts that nobody announced: a guest boots with fewer exits, and every device on a line
//! must be in the DSDT. What is without MADT falls back to PIC and PIT, which do not exist here.

use super::acpi_pm;
use super::cpu::Topology;
use super::layout::{self, Layout};
use super::{Platform, acpi_aml};
use crate::bail;
use crate::error::Result;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

const OEM: [u8; 6] = *b"MINIVM";
const TABLE: [u8; 8] = *b"MINIVMM ";
const REVISION: u32 = 1;

// FADT, IA-PC boot architecture flags (ACPI 6.5, table 5.11).
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// All tables as one block for the address [`layout::ACPI`]; it begins with the RSDP.
pub fn build(layout: &Layout, topology: &Topology, platform: &Platform) -> Result<Vec<u8>> {
    // The RSDP comes first, and is filled in last: it points to the XSDT.
    let mut block = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        // Alignment is a courtesy to the guest's parser; the specification asks for none.
        block.resize(block.len().next_multiple_of(16), 0);
        let at = layout::ACPI + block.len() as u64;
        table.to_aml_bytes(&mut Block(&mut block));
        at
    };
    let dsdt = place(&dsdt(layout, platform));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(place(&fadt(dsdt, platform)));
    xsdt.add_entry(place(&madt(topology)));
    if platform.pci {
        let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
        let buses = (layout::ECAM.end - layout::ECAM.start) >> 20;
        mcfg.add_ecam(layout::ECAM.start, 0, 0, (buses - 1) as u8);
        xsdt.add_entry(place(&mcfg));
    }
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block[..rsdp.len()].copy_from_slice(&rsdp);
    if block.len() as u64 > layout::ACPI_END - layout::ACPI {
        bail!("the ACPI tables have {} bytes: more than there is room for", block.len());
    }
    Ok(block)
}

/// Appends to a vector in whole slices: the crate's own sink for vectors pushes byte by byte.
struct Block<'a>(&'a mut Vec<u8>);

impl AmlSink for Block<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
    fn vec(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
}

fn dsdt(layout: &Layout, platform: &Platform) -> Sdt {
    // Revision 2 and above: AML's integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&acpi_aml::dsdt(layout, platform));
    dsdt
}

fn fadt(dsdt: u64, platform: &Platform) -> impl Aml {
    let port = |off: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::ACPI_PM + off))
    };
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // Both buttons are not among the fixed registers, which do not exist: control methods.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    fadt.reset_reg = port(acpi_pm::RESET);
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.sleep_control_reg = port(acpi_pm::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(acpi_pm::SLEEP_STATUS);
    let boot_arch = NO_VGA
        | flag(!platform.serial.is_empty(), LEGACY_DEVICES)
        | flag(platform.i8042, HAS_8042)
        | flag(!platform.cmos, NO_CMOS_RTC);
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.finalize()
}

fn madt(topology: &Topology) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC as u32));
    for index in 0..topology.cpus() {
        let id = topology.apic_id(index) as u8;
        madt.add_structure(ProcessorLocalApic::new(index as u8, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

#[cfg(test)]
#[path = "acpi_test.rs"]
mod tests;
