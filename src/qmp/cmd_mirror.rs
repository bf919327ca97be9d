//! Mirrors: `drive-mirror`, `blockdev-mirror`.
//!
//! Owns: the commands' form, and QEMU's texts. Never: how a mirror copies (`jobs/mirror.rs`). Threads:
//! control. Locks: none.

use super::cmd_blockdev::find_node;
use super::cmd_query_block::file_name;
use super::cmd_snapshot::NewImageMode;
use super::job_options::{self, BlockdevOnError, JobOptions, MirrorSyncMode};
use super::schema::Cx;
use crate::block::node::Node;
use crate::control::formats::Formats;
use crate::control::new_image::{self, NewBacking};
use crate::error::Result;
use crate::jobs::table::Kind;
use crate::jobs::{layers, mirror};
use crate::qapi::Flat;
use crate::{bail, commands, wire_enum, wire_struct};
use serde_json::{Value, json};
use std::sync::Arc;

commands! {
    /// Mirrors.
    pub static MIRROR;

    /// Copies a disk to a file and goes on copying what the guest writes; completed, the guest goes on
    /// with the copy.
    "drive-mirror" => drive_mirror(DriveMirror) -> ();

    /// The same, to a node that is open already.
    "blockdev-mirror" => blockdev_mirror(BlockdevMirror) -> ();
}

wire_enum! {
    /// How what the guest writes gets to the target.
    pub enum MirrorCopyMode {
        /// The job copies it later.
        "background" Background,
        /// With the guest's own write, which ends when both sides have it.
        "write-blocking" WriteBlocking,
    }
    default Background
}

wire_struct! {
    /// What both commands have.
    pub struct MirrorCommon {
        /// The node in whose place the target comes, when it is completed: a child of a quorum, and by
        /// default the disk itself.
        replaces: Option<String>,
        /// What is copied: `full`, `top` or `none`.
        sync: MirrorSyncMode,
        /// Bytes that are noted together: a power of two, 512 to 64 MiB.
        granularity: Option<u32>,
        /// The most that is copied in one piece, in bytes (0: the default).
        "buf-size" buf_size: Option<i64>,
        /// What is done when the disk cannot be read.
        "on-source-error" on_source_error: Option<BlockdevOnError>,
        /// What is done when the target cannot be written.
        "on-target-error" on_target_error: Option<BlockdevOnError>,
        /// How what the guest writes gets to the target.
        "copy-mode" copy_mode: Option<MirrorCopyMode>,
    }
}

wire_struct! {
    /// A mirror to a file.
    pub struct DriveMirror {
        /// The job.
        job: Flat<JobOptions>,
        /// The file.
        target: String,
        /// Its format; by default the disk's.
        format: Option<String>,
        /// The name of the target's node.
        "node-name" node_name: Option<String>,
        /// What both commands have.
        common: Flat<MirrorCommon>,
        /// Where the file comes from; it is created by default.
        mode: Option<NewImageMode>,
        /// Zeroes give space back on the target (default: true).
        unmap: Option<bool>,
    }
}

wire_struct! {
    /// A mirror to a node.
    pub struct BlockdevMirror {
        /// The job.
        job: Flat<JobOptions>,
        /// The node.
        target: String,
        /// What both commands have.
        common: Flat<MirrorCommon>,
        /// The same as `buf-size`, under its name of before QEMU 2.9.
        "buf_size" old_buf_size: Option<i64>,
        /// The name of the filter above the disk.
        "filter-node-name" filter_node_name: Option<String>,
    }
}

/// The disk: what its users see, and the image.
struct Disk {
    root: Arc<Node>,
    image: Arc<Node>,
}

fn disk(cx: &Cx, device: &str) -> Result<Disk> {
    let root = find_node(cx, Some(device), Some(device))?;
    if !cx.vm.is_root(&root) {
        bail!("Need a root block node");
    }
    let image = root.clone().skip_filters();
    Ok(Disk { root, image })
}

/// `top` of a disk without a backing file is all of it.
fn sync_of(common: &MirrorCommon, disk: &Disk) -> Result<MirrorSyncMode> {
    Ok(match common.sync {
        MirrorSyncMode::Incremental => bail!("Sync mode 'incremental' not supported"),
        MirrorSyncMode::Bitmap => bail!("Sync mode 'bitmap' not supported"),
        MirrorSyncMode::Top if layers::below(&disk.image).is_none() => MirrorSyncMode::Full,
        sync => sync,
    })
}

fn check_granularity(common: &MirrorCommon) -> Result<()> {
    if let Some(granularity) = common.granularity.filter(|g| *g != 0) {
        if !(512..=64 << 20).contains(&granularity) {
            bail!("Parameter 'granularity' expects a value in range [512B, 64MB]");
        }
        if !granularity.is_power_of_two() {
            bail!("Parameter 'granularity' expects a power of 2");
        }
    }
    Ok(())
}

/// The node that the target is to replace: the disk, or what it shows through filters and quorums.
fn replaced(cx: &Cx, common: &MirrorCommon, disk: &Disk) -> Result<Option<Arc<Node>>> {
    let Some(name) = &common.replaces else { return Ok(None) };
    let node = cx.vm.graph.need(name)?.clone();
    cx.vm.check_idle(&node)?;
    fn shows(node: &Arc<Node>, wanted: &Arc<Node>) -> bool {
        let below = match node.driver.filtered() {
            Some(edge) => vec![edge.clone()],
            None if node.driver.name() == "quorum" => node.driver.edges(),
            None => Vec::new(),
        };
        Arc::ptr_eq(node, wanted) || below.iter().filter_map(|e| e.node()).any(|n| shows(&n, wanted))
    }
    if !shows(&disk.root, &node) {
        let of = &disk.root.name;
        bail!(
            "Cannot replace '{name}' by a node mirrored from '{of}', because it cannot be guaranteed that \
             doing so would not lead to an abrupt change of visible data"
        );
    }
    Ok(Some(node))
}

