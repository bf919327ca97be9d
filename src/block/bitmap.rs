//! A dirty bitmap: which parts of a node were written since somebody began to care.
//!
//! Owns: the bits, and the state that says who may do what with them. Never: decides when a write
//! is noted ([`Node`](super::node::Node) does: after the data, before the writer hears of it), and
//! never touches a disk. Threads: any. Locks: its own read-write lock, held for writing only while
//! the length changes; bits change by atomics.
//!
//! A user who copies what is dirty first *clears* a granule ([`Bitmap::take`]) and *then* reads its
//! data: a write that comes after the look at the bit marks it again, so that nothing is lost. For
//! the same reason a mark is never skipped by an old look at the word: a full fence stands between
//! the data and that look.
//!
//! Memory follows use: 4 KiB for each 32768 granules of which one was ever dirty (1 TiB at 64 KiB:
//! 2 MiB at most).

use crate::bail;
use crate::error::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// The longest name of a bitmap, in bytes (the qcow2 specification's limit).
pub const MAX_NAME: usize = 1023;
/// The finest granularity, in bytes.
pub const MIN_GRANULARITY: u32 = 512;
/// The most granules that a bitmap may have: 128 TiB at the finest granularity.
const MAX_GRANULES: u64 = 1 << 38;

const WORDS: usize = 512;
const LEAF_BITS: u32 = 15;
const LEAVES: usize = 64;
const BRANCH_BITS: u32 = LEAF_BITS + 6;

type Leaf = [AtomicU64; WORDS];
/// The leaves of 2 Mi granules.
type Branch = [OnceLock<Box<Leaf>>; LEAVES];

fn new_leaf() -> Box<Leaf> {
    Box::new([const { AtomicU64::new(0) }; WORDS])
}

fn new_branch() -> Box<Branch> {
    Box::new([const { OnceLock::new() }; LEAVES])
}

/// What makes a bitmap useless for an operation (QEMU's BDRV_BITMAP_*).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refuse {
    /// In use by a job or an export, or broken; it may be read-only.
    Busy,
    /// The same, or read-only (QEMU's BDRV_BITMAP_DEFAULT).
    Change,
    /// In use, or read-only; it may be broken (it is to be removed).
    Remove,
}

/// A bitmap of a node. See the module's head.
pub struct Bitmap {
    name: Option<String>,
    granularity_bits: u32,
    /// Notes what is written.
    enabled: AtomicBool,
    /// Stored in the image when that is closed.
    persistent: AtomicBool,
    /// A job or an export uses it.
    busy: AtomicBool,
    /// Lies in an image that is read-only.
    read_only: AtomicBool,
    /// The image was not closed properly: its contents are lost; it can only be removed.
    inconsistent: AtomicBool,
    /// Notes what is written in its place while it is in use.
    successor: Mutex<Option<Arc<Bitmap>>>,
    /// How many granules are dirty. Changed after the bits: below 0 for a moment, perhaps.
    dirty: AtomicI64,
    bits: RwLock<Bits>,
}

/// Length in bytes, and the tree of words for it.
struct Bits {
    len: u64,
    tree: Vec<OnceLock<Box<Branch>>>,
}

impl Bits {
    fn leaf(&self, granule: u64) -> Option<&Leaf> {
        let branch = self.tree.get((granule >> BRANCH_BITS) as usize)?.get()?;
        branch[(granule >> LEAF_BITS) as usize % LEAVES].get().map(|leaf| &**leaf)
    }

    /// The leaf of a granule below the length.
    fn make_leaf(&self, granule: u64) -> Option<&Leaf> {
        let branch = self.tree.get((granule >> BRANCH_BITS) as usize)?.get_or_init(new_branch);
        Some(branch[(granule >> LEAF_BITS) as usize % LEAVES].get_or_init(new_leaf))
    }
}

fn word_of(granule: u64) -> usize {
    (granule >> 6) as usize % WORDS
}

