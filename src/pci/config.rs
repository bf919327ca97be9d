//! A function's configuration space: bytes, which of their bits can be written, capabilities.
//!
//! Owns: the 256 bytes of PCI 3.0, section 6. Never: knows what lies behind a BAR, or what a write
//! leads to (`function.rs`). Threads: any, under the function's Mutex. Locks: none.

use super::function::{BarSpec, Ident};

/// Offsets and bits of the type 0 header (PCI 3.0, 6.1 and 6.2).
pub mod reg {
    /// Command: what the function reacts to and may do.
    pub const COMMAND: usize = 0x04;
    /// The first BAR.
    pub const BARS: usize = 0x10;
    /// The first byte after the BARs.
    pub const BARS_END: usize = 0x28;
    /// Where the list of capabilities begins.
    pub const CAPABILITIES: usize = 0x34;
    /// For the operating system's notes on routing.
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// 1: INTA#.
    pub const INTERRUPT_PIN: usize = 0x3d;
    /// Command: memory BARs are decoded.
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    /// Command: may master the bus. It is kept, and not enforced.
    pub const COMMAND_MASTER: u16 = 1 << 2;
    /// Command: INTx is not asserted.
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
}

/// Length of a conventional function's configuration space.
pub const LEN: usize = 256;

/// A capability to be put on the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID (PCI 3.0, appendix H).
    pub id: u8,
    /// What follows the two header bytes.
    pub body: Vec<u8>,
    /// Writable bits of `body`; missing bytes are read-only.
    pub mask: Vec<u8>,
}

/// See the module's head.
#[derive(Clone)]
pub struct Config {
    bytes: [u8; LEN],
    mask: [u8; LEN],
    /// The `next` byte to be set when another capability is added.
    link: usize,
    /// The first free byte behind the capabilities.
    free: usize,
}

impl Config {
    /// A type 0 header.
    pub fn new(ident: Ident) -> Config {
        let mut this = Config { bytes: [0; LEN], mask: [0; LEN], link: reg::CAPABILITIES, free: 0x40 };
        this.set(0x00, &ident.vendor.to_le_bytes());
        this.set(0x02, &ident.device.to_le_bytes());
        let class = ident.class << 8 | u32::from(ident.revision);
        this.set(0x08, &class.to_le_bytes());
        this.set(0x2c, &ident.subsystem_vendor.to_le_bytes());
        this.set(0x2e, &ident.subsystem.to_le_bytes());
        // Parity and SERR# may be asked for; there is nobody to report them.
        let command = reg::COMMAND_MEMORY | reg::COMMAND_MASTER | reg::COMMAND_INTX_DISABLE | 1 << 6 | 1 << 8;
        this.mask[reg::COMMAND..][..2].copy_from_slice(&command.to_le_bytes());
        // Cache line size and interrupt line are the system's notes.
        this.mask[0x0c] = 0xff;
        this.mask[reg::INTERRUPT_LINE] = 0xff;
        this
    }

    /// Sets bytes regardless of who may write them.
    ///
    /// # Panics
    /// When they do not fit: an error in the caller.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes a BAR's register, with the address `base`.
    pub fn add_bar(&mut self, bar: &BarSpec, base: u64) {
        let at = reg::BARS + 4 * usize::from(bar.index);
        let kind = u64::from(bar.is_64bit) << 2 | u64::from(bar.prefetchable) << 3;
        let (value, mask) = (base & !0xf | kind, !(bar.size - 1) & !0xf);
        let len = if bar.is_64bit { 8 } else { 4 };
        self.set(at, &value.to_le_bytes()[..len]);
        self.mask[at..at + len].copy_from_slice(&mask.to_le_bytes()[..len]);
    }

    /// The address in a BAR's register.
    pub fn bar(&self, bar: &BarSpec) -> u64 {
        let at = reg::BARS + 4 * usize::from(bar.index);
        let len = if bar.is_64bit { 8 } else { 4 };
        let mut value = [0; 8];
        value[..len].copy_from_slice(&self.bytes[at..at + len]);
        u64::from_le_bytes(value) & !(bar.size - 1)
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[reg::COMMAND], self.bytes[reg::COMMAND + 1]])
    }

    /// Appends a capability; returns the offset of its ID byte.
    ///
    /// # Panics
    /// When the 192 bytes behind the header are full: an error in the device.
    pub fn add_capability(&mut self, cap: &Capability) -> usize {
        let at = self.free;
        self.set(at, &[cap.id, 0]);
        self.set(at + 2, &cap.body);
        self.mask[at + 2..at + 2 + cap.mask.len()].copy_from_slice(&cap.mask);
        self.bytes[self.link] = at as u8;
        self.bytes[0x06] |= 1 << 4;
        self.link = at + 1;
        // The list's entries are aligned to 4 bytes.
        self.free = (at + 2 + cap.body.len()).next_multiple_of(4);
        at
    }

    /// Copies bytes out; what lies beyond the end reads as zeroes.
    pub fn read(&self, off: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(off + n).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits.
    pub fn write(&mut self, off: usize, data: &[u8]) {
        for (n, &value) in data.iter().enumerate() {
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(off + n), self.mask.get(off + n)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
