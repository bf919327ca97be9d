//! Snapshots: new images on top of a disk, snapshots inside an image, several at once.
//!
//! Owns: the commands' form, and QEMU's texts. Never: the moment of a snapshot (`block/snapshot.rs`).
//! Threads: control. Locks: none.

use super::cmd_backup::Planned;
use super::cmd_bitmap::{Step, Undo};
use super::cmd_blockdev::{find_node, find_root};
use super::cmd_query_block::file_name;
use super::schema::Cx;
use crate::block::driver;
use crate::block::graph::Graph;
use crate::block::node::Node;
use crate::block::snapshot::{Act, Inside, Moment, Overlay, check_overlay};
use crate::control::formats::Formats;
use crate::control::new_image::{self, NewBacking};
use crate::error::{Error, Result, strerror};
use crate::event::Events;
use crate::jobs::registry::{JobKey, Jobs, Txn};
use crate::jobs::table::Kind;
use crate::{bail, commands, wire_enum, wire_struct};
use serde_json::Value;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

commands! {
    /// Snapshots.
    pub static SNAPSHOT;

    /// Puts a new image on top of a disk: what is written from now on goes there, and the disk as it
    /// is becomes its backing file.
    "blockdev-snapshot-sync" => blockdev_snapshot_sync(BlockdevSnapshotSync) -> ();

    /// The same with an image that is open already.
    "blockdev-snapshot" => blockdev_snapshot(BlockdevSnapshot) -> ();

    /// Takes a snapshot inside the image.
    "blockdev-snapshot-internal-sync" => blockdev_snapshot_internal_sync(BlockdevSnapshotInternal) -> ();

    /// Deletes a snapshot inside an image, and answers what it was.
    "blockdev-snapshot-delete-internal-sync" => delete_internal {
        /// The drive, or the node.
        device: String,
        /// The snapshot's id. One of `id` and `name` is needed; both must fit.
        id: Option<String>,
        /// The snapshot's name.
        name: Option<String>,
    } -> SnapshotInfo;
}

wire_enum! {
    /// Where a new image comes from.
    pub enum NewImageMode {
        /// It is there already; what it names as its backing file is not looked at.
        "existing" Existing,
        /// It is created.
        "absolute-paths" AbsolutePaths,
    }
    default AbsolutePaths
}

wire_struct! {
    /// A new image on top of a disk.
    pub struct BlockdevSnapshotSync {
        /// The drive. One of `device` and `node-name` is needed; this one is looked at first.
        device: Option<String>,
        /// The node.
        "node-name" node_name: Option<String>,
        /// The new image's path.
        "snapshot-file" file: String,
        /// The new node's name; needed with `node-name`.
        "snapshot-node-name" name: Option<String>,
        /// The new image's format; `qcow2` by default.
        format: Option<String>,
        /// Where it comes from; it is created by default.
        mode: Option<NewImageMode>,
    }
}

wire_struct! {
    /// An open image on top of a disk.
    pub struct BlockdevSnapshot {
        /// What becomes the backing file: a node, or a drive's.
        node: String,
        /// The node that goes on top: nobody uses it, and it was opened with `backing` null.
        overlay: String,
    }
}

wire_struct! {
    /// A snapshot inside an image.
    pub struct BlockdevSnapshotInternal {
        /// The drive, or the node.
        device: String,
        /// The snapshot's name.
        name: String,
    }
}

wire_struct! {
    /// A snapshot inside an image.
    pub struct SnapshotInfo {
        /// Unique in the image.
        id: String,
        /// What a person calls it.
        name: String,
        /// Bytes of the VM's state that are stored with it.
        "vm-state-size" vm_state_size: u64,
        /// When it was taken: seconds since 1970…
        "date-sec" date_sec: u64,
        /// … and nanoseconds.
        "date-nsec" date_nsec: u64,
        /// How long the guest had run: seconds…
        "vm-clock-sec" vm_clock_sec: u64,
        /// … and nanoseconds.
        "vm-clock-nsec" vm_clock_nsec: u64,
        /// Instructions that the guest had run, if that was counted.
        icount: Option<u64>,
    }
}