/// The bits of `range` that lie in the word of its first granule, and where the next word begins.
fn first_word(range: &Range<u64>) -> (u64, u64) {
    let next = (range.start | 63) + 1;
    let low = !0u64 << (range.start & 63);
    let high = if range.end >= next { !0 } else { !(!0u64 << (range.end & 63)) };
    (low & high, next)
}

impl Bitmap {
    /// An enabled, clean bitmap for `len` bytes. `granularity` is a power of two.
    ///
    /// # Errors
    /// More granules than a bitmap may have.
    pub fn new(name: Option<&str>, granularity: u32, len: u64) -> Result<Arc<Bitmap>> {
        if !granularity.is_power_of_two() || granularity < MIN_GRANULARITY {
            bail!("Granularity must be power of 2 and at least 512");
        }
        let bitmap = Bitmap {
            name: name.map(str::to_string),
            granularity_bits: granularity.ilog2(),
            enabled: AtomicBool::new(true),
            persistent: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            successor: Mutex::new(None),
            dirty: AtomicI64::new(0),
            bits: RwLock::new(Bits { len: 0, tree: Vec::new() }),
        };
        if bitmap.granules(len) > MAX_GRANULES {
            bail!("Too much space will be occupied by the bitmap. Use larger granularity");
        }
        bitmap.resize(len);
        Ok(Arc::new(bitmap))
    }

    fn read(&self) -> RwLockReadGuard<'_, Bits> {
        self.bits.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many granules `len` bytes have.
    fn granules(&self, len: u64) -> u64 {
        (len >> self.granularity_bits) + u64::from(len & (self.granularity() - 1) != 0)
    }

    // ---- state

    /// Its name; anonymous ones are those of jobs.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Bytes of a granule.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Bytes of the node that it describes.
    pub fn len(&self) -> u64 {
        self.read().len
    }

    /// True when the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes what is written.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Begins or stops to note what is written.
    pub fn set_enabled(&self, on: bool) {
        self.enabled.store(on, Ordering::SeqCst);
    }

    /// It, or what stands in for it, notes what is written (QEMU's `recording`).
    pub fn recording(&self) -> bool {
        self.enabled() || self.successor().is_some_and(|s| s.recording())
    }

    /// It is stored in the image.
    pub fn persistent(&self) -> bool {
        self.persistent.load(Ordering::SeqCst)
    }

    /// Whether it is to be stored in the image.
    pub fn set_persistent(&self, on: bool) {
        self.persistent.store(on, Ordering::SeqCst);
    }

    /// A job or an export uses it: nobody else may change it.
    pub fn busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// Says that a job or an export uses it, or does no longer.
    pub fn set_busy(&self, on: bool) {
        self.busy.store(on, Ordering::SeqCst);
    }

    /// It lies in an image that is read-only.
    pub fn read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    /// Whether its image is read-only.
    pub fn set_read_only(&self, on: bool) {
        self.read_only.store(on, Ordering::SeqCst);
    }

    /// Its contents are lost; it can only be removed.
    pub fn inconsistent(&self) -> bool {
        self.inconsistent.load(Ordering::SeqCst)
    }

    /// Its contents are lost: it notes nothing any more.
    pub fn set_inconsistent(&self) {
        self.set_enabled(false);
        self.inconsistent.store(true, Ordering::SeqCst);
    }

