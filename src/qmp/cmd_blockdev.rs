//! The block graph's commands: `blockdev-add`, `blockdev-del`, `block_resize`.
//!
//! Owns: their form and QEMU's texts. Never: formats' insides. Threads: control. Locks: none.

use super::schema::{Cx, Object, Path, Ty, Value, Wire};
use crate::block::graph::Parent;
use crate::block::node::{Edge, Node};
use crate::block::open;
use crate::control::formats::{self, BlockdevDriver, BlockdevOptions, Formats};
use crate::error::{Error, Result, strerror};
use crate::event::Event;
use crate::{bail, commands};
use std::sync::Arc;

commands! {
    /// The block graph.
    pub static BLOCKDEV;

    /// Opens a node of the block graph, with the nodes that it defines inline. It stays until
    /// `blockdev-del`.
    "blockdev-add" => blockdev_add(Given) -> ();

    /// Gives nodes other options while they are used: all of them, or none. What is left out gets its
    /// default, but a backing file must be said.
    "blockdev-reopen" | "x-blockdev-reopen" => blockdev_reopen {
        /// For each node all options that it shall have.
        options: Vec<Given>,
    } -> ();

    /// Closes a node of `blockdev-add` that nobody uses, with the inner nodes that only it used.
    "blockdev-del" | "x-blockdev-del" => blockdev_del {
        /// The node's name.
        "node-name" node_name: String,
    } -> ();

    /// Changes the length of a disk. The guest is told; what it makes of it is its affair.
    "block_resize" => block_resize {
        /// The drive's name. One of `device` and `node-name` is needed.
        device: Option<String>,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// The new length in bytes.
        size: i64,
    } -> ();

    /// Makes one `BLOCK_WRITE_THRESHOLD` event when something is first written beyond a byte of a
    /// node.
    "block-set-write-threshold" => set_write_threshold {
        /// The node's name.
        "node-name" node_name: String,
        /// The byte; 0 is none.
        "write-threshold" threshold: u64,
    } -> ();

    /// Records another name for an image's backing file in the image. Nothing is opened or closed. The
    /// recorded format stays; if there is none, that of the node below is recorded.
    "change-backing-file" => change_backing_file {
        /// The drive, or the node, in whose chain the image is.
        device: String,
        /// The image's node.
        "image-node-name" image: String,
        /// The name to record; "": that it has none.
        "backing-file" name: String,
    } -> ();
}

/// A node's options, and the same as they were given.
struct Given(BlockdevOptions, Object);

impl Wire for Given {
    const TY: Ty = BlockdevOptions::TY;

    fn take(v: Value, at: &Path) -> Result<Given> {
        let given = v.as_object().cloned().unwrap_or_default();
        Ok(Given(BlockdevOptions::take(v, at)?, given))
    }

    fn give(self) -> Value {
        Value::Object(self.1)
    }
}

fn blockdev_reopen(cx: &mut Cx, options: Vec<Given>) -> Result<()> {
    let list: Vec<_> = options.into_iter().map(|g| formats::wanted(g.1)).collect::<Result<_>>()?;
    let vm = &mut *cx.vm;
    for wanted in &list {
        let Some(node) = wanted.common.node_name.as_ref().and_then(|n| vm.graph.find(n)) else { continue };
        // A job is made for a disk of that length.
        let now = node.driver.own_options();
        if ["offset", "size"].iter().any(|key| wanted.given.get(*key) != now.get(*key)) {
            vm.check_idle(node)?;
        }
    }
    // A job counts on what is below the nodes that it works on; other options are none of its business.
    let jobs = &vm.jobs;
    let may = |node: &Arc<Node>, edge: &Arc<Edge>| jobs.check_edge(node, edge);
    vm.graph.reopen(&Formats::new(&mut vm.fds, &vm.objects), &list, may)
}

fn blockdev_add(cx: &mut Cx, given: Given) -> Result<()> {
    let Given(options, given) = given;
    // A format without a name is of some use (QEMU 2.8's manual adds one); it is found by its
    // automatic name. A bare protocol is most likely a mistake.
    let bare = matches!(
        options.driver,
        BlockdevDriver::File(_)
            | BlockdevDriver::HostDevice(_)
            | BlockdevDriver::Nbd(_)
            | BlockdevDriver::NullAio(_)
            | BlockdevDriver::NullCo(_)
    );
    if options.node_name.is_none() && bare {
        return Err(Error::new("'node-name' must be specified for the root node"));
    }
    let plan = formats::plan(options)?;
    let Cx { vm, conn } = cx;
    let mut passed = |name: &str| conn.take_named(name);
    let env = Formats::new(&mut vm.fds, &vm.objects).with(&mut passed);
    let node = open::add(&mut vm.graph, &env, plan)?;
    open::remember(&node, &given);
    Ok(())
}

