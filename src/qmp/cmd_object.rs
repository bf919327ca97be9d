//! The user's objects: `object-add`, `object-del`, `query-iothreads`.
//!
//! Owns: their form. Never: knows a type of object (`control/objects.rs` does). Threads: control.
//! Locks: none.

use super::schema::{Cx, Object, Path, Ty, Value, Wire};
use crate::control::objects::ObjectOptions;
use crate::error::Result;
use crate::virtio::worker::IoThread;
use crate::{commands, wire_struct};
use std::sync::Arc;

commands! {
    /// Objects.
    pub static OBJECT;

    /// Makes an object: a secret, a thread. Its properties stand beside `qom-type` and `id`; until
    /// QEMU 6.0 they stood in `props`, which works too.
    "object-add" => object_add(ObjectAdd) -> ();

    /// Deletes an object that nobody uses.
    "object-del" => object_del {
        /// Its name.
        id: String,
    } -> ();

    /// The threads that `object-add` has made.
    "query-iothreads" => query_iothreads {} -> Vec<IOThreadInfo>;
}

/// `ObjectOptions`, of which some may stand in a member `props`.
struct ObjectAdd(ObjectOptions);

impl Wire for ObjectAdd {
    const TY: Ty = ObjectOptions::TY;

    fn take(mut v: Value, at: &Path) -> Result<ObjectAdd> {
        if let Some(map) = v.as_object_mut()
            && let Some(props) = map.remove("props")
        {
            let Value::Object(props) = props else { return Err(at.member("props").wrong_type("dict")) };
            merge(map, props)?;
        }
        ObjectOptions::take(v, at).map(ObjectAdd)
    }

    fn give(self) -> Value {
        self.0.give()
    }
}

/// Adds `props`; one that is there already is not to be overruled.
fn merge(map: &mut Object, props: Object) -> Result<()> {
    for (name, value) in props {
        if map.contains_key(&name) {
            return Err(Path::Root.member("props").member(&name).unexpected());
        }
        map.insert(name, value);
    }
    Ok(())
}

wire_struct! {
    /// A thread.
    pub struct IOThreadInfo {
        /// Its name.
        id: String,
        /// Its number in the host.
        "thread-id" thread_id: i64,
        /// Nanoseconds for which it looks for the next request before it sleeps.
        "poll-max-ns" poll_max_ns: i64,
        /// By which factor that time grows; 0 is 2.
        "poll-grow" poll_grow: i64,
        /// By which divisor it shrinks; 0: to nothing.
        "poll-shrink" poll_shrink: i64,
        /// Requests that are made at once at most: no limit.
        "aio-max-batch" aio_max_batch: i64,
    }
}

fn object_add(cx: &mut Cx, options: ObjectAdd) -> Result<()> {
    cx.vm.add_object(options.0)
}

fn object_del(cx: &mut Cx, id: String) -> Result<()> {
    cx.vm.delete_object(&id)
}

fn query_iothreads(cx: &mut Cx) -> Result<Vec<IOThreadInfo>> {
    let one = |(id, thread): (&str, &Arc<IoThread>)| IOThreadInfo {
        id: id.to_string(),
        thread_id: thread.id().into(),
        poll_max_ns: thread.poll_max().as_nanos().try_into().unwrap_or(i64::MAX),
        poll_grow: thread.pace().grow.into(),
        poll_shrink: thread.pace().shrink.into(),
        aio_max_batch: 0,
    };
    Ok(cx.vm.objects.all().map(one).collect())
}

#[cfg(test)]
#[path = "cmd_object_test.rs"]
mod tests;
