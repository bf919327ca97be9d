//! The block graph: names, who is above whom, and how nodes and handles come and go.
//!
//! Nodes are made by [`open`](super::open), used through [`Handle`]s, and connected by edges. Any
//! change of what is connected to what runs in [`Graph::edit`] (in [`edit`](super::edit)). Who may
//! do what is [`perm`]'s to say.
//!
//! Owns: the list of nodes, the list of handles. Never: threads, options, JSON. Threads: control
//! only, hence no lock.

use super::driver::Perm;
use super::edit::is_above;
use super::handle::{Handle, HandleSpec};
use super::node::{Edge, Node};
use super::perm::{self, Hold};
use super::throttle::{Group, Member};
use super::yank::Yanks;
use crate::bail;
use crate::error::{Error, Result};
use crate::event::Events;
use std::sync::Arc;
use std::time::Instant;

/// The longest node name, in bytes (QEMU's node_name[32]).
const NAME_MAX: usize = 31;

pub(super) struct Entry {
    pub(super) node: Arc<Node>,
    /// Position by age.
    age: u64,
    /// Made by `blockdev-add`: stays until `blockdev-del`.
    monitor: bool,
    /// What the driver was last told.
    pub(super) perm: (Perm, Perm),
}

/// See the module's head.
#[derive(Default)]
pub struct Graph {
    pub(super) nodes: Vec<Entry>,
    pub(super) handles: Vec<Arc<Handle>>,
    pub(super) holds: Vec<Hold>,
    /// Names of the nodes that are being opened.
    opening: Vec<String>,
    /// How many automatic names were given.
    named: u64,
    ages: u64,
    /// Where drivers post what the control thread is to know.
    events: Option<Events>,
    yanks: Yanks,
}

/// Who is directly above a node.
pub enum Parent {
    /// A node, by this edge of its driver.
    Node(Arc<Node>, Arc<Edge>),
    /// A guest disk, a job, an export.
    Handle(Arc<Handle>),
}

/// These nodes and all below them, each once.
fn below(roots: &[Arc<Node>]) -> Vec<Arc<Node>> {
    let mut all: Vec<Arc<Node>> = Vec::new();
    let mut todo = roots.to_vec();
    while let Some(node) = todo.pop() {
        if !all.iter().any(|n| Arc::ptr_eq(n, &node)) {
            todo.extend(node.driver.edges().iter().filter_map(|e| e.node()));
            all.push(node);
        }
    }
    all
}

/// Requests that would be held back on purpose are not; dropping it ends that.
pub struct Hurry(Vec<Arc<Member>>, Vec<Arc<Node>>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.iter().for_each(|m| m.exempt(false));
        self.1.iter().for_each(|n| n.driver.hurry(false));
    }
}

/// A letter first, then letters, digits and `-._` (QEMU's id_wellformed).
pub fn well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

impl Graph {
    /// A graph without nodes.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// From now on drivers that are opened post their events there.
    pub fn report_to(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// Where drivers post their events.
    pub fn events(&self) -> Option<&Events> {
        self.events.as_ref()
    }

    /// The nodes that can hang.
    pub fn yanks(&self) -> &Yanks {
        &self.yanks
    }

    // ---- names and topology

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.iter().map(|e| &e.node).find(|n| n.name == name)
    }

    /// The node of that name, or QEMU's error.
    pub fn need(&self, name: &str) -> Result<&Arc<Node>> {
        let lost = || Error::new(format!("Failed to find node with node-name='{name}'"));
        self.find(name).ok_or_else(lost)
    }

