//! What a job can be, and what it may be told in which state: QEMU's two matrices.
//!
//! Owns: kinds, states, verbs, and their words. Never: acts. Threads: any. Locks: none.

use crate::error::{Error, Result};

/// What a job does (QMP's `JobType`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Writes images down into one below them.
    Commit,
    /// Pulls the contents of backing files up.
    Stream,
    /// Copies a disk, and what is written to it meanwhile.
    Mirror,
    /// Copies a disk as it was at the start.
    Backup,
    /// Makes an image.
    Create,
}

impl Kind {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Commit => "commit",
            Kind::Stream => "stream",
            Kind::Mirror => "mirror",
            Kind::Backup => "backup",
            Kind::Create => "create",
        }
    }

    /// True for the jobs on disks: `query-block-jobs` and `block-job-*` know them, and they have
    /// events of their own.
    pub fn is_block(self) -> bool {
        self != Kind::Create
    }
}

/// Where a job is in its life (QMP's `JobStatus`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// It has a name, and does not run yet.
    Created,
    /// It works.
    Running,
    /// It was told to pause, and does nothing.
    Paused,
    /// Source and target are in sync and are kept so until it is told to end.
    Ready,
    /// Paused while ready.
    Standby,
    /// Its work is done; others of its transaction still work.
    Waiting,
    /// All are done; what it changes for good is still to be done.
    Pending,
    /// It failed or was cancelled.
    Aborting,
    /// It is over, and can be looked at.
    Concluded,
    /// It is forgotten.
    Null,
}

impl Status {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// The work is over, one way or another.
    pub fn is_completed(self) -> bool {
        use Status::*;
        matches!(self, Waiting | Pending | Aborting | Concluded | Null)
    }

    /// Its thread may be at work.
    pub fn is_active(self) -> bool {
        use Status::*;
        matches!(self, Running | Paused | Ready | Standby)
    }

    /// May a job go from this state to `next`?
    pub fn may_become(self, next: Status) -> bool {
        use Status::*;
        match self {
            Created => matches!(next, Running | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => next == Running,
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => next == Ready,
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => matches!(next, Aborting | Concluded),
            Concluded => next == Null,
            Null => false,
        }
    }
}

/// What a user may tell a job (QEMU's `JobVerb`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// End without a result.
    Cancel,
    /// Do nothing for a while.
    Pause,
    /// Go on.
    Resume,
    /// Another limit of bytes per second.
    SetSpeed,
    /// A ready job: end.
    Complete,
    /// A pending job: make it so.
    Finalize,
    /// A concluded job: be forgotten.
    Dismiss,
}

impl Verb {
    /// As messages name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }

    /// May a job in this state be told so?
    pub fn allowed(self, status: Status) -> bool {
        use Status::*;
        match self {
            Verb::Cancel => {
                matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(status, Ready | Standby),
            Verb::Finalize => status == Pending,
            Verb::Dismiss => status == Concluded,
        }
    }

    /// The same, with QEMU's text for "no".
    pub fn check(self, id: &str, status: Status) -> Result<()> {
        if self.allowed(status) {
            return Ok(());
        }
        let (status, verb) = (status.as_str(), self.as_str());
        Err(Error::new(format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")))
    }
}
