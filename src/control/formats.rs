//! The block drivers: the options of each as `blockdev-add` takes them, and how to open it.
//!
//! A new driver is a file with an [`Open`], and a row here. Owns: the table. Never: guests, QMP's
//! connections. Threads: control. Locks: none.

use super::drive_options::named;
use super::encrypt_options::BlockdevQcow2Encryption;
use super::json_name;
use super::objects::Objects;
use crate::bail;
use crate::block::blkdebug::{BlkdebugOptions, BlkdebugPlan};
use crate::block::blkverify::BlkverifyPlan;
use crate::block::file_open::{BlockdevOptionsFile, FilePlan};
use crate::block::filter_compress::CompressPlan;
use crate::block::filter_copy_on_read::CopyOnReadPlan;
use crate::block::filter_preallocate::PreallocatePlan;
use crate::block::filter_throttle::ThrottlePlan;
use crate::block::node::DetectZeroes;
use crate::block::null::{BlockdevOptionsNull, NullPlan};
use crate::block::open::{Backing, Child, Common, Env, Open, PassedFd, Plan};
use crate::block::quorum::{QuorumPlan, QuorumReadPattern};
use crate::block::raw::RawPlan;
use crate::block::reopen_options::{Wanted, WantedChild};
use crate::block::throttle::Group;
use crate::error::{Error, Result};
use crate::nbd::driver::{BlockdevOptionsNbd, NbdPlan};
use crate::nbd::uri;
use crate::qapi::{self, Flat, Null, Object, Rest, Wire};
use crate::qcow2::{self, plan::Qcow2Plan};
use crate::sys::fdset::FdSets;
use crate::{wire_alternate, wire_enum, wire_struct, wire_union};
use serde_json::Value;
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

wire_enum! {
    /// What becomes of a discard request.
    pub enum BlockdevDiscardOptions {
        /// Nothing.
        "ignore" Ignore,
        /// It is passed on.
        "unmap" Unmap,
    }
}

wire_enum! {
    /// What becomes of a write of zeroes.
    pub enum BlockdevDetectZeroesOptions {
        /// It is a write.
        "off" Off,
        /// It is a write-zeroes request.
        "on" On,
        /// It is a write-zeroes request that may give the space back; needs `discard` `unmap`.
        "unmap" Unmap,
    }
}

wire_struct! {
    /// How the host's cache is used.
    pub struct BlockdevCacheOptions {
        /// Bypass the host's page cache (O_DIRECT).
        direct: Option<bool>,
        /// Ignore flushes: fast, and the image is lost in a crash of the host.
        "no-flush" no_flush: Option<bool>,
        /// False: follow each write with a flush. (Until QEMU 2.9; a device's `write-cache` is
        /// the newer way.)
        writeback: Option<bool>,
    }
}

wire_union! {
    /// A node of the block graph.
    pub struct BlockdevOptions {}
    /// Its driver.
    "driver" => pub enum BlockdevDriver as driver {
        /// Injects errors: for tests.
        "blkdebug" Blkdebug(Box<BlockdevOptionsBlkdebug>),
        /// Compares what two nodes do: for tests.
        "blkverify" Blkverify(Box<BlockdevOptionsBlkverify>),
        /// A regular file.
        "file" File(BlockdevOptionsFile),
        /// A block device of the host.
        "host_device" HostDevice(BlockdevOptionsFile),
        /// A disk on an NBD server.
        "nbd" Nbd(Box<BlockdevOptionsNbd>),
        /// No storage: writes are forgotten.
        "null-aio" NullAio(BlockdevOptionsNull),
        /// No storage: writes are forgotten.
        "null-co" NullCo(BlockdevOptionsNull),
        /// Everything that is written is stored compressed.
        "compress" Compress(BlockdevOptionsGenericFormat),
        /// What has to be read from a backing file is written into the image.
        "copy-on-read" CopyOnRead(BlockdevOptionsCor),
        /// A growing file grows in large steps.
        "preallocate" Preallocate(BlockdevOptionsPreallocate),
        /// QEMU's image format.
        "qcow2" Qcow2(Box<BlockdevOptionsQcow2>),
        /// Several nodes that hold the same, and vote.
        "quorum" Quorum(Box<BlockdevOptionsQuorum>),
        /// Bytes as they are.
        "raw" Raw(Box<BlockdevOptionsRaw>),
        /// Keeps to the limits of a group.
        "throttle" Throttle(BlockdevOptionsThrottle),
    }
    .. {
        /// Its name. Needed for the outermost node of a command if it is a protocol; a format
        /// without one gets a name of its own, as inner nodes do.
        "node-name" node_name: Option<String>,
        /// Whether discard requests are passed on; by default they are not.
        discard: Option<BlockdevDiscardOptions>,
        /// How the host's cache is used.
        cache: Option<BlockdevCacheOptions>,
        /// Refuse writes.
        "read-only" read_only: Option<bool>,
        /// Open it read-only if it cannot be opened for writing.
        "auto-read-only" auto_read_only: Option<bool>,
        /// Take no locks; only for read-only nodes.
        "force-share" force_share: Option<bool>,
        /// What becomes of a write of zeroes.
        "detect-zeroes" detect_zeroes: Option<BlockdevDetectZeroesOptions>,
    }
}

