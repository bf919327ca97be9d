//! virtio-scsi: the face of a SCSI controller, and its bus (virtio 1.2, 5.6).
//!
//! Owns: the configuration space, which units are on the bus, what the driver has still to be told.
//! Requests are in `scsi_io.rs`, task management and events in `scsi_control.rs`, the units' commands
//! in `scsi_unit.rs`, `scsi_disk.rs` and `scsi_cd.rs`. Never: knows what is below a unit. Threads:
//! vCPUs read and write the configuration; control adds and takes units; the workers run between
//! DRIVER_OK and reset. Locks: `units` (read for the moment of a look-up), `news`, and `running`
//! (see `scsi_io.rs`): none is held while another is taken.

use super::device::{Kind, Task, Thread, Transport, VirtioDevice};
use super::queue::MAX_SIZE;
use super::scsi_control::ControlWorker;
use super::scsi_io::{RequestWorker, Running};
use super::scsi_sense::Sense;
use super::scsi_unit::{Address, Unit};
use super::worker::IoThread;
use crate::bail;
use crate::error::Result;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

const F_HOTPLUG: u64 = 1 << 1;
const F_CHANGE: u64 = 1 << 2;

/// The control and the event queue; requests are behind them.
pub(super) const CONTROL_QUEUE: u16 = 0;
pub(super) const EVENT_QUEUE: u16 = 1;
pub(super) const REQUEST_QUEUES: u16 = 2;

const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;
/// Offsets of the members that the driver may write.
const SENSE_SIZE_AT: usize = 20;
const CDB_SIZE_AT: usize = 24;
/// The largest that it may ask for.
pub(super) const CDB_MAX: u32 = 255;
const SENSE_MAX: u32 = 65535;
/// Bytes of `struct virtio_scsi_event`.
pub(super) const EVENT_LEN: usize = 16;
/// Events that are kept while the driver gives no buffers.
const EVENTS_MAX: usize = 64;

pub(super) const T_TRANSPORT_RESET: u32 = 1;
pub(super) const T_ASYNC_NOTIFY: u32 = 2;
pub(super) const T_PARAM_CHANGE: u32 = 3;
/// In an event: others before it are lost.
pub(super) const T_EVENTS_MISSED: u32 = 1 << 31;
const RESET_RESCAN: u32 = 1;
const RESET_REMOVED: u32 = 2;
/// The media class of asynchronous notifications.
pub(super) const ASYNC_MEDIA_CHANGE: u32 = 16;

/// Targets and logical units that the transport can address.
pub const MAX_TARGET: u32 = 255;
/// See [`MAX_TARGET`].
pub const MAX_LUN: u32 = 16383;

/// The properties of `virtio-scsi-pci`, with QEMU's names and defaults.
#[derive(Clone)]
pub struct ScsiConfig {
    /// Name for the threads and the log.
    pub id: String,
    /// Request queues; one for each vCPU is best.
    pub num_queues: u16,
    /// Entries of a queue; a power of two from 4 to 1024.
    pub queue_size: u16,
    /// Longest transfer in 512-byte sectors, as a hint.
    pub max_sectors: u32,
    /// Commands that one unit may be given at a time, as a hint.
    pub cmd_per_lun: u32,
    /// The driver hears of units that come and go.
    pub hotplug: bool,
    /// The driver hears of changed lengths.
    pub param_change: bool,
    /// Threads that serve the request queues.
    pub workers: u16,
    /// The user's thread that serves the request queues instead.
    pub iothread: Option<Arc<IoThread>>,
    /// How long each of them may look for the next request before it sleeps.
    pub poll: Duration,
}

impl Default for ScsiConfig {
    fn default() -> ScsiConfig {
        ScsiConfig {
            id: String::new(),
            num_queues: 1,
            queue_size: 256,
            max_sectors: 0xffff,
            cmd_per_lun: 128,
            hotplug: true,
            param_change: true,
            workers: 1,
            iothread: None,
            poll: Duration::ZERO,
        }
    }
}

