//! All jobs: their names and states, what a user tells them, what their threads have to say.
//!
//! A command makes a job with [`Jobs::create`] and sets it going with [`Jobs::start`]; the control
//! thread calls [`Jobs::serve`] for every [`Event::Job`](crate::event::Event::Job), and sends on what
//! it finds in [`Jobs::out`].
//!
//! Owns: the list. Never: how a job works, QMP. Threads: control only. Locks: a job's own, for moments.

use super::job::Work;
use super::shared::{Hold, HoldList, Notice, Progress, Shared, Snapshot, State};
use super::table::{Kind, Status};
use crate::bail;
use crate::block::edit::Quiesced;
use crate::block::graph::{Graph, well_formed};
use crate::block::node::{Edge, Node};
use crate::error::{Class, Error, Result, strerror};
use crate::event::{ErrorAction, Events};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The longest time for which a job may have the guest held before it has to try again.
const HOLD: Duration = Duration::from_secs(2);

/// The longest time for which a command waits for the first step of the job that it has started.
const FIRST_STEP: Duration = Duration::from_millis(50);

/// What a job is made with.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name; unique.
    pub id: String,
    /// What it does.
    pub kind: Kind,
    /// Bytes per second; 0: no limit; less: an error.
    pub speed: i64,
    /// Makes its result good without being told to.
    pub auto_finalize: bool,
    /// Is forgotten without being told to.
    pub auto_dismiss: bool,
    /// The transaction whose jobs succeed or fail together; `None`: one of its own.
    pub txn: Option<Txn>,
}

impl Spec {
    /// A job with the defaults of QMP's commands.
    pub fn new(id: impl Into<String>, kind: Kind) -> Spec {
        Spec { id: id.into(), kind, speed: 0, auto_finalize: true, auto_dismiss: true, txn: None }
    }
}

/// A transaction of jobs ([`Jobs::new_txn`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Txn(pub(super) u64);

/// A job, for as long as it is in the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JobKey(pub(super) u64);

/// What a job has come to, as events tell it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// What it does.
    pub kind: Kind,
    /// Its name.
    pub id: String,
    /// Bytes.
    pub progress: Progress,
    /// Bytes per second; 0: no limit.
    pub speed: u64,
}

/// What users of jobs are told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum JobEvent {
    /// A job has changed its state.
    Status(String, Status),
    /// A block job is in sync.
    Ready(Report),
    /// A block job has ended by itself, well or with this error.
    Completed(Report, Option<String>),
    /// A block job was cancelled.
    Cancelled(Report),
    /// A block job waits for being finalized.
    Pending(Kind, String),
    /// A request of a block job failed.
    Error {
        /// The job's name.
        id: String,
        /// True for the source.
        read: bool,
        /// What is done about it.
        action: ErrorAction,
    },
}

/// A job as queries show it.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// What it does.
    pub kind: Kind,
    /// Its state.
    pub status: Status,
    /// A user paused it, or an error did.
    pub paused: bool,
    /// It is in sync.
    pub ready: bool,
    /// Makes its result good without being told to.
    pub auto_finalize: bool,
    /// Is forgotten without being told to.
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// The numbers.
    pub now: Snapshot,
    /// `actively-synced`, for mirrors.
    pub actively_synced: Option<bool>,
}

pub(super) struct Job {
    pub serial: u64,
    pub id: String,
    pub kind: Kind,
    pub status: Status,
    pub user_paused: bool,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    /// A cancel was asked for, of whichever kind.
    pub cancelled: bool,
    /// A cancel that throws the result away.
    pub forced: bool,
    pub started: bool,
    /// The thread has ended; `work` is back.
    pub done: bool,
    pub error: Option<Error>,
    /// [`Work::completes`], [`Work::cancels_softly`]: the thread has the work.
    pub completes: bool,
    pub softly: bool,
    pub txn: u64,
    /// Nobody else may do certain things to these.
    pub nodes: Vec<Arc<Node>>,
    pub shared: Arc<Shared>,
    pub work: Option<Box<dyn Work>>,
    pub synced: Option<Box<dyn Fn() -> bool>>,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    pub(super) fn report(&self) -> Report {
        let now = self.shared.snapshot();
        Report { kind: self.kind, id: self.id.clone(), progress: now.progress, speed: now.speed }
    }
}

