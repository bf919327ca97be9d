//! THE poll loop: it runs the workers of all devices.
//!
//! Owns: the threads, who runs on which, pausing and stopping. Never: knows any one device, or the
//! guest's view of one. Threads: a loop's own; whoever starts, pauses and stops a [`Crew`] (a vCPU
//! after the bus lock is gone, or control) waits here for the workers. Locks: a loop's command
//! list, a leaf; the slow thread's slot, held while that thread starts or ends.
//!
//! ```text
//!        kick (vCPU)          Command::Add / Remove / Sync (control, vCPU)
//!            │                     │
//!  asleep ───┴─► awake: commands ──┴─► queues that were kicked ─► look again ─► asleep in poll(2)
//!                   ▲                                                 │           │ sources ready
//!                   └──────────────── more has come ◄─────────────────┘◄──────────┘
//! ```
//!
//! *Paused*: [`Halt`] makes queues give nothing and the loop ask no sources; a `Sync` that comes back
//! says that the request in hand is finished. *Stopped*: `Remove` drops the worker and comes back. A
//! worker that panics is dropped, its device NEEDS_RESET; the thread goes on for the others.

use super::device::{Task, Thread, Transport, Worker};
use super::kick::{Kick, Waker};
use super::queue::{Halt, Queue};
use crate::sys::poll::{PollSet, Token};
use crate::sys::thread::{self, IO_STACK, panic_text, spawn};
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The name of the thread that slow devices share.
const SLOW: &str = "virtio-slow";

/// A worker on its thread.
struct Member {
    /// Unique in its loop: the address of its crew's list of queues, and its place in the crew.
    id: (usize, usize),
    worker: Box<dyn Worker>,
    waker: Waker,
    /// Those that it hears of.
    queues: Vec<Arc<Queue>>,
    /// All of its device.
    all: Arc<[Arc<Queue>]>,
    halt: Arc<Halt>,
    transport: Arc<dyn Transport>,
    poll: Duration,
}

/// The sender is dropped when the command has been carried out: that is the answer.
enum Command {
    Add(Box<Member>),
    /// Drop the worker.
    Remove((usize, usize), SyncSender<()>),
    /// No worker is in a call.
    Sync(SyncSender<()>),
    /// The thread's number.
    Tell(SyncSender<u32>),
    Quit,
}

/// A thread that runs workers, as others see it.
struct Loop {
    kick: Arc<Kick>,
    commands: Mutex<Vec<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    pace: Pace,
}

impl Loop {
    fn start(name: &str, pace: Pace) -> io::Result<Arc<Loop>> {
        let this = Arc::new(Loop {
            kick: Arc::new(Kick::new()?),
            commands: Mutex::new(Vec::new()),
            thread: Mutex::new(None),
            pace,
        });
        let theirs = this.clone();
        // A name is a C string.
        let thread = spawn(&name.replace('\0', "?"), IO_STACK, move || theirs.run())?;
        *this.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(this)
    }