impl ScsiConfig {
    /// Refuses what the device cannot be.
    pub fn check(&self) -> Result<()> {
        if !(1..=1022).contains(&self.num_queues) {
            bail!(
                "Invalid number of queues (= {}), must be a positive integer less than 1023",
                self.num_queues
            );
        }
        if self.queue_size <= 2 {
            bail!("invalid virtqueue_size property (= {}), must be > 2", self.queue_size);
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > MAX_SIZE {
            bail!(
                "invalid virtqueue_size property (= {}), must be a power of 2 (max {MAX_SIZE})",
                self.queue_size
            );
        }
        if self.cmd_per_lun == 0 || self.max_sectors == 0 {
            bail!("cmd_per_lun and max_sectors must be larger than 0");
        }
        if !(1..=64).contains(&self.workers) {
            bail!("workers property must be between 1 and 64");
        }
        if self.iothread.is_some() && self.workers != 1 {
            bail!("'workers' and 'iothread' are mutually exclusive: an iothread is one worker");
        }
        Ok(())
    }
}

/// What the driver has still to be told by the event queue.
#[derive(Default)]
pub(super) struct News {
    events: VecDeque<[u8; EVENT_LEN]>,
    missed: bool,
    /// Wakes the control worker; while the driver is up.
    bell: Option<Arc<EventFd>>,
}

impl News {
    /// The next event.
    pub(super) fn take(&mut self) -> Option<[u8; EVENT_LEN]> {
        let mut event = self.events.pop_front()?;
        if std::mem::take(&mut self.missed) {
            event[3] |= (T_EVENTS_MISSED >> 24) as u8;
        }
        Some(event)
    }
}

/// The units of a controller, as workers and control share them.
pub struct Bus {
    /// Its name: `scsi0.0`.
    pub name: String,
    /// In the order of their addresses.
    units: RwLock<Arc<[Arc<Unit>]>>,
    news: Mutex<News>,
    pub(super) running: Mutex<Running>,
    acked: AtomicU64,
    pub(super) sense_size: AtomicU32,
    pub(super) cdb_size: AtomicU32,
}

impl Bus {
    /// The units, by address.
    pub fn units(&self) -> Arc<[Arc<Unit>]> {
        self.units.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The unit at `address`.
    pub fn find(&self, address: Address) -> Option<Arc<Unit>> {
        let units = self.units.read().unwrap_or_else(PoisonError::into_inner);
        let at = units.binary_search_by_key(&address, |u| u.address).ok()?;
        Some(units[at].clone())
    }

    pub(super) fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place for a new unit, with QEMU's texts where there is none.
    pub fn place(&self, target: Option<u32>, lun: Option<u32>) -> Result<Address> {
        if let Some(target) = target.filter(|t| *t > MAX_TARGET) {
            bail!("bad scsi device id: {target}");
        }
        if let Some(lun) = lun.filter(|l| *l > MAX_LUN) {
            bail!("bad scsi device lun: {lun}");
        }
        let address = |target: u32, lun: u32| Address { target: target as u8, lun: lun as u16 };
        let free = |a: &Address| self.find(*a).is_none();
        match (target, lun) {
            (None, lun) => {
                let lun = lun.unwrap_or(0);
                let found = (0..=MAX_TARGET).map(|t| address(t, lun)).find(free);
                found.ok_or_else(|| crate::error::Error::new("no free target"))
            }
            (Some(target), None) => {
                let found = (0..=MAX_LUN).map(|l| address(target, l)).find(free);
                found.ok_or_else(|| crate::error::Error::new("no free lun"))
            }
            (Some(target), Some(lun)) => match self.find(address(target, lun)) {
                None => Ok(address(target, lun)),
                Some(unit) => bail!("lun already used by '{}'", unit.config.id),
            },
        }
    }

    /// Puts a unit on the bus, at a place that is free, and tells the driver.
    pub fn attach(self: &Arc<Self>, unit: Arc<Unit>) {
        let (bus, it) = (Arc::downgrade(self), Arc::downgrade(&unit));
        unit.handle().on_resize(Some(Box::new(move |len| {
            if let (Some(bus), Some(unit)) = (bus.upgrade(), it.upgrade())
                && unit.look(len)
                && unit.tray.is_none()
            {
                unit.attend(Sense::CAPACITY_CHANGED);
                let reason = u32::from(Sense::CAPACITY_CHANGED.1) | u32::from(Sense::CAPACITY_CHANGED.2) << 8;
                bus.tell(F_CHANGE, T_PARAM_CHANGE, &unit, reason);
            }
        })));
        if let Some(tray) = &unit.tray {
            let (bus, it) = (Arc::downgrade(self), Arc::downgrade(&unit));
            tray.on_news(Some(Box::new(move || {
                if let (Some(bus), Some(unit)) = (bus.upgrade(), it.upgrade())
                    && unit.subscribed.load(Ordering::Relaxed) & ASYNC_MEDIA_CHANGE != 0
                {
                    bus.tell(0, T_ASYNC_NOTIFY, &unit, ASYNC_MEDIA_CHANGE);
                }
            })));
        }
        self.change(|units| {
            units.push(unit.clone());
            units.sort_by_key(|u| u.address);
        });
        self.changed(&unit, RESET_RESCAN);
    }

    /// Takes a unit off the bus, and tells the driver. Requests that have found it fail.
    pub fn detach(&self, unit: &Arc<Unit>) {
        self.change(|units| units.retain(|u| !Arc::ptr_eq(u, unit)));
        unit.leave();
        self.changed(unit, RESET_REMOVED);
    }

    fn change(&self, f: impl FnOnce(&mut Vec<Arc<Unit>>)) {
        let mut units = self.units.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = units.to_vec();
        f(&mut list);
        *units = list.into();
    }

    fn changed(&self, unit: &Unit, reason: u32) {
        let same = |u: &&Arc<Unit>| u.address.target == unit.address.target && u.address != unit.address;
        // A driver that comes looks for itself.
        if self.news().bell.is_some() {
            self.units().iter().filter(same).for_each(|u| u.attend(Sense::LUNS_CHANGED));
        }
        self.tell(F_HOTPLUG, T_TRANSPORT_RESET, unit, reason);
    }

    /// Queues an event, if the driver is up and has asked for such (`feature`).
    fn tell(&self, feature: u64, event: u32, unit: &Unit, reason: u32) {
        if self.acked.load(Ordering::SeqCst) & feature != feature {
            return;
        }
        let mut bytes = [0; EVENT_LEN];
        bytes[..4].copy_from_slice(&event.to_le_bytes());
        bytes[4..12].copy_from_slice(&unit.address.lun());
        bytes[12..].copy_from_slice(&reason.to_le_bytes());
        let mut news = self.news();
        let Some(bell) = news.bell.clone() else { return };
        if news.events.len() < EVENTS_MAX {
            news.events.push_back(bytes);
        } else {
            news.missed = true;
        }
        drop(news);
        ring(&bell);
    }

    /// Wakes the control worker.
    pub(super) fn ring(&self) {
        let bell = self.news().bell.clone();
        bell.iter().for_each(|bell| ring(bell));
    }
}

fn ring(bell: &EventFd) {
    // It fails only at 2^64 - 2 unread wake-ups; then it is readable anyway.
    let _ = bell.write(1);
}

/// See the module's head.
pub struct Scsi {
    config: ScsiConfig,
    bus: Arc<Bus>,
    queue_sizes: Vec<u16>,
    transport: OnceLock<Arc<dyn Transport>>,
}

impl Scsi {
    /// A controller without units, whose bus has the name `bus`.
    pub fn new(config: ScsiConfig, bus: String) -> Result<Arc<Scsi>> {
        config.check()?;
        let bus = Arc::new(Bus {
            name: bus,
            units: RwLock::new(Arc::new([])),
            news: Mutex::default(),
            running: Mutex::default(),
            acked: AtomicU64::new(0),
            sense_size: AtomicU32::new(SENSE_SIZE),
            cdb_size: AtomicU32::new(CDB_SIZE),
        });
        let queue_sizes = vec![config.queue_size; usize::from(REQUEST_QUEUES + config.num_queues)];
        Ok(Arc::new(Scsi { config, bus, queue_sizes, transport: OnceLock::new() }))
    }

