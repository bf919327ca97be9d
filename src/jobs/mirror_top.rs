//! The filter `mirror_top`: what a mirror puts above a disk, so that it hears of every write.
//!
//! In the background mode it only marks what was written, and the job copies that later. In the mode
//! `write-blocking` a guest's write goes to both sides before the guest hears of it, and leaves
//! nothing to be copied: [`Both`]. A write and a copy of the job that overlap take turns, so do two
//! writes, and both sides get the same bytes of a memory that the guest may change meanwhile.
//!
//! A job that was told to end is [closing](Mode::Closing), whatever its mode was: nothing more becomes
//! dirty then, so that it comes to its end however fast the guest writes, and may wait there for as long
//! as it likes; the guest is as fast as the target, and never waits for more than a piece of the job's.
//!
//! Owns: the mark, and the second write. Never: decides about errors of the target: the guest does not
//! hear of them, the job does. Threads: I/O from any. Locks: the turns, taken with a ticket in hand;
//! whoever has a turn waits for nothing but I/O.

use crate::block::bitmap::Bitmap;
use crate::block::chain;
use crate::block::driver::{Driver, ExtentKind, Flags, Perm};
use crate::block::filename::names;
use crate::block::graph::Graph;
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::serial::Serial;
use crate::error::Result;
use crate::sys::buf::{AlignedBuf, CopyBuf};
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most that a guest's thread copies in one piece, in bytes.
const PIECE: u64 = 1 << 20;

/// How guests' writes get to the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mode {
    /// The job copies them later; or it is over, and nobody does.
    Background,
    /// With the guest's own write, but for discards, and for what hides more than was written.
    Blocking,
    /// With the guest's own write, all of it: discards are not done.
    Closing,
}

/// The two sides of the mirror: what the filter and the job share.
pub struct Both {
    target: Arc<Edge>,
    /// The target's backing file is not there yet: what it does not hold must be copied as a whole, and zeroes
    /// must be said to be there.
    bare: bool,
    /// The target is below the disk, where not only this filter marks what is written.
    commit: bool,
    /// Who is at which bytes. The job takes turns in all modes, guests' writes but in the background.
    pub turns: Serial,
    /// A [`Mode`].
    mode: AtomicU8,
    /// Why a write of the guest did not reach the target, until the job has asked.
    failed: Mutex<Option<io::Error>>,
    bug: Bug,
}

impl Both {
    /// For a target. `bare`: its backing file is not there yet. `commit`: it is below the disk.
    pub fn new(target: &Arc<Node>, (bare, commit): (bool, bool), mode: Mode) -> Arc<Both> {
        Arc::new(Both {
            target: Edge::new("target", Some(target.clone())),
            bare,
            commit,
            turns: Serial::default(),
            mode: AtomicU8::new(mode as u8),
            failed: Mutex::default(),
            bug: Bug::here(),
        })
    }

    /// The target, for whoever has a ticket of a handle above the filter.
    pub fn target(&self) -> io::Result<Arc<Node>> {
        self.target.need()
    }

    /// How the target is changed.
    pub fn hide(&self) -> Flags {
        if self.bare { Flags::HIDE } else { Flags::NONE }
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

    /// Another mode, for requests that begin from now on. One that began before may still go as it
    /// did; it marks what it changed after that, which is right in every mode.
    pub fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// The mode now.
    pub fn is(&self, mode: Mode) -> bool {
        self.mode.load(Ordering::SeqCst) == mode as u8
    }

    /// There is an error for [`Both::take_error`].
    pub fn has_failed(&self) -> bool {
        self.lock_failed().is_some()
    }

    /// Why a write of the guest did not reach the target, since the last time that this was asked.
    pub fn take_error(&self) -> Option<io::Error> {
        self.lock_failed().take()
    }

    fn lock_failed(&self) -> MutexGuard<'_, Option<io::Error>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies a range as it is, with its turn in hand.
    fn bring(&self, source: &Node, range: Range<u64>) -> io::Result<()> {
        let target = self.target.need()?;
        let flags = self.hide() | if self.commit { Flags::MAY_UNMAP } else { Flags::NONE };
        let mut at = range.start;
        while at < range.end {
            let found = chain::contents(source, at, range.end - at)?;
            if found.zero {
                target.zero(at, found.len, flags)?;
                at += found.len;
                continue;
            }
            let n = found.len.min(PIECE);
            let mut buf = CopyBuf::new(n as usize);
            source.read(at, &mut IovMut::from_slice(&mut buf))?;
            target.write(at, &Iov::from_slice(&buf), self.hide())?;
            at += n;
        }
        Ok(())
    }
}

/// See the module's head.
pub struct MirrorTop {
    file: Arc<Edge>,
    /// Marked after each write, before the writer hears of it; also when it failed.
    dirty: Arc<Bitmap>,
    both: Arc<Both>,
}

/// What the filter is to be like.
pub struct Options<'a> {
    /// As the user wants it named; without, it is given a name, and not shown to those who ask about
    /// disks.
    pub name: Option<&'a str>,
    /// Both sides.
    pub both: Arc<Both>,
}

