//! Snapshots of one disk or of several at one moment: new images on top, and snapshots inside.
//!
//! Everything slow is done before: the overlays exist and are open, and what the disks hold in memory
//! is written back once while their guests go on. Then the guests wait, and all of it happens, in the
//! order in which it was asked for, or nothing.
//!
//! Owns: that moment. Never: files, names. Threads: control. Locks: none.

use super::driver::Snapshot;
use super::edit::{Changed, is_above};
use super::graph::Graph;
use super::node::{Edge, Node};
use crate::bail;
use crate::error::{Error, Result, strerror};
use std::sync::Arc;

/// An image that goes on top of a node: whoever is above `node` will be above `over`.
pub struct Overlay {
    /// It becomes the backing file.
    pub node: Arc<Node>,
    /// Nobody uses it, and it has no backing file.
    pub over: Arc<Node>,
}

/// A snapshot inside an image.
pub struct Inside {
    /// The image.
    pub node: Arc<Node>,
    /// Its disk, as messages name it.
    pub device: String,
    /// What is to be made.
    pub snapshot: Snapshot,
}

/// A part of what happens at the moment.
pub enum Act {
    /// An image goes on top.
    Overlay(Overlay),
    /// A snapshot inside an image.
    Inside(Inside),
    /// Something else, by its number in the [`Moment`].
    Other(usize),
}

impl Act {
    /// The node whose contents it keeps.
    fn node(&self) -> Option<&Arc<Node>> {
        match self {
            Act::Overlay(o) => Some(&o.node),
            Act::Inside(i) => Some(&i.node),
            Act::Other(_) => None,
        }
    }

    /// The overlay, if it is one.
    pub fn overlay(&self) -> Option<&Overlay> {
        if let Act::Overlay(o) = self { Some(o) } else { None }
    }
}

/// What else happens at the moment of the snapshots, while the guests wait.
pub trait Moment {
    /// The nodes whose users wait.
    fn nodes(&self) -> Vec<Arc<Node>>;

    /// Does number `n`; nothing of it is done on failure.
    fn happen(&mut self, graph: &mut Graph, n: usize) -> Result<()>;

    /// Something else failed: makes `n` undone, at the same moment. The last that was done comes
    /// first.
    fn undo(&mut self, graph: &mut Graph, n: usize);

    /// All is well, and the guests go on.
    fn keep(&mut self, graph: &mut Graph);
}

fn backing_edge(node: &Node) -> Result<Arc<Edge>> {
    node.backing_edge().ok_or_else(|| Error::new("The overlay does not support backing images"))
}

/// Whether `over` can be put on top of another node, as far as it is known by itself.
pub fn check_overlay(graph: &Graph, over: &Arc<Node>) -> Result<()> {
    if !graph.parents(over).is_empty() {
        bail!("The overlay is already in use");
    }
    if backing_edge(over)?.node().is_some() {
        bail!("The overlay already has a backing image");
    }
    Ok(())
}

impl Graph {
    /// Does all of this at one moment. What was written before it is in the images below the
    /// overlays, on stable storage, and stays there: they turn read-only.
    pub fn snapshot(&mut self, acts: &[Act], moment: &mut dyn Moment) -> Result<()> {
        let at: Vec<_> = acts.iter().filter_map(Act::node).collect();
        let flush = || {
            // A guest's flush after this goes to the overlay only.
            let mut writable = at.iter().filter(|n| !n.read_only());
            writable.try_for_each(|n| {
                n.flush()
                    .map_err(|e| Error::new(format!("Could not flush node '{}': {}", n.name, strerror(&e))))
            })
        };
        flush()?;
        let others = moment.nodes();
        let all: Vec<_> = at.iter().copied().chain(&others).collect();
        let quiesced = self.quiesce(&all, &[]);
        flush()?;
        let mut edits: Vec<Changed> = Vec::new();
        let mut failed = None;
        for (n, act) in acts.iter().enumerate() {
            let done = match act {
                Act::Overlay(o) => self.put_over(o).map(|edit| edits.push(edit)),
                Act::Inside(one) => one.take(),
                Act::Other(n) => moment.happen(self, *n),
            };
            if let Err(e) = done {
                failed = Some((n, e));
                break;
            }
        }
        if let Some((made, e)) = failed {
            for act in acts[..made].iter().rev() {
                match act {
                    Act::Overlay(_) => edits.pop().into_iter().for_each(|edit| self.put_back(edit)),
                    Act::Inside(one) => one.undo(),
                    Act::Other(n) => moment.undo(self, *n),
                }
            }
            return Err(e);
        }
        drop(quiesced);
        moment.keep(self);
        for o in acts.iter().filter_map(Act::overlay) {
            if o.over.len() != o.node.len() {
                let above =
                    self.handles().iter().filter(|h| h.node().is_some_and(|n| is_above(&n, &[&o.over])));
                above.for_each(|h| h.resized());
            }
            if let Err(e) = self.set_read_only(&o.node, true) {
                log::warn!("node '{}' stays writable below its overlay: {e}", o.node.name);
            }
        }
        Ok(())
    }

    fn put_over(&mut self, o: &Overlay) -> Result<Changed> {
        // Everybody waits but what has come at this same moment.
        let quiesced = self.quiesce(&[&o.node], &[]);
        self.change(&quiesced, |edit| {
            let edge = backing_edge(&o.over)?;
            edit.replace(&o.node, &o.over, Some(&o.over))?;
            edit.set(&edge, Some(o.node.clone()))
        })
    }
}

/// Nothing else happens.
impl Moment for () {
    fn nodes(&self) -> Vec<Arc<Node>> {
        Vec::new()
    }
    fn happen(&mut self, _: &mut Graph, _: usize) -> Result<()> {
        Ok(())
    }
    fn undo(&mut self, _: &mut Graph, _: usize) {}
    fn keep(&mut self, _: &mut Graph) {}
}

impl Inside {
    fn take(&self) -> Result<()> {
        let (name, device) = (&self.snapshot.name, &self.device);
        let none = || std::io::Error::from_raw_os_error(libc::ENOTSUP);
        let internal = self.node.driver.internal().ok_or_else(none);
        let done = internal.and_then(|i| i.create_snapshot(self.snapshot.clone()));
        done.map_err(|e| {
            Error::new(format!("Failed to create snapshot '{name}' on device '{device}': {}", strerror(&e)))
        })
    }

    fn undo(&self) {
        let Some(internal) = self.node.driver.internal() else { return };
        if let Err(e) = internal.delete_snapshot(None, Some(&self.snapshot.name)) {
            log::error!("the snapshot '{}' on '{}' stays: {e}", self.snapshot.name, self.device);
        }
    }
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
