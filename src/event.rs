//! What the worker threads tell the control thread: the vocabulary of the inbox.
//!
//! Owns: the list of things that can happen below the control thread. Never: decides what they
//! lead to (`control/` does). Threads: any posts, control takes. Locks: the inbox's own, a leaf.

use crate::sys::inbox::Inbox;
use std::sync::Arc;

/// Something that happened on a vCPU, worker or job thread and needs the control thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest asked for a reset (keyboard controller, ACPI reset register, triple fault).
    Reset,
    /// The guest switched itself off (ACPI S5).
    Shutdown,
    /// The guest set the real-time clock: offset in seconds from the host's clock.
    RtcChange {
        /// Seconds by which the guest's clock is now ahead of the host's.
        offset: i64,
    },
    /// A guest request failed on a disk.
    BlockIoError(BlockIoError),
    /// A write went beyond a node's write threshold, which is off now.
    WriteThreshold {
        /// The node.
        node_name: String,
        /// By how many bytes.
        exceeded: u64,
        /// The threshold, in bytes.
        threshold: u64,
    },
    /// An image was found corrupt.
    ImageCorrupted {
        /// The node.
        node_name: String,
        /// What is wrong.
        msg: String,
        /// Where in the image file, if it is about a place: offset and length in bytes.
        at: Option<(u64, u64)>,
        /// It is not written any more.
        fatal: bool,
    },
    /// A child of a quorum failed, or was outvoted.
    QuorumReportBad {
        /// What it was asked to do.
        op: QuorumOp,
        /// The error in words; none: it was outvoted.
        error: Option<String>,
        /// The child.
        node_name: String,
        /// Where, in units of 512 bytes.
        sector_num: u64,
        /// How many of them.
        sectors_count: u64,
    },
    /// Too few children of a quorum could do something, or agreed.
    QuorumFailure {
        /// The quorum.
        node_name: String,
        /// Where, in units of 512 bytes.
        sector_num: u64,
        /// How many of them.
        sectors_count: u64,
    },
    /// The guest moved the tray of a drive, or a reset closed it.
    TrayMoved {
        /// QOM path of the guest device.
        qom_path: String,
        /// It is open now.
        open: bool,
    },
    /// A guest device is gone.
    DeviceDeleted {
        /// Its id, or "".
        id: String,
        /// Its QOM path.
        qom_path: String,
    },
    /// A vCPU thread cannot go on; the text says why.
    VcpuFailed {
        /// Which vCPU.
        cpu: usize,
        /// Why, for the log.
        why: String,
    },
    /// The guest wrote a test program's exit code to the debug-exit port.
    DebugExit {
        /// The process's exit status.
        status: u8,
    },
    /// The user typed the console's quit sequence (`Ctrl-A x`).
    ConsoleQuit,
    /// The thread of the block job with this serial number has something to say.
    Job(u64),
    /// The last client of an export that is being closed has gone.
    ExportIdle,
    /// Call the control loop: something it watches has changed (no other meaning).
    Wake,
}

/// What a child of a quorum was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuorumOp {
    /// To read.
    Read,
    /// To write, or to write zeroes.
    Write,
    /// To make what was written durable.
    Flush,
}

impl QuorumOp {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            QuorumOp::Read => "read",
            QuorumOp::Write => "write",
            QuorumOp::Flush => "flush",
        }
    }
}

/// The data of QMP's `BLOCK_IO_ERROR`, and whether the VM must stop for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockIoError {
    /// QOM path of the guest device.
    pub qom_path: String,
    /// Legacy drive name, or "".
    pub device: String,
    /// The root node's name, if it is not an automatic one.
    pub node_name: Option<String>,
    /// True for a read.
    pub read: bool,
    /// What is done: report, ignore or stop.
    pub action: ErrorAction,
    /// True for ENOSPC.
    pub nospace: bool,
    /// strerror text.
    pub reason: String,
}

/// What is done about a failed guest request (`BlockErrorAction`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// Tell the guest that it succeeded.
    Ignore,
    /// Fail the guest's request.
    Report,
    /// Stop the VM and try the request again after `cont`.
    Stop,
}

/// The control thread's inbox, as every other thread holds it.
pub type Events = Arc<Inbox<Event>>;