/// Puts the filter above `source`; `dirty` has every write from now on that did not go to both sides.
pub fn insert(
    graph: &mut Graph,
    source: &Arc<Node>,
    dirty: &Arc<Bitmap>,
    Options { name, both }: Options,
) -> Result<Arc<Node>> {
    let implicit = name.is_none();
    let name = match name {
        Some(name) => {
            graph.check_name(name)?;
            name.to_string()
        }
        None => graph.auto_name(),
    };
    let file = Edge::new("file", None);
    let commit = both.commit;
    let filter = MirrorTop { file, dirty: dirty.clone(), both };
    let options = NodeOptions { read_only: source.read_only(), implicit, ..NodeOptions::default() };
    let node = Node::new(name, Box::new(filter), options);
    if commit {
        // A writer that goes past the filter cannot be kept out: others must share everything. Not the
        // filter's as well, or what it has copied would be marked after that.
        source.insert_bitmap(dirty.clone())?;
    } else {
        // The filter marks it: as a bitmap of a node it is only shown.
        dirty.set_enabled(false);
        node.insert_bitmap(dirty.clone())?;
    }
    let done = graph.insert_filter(&node, source);
    if done.is_err() {
        source.remove_bitmap(dirty);
    }
    done.map(|()| node)
}

impl MirrorTop {
    /// Changes both sides. `change` is told which.
    fn both(&self, off: u64, len: u64, change: impl Fn(&Node) -> io::Result<()>) -> io::Result<()> {
        let Both { bare, commit, .. } = *self.both;
        let granule = self.dirty.granularity();
        let whole = off & !(granule - 1)..(off + len).next_multiple_of(granule).min(self.len());
        let wholly = self.both.is(Mode::Closing) && (bare || commit);
        let turn = if wholly { whole.clone() } else { off..off + len };
        let _turn = self.both.turns.enter(turn.start, turn.end, true);
        let source = self.file.need()?;
        let done = change(&source);
        if done.is_err() {
            return self.after(off, len, done);
        }
        let second = if wholly && (commit || !self.both.holds(whole.start, whole.end).unwrap_or(false)) {
            // As the job does it: a write that goes past this filter marks it again.
            self.dirty.clear(whole.start, whole.end - whole.start);
            let second = self.both.bring(&source, whole.clone());
            if second.is_err() {
                self.dirty.mark(whole.start, whole.end - whole.start);
            }
            second
        } else if self.dirty.next_clean(off, off + len).is_some()
            && (!bare || self.both.holds(whole.start, whole.end).unwrap_or(false))
        {
            // With the turn in hand the job clears nothing here.
            self.both.target.need().and_then(|target| change(&target))
        } else {
            // What is dirty all over the job copies later.
            return self.after(off, len, done);
        };
        match second {
            Ok(()) => done,
            Err(e) => {
                *self.both.lock_failed() = Some(e);
                self.after(off, len, done)
            }
        }
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
        vec![self.file.clone(), self.both.target.clone()]
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "target" {
            // What it does there it does with the job's permissions, which share them with nobody.
            return (Perm::NONE, Perm::ALL);
        }
        match self.both.commit {
            true => (above.0 & !Perm::CONSISTENT_READ, Perm::ALL),
            // Another writer would go past the filter.
            false => (above.0, above.1 & !(Perm::WRITE | Perm::RESIZE)),
        }
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        if !self.both.is(Mode::Background) {
            let len = from.len();
            let same = AlignedBuf::copy(from);
            let write = |n: &Node| n.write(off, &Iov::from_slice(&same[..len]), flags | self.both.hide());
            return self.both(off, len as u64, write);
        }
        if self.both.bug.is(Mutant::MarkBeforeData) {
            self.dirty.mark(off, from.len() as u64);
            return self.file.need()?.write(off, from, flags);
        }
        let done = self.file.need()?.write(off, from, flags);
        self.after(off, from.len() as u64, done)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        if !self.both.is(Mode::Background) {
            // The disk may say so, too.
            return self.both(off, len, |n| n.zero(off, len, flags | self.both.hide()));
        }
        let done = self.file.need()?.zero(off, len, flags);
        self.after(off, len, done)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        // Each side may do with it what it likes: it has to be copied. Nobody minds if nothing is done.
        if self.both.is(Mode::Closing) {
            return Ok(());
        }
        let blocking = self.both.is(Mode::Blocking);
        let _turn = blocking.then(|| self.both.turns.enter(off, off + len, true));
        let done = self.file.need()?.discard(off, len);
        self.after(off, len, done)
    }

    fn filename(&self) -> String {
        self.file.node().map(|n| names(&n).shown()).unwrap_or_default()
    }
}
