//! `-drive`: how fast a drive may be used, and what is counted of it.
//!
//! Owns: the form of `throttling.*` and `stats-*`, QEMU's texts. Never: opens anything. Threads:
//! control. Locks: none.

use super::throttle_group::ThrottleLimits;
use crate::bail;
use crate::block::handle::Handle;
use crate::block::throttle::{Group, Limits};
use crate::error::{Error, Result};
use crate::qapi::{Path, Rest, Wire};
use crate::wire_struct;
use serde_json::{Map, Value};
use std::sync::Arc;

wire_struct! {
    /// `throttling`.
    struct Throttling {
        /// The group; the drive's own by default.
        group: Option<String>,
        /// The limits.
        rest: Rest,
    }
}

/// See the module's head.
#[derive(Default)]
pub struct DriveLimits {
    limits: Option<(Option<String>, Limits)>,
    /// Refused requests count as use of the disk, and failed ones.
    account: (bool, bool),
    /// Seconds.
    intervals: Vec<u64>,
}

/// The members of `map` that belong to `name`: those of a table, and those that are called
/// `NAME.MEMBER`.
fn table(map: &mut Map<String, Value>, name: &str) -> Result<Map<String, Value>> {
    let mut found = match map.remove(name) {
        None => Map::new(),
        Some(Value::Object(table)) => table,
        // `stats-intervals = [60, 3600]`
        Some(Value::Array(list)) => list.into_iter().enumerate().map(|(n, v)| (n.to_string(), v)).collect(),
        Some(_) => bail!("Invalid parameter type for '{name}', expected: object"),
    };
    let prefix = format!("{name}.");
    let keys: Vec<_> = map.keys().filter(|k| k.starts_with(&prefix)).cloned().collect();
    for key in keys {
        if let Some(value) = map.remove(&key) {
            found.insert(key[prefix.len()..].to_string(), value);
        }
    }
    Ok(found)
}

fn flag(map: &mut Map<String, Value>, name: &str) -> Result<bool> {
    match map.remove(name) {
        None => Ok(true),
        Some(value) => bool::take(value, &Path::Root.member(name)),
    }
}

impl DriveLimits {
    /// Takes its members out of a drive's.
    pub fn take(map: &mut Map<String, Value>) -> Result<DriveLimits> {
        let throttling = table(map, "throttling")?;
        let mut limits = None;
        if !throttling.is_empty() {
            let t = Throttling::take(Value::Object(throttling), &Path::Root.member("throttling"))?;
            let given = ThrottleLimits::take(Value::Object(t.rest.0), &Path::Root.member("throttling"))?;
            limits = Some((t.group, given.limits()?));
        }
        let account = (flag(map, "stats-account-invalid")?, flag(map, "stats-account-failed")?);
        let mut intervals = Vec::new();
        for (_, value) in table(map, "stats-intervals")? {
            match value.as_i64() {
                Some(n) if n > 0 && n <= u32::MAX.into() => intervals.push(n.unsigned_abs()),
                Some(n) => bail!("Invalid interval length: {n}"),
                None => return Err(Error::new("The specification of stats-intervals is invalid")),
            }
        }
        Ok(DriveLimits { limits, account, intervals })
    }

    /// The drive keeps to it from now on. `find`: the group of that name, if there is one.
    pub fn apply(self, handle: &Handle, find: impl FnOnce(&str) -> Option<Arc<Group>>) {
        handle.stats.set_account(self.account.0, self.account.1);
        self.intervals.iter().for_each(|seconds| handle.stats.add_interval(*seconds));
        if let Some((group, limits)) = self.limits.filter(|(_, l)| l.any()) {
            let name = group.unwrap_or_else(|| handle.name().to_string());
            let group = find(&name).unwrap_or_else(|| Group::new(&name));
            group.set_limits(limits);
            handle.throttle(Some(group.join()));
        }
    }
}

#[cfg(test)]
#[path = "drive_limits_test.rs"]
mod tests;
