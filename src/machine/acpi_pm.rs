//! The ACPI registers of a hardware-reduced platform: sleep, reset, and the events behind the GED.
//!
//! Owns: the ports `layout::ACPI_PM` … and which events the guest has not yet fetched. Never:
//! knows what AML does with them (`acpi.rs` writes it). Threads: vCPUs read and write; control
//! raises events. Locks: one mutex, then the IOAPIC's.
//!
//! | port | width | |
//! |---|---|---|
//! | +0 | 1 | sleep control (ACPI 6.5, 4.8.3.7): SLP_EN is bit 5, SLP_TYP bits 2–4 |
//! | +1 | 1 | sleep status (4.8.3.8): WAK_STS is bit 7; never set, since nothing but S5 exists |
//! | +2 | 1 | reset (4.8.3.6): the value [`RESET_VALUE`] resets the machine |
//! | +4 | 4 | events: reading fetches and clears them; the bits are [`EVENT_POWER_BUTTON`] … |

use super::bus::{BusDevice, Effect};
use super::irq::Line;
use crate::event::Event;
use std::sync::{Mutex, PoisonError};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// Offset of the event register.
pub const EVENTS: u16 = 4;
/// What resets the machine when written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, as `\_S5` says.
pub const SLP_TYP_S5: u8 = 5;
/// The power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1;

/// The registers.
pub struct AcpiPm {
    events: Mutex<u32>,
    line: Line,
}

impl AcpiPm {
    /// Registers whose events raise `line` (edge triggered).
    pub fn new(line: Line) -> AcpiPm {
        AcpiPm { events: Mutex::new(0), line }
    }

    /// Tells the guest that `event` has happened.
    pub fn raise(&self, event: u32) {
        // Under the lock until the line is set: else a fetch on a vCPU between the two could
        // lower the line first, and it would stay high with nothing to fetch, deaf for good.
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        *events |= event;
        self.line.set(false);
        self.line.set(true);
    }

    /// Back to power-on state.
    pub fn reset(&self) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        *events = 0;
        self.line.set(false);
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, off: u64, data: &mut [u8]) {
        if off == u64::from(EVENTS) && data.len() == 4 {
            let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            data.copy_from_slice(&events.to_le_bytes());
            *events = 0;
            self.line.set(false);
        }
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        const SLP_EN: u8 = 1 << 5;
        match (off as u16, data) {
            (SLEEP_CONTROL, [v]) if v & SLP_EN != 0 && v >> 2 & 7 == SLP_TYP_S5 => {
                Effect::Post(Event::Shutdown)
            }
            (RESET, [RESET_VALUE]) => Effect::Post(Event::Reset),
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
#[path = "acpi_pm_test.rs"]
mod tests;
