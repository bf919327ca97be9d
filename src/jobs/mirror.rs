//! The job `mirror`: a copy of a disk that follows it, until the guest is switched over to it. The
//! commit of an active image is one, too, whose target lies below the disk.
//!
//! A dirty bitmap says what is still to be copied: all that there was, at first, and what the guest
//! has written since. The job *clears* a granule, *then* reads it and writes it to the target; when
//! that fails it sets it again. Once little is dirty the job is ready. When it is told to end it has
//! the guest held, copies the rest, flushes the target, and ends; the control thread switches over
//! before the guest goes on.
//!
//! A guest that writes faster than the job copies is held again and again, for a little at a time,
//! until nothing is left.
//!
//! In the mode `write-blocking` ([`mirror_top`]) the guest's writes go to both sides. A piece that the
//! job copies is then taken, read and written within one turn, so that no write of the guest comes
//! between; nothing that was copied becomes dirty again, but by a discard or an error.
//!
//! Owns: the order of it. Never: makes or names targets. Threads: as [`Work`] says. Locks: none of its
//! own.

use super::job::{JobCtx, Stop, Work, attach};
use super::layers::{self, Found};
use super::mirror_top::{self, Active};
use super::table::Kind;
use crate::block::bitmap::Bitmap;
use crate::block::chain::{self, Contents};
use crate::block::driver::{Flags, Perm};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, OnError};
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The most that is copied in one piece, in bytes.
const PIECE: u64 = 1 << 20;

/// The guest is held for the rest when no more than this is dirty, in bytes.
const LITTLE: u64 = 1 << 20;

/// The most that is copied while a guest is held that cannot be caught up with otherwise, in bytes.
const MOST_HELD: u64 = 256 << 20;

/// How often the whole disk is gone over before a job is ready although the guest is faster.
const ROUNDS: u32 = 8;

/// What is copied at first.
pub enum Sync {
    /// The whole disk. `zeroed`: the target is known to read as zeroes all over.
    Full {
        /// What is not allocated in the source need not be looked at in the target.
        zeroed: bool,
    },
    /// What lies in these images of the source's chain, uppermost first.
    Top(Vec<Arc<Node>>),
    /// Nothing: only what is written from now on.
    None,
}

/// A mirror that is to be made.
pub struct Plan {
    /// The disk.
    pub source: Arc<Node>,
    /// Where it goes.
    pub target: Arc<Node>,
    /// What is copied at first.
    pub sync: Sync,
    /// The target lies below the disk, whose images it takes in.
    pub commit: bool,
    /// Bytes that are noted together, a power of two.
    pub granularity: u32,
    /// The most that is copied in one piece, in bytes.
    pub buf_size: u64,
    /// Zeroes give space back on the target.
    pub unmap: bool,
    /// The node in whose place the target comes, if not the disk's.
    pub replaces: Option<Arc<Node>>,
    /// What to do when reading fails.
    pub on_source_error: OnError,
    /// What to do when writing fails.
    pub on_target_error: OnError,
    /// The filter's name.
    pub filter: Option<String>,
    /// The guest's writes go to both sides at once (`copy-mode=write-blocking`).
    pub active: bool,
    /// What becomes the target's backing file when the guest is switched over to it, which it does not
    /// have before.
    pub backing: Option<Arc<Node>>,
}

/// Which side of a copy failed.
enum Failed {
    Source(io::Error),
    Target(io::Error),
}

/// How a copy went.
type Copied = Result<(), Failed>;

/// A side of a copy: a handle, which takes a ticket for each request, or a node, for whoever has one.
trait Side {
    fn contents(&self, off: u64, len: u64) -> io::Result<Contents>;
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()>;
    fn write(&self, off: u64, from: &Iov) -> io::Result<()>;
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()>;
}

impl Side for Arc<Handle> {
    fn contents(&self, off: u64, len: u64) -> io::Result<Contents> {
        Handle::contents(self, off, len)
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        Handle::read(self, off, to)
    }
    fn write(&self, off: u64, from: &Iov) -> io::Result<()> {
        Handle::write(self, off, from, Flags::NONE)
    }
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        Handle::zero(self, off, len, flags)
    }
}

