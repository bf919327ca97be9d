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
use super::scsi::Bus;
use super::scsi_kinds;
use super::scsi_unit::{Address, Unit};
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
    /// Its properties, besides those of every device on such a bus.
    pub properties: &'static [Property],
    /// Makes one, not plugged yet.
    pub make: Make,
}

/// What a device is plugged into, and its constructor.
#[derive(Clone, Copy)]
pub enum Make {
    /// A PCI slot.
    Pci(fn(&Properties, &mut Making) -> Result<Arc<dyn VirtioDevice>>),
    /// A SCSI bus.
    Scsi(fn(&Properties, &mut Making, Address) -> Result<Arc<Unit>>),
}

/// All models. To add a device, add its row.
pub const KINDS: &[Model] = &[
    Model { name: "virtio-blk-pci", properties: BLK, make: Make::Pci(make_blk) },
    Model { name: "virtio-net-pci", properties: NET, make: Make::Pci(make_net) },
    Model { name: "virtio-rng-pci", properties: RNG, make: Make::Pci(make_rng) },
    Model {
        name: "virtio-scsi-pci",
        properties: scsi_kinds::CONTROLLER,
        make: Make::Pci(scsi_kinds::make_controller),
    },
    Model { name: "scsi-hd", properties: scsi_kinds::HD, make: Make::Scsi(scsi_kinds::make_hd) },
    Model { name: "scsi-cd", properties: scsi_kinds::CD, make: Make::Scsi(scsi_kinds::make_cd) },
];

/// Models of QEMU whose bus is not in this machine, or takes no devices while it runs: said so in
/// QEMU's words.
const FOREIGN: &[(&str, &str)] = &[
    ("device", "Parameter 'driver' expects a non-abstract device type"),
    ("isa-serial", "Bus 'isa.0' does not support hotplugging"),
    ("pc-testdev", "Bus 'isa.0' does not support hotplugging"),
    ("isa-debug-exit", "Bus 'isa.0' does not support hotplugging"),
    ("usb-mouse", "No 'usb-bus' bus found for device 'usb-mouse'"),
    ("usb-kbd", "No 'usb-bus' bus found for device 'usb-kbd'"),
    ("usb-tablet", "No 'usb-bus' bus found for device 'usb-tablet'"),
    ("usb-storage", "No 'usb-bus' bus found for device 'usb-storage'"),
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
    /// The medium can be taken out: it gets a tray.
    pub removable: bool,
    /// It is the device itself that has the disk, not a part of it: `query-block` shows its id.
    pub whole: bool,
    /// Does the disk have a volatile cache? None: as the drive says.
    pub write_cache: Option<bool>,
    /// `rerror`: `report`, `ignore`, `stop` or `auto`; None: as the drive says.
    pub rerror: Option<String>,
    /// `werror`: the same, or `enospc`.
    pub werror: Option<String>,
}

/// Where devices find what the user has named. Control implements it.
pub trait Backends {
    /// The drive `name` (a legacy drive or a node), for its only user; None: an empty one.
    /// `property` is what names it (`virtio-blk-pci.drive`), for the message when there is none.
    fn drive(
        &mut self,
        property: &str,
        name: Option<&str>,
        user: &User,
        usage: &DriveUse,
    ) -> Result<Arc<Handle>>;
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
    /// The machine around it.
    pub sockets: &'a Sockets,
}

impl Making<'_> {
    /// A queue for each processor is best.
    pub(super) fn queues(&self) -> u16 {
        self.sockets.cpus.clamp(1, 64) as u16
    }
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
    /// The SCSI buses, oldest first.
    pub buses: Vec<Arc<Bus>>,
}

/// Where a device is plugged in.
#[derive(Clone)]
pub enum Place {
    /// On a PCI slot.
    Slot(u8, Arc<dyn VirtioDevice>),
    /// On a SCSI bus.
    Unit(Arc<Bus>, Arc<Unit>),
}

/// A device that was plugged.
#[derive(Clone)]
pub struct Device {
    /// Its model.
    pub model: &'static str,
    /// Its id and place.
    pub user: User,
    /// Its place.
    pub place: Place,
}

/// The arguments of `device_add`, checked as far as they can be alone.
#[derive(Clone, Debug)]
pub struct Request {
    model: usize,
    properties: Properties,
}

