//! `block-stream`: pulls what lies in backing files up into an image, which then does without them.
//!
//! The image brings the data up itself ([`Node::populate`]), so that a guest that writes meanwhile is
//! neither held up by more than the cluster it writes to, nor overwritten. At the end the image's
//! header names the new backing file, or none, and then the graph follows.
//!
//! Owns: the walk. Never: names of files (it is told them). Threads: as [`Work`] says. Locks: none.

use super::crew::{Crew, PIECE, Step, Todo};
use super::job::{After, JobCtx, Stop, Work, attach};
use super::layers::{Found, below, find};
use crate::block::driver::{ExtentKind, Perm};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec, OnError};
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// What is to be done.
pub struct Plan {
    /// Where it goes; no filter.
    pub top: Arc<Node>,
    /// The images that data come from, uppermost first; none: there is nothing to do.
    pub from: Vec<Arc<Node>>,
    /// What to record as the backing file, instead of the name of the node that will be it.
    pub backing_file: Option<String>,
    /// What to do when a request fails.
    pub on_error: OnError,
    /// The filter above it, by which it is seen that a job is at work there.
    pub filter: Option<Arc<Node>>,
    /// The job's name, for messages.
    pub id: String,
    /// How a node's file is named in an image's header.
    pub name_of: fn(&Node) -> String,
}

/// What is done with a piece.
enum Do {
    Nothing,
    /// Its data are brought up.
    BringUp,
    /// It is made zeroes in the image itself.
    Hide,
}

/// The job.
pub struct Stream {
    plan: Plan,
    handle: Option<Arc<Handle>>,
    /// On the filter, which nobody else may be above.
    above: Option<Arc<Handle>>,
    /// On the images that data come from: nobody may write to them.
    held: Vec<Arc<Handle>>,
    crew: Crew,
    /// The image was read-only before.
    turn_back: bool,
    bug: Bug,
}

impl Stream {
    /// Makes `top` writable, and attaches to it.
    pub fn new(graph: &mut Graph, plan: Plan) -> Result<Stream> {
        let turn_back = plan.top.read_only();
        let top = plan.top.clone();
        let crew = Crew::new(graph, &top);
        let (held, bug) = (Vec::new(), Bug::here());
        let mut stream = Stream { plan, handle: None, above: None, held, crew, turn_back, bug };
        match stream.begin(graph) {
            Ok(()) => Ok(stream),
            Err(e) => {
                stream.clean(graph);
                stream.dismiss(graph);
                Err(e)
            }
        }
    }

    fn begin(&mut self, graph: &mut Graph) -> Result<()> {
        let Plan { top, from, id, filter, .. } = &self.plan;
        if let Some(filter) = filter {
            self.above = Some(attach(graph, filter, Perm::NONE, Perm::ALL)?);
        }
        graph.set_read_only(top, false)?;
        let uses = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let spec = |role, uses, shares| {
            let job = Some((role, format!("stream job '{id}'")));
            HandleSpec { uses, shares, job, ..HandleSpec::default() }
        };
        let of_top = spec("active node", uses, uses | Perm::WRITE);
        self.handle = Some(graph.attach(Some(top.clone()), of_top)?);
        for image in from {
            let of_image = spec("intermediate node", Perm::CONSISTENT_READ, uses);
            self.held.push(graph.attach(Some(image.clone()), of_image)?);
        }
        Ok(())
    }

    /// What there is to do at `off`, and for how many of `len` bytes; no more than `most` are worked on.
    fn look(&self, top: &Node, off: u64, len: u64, most: u64) -> io::Result<(Do, u64)> {
        let extent = top.status(off, len)?;
        if extent.kind != ExtentKind::Unallocated {
            return Ok((Do::Nothing, extent.len));
        }
        let (found, n) = find(&self.plan.from, off, extent.len)?;
        let based = self.plan.from.last().is_some_and(|last| below(last).is_some());
        Ok(match found {
            Found::Data => (Do::BringUp, n.min(most)),
            // They hide what the new backing file has there.
            Found::Zero if based && !self.bug.is(Mutant::NoZeroes) => (Do::Hide, n.min(1 << 30)),
            Found::Zero | Found::Nothing => (Do::Nothing, n),
        })
    }

