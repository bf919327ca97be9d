//! A function on a slot: what the PCI root needs from a device ([`PciDevice`]), and how its
//! configuration space leads to mapped registers ([`Function`]).
//!
//! Owns: one configuration space, and which of its BARs are on the memory bus. Never: knows what a
//! register does. Threads: vCPUs read and write the configuration; control plugs, resets, unplugs.
//! Locks: `config` for the bytes, never held while anything is called; `mapped` while BARs move,
//! taken with no bus lock held.

use super::config::{Capability, Config, LEN, reg};
use super::msix::Msix;
use crate::machine::bus::{Bus, BusDevice, Effect};
use crate::machine::irq::Line;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// A device on a slot.
pub trait PciDevice: Send + Sync {
    /// The numbers of its header.
    fn ident(&self) -> Ident;
    /// Its BARs.
    fn bars(&self) -> Vec<BarSpec>;
    /// The registers behind BAR `index`.
    fn bar(&self, index: u8) -> Arc<dyn BusDevice>;
    /// Its capabilities, except MSI-X.
    fn capabilities(&self) -> Vec<Capability> {
        Vec::new()
    }
    /// Which of [`PciDevice::capabilities`] is a window on the BARs through configuration space
    /// (virtio 1.2, 4.1.4.9): BAR at byte 4 of the capability, offset at 8, length at 12, data at 16.
    fn window(&self) -> Option<usize> {
        None
    }
    /// Its MSI-X vectors. The device itself answers for table and pending bits in their BAR.
    fn msix(&self) -> Option<&Msix> {
        None
    }
    /// Its interrupt pin, when it is plugged.
    fn connect(&self, pin: Arc<Pin>) {
        let _ = pin;
    }
    /// Back to power-on state. Returns when no thread of the device touches the guest.
    fn reset(&self);
    /// Stop taking work, keep what is queued; returns when no thread touches the guest.
    fn pause(&self);
    /// Go on after [`PciDevice::pause`].
    fn resume(&self);
    /// Unplug or quit: as reset, for good.
    fn stop(&self);
}

/// An interrupt line that several pins share: high while one of them is.
pub struct SharedLine {
    line: Line,
    asserted: Mutex<u32>,
}

impl SharedLine {
    /// Nobody asserts it.
    pub fn new(line: Line) -> SharedLine {
        SharedLine { line, asserted: Mutex::new(0) }
    }

    fn set(&self, slot: u8, high: bool) {
        let mut asserted = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *asserted != 0;
        *asserted = *asserted & !(1 << slot) | u32::from(high) << slot;
        if (*asserted != 0) != before {
            self.line.set(!before);
        }
    }
}

/// A function's INTA#.
pub struct Pin {
    line: Arc<SharedLine>,
    slot: u8,
    /// What the device wants, and whether INTx is off (INTX_DISABLE, or MSI-X is on).
    state: Mutex<(bool, bool)>,
}

impl Pin {
    /// The pin of the function on `slot` (0 to 31).
    pub fn new(line: Arc<SharedLine>, slot: u8) -> Pin {
        Pin { line, slot: slot & 31, state: Mutex::new((false, false)) }
    }

    fn update(&self, f: impl FnOnce(&mut (bool, bool))) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut state);
        self.line.set(self.slot, state.0 && !state.1);
    }

    /// Asserts it or not.
    pub fn set(&self, high: bool) {
        self.update(|state| state.0 = high);
    }

    /// Keeps it silent, whatever the device wants.
    fn set_off(&self, off: bool) {
        self.update(|state| state.1 = off);
    }
}

/// See the module's head.
pub struct Function {
    device: Arc<dyn PciDevice>,
    bus: Arc<Bus>,
    pin: Arc<Pin>,
    bars: Vec<BarSpec>,
    /// As it is after reset: with the BARs where the root put them.
    fresh: Config,
    config: Mutex<Config>,
    /// Offsets of the MSI-X capability and of the window.
    msix: Option<usize>,
    window: Option<usize>,
    mapped: Mutex<Mapped>,
}

#[derive(Default)]
struct Mapped {
    /// The address of each BAR that is on the bus.
    at: Vec<Option<u64>>,
    /// Unplugged: a processor that was about to move a BAR comes too late.
    gone: bool,
}

