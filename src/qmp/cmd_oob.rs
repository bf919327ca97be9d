//! The commands that may run out of band: they free what hangs. Clients that speak out-of-band
//! execution expect them wherever it is offered.
//!
//! Owns: their QMP form. What can hang are nodes on an NBD server; there is no migration. Never: uses
//! the VM, which may be what hangs. Threads: control, and those of clients ([`oob`](super::oob)).
//! Locks: none.

use super::schema::{Empty, Yanks};
use crate::error::{Class, Error, Result};
use crate::{commands, wire_struct, wire_union};

commands! {
    /// Out-of-band commands.
    pub static OOB;

    /// Breaks connections that hang, for good, and lets what waits for them fail: a node is of no
    /// use any more afterwards. Fails without having done anything if one of the instances is not in
    /// `query-yank`.
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

fn yank(yanks: &Yanks, instances: Vec<YankInstance>) -> Result<()> {
    let node = |i: &YankInstance| match &i.instance {
        YankInstanceType::BlockNode(b) => Some(b.node_name.clone()),
        YankInstanceType::Chardev(_) | YankInstanceType::Migration(_) => None,
    };
    let there = instances.iter().map(node).collect::<Option<Vec<String>>>();
    let there = there.is_some_and(|n| yanks.pull(&n.iter().map(String::as_str).collect::<Vec<_>>()));
    if there { Ok(()) } else { Err(Error::of(Class::DeviceNotFound, "Instance not found")) }
}

fn query_yank(yanks: &Yanks) -> Result<Vec<YankInstance>> {
    let instance = |node_name| YankInstanceType::BlockNode(YankInstanceBlockNode { node_name });
    Ok(yanks.nodes().into_iter().map(|n| YankInstance { instance: instance(n) }).collect())
}

fn migrate_pause(_: &Yanks) -> Result<()> {
    Err(Error::new(
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state",
    ))
}
