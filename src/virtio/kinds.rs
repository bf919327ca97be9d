//! The table of device models: name → properties and constructor; and `device_add`'s way from the
//! arguments to a device on a slot.
//!
//! Owns: [`KINDS`]. Never: knows what a device does, the block graph, or QMP's wire. Threads:
//! control. Locks: none.

use super::blk::{Blk, BlkConfig};
use super::device::VirtioDevice;
use super::net::{Net, NetConfig, parse_mac};
use super::pci::VirtioPci;
use super::properties::{Properties, Property, Type};
use super::rng::{Rng, RngConfig};
use super::worker::{IoThread, SlowThread};
use crate::bail;
use crate::block::handle::Handle;
use crate::error::Result;
use crate::machine::irq::Interrupts;
use crate::machine::memory::Mem;
use crate::net::netdev::Netdev;
use crate::pci::root::PciRoot;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// A device model.
pub struct Model {
    /// What `driver` says.
    pub name: &'static str,
    /// Its properties, besides those of every PCI device.
    pub properties: &'static [Property],
    /// Makes one, not plugged yet.
    pub make: fn(&Properties, &mut Making) -> Result<Arc<dyn VirtioDevice>>,
}

/// All models. To add a device, add its row.
pub const KINDS: &[Model] = &[
    Model { name: "virtio-blk-pci", properties: BLK, make: make_blk },
    Model { name: "virtio-net-pci", properties: NET, make: make_net },
    Model { name: "virtio-rng-pci", properties: RNG, make: make_rng },
];

/// Properties of every PCI device.
const COMMON: &[Property] = &[
    ("id", Type::Text),
    ("bus", Type::Text),
    ("addr", Type::Text),
    // MSI-X vectors.
    ("vectors", Type::Number(16)),
];

/// Which device has a backend: for permissions, messages, events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// Its id, or "".
    pub id: String,
    /// Where it stands in QEMU's object tree: `/machine/peripheral/ID`.
    pub qom_path: String,
}

/// How a disk wants to use its drive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriveUse {
    /// It never writes.
    pub read_only: bool,
    /// It lets others write (`share-rw`).
    pub share_rw: bool,
    /// Does the disk have a volatile cache? None: as the drive says.
    pub write_cache: Option<bool>,
    /// `rerror`: `report`, `ignore`, `stop` or `auto`; None: as the drive says.
    pub rerror: Option<String>,
    /// `werror`: the same, or `enospc`.
    pub werror: Option<String>,
}

/// Where devices find what the user has named. Control implements it.
pub trait Backends {
    /// The drive `name` (a legacy drive or a node), for its only user. `property` is what names it
    /// (`virtio-blk-pci.drive`), for the message when there is none.
    fn drive(&mut self, property: &str, name: &str, user: &User, usage: &DriveUse) -> Result<Arc<Handle>>;
    /// The netdev `name`, for its only user.
    fn netdev(&mut self, property: &str, name: &str, user: &User) -> Result<Arc<dyn Netdev>>;
    /// The `iothread` object `name`.
    fn iothread(&mut self, name: &str) -> Result<Arc<IoThread>>;
    /// A MAC address for a card that was given none.
    fn next_mac(&mut self) -> [u8; 6];
    /// The device has not come into being after all, or has gone: its backends are free.
    fn release(&mut self, user: &User);
}

/// What a constructor has besides the properties.
pub struct Making<'a> {
    /// The device to be.
    pub user: &'a User,
    /// Drives and netdevs.
    pub backends: &'a mut dyn Backends,
    /// Processors of the machine: as many queues are best.
    pub cpus: usize,
}

/// The parts of the machine that a device is connected to.
#[derive(Clone)]
pub struct Sockets {
    /// The slots.
    pub root: Arc<PciRoot>,
    /// RAM.
    pub mem: Mem,
    /// Where messages go.
    pub interrupts: Arc<dyn Interrupts>,
    /// The thread of slow devices.
    pub slow: Arc<SlowThread>,
    /// Processors of the machine.
    pub cpus: usize,
}

/// A device that was plugged.
#[derive(Clone)]
pub struct Device {
    /// Its model.
    pub model: &'static str,
    /// Its id and place.
    pub user: User,
    /// Its slot.
    pub slot: u8,
    /// Its face.
    pub face: Arc<dyn VirtioDevice>,
}

