//! The object `throttle-group`: limits by name.
//!
//! Owns: the form of its properties. Never: waits (`block/throttle.rs`). Threads: control. Locks: none.

use crate::block::throttle::{Group, Limit, Limits, Which};
use crate::error::{Error, Result};
use crate::{bail, wire_struct};
use std::sync::Arc;

wire_struct! {
    /// Limits, in bytes and operations a second; 0, and absent, is none.
    pub struct ThrottleLimits {
        /// Operations a second.
        "iops-total" iops_total: Option<i64>,
        /// The same in a burst.
        "iops-total-max" iops_total_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "iops-total-max-length" iops_total_max_length: Option<i64>,
        /// Reads a second.
        "iops-read" iops_read: Option<i64>,
        /// The same in a burst.
        "iops-read-max" iops_read_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "iops-read-max-length" iops_read_max_length: Option<i64>,
        /// Writes a second.
        "iops-write" iops_write: Option<i64>,
        /// The same in a burst.
        "iops-write-max" iops_write_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "iops-write-max-length" iops_write_max_length: Option<i64>,
        /// Bytes a second.
        "bps-total" bps_total: Option<i64>,
        /// The same in a burst.
        "bps-total-max" bps_total_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "bps-total-max-length" bps_total_max_length: Option<i64>,
        /// Bytes read a second.
        "bps-read" bps_read: Option<i64>,
        /// The same in a burst.
        "bps-read-max" bps_read_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "bps-read-max-length" bps_read_max_length: Option<i64>,
        /// Bytes written a second.
        "bps-write" bps_write: Option<i64>,
        /// The same in a burst.
        "bps-write-max" bps_write_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "bps-write-max-length" bps_write_max_length: Option<i64>,
        /// Bytes that count as one operation; longer requests count as several.
        "iops-size" iops_size: Option<i64>,
    }
}

wire_struct! {
    /// Limits that the disks and nodes in the group share.
    pub struct ThrottleGroupProperties {
        /// The limits.
        limits: Option<ThrottleLimits>,
        /// Operations a second.
        "x-iops-total" x_iops_total: Option<i64>,
        /// The same in a burst.
        "x-iops-total-max" x_iops_total_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-iops-total-max-length" x_iops_total_max_length: Option<i64>,
        /// Reads a second.
        "x-iops-read" x_iops_read: Option<i64>,
        /// The same in a burst.
        "x-iops-read-max" x_iops_read_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-iops-read-max-length" x_iops_read_max_length: Option<i64>,
        /// Writes a second.
        "x-iops-write" x_iops_write: Option<i64>,
        /// The same in a burst.
        "x-iops-write-max" x_iops_write_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-iops-write-max-length" x_iops_write_max_length: Option<i64>,
        /// Bytes a second.
        "x-bps-total" x_bps_total: Option<i64>,
        /// The same in a burst.
        "x-bps-total-max" x_bps_total_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-bps-total-max-length" x_bps_total_max_length: Option<i64>,
        /// Bytes read a second.
        "x-bps-read" x_bps_read: Option<i64>,
        /// The same in a burst.
        "x-bps-read-max" x_bps_read_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-bps-read-max-length" x_bps_read_max_length: Option<i64>,
        /// Bytes written a second.
        "x-bps-write" x_bps_write: Option<i64>,
        /// The same in a burst.
        "x-bps-write-max" x_bps_write_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        "x-bps-write-max-length" x_bps_write_max_length: Option<i64>,
        /// Bytes that count as one operation.
        "x-iops-size" x_iops_size: Option<i64>,
    }
}

/// A member of `limits`, or else the property that was there before it.
fn either(limits: Option<i64>, property: Option<i64>) -> Result<Option<u64>> {
    match (limits, property) {
        // What is negative is out of range, as a large number is.
        (Some(n), _) => Ok(Some(n.cast_unsigned())),
        (None, Some(n)) if n < 0 => Err(Error::new("Property values cannot be negative")),
        (None, n) => Ok(n.map(i64::cast_unsigned)),
    }
}

