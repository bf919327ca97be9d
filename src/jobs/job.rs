//! What a kind of job is ([`Work`]), what it works with ([`JobCtx`]), and its thread.
//!
//! **For the writer of a job.** [`Work::run`] is on the job's own thread, does blocking I/O through
//! its handles, and between two pieces calls [`JobCtx::pause_point`] (or something that does: every
//! method that waits) and returns at once with the [`Stop`] it gets from there. Everything else of
//! `Work` is on the control thread, with the graph in hand, after `run` has returned:
//!
//! ```text
//! run ─ Ok ──► prepare ─ Ok ──► commit ──► clean        in a transaction: all prepare, then all
//!   └─ Err ────────┴─ Err ────► abort ───► clean        commit; one that fails aborts all
//! ```
//!
//! A job that copies holds one ticket at a time, as everybody does: it reads through one handle and
//! writes through another, or, where a lock of a range must lie around both, runs the whole piece
//! inside one ticket ([`Handle::inside`](crate::block::handle::Handle::inside)) and takes the range
//! after the ticket. It never takes a ticket with a range in hand.
//!
//! Owns: the mutex between a job's thread and the control thread. Never: names, states (`registry.rs`
//! has them), QMP. Threads: the job's, and control. Locks: its own, a leaf but for the inbox; never
//! across I/O, nor while it waits (a condition variable lets go of it).

use super::rate::Rate;
use crate::block::driver::Perm;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec, IoStatus, OnError};
use crate::block::node::Node;
use crate::error::{Error, strerror};
use crate::event::{ErrorAction, Event, Events};
use crate::sys::thread;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Why a job's work ends early.
#[derive(Clone, PartialEq, Debug)]
pub enum Stop {
    /// It was cancelled.
    Cancelled,
    /// It failed; what a user is told.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(e: Error) -> Stop {
        Stop::Failed(e)
    }
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Stop {
        Stop::Failed(Error::new(strerror(&e)))
    }
}

/// What a kind of job does. See the module's head.
pub trait Work: Send {
    /// How much there is to do, in bytes, if that is known before it begins: who asks for the progress
    /// of a job that was just started is told.
    fn total(&self) -> Option<u64> {
        None
    }

    /// The work, on the job's thread.
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop>;

    /// Whatever can fail about making the result good. The guest may have gone on since `run` ended,
    /// unless the job held it then: what must not change between this and `commit` is quiesced here
    /// and kept so in the job until then (both happen in one go of the control thread).
    fn prepare(&mut self, graph: &mut Graph) -> Result<(), Error> {
        let _ = graph;
        Ok(())
    }

    /// Makes the result good. Cannot fail.
    fn commit(&mut self, graph: &mut Graph) {
        let _ = graph;
    }

    /// Puts things back, after a failure or a cancel. `run` may never have been called.
    fn abort(&mut self, graph: &mut Graph) {
        let _ = graph;
    }

    /// After `commit` or `abort`: takes filters out, detaches handles. The job is still in the list.
    fn clean(&mut self, graph: &mut Graph) {
        let _ = graph;
    }

    /// The filter that the job has put in: the user may do no more with it than with the job's disks.
    fn filter(&self) -> Option<&Arc<Node>> {
        None
    }

    /// After `clean`, for a job that stays in the list: it keeps its nodes from the user as before, until
    /// [`Work::dismiss`], as that kind of job does in QEMU.
    fn lingers(&self, failed: bool) -> bool {
        let _ = failed;
        false
    }

    /// The job leaves the list: lets go of what `clean` has left. May come without a `run`, and after any
    /// end.
    fn dismiss(&mut self, graph: &mut Graph) {
        let _ = graph;
    }

    /// True for a job whose end a user may ask for while it is ready (`block-job-complete`).
    fn completes(&self) -> bool {
        false
    }

    /// A cancel without force while the job is ready lets it end well ([`JobCtx::stopping`]) instead
    /// of throwing its result away. Only asked of jobs in ready or standby.
    fn cancels_softly(&self) -> bool {
        false
    }

