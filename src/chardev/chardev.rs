//! The two ends of a character device.
//!
//! Owns: the bounded buffers between a frontend (a serial port on a vCPU thread) and a backend (a
//! terminal, pipe or file), and the thread that moves bytes between the buffers and the backend.
//! Never: knows which frontend it serves, or what the bytes mean.
//!
//! ```text
//!   vCPU thread                                            chardev thread
//!   serial ── write() ──► output queue, 64 KiB ──────────► Backend::write ──► file descriptor
//!          ◄─ take()  ─── input queue,   4 KiB ◄────────── Backend::read  ◄── file descriptor
//!          ◄─ Frontend::input_ready, output_room ◄──────── (with no lock of this file held)
//! ```
//!
//! A vCPU never waits for a backend. Where a write cannot wait (pipes, terminals, sockets) it is done
//! at once, and a VM that only prints needs no thread; else [`Chardev::write`] takes what fits and says how much that
//! was; the frontend keeps the rest and stops telling its guest that it is ready, until
//! [`Frontend::output_room`]. Nothing is lost in either direction: input that no one takes stays in
//! the pipe it comes from (a terminal's is read all the same, so that its escape keys always work).
//!
//! Threads: any writes and takes; one thread per backend, started when there is something to do:
//! at [`Chardev::attach`] if the backend has input, else when output must wait. While nothing
//! happens it sleeps in poll(2). Locks: the queues' mutex, a leaf.

use crate::sys::fdio::Output;
use crate::sys::poll::PollSet;
use crate::sys::thread::{self, SMALL_STACK};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of output that wait for the backend at most (as much again is being written).
const OUTPUT: usize = 64 << 10;
/// Bytes of input that wait for the frontend at most.
const INPUT: usize = 4 << 10;
/// How long [`Chardev::close`] waits for a backend that takes no output at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device that reads from and writes to a chardev. Called on the chardev's thread.
pub trait Frontend: Send + Sync {
    /// There is input to [`Chardev::take`] where there was none.
    fn input_ready(&self);
    /// [`Chardev::write`] took less than all of its bytes; now it takes more.
    fn output_room(&self);
}

/// The host's side: one file, pipe, terminal. All calls come from one thread; no call blocks.
pub trait Backend: Send {
    /// What to poll for input; `None` when it has none, or no more.
    fn input(&self) -> Option<BorrowedFd<'_>>;
    /// Reads once and adds what is for the frontend to `to`. False at the end of the input; then
    /// [`Backend::input`] is `None`.
    fn read(&mut self, to: &mut Vec<u8>) -> io::Result<bool>;
    /// Is input beyond what the frontend takes to be read and dropped (a terminal, so that its
    /// escape keys work)? Otherwise it stays where it is.
    fn drops_input(&self) -> bool {
        false
    }
    /// What to poll when [`Backend::write`] would block.
    fn output(&self) -> BorrowedFd<'_>;
    /// Writes some of `data` (at least one byte), or fails with `WouldBlock`.
    fn write(&mut self, data: &[u8]) -> io::Result<usize>;
    /// Where a frontend's thread may write itself while nothing is queued.
    fn immediate(&self) -> Option<Output> {
        None
    }
}

/// A frontend's end.
pub struct Chardev {
    label: String,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    queues: Mutex<Queues>,
    changed: Condvar,
    wake: EventFd,
}

#[derive(Default)]
struct Queues {
    /// Until the thread is started; `None` also for a chardev without any backend.
    backend: Option<Box<dyn Backend>>,
    immediate: Option<Output>,
    /// The thread runs and takes output.
    running: bool,
    /// No backend any more: output vanishes.
    closed: bool,
    /// It has been said that output is lost.
    told: bool,
    /// Quit once all output is written.
    closing: bool,
    /// The thread is in poll(2), or on the way to it, and must be woken for output.
    asleep: bool,
    output: Vec<u8>,
    /// A frontend waits for room.
    refused: bool,
    input: Vec<u8>,
    /// The thread does not read because the input queue was full.
    full: bool,
    frontend: Option<Weak<dyn Frontend>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only when it has been written 2^64 - 2 times; then it is readable anyway.
        let _ = self.wake.write(1);
    }
}

impl Chardev {
    /// A chardev on `backend`. Fails only without file descriptors. `label` names it in messages.
    pub fn new(label: &str, backend: Box<dyn Backend>) -> io::Result<Arc<Chardev>> {
        Chardev::with(label, Some(backend))
    }

    /// A chardev that has no input and drops its output.
    pub fn null(label: &str) -> io::Result<Arc<Chardev>> {
        Chardev::with(label, None)
    }

