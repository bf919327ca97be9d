//! The driver `raw`: a child's bytes as they are, or a window of them.
//!
//! Owns: offset and size. Never: looks at data. Threads: I/O from any. Locks: none.

use super::chain;
use super::debug::BlkdebugEvent;
use super::driver::{Driver, Extent, ExtentKind, Flags, ImageInfo, Limits, Perm, Preallocation};
use super::node::{Edge, Node, errno};
use super::open::{Child, Open, Opening};
use super::perm;
use super::reopen_options::{Ready, Reopening};
use crate::bail;
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Map, Value, json};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Options of `raw`.
pub struct RawPlan {
    /// What has the bytes.
    pub file: Child,
    /// Where the window begins, in bytes.
    pub offset: Option<u64>,
    /// How long it is, in bytes; absent: up to the end.
    pub size: Option<u64>,
}

/// Windows end with a sector, in bytes.
const SECTOR: u64 = 512;

/// The part of the child that is shown; [`Window::NONE`] stands for what was not given.
struct Window {
    offset: AtomicU64,
    size: AtomicU64,
}

impl Window {
    const NONE: u64 = u64::MAX;

    fn offset(&self) -> u64 {
        match self.offset.load(Ordering::Relaxed) {
            Window::NONE => 0,
            given => given,
        }
    }

    fn size(&self) -> Option<u64> {
        Some(self.size.load(Ordering::Relaxed)).filter(|n| *n != Window::NONE)
    }

    /// All of the child, as it is.
    fn is_whole(&self) -> bool {
        self.offset() == 0 && self.size().is_none()
    }

    fn set(&self, offset: Option<u64>, size: Option<u64>) {
        self.offset.store(offset.unwrap_or(Window::NONE), Ordering::Relaxed);
        self.size.store(size.unwrap_or(Window::NONE), Ordering::Relaxed);
    }

    /// It must lie in a child of `len` bytes, whose last sector counts as a whole; texts are QEMU's.
    fn check(offset: Option<u64>, size: Option<u64>, len: u64) -> Result<()> {
        let (offset, len) = (offset.unwrap_or(0), len.next_multiple_of(SECTOR));
        if offset > len {
            bail!("Offset ({offset}) cannot be greater than size of the containing file ({len})");
        }
        let Some(size) = size else { return Ok(()) };
        if size > len - offset {
            // Two spaces, as in QEMU.
            bail!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to \
                 the  actual size of the containing file ({len})"
            );
        }
        if !size.is_multiple_of(SECTOR) {
            bail!("Specified size is not multiple of {SECTOR}");
        }
        Ok(())
    }
}

/// See the module's head.
pub struct Raw {
    file: Arc<Edge>,
    window: Window,
}

impl Open for RawPlan {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let window = self.offset.is_some() || self.size.is_some();
        let perm = window_perm(window, (Perm::NONE, Perm::ALL));
        let file = cx.child("file", self.file, perm)?;
        let node = file.need()?;
        Window::check(self.offset, self.size, node.len())?;
        let window = Window { offset: AtomicU64::new(0), size: AtomicU64::new(0) };
        window.set(self.offset, self.size);
        Ok(Box::new(Raw { file, window }))
    }
}

fn window_perm(window: bool, above: (Perm, Perm)) -> (Perm, Perm) {
    if window { perm::for_data(above) } else { above }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn len(&self) -> u64 {
        let whole = self.file.peek(Node::len).unwrap_or(0);
        if self.window.is_whole() {
            return whole;
        }
        let rest = whole.next_multiple_of(SECTOR).saturating_sub(self.window.offset());
        self.window.size().map_or(rest, |size| size.min(rest))
    }

    fn grows(&self) -> bool {
        self.window.size().is_none() && self.file.peek(|n| n.driver.grows()).unwrap_or(false)
    }

    /// A window may start anywhere.
    fn limits(&self) -> Limits {
        Limits::above(&self.file)
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone()]
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        window_perm(!self.window.is_whole(), above)
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let file = self.file.need()?;
        file.moment(BlkdebugEvent::ReadAio);
        file.read(off + self.window.offset(), to)
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let file = self.file.need()?;
        file.moment(BlkdebugEvent::WriteAio);
        file.write(off + self.window.offset(), from, flags)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.file.need()?.zero(off + self.window.offset(), len, flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.file.need()?.discard(off + self.window.offset(), len)
    }

    fn flush(&self) -> io::Result<()> {
        let file = self.file.need()?;
        file.moment(BlkdebugEvent::FlushToOs);
        file.moment(BlkdebugEvent::FlushToDisk);
        file.flush()
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        // Below may be a format with images behind it: "not in this node" would be said of those.
        let at = off + self.window.offset();
        let found = chain::contents(&*self.file.need()?, at, len)?;
        let kind = if found.zero { ExtentKind::Zero } else { ExtentKind::Data };
        Ok(Extent { kind, len: found.len, host_offset: Some(at) })
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.resize_with(len, Preallocation::Off)
    }

    fn resize_with(&self, len: u64, how: Preallocation) -> io::Result<()> {
        if self.window.size().is_some() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "Cannot resize fixed-size raw disks"));
        }
        let end = len.checked_add(self.window.offset()).ok_or_else(|| errno(libc::EFBIG))?;
        self.file.need()?.resize_with(end, how)
    }

    fn info(&self) -> ImageInfo {
        let below = self.file.node().map(|n| n.driver.info()).unwrap_or_default();
        let ImageInfo { actual_size, cluster_size, dirty, .. } = below;
        ImageInfo { actual_size, cluster_size, dirty, ..ImageInfo::default() }
    }

    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let ready = || -> Result<Ready<'a>> {
            let (offset, size) = (how.take_size("offset")?, how.take_size("size")?);
            Window::check(offset, size, self.file.peek(Node::len).unwrap_or(0))?;
            Ok(Box::new(move || self.window.set(offset, size)))
        };
        Some(ready())
    }

    fn own_options(&self) -> Map<String, Value> {
        let given = |name: &str, cell: &AtomicU64| match cell.load(Ordering::Relaxed) {
            Window::NONE => None,
            n => Some((name.to_string(), json!(n))),
        };
        given("size", &self.window.size).into_iter().chain(given("offset", &self.window.offset)).collect()
    }
}
