//! What a job's thread and the control thread share: what the one is told, and what the other is to know.
//!
//! Owns: the mutex between the two, and the thread. Never: names, states (`registry.rs` has them), QMP.
//! Threads: the job's, and control. Locks: its own, a leaf but for the inbox; never across I/O, nor while
//! it waits (a condition variable lets go of it).

use super::job::{JobCtx, Stop, Work};
use super::rate::Rate;
use crate::block::handle::{Handle, IoStatus};
use crate::block::node::Node;
use crate::block::traffic;
use crate::error::Error;
use crate::event::{ErrorAction, Event, Events};
use crate::sys::thread;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
pub(super) type Ended = std::result::Result<(), Stop>;

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
    /// See [`Snapshot::busy`].
    pub busy: bool,
    /// It has been told that it is ready.
    pub ready: bool,
    pub progress: Progress,
    pub rate: Rate,
    pub io_status: IoStatus,
    pub hold: Hold,
    pub hold_list: HoldList,
    /// Counts what a sleeper has to know: it wakes up when this changes.
    pub kicks: u64,
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
    pub changed: Condvar,
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
    pub(super) fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
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

    /// The job's thread: changes what can be seen of the job.
    pub(super) fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let done = f(&mut state);
        self.stepped(&state);
        done
    }

    /// The job's thread: something for the control thread to act on, when it is [told](Shared::post).
    pub(super) fn note(&self, state: &mut State, notice: Notice) {
        state.notices.push_back(notice);
        self.stepped(state);
    }

    /// The job's thread: waits as [`Shared::wait`] does, and is not busy meanwhile.
    pub(super) fn idle<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        let busy = std::mem::replace(&mut state.busy, false);
        self.stepped(&state);
        let mut state = self.wait(state, until);
        state.busy = busy;
        state
    }

    /// Something may have changed that [`Shared::wait_first_step`] waits for.
    fn stepped(&self, state: &State) {
        if state.watched {
            self.changed.notify_all();
        }
    }

    /// Sends the control thread to look at the job.
    pub(super) fn post(&self) {
        self.events.post(Event::Job(self.serial));
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
            traffic::for_a_job();
            let cx = JobCtx::new(shared.clone());
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
            let mut state = shared.lock();
            state.busy = false;
            state.finished = Some((work, done));
            drop(state);
            shared.changed.notify_all();
            shared.post();
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