    /// Asked once, when the job is made: what says `actively-synced` in `query-block-jobs`, for jobs
    /// that have it. Must not block.
    fn actively_synced(&self) -> Option<Box<dyn Fn() -> bool>> {
        None
    }
}

/// What the job's thread has to say; the control thread acts on it in order.
#[derive(Debug)]
pub(super) enum Notice {
    Paused,
    Resumed,
    Ready,
    Error { read: bool, action: ErrorAction },
    Hold,
}

/// What became of [`JobCtx::hold_guest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hold {
    /// Nobody is held.
    None,
    /// The job's thread wants it.
    Wanted,
    /// The control thread does it.
    Held,
    /// The job is done, and ends; the control thread keeps holding until it has.
    Confirmed,
}

/// Who is held: everybody above these nodes, but not these handles.
#[derive(Default)]
pub(super) struct HoldList {
    pub nodes: Vec<Arc<Node>>,
    pub but: Vec<Arc<Handle>>,
}

/// The two numbers of a job's progress, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// How much is done.
    pub offset: u64,
    /// How much there is, as far as it is known.
    pub len: u64,
}

/// What `query-jobs` and the events need of the thread's side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// See there.
    pub progress: Progress,
    /// The thread is at work: it does not sleep, nor is it paused, nor at rest.
    pub busy: bool,
    /// Of the last error that paused it.
    pub io_status: IoStatus,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
}

/// How a job's work ends.
type Ended = std::result::Result<(), Stop>;

pub(super) struct State {
    pub notices: VecDeque<Notice>,
    /// It is to pause.
    pub pause: bool,
    /// It is to end without a result.
    pub cancel: bool,
    /// It was ready and is to end well, but without its last step.
    pub soft_cancel: bool,
    /// It is ready and is to end.
    pub complete: bool,
    busy: bool,
    ready: bool,
    progress: Progress,
    rate: Rate,
    pub io_status: IoStatus,
    pub hold: Hold,
    pub hold_list: HoldList,
    /// Counts what a sleeper has to know: it wakes up when this changes.
    kicks: u64,
    /// The control thread waits for the job's first step.
    watched: bool,
    /// The work comes back when the thread has done it.
    pub finished: Option<(Box<dyn Work>, Ended)>,
}

