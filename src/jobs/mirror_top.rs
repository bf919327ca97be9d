//! The filter `mirror_top`: what a mirror puts above a disk, so that it hears of every write.
//!
//! Owns: the mark. Never: copies. Threads: I/O from any. Locks: none.

use crate::block::bitmap::Bitmap;
use crate::block::driver::{Driver, Flags, Limits, Perm};
use crate::block::graph::Graph;
use crate::block::node::{Edge, Node, NodeOptions};
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::Arc;

/// See the module's head.
pub struct MirrorTop {
    file: Arc<Edge>,
    limits: Limits,
    /// Marked after each write, before the writer hears of it; also when it failed.
    dirty: Arc<Bitmap>,
    /// The target is below the disk (the commit of an active image): what lies between must let
    /// the job write there.
    commit: bool,
}

/// Puts the filter above `source`; `dirty` has every write from now on. `name`: as the user wants it
/// named; without, it is given one, and not shown to those who ask about disks.
pub fn insert(
    graph: &mut Graph,
    source: &Arc<Node>,
    dirty: &Arc<Bitmap>,
    name: Option<&str>,
    commit: bool,
) -> Result<Arc<Node>> {
    let implicit = name.is_none();
    let name = match name {
        Some(name) => {
            graph.check_name(name)?;
            name.to_string()
        }
        None => graph.auto_name(),
    };
    // The filter marks it: as a bitmap of a node it is only shown.
    dirty.set_enabled(false);
    let file = Edge::new("file", None);
    let filter = MirrorTop { file, limits: source.limits(), dirty: dirty.clone(), commit };
    let options = NodeOptions { read_only: source.read_only(), implicit, ..NodeOptions::default() };
    let node = Node::new(name, Box::new(filter), options);
    node.insert_bitmap(dirty.clone())?;
    if commit {
        // A writer that goes past the filter cannot be kept out: others must share everything.
        dirty.set_enabled(true);
        source.insert_bitmap(dirty.clone())?;
    }
    let done = graph.insert_filter(&node, source);
    if done.is_err() {
        source.remove_bitmap(dirty);
    }
    done.map(|()| node)
}

impl MirrorTop {
    /// Notes a change after it was done, or was to be done.
    fn after<T>(&self, off: u64, len: u64, done: io::Result<T>) -> io::Result<T> {
        self.dirty.mark(off, len);
        done
    }
}

impl Driver for MirrorTop {
    fn name(&self) -> &'static str {
        "mirror_top"
    }

    fn len(&self) -> u64 {
        self.file.peek(Node::len).unwrap_or(0)
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, memory_alignment: 1, ..self.limits }
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone()]
    }

    fn filtered(&self) -> Option<Arc<Edge>> {
        Some(self.file.clone())
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        match self.commit {
            true => (above.0 & !Perm::CONSISTENT_READ, Perm::ALL),
            // Another writer would go past the filter.
            false => (above.0, above.1 & !(Perm::WRITE | Perm::RESIZE)),
        }
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.file.need()?.read(off, to)
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let done = self.file.need()?.write(off, from, flags);
        self.after(off, from.len() as u64, done)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let done = self.file.need()?.zero(off, len, flags);
        self.after(off, len, done)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        let done = self.file.need()?.discard(off, len);
        self.after(off, len, done)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.need()?.flush()
    }

    fn filename(&self) -> String {
        self.file.node().map(|n| n.driver.filename()).unwrap_or_default()
    }
}
