//! `blockdev-reopen`: nodes get other options while they are used, all of them or none.
//!
//! First everything is looked at and made ready, one node after the other, parents first: what the
//! driver can become, which children it gets, and that nothing else changes. Then the gates of all
//! users are closed, nodes turn read-only or writable, edges are set and permissions checked, and
//! only when all of that holds the drivers are told.
//!
//! Owns: that order, and QEMU's texts. Never: JSON, a driver's options. Threads: control. Locks: none.

use super::graph::Graph;
use super::node::{Edge, Node, NodeOptions};
use super::open::{Asked, Common, Env};
use crate::bail;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::sync::Arc;

/// The options that a node shall have, all of them.
#[derive(Default)]
pub struct Wanted {
    /// Those of every node.
    pub common: Common,
    /// All of them as they were given.
    pub given: Map<String, Value>,
    /// What is said of its children, by role.
    pub children: Vec<(String, WantedChild)>,
}

/// What is said of a child.
pub enum WantedChild {
    /// The options that it shall have; only for one that was defined with its parent.
    Options(Box<Wanted>),
    /// This one.
    Node(String),
    /// None.
    Nothing,
}

/// Does what a driver has made ready: takes effect, and cannot fail.
pub type Ready<'a> = Box<dyn FnOnce() + 'a>;

/// What a driver is asked to become. What it does not [`take`](Reopening::take) must not change.
pub struct Reopening<'a> {
    /// The options of every node, as they will be.
    pub options: NodeOptions,
    given: &'a Map<String, Value>,
    taken: RefCell<Vec<&'static str>>,
    graph: &'a Graph,
    env: &'a dyn Env,
}

impl Reopening<'_> {
    /// The driver's option `key`, which may be another one than before, or absent: the default.
    pub fn take(&self, key: &'static str) -> Option<&Value> {
        self.taken.borrow_mut().push(key);
        self.given.get(key)
    }

    /// The same for a number of bytes, or the like.
    pub fn take_size(&self, key: &'static str) -> Result<Option<u64>> {
        let bad = |v: &Value| Error::new(format!("Value '{v}' is out of range for parameter '{key}'"));
        self.take(key).map(|v| v.as_u64().ok_or_else(|| bad(v))).transpose()
    }

    /// The throttle group of that name.
    pub fn throttle_group(&self, name: &str) -> Option<Arc<super::throttle::Group>> {
        self.env.throttle_group(name).or_else(|| self.graph.find_throttle_group(name))
    }
}

/// Options of every node, which drivers have no word in.
const COMMON: &[&str] = &["cache", "discard", "read-only", "auto-read-only", "detect-zeroes"];

/// One node of the list.
struct Item {
    node: Arc<Node>,
    options: NodeOptions,
    asked: Asked,
    /// `backing` is not said.
    silent: bool,
    edges: Vec<(Arc<Edge>, Option<Arc<Node>>)>,
}