    /// Does the next piece.
    fn step(&self, cx: &JobCtx, handle: &Handle, todo: &Todo) -> Step<(Range<u64>, io::Error)> {
        let look = |off, len| handle.inside(|top| self.look(top, off, len, cx.piece(PIECE)));
        let Some((range, found)) = todo.take(look) else { return Ok(None) };
        let len = range.end - range.start;
        let done = found.and_then(|what| {
            match what {
                Do::Nothing => return Ok(0),
                Do::BringUp => handle.inside(|top| top.populate(range.start, len, false))?,
                Do::Hide => {
                    handle.inside(|top| top.populate(range.start, len, true))?;
                    return Ok(0);
                }
            }
            Ok(len)
        });
        let work = done.map_err(|e| (range, e))?;
        cx.advance(len);
        // Nobody waits after the last piece.
        Ok(Some(work).filter(|_| !todo.is_empty()))
    }
}

impl Work for Stream {
    fn total(&self) -> Option<u64> {
        self.handle.as_ref().filter(|_| !self.plan.from.is_empty()).map(|h| h.len())
    }

    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let (Some(handle), false) = (&self.handle, self.plan.from.is_empty()) else { return Ok(()) };
        let mut ignored = None;
        let step = |todo: &Todo| self.step(cx, handle, todo);
        self.crew.work_off(cx, handle.len(), step, |range, e| {
            let after = cx.on_error(self.plan.on_error, &e, true)?;
            if after == After::Ignored {
                cx.advance(range.end - range.start);
                ignored.get_or_insert(e);
            }
            Ok(after)
        })?;
        if let Some(e) = ignored {
            // What is missing must go on showing through.
            return Err(e.into());
        }
        // Here rather than on the control thread, for it may take long.
        Ok(handle.flush()?)
    }

    fn prepare(&mut self, graph: &mut Graph) -> Result<()> {
        let Some(last) = self.plan.from.last() else { return Ok(()) };
        let top = &self.plan.top;
        let Some(edge) = top.backing_edge() else { return Ok(()) };
        let base = last.backing();
        let named = base.clone().map(Node::skip_filters).map(|b| {
            let name = self.plan.backing_file.clone().unwrap_or_else(|| (self.plan.name_of)(&b));
            (name, b.driver.name())
        });
        let wrong = |e: io::Error| {
            Error::new(format!("Could not change the backing file of '{}': {}", top.name, strerror(&e)))
        };
        // Before the header says that the data are here, they are.
        top.flush().map_err(wrong)?;
        top.driver.set_backing(named.as_ref().map(|(n, f)| (n.as_str(), *f))).map_err(wrong)?;
        let quiesced = graph.quiesce(&[top], &[]);
        graph.edit(&quiesced, |edit| edit.set(&edge, base))
    }

    fn filter(&self) -> Option<&Arc<Node>> {
        self.plan.filter.as_ref()
    }

    fn lingers(&self, _: bool) -> bool {
        true
    }

    fn dismiss(&mut self, graph: &mut Graph) {
        self.held.drain(..).for_each(|handle| graph.detach(&handle));
    }

    fn clean(&mut self, graph: &mut Graph) {
        if let Some(above) = self.above.take() {
            graph.detach(&above);
        }
        if let Some(filter) = self.plan.filter.take()
            && let Err(e) = graph.remove_filter(&filter)
        {
            log::error!("the filter '{}' stays: {e}", filter.name);
        }
        if let Some(handle) = self.handle.take() {
            graph.detach(&handle);
        }
        if self.turn_back
            && let Err(e) = graph.set_read_only(&self.plan.top, true)
        {
            log::warn!("node '{}' stays writable: {e}", self.plan.top.name);
        }
        self.plan.from.clear();
        graph.collect();
    }
}