/// What the two commands do not have in common.
struct Target {
    node: Arc<Node>,
    zeroed: bool,
    unmap: bool,
    filter: Option<String>,
    backing: Option<Arc<Node>>,
}

fn drive_mirror(cx: &mut Cx, args: DriveMirror) -> Result<()> {
    let disk = disk(cx, &args.job.device)?;
    if args.common.replaces.is_some() && args.node_name.is_none() {
        bail!("a node-name must be provided when replacing a named node of the graph");
    }
    if let Some(name) = &args.node_name {
        cx.vm.graph.check_name(name)?;
    }
    // QEMU makes the file first.
    check_granularity(&args.common)?;
    let sync = sync_of(&args.common, &disk)?;
    let format = args.format.as_deref().unwrap_or(disk.image.driver.name());
    let unmap = args.unmap.unwrap_or(true);
    let below = match sync {
        MirrorSyncMode::None => Some(disk.image.clone()),
        MirrorSyncMode::Top => layers::below(&disk.image),
        _ => None,
    };
    let new = args.mode.unwrap_or_default() == NewImageMode::AbsolutePaths;
    if new {
        let recorded =
            below.as_ref().map(|b| NewBacking { name: file_name(b), format: b.driver.name().to_string() });
        let env = Formats::new(&mut cx.vm.fds, &cx.vm.objects);
        new_image::make((&cx.vm.graph, &env), &args.target, format, disk.root.len(), recorded)?;
    }
    // What the target shows of its backing file is not its own: it gets that file in the end.
    let chain = (below.is_some() || new).then_some(Value::Null);
    let name = args.node_name.as_deref();
    let mut options = new_image::options(&args.target, format, name, &disk.root.options(), chain)?;
    if unmap {
        options["discard"] = json!("unmap");
    }
    let env = Formats::new(&mut cx.vm.fds, &cx.vm.objects);
    let node = new_image::open(&mut cx.vm.graph, &env, options)?;
    let target = Target { node: node.clone(), zeroed: new, unmap, filter: None, backing: below };
    let done = mirror(cx, args.job.0, args.common.0, disk, target);
    // Whoever uses it now keeps it.
    cx.vm.graph.disown(&node);
    drop(node);
    cx.vm.graph.collect();
    done
}

fn blockdev_mirror(cx: &mut Cx, mut args: BlockdevMirror) -> Result<()> {
    if let Some(size) = args.old_buf_size
        && args.common.0.buf_size.replace(size).is_some()
    {
        bail!("'buf-size' and 'buf_size' cannot be specified at the same time");
    }
    let disk = disk(cx, &args.job.device)?;
    let node = find_node(cx, Some(&args.target), Some(&args.target))?;
    let unmap = node.options().unmap;
    let filter = args.filter_node_name;
    // Its backing file is the user's to say.
    let target = Target { node, zeroed: false, unmap, filter, backing: None };
    mirror(cx, args.job.0, args.common.0, disk, target)
}

fn mirror(cx: &mut Cx, job: JobOptions, common: MirrorCommon, disk: Disk, target: Target) -> Result<()> {
    check_granularity(&common)?;
    cx.vm.check_alone(&target.node)?;
    let replaces = replaced(cx, &common, &disk)?;
    let sync = sync_of(&common, &disk)?;
    if common.buf_size.is_some_and(|n| n < 0) {
        bail!("Invalid parameter 'buf-size'");
    }
    if Arc::ptr_eq(&disk.root, &target.node) || Arc::ptr_eq(&disk.image, &target.node) {
        bail!("Can't mirror node into itself");
    }
    if let Some(name) = &target.filter {
        cx.vm.graph.check_name(name)?;
    }
    let spec = job_options::spec(cx, Kind::Mirror, &job, &disk.root);
    let events = cx.vm.events.clone();
    let plan = mirror::Plan {
        source: disk.root.clone(),
        target: target.node.clone(),
        sync: match sync {
            MirrorSyncMode::None => mirror::Sync::None,
            MirrorSyncMode::Top => mirror::Sync::Top(vec![disk.image.clone()]),
            _ => mirror::Sync::Full { zeroed: target.zeroed },
        },
        commit: false,
        granularity: common
            .granularity
            .filter(|g| *g != 0)
            .unwrap_or_else(|| mirror::default_granularity(&target.node)),
        buf_size: common.buf_size.filter(|n| *n > 0).map_or(16 << 20, i64::cast_unsigned),
        unmap: target.unmap,
        replaces,
        on_source_error: common.on_source_error.unwrap_or_default().into(),
        on_target_error: common.on_target_error.unwrap_or_default().into(),
        filter: target.filter,
        active: common.copy_mode == Some(MirrorCopyMode::WriteBlocking),
        backing: target.backing,
    };
    let mut nodes = vec![&disk.root, &target.node];
    if !Arc::ptr_eq(&disk.root, &disk.image) {
        nodes.push(&disk.image);
    }
    let graph = &mut cx.vm.graph;
    let build = || Ok(Box::new(mirror::Mirror::new(graph, plan)?) as _);
    let key = cx.vm.jobs.create(spec, &events, &nodes, build)?;
    cx.vm.jobs.start(&mut cx.vm.graph, key);
    Ok(())
}
