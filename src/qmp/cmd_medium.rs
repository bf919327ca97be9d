//! Removable media: `eject`, the tray, and what lies in it.
//!
//! Owns: the commands' forms, and in which order a change of medium is done. Never: the rules
//! (`block/medium.rs`). Threads: control. Locks: none.

use super::schema::Cx;
use crate::block::drive::{Drive, Drives};
use crate::block::medium::{self, Opened};
use crate::block::open;
use crate::control::devices::Devices;
use crate::control::drive_options::named;
use crate::control::formats::{self, BlockdevOptions, Formats};
use crate::error::{Class, Error, Result};
use crate::qapi::{Path, Wire};
use crate::{bail, commands, wire_enum};
use serde_json::json;

commands! {
    /// Removable media.
    pub static MEDIUM;

    /// Opens the tray of a drive and takes the medium out. When the guest has locked the tray it is
    /// asked to open it, and the command fails.
    "eject" => eject {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
        /// Open a locked tray too.
        force: Option<bool>,
    } -> ();

    /// Opens the tray of a drive. When the guest has locked it, it is asked to open it:
    /// `DEVICE_TRAY_MOVED` says when it has.
    "blockdev-open-tray" => open_tray {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
        /// Open a locked tray too, at once.
        force: Option<bool>,
    } -> ();

    /// Closes the tray of a drive. The guest sees the medium in it, if there is one.
    "blockdev-close-tray" => close_tray {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
    } -> ();

    /// Takes the medium out of a drive, whose tray must be open. A node of `blockdev-add` stays.
    "blockdev-remove-medium" => remove_medium {
        /// The guest device's id or path.
        id: String,
    } -> ();

    /// The same in its older form.
    "x-blockdev-remove-medium" => x_remove_medium {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
    } -> ();

    /// Puts a node into an empty drive, whose tray must be open.
    "blockdev-insert-medium" => insert_medium {
        /// The guest device's id or path.
        id: String,
        /// The node.
        "node-name" node_name: String,
    } -> ();

    /// The same in its older form.
    "x-blockdev-insert-medium" => x_insert_medium {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
        /// The node.
        "node-name" node_name: String,
    } -> ();

    /// Puts another image into a drive: opens the image and the tray, exchanges, closes the tray.
    "blockdev-change-medium" => change_medium {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
        /// The image's path.
        filename: String,
        /// Its format. Needed: images are not probed.
        format: Option<String>,
        /// Open a locked tray too.
        force: Option<bool>,
        /// Whether it may be written; by default as the drive was.
        "read-only-mode" read_only_mode: Option<BlockdevChangeReadOnlyMode>,
    } -> ();
}

wire_enum! {
    /// Whether a new medium may be written.
    pub enum BlockdevChangeReadOnlyMode {
        /// As the one before.
        "retain" Retain,
        /// No.
        "read-only" ReadOnly,
        /// Yes.
        "read-write" ReadWrite,
    }
}

/// The drive that `device` or `id` means, and that name.
fn find<'a>(
    (drives, devices): (&'a mut Drives, &Devices),
    device: Option<String>,
    id: Option<String>,
) -> Result<(&'a mut Drive, String)> {
    let (name, by_id) = match (device, id) {
        (Some(name), None) => (name, false),
        (None, Some(id)) => (id, true),
        _ => bail!("Need exactly one of 'device' and 'id'"),
    };
    let without_disk = by_id && devices.find(&name).is_some();
    let drive = if by_id { drives.of_device(&name) } else { drives.find_mut(&name) };
    match drive {
        Some(drive) => Ok((drive, name)),
        None if without_disk => bail!("Device does not have a block device backend"),
        None => Err(Error::of(Class::DeviceNotFound, format!("Device '{name}' not found"))),
    }
}

/// In the older commands a device's id will do for a drive's name.
fn by_either(cx: &Cx, device: Option<String>, id: Option<String>) -> (Option<String>, Option<String>) {
    match (device, id) {
        (Some(name), None) if cx.vm.drives.find(&name).is_none() => (None, Some(name)),
        other => other,
    }
}

fn path(drive: &Drive) -> String {
    drive.device.as_ref().map(|d| d.qom_path.clone()).unwrap_or_default()
}

/// Opens a tray and says so; an error when it must open and does not.
fn open_it(cx: &mut Cx, device: Option<String>, id: Option<String>, force: bool, must: bool) -> Result<()> {
    let (drive, name) = find((&mut cx.vm.drives, &cx.vm.devices), device, id)?;
    let opened = medium::open_tray(drive, &name, force)?;
    if must {
        medium::must_open(opened, &name)?;
    }
    let path = path(drive);
    if opened == Opened::Moved {
        cx.vm.tray_moved(&path, true);
    }
    Ok(())
}

/// Fails while a job uses the medium.
fn check_idle(cx: &mut Cx, device: &Option<String>, id: &Option<String>) -> Result<()> {
    let (drive, _) = find((&mut cx.vm.drives, &cx.vm.devices), device.clone(), id.clone())?;
    match drive.handle.node() {
        Some(node) => cx.vm.check_idle(&node),
        None => Ok(()),
    }
}

