//! What there is of disks and nodes, and what they have done: `query-block`, `query-blockstats`,
//! `query-named-block-nodes`.
//!
//! Owns: how the graph looks from outside. Never: changes anything. Threads: control. Locks: none.

use super::cmd_snapshot::SnapshotInfo;
use super::query_block_types::*;
use super::schema::Cx;
use crate::block::bitmap::Bitmap;
use crate::block::drive::Drive;
use crate::block::driver;
use crate::block::handle::{Handle, IoStatus};
use crate::block::node::{DetectZeroes, Node};
use crate::block::open::combine;
use crate::block::stats::{Kind, Stats};
use crate::block::throttle::Which;
use crate::commands;
use crate::control::formats::BlockdevDetectZeroesOptions;
use crate::error::Result;
use crate::qapi::{Path, Wire};
use serde_json::{Map, Value, json};
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
    Ok(cx.vm.drives.iter().map(block_info).collect())
}

fn query_named_block_nodes(cx: &mut Cx, flat: Option<bool>) -> Result<Vec<BlockDeviceInfo>> {
    let flat = flat.unwrap_or(false);
    Ok(cx.vm.graph.nodes().map(|n| device_info(n, None, flat)).collect())
}

fn query_blockstats(cx: &mut Cx, query_nodes: Option<bool>) -> Result<Vec<BlockStats>> {
    if query_nodes.unwrap_or(false) {
        // Oldest first, as QEMU has it here.
        let mut nodes: Vec<_> = cx.vm.graph.nodes().collect();
        nodes.reverse();
        return Ok(nodes.into_iter().map(node_stats).collect());
    }
    Ok(cx.vm.drives.iter().map(drive_stats).collect())
}

fn qdev(drive: &Drive) -> Option<String> {
    drive.device.as_ref().map(|d| d.qdev.clone())
}

fn block_info(drive: &Drive) -> BlockInfo {
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
            .map(|n| device_info(&n, Some(&drive.handle), false)),
        tray_open: tray.map(|t| t.is_open()),
        io_status: reports.then(|| match drive.handle.io_status() {
            IoStatus::Ok => BlockDeviceIoStatus::Ok,
            IoStatus::Failed => BlockDeviceIoStatus::Failed,
            IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
        }),
    }
}

/// The node at the other end of the child edge `role`.
fn child(node: &Node, role: &str) -> Option<Arc<Node>> {
    node.driver.edges().into_iter().find(|e| e.role == role)?.node()
}

/// The name of a node's file: a plain one if that says it all, else `json:{…}`.
fn filename(node: &Node, info: &driver::ImageInfo) -> String {
    let plain = node.driver.filename();
    let usual = child(node, "backing").map(|b| b.driver.filename());
    let own = child(node, "file").map(|f| f.driver.filename()).unwrap_or_default();
    let named = info.backing_filename.as_ref().map(|name| combine(&own, name));
    if !plain.is_empty() && usual == named {
        return plain;
    }
    format!("json:{}", Value::Object(options(node)))
}

/// The name of a node's file.
pub(super) fn file_name(node: &Node) -> String {
    filename(node, &node.driver.info())
}

/// The options that would open this node again.
fn options(node: &Node) -> Map<String, Value> {
    let mut map = node.driver.own_options();
    map.insert("driver".into(), json!(node.driver.name()));
    for edge in node.driver.edges() {
        let below = edge.node().map_or(Value::Null, |n| Value::Object(options(&n)));
        // The children of a quorum are a list.
        match edge.role.split_once('.').map(|(list, _)| map.entry(list).or_insert(json!([]))) {
            Some(Value::Array(list)) => list.push(below),
            _ => {
                map.insert(edge.role.clone(), below);
            }
        }
    }
    map
}

fn image_info(node: &Node, flat: bool) -> ImageInfo {
    let info = node.driver.info();
    let own = child(node, "file").map(|f| f.driver.filename()).unwrap_or_default();
    let backing = child(node, "backing").filter(|_| !flat);
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
        filename: filename(node, &info),
        format: node.driver.name().to_string(),
        dirty_flag: Some(info.dirty),
        actual_size: info.actual_size,
        virtual_size: node.len(),
        cluster_size: info.cluster_size,
        encrypted: info.encrypted.then_some(true),
        full_backing_filename: info.backing_filename.as_ref().map(|name| combine(&own, name)),
        backing_filename: info.backing_filename,
        backing_filename_format: info.backing_format,
        snapshots: snapshots.filter(|list| !list.is_empty()),
        format_specific: specific,
        backing_image: backing.map(|b| Box::new(image_info(&b, flat))),
    }
}

fn device_info(node: &Node, handle: Option<&Handle>, flat: bool) -> BlockDeviceInfo {
    let image = image_info(node, flat);
    let member = handle.and_then(Handle::throttled);
    let limits = member.as_ref().map(|m| m.group().limits()).unwrap_or_default();
    let burst = |which| {
        let limit = limits.get(which);
        (limit.max > 0).then_some((limit.max.cast_signed(), limit.length.cast_signed()))
    };
    let chain = std::iter::successors(child(node, "backing"), |n| child(n, "backing"));
    BlockDeviceInfo {
        file: image.filename.clone(),
        node_name: Some(node.name.clone()),
        ro: node.read_only(),
        drv: node.driver.name().to_string(),
        backing_file: child(node, "backing").map(|b| filename(&b, &b.driver.info())),
        // QEMU counts the images it shows below this one.
        backing_file_depth: if flat { 0 } else { i64::try_from(chain.count()).unwrap_or(i64::MAX) },
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
    let below = drive.handle.node().map(|n| node_stats(&n.skip_implicit()));
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

fn node_stats(node: &Arc<Node>) -> BlockStats {
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
        parent: child(node, "file").map(|n| Box::new(node_stats(&n))),
        backing: child(node, "backing").map(|n| Box::new(node_stats(&n))),
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
        timed_stats: Vec::new(),
    }
}

#[cfg(test)]
#[path = "cmd_query_block_test.rs"]
mod tests;
