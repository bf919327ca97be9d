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
        // The node itself first: what it holds in memory goes to files that are still writable.
        for (n, one) in all.iter().enumerate() {
            if let Err(e) = one.driver.set_read_only(read_only) {
                turn_back(&all[..n], read_only);
                begin_again(&all[..n], read_only);
                return Err(e.into());
            }
        }
        all.iter().for_each(|n| n.mark_read_only(read_only));
        let mut done = self.refresh();
        if done.is_ok() && !read_only {
            let begun: std::io::Result<()> = all.iter().rev().try_for_each(|n| n.driver.begin_writing());
            done = begun.map_err(Into::into);
        }
        if done.is_err() {
            turn_back(&all, read_only);
            all.iter().for_each(|n| n.mark_read_only(!read_only));
            if let Err(e) = self.refresh() {
                log::error!("the permissions of before could not be had again: {e}");
            }
            begin_again(&all, read_only);
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

fn turn_back(nodes: &[Arc<Node>], read_only: bool) {
    for node in nodes {
        if let Err(e) = node.driver.set_read_only(!read_only) {
            log::error!("node '{}' does not turn back: {e}", node.name);
        }
    }
}

/// Those that were to turn read-only are writable again: what they wrote for that is out of date.
fn begin_again(nodes: &[Arc<Node>], read_only: bool) {
    for node in nodes.iter().rev().filter(|_| read_only) {
        if let Err(e) = node.driver.begin_writing() {
            log::error!("node '{}' should not be written to: {e}", node.name);
        }
    }
}
