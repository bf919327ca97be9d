//! The machine below the devices: KVM, memory, processors, buses, interrupts, boot.
//!
//! Knows no QMP and no block layer. Lock order on vCPU threads: `Bus (read) → device Mutex → inbox`.

pub mod bus;
pub mod irq;
pub mod memory;
