//! A guest's view of a virtio device: registers, rings, and requests that must work.

use crate::kit::deadline;
use crate::kit::disk::{FakeState, fake_disk};
use crate::kit::ram::GuestRam;
use crate::kit::ring::{Memory, Ring};
use crate::kit::wire::Wire;
use minivmm::block::driver::Perm;
use minivmm::block::handle::HandleSpec;
use minivmm::block::node::NodeOptions;
use minivmm::machine::bus::{BusDevice, Effect};
use minivmm::machine::irq::{Interrupts, Msi};
use minivmm::machine::memory::Mem;
use minivmm::net::netdev::Offload;
use minivmm::pci::function::PciDevice;
use minivmm::virtio::blk::{Blk, BlkConfig};
use minivmm::virtio::device::VirtioDevice;
use minivmm::virtio::net::{Net, NetConfig};
use minivmm::virtio::pci::VirtioPci;
use minivmm::virtio::registers::status;
use minivmm::virtio::worker::SlowThread;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

// Registers of the common configuration (virtio 1.2, 4.1.4.3).
pub const DEVICE_FEATURE_SELECT: u64 = 0;
pub const DEVICE_FEATURE: u64 = 4;
pub const DRIVER_FEATURE_SELECT: u64 = 8;
pub const DRIVER_FEATURE: u64 = 12;
pub const STATUS: u64 = 0x14;
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const QUEUE_ENABLE: u64 = 0x1c;
pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
pub const QUEUE_DESC: u64 = 0x20;
pub const QUEUE_DRIVER: u64 = 0x28;
pub const QUEUE_DEVICE: u64 = 0x30;

/// Where the rings begin; requests come behind them.
pub const RINGS: u64 = 0x1000;
pub const DISK: usize = 256 << 10;

/// xorshift64*.
pub struct Rng(pub u64);

impl Rng {
    pub fn new(fallback: u64) -> Rng {
        let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(fallback);
        eprintln!("SEED={seed}");
        Rng(seed)
    }
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }
}

#[derive(Default)]
struct NoInterrupts(AtomicUsize);

impl Interrupts for NoInterrupts {
    fn set_line(&self, _: u32, _: bool) {}
    fn send_msi(&self, _: Msi) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A device behind its transport, as a guest sees it.
pub struct Guest {
    pub ram: GuestRam,
    pub pci: VirtioPci,
    pub bar: Arc<dyn BusDevice>,
    pub notify: u64,
    pub queues: u16,
    pub rings: Vec<Ring<Mem>>,
    pub free: u64,
}

impl Guest {
    pub fn new(device: Arc<dyn VirtioDevice>) -> Guest {
        let ram = GuestRam::new();
        let (queues, slow) = (device.queue_sizes().len() as u16, Arc::new(SlowThread::default()));
        let interrupts = Arc::new(NoInterrupts::default());
        let pci = VirtioPci::new(device, "hostile".into(), ram.mem.clone(), interrupts, slow, None);
        // struct virtio_pci_notify_cap: type 2, its offset at byte 8 of the capability.
        let caps = pci.capabilities();
        let notify = caps.iter().find(|c| c.body[1] == 2).unwrap();
        let notify = u32::from_le_bytes(notify.body[6..10].try_into().unwrap()).into();
        let bar = pci.bar(0);
        Guest { ram, pci, bar, notify, queues, rings: Vec::new(), free: 0 }
    }

