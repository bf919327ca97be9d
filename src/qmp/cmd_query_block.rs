//! What there is of disks and nodes, and what they have done: `query-block`, `query-blockstats`,
//! `query-named-block-nodes`.
//!
//! Owns: how the graph looks from outside. Never: changes anything. Threads: control. Locks: none.

use super::cmd_snapshot::SnapshotInfo;
use super::query_block_types::*;
use super::schema::Cx;
use crate::block::bitmap::Bitmap;
use crate::block::drive::Drive;
use crate::block::filename;
use crate::block::handle::{Handle, IoStatus};
use crate::block::node::{DetectZeroes, Node};
use crate::block::open::combine;
use crate::block::stats::{Kind, Stats};
use crate::block::throttle::Which;
use crate::block::timed::Summary;
use crate::commands;
use crate::control::formats::BlockdevDetectZeroesOptions;
use crate::error::Result;
use crate::qapi::{Path, Wire};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

commands! {
    /// What there is of disks.
    pub static QUERY_BLOCK;

    /// The drives: those with a legacy name, used or not, then those that guest devices made.
    "query-block" => query_block {} -> Vec<BlockInfo>;

    /// What was done with the drives, or with all nodes.
    "query-blockstats" => query_blockstats {
        /// One entry for each node instead.
        "query-nodes" query_nodes: Option<bool>,
    } -> Vec<BlockStats>;

    /// All nodes, newest first.
    "query-named-block-nodes" => query_named_block_nodes {
        /// Leave out the images of backing files.
        flat: Option<bool>,
    } -> Vec<BlockDeviceInfo>;
}

fn query_block(cx: &mut Cx) -> Result<Vec<BlockInfo>> {
    let look = Look::default();
    Ok(cx.vm.drives.iter().map(|d| block_info(&look, d)).collect())
}

fn query_named_block_nodes(cx: &mut Cx, flat: Option<bool>) -> Result<Vec<BlockDeviceInfo>> {
    let look = Look { flat: flat.unwrap_or(false), ..Look::default() };
    Ok(cx.vm.graph.nodes().map(|n| device_info(&look, n, None)).collect())
}

fn query_blockstats(cx: &mut Cx, query_nodes: Option<bool>) -> Result<Vec<BlockStats>> {
    if query_nodes.unwrap_or(false) {
        // Oldest first, as QEMU has it here.
        let mut nodes: Vec<_> = cx.vm.graph.nodes().collect();
        nodes.reverse();
        return Ok(nodes.into_iter().map(|n| node_stats(n, false)).collect());
    }
    Ok(cx.vm.drives.iter().map(drive_stats).collect())
}

fn qdev(drive: &Drive) -> Option<String> {
    drive.device.as_ref().map(|d| d.qdev.clone())
}

fn block_info(look: &Look, drive: &Drive) -> BlockInfo {
    let device = drive.device.as_ref();
    let tray = drive.handle.tray();
    let reports = device.is_some_and(|d| d.io_status);
    BlockInfo {
        device: drive.name().to_string(),
        qdev: qdev(drive),
        kind: "unknown".to_string(),
        removable: device.is_none_or(|d| d.removable),
        locked: tray.as_ref().is_some_and(|t| t.is_locked()),
        inserted: drive
            .handle
            .node()
            .map(Node::skip_implicit)
            .map(|n| device_info(look, &n, Some(&drive.handle))),
        tray_open: tray.map(|t| t.is_open()),
        io_status: reports.then(|| match drive.handle.io_status() {
            IoStatus::Ok => BlockDeviceIoStatus::Ok,
            IoStatus::Failed => BlockDeviceIoStatus::Failed,
            IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
        }),
    }
}

/// The name of a node's file.
pub(super) fn file_name(node: &Node) -> String {
    filename::names(node).shown()
}

/// One look at the graph.
#[derive(Default)]
struct Look {
    /// Backing files' images are left out.
    flat: bool,
    /// Names that are known already: of a long chain each would be made many times.
    names: RefCell<HashMap<*const Node, String>>,
}

impl Look {
    fn name(&self, node: &Arc<Node>) -> String {
        let mut names = self.names.borrow_mut();
        names.entry(Arc::as_ptr(node)).or_insert_with(|| file_name(node)).clone()
    }
}

/// What a node filters, or its backing file. `seen`: of what a user did not ask for nothing is shown.
fn below(node: &Node, seen: bool) -> Option<Arc<Node>> {
    let below = node.filtered().or_else(|| node.backing())?;
    Some(if seen { below.skip_implicit() } else { below })
}

