//! `transaction`: several actions at one moment, or none of them.
//!
//! Owns: which actions there are. Never: what one does: its own `cmd_*.rs` plans it, and all that was
//! planned happens in [`Graph::snapshot`](crate::block::graph::Graph::snapshot), in that order, while
//! the guests wait. Threads: control. Locks: none.

use super::cmd_backup::*;
use super::cmd_bitmap::*;
use super::cmd_snapshot::*;
use super::job_options::{ActionCompletionMode, TransactionProperties};
use super::schema::Cx;
use crate::error::Result;
use crate::qapi::Empty;
use crate::{bail, commands, wire_struct, wire_union};

commands! {
    /// Several actions.
    pub static TRANSACTION;

    /// Does all of this at one moment, or nothing of it. Files that were made for it stay.
    "transaction" => transaction {
        /// What to do, in order.
        actions: Vec<TransactionAction>,
        /// How its jobs go together.
        properties: Option<TransactionProperties>,
    } -> ();
}

wire_struct! {
    /// `data` of `abort`.
    pub struct AbortWrapper {
        /// Nothing.
        data: Empty,
    }
}

wire_struct! {
    /// `data` of `block-dirty-bitmap-add`.
    pub struct BlockDirtyBitmapAddWrapper {
        /// The command's arguments.
        data: BlockDirtyBitmapAdd,
    }
}

wire_struct! {
    /// `data` of the other bitmap commands.
    pub struct BlockDirtyBitmapWrapper {
        /// The command's arguments.
        data: BlockDirtyBitmap,
    }
}

wire_struct! {
    /// `data` of `block-dirty-bitmap-merge`.
    pub struct BlockDirtyBitmapMergeWrapper {
        /// The command's arguments.
        data: BlockDirtyBitmapMerge,
    }
}

wire_struct! {
    /// `data` of `blockdev-backup`.
    pub struct BlockdevBackupWrapper {
        /// The command's arguments.
        data: BlockdevBackup,
    }
}

wire_struct! {
    /// `data` of `drive-backup`.
    pub struct DriveBackupWrapper {
        /// The command's arguments.
        data: DriveBackup,
    }
}

wire_struct! {
    /// `data` of `blockdev-snapshot`.
    pub struct BlockdevSnapshotWrapper {
        /// The command's arguments.
        data: BlockdevSnapshot,
    }
}

wire_struct! {
    /// `data` of `blockdev-snapshot-internal-sync`.
    pub struct BlockdevSnapshotInternalWrapper {
        /// The command's arguments.
        data: BlockdevSnapshotInternal,
    }
}

wire_struct! {
    /// `data` of `blockdev-snapshot-sync`.
    pub struct BlockdevSnapshotSyncWrapper {
        /// The command's arguments.
        data: BlockdevSnapshotSync,
    }
}

wire_union! {
    /// A part of a transaction.
    pub struct TransactionAction {}
    /// Which.
    "type" => pub enum TransactionActionKind as kind {
        /// Fails: for tests.
        "abort" Abort(AbortWrapper),
        /// A new dirty bitmap.
        "block-dirty-bitmap-add" BitmapAdd(BlockDirtyBitmapAddWrapper),
        /// A bitmap goes.
        "block-dirty-bitmap-remove" BitmapRemove(BlockDirtyBitmapWrapper),
        /// A bitmap forgets.
        "block-dirty-bitmap-clear" BitmapClear(BlockDirtyBitmapWrapper),
        /// A bitmap notes again what is written.
        "block-dirty-bitmap-enable" BitmapEnable(BlockDirtyBitmapWrapper),
        /// A bitmap notes no more what is written.
        "block-dirty-bitmap-disable" BitmapDisable(BlockDirtyBitmapWrapper),
        /// A bitmap gets what others have.
        "block-dirty-bitmap-merge" BitmapMerge(BlockDirtyBitmapMergeWrapper),
        /// A copy of a disk as it is at the moment, to a node.
        "blockdev-backup" BlockdevBackup(BlockdevBackupWrapper),
        /// An open image on top of a disk.
        "blockdev-snapshot" Snapshot(BlockdevSnapshotWrapper),
        /// A snapshot inside an image.
        "blockdev-snapshot-internal-sync" Internal(BlockdevSnapshotInternalWrapper),
        /// A new image on top of a disk.
        "blockdev-snapshot-sync" Sync(BlockdevSnapshotSyncWrapper),
        /// A copy of a disk as it is at the moment, to a file.
        "drive-backup" DriveBackup(DriveBackupWrapper),
    }
}

fn transaction(
    cx: &mut Cx,
    actions: Vec<TransactionAction>,
    properties: Option<TransactionProperties>,
) -> Result<()> {
    let mode = properties.and_then(|p| p.completion_mode).unwrap_or_default();
    let grouped = mode == ActionCompletionMode::Grouped;
    if let Some(name) = actions.iter().filter(|_| grouped).find_map(|a| without_job(&a.kind)) {
        bail!("Action '{name}' does not support transaction property completion-mode = grouped");
    }
    run(cx, |cx, plan| {
        plan.grouped = grouped;
        actions.into_iter().try_for_each(|action| plan_action(cx, plan, action.kind))
    })
}

/// The name of an action that starts no job, and is done when the transaction is.
fn without_job(action: &TransactionActionKind) -> Option<&'static str> {
    use TransactionActionKind as Kind;
    Some(match action {
        Kind::BlockdevBackup(_) | Kind::DriveBackup(_) => return None,
        Kind::Abort(_) => "abort",
        Kind::Snapshot(_) => "blockdev-snapshot",
        Kind::Internal(_) => "blockdev-snapshot-internal-sync",
        Kind::Sync(_) => "blockdev-snapshot-sync",
        Kind::BitmapAdd(_) => "block-dirty-bitmap-add",
        Kind::BitmapRemove(_) => "block-dirty-bitmap-remove",
        Kind::BitmapClear(_) => "block-dirty-bitmap-clear",
        Kind::BitmapEnable(_) => "block-dirty-bitmap-enable",
        Kind::BitmapDisable(_) => "block-dirty-bitmap-disable",
        Kind::BitmapMerge(_) => "block-dirty-bitmap-merge",
    })
}

fn plan_action(cx: &mut Cx, plan: &mut Plan, action: TransactionActionKind) -> Result<()> {
    use TransactionActionKind as Kind;
    let look = |cx: &Cx, name: &str| planned(cx, plan, Some(name), Some(name));
    let step = match action {
        Kind::Abort(_) => bail!("Transaction aborted using Abort action"),
        Kind::Snapshot(w) => return plan_overlay(cx, plan, w.data),
        Kind::Internal(w) => return plan_internal(cx, plan, w.data),
        Kind::Sync(w) => return plan_sync(cx, plan, w.data),
        Kind::BlockdevBackup(w) => return plan_blockdev(cx, plan, w.data),
        Kind::DriveBackup(w) => return plan_drive(cx, plan, w.data),
        Kind::BitmapAdd(w) => plan_add(cx, w.data, &look)?,
        Kind::BitmapRemove(w) => plan_remove(cx, w.data, &look)?,
        Kind::BitmapClear(w) => plan_clear(cx, w.data, &look)?,
        Kind::BitmapEnable(w) => plan_enable(cx, w.data, true, &look)?,
        Kind::BitmapDisable(w) => plan_enable(cx, w.data, false, &look)?,
        Kind::BitmapMerge(w) => plan_merge(cx, w.data, &look)?,
    };
    plan.push(Other::Bitmap(step));
    Ok(())
}

#[cfg(test)]
#[path = "cmd_transaction_test.rs"]
mod tests;
