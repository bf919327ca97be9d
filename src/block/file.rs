//! The drivers `file` (regular files) and `host_device` (block devices): the only place of the
//! block layer that makes system calls on disks.
//!
//! Owns: the descriptors, the image locks, the discard counters. Never: knows formats. Threads:
//! I/O from any; `set_perm`, `resize` and `close` on the control thread; `grow` on any, with the lock of
//! the format above. Locks: `turn`, across one write to the kernel, and with it nothing is waited for but
//! that; the descriptor's number never changes (a reopen puts another open file in its place, dup3(2)).
//!
//! A failed fdatasync(2) may have dropped dirty pages, and the next one would report success: from
//! then on every flush fails, unless the page cache is bypassed (as in QEMU).

use super::driver::{Driver, Extent, ExtentKind, Flags, ImageInfo, Limits, Perm, Preallocation};
use super::file_open::{self, Opened, is_direct};
use super::filelock::Locks;
use super::node::errno;
use super::node_options::LimitsCell;
use super::reopen_options::{Ready, Reopening};
use crate::error::{Result, strerror};
use crate::sys::buf::AlignedBuf;
use crate::sys::file_attr;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::thread::lock;
use serde_json::{Map, Value, json};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the module's head.
pub struct File {
    name: &'static str,
    filename: String,
    fd: OwnedFd,
    /// The fd set stays alive as long as this.
    _keep: Option<Box<dyn Send + Sync>>,
    device: bool,
    direct: AtomicBool,
    /// The node is writable, but the descriptor is so only while somebody writes.
    reopen: AtomicBool,
    /// The descriptor came from an fd set: its access mode is its giver's to choose.
    passed: bool,
    writable: AtomicBool,
    limits: LimitsCell,
    len: AtomicU64,
    id: (u64, u64),
    locks: Locks,
    /// Who writes much at a time into the page cache. The kernel lets one writer into a file, too, but who waits
    /// there does so busily. Into a device it lets all.
    turn: Mutex<()>,
    /// A flush has failed: what was written before it may be lost.
    broken: AtomicBool,
    discard_ok: AtomicU64,
    discard_failed: AtomicU64,
    discard_bytes: AtomicU64,
}

/// From so many bytes on a write takes longer than to wake who waits for it by far.
const LONG: usize = 256 << 10;