/// The arguments of `device_add`, checked as far as they can be alone.
#[derive(Clone, Debug)]
pub struct Request {
    model: usize,
    properties: Properties,
    slot: Option<u8>,
}

impl Request {
    /// Checks model and properties. Nothing is made.
    pub fn parse(args: &Map<String, Value>) -> Result<Request> {
        let Some(Value::String(driver)) = args.get("driver") else {
            bail!("Parameter 'driver' is missing");
        };
        let Some(model) = KINDS.iter().position(|k| k.name == driver) else {
            bail!("'{driver}' is not a valid device model name");
        };
        let kind = &KINDS[model];
        let properties = Properties::parse(kind.name, &[COMMON, kind.properties], args)?;
        if let Some(bus) = properties.text("bus").filter(|bus| !matches!(*bus, "pci.0" | "pcie.0")) {
            bail!("Bus '{bus}' not found");
        }
        let slot = match properties.text("addr") {
            None => None,
            Some(text) => match parse_addr(text) {
                Some((slot, 0)) => Some(slot),
                Some(_) => bail!("{}: only function 0", properties.bad_value("addr")),
                None => bail!("{}", properties.bad_value("addr")),
            },
        };
        Ok(Request { model, properties, slot })
    }

    /// The id that it will have, or "".
    pub fn id(&self) -> &str {
        self.properties.text("id").unwrap_or_default()
    }

    /// Makes the device and plugs it. The id has been found free. `anonymous` is the number of
    /// devices without an id so far.
    pub fn plug(&self, sockets: &Sockets, backends: &mut dyn Backends, anonymous: usize) -> Result<Device> {
        let kind = &KINDS[self.model];
        let id = self.id().to_string();
        let qom_path = match &*id {
            "" => format!("/machine/peripheral-anon/device[{anonymous}]"),
            id => format!("/machine/peripheral/{id}"),
        };
        let name = if id.is_empty() { kind.name.to_string() } else { format!("{},id={id}", kind.name) };
        let user = User { id, qom_path };
        sockets.root.find_slot(self.slot, &name)?;
        let mut making = Making { user: &user, backends, cpus: sockets.cpus };
        let result = (kind.make)(&self.properties, &mut making).and_then(|face| {
            let vectors = self.properties.number("vectors");
            let (mem, interrupts) = (sockets.mem.clone(), sockets.interrupts.clone());
            let slow = sockets.slow.clone();
            let pci = VirtioPci::new(face.clone(), name.clone(), mem, interrupts, slow, vectors);
            let slot = sockets.root.plug(Arc::new(pci), self.slot, &name)?;
            Ok((face, slot))
        });
        match result {
            Ok((face, slot)) => Ok(Device { model: kind.name, user, slot, face }),
            Err(e) => {
                backends.release(&user);
                Err(e)
            }
        }
    }
}

/// `SLOT` or `SLOT.FUNCTION`, hexadecimal.
fn parse_addr(text: &str) -> Option<(u8, u8)> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let hex = |digits: &str, end: u8| {
        let plain = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|n| plain && *n < end)
    };
    Some((hex(slot, 32)?, hex(function, 8)?))
}

const BLK: &[Property] = &[
    ("drive", Type::Text),
    ("serial", Type::Text),
    ("read-only", Type::Bool),
    ("share-rw", Type::Bool),
    ("write-cache", Type::OnOffAuto),
    ("rerror", Type::Word(&["auto", "report", "ignore", "stop"])),
    ("werror", Type::Word(&["auto", "report", "ignore", "stop", "enospc"])),
    ("logical_block_size", Type::Size32),
    ("physical_block_size", Type::Size32),
    ("min_io_size", Type::Size32),
    ("opt_io_size", Type::Size32),
    ("discard_granularity", Type::Size32),
    ("num-queues", Type::Number(16)),
    ("queue-size", Type::Number(16)),
    ("workers", Type::Number(16)),
    ("iothread", Type::Text),
    // Of QEMU's iothread; here also the workers' own.
    ("poll-max-ns", Type::Number(32)),
    ("discard", Type::Bool),
    ("write-zeroes", Type::Bool),
    ("max-discard-sectors", Type::Number(32)),
    ("max-write-zeroes-sectors", Type::Number(32)),
    ("config-wce", Type::Bool),
];

