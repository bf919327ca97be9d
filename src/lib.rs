//! minivmm: a small, synchronous KVM virtual machine monitor whose control plane is QEMU's QMP.
//!
//! One thread (control) owns everything that has a name; device, vCPU and job threads only *do*,
//! reach the disk through a gate that the owner can close, and say what happened by putting an
//! event in the owner's inbox. The floors, top to bottom; imports go down only:
//!
//! ```text
//! main.rs    startup.rs
//! config.rs  args.rs
//! qmp/        wire, client, schema, events; one cmd_*.rs an area
//! control/    the one owner: Vm, event loop, run state
//! virtio/     transport, worker loop, devices
//! jobs/       block jobs
//! qcow2/      nbd/        devices/    pci/
//! block/      net/        chardev/    machine/
//! qapi/       sys/        error.rs    event.rs
//! ```
// The library is read by those who work on it: a module's head may speak of what is private.
#![allow(rustdoc::private_intra_doc_links)]

// The kit that unit tests share with the tests under `tests/` says `minivmm::`.
#[cfg(test)]
extern crate self as minivmm;

pub mod args;
pub mod block;
pub mod chardev;
pub mod config;
mod config_tables;
pub mod config_tree;
pub mod control;
pub mod devices;
pub mod error;
pub mod event;
pub mod jobs;
pub mod machine;
pub mod nbd;
pub mod net;
pub mod pci;
pub mod qapi;
pub mod qcow2;
pub mod qmp;
pub mod startup;
pub mod sys;
pub mod virtio;
