//! Who may do what with a node: the check over the whole graph, and the common rules of formats.
//!
//! Every user of a node says what it does (`uses`) and what it lets others do (`shares`). Users
//! are handles, nodes above, and nodes that are being opened. What a node does with its children
//! follows from what its own users do ([`Driver::wants`](super::driver::Driver::wants)), so that
//! the check goes from the top down.
//!
//! [`Graph::refresh`] checks the graph as it is, and tells the drivers what has changed for them.
//!
//! Owns: the rules and their texts, and users that are not in the graph yet. Never: changes what is
//! connected. Threads: control. Locks: none.

use super::driver::Perm;
use super::graph::{Entry, Graph};
use super::handle::Handle;
use super::node::{Edge, Node};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// The names of permissions in messages, by bit.
pub(super) const NAMES: [(Perm, &str); 4] = [
    (Perm::CONSISTENT_READ, "consistent read"),
    (Perm::WRITE, "write"),
    (Perm::WRITE_UNCHANGED, "write unchanged"),
    (Perm::RESIZE, "resize"),
];

fn names(perm: Perm) -> String {
    let words: Vec<_> = NAMES.iter().filter(|(p, _)| perm.contains(*p)).map(|(_, n)| *n).collect();
    words.join(", ")
}

/// What a format does with the child that holds its metadata, when its users do `above`: it
/// writes whenever it may, and lets nobody else write or resize.
pub fn for_metadata(above: (Perm, Perm), writable: bool) -> (Perm, Perm) {
    let own = if writable { Perm::WRITE | Perm::RESIZE } else { Perm::NONE };
    (above.0 | own | Perm::CONSISTENT_READ, above.1 & !(Perm::WRITE | Perm::RESIZE))
}

/// What a format does with a child that holds guest data only: it writes when its users do, and
/// lets nobody else resize.
pub fn for_data(above: (Perm, Perm)) -> (Perm, Perm) {
    let mut uses = above.0;
    if uses.contains(Perm::WRITE_UNCHANGED) {
        // Unchanged data may have to be copied to a new place.
        uses = uses | Perm::WRITE;
    }
    if uses.contains(Perm::WRITE) {
        uses = uses | Perm::RESIZE;
    }
    (uses, above.1 & !Perm::RESIZE)
}

/// What a format does with its backing file: it reads, and minds writers only if its users do.
pub fn for_backing(above: (Perm, Perm)) -> (Perm, Perm) {
    let shares = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    let changing = Perm::WRITE | Perm::RESIZE;
    let shares = if above.1.contains(Perm::WRITE) { shares | changing } else { shares };
    (above.0 & Perm::CONSISTENT_READ, shares)
}

/// One user of a node.
#[derive(Clone)]
pub(super) struct Use {
    pub node: Arc<Node>,
    /// The edge's role.
    pub role: String,
    pub uses: Perm,
    pub shares: Perm,
    /// As messages name the user.
    pub who: String,
}

/// What each node's users do and share together.
pub(super) struct Verdict {
    pub node: Arc<Node>,
    pub uses: Perm,
    pub shares: Perm,
}

fn key(node: &Arc<Node>) -> *const Node {
    Arc::as_ptr(node)
}

/// The most nodes on a way from the top of the graph to its bottom. Requests go down by recursion,
/// on threads with [`IO_STACK`](crate::sys::thread::IO_STACK).
pub(super) const MAX_DEPTH: usize = 256;

/// All nodes, every one before its children. Fails when there is a cycle, or a way that is too
/// long.
pub(super) fn order(nodes: &[Arc<Node>]) -> Result<Vec<Arc<Node>>> {
    /// Per node: `None` while it is on the path from the start to here, then its height.
    type Heights = HashMap<*const Node, Option<usize>>;
    fn visit(node: &Arc<Node>, seen: &mut Heights, out: &mut Vec<Arc<Node>>) -> Result<usize> {
        match seen.get(&key(node)) {
            Some(Some(height)) => return Ok(*height),
            Some(None) => {
                return Err(Error::new(format!("Node '{}' would be its own child", node.name)));
            }
            None => {}
        }
        seen.insert(key(node), None);
        let mut height = 0;
        for edge in node.driver.edges() {
            if let Some(child) = edge.node() {
                height = height.max(visit(&child, seen, out)?);
            }
        }
        height += 1;
        if height > MAX_DEPTH {
            let name = &node.name;
            let text = format!("Node '{name}' would stand on more than {MAX_DEPTH} others");
            return Err(Error::new(text));
        }
        seen.insert(key(node), Some(height));
        out.push(node.clone());
        Ok(height)
    }
    let (mut seen, mut out) = (Heights::new(), Vec::new());
    for node in nodes {
        visit(node, &mut seen, &mut out)?;
    }
    out.reverse();
    Ok(out)
}

fn conflict(a: &Use, b: &Use) -> Option<Error> {
    let bad = b.uses & !a.shares;
    (bad != Perm::NONE).then(|| {
        let node = &b.node.name;
        Error::new(format!(
            "Permission conflict on node '{node}': permissions '{}' are both required by {} \
             (uses node '{node}' as '{}' child) and unshared by {} \
             (uses node '{node}' as '{}' child).",
            names(bad),
            b.who,
            b.role,
            a.who,
            a.role,
        ))
    })
}

