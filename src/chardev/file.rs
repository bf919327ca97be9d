//! Output to a file.
//!
//! Owns: the file. Never: reads it. Threads: the chardev's. Locks: none.

use super::chardev::{Backend, Chardev};
use crate::sys::fdio::Output;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// Output only, wherever it goes.
pub(super) struct FileBackend(pub(super) Output);

impl Backend for FileBackend {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read(&mut self, _: &mut Vec<u8>) -> io::Result<bool> {
        Ok(false)
    }

    fn output(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn immediate(&self) -> Option<Output> {
        self.0.immediate()
    }
}

/// A chardev that writes to the file at `path`, which is created if need be, and emptied unless
/// `append`. The thread starts with the first byte, and not at all for a FIFO that is read.
pub fn open(label: &str, path: &Path, append: bool) -> io::Result<Arc<Chardev>> {
    // Non-blocking for the sake of a FIFO, whose open would wait for a reader.
    let mut options = OpenOptions::new();
    options.create(true).mode(0o666).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    if append {
        options.append(true)
    } else {
        options.write(true).truncate(true)
    };
    Chardev::new(label, Box::new(FileBackend(Output::new(options.open(path)?)?)))
}