/// What the job's thread and the control thread share.
pub(super) struct Shared {
    serial: u64,
    events: Events,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(serial: u64, speed: u64, events: Events) -> Arc<Shared> {
        Arc::new(Shared {
            serial,
            events,
            state: Mutex::new(State {
                notices: VecDeque::new(),
                pause: false,
                cancel: false,
                soft_cancel: false,
                complete: false,
                busy: false,
                ready: false,
                progress: Progress::default(),
                rate: Rate::new(speed),
                io_status: IoStatus::Ok,
                hold: Hold::None,
                hold_list: HoldList::default(),
                kicks: 0,
                watched: false,
                finished: None,
            }),
            changed: Condvar::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the thread has to know, and wakes it.
    pub(super) fn tell(&self, f: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        f(&mut state);
        state.kicks += 1;
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn set_speed(&self, speed: u64) {
        self.tell(|s| s.rate.set(speed, Instant::now()));
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let s = self.lock();
        Snapshot { progress: s.progress, busy: s.busy, io_status: s.io_status, speed: s.rate.speed() }
    }

    /// Waits on the condition variable, at most until `until`.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        match until {
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Control thread: waits until `done` says so, at most for `time`; what it said last.
    pub(super) fn wait_for(&self, time: Option<Duration>, done: impl Fn(&State) -> bool) -> bool {
        let until = time.map(|t| Instant::now() + t);
        let mut state = self.lock();
        loop {
            if done(&state) {
                return true;
            }
            if until.is_some_and(|t| t <= Instant::now()) {
                return false;
            }
            state = self.wait(state, until);
        }
    }

    /// Control thread, right after the start: waits until the job has done something that can be seen, or
    /// waits itself, but no longer than for `time`.
    pub(super) fn wait_first_step(&self, time: Duration) {
        self.lock().watched = true;
        self.wait_for(Some(time), |s| {
            !s.busy || s.progress.offset > 0 || !s.notices.is_empty() || s.finished.is_some()
        });
        self.lock().watched = false;
    }

    /// Something has changed that [`Shared::wait_first_step`] waits for.
    fn stepped(&self, state: &State) {
        if state.watched {
            self.changed.notify_all();
        }
    }

    /// Starts the thread. On an error the work comes back.
    pub(super) fn spawn(
        self: &Arc<Shared>,
        name: &str,
        work: Box<dyn Work>,
    ) -> Result<JoinHandle<()>, (Box<dyn Work>, io::Error)> {
        let shared = self.clone();
        {
            let mut state = self.lock();
            state.busy = true;
            state.progress.len = work.total().unwrap_or(0);
        }
        // Not lost in a closure that is never called.
        let parcel = Arc::new(Mutex::new(Some(work)));
        let mine = parcel.clone();
        let take = |p: &Mutex<Option<Box<dyn Work>>>| p.lock().unwrap_or_else(PoisonError::into_inner).take();
        let spawned = thread::spawn(name, thread::IO_STACK, move || {
            let Some(mut work) = take(&mine) else { return };
            let cx = JobCtx { shared };
            let run = || {
                // A cancel that came already is the work's to find: it says how much there was to do.
                let _ = cx.pause_point();
                work.run(&cx)
            };
            let done = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
                let text = thread::panic_text(&*panic);
                log::error!("a job's thread failed: {text}");
                Err(Stop::Failed(Error::new(format!("Internal error: {text}"))))
            });
            let shared = cx.shared;
            let mut state = shared.lock();
            state.busy = false;
            state.finished = Some((work, done));
            drop(state);
            shared.changed.notify_all();
            shared.events.post(Event::Job(shared.serial));
        });
        spawned.map_err(|e| {
            self.lock().busy = false;
            // It is there: only the thread that was not made takes it.
            (take(&parcel).unwrap_or_else(|| Box::new(Nothing)), e)
        })
    }
}

/// Work that is none.
struct Nothing;

impl Work for Nothing {
    fn run(&mut self, _: &JobCtx) -> Ended {
        Ok(())
    }
}

/// What a job works with, on its own thread. Every method that waits also pauses when it is told to,
/// and returns [`Stop::Cancelled`] at once when the job is to end without a result.
pub struct JobCtx {
    shared: Arc<Shared>,
}

/// What to do after an error ([`JobCtx::on_error`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// The policy is `ignore`: go on; what that means is the job's to say (skip it, or try again:
    /// there was a short sleep, so that a loop does not spin).
    Ignored,
    /// The job was paused and resumed: try again.
    Again,
}

impl JobCtx {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    fn post(&self) {
        self.shared.events.post(Event::Job(self.shared.serial));
    }

    /// Between two pieces of work, without a ticket in hand: waits while the job is paused. A job that
    /// holds the guest and is to pause lets the guest go first.
    pub fn pause_point(&self) -> Ended {
        let mut state = self.lock();
        if state.cancel {
            return Err(Stop::Cancelled);
        }
        if !state.pause {
            return Ok(());
        }
        if state.hold != Hold::None {
            state.hold = Hold::None;
            self.shared.changed.notify_all();
        }
        let busy = std::mem::replace(&mut state.busy, false);
        self.shared.stepped(&state);
        state.notices.push_back(Notice::Paused);
        self.post();
        while state.pause && !state.cancel {
            state = self.shared.wait(state, None);
        }
        state.busy = busy;
        state.notices.push_back(Notice::Resumed);
        let cancelled = state.cancel;
        drop(state);
        self.post();
        if cancelled { Err(Stop::Cancelled) } else { Ok(()) }
    }