    fn with(label: &str, backend: Option<Box<dyn Backend>>) -> io::Result<Arc<Chardev>> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let immediate = backend.as_ref().and_then(|b| b.immediate());
        let queues = Queues { closed: backend.is_none(), backend, immediate, ..Queues::default() };
        let shared = Arc::new(Shared { queues: Mutex::new(queues), changed: Condvar::new(), wake });
        Ok(Arc::new(Chardev { label: label.to_string(), shared, thread: Mutex::new(None) }))
    }

    /// The name it was given.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Makes `frontend` the one to be told of input and of room. It holds no reference to it.
    pub fn attach(&self, frontend: Weak<dyn Frontend>) {
        let mut queues = self.shared.lock();
        let ready = if queues.input.is_empty() { None } else { frontend.upgrade() };
        queues.frontend = Some(frontend);
        if queues.backend.as_ref().is_some_and(|b| b.input().is_some()) {
            self.start(&mut queues);
        }
        drop(queues);
        if let Some(frontend) = ready {
            frontend.input_ready();
        }
    }

    /// Takes as much of `data` as there is room for, and says how much. Never waits. When that is
    /// not all, [`Frontend::output_room`] will be called.
    pub fn write(&self, data: &[u8]) -> usize {
        let mut queues = self.shared.lock();
        if queues.closed {
            return data.len();
        }
        let done = self.write_now(&mut queues, data);
        if done == data.len() {
            return done;
        }
        if !queues.running {
            self.start(&mut queues);
        }
        let n = (data.len() - done).min(OUTPUT - queues.output.len());
        queues.output.extend_from_slice(&data[done..done + n]);
        queues.refused |= done + n < data.len();
        let asleep = std::mem::take(&mut queues.asleep);
        drop(queues);
        if asleep {
            self.shared.wake();
        }
        done + n
    }

    /// Writes past the queue what can be written at once, if nothing is queued before it.
    fn write_now(&self, queues: &mut Queues, data: &[u8]) -> usize {
        let idle = queues.output.is_empty() && (queues.asleep || !queues.running);
        match &mut queues.immediate {
            Some(output) if idle => match output.write(data) {
                Ok(n) => n,
                Err(e) => lost(&self.label, &e, &mut queues.told).map_or(0, |()| data.len()),
            },
            _ => 0,
        }
    }

    /// Takes input into `to`; returns how many bytes. Never waits. After 0,
    /// [`Frontend::input_ready`] will be called when there is more.
    pub fn take(&self, to: &mut [u8]) -> usize {
        let mut queues = self.shared.lock();
        let n = to.len().min(queues.input.len());
        to[..n].copy_from_slice(&queues.input[..n]);
        queues.input.drain(..n);
        let resume = n > 0 && std::mem::take(&mut queues.full);
        drop(queues);
        if resume {
            self.shared.wake();
        }
        n
    }

    /// Writes what is queued and lets the backend go (a terminal is itself again). Later output
    /// vanishes. Gives up when the backend takes nothing at all for five seconds.
    pub fn close(&self) {
        let mut queues = self.shared.lock();
        queues.closing = true;
        queues.immediate = None;
        if !queues.running {
            queues.closed = true;
        }
        let idle = queues.backend.take();
        drop(queues);
        drop(idle);
        self.shared.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The last reference may go on the thread itself, with the frontend that it was calling.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id())
            && thread.join().is_err()
        {
            log::error!("chardev '{}': its thread failed", self.label);
        }
    }

    /// Waits until all output so far is written, or `limit` is over; true when it is written.
    pub fn drain(&self, limit: Duration) -> bool {
        let queues = self.shared.lock();
        let busy = |q: &mut Queues| q.running && !(q.asleep && q.output.is_empty());
        let waited = self.shared.changed.wait_timeout_while(queues, limit, busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn start(&self, queues: &mut Queues) {
        let Some(backend) = queues.backend.take() else { return };
        let (shared, label) = (self.shared.clone(), self.label.clone());
        let pump = Pump {
            shared,
            label,
            backend,
            writing: Vec::new(),
            written: 0,
            blocked: false,
            told: false,
            set: PollSet::default(),
        };
        match thread::spawn("chardev", SMALL_STACK, move || pump.run()) {
            Ok(thread) => {
                queues.running = true;
                *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
            }
            Err(e) => {
                log::error!("chardev '{}': cannot start its thread: {e}; its output is lost", self.label);
                queues.closed = true;
            }
        }
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        self.close();
    }
}

/// Is output lost to this error of a write? Says so, once: the guest must not fill the log. Nobody reads any more, or the disk is full: the
/// guest cannot help it.
fn lost(label: &str, e: &io::Error, told: &mut bool) -> Option<()> {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => None,
        io::ErrorKind::BrokenPipe => Some(()),
        _ => {
            if !std::mem::replace(told, true) {
                log::warn!("chardev '{label}': {e}; output is lost");
            }
            Some(())
        }
    }
}

