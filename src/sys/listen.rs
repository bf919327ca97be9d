//! Listening sockets, and the files that those of Unix have.
//!
//! Owns: such a file: it is removed with its owner, and only if it is still the same one. Never:
//! accepts. Threads: any. Locks: none.

use super::unix;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The file of a socket that we listen on: removed when this is dropped, unless it has been
/// replaced.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<SocketFile> {
        let meta = fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_path_buf(), id: (meta.dev(), meta.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            // It may have gone meanwhile; there is nobody to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a Unix socket at `path`, without blocking. The path must not exist; the file of a
/// socket on which nobody listens any more is replaced.
pub fn on_path(path: &Path) -> io::Result<(OwnedFd, SocketFile)> {
    remove_stale(path)?;
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let file = SocketFile::new(path)?;
    Ok((listener.into(), file))
}

/// Listens on a socket that has an address.
pub fn on_fd(fd: BorrowedFd) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::listen(fd.as_raw_fd(), 128) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes the file of a Unix socket on which nobody listens. What is no socket, or is in use, is
/// left and is an error.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists and is not a socket"));
        }
        Ok(_) => {}
    }
    match unix::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // WouldBlock: so many clients wait there that it takes no more.
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "someone listens on it already")),
    }
}