wire_alternate! {
    /// A node: defined here, or the name of one that exists.
    pub enum BlockdevRef {
        /// Opened with the node that it belongs to.
        Definition(Box<BlockdevOptions>),
        /// Exists already.
        Reference(String),
    }
}

wire_alternate! {
    /// A node, or none.
    pub enum BlockdevRefOrNull {
        /// Opened with the node that it belongs to.
        Definition(Box<BlockdevOptions>),
        /// Exists already; "" is none.
        Reference(String),
        /// None.
        Null(Null),
    }
}

wire_struct! {
    /// Options of every format.
    pub struct BlockdevOptionsGenericFormat {
        /// What has the image's bytes.
        file: BlockdevRef,
    }
}

wire_struct! {
    /// Options of formats with backing files.
    pub struct BlockdevOptionsGenericCOWFormat {
        /// What has the image's bytes.
        file: BlockdevRef,
        /// The backing file; absent: what the image names; null: none.
        backing: Option<BlockdevRefOrNull>,
    }
}

wire_struct! {
    /// Options of the driver `blkdebug`.
    pub struct BlockdevOptionsBlkdebug {
        /// What has the bytes.
        image: BlockdevRef,
        /// The rules.
        base: Flat<BlkdebugOptions>,
    }
}

wire_struct! {
    /// Options of the driver `blkverify`.
    pub struct BlockdevOptionsBlkverify {
        /// What is tested.
        test: BlockdevRef,
        /// What is right.
        raw: BlockdevRef,
    }
}

wire_struct! {
    /// Options of the driver `quorum`.
    pub struct BlockdevOptionsQuorum {
        /// True: there are two children, and a difference is an error that is logged.
        blkverify: Option<bool>,
        /// The children.
        children: Vec<BlockdevRef>,
        /// How many children must agree in a read, or do a write.
        "vote-threshold" vote_threshold: i64,
        /// Children that are outvoted are overwritten with the answer (default: no).
        "rewrite-corrupted" rewrite_corrupted: Option<bool>,
        /// How the children are read (default: quorum).
        "read-pattern" read_pattern: Option<QuorumReadPattern>,
    }
}

wire_struct! {
    /// Options of the driver `raw`.
    pub struct BlockdevOptionsRaw {
        /// What has the bytes.
        base: Flat<BlockdevOptionsGenericFormat>,
        /// Where the disk begins, in bytes.
        offset: Option<i64>,
        /// How long it is, in bytes; absent: up to the end.
        size: Option<i64>,
    }
}

wire_struct! {
    /// Options of the driver `copy-on-read`.
    pub struct BlockdevOptionsCor {
        /// What is filtered.
        base: Flat<BlockdevOptionsGenericFormat>,
        /// The lowest backing file that data are copied from; absent: all.
        bottom: Option<String>,
    }
}

