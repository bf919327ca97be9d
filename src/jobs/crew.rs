//! The threads that copy for a job: several pieces at a time while the disk is free, one at a time
//! when somebody else uses it, or when the speed is limited.
//!
//! A job says what a step is: to find a piece that nobody else has, and to copy it. [`Crew::work`] has
//! steps done, by the job's thread and its helpers, until there is nothing left or one has failed.
//! What the job's thread alone may do (to pause, to wait as the speed demands, to act on an error) it
//! does while no step is under way.
//!
//! While others use the disk the job rests after each piece for as long as that took: so they have the
//! disk for themselves for half of the time at least, whatever else a piece costs them. If they have something
//! copied for the job before they write, it rests longer: that is time that the job takes from them, too.
//!
//! Owns: the helpers, which live no longer than `work`. Never: knows what is copied. Threads: the
//! job's, and its helpers. Locks: a list of errors, for moments.

use super::job::{After, JobCtx, Stop};
use crate::block::graph::Graph;
use crate::block::node::Node;
use crate::block::traffic::{self, Watch};
use crate::sys::buf;
use crate::sys::thread::{self, lock};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The most that is copied in one piece, in bytes. Each thread has a buffer for one.
pub const PIECE: u64 = 1 << 20;

/// How many pieces are under way at a time, at most: one is read while the other is written. More would
/// make a job larger, and those wait longer who begin to use the disk; disks that were tried are no faster.
const HANDS: usize = 2;

/// How long a disk counts as used after a request.
const USED: Duration = Duration::from_millis(10);

/// How many times as long as a piece took the job rests when others copied for it meanwhile. A guest that writes
/// one block after another which nobody has copied has three requests for each, and needs three quarters of what many
/// a disk can do for half of its own rate: an eighth of the time is the job's.
const REST_OF_HELPED: u32 = 7;

/// The longest rest after a piece.
const REST: Duration = Duration::from_secs(1);

/// Who uses the disk that a job works on.
struct Others {
    requests: u64,
    seen: Option<Instant>,
}

/// See the module's head.
pub struct Crew {
    watch: Watch,
    others: Mutex<Others>,
    /// Others copied for the job since its last rest.
    helped: AtomicBool,
}

/// What a step has come to: so many bytes were copied, and there may be more to do; or nothing is left
/// that nobody else is at.
pub type Step<E> = Result<Option<u64>, E>;

/// Ends the round when a step panics.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::SeqCst);
        }
    }
}

impl Crew {
    /// For a job whose own requests come to no node above `node`, nor to it. Control thread.
    pub fn new(graph: &Graph, node: &Arc<Node>) -> Crew {
        let watch = Watch::above(graph, node);
        let others = Mutex::new(Others { requests: watch.requests(), seen: None });
        Crew { watch, others, helped: AtomicBool::new(false) }
    }

    /// Others have copied something in their own time that the job would have had to copy.
    pub fn was_helped(&self) {
        self.helped.store(true, Ordering::Relaxed);
    }

    /// Others use the disk.
    fn is_used(&self) -> bool {
        let now = self.watch.requests();
        let mut others = lock(&self.others);
        if std::mem::replace(&mut others.requests, now) != now {
            others.seen = Some(Instant::now());
        }
        others.seen.is_some_and(|at| at.elapsed() < USED)
    }

    /// Has `step` done until nothing is left, or until some have failed: their errors, in the order of
    /// time. With errors there may be more left to do.
    pub fn work<E: Send>(&self, cx: &JobCtx, step: impl Fn() -> Step<E> + Sync) -> Result<Vec<E>, Stop> {
        buf::keep_copy_buf(PIECE as usize);
        loop {
            cx.pause_point()?;
            let alone = cx.is_limited() || self.is_used();
            if !alone {
                let (done, failed) = self.together(cx, &step);
                if done || !failed.is_empty() {
                    return Ok(failed);
                }
                continue;
            }
            let begun = Instant::now();
            match step() {
                Err(e) => return Ok(vec![e]),
                Ok(None) => return Ok(Vec::new()),
                Ok(Some(bytes)) => {
                    let time = begun.elapsed();
                    cx.throttle(bytes)?;
                    if bytes > 0 && !cx.is_limited() && self.is_used() {
                        let times =
                            if self.helped.swap(false, Ordering::Relaxed) { REST_OF_HELPED } else { 1 };
                        cx.sleep((time * times).min(REST))?;
                    }
                }
            }
        }
    }

