//! A split virtqueue (virtio 1.2, 2.7), shared by any number of workers.
//!
//! Owns: ring positions, notification suppression both ways, and the raw pointers of a chain.
//! Never: knows what a request means, or who is interrupted. Threads: workers pop and push; vCPUs
//! kick; the transport enables, halts and resets. Locks: one Mutex a queue, held for the ring
//! accesses of one pop or push and nothing else (an interrupt is sent after it is gone).
//!
//! Ring and descriptors are hostile. The `virtio-queue` crate walks them; whatever it, or the rules
//! here, find wrong (loops, indices, addresses outside memory, order, length) makes the device
//! NEEDS_RESET through [`Transport::needs_reset`], and every later pop gives nothing.

use super::device::Transport;
use super::kick::Waker;
use crate::machine::memory::{Map, Mem, push_guest};
use crate::sys::iov::{Iov, IovMut};
use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use virtio_queue::{Queue as SplitQueue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The largest size of a queue, and the most descriptors that a chain may have, as in QEMU.
/// (IOV_MAX is the same number, so that a chain fits one preadv.)
pub const MAX_SIZE: u16 = 1024;

/// Where the driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Entries: a power of two, at most the device's size.
    pub size: u16,
    /// Guest address of the descriptor table; a multiple of 16.
    pub desc: u64,
    /// Guest address of the available ring; a multiple of 2.
    pub avail: u64,
    /// Guest address of the used ring; a multiple of 4.
    pub used: u64,
}

/// Whether the queues of a device give requests. One for all of them.
#[derive(Debug, Default)]
pub struct Halt {
    paused: AtomicBool,
    broken: AtomicBool,
}

impl Halt {
    /// Pauses, or goes on.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// For good: the device needs a reset.
    pub fn break_down(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// True when no request is to be taken.
    pub fn is_set(&self) -> bool {
        self.paused.load(Ordering::SeqCst) || self.broken.load(Ordering::SeqCst)
    }
}

/// One queue between DRIVER_OK and reset.
pub struct Queue {
    index: u16,
    mem: Mem,
    transport: Arc<dyn Transport>,
    halt: Arc<Halt>,
    workers: OnceLock<Vec<Waker>>,
    ring: Mutex<Ring>,
}

#[derive(Default)]
struct Ring {
    /// None while the queue is not enabled, and for good when it is broken.
    live: Option<Live>,
    /// Answers later (see [`Queue::hold`]); or given back. Popped before the ring.
    held: VecDeque<Parts>,
    /// No pops until [`Queue::unpark`].
    parked: bool,
}

struct Live {
    split: SplitQueue,
    map: Map,
    /// The last pop found nothing: the owner waits for a kick, so kicks must come.
    hungry: bool,
    /// The used index at the last decision to interrupt.
    signalled: Wrapping<u16>,
}

/// What a chain points to. The lists borrow from `map`, hence the order of the fields.
struct Parts {
    head: u16,
    readable: Iov<'static>,
    writable: IovMut<'static>,
    map: Map,
}

/// A request: a descriptor chain, checked, all of it in guest memory. To be answered by
/// [`Queue::push`]. The guest may change the bytes at any time: look at them once, in a copy.
///
/// Dropped unanswered it panics in debug builds; in release builds it is pushed with length 0.
pub struct Chain<'q> {
    queue: &'q Queue,
    parts: Option<Parts>,
}

