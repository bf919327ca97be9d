//! The IOAPIC (Intel 82093AA and its successors in the ICH), in user space beside the kernel's local APICs.
//!
//! Owns: the redirection table and the pins' levels. Never: delivers (it says which message to
//! send; `irq.rs` sends). Threads: any, through `irq.rs`. Locks: none; it lives in a mutex there.
//!
//! A pin in level mode sends one message, sets Remote IRR and sends none until the end of that
//! interrupt: by KVM_EXIT_IOAPIC_EOI with the vector, or by the guest's write to the EOI register.

use super::irq::Msi;
use super::layout::{IOAPIC_PINS, LAPIC};

const PINS: usize = IOAPIC_PINS as usize;

// Bits of a redirection entry.
const VECTOR: u64 = 0xff;
const DELIVERY_SHIFT: u32 = 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DEST_SHIFT: u32 = 56;
/// What a guest may write: all but the reserved bits and the two that tell
/// the state: delivery status (12) and Remote IRR (14).
const WRITABLE: u64 = 0xff00_0000_0001_afff;

// Registers in the 4 KiB page, and by index.
const IOREGSEL: u64 = 0;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;
const ID: u8 = 0;
const VER: u8 = 1;
const ARB: u8 = 2;
const REDTBL: u8 = 0x10;
/// 0x20 is the first version with an EOI register; Linux then need not fake one by toggling the mode.
const VERSION: u32 = 0x20 | (IOAPIC_PINS - 1) << 16;

/// The state. Methods say in their result what messages must go out. An edge that comes while its
/// pin is masked is lost, as in the 82093AA.
pub struct Ioapic {
    select: u8,
    id: u8,
    redirect: [u64; PINS],
    /// Level of each pin, one bit each.
    high: u32,
    /// [`Ioapic::level_routes`] differs from what it was when it was last asked for.
    routes_changed: bool,
}

/// Messages to send, at most one a pin.
pub type Messages = Vec<Msi>;

impl Default for Ioapic {
    fn default() -> Self {
        Ioapic { select: 0, id: 0, redirect: [MASKED; PINS], high: 0, routes_changed: false }
    }
}

impl Ioapic {
    /// Power-on state, except for the pins' levels, which the devices drive.
    pub fn reset(&mut self) {
        let had_routes = !self.level_routes().is_empty();
        *self = Ioapic { high: self.high, routes_changed: had_routes, ..Ioapic::default() };
    }

    /// A device drives `pin`. At most one message goes out.
    pub fn set(&mut self, pin: u32, high: bool) -> Option<Msi> {
        if pin >= IOAPIC_PINS {
            return None;
        }
        let (bit, was) = (1 << pin, self.high >> pin & 1 == 1);
        self.high = if high { self.high | bit } else { self.high & !bit };
        let entry = self.redirect[pin as usize];
        match (high, entry & LEVEL != 0) {
            (true, true) => self.service_level(pin as usize),
            (true, false) if !was && entry & MASKED == 0 => message(entry),
            _ => None,
        }
    }

    /// Sends the interrupt of a level pin if it is due.
    fn service_level(&mut self, pin: usize) -> Option<Msi> {
        let entry = self.redirect[pin];
        let due = self.high >> pin & 1 == 1 && entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        let message = due.then(|| message(entry)).flatten()?;
        self.redirect[pin] |= REMOTE_IRR;
        Some(message)
    }

    /// The interrupt `vector` has ended: level pins that are still high send again.
    pub fn eoi(&mut self, vector: u8) -> Messages {
        let mut out = Messages::new();
        for pin in 0..PINS {
            let entry = self.redirect[pin];
            if entry & VECTOR == u64::from(vector) && entry & LEVEL != 0 && entry & REMOTE_IRR != 0 {
                self.redirect[pin] &= !REMOTE_IRR;
                out.extend(self.service_level(pin));
            }
        }
        out
    }

    /// The guest reads a 32-bit register at `off` of the page.
    pub fn read(&self, off: u64) -> u32 {
        match off {
            IOREGSEL => u32::from(self.select),
            IOWIN => match self.select {
                ID | ARB => u32::from(self.id) << 24,
                VER => VERSION,
                index => match self.entry(index) {
                    Some((pin, false)) => self.redirect[pin] as u32,
                    Some((pin, true)) => (self.redirect[pin] >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// The guest writes one.
    pub fn write(&mut self, off: u64, value: u32) -> Messages {
        match off {
            IOREGSEL => self.select = value as u8,
            IOWIN => match self.select {
                ID => self.id = (value >> 24) as u8 & 0xf,
                index => {
                    if let Some((pin, upper)) = self.entry(index) {
                        return self.write_entry(pin, upper, value);
                    }
                }
            },
            EOI => return self.eoi(value as u8),
            _ => {}
        }
        Messages::new()
    }

    fn entry(&self, index: u8) -> Option<(usize, bool)> {
        let n = usize::from(index.checked_sub(REDTBL)?);
        (n / 2 < PINS).then_some((n / 2, n % 2 == 1))
    }

    fn write_entry(&mut self, pin: usize, upper: bool, value: u32) -> Messages {
        let old = self.redirect[pin];
        let asked = match upper {
            true => old & 0xffff_ffff | u64::from(value) << 32,
            false => old & !0xffff_ffff | u64::from(value),
        };
        let mut new = asked & WRITABLE | old & REMOTE_IRR;
        if new & LEVEL == 0 {
            // An edge-triggered pin has no Remote IRR; older kernels clear it in this very way.
            new &= !REMOTE_IRR;
        }
        self.redirect[pin] = new;
        let route = |e: u64| (e & LEVEL != 0).then_some(e & !(REMOTE_IRR | MASKED));
        self.routes_changed |= route(old) != route(new);
        self.service_level(pin).into_iter().collect()
    }

    /// The messages of all level-triggered pins, so that KVM reports the end of their interrupts.
    pub fn level_routes(&self) -> Vec<(u32, Msi)> {
        let level = self.redirect.iter().enumerate().filter(|(_, e)| *e & LEVEL != 0);
        level.filter_map(|(pin, e)| Some((pin as u32, message(*e)?))).collect()
    }

    /// True once after [`Ioapic::level_routes`] has changed.
    pub fn take_routes_changed(&mut self) -> bool {
        std::mem::take(&mut self.routes_changed)
    }
}

/// The message that an entry stands for (Intel SDM 3, 11.11). None for delivery modes that make
/// no sense without a PIC, and for those that are reserved.
fn message(entry: u64) -> Option<Msi> {
    const EXT_INT: u64 = 7;
    let mode = entry >> DELIVERY_SHIFT & 7;
    if matches!(mode, 3 | 6 | EXT_INT) {
        return None;
    }
    let dest = entry >> DEST_SHIFT;
    let addr = LAPIC | dest << 12 | if entry & LOGICAL != 0 { 4 } else { 0 };
    // Bit 14 of the data: level "assert".
    let data = entry & (VECTOR | 7 << DELIVERY_SHIFT | LEVEL) | 1 << 14;
    Some(Msi { addr, data: data as u32 })
}

#[cfg(test)]
#[path = "ioapic_test.rs"]
mod tests;
