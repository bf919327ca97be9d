//! A driver of a modern virtio-pci device (virtio 1.2, 4.1), by hand, for tests: it finds the
//! device in configuration space, sets it up right or wrong, and kicks it. Knows nothing but how to
//! read and write the memory bus.
#![allow(dead_code, missing_docs)] // each test program uses a part; names say it

/// Where configuration space lies in memory.
pub const ECAM: u64 = 0xe000_0000;
/// Device status bits.
pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 0x40;
/// Feature bits.
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const RING_RESET: u64 = 1 << 40;
/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;

/// How the driver reaches registers.
pub trait Mmio: Clone {
    /// A load of `data.len()` bytes.
    fn load(&self, addr: u64, data: &mut [u8]);
    /// A store, and all that it leads to.
    fn store(&self, addr: u64, data: &[u8]);

    fn r8(&self, addr: u64) -> u8 {
        let mut b = [0; 1];
        self.load(addr, &mut b);
        b[0]
    }
    fn r16(&self, addr: u64) -> u16 {
        let mut b = [0; 2];
        self.load(addr, &mut b);
        u16::from_le_bytes(b)
    }
    fn r32(&self, addr: u64) -> u32 {
        let mut b = [0; 4];
        self.load(addr, &mut b);
        u32::from_le_bytes(b)
    }
    fn r64(&self, addr: u64) -> u64 {
        u64::from(self.r32(addr)) | u64::from(self.r32(addr + 4)) << 32
    }
    fn w8(&self, addr: u64, v: u8) {
        self.store(addr, &[v]);
    }
    fn w16(&self, addr: u64, v: u16) {
        self.store(addr, &v.to_le_bytes());
    }
    fn w32(&self, addr: u64, v: u32) {
        self.store(addr, &v.to_le_bytes());
    }
    fn w64(&self, addr: u64, v: u64) {
        self.w32(addr, v as u32);
        self.w32(addr + 4, (v >> 32) as u32);
    }
}

/// Address of register `reg` of the function on `slot`.
pub fn config(slot: u8, reg: u64) -> u64 {
    ECAM + (u64::from(slot) << 15) + reg
}

/// The first slot with virtio device `id`.
pub fn find<B: Mmio>(bus: &B, id: u16) -> Option<u8> {
    (0..32).find(|&slot| bus.r32(config(slot, 0)) == 0x1af4 | u32::from(0x1040 + id) << 16)
}

/// The capabilities of the function on `slot`: ID and offset.
pub fn capabilities<B: Mmio>(bus: &B, slot: u8) -> Vec<(u8, u64)> {
    let mut list = Vec::new();
    let mut at = u64::from(bus.r8(config(slot, 0x34)));
    while at != 0 {
        assert!(list.len() < 48, "the list of capabilities has no end");
        list.push((bus.r8(config(slot, at)), at));
        at = u64::from(bus.r8(config(slot, at + 1)));
    }
    list
}

/// Where the structures of a device lie.
#[derive(Clone)]
pub struct Driver<B> {
    pub bus: B,
    pub slot: u8,
    /// Address of BAR 0.
    pub bar: u64,
    pub common: u64,
    pub isr: u64,
    pub device: u64,
    pub notify: u64,
    pub notify_step: u64,
    /// Offset in configuration space of the window on the BARs.
    pub window: u64,
    /// Offset in configuration space of MSI-X.
    pub msix: u64,
    pub table: u64,
    pub pba: u64,
}

impl<B: Mmio> Driver<B> {
    /// Finds the structures of the device on `slot`, and has it decode its BARs.
    pub fn new(bus: B, slot: u8) -> Driver<B> {
        let c = |reg| config(slot, reg);
        let bar_at = |index: u8| {
            let reg = 0x10 + 4 * u64::from(index);
            let low = bus.r32(c(reg));
            let high = if low >> 1 & 3 == 2 { bus.r32(c(reg + 4)) } else { 0 };
            u64::from(high) << 32 | u64::from(low & !0xf)
        };
        let command = bus.r16(c(4));
        bus.w16(c(4), command | 0x6);
        let mut d = Driver {
            slot,
            bar: bar_at(0),
            common: 0,
            isr: 0,
            device: 0,
            notify: 0,
            notify_step: 0,
            window: 0,
            msix: 0,
            table: 0,
            pba: 0,
            bus: bus.clone(),
        };
        for (id, at) in capabilities(&bus, slot) {
            match id {
                0x09 => {
                    let place = bar_at(bus.r8(c(at + 4))) + u64::from(bus.r32(c(at + 8)));
                    match bus.r8(c(at + 3)) {
                        1 => d.common = place,
                        2 => (d.notify, d.notify_step) = (place, u64::from(bus.r32(c(at + 16)))),
                        3 => d.isr = place,
                        4 => d.device = place,
                        5 => d.window = at,
                        other => panic!("capability of type {other}"),
                    }
                }
                0x11 => {
                    let place = |reg| {
                        let word = bus.r32(c(reg));
                        bar_at(word as u8 & 7) + u64::from(word & !7)
                    };
                    (d.msix, d.table, d.pba) = (at, place(at + 4), place(at + 8));
                }
                _ => {}
            }
        }
        assert!(d.common != 0 && d.notify != 0 && d.isr != 0 && d.device != 0, "structures are missing");
        d
    }

