//! Guest memory. vm-memory's generics stop here (and in `virtio/queue.rs`).
//!
//! Owns: the mapped regions. Threads: any. Locks: one RwLock around the current map, for the
//! moment of a clone (memory is hot-plugged by the control thread).

use crate::sys::iov::Iov;
use std::sync::{Arc, PoisonError, RwLock};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The map of one moment. It stays valid (and the host memory mapped) as long as it is held.
pub type Map = Arc<GuestMemoryMmap>;

/// Guest memory, shared by everything that reads or writes it.
#[derive(Clone)]
pub struct Mem(Arc<RwLock<Map>>);

impl Mem {
    /// Memory made of `map`.
    pub fn new(map: GuestMemoryMmap) -> Mem {
        Mem(Arc::new(RwLock::new(Arc::new(map))))
    }

    /// The map as it is now.
    pub fn map(&self) -> Map {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Copies guest memory at `addr` into `to`; false when not all of it is memory.
    #[must_use]
    pub fn read(&self, addr: u64, to: &mut [u8]) -> bool {
        self.map().read_slice(to, GuestAddress(addr)).is_ok()
    }

    /// Copies `from` to guest memory at `addr`; false when not all of it is memory.
    #[must_use]
    pub fn write(&self, addr: u64, from: &[u8]) -> bool {
        self.map().write_slice(from, GuestAddress(addr)).is_ok()
    }
}

/// Adds the `len` bytes of guest memory at `addr` to `iov`; false (and nothing added that
/// matters: the caller gives the list up) when not all of it is memory.
#[must_use]
pub fn push_guest<'a>(map: &'a GuestMemoryMmap, addr: u64, len: usize, iov: &mut Iov<'a>) -> bool {
    for slice in map.get_slices(GuestAddress(addr), len) {
        let Ok(slice) = slice else { return false };
        // SAFETY: the slice is mapped, readable and writable, as long as `map` is borrowed.
        unsafe { iov.push_raw(slice.ptr_guard_mut().as_ptr(), slice.len()) };
    }
    true
}
