//! The SCSI device models: `virtio-scsi-pci`, `scsi-hd` and `scsi-cd`, with their properties.
//!
//! Owns: those tables and constructors. Never: plugs anything. Threads: control. Locks: none.

use super::device::VirtioDevice;
use super::kinds::{DriveUse, Making};
use super::properties::{Properties, Property, Type};
use super::scsi::{Scsi, ScsiConfig};
use super::scsi_unit::{Address, MAX_DATA, Unit, UnitConfig, UnitKind};
use crate::bail;
use crate::error::Result;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a `device_id` at most.
const ID_MAX: usize = 127;

pub(super) const CONTROLLER: &[Property] = &[
    ("num_queues", Type::Number(32)),
    ("virtqueue_size", Type::Number(32)),
    ("max_sectors", Type::Number(32)),
    ("cmd_per_lun", Type::Number(32)),
    ("hotplug", Type::Bool),
    ("param_change", Type::Bool),
    ("workers", Type::Number(16)),
    ("iothread", Type::Text),
    // Of QEMU's iothread; here also the workers' own.
    ("poll-max-ns", Type::Number(32)),
];

pub(super) fn make_controller(p: &Properties, making: &mut Making) -> Result<Arc<dyn VirtioDevice>> {
    let d = ScsiConfig::default();
    let iothread = p.text("iothread").map(|name| making.backends.iothread(name)).transpose()?;
    let poll = iothread.as_ref().map_or(d.poll, |io| io.poll_max());
    // Values beyond 16 bits are refused with those beyond the limits.
    let short = |name: &str, default: u16| {
        p.number::<u32>(name).map_or(default, |n| u16::try_from(n).unwrap_or(u16::MAX))
    };
    let config = ScsiConfig {
        id: making.user.id.clone(),
        num_queues: short("num_queues", making.queues()),
        queue_size: short("virtqueue_size", d.queue_size),
        max_sectors: p.number("max_sectors").unwrap_or(d.max_sectors),
        cmd_per_lun: p.number("cmd_per_lun").unwrap_or(d.cmd_per_lun),
        hotplug: p.switch("hotplug").unwrap_or(d.hotplug),
        param_change: p.switch("param_change").unwrap_or(d.param_change),
        iothread,
        workers: p.number("workers").unwrap_or(d.workers),
        poll: p.number("poll-max-ns").map_or(poll, Duration::from_nanos),
    };
    // QEMU's names: of the device, or by number.
    let bus = match &*making.user.id {
        "" => format!("scsi.{}", making.sockets.buses.iter().filter(|b| b.name.starts_with("scsi.")).count()),
        id => format!("{id}.0"),
    };
    Ok(Scsi::new(config, bus)?)
}

/// Properties of every device on a SCSI bus.
pub(super) const COMMON: &[Property] = &[
    ("id", Type::Text),
    ("bus", Type::Text),
    ("channel", Type::Number(32)),
    ("scsi-id", Type::Number(32)),
    ("lun", Type::Number(32)),
    ("drive", Type::Text),
    ("vendor", Type::Text),
    ("product", Type::Text),
    ("ver", Type::Text),
    ("serial", Type::Text),
    ("device_id", Type::Text),
    ("wwn", Type::Number(64)),
    ("rerror", Type::Word(&["auto", "report", "ignore", "stop", "enospc"])),
    ("werror", Type::Word(&["auto", "report", "ignore", "stop", "enospc"])),
    ("share-rw", Type::Bool),
    ("write-cache", Type::OnOffAuto),
    ("logical_block_size", Type::Size32),
    ("physical_block_size", Type::Size32),
    ("min_io_size", Type::Size32),
    ("opt_io_size", Type::Size32),
    ("discard_granularity", Type::Size32),
    ("max_io_size", Type::Number(64)),
];

/// Those of a disk besides.
pub(super) const HD: &[Property] = &[
    ("removable", Type::Bool),
    ("dpofua", Type::Bool),
    ("rotation_rate", Type::Number(16)),
    ("max_unmap_size", Type::Number(64)),
];

/// Those of a CD drive besides.
pub(super) const CD: &[Property] = &[];

