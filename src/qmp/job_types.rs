//! What the commands that start jobs have in common.
//!
//! Owns: words. Never: a job. Threads: control. Locks: none.

use crate::block::handle::OnError;
use crate::{wire_enum, wire_struct};

wire_enum! {
    /// What a job does about a failed request.
    pub enum BlockdevOnError {
        /// It ends.
        "report" Report,
        /// It tries again.
        "ignore" Ignore,
        /// It pauses when there is no space left, and ends otherwise.
        "enospc" Enospc,
        /// It pauses.
        "stop" Stop,
        /// As `enospc`.
        "auto" Auto,
    }
    default Report
}

impl From<BlockdevOnError> for OnError {
    fn from(word: BlockdevOnError) -> OnError {
        match word {
            BlockdevOnError::Report => OnError::Report,
            BlockdevOnError::Ignore => OnError::Ignore,
            BlockdevOnError::Enospc => OnError::Enospc,
            BlockdevOnError::Stop => OnError::Stop,
            BlockdevOnError::Auto => OnError::Auto,
        }
    }
}

wire_enum! {
    /// What is copied.
    pub enum MirrorSyncMode {
        /// What is in the uppermost image.
        "top" Top,
        /// All of the disk.
        "full" Full,
        /// What is written from now on.
        "none" None,
        /// What the bitmap says, which forgets it when all of it was copied.
        "incremental" Incremental,
        /// What the bitmap says.
        "bitmap" Bitmap,
    }
}

wire_enum! {
    /// When a bitmap forgets what a job has copied.
    pub enum BitmapSyncMode {
        /// When the job succeeds.
        "on-success" OnSuccess,
        /// Never.
        "never" Never,
        /// Whatever was copied, also when the job fails.
        "always" Always,
    }
}

wire_enum! {
    /// When the jobs of a transaction are done.
    pub enum ActionCompletionMode {
        /// Each for itself.
        "individual" Individual,
        /// All together: when one fails, all fail.
        "grouped" Grouped,
    }
    default Individual
}

wire_struct! {
    /// How a transaction's jobs go together.
    pub struct TransactionProperties {
        /// When they are done.
        "completion-mode" completion_mode: Option<ActionCompletionMode>,
    }
}
