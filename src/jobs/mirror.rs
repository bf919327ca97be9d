//! The job `mirror`: a copy of a disk that follows it, until the guest is switched over to it. The
//! commit of an active image is one, too, whose target lies below the disk.
//!
//! A dirty bitmap says what is still to be copied: all that there was, at first, and what the guest
//! has written since. The job *clears* a granule, *then* reads it and writes it to the target; when
//! that fails it sets it again. Once little is dirty the job is ready.
//!
//! In the mode `write-blocking` ([`mirror_top`]) the guest's writes go to both sides. A piece that the
//! job copies is taken, read and written within one turn, so that no write of the guest comes between.
//!
//! When it is told to end it is [closing](mirror_top::Mode::Closing): from then on guests' writes go to
//! both sides in any case, and nothing becomes dirty again. The job copies the rest, flushes the target,
//! and has the guest held for what was under way just then. Then it ends, and the control thread
//! switches over before the guest goes on; or the job waits to be finalized, the guest goes on, still
//! on both sides, and the switch finds nothing to copy.
//!
//! Owns: the order of it. Never: makes or names targets. Threads: as [`Work`] says. Locks: none of its
//! own.

use super::crew::{Crew, PIECE, Step};
use super::job::{JobCtx, Stop, Work, attach, attach_source};
use super::layers::{self, Found};
use super::mirror_top::{self, Both, Mode};
use super::table::Kind;
use crate::block::bitmap::Bitmap;
use crate::block::chain;
use crate::block::driver::{Flags, Perm};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, OnError};
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use crate::sys::buf::CopyBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most that is zeroed in one piece, in bytes.
const ZEROES: u64 = 16 << 20;

/// A job is close to its end when no more than this is dirty, and this is the most that is copied while
/// the guest is held, in bytes.
const LITTLE: u64 = 1 << 20;

/// A flush that takes less is done while the guest is held.
const SHORT: Duration = Duration::from_millis(50);

/// After so many flushes that took longer the guest has to wait for one.
const MOST_FLUSHES: u32 = 8;

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

/// The job.
pub struct Mirror {
    plan: Plan,
    filter: Option<Arc<Node>>,
    dirty: Arc<Bitmap>,
    both: Arc<Both>,
    /// Above both sides: for tickets.
    above: Option<Arc<Handle>>,
    /// On each side: for what the job does there, and lets others do.
    src: Option<Arc<Handle>>,
    dst: Option<Arc<Handle>>,
    crew: Option<Crew>,
    /// How far the disk has been gone over this time, in bytes.
    at: Mutex<u64>,
    /// What was taken and is not copied yet, in bytes.
    under_way: AtomicU64,
    /// How often it has flushed the target since it is closing.
    flushes: u32,
    /// It was told to switch over.
    switch: bool,
    /// The target was read-only before.
    turn_back: bool,
    synced: Arc<AtomicBool>,
    /// The target has a backing file that is not there yet, or may get one: it holds less than the disk.
    bare: bool,
    bug: Bug,
}

