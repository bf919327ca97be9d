//! The qcow2 image format, as a [`Driver`](crate::block::driver::Driver).
//!
//! Source: QEMU's `docs/interop/qcow2`. One file, one idea:
//!
//! | file | owns |
//! |---|---|
//! | `types.rs` | geometry, entries, refcount fields |
//! | `header.rs` | the header and its extensions, both ways |
//! | `cache.rs` | pages of metadata in memory |
//! | `meta.rs` | `struct Meta`: look-up, tables, what is in flight |
//! | `alloc.rs` | refcounts, free clusters |
//! | `checkpoint.rs` | the only writer of metadata, and the proof of its order |
//! | `io.rs` | read, write: reserve → write data → link |
//! | `erase.rs` | write-zeroes, discard |
//! | `packed.rs` | writing compressed clusters |
//! | `compress.rs` | zlib and zstd |
//! | `crypt.rs` `crypt_*.rs` | encryption of guest data: where it happens; ciphers, keys, LUKS's header |
//! | `open.rs` | opening: limits, features, first checks |
//! | `plan.rs` | options of `blockdev-add`; opens the children |
//! | `create.rs` | new images |
//! | `prealloc.rs` | preallocation of a new image |
//! | `resize.rs` | growing and shrinking |
//! | `backing.rs` | another name for the backing file |
//! | `snapshot.rs` | internal snapshots |
//! | `bitmaps.rs` | stored bitmaps: when what is in the image |
//! | `bitmap_dir.rs` | their directory and tables as bytes |
//! | `extension.rs` | their extension in the header |
//! | `check.rs` | walking all metadata: repair at open, and the tests' checker |
//! | `corrupt.rs` | what follows when something is found wrong |
//! | `mutant.rs` | deliberate bugs for the tests' own test; none in a release build |
//! | `driver.rs` | `impl Driver` |
//!
//! Threads: requests come from any number of threads. Locks, in this order: `flush` (one
//! checkpoint at a time) → `meta` (for moments; never while guest data move) → `decompressed`.
//! Nobody waits for `flush`, for an allocation in flight or for exclusive use while counted as a
//! user ([`Using`]).

mod alloc;
mod backing;
mod bitmap_dir;
mod bitmaps;
mod cache;
pub mod check;
mod checkpoint;
pub mod compress;
pub mod corrupt;
pub mod create;
pub mod crypt;
#[cfg(feature = "luks")]
mod crypt_cipher;
#[cfg(feature = "luks")]
mod crypt_kdf;
#[cfg(feature = "luks")]
mod crypt_luks;
#[cfg(not(feature = "luks"))]
#[path = "crypt_absent.rs"]
mod crypt_luks;
mod driver;
mod erase;
mod extension;
pub mod header;
mod holes;
mod io;
mod meta;
pub mod mutant;
pub mod open;
mod packed;
pub mod plan;
mod populate;
mod prealloc;
mod resize;
mod snapshot;
mod types;

use crate::block::bitmaps::Bitmaps;
use crate::block::debug::BlkdebugEvent;
use crate::block::node::{Edge, Node};
use meta::{Meta, Miss};
use mutant::Mutant;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// An open image. See the module's head.
pub struct Qcow2 {
    file: Arc<Edge>,
    backing: Arc<Edge>,
    data_file: Option<Arc<Edge>>,
    geo: types::Geometry,
    crypt: Option<crypt::Payload>,
    read_only: AtomicBool,
    /// Space freed by guest requests goes back to the file system.
    punch: AtomicBool,
    /// Virtual size in bytes; changed only under exclusive use.
    size: AtomicU64,
    meta: Mutex<Meta>,
    /// An allocation landed, exclusive use ended, or the last user left.
    changed: Condvar,
    flush: Mutex<()>,
    /// How many checkpoints began.
    started: AtomicU64,
    /// The last of them that ended well with all on stable storage.
    finished: AtomicU64,
    /// Requests at data I/O, by the epoch in which they looked up where.
    users: [AtomicUsize; 2],
    /// Someone waits for `users` to become zero.
    awaited: AtomicBool,
    /// The cluster that was decompressed last, by its offset in the file.
    decompressed: Mutex<Option<(u64, Arc<[u8]>)>>,
    /// For how many seconds a page may stay unused; 0: for ever.
    clean_interval: AtomicU64,
    /// The node's bitmaps; the persistent ones are stored here.
    bitmaps: Arc<Bitmaps>,
    bug: Option<Mutant>,
    /// Told when the image is found corrupt.
    on_corrupt: Option<corrupt::OnCorrupt>,
}

/// A request that is at data I/O at a place it looked up. While it lives, that cluster is neither
/// punched nor used for anything else.
struct Using<'a> {
    image: &'a Qcow2,
    epoch: usize,
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        let before = self.image.users[self.epoch].fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.image.awaited.load(Ordering::SeqCst) {
            // The lock orders this after the waiter's look at the counter.
            drop(self.image.lock());
            self.image.changed.notify_all();
        }
    }
}

