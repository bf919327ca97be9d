//! `blockdev-create`: images made by a job.
//!
//! Owns: the command's form, and QEMU's texts. Never: how an image is made. Threads: control. Locks:
//! none.

use super::schema::Cx;
use crate::block::driver::Perm;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::open;
use crate::control::encrypt_options::QCryptoBlockCreateOptions;
use crate::control::formats::{self, BlockdevDriver, BlockdevRef, Formats};
use crate::control::new_image::touch;
use crate::error::{Error, Result, strerror};
use crate::jobs::create::{Attributes, Create, New};
use crate::jobs::registry::Spec;
use crate::jobs::table::Kind;
use crate::qapi::Empty;
use crate::qcow2::create::{CreateOptions, Preallocation};
use crate::qcow2::header::Compression;
use crate::{bail, commands, wire_enum, wire_struct, wire_union};
use std::sync::Arc;

commands! {
    /// Making images.
    pub static CREATE;

    /// Makes an image, as a job that stays until it is dismissed.
    "blockdev-create" => blockdev_create {
        /// The job.
        "job-id" job_id: String,
        /// What to make.
        options: BlockdevCreateOptions,
    } -> ();
}

wire_enum! {
    /// How much of an image's space is made with it.
    pub enum PreallocMode {
        /// Nothing.
        "off" Off,
        /// The tables.
        "metadata" Metadata,
        /// All of it, by fallocate(2).
        "falloc" Falloc,
        /// All of it, written.
        "full" Full,
    }
}

wire_enum! {
    /// The version of the format.
    pub enum BlockdevQcow2Version {
        /// QEMU 0.10.
        "v2" V2,
        /// QEMU 1.1.
        "v3" V3,
    }
}

wire_enum! {
    /// How clusters are compressed.
    pub enum Qcow2CompressionType {
        /// Deflate.
        "zlib" Zlib,
        /// Zstandard.
        "zstd" Zstd,
    }
}

wire_struct! {
    /// A file.
    pub struct BlockdevCreateOptionsFile {
        /// Its path.
        filename: String,
        /// Bytes.
        size: u64,
        /// Whether its space is made, too (default: off; metadata is not possible).
        preallocation: Option<PreallocMode>,
        /// Switch copy-on-write off, where the file system can (btrfs; default: false).
        nocow: Option<bool>,
        /// Bytes of space that are allocated at once, where the file system can (XFS); 0: as it likes
        /// (default: 1 MiB).
        "extent-size-hint" extent_size_hint: Option<u64>,
    }
}

wire_struct! {
    /// An image of the format qcow2.
    pub struct BlockdevCreateOptionsQcow2 {
        /// Where it goes; what is there is lost.
        file: BlockdevRef,
        /// Where its data go, if not there.
        "data-file" data_file: Option<BlockdevRef>,
        /// The data file is a raw image of the disk at all times.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Sub-clusters.
        "extended-l2" extended_l2: Option<bool>,
        /// Size of the disk in bytes.
        size: u64,
        /// Version of the format (default: v3).
        version: Option<BlockdevQcow2Version>,
        /// The backing file's name.
        "backing-file" backing_file: Option<String>,
        /// The backing file's format.
        "backing-fmt" backing_fmt: Option<String>,
        /// How it is encrypted.
        encrypt: Option<QCryptoBlockCreateOptions>,
        /// Bytes of a cluster (default: 65536).
        "cluster-size" cluster_size: Option<u64>,
        /// Whether its space is made, too (default: off).
        preallocation: Option<PreallocMode>,
        /// Write refcounts late.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// Bits of a refcount (default: 16).
        "refcount-bits" refcount_bits: Option<i64>,
        /// How clusters are compressed (default: zlib).
        "compression-type" compression: Option<Qcow2CompressionType>,
    }
}

wire_union! {
    /// An image to make.
    pub struct BlockdevCreateOptions {}
    /// Its driver.
    "driver" => pub enum BlockdevCreateDriver as driver {
        /// A file.
        "file" File(BlockdevCreateOptionsFile),
        /// QEMU's image format.
        "qcow2" Qcow2(Box<BlockdevCreateOptionsQcow2>),
        /// Cannot be made.
        "blkdebug" Blkdebug(Empty),
        /// Cannot be made.
        "blkverify" Blkverify(Empty),
        /// Cannot be made.
        "copy-on-read" CopyOnRead(Empty),
        /// Cannot be made.
        "host_device" HostDevice(Empty),
        /// Cannot be made.
        "nbd" Nbd(Empty),
        /// Cannot be made.
        "null-aio" NullAio(Empty),
        /// Cannot be made.
        "null-co" NullCo(Empty),
        /// Cannot be made.
        "quorum" Quorum(Empty),
        /// Cannot be made: a file is one.
        "raw" Raw(Empty),
        /// Cannot be made.
        "throttle" Throttle(Empty),
    }
}

fn blockdev_create(cx: &mut Cx, job_id: String, options: BlockdevCreateOptions) -> Result<()> {
    if !matches!(options.driver, BlockdevCreateDriver::File(_) | BlockdevCreateDriver::Qcow2(_)) {
        bail!("Driver does not support blockdev-create");
    }
    cx.vm.jobs.check_id(&job_id)?;
    let new = match options.driver {
        BlockdevCreateDriver::File(o) => new_file(cx, &o),
        BlockdevCreateDriver::Qcow2(o) => new_qcow2(cx, *o),
        // Refused above.
        _ => Err(Error::new("Driver does not support blockdev-create")),
    };
    let vm = &mut *cx.vm;
    let spec = Spec { auto_dismiss: false, ..Spec::new(job_id, Kind::Create) };
    let job = vm.jobs.create(spec, &vm.events.clone(), &[], || Ok(Box::new(Create::new(new))))?;
    vm.jobs.start(&mut vm.graph, job);
    Ok(())
}