/// Checks the whole graph, and says what each node's users do and share.
pub(super) fn check(nodes: &[Arc<Node>], roots: &[Use]) -> Result<Vec<Verdict>> {
    let mut users: HashMap<*const Node, Vec<Use>> = HashMap::new();
    for user in roots {
        users.entry(key(&user.node)).or_default().push(user.clone());
    }
    let mut out = Vec::new();
    for node in order(nodes)? {
        let list = users.remove(&key(&node)).unwrap_or_default();
        // The newest user is the first to be asked what it shares, as in QEMU.
        for (i, a) in list.iter().enumerate().rev() {
            for (j, b) in list.iter().enumerate().rev() {
                if let Some(e) = conflict(a, b).filter(|_| i != j) {
                    return Err(e);
                }
            }
        }
        let uses = list.iter().fold(Perm::NONE, |p, u| p | u.uses);
        let shares = list.iter().fold(Perm::ALL, |p, u| p & u.shares);
        let writes = uses & (Perm::WRITE | Perm::WRITE_UNCHANGED);
        if writes != Perm::NONE && node.read_only() {
            return Err(Error::new("Block node is read-only"));
        }
        for edge in node.driver.edges() {
            let Some(child) = edge.node() else { continue };
            let (uses, shares) = node.driver.wants(&edge, (uses, shares));
            let shares = if node.options().force_share { Perm::ALL } else { shares };
            users.entry(key(&child)).or_default().push(Use {
                node: child,
                role: edge.role.clone(),
                uses,
                shares,
                who: format!("node '{}'", node.name),
            });
        }
        out.push(Verdict { node, uses, shares });
    }
    Ok(out)
}

/// A user that is not in the graph yet: the edge of a node that is being opened.
pub(super) struct Hold {
    pub(super) edge: Arc<Edge>,
    uses: Perm,
    shares: Perm,
    pub(super) who: String,
}

impl Graph {
    /// What the users of `node` do with it, and share.
    pub(super) fn perm_of(&self, node: &Arc<Node>) -> (Perm, Perm) {
        let entry = self.nodes.iter().find(|e| Arc::ptr_eq(&e.node, node));
        entry.map_or((Perm::NONE, Perm::ALL), |e| e.perm)
    }

    /// Takes part in every check as the user `who` of `edge`'s node, before `who` is in the graph.
    pub(super) fn hold(&mut self, who: &str, edge: &Arc<Edge>, perm: (Perm, Perm)) -> Result<()> {
        let who = format!("node '{who}'");
        self.holds.push(Hold { edge: edge.clone(), uses: perm.0, shares: perm.1, who });
        self.refresh().inspect_err(|_| {
            self.holds.pop();
        })
    }

    /// Changes what a handle does and shares.
    pub fn set_perm(&mut self, handle: &Arc<Handle>, uses: Perm, shares: Perm) -> Result<()> {
        let old = (handle.uses(), handle.shares());
        handle.set_perm(uses, shares);
        self.refresh().inspect_err(|_| handle.set_perm(old.0, old.1))
    }

    fn users(&self) -> Vec<Use> {
        let of_handle = |h: &Arc<Handle>| {
            let node = h.root.node()?;
            let (uses, shares) = (h.uses(), h.shares());
            Some(Use { node, role: h.root.role.clone(), uses, shares, who: h.describe() })
        };
        let of_hold = |h: &Hold| {
            let (role, who) = (h.edge.role.clone(), h.who.clone());
            Some(Use { node: h.edge.node()?, role, uses: h.uses, shares: h.shares, who })
        };
        let handles = self.handles.iter().filter_map(of_handle);
        handles.chain(self.holds.iter().filter_map(of_hold)).collect()
    }

    /// Checks the permissions of the whole graph and tells the drivers. On an error the drivers
    /// have been told what they knew before.
    pub(super) fn refresh(&mut self) -> Result<()> {
        let nodes: Vec<_> = self.nodes.iter().map(|e| e.node.clone()).collect();
        let verdicts = check(&nodes, &self.users())?;
        let mut plan = Vec::new();
        for verdict in verdicts {
            let is_it = |e: &Entry| Arc::ptr_eq(&e.node, &verdict.node);
            if let Some(at) = self.nodes.iter().position(is_it) {
                let (old, new) = (self.nodes[at].perm, (verdict.uses, verdict.shares));
                if old != new {
                    plan.push((at, verdict.node, old, new));
                }
            }
        }
        // First everybody gets what is new beside what it had: that can fail. Then everybody lets
        // go of what is over: that cannot.
        for (n, (at, node, old, new)) in plan.iter().enumerate() {
            let both = (old.0 | new.0, old.1 & new.1);
            if let Err(e) = node.driver.set_perm(both.0, both.1) {
                for (at, node, old, _) in plan[..n].iter().rev() {
                    if let Err(e) = node.driver.set_perm(old.0, old.1) {
                        log::warn!("node '{}': {e}", node.name);
                    }
                    self.nodes[*at].perm = *old;
                }
                return Err(e.into());
            }
            self.nodes[*at].perm = both;
        }
        for (at, node, old, new) in plan {
            if (old.0 | new.0, old.1 & new.1) != new
                && let Err(e) = node.driver.set_perm(new.0, new.1)
            {
                log::warn!("node '{}' does not let go: {e}", node.name);
            }
            self.nodes[at].perm = new;
        }
        Ok(())
    }
}