wire_struct! {
    /// Options of the driver `preallocate`.
    pub struct BlockdevOptionsPreallocate {
        /// What is filtered.
        base: Flat<BlockdevOptionsGenericFormat>,
        /// What the file's length is made a multiple of (default: 1 MiB).
        "prealloc-align" prealloc_align: Option<i64>,
        /// How many bytes are allocated beyond what is written (default: 128 MiB).
        "prealloc-size" prealloc_size: Option<i64>,
    }
}

wire_struct! {
    /// Options of the driver `throttle`.
    pub struct BlockdevOptionsThrottle {
        /// The group's name.
        "throttle-group" throttle_group: String,
        /// What is filtered.
        file: BlockdevRef,
    }
}

wire_struct! {
    /// Options of the driver `qcow2`.
    pub struct BlockdevOptionsQcow2 {
        /// What has the image's bytes, and the backing file.
        base: Flat<BlockdevOptionsGenericCOWFormat>,
        /// Whether space that the guest discards goes back to the file system (default: yes).
        "pass-discard-request" pass_discard_request: Option<bool>,
        /// How to get at the data of an encrypted image.
        encrypt: Option<BlockdevQcow2Encryption>,
        /// Bytes of both metadata caches together.
        "cache-size" cache_size: Option<i64>,
        /// Bytes of the cache for L2 tables (default: enough for the disk, at most 32 MiB).
        "l2-cache-size" l2_cache_size: Option<i64>,
        /// Unit of that cache; it never uses larger ones than 4 KiB.
        "l2-cache-entry-size" l2_cache_entry_size: Option<i64>,
        /// Bytes of the cache for refcount blocks.
        "refcount-cache-size" refcount_cache_size: Option<i64>,
        /// Seconds after which unused pages of the caches are given up (default: 600; 0: never).
        "cache-clean-interval" cache_clean_interval: Option<i64>,
        /// The external data file; absent: the one that the image names.
        "data-file" data_file: Option<BlockdevRef>,
    }
}

fn child(r: BlockdevRef) -> Result<Child> {
    Ok(match r {
        BlockdevRef::Definition(options) => Child::New(Box::new(plan(*options)?)),
        BlockdevRef::Reference(name) => Child::Node(name),
    })
}

/// What a `backing` member says.
pub fn backing(r: Option<BlockdevRefOrNull>) -> Result<Backing> {
    Ok(match r {
        None => Backing::FromImage,
        Some(BlockdevRefOrNull::Null(_)) => Backing::Nothing,
        Some(BlockdevRefOrNull::Reference(name)) if name.is_empty() => Backing::Nothing,
        Some(BlockdevRefOrNull::Reference(name)) => Backing::Child(Child::Node(name)),
        Some(BlockdevRefOrNull::Definition(options)) => Backing::Child(Child::New(Box::new(plan(*options)?))),
    })
}

fn bytes(name: &str, n: Option<i64>) -> Result<Option<u64>> {
    let bad = |n| Error::new(format!("Value '{n}' is out of range for parameter '{name}'"));
    n.map(|n| u64::try_from(n).map_err(|_| bad(n))).transpose()
}

