//! A client that has enabled out-of-band execution: it has a thread that reads it, so that `exec-oob`
//! is done at once, whatever the control thread is waiting for. All other requests queue up for the
//! control thread, as many as QEMU lets.
//!
//! Owns: the thread, the queue. Never: runs anything but out-of-band commands, which get along without
//! the VM ([`Yanks`]); decides when the client is over. Threads: control, and its own. Locks: the
//! client's, for moments: neither thread holds it while it waits, or while it runs a command.

use super::client::{Client, HIGH_WATER};
use super::dispatch;
use super::fds::Conn;
use super::schema::Value;
use super::wire::Message;
use crate::block::yank::Yanks;
use crate::sys::inbox::Inbox;
use crate::sys::poll::PollSet;
use crate::sys::thread;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Requests that wait for the control thread; then the client is not read any more.
const QUEUE: usize = 8;

/// See the module's head. Dropping it ends the thread.
pub struct Line {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread: there is something to send, or room in the queue, or it is the end.
    wake: Inbox<()>,
    /// Wakes the control thread.
    ready: Arc<Inbox<()>>,
    yanks: Yanks,
}

struct State {
    client: Client,
    queue: VecDeque<(Message, Vec<OwnedFd>)>,
    /// Descriptors that came with what has not been queued.
    fds: Vec<OwnedFd>,
    end: bool,
}

impl Line {
    /// Reads `client` from now on. `ready` is posted to when there is something for the control thread.
    /// When there is no thread to be had, the client comes back.
    pub fn start(
        client: Client,
        yanks: Yanks,
        ready: Arc<Inbox<()>>,
    ) -> Result<Line, Box<(Client, io::Error)>> {
        let wake = match Inbox::new() {
            Ok(wake) => wake,
            Err(e) => return Err(Box::new((client, e))),
        };
        let state = State { client, queue: VecDeque::new(), fds: Vec::new(), end: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake, ready, yanks });
        let own = shared.clone();
        match thread::spawn("qmp-oob", thread::SMALL_STACK, move || own.run()) {
            Ok(thread) => Ok(Line { shared, thread: Some(thread) }),
            Err(e) => match Arc::into_inner(shared) {
                Some(shared) => {
                    let state = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
                    Err(Box::new((state.client, e)))
                }
                // The closure that held the other one is gone with the failed spawn.
                None => unreachable!("a thread that was not started holds nothing"),
            },
        }
    }

    /// The next request for the control thread, and its descriptors to `conn`.
    pub fn next_message(&self, conn: &mut Conn) -> Option<Message> {
        let mut state = self.shared.lock();
        if state.client.unsent() > HIGH_WATER {
            return None;
        }
        let (message, fds) = state.queue.pop_front()?;
        drop(state);
        // There may be more where that came from.
        self.shared.wake.post(());
        if !fds.is_empty() {
            conn.receive(fds);
        }
        Some(message)
    }

    /// Queues a message for sending.
    pub fn push(&self, message: &Value) {
        self.shared.lock().client.push(message);
    }

    /// Sends what can be sent without waiting; the thread sends the rest.
    pub fn flush(&self) {
        let mut state = self.shared.lock();
        state.client.flush();
        if state.client.unsent() > 0 {
            drop(state);
            self.shared.wake.post(());
        }
    }

    /// True when nothing more can come of it.
    pub fn is_over(&self) -> bool {
        let state = self.shared.lock();
        state.client.is_over() && (state.queue.is_empty() || state.client.is_gone())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.wake.post(());
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            log::error!("QMP: the thread of a client panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let (mut set, mut scratch) = (PollSet::default(), Vec::new());
        loop {
            // First what is there already: the client was read by others before.
            while let Some(request) = self.sort() {
                let reply = dispatch::answer_oob(&self.yanks, request);
                let mut state = self.lock();
                state.client.push(&reply);
                state.client.flush();
            }
            set.clear();
            set.add(self.wake.as_raw_fd(), libc::POLLIN);
            let mut state = self.lock();
            if state.end {
                return;
            }
            if state.client.waits() {
                state.client.prepare(&mut set);
            }
            let busy = !state.queue.is_empty() || state.client.is_over();
            drop(state);
            if busy {
                self.ready.post(());
            }
            if let Err(e) = set.wait() {
                log::error!("QMP: poll failed: {e}");
                return;
            }
            self.wake.take();
            self.lock().client.exchange(&set, &mut scratch);
        }
    }

    /// Queues what came for the control thread, up to a request that is to be run out of band.
    fn sort(&self) -> Option<serde_json::Map<String, Value>> {
        let mut state = self.lock();
        let state = &mut *state;
        while state.queue.len() < QUEUE {
            let mut conn = Conn::new();
            let message = state.client.next_message(&mut conn);
            // Also when they came with a space before the message, which is not there yet.
            if let Some(fds) = conn.take_pending() {
                state.fds = fds;
            }
            match message? {
                Ok(Value::Object(request)) if request.contains_key("exec-oob") => return Some(request),
                message => state.queue.push_back((message, std::mem::take(&mut state.fds))),
            }
        }
        None
    }
}
