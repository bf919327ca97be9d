//! A node of the block graph.
//!
//! Owns: a driver, and everything that comes before it: bounds, read-only, alignment (bounce
//! buffers, read-modify-write), fall-backs for zero and discard, detect-zeroes, FUA, and the
//! bookkeeping after a write. Never: knows who is above. Drivers reach their children by
//! `edge.node()` and the methods here, never by `node.driver`, so that each level's checks hold.
//! Threads: I/O from any. Locks: the list of serialised requests, only for drivers that need aligned
//! requests, never across I/O (a request that overlaps a read-modify-write waits for it on a
//! condition variable).

use super::bitmaps::Bitmaps;
use super::debug::{BlkdebugEvent, Locks};
pub use super::edge::Edge;
pub use super::node_options::{DetectZeroes, NodeOptions};

use super::driver::{Driver, Extent, ExtentKind, Flags, Limits, Preallocation};
use super::filename::ByHeader;
use super::flush_once;
use super::node_options::{LimitsCell, OptionsCell};
use super::open::Asked;
use super::serial::Serial;
use super::traffic::Traffic;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The longest bounce buffer, in bytes; longer requests go through it in pieces.
const BOUNCE: u64 = 1 << 20;

/// Requests end below this (QEMU's BDRV_MAX_LENGTH): off_t, with room for rounding up.
pub const MAX_LEN: u64 = 0x7fff_ffff_c000_0000;

/// An I/O error by its number.
pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn is_enotsup(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTSUP))
}

/// Tells the control thread that a write went beyond the threshold; by how many bytes.
pub type ThresholdHook = Box<dyn FnOnce(u64) + Send>;

/// A node: a name, a driver, and the checks in front of it.
pub struct Node {
    /// Unique in the graph; `#blockNNN` when it was not given.
    pub name: String,
    /// The format, protocol or filter. I/O goes through the node's methods, not through this.
    pub driver: Box<dyn Driver>,
    options: OptionsCell,
    read_only: AtomicBool,
    limits: LimitsCell,
    /// True without children: the driver is the storage itself.
    storage: bool,
    /// The driver wants to know of moments.
    tested: bool,
    pub(super) traffic: Traffic,
    /// End of the highest write, in bytes; 0 before the first.
    highest: AtomicU64,
    /// Counts completed changes; [`Node::flush`] compares it with `flushed`.
    changes: AtomicU64,
    /// The count that the last good flush covered; `u64::MAX` before the first, so that the first
    /// flush is always done (an earlier process may have left data in the page cache).
    flushed: AtomicU64,
    serial: Serial,
    threshold: AtomicU64,
    threshold_hook: Mutex<Option<ThresholdHook>>,
    pub(super) bitmaps: Arc<Bitmaps>,
    by_header: Mutex<Option<ByHeader>>,
    asked: Mutex<Asked>,
}

impl Node {
    /// A node in front of `driver`. Reach it through a graph, or, in tests, directly.
    pub fn new(name: impl Into<String>, driver: Box<dyn Driver>, options: NodeOptions) -> Arc<Node> {
        let limits = driver.limits();
        let storage = driver.edges().is_empty();
        let tested = driver.moments().is_some();
        let bitmaps = driver.bitmaps().unwrap_or_default();
        Arc::new(Node {
            name: name.into(),
            driver,
            storage,
            tested,
            traffic: Traffic::default(),
            options: OptionsCell::new(options),
            read_only: AtomicBool::new(options.read_only),
            limits: LimitsCell::new(limits),
            highest: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            flushed: AtomicU64::new(u64::MAX),
            serial: Serial::default(),
            threshold: AtomicU64::new(0),
            threshold_hook: Mutex::new(None),
            bitmaps,
            by_header: Mutex::new(None),
            asked: Mutex::default(),
        })
    }

    /// The format above has come to a moment that tests have a name for. The request
    /// may be held back: call it with no lock held that the control thread takes.
    #[inline]
    pub fn moment(&self, event: BlkdebugEvent) {
        if self.tested {
            self.tell(Some(event), Locks::Free);
        }
    }

    /// As [`Node::moment`], with such a lock held.
    #[inline]
    pub fn moment_locked(&self, event: BlkdebugEvent) {
        if self.tested {
            self.tell(Some(event), Locks::Held);
        }
    }