impl Function {
    /// A function with its BARs at `bases`, in the order of [`PciDevice::bars`]; nothing is decoded
    /// yet.
    pub fn new(device: Arc<dyn PciDevice>, bus: Arc<Bus>, pin: Arc<Pin>, bases: &[u64]) -> Arc<Function> {
        let bars = device.bars();
        let mut config = Config::new(device.ident());
        bars.iter().zip(bases).for_each(|(bar, base)| config.add_bar(bar, *base));
        let caps = device.capabilities();
        let places: Vec<_> = caps.iter().map(|cap| config.add_capability(cap)).collect();
        let window = device.window().and_then(|n| places.get(n).copied());
        let msix = device.msix().map(|msix| config.add_capability(&msix.capability()));
        if !bars.is_empty() {
            config.set(reg::INTERRUPT_PIN, &[1]);
        }
        device.connect(pin.clone());
        let mapped = Mutex::new(Mapped { at: vec![None; bars.len()], gone: false });
        let fresh = config.clone();
        Arc::new(Function { device, bus, pin, bars, fresh, config: Mutex::new(config), msix, window, mapped })
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn PciDevice> {
        &self.device
    }

    fn lock(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of configuration space. Beyond its 256 bytes are zeroes: no extended capabilities.
    pub fn read(&self, off: usize, data: &mut [u8]) {
        let config = self.lock();
        config.read(off, data);
        let Some((bar, at, len)) = self.window_target(&config, off, data.len()) else { return };
        drop(config);
        let mut word = [0; 4];
        self.device.bar(bar).read(at, &mut word[..len]);
        // As much of it as the access asks for.
        let n = data.len().min(4);
        data[..n].copy_from_slice(&word[..n]);
    }

    /// A write to configuration space.
    pub fn write(self: &Arc<Self>, off: usize, data: &[u8]) -> Effect {
        let touches = |at: usize, len: usize| off < at + len && at < off + data.len();
        let mut config = self.lock();
        config.write(off, data);
        let command = config.command();
        let control = self.msix.map(|at| {
            let mut word = [0; 2];
            config.read(at + 2, &mut word);
            (at, u16::from_le_bytes(word))
        });
        let target = self.window_target(&config, off, data.len());
        drop(config);
        let mut messages = self.device.msix().is_some_and(Msix::is_enabled);
        if let (Some(msix), Some((at, control))) = (self.device.msix(), control)
            && touches(at + 2, 2)
        {
            msix.set_control(control);
            messages = msix.is_enabled();
            self.pin.set_off(messages || command & reg::COMMAND_INTX_DISABLE != 0);
        }
        if touches(reg::COMMAND, 2) {
            self.pin.set_off(messages || command & reg::COMMAND_INTX_DISABLE != 0);
        }
        if touches(reg::COMMAND, 2) || touches(reg::BARS, reg::BARS_END - reg::BARS) {
            let this = self.clone();
            return Effect::Run(Box::new(move || this.remap()));
        }
        match target {
            Some((bar, at, len)) if data.len() >= len => self.device.bar(bar).write(at, &data[..len]),
            _ => Effect::None,
        }
    }

    /// What an access to the window's data goes to: BAR, offset, length; None when it goes nowhere.
    fn window_target(&self, config: &Config, off: usize, _len: usize) -> Option<(u8, u64, usize)> {
        let at = self.window.filter(|at| off == at + 16)?;
        let word = |n: usize| {
            let mut word = [0; 4];
            config.read(at + n, &mut word);
            u32::from_le_bytes(word)
        };
        let (index, start, len) = (word(4) as u8, u64::from(word(8)), word(12));
        let bar = self.bars.iter().find(|b| b.index == index)?;
        let fits = matches!(len, 1 | 2 | 4) && start % u64::from(len) == 0;
        (fits && start + u64::from(len) <= bar.size).then_some((index, start, len as usize))
    }

    /// Puts the BARs on the bus where the configuration says now. With no bus lock held.
    pub fn remap(&self) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if mapped.gone {
            return;
        }
        let wanted: Vec<Option<u64>> = {
            let config = self.lock();
            let decodes = config.command() & reg::COMMAND_MEMORY != 0;
            self.bars.iter().map(|bar| decodes.then(|| config.bar(bar))).collect()
        };
        self.map(&mut mapped.at, &wanted);
    }

    fn map(&self, mapped: &mut [Option<u64>], wanted: &[Option<u64>]) {
        for (now, want) in mapped.iter_mut().zip(wanted) {
            if now != want
                && let Some(base) = now.take()
            {
                self.bus.remove(base);
            }
        }
        for ((now, want), bar) in mapped.iter_mut().zip(wanted).zip(&self.bars) {
            if let (None, Some(base)) = (&now, want) {
                // Where something else is decoded the BAR stays unreachable until it moves on.
                if self.bus.add(*base, bar.size, self.device.bar(bar.index)) {
                    *now = Some(*base);
                }
            }
        }
    }

    /// Takes the BARs off the bus, perhaps for good; returns when no access is in flight.
    fn unmap(&self, gone: bool) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.gone |= gone;
        self.map(&mut mapped.at, &vec![None; self.bars.len()]);
    }

    /// Back to the state after plugging. The processors are stopped.
    pub fn reset(&self) {
        *self.lock() = self.fresh.clone();
        self.unmap(false);
        self.device.reset();
        if let Some(msix) = self.device.msix() {
            msix.reset();
        }
        self.pin.set(false);
        self.pin.set_off(false);
    }

    /// Off the bus, then stopped.
    pub fn unplug(&self) {
        self.unmap(true);
        self.device.stop();
        self.pin.set(false);
    }
}

// A virtio function's list of capabilities fits the space.
const _: () = assert!(0x40 + 4 * 16 + 20 + 20 + 12 <= LEN);

#[cfg(test)]
#[path = "function_test.rs"]
mod tests;