/// The chardev's thread.
struct Pump {
    shared: Arc<Shared>,
    label: String,
    backend: Box<dyn Backend>,
    /// Output in hand; the first `written` bytes are done.
    writing: Vec<u8>,
    written: usize,
    /// The backend would block.
    blocked: bool,
    /// It has been said that output is lost.
    told: bool,
    set: PollSet,
}

impl Drop for Pump {
    /// Also after a panic: who waits for the backend must not wait for ever.
    fn drop(&mut self) {
        let mut queues = self.shared.lock();
        queues.closed = true;
        queues.running = false;
        queues.output = Vec::new();
        queues.immediate = None;
        let waiting = std::mem::take(&mut queues.refused).then(|| queues.frontend.clone()).flatten();
        drop(queues);
        self.shared.changed.notify_all();
        if let Some(frontend) = waiting.and_then(|f| f.upgrade()) {
            frontend.output_room();
        }
    }
}

impl Pump {
    fn run(mut self) {
        // Since when closing has made no progress.
        let mut stuck = None;
        loop {
            self.next_output();
            if self.pending() && !self.blocked {
                if self.write() {
                    stuck = None;
                }
                continue;
            }
            let (closing, full) = {
                let queues = self.shared.lock();
                (queues.closing, queues.full)
            };
            let mut limit = None;
            if closing {
                let give_up = *stuck.get_or_insert_with(Instant::now) + PATIENCE;
                if !self.pending() || Instant::now() >= give_up {
                    return;
                }
                limit = Some(give_up);
            }
            self.wait(!full && !closing, limit);
        }
    }

    fn pending(&self) -> bool {
        self.written < self.writing.len()
    }

    /// Takes the queued output when the last is written, and tells the frontend of the room.
    fn next_output(&mut self) {
        if self.pending() {
            return;
        }
        self.writing.clear();
        self.written = 0;
        let mut queues = self.shared.lock();
        std::mem::swap(&mut self.writing, &mut queues.output);
        queues.asleep = self.writing.is_empty();
        let waiting = std::mem::take(&mut queues.refused).then(|| queues.frontend.clone()).flatten();
        let asleep = queues.asleep;
        drop(queues);
        if asleep {
            // A quiet console keeps no buffers.
            self.writing = Vec::new();
            self.shared.changed.notify_all();
        }
        if let Some(frontend) = waiting.and_then(|f| f.upgrade()) {
            frontend.output_room();
        }
    }

    /// Writes once; true if something was written.
    fn write(&mut self) -> bool {
        match self.backend.write(&self.writing[self.written..]) {
            Ok(n) => {
                self.written += n;
                n > 0
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.blocked = true;
                false
            }
            Err(e) => {
                if lost(&self.label, &e, &mut self.told).is_some() {
                    self.written = self.writing.len();
                }
                false
            }
        }
    }

    /// Sleeps until there is something to do; reads input.
    fn wait(&mut self, read: bool, limit: Option<Instant>) {
        let input = self.backend.input().filter(|_| read || self.backend.drops_input());
        self.set.clear();
        let wake = self.set.add(self.shared.wake.as_raw_fd(), libc::POLLIN);
        let input = input.map(|fd| self.set.add(fd.as_raw_fd(), libc::POLLIN));
        let output = self.blocked.then(|| self.set.add(self.backend.output().as_raw_fd(), libc::POLLOUT));
        if let Some(when) = limit {
            self.set.until(when);
        }
        if let Err(e) = self.set.wait() {
            // Out of kernel memory; try again, but do not spin.
            log::error!("chardev '{}': poll: {e}", self.label);
            std::thread::sleep(Duration::from_millis(100));
            return;
        }
        if self.set.ready(wake) != 0 {
            let _ = self.shared.wake.read();
        }
        if output.is_some_and(|token| self.set.ready(token) != 0) {
            self.blocked = false;
        }
        if input.is_some_and(|token| self.set.ready(token) != 0) {
            self.read();
        }
    }

    fn read(&mut self) {
        let mut got = Vec::new();
        match self.backend.read(&mut got) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => log::warn!("chardev '{}': {e}; no more input", self.label),
        }
        let mut queues = self.shared.lock();
        if self.backend.drops_input() {
            got.truncate(INPUT.saturating_sub(queues.input.len()));
        }
        if got.is_empty() {
            return;
        }
        queues.input.append(&mut got);
        // A read brings at most INPUT bytes, so the queue holds less than twice as much.
        queues.full = queues.input.len() >= INPUT;
        let frontend = queues.frontend.clone();
        drop(queues);
        if let Some(frontend) = frontend.and_then(|f| f.upgrade()) {
            frontend.input_ready();
        }
    }
}

#[cfg(test)]
#[path = "chardev_test.rs"]
mod tests;
