//! Interrupts, as devices see them.
//!
//! Owns: nothing but the way to the interrupt controllers. Never: knows who raises one. Threads:
//! any. Locks: those of the user-space IOAPIC, a leaf.

/// A message-signalled interrupt: what a device writes where (PCI 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Msi {
    /// Address, normally 0xfee00000 + destination.
    pub addr: u64,
    /// Data: vector, delivery mode.
    pub data: u32,
}

/// The interrupt controllers: the IOAPIC's pins and the way for messages.
pub trait Interrupts: Send + Sync {
    /// Sets pin `gsi` of the IOAPIC high or low.
    fn set_line(&self, gsi: u32, high: bool);
    /// Sends a message. A message that the guest made up wrongly is dropped.
    fn send_msi(&self, msi: Msi);
}

/// One pin of the IOAPIC, for a device on a line.
#[derive(Clone)]
pub struct Line {
    controllers: std::sync::Arc<dyn Interrupts>,
    gsi: u32,
}

impl Line {
    /// Pin `gsi`.
    pub fn new(controllers: std::sync::Arc<dyn Interrupts>, gsi: u32) -> Line {
        Line { controllers, gsi }
    }

    /// Sets the level.
    pub fn set(&self, high: bool) {
        self.controllers.set_line(self.gsi, high);
    }
}
