//! The block graph's commands: `blockdev-add`, `blockdev-del`, `block_resize`.
//!
//! Owns: their form and QEMU's texts. Never: formats' insides. Threads: control. Locks: none.

use super::schema::Cx;
use crate::block::node::Node;
use crate::block::open;
use crate::commands;
use crate::control::formats::{self, BlockdevDriver, BlockdevOptions, Formats};
use crate::error::{Error, Result};
use std::sync::Arc;

commands! {
    /// The block graph.
    pub static BLOCKDEV;

    /// Opens a node of the block graph, with the nodes that it defines inline. It stays until
    /// `blockdev-del`.
    "blockdev-add" => blockdev_add(BlockdevOptions) -> ();

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
}

fn blockdev_add(cx: &mut Cx, options: BlockdevOptions) -> Result<()> {
    // A format without a name is of some use (QEMU 2.8's manual adds one); it is found by its
    // automatic name. A bare protocol is most likely a mistake.
    let bare = matches!(
        options.driver,
        BlockdevDriver::File(_)
            | BlockdevDriver::HostDevice(_)
            | BlockdevDriver::NullAio(_)
            | BlockdevDriver::NullCo(_)
    );
    if options.node_name.is_none() && bare {
        return Err(Error::new("'node-name' must be specified for the root node"));
    }
    let plan = formats::plan(options)?;
    open::add(&mut cx.vm.graph, &Formats::new(&mut cx.vm.fds), plan)?;
    Ok(())
}

fn blockdev_del(cx: &mut Cx, node_name: String) -> Result<()> {
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
    cx.vm.graph.resize(&node, size)
}

#[cfg(test)]
#[path = "cmd_blockdev_test.rs"]
pub(crate) mod tests;
