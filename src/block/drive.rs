//! A drive: what `query-block` lists. A handle, its legacy name, and the guest device that uses it.
//!
//! Owns: the list, and the rules by which a device gets its disk. Never: knows a device model.
//! Threads: control. Locks: none.

use super::driver::Perm;
use super::graph::{Graph, well_formed};
use super::handle::{Handle, HandleSpec, OnError};
use super::node::Node;
use super::tray::Tray;
use crate::bail;
use crate::error::Result;
use crate::event::Events;
use std::sync::Arc;

/// The guest device that uses a drive.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Its id, or "".
    pub id: String,
    /// QOM path of the device, or of the part of it that has the disk.
    pub qom_path: String,
    /// How `query-block` names it: by its id, or by the path of the part that has the disk.
    pub qdev: String,
    /// The medium can be taken out: it has a tray, and may be empty.
    pub removable: bool,
    /// It reports `io-status`.
    pub io_status: bool,
}

/// How a device wants to use its disk.
#[derive(Clone, Debug)]
pub struct Use {
    /// It never writes.
    pub read_only: bool,
    /// It does not mind other writers (`share-rw`).
    pub share_rw: bool,
    /// It copes with a change of length.
    pub resizable: bool,
    /// `rerror`: `Auto` is what the drive says.
    pub rerror: OnError,
    /// `werror`: `Auto` is what the drive says.
    pub werror: OnError,
    /// `write-cache`: `None` is what the drive says.
    pub write_cache: Option<bool>,
}

impl Default for Use {
    fn default() -> Use {
        Use {
            read_only: false,
            share_rw: false,
            resizable: true,
            rerror: OnError::Auto,
            werror: OnError::Auto,
            write_cache: None,
        }
    }
}

/// See the module's head.
pub struct Drive {
    /// The only way to the disk.
    pub handle: Arc<Handle>,
    /// Who uses it.
    pub device: Option<Device>,
    /// Made by `-drive` with an interface (`if=virtio`): it was given a device by itself.
    pub automatic: bool,
    /// Whoever uses it writes, if the medium can be written.
    pub(super) writes: bool,
    /// The next medium is only read, when nothing else is said: as the last one was.
    pub read_only: bool,
}

impl Drive {
    /// Legacy name, or "".
    pub fn name(&self) -> &str {
        self.handle.name()
    }
}

/// All drives.
#[derive(Default)]
pub struct Drives {
    list: Vec<Drive>,
}

impl Drives {
    /// No drives.
    pub fn new() -> Drives {
        Drives::default()
    }

    /// The drives as `query-block` lists them: those with a name first.
    pub fn iter(&self) -> impl Iterator<Item = &Drive> {
        let named = |yes: bool| self.list.iter().filter(move |d| d.name().is_empty() != yes);
        named(true).chain(named(false))
    }

    /// The drive of that legacy name.
    pub fn find(&self, name: &str) -> Option<&Drive> {
        self.list.iter().find(|d| d.name() == name && !name.is_empty())
    }

    /// The same.
    pub fn find_mut(&mut self, name: &str) -> Option<&mut Drive> {
        self.list.iter_mut().find(|d| d.name() == name && !name.is_empty())
    }

    /// The drive of the guest device with that id or QOM path.
    pub fn of_device(&mut self, id: &str) -> Option<&mut Drive> {
        self.list
            .iter_mut()
            .find(|d| d.device.as_ref().is_some_and(|v| v.qom_path == id || (v.id == id && !id.is_empty())))
    }

    /// `-drive`: a drive with a legacy name on `node`, or an empty one. `spec.name` is the name;
    /// what the handle does and shares follows from the node, until a device uses it. On an error
    /// a node that nobody else uses is closed.
    pub fn add(
        &mut self,
        graph: &mut Graph,
        node: Option<Arc<Node>>,
        spec: HandleSpec,
        automatic: bool,
    ) -> Result<Arc<Handle>> {
        let made = self.make(graph, node, spec, automatic);
        if made.is_err() {
            graph.collect();
        }
        made
    }

    fn make(
        &mut self,
        graph: &mut Graph,
        node: Option<Arc<Node>>,
        mut spec: HandleSpec,
        automatic: bool,
    ) -> Result<Arc<Handle>> {
        check_id(graph, self, &spec.name)?;
        let write = node.as_ref().is_some_and(|n| !n.read_only());
        spec.uses = Perm::CONSISTENT_READ | if write { Perm::WRITE } else { Perm::NONE };
        spec.shares = Perm::ALL;
        let handle = graph.attach(node, spec)?;
        self.list.push(Drive {
            handle: handle.clone(),
            device: None,
            automatic,
            writes: true,
            read_only: false,
        });
        Ok(handle)
    }