/// From `blockdev-add`'s arguments to what `block/open.rs` opens.
pub fn plan(options: BlockdevOptions) -> Result<Plan> {
    let common = CommonOptions {
        node_name: options.node_name,
        discard: options.discard,
        cache: options.cache,
        read_only: options.read_only,
        auto_read_only: options.auto_read_only,
        force_share: options.force_share,
        detect_zeroes: options.detect_zeroes,
        rest: Rest::default(),
    };
    let common = common.common();
    let name = options.driver.word();
    let driver: Box<dyn Open> = match options.driver {
        BlockdevDriver::Blkdebug(o) => Box::new(BlkdebugPlan { image: child(o.image)?, options: o.base.0 }),
        BlockdevDriver::File(options) | BlockdevDriver::HostDevice(options) => {
            Box::new(FilePlan { name, options })
        }
        BlockdevDriver::Nbd(options) => Box::new(NbdPlan::Options(options)),
        BlockdevDriver::NullAio(options) | BlockdevDriver::NullCo(options) => {
            Box::new(NullPlan { name, options })
        }
        BlockdevDriver::Qcow2(o) => Box::new(Qcow2Plan {
            file: child(o.base.0.file)?,
            backing: backing(o.base.0.backing)?,
            data_file: o.data_file.map(child).transpose()?,
            encrypt: o.encrypt.map(BlockdevQcow2Encryption::method),
            options: qcow2::open::Options {
                cache_size: bytes("cache-size", o.cache_size)?,
                l2_cache_size: bytes("l2-cache-size", o.l2_cache_size)?,
                l2_cache_entry_size: bytes("l2-cache-entry-size", o.l2_cache_entry_size)?,
                refcount_cache_size: bytes("refcount-cache-size", o.refcount_cache_size)?,
                cache_clean_interval: bytes("cache-clean-interval", o.cache_clean_interval)?,
                pass_discard_request: o.pass_discard_request,
                ..Default::default()
            },
        }),
        BlockdevDriver::Compress(o) => Box::new(CompressPlan { file: child(o.file)? }),
        BlockdevDriver::CopyOnRead(o) => {
            Box::new(CopyOnReadPlan { file: child(o.base.0.file)?, bottom: o.bottom })
        }
        BlockdevDriver::Preallocate(o) => Box::new(PreallocatePlan {
            file: child(o.base.0.file)?,
            align: bytes("prealloc-align", o.prealloc_align)?,
            size: bytes("prealloc-size", o.prealloc_size)?,
        }),
        BlockdevDriver::Throttle(o) => {
            Box::new(ThrottlePlan { file: child(o.file)?, group: o.throttle_group })
        }
        BlockdevDriver::Blkverify(o) => Box::new(BlkverifyPlan { raw: child(o.raw)?, test: child(o.test)? }),
        BlockdevDriver::Quorum(o) => Box::new(QuorumPlan {
            children: o.children.into_iter().map(child).collect::<Result<_>>()?,
            threshold: o.vote_threshold,
            blkverify: o.blkverify,
            rewrite_corrupted: o.rewrite_corrupted,
            read_pattern: o.read_pattern,
        }),
        BlockdevDriver::Raw(o) => Box::new(RawPlan {
            file: child(o.base.0.file)?,
            offset: bytes("offset", o.offset)?,
            size: bytes("size", o.size)?,
        }),
    };
    Ok(Plan { common, driver })
}

wire_struct! {
    /// The options that every node has, beside its driver's.
    struct CommonOptions {
        /// Its name.
        "node-name" node_name: Option<String>,
        /// As in [`BlockdevOptions`].
        discard: Option<BlockdevDiscardOptions>,
        /// As there.
        cache: Option<BlockdevCacheOptions>,
        /// As there.
        "read-only" read_only: Option<bool>,
        /// As there.
        "auto-read-only" auto_read_only: Option<bool>,
        /// As there.
        "force-share" force_share: Option<bool>,
        /// As there.
        "detect-zeroes" detect_zeroes: Option<BlockdevDetectZeroesOptions>,
        /// The driver, and what it has of its own.
        rest: Rest,
    }
}

impl CommonOptions {
    fn common(self) -> Common {
        Common {
            node_name: self.node_name,
            unmap: self.discard.map(|d| d == BlockdevDiscardOptions::Unmap),
            direct: self.cache.as_ref().and_then(|c| c.direct),
            no_flush: self.cache.as_ref().and_then(|c| c.no_flush),
            writeback: self.cache.as_ref().and_then(|c| c.writeback),
            read_only: self.read_only,
            auto_read_only: self.auto_read_only,
            force_share: self.force_share,
            detect_zeroes: self.detect_zeroes.map(|d| match d {
                BlockdevDetectZeroesOptions::Off => DetectZeroes::Off,
                BlockdevDetectZeroesOptions::On => DetectZeroes::On,
                BlockdevDetectZeroesOptions::Unmap => DetectZeroes::Unmap,
            }),
        }
    }
}

