//! The end of jobs: those of a transaction succeed together or fail together.
//!
//! A job without a transaction is the only one of its own. Owns: the order of the last states and
//! events, which is QEMU's (job.c). Never: threads, but to wait for one that was told to end. Threads:
//! control. Locks: a job's own, for moments.

use super::registry::{JobEvent, Jobs};
use super::table::Status;
use crate::block::graph::Graph;
use crate::block::mutant::{Bug, Mutant};
use crate::error::Error;

impl Jobs {
    /// The others of its transaction, and itself, newest first, as in QEMU.
    fn together(&self, serial: u64) -> Vec<u64> {
        let Some(at) = self.at(serial) else { return Vec::new() };
        let txn = self.list[at].txn;
        self.list.iter().rev().filter(|j| j.txn == txn).map(|j| j.serial).collect()
    }

    /// A cancel counts even when the work was done just before it: then it failed.
    fn settle(&mut self, serial: u64) -> bool {
        let Some(at) = self.at(serial) else { return false };
        let job = &mut self.list[at];
        if job.error.is_none() && job.forced {
            job.error = Some(Error::new("Operation canceled"));
        }
        let failed = job.error.is_some();
        if failed && !matches!(job.status, Status::Aborting | Status::Concluded) {
            self.become_status(at, Status::Aborting);
        }
        failed
    }

    /// The work of a job is over (or never began).
    pub(super) fn completed(&mut self, graph: &mut Graph, serial: u64) {
        if self.at(serial).is_none_or(|at| self.list[at].status.is_completed()) {
            return;
        }
        if self.settle(serial) {
            self.abort_all(graph, serial);
            return;
        }
        if let Some(at) = self.at(serial) {
            self.become_status(at, Status::Waiting);
        }
        let all = self.together(serial);
        let done = |s: &u64| self.at(*s).is_none_or(|at| self.list[at].status.is_completed());
        if !all.iter().all(done) && !Bug::here().is(Mutant::CommitAlone) {
            return;
        }
        let mut by_hand = false;
        for &one in &all {
            let Some(at) = self.at(one) else { continue };
            if self.list[at].status != Status::Waiting {
                continue;
            }
            self.become_status(at, Status::Pending);
            let job = &self.list[at];
            if !job.auto_finalize {
                by_hand = true;
                if job.kind.is_block() {
                    self.out.push(JobEvent::Pending(job.kind, job.id.clone()));
                }
            }
        }
        if !by_hand {
            self.do_finalize(graph, serial);
        }
    }

    /// All prepare, then all commit; or all abort.
    pub(super) fn do_finalize(&mut self, graph: &mut Graph, serial: u64) {
        let all = self.together(serial);
        for &one in &all {
            let Some(job) = self.get(one) else { continue };
            let Some(mut work) = job.work.take() else { continue };
            let done = work.prepare(graph);
            let Some(job) = self.get(one) else { continue };
            job.work = Some(work);
            if let Err(e) = done {
                job.error = Some(e);
                self.settle(one);
                self.abort_all(graph, one);
                return;
            }
        }
        for one in all {
            self.conclude(graph, one);
        }
    }

    /// One has failed: all others of its transaction are cancelled, and all are concluded.
    fn abort_all(&mut self, graph: &mut Graph, serial: u64) {
        let all = self.together(serial);
        for &one in all.iter().filter(|o| **o != serial) {
            self.tell_cancel(one, true);
        }
        for &one in &all {
            self.wait_end(one);
            self.conclude(graph, one);
        }
    }

    /// Says the cancel, and answers whether it is the kind that throws the result away.
    fn tell_cancel(&mut self, serial: u64, force: bool) -> bool {
        let Some(job) = self.get(serial) else { return false };
        let ready = matches!(job.status, Status::Ready | Status::Standby);
        // Also while it waits to be finalized: then it can only be thrown away.
        let force = force || !job.softly || !ready;
        job.user_paused = false;
        if force || !job.done {
            job.cancelled = true;
            job.forced |= force;
        }
        job.shared.tell(|s| {
            s.pause = false;
            s.cancel |= force;
            s.soft_cancel = true;
        });
        force
    }

    /// Cancels a job in whatever state it is.
    pub(super) fn cancel_now(&mut self, graph: &mut Graph, serial: u64, force: bool) {
        let Some(at) = self.at(serial) else { return };
        if matches!(self.list[at].status, Status::Aborting | Status::Concluded | Status::Null) {
            return;
        }
        let force = self.tell_cancel(serial, force);
        let Some(job) = self.get(serial) else { return };
        if !job.started {
            self.completed(graph, serial);
        } else if job.done && force {
            // Waiting or pending.
            self.settle(serial);
            self.abort_all(graph, serial);
        }
    }

    /// Commits or aborts one job, tells how it ended, and forgets it if that was asked for.
    fn conclude(&mut self, graph: &mut Graph, serial: u64) {
        let failed = self.settle(serial);
        let Some(job) = self.get(serial) else { return };
        if job.status == Status::Concluded {
            return;
        }
        let mut lingers = false;
        let mut work = job.work.take();
        if let Some(work) = &mut work {
            if failed {
                work.abort(graph);
            } else {
                work.commit(graph);
            }
            work.clean(graph);
            lingers = work.lingers(failed);
        }
        let lonely = self.serial();
        let Some(at) = self.at(serial) else { return };
        let job = &mut self.list[at];
        job.work = work.filter(|_| lingers);
        job.txn = lonely;
        if !lingers {
            job.nodes.clear();
        }
        job.user_paused = false;
        if job.started && job.kind.is_block() {
            let (report, error) = (job.report(), job.error.as_ref().map(|e| e.desc.clone()));
            let event = match job.forced {
                true => JobEvent::Cancelled(report),
                false => JobEvent::Completed(report, error),
            };
            self.out.push(event);
        }
        let forget = job.auto_dismiss || !job.started;
        self.become_status(at, Status::Concluded);
        if forget {
            self.forget(graph, serial);
        }
    }
}
