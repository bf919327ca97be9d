//! `block-stream`: pulls what lies in backing files up into an image, which then does without them.
//!
//! The image brings the data up itself ([`Node::populate`]), so that a guest that writes meanwhile is
//! neither held up by more than the cluster it writes to, nor overwritten. At the end the image's
//! header names the new backing file, or none, and then the graph follows.
//!
//! Owns: the walk. Never: names of files (it is told them). Threads: as [`Work`] says. Locks: none.

use super::job::{After, JobCtx, Stop, Work, attach};
use super::layers::{Found, below, find};
use crate::block::driver::{ExtentKind, Perm};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, OnError};
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use std::io;
use std::sync::Arc;

/// The most that is brought up in one piece, in bytes.
const PIECE: u64 = 1 << 20;

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
    /// The filter, if the user wants one.
    pub filter: Option<Arc<Node>>,
    /// How a node's file is named in an image's header.
    pub name_of: fn(&Node) -> String,
}

/// The job.
pub struct Stream {
    plan: Plan,
    handle: Option<Arc<Handle>>,
    /// The image was read-only before.
    turn_back: bool,
    bug: Bug,
}

impl Stream {
    /// Makes `top` writable, and attaches to it.
    pub fn new(graph: &mut Graph, plan: Plan) -> Result<Stream> {
        let turn_back = plan.top.read_only();
        let top = plan.top.clone();
        let mut stream = Stream { plan, handle: None, turn_back, bug: Bug::here() };
        let uses = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let attached = graph.set_read_only(&top, false);
        match attached.and_then(|()| attach(graph, &top, uses, uses | Perm::WRITE)) {
            Ok(handle) => {
                stream.handle = Some(handle);
                Ok(stream)
            }
            Err(e) => {
                stream.clean(graph);
                Err(e)
            }
        }
    }

    /// Does the piece at `off`; answers how long it was, and how much of it was work.
    fn piece(&self, handle: &Handle, off: u64, len: u64, most: u64) -> io::Result<(u64, u64)> {
        handle.inside(|top| {
            let extent = top.status(off, len)?;
            if extent.kind != ExtentKind::Unallocated {
                return Ok((extent.len, 0));
            }
            let (found, n) = find(&self.plan.from, off, extent.len)?;
            let based = self.plan.from.last().is_some_and(|last| below(last).is_some());
            match found {
                Found::Data => {
                    let n = n.min(most);
                    top.populate(off, n, false)?;
                    Ok((n, n))
                }
                Found::Zero if based && !self.bug.is(Mutant::NoZeroes) => {
                    // They hide what the new backing file has there.
                    let n = n.min(1 << 30);
                    top.populate(off, n, true)?;
                    Ok((n, 0))
                }
                Found::Zero | Found::Nothing => Ok((n, 0)),
            }
        })
    }
}

impl Work for Stream {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let (Some(handle), false) = (&self.handle, self.plan.from.is_empty()) else { return Ok(()) };
        let len = handle.len();
        cx.progress(0, len);
        let mut off = 0;
        let mut ignored = None;
        while off < len {
            cx.pause_point()?;
            match self.piece(handle, off, len - off, cx.piece(PIECE)) {
                Ok((n, work)) => {
                    off += n;
                    cx.progress(off, len);
                    if work > 0 {
                        cx.throttle(work)?;
                    }
                }
                Err(e) => match cx.on_error(self.plan.on_error, &e, true)? {
                    After::Again => {}
                    After::Ignored => {
                        off += cx.piece(PIECE).min(len - off);
                        ignored.get_or_insert(e);
                    }
                },
            }
        }
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

    fn clean(&mut self, graph: &mut Graph) {
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