impl Queue {
    /// A queue that is not enabled yet.
    pub fn new(index: u16, mem: Mem, transport: Arc<dyn Transport>, halt: Arc<Halt>) -> Queue {
        Queue { index, mem, transport, halt, workers: OnceLock::new(), ring: Mutex::new(Ring::default()) }
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries; 0 while the ring is not in use.
    pub fn size(&self) -> u16 {
        self.lock().live.as_ref().map_or(0, |live| live.split.size())
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who hears its kicks. Set once, before the first kick.
    pub fn set_workers(&self, workers: Vec<Waker>) {
        // A second call would be an error of the worker loop; the first set stays.
        let _ = self.workers.set(workers);
    }

    /// Takes the ring into use; false when the set-up is impossible (size, alignment, memory).
    #[must_use]
    pub fn enable(&self, setup: Setup, max_size: u16, event_idx: bool) -> bool {
        let map = self.mem.map();
        let live = Live::new(setup, max_size, event_idx, map);
        let ok = live.is_some();
        *self.lock() = Ring { live, ..Ring::default() };
        ok
    }

    /// Takes the ring out of use. The workers must not hold a chain of it.
    pub fn disable(&self) {
        *self.lock() = Ring::default();
    }

    /// True while the ring is in use.
    pub fn is_enabled(&self) -> bool {
        self.lock().live.is_some()
    }

    /// The next request; None when there is none, the device is paused or the queue is not in use.
    pub fn pop(&self) -> Option<Chain<'_>> {
        if self.halt.is_set() {
            return None;
        }
        let mut ring = self.lock();
        if ring.parked {
            return None;
        }
        if let Some(parts) = ring.held.pop_front() {
            return Some(Chain { queue: self, parts: Some(parts) });
        }
        let live = ring.live.as_mut()?;
        let popped = live.pop();
        // Others that sleep must hear of what is left, and of what comes while we work.
        let more = match popped {
            Ok(Some(_)) if self.workers().iter().any(Waker::is_asleep) => live.enable_kicks(),
            _ => Ok(false),
        };
        match (popped, more) {
            (Ok(None), _) => None,
            (Ok(Some(parts)), Ok(more)) => {
                drop(ring);
                if more {
                    self.kick();
                }
                Some(Chain { queue: self, parts: Some(parts) })
            }
            (Err(why), _) | (_, Err(why)) => {
                drop(ring);
                self.fail(why);
                None
            }
        }
    }

    /// True when [`Queue::pop`] would give a request. When not, the next buffer brings a kick.
    pub fn has_work(&self) -> bool {
        if self.halt.is_set() {
            return false;
        }
        let mut ring = self.lock();
        if ring.parked || !ring.held.is_empty() {
            return !ring.parked;
        }
        let Some(live) = ring.live.as_mut() else { return false };
        match live.available() {
            Ok(n) => {
                live.hungry |= n == 0;
                n > 0
            }
            Err(why) => {
                drop(ring);
                self.fail(why);
                false
            }
        }
    }

    /// Answers `chain`: the device wrote `written` bytes to the start of its writable part.
    /// Interrupts, unless the driver does not want it.
    pub fn push(&self, chain: Chain<'_>, written: usize) {
        self.push_all([(chain, written)]);
    }

    /// Answers several chains; the driver sees all of them at once or none (mergeable receive
    /// buffers), and gets one interrupt.
    pub fn push_all<'q>(&self, chains: impl IntoIterator<Item = (Chain<'q>, usize)>) {
        let answers = chains.into_iter().map(|(mut chain, written)| {
            debug_assert!(std::ptr::eq(self, chain.queue), "a chain of another queue");
            let parts = chain.take();
            (parts.head, u32::try_from(written.min(parts.writable.len())).unwrap_or(u32::MAX))
        });
        let mut ring = self.lock();
        // Not in use any more: nobody waits for the answer, but the chains are to be consumed.
        let Some(live) = ring.live.as_mut() else { return answers.for_each(drop) };
        let result = live.push(answers);
        drop(ring);
        match result {
            Ok(true) => self.transport.queue_used(self.index),
            Ok(false) => {}
            Err(why) => self.fail(why),
        }
    }

    /// Puts `chain` back as the next to be popped.
    pub fn unpop(&self, mut chain: Chain<'_>) {
        let parts = chain.take();
        self.lock().held.push_front(parts);
    }

    /// Puts `chain` back and gives no more until the device was paused and resumes: the request
    /// failed, the VM is about to stop for it, and `cont` tries it again.
    pub fn hold(&self, mut chain: Chain<'_>) {
        let parts = chain.take();
        let mut ring = self.lock();
        ring.held.push_back(parts);
        ring.parked = true;
    }

    /// The driver broke the device's own rules (no header, no place for the answer): `chain` is not
    /// answered, and the device NEEDS_RESET.
    pub fn reject(&self, mut chain: Chain<'_>, why: &str) {
        chain.take();
        self.fail(why);
    }

    /// The device resumes: held requests may be popped, and memory may have another map.
    pub fn unpark(&self) {
        let map = self.mem.map();
        let mut ring = self.lock();
        ring.parked = false;
        if let Some(live) = ring.live.as_mut() {
            live.map = map;
        }
    }

    /// The driver's notification: wakes one worker that sleeps, if any does.
    pub fn kick(&self) {
        let workers = self.workers();
        // One that is awake looks at the ring before it sleeps: then any will do.
        if let Some(worker) = workers.iter().find(|w| w.is_asleep()).or(workers.first()) {
            worker.kick(self.index);
        }
    }

    /// Has every worker look, whatever the ring says.
    pub(super) fn kick_workers(&self) {
        self.workers().iter().for_each(|w| w.kick(self.index));
    }

    /// For the worker loop, before it sleeps: has the driver kick from now on if the last pop
    /// found nothing, and returns true when something has come meanwhile.
    pub(super) fn prepare_sleep(&self) -> bool {
        if self.halt.is_set() {
            return false;
        }
        let mut ring = self.lock();
        if ring.parked {
            return false;
        }
        let more = match ring.live.as_mut() {
            // If the worker leaves what has come, it does so on purpose: no second call for it.
            Some(live) if live.hungry => live.enable_kicks().inspect(|&more| live.hungry = !more),
            // One of several leaves nothing on purpose. Another has popped since this one found the
            // queue dry, and may be long at it: what comes meanwhile is for those who sleep.
            Some(live) if self.workers().len() > 1 => live.enable_kicks(),
            _ => Ok(false),
        };
        drop(ring);
        more.unwrap_or_else(|why| {
            self.fail(why);
            false
        })
    }

    /// For the worker loop, while it polls: a request waits that its owner has not left on purpose.
    pub(super) fn is_waiting(&self) -> bool {
        if self.halt.is_set() {
            return false;
        }
        let ring = self.lock();
        // What is wrong with the ring is found out by the pop.
        let waits = |live: &Live| live.hungry && live.available() != Ok(0);
        !ring.parked && ring.live.as_ref().is_some_and(waits)
    }

    /// For the worker loop, when it wakes: no kicks are needed while a lone worker is awake.
    pub(super) fn suppress_kicks(&self) {
        if self.workers().len() > 1 {
            return;
        }
        if let Some(live) = self.lock().live.as_mut() {
            // Only saves exits; that the ring is bad shows elsewhere.
            let _ = live.split.disable_notification(&*live.map);
        }
    }

    fn workers(&self) -> &[Waker] {
        self.workers.get().map_or(&[], Vec::as_slice)
    }

    fn fail(&self, why: &str) {
        self.lock().live = None;
        self.halt.break_down();
        self.transport.needs_reset(&format!("queue {}: {why}", self.index));
    }
}