    /// True once the job is to end without a result: for loops that have nothing to return from.
    pub fn cancelled(&self) -> bool {
        self.lock().cancel
    }

    /// The job's thread has something else to do than to go on: it is to pause, to end, or to keep to a
    /// speed. For its helpers, which leave that to it.
    pub fn is_wanted(&self) -> bool {
        let state = self.lock();
        state.cancel || state.pause || state.rate.speed() != 0
    }

    /// There is a limit of its speed.
    pub fn is_limited(&self) -> bool {
        self.lock().rate.speed() != 0
    }

    /// Sets both numbers of the progress, in bytes.
    pub fn progress(&self, offset: u64, len: u64) {
        let mut state = self.lock();
        state.progress = Progress { offset, len };
        self.shared.stepped(&state);
    }

    /// So many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        let mut state = self.lock();
        state.progress.offset = state.progress.offset.saturating_add(bytes);
        self.shared.stepped(&state);
    }

    /// There is so much to be done beyond what is done: `len` follows (a mirror's guest writes).
    pub fn remaining(&self, bytes: u64) {
        let progress = &mut self.lock().progress;
        progress.len = progress.offset.saturating_add(bytes);
    }

    /// The progress now.
    pub fn get_progress(&self) -> Progress {
        self.lock().progress
    }

