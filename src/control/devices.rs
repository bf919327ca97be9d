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
use crate::error::{Class, Error, Result};
use crate::event::{Event, Events};
use crate::net::netdev::{Netdev, Netdevs};
use crate::virtio::kinds::{Backends, Device, DriveUse, Place, Request, Sockets, User};
use crate::virtio::scsi::Bus;
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
    /// Devices without an id so far.
    anonymous: usize,
}

impl Devices {
    /// Whether a device may have that id; QEMU's texts. At run time any id will do, as in QEMU.
    fn check_id(&self, id: &str, running: bool) -> Result<()> {
        if id.is_empty() {
            return Ok(());
        }
        if !running && !well_formed(id) {
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

    /// The device with that id or QOM path.
    pub fn find(&self, id: &str) -> Option<&Device> {
        self.list.iter().find(|d| is_called(d, id))
    }

    /// The SCSI buses, oldest first.
    fn buses(&self) -> Vec<Arc<Bus>> {
        let bus = |d: &Device| match &d.place {
            Place::Slot(_, face) => face.scsi_bus(),
            Place::Unit(..) => None,
        };
        self.list.iter().filter_map(bus).collect()
    }
}

fn is_called(device: &Device, id: &str) -> bool {
    device.user.qom_path == id || (device.user.id == id && !id.is_empty())
}

/// Objects of QEMU's tree that are no devices.
const CONTAINERS: &[&str] = &[
    "/",
    "/backend",
    "/chardevs",
    "/machine",
    "/machine/peripheral",
    "/machine/peripheral-anon",
    "/machine/unattached",
    "/objects",
];

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
    fn drive(
        &mut self,
        property: &str,
        name: Option<&str>,
        user: &User,
        usage: &DriveUse,
    ) -> Result<Arc<Handle>> {
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
            qdev: if usage.whole && !user.id.is_empty() { &user.id } else { &user.qom_path }.clone(),
            removable: usage.removable,
            io_status: true,
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
    /// Makes the device that `args` (those of `device_add`) describe, and plugs it. `running`: the
    /// guest may have seen the machine already.
    pub fn add_device(&mut self, args: &Map<String, Value>, running: bool) -> Result<()> {
        let (Some(machine), Some(board)) = (&self.machine, &self.board) else {
            return Err(Error::new("there is no machine"));
        };
        if !running && args.get("driver").and_then(Value::as_str) == Some("isa-debug-exit") {
            return board.add_debug_exit(machine, args);
        }
        let buses = self.devices.buses();
        let request = Request::parse(args, running, &buses)?;
        self.devices.check_id(request.id(), running)?;
        let sockets = Sockets {
            root: board.pci.clone(),
            mem: machine.mem.clone(),
            interrupts: machine.interrupts.clone(),
            slow: self.devices.slow.clone(),
            cpus: self.settings.topology.cpus(),
            buses,
        };
        let mut shelf = Shelf {
            graph: &mut self.graph,
            drives: &mut self.drives,
            netdevs: &mut self.netdevs,
            objects: &self.objects,
            events: &self.events,
            macs: &mut self.devices.macs,
        };
        let device = request.plug(&sockets, &mut shelf, self.devices.anonymous)?;
        self.devices.anonymous += usize::from(device.user.id.is_empty());
        self.devices.list.push(device);
        Ok(())
    }

    /// `device_del`: takes a device away that needs no help of the guest. Clients hear of it after
    /// the answer. `id`: id or QOM path.
    pub fn delete_device(&mut self, id: &str) -> Result<()> {
        let Some(at) = self.devices.list.iter().position(|d| is_called(d, id)) else {
            if CONTAINERS.contains(&id) {
                bail!("{id} is not a device");
            }
            return Err(Error::of(Class::DeviceNotFound, format!("Device '{id}' not found")));
        };
        match &self.devices.list[at].place {
            Place::Slot(..) => bail!("Bus 'pcie.0' does not support hotplugging"),
            // Nobody finds the unit any more; whoever has found it loses the disk below.
            Place::Unit(bus, unit) => bus.detach(unit),
        }
        let device = self.devices.list.remove(at);
        self.drives.detach_device(&mut self.graph, &device.user.qom_path);
        let User { id, qom_path } = device.user;
        self.events.post(Event::DeviceDeleted { id, qom_path });
        Ok(())
    }
}
