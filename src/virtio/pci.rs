//! The PCI transport: a virtio device as a PCI function (virtio 1.2, section 4.1; modern only).
//!
//! Owns: the device's state machine, its registers, its vectors, and when its workers live. Never:
//! knows any one device. Threads: vCPUs read and write registers; what must wait for workers
//! (DRIVER_OK, reset) is an [`Effect::Run`] that the vCPU does with no bus lock held; control
//! pauses, resumes, resets, unplugs; workers raise interrupts. Locks: `crew` while workers start and
//! stop (then `setup`); `setup` for the registers, a leaf; `queues` for reading at each kick, a leaf.
//!
//! ```text
//! BAR 0, 64-bit   0x0000 common configuration      0x3000 notifications, 4 bytes a queue
//!                 0x1000 interrupt status (1 byte)  0x4000 MSI-X pending bits
//!                 0x2000 device configuration       0x8000 MSI-X table, up to 2048 vectors
//! ```

use super::device::{Transport, VirtioDevice};
use super::queue::{Halt, Queue};
use super::registers::{Registers, common, feature, status};
use super::worker::{Crew, SlowThread};
use crate::machine::bus::{BusDevice, Effect};
use crate::machine::irq::Interrupts;
use crate::machine::memory::Mem;
use crate::pci::config::Capability;
use crate::pci::function::{BarSpec, Ident, PciDevice, Pin};
use crate::pci::msix::{Msix, Place};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

const BAR_SIZE: u64 = 0x1_0000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const PBA: u64 = 0x4000;
const TABLE: u64 = 0x8000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u64 = 4;

/// No vector (virtio 1.2, 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What devices and workers reach of the transport.
struct Upward {
    name: String,
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    msix: Msix,
    pin: OnceLock<Arc<Pin>>,
}

impl Upward {
    fn interrupt(&self, vector: &AtomicU16, isr: u8) {
        if self.msix.is_enabled() {
            return self.msix.fire(vector.load(Ordering::SeqCst));
        }
        self.isr.fetch_or(isr, Ordering::SeqCst);
        if let Some(pin) = self.pin.get() {
            pin.set(true);
        }
    }

    /// Reading the interrupt status is what acknowledges INTx.
    fn take_isr(&self) -> u8 {
        // The pin first: it may stay high without a cause until the next read, which is harmless;
        // the other way round a cause that comes in between would be left with a low pin.
        if let Some(pin) = self.pin.get() {
            pin.set(false);
        }
        self.isr.swap(0, Ordering::SeqCst)
    }

    fn is_started(&self) -> bool {
        self.status.load(Ordering::SeqCst) & status::DRIVER_OK != 0
    }
}

impl Transport for Upward {
    fn queue_used(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.interrupt(vector, ISR_QUEUE);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.is_started() {
            self.interrupt(&self.config_vector, ISR_CONFIG);
        }
    }

    fn needs_reset(&self, why: &str) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET == 0 {
            log::warn!("{}: {why}; it needs a reset by the guest", self.name);
            if before & status::DRIVER_OK != 0 {
                self.interrupt(&self.config_vector, ISR_CONFIG);
            }
        }
    }
}

struct Inner {
    device: Arc<dyn VirtioDevice>,
    up: Arc<Upward>,
    mem: Mem,
    slow: Arc<SlowThread>,
    registers: Mutex<Registers>,
    /// What kicks go to; empty while the device is not started.
    queues: RwLock<Arc<[Arc<Queue>]>>,
    crew: Mutex<Option<Crew>>,
    /// Set by `stop`: never to be started again.
    gone: AtomicBool,
}

/// A virtio device on PCI.
pub struct VirtioPci {
    inner: Arc<Inner>,
}

impl VirtioPci {
    /// Gives `device` its transport. `name` is for the log. `vectors`: MSI-X vectors; None for one a
    /// queue and one for configuration changes.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        name: String,
        mem: Mem,
        interrupts: Arc<dyn Interrupts>,
        slow: Arc<SlowThread>,
        vectors: Option<u16>,
    ) -> VirtioPci {
        let queues = device.queue_sizes().len() as u16;
        let place = Place { bar: 0, table: TABLE as u32, pba: PBA as u32 };
        let up = Arc::new(Upward {
            name,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            msix: Msix::new(interrupts, vectors.unwrap_or(queues.saturating_add(1)), place),
            pin: OnceLock::new(),
        });
        device.attach(up.clone());
        let registers = Mutex::new(Registers::new(&*device));
        let inner = Inner {
            device,
            up,
            mem,
            slow,
            registers,
            queues: RwLock::new(Arc::new([])),
            crew: Mutex::new(None),
            gone: AtomicBool::new(false),
        };
        VirtioPci { inner: Arc::new(inner) }
    }
}