impl Side for Node {
    fn contents(&self, off: u64, len: u64) -> io::Result<Contents> {
        chain::contents(self, off, len)
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        Node::read(self, off, to)
    }
    fn write(&self, off: u64, from: &Iov) -> io::Result<()> {
        Node::write(self, off, from, Flags::NONE)
    }
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        Node::zero(self, off, len, flags)
    }
}

/// The job.
pub struct Mirror {
    plan: Plan,
    filter: Option<Arc<Node>>,
    dirty: Arc<Bitmap>,
    src: Option<Arc<Handle>>,
    dst: Option<Arc<Handle>>,
    /// In the mode `write-blocking`: what the filter shares, and a handle above both sides.
    active: Option<(Arc<Active>, Arc<Handle>)>,
    buf: Option<AlignedBuf>,
    /// It was told to switch over.
    switch: bool,
    /// The target was read-only before.
    turn_back: bool,
    synced: Arc<AtomicBool>,
    /// The target has a backing file that is not there yet.
    bare: bool,
}

impl Mirror {
    /// Puts the filter in and attaches to both sides.
    pub fn new(graph: &mut Graph, mut plan: Plan) -> Result<Mirror> {
        let image = plan.target.clone().skip_filters();
        // Its backing file comes later: a cluster that it has only a part of would hide the rest.
        let bare = image.backing().is_none() && !chain::stands_alone(&image);
        if bare {
            let cluster = image.driver.info().cluster_size.unwrap_or(0).next_power_of_two();
            plan.granularity = plan.granularity.max(u32::try_from(cluster).unwrap_or(0));
        }
        let dirty = Bitmap::new(None, plan.granularity, plan.source.len())?;
        let turn_back = plan.target.read_only();
        let mut mirror = Mirror {
            plan,
            filter: None,
            dirty,
            src: None,
            dst: None,
            active: None,
            buf: None,
            switch: false,
            turn_back,
            synced: Arc::default(),
            bare,
        };
        match mirror.begin(graph) {
            Ok(()) => Ok(mirror),
            Err(e) => {
                mirror.clean(graph);
                Err(e)
            }
        }
    }

    fn begin(&mut self, graph: &mut Graph) -> Result<()> {
        let Plan { source, target, commit, .. } = &self.plan;
        if *commit {
            graph.set_read_only(target, false)?;
        }
        let active = self.plan.active.then(|| Active::new(target, self.bare));
        let name = self.plan.filter.as_deref();
        let options = mirror_top::Options { name, commit: *commit, active: active.clone() };
        let filter = mirror_top::insert(graph, source, &self.dirty, options)?;
        self.filter = Some(filter.clone());
        if let Some(active) = active {
            self.active = Some((active, attach(graph, &filter, Perm::NONE, Perm::ALL)?));
        }
        let reads = if *commit { Perm::NONE } else { Perm::CONSISTENT_READ };
        self.src = Some(attach(graph, source, reads, Perm::ALL)?);
        if *commit && target.len() < source.len() {
            graph.resize(target, source.len())?;
        }
        let uses = Perm::WRITE | Perm::CONSISTENT_READ;
        let shares = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        // The filter writes there as well.
        let shares = if self.plan.active { shares | Perm::WRITE } else { shares };
        self.dst = Some(attach(graph, target, uses, shares)?);
        Ok(())
    }

    fn sides(&self) -> Result<(Arc<Handle>, Arc<Handle>), Stop> {
        match (&self.src, &self.dst) {
            (Some(src), Some(dst)) => Ok((src.clone(), dst.clone())),
            _ => Err(Stop::Failed(Error::new("the job has no disk"))),
        }
    }

    /// Notes what there is to be copied at first.
    fn begin_dirty(&self, cx: &JobCtx, src: &Arc<Handle>, dst: &Arc<Handle>) -> Result<(), Stop> {
        let images: Vec<_> = match &self.plan.sync {
            Sync::None => return Ok(()),
            Sync::Top(images) => images.clone(),
            Sync::Full { .. } => layers::chain(self.plan.source.clone()).collect(),
        };
        let zeroed = !matches!(self.plan.sync, Sync::Full { zeroed: false });
        let len = self.dirty.len();
        if !zeroed && !self.plan.target.options().unmap {
            // Zeroes take as long as data there, perhaps, and count as such.
            self.dirty.mark(0, len);
            return Ok(());
        }
        let (mut off, begun) = (0, Instant::now());
        while off < len {
            // What takes a moment only is found out even for a job that is cancelled at once.
            if begun.elapsed() > Duration::from_millis(20) {
                cx.pause_point()?;
            }
            let found = src.inside(|_| layers::find(&images, off, len - off));
            let (found, n) = match found {
                Ok(found) => found,
                Err(e) => {
                    cx.on_error(self.plan.on_source_error, &e, true)?;
                    continue;
                }
            };
            if found != Found::Nothing {
                self.dirty.mark(off, n);
            } else if !zeroed && let Err(e) = self.zero(dst, off, n.min(1 << 30)) {
                cx.on_error(self.plan.on_target_error, &e, false)?;
                continue;
            }
            off += if found == Found::Nothing && !zeroed { n.min(1 << 30) } else { n };
        }
        Ok(())
    }