impl Request {
    /// Checks model and properties. Nothing is made. `running`: the machine runs already, so that
    /// not every bus takes devices. `buses`: the SCSI buses.
    pub fn parse(args: &Map<String, Value>, running: bool, buses: &[Arc<Bus>]) -> Result<Request> {
        let Some(Value::String(driver)) = args.get("driver") else {
            bail!("Parameter 'driver' is missing");
        };
        let Some(model) = KINDS.iter().position(|k| k.name == driver) else {
            match FOREIGN.iter().find(|(name, _)| running && name == driver) {
                Some((_, why)) => bail!("{why}"),
                None => bail!("'{driver}' is not a valid device model name"),
            }
        };
        let kind = &KINDS[model];
        let bus = args.get("bus").and_then(Value::as_str);
        let on_pci = bus.is_some_and(|bus| matches!(bus, "pci.0" | "pcie.0"));
        let on_scsi = bus.is_some_and(|bus| buses.iter().any(|b| b.name == bus));
        let common = match (kind.make, bus) {
            (_, Some(bus)) if !on_pci && !on_scsi => bail!("Bus '{bus}' not found"),
            (Make::Pci(_), _) if on_scsi => bail!("Device '{}' can't go on SCSI bus", kind.name),
            (Make::Scsi(_), _) if on_pci => bail!("Device '{}' can't go on PCIE bus", kind.name),
            (Make::Pci(_), bus) if running => {
                bail!("Bus '{}' does not support hotplugging", bus.unwrap_or("pcie.0"))
            }
            (Make::Scsi(_), None) if buses.is_empty() => {
                bail!("No 'SCSI' bus found for device '{}'", kind.name)
            }
            (Make::Pci(_), _) => COMMON,
            (Make::Scsi(_), _) => scsi_kinds::COMMON,
        };
        let request =
            Request { model, properties: Properties::parse(kind.name, &[common, kind.properties], args)? };
        request.slot()?;
        Ok(request)
    }

    fn slot(&self) -> Result<Option<u8>> {
        Ok(match self.properties.text("addr") {
            None => None,
            Some(text) => match parse_addr(text) {
                Some((slot, 0)) => Some(slot),
                Some(_) => bail!("{}: only function 0", self.properties.bad_value("addr")),
                None => bail!("{}", self.properties.bad_value("addr")),
            },
        })
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
        if let Make::Pci(_) = kind.make {
            sockets.root.find_slot(self.slot()?, &name)?;
        }
        let mut making = Making { user: &user, backends, sockets };
        let place = match kind.make {
            Make::Pci(make) => self.plug_pci(make, &mut making, &name),
            Make::Scsi(make) => self.plug_scsi(make, &mut making),
        };
        match place {
            Ok(place) => Ok(Device { model: kind.name, user, place }),
            Err(e) => {
                backends.release(&user);
                Err(e)
            }
        }
    }

    fn plug_pci(
        &self,
        make: fn(&Properties, &mut Making) -> Result<Arc<dyn VirtioDevice>>,
        making: &mut Making,
        name: &str,
    ) -> Result<Place> {
        let (sockets, wanted) = (making.sockets, self.slot()?);
        let face = make(&self.properties, making)?;
        let vectors = self.properties.number("vectors");
        let (mem, interrupts) = (sockets.mem.clone(), sockets.interrupts.clone());
        let slow = sockets.slow.clone();
        let pci = VirtioPci::new(face.clone(), name.to_string(), mem, interrupts, slow, vectors);
        let slot = sockets.root.plug(Arc::new(pci), wanted, name)?;
        Ok(Place::Slot(slot, face))
    }

    fn plug_scsi(
        &self,
        make: fn(&Properties, &mut Making, Address) -> Result<Arc<Unit>>,
        making: &mut Making,
    ) -> Result<Place> {
        let wanted = self.properties.text("bus");
        let bus = making.sockets.buses.iter().find(|b| wanted.is_none_or(|w| b.name == w));
        let Some(bus) = bus.cloned() else { bail!("Bus '{}' not found", wanted.unwrap_or("SCSI")) };
        if let Some(channel) = self.properties.number::<u32>("channel").filter(|c| *c != 0) {
            bail!("bad scsi channel id: {channel}");
        }
        let address = bus.place(self.properties.number("scsi-id"), self.properties.number("lun"))?;
        let unit = make(&self.properties, making, address)?;
        bus.attach(unit.clone());
        Ok(Place::Unit(bus, unit))
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
    ("rerror", Type::Word(&["auto", "report", "ignore", "stop", "enospc"])),
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
        num_queues: p.number("num-queues").unwrap_or(making.queues()),
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
        removable: false,
        whole: false,
        write_cache: p.text("write-cache").filter(|w| *w != "auto").map(|w| w == "on"),
        rerror: p.text("rerror").map(str::to_string),
        werror: p.text("werror").map(str::to_string),
    };
    let handle = making.backends.drive("virtio-blk-pci.drive", Some(drive), making.user, &usage)?;
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
