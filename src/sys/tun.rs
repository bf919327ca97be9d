//! The system calls of a TAP interface (`/dev/net/tun`; Linux `Documentation/networking/tuntap.rst`)
//! and of a frame that goes in or out in one piece.
//!
//! Owns: nothing; each function is one system call. Threads: any. Locks: none.

use super::iov::{Iov, IovMut};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most pieces that one readv(2) or writev(2) takes (`IOV_MAX`).
pub const IOV_MAX: usize = 1024;

/// Flags of `TUNSETIFF` that this program uses: an Ethernet interface, no packet information.
const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI;

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A zeroed `struct ifreq`.
fn ifreq() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which zero bytes are a value.
    unsafe { std::mem::zeroed() }
}

/// `TUNSETIFF`: makes `fd`, an open `/dev/net/tun`, the interface `name` (`tap%d`: the kernel
/// chooses the number; at most 15 bytes). Returns the name it has now.
pub fn attach(fd: BorrowedFd, name: &str, vnet_hdr: bool) -> io::Result<String> {
    let mut req = ifreq();
    if name.len() >= req.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = TAP_FLAGS | if vnet_hdr { libc::IFF_VNET_HDR } else { 0 };
    req.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut req) })?;
    Ok(name_of(&req))
}

/// `TUNGETIFF`: the interface behind `fd` and its flags (`IFF_TAP`, `IFF_VNET_HDR`, …).
pub fn attached(fd: BorrowedFd) -> io::Result<(String, i32)> {
    let mut req = ifreq();
    // SAFETY: TUNGETIFF writes one ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut req) })?;
    // SAFETY: the kernel has written ifru_flags; any bits are a c_short.
    let flags = unsafe { req.ifr_ifru.ifru_flags };
    Ok((name_of(&req), i32::from(flags as u16)))
}

fn name_of(req: &libc::ifreq) -> String {
    req.ifr_name.iter().take_while(|c| **c != 0).map(|c| char::from(*c as u8)).collect()
}

/// `TUNGETFEATURES`: the flags that the kernel's `TUNSETIFF` knows.
pub fn features(fd: BorrowedFd) -> io::Result<i32> {
    let mut flags: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one unsigned int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETFEATURES, &mut flags) })?;
    Ok(flags as i32)
}

/// `TUNSETOFFLOAD`: what the reader of frames can do without (`TUN_F_*`).
pub fn set_offload(fd: BorrowedFd, bits: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

/// `TUNSETVNETHDRSZ`: bytes of the header before each frame, 10 or 12.
pub fn set_vnet_hdr_len(fd: BorrowedFd, len: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
}

/// `TUNSETSNDBUF`: bytes that may be under way to the host before a write blocks.
pub fn set_sndbuf(fd: BorrowedFd, bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETSNDBUF reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETSNDBUF, &bytes) })
}

/// Sets `O_NONBLOCK` on a descriptor that came from outside.
pub fn set_nonblocking(fd: BorrowedFd) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor, with an int argument.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))
    }
}

/// One readv(2): a frame, cut off silently by the kernel when `to` is too small. `WouldBlock`:
/// there is none.
pub fn read_frame(fd: BorrowedFd, to: &mut IovMut) -> io::Result<usize> {
    let pieces = &to.iovecs()[..to.iovecs().len().min(IOV_MAX)];
    // SAFETY: an IovMut's pieces are writable while it is borrowed.
    let n = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// One writev(2) of a whole frame. More than [`IOV_MAX`] pieces are gathered first.
pub fn write_frame(fd: BorrowedFd, from: &Iov) -> io::Result<usize> {
    let pieces = from.iovecs();
    if pieces.len() > IOV_MAX {
        let copy = from.to_vec();
        return write_frame(fd, &Iov::from_slice(&copy));
    }
    // SAFETY: an Iov's pieces are readable while it is borrowed.
    let n = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}