    /// As [`Node::moment_locked`], for a moment without a name.
    #[inline]
    pub fn locked(&self) {
        if self.tested {
            self.tell(None, Locks::Held);
        }
    }

    /// A moment of this node itself, whatever is above.
    #[inline]
    fn own_moment(&self, event: BlkdebugEvent) {
        if self.tested {
            self.tell(Some(event), Locks::AsBefore);
        }
    }

    /// True when moments matter: for who would have to go a long way to tell of them.
    pub fn is_tested(&self) -> bool {
        self.tested
    }

    #[cold]
    fn tell(&self, event: Option<BlkdebugEvent>, locks: Locks) {
        if let Some(moments) = self.driver.moments() {
            moments.moment(event, locks);
        }
    }

    /// Virtual length in bytes, now.
    pub fn len(&self) -> u64 {
        self.driver.len()
    }

    /// True when the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The driver's alignment and preferences.
    pub fn limits(&self) -> Limits {
        self.limits.get()
    }

    /// What was asked for when it was opened, or last reopened; whether it is read-only now is
    /// [`Node::read_only`]'s to say.
    pub fn options(&self) -> NodeOptions {
        self.options.get()
    }

    /// It is reopened with other options. Only the graph does this, with the gates above closed.
    pub(super) fn set_options(&self, options: NodeOptions) {
        self.options.set(options);
    }

    /// It has been reopened, or what is below has changed: its driver may have other limits. Only the
    /// graph does this, with the gates above closed.
    pub(super) fn refresh_limits(&self) {
        self.limits.set(self.driver.limits());
    }

    /// What it was asked to be when it was opened, or last reopened.
    pub(super) fn asked(&self) -> Asked {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets [`Node::asked`].
    pub(super) fn set_asked(&self, asked: Asked) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = asked;
    }

