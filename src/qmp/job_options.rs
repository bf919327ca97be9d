//! What the commands that start jobs have in common.
//!
//! Owns: their common words and arguments, and QEMU's texts about them. Never: what a job does. Threads: control.
//! Locks: none.

use super::schema::Cx;
use crate::bail;
use crate::block::handle::OnError;
use crate::block::node::Node;
use crate::error::{Error, Result};
use crate::jobs::layers;
use crate::jobs::registry::Spec;
use crate::jobs::table::Kind;
use crate::{wire_enum, wire_struct};
use std::sync::Arc;

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

wire_struct! {
    /// Arguments of every job.
    pub struct JobOptions {
        /// The job's name (default: the drive's).
        "job-id" job_id: Option<String>,
        /// The disk.
        device: String,
        /// Bytes per second (default: 0, no limit).
        speed: Option<i64>,
        /// Do the last step without being told to (default: true).
        "auto-finalize" auto_finalize: Option<bool>,
        /// Be forgotten without being told to (default: true).
        "auto-dismiss" auto_dismiss: Option<bool>,
    }
}

/// A job's name: the one given, or the drive's; "" if there is none.
pub(super) fn job_id(cx: &Cx, given: Option<&str>, node: &Arc<Node>) -> String {
    given.or_else(|| cx.vm.drive_of(node)).unwrap_or_default().to_string()
}

/// What a job is made with, on the disk `node`.
pub(super) fn spec(cx: &Cx, kind: Kind, o: &JobOptions, node: &Arc<Node>) -> Spec {
    let id = job_id(cx, o.job_id.as_deref(), node);
    Spec {
        speed: o.speed.unwrap_or(0),
        auto_finalize: o.auto_finalize.unwrap_or(true),
        auto_dismiss: o.auto_dismiss.unwrap_or(true),
        ..Spec::new(id, kind)
    }
}

/// The node called `name`, for arguments that name nodes only.
pub(super) fn by_node_name(cx: &Cx, name: &str) -> Result<Arc<Node>> {
    let lost = || Error::new(format!("Cannot find device='' nor node-name='{name}'"));
    cx.vm.graph.find(name).cloned().ok_or_else(lost)
}

/// The image below `top` in its chain whose file is called `name`: as the image above records it, or
/// as a path to the same file (QEMU's bdrv_find_backing_image).
pub(super) fn find_backing(top: &Arc<Node>, name: &str) -> Option<Arc<Node>> {
    let real = |path: &str| std::fs::canonicalize(path).ok();
    let mut chain = layers::chain(top.clone());
    let mut above = chain.next()?;
    for node in chain {
        let recorded = above.driver.info().backing_filename;
        let file = super::cmd_query_block::file_name(&node);
        if recorded.as_deref() == Some(name) || file == name {
            return Some(node);
        }
        let own = crate::block::filename::origin(&above);
        let meant = crate::block::open::combine(&own, name);
        if let (Some(a), Some(b)) = (real(&meant), real(&file))
            && a == b
        {
            return Some(node);
        }
        above = node;
    }
    None
}

/// The image below `top`, which messages call `device`, with that file name; or QEMU's text.
pub(super) fn need_backing(top: &Arc<Node>, name: &str) -> Result<Arc<Node>> {
    match find_backing(top, name) {
        Some(node) => Ok(node),
        None => bail!("Can't find '{name}' in the backing chain"),
    }
}

/// True when `node` is `top` or below it in the chain.
pub(super) fn in_chain(top: &Arc<Node>, node: &Arc<Node>) -> bool {
    layers::nodes(top).any(|n| Arc::ptr_eq(&n, node))
}