    /// Its bus.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }
}

impl VirtioDevice for Scsi {
    fn kind(&self) -> Kind {
        Kind { id: 8, class: 0x01_00_00, name: "virtio-scsi" }
    }

    fn features(&self) -> u64 {
        let on = |yes: bool, bit: u64| if yes { bit } else { 0 };
        on(self.config.hotplug, F_HOTPLUG) | on(self.config.param_change, F_CHANGE)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, off: u64, data: &mut [u8]) {
        // struct virtio_scsi_config (5.6.4).
        let mut bytes = [0; 36];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0, self.config.num_queues.into());
        // Room for the two headers, when the driver has no indirect descriptors.
        put(4, u32::from(self.config.queue_size) - 2);
        put(8, self.config.max_sectors);
        put(12, self.config.cmd_per_lun);
        put(16, EVENT_LEN as u32);
        put(SENSE_SIZE_AT, self.bus.sense_size.load(Ordering::Relaxed));
        put(CDB_SIZE_AT, self.bus.cdb_size.load(Ordering::Relaxed));
        // max_channel 0 before max_target.
        put(28, MAX_TARGET << 16);
        put(32, MAX_LUN);
        let Ok(off) = usize::try_from(off) else { return };
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(off)) {
            *to = *from;
        }
    }

    fn write_config(&self, off: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        // What the driver asks for holds from its start on; what it cannot have is ignored.
        match usize::try_from(off) {
            Ok(SENSE_SIZE_AT) if value <= SENSE_MAX => self.bus.sense_size.store(value, Ordering::Relaxed),
            Ok(CDB_SIZE_AT) if value <= CDB_MAX => self.bus.cdb_size.store(value, Ordering::Relaxed),
            _ => {}
        }
    }

