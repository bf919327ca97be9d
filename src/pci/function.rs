//! What the PCI root needs from a device: [`PciDevice`].

use crate::machine::bus::BusDevice;
use std::sync::Arc;

/// The numbers that a driver finds a function by (PCI 3.0, 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ident {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, subclass, interface (24 bits).
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A base address register: 64-bit or 32-bit memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Index of the (first) register, 0 to 5.
    pub index: u8,
    /// Bytes; a power of two, at least 16.
    pub size: u64,
    /// Takes two registers and may lie above 4 GiB.
    pub is_64bit: bool,
    /// Reads have no side effects.
    pub prefetchable: bool,
}

/// A function on a slot. `pci/root.rs` decodes its configuration space and puts its BARs on the
/// memory bus.
pub trait PciDevice: Send + Sync {
    /// The numbers of its header.
    fn ident(&self) -> Ident;
    /// Its BARs, except that of MSI-X.
    fn bars(&self) -> Vec<BarSpec>;
    /// The registers behind BAR `index`.
    fn bar(&self, index: u8) -> Arc<dyn BusDevice>;
    /// Back to power-on state. Returns when no thread of the device touches the guest.
    fn reset(&self);
    /// Stop taking work, keep what is queued; returns when no thread touches the guest.
    fn pause(&self);
    /// Go on after [`PciDevice::pause`].
    fn resume(&self);
    /// Unplug or quit: as reset, for good.
    fn stop(&self);
}
