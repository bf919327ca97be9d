//! The filter that a job puts above an image so that its permissions are the job's to say, and so that
//! the user sees that a job is at work there. It passes everything on.
//!
//! Owns: an edge. Never: changes a request. Threads: I/O from any. Locks: none.

use crate::block::driver::{Driver, Perm};
use crate::block::filename::names;
use crate::block::graph::Graph;
use crate::block::node::{Edge, Node, NodeOptions};
use crate::error::Result;
use std::sync::Arc;

/// What a [`PassThrough`] asks of the node below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asks {
    /// What its users do, and it shares what they share.
    Same,
    /// What its users do but for consistent reads, and it lets others do everything: the job knows
    /// that what it writes below is not seen from above.
    Lenient,
}

/// See the module's head.
pub struct PassThrough {
    name: &'static str,
    file: Arc<Edge>,
    asks: Asks,
}

/// Puts a filter of the driver `driver` between `at` and everybody above it. `name`: as the user wants
/// it named; without, it is given one, and not shown to those who ask about disks.
pub fn insert(
    graph: &mut Graph,
    driver: &'static str,
    name: Option<&str>,
    at: &Arc<Node>,
    asks: Asks,
) -> Result<Arc<Node>> {
    let implicit = name.is_none();
    let name = match name {
        Some(name) => {
            graph.check_name(name)?;
            name.to_string()
        }
        None => graph.auto_name(),
    };
    let filter = PassThrough { name: driver, file: Edge::new("file", None), asks };
    // Through such a one nobody writes.
    let read_only = asks == Asks::Lenient || at.read_only();
    let options = NodeOptions { read_only, implicit, ..NodeOptions::default() };
    let node = Node::new(name, Box::new(filter), options);
    graph.insert_filter(&node, at)?;
    Ok(node)
}

impl Driver for PassThrough {
    fn name(&self) -> &'static str {
        self.name
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        match self.asks {
            Asks::Same => above,
            Asks::Lenient => (above.0 & !Perm::CONSISTENT_READ, Perm::ALL),
        }
    }

    fn filename(&self) -> String {
        self.file.node().map(|n| names(&n).shown()).unwrap_or_default()
    }
}
