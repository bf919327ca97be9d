//! The driver `throttle`: a filter that keeps to the limits of a `throttle-group`.
//!
//! A request waits here with a ticket of its disk's gate in hand; so whoever closes a gate lets all
//! that wait go on ([`Driver::hurry`]).
//!
//! Owns: a place in a group. Never: the limits (`throttle.rs` does). Threads: I/O from any; reopen on
//! the control thread. Locks: its place's, for the moment of a clone.

use super::driver::{Driver, Flags, Perm};
use super::node::Edge;
use super::open::{Child, Open, Opening};
use super::reopen_options::{Ready, Reopening};
use super::throttle::Member;
use crate::bail;
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Map, Value, json};
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

/// Options of `throttle`.
pub struct ThrottlePlan {
    /// What is filtered.
    pub file: Child,
    /// The group's name.
    pub group: String,
}

/// See the module's head.
pub struct Throttle {
    file: Arc<Edge>,
    member: RwLock<Arc<Member>>,
}

impl Open for ThrottlePlan {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let file = cx.child("file", self.file, (Perm::NONE, Perm::ALL))?;
        let Some(group) = cx.throttle_group(&self.group) else {
            bail!("Throttle group '{}' does not exist", self.group);
        };
        Ok(Box::new(Throttle { file, member: RwLock::new(group.join()) }))
    }
}

impl Throttle {
    fn member(&self) -> Arc<Member> {
        self.member.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Driver for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn throttled(&self) -> Option<Arc<Member>> {
        Some(self.member())
    }

    fn hurry(&self, on: bool) {
        self.member().exempt(on);
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.member().wait(true, to.len() as u64);
        self.file.need()?.read(off, to)
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.member().wait(false, from.len() as u64);
        self.file.need()?.write(off, from, flags)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.member().wait(false, len);
        self.file.need()?.zero(off, len, flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.member().wait(false, len);
        self.file.need()?.discard(off, len)
    }

    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let ready = || -> Result<Ready<'a>> {
            let name = how.take("throttle-group").and_then(Value::as_str).unwrap_or_default();
            let Some(group) = how.throttle_group(name) else {
                bail!("Throttle group '{name}' does not exist");
            };
            if Arc::ptr_eq(&group, self.member().group()) {
                return Ok(Box::new(|| {}));
            }
            let member = group.join();
            Ok(Box::new(move || {
                *self.member.write().unwrap_or_else(PoisonError::into_inner) = member;
            }))
        };
        Some(ready())
    }

    fn own_options(&self) -> Map<String, Value> {
        Map::from_iter([("throttle-group".to_string(), json!(self.member().group().name))])
    }
}

#[cfg(test)]
#[path = "filter_throttle_test.rs"]
mod tests;