    /// Has `step` done until all of a disk of `len` bytes is: it takes pieces of what there is to do, and
    /// says which has failed. `failed` decides whether such a piece is done again; or it ends the job.
    pub fn work_off<E: Send>(
        &self,
        cx: &JobCtx,
        len: u64,
        step: impl Fn(&Todo) -> Step<(Range<u64>, E)> + Sync,
        mut failed: impl FnMut(&Range<u64>, E) -> Result<After, Stop>,
    ) -> Result<(), Stop> {
        let todo = Todo::new(len);
        loop {
            let mut wrong = self.work(cx, || step(&todo))?.into_iter();
            let Some((range, e)) = wrong.next() else { return Ok(()) };
            // The others fail again, if they do: one error is reported at a time.
            wrong.for_each(|(range, _)| todo.give_back(range));
            if failed(&range, e)? == After::Again {
                todo.give_back(range);
            }
        }
    }

    /// Several threads at once; until nothing is left (true), or a step fails, or the job is to pause, or
    /// others come.
    fn together<E: Send>(&self, cx: &JobCtx, step: &(impl Fn() -> Step<E> + Sync)) -> (bool, Vec<E>) {
        let (stop, called, failed) = (AtomicBool::new(false), AtomicBool::new(false), Mutex::new(Vec::new()));
        // True: go on.
        let once = || {
            let _alarm = Alarm(&stop);
            if stop.load(Ordering::SeqCst) {
                return false;
            }
            if cx.is_wanted() || self.is_used() {
                called.store(true, Ordering::SeqCst);
                stop.store(true, Ordering::SeqCst);
                return false;
            }
            match step() {
                Ok(left) => left.is_some(),
                Err(e) => {
                    stop.store(true, Ordering::SeqCst);
                    lock(&failed).push(e);
                    false
                }
            }
        };
        std::thread::scope(|scope| {
            // For one piece no thread is worth its making.
            if !once() || !once() {
                return;
            }
            let help = || {
                traffic::for_a_job();
                buf::keep_copy_buf(PIECE as usize);
                while once() {}
            };
            // Those that there are do it all.
            let helpers: Vec<_> =
                (1..HANDS).map_while(|_| thread::spawn_scoped(scope, "job-helper", help).ok()).collect();
            while once() {}
            for helper in helpers {
                if let Err(panic) = helper.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
        let done = !called.load(Ordering::SeqCst);
        (done, failed.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What of a disk is still to be done, in order; several threads take from it.
pub struct Todo(Mutex<Vec<Range<u64>>>);

impl Todo {
    /// `len` bytes, from 0 on.
    pub fn new(len: u64) -> Todo {
        let todo = Todo(Mutex::default());
        todo.give_back(0..len);
        todo
    }

    /// Takes the next piece: `look` says what is at an offset, for at most so many bytes, and for how
    /// many. Where it cannot say, the piece is as long as pieces are.
    pub fn take<T>(
        &self,
        look: impl FnOnce(u64, u64) -> io::Result<(T, u64)>,
    ) -> Option<(Range<u64>, io::Result<T>)> {
        let mut list = lock(&self.0);
        let next = list.last_mut()?;
        let (off, left) = (next.start, next.end - next.start);
        let (what, n) = match look(off, left) {
            Ok((what, n)) => (Ok(what), n.clamp(1, left)),
            Err(e) => (Err(e), PIECE.min(left)),
        };
        next.start += n;
        if next.is_empty() {
            list.pop();
        }
        Some((off..off + n, what))
    }

    /// Nothing is left that nobody has taken.
    pub fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// A piece that was taken is to be done again, and next.
    pub fn give_back(&self, range: Range<u64>) {
        if !range.is_empty() {
            lock(&self.0).push(range);
        }
    }
}

#[cfg(test)]
#[path = "crew_test.rs"]
mod tests;
