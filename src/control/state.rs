//! The run state of the VM, and which changes of it are legal.
//!
//! Owns: the table. Never: acts (`vm.rs` does). Threads: control. Locks: none.

/// QMP's `RunState`, as far as a VM of ours can be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Nothing has run since the start or since the last reset.
    Prelaunch,
    /// The processors run.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Stopped because a disk failed and its policy says so; `cont` tries the request again.
    IoError,
    /// The guest has switched itself off, and the policy is to keep the process.
    Shutdown,
    /// A processor cannot go on.
    InternalError,
}

impl RunState {
    /// All of them, in the order of QMP's schema.
    pub const ALL: [RunState; 6] = [
        RunState::InternalError,
        RunState::IoError,
        RunState::Paused,
        RunState::Prelaunch,
        RunState::Running,
        RunState::Shutdown,
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::IoError => "io-error",
            RunState::Shutdown => "shutdown",
            RunState::InternalError => "internal-error",
        }
    }

    /// True for [`RunState::Running`] alone.
    pub fn is_running(self) -> bool {
        self == RunState::Running
    }

    /// True where only a reset leads on: `cont` is refused.
    pub fn needs_reset(self) -> bool {
        matches!(self, RunState::Shutdown | RunState::InternalError)
    }

    /// May the VM go from this state to `next`? (A state may always be kept.)
    pub fn may_become(self, next: RunState) -> bool {
        use RunState::*;
        match (self, next) {
            (a, b) if a == b => true,
            // Whatever stops a VM stops one that runs.
            (Running, Paused | IoError | Shutdown | InternalError) => true,
            // A reset of a stopped VM.
            (_, Prelaunch) => self != Running,
            (Prelaunch | Paused | IoError, Running) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
