//! A connected stream socket that is read and written with waiting, by several threads at once.
//!
//! Owns: the descriptor. A thread that waits in one of the calls is let go by
//! [`Stream::shut_down`]. Never: knows what the bytes mean. Threads: any. Locks: none (who lets
//! several threads read, or write, sees to it that they take turns).

use super::iov::{Iov, IovMut};
use super::poll::PollSet;
use super::unix;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes that a Unix socket holds for its reader, if the system's limit lets it: by default it is less
/// than a long request or reply, and who sends one sleeps and wakes several times for it.
const SEND_BUFFER: i32 = 2 << 20;
/// Pieces that one system call takes (the kernel's limit is 1024).
const PIECES: usize = 1000;

/// See the module's head.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    /// Takes a connected socket: calls on it wait, and small messages of TCP go out at once.
    pub fn new(fd: OwnedFd) -> io::Result<Stream> {
        unix::set_nonblocking(fd.as_fd(), false)?;
        let stream = Stream(fd);
        // Without these it works as well, only slower, and a dead peer is noticed later.
        if unix::kind(stream.0.as_fd()) == unix::Kind::Socket {
            let _ = stream.option(libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32);
            let _ = stream.option(libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1i32);
        } else {
            let _ = stream.option(libc::SOL_SOCKET, libc::SO_SNDBUF, &SEND_BUFFER);
        }
        Ok(stream)
    }

    fn option<T>(&self, level: i32, name: i32, value: &T) -> io::Result<()> {
        let len = mem::size_of::<T>() as libc::socklen_t;
        // SAFETY: `value` is readable for `len` bytes.
        let rc =
            unsafe { libc::setsockopt(self.0.as_raw_fd(), level, name, (value as *const T).cast(), len) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// A call waits no longer than that and then fails with `WouldBlock`; `None`: for ever.
    pub fn set_patience(&self, time: Option<Duration>) -> io::Result<()> {
        // Zero would mean for ever.
        let time = time.map_or(Duration::ZERO, |t| t.max(Duration::from_millis(1)));
        let value = libc::timeval {
            tv_sec: time.as_secs() as libc::time_t,
            tv_usec: time.subsec_micros() as libc::suseconds_t,
        };
        self.option(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &value)?;
        self.option(libc::SOL_SOCKET, libc::SO_SNDTIMEO, &value)
    }

    /// Reads what is there, at least one byte; 0 at the end. `wait`: until something is there,
    /// else `WouldBlock`.
    pub fn recv(&self, to: &mut [u8], wait: bool) -> io::Result<usize> {
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        loop {
            // SAFETY: `to` is writable for its length.
            let n = unsafe { libc::recv(self.0.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), flags) };
            match usize::try_from(n) {
                Ok(n) => return Ok(n),
                Err(_) => retry(io::Error::last_os_error())?,
            }
        }
    }

    /// Fills `to`. `UnexpectedEof` when the stream ends before.
    pub fn recv_all(&self, to: &mut IovMut) -> io::Result<()> {
        let (mut at, len) = (0, to.len());
        while at < len {
            let rest = to.slice(at, len - at);
            // SAFETY: msghdr is plain data, for which zeroes mean "none".
            let mut msg: libc::msghdr = unsafe { mem::zeroed() };
            msg.msg_iov = rest.iovecs().as_ptr().cast_mut();
            msg.msg_iovlen = rest.iovecs().len().min(PIECES);
            // SAFETY: every piece of an IovMut is writable; the list lives during the call.
            let n = unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut msg, libc::MSG_WAITALL) };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(_) => retry(io::Error::last_os_error())?,
            }
        }
        Ok(())
    }

    /// Fills `to` before `deadline`, however slowly the bytes come; `TimedOut` after it.
    pub fn recv_by(&self, to: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut at = 0;
        let mut set = PollSet::default();
        while at < to.len() {
            match self.recv(&mut to[at..], false) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                Err(_) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
                Err(_) => {
                    set.clear();
                    set.add(self.0.as_raw_fd(), libc::POLLIN);
                    set.until(deadline);
                    set.wait()?;
                }
            }
        }
        Ok(())
    }

    /// Writes all of `data`.
    pub fn send_all(&self, data: &Iov) -> io::Result<()> {
        let mut at = self.send_some(data)?;
        while at < data.len() {
            at += self.send_some(&data.slice(at, data.len() - at))?;
        }
        Ok(())
    }

    fn send_some(&self, data: &Iov) -> io::Result<usize> {
        // SAFETY: msghdr is plain data, for which zeroes mean "none".
        let mut msg: libc::msghdr = unsafe { mem::zeroed() };
        msg.msg_iov = data.iovecs().as_ptr().cast_mut();
        msg.msg_iovlen = data.iovecs().len().min(PIECES);
        loop {
            // SAFETY: every piece of an Iov is readable; the kernel only reads list and pieces.
            let n = unsafe { libc::sendmsg(self.0.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
            match usize::try_from(n) {
                Ok(n) => return Ok(n),
                Err(_) => retry(io::Error::last_os_error())?,
            }
        }
    }

    /// Ends both directions: whoever waits is let go, the peer sees the end.
    pub fn shut_down(&self) {
        // SAFETY: shutdown touches no memory. It fails only when the connection is gone already.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn retry(e: io::Error) -> io::Result<()> {
    if e.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(e) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn scattered_bytes_arrive_in_order_although_the_buffers_are_small() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Stream::new(a.into()).unwrap(), Stream::new(b.into()).unwrap());
        let bytes: Vec<u8> = (0..1_500_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        let sent = bytes.clone();
        let sender = std::thread::spawn(move || {
            // More pieces than one call takes, of uneven lengths.
            let mut iov = Iov::new();
            sent.chunks(613).for_each(|c| iov.push(c));
            a.send_all(&iov).unwrap();
        });
        let mut got = vec![0; bytes.len()];
        let (left, right) = got.split_at_mut(700_001);
        b.recv_all(&mut IovMut::from_slice(left)).unwrap();
        b.recv_all(&mut IovMut::from_slice(right)).unwrap();
        sender.join().unwrap();
        assert!(got == bytes);
        let e = b.recv_all(&mut IovMut::from_slice(&mut [0; 4])).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn whoever_waits_is_let_go_and_patience_ends() {
        let (a, b) = UnixStream::pair().unwrap();
        let b = std::sync::Arc::new(Stream::new(b.into()).unwrap());
        b.set_patience(Some(Duration::from_millis(20))).unwrap();
        assert_eq!(b.recv(&mut [0; 4], true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        b.set_patience(None).unwrap();
        a.set_nonblocking(false).unwrap();
        let (start, limit) = (Instant::now(), Duration::from_millis(60));
        let e = b.recv_by(&mut [0; 4], start + limit).unwrap_err();
        assert_eq!((e.kind(), start.elapsed() >= limit), (io::ErrorKind::TimedOut, true));
        let waiter = b.clone();
        let t = std::thread::spawn(move || waiter.recv(&mut [0; 4], true).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        b.shut_down();
        assert_eq!(t.join().unwrap(), 0);
        drop(a);
    }
}
