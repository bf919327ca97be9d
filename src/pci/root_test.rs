use super::*;
use crate::machine::irq::Msi;
use crate::pci::config::{Capability, reg};
use std::sync::atomic::AtomicUsize;

struct Silent;

impl Interrupts for Silent {
    fn set_line(&self, _: u32, _: bool) {}
    fn send_msi(&self, _: Msi) {}
}

/// One register that counts reads, behind a BAR of `size`.
struct Dummy {
    size: u64,
    is_64bit: bool,
    stopped: AtomicUsize,
    slow: std::time::Duration,
    inside: Arc<AtomicUsize>,
}

struct Register(u64, std::time::Duration, Arc<AtomicUsize>);

impl BusDevice for Register {
    fn read(&self, off: u64, data: &mut [u8]) {
        self.2.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.1);
        data.copy_from_slice(&(self.0 + off).to_le_bytes()[..data.len()]);
        self.2.fetch_sub(1, Ordering::SeqCst);
    }
    fn write(&self, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }
}

impl Dummy {
    fn new(size: u64, is_64bit: bool) -> Arc<Dummy> {
        Dummy::slow(size, is_64bit, 0)
    }

    fn slow(size: u64, is_64bit: bool, ms: u64) -> Arc<Dummy> {
        let slow = std::time::Duration::from_millis(ms);
        Arc::new(Dummy { size, is_64bit, stopped: AtomicUsize::new(0), slow, inside: Arc::default() })
    }
}