    /// What notes the writes while a job uses this one.
    pub fn successor(&self) -> Option<Arc<Bitmap>> {
        self.successor.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_successor(&self, to: Option<Arc<Bitmap>>) -> Option<Arc<Bitmap>> {
        std::mem::replace(&mut *self.successor.lock().unwrap_or_else(PoisonError::into_inner), to)
    }

    /// QEMU's error when the bitmap cannot be used for what is asked.
    pub fn check(&self, refuse: Refuse) -> Result<()> {
        let name = self.name().unwrap_or_default();
        if self.busy() {
            bail!("Bitmap '{name}' is currently in use by another operation and cannot be used");
        }
        if self.read_only() && refuse != Refuse::Busy {
            bail!("Bitmap '{name}' is readonly and cannot be modified");
        }
        if self.inconsistent() && refuse != Refuse::Remove {
            bail!("Bitmap '{name}' is inconsistent and cannot be used");
        }
        Ok(())
    }

    // ---- bits

    /// Bytes that are dirty: granules, each counted whole.
    pub fn count(&self) -> u64 {
        self.dirty.load(Ordering::SeqCst).max(0).cast_unsigned() << self.granularity_bits
    }

    /// The granules that `len` bytes at `off` touch, below the end.
    fn touched(&self, bits: &Bits, off: u64, len: u64) -> Range<u64> {
        let end = off.saturating_add(len).min(bits.len);
        if len == 0 || off >= end {
            return 0..0;
        }
        off >> self.granularity_bits..self.granules(end)
    }

    /// Marks every granule that `len` bytes at `off` touch. What lies beyond the end is left out.
    pub fn mark(&self, off: u64, len: u64) {
        // See the module's head: the data come before the look at the words.
        fence(Ordering::SeqCst);
        let bits = self.read();
        let mut range = self.touched(&bits, off, len);
        let mut new = 0;
        while range.start < range.end {
            let Some(leaf) = bits.make_leaf(range.start) else { break };
            let (mask, next) = first_word(&range);
            let word = &leaf[word_of(range.start)];
            if word.load(Ordering::SeqCst) & mask != mask {
                let before = word.fetch_or(mask, Ordering::SeqCst);
                new += i64::from((mask & !before).count_ones());
            }
            range.start = next;
        }
        if new > 0 {
            self.dirty.fetch_add(new, Ordering::SeqCst);
        }
    }

    /// Clears these granules; answers how many were dirty.
    fn wipe(&self, bits: &Bits, mut range: Range<u64>) -> i64 {
        let mut gone = 0;
        while range.start < range.end {
            let (mask, next) = first_word(&range);
            match bits.leaf(range.start) {
                None => range.start = ((range.start >> LEAF_BITS) + 1) << LEAF_BITS,
                Some(leaf) => {
                    let word = &leaf[word_of(range.start)];
                    if word.load(Ordering::SeqCst) & mask != 0 {
                        gone += i64::from((word.fetch_and(!mask, Ordering::SeqCst) & mask).count_ones());
                    }
                    range.start = next;
                }
            }
        }
        self.dirty.fetch_sub(gone, Ordering::SeqCst);
        gone
    }

    /// Clears every granule that `len` bytes at `off` touch.
    pub fn clear(&self, off: u64, len: u64) {
        let bits = self.read();
        self.wipe(&bits, self.touched(&bits, off, len));
    }

    /// Clears all of it.
    pub fn clear_all(&self) {
        self.clear(0, u64::MAX);
    }

    /// Clears the granule of byte `off` and answers whether it was dirty: read its data after this.
    pub fn take(&self, off: u64) -> bool {
        let bits = self.read();
        self.wipe(&bits, self.touched(&bits, off, 1)) != 0
    }

    /// True when the granule of byte `off` is dirty.
    pub fn is_dirty(&self, off: u64) -> bool {
        let bits = self.read();
        let granule = off >> self.granularity_bits;
        let leaf = (off < bits.len).then(|| bits.leaf(granule)).flatten();
        leaf.is_some_and(|l| l[word_of(granule)].load(Ordering::SeqCst) >> (granule & 63) & 1 != 0)
    }

    /// The first granule from `from` on, and below `end`, whose bit is `set`.
    fn find(bits: &Bits, from: u64, end: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let Some(leaf) = bits.leaf(at) else {
                if !set {
                    return Some(at);
                }
                let none = bits.tree.get((at >> BRANCH_BITS) as usize).is_none_or(|b| b.get().is_none());
                let shift = if none { BRANCH_BITS } else { LEAF_BITS };
                at = ((at >> shift) + 1) << shift;
                continue;
            };
            let word = leaf[word_of(at)].load(Ordering::SeqCst);
            let word = (if set { word } else { !word }) & (!0 << (at & 63));
            if word != 0 {
                return Some((at & !63) + u64::from(word.trailing_zeros())).filter(|g| *g < end);
            }
            at = (at | 63) + 1;
        }
        None
    }