    fn post(&self, command: Command) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        self.kick.wake();
    }

    fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn has_commands(&self) -> bool {
        !self.commands.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Ends the thread; returns when it has ended.
    fn quit(&self) {
        self.post(Command::Quit);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It ends in no other way than by Quit: a worker's panic was caught.
        thread.map(JoinHandle::join);
    }

    fn run(&self) {
        let mut members: Vec<Member> = Vec::new();
        let (mut poll, mut sources) = (PollSet::default(), Vec::new());
        let mut patience = Patience { window: Duration::ZERO, pace: self.pace };
        loop {
            for command in self.take_commands() {
                match command {
                    Command::Add(member) => members.push(*member),
                    Command::Remove(id, _done) => {
                        if let Some(at) = members.iter().position(|m| m.id == id) {
                            members.remove(at).end();
                        }
                    }
                    Command::Sync(_done) => {}
                    // Who asks has room for the answer, and waits for it.
                    Command::Tell(to) => drop(to.send(thread::id())),
                    Command::Quit => return,
                }
            }
            call(&mut members, Member::run_queues);
            poll.clear();
            let kicked = poll.add(self.kick.as_raw_fd(), libc::POLLIN);
            Self::ask_sources(&mut members, &mut poll, &mut sources);
            if sources.is_empty()
                && patience.watch(|| self.has_commands() || members.iter().any(Member::has_work))
            {
                continue;
            }
            self.kick.prepare();
            let busy = members.iter().filter(|m| m.must_stay_awake()).count() > 0;
            let awake = busy || self.has_commands();
            let max = members.iter().map(|m| m.poll).max().unwrap_or_default();
            if sources.is_empty() {
                match awake {
                    true => self.kick.rise(false),
                    false => patience.sleep(max, || self.kick.sleep()),
                }
                continue;
            }
            if awake {
                // Not to sleep, but sources have their turn also when the rings never run dry.
                poll.until(Instant::now());
            }
            let polled = patience.sleep(max, || poll.wait());
            self.kick.rise(polled.is_ok() && poll.ready(kicked) != 0);
            if let Err(e) = polled {
                // ENOMEM or a descriptor limit: no device can go on without hearing its kicks.
                log::error!("virtio: poll: {e}");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            call(&mut members, |member| member.run_sources(&poll, &sources));
        }
    }

    fn ask_sources(members: &mut Vec<Member>, poll: &mut PollSet, out: &mut Vec<Ready>) {
        out.clear();
        call(members, |member| {
            if !member.halt.is_set() {
                for (index, source) in member.worker.sources().into_iter().enumerate() {
                    out.push((member.id, index, poll.add(source.fd, source.events)));
                }
            }
        });
    }
}

/// How long a loop looks at its queues before it sleeps. A sleep and its end by an eventfd cost
/// more than some microseconds of looking; but an idle VM must cost nothing: one long sleep, and
/// the next ones come at once, until there was a short one.
struct Patience {
    window: Duration,
    pace: Pace,
}

/// How the time that a thread looks at its queues grows and shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Factor after a short sleep; 0 is 2.
    pub grow: u32,
    /// Divisor after a long sleep; 0: no looking until there was a short one.
    pub shrink: u32,
}

impl Patience {
    /// The first window.
    const FIRST: Duration = Duration::from_micros(4);