fn image_info(look: &Look, node: &Arc<Node>, seen: bool) -> ImageInfo {
    let info = node.driver.info();
    let backing = below(node, seen).filter(|_| !look.flat);
    // An image whose list cannot be read shows none.
    let snapshots = node.driver.internal().and_then(|i| i.snapshots().ok());
    let snapshots = snapshots.map(|list| list.into_iter().map(SnapshotInfo::from).collect::<Vec<_>>());
    let specific = info.specific.as_ref().and_then(|(kind, data)| {
        let value = json!({ "type": kind, "data": data });
        // A driver's words that the schema does not know would be an error of ours.
        let taken = ImageInfoSpecific::take(value, &Path::Root);
        taken.inspect_err(|e| log::error!("format-specific of {}: {e}", node.name)).ok()
    });
    ImageInfo {
        filename: look.name(node),
        format: node.driver.name().to_string(),
        dirty_flag: info.dirty,
        actual_size: info.actual_size,
        // A file need not be whole sectors; disks are.
        virtual_size: node.len().next_multiple_of(512),
        cluster_size: info.cluster_size,
        encrypted: info.encrypted.then_some(true),
        full_backing_filename: info
            .backing_filename
            .as_ref()
            .map(|name| combine(&filename::origin(node), name)),
        backing_filename: info.backing_filename,
        backing_filename_format: info.backing_format,
        snapshots: snapshots.filter(|list| !list.is_empty()),
        format_specific: specific,
        backing_image: backing.map(|b| Box::new(image_info(look, &b, seen))),
    }
}

fn device_info(look: &Look, node: &Arc<Node>, handle: Option<&Handle>) -> BlockDeviceInfo {
    let image = image_info(look, node, handle.is_some());
    let member = handle.and_then(Handle::throttled);
    let limits = member.as_ref().map(|m| m.group().limits()).unwrap_or_default();
    let burst = |which| {
        let limit = limits.get(which);
        (limit.max > 0).then_some((limit.max.cast_signed(), limit.length.cast_signed()))
    };
    let seen = handle.is_some();
    let chain = std::iter::successors(below(node, seen), |n| below(n, seen));
    BlockDeviceInfo {
        file: image.filename.clone(),
        node_name: Some(node.name.clone()),
        ro: node.read_only(),
        drv: node.driver.name().to_string(),
        backing_file: node.backing().map(|b| look.name(&b)),
        // QEMU counts the images it shows below this one.
        backing_file_depth: if look.flat { 0 } else { i64::try_from(chain.count()).unwrap_or(i64::MAX) },
        active: true,
        encrypted: image.encrypted.unwrap_or(false),
        detect_zeroes: match node.options().detect_zeroes {
            DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
            DetectZeroes::On => BlockdevDetectZeroesOptions::On,
            DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
        },
        bps: limits.get(Which::BpsTotal).avg.cast_signed(),
        bps_rd: limits.get(Which::BpsRead).avg.cast_signed(),
        bps_wr: limits.get(Which::BpsWrite).avg.cast_signed(),
        iops: limits.get(Which::OpsTotal).avg.cast_signed(),
        iops_rd: limits.get(Which::OpsRead).avg.cast_signed(),
        iops_wr: limits.get(Which::OpsWrite).avg.cast_signed(),
        bps_max: burst(Which::BpsTotal).map(|b| b.0),
        bps_max_length: burst(Which::BpsTotal).map(|b| b.1),
        bps_rd_max: burst(Which::BpsRead).map(|b| b.0),
        bps_rd_max_length: burst(Which::BpsRead).map(|b| b.1),
        bps_wr_max: burst(Which::BpsWrite).map(|b| b.0),
        bps_wr_max_length: burst(Which::BpsWrite).map(|b| b.1),
        iops_max: burst(Which::OpsTotal).map(|b| b.0),
        iops_max_length: burst(Which::OpsTotal).map(|b| b.1),
        iops_rd_max: burst(Which::OpsRead).map(|b| b.0),
        iops_rd_max_length: burst(Which::OpsRead).map(|b| b.1),
        iops_wr_max: burst(Which::OpsWrite).map(|b| b.0),
        iops_wr_max_length: burst(Which::OpsWrite).map(|b| b.1),
        iops_size: (limits.iops_size > 0).then_some(limits.iops_size.cast_signed()),
        group: member.map(|m| m.group().name.clone()),
        image,
        cache: BlockdevCacheInfo {
            writeback: handle.is_none_or(Handle::write_cache) && node.options().writeback,
            direct: node.options().direct,
            no_flush: node.options().no_flush,
        },
        // Its type is `int`: thresholds that no disk reaches are shown as negative numbers.
        write_threshold: node.write_threshold().cast_signed(),
        dirty_bitmaps: Some(node.bitmaps().iter().map(|b| dirty_info(b)).collect::<Vec<_>>())
            .filter(|list| !list.is_empty()),
    }
}

