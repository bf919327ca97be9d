//! Devices that are not on PCI: serial port, keyboard controller, clock, debug exit.
//!
//! Each is a [`crate::machine::bus::BusDevice`] for the port bus. Knows no threads and no files: a
//! serial port gets a [`crate::chardev::chardev::Chardev`].

pub mod cmos;
pub mod debug_exit;
pub mod i8042;
pub mod serial;
#[cfg(test)]
mod testing;