impl From<driver::Snapshot> for SnapshotInfo {
    fn from(s: driver::Snapshot) -> SnapshotInfo {
        SnapshotInfo {
            id: s.id,
            name: s.name,
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec.into(),
            date_nsec: s.date_nsec.into(),
            vm_clock_sec: s.vm_clock_nsec / 1_000_000_000,
            vm_clock_nsec: s.vm_clock_nsec % 1_000_000_000,
            icount: s.icount,
        }
    }
}

/// What is to happen at one moment. The nodes that were opened for it are the user's until then, so
/// that nobody closes them.
#[derive(Default)]
pub(super) struct Plan {
    acts: Vec<Act>,
    others: Vec<Other>,
    /// Opened for it.
    pub opened: Vec<Arc<Node>>,
    /// The jobs fail or succeed together.
    pub grouped: bool,
}

/// What happens at the moment and is no snapshot; first what it will be, then how it is undone.
pub(super) enum Other {
    /// Something is done with a bitmap.
    Bitmap(Step),
    /// It was.
    BitmapDone(Undo),
    /// A disk is copied from this moment on.
    Backup(Planned),
    /// It is.
    BackupBegun(JobKey),
    /// It cannot happen.
    Fails(Error),
    /// Nothing is left of it.
    Over,
}

struct Others<'a> {
    list: &'a mut Vec<Other>,
    jobs: &'a mut Jobs,
    events: Events,
    txn: Option<Txn>,
}

impl Others<'_> {
    fn take(&mut self, n: usize) -> Other {
        std::mem::replace(&mut self.list[n], Other::Over)
    }
}

impl Moment for Others<'_> {
    fn nodes(&self) -> Vec<Arc<Node>> {
        let node = |other: &Other| match other {
            Other::Bitmap(step) => Some(step.node().clone()),
            Other::Backup(planned) => Some(planned.source().clone()),
            _ => None,
        };
        self.list.iter().filter_map(node).collect()
    }

    fn happen(&mut self, graph: &mut Graph, n: usize) -> Result<()> {
        self.list[n] = match self.take(n) {
            Other::Bitmap(step) => Other::BitmapDone(step.run()?),
            Other::Backup(planned) => {
                let with = (&self.events, self.txn);
                Other::BackupBegun(planned.happen(graph, self.jobs, with)?)
            }
            Other::Fails(e) => return Err(e),
            done => done,
        };
        Ok(())
    }

    fn undo(&mut self, graph: &mut Graph, n: usize) {
        match self.take(n) {
            Other::BitmapDone(undo) => undo.undo(),
            Other::BackupBegun(key) => self.jobs.cancel_sync(graph, key),
            _ => {}
        }
    }

    fn keep(&mut self, graph: &mut Graph) {
        for other in std::mem::take(self.list) {
            match other {
                Other::BitmapDone(undo) => undo.keep(),
                Other::BackupBegun(key) => self.jobs.start(graph, key),
                _ => {}
            }
        }
    }
}

impl Plan {
    /// One more.
    pub fn push(&mut self, other: Other) {
        self.acts.push(Act::Other(self.others.len()));
        self.others.push(other);
    }

    /// Whether `node` has a bitmap of that name, or will have one.
    pub fn has_bitmap(&self, node: &Arc<Node>, name: &str) -> bool {
        let adds = |o: &Other| matches!(o, Other::Bitmap(step) if step.adds(node, name));
        node.find_bitmap(name).is_some() || self.others.iter().any(adds)
    }

    fn overlays(&self) -> impl Iterator<Item = &Overlay> {
        self.acts.iter().filter_map(Act::overlay)
    }

    /// The overlay that is to be on top of `node`.
    fn over(&self, node: &Arc<Node>) -> Option<&Arc<Node>> {
        self.overlays().find(|o| Arc::ptr_eq(&o.node, node)).map(|o| &o.over)
    }

    /// True when a backup of `node` is to begin.
    fn copies(&self, node: &Arc<Node>) -> bool {
        self.others.iter().any(|o| matches!(o, Other::Backup(b) if Arc::ptr_eq(b.source(), node)))
    }

    /// As [`Vm::check_alone`](crate::control::vm::Vm::check_alone), with what is to begin: a backup's
    /// filter will be what `drive`, if it is one, is on then; the node below stays free.
    fn check_alone(&self, cx: &Cx, node: &Arc<Node>, drive: Option<&str>) -> Result<()> {
        let by_drive = drive.is_some_and(|d| cx.vm.drives.find(d).is_some());
        if by_drive && self.copies(node) {
            let (name, kind) = (cx.vm.disk_name(node), Kind::Backup.as_str());
            bail!("Node '{name}' is busy: block device is in use by block job: {kind}");
        }
        cx.vm.check_alone(node)
    }