fn dirty_info(bitmap: &Bitmap) -> BlockDirtyInfo {
    BlockDirtyInfo {
        name: bitmap.name().map(str::to_string),
        count: bitmap.count().cast_signed(),
        granularity: u32::try_from(bitmap.granularity()).unwrap_or(u32::MAX),
        recording: bitmap.recording(),
        busy: bitmap.busy(),
        persistent: bitmap.persistent(),
        inconsistent: bitmap.inconsistent().then_some(true),
    }
}

fn drive_stats(drive: &Drive) -> BlockStats {
    let below = drive.handle.node().map(|n| node_stats(&n, true));
    let (invalid, failed) = drive.handle.stats.account();
    let mut stats = counters(Some(&drive.handle.stats));
    stats.wr_highest_offset = below.as_ref().map_or(0, |b| b.stats.wr_highest_offset);
    stats.account_invalid = invalid;
    stats.account_failed = failed;
    let top = BlockStats {
        device: Some(drive.name().to_string()),
        qdev: qdev(drive),
        node_name: None,
        stats,
        driver_specific: None,
        parent: None,
        backing: None,
    };
    match below {
        Some(b) => BlockStats {
            node_name: b.node_name,
            driver_specific: b.driver_specific,
            parent: b.parent,
            backing: b.backing,
            ..top
        },
        None => top,
    }
}

/// `seen`: as part of a drive, with its backing file, and without what no user asked for.
fn node_stats(node: &Arc<Node>, seen: bool) -> BlockStats {
    let node = &if seen { node.clone().skip_implicit() } else { node.clone() };
    let mut stats = counters(None);
    stats.wr_highest_offset = node.wr_highest_offset();
    let specific = node.driver.stats().and_then(|map| {
        let taken = BlockStatsSpecific::take(Value::Object(map), &Path::Root);
        taken.inspect_err(|e| log::error!("driver-specific of {}: {e}", node.name)).ok()
    });
    BlockStats {
        device: None,
        qdev: None,
        node_name: Some(node.name.clone()),
        stats,
        driver_specific: specific,
        parent: filename::primary(node).map(|n| Box::new(node_stats(&n, seen))),
        backing: below(node, seen).filter(|_| seen).map(|n| Box::new(node_stats(&n, seen))),
    }
}

fn timed((seconds, [rd, wr, flush]): (u64, [Summary; 3])) -> BlockDeviceTimedStats {
    let none = Summary::default();
    BlockDeviceTimedStats {
        interval_length: seconds,
        min_rd_latency_ns: rd.min,
        max_rd_latency_ns: rd.max,
        avg_rd_latency_ns: rd.avg,
        min_wr_latency_ns: wr.min,
        max_wr_latency_ns: wr.max,
        avg_wr_latency_ns: wr.avg,
        min_zone_append_latency_ns: none.min,
        max_zone_append_latency_ns: none.max,
        avg_zone_append_latency_ns: none.avg,
        min_flush_latency_ns: flush.min,
        max_flush_latency_ns: flush.max,
        avg_flush_latency_ns: flush.avg,
        avg_rd_queue_depth: rd.depth,
        avg_wr_queue_depth: wr.depth,
        avg_zone_append_queue_depth: none.depth,
    }
}

/// The counters of a drive; of a node, which counts nothing but its highest write, all are 0.
fn counters(stats: Option<&Stats>) -> BlockDeviceStats {
    let get = |kind| stats.map(|s| s.get(kind)).unwrap_or_default();
    let (rd, wr) = (get(Kind::Read), get(Kind::Write));
    let (flush, unmap) = (get(Kind::Flush), get(Kind::Unmap));
    BlockDeviceStats {
        rd_bytes: rd.bytes,
        wr_bytes: wr.bytes,
        zone_append_bytes: 0,
        unmap_bytes: unmap.bytes,
        rd_operations: rd.operations,
        wr_operations: wr.operations,
        zone_append_operations: 0,
        flush_operations: flush.operations,
        unmap_operations: unmap.operations,
        rd_total_time_ns: rd.total_time_ns,
        wr_total_time_ns: wr.total_time_ns,
        zone_append_total_time_ns: 0,
        flush_total_time_ns: flush.total_time_ns,
        unmap_total_time_ns: unmap.total_time_ns,
        wr_highest_offset: 0,
        rd_merged: rd.merged,
        wr_merged: wr.merged,
        zone_append_merged: 0,
        unmap_merged: unmap.merged,
        idle_time_ns: stats.and_then(Stats::idle_time_ns),
        failed_rd_operations: rd.failed,
        failed_wr_operations: wr.failed,
        failed_zone_append_operations: 0,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: rd.invalid,
        invalid_wr_operations: wr.invalid,
        invalid_zone_append_operations: 0,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: false,
        account_failed: false,
        timed_stats: stats.map(|s| s.timed().into_iter().map(timed).collect()).unwrap_or_default(),
    }
}

#[cfg(test)]
#[path = "cmd_query_block_test.rs"]
mod tests;