    /// Looks for work until the window is over; true when there is some.
    fn watch(&self, found: impl Fn() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let end = Instant::now() + self.window;
        loop {
            if found() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Sleeps, and learns from how long it was. `max`: zero for no looking at all.
    fn sleep<T>(&mut self, max: Duration, sleep: impl FnOnce() -> T) -> T {
        if max.is_zero() {
            self.window = max;
            return sleep();
        }
        let begin = Instant::now();
        let result = sleep();
        let missed = begin.elapsed() <= max;
        self.window = match (missed, self.pace.shrink) {
            (true, _) => {
                let factor = if self.pace.grow == 0 { 2 } else { self.pace.grow };
                self.window.saturating_mul(factor).clamp(Self::FIRST.min(max), max)
            }
            (false, 0) => Duration::ZERO,
            (false, divisor) => self.window / divisor,
        };
        result
    }
}

/// Whose source, which of its list, where in the poll set.
type Ready = ((usize, usize), usize, Token);

/// Calls into every worker; one that panics is dropped and its device broken.
fn call(members: &mut Vec<Member>, mut f: impl FnMut(&mut Member)) {
    let mut at = 0;
    while at < members.len() {
        // A worker that panicked is dropped and never called again, so what it left half done
        // inside itself is not seen.
        match catch_unwind(AssertUnwindSafe(|| f(&mut members[at]))) {
            Ok(()) => at += 1,
            Err(panic) => {
                let member = members.remove(at);
                member.halt.break_down();
                member.transport.needs_reset(&format!("a worker panicked: {}", panic_text(&*panic)));
                member.end();
            }
        }
    }
}

impl Member {
    fn run_queues(&mut self) {
        if self.halt.is_set() {
            return;
        }
        let marks = self.waker.take();
        for queue in self.queues.iter().filter(|q| marks & Waker::bit(q.index()) != 0) {
            queue.suppress_kicks();
            self.worker.on_queue(queue.index(), queue);
        }
    }

    fn run_sources(&mut self, poll: &PollSet, sources: &[Ready]) {
        for &(id, index, token) in sources.iter().filter(|(id, ..)| *id == self.id) {
            let revents = poll.ready(token);
            if revents != 0 && !self.halt.is_set() {
                debug_assert_eq!(id, self.id);
                self.worker.on_source(index, revents, &self.all);
            }
        }
    }

    /// A kick has come, or a request has without one.
    fn has_work(&self) -> bool {
        let comes = |q: &&Arc<Queue>| q.is_waiting();
        match self.queues.iter().find(comes) {
            Some(queue) => self.waker.mark(queue.index()),
            None => return !self.halt.is_set() && self.waker.is_marked(),
        }
        true
    }

    /// Has the driver kick; true when there is something to do already.
    fn must_stay_awake(&self) -> bool {
        for queue in &self.queues {
            if queue.prepare_sleep() {
                self.waker.mark(queue.index());
            }
        }
        !self.halt.is_set() && self.waker.is_marked()
    }

    /// Drops the worker; its destructor may be as wrong as the rest of it.
    fn end(self) {
        let Member { worker, transport, .. } = self;
        if catch_unwind(AssertUnwindSafe(|| drop(worker))).is_err() {
            transport.needs_reset("a worker panicked while it was dropped");
        }
    }
}

/// The thread that slow devices share: it exists while one of them is started.
#[derive(Default)]
pub struct SlowThread(Mutex<Option<(Arc<Loop>, usize)>>);

impl SlowThread {
    fn acquire(&self) -> io::Result<Arc<Loop>> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (running, users) = match slot.take() {
            Some(slot) => slot,
            None => (Loop::start(SLOW, Pace::default())?, 0),
        };
        *slot = Some((running.clone(), users + 1));
        Ok(running)
    }

    fn release(&self) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.take() {
            Some((last, 1)) => last.quit(),
            Some((running, users)) => *slot = Some((running, users - 1)),
            None => {}
        }
    }
}

/// A thread that the user has made (`object-add`, `iothread`), for the workers of the devices that
/// name it: from its making until nobody has it any more.
pub struct IoThread {
    on: Arc<Loop>,
    id: u32,
    poll_max: Duration,
}

impl IoThread {
    /// Starts the thread. Its workers look for new requests for `poll_max` at most before it sleeps.
    pub fn start(name: &str, poll_max: Duration, pace: Pace) -> io::Result<IoThread> {
        let on = Loop::start(name, pace)?;
        // Its first command: it says who it is.
        let (tell, told) = sync_channel(1);
        on.post(Command::Tell(tell));
        let id = told.recv().unwrap_or_default();
        Ok(IoThread { on, id, poll_max })
    }

    /// Its number in the host.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How long it may look for new requests.
    pub fn poll_max(&self) -> Duration {
        self.poll_max
    }

    /// How that time grows and shrinks.
    pub fn pace(&self) -> Pace {
        self.on.pace
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.on.quit();
    }
}

impl std::fmt::Debug for IoThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoThread({})", self.id)
    }
}

/// The same thread.
impl PartialEq for IoThread {
    fn eq(&self, other: &IoThread) -> bool {
        self.id == other.id
    }
}

impl Eq for IoThread {}

/// A loop that a crew's worker runs on; given back when dropped.
struct Place {
    on: Arc<Loop>,
    owner: Owner,
}