    /// It cannot be. What happens with bitmaps before that may be what is wrong with it; nothing else
    /// is tried for that.
    fn fail(&mut self, e: Error) {
        let others = &self.others;
        self.acts.retain(|act| matches!(act, Act::Other(n) if matches!(others[*n], Other::Bitmap(_))));
        self.push(Other::Fails(e));
    }

    /// What a drive's node will be.
    pub fn top(&self, mut node: Arc<Node>) -> Arc<Node> {
        while let Some(over) = self.over(&node) {
            node = over.clone();
        }
        node
    }

    /// Fails when `node` is some other image's backing file, or will be.
    fn check_free(&self, graph: &Graph, node: &Arc<Node>) -> Result<()> {
        let of = graph.image_above(node).map(|above| above.name.clone());
        match of.or_else(|| self.over(node).map(|o| o.name.clone())) {
            Some(of) => bail!("Node '{}' is busy: node is used as backing hd of '{of}'", node.name),
            None => Ok(()),
        }
    }
}

/// Plans with `prepare`, and does it.
pub(super) fn run(cx: &mut Cx, prepare: impl FnOnce(&mut Cx, &mut Plan) -> Result<()>) -> Result<()> {
    let mut plan = Plan::default();
    if let Err(e) = prepare(cx, &mut plan) {
        plan.fail(e);
    }
    let vm = &mut *cx.vm;
    let txn = plan.grouped.then(|| vm.jobs.new_txn());
    let (list, events) = (&mut plan.others, vm.events.clone());
    let mut others = Others { list, jobs: &mut vm.jobs, events, txn };
    let done = vm.graph.snapshot(&plan.acts, &mut others);
    plan.opened.iter().for_each(|n| cx.vm.graph.disown(n));
    drop(plan);
    cx.vm.graph.collect();
    done
}

fn blockdev_snapshot_sync(cx: &mut Cx, args: BlockdevSnapshotSync) -> Result<()> {
    run(cx, |cx, plan| plan_sync(cx, plan, args))
}

fn blockdev_snapshot(cx: &mut Cx, args: BlockdevSnapshot) -> Result<()> {
    run(cx, |cx, plan| plan_overlay(cx, plan, args))
}

fn blockdev_snapshot_internal_sync(cx: &mut Cx, args: BlockdevSnapshotInternal) -> Result<()> {
    run(cx, |cx, plan| plan_internal(cx, plan, args))
}

/// The node that is meant. A drive has the overlay that it will have.
pub(super) fn planned(cx: &Cx, plan: &Plan, device: Option<&str>, node: Option<&str>) -> Result<Arc<Node>> {
    let found = find_node(cx, device, node)?;
    let by_drive = device.is_some_and(|d| cx.vm.drives.find(d).is_some());
    Ok(if by_drive { plan.top(found) } else { found })
}

/// As a part of a transaction.
pub(super) fn plan_overlay(cx: &mut Cx, plan: &mut Plan, args: BlockdevSnapshot) -> Result<()> {
    let node = planned(cx, plan, Some(&args.node), Some(&args.node))?;
    plan.check_alone(cx, &node, Some(&args.node))?;
    plan.check_free(&cx.vm.graph, &node)?;
    let over = find_node(cx, Some(&args.overlay), Some(&args.overlay))?;
    if plan.overlays().any(|o| Arc::ptr_eq(&o.over, &over)) || Arc::ptr_eq(&over, &node) {
        bail!("The overlay is already in use");
    }
    check_overlay(&cx.vm.graph, &over)?;
    plan.acts.push(Act::Overlay(Overlay { node, over }));
    Ok(())
}

