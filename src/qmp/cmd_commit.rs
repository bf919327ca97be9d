//! `block-commit`.
//!
//! Owns: the command's form, and QEMU's texts. Never: how data move (`jobs/commit.rs`, `jobs/mirror.rs`).
//! Threads: control. Locks: none.

use super::cmd_blockdev::find_node;
use super::cmd_query_block::file_name;
use super::job_options::{self, BlockdevOnError, JobOptions};
use super::job_options::{by_node_name, find_backing, in_chain, need_backing};
use super::schema::Cx;
use crate::block::node::Node;
use crate::error::{Class, Error, Result};
use crate::jobs::table::Kind;
use crate::jobs::{commit, layers, mirror};
use crate::qapi::Flat;
use crate::{bail, commands, wire_struct};
use std::sync::Arc;

commands! {
    /// Writing images down.
    pub static COMMIT;

    /// Writes what lies in images of a disk down into one below them, which then takes their place; a
    /// job. That of the uppermost image becomes ready and is to be completed.
    "block-commit" => block_commit(BlockCommit) -> ();
}

wire_struct! {
    /// Arguments of `block-commit`.
    pub struct BlockCommit {
        /// The disk, and the job.
        common: Flat<JobOptions>,
        /// The node that data are written to (default: the lowest).
        "base-node" base_node: Option<String>,
        /// Its file.
        base: Option<String>,
        /// The node of the uppermost image that is written down (default: the disk's).
        "top-node" top_node: Option<String>,
        /// Its file.
        top: Option<String>,
        /// The name that the image above is to record, if not the base's.
        "backing-file" backing_file: Option<String>,
        /// Record the format `raw` for a bare protocol, as is always done here.
        "backing-mask-protocol" mask_protocol: Option<bool>,
        /// What to do when a request fails (default: report).
        "on-error" on_error: Option<BlockdevOnError>,
        /// Name of the filter node.
        "filter-node-name" filter: Option<String>,
    }
}

/// The disk's node. An unknown disk is of a class by which clients tell old servers.
fn root_of(cx: &Cx, device: &str) -> Result<Arc<Node>> {
    let lost = |_| Error::of(Class::DeviceNotFound, format!("Device '{device}' not found"));
    let node = match cx.vm.drives.find(device) {
        Some(_) => find_node(cx, Some(device), None)?,
        None => find_node(cx, None, Some(device)).map_err(lost)?,
    };
    if !cx.vm.is_root(&node) {
        bail!("Need a root block node");
    }
    Ok(node)
}

fn top_of(cx: &Cx, root: &Arc<Node>, args: &BlockCommit) -> Result<Arc<Node>> {
    match (&args.top_node, &args.top) {
        (Some(_), Some(_)) => bail!("'top-node' and 'top' are mutually exclusive"),
        (Some(name), None) => {
            let node = by_node_name(cx, name)?;
            if !in_chain(root, &node) {
                bail!("'{name}' is not in this backing file chain");
            }
            Ok(node)
        }
        (None, Some(file)) if file_name(root) == *file => Ok(root.clone()),
        (None, Some(file)) => match find_backing(root, file) {
            Some(node) => Ok(node),
            None => bail!("Top image file {file} not found"),
        },
        (None, None) => Ok(root.clone()),
    }
}

fn base_of(cx: &Cx, top: &Arc<Node>, args: &BlockCommit) -> Result<Arc<Node>> {
    match (&args.base_node, &args.base) {
        (Some(_), Some(_)) => bail!("'base-node' and 'base' are mutually exclusive"),
        (Some(name), None) => {
            let node = by_node_name(cx, name)?;
            if !in_chain(top, &node) {
                bail!("'{name}' is not in this backing file chain");
            }
            Ok(node.skip_filters())
        }
        (None, Some(file)) => need_backing(top, file),
        (None, None) => {
            layers::chain(top.clone()).last().ok_or_else(|| Error::new("There is no backing image"))
        }
    }
}

fn block_commit(cx: &mut Cx, args: BlockCommit) -> Result<()> {
    let root = root_of(cx, &args.common.0.device)?;
    let active = root.clone().skip_filters();
    let top = top_of(cx, &root, &args)?.skip_filters();
    let base = base_of(cx, &top, &args)?;
    let mut nodes = Vec::new();
    for node in layers::nodes(&root) {
        let last = Arc::ptr_eq(&node, &base);
        nodes.push(node);
        if last {
            break;
        }
    }
    for node in &nodes {
        cx.vm.check_idle(node)?;
    }
    if Arc::ptr_eq(&top, &base) {
        bail!("cannot commit an image into itself");
    }
    let is_base = |n: &Arc<Node>| Arc::ptr_eq(n, &base);
    let from: Vec<_> = layers::chain(top.clone()).take_while(|n| !is_base(n)).collect();
    let on_error = args.on_error.unwrap_or_default().into();
    let spec = job_options::spec(cx, Kind::Commit, &args.common.0, &root);
    let events = cx.vm.events.clone();
    let nodes: Vec<_> = nodes.iter().collect();
    let graph = &mut cx.vm.graph;
    let job = if Arc::ptr_eq(&top, &active) {
        if args.backing_file.is_some() {
            bail!("'backing-file' specified, but 'top' is the active layer");
        }
        // This kind puts its filter in before there is a job.
        if let Some(name) = &args.filter {
            graph.check_name(name)?;
        }
        let build = || {
            let plan = mirror::Plan {
                source: active.clone(),
                granularity: mirror::default_granularity(&base),
                target: base.clone(),
                sync: mirror::Sync::Top(from),
                commit: true,
                active: false,
                backing: None,
                buf_size: 1 << 20,
                unmap: true,
                replaces: None,
                on_source_error: on_error,
                on_target_error: on_error,
                filter: args.filter,
            };
            Ok(Box::new(mirror::Mirror::new(graph, plan)?) as _)
        };
        cx.vm.jobs.create(spec, &events, &nodes, build)?
    } else {
        let build = || {
            let plan = commit::Plan {
                from,
                base: base.clone(),
                backing_file: args.backing_file,
                on_error,
                filter: args.filter,
                name_of: file_name,
            };
            Ok(Box::new(commit::Commit::new(graph, plan)?) as _)
        };
        cx.vm.jobs.create(spec, &events, &nodes, build)?
    };
    cx.vm.jobs.start(&mut cx.vm.graph, job);
    Ok(())
}