/// Who ends a loop's thread.
enum Owner {
    Crew,
    Slow(Arc<SlowThread>),
    /// Kept alive by whoever runs on it.
    Io(#[expect(dead_code, reason = "only held")] Arc<IoThread>),
}

impl Place {
    fn find(thread: &Thread, slow: &Arc<SlowThread>) -> io::Result<Place> {
        Ok(match thread {
            Thread::Own(name) => Place { on: Loop::start(name, Pace::default())?, owner: Owner::Crew },
            Thread::Slow => Place { on: slow.acquire()?, owner: Owner::Slow(slow.clone()) },
            Thread::Io(io) => Place { on: io.on.clone(), owner: Owner::Io(io.clone()) },
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        match &self.owner {
            Owner::Crew => self.on.quit(),
            Owner::Slow(slow) => slow.release(),
            Owner::Io(_) => {}
        }
    }
}

/// The workers of one device, from DRIVER_OK to reset. Dropped, it stops them and returns when
/// they have let go of the guest.
pub struct Crew {
    places: Vec<Place>,
    queues: Arc<[Arc<Queue>]>,
    halt: Arc<Halt>,
}

impl Crew {
    /// Starts the threads. Each worker first looks at all of its queues. Errors: no descriptor or
    /// thread left; then nothing has been started.
    pub fn start(
        tasks: Vec<Task>,
        queues: Arc<[Arc<Queue>]>,
        halt: Arc<Halt>,
        transport: &Arc<dyn Transport>,
        slow: &Arc<SlowThread>,
    ) -> io::Result<Crew> {
        let places = tasks.iter().map(|t| Place::find(&t.thread, slow)).collect::<io::Result<Vec<_>>>()?;
        let wakers: Vec<Waker> = places.iter().map(|p| Waker::new(p.on.kick.clone())).collect();
        for queue in queues.iter() {
            let heard = tasks.iter().zip(&wakers).filter(|(t, _)| t.queues.contains(&queue.index()));
            queue.set_workers(heard.map(|(_, waker)| waker.clone()).collect());
        }
        let crew = Crew { places, queues, halt };
        for (n, (task, waker)) in tasks.into_iter().zip(wakers).enumerate() {
            waker.kick_all(!0);
            crew.places[n].on.post(Command::Add(Box::new(Member {
                id: crew.id(n),
                worker: task.worker,
                waker,
                queues: crew.queues.iter().filter(|q| task.queues.contains(&q.index())).cloned().collect(),
                all: crew.queues.clone(),
                halt: crew.halt.clone(),
                transport: transport.clone(),
                poll: task.poll,
            })));
        }
        Ok(crew)
    }

    fn id(&self, n: usize) -> (usize, usize) {
        (Arc::as_ptr(&self.queues).cast::<u8>() as usize, n)
    }

    /// Posts a command to every worker's loop, then waits until all are carried out.
    fn all_do(&self, command: impl Fn(usize, SyncSender<()>) -> Command) {
        let waits = self.places.iter().enumerate().map(|(n, place)| {
            let (done, wait) = sync_channel(0);
            place.on.post(command(n, done));
            wait
        });
        // An error is the answer: the sender was dropped.
        for wait in waits.collect::<Vec<_>>() {
            let _ = wait.recv();
        }
    }

    /// Queue `index`.
    pub fn queue(&self, index: u16) -> Option<&Arc<Queue>> {
        self.queues.get(usize::from(index))
    }

    /// Lets the workers finish the request in hand; returns when they have.
    pub fn pause(&self) {
        self.halt.pause(true);
        self.sync();
    }

    /// Returns when every worker has come out of the call that it may be in.
    pub fn sync(&self) {
        self.all_do(|_, done| Command::Sync(done));
    }

    /// Goes on: every worker looks at all of its queues, the requests on hold first.
    pub fn resume(&self) {
        self.queues.iter().for_each(|q| q.unpark());
        self.halt.pause(false);
        self.queues.iter().for_each(|q| q.kick_workers());
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.halt.pause(true);
        self.all_do(|n, done| Command::Remove(self.id(n), done));
    }
}

#[cfg(test)]
#[path = "worker_test.rs"]
mod tests;
