//! Backups: `drive-backup`, `blockdev-backup`, alone and as parts of a transaction.
//!
//! Owns: the commands' form, QEMU's texts, and when a backup begins. Never: how it copies
//! (`jobs/backup.rs`). Threads: control. Locks: none.

use super::cmd_blockdev::find_node;
use super::cmd_query_block::file_name;
use super::cmd_snapshot::{NewImageMode, Other, Plan, planned, run};
use super::job_options::{BitmapSyncMode, BlockdevOnError, MirrorSyncMode, job_id};
use super::schema::Cx;
use crate::block::bitmap::Refuse;
use crate::block::graph::Graph;
use crate::block::node::Node;
use crate::control::formats::Formats;
use crate::control::new_image::{self, NewBacking};
use crate::error::Result;
use crate::event::Events;
use crate::jobs::backup::{Backup, BackupSpec, BitmapMode, Sync};
use crate::jobs::job::Work;
use crate::jobs::registry::{JobKey, Jobs, Spec, Txn};
use crate::jobs::table::Kind;
use crate::qapi::Flat;
use crate::{bail, commands, wire_struct};
use serde_json::{Value, json};
use std::sync::Arc;

commands! {
    /// Backups.
    pub static BACKUP;

    /// Copies a disk as it is now to a file, while the guest goes on writing.
    "drive-backup" => drive_backup(DriveBackup) -> ();

    /// The same, to a node that is open already.
    "blockdev-backup" => blockdev_backup(BlockdevBackup) -> ();
}

wire_struct! {
    /// What both commands have.
    pub struct BackupCommon {
        /// The job; by default it has the drive's name.
        "job-id" job_id: Option<String>,
        /// The drive, or the node, that is copied.
        device: String,
        /// What of it.
        sync: MirrorSyncMode,
        /// Bytes per second at most; 0: no limit.
        speed: Option<i64>,
        /// A bitmap of the node.
        bitmap: Option<String>,
        /// When it forgets what was copied.
        "bitmap-mode" bitmap_mode: Option<BitmapSyncMode>,
        /// The target's data are compressed, if its format can (qcow2).
        compress: Option<bool>,
        /// What is done when the disk cannot be read.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What is done when the target cannot be written.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// False: the job waits for `job-finalize` before it ends.
        "auto-finalize" auto_finalize: Option<bool>,
        /// False: it stays in the list until `job-dismiss`.
        "auto-dismiss" auto_dismiss: Option<bool>,
        /// The name of the node that sees the guest's writes.
        "filter-node-name" filter_node_name: Option<String>,
    }
}

wire_struct! {
    /// A backup to a file.
    pub struct DriveBackup {
        /// What both commands have.
        common: Flat<BackupCommon>,
        /// The file.
        target: String,
        /// Its format; by default the disk's.
        format: Option<String>,
        /// Where it comes from; it is created by default.
        mode: Option<NewImageMode>,
    }
}

wire_struct! {
    /// A backup to a node.
    pub struct BlockdevBackup {
        /// What both commands have.
        common: Flat<BackupCommon>,
        /// The node.
        target: String,
    }
}

fn drive_backup(cx: &mut Cx, args: DriveBackup) -> Result<()> {
    run(cx, |cx, plan| plan_drive(cx, plan, args))
}

fn blockdev_backup(cx: &mut Cx, args: BlockdevBackup) -> Result<()> {
    run(cx, |cx, plan| plan_blockdev(cx, plan, args))
}

/// A backup whose target is open, and which begins at the moment of the transaction.
pub(super) struct Planned {
    args: BackupCommon,
    id: String,
    filter: (String, bool),
    source: Arc<Node>,
    target: Arc<Node>,
}

/// `blockdev-backup` as a part of a transaction.
pub(super) fn plan_blockdev(cx: &mut Cx, plan: &mut Plan, args: BlockdevBackup) -> Result<()> {
    let source = planned(cx, plan, Some(&args.common.device), Some(&args.common.device))?;
    let target = find_node(cx, Some(&args.target), Some(&args.target))?;
    push(cx, plan, args.common.0, source, target)
}

/// `drive-backup` as a part of a transaction. The file that it makes stays, whatever comes.
pub(super) fn plan_drive(cx: &mut Cx, plan: &mut Plan, args: DriveBackup) -> Result<()> {
    let source = planned(cx, plan, Some(&args.common.device), Some(&args.common.device))?;
    cx.vm.check_idle(&source)?;
    bitmap_rules(&args.common)?;
    bitmap_is_there(plan, &args.common, &source)?;
    let image = source.clone().skip_filters();
    let format = args.format.as_deref().unwrap_or(image.driver.name());
    let below = image.backing();
    // What is not copied comes from here.
    let backing = match args.common.sync {
        MirrorSyncMode::None => Some(image.clone()),
        MirrorSyncMode::Top => below,
        _ => None,
    };
    if args.mode.unwrap_or_default() == NewImageMode::AbsolutePaths {
        let backing =
            backing.as_ref().map(|b| NewBacking { name: file_name(b), format: b.driver.name().to_string() });
        let env = Formats::new(&mut cx.vm.fds, &cx.vm.objects);
        new_image::make((&cx.vm.graph, &env), &args.target, format, source.len(), backing)?;
    }
    let chain = match args.common.sync {
        // The disk itself, not another look at its file.
        MirrorSyncMode::None => Some(Value::String(image.name.clone())),
        MirrorSyncMode::Top => None,
        _ => Some(Value::Null),
    };
    let mut options = new_image::options(&args.target, format, None, &source.options(), chain)?;
    options["discard"] = json!("unmap");
    options["detect-zeroes"] = json!("unmap");
    let env = Formats::new(&mut cx.vm.fds, &cx.vm.objects);
    let target = new_image::open(&mut cx.vm.graph, &env, options)?;
    plan.opened.push(target.clone());
    push(cx, plan, args.common.0, source, target)
}

