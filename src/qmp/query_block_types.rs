//! What the block queries answer: QAPI's types.
//!
//! Owns: names and order of members. Never: where the values come from. Threads: control.

use super::cmd_snapshot::SnapshotInfo;
use crate::control::encrypt_options::QCryptoCipherAlgo;
use crate::control::formats::BlockdevDetectZeroesOptions;
use crate::qapi::Empty;
use crate::qcow2::crypt::{Hash, IvGen, Mode};
use crate::{wire_enum, wire_struct, wire_union};

wire_enum! {
    /// How the last stop on an I/O error came about.
    pub enum BlockDeviceIoStatus {
        /// There was none since the last `cont`.
        "ok" Ok,
        /// An I/O error.
        "failed" Failed,
        /// No space left.
        "nospace" Nospace,
    }
}

wire_struct! {
    /// How caches are used.
    pub struct BlockdevCacheInfo {
        /// Writes may stay in a cache until the guest flushes.
        writeback: bool,
        /// The host's page cache is bypassed.
        direct: bool,
        /// Flushes are ignored.
        "no-flush" no_flush: bool,
    }
}

wire_struct! {
    /// Of a file.
    pub struct ImageInfoSpecificFile {
        /// The extent size hint in bytes.
        "extent-size-hint" extent_size_hint: Option<u64>,
    }
}

wire_struct! {
    /// Of a file.
    pub struct ImageInfoSpecificFileWrapper {
        /// Its particulars.
        data: ImageInfoSpecificFile,
    }
}

wire_enum! {
    /// How a stored bitmap is.
    pub enum Qcow2BitmapInfoFlags {
        /// It is in use, or the image was not closed properly.
        "in-use" InUse,
        /// It notes what is written.
        "auto" Auto,
    }
}

wire_struct! {
    /// A stored bitmap.
    pub struct Qcow2BitmapInfo {
        /// Its name.
        name: String,
        /// Bytes that one bit stands for.
        granularity: u32,
        /// How it is.
        flags: Vec<Qcow2BitmapInfoFlags>,
    }
}

wire_struct! {
    /// A place for a key in a LUKS header.
    pub struct QCryptoBlockInfoLUKSSlot {
        /// A password opens it.
        active: bool,
        /// Iterations of PBKDF2.
        iters: Option<i64>,
        /// Into how many stripes the key is split.
        stripes: Option<i64>,
        /// Where its key material is, in bytes.
        "key-offset" key_offset: i64,
    }
}

wire_struct! {
    /// A LUKS header.
    pub struct QCryptoBlockInfoLUKS {
        /// The cipher.
        "cipher-alg" cipher_alg: QCryptoCipherAlgo,
        /// How sectors are made of blocks.
        "cipher-mode" cipher_mode: Mode,
        /// How sector numbers become initialization vectors.
        "ivgen-alg" ivgen_alg: IvGen,
        /// The hash for that.
        "ivgen-hash-alg" ivgen_hash_alg: Option<Hash>,
        /// What keys are derived with.
        "hash-alg" hash_alg: Hash,
        /// It is in another file: never here.
        "detached-header" detached_header: bool,
        /// Bytes of the header.
        "payload-offset" payload_offset: i64,
        /// Iterations of PBKDF2 for the key's digest.
        "master-key-iters" master_key_iters: i64,
        /// Its name.
        uuid: String,
        /// Its eight slots.
        slots: Vec<QCryptoBlockInfoLUKSSlot>,
    }
}

wire_union! {
    /// How a qcow2 image is encrypted.
    pub struct ImageInfoSpecificQCow2Encryption {}
    /// The method.
    "format" => pub enum ImageInfoSpecificQCow2EncryptionFormat as format {
        /// The legacy way.
        "aes" Aes(Empty),
        /// LUKS1.
        "luks" Luks(QCryptoBlockInfoLUKS),
    }
}

wire_struct! {
    /// Of a qcow2 image.
    pub struct ImageInfoSpecificQCow2 {
        /// The version: 0.10 is 2, 1.1 is 3.
        compat: String,
        /// External data file, as the image names it.
        "data-file" data_file: Option<String>,
        /// The external data file is a raw image of the disk.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Subclusters are used.
        "extended-l2" extended_l2: Option<bool>,
        /// Reference counts may be out of date after a crash.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// The image is marked as corrupt.
        corrupt: Option<bool>,
        /// Width of a reference count.
        "refcount-bits" refcount_bits: i64,
        /// The bitmaps that are stored in it.
        bitmaps: Option<Vec<Qcow2BitmapInfo>>,
        /// How it is encrypted.
        encrypt: Option<ImageInfoSpecificQCow2Encryption>,
        /// How clusters are compressed.
        "compression-type" compression_type: String,
    }
}

wire_struct! {
    /// Of a qcow2 image.
    pub struct ImageInfoSpecificQCow2Wrapper {
        /// Its particulars.
        data: ImageInfoSpecificQCow2,
    }
}

