//! The commands that may run out of band: they free what hangs. Clients that speak out-of-band
//! execution expect them wherever it is offered.
//!
//! Owns: their QMP form. Nothing in this program can hang so far (no network storage, no migration),
//! which is what they answer. Never: anything else. Threads: control. Locks: none.

use super::schema::{Cx, Empty};
use crate::error::{Class, Error, Result};
use crate::{commands, wire_struct, wire_union};

commands! {
    /// Out-of-band commands.
    pub static OOB;

    /// Breaks connections that hang, and lets what waits for them fail. Fails without having
    /// done anything if one of the instances is not in `query-yank`.
    oob "yank" => yank {
        /// What to free.
        instances: Vec<YankInstance>,
    } -> ();

    /// What `yank` can free now.
    oob "query-yank" => query_yank {} -> Vec<YankInstance>;

    /// Interrupts a postcopy migration whose connection hangs.
    oob "migrate-pause" => migrate_pause {} -> ();
}

wire_union! {
    /// Something that can hang.
    pub struct YankInstance {}
    /// What it is.
    "type" => pub enum YankInstanceType as instance {
        /// A node whose storage is behind a network.
        "block-node" BlockNode(YankInstanceBlockNode),
        /// A character device on a socket.
        "chardev" Chardev(YankInstanceChardev),
        /// The migration.
        "migration" Migration(Empty),
    }
}

wire_struct! {
    /// A node.
    pub struct YankInstanceBlockNode {
        /// Its name.
        "node-name" node_name: String,
    }
}

wire_struct! {
    /// A character device.
    pub struct YankInstanceChardev {
        /// Its name.
        id: String,
    }
}

fn yank(cx: &mut Cx, instances: Vec<YankInstance>) -> Result<()> {
    let there = query_yank(cx)?;
    if instances.iter().all(|i| there.contains(i)) {
        return Ok(());
    }
    Err(Error::of(Class::DeviceNotFound, "Instance not found"))
}

fn query_yank(_: &mut Cx) -> Result<Vec<YankInstance>> {
    Ok(Vec::new())
}

fn migrate_pause(_: &mut Cx) -> Result<()> {
    Err(Error::new(
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
    ))
}
