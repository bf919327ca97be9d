//! Removable media: what may be done to the tray and the medium of a drive, in which order, and
//! QEMU's texts where it may not.
//!
//! Owns: the rules. Never: opens images, knows SCSI. Threads: control. Locks: none.
//!
//! A drive that no guest device uses has neither tray nor lock: media come and go freely.

use super::drive::Drive;
use super::driver::Perm;
use super::graph::{Graph, Parent};
use super::node::Node;
use super::tray::Tray;
use crate::bail;
use crate::error::Result;
use std::sync::Arc;

/// What [`open_tray`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// It moved.
    Moved,
    /// It is open, or there is none.
    Already,
    /// The guest has locked it, and was asked.
    Asked,
}

/// Whether the medium can be taken out at all.
pub fn check_removable(drive: &Drive, name: &str) -> Result<()> {
    removable(drive, name).map(drop)
}

/// Whether what is in the drive, or was in it last, is only read.
pub fn was_read_only(drive: &Drive) -> bool {
    drive.handle.node().map_or(drive.read_only, |n| n.read_only())
}

fn removable(drive: &Drive, name: &str) -> Result<Option<Arc<Tray>>> {
    if drive.device.as_ref().is_some_and(|d| !d.removable) {
        bail!("Device '{name}' is not removable");
    }
    Ok(drive.handle.tray())
}

/// Opens the tray. `name` is the user's name for the drive.
pub fn open_tray(drive: &Drive, name: &str, force: bool) -> Result<Opened> {
    let Some(tray) = removable(drive, name)?.filter(|t| !t.is_open()) else { return Ok(Opened::Already) };
    if tray.is_locked() {
        tray.request_eject(force);
        if !force {
            return Ok(Opened::Asked);
        }
    }
    Ok(if tray.set_open(true) { Opened::Moved } else { Opened::Already })
}

/// The error where a tray had to open and the guest was only asked to.
pub fn must_open(opened: Opened, name: &str) -> Result<Opened> {
    if opened == Opened::Asked {
        bail!("Device '{name}' is locked and force was not specified, wait for tray to open and try again");
    }
    Ok(opened)
}

/// Closes the tray; true when it moved. The guest sees what is in the drive.
pub fn close_tray(drive: &Drive, name: &str) -> Result<bool> {
    Ok(removable(drive, name)?.is_some_and(|tray| tray.set_open(false)))
}

/// Takes the medium out, if there is one. A node that nobody else uses or owns is closed.
pub fn remove(graph: &mut Graph, drive: &mut Drive, name: &str) -> Result<()> {
    if removable(drive, name)?.is_some_and(|tray| !tray.is_open()) {
        bail!("Tray of device '{name}' is not open");
    }
    let Some(node) = drive.handle.node() else { return Ok(()) };
    let read_only = node.read_only();
    drop(node);
    let quiesced = graph.quiesce_handles(vec![drive.handle.clone()]);
    let done = graph.edit(&quiesced, |edit| edit.set_root(&drive.handle, None));
    drop(quiesced);
    done?;
    drive.read_only = read_only;
    drive.handle.resized();
    graph.collect();
    Ok(())
}

/// Puts `node` into an empty drive.
pub fn insert(graph: &mut Graph, drive: &Drive, node: &Arc<Node>) -> Result<()> {
    if drive.device.as_ref().is_some_and(|d| !d.removable) {
        bail!("Device is not removable");
    }
    if drive.handle.tray().is_some_and(|tray| !tray.is_open()) {
        bail!("Tray of the device is not open");
    }
    if drive.handle.node().is_some() {
        bail!("There already is a medium in the device");
    }
    // What its user does depends on the medium, as when the drive was made.
    let old = (drive.handle.uses(), drive.handle.shares());
    let write = if drive.writes && !node.read_only() { Perm::WRITE } else { Perm::NONE };
    let quiesced = graph.quiesce_handles(vec![drive.handle.clone()]);
    drive.handle.set_perm(Perm::CONSISTENT_READ | write, old.1);
    let done = graph.edit(&quiesced, |edit| edit.set_root(&drive.handle, Some(node.clone())));
    drop(quiesced);
    done.inspect_err(|_| drive.handle.set_perm(old.0, old.1))?;
    drive.handle.resized();
    Ok(())
}

/// Whether `node` is free to be inserted.
pub fn check_free(graph: &Graph, node: &Arc<Node>) -> Result<()> {
    if graph.parents(node).iter().any(|p| matches!(p, Parent::Handle(_))) {
        bail!("Node '{}' is already in use", node.name);
    }
    Ok(())
}