fn blockdev_del(cx: &mut Cx, node_name: String) -> Result<()> {
    let node = cx.vm.graph.need(&node_name)?.clone();
    // What is a disk says that first, and so does the graph.
    if !cx.vm.graph.is_disk(&node) {
        cx.vm.check_alone(&node)?;
    }
    drop(node);
    cx.vm.graph.delete(&node_name)
}

/// The node that `device` (a drive) or `node-name` means; a drive is looked for first.
pub(super) fn find_node(cx: &Cx, device: Option<&str>, node_name: Option<&str>) -> Result<Arc<Node>> {
    if let Some(drive) = device.and_then(|d| cx.vm.drives.find(d)) {
        let empty = || Error::new(format!("Device '{}' has no medium", drive.name()));
        return drive.handle.node().ok_or_else(empty);
    }
    if let Some(node) = node_name.and_then(|n| cx.vm.graph.find(n)) {
        return Ok(node.clone());
    }
    let (device, node) = (device.unwrap_or_default(), node_name.unwrap_or_default());
    Err(Error::new(format!("Cannot find device='{device}' nor node-name='{node}'")))
}

fn block_resize(cx: &mut Cx, device: Option<String>, node_name: Option<String>, size: i64) -> Result<()> {
    let node = find_node(cx, device.as_deref(), node_name.as_deref())?;
    let Ok(size) = u64::try_from(size) else {
        return Err(Error::new("Parameter 'size' expects a >0 size"));
    };
    cx.vm.check_alone(&node)?;
    cx.vm.graph.resize(&node, size)
}

fn set_write_threshold(cx: &mut Cx, node_name: String, threshold: u64) -> Result<()> {
    let Some(node) = cx.vm.graph.find(&node_name) else {
        bail!("Device '{node_name}' not found");
    };
    let events = cx.vm.events.clone();
    let tell = move |exceeded| events.post(Event::WriteThreshold { node_name, exceeded, threshold });
    node.set_write_threshold(threshold, Box::new(tell));
    Ok(())
}

/// The root of a disk: a drive's node, or one that no other node uses.
pub(super) fn find_root(cx: &Cx, device: &str) -> Result<Arc<Node>> {
    let node = find_node(cx, Some(device), Some(device))?;
    let by_drive = cx.vm.drives.find(device).is_some();
    if cx.vm.has_job(&node) {
        bail!("Need a root block node");
    }
    if !by_drive && cx.vm.graph.parents(&node).iter().any(|p| matches!(p, Parent::Node(..))) {
        bail!("Need a root block node");
    }
    Ok(node)
}

fn change_backing_file(cx: &mut Cx, device: String, image: String, name: String) -> Result<()> {
    let root = find_root(cx, &device)?;
    let node = find_node(cx, None, Some(&image))?;
    let Some(below) = node.backing() else {
        bail!("not allowing backing file change on an image without a backing file");
    };
    let mut chain = std::iter::successors(Some(root), |n| n.backing());
    if !chain.any(|n| Arc::ptr_eq(&n, &node)) {
        bail!("'{device}' and image file are not in the same chain");
    }
    let read_only = node.read_only();
    cx.vm.graph.set_read_only(&node, false)?;
    let format = below.skip_filters().driver.name();
    let done = match name.as_str() {
        "" => node.driver.set_backing(None),
        name if node.driver.info().backing_format.is_none() => node.driver.set_backing(Some((name, format))),
        name => node.driver.set_backing_name(name),
    };
    if let Err(e) = cx.vm.graph.set_read_only(&node, read_only) {
        log::warn!("node '{}' stays writable: {e}", node.name);
    }
    done.map_err(|e| Error::new(format!("Could not change backing file to '{name}': {}", strerror(&e))))
}

#[cfg(test)]
#[path = "cmd_blockdev_test.rs"]
pub(crate) mod tests;