    /// Makes a range of the target read as zeroes, if it does not.
    fn zero(&self, dst: &impl Side, off: u64, len: u64) -> io::Result<()> {
        let there = dst.contents(off, len)?;
        let own = there.depth == 1 || !self.bare;
        if there.zero && own && there.len >= len {
            return Ok(());
        }
        dst.zero(off, len, if self.plan.unmap { Flags::MAY_UNMAP } else { Flags::NONE })
    }

    /// Copies a range whose granules were cleared.
    fn copy(&mut self, src: &impl Side, dst: &impl Side, range: &Range<u64>) -> Result<(), Failed> {
        let most = PIECE.min(self.plan.buf_size.max(4096)) as usize;
        let mut buf = self.buf.take().unwrap_or_else(|| AlignedBuf::new(most, 4096));
        let mut at = range.start;
        let done = loop {
            if at >= range.end {
                break Ok(());
            }
            match self.copy_some(src, dst, at, range.end - at, &mut buf) {
                Ok(n) => at += n,
                Err(e) => break Err(e),
            }
        };
        self.buf = Some(buf);
        done
    }

    /// Copies some of `len` bytes at `off`; answers how many.
    fn copy_some(
        &self,
        src: &impl Side,
        dst: &impl Side,
        off: u64,
        len: u64,
        buf: &mut AlignedBuf,
    ) -> Result<u64, Failed> {
        let found = src.contents(off, len).map_err(Failed::Source)?;
        if found.zero {
            self.zero(dst, off, found.len).map_err(Failed::Target)?;
            return Ok(found.len);
        }
        let n = found.len.min(buf.len() as u64);
        let part = &mut buf[..n as usize];
        src.read(off, &mut IovMut::from_slice(part)).map_err(Failed::Source)?;
        dst.write(off, &Iov::from_slice(part)).map_err(Failed::Target)?;
        Ok(n)
    }

    /// Takes the next dirty range from `from` on, and clears it.
    fn take(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let range = self.whole(&self.dirty.next_dirty(from, self.dirty.len(), most)?);
        // Before its data are read: a write that comes later marks it again.
        self.clear(&range);
        Some(range)
    }

    /// The granules that a range touches.
    fn whole(&self, range: &Range<u64>) -> Range<u64> {
        let granule = self.dirty.granularity();
        range.start & !(granule - 1)..range.end.next_multiple_of(granule).min(self.dirty.len())
    }

    fn clear(&self, range: &Range<u64>) {
        self.dirty.clear(range.start, range.end - range.start);
    }