/// As a part of a transaction.
pub(super) fn plan_sync(cx: &mut Cx, plan: &mut Plan, args: BlockdevSnapshotSync) -> Result<()> {
    let node = planned(cx, plan, args.device.as_deref(), args.node_name.as_deref())?;
    plan.check_alone(cx, &node, args.device.as_deref())?;
    plan.check_free(&cx.vm.graph, &node)?;
    if args.node_name.is_some() && args.name.is_none() {
        bail!("New overlay node-name missing");
    }
    if let Some(name) = &args.name
        && (cx.vm.graph.find(name).is_some() || cx.vm.drives.find(name).is_some())
    {
        bail!("New overlay node-name already in use");
    }
    let format = args.format.as_deref().unwrap_or("qcow2");
    match args.mode.unwrap_or_default() {
        NewImageMode::Existing => {}
        NewImageMode::AbsolutePaths => {
            let backing = NewBacking { name: file_name(&node), format: node.driver.name().to_string() };
            let env = Formats::new(&mut cx.vm.fds, &cx.vm.objects);
            new_image::make((&cx.vm.graph, &env), &args.file, format, node.len(), Some(backing))?;
        }
    }
    let name = args.name.as_deref();
    let over = new_image::options(&args.file, format, name, &node.options(), Some(Value::Null))?;
    let over = new_image::open(&mut cx.vm.graph, &Formats::new(&mut cx.vm.fds, &cx.vm.objects), over)?;
    plan.opened.push(over.clone());
    check_overlay(&cx.vm.graph, &over)?;
    plan.acts.push(Act::Overlay(Overlay { node, over }));
    Ok(())
}

/// As a part of a transaction.
pub(super) fn plan_internal(cx: &mut Cx, plan: &mut Plan, args: BlockdevSnapshotInternal) -> Result<()> {
    let BlockdevSnapshotInternal { device, name } = args;
    let found = find_root(cx, &device)?;
    let node = planned(cx, plan, Some(&device), Some(&device))?;
    if plan.copies(&node) || (Arc::ptr_eq(&found, &node) && plan.over(&node).is_some()) {
        bail!("Need a root block node");
    }
    plan.check_free(&cx.vm.graph, &node)?;
    if node.read_only() {
        bail!("Device '{device}' is read only");
    }
    let format = node.driver.name();
    let node = image_of(&node);
    let Some(internal) = node.driver.internal() else {
        bail!("Block format '{format}' used by device '{device}' does not support internal snapshots");
    };
    if name.is_empty() {
        bail!("Name is empty");
    }
    let list = internal.snapshots().map_err(|e| list_error(&e))?;
    let again =
        |act: &Act| matches!(act, Act::Inside(i) if Arc::ptr_eq(&i.node, &node) && i.snapshot.name == name);
    if plan.acts.iter().any(again) || list.iter().any(|s| s.name == name) {
        bail!("Snapshot with name '{name}' already exists on device '{device}'");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let snapshot = driver::Snapshot {
        name,
        date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nsec: now.subsec_nanos(),
        ..driver::Snapshot::default()
    };
    plan.acts.push(Act::Inside(Inside { node, device, snapshot }));
    Ok(())
}

/// The image that keeps the snapshots of a disk: what a filter shows is that of the node below it,
/// if it shows no other.
fn image_of(disk: &Arc<Node>) -> Arc<Node> {
    let mut image = disk.clone();
    while image.driver.internal().is_none()
        && image.driver.edges().len() == 1
        && let Some(below) = image.filtered()
    {
        image = below;
    }
    image
}

fn list_error(e: &std::io::Error) -> Error {
    Error::new(format!("Failed to get a snapshot list: {}", strerror(e)))
}

fn delete_internal(
    cx: &mut Cx,
    device: String,
    id: Option<String>,
    name: Option<String>,
) -> Result<SnapshotInfo> {
    let node = find_root(cx, &device)?;
    if id.is_none() && name.is_none() {
        bail!("Name or id must be provided");
    }
    let image = image_of(&node);
    let Some(internal) = image.driver.internal() else {
        return Err(list_error(&std::io::Error::from_raw_os_error(libc::ENOTSUP)));
    };
    if node.read_only() {
        bail!("Device '{device}' is read only");
    }
    let quiesced = cx.vm.graph.quiesce(&[&image], &[]);
    let gone = internal.delete_snapshot(id.as_deref(), name.as_deref());
    drop(quiesced);
    let (id, name) = (id.as_deref().unwrap_or("null"), name.as_deref().unwrap_or("null"));
    match gone {
        Ok(s) => Ok(s.into()),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
            bail!("Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'")
        }
        Err(e) => bail!("Failed to delete snapshot on device '{device}': {}", strerror(&e)),
    }
}

#[cfg(test)]
#[path = "cmd_snapshot_test.rs"]
mod tests;