/// See the module's head.
#[derive(Default)]
pub struct Jobs {
    pub(super) list: Vec<Job>,
    /// What has happened, oldest first; to be taken away.
    pub out: Vec<JobEvent>,
    serials: u64,
}

impl Jobs {
    /// No jobs.
    pub fn new() -> Jobs {
        Jobs::default()
    }

    /// True without any job.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn serial(&mut self) -> u64 {
        self.serials += 1;
        self.serials
    }

    /// A new transaction, for [`Spec::txn`].
    pub fn new_txn(&mut self) -> Txn {
        Txn(self.serial())
    }

    pub(super) fn at(&self, serial: u64) -> Option<usize> {
        self.list.iter().position(|j| j.serial == serial)
    }

    pub(super) fn get(&mut self, serial: u64) -> Option<&mut Job> {
        self.list.iter_mut().find(|j| j.serial == serial)
    }

    /// The job of that name, for `job-*`.
    pub fn find(&self, id: &str) -> Result<JobKey> {
        let found = self.list.iter().find(|j| j.id == id);
        found.map(|j| JobKey(j.serial)).ok_or_else(|| Error::new("Job not found"))
    }

    /// The block job of that name, for `block-job-*`.
    pub fn find_block(&self, id: &str) -> Result<JobKey> {
        let found = self.list.iter().find(|j| j.id == id && j.kind.is_block());
        let lost = || Error::of(Class::DeviceNotActive, format!("Block job '{id}' not found"));
        found.map(|j| JobKey(j.serial)).ok_or_else(lost)
    }

    /// All jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        let info = |j: &Job| JobInfo {
            id: j.id.clone(),
            kind: j.kind,
            status: j.status,
            // This kind holds its disk then, and in QEMU itself with it.
            paused: j.user_paused || j.softly && matches!(j.status, Status::Waiting | Status::Pending),
            ready: matches!(j.status, Status::Ready | Status::Standby),
            auto_finalize: j.auto_finalize,
            auto_dismiss: j.auto_dismiss,
            error: j.error.as_ref().map(|e| e.desc.clone()),
            now: j.shared.snapshot(),
            actively_synced: j.synced.as_ref().map(|f| f()),
        };
        self.list.iter().rev().map(info).collect()
    }

    /// The job that forbids certain things to be done to `node`: what it does, and whether it is over. A
    /// backup forbids nothing of its disk, as in QEMU, but what its filter and the target are used for.
    pub fn user_of(&self, node: &Arc<Node>) -> Option<(Kind, bool)> {
        let uses = |j: &&Job| j.nodes.iter().any(|n| Arc::ptr_eq(n, node));
        self.list.iter().find(uses).map(|j| (j.kind, j.status == Status::Concluded))
    }

    /// Fails when a job uses `node`, which messages call `name`.
    pub fn check_free(&self, node: &Arc<Node>, name: &str) -> Result<()> {
        match self.user_of(node) {
            Some((kind, _)) => {
                let kind = kind.as_str();
                bail!("Node '{name}' is busy: block device is in use by block job: {kind}")
            }
            None => Ok(()),
        }
    }

    /// Fails when a job counts on the child that `node` has by `edge`.
    pub fn check_edge(&self, node: &Arc<Node>, edge: &Edge) -> Result<()> {
        let uses = |j: &Job, node: &Arc<Node>| j.nodes.iter().any(|n| Arc::ptr_eq(n, node));
        if let Some(child) = edge.node()
            && self.list.iter().any(|j| uses(j, node) && uses(j, &child))
        {
            let (role, from, to) = (&edge.role, &node.name, &child.name);
            bail!("Cannot change frozen '{role}' link from '{from}' to '{to}'");
        }
        self.check_free(node, &node.name)
    }

    /// Whether a job of that name can be made.
    pub fn check_id(&self, id: &str) -> Result<()> {
        if !well_formed(id) {
            bail!("Invalid job ID '{id}'");
        }
        if self.list.iter().any(|j| j.id == id) {
            bail!("Job ID '{id}' already in use");
        }
        Ok(())
    }

    // ---- birth

    /// Makes a job, in state `created`. `build` makes its work (puts filters in, attaches handles) once
    /// it is known that the job can have its name; it undoes what it did when it fails. `events` is the
    /// control thread's inbox. `nodes`: see [`Jobs::user_of`]; the work's filter is one of them, too.
    pub fn create(
        &mut self,
        spec: Spec,
        events: &Events,
        nodes: &[&Arc<Node>],
        build: impl FnOnce() -> Result<Box<dyn Work>>,
    ) -> Result<JobKey> {
        self.check_id(&spec.id)?;
        self.out.push(JobEvent::Status(spec.id.clone(), Status::Created));
        let speed = u64::try_from(spec.speed);
        let speed = speed.map_err(|_| Error::new("Parameter 'speed' expects a non-negative value"));
        let (speed, work) = match speed.and_then(|speed| Ok((speed, build()?))) {
            Ok(made) => made,
            Err(e) => {
                // As in QEMU, where the job exists already when its speed and its nodes are looked at.
                self.out.push(JobEvent::Status(spec.id, Status::Null));
                return Err(e);
            }
        };
        let serial = self.serial();
        let txn = match spec.txn {
            Some(Txn(txn)) => txn,
            None => self.serial(),
        };
        self.list.push(Job {
            serial,
            id: spec.id,
            kind: spec.kind,
            status: Status::Created,
            user_paused: false,
            auto_finalize: spec.auto_finalize,
            auto_dismiss: spec.auto_dismiss,
            cancelled: false,
            forced: false,
            started: false,
            done: false,
            error: None,
            completes: work.completes(),
            softly: work.cancels_softly(),
            txn,
            nodes: nodes.iter().copied().chain(work.filter()).cloned().collect(),
            shared: Shared::new(serial, speed, events.clone()),
            synced: work.actively_synced(),
            work: Some(work),
            thread: None,
        });
        Ok(JobKey(serial))
    }

    /// Sets a created job going, and gives it the time for its first step: in QEMU, too, a job has come as
    /// far as that when its command answers, and clients look. When there is no thread to be had, the job
    /// fails, as a job does.
    pub fn start(&mut self, graph: &mut Graph, job: JobKey) {
        let Some(at) = self.at(job.0) else { return };
        self.become_status(at, Status::Running);
        let job = &mut self.list[at];
        job.started = true;
        let Some(work) = job.work.take() else { return };
        let name = format!("job-{}", job.kind.as_str());
        match job.shared.spawn(&name, work) {
            Ok(thread) => {
                job.thread = Some(thread);
                job.shared.wait_first_step(FIRST_STEP);
            }
            Err((work, e)) => {
                job.work = Some(work);
                job.done = true;
                job.error = Some(Error::new(strerror(&e)));
                let serial = job.serial;
                self.completed(graph, serial);
            }
        }
    }

    /// Changes the state of a job, and tells.
    pub(super) fn become_status(&mut self, at: usize, next: Status) {
        let job = &mut self.list[at];
        debug_assert!(job.status.may_become(next), "{}: {:?} to {next:?}", job.id, job.status);
        job.status = next;
        self.out.push(JobEvent::Status(job.id.clone(), next));
    }

    // ---- what a thread has to say

    /// Acts on what the job's thread has said.
    pub fn serve(&mut self, graph: &mut Graph, serial: u64) {
        loop {
            let Some(at) = self.at(serial) else { return };
            let notice = self.list[at].shared.lock().notices.pop_front();
            match notice {
                Some(Notice::Hold) => {
                    if let Some(held) = self.hold(graph, at) {
                        // The job has ended; the guest waits until the disk is what it is to be.
                        self.end(graph, serial);
                        drop(held);
                        return;
                    }
                }
                Some(notice) => self.note(at, &notice),
                None => break,
            }
        }
        self.end(graph, serial);
    }

    fn note(&mut self, at: usize, notice: &Notice) {
        let job = &self.list[at];
        match notice {
            Notice::Paused => {
                let next = if job.status == Status::Ready { Status::Standby } else { Status::Paused };
                self.become_status(at, next);
            }
            Notice::Resumed => {
                let next = if job.status == Status::Standby { Status::Ready } else { Status::Running };
                self.become_status(at, next);
            }
            Notice::Ready => {
                self.become_status(at, Status::Ready);
                let job = &self.list[at];
                if job.kind.is_block() {
                    self.out.push(JobEvent::Ready(job.report()));
                }
            }
            Notice::Error { read, action } => {
                let (id, read, action) = (job.id.clone(), *read, *action);
                if job.kind.is_block() {
                    self.out.push(JobEvent::Error { id, read, action });
                }
                if action == ErrorAction::Stop {
                    self.list[at].user_paused = true;
                }
            }
            Notice::Hold => {}
        }
    }

    /// Holds the guest for the job until it ends, lets it go, or has had its time. Something when the
    /// job has ended meanwhile and counts on the guest being held still.
    fn hold(&mut self, graph: &Graph, at: usize) -> Option<Quiesced> {
        let shared = self.list[at].shared.clone();
        let HoldList { nodes, but } = {
            let mut state = shared.lock();
            let list = std::mem::take(&mut state.hold_list);
            if state.hold != Hold::Wanted || state.cancel {
                return None;
            }
            list
        };
        let quiesced = graph.quiesce(&nodes.iter().collect::<Vec<_>>(), &but.iter().collect::<Vec<_>>());
        shared.tell(|s| {
            if s.hold == Hold::Wanted {
                s.hold = Hold::Held;
            }
        });
        // It may want the guest again before this thread has seen that it let it go.
        let over = |s: &State| s.finished.is_some() || !matches!(s.hold, Hold::Held | Hold::Confirmed);
        if !shared.wait_for(Some(HOLD), |s| over(s) || s.hold == Hold::Confirmed) {
            let mut state = shared.lock();
            if state.hold == Hold::Held {
                log::warn!("job '{}' takes long over its last piece; the guest goes on", self.list[at].id);
                state.hold = Hold::None;
                return None;
            }
        }
        // It ends at once now, if it has not let the guest go.
        shared.wait_for(None, over);
        let state = shared.lock();
        (state.finished.is_some() && state.hold == Hold::Confirmed).then_some(quiesced)
    }

    /// Takes the work back from a thread that has ended, and goes on from there.
    fn end(&mut self, graph: &mut Graph, serial: u64) {
        if self.take_back(serial) {
            self.completed(graph, serial);
        }
    }

    /// True when the thread has ended by now: its work is back, and its result known.
    fn take_back(&mut self, serial: u64) -> bool {
        let Some(at) = self.at(serial) else { return false };
        let finished = self.list[at].shared.lock().finished.take();
        let Some((work, result)) = finished else { return false };
        // What it said before its end comes first.
        loop {
            let notice = self.list[at].shared.lock().notices.pop_front();
            match notice {
                Some(notice) => self.note(at, &notice),
                None => break,
            }
        }
        let job = &mut self.list[at];
        if let Some(thread) = job.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of job '{}' failed", job.id);
        }
        job.work = Some(work);
        job.done = true;
        // It came to its end before it came to the pause that it was told.
        job.user_paused = false;
        if let Err(super::job::Stop::Failed(e)) = result {
            job.error = Some(e);
        }
        true
    }

    /// Waits until the job's thread, which was told to end, has done so.
    pub(super) fn wait_end(&mut self, serial: u64) {
        let Some(job) = self.get(serial) else { return };
        if job.thread.is_some() {
            job.shared.wait_for(None, |s| s.finished.is_some());
            self.take_back(serial);
        }
    }
}

#[cfg(test)]
#[path = "registry_test.rs"]
mod tests;
