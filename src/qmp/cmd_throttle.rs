//! How fast disks may be used: `block_set_io_throttle`.
//!
//! Owns: the form of its arguments. Never: waits (`block/throttle.rs`). Threads: control. Locks: none.

use super::schema::Cx;
use crate::block::throttle::{Group, Limit, Limits, Which};
use crate::error::{Class, Error, Result};
use crate::{bail, commands, wire_struct};

commands! {
    /// Limits of disks.
    pub static THROTTLE;

    /// Limits how fast a disk may be used. Disks of one group share its limits; all zero takes the
    /// disk out of its group.
    "block_set_io_throttle" => block_set_io_throttle(BlockIOThrottle) -> ();
}

wire_struct! {
    /// Limits, in bytes and operations a second; 0 is none.
    pub struct BlockIOThrottle {
        /// The drive's name.
        device: Option<String>,
        /// The guest device's id or path. One of `device` and `id` is needed.
        id: Option<String>,
        /// Bytes read and written.
        bps: i64,
        /// Bytes read.
        bps_rd: i64,
        /// Bytes written.
        bps_wr: i64,
        /// Reads and writes.
        iops: i64,
        /// Reads.
        iops_rd: i64,
        /// Writes.
        iops_wr: i64,
        /// The same in a burst; 0 or absent: a tenth of a second of the limit.
        bps_max: Option<i64>,
        /// Of reads.
        bps_rd_max: Option<i64>,
        /// Of writes.
        bps_wr_max: Option<i64>,
        /// Operations in a burst.
        iops_max: Option<i64>,
        /// Of reads.
        iops_rd_max: Option<i64>,
        /// Of writes.
        iops_wr_max: Option<i64>,
        /// How long such a burst may last, in seconds; 1 by default.
        bps_max_length: Option<i64>,
        /// Of reads.
        bps_rd_max_length: Option<i64>,
        /// Of writes.
        bps_wr_max_length: Option<i64>,
        /// Of operations.
        iops_max_length: Option<i64>,
        /// Of reads.
        iops_rd_max_length: Option<i64>,
        /// Of writes.
        iops_wr_max_length: Option<i64>,
        /// Bytes that count as one operation; longer requests count as several.
        iops_size: Option<i64>,
        /// The group; the disk's own by default.
        group: Option<String>,
    }
}

impl BlockIOThrottle {
    fn limits(&self) -> Result<Limits> {
        // What is negative is out of range, as a large number is.
        let number = |n: i64| n.cast_unsigned();
        let mut limits = Limits::new(number(self.iops_size.unwrap_or(0)));
        for (which, avg, max, length) in [
            (Which::BpsTotal, self.bps, self.bps_max, self.bps_max_length),
            (Which::BpsRead, self.bps_rd, self.bps_rd_max, self.bps_rd_max_length),
            (Which::BpsWrite, self.bps_wr, self.bps_wr_max, self.bps_wr_max_length),
            (Which::OpsTotal, self.iops, self.iops_max, self.iops_max_length),
            (Which::OpsRead, self.iops_rd, self.iops_rd_max, self.iops_rd_max_length),
            (Which::OpsWrite, self.iops_wr, self.iops_wr_max, self.iops_wr_max_length),
        ] {
            let (max, length) = (number(max.unwrap_or(0)), number(length.unwrap_or(1)));
            limits.set(which, Limit { avg: number(avg), max, length });
        }
        limits.check().map_err(Error::new)?;
        Ok(limits)
    }
}

fn block_set_io_throttle(cx: &mut Cx, args: BlockIOThrottle) -> Result<()> {
    let lost = |name: &str| Error::of(Class::DeviceNotFound, format!("Device '{name}' not found"));
    let drives = &mut cx.vm.drives;
    let (handle, path) = match (&args.device, &args.id) {
        (Some(_), Some(_)) | (None, None) => bail!("Need exactly one of 'device' and 'id'"),
        (Some(name), None) => {
            drives.find(name).map(|d| (d.handle.clone(), None)).ok_or_else(|| lost(name))?
        }
        (None, Some(id)) => {
            let drive = drives.of_device(id).ok_or_else(|| lost(id))?;
            (drive.handle.clone(), drive.device.as_ref().map(|d| d.qom_path.clone()))
        }
    };
    if handle.node().is_none() {
        bail!("Device has no medium");
    }
    let limits = args.limits()?;
    if !limits.any() {
        handle.throttle(None);
        return Ok(());
    }
    let own = if handle.name().is_empty() { path.unwrap_or_default() } else { handle.name().to_string() };
    // Without a word about it the drive stays in the group that it is in.
    let present = || handle.throttled().map_or(own, |m| m.group().name.clone());
    let wanted = args.group.unwrap_or_else(present);
    let objects = &cx.vm.objects;
    let known = objects.throttle_group(&wanted).or_else(|| cx.vm.graph.find_throttle_group(&wanted));
    let group = known.unwrap_or_else(|| Group::new(&wanted));
    group.set_limits(limits);
    if handle.throttled().is_none_or(|m| m.group().name != wanted) {
        handle.throttle(Some(group.join()));
    }
    Ok(())
}

#[cfg(test)]
#[path = "cmd_throttle_test.rs"]
mod tests;