impl Graph {
    /// Gives the nodes that `list` names other options. On an error nothing has changed. `may`: whether a
    /// node may get another child than that of this edge.
    pub fn reopen(
        &mut self,
        env: &dyn Env,
        list: &[Wanted],
        may: impl Fn(&Arc<Node>, &Arc<Edge>) -> Result<()>,
    ) -> Result<()> {
        let mut items = Vec::new();
        for wanted in list {
            let Some(name) = &wanted.common.node_name else { bail!("node-name not specified") };
            let node = self.need(name)?.clone();
            self.collect_items(node, Some(wanted), None, &mut items)?;
        }
        for item in &items {
            item.edges.iter().try_for_each(|(edge, _)| may(&item.node, edge))?;
        }
        // What is written back now need not be while the guests wait.
        for item in items.iter().filter(|i| i.options.read_only && !i.node.read_only()) {
            item.node.flush().map_err(|e| Error::from(e).context("Error flushing drive: "))?;
        }
        let mut ready = Vec::new();
        for item in &items {
            ready.push(self.prepare(env, item)?);
        }
        let at: Vec<_> = items.iter().map(|i| &i.node).collect();
        let lengths: Vec<_> = at.iter().map(|n| n.len()).collect();
        let quiesced = self.quiesce(&at, &[]);
        let turned: Vec<_> = items
            .iter()
            .filter(|i| i.node.read_only() != i.options.read_only)
            .map(|i| (i.node.clone(), i.options.read_only))
            .collect();
        let before: Vec<_> = at.iter().map(|n| n.options()).collect();
        let edges = || items.iter().flat_map(|i| &i.edges);
        let old: Vec<_> = edges().map(|(edge, _)| (edge.clone(), edge.node())).collect();
        let put_back = || items.iter().zip(&before).for_each(|(i, old)| i.node.set_options(*old));
        let set = |graph: &mut Graph| {
            items.iter().for_each(|i| i.node.set_options(i.options));
            let done = graph.edit(&quiesced, |edit| edges().try_for_each(|(e, to)| edit.set(e, to.clone())));
            done.inspect_err(|_| put_back())
        };
        let undo = |graph: &mut Graph| {
            put_back();
            if let Err(e) =
                graph.edit(&quiesced, |edit| old.iter().try_for_each(|(e, n)| edit.set(e, n.clone())))
            {
                log::error!("the nodes of before could not be had again: {e}");
            }
        };
        let mut done = self.turn(&turned, set, undo);
        let shut = turned.iter().find(|(_, read_only)| *read_only);
        if let (Err(e), Some((node, _))) = (&mut done, shut)
            && e.desc == "Block node is read-only"
        {
            e.desc = format!("Read-only block node '{}' cannot support read-write users", node.name);
        }
        if done.is_ok() {
            ready.into_iter().for_each(|now| now());
            self.refresh_limits();
            for item in &items {
                item.node.set_asked(item.asked.clone());
            }
        }
        drop(quiesced);
        if done.is_ok() {
            at.iter().zip(lengths).filter(|(n, len)| n.len() != *len).for_each(|(n, _)| self.tell_length(n));
            // A backing file that was let go of.
            self.collect();
        }
        done
    }

    /// Changes some of the options that every node has; the others, and the children, stay.
    pub fn reopen_with(
        &mut self,
        env: &dyn Env,
        node: &Arc<Node>,
        change: impl FnOnce(&mut Common),
    ) -> Result<()> {
        let Asked { mut common, given, .. } = node.asked();
        change(&mut common);
        common.node_name = Some(node.name.clone());
        let backing = |e: &Arc<Edge>| {
            let child = e.node().map_or(WantedChild::Nothing, |n| WantedChild::Node(n.name.clone()));
            (e.role.clone(), child)
        };
        let edges = node.driver.edges();
        let children = edges.iter().filter(|e| e.role == "backing").map(backing).collect();
        self.reopen(env, &[Wanted { common, given, children }], |_, _| Ok(()))
    }

