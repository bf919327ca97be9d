//! A node of the block graph, and the edges between nodes.
//!
//! Owns: a driver, and the checks before it (bounds, alignment, read-only). Never: knows who is
//! above. Threads: I/O from any; edges are set by the control thread only, with the gates above
//! closed. Locks: an edge's own, for the moment of a clone.

use super::driver::Driver;
use std::sync::{Arc, PoisonError, RwLock};

/// A connection from a user (a driver or a [`Handle`](super::handle::Handle)) down to a node.
pub struct Edge {
    /// `file`, `backing`, `data-file`, `children.0`, `root`…
    pub role: String,
    to: RwLock<Option<Arc<Node>>>,
}

impl Edge {
    /// A new edge to `node`, or to nothing (no backing file, no medium).
    pub fn new(role: impl Into<String>, node: Option<Arc<Node>>) -> Arc<Edge> {
        Arc::new(Edge { role: role.into(), to: RwLock::new(node) })
    }

    /// The node below, if any.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.to.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Points the edge elsewhere. Only the graph does this, with the gates above closed.
    pub(super) fn set(&self, node: Option<Arc<Node>>) -> Option<Arc<Node>> {
        std::mem::replace(&mut *self.to.write().unwrap_or_else(PoisonError::into_inner), node)
    }
}

/// A node: a name, a driver, and the checks in front of it.
pub struct Node {
    /// Unique in the graph; `#blockNNN` when it was not given.
    pub name: String,
    /// The format, protocol or filter.
    pub driver: Box<dyn Driver>,
    /// Writes are refused with EROFS-like errors.
    pub read_only: bool,
}