impl Live {
    fn new(setup: Setup, max_size: u16, event_idx: bool, map: Map) -> Option<Live> {
        let mut split = SplitQueue::new(max_size).ok()?;
        split.try_set_size(setup.size).ok()?;
        split.try_set_desc_table_address(GuestAddress(setup.desc)).ok()?;
        split.try_set_avail_ring_address(GuestAddress(setup.avail)).ok()?;
        split.try_set_used_ring_address(GuestAddress(setup.used)).ok()?;
        split.set_event_idx(event_idx);
        split.set_ready(true);
        // Address 0 means "not set" to the crate's iterator.
        if setup.avail == 0 || !split.is_valid(&*map) {
            return None;
        }
        Some(Live { split, map, hungry: true, signalled: Wrapping(0) })
    }

    /// Chains in the ring that were not popped.
    fn available(&self) -> Result<u16, &'static str> {
        let avail = self.split.avail_idx(&*self.map, Ordering::Acquire).map_err(|_| "available ring lost")?;
        let n = (avail - Wrapping(self.split.next_avail())).0;
        if n > self.split.size() { Err("available index jumps") } else { Ok(n) }
    }

    fn pop(&mut self) -> Result<Option<Parts>, &'static str> {
        let n = self.available()?;
        self.hungry = n == 0;
        if n == 0 {
            return Ok(None);
        }
        let map = self.map.clone();
        let mut heads = self.split.iter(&*map).map_err(|_| "available index jumps")?;
        let descriptors = heads.next().ok_or("available ring lost")?;
        let head = descriptors.head_index();
        // SAFETY: what is borrowed from `lasting` goes into Parts together with `map`, which keeps it
        // in place and mapped, and leaves Parts only borrowed (Chain::readable and the like).
        let lasting: &'static GuestMemoryMmap = unsafe { &*Arc::as_ptr(&map) };
        let (mut readable, mut writable) = (Iov::new(), Iov::new());
        let (mut count, mut goes_on, mut writes) = (0, true, false);
        for d in descriptors {
            // An empty list may still have seen a descriptor of length 0: `writes`.
            let list = match (d.is_write_only(), writes) {
                (true, _) => {
                    writes = true;
                    &mut writable
                }
                (false, false) => &mut readable,
                (false, true) => return Err("a readable descriptor after a writable one"),
            };
            count += 1;
            if count > usize::from(MAX_SIZE) {
                return Err("a chain of too many descriptors");
            }
            if !push_guest(lasting, d.addr().0, d.len() as usize, list) {
                return Err("a descriptor outside memory");
            }
            goes_on = d.has_next();
        }
        // The iterator ends early, silently, at whatever it does not accept.
        if goes_on {
            return Err("a chain that loops, or an index or a table out of range");
        }
        // SAFETY: guest memory is mapped writable.
        let writable = unsafe { IovMut::from_iov(writable) };
        Ok(Some(Parts { head, readable, writable, map }))
    }

    /// Enters the answers in the used ring; true when the driver wants an interrupt.
    fn push(&mut self, answers: impl Iterator<Item = (u16, u32)>) -> Result<bool, &'static str> {
        const LOST: &str = "used ring lost";
        let used_ring = self.split.used_ring();
        let mut used = Wrapping(self.split.next_used());
        let mut lost = false;
        // All of them, whatever happens: a chain that were dropped here would push itself, under
        // the lock that is held now.
        for (head, len) in answers {
            // The ring was checked to lie in memory when it was enabled: no overflow.
            let at = used_ring + 4 + 8 * u64::from(used.0 % self.split.size());
            let mut element = [0; 8];
            element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            element[4..].copy_from_slice(&len.to_le_bytes());
            lost |= self.map.write_slice(&element, GuestAddress(at)).is_err();
            used += 1;
        }
        if lost {
            return Err(LOST);
        }
        self.split.set_next_used(used.0);
        let index = GuestAddress(used_ring + 2);
        self.map.store(used.0.to_le(), index, Ordering::Release).map_err(|_| LOST)?;
        // The index before the driver's wish is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        let wish = |at: u64| {
            let word = self.map.load::<u16>(GuestAddress(at), Ordering::Relaxed);
            word.map(u16::from_le).map_err(|_| "available ring lost")
        };
        let avail_ring = self.split.avail_ring();
        if self.split.event_idx_enabled() {
            // Virtio 1.2, 2.7.10: when the index passes used_event.
            let event = Wrapping(wish(avail_ring + 4 + 2 * u64::from(self.split.size()))?);
            let old = std::mem::replace(&mut self.signalled, used);
            Ok(used - event - Wrapping(1) < used - old)
        } else {
            Ok(wish(avail_ring)? & 1 == 0)
        }
    }

    /// True when there are chains that came before the driver saw our wish.
    fn enable_kicks(&mut self) -> Result<bool, &'static str> {
        self.split.enable_notification(&*self.map).map_err(|_| "rings lost")
    }
}

