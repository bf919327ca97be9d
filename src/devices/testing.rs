//! What the tests of this folder share: an interrupt line that remembers, and port access.

use crate::machine::bus::{BusDevice, Effect};
use crate::machine::irq::{Interrupts, Line, Msi};
use std::sync::{Arc, Mutex};

/// Every change of a line, in order.
#[derive(Default)]
pub struct Wires(Mutex<Vec<(u32, bool)>>);

impl Interrupts for Wires {
    fn set_line(&self, gsi: u32, high: bool) {
        self.0.lock().unwrap().push((gsi, high));
    }

    fn send_msi(&self, _: Msi) {
        panic!("no device here sends messages");
    }
}

impl Wires {
    pub fn line(self: &Arc<Wires>, gsi: u32) -> Line {
        Line::new(self.clone(), gsi)
    }

    /// The levels since the last call.
    pub fn take(&self) -> Vec<bool> {
        self.0.lock().unwrap().drain(..).map(|(_, high)| high).collect()
    }
}

pub fn inb(device: &dyn BusDevice, off: u64) -> u8 {
    let mut data = [0];
    device.read(off, &mut data);
    data[0]
}

pub fn outb(device: &dyn BusDevice, off: u64, value: u8) -> Effect {
    device.write(off, &[value])
}

/// Random accesses of every width at every offset in range; the test is that nothing panics.
pub fn hammer(device: &dyn BusDevice, len: u64, rounds: u32, mut each: impl FnMut(Effect)) {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as u64 | 1;
    eprintln!("seed {seed}");
    let mut x = seed;
    for _ in 0..rounds {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let width = [1, 2, 4, 8][(x >> 8) as usize % 4];
        if width > len {
            continue;
        }
        let off = (x >> 16) % (len - width + 1);
        let mut data = (x >> 24).to_le_bytes();
        let data = &mut data[..width as usize];
        if x & 1 == 0 { device.read(off, data) } else { each(device.write(off, data)) }
    }
}