    /// Takes the next dirty range from `from` on, and copies it: the range, and how that went.
    fn take_and_copy(&mut self, from: u64, most: u64) -> Result<Option<(Range<u64>, Copied)>, Stop> {
        let (src, dst) = self.sides()?;
        let Some((active, above)) = self.active.clone() else {
            let Some(range) = self.take(from, most) else { return Ok(None) };
            let done = self.copy(&src, &dst, &range);
            return Ok(Some((range, done)));
        };
        let Some(next) = self.dirty.next_dirty(from, self.dirty.len(), most) else { return Ok(None) };
        let whole = self.whole(&next);
        let done = above.inside(|filter| {
            // The ticket first, then the turn.
            let _turn = active.turns.enter(whole.start, whole.end, true);
            self.clear(&whole);
            let (source, target) = (filter.filtered(), active.target()?);
            let source = source.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEDIUM))?;
            let done = self.copy(&*source, &*target, &whole);
            if done.is_err() {
                self.dirty.mark(whole.start, whole.end - whole.start);
            }
            Ok(done)
        })?;
        Ok(Some((whole, done)))
    }

    /// Copies what is dirty from `from` on, one piece of it; answers where it ended, `None` when there
    /// was nothing. Errors are dealt with as the policies say.
    fn step(&mut self, cx: &JobCtx, from: u64, most: u64) -> Result<Option<u64>, Stop> {
        if self.dirty.count() == 0 {
            return Ok(None);
        }
        cx.at_work();
        let Some((range, done)) = self.take_and_copy(from, most)? else { return Ok(None) };
        if let Err(e) = done {
            self.dirty.mark(range.start, range.end - range.start);
            match e {
                Failed::Source(e) => cx.on_error(self.plan.on_source_error, &e, true)?,
                Failed::Target(e) => cx.on_error(self.plan.on_target_error, &e, false)?,
            };
            return Ok(Some(range.end));
        }
        cx.advance(range.end - range.start);
        cx.remaining(self.dirty.count());
        Ok(Some(range.end))
    }

    /// The last step: with the guest held, copies up to `most` bytes. True when nothing is left, and the
    /// guest stays held.
    fn last_step(&mut self, cx: &JobCtx, most: u64) -> Result<bool, Stop> {
        let (src, dst) = self.sides()?;
        let above = [self.plan.source.clone()];
        let mut own = vec![src, dst.clone()];
        own.extend(self.active.iter().map(|(_, h)| h.clone()));
        if !cx.hold_guest(&above, &own)? {
            return Ok(false);
        }
        let mut done = 0;
        while done < most {
            let before = cx.get_progress().offset;
            let Some(_) = self.step(cx, 0, PIECE)? else { break };
            done += (cx.get_progress().offset - before).max(4096);
        }
        if self.dirty.count() == 0 {
            match dst.flush() {
                Ok(()) if cx.confirm_hold() => return Ok(true),
                Ok(()) => {}
                Err(e) => {
                    cx.release_guest();
                    cx.on_error(self.plan.on_target_error, &e, false)?;
                }
            }
        }
        cx.release_guest();
        Ok(false)
    }

    /// Nothing, or little enough, is dirty, or the guest is too fast to wait for that.
    fn is_close(&self, rounds: u32) -> bool {
        let dirty = self.dirty.count();
        dirty == 0 || (rounds >= 2 && dirty <= LITTLE) || rounds >= ROUNDS
    }
}