    /// The job is in sync: it becomes `ready`, once.
    pub fn ready(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.ready, true) {
            state.notices.push_back(Notice::Ready);
            self.shared.stepped(&state);
            drop(state);
            self.post();
        }
    }

    /// The job has nothing to do for now and only looks now and then whether that is still so: it does
    /// not count as busy until [`JobCtx::at_work`].
    pub fn at_rest(&self) {
        let mut state = self.lock();
        state.busy = false;
        self.shared.stepped(&state);
    }

    /// Ends [`JobCtx::at_rest`].
    pub fn at_work(&self) {
        self.lock().busy = true;
    }

    /// A ready job is to end (`block-job-complete`).
    pub fn completing(&self) -> bool {
        self.lock().complete
    }

    /// A ready job is to end well, but without its last step (`block-job-cancel` of a mirror).
    pub fn stopping(&self) -> bool {
        self.lock().soft_cancel
    }

    /// A good size for the next piece, at most `most`: a power of two that fits the speed.
    pub fn piece(&self, most: u64) -> u64 {
        self.lock().rate.piece(most)
    }

    /// After `bytes` of work: waits as the speed demands. 0 only pauses.
    pub fn throttle(&self, bytes: u64) -> Ended {
        self.lock().rate.spent(bytes, Instant::now());
        loop {
            self.pause_point()?;
            let state = self.lock();
            let Some(until) = state.rate.wait_until(Instant::now()) else { return Ok(()) };
            drop(self.doze(state, until));
        }
    }

    /// Sleeps, at most for `time`: wakes earlier when something changed (a verb, the speed, a
    /// [`Kick`]).
    pub fn sleep(&self, time: Duration) -> Ended {
        self.pause_point()?;
        let until = Instant::now() + time;
        let state = self.lock();
        let before = state.kicks;
        let mut state = self.doze(state, until);
        while state.kicks == before && !state.cancel && !state.pause && Instant::now() < until {
            state = self.doze(state, until);
        }
        drop(state);
        self.pause_point()
    }

    fn doze<'a>(&self, mut state: MutexGuard<'a, State>, until: Instant) -> MutexGuard<'a, State> {
        if state.cancel || state.pause {
            return state;
        }
        let busy = std::mem::replace(&mut state.busy, false);
        self.shared.stepped(&state);
        let mut state = self.shared.wait(state, Some(until));
        state.busy = busy;
        state
    }

    /// For other threads: ends a [`JobCtx::sleep`].
    pub fn kick(&self) -> Kick {
        Kick(self.shared.clone())
    }

    /// A request of the job failed: acts as the policy says, and tells the user. `read`: on the
    /// source. For `report` it returns the error; for `stop` it returns after the job was resumed.
    pub fn on_error(&self, policy: OnError, e: &io::Error, read: bool) -> Result<After, Stop> {
        let nospace = e.raw_os_error() == Some(libc::ENOSPC);
        let action = match policy {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if nospace => ErrorAction::Stop,
            OnError::Report | OnError::Enospc | OnError::Auto => ErrorAction::Report,
        };
        let mut state = self.lock();
        if state.cancel {
            return Err(Stop::Cancelled);
        }
        state.notices.push_back(Notice::Error { read, action });
        self.shared.stepped(&state);
        if action == ErrorAction::Stop {
            state.pause = true;
            if state.io_status == IoStatus::Ok {
                state.io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
            }
        }
        drop(state);
        self.post();
        match action {
            ErrorAction::Report => Err(Stop::Failed(Error::new(strerror(e)))),
            ErrorAction::Stop => self.pause_point().map(|()| After::Again),
            ErrorAction::Ignore => self.sleep(Duration::from_millis(20)).map(|()| After::Ignored),
        }
    }

    /// Asks the control thread to make everybody wait who is above one of `nodes`, except the handles
    /// in `but` (the job's own). When this returns, no request of theirs is under way and none begins.
    /// The job then does its last piece of work, which is short, calls [`JobCtx::confirm_hold`], and if
    /// that is true returns from `run` without delay; if not, the guest had to be let go in between, and
    /// it goes on as before. `Ok(false)`: could not be had now; the same.
    pub fn hold_guest(&self, nodes: &[Arc<Node>], but: &[Arc<Handle>]) -> Result<bool, Stop> {
        self.pause_point()?;
        let mut state = self.lock();
        state.hold = Hold::Wanted;
        state.hold_list = HoldList { nodes: nodes.to_vec(), but: but.to_vec() };
        state.notices.push_back(Notice::Hold);
        self.shared.stepped(&state);
        self.post();
        while state.hold == Hold::Wanted && !state.cancel && !state.pause {
            state = self.shared.wait(state, None);
        }
        if state.cancel {
            state.hold = Hold::None;
            drop(state);
            self.shared.changed.notify_all();
            return Err(Stop::Cancelled);
        }
        let held = state.hold == Hold::Held;
        if state.hold == Hold::Wanted {
            state.hold = Hold::None;
        }
        Ok(held)
    }

    /// The guest is still held, and stays so until the job has ended.
    pub fn confirm_hold(&self) -> bool {
        let mut state = self.lock();
        let held = state.hold == Hold::Held && !state.cancel;
        if held {
            state.hold = Hold::Confirmed;
        }
        held
    }

    /// Lets the guest go again, if it is held.
    pub fn release_guest(&self) {
        self.lock().hold = Hold::None;
        self.shared.changed.notify_all();
    }
}

/// Ends a job's sleep, from any thread.
#[derive(Clone)]
pub struct Kick(Arc<Shared>);

impl Kick {
    /// See [`JobCtx::sleep`].
    pub fn kick(&self) {
        self.0.tell(|_| ());
    }
}

/// A handle for a job on the disk that it works on, which is not its disk for that.
pub fn attach_source(
    graph: &mut Graph,
    node: &Arc<Node>,
    uses: Perm,
    shares: Perm,
) -> Result<Arc<Handle>, Error> {
    let job = Some(("source", "a block job".to_string()));
    graph.attach(Some(node.clone()), HandleSpec { uses, shares, job, ..HandleSpec::default() })
}

/// A handle for a job on `node`: what it does with it, and lets others do.
pub fn attach(graph: &mut Graph, node: &Arc<Node>, uses: Perm, shares: Perm) -> Result<Arc<Handle>, Error> {
    let spec = HandleSpec { uses, shares, ..HandleSpec::default() };
    graph.attach(Some(node.clone()), spec)
}

#[cfg(test)]
#[path = "job_test.rs"]
mod tests;
