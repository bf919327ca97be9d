//! What a user tells jobs, and what comes of it.
//!
//! Owns: QEMU's texts about that. Never: how a job lives and ends (`registry.rs`, `txn.rs`). Threads: control
//! only. Locks: a job's own, for moments.

use super::registry::{Job, JobKey, Jobs};
use super::table::{Status, Verb};
use crate::bail;
use crate::block::graph::Graph;
use crate::block::handle::IoStatus;
use crate::error::{Error, Result};

impl Jobs {
    fn verb(&mut self, job: JobKey, verb: Verb) -> Result<&mut Job> {
        let job = self.get(job.0).ok_or_else(|| Error::new("Job not found"))?;
        verb.check(&job.id, job.status)?;
        Ok(job)
    }

    /// Pauses it after the request in hand.
    pub fn pause(&mut self, job: JobKey) -> Result<()> {
        let job = self.verb(job, Verb::Pause)?;
        if job.user_paused {
            bail!("Job is already paused");
        }
        job.user_paused = true;
        job.shared.tell(|s| s.pause = true);
        Ok(())
    }

    /// Lets it go on, after a pause or an error.
    pub fn resume(&mut self, job: JobKey) -> Result<()> {
        let paused = self.get(job.0).is_some_and(|j| j.user_paused);
        if !paused {
            bail!("Can't resume a job that was not paused");
        }
        let job = self.verb(job, Verb::Resume)?;
        job.user_paused = false;
        job.shared.tell(|s| {
            s.pause = false;
            s.io_status = IoStatus::Ok;
        });
        Ok(())
    }

    /// Another limit, in bytes per second; 0: none.
    pub fn set_speed(&mut self, job: JobKey, speed: i64) -> Result<()> {
        let job = self.verb(job, Verb::SetSpeed)?;
        let Ok(speed) = u64::try_from(speed) else {
            bail!("Parameter 'speed' expects a non-negative value");
        };
        job.shared.set_speed(speed);
        Ok(())
    }

    /// A ready job: end, with the last step.
    pub fn complete(&mut self, job: JobKey) -> Result<()> {
        let job = self.verb(job, Verb::Complete)?;
        if job.cancelled || !job.completes {
            bail!("The active block job '{}' cannot be completed", job.id);
        }
        job.shared.tell(|s| s.complete = true);
        Ok(())
    }

    /// `job-cancel` (always with `force`), and `block-job-cancel` once it is known that the job is not
    /// paused.
    pub fn cancel(&mut self, graph: &mut Graph, job: JobKey, force: bool) -> Result<()> {
        let serial = self.verb(job, Verb::Cancel)?.serial;
        self.cancel_now(graph, serial, force);
        Ok(())
    }

    /// `block-job-cancel`.
    pub fn cancel_block(&mut self, graph: &mut Graph, job: JobKey, force: bool) -> Result<()> {
        let of = self.get(job.0).ok_or_else(|| Error::new("Job not found"))?;
        if of.user_paused && !force {
            bail!("The block job for device '{}' is currently paused", of.id);
        }
        self.cancel(graph, job, force)
    }

    /// Cancels a job that does not run yet (its command failed after all), or any other, and waits.
    pub fn cancel_sync(&mut self, graph: &mut Graph, job: JobKey) {
        self.cancel_now(graph, job.0, true);
        self.finish(graph, job.0);
    }

    /// The end of the process: cancels all, and waits.
    pub fn cancel_all(&mut self, graph: &mut Graph) {
        let all: Vec<u64> = self.list.iter().map(|j| j.serial).collect();
        for &serial in &all {
            if let Some(job) = self.get(serial)
                && job.status.is_active()
            {
                // All at once, rather than one after the other.
                job.shared.tell(|s| s.cancel = true);
            }
        }
        for serial in all {
            self.cancel_now(graph, serial, true);
            self.finish(graph, serial);
            if self.get(serial).is_some_and(|j| j.status == Status::Concluded) {
                self.forget(graph, serial);
            }
        }
    }

    /// Waits for a job that was told to end, and concludes it.
    fn finish(&mut self, graph: &mut Graph, serial: u64) {
        let active = self.get(serial).is_some_and(|j| !j.done && j.started);
        if active {
            self.wait_end(serial);
            self.completed(graph, serial);
        }
    }

    /// A pending job: makes it good, with all of its transaction.
    pub fn finalize(&mut self, graph: &mut Graph, job: JobKey) -> Result<()> {
        let serial = self.verb(job, Verb::Finalize)?.serial;
        self.do_finalize(graph, serial);
        Ok(())
    }

    /// Forgets a concluded job.
    pub fn dismiss(&mut self, graph: &mut Graph, job: JobKey) -> Result<()> {
        let serial = self.verb(job, Verb::Dismiss)?.serial;
        self.forget(graph, serial);
        Ok(())
    }

    pub(super) fn forget(&mut self, graph: &mut Graph, serial: u64) {
        if let Some(at) = self.at(serial) {
            self.become_status(at, Status::Null);
            if let Some(mut work) = self.list.remove(at).work {
                work.dismiss(graph);
            }
        }
    }
}
