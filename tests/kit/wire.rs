//! A network backend for tests.

use minivmm::net::netdev::{Netdev, Offload};
use minivmm::sys::iov::{Iov, IovMut};
use minivmm::sys::tun;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A backend whose other end is in the test: a pair of sockets.
pub struct Wire {
    /// The card's end.
    pub socket: UnixDatagram,
    can: Offload,
    /// What `set_offload` was told.
    pub set: Mutex<Vec<Offload>>,
    /// How often `send` was called.
    pub sends: AtomicUsize,
}

impl Wire {
    /// The backend, and the other end.
    pub fn new(can: Offload) -> (Arc<Wire>, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        theirs.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        (Arc::new(Wire { socket: ours, can, set: Mutex::default(), sends: AtomicUsize::new(0) }), theirs)
    }
}

impl Netdev for Wire {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    fn offloads(&self) -> Offload {
        self.can
    }
    fn set_offload(&self, what: Offload) -> io::Result<()> {
        self.set.lock().unwrap().push(what);
        Ok(())
    }
    fn recv(&self, to: &mut IovMut) -> io::Result<usize> {
        tun::read_frame(self.socket.as_fd(), to)
    }
    fn send(&self, from: &Iov) -> io::Result<()> {
        self.sends.fetch_add(1, Ordering::SeqCst);
        tun::write_frame(self.socket.as_fd(), from).map(|_| ())
    }
    fn info(&self) -> String {
        "type=wire".into()
    }
}