    /// How the image's header led to its backing file, if it did.
    pub(super) fn by_header(&self) -> Option<ByHeader> {
        self.by_header.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The image's header has led to its backing file.
    pub(super) fn set_by_header(&self, how: Option<ByHeader>) {
        *self.by_header.lock().unwrap_or_else(PoisonError::into_inner) = how;
    }

    /// True when writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Only the graph does this ([`Graph::set_read_only`](super::graph::Graph::set_read_only)),
    /// while nobody writes.
    pub(super) fn mark_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Relaxed);
    }

    /// End of the highest write since the node was opened, in bytes (`wr_highest_offset`).
    pub fn wr_highest_offset(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }

    /// The write threshold in bytes; 0 when none is set.
    pub fn write_threshold(&self) -> u64 {
        self.threshold.load(Ordering::Relaxed)
    }

    /// Calls `hook` once, when a write first goes beyond byte `at`; 0 switches it off.
    pub fn set_write_threshold(&self, at: u64, hook: ThresholdHook) {
        let mut slot = self.threshold_hook.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = (at != 0).then_some(hook);
        self.threshold.store(at, Ordering::Relaxed);
    }

    /// Reads `to.len()` bytes at `off`; beyond the end are zeroes (a backing file may be short).
    pub fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let n = to.len() as u64;
        self.traffic.note();
        check_range(off, n)?;
        let len = self.len();
        let inside = n.min(len.saturating_sub(off));
        if inside < n {
            to.fill(inside as usize, (n - inside) as usize, 0);
        }
        match inside {
            0 => Ok(()),
            _ if inside == n => self.read_inside(off, to),
            _ => self.read_inside(off, &mut to.slice(0, inside as usize)),
        }
    }

    fn read_inside(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let align = u64::from(self.limits().request_alignment);
        let n = to.len() as u64;
        if (off | n) & (align - 1) == 0 && self.memory_fits(to.as_source()) {
            return self.driver.read(off, to);
        }
        let mut bounce = self.bounce(off, n);
        let (mut at, end) = (off, off + n);
        while at < end {
            let from = at & !(align - 1);
            let upto = end.min(from + BOUNCE).next_multiple_of(align).min(from + bounce.len() as u64);
            let part = &mut bounce[..(upto - from) as usize];
            self.driver.read(from, &mut IovMut::from_slice(part))?;
            let stop = upto.min(end);
            to.copy_from((at - off) as usize, &part[(at - from) as usize..(stop - from) as usize]);
            at = stop;
        }
        Ok(())
    }

    fn memory_fits(&self, iov: &Iov) -> bool {
        let (memory, request) = (self.limits().memory_alignment, self.limits().request_alignment);
        memory == 1 || iov.fits(memory as usize, request as usize)
    }

    /// A buffer for the aligned surroundings of a request, at most [`BOUNCE`] long.
    fn bounce(&self, off: u64, n: u64) -> AlignedBuf {
        let align = u64::from(self.limits().request_alignment);
        let span = (off + n).next_multiple_of(align) - (off & !(align - 1));
        let len = span.min(BOUNCE.next_multiple_of(align));
        AlignedBuf::new(len as usize, self.limits().memory_alignment.max(16) as usize)
    }

    /// Writes all of `from` at `off`. EPERM when read-only; EIO beyond the end, unless the driver
    /// grows with its writes.
    pub fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let n = from.len() as u64;
        self.traffic.note();
        self.check_change(off, n)?;
        if n == 0 {
            return Ok(());
        }
        if self.options().detect_zeroes != DetectZeroes::Off && is_zero(from) {
            let unmap = match self.options().detect_zeroes {
                DetectZeroes::Unmap => Flags::MAY_UNMAP,
                _ => Flags::NONE,
            };
            return self.zero(off, n, flags | unmap);
        }
        self.check_threshold(off + n);
        let done = self.write_inside(off, from, flags);
        self.changed(off, n);
        done.and_then(|()| self.after_write(flags))
    }

    fn write_inside(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let align = u64::from(self.limits().request_alignment);
        let n = from.len() as u64;
        let aligned = (off | n) & (align - 1) == 0;
        let _turn = (align > 1)
            .then(|| self.serial.enter(off & !(align - 1), (off + n).next_multiple_of(align), !aligned));
        if aligned && self.memory_fits(from) {
            self.own_moment(BlkdebugEvent::Pwritev);
            let done = self.driver.write(off, from, Flags(flags.0 & (Flags::COMPRESSED | Flags::HIDE).0));
            self.own_moment(BlkdebugEvent::PwritevDone);
            return done;
        }
        let mut bounce = self.bounce(off, n);
        let (mut at, end) = (off, off + n);
        while at < end {
            let start = at & !(align - 1);
            let upto = end.min(start + BOUNCE).next_multiple_of(align).min(start + bounce.len() as u64);
            let part = &mut bounce[..(upto - start) as usize];
            let stop = upto.min(end);
            if at > start {
                self.own_moment(BlkdebugEvent::PwritevRmwHead);
                self.read_block(start, &mut part[..align as usize])?;
                self.own_moment(BlkdebugEvent::PwritevRmwAfterHead);
            }
            if stop < upto && (at == start || upto - start > align) {
                let last = part.len() - align as usize;
                self.own_moment(BlkdebugEvent::PwritevRmwTail);
                self.read_block(upto - align, &mut part[last..])?;
                self.own_moment(BlkdebugEvent::PwritevRmwAfterTail);
            }
            from.copy_to((at - off) as usize, &mut part[(at - start) as usize..(stop - start) as usize]);
            self.own_moment(BlkdebugEvent::Pwritev);
            let done = self.driver.write(start, &Iov::from_slice(part), Flags(flags.0 & Flags::HIDE.0));
            self.own_moment(BlkdebugEvent::PwritevDone);
            done?;
            at = stop;
        }
        Ok(())
    }

    /// One aligned block for a read-modify-write; zeroes where the driver has nothing yet.
    fn read_block(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        if at >= self.len() {
            to.fill(0);
            return Ok(());
        }
        // `to` is a block of an aligned buffer, but only as aligned as requests are.
        let memory = self.limits().memory_alignment as usize;
        if (to.as_ptr() as usize) & (memory - 1) == 0 {
            return self.driver.read(at, &mut IovMut::from_slice(to));
        }
        let mut block = AlignedBuf::new(to.len(), memory);
        self.driver.read(at, &mut IovMut::from_slice(&mut block))?;
        to.copy_from_slice(&block);
        Ok(())
    }

    /// Makes `len` bytes at `off` read as zeroes, quickly where the driver can.
    pub fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.check_change(off, len)?;
        if len == 0 {
            return Ok(());
        }
        self.check_threshold(off + len);
        let done = self.zero_inside(off, len, flags);
        self.changed(off, len);
        done.and_then(|()| self.after_write(flags))
    }

    fn zero_inside(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let align = u64::from(self.limits().request_alignment);
        let end = off + len;
        let (first, last) = (off.next_multiple_of(align), end & !(align - 1));
        let keep = if self.options().unmap { Flags::MAY_UNMAP } else { Flags::NONE };
        let pass = Flags(flags.0 & (keep | Flags::NO_FALLBACK | Flags::HIDE).0);
        if (first != off || last != end) && flags.contains(Flags::NO_FALLBACK) {
            return Err(errno(libc::ENOTSUP));
        }
        if first >= last {
            return self.write_zeroes(off, len);
        }
        if off < first {
            self.write_zeroes(off, first - off)?;
        }
        let done = {
            let _turn = (align > 1).then(|| self.serial.enter(first, last, false));
            self.own_moment(BlkdebugEvent::PwritevZero);
            self.driver.zero(first, last - first, pass)
        };
        self.own_moment(BlkdebugEvent::PwritevDone);
        match done {
            Err(e) if is_enotsup(&e) && !flags.contains(Flags::NO_FALLBACK) => {
                self.write_zeroes(first, last - first)?;
            }
            other => other?,
        }
        if last < end {
            self.write_zeroes(last, end - last)?;
        }
        Ok(())
    }

    /// Writes zeroes as data.
    fn write_zeroes(&self, off: u64, len: u64) -> io::Result<()> {
        let align = self.limits().memory_alignment.max(16) as usize;
        let zeroes = AlignedBuf::new(len.min(BOUNCE) as usize, align);
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE);
            self.write_inside(off + done, &Iov::from_slice(&zeroes[..n as usize]), Flags::NONE)?;
            done += n;
        }
        Ok(())
    }

    /// Says that the contents of `len` bytes at `off` are not needed: a hint, passed on only with
    /// `discard=unmap`, for the whole blocks in the range.
    pub fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.check_change(off, len)?;
        if off + len > self.len() {
            return Err(errno(libc::EIO));
        }
        let align = u64::from(self.limits().request_alignment);
        let (first, last) = (off.next_multiple_of(align), (off + len) & !(align - 1));
        if !self.options().unmap || first >= last {
            return Ok(());
        }
        self.check_threshold(off + len);
        let done = {
            let _turn = (align > 1).then(|| self.serial.enter(first, last, false));
            self.driver.discard(first, last - first)
        };
        self.changed_content(first, last - first);
        match done {
            Err(e) if is_enotsup(&e) => Ok(()),
            other => other,
        }
    }

    /// Makes `len` bytes at `off` independent of the backing file ([`Driver::populate`]). No write:
    /// dirty bitmaps are not marked.
    pub fn populate(&self, off: u64, len: u64, zero: bool) -> io::Result<()> {
        self.check_change(off, len)?;
        if len == 0 {
            return Ok(());
        }
        let done = self.driver.populate(off, len, zero);
        self.changes.fetch_add(1, Ordering::SeqCst);
        done
    }

    /// Every write that returned before this call is on stable storage when this returns, unless
    /// the node is opened with `cache.no-flush`.
    pub fn flush(&self) -> io::Result<()> {
        if self.storage && self.options().no_flush {
            return Ok(());
        }
        // Only writes that completed before this load must be covered. A format may have metadata
        // to write back whatever its children say, and knows best whether there is any.
        let changes = self.changes.load(Ordering::Acquire);
        if self.storage && self.flushed.load(Ordering::Acquire) == changes {
            return Ok(());
        }
        match self.storage {
            true => self.driver.flush()?,
            false => return flush_once::once(self, changes, || self.driver.flush()),
        }
        self.flushed.store(changes, Ordering::Release);
        Ok(())
    }

    /// What is at `off`, for at most `len` > 0 bytes; zeroes beyond the end.
    pub fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        check_range(off, len)?;
        if len == 0 {
            return Err(errno(libc::EINVAL));
        }
        let inside = len.min(self.len().saturating_sub(off));
        if inside == 0 {
            return Ok(Extent { kind: ExtentKind::Zero, len, host_offset: None });
        }
        // A filter asks the node below, which aligns it.
        let align = match self.driver.filtered() {
            Some(_) => 1,
            None => u64::from(self.limits().request_alignment),
        };
        let (start, end) = (off & !(align - 1), (off + inside).next_multiple_of(align));
        let Extent { kind, len, host_offset } = self.driver.status(start, end - start)?;
        let before = off - start;
        Ok(Extent {
            // "Data" is right of everything.
            kind: if len > before { kind } else { ExtentKind::Data },
            len: len.saturating_sub(before).clamp(1, inside),
            host_offset: host_offset.map(|at| at + before),
        })
    }

    /// Changes the virtual length. EACCES when read-only. The graph calls it, with the gates above
    /// closed ([`Graph::resize`](super::graph::Graph::resize)); a format calls it for its file.
    pub fn resize(&self, len: u64) -> io::Result<()> {
        self.resize_with(len, Preallocation::Off)
    }

    /// The same, allocating new space in advance.
    pub fn resize_with(&self, len: u64, how: Preallocation) -> io::Result<()> {
        self.change_len(len, |driver| driver.resize_with(len, how))
    }

    /// Makes it longer for a format, as [`Driver::grow`] says.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        self.change_len(len, |driver| driver.grow(len))
    }

    fn change_len(&self, len: u64, change: impl FnOnce(&dyn Driver) -> io::Result<()>) -> io::Result<()> {
        if self.read_only() {
            return Err(errno(libc::EACCES));
        }
        if len > MAX_LEN {
            return Err(errno(libc::EFBIG));
        }
        let done = change(&*self.driver);
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.bitmaps.resize(self.len());
        done
    }

    fn check_change(&self, off: u64, n: u64) -> io::Result<()> {
        if self.read_only() {
            return Err(errno(libc::EPERM));
        }
        check_range(off, n)?;
        if off + n > self.len() && !self.driver.grows() {
            return Err(errno(libc::EIO));
        }
        Ok(())
    }

    fn after_write(&self, flags: Flags) -> io::Result<()> {
        if flags.contains(Flags::FUA) || !self.options().writeback { self.flush() } else { Ok(()) }
    }

    fn check_threshold(&self, end: u64) {
        let passed = |at: u64| at != 0 && end > at;
        if passed(self.threshold.load(Ordering::Relaxed)) {
            let mut slot = self.threshold_hook.lock().unwrap_or_else(PoisonError::into_inner);
            // Another one may have been set meanwhile.
            let at = self.threshold.load(Ordering::Relaxed);
            if passed(at)
                && let Some(hook) = slot.take()
            {
                self.threshold.store(0, Ordering::Relaxed);
                hook(end - at);
            }
        }
    }

    /// The one place where a write is noted: after the data, before the writer's user hears of
    /// it, and also on failure (some of it may have been written). The dirty bitmaps are marked in
    /// [`Node::changed_content`].
    fn changed(&self, off: u64, len: u64) {
        self.highest.fetch_max(off + len, Ordering::Relaxed);
        self.changed_content(off, len);
    }

    fn changed_content(&self, off: u64, len: u64) {
        // SeqCst: the data come before the look at the bitmaps.
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.bitmaps.any() {
            self.bitmaps.mark(off, len, self.len());
        }
    }
}

fn check_range(off: u64, n: u64) -> io::Result<()> {
    match off.checked_add(n) {
        Some(end) if end <= MAX_LEN => Ok(()),
        _ => Err(errno(libc::EIO)),
    }
}

/// True when every byte is zero. Copies before it looks: the guest may write meanwhile.
fn is_zero(from: &Iov) -> bool {
    let mut part = [0u8; 4096];
    let mut at = 0;
    while at < from.len() {
        let n = part.len().min(from.len() - at);
        from.copy_to(at, &mut part[..n]);
        if part[..n].iter().any(|&b| b != 0) {
            return false;
        }
        at += n;
    }
    true
}

#[cfg(test)]
#[path = "node_test.rs"]
mod tests;
