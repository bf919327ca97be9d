//! Which events there are, what they carry, and how often they may come.
//!
//! Owns: the table, and the rate limits. Never: when an event happens (`control/` emits it), who
//! gets it (`server.rs`). Threads: control. Locks: none.

use super::schema::{Member, Ty};
use crate::qapi::Wire;
use crate::wire_enum;

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