impl Inner {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn crew(&self) -> MutexGuard<'_, Option<Crew>> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::RING
    }

    /// The common configuration as bytes, so that any access reads what is there.
    fn common(&self) -> [u8; common::LEN as usize] {
        let registers = self.registers();
        let mut bytes = [0; common::LEN as usize];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..][..value.len()].copy_from_slice(value);
        let word = |bits: u64, select: u32| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        let offered = word(self.offered(), registers.device_feature_select);
        let acked = word(registers.acked, registers.driver_feature_select);
        put(common::DEVICE_FEATURE_SELECT, &registers.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &offered.to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &registers.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &acked.to_le_bytes());
        put(common::CONFIG_VECTOR, &self.up.config_vector.load(Ordering::SeqCst).to_le_bytes());
        put(common::NUM_QUEUES, &(registers.queues.len() as u16).to_le_bytes());
        put(common::DEVICE_STATUS, &[self.up.status.load(Ordering::SeqCst)]);
        put(common::CONFIG_GENERATION, &[self.up.generation.load(Ordering::SeqCst)]);
        put(common::QUEUE_SELECT, &registers.queue_select.to_le_bytes());
        let index = registers.queue_select;
        let vector = self.up.queue_vectors.get(usize::from(index));
        let vector = vector.map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst));
        put(common::QUEUE_VECTOR, &vector.to_le_bytes());
        if let Some(queue) = registers.queues.get(usize::from(index)) {
            put(common::QUEUE_SIZE, &queue.setup.size.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &index.to_le_bytes());
            put(common::QUEUE_DESC, &queue.setup.desc.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.setup.avail.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.setup.used.to_le_bytes());
            put(common::QUEUE_NOTIFY_DATA, &index.to_le_bytes());
        }
        bytes
    }

    /// A write to the common configuration: exactly one register, or half of a 64-bit one.
    fn write_common(self: &Arc<Self>, off: u64, data: &[u8]) -> Effect {
        let whole = common::WRITABLE.contains(&(off, data.len()));
        let half = data.len() == 4 && common::WRITABLE.contains(&(off & !7, 8));
        if !whole && !half {
            return Effect::None;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let now = self.up.status.load(Ordering::SeqCst);
        let mut registers = self.registers();
        match off {
            common::DEVICE_FEATURE_SELECT => registers.device_feature_select = value as u32,
            common::DRIVER_FEATURE_SELECT => registers.driver_feature_select = value as u32,
            // Once agreed on, features stay (3.1.1).
            common::DRIVER_FEATURE if now & status::FEATURES_OK == 0 => {
                match registers.driver_feature_select {
                    0 => registers.acked = registers.acked >> 32 << 32 | value & 0xffff_ffff,
                    1 => registers.acked = registers.acked & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            common::CONFIG_VECTOR => self.up.config_vector.store(self.vector(value), Ordering::SeqCst),
            common::DEVICE_STATUS => {
                drop(registers);
                return self.write_status(value as u8);
            }
            common::QUEUE_SELECT => registers.queue_select = value as u16,
            common::QUEUE_VECTOR => {
                if let Some(vector) = self.up.queue_vectors.get(usize::from(registers.queue_select)) {
                    vector.store(self.vector(value), Ordering::SeqCst);
                }
            }
            common::QUEUE_RESET if value == 1 && registers.acked & feature::RING_RESET != 0 => {
                let (this, index) = (self.clone(), registers.queue_select);
                return Effect::Run(Box::new(move || this.reset_queue(index)));
            }
            common::QUEUE_RESET => {}
            _ => {
                let index = registers.queue_select;
                // What is in use does not move; 0 does not disable (4.1.4.3.2).
                let Some(queue) = registers.queue().filter(|q| !q.enabled) else { return Effect::None };
                queue.write(off, data.len(), value);
                if queue.enabled && now & status::DRIVER_OK != 0 {
                    let this = self.clone();
                    return Effect::Run(Box::new(move || this.enable_late(index)));
                }
            }
        }
        Effect::None
    }

    /// The vector that the driver asks for; none, if there is no such vector (4.1.5.1.2.1).
    fn vector(&self, value: u64) -> u16 {
        let value = value as u16;
        if value < self.up.msix.len() { value } else { NO_VECTOR }
    }

    fn write_status(self: &Arc<Self>, value: u8) -> Effect {
        if value == 0 {
            let this = self.clone();
            return Effect::Run(Box::new(move || this.reset()));
        }
        let mut set = value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        let mut now = self.up.status.load(Ordering::SeqCst);
        let acked = self.registers().acked;
        let agreeable = acked & !self.offered() == 0 && acked & feature::VERSION_1 != 0;
        if value & status::FEATURES_OK != 0 && agreeable {
            set |= status::FEATURES_OK;
        }
        // Only what has agreed on features and is not broken starts.
        now |= set;
        let startable = now & status::FEATURES_OK != 0 && now & status::NEEDS_RESET == 0;
        if value & status::DRIVER_OK != 0 && startable {
            set |= status::DRIVER_OK;
        }
        // Bits are never cleared but by a reset (2.1.1).
        let before = self.up.status.fetch_or(set, Ordering::SeqCst);
        if set & !before & status::DRIVER_OK == 0 {
            return Effect::None;
        }
        let this = self.clone();
        Effect::Run(Box::new(move || this.start()))
    }

    /// DRIVER_OK: the queues and the workers come to life.
    fn start(self: &Arc<Self>) {
        let mut crew = self.crew();
        // Another processor may have been faster, with a reset or the same.
        if crew.is_some() || !self.up.is_started() || self.gone.load(Ordering::SeqCst) {
            return;
        }
        let (acked, setups) = {
            let registers = self.registers();
            (registers.acked, registers.queues.clone())
        };
        let transport: Arc<dyn Transport> = self.up.clone();
        let halt = Arc::new(Halt::default());
        let queue = |n| Arc::new(Queue::new(n, self.mem.clone(), transport.clone(), halt.clone()));
        let queues: Arc<[Arc<Queue>]> = (0..setups.len() as u16).map(queue).collect();
        for ((queue, registers), max) in queues.iter().zip(&setups).zip(self.device.queue_sizes()) {
            let event_idx = acked & feature::EVENT_IDX != 0;
            if registers.enabled && !queue.enable(registers.setup, *max, event_idx) {
                let why = format!("queue {} is impossible: {:x?}", queue.index(), registers.setup);
                return transport.needs_reset(&why);
            }
        }
        let started = self
            .device
            .start(acked)
            .and_then(|tasks| Crew::start(tasks, queues.clone(), halt, &transport, &self.slow));
        match started {
            Ok(started) => {
                *self.queues.write().unwrap_or_else(PoisonError::into_inner) = queues.clone();
                *crew = Some(started);
                // A kick that came before the line above went nowhere.
                queues.iter().for_each(|q| q.kick_workers());
            }
            Err(e) => transport.needs_reset(&format!("cannot start: {e}")),
        }
    }

    /// The driver, or the machine, resets the device: returns when no worker touches the guest.
    fn reset(&self) {
        let mut crew = self.crew();
        *self.queues.write().unwrap_or_else(PoisonError::into_inner) = Arc::new([]);
        *crew = None;
        self.device.reset();
        *self.registers() = Registers::new(&*self.device);
        for (n, vector) in self.up.queue_vectors.iter().chain([&self.up.config_vector]).enumerate() {
            vector.store(NO_VECTOR, Ordering::SeqCst);
            self.up.msix.forget(n as u16);
        }
        self.up.take_isr();
        self.up.status.store(0, Ordering::SeqCst);
    }

    /// One queue goes out of use (2.6.1), once no worker holds a request of it.
    fn reset_queue(&self, index: u16) {
        let crew = self.crew();
        let fresh = Registers::new(&*self.device);
        let Some(fresh) = fresh.queues.get(usize::from(index)) else { return };
        if let Some(crew) = crew.as_ref() {
            crew.pause();
            crew.queue(index).inspect(|q| q.disable());
        }
        if let Some(queue) = self.registers().queues.get_mut(usize::from(index)) {
            *queue = *fresh;
        }
        if let Some(vector) = self.up.queue_vectors.get(usize::from(index)) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        if let Some(crew) = crew.as_ref() {
            crew.resume();
        }
    }

    /// A queue that was reset comes back.
    fn enable_late(&self, index: u16) {
        let crew = self.crew();
        let Some(queue) = crew.as_ref().and_then(|c| c.queue(index)) else { return };
        let (acked, registers) = {
            let registers = self.registers();
            (registers.acked, registers.queues.get(usize::from(index)).copied().unwrap_or_default())
        };
        let max = self.device.queue_sizes().get(usize::from(index)).copied().unwrap_or_default();
        if queue.is_enabled() || !registers.enabled {
            return;
        }
        if queue.enable(registers.setup, max, acked & feature::EVENT_IDX != 0) {
            queue.kick_workers();
        } else {
            self.up.needs_reset(&format!("queue {index} is impossible: {:x?}", registers.setup));
        }
    }

    fn notify(&self, off: u64) {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = usize::try_from(off / NOTIFY_STEP).ok().and_then(|n| queues.get(n)) {
            queue.kick();
        }
    }
}

struct Bar(Arc<Inner>);

impl BusDevice for Bar {
    fn read(&self, off: u64, data: &mut [u8]) {
        match off {
            0..ISR => {
                let bytes = self.0.common();
                for (n, byte) in data.iter_mut().enumerate() {
                    *byte = bytes.get((off - COMMON) as usize + n).copied().unwrap_or(0);
                }
            }
            ISR => data[0] = self.0.up.take_isr(),
            DEVICE..NOTIFY => self.0.device.read_config(off - DEVICE, data),
            PBA.. if !self.0.up.msix.read(off, data) => data.fill(0),
            _ => {}
        }
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        match off {
            NOTIFY..PBA => self.0.notify(off - NOTIFY),
            0..ISR => return self.0.write_common(off - COMMON, data),
            DEVICE..NOTIFY => self.0.device.write_config(off - DEVICE, data),
            TABLE.. => self.0.up.msix.write(off, data),
            _ => {}
        }
        Effect::None
    }
}

impl PciDevice for VirtioPci {
    fn ident(&self) -> Ident {
        let kind = self.inner.device.kind();
        Ident {
            vendor: 0x1af4,
            device: 0x1040 + kind.id,
            class: kind.class,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec { index: 0, size: BAR_SIZE, is_64bit: true, prefetchable: false }]
    }

    fn bar(&self, _index: u8) -> Arc<dyn BusDevice> {
        Arc::new(Bar(self.inner.clone()))
    }

    fn capabilities(&self) -> Vec<Capability> {
        // struct virtio_pci_cap (4.1.4): length, type, BAR, id, padding, offset, length.
        let cap = |kind: u8, offset: u64, len: u64, more: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
            body.extend((offset as u32).to_le_bytes());
            body.extend((len as u32).to_le_bytes());
            body.extend(more);
            Capability { id: 0x09, body, mask: Vec::new() }
        };
        let queues = self.inner.up.queue_vectors.len() as u64;
        let mut window = cap(5, 0, 0, &[0; 4]);
        // BAR, offset, length and data are the driver's (4.1.4.9).
        window.mask = vec![0; window.body.len()];
        window.mask[2] = 0xff;
        window.mask[6..].fill(0xff);
        vec![
            cap(1, COMMON, common::LEN, &[]),
            cap(2, NOTIFY, (queues * NOTIFY_STEP).max(4), &(NOTIFY_STEP as u32).to_le_bytes()),
            cap(3, ISR, 1, &[]),
            cap(4, DEVICE, NOTIFY - DEVICE, &[]),
            window,
        ]
    }

    fn window(&self) -> Option<usize> {
        Some(4)
    }

    fn msix(&self) -> Option<&Msix> {
        Some(&self.inner.up.msix)
    }

    fn connect(&self, pin: Arc<Pin>) {
        // A device is plugged once.
        let _ = self.inner.up.pin.set(pin);
    }

    fn reset(&self) {
        self.inner.reset();
    }

    fn pause(&self) {
        if let Some(crew) = self.inner.crew().as_ref() {
            crew.pause();
        }
    }

    fn resume(&self) {
        if let Some(crew) = self.inner.crew().as_ref() {
            crew.resume();
        }
    }

    fn stop(&self) {
        self.inner.gone.store(true, Ordering::SeqCst);
        self.inner.reset();
    }
}

#[cfg(test)]
#[path = "pci_test.rs"]
mod tests;