    pub fn read(&self, off: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bar.read(off, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, off: u64, width: usize, value: u64) {
        write(&*self.bar, off, &value.to_le_bytes()[..width]);
    }

    pub fn status(&self) -> u8 {
        self.read(STATUS, 1) as u8
    }

    pub fn offered(&self) -> u64 {
        self.write(DEVICE_FEATURE_SELECT, 4, 0);
        let low = self.read(DEVICE_FEATURE, 4);
        self.write(DEVICE_FEATURE_SELECT, 4, 1);
        low | self.read(DEVICE_FEATURE, 4) << 32
    }

    pub fn accept(&self, features: u64) {
        for half in 0..2 {
            self.write(DRIVER_FEATURE_SELECT, 4, half);
            self.write(DRIVER_FEATURE, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// Reset, and everything up to, but without, DRIVER_OK.
    pub fn prepare(&mut self, without: u64) {
        self.write(STATUS, 1, 0);
        assert_eq!(self.status(), 0, "a reset is done when the write returns");
        self.write(STATUS, 1, (status::ACKNOWLEDGE | status::DRIVER).into());
        self.accept(self.offered() & !without);
        self.write(STATUS, 1, 11);
        assert_eq!(self.status(), 11, "features refused");
        let mut base = RINGS;
        self.rings.clear();
        for q in 0..self.queues {
            self.write(QUEUE_SELECT, 2, q.into());
            let ring = Ring::new(self.ram.mem.clone(), self.read(QUEUE_SIZE, 2) as u16, base);
            self.place(&ring);
            base = ring.end().next_multiple_of(4096);
            self.rings.push(ring);
        }
        self.free = base;
    }

    pub fn place(&self, ring: &Ring<Mem>) {
        self.write(QUEUE_DESC, 8, ring.desc);
        self.write(QUEUE_DRIVER, 4, ring.avail);
        self.write(QUEUE_DRIVER + 4, 4, ring.avail >> 32);
        self.write(QUEUE_DEVICE, 8, ring.used);
        self.write(QUEUE_ENABLE, 2, 1);
    }

    pub fn start(&mut self, without: u64) {
        self.prepare(without);
        self.write(STATUS, 1, 15);
        assert_eq!(self.status(), 15);
    }

    pub fn kick(&self, q: u16) {
        self.write(self.notify + 4 * u64::from(q), 2, q.into());
    }

    pub fn is_broken(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub fn broken(&self, what: &str) {
        let end = deadline();
        while !self.is_broken() {
            assert!(Instant::now() < end, "{what}: the device does not mind");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub fn answer(&mut self, q: u16) -> (u16, u32) {
        let end = deadline();
        loop {
            if let Some(answer) = self.rings[usize::from(q)].answer() {
                return answer;
            }
            assert!(!self.is_broken(), "the device broke at a good request");
            assert!(Instant::now() < end, "no answer");
            std::thread::yield_now();
        }
    }

    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.mem.get(addr, &mut bytes);
        bytes
    }

    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.ram.mem.put(addr, bytes);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.pci.stop();
        if !std::thread::panicking() {
            self.ram.check_canaries();
        }
    }
}

pub fn write(bar: &dyn BusDevice, off: u64, data: &[u8]) {
    match bar.write(off, data) {
        Effect::Run(f) => f(),
        Effect::Post(e) => panic!("a virtio device posted {e:?}"),
        Effect::None => {}
    }
}

pub fn disk(num_queues: u16, workers: u16) -> (Guest, Arc<FakeState>) {
    let spec = HandleSpec { uses: Perm::ALL, ..HandleSpec::default() };
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    let (handle, state) = fake_disk(DISK, spec, options);
    let config = BlkConfig { num_queues, workers, queue_size: 64, ..BlkConfig::default() };
    (Guest::new(Blk::new(config, handle).unwrap()), state)
}

pub fn card() -> (Guest, UnixDatagram) {
    let all = Offload::CSUM | Offload::TSO4 | Offload::TSO6 | Offload::TSO_ECN;
    let (wire, far) = Wire::new(all);
    let config = NetConfig { rx_queue_size: 64, tx_queue_size: 64, ..NetConfig::default() };
    (Guest::new(Net::new(config, wire).unwrap()), far)
}

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Writes a sector and reads it back, on each queue.
pub fn disk_works(g: &mut Guest) {
    for q in 0..g.queues {
        let at = g.free;
        let data: Vec<u8> = (0..512u32).map(|i| (i * 3) as u8 ^ q as u8).collect();
        g.poke(at, &header(1, 3));
        g.poke(at + 16, &data);
        g.poke(at + 600, &[0xff]);
        let ring = &mut g.rings[usize::from(q)];
        let head = ring.chain(&[(at, 528, false), (at + 600, 1, true)]).unwrap();
        ring.offer(head);
        g.kick(q);
        assert_eq!(g.answer(q), (head, 1));
        assert_eq!(g.peek(at + 600, 1), [0], "status of the write");
        g.poke(at, &header(0, 3));
        let ring = &mut g.rings[usize::from(q)];
        let head = ring.chain(&[(at, 16, false), (at + 1024, 512, true), (at + 600, 1, true)]).unwrap();
        ring.offer(head);
        g.kick(q);
        assert_eq!(g.answer(q), (head, 513));
        assert_eq!(g.peek(at + 1024, 512), data);
    }
}

/// One frame each way.
pub fn card_works(g: &mut Guest, far: &UnixDatagram) {
    let at = g.free;
    let frame: Vec<u8> = (0..100).map(|i| if i < 12 { 0 } else { i }).collect();
    g.poke(at, &frame);
    let head = g.rings[1].chain(&[(at, 100, false)]).unwrap();
    g.rings[1].offer(head);
    g.kick(1);
    g.answer(1);
    // Frames of hostile requests before it may still be there.
    let mut got = vec![0; 70000];
    let end = deadline();
    loop {
        let n = far.recv(&mut got).unwrap();
        if got[..n] == frame {
            break;
        }
        assert!(Instant::now() < end, "the frame does not come");
    }
    // The same here; as long as there are so many that ours cannot be sent, one of them comes.
    let mut sent = false;
    loop {
        far.set_nonblocking(true).unwrap();
        sent = sent || far.send(&frame).is_ok();
        far.set_nonblocking(false).unwrap();
        let head = g.rings[0].chain(&[(at + 1000, 4000, true)]).unwrap();
        g.rings[0].offer(head);
        g.kick(0);
        let (answered, len) = g.answer(0);
        assert_eq!(answered, head);
        if len == 100 && g.peek(at + 1012, 88) == frame[12..] {
            break;
        }
        assert!(Instant::now() < end, "the frame does not come in");
    }
}
