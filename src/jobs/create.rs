//! `blockdev-create`: making an image, which may take long when its space is made, too.
//!
//! Owns: the order of it. Never: names or formats of others. Threads: as [`Work`]
//! says. Locks: none.

use super::job::{JobCtx, Stop, Work};
use crate::block::graph::Graph;
use crate::block::handle::Handle;
use crate::block::node::Node;
use crate::error::{Error, strerror};
use crate::qcow2::create::{self, CreateOptions, Preallocation};
use crate::sys::file_attr;
use std::fs;
use std::io;
use std::sync::Arc;

/// Bytes that a new file's space is allocated in at once, where the file system can (XFS): less makes
/// too many pieces of it in the long run.
const EXTENT_SIZE_HINT: u32 = 1 << 20;

/// What a new file is to be like, where its file system can.
pub struct Attributes {
    /// The file itself.
    pub file: fs::File,
    /// No copy-on-write (btrfs).
    pub nocow: bool,
    /// The extent size hint in bytes (XFS), if one was asked for; 0: none.
    pub extent_size_hint: Option<u32>,
}

impl Attributes {
    /// What is not said otherwise.
    pub fn new(file: fs::File) -> Attributes {
        Attributes { file, nocow: false, extent_size_hint: None }
    }

    /// Tries it; the file is empty.
    fn set(&self) {
        if self.nocow
            && let Err(e) = file_attr::set_nocow(&self.file)
        {
            log::debug!("nocow: {e}");
        }
        let hint = self.extent_size_hint.unwrap_or(EXTENT_SIZE_HINT);
        match file_attr::set_extent_size_hint(&self.file, hint) {
            Err(e) if self.extent_size_hint.is_some_and(|n| n > 0) => {
                log::warn!("Failed to set extent size hint: {}", strerror(&e));
            }
            _ => {}
        }
    }
}

/// What is to be made, in nodes that are open for it and that the job has handles on.
pub enum New {
    /// A file of zeroes.
    File {
        /// The file; what is in it is lost.
        file: Arc<Handle>,
        /// Its length in bytes.
        size: u64,
        /// Whether its space is made, too. `Metadata` is refused.
        preallocation: Preallocation,
        /// What it is to be like; not of a descriptor that was passed, which is its giver's.
        attributes: Option<Attributes>,
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
            New::File { file, size, preallocation, attributes } => {
                file.inside(|node| make_file(node, *size, *preallocation, attributes.as_ref()))
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

fn make_file(
    node: &Arc<Node>,
    size: u64,
    preallocation: Preallocation,
    attributes: Option<&Attributes>,
) -> io::Result<()> {
    let cannot = |e: io::Error| io::Error::new(e.kind(), format!("Could not resize file: {}", strerror(&e)));
    node.resize(0).map_err(cannot)?;
    if let Some(a) = attributes {
        a.set();
    }
    match preallocation {
        Preallocation::Off => node.resize(size).map_err(cannot),
        how => node.resize_with(size, how),
    }
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