    pub fn status(&self) -> u8 {
        self.bus.r8(self.common + 0x14)
    }

    pub fn set_status(&self, v: u8) {
        self.bus.w8(self.common + 0x14, v);
    }

    pub fn generation(&self) -> u8 {
        self.bus.r8(self.common + 0x15)
    }

    pub fn num_queues(&self) -> u16 {
        self.bus.r16(self.common + 0x12)
    }

    /// Device reset; returns when it is done.
    pub fn reset(&self) {
        self.set_status(0);
        while self.status() != 0 {
            std::thread::yield_now();
        }
    }

    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |bits, n| {
            self.bus.w32(self.common, n);
            bits | u64::from(self.bus.r32(self.common + 4)) << (32 * n)
        })
    }

    pub fn accept(&self, features: u64) {
        for n in 0..2 {
            self.bus.w32(self.common + 8, n);
            self.bus.w32(self.common + 12, (features >> (32 * n)) as u32);
        }
    }

    pub fn accepted(&self) -> u64 {
        (0..2).fold(0, |bits, n| {
            self.bus.w32(self.common + 8, n);
            bits | u64::from(self.bus.r32(self.common + 12)) << (32 * n)
        })
    }

    /// Reset, and everything up to FEATURES_OK; whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    pub fn select(&self, queue: u16) {
        self.bus.w16(self.common + 0x16, queue);
    }

    /// Largest size of `queue`, before it was set; 0 when there is no such queue.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.select(queue);
        self.bus.r16(self.common + 0x18)
    }

    /// Says where `queue` is, without enabling it.
    pub fn place_queue(&self, queue: u16, size: u16, desc: u64, avail: u64, used: u64) {
        self.select(queue);
        self.bus.w16(self.common + 0x18, size);
        self.bus.w64(self.common + 0x20, desc);
        self.bus.w64(self.common + 0x28, avail);
        self.bus.w64(self.common + 0x30, used);
    }

    /// Enables the queue that was placed.
    pub fn enable_queue(&self, queue: u16) {
        self.select(queue);
        self.bus.w16(self.common + 0x1c, 1);
    }

    /// Asks for `vector` for `queue`; what the device says.
    pub fn queue_vector(&self, queue: u16, vector: u16) -> u16 {
        self.select(queue);
        self.bus.w16(self.common + 0x1a, vector);
        self.bus.r16(self.common + 0x1a)
    }

    /// Asks for `vector` for changes of the configuration.
    pub fn config_vector(&self, vector: u16) -> u16 {
        self.bus.w16(self.common + 0x10, vector);
        self.bus.r16(self.common + 0x10)
    }

    pub fn driver_ok(&self) {
        self.set_status(self.status() | DRIVER_OK);
    }

    /// The address that kicks `queue`.
    pub fn notify_addr(&self, queue: u16) -> u64 {
        self.select(queue);
        self.notify + self.notify_step * u64::from(self.bus.r16(self.common + 0x1e))
    }

    pub fn kick(&self, queue: u16) {
        self.bus.w16(self.notify + self.notify_step * u64::from(queue), queue);
    }

    /// Switches MSI-X on; every vector n sends data `base + n` to 0xfee00000.
    pub fn enable_msix(&self, base: u32) {
        let control = self.bus.r16(config(self.slot, self.msix + 2));
        for n in 0..=u64::from(control & 0x7ff) {
            self.bus.w32(self.table + 16 * n, 0xfee0_0000);
            self.bus.w32(self.table + 16 * n + 4, 0);
            self.bus.w32(self.table + 16 * n + 8, base + n as u32);
            self.bus.w32(self.table + 16 * n + 12, 0);
        }
        self.bus.w16(config(self.slot, self.msix + 2), 1 << 15);
    }
}
