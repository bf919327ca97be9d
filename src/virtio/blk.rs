//! virtio-blk: the face of a disk (virtio 1.2, 5.2). What its requests do is in `blk_io.rs`.
//!
//! Owns: the device's properties, its configuration space, the cache mode that it agreed on.
//! Never: knows what is below the [`Handle`]. Threads: vCPUs read and write the configuration (no
//! lock is held and nothing waits: the capacity is a copy); control makes it, resizes it; its own
//! threads run [`DiskWorker`]s between DRIVER_OK and reset. Locks: none.

use super::blk_io::{DiskWorker, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, SECTOR};
use super::device::{Kind, Task, Thread, Transport, VirtioDevice};
use super::queue::MAX_SIZE;
use super::worker::IoThread;
use crate::bail;
use crate::block::handle::Handle;
use crate::error::Result;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap`, padded.
const CONFIG_LEN: usize = 60;
/// Offset of `writeback` in it, the one member that the driver may write.
const WRITEBACK: usize = 32;

/// The properties of `virtio-blk-pci`, with QEMU's names and defaults. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct BlkConfig {
    /// Name for the threads and the log.
    pub id: String,
    /// What the driver gets as the disk's identity; at most 20 bytes.
    pub serial: String,
    /// The driver may not write. Set also by a read-only medium.
    pub read_only: bool,
    /// Smallest unit of a request; a power of two from 512 to 2 MiB.
    pub logical_block_size: u32,
    /// Unit that the storage writes without reading first; at least the logical one.
    pub physical_block_size: u32,
    /// Smallest request that makes sense; 0: not told.
    pub min_io_size: u32,
    /// Best size of a request; 0: not told.
    pub opt_io_size: u32,
    /// Unit of discards; `None`: what the image says, or the logical block size.
    pub discard_granularity: Option<u32>,
    /// Queues; one for each vCPU is best.
    pub num_queues: u16,
    /// Entries of a queue; a power of two from 4 to 1024.
    pub queue_size: u16,
    /// The driver may discard.
    pub discard: bool,
    /// The driver may write zeroes without sending them.
    pub write_zeroes: bool,
    /// Longest discard in 512-byte sectors.
    pub max_discard_sectors: u32,
    /// Longest write of zeroes in 512-byte sectors.
    pub max_write_zeroes_sectors: u32,
    /// The driver may switch the write cache on and off.
    pub config_wce: bool,
    /// Threads that serve the queues.
    pub workers: u16,
    /// The thread that serves them instead; other disks may have the same.
    pub iothread: Option<Arc<IoThread>>,
    /// How long each of them may look for the next request before it sleeps.
    pub poll: Duration,
}

impl Default for BlkConfig {
    fn default() -> BlkConfig {
        BlkConfig {
            id: String::new(),
            serial: String::new(),
            read_only: false,
            logical_block_size: 512,
            physical_block_size: 512,
            min_io_size: 0,
            opt_io_size: 0,
            discard_granularity: None,
            num_queues: 1,
            queue_size: 256,
            discard: true,
            write_zeroes: true,
            max_discard_sectors: MAX_SEGMENT_SECTORS,
            max_write_zeroes_sectors: MAX_SEGMENT_SECTORS,
            config_wce: true,
            workers: 1,
            iothread: None,
            poll: Duration::ZERO,
        }
    }
}

impl BlkConfig {
    /// Refuses what the device cannot be, in QEMU's words.
    pub fn check(&self) -> Result<()> {
        let block = u64::from(self.logical_block_size);
        for (name, size) in [
            ("logical_block_size", self.logical_block_size),
            ("physical_block_size", self.physical_block_size),
        ] {
            if !(512..=2 << 20).contains(&size) {
                bail!("parameter {name} must be between 512 and 2097152");
            }
            if !size.is_power_of_two() {
                bail!("parameter {name} must be a power of 2");
            }
        }
        if self.logical_block_size > self.physical_block_size {
            bail!("logical_block_size > physical_block_size not supported");
        }
        for (name, size) in [
            ("min_io_size", Some(self.min_io_size)),
            ("opt_io_size", Some(self.opt_io_size)),
            ("discard_granularity", self.discard_granularity),
        ] {
            if size.is_some_and(|s| u64::from(s) % block != 0) {
                bail!("{name} must be a multiple of logical_block_size");
            }
        }
        if u64::from(self.min_io_size) / block > u64::from(u16::MAX) {
            bail!("min_io_size must not exceed {} logical blocks", u16::MAX);
        }
        for (name, sectors) in [
            ("max-discard-sectors", self.max_discard_sectors),
            ("max-write-zeroes-sectors", self.max_write_zeroes_sectors),
        ] {
            if !(1..=MAX_SEGMENT_SECTORS).contains(&sectors) {
                bail!("invalid {name} property ({sectors}), must be between 1 and {MAX_SEGMENT_SECTORS}");
            }
        }
        if self.num_queues == 0 {
            bail!("num-queues property must be larger than 0");
        }
        if self.num_queues > 1024 {
            bail!("num-queues property must be at most 1024");
        }
        if self.queue_size <= 2 {
            bail!("invalid queue-size property ({}), must be > 2", self.queue_size);
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > MAX_SIZE {
            bail!("invalid queue-size property ({}), must be a power of 2 (max {MAX_SIZE})", self.queue_size);
        }
        if !(1..=64).contains(&self.workers) {
            bail!("workers property must be between 1 and 64");
        }
        if self.iothread.is_some() && self.workers != 1 {
            bail!("'workers' and 'iothread' are mutually exclusive: an iothread is one worker");
        }
        if self.serial.len() > 20 {
            bail!("Property 'serial' must have at most 20 bytes");
        }
        Ok(())
    }
}

/// What the face and the workers share.
pub struct Disk {
    pub(super) handle: Arc<Handle>,
    /// In sectors of 512 bytes. A copy: to ask the handle may mean to wait for control.
    pub(super) capacity: AtomicU64,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    pub(super) serial: [u8; 20],
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    pub(super) max_discard: u32,
    pub(super) max_zeroes: u32,
    transport: OnceLock<Arc<dyn Transport>>,
}

impl Disk {
    fn resized(&self, bytes: u64) {
        let sectors = bytes / SECTOR;
        if self.capacity.swap(sectors, Ordering::Relaxed) != sectors
            && let Some(transport) = self.transport.get()
        {
            transport.config_changed();
        }
    }
}

/// See the module's head.
pub struct Blk {
    config: BlkConfig,
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    /// The write cache as the user set it; a reset goes back to it.
    write_cache: bool,
    fixed: [u8; CONFIG_LEN],
}

impl Blk {
    /// A disk on `handle`, which from now on tells it of changes of length. Control thread.
    pub fn new(config: BlkConfig, handle: Arc<Handle>) -> Result<Arc<Blk>> {
        config.check()?;
        let read_only = config.read_only || handle.read_only();
        let mut serial = [0; 20];
        serial[..config.serial.len()].copy_from_slice(config.serial.as_bytes());
        let granularity = match (config.discard_granularity, handle.limits().discard_alignment) {
            (Some(g), _) => g.max(config.logical_block_size),
            (None, image) => image.max(config.logical_block_size),
        };
        let disk = Arc::new(Disk {
            capacity: AtomicU64::new(handle.len() / SECTOR),
            block_size: config.logical_block_size,
            read_only,
            serial,
            discard: config.discard && !read_only,
            write_zeroes: config.write_zeroes && !read_only,
            max_discard: config.max_discard_sectors,
            max_zeroes: config.max_write_zeroes_sectors,
            transport: OnceLock::new(),
            handle: handle.clone(),
        });
        let hook = Arc::downgrade(&disk);
        handle.on_resize(Some(Box::new(move |bytes| {
            if let Some(disk) = hook.upgrade() {
                disk.resized(bytes);
            }
        })));
        Ok(Arc::new(Blk {
            queue_sizes: vec![config.queue_size; usize::from(config.num_queues)],
            write_cache: handle.write_cache(),
            fixed: fixed_config(&config, granularity),
            disk,
            config,
        }))
    }

    /// The disk behind it.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.disk.handle
    }

    /// The properties it was made with.
    pub fn config(&self) -> &BlkConfig {
        &self.config
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4), without capacity and writeback.
fn fixed_config(c: &BlkConfig, granularity: u32) -> [u8; CONFIG_LEN] {
    let mut bytes = [0; CONFIG_LEN];
    let mut put = |at: usize, v: &[u8]| bytes[at..at + v.len()].copy_from_slice(v);
    // Room for the header and the status, when the driver has no indirect descriptors.
    put(12, &u32::from(c.queue_size - 2).to_le_bytes());
    put(20, &c.logical_block_size.to_le_bytes());
    put(24, &[(c.physical_block_size / c.logical_block_size).trailing_zeros() as u8, 0]);
    put(26, &((c.min_io_size / c.logical_block_size) as u16).to_le_bytes());
    put(28, &(c.opt_io_size / c.logical_block_size).to_le_bytes());
    put(34, &c.num_queues.to_le_bytes());
    put(36, &c.max_discard_sectors.to_le_bytes());
    put(40, &(MAX_SEGMENTS as u32).to_le_bytes());
    put(44, &(granularity / SECTOR as u32).to_le_bytes());
    put(48, &c.max_write_zeroes_sectors.to_le_bytes());
    put(52, &(MAX_SEGMENTS as u32).to_le_bytes());
    put(56, &[1]);
    bytes
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        Kind { id: 2, class: 0x01_00_00, name: "virtio-blk" }
    }

    fn features(&self) -> u64 {
        let on = |yes: bool, bit: u64| if yes { bit } else { 0 };
        F_SEG_MAX
            | F_BLK_SIZE
            | F_TOPOLOGY
            | on(self.disk.read_only, F_RO)
            // A driver that may switch the cache on must be able to flush it.
            | on(self.write_cache || self.config.config_wce, F_FLUSH)
            | on(self.config.config_wce, F_CONFIG_WCE)
            | on(self.config.num_queues > 1, F_MQ)
            | on(self.disk.discard, F_DISCARD)
            | on(self.disk.write_zeroes, F_WRITE_ZEROES)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, off: u64, data: &mut [u8]) {
        let mut bytes = self.fixed;
        bytes[..8].copy_from_slice(&self.disk.capacity.load(Ordering::Relaxed).to_le_bytes());
        bytes[WRITEBACK] = self.disk.handle.write_cache().into();
        let Ok(off) = usize::try_from(off) else { return };
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(off)) {
            *to = *from;
        }
    }

    fn write_config(&self, off: u64, data: &[u8]) {
        let at = usize::try_from(off).ok().and_then(|off| WRITEBACK.checked_sub(off));
        if let (true, Some(value)) = (self.config.config_wce, at.and_then(|at| data.get(at))) {
            self.disk.handle.set_write_cache(value & 1 != 0);
        }
    }

    fn attach(&self, transport: Arc<dyn Transport>) {
        // A second transport would be an error of the caller; the first one stays.
        let _ = self.disk.transport.set(transport);
    }

    fn start(&self, acked: u64) -> io::Result<Vec<Task>> {
        // Virtio 1.2, 5.2.5.2: a driver that cannot flush gets a write-through disk; one that can
        // switch the cache has it as it is.
        if acked & F_CONFIG_WCE == 0 {
            self.disk.handle.set_write_cache(acked & F_FLUSH != 0);
        }
        let queues: Vec<u16> = (0..self.config.num_queues).collect();
        let task = |n: u16| Task {
            worker: Box::new(DiskWorker::new(self.disk.clone())),
            queues: queues.clone(),
            thread: match (&self.config.iothread, n, &*self.config.id) {
                (Some(io), _, _) => Thread::Io(io.clone()),
                (None, 0, id) => Thread::Own(format!("blk {id}")),
                (None, n, id) => Thread::Own(format!("blk {id} {n}")),
            },
            poll: self.config.poll,
        };
        Ok((0..self.config.workers).map(task).collect())
    }

    fn reset(&self) {
        self.disk.handle.set_write_cache(self.write_cache);
    }
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod tests;
