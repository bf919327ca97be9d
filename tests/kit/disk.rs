//! A disk in memory that fails and waits as it is told, for tests.

use super::until;
use minivmm::block::driver::{Driver, Flags};
use minivmm::block::handle::{Handle, HandleSpec};
use minivmm::block::node::{Node, NodeOptions};
use minivmm::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// What was asked of a [`FakeDisk`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// offset, length
    Read(u64, u64),
    /// offset, length
    Write(u64, u64),
    /// offset, length, may unmap
    Zero(u64, u64, bool),
    /// offset, length
    Discard(u64, u64),
    /// flush
    Flush,
}

/// The outside of a [`FakeDisk`].
#[derive(Default)]
pub struct FakeState {
    /// Its contents.
    pub data: Mutex<Vec<u8>>,
    /// All that was asked, in order of arrival.
    pub log: Mutex<Vec<Asked>>,
    /// When not 0, the next so many requests fail with `errno`.
    pub failures: AtomicUsize,
    /// See `failures`.
    pub errno: AtomicUsize,
    /// Requests wait while it is true.
    pub closed: Mutex<bool>,
    opened: Condvar,
    /// Requests inside.
    pub inside: AtomicUsize,
}

impl FakeState {
    /// The next `n` requests fail with `errno`.
    pub fn fail(&self, n: usize, errno: i32) {
        self.errno.store(errno as usize, Ordering::SeqCst);
        self.failures.store(n, Ordering::SeqCst);
    }

    /// Requests wait inside from now on, or no longer.
    pub fn hold(&self, on: bool) {
        *self.closed.lock().unwrap() = on;
        self.opened.notify_all();
    }

    /// Waits until `n` requests are inside.
    pub fn wait_inside(&self, n: usize) {
        until(|| (self.inside.load(Ordering::SeqCst) == n).then_some(()));
    }

    fn ask(&self, what: Asked) -> io::Result<()> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
        drop(closed);
        self.inside.fetch_sub(1, Ordering::SeqCst);
        self.log.lock().unwrap().push(what);
        let take = |n: usize| n.checked_sub(1);
        match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Err(io::Error::from_raw_os_error(self.errno.load(Ordering::SeqCst) as i32)),
            Err(_) => Ok(()),
        }
    }
}

/// A disk in memory that fails and waits as it is told.
pub struct FakeDisk(Arc<FakeState>);

/// A handle on a new fake disk of `len` bytes.
pub fn fake_disk(len: usize, spec: HandleSpec, options: NodeOptions) -> (Arc<Handle>, Arc<FakeState>) {
    let state = Arc::new(FakeState::default());
    *state.data.lock().unwrap() = vec![0; len];
    let node = Node::new("fake0", Box::new(FakeDisk(state.clone())), options);
    (Handle::new(Some(node), spec), state)
}

impl Driver for FakeDisk {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn len(&self) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.0.ask(Asked::Read(off, to.len() as u64))?;
        let data = self.0.data.lock().unwrap();
        to.copy_from(0, &data[off as usize..][..to.len()]);
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        self.0.ask(Asked::Write(off, from.len() as u64))?;
        from.copy_to(0, &mut self.0.data.lock().unwrap()[off as usize..][..from.len()]);
        Ok(())
    }
    fn zero(&self, off: u64, len: u64, f: Flags) -> io::Result<()> {
        self.0.ask(Asked::Zero(off, len, f.contains(Flags::MAY_UNMAP)))?;
        self.0.data.lock().unwrap()[off as usize..][..len as usize].fill(0);
        Ok(())
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.0.ask(Asked::Discard(off, len))
    }
    fn flush(&self) -> io::Result<()> {
        self.0.ask(Asked::Flush)
    }
}
