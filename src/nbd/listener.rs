//! The server's front door: takes connections in, counts them, and shows them out.
//!
//! Owns: the listening socket, its file, its thread, the list of connections, the time limit of
//! handshakes. Never: speaks the protocol. Threads: the control thread starts and stops it; its own
//! accepts; connections leave. Locks: the list's, for moments.

use super::export::{Line, Registry};
use super::{handshake, serve};
use crate::sys::inbox::Inbox;
use crate::sys::listen::SocketFile;
use crate::sys::poll::PollSet;
use crate::sys::stream::Stream;
use crate::sys::{thread, unix};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// After a failed accept (no descriptors, no threads), nobody is let in for so long.
const PATIENCE: Duration = Duration::from_millis(500);

/// Bytes that the buffers of all connections together may have beyond their first
/// [`serve::BUFFER`] each.
const BUDGET: usize = 64 << 20;

/// Where and how to serve.
pub struct Setup {
    /// Listening, without blocking.
    pub socket: OwnedFd,
    /// The file of a Unix socket that we made.
    pub file: Option<SocketFile>,
    /// Connections at a time; the next wait in the kernel's queue. 0: any number.
    pub max_connections: usize,
    /// A client that has not chosen an export by then is shown out.
    pub handshake: Option<Duration>,
}

/// A running server. Dropping it stops it.
pub struct Server {
    house: Arc<House>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

struct Guest {
    line: Arc<Line>,
    /// Its handshake must be over by then.
    deadline: Option<Instant>,
}

/// What the server's threads share.
pub(super) struct House {
    pub registry: Arc<Registry>,
    /// What is left of [`BUDGET`].
    pub budget: AtomicUsize,
    guests: Mutex<Vec<Guest>>,
    left: Condvar,
    wake: Inbox<()>,
    stopping: AtomicBool,
    max: usize,
}

impl House {
    fn guests(&self) -> MutexGuard<'_, Vec<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That client has chosen: it may stay as long as it likes.
    fn settled(&self, line: &Arc<Line>) {
        self.guests().iter_mut().filter(|g| Arc::ptr_eq(&g.line, line)).for_each(|g| g.deadline = None);
    }

    fn is_full(&self) -> bool {
        self.max != 0 && self.guests().len() >= self.max
    }
}

/// A connection's place in the list; dropping it is leaving.
pub(super) struct Place {
    house: Arc<House>,
    line: Arc<Line>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // The peer sees the end even if somebody still holds the line.
        self.line.stream.shut_down();
        self.house.guests().retain(|g| !Arc::ptr_eq(&g.line, &self.line));
        self.house.left.notify_all();
        self.house.wake.post(());
    }
}

impl Server {
    /// Starts to serve what is in `registry`.
    pub fn start(setup: Setup, registry: Arc<Registry>) -> io::Result<Server> {
        let house = Arc::new(House {
            registry,
            budget: AtomicUsize::new(BUDGET),
            guests: Mutex::default(),
            left: Condvar::new(),
            wake: Inbox::new()?,
            stopping: AtomicBool::new(false),
            max: setup.max_connections,
        });
        let (own, socket, limit) = (house.clone(), setup.socket, setup.handshake);
        let thread = thread::spawn("nbd-listen", thread::SMALL_STACK, move || own.listen(&socket, limit))?;
        Ok(Server { house, thread: Some(thread), _file: setup.file })
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.house.guests().len()
    }

    /// What is left for buffers, in bytes.
    #[cfg(test)]
    pub(super) fn budget(&self) -> usize {
        self.house.budget.load(Ordering::Relaxed)
    }

    /// Shows everybody out and waits until they have left. A request that is at a disk is waited
    /// for; a client is not.
    fn stop(&mut self) {
        self.house.stopping.store(true, Ordering::Release);
        self.house.wake.post(());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("NBD: the listening thread panicked");
        }
        let mut guests = self.house.guests();
        guests.iter().for_each(|g| g.line.cut());
        while !guests.is_empty() {
            guests = self.house.left.wait(guests).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl House {
    /// The listening thread.
    fn listen(self: Arc<Self>, socket: &OwnedFd, limit: Option<Duration>) {
        let mut set = PollSet::default();
        let mut not_before: Option<Instant> = None;
        loop {
            set.clear();
            set.add(self.wake.as_raw_fd(), libc::POLLIN);
            let now = Instant::now();
            let resting = not_before.filter(|t| *t > now);
            let open = resting.is_none() && !self.is_full();
            let door = open.then(|| set.add(socket.as_raw_fd(), libc::POLLIN));
            resting.into_iter().for_each(|t| set.until(t));
            self.guests().iter().filter_map(|g| g.deadline).for_each(|t| set.until(t));
            if let Err(e) = set.wait() {
                log::error!("NBD: poll failed: {e}");
                return;
            }
            self.wake.take();
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            let now = Instant::now();
            for guest in self.guests().iter_mut().filter(|g| g.deadline.is_some_and(|t| t <= now)) {
                guest.deadline = None;
                guest.line.cut();
            }
            if door.is_some_and(|d| set.ready(d) != 0)
                && let Err(e) = self.accept(socket, limit)
            {
                log::warn!("NBD: cannot take a client in: {e}");
                not_before = Some(now + PATIENCE);
            }
        }
    }

    fn accept(self: &Arc<Self>, socket: &OwnedFd, limit: Option<Duration>) -> io::Result<()> {
        let fd = match unix::accept(socket.as_fd()) {
            // It is gone again already.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                return Ok(());
            }
            other => other?,
        };
        let line = Arc::new(Line::new(Stream::new(fd)?));
        self.guests().push(Guest { line: line.clone(), deadline: limit.map(|l| Instant::now() + l) });
        let place = Place { house: self.clone(), line: line.clone() };
        // Its stack is that of a disk request, which goes down a chain of images.
        thread::spawn("nbd-client", thread::IO_STACK, move || {
            match handshake::negotiate(&line, &place.house.registry) {
                Ok(Some(session)) => {
                    place.house.settled(&line);
                    serve::run(session, line, place);
                }
                Ok(None) => {}
                Err(e) => log::debug!("NBD: a handshake ended: {e}"),
            }
        })?;
        Ok(())
    }
}

impl Place {
    /// The server's house.
    pub fn house(&self) -> &Arc<House> {
        &self.house
    }
}
