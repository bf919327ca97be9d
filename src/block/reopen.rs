//! Nodes that turn read-only, or writable, while they are in use.
//!
//! Owns: the order of it. Never: options. Threads: control. Locks: none.

use super::driver::Perm;
use super::graph::Graph;
use super::node::Node;
use crate::bail;
use crate::error::Result;
use std::sync::Arc;

impl Graph {
    /// Makes `node` read-only or writable, with the nodes that hold its bytes, unless those have a
    /// life of their own (`blockdev-add`). Fails, and changes nothing, when somebody writes to it, or
    /// when it cannot be written to (the host's permissions, a lock, a corrupt image).
    pub fn set_read_only(&mut self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        if node.read_only() == read_only {
            return Ok(());
        }
        let writing = Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        if read_only && self.perm_of(node).0 & writing != Perm::NONE {
            bail!("Node '{}' is being written to", node.name);
        }
        if !read_only && node.options().force_share {
            bail!("Node '{}' is opened with force-share=on", node.name);
        }
        let mut all = vec![node.clone()];
        self.storage_of(node, read_only, &mut all);
        let turned: Vec<_> = all.into_iter().map(|n| (n, read_only)).collect();
        self.turn(&turned, |graph| graph.refresh(), |_| {})
    }

    /// Makes each of these nodes, parents before their children, read-only (`true`) or writable,
    /// and then does `f`, which checks the permissions. If anything fails, nothing has changed: `undo`
    /// is called if it was later than `f`.
    pub(super) fn turn(
        &mut self,
        nodes: &[(Arc<Node>, bool)],
        f: impl FnOnce(&mut Graph) -> Result<()>,
        undo: impl FnOnce(&mut Graph),
    ) -> Result<()> {
        // Parents first: what they hold in memory goes to files that are still writable.
        for (n, (node, read_only)) in nodes.iter().enumerate() {
            if let Err(e) = node.driver.set_read_only(*read_only) {
                turn_back(&nodes[..n]);
                return Err(e.into());
            }
        }
        nodes.iter().for_each(|(n, read_only)| n.mark_read_only(*read_only));
        let mut done = f(self);
        if done.is_ok() {
            let mut writable = nodes.iter().rev().filter(|(_, read_only)| !read_only);
            done = writable.try_for_each(|(n, _)| n.driver.begin_writing().map_err(Into::into));
            if done.is_err() {
                undo(self);
            }
        }
        if done.is_err() {
            turn_back(nodes);
            nodes.iter().for_each(|(n, read_only)| n.mark_read_only(!read_only));
            if let Err(e) = self.refresh() {
                log::error!("the permissions of before could not be had again: {e}");
            }
        }
        done
    }

    /// The nodes below that hold `node`'s bytes and go with it.
    fn storage_of(&self, node: &Arc<Node>, read_only: bool, out: &mut Vec<Arc<Node>>) {
        for edge in node.driver.edges().iter().filter(|e| e.role != "backing") {
            let Some(below) = edge.node() else { continue };
            let known = out.iter().any(|n| Arc::ptr_eq(n, &below));
            if known || below.read_only() == read_only || self.is_monitor_owned(&below) {
                continue;
            }
            out.push(below.clone());
            self.storage_of(&below, read_only, out);
        }
    }
}

fn turn_back(nodes: &[(Arc<Node>, bool)]) {
    for (node, read_only) in nodes {
        if let Err(e) = node.driver.set_read_only(!read_only) {
            log::error!("node '{}' does not turn back: {e}", node.name);
        }
    }
}
