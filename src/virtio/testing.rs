//! For tests: guest memory between canaries, a transport that counts, a device that runs on it
//! without PCI, and a disk that fails and waits as it is told.

#[path = "../../tests/kit/ring.rs"]
pub mod ring;

use super::device::{Transport, VirtioDevice};
use super::queue::{Halt, Queue, Setup};
use super::worker::{Crew, SlowThread};
use crate::block::driver::{Driver, Flags};
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::{Node, NodeOptions};
use crate::machine::memory::Mem;
use crate::sys::iov::{Iov, IovMut};
use ring::{Memory, Ring};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory below the hole: `0..LOW`.
pub const LOW: u64 = 4 << 20;
/// Where memory goes on …
pub const HIGH: u64 = 1 << 32;
/// … for so many bytes.
pub const HIGH_LEN: u64 = 1 << 20;
/// The canaries' byte: nobody else writes it, so that it must never come to a disk or network.
pub const CANARY: u8 = 0xcc;
const CANARY_LEN: usize = 64 << 10;

/// Two regions of guest memory, each with a canary on both sides.
pub struct GuestRam {
    /// As devices see it.
    pub mem: Mem,
    around: Vec<(*mut u8, usize)>,
}

impl GuestRam {
    /// Zeroed.
    pub fn new() -> GuestRam {
        let mut around = Vec::new();
        let mut regions = Vec::new();
        for (base, len) in [(0, LOW as usize), (HIGH, HIGH_LEN as usize)] {
            let all = len + 2 * CANARY_LEN;
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a fresh mapping, never unmapped; the region built on its middle part owns no
            // mapping of its own.
            let region = unsafe {
                let p = libc::mmap(std::ptr::null_mut(), all, prot, flags, -1, 0).cast::<u8>();
                assert_ne!(p.cast(), libc::MAP_FAILED);
                for at in [0, CANARY_LEN + len] {
                    p.add(at).write_bytes(CANARY, CANARY_LEN);
                    around.push((p.add(at), CANARY_LEN));
                }
                MmapRegion::build_raw(p.add(CANARY_LEN), len, prot, flags).unwrap()
            };
            regions.push(GuestRegionMmap::new(region, GuestAddress(base)).unwrap());
        }
        GuestRam { mem: Mem::new(GuestMemoryMmap::from_regions(regions).unwrap()), around }
    }

    /// Panics when anything was written beside guest memory.
    pub fn check_canaries(&self) {
        for &(p, len) in &self.around {
            // SAFETY: mapped for good; nobody writes it, which is what is being checked.
            let bytes = unsafe { std::slice::from_raw_parts(p, len) };
            assert!(bytes.iter().all(|b| *b == CANARY), "host memory beside the guest's was written");
        }
    }
}

impl Memory for Mem {
    fn get(&self, addr: u64, to: &mut [u8]) {
        assert!(self.read(addr, to), "the test reads outside memory");
    }
    fn put(&self, addr: u64, from: &[u8]) {
        assert!(self.write(addr, from), "the test writes outside memory");
    }
}

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

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Waits until `f` gives something.
pub fn until<T>(mut f: impl FnMut() -> Option<T>) -> T {
    let end = deadline();
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "it does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What was asked of a [`FakeDisk`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// offset, length
    Read(u64, u64),
    /// offset, length
    Write(u64, u64),
    /// offset, length, may unmap
    Zero(u64, u64, bool),
    /// offset, length
    Discard(u64, u64),
    /// flush
    Flush,
}

/// The outside of a [`FakeDisk`].
#[derive(Default)]
pub struct FakeState {
    /// Its contents.
    pub data: Mutex<Vec<u8>>,
    /// All that was asked, in order of arrival.
    pub log: Mutex<Vec<Asked>>,
    /// When not 0, the next so many requests fail with `errno`.
    pub failures: AtomicUsize,
    /// See `failures`.
    pub errno: AtomicUsize,
    /// Requests wait while it is true.
    pub closed: Mutex<bool>,
    opened: Condvar,
    /// Requests inside.
    pub inside: AtomicUsize,
}

impl FakeState {
    /// The next `n` requests fail with `errno`.
    pub fn fail(&self, n: usize, errno: i32) {
        self.errno.store(errno as usize, Ordering::SeqCst);
        self.failures.store(n, Ordering::SeqCst);
    }

    /// Requests wait inside from now on, or no longer.
    pub fn hold(&self, on: bool) {
        *self.closed.lock().unwrap() = on;
        self.opened.notify_all();
    }

    /// Waits until `n` requests are inside.
    pub fn wait_inside(&self, n: usize) {
        until(|| (self.inside.load(Ordering::SeqCst) == n).then_some(()));
    }

    fn ask(&self, what: Asked) -> io::Result<()> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
        drop(closed);
        self.inside.fetch_sub(1, Ordering::SeqCst);
        self.log.lock().unwrap().push(what);
        let take = |n: usize| n.checked_sub(1);
        match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Err(io::Error::from_raw_os_error(self.errno.load(Ordering::SeqCst) as i32)),
            Err(_) => Ok(()),
        }
    }
}

/// A disk in memory that fails and waits as it is told.
pub struct FakeDisk(Arc<FakeState>);

/// A handle on a new fake disk of `len` bytes.
pub fn fake_disk(len: usize, spec: HandleSpec, options: NodeOptions) -> (Arc<Handle>, Arc<FakeState>) {
    let state = Arc::new(FakeState::default());
    *state.data.lock().unwrap() = vec![0; len];
    let node = Node::new("fake0", Box::new(FakeDisk(state.clone())), options);
    (Handle::new(Some(node), spec), state)
}

impl Driver for FakeDisk {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn len(&self) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.0.ask(Asked::Read(off, to.len() as u64))?;
        let data = self.0.data.lock().unwrap();
        to.copy_from(0, &data[off as usize..][..to.len()]);
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        self.0.ask(Asked::Write(off, from.len() as u64))?;
        from.copy_to(0, &mut self.0.data.lock().unwrap()[off as usize..][..from.len()]);
        Ok(())
    }
    fn zero(&self, off: u64, len: u64, f: Flags) -> io::Result<()> {
        self.0.ask(Asked::Zero(off, len, f.contains(Flags::MAY_UNMAP)))?;
        self.0.data.lock().unwrap()[off as usize..][..len as usize].fill(0);
        Ok(())
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.0.ask(Asked::Discard(off, len))
    }
    fn flush(&self) -> io::Result<()> {
        self.0.ask(Asked::Flush)
    }
}