fn unit(p: &Properties, making: &mut Making, address: Address, kind: UnitKind) -> Result<Arc<Unit>> {
    let d = UnitConfig::new(kind);
    let text = |name: &str, default: String| p.text(name).map_or(default, str::to_string);
    let serial = text("serial", d.serial);
    // As in QEMU: the serial number, or else the drive's name.
    let drive = p.text("drive").map_or("", |name| name.get(..ID_MAX).unwrap_or(name)).to_string();
    let device_id = text("device_id", if serial.is_empty() { drive } else { serial.clone() });
    let config = UnitConfig {
        kind,
        id: making.user.id.clone(),
        vendor: text("vendor", d.vendor),
        product: text("product", d.product),
        version: text("ver", d.version),
        serial,
        device_id,
        wwn: p.number("wwn").unwrap_or(d.wwn),
        logical_block_size: p.number("logical_block_size").unwrap_or(d.logical_block_size),
        physical_block_size: p
            .number("physical_block_size")
            .unwrap_or_else(|| p.number("logical_block_size").unwrap_or(0).max(d.physical_block_size)),
        min_io_size: p.number("min_io_size").unwrap_or(d.min_io_size),
        opt_io_size: p.number("opt_io_size").unwrap_or(d.opt_io_size),
        // 2^32 - 1 is QEMU's way to say "as the image says".
        discard_granularity: p.number("discard_granularity").filter(|g| *g != u32::MAX),
        removable: p.switch("removable").unwrap_or(d.removable),
        rotation_rate: p.number("rotation_rate").unwrap_or(d.rotation_rate),
        max_unmap_size: p.number("max_unmap_size").unwrap_or(d.max_unmap_size),
        max_io_size: p.number("max_io_size").unwrap_or(d.max_io_size).min(MAX_DATA),
        dpofua: p.switch("dpofua").unwrap_or(d.dpofua),
        read_only: d.read_only,
    };
    check(&config)?;
    if kind == UnitKind::Disk && p.text("drive").is_none() {
        bail!("drive property not set");
    }
    let usage = DriveUse {
        read_only: config.read_only,
        share_rw: p.switch("share-rw").unwrap_or(false),
        removable: config.removable,
        whole: true,
        write_cache: p.text("write-cache").filter(|w| *w != "auto").map(|w| w == "on"),
        rerror: p.text("rerror").map(str::to_string),
        werror: p.text("werror").map(str::to_string),
    };
    let property = format!("{}.drive", p.model());
    let handle = making.backends.drive(&property, p.text("drive"), making.user, &usage)?;
    Ok(Unit::new(address, config, handle))
}

fn check(c: &UnitConfig) -> Result<()> {
    let block = c.logical_block_size;
    for (name, size) in [("logical_block_size", block), ("physical_block_size", c.physical_block_size)] {
        if !(512..=2 << 20).contains(&size) {
            bail!("parameter {name} must be between 512 and 2097152");
        }
        if !size.is_power_of_two() {
            bail!("parameter {name} must be a power of 2");
        }
    }
    if block > c.physical_block_size {
        bail!("logical_block_size > physical_block_size not supported");
    }
    if c.kind == UnitKind::Cd && block != 2048 {
        bail!("logical_block_size of a CD drive must be 2048");
    }
    let sizes = [
        ("min_io_size", Some(c.min_io_size)),
        ("opt_io_size", Some(c.opt_io_size)),
        ("discard_granularity", c.discard_granularity),
    ];
    for (name, size) in sizes {
        if size.is_some_and(|s| s % block != 0) {
            bail!("{name} must be a multiple of logical_block_size");
        }
    }
    if c.max_unmap_size < u64::from(block) || c.max_io_size < u64::from(block) {
        bail!("max_unmap_size and max_io_size must be at least a block");
    }
    let texts = [
        ("vendor", &c.vendor, 8),
        ("product", &c.product, 16),
        ("ver", &c.version, 4),
        ("serial", &c.serial, 36),
        ("device_id", &c.device_id, ID_MAX),
    ];
    for (name, text, max) in texts {
        if text.len() > max || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            bail!("Property '{name}' must have at most {max} printable ASCII characters");
        }
    }
    Ok(())
}

pub(super) fn make_hd(p: &Properties, making: &mut Making, address: Address) -> Result<Arc<Unit>> {
    unit(p, making, address, UnitKind::Disk)
}

pub(super) fn make_cd(p: &Properties, making: &mut Making, address: Address) -> Result<Arc<Unit>> {
    unit(p, making, address, UnitKind::Cd)
}
