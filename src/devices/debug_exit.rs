//! Ports for test programs: one that ends the VM with an exit status, one that prints.
//!
//! Owns: nothing. Never: is there unless the configuration names it. Threads: vCPUs. Locks: none.
//! Both are QEMU's: `isa-debug-exit` and `isa-debugcon`.

use crate::chardev::chardev::Chardev;
use crate::event::Event;
use crate::machine::bus::{BusDevice, Effect};
use std::sync::Arc;

/// QEMU's default `iobase` of `isa-debug-exit`.
pub const EXIT_PORT: u64 = 0x501;
/// QEMU's default `iosize`.
pub const EXIT_LEN: u64 = 2;
/// QEMU's default `iobase` of `isa-debugcon`; also what Bochs has.
pub const CONSOLE_PORT: u64 = 0xe9;

/// Writing `n` ends the VM with exit status `2n + 1`, which no orderly exit has.
pub struct DebugExit;

impl BusDevice for DebugExit {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) -> Effect {
        let value = data.first().copied().unwrap_or(0);
        Effect::Post(Event::DebugExit { status: value << 1 | 1 })
    }
}

/// Every byte written goes to the chardev. Reads as 0xe9, by which a guest knows that it is there.
/// What the chardev has no room for is lost: there is no way to tell the guest to wait.
pub struct DebugConsole(pub Arc<Chardev>);

impl BusDevice for DebugConsole {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&self, _: u64, data: &[u8]) -> Effect {
        self.0.write(data);
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_asks_for_the_end() {
        for (value, expected) in [(0u8, 1u8), (1, 3), (0x10, 0x21), (0xff, 0xff)] {
            let Effect::Post(Event::DebugExit { status }) = DebugExit.write(0, &[value, 0]) else {
                panic!("no event");
            };
            assert_eq!(status, expected);
        }
        let mut data = [0; 8];
        DebugExit.read(1, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
