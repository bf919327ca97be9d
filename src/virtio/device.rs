//! What a virtio device is to the rest: a face for the transport, and workers for the loop.
//!
//! Owns: the traits. Never: knows PCI or any one device. Threads: the face is called on vCPU
//! threads (under the bus's read lock, so it never blocks) and by control; a worker belongs to one
//! thread at a time. Locks: none here.

use super::queue::Queue;
use super::scsi::Bus;
use super::worker::IoThread;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Which kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Virtio device ID (virtio 1.2, section 5): 1 network, 2 block, 4 entropy.
    pub id: u16,
    /// PCI class code: base class, subclass, interface (24 bits).
    pub class: u32,
    /// The name in log messages: `virtio-blk`.
    pub name: &'static str,
}

/// The face of a device, shared by its transport and whoever configures it (control).
///
/// The transport adds the ring features (VERSION_1, INDIRECT_DESC, EVENT_IDX, RING_RESET) and
/// keeps the device's state machine; a device hears of it only through [`VirtioDevice::start`]
/// and [`VirtioDevice::reset`].
pub trait VirtioDevice: Send + Sync {
    /// Its numbers.
    fn kind(&self) -> Kind;

    /// The feature bits that it offers (virtio 1.2, section 5.x.3), without the ring's.
    fn features(&self) -> u64;

    /// The size of each queue, at most [`super::queue::MAX_SIZE`] and a power of two. Constant.
    fn queue_sizes(&self) -> &[u16];

    /// The guest reads its device-specific configuration. `data` comes zeroed; bytes beyond the
    /// structure stay so. Any offset, any length.
    fn read_config(&self, off: u64, data: &mut [u8]);

    /// The guest writes its device-specific configuration. Any offset, any length; what is not
    /// writable is ignored. Must not block.
    fn write_config(&self, off: u64, data: &[u8]) {
        let _ = (off, data);
    }

    /// Called once, when the device gets its transport, which it may keep: to say that its
    /// configuration has changed ([`Transport::config_changed`]).
    fn attach(&self, transport: Arc<dyn Transport>) {
        let _ = transport;
    }

    /// The driver is ready (DRIVER_OK) and accepted the features `acked`: the workers to run until
    /// the next reset. An error makes the device NEEDS_RESET. Called again after each reset.
    fn start(&self, acked: u64) -> io::Result<Vec<Task>>;

    /// Back to power-on state, as far as the device itself keeps any. All workers are gone.
    fn reset(&self) {}

    /// The bus that disks can be plugged into, if it is a SCSI controller.
    fn scsi_bus(&self) -> Option<Arc<Bus>> {
        None
    }
}

/// The way from a device up to its driver. The transport implements it; any thread calls it.
pub trait Transport: Send + Sync {
    /// Queue `index` has used buffers: interrupt. (Called by [`Queue`], not by devices.)
    fn queue_used(&self, index: u16);
    /// The device-specific configuration has changed: new generation, interrupt.
    fn config_changed(&self);
    /// The device is broken until the driver resets it (virtio 1.2, 2.1.2); `why` goes to the log.
    fn needs_reset(&self, why: &str);
}

/// A worker and where it runs.
pub struct Task {
    /// The work.
    pub worker: Box<dyn Worker>,
    /// The queues whose kicks it hears. Several tasks may name the same queue (`workers = n`):
    /// each kick then wakes one that sleeps.
    pub queues: Vec<u16>,
    /// Its thread.
    pub thread: Thread,
    /// How long its thread may look at the queues before it sleeps, if requests have been coming in
    /// as short intervals; zero: it sleeps at once. The thread takes the longest of its workers.
    pub poll: Duration,
}

/// Which thread runs a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thread {
    /// One of its own, with this name (the kernel keeps 15 bytes of it).
    Own(String),
    /// The one that all slow devices share. Its workers must not block.
    Slow,
    /// One that the user has made, and perhaps gave to other devices too.
    Io(Arc<IoThread>),
}

/// A descriptor that a worker waits for besides the kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The descriptor; the worker keeps it open.
    pub fd: RawFd,
    /// poll(2) events: `POLLIN`, `POLLOUT`.
    pub events: i16,
}

/// The work of a device: called by the loop of `worker.rs`, always on the same thread, never
/// while the device is paused. A panic makes the device NEEDS_RESET and ends its workers.
pub trait Worker: Send {
    /// What to poll besides the kicks: tap, socket, timer. Asked again before each sleep, so it
    /// may come and go with what the worker can use ([`Queue::has_work`]).
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Queue `n` was kicked, or the device starts or resumes: pop, do it (it may block on I/O, on
    /// a thread of its own), push; until [`Queue::pop`] gives nothing more. What is left in the
    /// queue on purpose waits for a source or the next kick.
    fn on_queue(&mut self, n: u16, q: &Queue);

    /// Source `n` of the last [`Worker::sources`] is ready (`revents` of poll(2)). `qs` are all
    /// queues of the device.
    fn on_source(&mut self, n: usize, revents: i16, qs: &[Arc<Queue>]) {
        let _ = (n, revents, qs);
    }
}
