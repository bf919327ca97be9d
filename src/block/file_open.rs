//! Opening the drivers `file` and `host_device`: their options, the descriptor (by name, or out of
//! an fd set), and what O_DIRECT wants of it.
//!
//! Owns: nothing once the driver is open ([`File`] does). Threads: control.
//! Locks: none of memory; the image's are taken here for the first time.

use super::driver::{Driver, Limits};
use super::file::{File, seek, stat};
use super::filelock::Locks;
use super::node::errno;
use super::open::{Open, Opening, PassedFd};
use crate::bail;
use crate::error::{Error, Result, strerror};
use crate::sys::buf::AlignedBuf;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

crate::wire_enum! {
    /// On, off, or what is best.
    pub enum OnOffAuto {
        /// What is best.
        "auto" Auto,
        /// On, or an error.
        "on" On,
        /// Off.
        "off" Off,
    }
    default Auto
}

crate::wire_enum! {
    /// How requests reach the kernel in QEMU. Here the device's own thread makes them, whichever
    /// is chosen.
    pub enum BlockdevAioOptions {
        /// Threads.
        "threads" Threads,
        /// Linux AIO; only with `cache.direct`.
        "native" Native,
        /// io_uring.
        "io_uring" IoUring,
    }
    default Threads
}

crate::wire_struct! {
    /// Options of the drivers `file` and `host_device`.
    pub struct BlockdevOptionsFile {
        /// Path of the file, or `/dev/fdset/N`.
        filename: String,
        /// Whether to lock the image against other processes; `auto` locks where the host can.
        locking: Option<OnOffAuto>,
        /// How requests reach the kernel.
        aio: Option<BlockdevAioOptions>,
    }
}

/// One of the two drivers, with its options.
pub struct FilePlan {
    /// `file` or `host_device`.
    pub name: &'static str,
    /// Their options.
    pub options: BlockdevOptionsFile,
}

impl FilePlan {
    /// `file` on `filename`, or `host_device`.
    pub fn new(name: &'static str, filename: &str) -> FilePlan {
        let options = BlockdevOptionsFile { filename: filename.into(), locking: None, aio: None };
        FilePlan { name, options }
    }
}

fn open_path(path: &str, flags: i32) -> io::Result<OwnedFd> {
    let path = CString::new(path).map_err(|_| errno(libc::EINVAL))?;
    loop {
        // SAFETY: a NUL-terminated path; the result is checked.
        let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
        if fd >= 0 {
            // SAFETY: just opened, and nobody else's.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

impl Open for FilePlan {
    fn name(&self) -> &'static str {
        self.name
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let (name, filename) = (self.name, self.options.filename);
        if filename.is_empty() {
            bail!("The '{name}' block driver requires a file name");
        }
        let direct = cx.options.direct;
        if self.options.aio == Some(BlockdevAioOptions::Native) && !direct {
            bail!("aio=native was specified, but it requires cache.direct=on, which was not specified.");
        }
        let cannot = |e: io::Error| Error::new(format!("Could not open '{filename}': {}", strerror(&e)));
        let opened = open_fd(cx, &filename, direct)?;
        let fd = &opened.passed.fd;
        let st = stat(fd.as_raw_fd()).map_err(cannot)?;
        let device = name == "host_device";
        let kind = st.st_mode & libc::S_IFMT;
        if !device && kind != libc::S_IFREG {
            bail!("'{name}' driver requires '{filename}' to be a regular file");
        }
        if device && kind != libc::S_IFBLK && kind != libc::S_IFCHR {
            bail!("'{name}' driver requires '{filename}' to be either a character or block device");
        }
        let len =
            if device { seek(fd.as_raw_fd(), 0, libc::SEEK_END).map_err(cannot)? } else { st.st_size as u64 };
        let limits = if is_direct(fd) { probe_direct(fd.as_raw_fd(), &st) } else { Limits::default() };
        let locks = Locks::new(fd, &filename, self.options.locking.unwrap_or_default())?;
        let limits = Limits { cheap_zeroes: !device, ..limits };
        Ok(Box::new(File::new(name, filename, opened, locks, limits, len, (st.st_dev, st.st_ino))))
    }
}

/// A descriptor, and what may be done with it.
pub(super) struct Opened {
    pub passed: PassedFd,
    pub writable: bool,
    /// It is to be reopened for writing when somebody writes.
    pub reopen: bool,
}

fn open_fd(cx: &mut Opening, filename: &str, direct: bool) -> Result<Opened> {
    let wanted = if cx.options.read_only { libc::O_RDONLY } else { libc::O_RDWR };
    let flags = if direct { libc::O_DIRECT } else { 0 };
    if filename.starts_with("/dev/fdset/") {
        let mut passed = passed_fd(cx, filename, wanted, direct);
        if passed.is_err() && wanted == libc::O_RDWR && cx.options.auto_read_only {
            passed = passed_fd(cx, filename, libc::O_RDONLY, direct);
            cx.options.read_only |= passed.is_ok();
        }
        return Ok(Opened { passed: passed?, writable: !cx.options.read_only, reopen: false });
    }
    let cannot = |e: io::Error| match e.raw_os_error() {
        Some(libc::EINVAL) if direct => direct_error(filename, &e),
        _ => Error::new(format!("Could not open '{filename}': {}", strerror(&e))),
    };
    // With auto-read-only nothing is opened for writing before somebody wants to write, so that
    // the host's permissions matter only then; but whether it can be is found out now.
    let mut fd = open_path(filename, wanted | flags);
    let reopen = cx.options.auto_read_only && !cx.options.read_only;
    if reopen {
        let refused = matches!(&fd, Err(e) if matches!(
            e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)));
        cx.options.read_only = refused;
        fd = match fd {
            Ok(_) => open_path(filename, libc::O_RDONLY | flags),
            Err(_) if refused => open_path(filename, libc::O_RDONLY | flags),
            Err(e) => Err(e),
        };
    }
    let fd = fd.map_err(cannot)?;
    let writable = wanted == libc::O_RDWR && !reopen;
    let passed = PassedFd { fd, keep: None };
    Ok(Opened { passed, writable, reopen: reopen && !cx.options.read_only })
}

/// A descriptor out of a set. One that does not bypass the page cache, where that is wanted, is
/// opened again with O_DIRECT: the flag belongs to the open file, which is also the giver's.
fn passed_fd(cx: &Opening, filename: &str, mode: i32, direct: bool) -> Result<PassedFd> {
    if !direct {
        return cx.fdset(filename, mode);
    }
    cx.fdset(filename, mode | libc::O_DIRECT).or_else(|_| {
        let mut passed = cx.fdset(filename, mode)?;
        passed.fd = crate::sys::ofd::reopen(&passed.fd, mode | libc::O_DIRECT)
            .map_err(|e| direct_error(filename, &e))?;
        Ok(passed)
    })
}

fn direct_error(filename: &str, e: &io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::EINVAL) => {
            Error::new(format!("Could not open '{filename}': filesystem does not support O_DIRECT"))
        }
        _ => Error::new(format!("Could not open '{filename}': {}", strerror(e))),
    }
}