    /// All nodes, newest first.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.iter().rev().map(|e| &e.node)
    }

    /// All handles, oldest first.
    pub fn handles(&self) -> &[Arc<Handle>] {
        &self.handles
    }

    /// True for a node of `blockdev-add`.
    pub fn is_monitor_owned(&self, node: &Arc<Node>) -> bool {
        self.nodes.iter().any(|e| e.monitor && Arc::ptr_eq(&e.node, node))
    }

    /// Everybody directly above `node`.
    pub fn parents(&self, node: &Arc<Node>) -> Vec<Parent> {
        let is_it = |e: &Edge| e.node().is_some_and(|n| Arc::ptr_eq(&n, node));
        let mut out = Vec::new();
        for entry in &self.nodes {
            for edge in entry.node.driver.edges() {
                if is_it(&edge) {
                    out.push(Parent::Node(entry.node.clone(), edge));
                }
            }
        }
        out.extend(self.handles.iter().filter(|h| is_it(&h.root)).cloned().map(Parent::Handle));
        out
    }

    /// Somebody uses `node` as a disk: a guest, an export, a job that copies it.
    pub fn is_disk(&self, node: &Arc<Node>) -> bool {
        self.parents(node).iter().any(|p| matches!(p, Parent::Handle(h) if h.is_disk()))
    }

    /// The newest image whose backing file `node` is.
    pub fn image_above(&self, node: &Arc<Node>) -> Option<Arc<Node>> {
        self.parents(node).into_iter().rev().find_map(|parent| match parent {
            Parent::Node(above, edge) if edge.role == "backing" => Some(above),
            _ => None,
        })
    }

    /// Whether a new node may have that name; QEMU's texts.
    pub fn check_name(&self, name: &str) -> Result<()> {
        if !well_formed(name) {
            bail!("Invalid node-name: '{name}'");
        }
        if !name.is_empty() && self.handles.iter().any(|h| h.name() == name) {
            bail!("node-name={name} is conflicting with a device id");
        }
        if self.find(name).is_some() || self.opening.iter().any(|n| n == name) {
            bail!("Duplicate nodes with node-name='{name}'");
        }
        if name.len() > NAME_MAX {
            bail!("Node name too long");
        }
        Ok(())
    }

    /// A name for a node that was given none: `#block123`, never twice.
    pub fn auto_name(&mut self) -> String {
        self.named += 1;
        format!("#block{:03}", self.named)
    }

    /// The age of a node that is about to exist (its file is older, its backing file younger).
    pub(super) fn next_age(&mut self) -> u64 {
        self.ages += 1;
        self.ages
    }

    // ---- nodes come and go

    /// A node of that name is being opened: no child of it may take the name.
    pub(super) fn begin(&mut self, name: &str) {
        self.opening.push(name.to_string());
    }

    /// It is open, or cannot be.
    pub(super) fn end(&mut self, name: &str) {
        self.opening.retain(|n| n != name);
    }

    /// Enters a node that its driver has opened, in place of the holds of `who`.
    pub(super) fn insert(&mut self, node: Arc<Node>, age: u64) -> Result<()> {
        let at = self.nodes.partition_point(|e| e.age < age);
        let entry = Entry { node: node.clone(), age, monitor: false, perm: (Perm::NONE, Perm::ALL) };
        self.nodes.insert(at, entry);
        let who = format!("node '{}'", node.name);
        let holds: Vec<_> = self.holds.extract_if(.., |h| h.who == who).collect();
        if let Err(e) = self.refresh() {
            self.holds.extend(holds);
            self.nodes.remove(at);
            return Err(e);
        }
        Ok(())
    }

    /// The node of that name is now the user's: it stays until [`Graph::delete`].
    pub fn own(&mut self, node: &Arc<Node>) {
        for entry in self.nodes.iter_mut().filter(|e| Arc::ptr_eq(&e.node, node)) {
            entry.monitor = true;
        }
    }

    /// The node of that name is no longer the user's: [`Graph::collect`] closes it if nobody uses it.
    pub fn disown(&mut self, node: &Arc<Node>) {
        for entry in self.nodes.iter_mut().filter(|e| Arc::ptr_eq(&e.node, node)) {
            entry.monitor = false;
        }
    }

    /// Ends the holds of a node that could not be opened, and takes away what only it used.
    pub(super) fn release(&mut self, who: &str) {
        let who = format!("node '{who}'");
        self.holds.retain(|h| h.who != who);
        self.collect();
    }

    /// `blockdev-del`: takes a node away that nobody uses; texts are QEMU's.
    pub fn delete(&mut self, name: &str) -> Result<()> {
        let node = self.need(name)?.clone();
        let parents = self.parents(&node);
        if self.is_disk(&node) {
            bail!("Node {name} is in use");
        }
        if let Some(above) = self.image_above(&node) {
            bail!("Node '{name}' is busy: node is used as backing hd of '{}'", above.name);
        }
        if !self.is_monitor_owned(&node) {
            bail!("Node {name} is not owned by the monitor");
        }
        if !parents.is_empty() {
            bail!("Block device {name} is in use");
        }
        for entry in self.nodes.iter_mut().filter(|e| Arc::ptr_eq(&e.node, &node)) {
            entry.monitor = false;
        }
        drop((node, parents));
        self.collect();
        Ok(())
    }

    /// Enters a node that is complete (a job's filter, an overlay) and that nobody uses yet.
    pub fn add(&mut self, node: Arc<Node>) -> Result<()> {
        // No user can have asked for such a name.
        if !node.name.starts_with('#') {
            self.check_name(&node.name)?;
        }
        let age = self.next_age();
        self.insert(node, age)
    }

    /// Closes and forgets every node that nobody uses and the user does not own; parents first.
    pub fn collect(&mut self) {
        loop {
            let unused = |e: &Entry| {
                let held = |h: &Hold| h.edge.node().is_some_and(|n| Arc::ptr_eq(&n, &e.node));
                !e.monitor && !self.holds.iter().any(held) && self.parents(&e.node).is_empty()
            };
            let Some(at) = self.nodes.iter().position(unused) else { break };
            let entry = self.nodes.remove(at);
            close(&entry.node);
        }
        if let Err(e) = self.refresh() {
            // Fewer users cannot make a conflict; a driver may fail to let go of a lock.
            log::warn!("{e}");
        }
    }

    /// Lets nodes give up memory that they did not need for long; says when the next one wants to.
    pub fn tidy(&self, now: Instant) -> Option<Instant> {
        self.nodes.iter().filter_map(|e| e.node.driver.tidy(now)).min()
    }

    /// Writes everything back that is held in memory, and to stable storage. The first error is
    /// returned, after all nodes were tried. No request may be running.
    pub fn flush_all(&self) -> std::io::Result<()> {
        let nodes: Vec<_> = self.nodes.iter().map(|e| e.node.clone()).collect();
        let order = perm::order(&nodes).unwrap_or(nodes);
        let done: Vec<_> = order.iter().filter(|n| !n.read_only()).map(|n| n.flush()).collect();
        done.into_iter().collect()
    }

    /// The end of the process is near: nobody waits long for a server that does not answer.
    pub fn give_up(&self) {
        self.nodes.iter().for_each(|e| e.node.driver.give_up());
    }

    /// The end of the process: detaches every handle and closes every node.
    pub fn close_all(&mut self) {
        for handle in std::mem::take(&mut self.handles) {
            handle.gate.close();
            self.wait_empty(std::slice::from_ref(&handle));
            handle.root.set(None);
            handle.gate.open();
        }
        self.holds.clear();
        for entry in &mut self.nodes {
            entry.monitor = false;
        }
        self.collect();
    }

    // ---- handles come and go

    /// A new handle on `node`, or on nothing; fails when others do not share what it does.
    pub fn attach(&mut self, node: Option<Arc<Node>>, spec: HandleSpec) -> Result<Arc<Handle>> {
        self.attach_as(node, spec, "")
    }

    /// The same for a guest device, whose id messages name when the handle has no name.
    pub fn attach_as(
        &mut self,
        node: Option<Arc<Node>>,
        spec: HandleSpec,
        device: &str,
    ) -> Result<Arc<Handle>> {
        let handle = Handle::new(node, spec);
        handle.set_owner(device, "", None);
        self.handles.push(handle.clone());
        match self.refresh() {
            Ok(()) => Ok(handle),
            Err(e) => {
                self.handles.pop();
                handle.root.set(None);
                Err(e)
            }
        }
    }

    /// Takes a handle away. Its users get ENOMEDIUM from now on.
    pub fn detach(&mut self, handle: &Arc<Handle>) {
        handle.throttle(None);
        handle.gate.close();
        self.wait_empty(std::slice::from_ref(handle));
        handle.root.set(None);
        handle.gate.open();
        self.handles.retain(|h| !Arc::ptr_eq(h, handle));
        self.collect();
    }

    /// Waits until no request is behind these closed gates. Nothing below holds one back meanwhile.
    pub(super) fn wait_empty(&self, handles: &[Arc<Handle>]) {
        let roots: Vec<_> = handles.iter().filter_map(|h| h.root.node()).collect();
        let hurry = Hurry(Vec::new(), below(&roots));
        hurry.1.iter().for_each(|n| n.driver.hurry(true));
        handles.iter().for_each(|h| h.gate.wait_empty());
    }

    /// Changes the length of `node`, with the guests above it waiting, and tells them. Fails when
    /// the node is read-only, when somebody does not share that right, and with the driver.
    pub fn resize(&mut self, node: &Arc<Node>, len: u64) -> Result<()> {
        if node.read_only() {
            bail!("Image is read-only");
        }
        let spec = HandleSpec { uses: Perm::RESIZE, shares: Perm::ALL, ..HandleSpec::default() };
        let user = self.attach(Some(node.clone()), spec)?;
        let quiesced = self.quiesce(&[node], &[]);
        let done = node.resize(len);
        drop(quiesced);
        self.detach(&user);
        self.tell_length(node);
        Ok(done?)
    }

    /// Tells the guests above `node` that their disk may have another length.
    pub fn tell_length(&self, node: &Arc<Node>) {
        let above = |h: &&Arc<Handle>| h.root.node().is_some_and(|n| is_above(&n, &[node]));
        self.handles.iter().filter(above).for_each(|h| h.resized());
    }

    // ---- limits

    /// Everything that waits for limits: disks, and nodes that are filters.
    fn members(&self) -> impl Iterator<Item = Arc<Member>> {
        let disks = self.handles.iter().filter_map(|h| h.throttled());
        disks.chain(self.nodes.iter().filter_map(|e| e.node.driver.throttled()))
    }

    /// The group of that name, which some disk or node is in.
    pub fn find_throttle_group(&self, name: &str) -> Option<Arc<Group>> {
        self.members().map(|m| m.group().clone()).find(|g| g.name == name)
    }

    /// Before somebody waits for requests to end: none is held back, by a limit or a breakpoint, as
    /// long as it lives.
    pub fn hurry(&self) -> Hurry {
        let members: Vec<_> = self.handles.iter().filter_map(|h| h.throttled()).collect();
        members.iter().for_each(|m| m.exempt(true));
        let nodes: Vec<_> = self.nodes.iter().map(|e| e.node.clone()).collect();
        nodes.iter().for_each(|n| n.driver.hurry(true));
        Hurry(members, nodes)
    }
}

fn close(node: &Arc<Node>) {
    if let Err(e) = node.driver.close() {
        log::error!("closing node '{}' failed: {e}", node.name);
    }
}

#[cfg(test)]
#[path = "graph_test.rs"]
mod tests;