wire_union! {
    /// What only images of one kind have.
    pub struct ImageInfoSpecific {}
    /// The kind.
    "type" => pub enum ImageInfoSpecificKind as kind {
        /// A file.
        "file" File(ImageInfoSpecificFileWrapper),
        /// A qcow2 image.
        "qcow2" Qcow2(ImageInfoSpecificQCow2Wrapper),
    }
}

wire_struct! {
    /// An image.
    pub struct ImageInfo {
        /// Its name.
        filename: String,
        /// Its format.
        format: String,
        /// It was not closed properly.
        "dirty-flag" dirty_flag: Option<bool>,
        /// Bytes that it takes on the host.
        "actual-size" actual_size: Option<u64>,
        /// Length of the disk in bytes.
        "virtual-size" virtual_size: u64,
        /// Bytes of a cluster.
        "cluster-size" cluster_size: Option<u64>,
        /// True when it is encrypted.
        encrypted: Option<bool>,
        /// The backing file, as the image names it.
        "backing-filename" backing_filename: Option<String>,
        /// The same, made absolute or relative to this process.
        "full-backing-filename" full_backing_filename: Option<String>,
        /// Its format, as the image records it.
        "backing-filename-format" backing_filename_format: Option<String>,
        /// The snapshots inside it, if there are any.
        snapshots: Option<Vec<SnapshotInfo>>,
        /// What only its format has.
        "format-specific" format_specific: Option<ImageInfoSpecific>,
        /// The backing file's image.
        "backing-image" backing_image: Option<Box<ImageInfo>>,
    }
}

wire_struct! {
    /// A node.
    pub struct BlockDeviceInfo {
        /// Its file's name.
        file: String,
        /// Its name.
        "node-name" node_name: Option<String>,
        /// It refuses writes.
        ro: bool,
        /// Its driver.
        drv: String,
        /// The backing file's name.
        backing_file: Option<String>,
        /// Length of the chain of backing files.
        backing_file_depth: i64,
        /// It can be used (always, without migration).
        active: bool,
        /// It is encrypted.
        encrypted: bool,
        /// What becomes of a write of zeroes.
        detect_zeroes: BlockdevDetectZeroesOptions,
        /// Limit in bytes per second; 0: none.
        bps: i64,
        /// Limit of reads.
        bps_rd: i64,
        /// Limit of writes.
        bps_wr: i64,
        /// Limit in requests per second; 0: none.
        iops: i64,
        /// Limit of reads.
        iops_rd: i64,
        /// Limit of writes.
        iops_wr: i64,
        /// Bytes a second in a burst.
        bps_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        bps_max_length: Option<i64>,
        /// Bytes read a second in a burst.
        bps_rd_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        bps_rd_max_length: Option<i64>,
        /// Bytes written a second in a burst.
        bps_wr_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        bps_wr_max_length: Option<i64>,
        /// Operations a second in a burst.
        iops_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        iops_max_length: Option<i64>,
        /// Reads a second in a burst.
        iops_rd_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        iops_rd_max_length: Option<i64>,
        /// Writes a second in a burst.
        iops_wr_max: Option<i64>,
        /// How long such a burst may last, in seconds.
        iops_wr_max_length: Option<i64>,
        /// Bytes that count as one operation.
        iops_size: Option<i64>,
        /// The disks of one group share its limits.
        group: Option<String>,
        /// Its image.
        image: ImageInfo,
        /// How caches are used.
        cache: BlockdevCacheInfo,
        /// Writes beyond this byte make an event; 0: none do.
        write_threshold: i64,
        /// Its bitmaps, newest first; absent without one.
        "dirty-bitmaps" dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
    }
}

wire_struct! {
    /// A dirty bitmap.
    pub struct BlockDirtyInfo {
        /// Its name; jobs' own have none.
        name: Option<String>,
        /// Bytes that are dirty: a multiple of the granularity.
        count: i64,
        /// Bytes that one bit stands for.
        granularity: u32,
        /// It notes what is written.
        recording: bool,
        /// A job or an export uses it.
        busy: bool,
        /// It is stored in the image when that is closed.
        persistent: bool,
        /// The image was not closed properly: the bitmap can only be removed.
        inconsistent: Option<bool>,
    }
}

wire_struct! {
    /// A drive.
    pub struct BlockInfo {
        /// Its legacy name, or "".
        device: String,
        /// Id or QOM path of the guest device.
        qdev: Option<String>,
        /// `unknown`.
        "type" kind: String,
        /// The medium can be taken out.
        removable: bool,
        /// The guest has locked the tray.
        locked: bool,
        /// The medium.
        inserted: Option<BlockDeviceInfo>,
        /// For a device with a tray: whether it is open.
        tray_open: Option<bool>,
        /// How the last stop on an I/O error came about.
        "io-status" io_status: Option<BlockDeviceIoStatus>,
    }
}