pub(super) fn stat(fd: RawFd) -> io::Result<libc::stat> {
    // SAFETY: all-zero bytes are a valid stat.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes one stat.
    match unsafe { libc::fstat(fd, &mut st) } {
        0 => Ok(st),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn seek(fd: RawFd, off: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: no memory is involved; every data call gives its own offset, so the file position
    // is nobody's.
    let at = unsafe { libc::lseek(fd, off, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

impl File {
    /// The driver `name` on what [`file_open`](super::file_open) has opened.
    pub(super) fn new(
        name: &'static str,
        filename: String,
        opened: Opened,
        locks: Locks,
        limits: Limits,
        len: u64,
        id: (u64, u64),
    ) -> File {
        File {
            name,
            passed: filename.starts_with("/dev/fdset/"),
            filename,
            direct: AtomicBool::new(is_direct(&opened.passed.fd)),
            fd: opened.passed.fd,
            _keep: opened.passed.keep,
            device: name == "host_device",
            reopen: AtomicBool::new(opened.reopen),
            writable: AtomicBool::new(opened.writable),
            limits: LimitsCell::new(limits),
            len: AtomicU64::new(len),
            id,
            locks,
            turn: Mutex::default(),
            broken: AtomicBool::new(false),
            discard_ok: AtomicU64::new(0),
            discard_failed: AtomicU64::new(0),
            discard_bytes: AtomicU64::new(0),
        }
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn grown(&self, end: u64) {
        if end > self.len.load(Ordering::Relaxed) {
            self.len.fetch_max(end, Ordering::Relaxed);
        }
    }

    fn fallocate(&self, mode: i32, off: u64, len: u64) -> io::Result<()> {
        loop {
            // SAFETY: no memory is involved. Node keeps off + len below i64::MAX.
            let done = unsafe { libc::fallocate(self.fd(), mode, off as i64, len as i64) };
            if done == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                // What this file system or device cannot do: the node finds another way.
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL) => {
                    return Err(errno(libc::ENOTSUP));
                }
                _ => return Err(e),
            }
        }
    }

    /// Puts another open file, with or without the right to write, in the place of this one.
    fn reopen(&self, write: bool) -> io::Result<()> {
        let mode = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let direct = if self.direct.load(Ordering::Relaxed) { libc::O_DIRECT } else { 0 };
        let new = crate::sys::ofd::reopen(&self.fd, mode | direct)?;
        // SAFETY: both are descriptors of ours. Requests in flight keep the old open file.
        if unsafe { libc::dup3(new.as_raw_fd(), self.fd(), libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.writable.store(write, Ordering::Relaxed);
        Ok(())
    }
}

/// `e`, with what it was that could not be done.
fn because(what: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{what}: {}", strerror(e)))
}

/// Calls `f` for the pieces of `iov` until all are done; `f` says how many bytes it did. 0 ends it.
/// Returns the bytes done.
fn all_of(iov: &Iov, mut f: impl FnMut(&[libc::iovec], u64) -> isize) -> io::Result<usize> {
    /// IOV_MAX of Linux.
    const MOST: usize = 1024;
    let mut done = 0;
    let mut rest;
    let mut now = iov;
    while done < iov.len() {
        let vec = now.iovecs();
        let n = f(&vec[..vec.len().min(MOST)], done as u64);
        match usize::try_from(n) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
        if done < iov.len() {
            rest = iov.slice(done, iov.len() - done);
            now = &rest;
        }
    }
    Ok(done)
}

impl Driver for File {
    fn name(&self) -> &'static str {
        self.name
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn grows(&self) -> bool {
        !self.device
    }

    fn limits(&self) -> Limits {
        self.limits.get()
    }

    fn set_perm(&self, uses: Perm, shares: Perm) -> io::Result<()> {
        let old = self.locks.held();
        self.locks.set(uses, shares)?;
        let write = uses & (Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE) != Perm::NONE;
        if self.reopen.load(Ordering::Relaxed)
            && write != self.writable.load(Ordering::Relaxed)
            && let Err(e) = self.reopen(write)
        {
            if let Err(e) = self.locks.set(old.0, old.1) {
                log::warn!("{}: {e}", self.filename);
            }
            return Err(e);
        }
        Ok(())
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let fd = self.fd();
        let done = all_of(to.as_source(), |vec, at| {
            // SAFETY: the pieces of an IovMut are writable for their lengths. At most 1024, so
            // the count fits.
            unsafe { libc::preadv(fd, vec.as_ptr(), vec.len() as i32, (off + at) as i64) }
        })?;
        // Beyond the end (a block that the end is in, or someone cut the file): zeroes.
        to.fill(done, to.len() - done, 0);
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        let fd = self.fd();
        let _turn = (from.len() >= LONG && !self.device && !self.direct.load(Ordering::Relaxed))
            .then(|| lock(&self.turn));
        let done = all_of(from, |vec, at| {
            // SAFETY: the pieces of an Iov are readable for their lengths; at most 1024.
            unsafe { libc::pwritev(fd, vec.as_ptr(), vec.len() as i32, (off + at) as i64) }
        });
        match done {
            Ok(n) if n == from.len() => {
                self.grown(off + n as u64);
                Ok(())
            }
            // The kernel gives no reason for a write of nothing.
            Ok(_) => Err(errno(libc::ENOSPC)),
            Err(e) => {
                // Part of it may have made the file longer.
                if let Ok(end) = seek(fd, 0, libc::SEEK_END)
                    && !self.device
                {
                    self.grown(end);
                }
                Err(e)
            }
        }
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let end = off + len;
        let inside = end <= self.len();
        if flags.contains(Flags::MAY_UNMAP) && inside {
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            match self.fallocate(hole, off, len) {
                Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => {}
                other => return other,
            }
        }
        // Without KEEP_SIZE it makes the file longer, never shorter.
        self.fallocate(libc::FALLOC_FL_ZERO_RANGE, off, len)?;
        self.grown(end);
        Ok(())
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        let done = if self.device {
            let range: [u64; 2] = [off, len];
            // SAFETY: BLKDISCARD reads two u64: start and length.
            match unsafe { libc::ioctl(self.fd(), BLKDISCARD, range.as_ptr()) } {
                0 => Ok(()),
                _ => match io::Error::last_os_error() {
                    e if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
                        Err(errno(libc::ENOTSUP))
                    }
                    e => Err(e),
                },
            }
        } else {
            self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, off, len)
        };
        match &done {
            Ok(()) => {
                self.discard_ok.fetch_add(1, Ordering::Relaxed);
                self.discard_bytes.fetch_add(len, Ordering::Relaxed);
            }
            Err(_) => {
                self.discard_failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        done
    }

    fn flush(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(errno(libc::EIO));
        }
        loop {
            // SAFETY: no memory is involved.
            if unsafe { libc::fdatasync(self.fd()) } == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                // Some files cannot be synced, and have nothing to lose.
                Some(libc::EROFS | libc::EINVAL | libc::ENOTSUP) => return Ok(()),
                _ => {
                    if !self.direct.load(Ordering::Relaxed) {
                        self.broken.store(true, Ordering::Relaxed);
                    }
                    return Err(e);
                }
            }
        }
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let data = |len| Extent { kind: ExtentKind::Data, len, host_offset: Some(off) };
        if self.device {
            return Ok(data(len));
        }
        match seek(self.fd(), off as i64, libc::SEEK_DATA) {
            // A file that cannot tell has data everywhere.
            Err(e) if e.raw_os_error() != Some(libc::ENXIO) => return Ok(data(len)),
            // No data up to the end.
            Err(_) => return Ok(Extent { kind: ExtentKind::Zero, ..data(len) }),
            Ok(at) if at > off => {
                return Ok(Extent { kind: ExtentKind::Zero, ..data(len.min(at - off)) });
            }
            Ok(_) => {}
        }
        match seek(self.fd(), off as i64, libc::SEEK_HOLE) {
            Ok(at) if at > off => Ok(data(len.min(at - off))),
            _ => Ok(data(len)),
        }
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        if self.device {
            // A device may be longer than what is asked for (QEMU's `exact=false`).
            return match len > self.len() {
                true => Err(io::Error::new(io::ErrorKind::Unsupported, "Cannot grow device files")),
                false => Ok(()),
            };
        }
        let size = i64::try_from(len).map_err(|_| errno(libc::EFBIG))?;
        loop {
            // SAFETY: no memory is involved.
            if unsafe { libc::ftruncate(self.fd(), size) } == 0 {
                self.len.store(len, Ordering::Relaxed);
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }

    /// A write to space that the file system has found already costs less; and one that bypasses the page cache
    /// need not wait for all others to the file then.
    fn grow(&self, len: u64) -> io::Result<()> {
        let old = self.len();
        if len > old {
            match self.fallocate(0, old, len - old) {
                Ok(()) => {
                    self.len.store(len, Ordering::Relaxed);
                    return Ok(());
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => {
                    // A file system may keep what it has found: others need that now.
                    self.resize(old)?;
                }
                Err(_) => {}
            }
        }
        self.resize(len)
    }

    fn resize_with(&self, len: u64, how: Preallocation) -> io::Result<()> {
        let old = self.len();
        if how == Preallocation::Off {
            return self.resize(len);
        }
        let no = |text: String| Err(io::Error::new(io::ErrorKind::Unsupported, text));
        if self.device {
            let mode = how.as_str();
            return no(format!("Preallocation mode '{mode}' unsupported for this non-regular file"));
        }
        if how == Preallocation::Metadata {
            return no("Unsupported preallocation mode: metadata".into());
        }
        if len < old {
            return no("Preallocation can't be used for shrinking files".into());
        }
        let zeroes = || -> io::Result<()> {
            let zeroes = AlignedBuf::new(64 << 10, 4096);
            let mut pos = old;
            while pos < len {
                let n = (len - pos).min(zeroes.len() as u64);
                self.write(pos, &Iov::from_slice(&zeroes[..n as usize]), Flags::NONE)?;
                pos += n;
            }
            self.flush()
        };
        let resized = self.resize(len).map_err(|e| because("Could not resize file", &e));
        let done = resized.and_then(|()| match how {
            _ if len == old => Ok(()),
            Preallocation::Full => {
                zeroes().map_err(|e| because("Could not write zeros for preallocation", &e))
            }
            // As posix_fallocate does where the file system cannot.
            _ => match self.fallocate(0, old, len - old) {
                Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => zeroes(),
                other => other,
            }
            .map_err(|e| because("Could not preallocate new data", &e)),
        });
        done.inspect_err(|_| {
            if let Err(e) = self.resize(old) {
                log::warn!("'{}' keeps the length it was to get: {e}", self.filename);
            }
        })
    }

    fn info(&self) -> ImageInfo {
        let blocks = stat(self.fd()).map(|st| st.st_blocks as u64 * 512);
        let hint = file_attr::extent_size_hint(&self.fd);
        let specific = hint.map(|n| ("extent-size-hint".to_string(), json!(n))).into_iter().collect();
        ImageInfo {
            actual_size: blocks.ok(),
            specific: Some(("file", specific)),
            dirty: Some(false),
            ..ImageInfo::default()
        }
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    fn own_options(&self) -> Map<String, Value> {
        Map::from_iter([("filename".to_string(), json!(self.filename))])
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        if self.passed {
            let possible = read_only || self.writable.load(Ordering::Relaxed);
            return if possible { Ok(()) } else { Err(errno(libc::EACCES)) };
        }
        // From now on the descriptor follows its users, as with auto-read-only.
        self.reopen.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let direct = how.options.direct;
        if direct == self.direct.load(Ordering::Relaxed) {
            return Some(Ok(Box::new(|| {})));
        }
        let ready = || -> Result<Ready<'a>> {
            let (new, limits) = file_open::other_mode(&self.fd, &self.filename, direct)?;
            let limits = Limits { cheap_zeroes: !self.device, ..limits };
            Ok(Box::new(move || {
                // The access mode may have changed since, with what the users do; of one that was
                // passed it never does, and its flags are also its giver's.
                let done = match self.passed {
                    // SAFETY: both are descriptors of ours, and no request is in flight.
                    true => unsafe { libc::dup3(new.as_raw_fd(), self.fd(), libc::O_CLOEXEC) },
                    false => {
                        let flags = if direct { libc::O_DIRECT } else { 0 };
                        // SAFETY: status flags of a descriptor of ours; no memory is involved.
                        unsafe { libc::fcntl(self.fd(), libc::F_SETFL, flags) }
                    }
                };
                if done < 0 {
                    log::error!("{}: {}", self.filename, io::Error::last_os_error());
                    return;
                }
                self.direct.store(direct, Ordering::Relaxed);
                self.limits.set(limits);
            }))
        };
        Some(ready())
    }

    fn file_id(&self) -> Option<(u64, u64)> {
        Some(self.id)
    }

    fn stats(&self) -> Option<Map<String, Value>> {
        let count = |n: &AtomicU64| json!(n.load(Ordering::Relaxed));
        let mut map = Map::new();
        map.insert("driver".into(), json!(self.name));
        map.insert("discard-nb-ok".into(), count(&self.discard_ok));
        map.insert("discard-nb-failed".into(), count(&self.discard_failed));
        map.insert("discard-bytes-ok".into(), count(&self.discard_bytes));
        Some(map)
    }

    fn close(&self) -> io::Result<()> {
        // Nothing is held in memory; whether the page cache is to reach the disk is up to those
        // above, who flush before they close. The locks would end with the descriptor, but a child
        // process that is just being started may have a copy of it for a moment.
        self.locks.set(Perm::NONE, Perm::ALL)
    }
}

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