impl Work for Mirror {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let (src, dst) = self.sides()?;
        let (len, there) = (src.len(), dst.len());
        if len != there && !(self.plan.commit && there > len) {
            return Err(Stop::Failed(Error::new("Source and target image have different sizes")));
        }
        self.begin_dirty(cx, &src, &dst)?;
        cx.remaining(self.dirty.count());
        let (mut at, mut rounds, mut ready) = (0, 0, false);
        let (mut budget, mut last) = (LITTLE, u64::MAX);
        loop {
            cx.pause_point()?;
            if let Some((active, _)) = &self.active {
                let failed = active.take_error();
                self.synced.store(failed.is_none() && self.dirty.count() == 0, Ordering::SeqCst);
                if let Some(e) = failed {
                    cx.on_error(self.plan.on_target_error, &e, false)?;
                    continue;
                }
            }
            if self.is_close(rounds) {
                if !ready {
                    if let Err(e) = dst.flush() {
                        cx.on_error(self.plan.on_target_error, &e, false)?;
                        continue;
                    }
                    ready = true;
                    cx.remaining(self.dirty.count());
                    // Before anybody hears of it: a mirror that is ready and has copied all is not busy.
                    if self.dirty.count() == 0 {
                        cx.at_rest();
                    }
                    cx.ready();
                }
                let (complete, stop) = (cx.completing(), cx.stopping());
                if complete || stop {
                    if self.last_step(cx, budget)? {
                        self.switch = complete;
                        return Ok(());
                    }
                    // The guest has written more in between than was copied while it was held, perhaps.
                    let left = self.dirty.count();
                    let slow = left.saturating_add(LITTLE / 2) > last;
                    budget = if slow { (budget * 2).min(MOST_HELD) } else { LITTLE };
                    last = left;
                    continue;
                }
            }
            let before = cx.get_progress().offset;
            match self.step(cx, at, cx.piece(PIECE))? {
                Some(end) => {
                    at = end;
                    cx.throttle(cx.get_progress().offset - before)?;
                }
                None if at > 0 => {
                    at = 0;
                    rounds = (rounds + 1).min(ROUNDS);
                }
                None => {
                    cx.remaining(self.dirty.count());
                    cx.at_rest();
                    cx.sleep(Duration::from_millis(100))?;
                }
            }
        }
    }

    fn prepare(&mut self, graph: &mut Graph) -> Result<()> {
        let (Ok((src, dst)), true) = (self.sides(), self.switch) else { return Ok(()) };
        let Some(filter) = self.filter.clone() else { return Ok(()) };
        let Plan { source, target, replaces, .. } = &self.plan;
        let from = replaces.as_ref().unwrap_or(&filter).clone();
        let target = target.clone();
        let quiesced = graph.quiesce(&[source, &from, &target], &[&src, &dst]);
        let wrong = |e: io::Error| Error::new(strerror(&e));
        // Nothing, unless the job had to wait for others of its transaction or for a user.
        while let Some(range) = self.take(0, PIECE) {
            if let Err(Failed::Source(e) | Failed::Target(e)) = self.copy(&src, &dst, &range) {
                self.dirty.mark(range.start, range.end - range.start);
                return Err(wrong(e));
            }
        }
        dst.flush().map_err(wrong)?;
        // The target's new users do with it what they like; it stays open till they have it.
        graph.detach(&src);
        self.src = None;
        if let Some((active, above)) = self.active.take() {
            active.stop();
            graph.detach(&above);
        }
        graph.set_perm(&dst, Perm::NONE, Perm::ALL)?;
        let longer = target.len() != from.len();
        let backing = self.plan.backing.clone().zip(target.backing_edge());
        // Now the job's own handle as well, which is done.
        let all = graph.quiesce(&[&self.plan.source, &from, &target], &[]);
        let done = graph.edit(&all, |edit| {
            edit.replace(&from, &target, None)?;
            match &backing {
                Some((below, edge)) => edit.set(edge, Some(below.clone())),
                None => Ok(()),
            }
        });
        drop((all, quiesced));
        done?;
        if longer {
            graph.tell_length(&target);
        }
        // What the disk has become stays writable.
        self.turn_back = false;
        Ok(())
    }

    fn commit(&mut self, graph: &mut Graph) {
        // What is a backing file now is not written any more.
        if self.switch
            && let Some(below) = &self.plan.backing
            && let Err(e) = graph.set_read_only(below, true)
        {
            log::warn!("node '{}' stays writable: {e}", below.name);
        }
    }

    fn clean(&mut self, graph: &mut Graph) {
        if let Some((active, above)) = self.active.take() {
            active.stop();
            graph.detach(&above);
        }
        for handle in [self.src.take(), self.dst.take()].into_iter().flatten() {
            graph.detach(&handle);
        }
        if self.plan.commit {
            self.plan.source.remove_bitmap(&self.dirty);
        }
        if let Some(filter) = self.filter.take()
            && graph.find(&filter.name).is_some_and(|n| Arc::ptr_eq(n, &filter))
            && let Err(e) = graph.remove_filter(&filter)
        {
            log::error!("the filter '{}' stays: {e}", filter.name);
        }
        if self.plan.commit
            && self.turn_back
            && let Err(e) = graph.set_read_only(&self.plan.target, true)
        {
            log::warn!("node '{}' stays writable: {e}", self.plan.target.name);
        }
        graph.collect();
    }

    fn completes(&self) -> bool {
        true
    }

    fn cancels_softly(&self) -> bool {
        true
    }

    fn actively_synced(&self) -> Option<Box<dyn Fn() -> bool>> {
        let synced = self.synced.clone();
        (!self.plan.commit).then(|| Box::new(move || synced.load(Ordering::SeqCst)) as _)
    }
}

impl Plan {
    /// What such a job says it does.
    pub fn kind(&self) -> Kind {
        if self.commit { Kind::Commit } else { Kind::Mirror }
    }
}

/// The granularity for a target, if the user wants none: its cluster size, within reason.
pub fn default_granularity(target: &Node) -> u32 {
    match target.driver.info().cluster_size {
        Some(size) => size.clamp(4096, 65536) as u32,
        None => 65536,
    }
}
