//! Character backends: where a serial port or a monitor reads and writes.
//!
//! [`chardev::Chardev`] is the end that a frontend (a serial port) holds, [`chardev::Backend`]
//! what a kind of backend implements. Knows no frontends.

#[allow(clippy::module_inception)] // it is what the others here are made with
pub mod chardev;
pub mod console;
pub mod file;
#[cfg(test)]
pub(crate) mod testing;