fn make_blk(p: &Properties, making: &mut Making) -> Result<Arc<dyn VirtioDevice>> {
    let d = BlkConfig::default();
    let iothread = p.text("iothread").map(|name| making.backends.iothread(name)).transpose()?;
    let poll = iothread.as_ref().map_or(d.poll, |io| io.poll_max());
    let config = BlkConfig {
        id: making.user.id.clone(),
        serial: p.text("serial").unwrap_or_default().to_string(),
        read_only: p.switch("read-only").unwrap_or(d.read_only),
        logical_block_size: p.number("logical_block_size").unwrap_or(d.logical_block_size),
        physical_block_size: p.number("physical_block_size").unwrap_or(d.physical_block_size),
        min_io_size: p.number("min_io_size").unwrap_or(d.min_io_size),
        opt_io_size: p.number("opt_io_size").unwrap_or(d.opt_io_size),
        // 2^32 - 1 is QEMU's way to say "as the image says".
        discard_granularity: p.number("discard_granularity").filter(|g| *g != u32::MAX),
        // One for each processor, as in QEMU.
        num_queues: p.number("num-queues").unwrap_or(making.cpus.clamp(1, 64) as u16),
        queue_size: p.number("queue-size").unwrap_or(d.queue_size),
        workers: p.number("workers").unwrap_or(d.workers),
        iothread,
        poll: p.number("poll-max-ns").map_or(poll, Duration::from_nanos),
        discard: p.switch("discard").unwrap_or(d.discard),
        write_zeroes: p.switch("write-zeroes").unwrap_or(d.write_zeroes),
        max_discard_sectors: p.number("max-discard-sectors").unwrap_or(d.max_discard_sectors),
        max_write_zeroes_sectors: p.number("max-write-zeroes-sectors").unwrap_or(d.max_write_zeroes_sectors),
        config_wce: p.switch("config-wce").unwrap_or(d.config_wce),
    };
    config.check()?;
    let Some(drive) = p.text("drive") else { bail!("drive property not set") };
    let usage = DriveUse {
        read_only: config.read_only,
        share_rw: p.switch("share-rw").unwrap_or(false),
        write_cache: p.text("write-cache").filter(|w| *w != "auto").map(|w| w == "on"),
        rerror: p.text("rerror").map(str::to_string),
        werror: p.text("werror").map(str::to_string),
    };
    let handle = making.backends.drive("virtio-blk-pci.drive", drive, making.user, &usage)?;
    Ok(Blk::new(config, handle)?)
}

const NET: &[Property] = &[
    ("netdev", Type::Text),
    ("mac", Type::Text),
    ("rx_queue_size", Type::Number(16)),
    ("tx_queue_size", Type::Number(16)),
    ("host_mtu", Type::Number(16)),
    ("mrg_rxbuf", Type::Bool),
    ("csum", Type::Bool),
    ("gso", Type::Bool),
];

fn make_net(p: &Properties, making: &mut Making) -> Result<Arc<dyn VirtioDevice>> {
    let d = NetConfig::default();
    let mac = match p.text("mac").map(parse_mac) {
        Some(Some(mac)) => mac,
        Some(None) => bail!("{}", p.bad_value("mac")),
        None => making.backends.next_mac(),
    };
    let config = NetConfig {
        id: making.user.id.clone(),
        mac,
        rx_queue_size: p.number("rx_queue_size").unwrap_or(d.rx_queue_size),
        tx_queue_size: p.number("tx_queue_size").unwrap_or(d.tx_queue_size),
        host_mtu: p.number("host_mtu").unwrap_or(d.host_mtu),
        mrg_rxbuf: p.switch("mrg_rxbuf").unwrap_or(d.mrg_rxbuf),
        csum: p.switch("csum").unwrap_or(d.csum),
        gso: p.switch("gso").unwrap_or(d.gso),
    };
    config.check()?;
    let Some(netdev) = p.text("netdev") else { bail!("netdev property not set") };
    let netdev = making.backends.netdev("virtio-net-pci.netdev", netdev, making.user)?;
    Ok(Net::new(config, netdev)?)
}

const RNG: &[Property] = &[("max-bytes", Type::Number(64)), ("period", Type::Number(32))];

fn make_rng(p: &Properties, _: &mut Making) -> Result<Arc<dyn VirtioDevice>> {
    let d = RngConfig::default();
    Ok(Rng::new(RngConfig {
        max_bytes: p.number("max-bytes").unwrap_or(d.max_bytes),
        period: p.number("period").unwrap_or(d.period),
    })?)
}

#[cfg(test)]
#[path = "kinds_test.rs"]
mod tests;
