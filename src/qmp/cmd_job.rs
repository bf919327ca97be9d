//! Jobs: what there are, and what they are told.
//!
//! Owns: the commands' form. Never: how a job lives (`jobs/`). Threads: control. Locks: none.

use super::event::{JobStatus, JobType};
use super::query_block_types::BlockDeviceIoStatus;
use super::schema::Cx;
use crate::block::handle::IoStatus;
use crate::error::Result;
use crate::jobs::registry::JobInfo as Info;
use crate::{commands, wire_struct};

commands! {
    /// Jobs.
    pub static JOB;

    /// All block jobs.
    "query-block-jobs" => query_block_jobs {} -> Vec<BlockJobInfo>;

    /// All jobs.
    "query-jobs" => query_jobs {} -> Vec<JobInfo>;

    /// Limits how fast a block job copies.
    "block-job-set-speed" => set_speed {
        /// The job.
        device: String,
        /// Bytes per second; 0: no limit.
        speed: i64,
    } -> ();

    /// Ends a block job. What it has done is thrown away, unless it is a mirror in sync.
    "block-job-cancel" => block_cancel {
        /// The job.
        device: String,
        /// Also a paused one, and a mirror in sync without a result.
        force: Option<bool>,
    } -> ();

    /// Pauses a block job after the request in hand.
    "block-job-pause" => block_pause {
        /// The job.
        device: String,
    } -> ();

    /// Lets a block job go on, after a pause or an error.
    "block-job-resume" => block_resume {
        /// The job.
        device: String,
    } -> ();

    /// Ends a block job that is in sync, with its last step: the disk switches over.
    "block-job-complete" => block_complete {
        /// The job.
        device: String,
    } -> ();

    /// Forgets a concluded block job.
    "block-job-dismiss" => block_dismiss {
        /// The job.
        id: String,
    } -> ();

    /// Does the last step of a pending block job, and of all in its transaction.
    "block-job-finalize" => block_finalize {
        /// The job.
        id: String,
    } -> ();

    /// Ends a job; what it has done is thrown away.
    "job-cancel" => cancel {
        /// The job.
        id: String,
    } -> ();

    /// Pauses a job after the request in hand.
    "job-pause" => pause {
        /// The job.
        id: String,
    } -> ();

    /// Lets a job go on, after a pause or an error.
    "job-resume" => resume {
        /// The job.
        id: String,
    } -> ();

    /// Ends a job that is in sync, with its last step.
    "job-complete" => complete {
        /// The job.
        id: String,
    } -> ();

    /// Forgets a concluded job.
    "job-dismiss" => dismiss {
        /// The job.
        id: String,
    } -> ();

    /// Does the last step of a pending job, and of all in its transaction.
    "job-finalize" => finalize {
        /// The job.
        id: String,
    } -> ();
}

wire_struct! {
    /// A block job.
    pub struct BlockJobInfo {
        /// What it does.
        "type" kind: JobType,
        /// Its id.
        device: String,
        /// How much there is to do, in bytes, as far as it is known.
        len: u64,
        /// How much is done.
        offset: u64,
        /// It does something at the moment: it does not wait for anything but the disk.
        busy: bool,
        /// A user has paused it, or an error.
        paused: bool,
        /// Its limit in bytes per second; 0: none.
        speed: u64,
        /// Of the error that paused it.
        "io-status" io_status: BlockDeviceIoStatus,
        /// It is in sync.
        ready: bool,
        /// Its state.
        status: JobStatus,
        /// It does its last step without being told to.
        "auto-finalize" auto_finalize: bool,
        /// It is forgotten without being told to.
        "auto-dismiss" auto_dismiss: bool,
        /// Why it failed.
        error: Option<String>,
        /// A mirror that has the guest write to both sides does so now.
        "actively-synced" actively_synced: Option<bool>,
    }
}

wire_struct! {
    /// A job.
    pub struct JobInfo {
        /// Its id.
        id: String,
        /// What it does.
        "type" kind: JobType,
        /// Its state.
        status: JobStatus,
        /// How much is done.
        "current-progress" current: u64,
        /// How much there is to do, as far as it is known.
        "total-progress" total: u64,
        /// Why it failed.
        error: Option<String>,
    }
}

fn query_block_jobs(cx: &mut Cx) -> Result<Vec<BlockJobInfo>> {
    let one = |j: Info| BlockJobInfo {
        kind: j.kind.into(),
        device: j.id,
        len: j.now.progress.len,
        offset: j.now.progress.offset,
        busy: j.now.busy,
        paused: j.paused,
        speed: j.now.speed,
        io_status: match j.now.io_status {
            IoStatus::Ok => BlockDeviceIoStatus::Ok,
            IoStatus::Failed => BlockDeviceIoStatus::Failed,
            IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
        },
        ready: j.ready,
        status: j.status.into(),
        auto_finalize: j.auto_finalize,
        auto_dismiss: j.auto_dismiss,
        error: j.error,
        actively_synced: j.actively_synced,
    };
    Ok(cx.vm.jobs.query().into_iter().filter(|j| j.kind.is_block()).map(one).collect())
}

fn query_jobs(cx: &mut Cx) -> Result<Vec<JobInfo>> {
    let one = |j: Info| JobInfo {
        id: j.id,
        kind: j.kind.into(),
        status: j.status.into(),
        current: j.now.progress.offset,
        total: j.now.progress.len,
        error: j.error,
    };
    Ok(cx.vm.jobs.query().into_iter().map(one).collect())
}

fn set_speed(cx: &mut Cx, device: String, speed: i64) -> Result<()> {
    let job = cx.vm.jobs.find_block(&device)?;
    cx.vm.jobs.set_speed(job, speed)
}

fn block_cancel(cx: &mut Cx, device: String, force: Option<bool>) -> Result<()> {
    let job = cx.vm.jobs.find_block(&device)?;
    cx.vm.jobs.cancel_block(&mut cx.vm.graph, job, force.unwrap_or(false))
}

fn block_pause(cx: &mut Cx, device: String) -> Result<()> {
    let job = cx.vm.jobs.find_block(&device)?;
    cx.vm.jobs.pause(job)
}

fn block_resume(cx: &mut Cx, device: String) -> Result<()> {
    let job = cx.vm.jobs.find_block(&device)?;
    cx.vm.jobs.resume(job)
}

fn block_complete(cx: &mut Cx, device: String) -> Result<()> {
    let job = cx.vm.jobs.find_block(&device)?;
    cx.vm.jobs.complete(job)
}

fn block_dismiss(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find_block(&id)?;
    cx.vm.jobs.dismiss(&mut cx.vm.graph, job)
}

fn block_finalize(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find_block(&id)?;
    cx.vm.jobs.finalize(&mut cx.vm.graph, job)
}

fn cancel(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.cancel(&mut cx.vm.graph, job, true)
}

fn pause(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.pause(job)
}

fn resume(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.resume(job)
}

fn complete(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.complete(job)
}

fn dismiss(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.dismiss(&mut cx.vm.graph, job)
}

fn finalize(cx: &mut Cx, id: String) -> Result<()> {
    let job = cx.vm.jobs.find(&id)?;
    cx.vm.jobs.finalize(&mut cx.vm.graph, job)
}

#[cfg(test)]
#[path = "cmd_job_test.rs"]
mod tests;