fn eject(cx: &mut Cx, device: Option<String>, id: Option<String>, force: Option<bool>) -> Result<()> {
    check_idle(cx, &device, &id)?;
    open_it(cx, device.clone(), id.clone(), force.unwrap_or(false), true)?;
    remove(cx, device, id)
}

fn open_tray(cx: &mut Cx, device: Option<String>, id: Option<String>, force: Option<bool>) -> Result<()> {
    open_it(cx, device, id, force.unwrap_or(false), false)
}

fn close_tray(cx: &mut Cx, device: Option<String>, id: Option<String>) -> Result<()> {
    let (drive, name) = find((&mut cx.vm.drives, &cx.vm.devices), device, id)?;
    let (moved, path) = (medium::close_tray(drive, &name)?, path(drive));
    if moved {
        cx.vm.tray_moved(&path, false);
    }
    Ok(())
}

fn remove(cx: &mut Cx, device: Option<String>, id: Option<String>) -> Result<()> {
    check_idle(cx, &device, &id)?;
    let (drive, name) = find((&mut cx.vm.drives, &cx.vm.devices), device, id)?;
    medium::remove(&mut cx.vm.graph, drive, &name)
}

fn remove_medium(cx: &mut Cx, id: String) -> Result<()> {
    remove(cx, None, Some(id))
}

fn x_remove_medium(cx: &mut Cx, device: Option<String>, id: Option<String>) -> Result<()> {
    let (device, id) = by_either(cx, device, id);
    remove(cx, device, id)
}

fn insert_medium(cx: &mut Cx, id: String, node_name: String) -> Result<()> {
    insert(cx, None, Some(id), &node_name)
}

fn x_insert_medium(cx: &mut Cx, device: Option<String>, id: Option<String>, node_name: String) -> Result<()> {
    let (device, id) = by_either(cx, device, id);
    insert(cx, device, id, &node_name)
}

fn insert(cx: &mut Cx, device: Option<String>, id: Option<String>, node_name: &str) -> Result<()> {
    let (drive, _) = find((&mut cx.vm.drives, &cx.vm.devices), device, id)?;
    let graph = &mut cx.vm.graph;
    let Some(node) = graph.find(node_name).cloned() else { bail!("Node '{node_name}' not found") };
    medium::check_free(graph, &node)?;
    medium::insert(graph, drive, &node)
}

fn change_medium(
    cx: &mut Cx,
    device: Option<String>,
    id: Option<String>,
    filename: String,
    format: Option<String>,
    force: Option<bool>,
    mode: Option<BlockdevChangeReadOnlyMode>,
) -> Result<()> {
    let (drive, name) = find((&mut cx.vm.drives, &cx.vm.devices), device.clone(), id.clone())?;
    medium::check_removable(drive, &name)?;
    let read_only = match mode.unwrap_or(BlockdevChangeReadOnlyMode::Retain) {
        BlockdevChangeReadOnlyMode::Retain => medium::was_read_only(drive),
        BlockdevChangeReadOnlyMode::ReadOnly => true,
        BlockdevChangeReadOnlyMode::ReadWrite => false,
    };
    if let Some(format) = format.as_ref().filter(|f| !formats::exists(f)) {
        bail!("Unknown driver '{format}'");
    }
    let options = json!({
        "driver": format.as_deref().unwrap_or("raw"),
        "file": named(&filename)?,
        "read-only": read_only,
    });
    let plan = formats::plan(BlockdevOptions::take(options, &Path::Root)?)?;
    let node = open::open(&mut cx.vm.graph, &Formats::new(&mut cx.vm.fds, &cx.vm.objects), plan)?;
    // It stays while the old one goes.
    cx.vm.graph.own(&node);
    let changed = match format {
        None => Err(Error::new(
            "Parameter 'format' is missing: 'raw', 'qcow2', … (images are not probed: a guest could \
             write another format's header into a raw disk)",
        )),
        Some(_) => exchange(cx, device, id, force.unwrap_or(false), &node),
    };
    cx.vm.graph.disown(&node);
    drop(node);
    cx.vm.graph.collect();
    changed
}

fn exchange(
    cx: &mut Cx,
    device: Option<String>,
    id: Option<String>,
    force: bool,
    node: &std::sync::Arc<crate::block::node::Node>,
) -> Result<()> {
    check_idle(cx, &device, &id)?;
    open_it(cx, device.clone(), id.clone(), force, true)?;
    remove(cx, device.clone(), id.clone())?;
    let (drive, _) = find((&mut cx.vm.drives, &cx.vm.devices), device.clone(), id.clone())?;
    medium::insert(&mut cx.vm.graph, drive, node)?;
    close_tray(cx, device, id)
}

#[cfg(test)]
#[path = "cmd_medium_test.rs"]
mod tests;
