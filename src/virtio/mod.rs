//! Virtio: the queues, the one worker loop, the transport, and the devices.
//!
//! A device is two things: its face ([`device::VirtioDevice`]: numbers, features, configuration
//! space), which the transport shows to the guest, and its work ([`device::Worker`]), which the
//! loop in `worker.rs` runs on a thread that exists only between DRIVER_OK and reset.

pub mod blk;
mod blk_io;
pub mod device;
pub mod kick;
pub mod kinds;
pub mod net;
mod net_io;
pub mod pci;
pub mod properties;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod scsi;
mod scsi_cd;
mod scsi_control;
mod scsi_disk;
mod scsi_io;
mod scsi_kinds;
mod scsi_pages;
pub mod scsi_sense;
#[cfg(test)]
mod scsi_testing;
pub mod scsi_unit;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
pub mod testing_pci;
pub mod worker;