    /// Gives a new guest device its disk: `what` names a drive, or a node, which gets a drive
    /// without a name; None is an empty drive without a name. `model` is for the message when there
    /// is neither.
    pub fn attach_device(
        &mut self,
        graph: &mut Graph,
        what: Option<&str>,
        model: &str,
        device: Device,
        how: &Use,
        events: &Events,
    ) -> Result<Arc<Handle>> {
        let named = what.filter(|what| !what.is_empty());
        if let (Some(what), Some(drive)) = (what, self.list.iter_mut().find(|d| Some(d.name()) == named)) {
            if drive.device.is_some() && drive.automatic {
                bail!(
                    "Drive '{what}' is already in use because it has been automatically connected \
                     to another device (did you need 'if=none' in the drive options?)"
                );
            }
            if drive.device.is_some() {
                bail!("Drive '{what}' is already in use by another device");
            }
            if drive.handle.node().is_none() && !device.removable {
                bail!("Device needs media, but drive is empty");
            }
            let handle = drive.handle.clone();
            let (uses, shares) = perms(how, handle.node().as_ref());
            handle.set_owner(&device.id, &device.qom_path, Some(events.clone()));
            if let Err(e) = graph.set_perm(&handle, uses, shares) {
                handle.set_owner("", "", None);
                return Err(e);
            }
            drive.writes = !how.read_only;
            if device.removable {
                handle.set_tray(Tray::new(&device.qom_path, events.clone()));
            }
            drive.device = Some(device);
            let drives = handle.policy();
            let choose = |own, of_drive| if own == OnError::Auto { of_drive } else { own };
            handle.set_policy(choose(how.rerror, drives.0), choose(how.werror, drives.1));
            if let Some(on) = how.write_cache {
                handle.set_write_cache(on);
            }
            return Ok(handle);
        }
        let node = match what {
            None => None,
            Some(what) => match graph.find(what) {
                Some(node) => Some(node.clone()),
                None => bail!("Property '{model}.drive' can't find value '{what}'"),
            },
        };
        let (uses, shares) = perms(how, node.as_ref());
        let spec = HandleSpec {
            name: String::new(),
            uses,
            shares,
            write_cache: how.write_cache.unwrap_or(true),
            rerror: how.rerror,
            werror: how.werror,
            ..HandleSpec::default()
        };
        let handle = graph.attach_as(node, spec, &device.id)?;
        handle.set_owner(&device.id, &device.qom_path, Some(events.clone()));
        if device.removable {
            handle.set_tray(Tray::new(&device.qom_path, events.clone()));
        }
        let writes = !how.read_only;
        self.list.push(Drive {
            handle: handle.clone(),
            device: Some(device),
            automatic: false,
            writes,
            read_only: true,
        });
        Ok(handle)
    }

    /// The guest device with this QOM path is gone, and its workers with it: so is its drive.
    pub fn detach_device(&mut self, graph: &mut Graph, qom_path: &str) {
        let gone = |d: &mut Drive| d.device.as_ref().is_some_and(|v| v.qom_path == qom_path);
        for drive in self.list.extract_if(.., gone) {
            drive.handle.on_resize(None);
            if let Some(tray) = drive.handle.tray() {
                tray.on_news(None);
            }
            graph.detach(&drive.handle);
        }
    }

    /// The end of the process, before [`Graph::close_all`].
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// `cont`: no disk has failed since.
    pub fn reset_io_status(&self) {
        self.list.iter().for_each(|d| d.handle.reset_io_status());
    }
}

/// What a device does with a node, and shares.
fn perms(how: &Use, node: Option<&Arc<Node>>) -> (Perm, Perm) {
    let write = !how.read_only && node.is_none_or(|n| !n.read_only());
    let uses = Perm::CONSISTENT_READ | if write { Perm::WRITE } else { Perm::NONE };
    let mut shares = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    if how.resizable {
        shares = shares | Perm::RESIZE;
    }
    if how.share_rw {
        shares = shares | Perm::WRITE;
    }
    (uses, shares)
}

fn check_id(graph: &Graph, drives: &Drives, id: &str) -> Result<()> {
    if !well_formed(id) {
        bail!("Parameter 'id' expects an identifier");
    }
    if drives.find(id).is_some() {
        bail!("Device with id '{id}' already exists");
    }
    if graph.find(id).is_some() {
        bail!("Device name '{id}' conflicts with an existing node name");
    }
    Ok(())
}

#[cfg(test)]
#[path = "drive_test.rs"]
mod tests;