/// The counters of one kind of request, spread over the members of [`BlockDeviceStats`].
macro_rules! stats {
    ($($(#[doc = $doc:literal])* $field:ident : $T:ty,)*) => {
        wire_struct! {
            /// What was done with a disk.
            pub struct BlockDeviceStats { $( $(#[doc = $doc])* $field: $T, )* }
        }
    };
}

stats! {
    /// Bytes read.
    rd_bytes: u64,
    /// Bytes written.
    wr_bytes: u64,
    /// Bytes appended to zones.
    zone_append_bytes: u64,
    /// Bytes given up.
    unmap_bytes: u64,
    /// Reads.
    rd_operations: u64,
    /// Writes.
    wr_operations: u64,
    /// Appends to zones.
    zone_append_operations: u64,
    /// Flushes.
    flush_operations: u64,
    /// Discards.
    unmap_operations: u64,
    /// Time spent with reads.
    rd_total_time_ns: u64,
    /// Time spent with writes.
    wr_total_time_ns: u64,
    /// Time spent with appends to zones.
    zone_append_total_time_ns: u64,
    /// Time spent with flushes.
    flush_total_time_ns: u64,
    /// Time spent with discards.
    unmap_total_time_ns: u64,
    /// End of the highest write since the node was opened.
    wr_highest_offset: u64,
    /// Reads merged into others.
    rd_merged: u64,
    /// Writes merged into others.
    wr_merged: u64,
    /// Appends to zones merged into others.
    zone_append_merged: u64,
    /// Discards merged into others.
    unmap_merged: u64,
    /// Time since the last request; absent before the first.
    idle_time_ns: Option<u64>,
    /// Reads that failed.
    failed_rd_operations: u64,
    /// Writes that failed.
    failed_wr_operations: u64,
    /// Appends to zones that failed.
    failed_zone_append_operations: u64,
    /// Flushes that failed.
    failed_flush_operations: u64,
    /// Discards that failed.
    failed_unmap_operations: u64,
    /// Reads that the device refused.
    invalid_rd_operations: u64,
    /// Writes that the device refused.
    invalid_wr_operations: u64,
    /// Appends to zones that the device refused.
    invalid_zone_append_operations: u64,
    /// Flushes that the device refused.
    invalid_flush_operations: u64,
    /// Discards that the device refused.
    invalid_unmap_operations: u64,
    /// Refused requests count for `idle_time_ns`.
    account_invalid: bool,
    /// Failed requests count for times.
    account_failed: bool,
    /// Statistics by interval, as `stats-intervals` of the drive sets up.
    timed_stats: Vec<BlockDeviceTimedStats>,
}

wire_struct! {
    /// Statistics of an interval.
    pub struct BlockDeviceTimedStats {
        /// Its length in seconds.
        interval_length: u64,
        /// The shortest read.
        min_rd_latency_ns: u64,
        /// The longest.
        max_rd_latency_ns: u64,
        /// The mean.
        avg_rd_latency_ns: u64,
        /// The shortest write.
        min_wr_latency_ns: u64,
        /// The longest.
        max_wr_latency_ns: u64,
        /// The mean.
        avg_wr_latency_ns: u64,
        /// The shortest append to a zone.
        min_zone_append_latency_ns: u64,
        /// The longest.
        max_zone_append_latency_ns: u64,
        /// The mean.
        avg_zone_append_latency_ns: u64,
        /// The shortest flush.
        min_flush_latency_ns: u64,
        /// The longest.
        max_flush_latency_ns: u64,
        /// The mean.
        avg_flush_latency_ns: u64,
        /// Reads under way, in the mean.
        avg_rd_queue_depth: f64,
        /// Writes under way, in the mean.
        avg_wr_queue_depth: f64,
        /// Appends to zones under way, in the mean.
        avg_zone_append_queue_depth: f64,
    }
}

wire_struct! {
    /// Of a file.
    pub struct BlockStatsSpecificFile {
        /// Discards that the host did.
        "discard-nb-ok" discard_nb_ok: u64,
        /// Discards that the host refused.
        "discard-nb-failed" discard_nb_failed: u64,
        /// Bytes given back to the host.
        "discard-bytes-ok" discard_bytes_ok: u64,
    }
}

wire_union! {
    /// What only nodes of one driver count.
    pub struct BlockStatsSpecific {}
    /// The driver.
    "driver" => pub enum BlockStatsSpecificDriver as driver {
        /// A file.
        "file" File(BlockStatsSpecificFile),
        /// A block device.
        "host_device" HostDevice(BlockStatsSpecificFile),
    }
}

wire_struct! {
    /// Statistics of a drive or a node.
    pub struct BlockStats {
        /// The drive's legacy name.
        device: Option<String>,
        /// Id or QOM path of the guest device.
        qdev: Option<String>,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// The counters.
        stats: BlockDeviceStats,
        /// What only its driver counts.
        "driver-specific" driver_specific: Option<BlockStatsSpecific>,
        /// Of the node that has its bytes.
        parent: Option<Box<BlockStats>>,
        /// Of the backing file.
        backing: Option<Box<BlockStats>>,
    }
}
