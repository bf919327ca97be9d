//! Backends for tests.

use super::chardev::{Backend, Chardev};
use super::file::FileBackend;
use crate::sys::fdio::Output;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A backend on one end of a socket pair: what the test writes to the other end is input, what it
/// reads from there is output.
struct Pair {
    stream: UnixStream,
    ended: bool,
}

impl Backend for Pair {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        (!self.ended).then(|| self.stream.as_fd())
    }

    fn read(&mut self, to: &mut Vec<u8>) -> io::Result<bool> {
        let mut buf = [0; 1024];
        let n = self.stream.read(&mut buf)?;
        self.ended = n == 0;
        to.extend(&buf[..n]);
        Ok(n > 0)
    }

    fn output(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.write(data)
    }
}

/// A chardev and the host's end of it.
pub fn pair() -> (Arc<Chardev>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    (Chardev::new("test", Box::new(Pair { stream: ours, ended: false })).unwrap(), theirs)
}

/// A chardev that writes to `file`, at once where that cannot block.
pub fn output(file: File) -> Arc<Chardev> {
    Chardev::new("test", Box::new(FileBackend(Output::new(file).unwrap()))).unwrap()
}

/// A pipe: where to read, where to write.
pub fn pipe() -> (File, File) {
    let (r, w) = io::pipe().unwrap();
    (File::from(OwnedFd::from(r)), File::from(OwnedFd::from(w)))
}

/// True when `fd` is in non-blocking mode.
pub fn is_nonblocking(fd: &File) -> bool {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let info = std::fs::read_to_string(path).unwrap();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim().to_string();
    i32::from_str_radix(&flags, 8).unwrap() & libc::O_NONBLOCK != 0
}