    /// The next run of dirty granules that touches bytes `from..end`: its bytes, cut to them and to
    /// the length, at most `max` long (but at least to the end of a granule).
    pub fn next_dirty(&self, from: u64, end: u64, max: u64) -> Option<Range<u64>> {
        let bits = self.read();
        let end = end.min(bits.len);
        if from >= end {
            return None;
        }
        let shift = self.granularity_bits;
        let last = self.granules(end);
        let first = Self::find(&bits, from >> shift, last, true)?;
        let most = first.saturating_add((max >> shift).max(1)).min(last);
        let stop = Self::find(&bits, first, most, false).unwrap_or(most);
        Some((first << shift).max(from)..(stop << shift).min(end))
    }

    /// The first byte from `from` on, and below `end`, whose granule is clean.
    pub fn next_clean(&self, from: u64, end: u64) -> Option<u64> {
        let bits = self.read();
        let end = end.min(bits.len);
        if from >= end {
            return None;
        }
        let shift = self.granularity_bits;
        Self::find(&bits, from >> shift, self.granules(end), false).map(|g| (g << shift).max(from))
    }

    /// Marks everything that is dirty in `other`, whose granularity may differ.
    pub fn merge(&self, other: &Bitmap) {
        let mut at = 0;
        while let Some(run) = other.next_dirty(at, u64::MAX, u64::MAX) {
            self.mark(run.start, run.end - run.start);
            at = run.end;
        }
    }

    /// A copy of the bits, under no name and recording nothing.
    pub fn copy(&self) -> Result<Arc<Bitmap>> {
        let copy = Bitmap::new(None, 1 << self.granularity_bits, self.len())?;
        copy.set_enabled(false);
        copy.merge(self);
        Ok(copy)
    }

    /// The node has become `len` bytes long: what is new is clean, what is gone is forgotten.
    pub fn resize(&self, len: u64) {
        self.set_len(len, false);
    }

    /// The node has become at least `len` bytes long.
    pub fn grow(&self, len: u64) {
        self.set_len(len, true);
    }

    fn set_len(&self, len: u64, only_grow: bool) {
        let mut bits = self.bits.write().unwrap_or_else(PoisonError::into_inner);
        if only_grow && len <= bits.len {
            return;
        }
        if len < bits.len {
            self.wipe(&bits, self.granules(len)..self.granules(bits.len));
        }
        bits.len = len;
        let branches = self.granules(len).div_ceil(1 << BRANCH_BITS);
        bits.tree.resize_with(branches as usize, OnceLock::new);
    }

    // ---- as bytes: granule 0 is the lowest bit of byte 0 (the order of the qcow2 specification)

    /// The bits from granule `first`, a multiple of 64, on; zeroes beyond the end. Answers whether
    /// any is set.
    pub fn save(&self, first: u64, to: &mut [u8]) -> bool {
        debug_assert!(first.is_multiple_of(64));
        let bits = self.read();
        let mut any = false;
        for (n, chunk) in to.chunks_mut(8).enumerate() {
            let granule = first + n as u64 * 64;
            let word = bits.leaf(granule).map_or(0, |l| l[word_of(granule)].load(Ordering::SeqCst));
            any |= word != 0;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
        any
    }

    /// Marks what the bits in `from` say, granule `first`, a multiple of 64, being the first. Bits
    /// beyond the end are ignored.
    pub fn load(&self, first: u64, from: &[u8]) {
        debug_assert!(first.is_multiple_of(64));
        let bits = self.read();
        let end = self.granules(bits.len);
        let mut new = 0;
        for (n, chunk) in from.chunks(8).enumerate() {
            let granule = first + n as u64 * 64;
            if granule >= end {
                break;
            }
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(bytes) & first_word(&(granule..end)).0;
            if word == 0 {
                continue;
            }
            let Some(leaf) = bits.make_leaf(granule) else { break };
            let before = leaf[word_of(granule)].fetch_or(word, Ordering::SeqCst);
            new += i64::from((word & !before).count_ones());
        }
        self.dirty.fetch_add(new, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[path = "bitmap_test.rs"]
mod tests;
