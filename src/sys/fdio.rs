//! Writes that do not block, to files that others may share.
//!
//! Owns: nothing. Threads: any. Locks: none.

use super::poll::PollSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Instant;

/// An output file that is written without blocking, although its blocking mode is shared with
/// other processes (the shell that started us) and must stay as it is.
pub struct Output {
    file: File,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Regular files: write(2) does the right thing, and may wait for the disk.
    Regular,
    /// A pipe or terminal that we opened ourselves, non-blocking.
    Own,
    /// A socket: send(2) with MSG_DONTWAIT.
    Socket,
    /// A pipe or terminal that could not be opened again: ask poll(2), then write at most what a
    /// pipe takes at once.
    Shared,
}

impl Output {
    /// Output to `file`, of whatever kind it is.
    pub fn new(file: File) -> io::Result<Output> {
        let kind = file.metadata()?.file_type();
        if kind.is_socket() {
            return Ok(Output { file, kind: Kind::Socket });
        }
        if !kind.is_fifo() && !kind.is_char_device() {
            return Ok(Output { file, kind: Kind::Regular });
        }
        // A new open file description: its O_NONBLOCK is our own.
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        match again {
            Ok(file) => Ok(Output { file, kind: Kind::Own }),
            Err(_) => Ok(Output { file, kind: Kind::Shared }),
        }
    }

    /// Another one to the same file, if its writes never wait, not even for a disk.
    pub fn immediate(&self) -> Option<Output> {
        match self.kind {
            Kind::Own | Kind::Socket => Some(Output { file: self.file.try_clone().ok()?, kind: self.kind }),
            Kind::Regular | Kind::Shared => None,
        }
    }

    /// What to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.file)
    }

    /// Writes some of `data`, or fails with `WouldBlock`.
    pub fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.kind {
            Kind::Regular | Kind::Own => self.file.write(data),
            Kind::Socket => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: `data` is readable for its length.
                let n = unsafe { libc::send(self.file.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            }
            Kind::Shared => {
                let mut set = PollSet::default();
                let token = set.add(self.file.as_raw_fd(), libc::POLLOUT);
                set.until(Instant::now());
                set.wait()?;
                if set.ready(token) == 0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.file.write(&data[..data.len().min(libc::PIPE_BUF)])
            }
        }
    }
}