/// A handle on a node that an image is to be made in. A node that is defined here is open as long as
/// the handle is attached.
fn target(cx: &mut Cx, file: BlockdevRef, shares: Perm) -> Result<Arc<Handle>> {
    let graph = &mut cx.vm.graph;
    let node = match file {
        BlockdevRef::Reference(name) => {
            let drive = cx.vm.drives.find(&name).and_then(|d| d.handle.node());
            let lost = || Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"));
            drive.or_else(|| graph.find(&name).cloned()).ok_or_else(lost)?
        }
        BlockdevRef::Definition(options) => {
            open::open(graph, &Formats::new(&mut cx.vm.fds, &cx.vm.objects), formats::plan(*options)?)?
        }
    };
    let spec = HandleSpec { uses: Perm::WRITE | Perm::RESIZE, shares, ..HandleSpec::default() };
    let handle = graph.attach(Some(node), spec);
    if handle.is_err() {
        graph.collect();
    }
    handle
}

/// Device and inode number of the file below filters and `raw`.
fn bottom(handle: &Handle) -> Option<(u64, u64)> {
    let mut node = handle.node()?;
    loop {
        match (node.driver.file_id(), node.driver.edges().first().and_then(|e| e.node())) {
            (None, Some(below)) => node = below,
            (id, _) => return id,
        }
    }
}

fn new_file(cx: &mut Cx, o: &BlockdevCreateOptionsFile) -> Result<New> {
    let extent_size_hint = o.extent_size_hint.map(u32::try_from).transpose();
    let extent_size_hint = extent_size_hint.map_err(|_| Error::new("Extent size hint is too large"))?;
    let preallocation = match o.preallocation {
        Some(PreallocMode::Metadata) => bail!("Unsupported preallocation mode: metadata"),
        mode => preallocation(mode),
    };
    let path = &o.filename;
    let touched =
        touch(path).map_err(|e| Error::new(format!("Could not create '{path}': {}", strerror(&e))))?;
    let attributes =
        touched.map(|file| Attributes { file, nocow: o.nocow.unwrap_or(false), extent_size_hint });
    let options = serde_json::json!({ "driver": "file", "filename": o.filename });
    let options = <formats::BlockdevOptions as crate::qapi::Wire>::take(options, &crate::qapi::Path::Root)?;
    debug_assert!(matches!(options.driver, BlockdevDriver::File(_)));
    let file = target(cx, BlockdevRef::Definition(Box::new(options)), !Perm::RESIZE)?;
    Ok(New::File { file, size: o.size, preallocation, attributes })
}

fn new_qcow2(cx: &mut Cx, o: BlockdevCreateOptionsQcow2) -> Result<New> {
    if let Some(format) = &o.backing_fmt
        && !BlockdevDriver::WORDS.contains(&format.as_str())
    {
        bail!("Parameter 'backing-fmt' does not accept value '{format}'");
    }
    let default = CreateOptions::default();
    let mut options = CreateOptions {
        size: o.size,
        version: if o.version == Some(BlockdevQcow2Version::V2) { 2 } else { 3 },
        cluster_size: o.cluster_size.unwrap_or(default.cluster_size),
        refcount_bits: match o.refcount_bits {
            Some(bits) => u32::try_from(bits).unwrap_or(0),
            None => default.refcount_bits,
        },
        backing_file: o.backing_file,
        backing_format: o.backing_fmt,
        lazy_refcounts: o.lazy_refcounts.unwrap_or(false),
        extended_l2: o.extended_l2.unwrap_or(false),
        compression: match o.compression {
            Some(Qcow2CompressionType::Zstd) => Compression::Zstd,
            _ => Compression::Zlib,
        },
        data_file: None,
        data_file_raw: o.data_file_raw.unwrap_or(false),
        preallocation: preallocation(o.preallocation),
        encrypt: o.encrypt.map(|e| e.resolve(&cx.vm.objects)).transpose()?,
    };
    let file = target(cx, o.file, Perm::ALL)?;
    let data_file = match o.data_file.map(|d| target(cx, d, Perm::ALL)).transpose() {
        Ok(data) => data,
        Err(e) => {
            cx.vm.graph.detach(&file);
            return Err(e);
        }
    };
    let same = |data: &Arc<Handle>| bottom(data).is_some_and(|id| bottom(&file) == Some(id));
    if let Some(data) = data_file.as_ref().filter(|data| same(data)) {
        // Tables and data in the same place.
        cx.vm.graph.detach(data);
        cx.vm.graph.detach(&file);
        bail!("Failed to get shared \"resize\" lock");
    }
    options.data_file = data_file.as_ref().and_then(|h| h.node()).map(|n| n.driver.filename());
    Ok(New::Qcow2 { file, data_file, options: Box::new(options) })
}

fn preallocation(mode: Option<PreallocMode>) -> Preallocation {
    match mode {
        None | Some(PreallocMode::Off) => Preallocation::Off,
        Some(PreallocMode::Metadata) => Preallocation::Metadata,
        Some(PreallocMode::Falloc) => Preallocation::Falloc,
        Some(PreallocMode::Full) => Preallocation::Full,
    }
}