    /// Puts `node`, and the children that were defined with it, on the list. `wanted`: none if it
    /// keeps its own options, but takes what its parent has now.
    fn collect_items(
        &self,
        node: Arc<Node>,
        wanted: Option<&Wanted>,
        parent: Option<(&Node, &NodeOptions, bool)>,
        items: &mut Vec<Item>,
    ) -> Result<()> {
        let old = node.asked();
        let common = wanted.map_or_else(|| old.common.clone(), |w| w.common.clone());
        if wanted.is_some() && common.force_share.is_some() && common.force_share != old.common.force_share {
            bail!("Cannot change the option 'force-share'");
        }
        let mut options = common.with_parent(parent.map(|(_, options, backing)| (options, backing)))?;
        options.implicit = node.options().implicit;
        if options.auto_read_only && !options.read_only && node.read_only() {
            // If nobody asked for that, it is because it could not be written to.
            let inherited = parent.is_some_and(|(p, ..)| p.read_only());
            options.read_only = old.common.read_only != Some(true) && !inherited;
        }
        let given = wanted.map_or(old.given, |w| w.given.clone());
        let asked = Asked { common, owner: old.owner, given };
        let (mut edges, mut children) = (Vec::new(), Vec::new());
        for edge in node.driver.edges() {
            let (role, child) = (edge.role.as_str(), edge.node());
            let inline = child.as_ref().filter(|c| c.asked().owner.as_deref() == Some(node.name.as_str()));
            let said = wanted.and_then(|w| w.children.iter().find(|(r, _)| r == role)).map(|(_, c)| c);
            match said {
                Some(WantedChild::Options(w)) => match inline {
                    Some(child) => children.push((child.clone(), Some(&**w), role == "backing")),
                    None => bail!("Cannot change the option '{role}.driver'"),
                },
                Some(WantedChild::Node(name)) => {
                    if child.as_ref().is_some_and(|c| c.name == *name) {
                        children.extend(inline.map(|c| (c.clone(), None, role == "backing")));
                        continue;
                    }
                    let lost = || Error::new(format!("Cannot find device='' nor node-name='{name}'"));
                    let new = self.find(name).cloned().ok_or_else(lost)?;
                    if child.as_ref().is_some_and(|c| Arc::ptr_eq(&c.clone().skip_implicit(), &new)) {
                        continue;
                    }
                    if super::edit::is_above(&new, &[&node]) {
                        let above = &node.name;
                        bail!("Making '{name}' a {role} child of '{above}' would create a cycle");
                    }
                    if !(role == "backing" || role == "file" && can_change_file(&node, child.as_ref(), &new))
                    {
                        bail!("Cannot change the option '{role}'");
                    }
                    edges.push((edge.clone(), Some(new)));
                }
                Some(WantedChild::Nothing) => {
                    if role != "backing" {
                        bail!("Cannot change the option '{role}'");
                    }
                    if child.is_some() {
                        edges.push((edge.clone(), None));
                    }
                }
                None if wanted.is_some() && role == "backing" => {}
                None => children.extend(inline.map(|c| (c.clone(), None, role == "backing"))),
            }
        }
        for (edge, _) in &edges {
            if edge.node().is_some_and(|c| c.options().implicit) {
                bail!("Cannot replace implicit {} child of {}", edge.role, node.name);
            }
        }
        let backing = |w: &Wanted| w.children.iter().any(|(role, _)| role == "backing");
        let silent = wanted.is_some_and(|w| !backing(w));
        let item = Item { node: node.clone(), options, asked, silent, edges };
        match items.iter_mut().find(|i| Arc::ptr_eq(&i.node, &node)) {
            Some(known) if wanted.is_some() => *known = item,
            Some(_) => {}
            None => items.push(item),
        }
        for (child, wanted, backing) in children {
            self.collect_items(child, wanted, Some((&node, &options, backing)), items)?;
        }
        Ok(())
    }

    /// Has the driver made ready, and checks that all that changes is what may.
    fn prepare<'a>(&self, env: &dyn Env, item: &'a Item) -> Result<Ready<'a>> {
        let node = &item.node;
        let given = &item.asked.given;
        let how = Reopening { options: item.options, given, taken: RefCell::default(), graph: self, env };
        let Some(ready) = node.driver.reopen(&how) else {
            let format = node.driver.name();
            bail!("Block format '{format}' used by node '{}' does not support reopening files", node.name);
        };
        let (old, own) = (node.asked().given, node.driver.own_options());
        let edges = node.driver.edges();
        let free = |key: &str| {
            let child = |e: &Arc<Edge>| e.role.split('.').next() == Some(key);
            COMMON.contains(&key) || edges.iter().any(child)
        };
        for key in old.keys().filter(|k| !given.contains_key(*k) && *k != "node-name" && *k != "driver") {
            if !free(key) && !how.taken.borrow().iter().any(|t| t == key) {
                bail!("Option '{key}' cannot be reset to its default value");
            }
        }
        let ready = ready?;
        let header = || node.driver.info().backing_filename.is_some();
        let has_backing = edges.iter().any(|e| e.role == "backing");
        if item.silent && has_backing && (node.backing().is_some() || header()) {
            bail!("backing is missing for '{}'", node.name);
        }
        for (key, value) in given {
            if free(key) || how.taken.borrow().iter().any(|t| t == key) {
                continue;
            }
            let name = match &**key {
                "driver" => Some(Value::from(node.driver.name())),
                "node-name" => Some(Value::from(&*node.name)),
                _ => None,
            };
            let known = name.as_ref().or_else(|| old.get(key)).or_else(|| own.get(key));
            if known != Some(value) {
                bail!("Cannot change the option '{key}'");
            }
        }
        Ok(ready)
    }
}

/// A filter is on what it is put on; a format has read what is in its file, and must go on finding
/// it there: filters come and go between the two.
fn can_change_file(node: &Node, old: Option<&Arc<Node>>, new: &Arc<Node>) -> bool {
    let file = new.clone().skip_filters();
    node.driver.filtered().is_some()
        || node.driver.name() == "raw"
        || old.is_some_and(|old| Arc::ptr_eq(&old.clone().skip_filters(), &file))
}

#[cfg(test)]
#[path = "reopen_options_test.rs"]
mod tests;
