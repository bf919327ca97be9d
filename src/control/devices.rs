//! Guest devices: from `device_add`'s arguments to a device on its slot, with its backends.
//!
//! Owns: the list of devices with their ids. Never: knows a device model (`virtio/kinds.rs` does).
//! Threads: control. Locks: none.

use super::objects::Objects;
use super::vm::Vm;
use crate::bail;
use crate::block::drive::{self, Drives, Use};
use crate::block::graph::{Graph, well_formed};
use crate::block::handle::{Handle, OnError};
use crate::error::{Error, Result};
use crate::event::Events;
use crate::net::netdev::{Netdev, Netdevs};
use crate::virtio::kinds::{Backends, Device, DriveUse, Request, Sockets, User};
use crate::virtio::worker::{IoThread, SlowThread};
use serde_json::{Map, Value};
use std::sync::Arc;

/// The devices that the user has named, in the order of their making.
#[derive(Default)]
pub struct Devices {
    list: Vec<Device>,
    slow: Arc<SlowThread>,
    /// Network cards that were given no address so far.
    macs: u8,
}

impl Devices {
    /// Whether a device may have that id; QEMU's texts.
    fn check_id(&self, id: &str) -> Result<()> {
        if id.is_empty() {
            return Ok(());
        }
        if !well_formed(id) {
            bail!("Parameter 'id' expects an identifier");
        }
        if self.list.iter().any(|d| d.user.id == id) {
            bail!("Duplicate device ID '{id}'");
        }
        Ok(())
    }

    /// The devices, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.list.iter()
    }
}

/// What devices may take, borrowed from the VM for the making of one.
struct Shelf<'a> {
    graph: &'a mut Graph,
    drives: &'a mut Drives,
    netdevs: &'a mut Netdevs,
    objects: &'a Objects,
    events: &'a Events,
    macs: &'a mut u8,
}

impl Backends for Shelf<'_> {
    fn drive(&mut self, property: &str, name: &str, user: &User, usage: &DriveUse) -> Result<Arc<Handle>> {
        let word = |w: &Option<String>| w.as_deref().and_then(OnError::from_word).unwrap_or_default();
        let how = Use {
            read_only: usage.read_only,
            share_rw: usage.share_rw,
            resizable: true,
            rerror: word(&usage.rerror),
            werror: word(&usage.werror),
            write_cache: usage.write_cache,
        };
        let device = drive::Device {
            id: user.id.clone(),
            qom_path: user.qom_path.clone(),
            io_status: true,
            ..drive::Device::default()
        };
        let model = property.split('.').next().unwrap_or(property);
        self.drives.attach_device(self.graph, name, model, device, &how, self.events)
    }

    fn netdev(&mut self, property: &str, name: &str, user: &User) -> Result<Arc<dyn Netdev>> {
        self.netdevs.attach(name, property, &user.qom_path)
    }

    fn iothread(&mut self, name: &str) -> Result<Arc<IoThread>> {
        self.objects.iothread(name)
    }

    fn next_mac(&mut self) -> [u8; 6] {
        // QEMU's addresses: 52:54:00:12:34:56 and so on.
        let mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56u8.wrapping_add(*self.macs)];
        *self.macs = self.macs.wrapping_add(1);
        mac
    }

    fn release(&mut self, user: &User) {
        self.drives.detach_device(self.graph, &user.qom_path);
        let used = |u: Option<&str>| u == Some(user.qom_path.as_str());
        let ids: Vec<String> = self.netdevs.iter().filter(|n| used(n.2)).map(|n| n.0.to_string()).collect();
        ids.iter().for_each(|id| self.netdevs.detach(id));
    }
}

impl Vm {
    /// Makes the device that `args` (those of `device_add`) describe, and plugs it.
    pub fn add_device(&mut self, args: &Map<String, Value>) -> Result<()> {
        let (Some(machine), Some(board)) = (&self.machine, &self.board) else {
            return Err(Error::new("there is no machine"));
        };
        if args.get("driver").and_then(Value::as_str) == Some("isa-debug-exit") {
            return board.add_debug_exit(machine, args);
        }
        let request = Request::parse(args)?;
        self.devices.check_id(request.id())?;
        let sockets = Sockets {
            root: board.pci.clone(),
            mem: machine.mem.clone(),
            interrupts: machine.interrupts.clone(),
            slow: self.devices.slow.clone(),
            cpus: self.settings.topology.cpus(),
        };
        let mut shelf = Shelf {
            graph: &mut self.graph,
            drives: &mut self.drives,
            netdevs: &mut self.netdevs,
            objects: &self.objects,
            events: &self.events,
            macs: &mut self.devices.macs,
        };
        let anonymous = self.devices.list.iter().filter(|d| d.user.id.is_empty()).count();
        let device = request.plug(&sockets, &mut shelf, anonymous)?;
        self.devices.list.push(device);
        Ok(())
    }
}
