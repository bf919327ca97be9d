//! `blockdev-create`: making an image, which may take long when its space is made, too.
//!
//! Owns: the order of it. Never: names or formats of others. Threads: as [`Work`]
//! says. Locks: none.

use super::job::{JobCtx, Stop, Work};
use crate::block::driver::Flags;
use crate::block::graph::Graph;
use crate::block::handle::Handle;
use crate::block::node::Node;
use crate::error::Error;
use crate::qcow2::create::{self, CreateOptions, Preallocation};
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::Iov;
use std::io;
use std::sync::Arc;

/// What is to be made, in nodes that are open for it and that the job has handles on.
pub enum New {
    /// A file of zeroes.
    File {
        /// The file; what is in it is lost.
        file: Arc<Handle>,
        /// Its length in bytes.
        size: u64,
        /// Whether its space is made, too. `Metadata` is not known here.
        preallocation: Preallocation,
    },
    /// An image of the format `qcow2`.
    Qcow2 {
        /// What is in it is lost.
        file: Arc<Handle>,
        /// The external data file, if the options name one.
        data_file: Option<Arc<Handle>>,
        /// What it is to be like.
        options: Box<CreateOptions>,
    },
}

impl New {
    /// Makes it. Blocks.
    pub fn make(&self) -> io::Result<()> {
        match self {
            New::File { file, size, preallocation } => {
                file.inside(|node| make_file(node, *size, *preallocation))
            }
            New::Qcow2 { file, data_file, options } => {
                // Its own ticket would be the second; the handle is this job's, and stays as it is.
                let data = data_file.as_ref().and_then(|h| h.node());
                file.inside(|node| create::create(node, data.as_ref(), options))
            }
        }
    }

    /// Lets go of the nodes: those that were opened for this are closed.
    pub fn close(self, graph: &mut Graph) {
        match self {
            New::File { file, .. } => graph.detach(&file),
            New::Qcow2 { file, data_file, .. } => {
                graph.detach(&file);
                if let Some(data) = data_file {
                    graph.detach(&data);
                }
            }
        }
    }
}

fn make_file(node: &Arc<Node>, size: u64, preallocation: Preallocation) -> io::Result<()> {
    node.resize(0)?;
    node.resize(size)?;
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => {
            if size > 0 {
                node.zero(0, size, Flags::NO_FALLBACK)?;
            }
        }
        Preallocation::Full => {
            let zeroes = AlignedBuf::new(1 << 20, 4096);
            let mut at = 0;
            while at < size {
                let n = (size - at).min(zeroes.len() as u64);
                node.write(at, &Iov::from_slice(&zeroes[..n as usize]), Flags::NONE)?;
                at += n;
            }
            node.flush()?;
        }
    }
    Ok(())
}

/// The job.
pub struct Create {
    /// What is to be made; or why it cannot be, which the job tells when it runs.
    new: Result<New, Error>,
}

impl Create {
    /// See [`Create::new`]'s type.
    pub fn new(new: Result<New, Error>) -> Create {
        Create { new }
    }
}

impl Work for Create {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        cx.progress(0, 1);
        let done = match &self.new {
            Ok(new) => new.make().map_err(Stop::from),
            Err(e) => Err(Stop::Failed(e.clone())),
        };
        cx.progress(1, 1);
        done
    }

    fn clean(&mut self, graph: &mut Graph) {
        let gone = Err(Error::new(""));
        if let Ok(new) = std::mem::replace(&mut self.new, gone) {
            new.close(graph);
        }
    }
}
