//! The common configuration of a virtio device on PCI: register numbers, and what the driver has
//! written there (virtio 1.2, 2.1, 4.1.4.3, 6).
//!
//! Owns: the registers' values until the next reset. Never: knows what a write leads to (`pci.rs`).
//! Threads: vCPUs, under the transport's Mutex. Locks: none.

use super::device::VirtioDevice;
use super::queue::Setup;

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver knows of the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver can drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device must be reset.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver gave up.
    pub const FAILED: u8 = 0x80;
}

/// Feature bits that are the transport's (virtio 1.2, section 6).
pub mod feature {
    /// Chains may be tables of their own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notification suppression by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// One queue can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// All of them.
    pub const RING: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// Registers of the common configuration (virtio 1.2, 4.1.4.3).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_NOTIFY_DATA: u64 = 0x38;
    pub const QUEUE_RESET: u64 = 0x3a;
    pub const LEN: u64 = 0x3c;

    /// The registers that can be written: offset and width. A 64-bit one takes two halves too.
    pub const WRITABLE: &[(u64, usize)] = &[
        (DEVICE_FEATURE_SELECT, 4),
        (DRIVER_FEATURE_SELECT, 4),
        (DRIVER_FEATURE, 4),
        (CONFIG_VECTOR, 2),
        (DEVICE_STATUS, 1),
        (QUEUE_SELECT, 2),
        (QUEUE_SIZE, 2),
        (QUEUE_VECTOR, 2),
        (QUEUE_ENABLE, 2),
        (QUEUE_DESC, 8),
        (QUEUE_DRIVER, 8),
        (QUEUE_DEVICE, 8),
        (QUEUE_RESET, 2),
    ];
}

/// The registers that the driver sets before it starts the device.
#[derive(Clone, Default)]
pub struct Registers {
    /// Which half of the features the device shows.
    pub device_feature_select: u32,
    /// Which half of the features the driver writes.
    pub driver_feature_select: u32,
    /// The features that the driver accepts.
    pub acked: u64,
    /// Which queue the queue registers show.
    pub queue_select: u16,
    /// The registers of each queue.
    pub queues: Vec<QueueRegisters>,
}

/// The registers of one queue.
#[derive(Clone, Copy, Default)]
pub struct QueueRegisters {
    /// Where it is and how large.
    pub setup: Setup,
    /// The driver has switched it on.
    pub enabled: bool,
}

impl Registers {
    /// As they are after reset: queues as large as they can be.
    pub fn new(device: &dyn VirtioDevice) -> Registers {
        let queue =
            |&size: &u16| QueueRegisters { setup: Setup { size, ..Setup::default() }, enabled: false };
        Registers { queues: device.queue_sizes().iter().map(queue).collect(), ..Registers::default() }
    }

    /// The queue that is selected, if it is there.
    pub fn queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }
}

impl QueueRegisters {
    /// A write of `len` bytes to one of its registers, or to half of an address.
    pub fn write(&mut self, off: u64, len: usize, value: u64) {
        let field = match off & !7 {
            common::QUEUE_DESC => &mut self.setup.desc,
            common::QUEUE_DRIVER => &mut self.setup.avail,
            common::QUEUE_DEVICE => &mut self.setup.used,
            _ => {
                match off {
                    // An impossible size is found out when the queue is taken into use.
                    common::QUEUE_SIZE => self.setup.size = value as u16,
                    common::QUEUE_ENABLE => self.enabled = value == 1,
                    _ => {}
                }
                return;
            }
        };
        *field = match (len, off & 4) {
            (8, _) => value,
            (_, 0) => *field >> 32 << 32 | value,
            _ => *field & 0xffff_ffff | value << 32,
        };
    }
}