fn push(
    cx: &mut Cx,
    plan: &mut Plan,
    args: BackupCommon,
    source: Arc<Node>,
    target: Arc<Node>,
) -> Result<()> {
    bitmap_rules(&args)?;
    bitmap_is_there(plan, &args, &source)?;
    let id = job_id(cx, args.job_id.as_deref(), &source);
    cx.vm.check_idle(&source)?;
    if !Arc::ptr_eq(&source, &target) {
        cx.vm.check_idle(&target)?;
    }
    let filter = match &args.filter_node_name {
        Some(name) => (name.clone(), true),
        None => (cx.vm.graph.auto_name(), false),
    };
    plan.push(Other::Backup(Planned { args, id, filter, source, target }));
    Ok(())
}

/// Before anything is made for a backup that cannot be.
fn bitmap_is_there(plan: &Plan, args: &BackupCommon, source: &Arc<Node>) -> Result<()> {
    match &args.bitmap {
        Some(name) if !plan.has_bitmap(source, name) => bail!("Bitmap '{name}' could not be found"),
        _ => Ok(()),
    }
}

fn bitmap_rules(args: &BackupCommon) -> Result<()> {
    use MirrorSyncMode as Mode;
    let sync = match args.sync {
        Mode::Incremental => "incremental",
        Mode::Bitmap => "bitmap",
        _ => "",
    };
    if !sync.is_empty() && args.bitmap.is_none() {
        bail!("must provide a valid bitmap name for '{sync}' sync mode");
    }
    if args.sync == Mode::Incremental && args.bitmap_mode.is_some_and(|m| m != BitmapSyncMode::OnSuccess) {
        bail!("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
    }
    if args.bitmap.is_none() && args.bitmap_mode.is_some() {
        bail!("Cannot specify bitmap sync mode without a bitmap");
    }
    Ok(())
}

/// What more a bitmap must be, once it is found.
fn mode_of(args: &BackupCommon) -> Result<BitmapMode> {
    use MirrorSyncMode as Mode;
    let mode = match (args.bitmap_mode, args.sync) {
        (None, Mode::Incremental) => BitmapSyncMode::OnSuccess,
        (None, _) => bail!("Bitmap sync mode must be given when providing a bitmap"),
        (Some(mode), _) => mode,
    };
    let sync = match args.sync {
        Mode::None => bail!("sync mode 'none' does not produce meaningful bitmap outputs"),
        Mode::Full => "full",
        Mode::Top => "top",
        Mode::Incremental | Mode::Bitmap => "",
    };
    if !sync.is_empty() && mode == BitmapSyncMode::Never {
        bail!("Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'");
    }
    Ok(match mode {
        BitmapSyncMode::OnSuccess => BitmapMode::OnSuccess,
        BitmapSyncMode::Never => BitmapMode::Never,
        BitmapSyncMode::Always => BitmapMode::Always,
    })
}

impl Planned {
    /// The node that is copied, whose users wait while it begins.
    pub fn source(&self) -> &Arc<Node> {
        &self.source
    }

    /// Begins, if nobody uses its nodes meanwhile.
    pub fn happen(
        self,
        graph: &mut Graph,
        jobs: &mut Jobs,
        (events, txn): (&Events, Option<Txn>),
    ) -> Result<JobKey> {
        // Nobody used them before, but one that has just begun may.
        for node in [&self.source, &self.target] {
            jobs.check_free(node, &node.name)?;
        }
        self.begin(graph, jobs, events, txn)
    }

    fn begin(self, graph: &mut Graph, jobs: &mut Jobs, events: &Events, txn: Option<Txn>) -> Result<JobKey> {
        let Planned { args, id, filter, source, target } = self;
        let bitmap = match &args.bitmap {
            None => None,
            Some(name) => {
                let Some(bitmap) = source.find_bitmap(name) else {
                    bail!("Bitmap '{name}' could not be found");
                };
                let mode = mode_of(&args)?;
                bitmap.check(Refuse::Busy)?;
                Some((bitmap, mode))
            }
        };
        let job = Spec {
            speed: args.speed.unwrap_or(0),
            auto_finalize: args.auto_finalize.unwrap_or(true),
            auto_dismiss: args.auto_dismiss.unwrap_or(true),
            txn,
            ..Spec::new(id, Kind::Backup)
        };
        let spec = BackupSpec {
            source: source.clone(),
            target: target.clone(),
            sync: match args.sync {
                MirrorSyncMode::Full => Sync::Full,
                MirrorSyncMode::Top => Sync::Top,
                MirrorSyncMode::None => Sync::None,
                MirrorSyncMode::Incremental | MirrorSyncMode::Bitmap => Sync::Bitmap,
            },
            bitmap,
            compress: args.compress.unwrap_or(false),
            on_source_error: args.on_source_error.unwrap_or_default().into(),
            on_target_error: args.on_target_error.unwrap_or_default().into(),
            break_snapshot: false,
            filter,
        };
        spec.check(graph)?;
        let build = || Ok(Box::new(Backup::new(graph, spec)?) as Box<dyn Work>);
        jobs.create(job, events, &[&target], build)
    }
}