impl ThrottleLimits {
    /// Those that make sense together.
    pub fn limits(self) -> Result<Limits> {
        ThrottleGroupProperties { limits: Some(self), ..ThrottleGroupProperties::none() }.limits()
    }
}

impl ThrottleGroupProperties {
    fn none() -> ThrottleGroupProperties {
        ThrottleGroupProperties {
            limits: None,
            x_iops_total: None,
            x_iops_total_max: None,
            x_iops_total_max_length: None,
            x_iops_read: None,
            x_iops_read_max: None,
            x_iops_read_max_length: None,
            x_iops_write: None,
            x_iops_write_max: None,
            x_iops_write_max_length: None,
            x_bps_total: None,
            x_bps_total_max: None,
            x_bps_total_max_length: None,
            x_bps_read: None,
            x_bps_read_max: None,
            x_bps_read_max_length: None,
            x_bps_write: None,
            x_bps_write_max: None,
            x_bps_write_max_length: None,
            x_iops_size: None,
        }
    }

    /// The group that has these limits.
    pub fn group(&self, name: &str) -> Result<Arc<Group>> {
        let limits = self.limits()?;
        let group = Group::new(name);
        group.set_limits(limits);
        Ok(group)
    }

    fn limits(&self) -> Result<Limits> {
        let of = |f: fn(&ThrottleLimits) -> Option<i64>| self.limits.as_ref().and_then(f);
        let mut limits = Limits::new(either(of(|l| l.iops_size), self.x_iops_size)?.unwrap_or(0));
        for (which, word, avg, max, length) in [
            (
                Which::OpsTotal,
                "iops-total",
                either(of(|l| l.iops_total), self.x_iops_total)?,
                either(of(|l| l.iops_total_max), self.x_iops_total_max)?,
                either(of(|l| l.iops_total_max_length), self.x_iops_total_max_length)?,
            ),
            (
                Which::OpsRead,
                "iops-read",
                either(of(|l| l.iops_read), self.x_iops_read)?,
                either(of(|l| l.iops_read_max), self.x_iops_read_max)?,
                either(of(|l| l.iops_read_max_length), self.x_iops_read_max_length)?,
            ),
            (
                Which::OpsWrite,
                "iops-write",
                either(of(|l| l.iops_write), self.x_iops_write)?,
                either(of(|l| l.iops_write_max), self.x_iops_write_max)?,
                either(of(|l| l.iops_write_max_length), self.x_iops_write_max_length)?,
            ),
            (
                Which::BpsTotal,
                "bps-total",
                either(of(|l| l.bps_total), self.x_bps_total)?,
                either(of(|l| l.bps_total_max), self.x_bps_total_max)?,
                either(of(|l| l.bps_total_max_length), self.x_bps_total_max_length)?,
            ),
            (
                Which::BpsRead,
                "bps-read",
                either(of(|l| l.bps_read), self.x_bps_read)?,
                either(of(|l| l.bps_read_max), self.x_bps_read_max)?,
                either(of(|l| l.bps_read_max_length), self.x_bps_read_max_length)?,
            ),
            (
                Which::BpsWrite,
                "bps-write",
                either(of(|l| l.bps_write), self.x_bps_write)?,
                either(of(|l| l.bps_write_max), self.x_bps_write_max)?,
                either(of(|l| l.bps_write_max_length), self.x_bps_write_max_length)?,
            ),
        ] {
            let length = length.unwrap_or(1);
            if length > u32::MAX.into() {
                bail!("{word}-max-length value must be in the range [0, {}]", u32::MAX);
            }
            limits.set(which, Limit { avg: avg.unwrap_or(0), max: max.unwrap_or(0), length });
        }
        limits.check().map_err(Error::new)?;
        Ok(limits)
    }
}

#[cfg(test)]
#[path = "throttle_group_test.rs"]
mod tests;
