//! For tests: a transport that counts, and a device that runs on it without PCI.

#[path = "../../tests/kit/mod.rs"]
pub mod kit;

use super::device::{Transport, VirtioDevice};
use super::queue::{Halt, Queue, Setup};
use super::worker::{Crew, SlowThread};
use crate::machine::memory::Mem;
use kit::deadline;
pub use kit::disk::{Asked, FakeState, fake_disk};
pub use kit::ram::GuestRam;
pub use kit::ram::{HIGH, HIGH_LEN, LOW};
pub use kit::ring;
use kit::ring::{Memory, Ring};
pub use kit::until;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A transport that counts what it is told.
#[derive(Default)]
pub struct Told {
    /// Interrupts, of any queue.
    pub interrupts: AtomicUsize,
    /// Changes of the configuration.
    pub config_changes: AtomicUsize,
    /// Why the device needs a reset: the first reason.
    pub broken: Mutex<Option<String>>,
}

impl Transport for Told {
    fn queue_used(&self, _: u16) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self, why: &str) {
        self.broken.lock().unwrap().get_or_insert(why.to_string());
    }
}

/// A device with its driver's rings, without PCI.
pub struct Rig {
    /// Guest memory.
    pub ram: GuestRam,
    /// What the device said.
    pub told: Arc<Told>,
    /// The driver's ends.
    pub rings: Vec<Ring<Mem>>,
    /// Memory behind the rings is free for requests, from here on.
    pub free: u64,
    device: Arc<dyn VirtioDevice>,
    acked: u64,
    queues: Arc<[Arc<Queue>]>,
    crew: Option<Crew>,
}

impl Rig {
    /// The device as after DRIVER_OK with the features `acked`.
    pub fn new(device: Arc<dyn VirtioDevice>, acked: u64) -> Rig {
        let told = Arc::new(Told::default());
        device.attach(told.clone());
        let mut rig = Rig {
            ram: GuestRam::new(),
            told,
            rings: Vec::new(),
            free: 0,
            device,
            acked,
            queues: Arc::new([]),
            crew: None,
        };
        rig.start();
        rig
    }

    /// DRIVER_OK, with new rings.
    pub fn start(&mut self) {
        let mut base = 0x1000;
        let halt = Arc::new(Halt::default());
        self.rings.clear();
        let mut queues = Vec::new();
        for (n, size) in self.device.queue_sizes().iter().enumerate() {
            let ring = Ring::new(self.ram.mem.clone(), *size, base);
            base = ring.end().next_multiple_of(4096);
            let q = Queue::new(n as u16, self.ram.mem.clone(), self.told.clone(), halt.clone());
            let setup = Setup { size: *size, desc: ring.desc, avail: ring.avail, used: ring.used };
            assert!(q.enable(setup, *size, false));
            queues.push(Arc::new(q));
            self.rings.push(ring);
        }
        self.free = base;
        self.queues = queues.into();
        let tasks = self.device.start(self.acked).unwrap();
        let transport: Arc<dyn Transport> = self.told.clone();
        let slow = Arc::new(SlowThread::default());
        self.crew = Some(Crew::start(tasks, self.queues.clone(), halt, &transport, &slow).unwrap());
    }

    /// Device reset: returns when no worker touches the guest.
    pub fn reset(&mut self) {
        self.crew = None;
        self.device.reset();
        *self.told.broken.lock().unwrap() = None;
    }

    /// Makes a chain available; its head.
    pub fn offer(&mut self, q: usize, pieces: &[(u64, u32, bool)]) -> u16 {
        let head = self.rings[q].chain(pieces).expect("the ring is full");
        self.rings[q].offer(head);
        head
    }

    /// The driver's notification.
    pub fn kick(&self, q: usize) {
        self.queues[q].kick();
    }

    /// Waits for the next answer: head and length.
    pub fn answer(&mut self, q: usize) -> (u16, u32) {
        let end = deadline();
        loop {
            if let Some(answer) = self.rings[q].answer() {
                return answer;
            }
            assert!(Instant::now() < end, "no answer; broken: {:?}", self.told.broken.lock().unwrap());
            std::thread::yield_now();
        }
    }

    /// Nothing is answered within a short time.
    pub fn no_answer(&mut self, q: usize) {
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(self.rings[q].answer(), None, "an answer that must not come");
    }

    /// Waits until the device needs a reset; why.
    pub fn broken(&self) -> String {
        until(|| self.told.broken.lock().unwrap().clone())
    }

    /// Pauses the device's workers.
    pub fn pause(&self) {
        self.crew.as_ref().unwrap().pause();
    }

    /// They go on.
    pub fn resume(&self) {
        self.crew.as_ref().unwrap().resume();
    }

    /// The address in descriptor `n` of queue `q`.
    pub fn descriptor(&self, q: usize, n: u16) -> u64 {
        let bytes = self.peek(self.rings[q].desc + 16 * u64::from(n), 8);
        bytes.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b))
    }

    /// Guest memory at `addr`.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.mem.get(addr, &mut bytes);
        bytes
    }

    /// Sets guest memory at `addr`.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.ram.mem.put(addr, bytes);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.crew = None;
        if !std::thread::panicking() {
            self.ram.check_canaries();
        }
    }
}
