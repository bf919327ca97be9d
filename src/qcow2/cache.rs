//! Pages of metadata in memory: L2 tables or refcount blocks, in pieces of at most 4 KiB.
//!
//! Owns: the pages of one kind, which of them are dirty, which may go. Never: reads or writes the
//! file; decides when something is written (checkpoint.rs does). Threads: any, under the lock of
//! the [`Meta`](super::meta::Meta) that it is part of.
//!
//! A page is an `Arc<[u8]>`: the checkpoint shares it instead of copying, and a change made
//! meanwhile copies it (copy on write), so that what is being written never changes under the
//! writer's hands.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// A hash for page offsets and cluster numbers: they are not chosen by an attacker to collide in
/// a way that matters (a page costs a read of the file first), and this is on every request's way.
#[derive(Default)]
pub struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }

    fn write_u64(&mut self, n: u64) {
        // A multiplication mixes upwards; the table uses both ends, so fold the top down.
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// The hasher as maps and sets want it.
pub type ByOffset = BuildHasherDefault<OffsetHasher>;

struct Slot {
    offset: u64,
    page: Arc<[u8]>,
    /// Set at use, cleared as the clock's hand passes.
    used: bool,
    dirty: bool,
}

/// See the module's head.
pub struct Cache {
    map: HashMap<u64, usize, ByOffset>,
    slots: Vec<Slot>,
    dirty: BTreeSet<u64>,
    hand: usize,
    /// Pages that may be kept; dirty ones are kept beyond that.
    capacity: usize,
}

impl Cache {
    /// An empty cache for `capacity` pages (at least 8). Takes no memory yet.
    pub fn new(capacity: usize) -> Cache {
        Cache {
            map: HashMap::default(),
            slots: Vec::new(),
            dirty: BTreeSet::new(),
            hand: 0,
            capacity: capacity.max(8),
        }
    }

    /// From now on as many pages may be kept, if that is more than before.
    pub fn allow(&mut self, capacity: usize) {
        self.capacity = self.capacity.max(capacity);
    }

    /// How many pages may be kept.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// From now on `capacity` pages may be kept (at least 8). Those that are too many go as others
    /// come.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity.max(8);
    }

    /// The page at file offset `offset`, if it is here.
    pub fn get(&mut self, offset: u64) -> Option<&[u8]> {
        let slot = &mut self.slots[*self.map.get(&offset)?];
        slot.used = true;
        Some(&slot.page)
    }

    /// True when the page is here. Does not count as a use.
    pub fn has(&self, offset: u64) -> bool {
        self.map.contains_key(&offset)
    }

    /// The page for a change: it is dirty afterwards.
    pub fn get_mut(&mut self, offset: u64) -> Option<&mut [u8]> {
        let slot = &mut self.slots[*self.map.get(&offset)?];
        slot.used = true;
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.insert(offset);
        }
        Some(Arc::make_mut(&mut slot.page))
    }

    /// Adds a page that is as the file has it (or will read back the same), in place of any older
    /// one of that offset.
    pub fn insert(&mut self, offset: u64, page: Arc<[u8]>) {
        if let Some(&i) = self.map.get(&offset) {
            self.dirty.remove(&offset);
            self.slots[i] = Slot { offset, page, used: true, dirty: false };
            return;
        }
        if self.slots.len() >= self.capacity {
            self.evict();
        }
        self.map.insert(offset, self.slots.len());
        self.slots.push(Slot { offset, page, used: true, dirty: false });
    }

    /// Lets one clean page go, if the clock finds one within two rounds.
    fn evict(&mut self) {
        for _ in 0..self.slots.len() * 2 {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = &mut self.slots[self.hand];
            if !slot.dirty && !std::mem::take(&mut slot.used) {
                self.remove_slot(self.hand);
                // A cache that had to grow for dirty pages shrinks again.
                if self.slots.len() < self.capacity {
                    return;
                }
                continue;
            }
            self.hand += 1;
        }
    }

    fn remove_slot(&mut self, i: usize) {
        let gone = self.slots.swap_remove(i);
        self.map.remove(&gone.offset);
        if let Some(moved) = self.slots.get(i) {
            self.map.insert(moved.offset, i);
        }
    }

    /// Forgets the pages of `range`, dirty or not: their cluster is no metadata any more.
    pub fn forget(&mut self, range: std::ops::Range<u64>, page_size: u64) {
        let mut offset = range.start;
        while offset < range.end {
            if let Some(&i) = self.map.get(&offset) {
                self.dirty.remove(&offset);
                self.remove_slot(i);
            }
            offset += page_size;
        }
    }

    /// Lets go of every clean page that was not used since the last call.
    pub fn trim(&mut self) {
        let mut i = 0;
        while i < self.slots.len() {
            if !self.slots[i].dirty && !std::mem::take(&mut self.slots[i].used) {
                self.remove_slot(i);
            } else {
                i += 1;
            }
        }
        self.slots.shrink_to_fit();
        self.map.shrink_to_fit();
    }

    /// How many pages are dirty.
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// True when so many pages are dirty that a checkpoint is due. Never, if all pages that there
    /// are fit: then only the guest's flushes cost syncs.
    pub fn is_full(&self) -> bool {
        self.dirty.len() > self.capacity
    }

    /// All dirty pages in the order of their offsets, shared.
    pub fn snapshot(&self) -> Vec<(u64, Arc<[u8]>)> {
        // A dirty offset always has a slot: `forget` and `insert` keep the two in step.
        self.dirty.iter().filter_map(|o| self.map.get(o).map(|&i| (*o, self.slots[i].page.clone()))).collect()
    }

    /// The pages of a [`Cache::snapshot`] are in the file now: those not changed since are clean.
    pub fn written(&mut self, pages: &[(u64, Arc<[u8]>)]) {
        for (offset, page) in pages {
            if let Some(&i) = self.map.get(offset)
                && Arc::ptr_eq(&self.slots[i].page, page)
            {
                self.slots[i].dirty = false;
                self.dirty.remove(offset);
            }
        }
    }

    /// Bytes of memory in pages.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|s| s.page.len()).sum()
    }
}

#[cfg(test)]
#[path = "cache_test.rs"]
mod tests;
