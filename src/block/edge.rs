//! The edges of the block graph: who is connected to which node.
//!
//! Owns: the pointer of one connection. Never: opens the gates above, which are closed while it is set
//! ([`Graph`](super::graph::Graph) does). Threads: any look; the control thread sets. Locks: an edge's
//! own, for the moment of a clone.

use super::node::{Node, errno};
use std::io;
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

    /// Asks the node below something that does not block (its length): cheaper than [`Edge::node`].
    pub fn peek<T>(&self, f: impl FnOnce(&Node) -> T) -> Option<T> {
        self.to.read().unwrap_or_else(PoisonError::into_inner).as_deref().map(f)
    }

    /// The node below; ENOMEDIUM without one.
    pub fn need(&self) -> io::Result<Arc<Node>> {
        self.node().ok_or_else(|| errno(libc::ENOMEDIUM))
    }

    /// Points the edge elsewhere. Only the graph does this, with the gates above closed.
    pub(super) fn set(&self, node: Option<Arc<Node>>) -> Option<Arc<Node>> {
        std::mem::replace(&mut *self.to.write().unwrap_or_else(PoisonError::into_inner), node)
    }
}
