//! Stream sockets without blocking, and the file descriptors that travel on Unix sockets.
//!
//! Owns: the system calls. Every descriptor that arrives is owned (and close-on-exec) from the
//! first moment, so none can leak, not even when a message is cut. Never: knows what the bytes
//! mean. Threads: any. Locks: none.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The most descriptors of one message that are taken; the kernel closes the others.
pub const MAX_FDS: usize = 16;

/// Room for a control message with [`MAX_FDS`] descriptors, aligned as `cmsghdr` is.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    room: [u8; 16 + 4 * MAX_FDS],
}

/// What a read gave.
#[derive(Debug, Default)]
pub struct Received {
    /// How many bytes; 0 at the end of the stream.
    pub len: usize,
    /// The descriptors that came with one of these bytes, and with which.
    pub fds: Option<(usize, Vec<OwnedFd>)>,
}

/// Reads what is there, without waiting. `WouldBlock`: nothing is there.
///
/// The kernel puts bytes that came before a message with descriptors into the same read, and does
/// not tell with which byte the descriptors came. A caller that tells requests apart must know:
/// so a look ahead (MSG_PEEK) says whether there are any, and only then the bytes are read one by
/// one up to the one that has them. (A client that waits for its answers sends it first.)
pub fn recv(fd: BorrowedFd, buf: &mut [u8]) -> io::Result<Received> {
    let (len, fds) = peek(fd, buf)?;
    if !fds {
        return Ok(Received { len: plain(fd, &mut buf[..len])?, fds: None });
    }
    let mut at = 0;
    while at < len {
        let (n, fds) = match take(fd, &mut buf[at..at + 1]) {
            Ok(read) => read,
            Err(_) if at > 0 => break,
            Err(e) => return Err(e),
        };
        if n == 0 {
            break;
        }
        at += 1;
        if let Some(fds) = fds {
            // The rest of the message, unless another with descriptors may follow in the same read.
            let rest = match peek(fd, &mut buf[at..]) {
                Ok((rest, false)) if rest > 0 => plain(fd, &mut buf[at..at + rest]).unwrap_or(0),
                _ => 0,
            };
            return Ok(Received { len: at + rest, fds: Some((at - 1, fds)) });
        }
    }
    Ok(Received { len: at, fds: None })
}

/// Reads what is there, without waiting, from a socket that carries no descriptors (TCP).
pub fn plain(fd: BorrowedFd, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buf` is writable for its length.
    let n = unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// How many bytes a read would give, and whether descriptors may have come with one of them (or
/// with one soon after).
fn peek(fd: BorrowedFd, buf: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: msghdr is plain data, for which zeroes mean "none".
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    // SAFETY: msg points to one iovec over `buf`, both of which live during the call.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT | libc::MSG_PEEK) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // Without room for control messages the kernel hands out no descriptor but says that it could.
    Ok((n, msg.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Reads with descriptors; `Some` if there were any, even if none of them could be taken.
fn take(fd: BorrowedFd, buf: &mut [u8]) -> io::Result<(usize, Option<Vec<OwnedFd>>)> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control = Control { room: [0; 16 + 4 * MAX_FDS] };
    // SAFETY: msghdr is plain data, for which zeroes mean "none".
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = (&raw mut control).cast();
    msg.msg_controllen = mem::size_of::<Control>();
    // SAFETY: msg points to one iovec over `buf` and to the control buffer, with their lengths.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control buffer and set its length; CMSG_* walk within it.
    // The descriptors of an SCM_RIGHTS message are new ones that nothing else owns.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&msg);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..bytes / mem::size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&msg, header);
        }
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        log::warn!("of the file descriptors that came with a message, only {} could be taken", fds.len());
    }
    let any = !fds.is_empty() || msg.msg_flags & libc::MSG_CTRUNC != 0;
    Ok((n, any.then_some(fds)))
}

/// Writes what fits, without waiting. `WouldBlock`: nothing does.
pub fn send(fd: BorrowedFd, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `data` is readable for its length.
    let n = unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes `data` (not empty) with descriptors attached to it; waits for room. More than
/// [`MAX_FDS`] are an error.
pub fn send_fds(fd: BorrowedFd, data: &[u8], fds: &[BorrowedFd]) -> io::Result<usize> {
    if fds.len() > MAX_FDS || data.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut control = Control { room: [0; 16 + 4 * MAX_FDS] };
    // SAFETY: msghdr is plain data, for which zeroes mean "none".
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = mem::size_of_val(fds);
        msg.msg_control = (&raw mut control).cast();
        // SAFETY: the control buffer has room for MAX_FDS descriptors; a BorrowedFd is one RawFd.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(bytes as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes as u32) as usize;
            let to = libc::CMSG_DATA(header).cast::<RawFd>();
            for (i, fd) in fds.iter().enumerate() {
                to.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: msg points to one iovec over `data`, which is only read, and to the control buffer.
    let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The next connection on a listening socket, close-on-exec.
pub fn accept(fd: BorrowedFd) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for; the result is a new descriptor that nothing else owns.
    unsafe {
        match libc::accept4(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Connects to the socket at `path` without waiting. `WouldBlock`: its queue is full.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: plain data, for which zeroes are valid; sun_path stays zero-terminated below.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, &byte) in address.sun_path.iter_mut().zip(bytes) {
        *to = byte as libc::c_char;
    }
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the new descriptor is owned by nothing else; the address is a local of the given size.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, flags, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let len = mem::size_of_val(&address) as libc::socklen_t;
        match libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) {
            0 => Ok(fd),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// What a descriptor is, as far as a stream of bytes is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Unix stream socket: it carries descriptors.
    Unix,
    /// Another stream socket.
    Socket,
    /// A socket that waits for connections.
    Listener,
    /// A pipe, terminal or file.
    Other,
}

/// What `fd` is.
pub fn kind(fd: BorrowedFd) -> Kind {
    let option = |name: libc::c_int| -> Option<libc::c_int> {
        let mut value: libc::c_int = 0;
        let mut len = mem::size_of_val(&value) as libc::socklen_t;
        // SAFETY: `value` is a c_int and `len` its size.
        let rc = unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value, &mut len)
        };
        (rc == 0).then_some(value)
    };
    match (option(libc::SO_DOMAIN), option(libc::SO_ACCEPTCONN)) {
        (None, _) => Kind::Other,
        (_, Some(1)) => Kind::Listener,
        (Some(libc::AF_UNIX), _) => Kind::Unix,
        _ => Kind::Socket,
    }
}

/// Sets or clears O_NONBLOCK. The flag belongs to the open file, which others may share.
pub fn set_nonblocking(fd: BorrowedFd, on: bool) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL touch no memory.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        let wanted = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
        if wanted != flags && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "unix_test.rs"]
mod tests;