impl Mirror {
    /// Puts the filter in and attaches to both sides.
    pub fn new(graph: &mut Graph, mut plan: Plan) -> Result<Mirror> {
        let image = plan.target.clone().skip_filters();
        // Its backing file comes later: a cluster that it has only a part of would hide the rest.
        let partly =
            !plan.commit && !matches!(plan.sync, Sync::Full { .. }) && image.backing_edge().is_some();
        let bare = image.backing().is_none() && (partly || !chain::stands_alone(&image));
        if bare {
            let cluster = image.driver.info().cluster_size.unwrap_or(0).next_power_of_two();
            plan.granularity = plan.granularity.max(u32::try_from(cluster).unwrap_or(0));
        }
        let dirty = Bitmap::new(None, plan.granularity, plan.source.len())?;
        let turn_back = plan.target.read_only();
        let both = Both::new(&plan.target, (bare, plan.commit), plan.mode());
        let mut mirror = Mirror {
            plan,
            filter: None,
            dirty,
            both,
            above: None,
            src: None,
            dst: None,
            crew: None,
            at: Mutex::new(0),
            under_way: AtomicU64::new(0),
            flushes: 0,
            switch: false,
            turn_back,
            synced: Arc::default(),
            bare,
            bug: Bug::here(),
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
        let name = self.plan.filter.as_deref();
        let options = mirror_top::Options { name, both: self.both.clone() };
        let filter = mirror_top::insert(graph, source, &self.dirty, options)?;
        self.filter = Some(filter.clone());
        self.crew = Some(Crew::new(graph, &filter));
        self.above = Some(attach(graph, &filter, Perm::NONE, Perm::ALL)?);
        let reads = if *commit { Perm::NONE } else { Perm::CONSISTENT_READ };
        self.src = Some(attach_source(graph, source, reads, Perm::ALL)?);
        if *commit && target.len() < source.len() {
            graph.resize(target, source.len())?;
        }
        let uses = Perm::WRITE | Perm::CONSISTENT_READ;
        // Nobody else gets to see a copy that is not complete.
        let reads = if *commit { Perm::CONSISTENT_READ } else { Perm::NONE };
        self.dst = Some(attach(graph, target, uses, reads | Perm::WRITE_UNCHANGED)?);
        Ok(())
    }

    fn handles(&self) -> Result<[Arc<Handle>; 3], Error> {
        match (&self.above, &self.src, &self.dst) {
            (Some(above), Some(src), Some(dst)) => Ok([above.clone(), src.clone(), dst.clone()]),
            _ => Err(Error::new("the job has no disk")),
        }
    }

    /// Does something with a ticket in hand. `f` has the source and the target.
    fn inside<T>(&self, f: impl FnOnce(&Node, &Node) -> io::Result<T>) -> io::Result<T> {
        let none = || io::Error::from_raw_os_error(libc::ENOMEDIUM);
        let above = self.above.as_ref().ok_or_else(none)?;
        above.inside(|filter| {
            let (source, target) = (filter.filtered().ok_or_else(none)?, self.both.target()?);
            f(&source, &target)
        })
    }

    /// Deals with an error as the policies say.
    fn failed(&self, cx: &JobCtx, failed: Failed) -> Result<(), Stop> {
        match failed {
            Failed::Source(e) => cx.on_error(self.plan.on_source_error, &e, true)?,
            Failed::Target(e) => cx.on_error(self.plan.on_target_error, &e, false)?,
        };
        // What failed while the job was paused is marked, and tried again as well.
        self.both.take_error();
        Ok(())
    }

    /// Notes what there is to be copied at first.
    fn begin_dirty(&self, cx: &JobCtx) -> Result<(), Stop> {
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
            let most = if zeroed { len - off } else { ZEROES.min(len - off) };
            let found = self.inside(|_, target| {
                // A write of the guest that goes to both sides must not come between.
                let _turn = (!zeroed).then(|| self.both.turns.enter(off, off + most, true));
                let (found, n) = match layers::find(&images, off, most) {
                    Ok(found) => found,
                    Err(e) => return Ok(Err(Failed::Source(e))),
                };
                if found != Found::Nothing {
                    self.dirty.mark(off, n);
                } else if !zeroed && let Err(e) = self.zero(target, off, n) {
                    return Ok(Err(Failed::Target(e)));
                }
                Ok(Ok(n))
            })?;
            match found {
                Ok(n) => off += n,
                Err(e) => self.failed(cx, e)?,
            }
        }
        Ok(())
    }

    /// Makes a range of the target read as zeroes, if it does not.
    fn zero(&self, dst: &Node, off: u64, len: u64) -> io::Result<()> {
        let there = chain::contents(dst, off, len)?;
        let own = there.depth == 1 || !self.bare;
        if there.zero && own && there.len >= len {
            return Ok(());
        }
        let unmap = if self.plan.unmap { Flags::MAY_UNMAP } else { Flags::NONE };
        dst.zero(off, len, unmap | self.both.hide())
    }

    /// Copies a range whose granules were cleared.
    fn copy(&self, src: &Node, dst: &Node, range: &Range<u64>) -> Copied {
        let (mut at, mut data) = (range.start, 0);
        while at < range.end {
            if data >= PIECE && at.is_multiple_of(self.dirty.granularity()) {
                // It was taken for a hole, and somebody writes there: the rest is another piece's.
                self.dirty.mark(at, range.end - at);
                break;
            }
            let (n, written) = self.copy_some(src, dst, at, range.end - at)?;
            at += n;
            data += written;
        }
        Ok(())
    }

    /// Copies some of `len` bytes at `off`; answers how many, and how many of these are data.
    fn copy_some(&self, src: &Node, dst: &Node, off: u64, len: u64) -> Result<(u64, u64), Failed> {
        let found = chain::contents(src, off, len).map_err(Failed::Source)?;
        if found.zero {
            self.zero(dst, off, found.len).map_err(Failed::Target)?;
            return Ok((found.len, 0));
        }
        let n = found.len.min(PIECE).min(self.plan.buf_size.max(4096));
        let mut buf = CopyBuf::new(n as usize);
        src.read(off, &mut IovMut::from_slice(&mut buf)).map_err(Failed::Source)?;
        dst.write(off, &Iov::from_slice(&buf), self.both.hide()).map_err(Failed::Target)?;
        Ok((n, n))
    }

