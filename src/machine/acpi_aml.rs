//! The DSDT's content: which devices at fixed places there are, in AML.
//!
//! Owns: the namespace. Never: makes a table of it (`acpi.rs`). Threads: control. Locks: none.
//!
//! ```text
//! \_S5        power off: SLP_TYP 5
//! \_SB.PCI0   the PCI root: buses and windows        (PNP0A08)
//! \_SB.MRES   ports and ECAM, so that nobody else takes them (PNP0C02)
//! \_SB.PWRB   the power button, a control method     (PNP0C0C)
//! \_SB.GED    generic event device (ACPI0013): one edge-triggered pin; _EVT fetches what has
//!             happened from the event register and notifies. Later hot-plug adds bits here.
//! \_SB.COMn, PS2K, RTC   devices on interrupt lines
//! ```
//!
//! `system_powerdown` in a stock Debian guest: GED's interrupt → `_EVT` → Notify(PWRB, 0x80) → the
//! `button` driver (a module; udev loads it for PNP0C0C) sends KEY_POWER through the input layer →
//! `systemd-logind` (which needs `evdev`, also loaded by udev) or acpid switches off. A guest
//! without one of them ignores the button, as on real hardware.

use super::Platform;
use super::acpi_pm;
use super::layout::{self, Layout};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};

/// `Notify` of a button: pressed (ACPI 6.5, 5.6.6).
const PRESSED: u8 = 0x80;

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

fn device(path: &str, hid: &str, uid: u8, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let (hid, uid) = (name("_HID", &EISAName::new(hid)), name("_UID", &uid));
    let crs = name("_CRS", &ResourceTemplate::new(resources));
    bytes(&Device::new(path.into(), vec![&hid, &uid, &crs]))
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    aml.to_aml_bytes(&mut out);
    out
}

/// An edge-triggered, active-high pin of its own.
fn irq(gsi: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(gsi))
}

fn ports(base: u16, len: u8) -> IO {
    IO::new(base, base, 1, len)
}

/// The definition block.
pub fn dsdt(layout: &Layout, platform: &Platform) -> Vec<u8> {
    let mut out = bytes(&name("_S5_", &Package::new(vec![&acpi_pm::SLP_TYP_S5, &ZERO, &ZERO, &ZERO])));
    let mut system = Vec::new();
    if platform.pci {
        system.extend(pci(layout));
    }
    system.extend(reserved(platform));
    system.extend(bytes(&Device::new("PWRB".into(), vec![&name("_HID", &EISAName::new("PNP0C0C"))])));
    system.extend(event_device());
    for (n, &(base, pin)) in platform.serial.iter().enumerate().take(9) {
        let path = format!("COM{}", n + 1);
        system.extend(device(&path, "PNP0501", n as u8, vec![&ports(base, 8), &irq(pin)]));
    }
    if platform.i8042 {
        let (data, command, pin) = (ports(0x60, 1), ports(0x64, 1), irq(layout::I8042_IRQ.0));
        system.extend(device("PS2K", "PNP0303", 0, vec![&data, &command, &pin]));
    }
    if platform.cmos {
        let (port, pin) = layout::CMOS;
        system.extend(device("RTC_", "PNP0B00", 0, vec![&ports(port, 2), &irq(pin)]));
    }
    out.extend(Scope::raw("_SB_".into(), system));
    out
}

/// The PCI root bridge. It has no port window: no device has port BARs.
fn pci(layout: &Layout) -> Vec<u8> {
    use AddressSpaceCacheable::{NotCacheable, PreFetchable};
    let (low, high) = (layout::MMIO32, &layout.mmio64);
    let buses = ((layout::ECAM.end - layout::ECAM.start) >> 20) as u16;
    let buses = AddressSpace::new_bus_number(0u16, buses - 1);
    let low = AddressSpace::new_memory(NotCacheable, true, low.start as u32, low.end as u32 - 1, None);
    let high = AddressSpace::new_memory(PreFetchable, true, high.start, high.end - 1, None);
    let crs = ResourceTemplate::new(vec![&buses, &low, &high]);
    // INTA# of each slot (ACPI 6.5, 6.2.13), for drivers that use no MSI-X: address, pin, no link
    // device, IOAPIC pin.
    let routes: Vec<_> =
        (1..32u32).map(|slot| (slot << 16 | 0xffff, layout::PCI_IRQ + (slot % 4) as u8)).collect();
    let routes: Vec<_> =
        routes.iter().map(|(address, pin)| Package::new(vec![address, &ZERO, &ZERO, pin])).collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    let parts: [&dyn Aml; 7] = [
        &name("_HID", &EISAName::new("PNP0A08")),
        &name("_PRT", &routes),
        &name("_CID", &EISAName::new("PNP0A03")),
        &name("_SEG", &ZERO),
        &name("_BBN", &ZERO),
        &name("_UID", &ZERO),
        &name("_CRS", &crs),
    ];
    bytes(&Device::new("PCI0".into(), parts.to_vec()))
}

/// What no driver may take: our registers, and ECAM (Linux believes MCFG only with this).
fn reserved(platform: &Platform) -> Vec<u8> {
    let pm = ports(layout::ACPI_PM, layout::ACPI_PM_LEN as u8);
    let ecam = &layout::ECAM;
    let ecam = Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32);
    let mut resources: Vec<&dyn Aml> = vec![&pm];
    if platform.pci {
        resources.push(&ecam);
    }
    device("MRES", "PNP0C02", 0, resources)
}

/// The generic event device (ACPI 6.5, 5.6.9).
fn event_device() -> Vec<u8> {
    let (at, len) = (layout::ACPI_PM + acpi_pm::EVENTS, 4u8);
    let region = OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &at, &len);
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVTS", 32)],
    );
    let (events, happened) = (Path::new("EVTS"), Local(0));
    let fetch = Store::new(&happened, &events);
    let button = Path::new("PWRB");
    let notify = Notify::new(&button, &PRESSED);
    let pressed = And::new(&ZERO, &happened, &acpi_pm::EVENT_POWER_BUTTON);
    let on_press = If::new(&pressed, vec![&notify]);
    let method = Method::new("_EVT".into(), 1, true, vec![&fetch, &on_press]);
    let (pin, hid) = (irq(layout::GED_IRQ), name("_HID", &"ACPI0013"));
    let crs = name("_CRS", &ResourceTemplate::new(vec![&pin]));
    let parts: [&dyn Aml; 6] = [&hid, &name("_UID", &ZERO), &crs, &region, &field, &method];
    bytes(&Device::new("GED_".into(), parts.to_vec()))
}
