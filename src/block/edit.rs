//! Changing what is connected to what: the gates of everybody above are closed, edges are set,
//! permissions checked, and all of it holds or nothing has happened.
//!
//! Owns: that. Never: opens anything; while a [`Quiesced`] lives, nothing slow is done. Threads:
//! control. Locks: an edge's, for a moment.

use super::graph::{Graph, Parent};
use super::handle::Handle;
use super::node::{Edge, Node};
use super::perm;
use crate::bail;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::sync::Arc;

/// Closed gates; dropping it opens them.
pub struct Quiesced {
    handles: Vec<Arc<Handle>>,
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.gate.open();
        }
    }
}

impl Quiesced {
    /// True when this handle's requests wait.
    pub fn covers(&self, handle: &Arc<Handle>) -> bool {
        self.handles.iter().any(|h| Arc::ptr_eq(h, handle))
    }
}

/// True when `node` is one of `at`, or above one. Every node is looked at once, however many ways
/// lead to it.
pub(super) fn is_above(node: &Arc<Node>, at: &[&Arc<Node>]) -> bool {
    let mut todo = vec![node.clone()];
    let mut seen = HashSet::new();
    while let Some(node) = todo.pop() {
        if at.iter().any(|n| Arc::ptr_eq(n, &node)) {
            return true;
        }
        if seen.insert(Arc::as_ptr(&node)) {
            todo.extend(node.driver.edges().iter().filter_map(|e| e.node()));
        }
    }
    false
}

impl Graph {
    /// Closes the gate of every handle above any of `at`, except those in `but`, and waits until
    /// no request is behind one. All gates are closed before the first is waited for.
    pub fn quiesce(&self, at: &[&Arc<Node>], but: &[&Arc<Handle>]) -> Quiesced {
        let above = |h: &&Arc<Handle>| {
            !but.iter().any(|b| Arc::ptr_eq(b, h)) && h.root.node().is_some_and(|n| is_above(&n, at))
        };
        self.quiesce_handles(self.handles.iter().filter(above).cloned().collect())
    }

    /// Closes the gates of these handles, and waits.
    pub fn quiesce_handles(&self, handles: Vec<Arc<Handle>>) -> Quiesced {
        for handle in &handles {
            handle.gate.close();
        }
        self.wait_empty(&handles);
        Quiesced { handles }
    }

    /// Changes edges as `f` says, checks cycles and permissions, and puts everything back if
    /// either, or `f` itself, fails. `quiesced` must cover every handle above the changed edges.
    pub fn edit(&mut self, quiesced: &Quiesced, f: impl FnOnce(&mut Edit) -> Result<()>) -> Result<()> {
        self.change(quiesced, f).map(drop)
    }

    /// The same, for who may want everything back as long as the guests wait.
    pub(super) fn change(
        &mut self,
        quiesced: &Quiesced,
        f: impl FnOnce(&mut Edit) -> Result<()>,
    ) -> Result<Changed> {
        let mut edit = Edit { graph: self, quiesced, undo: Vec::new() };
        let done = f(&mut edit);
        let undo = Changed(edit.undo);
        if let Err(e) = done.and_then(|()| self.refresh()) {
            self.put_back(undo);
            return Err(e);
        }
        self.refresh_limits();
        Ok(undo)
    }

    /// Everything is connected as before a change. What was changed later has been put back already.
    pub(super) fn put_back(&mut self, changed: Changed) {
        for (edge, old) in changed.0.into_iter().rev() {
            edge.set(old);
        }
        if let Err(e) = self.refresh() {
            log::error!("the permissions of before could not be had again: {e}");
        }
        self.refresh_limits();
    }

    /// Who is above what has changed may have other limits now.
    pub(super) fn refresh_limits(&self) {
        let nodes: Vec<_> = self.nodes().cloned().collect();
        let order = perm::order(&nodes).unwrap_or_default();
        order.iter().rev().for_each(|n| n.refresh_limits());
    }
}

/// Filters that come and go under running guests: what jobs put above the nodes they work on.
impl Graph {
    /// Enters `filter`, which nobody knows yet and whose filtered edge is empty, and puts it between
    /// `at` and everybody above it. On an error it is closed and forgotten.
    pub fn insert_filter(&mut self, filter: &Arc<Node>, at: &Arc<Node>) -> Result<()> {
        self.add(filter.clone())?;
        let quiesced = self.quiesce(&[at], &[]);
        let done = self.edit(&quiesced, |edit| edit.insert_filter(filter, at));
        drop(quiesced);
        if done.is_err() {
            self.collect();
        }
        done
    }

    /// Takes it out again: everybody above it is above what it filters. It is closed, unless the
    /// user owns it.
    pub fn remove_filter(&mut self, filter: &Arc<Node>) -> Result<()> {
        let quiesced = self.quiesce(&[filter], &[]);
        let done = self.edit(&quiesced, |edit| edit.remove_filter(filter));
        drop(quiesced);
        self.collect();
        done
    }
}

