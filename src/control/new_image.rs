//! Images that commands make or open as a file name and a format say: the target of a mirror or a
//! backup, a snapshot's overlay.
//!
//! Owns: what is made where, and QEMU's texts. Never: what is written into it. Threads: control.
//! Locks: none.

use super::drive_options::named;
use super::formats::{self, BlockdevOptions, Formats};
use crate::bail;
use crate::block::driver::Perm;
use crate::block::filename::absolute;
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::node::{Node, NodeOptions};
use crate::block::open;
use crate::error::{Error, Result, strerror};
use crate::jobs::create::{Attributes, New};
use crate::qapi::{Path, Wire};
use crate::qcow2::create::{CreateOptions, Preallocation};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

/// The backing file that a new image is to have.
#[derive(Clone, Debug)]
pub struct NewBacking {
    /// The name to record; a relative path is made absolute.
    pub name: String,
    /// The format to record.
    pub format: String,
}

/// Makes the file at `path`, if there is none, for a node that is to be opened on it. What is in it
/// stays. `None`: a descriptor that was passed.
pub fn touch(path: &str) -> std::io::Result<Option<File>> {
    if path.starts_with("/dev/fdset/") {
        return Ok(None);
    }
    let mut how = std::fs::OpenOptions::new();
    // A file that is there loses its contents only below, with a lock on it.
    how.read(true).write(true).create(true).truncate(false).mode(0o644).open(path).map(Some)
}

/// Makes an image of `format` and `size` bytes in the file that `name` (a path, `json:{…}`) means.
/// `node` is how it says that the file itself is at fault; texts are QEMU's.
///
/// The file of a node of `known` is left alone, even one without locks.
///
/// # Errors
/// `Unknown file format`, `Backing file not supported`, `Could not create 'PATH': …`.
pub fn make(
    (known, env): (&Graph, &Formats),
    name: &str,
    format: &str,
    size: u64,
    backing: Option<NewBacking>,
) -> Result<()> {
    let mut file = named(name)?;
    if !["qcow2", "raw"].contains(&format) {
        bail!("Unknown file format '{format}'");
    }
    if backing.is_some() && format != "qcow2" {
        bail!("Backing file not supported for file format '{format}'");
    }
    let path = file["filename"].as_str().unwrap_or(name).to_string();
    let says = |e: &std::io::Error| Error::new(format!("Could not create '{path}': {}", strerror(e)));
    let user_of = |id: (u64, u64)| known.nodes().find(|n| n.driver.file_id() == Some(id));
    let mut touched = None;
    if file["driver"] == "file" {
        let there = std::fs::metadata(&path).ok().map(|m| (m.dev(), m.ino()));
        let same = |b: &NewBacking| {
            let other = std::fs::metadata(&b.name).ok().map(|m| (m.dev(), m.ino()));
            there.is_some() && there == other
        };
        if backing.as_ref().is_some_and(same) {
            bail!("Error: Trying to create an image with the same filename as the backing file");
        }
        touched = touch(&path).map_err(|e| says(&e))?;
    }
    file["node-name"] = "new".into();
    let mut graph = Graph::new();
    let spec = formats::plan(BlockdevOptions::take(file, &Path::Root)?)?;
    let below = open::add(&mut graph, env, spec)?;
    let whole = HandleSpec { uses: Perm::WRITE | Perm::RESIZE, shares: Perm::NONE, ..Default::default() };
    let user = graph.attach(Some(below.clone()), whole)?;
    if let Some(node) = below.driver.file_id().and_then(user_of) {
        graph.close_all();
        bail!("Could not create '{path}': it is the file of node '{}'", node.name);
    }
    // A file first, then what is in it, as QEMU does: what a file is like is said while it is empty.
    let attributes = touched.map(Attributes::new);
    let blank = |size| New::File { file: user.clone(), size, preallocation: Preallocation::Off, attributes };
    let (bare, image) = match format {
        "raw" => (blank(size), None),
        _ => {
            let backing = backing.map(|b| NewBacking { name: absolute(&b.name), ..b });
            let (backing_file, backing_format) = backing.map(|b| (b.name, b.format)).unzip();
            let size = size.next_multiple_of(512);
            let options = CreateOptions { size, backing_file, backing_format, ..CreateOptions::default() };
            let image = New::Qcow2 { file: user.clone(), data_file: None, options: Box::new(options) };
            (blank(0), Some(image))
        }
    };
    let made = bare.make().and_then(|()| image.map_or(Ok(()), |i| i.make()));
    graph.detach(&user);
    drop(below);
    graph.close_all();
    made.map_err(|e| says(&e))
}

/// The options of a node on the image `name` of `format`, with the caches of `like`. `backing`: what
/// becomes of the backing file, for formats that have one (absent: what the image says; null: none).
pub fn options(
    name: &str,
    format: &str,
    node_name: Option<&str>,
    like: &NodeOptions,
    backing: Option<Value>,
) -> Result<Value> {
    if !formats::exists(format) {
        bail!("Unknown driver '{format}'");
    }
    let mut node = json!({
        "driver": format,
        "file": named(name)?,
        "cache": { "direct": like.direct, "no-flush": like.no_flush, "writeback": like.writeback },
        "discard": if like.unmap { "unmap" } else { "ignore" },
    });
    if let Some(backing) = backing
        && format == "qcow2"
    {
        node["backing"] = backing;
    }
    if let Some(name) = node_name {
        node["node-name"] = name.into();
    }
    Ok(node)
}

/// Opens it: the node is the user's ([`Graph::disown`] when it has another one).
pub fn open(graph: &mut Graph, env: &Formats, options: Value) -> Result<Arc<Node>> {
    let spec = formats::plan(BlockdevOptions::take(options, &Path::Root)?)?;
    open::add(graph, env, spec)
}