impl PciDevice for Dummy {
    fn ident(&self) -> Ident {
        Ident { device: 0x10, ..BRIDGE }
    }
    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec { index: 0, size: self.size, is_64bit: self.is_64bit, prefetchable: false }]
    }
    fn bar(&self, _: u8) -> Arc<dyn BusDevice> {
        Arc::new(Register(self.size, self.slow, self.inside.clone()))
    }
    fn capabilities(&self) -> Vec<Capability> {
        vec![Capability { id: 9, body: vec![0; 18], mask: vec![0xff; 18] }]
    }
    fn window(&self) -> Option<usize> {
        Some(0)
    }
    fn reset(&self) {}
    fn pause(&self) {}
    fn resume(&self) {}
    fn stop(&self) {
        assert_eq!(self.inside.load(Ordering::SeqCst), 0, "stopped while a processor was inside");
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

const WINDOW: Range<u64> = 0xc000_0000..0xc010_0000;
const ECAM: u64 = 0xe000_0000;

struct Rig {
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    root: Arc<PciRoot>,
}

fn rig() -> Rig {
    let (mmio, pio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
    let silent: Arc<dyn Interrupts> = Arc::new(Silent);
    let root = PciRoot::new(mmio.clone(), &silent, 16, WINDOW);
    assert!(mmio.add(ECAM, 256 << 20, root.ecam()) && pio.add(0xcf8, 8, root.ports()));
    Rig { mmio, pio, root }
}

fn run(effect: Effect) {
    if let Effect::Run(f) = effect {
        f();
    }
}

impl Rig {
    fn r32(&self, addr: u64) -> u32 {
        let mut b = [0; 4];
        self.mmio.read(addr, &mut b);
        u32::from_le_bytes(b)
    }
    fn w32(&self, addr: u64, v: u32) {
        run(self.mmio.write(addr, &v.to_le_bytes()));
    }
    fn c(slot: u8, reg: usize) -> u64 {
        ECAM + (u64::from(slot) << 15) + reg as u64
    }
    fn decode(&self, slot: u8, on: bool) {
        self.w32(Rig::c(slot, reg::COMMAND), u32::from(on) << 1);
    }
    fn plug(&self, device: Arc<Dummy>, slot: Option<u8>) -> Result<u8> {
        self.root.plug(device, slot, "dummy")
    }
}

#[test]
fn slots_are_given_out_once() {
    let r = rig();
    assert_eq!(r.plug(Dummy::new(0x1000, true), Some(5)).unwrap(), 5);
    assert_eq!(r.plug(Dummy::new(0x1000, true), None).unwrap(), 1);
    let text = |slot| r.plug(Dummy::new(0x1000, true), slot).unwrap_err().desc;
    assert_eq!(text(Some(5)), "PCI: slot 5 function 0 not available for dummy, in use by dummy");
    assert!(text(Some(0)).contains("in use by host bridge"));
    assert_eq!(text(Some(32)), "PCI: there is no slot 32");
    for _ in 0..29 {
        r.plug(Dummy::new(0x1000, true), None).unwrap();
    }
    assert_eq!(text(None), "PCI: no slot/function available for dummy, all in use or reserved");
    assert!(r.root.unplug(7) && !r.root.unplug(7) && !r.root.unplug(77));
    assert_eq!(r.plug(Dummy::new(0x1000, true), None).unwrap(), 7);
}

#[test]
fn addresses_are_aligned_apart_and_inside_the_window() {
    let r = rig();
    let sizes = [0x1000, 0x8000, 0x10, 0x4_0000, 0x100];
    let mut taken: Vec<Range<u64>> = Vec::new();
    for size in sizes {
        let slot = r.plug(Dummy::new(size, false), None).unwrap();
        let base = u64::from(r.r32(Rig::c(slot, 0x10)) & !0xf);
        assert!(base % size == 0 && base >= WINDOW.start && base + size <= WINDOW.end, "{base:x}");
        let pages = base / 4096..(base + size).div_ceil(4096);
        assert!(taken.iter().all(|t| pages.end <= t.start || t.end <= pages.start), "a page is shared");
        taken.push(pages);
    }
    assert!(r.plug(Dummy::new(0x20_0000, false), None).unwrap_err().desc.contains("no address space"));
    assert!(r.plug(Dummy::new(0x8_0000, false), None).is_ok());
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let r = rig();
    let slot = r.plug(Dummy::new(0x1000, true), Some(3)).unwrap();
    let port = |reg: u32, len: usize| {
        let address = 1u32 << 31 | 3 << 11 | reg & 0xfc;
        run(r.pio.write(0xcf8, &address.to_le_bytes()));
        let mut b = [0; 4];
        r.pio.read(0xcfc + u64::from(reg & 3), &mut b[..len]);
        u32::from_le_bytes(b)
    };
    for reg in (0..256).step_by(4) {
        assert_eq!(port(reg, 4), r.r32(Rig::c(slot, reg as usize)), "register {reg:x}");
    }
    assert_eq!((port(2, 2), port(3, 1)), (0x10, 0));
    run(r.pio.write(0xcf8, &0x8000_1804u32.to_le_bytes()));
    run(r.pio.write(0xcfc, &[6, 0]));
    assert_eq!(r.r32(Rig::c(slot, 4)) & 0xffff, 6);
    // The address port takes words only; without its top bit the data port leads nowhere.
    run(r.pio.write(0xcf8, &[0, 0]));
    assert_eq!(port(4, 2), 6);
    run(r.pio.write(0xcf8, &0x0000_1800u32.to_le_bytes()));
    let mut b = [0; 4];
    r.pio.read(0xcfc, &mut b);
    assert_eq!(b, [0xff; 4]);
}

#[test]
fn where_nobody_is_all_bits_are_set() {
    let r = rig();
    r.plug(Dummy::new(0x1000, true), Some(3)).unwrap();
    assert_eq!(r.r32(Rig::c(0, 0)), 0x0008_1b36);
    for (bus, slot, function) in [(0, 2, 0), (0, 3, 1), (0, 0, 7), (1, 3, 0), (255, 31, 7)] {
        let addr = ECAM + (bus << 20) + (slot << 15) + (function << 12);
        assert_eq!(r.r32(addr), u32::MAX);
        r.w32(addr + 4, 0xffff_ffff);
    }
    assert_eq!(r.r32(Rig::c(3, 0x100)), 0, "no extended capabilities");
    let mut b = [0; 8];
    r.mmio.read(Rig::c(3, 0xffc), &mut b);
    r.mmio.read(Rig::c(3, 0xffe), &mut b);
    run(r.mmio.write(Rig::c(3, 0xffe), &b));
}

#[test]
fn bars_are_reachable_only_while_decoded_and_where_they_are() {
    let r = rig();
    let slot = r.plug(Dummy::new(0x1000, true), None).unwrap();
    let base = u64::from(r.r32(Rig::c(slot, 0x10)) & !0xf);
    assert_eq!(r.r32(base), u32::MAX, "decoded before the driver says so");
    r.decode(slot, true);
    assert_eq!(r.r32(base + 4), 0x1004);
    // Moved above 4 GiB in two halves, while decoded.
    r.w32(Rig::c(slot, 0x14), 2);
    r.w32(Rig::c(slot, 0x10), 0x4000);
    assert_eq!((r.r32(base), r.r32(0x2_0000_4004)), (u32::MAX, 0x1004));
    r.decode(slot, false);
    assert_eq!(r.r32(0x2_0000_4004), u32::MAX);
    // Sizing.
    r.w32(Rig::c(slot, 0x10), u32::MAX);
    r.w32(Rig::c(slot, 0x14), u32::MAX);
    assert_eq!((r.r32(Rig::c(slot, 0x10)), r.r32(Rig::c(slot, 0x14))), (0xffff_f004, u32::MAX));
    r.decode(slot, true);
    // On top of configuration space: that stays, the BAR is unreachable, and comes back.
    r.w32(Rig::c(slot, 0x14), 0);
    r.w32(Rig::c(slot, 0x10), ECAM as u32);
    assert_eq!(r.r32(Rig::c(0, 0)), 0x0008_1b36);
    r.w32(Rig::c(slot, 0x10), base as u32);
    assert_eq!(r.r32(base + 8), 0x1008);
    // A reset puts everything back.
    r.w32(Rig::c(slot, 0x10), 0xd000_0000);
    assert_eq!(r.r32(0xd000_0008), 0x1008);
    r.root.reset();
    assert_eq!((r.r32(0xd000_0008), r.r32(base)), (u32::MAX, u32::MAX));
    r.decode(slot, true);
    assert_eq!(r.r32(base + 8), 0x1008);
}

#[test]
fn unplugging_waits_for_processors_inside() {
    let r = rig();
    let device = Dummy::slow(0x1000, true, 50);
    let slot = r.plug(device.clone(), None).unwrap();
    let base = u64::from(r.r32(Rig::c(slot, 0x10)) & !0xf);
    r.decode(slot, true);
    let mmio = r.mmio.clone();
    let reader = std::thread::spawn(move || {
        let mut b = [0; 4];
        mmio.read(base, &mut b);
        u32::from_le_bytes(b)
    });
    while device.inside.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert!(r.root.unplug(slot));
    assert_eq!(reader.join().unwrap(), 0x1000);
    assert_eq!(device.stopped.load(Ordering::SeqCst), 1);
    assert_eq!((r.r32(base), r.r32(Rig::c(slot, 0))), (u32::MAX, u32::MAX));
}

#[test]
fn a_bar_that_moves_too_late_stays_off_the_bus() {
    let r = rig();
    let slot = r.plug(Dummy::new(0x1000, true), None).unwrap();
    let base = u64::from(r.r32(Rig::c(slot, 0x10)) & !0xf);
    let late = r.mmio.write(Rig::c(slot, reg::COMMAND), &[2, 0]);
    assert!(r.root.unplug(slot));
    run(late);
    assert_eq!(r.r32(base), u32::MAX);
}

#[test]
fn processors_and_control_may_do_everything_at_once() {
    let r = rig();
    let stop = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..2u64)
        .map(|t| {
            let (mmio, pio, stop) = (r.mmio.clone(), r.pio.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut x = 0x1234_5678_9abc_def1 + t;
                while stop.load(Ordering::SeqCst) == 0 {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let addr = match x % 3 {
                        0 => ECAM + (x >> 8 & 7) * 0x8000 + (x >> 16 & 0x7f),
                        1 => WINDOW.start + (x >> 8 & 0xffff),
                        _ => ECAM + (x >> 8 & 7) * 0x8000 + 4,
                    };
                    run(mmio.write(addr, &(x >> 30).to_le_bytes()[..1 << (x >> 60 & 3)]));
                    run(pio.write(0xcf8 + (x >> 9 & 4), &(x >> 20).to_le_bytes()[..4]));
                    mmio.read(addr, &mut [0; 8]);
                }
            })
        })
        .collect();
    for n in 0..250u8 {
        let slot = 1 + n % 7;
        if r.plug(Dummy::new(0x1000 << (n % 3), n % 2 == 0), Some(slot)).is_err() {
            r.root.unplug(slot);
        }
        if n % 50 == 0 {
            r.root.reset();
        }
    }
    for slot in 1..8 {
        r.root.unplug(slot);
    }
    stop.store(1, Ordering::SeqCst);
    threads.into_iter().for_each(|t| t.join().unwrap());
    for addr in (WINDOW.start..WINDOW.end).step_by(0x1000) {
        assert_eq!(r.r32(addr), u32::MAX, "an unplugged device still answers");
    }
}
