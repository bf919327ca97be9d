//! `block-commit` of images below the active one: writes what lies in them down into one below, and
//! takes them out of the chain.
//!
//! Nobody writes to these images; the guest, above them, reads through them, and never sees the places
//! of the base that the job writes to, for what it writes there lies above. So the copy needs no lock.
//!
//! Owns: the walk. Never: names of files (it is told them). Threads: as [`Work`] says. Locks: none.

use super::crew::{Crew, PIECE, Step, Todo};
use super::filter::{self, Asks};
use super::job::{After, JobCtx, Stop, Work, attach};
use super::layers::{Found, find};
use crate::block::driver::{Flags, Perm};
use crate::block::graph::{Graph, Parent};
use crate::block::handle::{Handle, OnError};
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use crate::sys::buf::CopyBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// What is to be done.
pub struct Plan {
    /// The images that are written down, uppermost first; at least one.
    pub from: Vec<Arc<Node>>,
    /// Where to.
    pub base: Arc<Node>,
    /// What the image above records as its backing file, instead of the base's name.
    pub backing_file: Option<String>,
    /// What to do when a request fails.
    pub on_error: OnError,
    /// The filter's name.
    pub filter: Option<String>,
    /// How a node's file is named in an image's header.
    pub name_of: fn(&Node) -> String,
}

/// The job.
pub struct Commit {
    plan: Plan,
    filter: Option<Arc<Node>>,
    src: Option<Arc<Handle>>,
    dst: Option<Arc<Handle>>,
    crew: Option<Crew>,
    /// The base was read-only before.
    turn_back: bool,
}

impl Commit {
    /// Puts the filter in, makes the base writable and long enough, and attaches to both sides.
    pub fn new(graph: &mut Graph, plan: Plan) -> Result<Commit> {
        let turn_back = plan.base.read_only();
        let mut commit = Commit { plan, filter: None, src: None, dst: None, crew: None, turn_back };
        match commit.begin(graph) {
            Ok(()) => Ok(commit),
            Err(e) => {
                commit.clean(graph);
                Err(e)
            }
        }
    }

    fn begin(&mut self, graph: &mut Graph) -> Result<()> {
        let Plan { from, base, filter, .. } = &self.plan;
        let Some(top) = from.first() else { return Err(Error::new("there is nothing to commit")) };
        graph.set_read_only(base, false)?;
        let filter = filter::insert(graph, "commit_top", filter.as_deref(), top, Asks::Lenient)?;
        self.crew = Some(Crew::new(graph, &filter));
        self.filter = Some(filter);
        self.src = Some(attach(graph, top, Perm::NONE, Perm::ALL)?);
        if base.len() < top.len() {
            graph.resize(base, top.len())?;
        }
        let uses = Perm::CONSISTENT_READ | Perm::WRITE;
        let shares = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        self.dst = Some(attach(graph, base, uses, shares)?);
        Ok(())
    }

    /// Does the next piece; what failed, and whether it was the reading.
    fn step(
        &self,
        cx: &JobCtx,
        src: &Handle,
        dst: &Handle,
        todo: &Todo,
    ) -> Step<(Range<u64>, (io::Error, bool))> {
        let look = |off, len| {
            let (found, n) = src.inside(|_| find(&self.plan.from, off, len))?;
            let most = match found {
                Found::Nothing => n,
                Found::Zero => 1 << 30,
                Found::Data => cx.piece(PIECE),
            };
            Ok((found, n.min(most)))
        };
        let Some((range, found)) = todo.take(look) else { return Ok(None) };
        let copied = found.map_err(|e| (e, true)).and_then(|found| self.copy(src, dst, found, &range));
        let work = copied.map_err(|failed| (range.clone(), failed))?;
        cx.advance(range.end - range.start);
        // Nobody waits after the last piece.
        Ok(Some(work).filter(|_| !todo.is_empty()))
    }

    /// Writes down what was found; answers how much work that was.
    fn copy(
        &self,
        src: &Handle,
        dst: &Handle,
        found: Found,
        range: &Range<u64>,
    ) -> Result<u64, (io::Error, bool)> {
        let (off, n) = (range.start, range.end - range.start);
        match found {
            Found::Nothing => Ok(0),
            Found::Zero => {
                let there = dst.contents(off, n).map_err(|e| (e, false))?;
                if !(there.zero && there.len >= n) {
                    dst.zero(off, n, Flags::MAY_UNMAP).map_err(|e| (e, false))?;
                }
                Ok(0)
            }
            Found::Data => {
                let mut buf = CopyBuf::new(n as usize);
                src.read(off, &mut IovMut::from_slice(&mut buf)).map_err(|e| (e, true))?;
                dst.write(off, &Iov::from_slice(&buf), Flags::NONE).map_err(|e| (e, false))?;
                Ok(n)
            }
        }
    }