    /// The granules that a range touches.
    fn whole(&self, range: &Range<u64>) -> Range<u64> {
        let granule = self.dirty.granularity();
        range.start & !(granule - 1)..range.end.next_multiple_of(granule).min(self.dirty.len())
    }

    fn cursor(&self) -> MutexGuard<'_, u64> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next dirty range from the cursor on, of at most `most` bytes, or more if it is a hole. The
    /// cursor is behind it then: nobody else gets it this time.
    fn next(&self, most: u64) -> Option<Range<u64>> {
        let mut at = self.cursor();
        let hole = if self.plan.target.limits().cheap_zeroes { ZEROES.max(most) } else { most };
        let mut range = self.whole(&self.dirty.next_dirty(*at, self.dirty.len(), hole)?);
        if range.end - range.start > most {
            // Only how much is taken depends on this look: what is there is found out when the granules
            // are clear. So it does not matter when it fails.
            let found = self.inside(|src, _| chain::contents(src, range.start, range.end - range.start));
            let granule = self.dirty.granularity();
            let hole = found.map_or(0, |f| if f.zero { f.len & !(granule - 1) } else { 0 });
            range.end = range.end.min(range.start + hole.max(most.next_multiple_of(granule)));
        }
        *at = range.end;
        Some(range)
    }

    /// Clears a range of whole granules, and copies it; if that fails it is dirty again.
    fn take_and_copy(&self, range: &Range<u64>) -> Copied {
        let done = self.inside(|source, target| {
            // The ticket first, then the turn.
            let turn = self.both.turns.enter(range.start, range.end, true);
            let _turn = (!self.bug.is(Mutant::NoTurn)).then_some(turn);
            // Before its data are read: a write that comes later marks it again.
            if !self.bug.is(Mutant::ClearAfterRead) {
                self.dirty.clear(range.start, range.end - range.start);
            }
            let done = self.copy(source, target, range);
            if self.bug.is(Mutant::ClearAfterRead) {
                self.dirty.clear(range.start, range.end - range.start);
            }
            if done.is_err() && !self.bug.is(Mutant::NoRemark) {
                self.dirty.mark(range.start, range.end - range.start);
            }
            Ok(done)
        });
        done.unwrap_or_else(|e| Err(Failed::Source(e)))
    }

    /// Copies what is dirty from the cursor on, one piece of it; `None` when there was nothing.
    fn step(&self, cx: &JobCtx, most: u64) -> Step<Failed> {
        if self.dirty.count() == 0 {
            return Ok(None);
        }
        cx.at_work();
        let Some(range) = self.next(most) else { return Ok(None) };
        let len = range.end - range.start;
        self.under_way.fetch_add(len, Ordering::SeqCst);
        let done = self.take_and_copy(&range);
        self.under_way.fetch_sub(len, Ordering::SeqCst);
        done?;
        cx.advance(len);
        cx.remaining(self.dirty.count() + self.under_way.load(Ordering::SeqCst));
        Ok(Some(len))
    }

    /// The last step, with nothing dirty: true when it was done, and the guest stays held.
    fn last_step(&mut self, cx: &JobCtx) -> Result<bool, Stop> {
        let own = self.handles()?;
        if self.bug.is(Mutant::NoDrain) {
            self.both.set_mode(Mode::Background);
            return Ok(true);
        }
        // What was written for long is flushed for long: not while the guest waits.
        let begun = Instant::now();
        if let Err(e) = self.flush(&own[2]) {
            self.failed(cx, Failed::Target(e))?;
            return Ok(false);
        }
        let slow = begun.elapsed() > SHORT && self.flushes < MOST_FLUSHES;
        self.flushes += 1;
        if slow || !cx.hold_guest(from_ref(&self.plan.source), &own)? {
            return Ok(false);
        }
        // What was under way when the job began to close.
        let mut done = 0;
        while done < LITTLE {
            *self.cursor() = 0;
            match self.step(cx, PIECE) {
                Ok(None) => break,
                Ok(Some(bytes)) => done += bytes.max(4096),
                Err(e) => {
                    done += 4096;
                    self.failed(cx, e)?;
                }
            }
        }
        if self.dirty.count() == 0 {
            match self.flush(&own[2]) {
                Ok(()) if cx.confirm_hold() => return Ok(true),
                Ok(()) => {}
                Err(e) => {
                    cx.release_guest();
                    self.failed(cx, Failed::Target(e))?;
                }
            }
        }
        cx.release_guest();
        Ok(false)
    }

    fn flush(&self, target: &Handle) -> io::Result<()> {
        if self.bug.is(Mutant::NoFlush) { Ok(()) } else { target.flush() }
    }

