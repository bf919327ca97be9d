//! The PCI root: the host bridge, 31 slots, the ways into configuration space.
//!
//! Owns: which function is on which slot, and the addresses that BARs get. Never: knows a device's
//! class. Threads: vCPUs through [`PciRoot::ecam`] and [`PciRoot::ports`]; control plugs and unplugs.
//! Locks: `slots` (read during an access, so that unplug waits), `address`, `windows`: all leaves.

use super::function::{BarSpec, Function, Ident, PciDevice, Pin, SharedLine};
use crate::bail;
use crate::error::Result;
use crate::machine::bus::{Bus, BusDevice, Effect};
use crate::machine::irq::{Interrupts, Line};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Slots on the one bus.
pub const SLOTS: usize = 32;
/// The lines that INTA# of the slots go to: slot n to `first + n % PINS`.
pub const PINS: usize = 4;

/// The host bridge: numbers, and nothing else.
const BRIDGE: Ident = Ident {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

struct Bridge;

impl PciDevice for Bridge {
    fn ident(&self) -> Ident {
        BRIDGE
    }
    fn bars(&self) -> Vec<BarSpec> {
        Vec::new()
    }
    fn bar(&self, _index: u8) -> Arc<dyn BusDevice> {
        Arc::new(Nothing)
    }
    fn reset(&self) {}
    fn pause(&self) {}
    fn resume(&self) {}
    fn stop(&self) {}
}

struct Nothing;

impl BusDevice for Nothing {
    fn read(&self, _off: u64, _data: &mut [u8]) {}
    fn write(&self, _off: u64, _data: &[u8]) -> Effect {
        Effect::None
    }
}

struct Slot {
    function: Arc<Function>,
    /// Model, and id if it has one, for messages.
    name: String,
    /// Where its BARs are after reset.
    bars: Vec<Range<u64>>,
}

/// See the module's head.
pub struct PciRoot {
    bus: Arc<Bus>,
    lines: [Arc<SharedLine>; PINS],
    window: Range<u64>,
    slots: RwLock<[Option<Slot>; SLOTS]>,
    /// The address port of configuration mechanism #1.
    address: AtomicU32,
    /// Serializes plugging.
    plugging: Mutex<()>,
}

impl PciRoot {
    /// A root with nothing but the host bridge. BARs are put into `window` of the memory bus `bus`;
    /// INTA# goes to the IOAPIC's pins from `first_pin` on.
    pub fn new(
        bus: Arc<Bus>,
        interrupts: &Arc<dyn Interrupts>,
        first_pin: u32,
        window: Range<u64>,
    ) -> Arc<PciRoot> {
        let lines = std::array::from_fn(|n| {
            Arc::new(SharedLine::new(Line::new(interrupts.clone(), first_pin + n as u32)))
        });
        let pin = Arc::new(Pin::new(lines[0].clone(), 0));
        let bridge = Slot {
            function: Function::new(Arc::new(Bridge), bus.clone(), pin, &[]),
            name: "host bridge".into(),
            bars: Vec::new(),
        };
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(bridge);
        Arc::new(PciRoot {
            bus,
            lines,
            window,
            slots: RwLock::new(slots),
            address: AtomicU32::new(0),
            plugging: Mutex::new(()),
        })
    }

    /// Puts `device` on `slot`, or on the first free one; returns which. `name` is for messages:
    /// `virtio-blk-pci,id=disk0`. Its BARs have addresses from now on; the driver switches decoding on.
    pub fn plug(&self, device: Arc<dyn PciDevice>, slot: Option<u8>, name: &str) -> Result<u8> {
        let _one = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = self.find_slot(slot, name)?;
        let mut taken: Vec<Range<u64>> = Vec::new();
        {
            let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
            taken.extend(slots.iter().flatten().flat_map(|s| s.bars.iter().cloned()));
        }
        let mut bars = Vec::new();
        for bar in device.bars() {
            let Some(base) = place(&self.window, &taken, bar.size) else {
                bail!("no address space left for the registers of {name}");
            };
            taken.push(base..base + bar.size);
            bars.push(base..base + bar.size);
        }
        let bases: Vec<u64> = bars.iter().map(|b| b.start).collect();
        let pin = Arc::new(Pin::new(self.lines[usize::from(slot) % PINS].clone(), slot));
        let function = Function::new(device, self.bus.clone(), pin, &bases);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(slot)] = Some(Slot { function, name: name.to_string(), bars });
        Ok(slot)
    }

    /// Which slot `plug` would take; an error when it is not free, or none is.
    pub fn find_slot(&self, wanted: Option<u8>, name: &str) -> Result<u8> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        match wanted {
            Some(n) => match slots.get(usize::from(n)) {
                Some(None) => Ok(n),
                Some(Some(by)) => {
                    bail!("PCI: slot {n} function 0 not available for {name}, in use by {}", by.name)
                }
                None => bail!("PCI: there is no slot {n}"),
            },
            None => match slots.iter().position(Option::is_none) {
                Some(n) => Ok(n as u8),
                None => bail!("PCI: no slot/function available for {name}, all in use or reserved"),
            },
        }
    }

    /// Takes the function off `slot`: first out of the guest's sight, then stopped.
    pub fn unplug(&self, slot: u8) -> bool {
        let _one = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = match self.slots.write().unwrap_or_else(PoisonError::into_inner).get_mut(usize::from(slot))
        {
            Some(slot) => slot.take(),
            None => None,
        };
        gone.inspect(|slot| slot.function.unplug()).is_some()
    }

    /// The function on `slot`.
    pub fn function(&self, slot: u8) -> Option<Arc<Function>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(usize::from(slot))?.as_ref().map(|s| s.function.clone())
    }

    fn all(&self) -> Vec<Arc<Function>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().map(|s| s.function.clone()).collect()
    }

    /// All functions back to the state after plugging. The processors are stopped.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        self.all().iter().for_each(|f| f.reset());
    }

    /// All devices stop taking work; returns when none touches the guest. The processors are
    /// stopped.
    pub fn pause(&self) {
        self.all().iter().for_each(|f| f.device().pause());
    }

    /// All devices go on. Before the processors do.
    pub fn resume(&self) {
        self.all().iter().for_each(|f| f.device().resume());
    }

    /// All devices stop for good. The processors are stopped.
    pub fn stop(&self) {
        self.all().iter().for_each(|f| f.device().stop());
    }

    /// Configuration space in memory (PCI Express, 7.2.2), one bus of 1 MiB; more buses are empty.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(self.clone()))
    }

    /// Configuration mechanism #1: 8 ports (PCI 3.0, 3.2.2.3.2).
    pub fn ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ports(self.clone()))
    }

    /// `place`: bus << 8 | device << 3 | function.
    fn read(&self, place: u64, reg: usize, data: &mut [u8]) {
        match self.find(place) {
            Some(function) => function.read(reg, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, place: u64, reg: usize, data: &[u8]) -> Effect {
        self.find(place).map_or(Effect::None, |function| function.write(reg, data))
    }

    fn find(&self, place: u64) -> Option<Arc<Function>> {
        if place & 7 == 0 && place >> 8 == 0 { self.function((place >> 3) as u8) } else { None }
    }
}

/// The lowest free place for `size` bytes (a power of two) in `window`, aligned to its size and
/// to a page, so that two functions never share one.
fn place(window: &Range<u64>, taken: &[Range<u64>], size: u64) -> Option<u64> {
    let align = size.max(0x1000);
    let mut base = window.start.checked_next_multiple_of(align)?;
    loop {
        let end = base.checked_add(align).filter(|end| *end <= window.end)?;
        match taken.iter().find(|t| t.start < end && base < t.end) {
            Some(t) => base = t.end.checked_next_multiple_of(align)?,
            None => return Some(base),
        }
    }
}

struct Ecam(Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, off: u64, data: &mut [u8]) {
        self.0.read(off >> 12, (off & 0xfff) as usize, data);
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        self.0.write(off >> 12, (off & 0xfff) as usize, data)
    }
}

struct Ports(Arc<PciRoot>);

impl Ports {
    /// What the data port stands for now, at its byte `off`: place and register.
    fn target(&self, off: u64) -> Option<(u64, usize)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let enabled = address >> 31 != 0;
        enabled.then_some((u64::from(address >> 8 & 0xffff), (address & 0xfc) as usize + (off & 3) as usize))
    }
}

impl BusDevice for Ports {
    fn read(&self, off: u64, data: &mut [u8]) {
        let address = self.0.address.load(Ordering::Relaxed).to_le_bytes();
        match (off, self.target(off)) {
            (0, _) if data.len() == 4 => data.copy_from_slice(&address),
            (4.., Some((place, reg))) => self.0.read(place, reg, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        match (off, data, self.target(off)) {
            (0, &[a, b, c, d], _) => {
                self.0.address.store(u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc, Ordering::Relaxed);
                Effect::None
            }
            (4.., _, Some((place, reg))) => self.0.write(place, reg, data),
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
#[path = "root_test.rs"]
mod tests;
