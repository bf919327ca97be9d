//! Attributes of files that only some file systems know: no copy-on-write (btrfs), and how much space
//! to allocate at once (XFS).
//!
//! Owns: the system calls. Threads: any. Locks: none.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `_IOR('f', 1, long)` and `_IOW('f', 2, long)` of linux/fs.h. The number of most file systems is an
/// int, but FUSE copies a long.
const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const FS_NOCOW_FL: libc::c_long = 0x0080_0000;

/// `_IOR('X', 31, struct fsxattr)` and `_IOW('X', 32, struct fsxattr)`.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::c_ulong = 0x401c_5820;
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

fn ioctl<T>(fd: &impl AsFd, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
    // SAFETY: every request above reads or writes one `T` of those that it is called with here.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, std::ptr::from_mut(arg)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Switches copy-on-write off. btrfs does that only as long as the file is empty.
pub fn set_nocow(fd: &impl AsFd) -> io::Result<()> {
    let mut flags: libc::c_long = 0;
    ioctl(fd, FS_IOC_GETFLAGS, &mut flags)?;
    flags |= FS_NOCOW_FL;
    ioctl(fd, FS_IOC_SETFLAGS, &mut flags)
}

/// Asks for space in pieces of `bytes`; 0: as the file system likes. XFS takes multiples of its blocks,
/// and only as long as the file is empty; ext4 says yes and does nothing.
pub fn set_extent_size_hint(fd: &impl AsFd, bytes: u32) -> io::Result<()> {
    let mut attr = FsXattr::default();
    ioctl(fd, FS_IOC_FSGETXATTR, &mut attr)?;
    attr.xflags |= FS_XFLAG_EXTSIZE;
    attr.extsize = bytes;
    ioctl(fd, FS_IOC_FSSETXATTR, &mut attr)
}

/// What was asked for, if anything was.
pub fn extent_size_hint(fd: &impl AsFd) -> Option<u32> {
    let mut attr = FsXattr::default();
    ioctl(fd, FS_IOC_FSGETXATTR, &mut attr).ok()?;
    Some(attr.extsize).filter(|&n| n != 0)
}
