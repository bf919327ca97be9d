//! `block-stream`.
//!
//! Owns: the command's form, and QEMU's texts. Never: how data move (`jobs/stream.rs`). Threads:
//! control. Locks: none.

use super::cmd_blockdev::find_node;
use super::cmd_query_block::file_name;
use super::job_options::{self, BlockdevOnError, JobOptions, by_node_name, in_chain, need_backing};
use super::schema::Cx;
use crate::block::node::Node;
use crate::error::Result;
use crate::jobs::filter::{self, Asks};
use crate::jobs::layers;
use crate::jobs::stream::{Plan, Stream};
use crate::jobs::table::Kind;
use crate::qapi::Flat;
use crate::{bail, commands, wire_struct};
use std::sync::Arc;

commands! {
    /// Pulling backing files up.
    pub static STREAM;

    /// Copies into an image what lies in its backing files, down to one that stays its backing file,
    /// or all of it; a job.
    "block-stream" => block_stream(BlockStream) -> ();
}

wire_struct! {
    /// Arguments of `block-stream`.
    pub struct BlockStream {
        /// The disk, and the job.
        common: Flat<JobOptions>,
        /// The file of the image that becomes the backing file.
        base: Option<String>,
        /// Its node.
        "base-node" base_node: Option<String>,
        /// The name to record for it, if not its own.
        "backing-file" backing_file: Option<String>,
        /// Record the format `raw` for a bare protocol, as is always done here.
        "backing-mask-protocol" mask_protocol: Option<bool>,
        /// The node of the lowest image that is copied.
        bottom: Option<String>,
        /// What to do when a request fails (default: report).
        "on-error" on_error: Option<BlockdevOnError>,
        /// Name of the filter node.
        "filter-node-name" filter: Option<String>,
    }
}

fn block_stream(cx: &mut Cx, args: BlockStream) -> Result<()> {
    let device = args.common.0.device.clone();
    for (a, b, both) in [
        ("base", "base-node", args.base.is_some() && args.base_node.is_some()),
        ("base", "bottom", args.base.is_some() && args.bottom.is_some()),
        ("bottom", "base-node", args.bottom.is_some() && args.base_node.is_some()),
    ] {
        if both {
            bail!("'{a}' and '{b}' cannot be specified at the same time");
        }
    }
    let root = find_node(cx, Some(&device), Some(&device))?;
    let top = root.clone().skip_filters();
    let mut base = None;
    if let Some(name) = &args.base {
        base = Some(need_backing(&root, name)?);
    }
    if let Some(name) = &args.base_node {
        let node = by_node_name(cx, name)?;
        if Arc::ptr_eq(&node, &root) || Arc::ptr_eq(&node, &top) || !in_chain(&root, &node) {
            bail!("Node '{name}' is not a backing image of '{device}'");
        }
        base = Some(node.skip_filters());
    }
    let mut bottom = None;
    if let Some(name) = &args.bottom {
        let node = by_node_name(cx, name)?;
        if node.filtered().is_some() {
            bail!("Node '{name}' is a filter, use a non-filter node as 'bottom'");
        }
        if !in_chain(&root, &node) {
            bail!("Node '{name}' is not in a chain starting from '{device}'");
        }
        base = layers::below(&node);
        bottom = Some(node);
    }
    let is_base = |n: &Arc<Node>| base.as_ref().is_some_and(|b| Arc::ptr_eq(n, b));
    let from: Vec<_> = layers::chain(top.clone()).skip(1).take_while(|n| !is_base(n)).collect();
    // With the image itself as the lowest that is copied there is nothing to copy.
    let nothing = bottom.is_some_and(|b| Arc::ptr_eq(&b, &top));
    let from = if nothing { Vec::new() } else { from };
    // Filters, too; with nothing to copy only the image.
    let last = from.last().unwrap_or(&top).clone();
    let mut nodes = Vec::new();
    for node in layers::nodes(&root) {
        let is_last = Arc::ptr_eq(&node, &last);
        nodes.push(node);
        if is_last {
            break;
        }
    }
    for node in &nodes {
        cx.vm.check_idle(node)?;
    }
    if args.backing_file.is_some() && base.is_none() {
        bail!("backing file specified, but streaming the entire chain");
    }
    if let Some(name) = &args.filter {
        cx.vm.graph.check_name(name).map_err(|e| e.context("Could not create node: "))?;
    }
    let spec = job_options::spec(cx, Kind::Stream, &args.common.0, &root);
    let events = cx.vm.events.clone();
    let nodes: Vec<_> = nodes.iter().collect();
    let id = spec.id.clone();
    let graph = &mut cx.vm.graph;
    let build = || {
        let filter = filter::insert(graph, "copy-on-read", args.filter.as_deref(), &top, Asks::Same)?;
        let plan = Plan {
            top: top.clone(),
            from: from.clone(),
            backing_file: args.backing_file,
            on_error: args.on_error.unwrap_or_default().into(),
            filter: Some(filter),
            id,
            name_of: file_name,
        };
        Ok(Box::new(Stream::new(graph, plan)?) as _)
    };
    let job = cx.vm.jobs.create(spec, &events, &nodes, build)?;
    cx.vm.jobs.start(&mut cx.vm.graph, job);
    Ok(())
}
