//! Which events there are, what they carry, and how often they may come.
//!
//! Owns: the table, and the rate limits. Never: when an event happens (`control/` emits it), who
//! gets it (`server.rs`). Threads: control. Locks: none.

use super::schema::{Member, Object, Ty, Value};
use crate::control::vm::QmpEvent;
use crate::jobs::table::{Kind, Status};
use crate::qapi::Wire;
use crate::wire_enum;
use serde_json::json;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// One kind of event.
pub struct EventDef {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its documentation, line by line.
    pub doc: &'static [&'static str],
    /// What it carries.
    pub data: Ty,
    /// The members of its data.
    pub members: fn() -> Vec<Member>,
    /// How often it may come.
    pub limit: Limit,
}

/// How often an event may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// As often as it happens.
    None,
    /// Once a second.
    Kind,
    /// Once a second for each value of this member.
    Member(&'static str),
}

/// Declares events. `limited` before the data: at most one a second; `limited by "member"`: at
/// most one a second for each value of that member.
macro_rules! events {
    (
        $(#[doc = $tdoc:literal])*
        $vis:vis static $TABLE:ident;
        $(
            $(#[doc = $doc:literal])*
            $name:literal $(limited $($key:literal)?)? { $(
                $(#[doc = $fdoc:literal])*
                $($wire:literal)? $field:ident : $T:ty
            ),* $(,)? };
        )*
    ) => {
        $(#[doc = $tdoc])*
        $vis static $TABLE: &[EventDef] = &[$(
            EventDef {
                name: $name,
                doc: &[$($doc),*],
                data: $crate::command_args!(type concat!($name, "-data"), {
                    $( $(#[doc = $fdoc])* $($wire)? $field: $T ),*
                }),
                members: || {
                    #[allow(unused_mut)]
                    let mut list = Vec::new();
                    $( <$T as Wire>::describe_member(
                        $crate::wire_name!($($wire)? $field),
                        &[$($fdoc),*],
                        &mut list,
                    ); )*
                    list
                },
                limit: events!(limit $(limited $($key)?)?),
            }
        ),*];
    };
    (limit) => { Limit::None };
    (limit limited) => { Limit::Kind };
    (limit limited $key:literal) => { Limit::Member($key) };
}

events! {
    /// Every event.
    pub static EVENTS;

    /// The VM has ended, or stopped for good: the process exits, or waits in run state
    /// `shutdown`.
    "SHUTDOWN" {
        /// The guest did it.
        guest: bool,
        /// Who wanted it, and why.
        reason: ShutdownCause,
    };

    /// The power button was pressed. The guest may ignore it.
    "POWERDOWN" {};

    /// The VM was reset.
    "RESET" {
        /// The guest did it.
        guest: bool,
        /// Who wanted it, and why.
        reason: ShutdownCause,
    };

    /// The processors have stopped.
    "STOP" {};

    /// The processors run again.
    "RESUME" {};

    /// The guest has set its clock.
    "RTC_CHANGE" limited {
        /// Seconds by which it is ahead of the host's.
        offset: i64,
        /// The clock's path.
        "qom-path" qom_path: String,
    };

    /// A request of the guest failed on a disk.
    "BLOCK_IO_ERROR" limited "qom-path" {
        /// The guest device's path.
        "qom-path" qom_path: String,
        /// The drive's name, or "".
        device: String,
        /// The node's name, unless it is an automatic one.
        "node-name" node_name: Option<String>,
        /// What failed.
        operation: IoOperationType,
        /// What is done about it.
        action: BlockErrorAction,
        /// It failed for lack of space.
        nospace: Option<bool>,
        /// The error in words, for people.
        reason: String,
    };

    /// An image was found to contradict itself. From a fatal one on it can only be read, until it
    /// was checked and repaired.
    "BLOCK_IMAGE_CORRUPTED" {
        /// The name of the drive that it is in, or "".
        device: String,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// What is wrong, for people.
        msg: String,
        /// Where in the image file, in bytes, if it is about a place.
        offset: Option<i64>,
        /// How many bytes there.
        size: Option<i64>,
        /// The image is marked as corrupt and not written any more.
        fatal: bool,
    };

    /// An export is gone: nothing uses its node any more on its behalf.
    "BLOCK_EXPORT_DELETED" {
        /// Its id.
        id: String,
    };

    /// Too few children of a quorum could do something, or agreed.
    "QUORUM_FAILURE" limited {
        /// The drive or node.
        reference: String,
        /// Where, in units of 512 bytes.
        "sector-num" sector_num: i64,
        /// How many of them.
        "sectors-count" sectors_count: i64,
    };

    /// A child of a quorum failed, or was outvoted.
    "QUORUM_REPORT_BAD" limited "node-name" {
        /// What it was asked to do.
        "type" op: QuorumOpType,
        /// The error in words; none: it was outvoted.
        error: Option<String>,
        /// The child's node.
        "node-name" node_name: String,
        /// Where, in units of 512 bytes.
        "sector-num" sector_num: i64,
        /// How many of them.
        "sectors-count" sectors_count: i64,
    };

    /// The tray of a drive has moved, by the user's will or the guest's.
    "DEVICE_TRAY_MOVED" {
        /// The drive's name, or "".
        device: String,
        /// The guest device's id, or its path if it has none.
        id: String,
        /// It is open now.
        "tray-open" tray_open: bool,
    };

    /// A guest device is gone; its id and its drive are free.
    "DEVICE_DELETED" {
        /// Its id, if it had one.
        device: Option<String>,
        /// Its path.
        path: String,
    };

    /// A write went beyond a node's write threshold, which is off now.
    "BLOCK_WRITE_THRESHOLD" {
        /// The node.
        "node-name" node_name: String,
        /// By how many bytes.
        "amount-exceeded" exceeded: u64,
        /// The threshold, in bytes.
        "write-threshold" threshold: u64,
    };

    /// A job has changed its state.
    "JOB_STATUS_CHANGE" {
        /// The job.
        id: String,
        /// Its state now.
        status: JobStatus,
    };

    /// A block job is in sync: it keeps the target so until `block-job-complete` or
    /// `block-job-cancel`.
    "BLOCK_JOB_READY" {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        device: String,
        /// How much there is to do, in bytes.
        len: u64,
        /// How much is done.
        offset: u64,
        /// Its limit in bytes per second; 0: none.
        speed: u64,
    };

    /// A block job has ended by itself.
    "BLOCK_JOB_COMPLETED" {
        /// What it did.
        "type" kind: JobType,
        /// The job.
        device: String,
        /// How much there was to do, in bytes.
        len: u64,
        /// How much is done.
        offset: u64,
        /// Its limit in bytes per second; 0: none.
        speed: u64,
        /// Why it failed, if it did.
        error: Option<String>,
    };

    /// A block job was cancelled.
    "BLOCK_JOB_CANCELLED" {
        /// What it did.
        "type" kind: JobType,
        /// The job.
        device: String,
        /// How much there was to do, in bytes.
        len: u64,
        /// How much was done.
        offset: u64,
        /// Its limit in bytes per second; 0: none.
        speed: u64,
    };

    /// A request of a block job failed.
    "BLOCK_JOB_ERROR" {
        /// The job.
        device: String,
        /// Reading from the source, or writing to the target.
        operation: IoOperationType,
        /// What is done about it; `stop` pauses the job.
        action: BlockErrorAction,
    };

    /// A block job is done but for its last step, and waits for `block-job-finalize`.
    "BLOCK_JOB_PENDING" {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        id: String,
    };
}

wire_enum! {
    /// What a job does.
    pub enum JobType {
        /// Writes images down into one below them.
        "commit" Commit,
        /// Pulls the contents of backing files up.
        "stream" Stream,
        /// Copies a disk, and what is written to it meanwhile.
        "mirror" Mirror,
        /// Copies a disk as it was at the start.
        "backup" Backup,
        /// Makes an image.
        "create" Create,
    }
}

impl From<Kind> for JobType {
    fn from(kind: Kind) -> JobType {
        match kind {
            Kind::Commit => JobType::Commit,
            Kind::Stream => JobType::Stream,
            Kind::Mirror => JobType::Mirror,
            Kind::Backup => JobType::Backup,
            Kind::Create => JobType::Create,
        }
    }
}

wire_enum! {
    /// Where a job is in its life.
    pub enum JobStatus {
        /// It has a name, and does not run yet.
        "created" Created,
        /// It works.
        "running" Running,
        /// It was told to pause, or an error paused it.
        "paused" Paused,
        /// In sync.
        "ready" Ready,
        /// Paused while in sync.
        "standby" Standby,
        /// Its work is done; others of its transaction still work.
        "waiting" Waiting,
        /// Its work is done; its last step is not.
        "pending" Pending,
        /// It failed, or was cancelled.
        "aborting" Aborting,
        /// It is over, and can be looked at until it is dismissed.
        "concluded" Concluded,
        /// It is forgotten.
        "null" Null,
    }
}

impl From<Status> for JobStatus {
    fn from(status: Status) -> JobStatus {
        match status {
            Status::Created => JobStatus::Created,
            Status::Running => JobStatus::Running,
            Status::Paused => JobStatus::Paused,
            Status::Ready => JobStatus::Ready,
            Status::Standby => JobStatus::Standby,
            Status::Waiting => JobStatus::Waiting,
            Status::Pending => JobStatus::Pending,
            Status::Aborting => JobStatus::Aborting,
            Status::Concluded => JobStatus::Concluded,
            Status::Null => JobStatus::Null,
        }
    }
}

wire_enum! {
    /// What a child of a quorum was asked to do.
    pub enum QuorumOpType {
        /// To read.
        "read" Read,
        /// To write.
        "write" Write,
        /// To make what was written durable.
        "flush" Flush,
    }
}

wire_enum! {
    /// Who wanted a shutdown or reset, and why.
    pub enum ShutdownCause {
        /// `quit`.
        "host-qmp-quit" HostQmpQuit,
        /// `system_reset`.
        "host-qmp-system-reset" HostQmpSystemReset,
        /// A signal such as SIGINT.
        "host-signal" HostSignal,
        /// The console.
        "host-ui" HostUi,
        /// The guest switched itself off.
        "guest-shutdown" GuestShutdown,
        /// The guest asked for a reset.
        "guest-reset" GuestReset,
    }
}

wire_enum! {
    /// Reading or writing.
    pub enum IoOperationType {
        /// Reading.
        "read" Read,
        /// Writing.
        "write" Write,
    }
}

wire_enum! {
    /// What is done about a failed request.
    pub enum BlockErrorAction {
        /// The guest is told that it succeeded.
        "ignore" Ignore,
        /// The guest is told.
        "report" Report,
        /// The VM stops, and tries again after `cont`.
        "stop" Stop,
    }
}

/// The event as it is sent.
pub fn message(e: &QmpEvent) -> Value {
    let since = e.time.duration_since(UNIX_EPOCH);
    // QEMU's way to say that the clock is no good.
    let (seconds, micros) =
        since.map_or((-1, -1), |d| (d.as_secs().cast_signed(), i64::from(d.subsec_micros())));
    let mut out = Object::new();
    out.insert("timestamp".into(), json!({ "seconds": seconds, "microseconds": micros }));
    out.insert("event".into(), e.name.into());
    if let Some(data) = &e.data {
        out.insert("data".into(), Value::Object(data.clone()));
    }
    Value::Object(out)
}

/// The window of a limited event: at most one goes out in it.
#[derive(Debug)]
struct Window {
    kind: &'static str,
    /// The value of the deciding member; null where the kind alone decides.
    key: Value,
    ends: Instant,
    /// The last event that came within it.
    held: Option<QmpEvent>,
}

/// Holds events back that come too often: the first goes out at once and opens a window of a
/// second; of those that come within it the last is kept and goes out when the window ends, which
/// opens the next one.
#[derive(Debug, Default)]
pub struct Limiter {
    windows: Vec<Window>,
}

/// The length of a window.
const WINDOW: Duration = Duration::from_secs(1);

impl Limiter {
    /// Passes the event on, or keeps it.
    pub fn admit(&mut self, e: QmpEvent, now: Instant) -> Option<QmpEvent> {
        let def = EVENTS.iter().find(|d| d.name == e.name);
        debug_assert!(def.is_some_and(|d| fits(d, &e)), "{e:?} is not what the table says");
        let key = match def.map_or(Limit::None, |d| d.limit) {
            Limit::None => return Some(e),
            Limit::Kind => Value::Null,
            Limit::Member(name) => {
                e.data.as_ref().and_then(|data| data.get(name)).cloned().unwrap_or_default()
            }
        };
        match self.windows.iter_mut().find(|w| w.kind == e.name && w.key == key) {
            Some(w) => {
                w.held = Some(e);
                None
            }
            None => {
                self.windows.push(Window { kind: e.name, key, ends: now + WINDOW, held: None });
                Some(e)
            }
        }
    }

    /// Ends the windows whose time is over; returns what was kept in them.
    pub fn due(&mut self, now: Instant) -> Vec<QmpEvent> {
        let mut out = Vec::new();
        self.windows.retain_mut(|w| {
            if w.ends > now {
                return true;
            }
            let Some(e) = w.held.take() else { return false };
            out.push(e);
            w.ends = now + WINDOW;
            true
        });
        out
    }

    /// True while any window is open.
    pub fn waits(&self) -> bool {
        !self.windows.is_empty()
    }

    /// When something is to be sent, at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.windows.iter().filter(|w| w.held.is_some()).map(|w| w.ends).min()
    }
}

/// Has the event the members that its definition has?
fn fits(def: &EventDef, e: &QmpEvent) -> bool {
    let members = (def.members)();
    let none = Object::new();
    let data = e.data.as_ref().unwrap_or(&none);
    data.keys().all(|key| members.iter().any(|m| m.name == key))
        && members.iter().all(|m| m.optional || data.contains_key(m.name))
}

#[cfg(test)]
#[path = "event_test.rs"]
mod tests;
