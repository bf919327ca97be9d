//! For tests: a PCI root with buses and captured interrupts, and a device that echoes.

use super::device::{Kind, Source, Task, Thread, Transport, VirtioDevice, Worker};
use super::pci::VirtioPci;
use super::queue::Queue;
use super::testing::GuestRam;
use super::worker::SlowThread;
use crate::machine::bus::{Bus, Effect};
use crate::machine::irq::{Interrupts, Msi};
use crate::pci::root::PciRoot;
use pci::{Driver, Mmio};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

#[path = "../../tests/kit/pci.rs"]
pub mod pci;

/// Interrupt controllers that remember.
#[derive(Default)]
pub struct Caught {
    /// Messages, in order.
    pub messages: Mutex<Vec<Msi>>,
    /// Lines that are high, one bit each.
    pub lines: Mutex<u32>,
}

impl Caught {
    /// Messages with `data` since the last call.
    pub fn take(&self, data: u32) -> usize {
        let mut messages = self.messages.lock().unwrap();
        let before = messages.len();
        messages.retain(|m| m.data != data);
        before - messages.len()
    }

    /// Is line `gsi` high?
    pub fn line(&self, gsi: u32) -> bool {
        *self.lines.lock().unwrap() >> gsi & 1 != 0
    }
}

impl Interrupts for Caught {
    fn set_line(&self, gsi: u32, high: bool) {
        let mut lines = self.lines.lock().unwrap();
        *lines = *lines & !(1 << gsi) | u32::from(high) << gsi;
    }
    fn send_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}

/// The memory bus as a processor sees it: what an access leads to is done at once.
#[derive(Clone)]
pub struct Cpu(pub Arc<Bus>);

impl Mmio for Cpu {
    fn load(&self, addr: u64, data: &mut [u8]) {
        self.0.read(addr, data);
    }
    fn store(&self, addr: u64, data: &[u8]) {
        match self.0.write(addr, data) {
            Effect::Run(f) => f(),
            Effect::Post(_) | Effect::None => {}
        }
    }
}

/// RAM, buses, a PCI root, interrupt controllers.
pub struct Board {
    /// RAM.
    pub ram: GuestRam,
    /// The processor's loads and stores.
    pub cpu: Cpu,
    /// The port bus.
    pub pio: Cpu,
    /// The slots.
    pub root: Arc<PciRoot>,
    /// What was raised.
    pub caught: Arc<Caught>,
    /// The thread of slow devices.
    pub slow: Arc<SlowThread>,
}

/// The window for BARs.
pub const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;

impl Default for Board {
    fn default() -> Board {
        Board::new()
    }
}

impl Board {
    /// Nothing is plugged.
    pub fn new() -> Board {
        let (mmio, pio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let caught = Arc::new(Caught::default());
        let interrupts: Arc<dyn Interrupts> = caught.clone();
        let root = PciRoot::new(mmio.clone(), &interrupts, 16, WINDOW);
        assert!(mmio.add(pci::ECAM, 256 << 20, root.ecam()) && pio.add(0xcf8, 8, root.ports()));
        let slow = Arc::new(SlowThread::default());
        Board { ram: GuestRam::new(), cpu: Cpu(mmio), pio: Cpu(pio), root, caught, slow }
    }

    /// Plugs `device`; a driver for it.
    pub fn plug(&self, device: Arc<dyn VirtioDevice>) -> Driver<Cpu> {
        let (mem, interrupts) = (self.ram.mem.clone(), self.caught.clone());
        let pci = VirtioPci::new(device, "test".into(), mem, interrupts, self.slow.clone(), None);
        let slot = self.root.plug(Arc::new(pci), None, "test").unwrap();
        Driver::new(self.cpu.clone(), slot)
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.root.stop();
        if !std::thread::panicking() {
            self.ram.check_canaries();
        }
    }
}

/// What an [`Echo`] does with a request, by its first byte; anything else is echoed.
pub const PANIC: u8 = 1;
/// It waits until [`Gate::open`].
pub const WAIT: u8 = 2;
/// It puts the request on hold.
pub const HOLD: u8 = 3;

/// Where workers wait.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    /// How many wait now.
    pub waiting: AtomicUsize,
}

impl Gate {
    /// Lets all through.
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A device that copies what it is given to where it may write.
pub struct Echo {
    sizes: Vec<u16>,
    tasks: Vec<(Vec<u16>, Thread)>,
    config: Mutex<Vec<u8>>,
    /// The way up, once it is plugged.
    pub up: OnceLock<Arc<dyn Transport>>,
    /// Where requests that begin with [`WAIT`] wait.
    pub gate: Arc<Gate>,
    /// Requests done.
    pub done: Arc<AtomicUsize>,
    /// Calls of `reset`.
    pub resets: AtomicUsize,
    /// HOLD was seen and is not to be held again.
    held: Arc<AtomicUsize>,
}

impl Echo {
    /// `queues` queues of 64 entries. Each task hears the queues of its list.
    pub fn new(queues: usize, tasks: Vec<(Vec<u16>, Thread)>) -> Arc<Echo> {
        Arc::new(Echo {
            sizes: vec![64; queues],
            tasks,
            config: Mutex::new((0..16).collect()),
            up: OnceLock::new(),
            gate: Arc::default(),
            done: Arc::default(),
            resets: AtomicUsize::new(0),
            held: Arc::default(),
        })
    }

    /// One queue, one thread.
    pub fn simple() -> Arc<Echo> {
        Echo::new(1, vec![(vec![0], Thread::Own("echo".into()))])
    }
}

impl VirtioDevice for Echo {
    fn kind(&self) -> Kind {
        Kind { id: 42, class: 0xff_0000, name: "echo" }
    }
    fn features(&self) -> u64 {
        1 << 3 | 1 << 37
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn read_config(&self, off: u64, data: &mut [u8]) {
        let config = self.config.lock().unwrap();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = config.get(off as usize + n).copied().unwrap_or(0);
        }
    }
    fn write_config(&self, off: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        for (n, byte) in data.iter().enumerate() {
            if let Some(b) = config.get_mut(off as usize + n) {
                *b = *byte;
            }
        }
    }
    fn attach(&self, up: Arc<dyn Transport>) {
        assert!(self.up.set(up).is_ok(), "attached twice");
    }
    fn start(&self, _acked: u64) -> io::Result<Vec<Task>> {
        let task = |(queues, thread): &(Vec<u16>, Thread)| {
            let (gate, done, held) = (self.gate.clone(), self.done.clone(), self.held.clone());
            let worker = Box::new(EchoWorker { gate, done, held });
            Task { worker, queues: queues.clone(), thread: thread.clone(), poll: Duration::ZERO }
        };
        Ok(self.tasks.iter().map(task).collect())
    }
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

struct EchoWorker {
    gate: Arc<Gate>,
    done: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
}

impl Worker for EchoWorker {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn on_queue(&mut self, _n: u16, q: &Queue) {
        while let Some(mut chain) = q.pop() {
            let bytes = chain.readable().to_vec();
            match bytes.first() {
                Some(&PANIC) => panic!("told to"),
                Some(&WAIT) => self.gate.pass(),
                Some(&HOLD) if self.held.fetch_add(1, Ordering::SeqCst) == 0 => {
                    q.hold(chain);
                    continue;
                }
                _ => {}
            }
            let n = bytes.len().min(chain.writable_len());
            chain.writable().copy_from(0, &bytes[..n]);
            self.done.fetch_add(1, Ordering::SeqCst);
            q.push(chain, n);
        }
    }
}