/// Children that come and go under running guests (`x-blockdev-change`); texts are QEMU's.
impl Graph {
    /// Makes `node`, which nobody else uses, a further child of `parent`.
    pub fn add_child(&mut self, parent: &Arc<Node>, node: &Arc<Node>) -> Result<()> {
        let Some(children) = parent.driver.children() else {
            bail!("The node {} does not support adding a child", parent.name);
        };
        if !self.parents(node).is_empty() {
            bail!("The node {} already has a parent", node.name);
        }
        let edge = Edge::new(children.new_role(node)?, Some(node.clone()));
        let _quiesced = self.quiesce(&[parent], &[]);
        children.add(&edge);
        // Looks for cycles, too.
        self.refresh().inspect_err(|_| children.take_back(&edge))
    }

    /// Takes the child of that role away from `parent`. It is closed, unless the user owns it.
    pub fn remove_child(&mut self, parent: &Arc<Node>, role: &str) -> Result<()> {
        let Some(edge) = parent.driver.edges().into_iter().find(|e| e.role == role) else {
            bail!("Node '{}' does not have child '{role}'", parent.name);
        };
        let Some(children) = parent.driver.children() else {
            bail!("The node {} does not support removing a child", parent.name);
        };
        children.may_remove()?;
        let quiesced = self.quiesce(&[parent], &[]);
        children.remove(&edge);
        drop(quiesced);
        self.collect();
        Ok(())
    }
}

fn filtered(filter: &Arc<Node>) -> Result<Arc<Edge>> {
    let none = || Error::new(format!("Node '{}' is not a filter", filter.name));
    filter.driver.filtered().cloned().ok_or_else(none)
}

/// What the edges that a change has set led to before, in the order in which they were set.
pub(super) struct Changed(Vec<(Arc<Edge>, Option<Arc<Node>>)>);

/// A change of the graph under way; see [`Graph::edit`].
pub struct Edit<'a> {
    graph: &'a Graph,
    quiesced: &'a Quiesced,
    undo: Vec<(Arc<Edge>, Option<Arc<Node>>)>,
}

impl Edit<'_> {
    /// The graph as it is now.
    pub fn graph(&self) -> &Graph {
        self.graph
    }

    /// Points `edge` to `node`, or to nothing. An error when that would make a cycle.
    pub fn set(&mut self, edge: &Arc<Edge>, node: Option<Arc<Node>>) -> Result<()> {
        debug_assert!(self.is_quiet(edge), "edge '{}' is changed under I/O", edge.role);
        let old = edge.set(node);
        let nodes: Vec<_> = self.graph.nodes().cloned().collect();
        if let Err(e) = perm::order(&nodes) {
            edge.set(old);
            return Err(e);
        }
        self.undo.push((edge.clone(), old));
        Ok(())
    }

    /// Points the root of `handle` to `node`, or to nothing (no medium).
    pub fn set_root(&mut self, handle: &Handle, node: Option<Arc<Node>>) -> Result<()> {
        self.set(&handle.root.clone(), node)
    }

    /// Makes everybody who is above `from`, except the node `but` and what `to` stands on itself (a
    /// backup's target whose backing file is the disk), be above `to` instead.
    pub fn replace(&mut self, from: &Arc<Node>, to: &Arc<Node>, but: Option<&Arc<Node>>) -> Result<()> {
        for parent in self.graph.parents(from) {
            match parent {
                Parent::Node(above, _) if but.is_some_and(|b| Arc::ptr_eq(b, &above)) => {}
                Parent::Node(above, _) if is_above(to, &[&above]) => {}
                Parent::Node(_, edge) => self.set(&edge, Some(to.clone()))?,
                Parent::Handle(handle) => self.set_root(&handle, Some(to.clone()))?,
            }
        }
        Ok(())
    }

    /// Puts `filter`, a node of the graph whose driver's [`filtered`](super::driver::Driver::filtered)
    /// edge is empty, between `at` and everybody above it.
    pub fn insert_filter(&mut self, filter: &Arc<Node>, at: &Arc<Node>) -> Result<()> {
        let edge = filtered(filter)?;
        self.replace(at, filter, Some(filter))?;
        self.set(&edge, Some(at.clone()))
    }

    /// The reverse: everybody above `filter` is above what it filters, and it is on nothing.
    pub fn remove_filter(&mut self, filter: &Arc<Node>) -> Result<()> {
        let edge = filtered(filter)?;
        if let Some(below) = edge.node() {
            self.replace(filter, &below, None)?;
        }
        self.set(&edge, None)
    }

    /// True when every handle that can come to `edge` waits at its gate.
    fn is_quiet(&self, edge: &Arc<Edge>) -> bool {
        self.graph.handles.iter().all(|h| {
            let owns = |n: &Arc<Node>| n.driver.edges().iter().any(|e| Arc::ptr_eq(e, edge));
            let owner = self.graph.nodes().find(|n| owns(n));
            let below = |root: &Arc<Node>| owner.is_some_and(|n| is_above(root, &[n]));
            let above = Arc::ptr_eq(&h.root, edge) || h.root.node().is_some_and(|n| below(&n));
            !above || self.quiesced.covers(h)
        })
    }
}

#[cfg(test)]
#[path = "edit_test.rs"]
mod tests;
