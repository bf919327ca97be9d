//! A heap buffer with an alignment that the caller chooses (O_DIRECT wants one), and one that each
//! thread keeps for what it copies.
//!
//! Owns: its allocation. Threads: any. Locks: none.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A huge page of x86-64, in bytes.
const HUGE: usize = 2 << 20;

/// The longest buffer that a thread keeps if nothing else was said, in bytes.
const KEPT: usize = 64 << 10;

/// Zeroed bytes at an aligned address.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
    len: usize,
}

// SAFETY: it owns its memory alone, as a Vec<u8> does.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; `&AlignedBuf` gives `&[u8]` only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align`; of none nothing is allocated.
    ///
    /// # Panics
    /// When `align` is no power of two, or `len` is beyond `isize::MAX`: errors in the caller.
    pub fn new(len: usize, align: usize) -> AlignedBuf {
        let layout = Layout::from_size_align(len, align).expect("a power of two");
        if len == 0 {
            return AlignedBuf { ptr: NonNull::dangling(), layout, len };
        }
        // SAFETY: the layout's size is at least 1.
        let ptr = unsafe { alloc_zeroed(layout) };
        match NonNull::new(ptr) {
            Some(ptr) => AlignedBuf { ptr, layout, len: layout.size() },
            None => handle_alloc_error(layout),
        }
    }

    /// `len` zero bytes on huge pages, if the system has any to give: for a buffer that lives long and
    /// that much goes through. A direct request has to pin one page of it instead of 256 to the MiB,
    /// and is one piece for the disk.
    ///
    /// # Panics
    /// When `len`, rounded up to huge pages, is beyond `isize::MAX`: an error in the caller.
    pub fn huge(len: usize) -> AlignedBuf {
        let size = len.max(1).next_multiple_of(HUGE);
        let layout = Layout::from_size_align(size, HUGE).expect("a length of this world");
        // SAFETY: the layout's size is at least 1.
        let Some(ptr) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        // Before the first touch. A system that cannot has pages of the usual size.
        // SAFETY: whole pages of the allocation above; their contents do not change.
        unsafe { libc::madvise(ptr.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        // SAFETY: all of the allocation above.
        unsafe { ptr.as_ptr().write_bytes(0, size) };
        AlignedBuf { ptr, layout, len }
    }

    /// What `from` holds now, whatever becomes of its memory: for two uses that must see the same.
    pub fn copy(from: &super::iov::Iov) -> AlignedBuf {
        let mut buf = AlignedBuf::new(from.len(), 4096);
        from.copy_to(0, &mut buf[..from.len()]);
        buf
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with at least this size, initialised with zeroes; or dangling, of no bytes.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated with this layout in `new`, freed once.
            unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
        }
    }
}

thread_local! {
    static KEPT_BUF: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
    static MOST: Cell<usize> = const { Cell::new(KEPT) };
}

/// From now on the calling thread keeps a buffer of up to `most` bytes for its copies ([`CopyBuf`]):
/// for threads that do little else.
pub fn keep_copy_buf(most: usize) {
    MOST.set(most);
}

/// Memory for a copy that is over soon; dropping it lets the thread use it again. At a multiple of
/// 4096. What is in it at first is anything.
pub struct CopyBuf {
    buf: Option<AlignedBuf>,
    len: usize,
}

impl CopyBuf {
    /// `len` bytes: what the thread kept of the last time, if that is enough.
    pub fn new(len: usize) -> CopyBuf {
        let kept = KEPT_BUF.take().filter(|b| b.len() >= len);
        // What is less than half a huge page, or used but once, is not worth one.
        let buf = kept.unwrap_or_else(|| match len >= HUGE / 2 && len <= MOST.get() {
            true => AlignedBuf::huge(len),
            false => AlignedBuf::new(len, 4096),
        });
        CopyBuf { buf: Some(buf), len }
    }
}

impl Deref for CopyBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |b| &b[..self.len])
    }
}

impl DerefMut for CopyBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buf.as_mut().map_or(&mut [], |b| &mut b[..self.len])
    }
}

impl Drop for CopyBuf {
    fn drop(&mut self) {
        let most = MOST.try_with(Cell::get).unwrap_or(0);
        if let Some(buf) = self.buf.take().filter(|b| b.len() <= most) {
            // The thread may be at its end, and keeps nothing any more.
            let _ = KEPT_BUF.try_with(|kept| {
                let other = kept.take();
                kept.set(Some(other.filter(|o| o.len() > buf.len()).unwrap_or(buf)));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_writable() {
        for align in [1, 512, 4096, 65536] {
            let mut b = AlignedBuf::new(1000, align);
            assert_eq!(b.as_ptr() as usize % align, 0);
            assert_eq!(b.len(), 1000);
            assert!(b.iter().all(|&x| x == 0));
            b.fill(7);
            assert!(b.iter().all(|&x| x == 7));
            assert_eq!(AlignedBuf::new(0, align).len(), 0);
        }
    }

    #[test]
    fn a_huge_buffer_is_as_long_as_was_asked() {
        for len in [1, 1 << 20, (2 << 20) + 5] {
            let mut b = AlignedBuf::huge(len);
            assert_eq!((b.len(), b.as_ptr() as usize % HUGE), (len, 0));
            assert!(b.iter().all(|&x| x == 0));
            b.fill(7);
        }
    }

    #[test]
    fn a_thread_uses_its_copy_buffer_again() {
        let first = CopyBuf::new(1000);
        let place = first.as_ptr();
        // A second one at the same time is another, and the longer one is kept.
        let mut second = CopyBuf::new(3000);
        assert_ne!(second.as_ptr(), place);
        assert_eq!((first.len(), second.len(), second.as_ptr() as usize % 4096), (1000, 3000, 0));
        second.fill(7);
        let place = second.as_ptr();
        drop((second, first));
        let third = CopyBuf::new(500);
        assert_eq!((third.as_ptr(), third.len()), (place, 500));
        drop(third);
        // One that is too long is not kept, but by who wants it.
        drop(CopyBuf::new(KEPT + 1));
        assert!(KEPT_BUF.take().is_none());
        keep_copy_buf(1 << 20);
        drop(CopyBuf::new(1 << 20));
        assert_eq!(KEPT_BUF.take().map(|b| (b.len(), b.as_ptr() as usize % HUGE)), Some((1 << 20, 0)));
    }
}
