//! The user's objects (`object-add`, `[[object]]`): things that have a name and are used by others.
//!
//! A new type is a row in [`ObjectType`], and its making in [`Vm::add_object`]. Owns: the list.
//! Never: JSON text, what the objects are used for. Threads: control. Locks: none.

use super::secret::{Secret, SecretProperties};
use super::throttle_group::ThrottleGroupProperties;
use super::vm::Vm;
use crate::bail;
use crate::block::graph::well_formed;
use crate::block::throttle::Group;
use crate::error::{Class, Error, Result};
use crate::virtio::worker::{IoThread, Pace};
use crate::{wire_struct, wire_union};
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

wire_union! {
    /// An object.
    pub struct ObjectOptions {}
    /// Its type.
    "qom-type" => pub enum ObjectType as kind {
        /// A thread that serves the disks that name it.
        "iothread" Iothread(IothreadProperties),
        /// A password or key.
        "secret" Secret(SecretProperties),
        /// Limits that the disks and nodes in it share.
        "throttle-group" ThrottleGroup(Box<ThrottleGroupProperties>),
    }
    .. {
        /// Its name: a letter, then letters, digits, `-`, `.`, `_`.
        id: String,
    }
}

wire_struct! {
    /// A thread for disks.
    pub struct IothreadProperties {
        /// Nanoseconds for which it looks for the next request before it sleeps, if requests have
        /// been coming in as short intervals (default: 32768; 0: never).
        "poll-max-ns" poll_max_ns: Option<i64>,
        /// By which factor that time grows when it was too short; 0 (default) is 2.
        "poll-grow" poll_grow: Option<i64>,
        /// By which divisor it shrinks when it was too long; 0 (default): to nothing.
        "poll-shrink" poll_shrink: Option<i64>,
    }
}

/// What can be kept under a name.
pub trait Object: Any {
    /// Somebody uses it, so it cannot be deleted.
    fn in_use(&self) -> bool {
        false
    }
}

impl Object for Arc<IoThread> {
    fn in_use(&self) -> bool {
        Arc::strong_count(self) > 1
    }
}

impl Object for Arc<Group> {
    fn in_use(&self) -> bool {
        Arc::strong_count(self) > 1
    }
}

struct Entry {
    id: String,
    object: Box<dyn Object>,
}

/// The objects, oldest first.
#[derive(Default)]
pub struct Objects(Vec<Entry>);

impl Objects {
    /// The object `id`, whatever it is.
    pub fn find(&self, id: &str) -> Option<&dyn Object> {
        self.0.iter().find(|e| e.id == id).map(|e| &*e.object)
    }

    /// The objects of one type, with their ids.
    pub fn all<T: Object>(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().filter_map(|e| Some((&*e.id, (&*e.object as &dyn Any).downcast_ref()?)))
    }

    /// The secret `id`.
    pub fn secret(&self, id: &str) -> Result<&Secret> {
        let Some(object) = self.find(id) else { bail!("No secret with id '{id}'") };
        match (object as &dyn Any).downcast_ref() {
            Some(secret) => Ok(secret),
            None => bail!("Object with id '{id}' is not a secret"),
        }
    }

    /// The throttle group `id`.
    pub fn throttle_group(&self, id: &str) -> Option<Arc<Group>> {
        self.all::<Arc<Group>>().find(|(known, _)| *known == id).map(|(_, group)| group.clone())
    }

    /// The secret `id`, which is a password: text without a zero byte.
    pub fn password(&self, id: &str) -> Result<Vec<u8>> {
        let bytes = self.secret(id)?.bytes();
        if bytes.contains(&0) || std::str::from_utf8(bytes).is_err() {
            bail!("Data from secret {id} is not valid UTF-8");
        }
        Ok(bytes.to_vec())
    }

    /// The thread `id`.
    pub fn iothread(&self, id: &str) -> Result<Arc<IoThread>> {
        match self.all::<Arc<IoThread>>().find(|(known, _)| *known == id) {
            Some((_, thread)) => Ok(thread.clone()),
            None => Err(Error::of(Class::DeviceNotFound, format!("Device '{id}' not found"))),
        }
    }

    fn delete(&mut self, id: &str) -> Result<()> {
        let Some(at) = self.0.iter().position(|e| e.id == id) else { bail!("object '{id}' not found") };
        if self.0[at].object.in_use() {
            bail!("object '{id}' is in use, can not be deleted");
        }
        self.0.remove(at);
        Ok(())
    }
}

impl Vm {
    /// `object-add`.
    pub fn add_object(&mut self, options: ObjectOptions) -> Result<()> {
        let id = options.id;
        if !well_formed(&id) {
            bail!("Parameter 'id' expects an identifier");
        }
        if self.objects.find(&id).is_some() {
            bail!("attempt to add duplicate property '{id}' to object (type 'container')");
        }
        let object: Box<dyn Object> = match options.kind {
            ObjectType::Iothread(options) => Box::new(iothread(&id, &options)?),
            ObjectType::Secret(options) => Box::new(Secret::load(&options, &self.objects)?),
            ObjectType::ThrottleGroup(options) => {
                if self.graph.find_throttle_group(&id).is_some() {
                    bail!("A group with this name already exists");
                }
                Box::new(options.group(&id)?)
            }
        };
        self.objects.0.push(Entry { id, object });
        Ok(())
    }

    /// `object-del`.
    pub fn delete_object(&mut self, id: &str) -> Result<()> {
        self.objects.delete(id)
    }
}

fn iothread(id: &str, options: &IothreadProperties) -> Result<Arc<IoThread>> {
    let number = |name: &str, given: Option<i64>, default: u64| match given.map(u64::try_from) {
        None => Ok(default),
        Some(Ok(n)) => Ok(n),
        Some(Err(_)) => bail!("{name} value must be in range [0, {}]", i64::MAX),
    };
    let poll_max = Duration::from_nanos(number("poll-max-ns", options.poll_max_ns, 32768)?);
    let factor = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let grow = factor(number("poll-grow", options.poll_grow, 0)?);
    let shrink = factor(number("poll-shrink", options.poll_shrink, 0)?);
    let thread = IoThread::start(&format!("IO {id}"), poll_max, Pace { grow, shrink })
        .map_err(|e| Error::from(e).context("starting a thread: "))?;
    Ok(Arc::new(thread))
}

#[cfg(test)]
#[path = "objects_test.rs"]
mod tests;
