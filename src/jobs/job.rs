//! What a kind of job is ([`Work`]), and what it works with ([`JobCtx`]).
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
//! Owns: what a job's thread may do. Never: names, states (`registry.rs` has them), QMP. Threads: the
//! job's, and control. Locks: that of [`Shared`], never across I/O.

use super::shared::{Ended, Hold, HoldList, Notice, Shared, State};
pub use super::shared::{Progress, Snapshot};
use crate::block::driver::Perm;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec, IoStatus, OnError};
use crate::block::node::Node;
use crate::error::{Error, strerror};
use crate::event::ErrorAction;
use std::io;
use std::sync::{Arc, MutexGuard};
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

    pub(super) fn new(shared: Arc<Shared>) -> JobCtx {
        JobCtx { shared }
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
        self.shared.note(&mut state, Notice::Paused);
        self.shared.post();
        while state.pause && !state.cancel {
            state = self.shared.idle(state, None);
        }
        self.shared.note(&mut state, Notice::Resumed);
        let cancelled = state.cancel;
        drop(state);
        self.shared.post();
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
        self.shared.change(|s| s.progress = Progress { offset, len });
    }

    /// So many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        self.shared.change(|s| s.progress.offset = s.progress.offset.saturating_add(bytes));
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
            self.shared.note(&mut state, Notice::Ready);
            drop(state);
            self.shared.post();
        }
    }

    /// The job has nothing to do for now and only looks now and then whether that is still so: it does
    /// not count as busy until [`JobCtx::at_work`].
    pub fn at_rest(&self) {
        self.shared.change(|s| s.busy = false);
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

    fn doze<'a>(&self, state: MutexGuard<'a, State>, until: Instant) -> MutexGuard<'a, State> {
        if state.cancel || state.pause { state } else { self.shared.idle(state, Some(until)) }
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
        self.shared.note(&mut state, Notice::Error { read, action });
        if action == ErrorAction::Stop {
            state.pause = true;
            if state.io_status == IoStatus::Ok {
                state.io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
            }
        }
        drop(state);
        self.shared.post();
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
        self.shared.note(&mut state, Notice::Hold);
        self.shared.post();
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
