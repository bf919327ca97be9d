//! The filter `mirror_top`: what a mirror puts above a disk, so that it hears of every write.
//!
//! In the background mode it only marks what was written, and the job copies that later. In the mode
//! `write-blocking` a guest's write goes to both sides before the guest hears of it, and leaves
//! nothing to be copied: [`Active`]. A write and a copy of the job that overlap take turns, so do two
//! writes, and both sides get the same bytes of a memory that the guest may change meanwhile.
//!
//! Owns: the mark, and the second write. Never: decides about errors of the target: the guest does not
//! hear of them, the job does. Threads: I/O from any. Locks: the turns, taken with a ticket in hand;
//! whoever has a turn waits for nothing but I/O.

use crate::block::bitmap::Bitmap;
use crate::block::driver::{Driver, ExtentKind, Flags, Perm};
use crate::block::filename::names;
use crate::block::graph::Graph;
use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::serial::Serial;
use crate::error::Result;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::Iov;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The mode `write-blocking`: what the filter and the job share.
pub struct Active {
    target: Arc<Edge>,
    /// The target's backing file is not there yet: what it does not hold must be copied as a whole.
    bare: bool,
    /// Who is at which bytes.
    pub turns: Serial,
    /// False: the job is at its end, and nothing goes to the target any more.
    on: AtomicBool,
    /// Why a write of the guest did not reach the target, until the job has asked.
    failed: Mutex<Option<io::Error>>,
}

impl Active {
    /// For a target. `bare`: its backing file is not there yet.
    pub fn new(target: &Arc<Node>, bare: bool) -> Arc<Active> {
        Arc::new(Active {
            target: Edge::new("target", Some(target.clone())),
            bare,
            turns: Serial::default(),
            on: AtomicBool::new(true),
            failed: Mutex::default(),
        })
    }

    /// The target, for whoever has a ticket of a handle above the filter.
    pub fn target(&self) -> io::Result<Arc<Node>> {
        self.target.need()
    }

    /// True when the target holds all of `off..end`.
    fn holds(&self, off: u64, end: u64) -> io::Result<bool> {
        let target = self.target.need()?.skip_filters();
        let mut at = off;
        while at < end {
            let extent = target.status(at, end - at)?;
            if extent.kind == ExtentKind::Unallocated {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }

    /// Nothing goes to the target from now on. Nobody is above the filter then, or waits.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Why a write of the guest did not reach the target, since the last time that this was asked.
    pub fn take_error(&self) -> Option<io::Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// See the module's head.
pub struct MirrorTop {
    file: Arc<Edge>,
    /// Marked after each write, before the writer hears of it; also when it failed.
    dirty: Arc<Bitmap>,
    /// The target is below the disk (the commit of an active image): what lies between must let
    /// the job write there.
    commit: bool,
    active: Option<Arc<Active>>,
}

/// What the filter is to be like.
pub struct Options<'a> {
    /// As the user wants it named; without, it is given a name, and not shown to those who ask about
    /// disks.
    pub name: Option<&'a str>,
    /// The target is below the disk.
    pub commit: bool,
    /// Guests' writes go to both sides.
    pub active: Option<Arc<Active>>,
}

/// Puts the filter above `source`; `dirty` has every write from now on that did not go to both sides.
pub fn insert(
    graph: &mut Graph,
    source: &Arc<Node>,
    dirty: &Arc<Bitmap>,
    Options { name, commit, active }: Options,
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
    let filter = MirrorTop { file, dirty: dirty.clone(), commit, active };
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
    /// The mode `write-blocking`, unless the job is at its end.
    fn active(&self) -> Option<&Active> {
        self.active.as_deref().filter(|a| a.on.load(Ordering::SeqCst))
    }

    /// Changes both sides. `change` is told which.
    fn both(
        &self,
        active: &Active,
        off: u64,
        len: u64,
        change: impl Fn(&Node) -> io::Result<()>,
    ) -> io::Result<()> {
        let _turn = active.turns.enter(off, off + len, true);
        let done = change(&*self.file.need()?);
        // With the turn in hand the job clears nothing here: what is dirty all over it copies later.
        let granule = self.dirty.granularity();
        let whole = (off & !(granule - 1), (off + len).next_multiple_of(granule).min(self.len()));
        if done.is_ok()
            && self.dirty.next_clean(off, off + len).is_some()
            && (!active.bare || active.holds(whole.0, whole.1).unwrap_or(false))
        {
            match active.target.need().and_then(|target| change(&target)) {
                Ok(()) => return done,
                Err(e) => {
                    *active.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                }
            }
        }
        self.after(off, len, done)
    }

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

    fn edges(&self) -> Vec<Arc<Edge>> {
        let target = self.active.iter().map(|a| a.target.clone());
        std::iter::once(self.file.clone()).chain(target).collect()
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "target" {
            let uses = if self.active().is_some() { Perm::WRITE } else { Perm::NONE };
            return (uses, Perm::ALL);
        }
        match self.commit {
            true => (above.0 & !Perm::CONSISTENT_READ, Perm::ALL),
            // Another writer would go past the filter.
            false => (above.0, above.1 & !(Perm::WRITE | Perm::RESIZE)),
        }
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        if let Some(active) = self.active() {
            let len = from.len();
            let same = AlignedBuf::copy(from);
            let write = |n: &Node| n.write(off, &Iov::from_slice(&same[..len]), flags);
            return self.both(active, off, len as u64, write);
        }
        let done = self.file.need()?.write(off, from, flags);
        self.after(off, from.len() as u64, done)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        if let Some(active) = self.active() {
            return self.both(active, off, len, |n| n.zero(off, len, flags));
        }
        let done = self.file.need()?.zero(off, len, flags);
        self.after(off, len, done)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        // Each side may do with it what it likes: it has to be copied.
        let _turn = self.active().map(|a| a.turns.enter(off, off + len, true));
        let done = self.file.need()?.discard(off, len);
        self.after(off, len, done)
    }

    fn filename(&self) -> String {
        self.file.node().map(|n| names(&n).shown()).unwrap_or_default()
    }
}