    /// What was beyond the end of the committed images reads as zeroes for the images above, and must
    /// go on doing so when the base takes their place.
    fn tail(&self, src: &Handle, dst: &Handle, above: u64) -> io::Result<()> {
        if Bug::here().is(Mutant::NoTail) {
            return Ok(());
        }
        let (from, end) = (src.len(), dst.len().min(above));
        if from < end { dst.zero(from, end - from, Flags::MAY_UNMAP) } else { Ok(()) }
    }

    /// The longest image right above the committed ones.
    fn above(&self, graph: &Graph) -> Vec<Arc<Node>> {
        let Some(filter) = &self.filter else { return Vec::new() };
        let parents = graph.parents(filter).into_iter();
        let images = parents.filter_map(|p| match p {
            Parent::Node(node, edge) if edge.role == "backing" => Some(node),
            _ => None,
        });
        images.collect()
    }

    /// Records the base as the backing file of the images above.
    fn rename(&self, graph: &mut Graph) -> Result<()> {
        let base = &self.plan.base;
        let name = self.plan.backing_file.clone().unwrap_or_else(|| (self.plan.name_of)(base));
        for image in self.above(graph) {
            let read_only = image.read_only();
            graph.set_read_only(&image, false)?;
            let done = image.driver.set_backing(Some((&name, base.driver.name())));
            if let Err(e) = graph.set_read_only(&image, read_only) {
                log::warn!("node '{}' stays writable: {e}", image.name);
            }
            done.map_err(|e| {
                let (image, why) = (&image.name, strerror(&e));
                Error::new(format!("Could not change the backing file of '{image}': {why}"))
            })?;
        }
        Ok(())
    }
}

impl Work for Commit {
    fn total(&self) -> Option<u64> {
        self.src.as_ref().map(|h| h.len())
    }

    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let (Some(src), Some(dst)) = (self.src.clone(), self.dst.clone()) else { return Ok(()) };
        let Some(crew) = &self.crew else { return Ok(()) };
        let step = |todo: &Todo| self.step(cx, &src, &dst, todo);
        crew.work_off(cx, src.len(), step, |_, (e, read)| {
            // Ignored or not, what could not be written must be.
            cx.on_error(self.plan.on_error, &e, read).map(|_| After::Again)
        })?;
        // Here rather than on the control thread, for it may take long.
        Ok(dst.flush()?)
    }

    fn prepare(&mut self, graph: &mut Graph) -> Result<()> {
        let (Some(src), Some(dst), Some(filter)) = (&self.src, &self.dst, &self.filter) else {
            return Ok(());
        };
        let longest = self.above(graph).iter().map(|n| n.len()).max().unwrap_or(0);
        self.tail(src, dst, longest)?;
        dst.flush()?;
        self.rename(graph)?;
        // The base's new users do not share what the job did; it stays open till they have it.
        graph.set_perm(dst, Perm::NONE, Perm::ALL)?;
        let quiesced = graph.quiesce(&[filter, &self.plan.base], &[]);
        graph.edit(&quiesced, |edit| edit.replace(filter, &self.plan.base, None))
    }

    fn filter(&self) -> Option<&Arc<Node>> {
        self.filter.as_ref()
    }

    fn lingers(&self, failed: bool) -> bool {
        !failed
    }

    fn clean(&mut self, graph: &mut Graph) {
        for handle in [self.src.take(), self.dst.take()].into_iter().flatten() {
            graph.detach(&handle);
        }
        if let Some(filter) = self.filter.take()
            && graph.find(&filter.name).is_some_and(|n| Arc::ptr_eq(n, &filter))
            && let Err(e) = graph.remove_filter(&filter)
        {
            log::error!("the filter '{}' stays: {e}", filter.name);
        }
        if self.turn_back
            && let Err(e) = graph.set_read_only(&self.plan.base, true)
        {
            log::warn!("node '{}' stays writable: {e}", self.plan.base.name);
        }
        self.plan.from.clear();
        graph.collect();
    }
}
