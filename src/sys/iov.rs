//! Scatter lists: where a request's data lies. The only raw pointers of the request path.
//!
//! [`Iov`] is a source of data (for writes), [`IovMut`] a destination (for reads). Both may point
//! into guest memory, which the guest can change at any time, even while a request runs: the
//! bytes are therefore only ever copied or handed to the kernel, never borrowed as `&[u8]`.
//! What must be looked at (compressed, encrypted, compared) is copied out first.
//!
//! Owns: pointers, for the lifetime `'a` of what they point into. Threads: any. Locks: none.

use std::marker::PhantomData;

/// A list of memory pieces to take data from; `len` bytes in all.
pub struct Iov<'a> {
    vec: Vec<libc::iovec>,
    len: usize,
    life: PhantomData<&'a [u8]>,
}

/// A list of memory pieces to put data into; `len` bytes in all.
pub struct IovMut<'a>(Iov<'a>);

// SAFETY: an Iov is a borrowed region like `&'a [u8]`; its accesses are raw copies, which are
// sound from any thread as long as the region lives, and 'a sees to that.
unsafe impl Send for Iov<'_> {}
// SAFETY: as above; `&Iov` allows no more than reading.
unsafe impl Sync for Iov<'_> {}

impl<'a> Iov<'a> {
    /// An empty list, to be filled with [`Iov::push_raw`].
    pub fn new() -> Iov<'a> {
        Iov { vec: Vec::new(), len: 0, life: PhantomData }
    }

    /// The list with the one piece `data`.
    pub fn from_slice(data: &'a [u8]) -> Iov<'a> {
        let mut iov = Iov::new();
        // SAFETY: `data` is readable for 'a.
        unsafe { iov.push_raw(data.as_ptr().cast_mut(), data.len()) };
        iov
    }

    /// Adds the piece `data`.
    pub fn push(&mut self, data: &'a [u8]) {
        // SAFETY: `data` is readable for 'a.
        unsafe { self.push_raw(data.as_ptr().cast_mut(), data.len()) };
    }

    /// Adds all pieces of `other`.
    pub fn append(&mut self, other: &Iov<'a>) {
        self.vec.extend_from_slice(&other.vec);
        self.len += other.len;
    }

    /// Adds a piece.
    ///
    /// # Safety
    /// `ptr` is readable for `len` bytes during `'a` (and writable, if this becomes an [`IovMut`]).
    pub unsafe fn push_raw(&mut self, ptr: *mut u8, len: usize) {
        if len > 0 {
            self.vec.push(libc::iovec { iov_base: ptr.cast(), iov_len: len });
            self.len += len;
        }
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without any byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, for preadv(2) and friends.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.vec
    }

    /// The part of `len` bytes from byte `at` on.
    ///
    /// # Panics
    /// When `at + len` is beyond the end: an error in the caller, not in its input.
    pub fn slice(&self, at: usize, len: usize) -> Iov<'a> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "slice beyond the Iov");
        let mut out = Iov::new();
        let (mut skip, mut left) = (at, len);
        for piece in &self.vec {
            if left == 0 {
                break;
            }
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let take = left.min(piece.iov_len - skip);
            // SAFETY: inside a piece that lives for 'a.
            unsafe { out.push_raw(piece.iov_base.cast::<u8>().add(skip), take) };
            skip = 0;
            left -= take;
        }
        out
    }

    /// Copies bytes from position `at` on into `to`.
    ///
    /// # Panics
    /// When `at + to.len()` is beyond the end.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        let mut done = 0;
        for piece in self.slice(at, to.len()).iovecs() {
            // SAFETY: the piece is readable, `to` has room (slice's length is to.len()); guest
            // memory never overlaps a Rust slice.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    piece.iov_base.cast::<u8>(),
                    to[done..].as_mut_ptr(),
                    piece.iov_len,
                );
            }
            done += piece.iov_len;
        }
    }

    /// The bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; self.len];
        self.copy_to(0, &mut v);
        v
    }

    /// True when every piece's address and length is a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.vec.iter().all(|p| (p.iov_base as usize | p.iov_len) & (align - 1) == 0)
    }

    /// True when every piece's address is a multiple of `address`, and its length one of `len`
    /// (both powers of two): what O_DIRECT wants.
    pub fn fits(&self, address: usize, len: usize) -> bool {
        let fit = |p: &libc::iovec| p.iov_base as usize & (address - 1) == 0 && p.iov_len & (len - 1) == 0;
        self.vec.iter().all(fit)
    }
}

impl Default for Iov<'_> {
    fn default() -> Self {
        Iov::new()
    }
}

impl<'a> IovMut<'a> {
    /// An empty list.
    pub fn new() -> IovMut<'a> {
        IovMut(Iov::new())
    }

    /// The list with the one piece `data`.
    pub fn from_slice(data: &'a mut [u8]) -> IovMut<'a> {
        let mut iov = Iov::new();
        // SAFETY: `data` is writable for 'a.
        unsafe { iov.push_raw(data.as_mut_ptr(), data.len()) };
        IovMut(iov)
    }

    /// Adds a piece.
    ///
    /// # Safety
    /// `ptr` is readable and writable for `len` bytes during `'a`.
    pub unsafe fn push_raw(&mut self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.push_raw(ptr, len) }
    }

    /// The pieces of `iov` as a destination.
    ///
    /// # Safety
    /// Every piece of `iov` is writable during `'a`.
    pub unsafe fn from_iov(iov: Iov<'a>) -> IovMut<'a> {
        IovMut(iov)
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// True without any byte.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The pieces, for preadv(2).
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.0.iovecs()
    }

    /// The part of `len` bytes from byte `at` on, borrowed so that only one is written at a time.
    ///
    /// # Panics
    /// When `at + len` is beyond the end.
    pub fn slice(&mut self, at: usize, len: usize) -> IovMut<'_> {
        IovMut(self.0.slice(at, len))
    }

    /// The same memory as a source.
    pub fn as_source(&self) -> &Iov<'a> {
        &self.0
    }

    /// Copies `from` to position `at`.
    ///
    /// # Panics
    /// When `at + from.len()` is beyond the end.
    pub fn copy_from(&mut self, at: usize, from: &[u8]) {
        let mut done = 0;
        for piece in self.0.slice(at, from.len()).iovecs() {
            // SAFETY: the piece is writable (the promise of an IovMut) and as long as is copied.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from[done..].as_ptr(),
                    piece.iov_base.cast::<u8>(),
                    piece.iov_len,
                );
            }
            done += piece.iov_len;
        }
    }

    /// Sets `len` bytes from `at` on to `byte`.
    ///
    /// # Panics
    /// When `at + len` is beyond the end.
    pub fn fill(&mut self, at: usize, len: usize, byte: u8) {
        for piece in self.0.slice(at, len).iovecs() {
            // SAFETY: the piece is writable.
            unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), byte, piece.iov_len) };
        }
    }

    /// True when every piece's address and length is a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.0.is_aligned(align)
    }
}

impl Default for IovMut<'_> {
    fn default() -> Self {
        IovMut::new()
    }
}

#[cfg(test)]
#[path = "iov_test.rs"]
mod tests;