/// Guest clusters that are in the in-flight list. They leave it with [`InFlight::landed`], or, should
/// the thread panic before, when this is dropped: nobody waits for them for ever. What was reserved
/// for them is leaked then.
struct InFlight<'a> {
    image: &'a Qcow2,
    range: Range<u64>,
    over: bool,
}

impl InFlight<'_> {
    /// It is over, well or not; wakes who waits for it.
    fn landed(mut self, mut meta: MutexGuard<'_, Meta>) {
        meta.landed(&self.range);
        self.over = true;
        let awaited = meta.waiting > 0;
        drop(meta);
        if awaited {
            self.image.changed.notify_all();
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.image.lock().landed(&self.range);
            self.image.changed.notify_all();
        }
    }
}

/// The image for one thread alone: no request runs or begins. Dropping it lets them go on.
struct Exclusive<'a>(&'a Qcow2);

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.0.lock().exclusive = false;
        self.0.changed.notify_all();
    }
}

/// See [`Qcow2::lock`].
fn poisoned<'a>(e: PoisonError<MutexGuard<'a, Meta>>) -> MutexGuard<'a, Meta> {
    let mut meta = e.into_inner();
    meta.corrupt = true;
    meta
}

impl Qcow2 {
    /// The metadata. After a panic in the middle of a change nothing is written any more.
    fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(poisoned)
    }

    fn wait<'a>(&'a self, mut meta: MutexGuard<'a, Meta>) -> MutexGuard<'a, Meta> {
        meta.waiting += 1;
        let mut meta = self.changed.wait(meta).unwrap_or_else(poisoned);
        meta.waiting -= 1;
        meta
    }

    /// Guards clusters that were just entered into the in-flight list.
    fn flight(&self, range: Range<u64>) -> InFlight<'_> {
        InFlight { image: self, range, over: false }
    }

    /// True when the tests asked for this bug. Never in a release build.
    fn has_bug(&self, mutant: Mutant) -> bool {
        cfg!(debug_assertions) && self.bug == Some(mutant)
    }

    /// Counts the caller as a user of what it just looked up under `meta`.
    fn using(&self, meta: &Meta) -> Using<'_> {
        self.users[meta.epoch].fetch_add(1, Ordering::SeqCst);
        Using { image: self, epoch: meta.epoch }
    }

    fn node(&self, edge: &Edge) -> std::io::Result<Arc<Node>> {
        edge.node().ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOMEDIUM))
    }

    fn file(&self) -> std::io::Result<Arc<Node>> {
        self.node(&self.file)
    }

    /// Tells a driver for tests that is below of a moment. With no lock held.
    fn moment(&self, event: BlkdebugEvent) {
        if self.file.peek(Node::is_tested) == Some(true)
            && let Some(file) = self.file.node()
        {
            file.moment(event);
        }
    }

    /// Where guest data are: the external data file, or the image file.
    fn data(&self) -> std::io::Result<Arc<Node>> {
        self.node(self.data_file.as_ref().unwrap_or(&self.file))
    }

    /// Waits until no allocation in the guest clusters `range` is in flight and nobody has the
    /// image for himself.
    fn wait_for<'a>(&'a self, mut meta: MutexGuard<'a, Meta>, range: &Range<u64>) -> MutexGuard<'a, Meta> {
        while meta.exclusive || meta.is_in_flight(range) {
            meta = self.wait(meta);
        }
        meta
    }

    /// Takes the image for the caller alone: waits for every request to end.
    fn exclusive(&self) -> Exclusive<'_> {
        let mut meta = self.lock();
        while meta.exclusive {
            meta = self.wait(meta);
        }
        meta.exclusive = true;
        self.awaited.store(true, Ordering::SeqCst);
        while !meta.in_flight.is_empty() || self.users.iter().any(|u| u.load(Ordering::SeqCst) != 0) {
            meta = self.wait(meta);
        }
        self.awaited.store(false, Ordering::SeqCst);
        Exclusive(self)
    }

    /// A page that a look-up missed: reads it with the lock released, and puts it in unless it
    /// could be out of date by then; so with those that are read ahead. Answers EIO when the miss is a
    /// corruption.
    fn resolve<'a>(
        &'a self,
        meta: MutexGuard<'a, Meta>,
        miss: Miss,
    ) -> std::io::Result<MutexGuard<'a, Meta>> {
        match miss {
            Miss::Page(offset) => {
                let (generation, size, count) = (meta.generation, meta.geo.page_size(), meta.ahead(offset));
                drop(meta);
                let file = self.file()?;
                file.moment(BlkdebugEvent::L2Load);
                let pages = match meta::read_pages(&file, offset, size, count) {
                    // Only the first was asked for.
                    Err(_) if count > 1 => meta::read_pages(&file, offset, size, 1)?,
                    pages => pages?,
                };
                let mut meta = self.lock();
                if meta.generation == generation {
                    for (offset, page) in (offset..).step_by(size as usize).zip(pages) {
                        if !meta.l2.has(offset) {
                            meta.l2.insert(offset, page);
                        }
                    }
                }
                Ok(meta)
            }
            Miss::Corrupt(why) => {
                drop(meta);
                Err(self.mark_corrupt(&why))
            }
        }
    }
}

#[cfg(test)]
#[path = "ahead_test.rs"]
mod tests;