    fn attach(&self, transport: Arc<dyn Transport>) {
        // A second transport would be an error of the caller; the first one stays.
        let _ = self.transport.set(transport);
    }

    fn start(&self, acked: u64) -> io::Result<Vec<Task>> {
        let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        *self.bus.news() = News { bell: Some(bell.clone()), ..News::default() };
        self.bus.acked.store(acked, Ordering::SeqCst);
        let control = Task {
            worker: Box::new(ControlWorker::new(self.bus.clone(), bell)),
            queues: vec![CONTROL_QUEUE, EVENT_QUEUE],
            thread: Thread::Slow,
            poll: Duration::ZERO,
        };
        let queues: Vec<u16> = (REQUEST_QUEUES..REQUEST_QUEUES + self.config.num_queues).collect();
        let task = |n: u16| Task {
            worker: Box::new(RequestWorker::new(self.bus.clone())),
            queues: queues.clone(),
            thread: match (&self.config.iothread, n, &*self.config.id) {
                (Some(io), _, _) => Thread::Io(io.clone()),
                (None, 0, id) => Thread::Own(format!("scsi {id}")),
                (None, n, id) => Thread::Own(format!("scsi {id} {n}")),
            },
            poll: self.config.poll,
        };
        Ok(std::iter::once(control).chain((0..self.config.workers).map(task)).collect())
    }

    fn reset(&self) {
        self.bus.acked.store(0, Ordering::SeqCst);
        *self.bus.news() = News::default();
        *self.bus.running.lock().unwrap_or_else(PoisonError::into_inner) = Running::default();
        self.bus.sense_size.store(SENSE_SIZE, Ordering::Relaxed);
        self.bus.cdb_size.store(CDB_SIZE, Ordering::Relaxed);
        self.bus.units().iter().for_each(|u| u.reset());
    }

    fn scsi_bus(&self) -> Option<Arc<Bus>> {
        Some(self.bus.clone())
    }
}

#[cfg(test)]
#[path = "scsi_test.rs"]
mod tests;
