//! Serialisation of overlapping writes around a read-modify-write.
//!
//! A write that is not aligned to its driver's blocks reads a block, changes a part, and writes
//! it back; another write to the same block in between would be lost. Such a request therefore
//! waits for every overlapping write, and they for it. Aligned writes do not wait for each other.
//!
//! Owns: the list of writes in flight on a node whose blocks are larger than a byte. Threads: any.
//! Locks: its own, never across I/O.

use std::sync::{Condvar, Mutex, PoisonError};

struct Entry {
    id: u64,
    start: u64,
    end: u64,
    alone: bool,
}

#[derive(Default)]
struct List {
    next: u64,
    entries: Vec<Entry>,
    waiting: usize,
}

/// See the module's head.
#[derive(Default)]
pub struct Serial {
    list: Mutex<List>,
    gone: Condvar,
}

/// A write in flight; dropping it is its end.
pub struct Turn<'a> {
    serial: &'a Serial,
    id: u64,
}

impl Serial {
    /// Enters a write of `start..end` (in whole blocks), waiting for those it must not overlap.
    /// `alone`: it is a read-modify-write.
    pub fn enter(&self, start: u64, end: u64, alone: bool) -> Turn<'_> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.waiting += 1;
        let hit = |e: &Entry| e.start < end && start < e.end && (e.alone || alone);
        while list.entries.iter().any(hit) {
            list = self.gone.wait(list).unwrap_or_else(PoisonError::into_inner);
        }
        list.waiting -= 1;
        let id = list.next;
        list.next += 1;
        list.entries.push(Entry { id, start, end, alone });
        Turn { serial: self, id }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut list = self.serial.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.entries.retain(|e| e.id != self.id);
        if list.waiting > 0 {
            self.serial.gone.notify_all();
        }
    }
}
