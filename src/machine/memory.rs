//! Guest memory. vm-memory's generics stop here (and in `virtio/queue.rs`).
//!
//! Owns: the mapped regions. Threads: any. Locks: one RwLock around the current map, for the
//! moment of a clone (memory is hot-plugged by the control thread).
//!
//! RAM is anonymous, private and MAP_NORESERVE: a page costs nothing before the guest touches it,
//! so a fleet of hundreds may be promised more than there is.

use super::layout::Layout;
use crate::error::{Error, Result, strerror};
use crate::sys::iov::Iov;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guests of this size and more get huge pages where the host has them; smaller ones never: one
/// touched byte would cost 2 MiB, more than all the rest of a small VM. For a Linux guest they are
/// worth it: under nested paging 16,700 faults during its boot became fewer than 50.
const HUGE_FROM: u64 = 256 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// The map of one moment. It stays valid (and the host memory mapped) as long as it is held.
pub type Map = Arc<GuestMemoryMmap>;

/// Guest memory, shared by everything that reads or writes it.
#[derive(Clone)]
pub struct Mem(Arc<RwLock<Map>>);

impl Mem {
    /// RAM as `layout` says, all zeroes.
    pub fn for_layout(layout: &Layout) -> Result<Mem> {
        let huge = layout.low + layout.high >= HUGE_FROM;
        let mut regions = Vec::new();
        for (start, len) in layout.ram() {
            let fail = |e: &dyn std::fmt::Display| {
                Error::new(format!("cannot map {len} bytes of guest memory: {e}"))
            };
            let len = usize::try_from(len).map_err(|e| fail(&e))?;
            let region = map_aligned(len, huge).map_err(|e| fail(&strerror(&e)))?;
            let region =
                GuestRegionMmap::new(region, GuestAddress(start)).ok_or_else(|| fail(&"it wraps around"))?;
            regions.push(region);
        }
        let map =
            GuestMemoryMmap::from_regions(regions).map_err(|e| Error::new(format!("guest memory: {e}")))?;
        Ok(Mem::new(map))
    }

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

/// Maps `len` bytes. With `huge`, at a host address that is a multiple of 2 MiB (all RAM begins at
/// such guest addresses, so that one huge page of the host backs one of the guest).
fn map_aligned(len: usize, huge: bool) -> io::Result<MmapRegion> {
    let map = || {
        MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| match e {
                vm_memory::mmap::MmapRegionError::Mmap(e) => e,
                e => io::Error::other(e.to_string()),
            })
    };
    let mut region = map()?;
    // Linux aligns large mappings itself since 6.7. Before, it puts a new one right below the last:
    // a spacer of the odd bytes in the gap that this one leaves makes the next one fit.
    let mut tries = 3;
    while huge && !(region.as_ptr() as usize).is_multiple_of(HUGE_PAGE) && tries > 0 {
        tries -= 1;
        let odd = region.as_ptr() as usize % HUGE_PAGE;
        drop(region);
        // Not a failure when it is refused, nor when another thread was faster: only slower.
        let spacer = MmapRegion::<()>::new(odd);
        region = map()?;
        drop(spacer);
    }
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the range is the mapping made above; neither advice changes its content. A kernel
    // without huge pages answers EINVAL, which is just as good.
    unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
    Ok(region)
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

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