/// From one entry of `blockdev-reopen`'s argument, which is known to be a `BlockdevOptions`, to what
/// `block/reopen_options.rs` does.
pub fn wanted(given: Object) -> Result<Wanted> {
    let common = CommonOptions::take(Value::Object(given.clone()), &qapi::Path::Root)?.common();
    let mut children = Vec::new();
    let mut add = |role: String, value: &Value| {
        match value {
            Value::Object(map) if map.contains_key("driver") => {
                children.push((role, WantedChild::Options(Box::new(wanted(map.clone())?))));
            }
            Value::String(name) if !(role == "backing" && name.is_empty()) => {
                children.push((role, WantedChild::Node(name.clone())));
            }
            Value::String(_) | Value::Null => children.push((role, WantedChild::Nothing)),
            _ => {}
        }
        Ok::<(), Error>(())
    };
    for (role, value) in &given {
        match value {
            Value::Array(list) => {
                list.iter().enumerate().try_for_each(|(n, v)| add(format!("{role}.{n}"), v))?;
            }
            value => add(role.clone(), value)?,
        }
    }
    Ok(Wanted { common, given, children })
}

/// A format that stands on one file: its driver name, and the driver with default options.
struct Layer {
    name: &'static str,
    open: fn(Child) -> Box<dyn Open>,
}

/// The formats that an image header, or `format=`, can name.
static FORMATS: &[Layer] = &[
    Layer { name: "qcow2", open: |file| Box::new(Qcow2Plan::new(file)) },
    Layer { name: "raw", open: |file| Box::new(RawPlan { file, offset: None, size: None }) },
];

/// True for a format that an image header, or `format=`, can name.
pub fn exists(format: &str) -> bool {
    FORMATS.iter().any(|l| l.name == format)
}

/// The formats, the fd sets and the objects, as opening a node needs them.
pub struct Formats<'a> {
    fds: RefCell<&'a mut FdSets>,
    objects: &'a Objects,
    passed: RefCell<Option<&'a mut Passed<'a>>>,
}

/// Gives a descriptor that was passed under a name, for good.
pub type Passed<'a> = dyn FnMut(&str) -> Result<OwnedFd> + 'a;

impl<'a> Formats<'a> {
    /// For one command.
    pub fn new(fds: &'a mut FdSets, objects: &'a Objects) -> Formats<'a> {
        Formats { fds: RefCell::new(fds), objects, passed: RefCell::new(None) }
    }

    /// With descriptors that were passed.
    pub fn with(self, passed: &'a mut Passed<'a>) -> Formats<'a> {
        Formats { passed: RefCell::new(Some(passed)), ..self }
    }
}

impl Env for Formats<'_> {
    fn layer(&self, format: &str, file: Child) -> Option<Plan> {
        let layer = FORMATS.iter().find(|l| l.name == format)?;
        Some(Plan { common: Common::default(), driver: (layer.open)(file) })
    }

    fn parse(&self, options: serde_json::Value) -> Result<Plan> {
        plan(BlockdevOptions::take(json_name::nested(options)?, &qapi::Path::Root)?)
    }

    fn protocol(&self, driver: &str, filename: &str) -> Option<Plan> {
        if uri::PROTOCOLS.contains(&driver) {
            let driver = Box::new(NbdPlan::Name(filename.into()));
            return Some(Plan { common: Common::default(), driver });
        }
        if ["blkdebug", "blkverify", "null-co", "null-aio"].contains(&driver) {
            return named(filename).and_then(|options| self.parse(options)).ok();
        }
        let name = ["file", "host_device"].into_iter().find(|n| *n == driver)?;
        let driver = Box::new(FilePlan::new(name, filename));
        Some(Plan { common: Common::default(), driver })
    }

    fn throttle_group(&self, name: &str) -> Option<Arc<Group>> {
        self.objects.throttle_group(name)
    }

    fn fdset(&self, path: &str, flags: i32) -> Result<PassedFd> {
        let (fd, in_use) = self.fds.borrow_mut().dup(path, flags)?;
        Ok(PassedFd { fd, keep: Some(Box::new(in_use)) })
    }

    fn passed(&self, name: &str) -> Result<OwnedFd> {
        match &mut *self.passed.borrow_mut() {
            Some(passed) => passed(name),
            None => bail!("File descriptor named '{name}' has not been found"),
        }
    }

    fn secret(&self, id: &str) -> Result<Vec<u8>> {
        self.objects.password(id)
    }
}

#[cfg(test)]
#[path = "formats_test.rs"]
mod tests;