    /// Nothing, or little enough, is dirty, or the guest is too fast to wait for that.
    fn is_close(&self, rounds: u32) -> bool {
        let dirty = self.dirty.count();
        dirty == 0 || (rounds >= 2 && dirty <= LITTLE) || rounds >= ROUNDS
    }
}

impl Work for Mirror {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let [_, src, dst] = self.handles()?;
        let (len, there) = (src.len(), dst.len());
        if len != there && !(self.plan.commit && there > len) {
            return Err(Stop::Failed(Error::new("Source and target image have different sizes")));
        }
        self.begin_dirty(cx)?;
        cx.remaining(self.dirty.count());
        let (mut rounds, mut ready) = (0, false);
        loop {
            cx.pause_point()?;
            let failed = self.both.take_error();
            let synced = self.plan.active && failed.is_none() && self.dirty.count() == 0;
            self.synced.store(synced, Ordering::SeqCst);
            if let Some(e) = failed {
                self.failed(cx, Failed::Target(e))?;
                continue;
            }
            if !ready && self.is_close(rounds) {
                if let Err(e) = dst.flush() {
                    self.failed(cx, Failed::Target(e))?;
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
            let complete = cx.completing();
            if ready && (complete || cx.stopping()) {
                self.both.set_mode(Mode::Closing);
                if self.dirty.count() == 0 {
                    if !self.last_step(cx)? {
                        continue;
                    }
                    self.switch = complete;
                    if !complete {
                        // The target is the disk as it is now.
                        self.both.set_mode(Mode::Background);
                    }
                    return Ok(());
                }
            }
            // What the job's thread has to look after before all is gone over.
            let called = || {
                let ends = ready && !self.both.is(Mode::Closing) && (cx.completing() || cx.stopping());
                ends || self.both.has_failed() || !ready && self.is_close(rounds)
            };
            let Some(crew) = &self.crew else { return Ok(()) };
            let step = || {
                if called() {
                    return Ok(None);
                }
                // Guests write to the target, too, which is time that the job takes from them.
                if self.both.is(Mode::Blocking) {
                    crew.was_helped();
                }
                self.step(cx, cx.piece(PIECE))
            };
            if let Some(e) = crew.work(cx, step)?.into_iter().next() {
                self.failed(cx, e)?;
            } else if called() {
                continue;
            } else if std::mem::take(&mut *self.cursor()) > 0 {
                rounds = (rounds + 1).min(ROUNDS);
            } else {
                cx.remaining(self.dirty.count());
                cx.at_rest();
                cx.sleep(Duration::from_millis(100))?;
            }
        }
    }

    fn prepare(&mut self, graph: &mut Graph) -> Result<()> {
        let (Ok([above, src, dst]), true) = (self.handles(), self.switch) else { return Ok(()) };
        let Some(filter) = self.filter.clone() else { return Ok(()) };
        let Plan { source, target, replaces, .. } = &self.plan;
        let from = replaces.as_ref().unwrap_or(&filter).clone();
        let (source, target) = (source.clone(), target.clone());
        let quiesced = graph.quiesce(&[&source, &from, &target], &[&above, &src, &dst]);
        let wrong = |e: io::Error| Error::new(strerror(&e));
        // Nothing, unless the job had to wait, and a write of the guest failed on the target meanwhile.
        if self.bug.is(Mutant::NoDrain) {
            self.dirty.clear_all();
        }
        if self.dirty.count() > LITTLE {
            let e = self.both.take_error();
            return Err(wrong(e.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EIO))));
        }
        while let Some(next) = self.dirty.next_dirty(0, self.dirty.len(), PIECE) {
            let done = self.take_and_copy(&self.whole(&next));
            done.map_err(|(Failed::Source(e) | Failed::Target(e))| wrong(e))?;
        }
        self.flush(&dst).map_err(wrong)?;
        // The target's new users do with it what they like; it stays open till they have it.
        graph.detach(&src);
        self.src = None;
        self.both.set_mode(Mode::Background);
        if let Some(above) = self.above.take() {
            graph.detach(&above);
        }
        graph.set_perm(&dst, Perm::NONE, Perm::ALL)?;
        let longer = target.len() != from.len();
        let backing = self.plan.backing.clone().zip(target.backing_edge());
        // Now the job's own handle as well, which is done.
        let all = graph.quiesce(&[&source, &from, &target], &[]);
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
        self.both.set_mode(Mode::Background);
        if let Some(above) = self.above.take() {
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

    fn filter(&self) -> Option<&Arc<Node>> {
        self.filter.as_ref()
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
    /// How guests' writes get to the target at first.
    fn mode(&self) -> Mode {
        if self.active { Mode::Blocking } else { Mode::Background }
    }

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

#[cfg(test)]
#[path = "mirror_test.rs"]
pub(in crate::jobs) mod tests;