/// Whether the descriptor bypasses the page cache: one that was passed may, though nobody asked.
pub(super) fn is_direct(fd: &OwnedFd) -> bool {
    // SAFETY: flags of a descriptor of ours; no memory is involved.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_DIRECT != 0
}

/// Another open file like `fd`'s, past the page cache or not, and what it wants of requests.
pub(super) fn other_mode(fd: &OwnedFd, filename: &str, direct: bool) -> Result<(OwnedFd, Limits)> {
    // SAFETY: flags of a descriptor of ours; no memory is involved.
    let mode = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } & libc::O_ACCMODE;
    let flag = if direct { libc::O_DIRECT } else { 0 };
    let new = crate::sys::ofd::reopen(fd, mode | flag).map_err(|e| direct_error(filename, &e))?;
    let limits = match direct {
        true => probe_direct(new.as_raw_fd(), &stat(new.as_raw_fd())?),
        false => Limits::default(),
    };
    Ok((new, limits))
}

/// What O_DIRECT wants of this file: the kernel's word (statx, Linux 6.1), else what a read
/// accepts, else a page.
fn probe_direct(fd: RawFd, st: &libc::stat) -> Limits {
    // SAFETY: all-zero bytes are a valid statx.
    let mut sx: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: an empty path with AT_EMPTY_PATH means `fd` itself; writes one statx.
    let done = unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &mut sx) };
    let known = done == 0 && sx.stx_mask & mask != 0;
    let sane = |n: u32| n.is_power_of_two() && n <= 1 << 20;
    if known && sane(sx.stx_dio_mem_align) && sane(sx.stx_dio_offset_align) {
        return Limits {
            request_alignment: sx.stx_dio_offset_align,
            memory_alignment: sx.stx_dio_mem_align,
            ..Limits::default()
        };
    }
    let mut page = AlignedBuf::new(65536, 65536);
    let base = page.as_mut_ptr();
    let accepts = |len: usize, shift: usize| {
        // SAFETY: at most 4096 + 4096 bytes of the buffer, which lives longer than this and is
        // reached by `base` alone.
        unsafe { libc::pread(fd, base.add(shift).cast(), len, 0) >= 0 }
    };
    let sizes = [512usize, 1024, 2048, 4096];
    // An empty file accepts anything: be careful there.
    let blank = st.st_size == 0 && st.st_mode & libc::S_IFMT == libc::S_IFREG;
    let find = |ok: &dyn Fn(usize) -> bool| {
        let found = sizes.iter().copied().find(|&n| !blank && ok(n)).unwrap_or(4096);
        u32::try_from(found).unwrap_or(4096)
    };
    Limits {
        request_alignment: find(&|n| accepts(n, 0)),
        memory_alignment: find(&|n| accepts(4096, n)),
        ..Limits::default()
    }
}