impl Chain<'_> {
    fn parts(&self) -> &Parts {
        // Taken only by what consumes the chain.
        self.parts.as_ref().expect("a chain has its parts until it is consumed")
    }

    fn parts_mut(&mut self) -> &mut Parts {
        // As above.
        self.parts.as_mut().expect("a chain has its parts until it is consumed")
    }

    fn take(&mut self) -> Parts {
        // As above.
        self.parts.take().expect("a chain has its parts until it is consumed")
    }

    /// The index of its first descriptor, which names it to the driver.
    pub fn head(&self) -> u16 {
        self.parts().head
    }

    /// What the driver gives.
    pub fn readable(&self) -> &Iov<'_> {
        &self.parts().readable
    }

    /// What the driver wants filled.
    pub fn writable(&mut self) -> IovMut<'_> {
        let parts = self.parts_mut();
        let len = parts.writable.len();
        parts.writable.slice(0, len)
    }

    /// The `len` bytes from byte `at` on of what the driver wants filled.
    ///
    /// # Panics
    /// When `at + len` is beyond [`Chain::writable_len`].
    pub fn writable_at(&mut self, at: usize, len: usize) -> IovMut<'_> {
        self.parts_mut().writable.slice(at, len)
    }

    /// Bytes that the driver wants filled.
    pub fn writable_len(&self) -> usize {
        self.parts().writable.len()
    }

    /// Both sides at once.
    pub fn split(&mut self) -> (&Iov<'_>, IovMut<'_>) {
        let parts = self.parts_mut();
        let len = parts.writable.len();
        (&parts.readable, parts.writable.slice(0, len))
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.parts().map
    }
}

impl Drop for Chain<'_> {
    fn drop(&mut self) {
        if self.parts.is_none() || std::thread::panicking() {
            return;
        }
        let (queue, parts) = (self.queue, self.parts.take());
        if cfg!(debug_assertions) {
            panic!("a request of queue {} was dropped without an answer", queue.index);
        }
        queue.push(Chain { queue, parts }, 0);
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
