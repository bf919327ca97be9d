//! The driver `preallocate`: a filter that lets a growing file grow in large steps, so that its file
//! system need not find space for every write. The surplus is cut off when nobody writes any more.
//!
//! Owns: where the data end and where the file does. Never: shares the file with other writers.
//! Threads: I/O from any; `set_perm`, `resize` and `close` on the control thread. Locks: the ends',
//! held while the file is made longer (which others have to wait for anyway).

use super::driver::{Driver, Flags, Perm};
use super::node::{Edge, Node};
use super::open::{Child, Open, Opening};
use super::reopen_options::{Ready, Reopening};
use crate::bail;
use crate::error::Result;
use crate::sys::iov::Iov;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What the file's length is made a multiple of, in bytes, unless `prealloc-align` says otherwise.
const ALIGN: u64 = 1 << 20;
/// How much is allocated beyond what is written, in bytes, unless `prealloc-size` says otherwise.
const SIZE: u64 = 128 << 20;

/// Options of `preallocate`.
pub struct PreallocatePlan {
    /// What is filtered.
    pub file: Child,
    /// In bytes.
    pub align: Option<u64>,
    /// In bytes.
    pub size: Option<u64>,
}

/// See the module's head.
pub struct Preallocate {
    file: Arc<Edge>,
    align: AtomicU64,
    size: AtomicU64,
    /// Where the data end: the length that is shown.
    data_end: AtomicU64,
    /// Where the file ends: there or later.
    file_end: Mutex<u64>,
}

fn wants(above: (Perm, Perm)) -> (Perm, Perm) {
    if !above.0.contains(Perm::WRITE) {
        return above;
    }
    (above.0 | Perm::RESIZE, above.1 & !(Perm::WRITE | Perm::RESIZE))
}

impl Open for PreallocatePlan {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let (align, size) = (self.align.unwrap_or(ALIGN), self.size.unwrap_or(SIZE));
        let file = cx.child("file", self.file, (Perm::NONE, Perm::ALL))?;
        let node = file.need()?;
        check(align, size, node.limits().request_alignment)?;
        let (align, size) = (AtomicU64::new(align), AtomicU64::new(size));
        let len = node.len();
        let data_end = AtomicU64::new(len);
        Ok(Box::new(Preallocate { file, align, size, data_end, file_end: Mutex::new(len) }))
    }
}

fn check(align: u64, size: u64, needed: u32) -> Result<()> {
    if align == 0 || !align.is_multiple_of(512) {
        bail!("prealloc-align parameter of preallocate filter is not aligned to 512");
    }
    if align > 1 << 62 || size > 1 << 62 || !align.is_multiple_of(needed.into()) {
        bail!(
            "prealloc-align parameter of preallocate filter is not aligned to underlying node \
             request alignment ({needed})"
        );
    }
    Ok(())
}

impl Preallocate {
    /// Makes the file longer if it ends before `end`. A file system that cannot do it makes the file
    /// grow with its writes, as without this filter.
    fn make_room(&self, node: &Node, end: u64) {
        if end <= self.len() {
            return;
        }
        let mut file_end = self.file_end.lock().unwrap_or_else(PoisonError::into_inner);
        if end > *file_end {
            let wanted = (end + self.size.load(Ordering::Relaxed))
                .next_multiple_of(self.align.load(Ordering::Relaxed));
            match node.zero(*file_end, wanted - *file_end, Flags::NO_FALLBACK) {
                Ok(()) => *file_end = wanted,
                Err(e) => log::debug!("no preallocation: {e}"),
            }
        }
    }

    fn written(&self, end: u64) {
        self.data_end.fetch_max(end, Ordering::AcqRel);
        let mut file_end = self.file_end.lock().unwrap_or_else(PoisonError::into_inner);
        *file_end = end.max(*file_end);
    }

    /// Cuts the surplus off.
    fn trim(&self) -> io::Result<()> {
        let mut file_end = self.file_end.lock().unwrap_or_else(PoisonError::into_inner);
        let data_end = self.len();
        if *file_end > data_end {
            self.file.need()?.resize(data_end)?;
            *file_end = data_end;
        }
        Ok(())
    }
}

impl Driver for Preallocate {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn len(&self) -> u64 {
        self.data_end.load(Ordering::Acquire)
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        wants(above)
    }

    fn set_perm(&self, uses: Perm, _: Perm) -> io::Result<()> {
        if uses.contains(Perm::WRITE) {
            return Ok(());
        }
        // Parents hear of it first: the file can still be cut.
        self.trim()
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let (node, end) = (self.file.need()?, off + from.len() as u64);
        self.make_room(&node, end);
        node.write(off, from, flags)?;
        self.written(end);
        Ok(())
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let node = self.file.need()?;
        self.make_room(&node, off + len);
        node.zero(off, len, flags)?;
        self.written(off + len);
        Ok(())
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.file.need()?.resize(len)?;
        self.data_end.store(len, Ordering::Release);
        *self.file_end.lock().unwrap_or_else(PoisonError::into_inner) = len;
        Ok(())
    }

    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let ready = || -> Result<Ready<'a>> {
            let (align, size) = (how.take_size("prealloc-align")?, how.take_size("prealloc-size")?);
            let (align, size) = (align.unwrap_or(ALIGN), size.unwrap_or(SIZE));
            check(align, size, self.file.peek(|n| n.limits().request_alignment).unwrap_or(1))?;
            Ok(Box::new(move || {
                self.align.store(align, Ordering::Relaxed);
                self.size.store(size, Ordering::Relaxed);
            }))
        };
        Some(ready())
    }

    fn close(&self) -> io::Result<()> {
        self.trim()?;
        self.flush()
    }
}

#[cfg(test)]
#[path = "filter_preallocate_test.rs"]
mod tests;
