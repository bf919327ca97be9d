//! `-drive`: its options, and what they mean as `blockdev-add`'s and `device_add`'s.
//!
//! Owns: the translation, the default names. Never: opens anything itself, knows a format. Threads:
//! control. Locks: none.

use super::drive_limits::DriveLimits;
use super::formats::{BlockdevDetectZeroesOptions, BlockdevDiscardOptions, BlockdevOptions, Formats, plan};
use super::json_name;
use super::vm::Vm;
use crate::bail;
use crate::block::filter_copy_on_read;
use crate::block::graph::Graph;
use crate::block::handle::{HandleSpec, OnError};
use crate::block::node::{Node, NodeOptions};
use crate::block::open;
use crate::error::{Error, Result, strerror};
use crate::nbd::uri;
use crate::qapi::{Path, Rest, Wire};
use crate::qcow2::create::{CreateOptions, create};
use crate::{wire_enum, wire_struct};
use serde_json::{Map, Value, json};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

wire_enum! {
    /// How the guest reaches a drive.
    pub enum BlockInterfaceType {
        /// By a virtio-blk-pci of its own.
        "virtio" Virtio,
        /// By a `[[device]]` that names it, or not at all.
        "none" None,
    }
}

wire_enum! {
    /// What a drive is.
    pub enum DriveMedia {
        /// A disk.
        "disk" Disk,
        /// A CD or DVD.
        "cdrom" Cdrom,
    }
}

wire_enum! {
    /// How writes are cached (`cache`): QEMU's five modes.
    pub enum CacheMode {
        /// In the host's page cache; durable when the guest flushes.
        "writeback" Writeback,
        /// Past the host's page cache (O_DIRECT); durable when the guest flushes.
        "none" None,
        /// The same.
        "off" Off,
        /// In the host's page cache, and durable when the write is done.
        "writethrough" Writethrough,
        /// Past the host's page cache, and durable when the write is done.
        "directsync" Directsync,
        /// In the host's page cache; flushes are ignored.
        "unsafe" Unsafe,
    }
}

wire_enum! {
    /// What is done about a failed read.
    pub enum ReadErrorAction {
        /// As `report`.
        "auto" Auto,
        /// The guest is told.
        "report" Report,
        /// The guest is told that all is well.
        "ignore" Ignore,
        /// The VM stops, and tries again after `cont`.
        "stop" Stop,
    }
}

wire_enum! {
    /// What is done about a failed write.
    pub enum WriteErrorAction {
        /// As `enospc`.
        "auto" Auto,
        /// The guest is told.
        "report" Report,
        /// The guest is told that all is well.
        "ignore" Ignore,
        /// The VM stops, and tries again after `cont`.
        "stop" Stop,
        /// The VM stops when there is no space left; the guest is told of other errors.
        "enospc" Enospc,
    }
}

wire_struct! {
    /// A drive.
    pub struct DriveOptions {
        /// Its legacy name; by default interface and number: `virtio0`, `none0`, …
        id: Option<String>,
        /// How the guest reaches it; `virtio` by default.
        "if" interface: Option<BlockInterfaceType>,
        /// The image's path (or, in a table, its options); absent: no medium.
        file: Option<Value>,
        /// The image's format. Needed with `file`: images are not probed, because a guest that can
        /// write the first bytes of a raw disk could choose its format.
        format: Option<String>,
        /// What it is: a `cdrom` is only read.
        media: Option<DriveMedia>,
        /// Old name of `format`.
        driver: Option<String>,
        /// The node's name; automatic by default.
        "node-name" node_name: Option<String>,
        /// Refuse writes.
        "read-only" read_only: Option<bool>,
        /// How writes are cached; `writeback` by default.
        cache: Option<CacheMode>,
        /// Whether the guest's discards reach the image.
        discard: Option<BlockdevDiscardOptions>,
        /// What becomes of a write of zeroes.
        "detect-zeroes" detect_zeroes: Option<BlockdevDetectZeroesOptions>,
        /// What is done about a failed write; `enospc` by default.
        werror: Option<WriteErrorAction>,
        /// What is done about a failed read; `report` by default.
        rerror: Option<ReadErrorAction>,
        /// Writes go to a temporary image and are forgotten at the end.
        snapshot: Option<bool>,
        /// What has to be read from a backing file is written into the image.
        "copy-on-read" copy_on_read: Option<bool>,
        /// Any other member of `blockdev-add`.
        rest: Rest,
    }
}

impl DriveOptions {
    fn is_read_only(&self) -> bool {
        self.read_only.unwrap_or(self.media == Some(DriveMedia::Cdrom))
    }

    /// The arguments of a `blockdev-add`; None for a drive without a medium.
    fn blockdev(&mut self) -> Result<Option<Map<String, Value>>> {
        let mut node = std::mem::take(&mut self.rest.0);
        let mut format = match (self.format.take(), self.driver.take()) {
            (Some(_), Some(_)) => bail!("Cannot specify both 'driver' and 'format'"),
            (format, driver) => format.or(driver),
        };
        let file = match self.file.take() {
            None if format.is_none() => {
                if let Some(name) = node.keys().next() {
                    bail!("Parameter '{name}' is unexpected");
                }
                return Ok(None);
            }
            None => None,
            Some(Value::String(name)) => {
                let own = named(&name)?;
                // A json: name has the options of the drive's node itself; what is given beside them
                // counts for more. (One of a protocol, with another format, is that format's file.)
                let whole = name.starts_with("json:") && own.get("file").is_some();
                if let (true, Value::Object(own)) = (whole, &own) {
                    let driver = own.get("driver").and_then(Value::as_str).map(String::from);
                    format = format.or(driver);
                    own.iter().for_each(|(k, v)| {
                        node.entry(k).or_insert_with(|| v.clone());
                    });
                    None
                } else {
                    Some(own)
                }
            }
            Some(table @ Value::Object(_)) => Some(table),
            Some(_) => bail!("Invalid parameter type for 'file', expected: string"),
        };
        let Some(format) = format else {
            bail!(
                "Parameter 'format' is missing: 'raw', 'qcow2', … (images are not probed: a guest could \
                 write another format's header into a raw disk)"
            );
        };
        node.insert("driver".into(), format.into());
        if let Some(file) = file {
            node.insert("file".into(), file);
        }
        if let Some(name) = self.node_name.take() {
            node.insert("node-name".into(), name.into());
        }
        node.insert("read-only".into(), self.is_read_only().into());
        node.entry("auto-read-only").or_insert(true.into());
        if let Some(discard) = self.discard {
            node.insert("discard".into(), discard.give());
        }
        if let Some(detect) = self.detect_zeroes {
            node.insert("detect-zeroes".into(), detect.give());
        }
        let (direct, no_flush) = match self.cache.unwrap_or(CacheMode::Writeback) {
            CacheMode::Writeback | CacheMode::Writethrough => (false, false),
            CacheMode::None | CacheMode::Off | CacheMode::Directsync => (true, false),
            CacheMode::Unsafe => (false, true),
        };
        node.insert("cache".into(), json!({ "direct": direct, "no-flush": no_flush }));
        Ok(Some(node))
    }
}

/// The node that QEMU takes for a file name: `json:{…}` is its options, `file:` may stand before a
/// path, and a block device is one; `blkdebug:RULES:FILE` and `blkverify:RAW:FILE` are for tests.
pub fn named(name: &str) -> Result<Value> {
    if let Some(text) = name.strip_prefix("json:") {
        return match serde_json::from_str(text) {
            Ok(options @ Value::Object(_)) => json_name::nested(options),
            Ok(_) => Err(Error::new("Invalid JSON object given")),
            Err(e) => Err(Error::new(format!("Could not parse the JSON options: {e}"))),
        };
    }
    let path = match name.split_once(':') {
        Some(("file", path)) => path,
        Some(("blkdebug", rest)) => {
            let Some((config, image)) = rest.split_once(':') else {
                bail!("blkdebug requires both config file and image path");
            };
            let mut node = json!({ "driver": "blkdebug", "image": named(image)? });
            if !config.is_empty() {
                node["config"] = config.into();
            }
            return Ok(node);
        }
        Some(("blkverify", rest)) => {
            let Some((raw, test)) = rest.split_once(':') else {
                bail!("blkverify requires raw copy and original image path");
            };
            return Ok(json!({ "driver": "blkverify", "raw": named(raw)?, "test": named(test)? }));
        }
        Some((driver @ ("null-co" | "null-aio"), rest)) => {
            if rest != "//" {
                bail!("The only allowed filename for this driver is '{driver}://'");
            }
            return Ok(json!({ "driver": driver }));
        }
        Some((protocol, _)) if uri::PROTOCOLS.contains(&protocol) => {
            let place = uri::Location::parse(name)?;
            return Ok(json!({ "driver": "nbd", "server": place.server.give(), "export": place.export }));
        }
        Some((protocol, _)) if !protocol.contains('/') => bail!("Unknown protocol '{protocol}'"),
        _ => name,
    };
    let driver = match std::fs::metadata(path) {
        Ok(m) if m.file_type().is_block_device() => "host_device",
        _ => "file",
    };
    Ok(json!({ "driver": driver, "filename": path }))
}

/// A file without a name, for what is written to a drive with `snapshot`.
fn temporary() -> Result<std::fs::File> {
    let dir = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let mut how = std::fs::OpenOptions::new();
    how.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    how.open(&dir).map_err(|e| {
        let why = strerror(&e);
        Error::new(format!("Could not create a temporary file in '{}': {why} (set TMPDIR)", dir.display()))
    })
}

impl Vm {
    /// The options of a temporary qcow2 image over the image that `base` describes, which is only
    /// read from now on.
    fn throwaway(&mut self, mut base: Map<String, Value>) -> Result<Map<String, Value>> {
        base.insert("read-only".into(), true.into());
        let mut graph = Graph::new();
        let mut open = |graph: &mut Graph, args: &Map<String, Value>| {
            let plan = plan(BlockdevOptions::take(Value::Object(args.clone()), &Path::Root)?)?;
            open::add(graph, &Formats::new(&mut self.fds, &self.objects), plan)
        };
        let size = open(&mut graph, &base)?.len();
        let file = temporary()?;
        // The name leads to the file for as long as it is open here, and the node has its own
        // descriptor then.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        let below = json!({ "driver": "file", "filename": name, "node-name": "temporary" });
        let node = open(&mut graph, below.as_object().unwrap_or(&Map::new()))?;
        let made = create(&node, None, &CreateOptions { size, ..CreateOptions::default() });
        drop(node);
        graph.close_all();
        made.map_err(|e| Error::new(format!("Could not create a temporary image: {}", strerror(&e))))?;
        self.temporary.push(file);
        let cache = json!({ "direct": false, "no-flush": true });
        let file = json!({ "driver": "file", "filename": name });
        let over = json!({ "driver": "qcow2", "file": file, "backing": base, "cache": cache,
                           "discard": "unmap" });
        Ok(over.as_object().cloned().unwrap_or_default())
    }

    /// A filter above a drive's node that its user is not told of.
    fn copy_on_read(&mut self, node: Arc<Node>) -> Result<Arc<Node>> {
        if node.read_only() {
            log::warn!("disabling copy-on-read on read-only drive");
            return Ok(node);
        }
        let options = NodeOptions { implicit: true, unmap: true, ..node.options() };
        let done = filter_copy_on_read::above(&node).and_then(|driver| {
            let filter = Node::new(self.graph.auto_name(), driver, options);
            self.graph.insert_filter(&filter, &node)?;
            Ok(filter)
        });
        done.inspect_err(|_| self.graph.collect())
    }

    /// Makes the drive that `args` (those of `-drive`) describe, and its device if it has one by
    /// itself.
    pub fn add_drive(&mut self, args: Map<String, Value>) -> Result<()> {
        let mut options = DriveOptions::take(Value::Object(args), &Path::Root)?;
        let limits = DriveLimits::take(&mut options.rest.0)?;
        let interface = options.interface.unwrap_or(BlockInterfaceType::Virtio);
        let (word, count) = match interface {
            BlockInterfaceType::Virtio => ("virtio", &mut self.drive_numbers.0),
            BlockInterfaceType::None => ("none", &mut self.drive_numbers.1),
        };
        let number = std::mem::replace(count, *count + 1);
        let id = options.id.take().unwrap_or_else(|| format!("{word}{number}"));
        let write_cache = !matches!(options.cache, Some(CacheMode::Writethrough | CacheMode::Directsync));
        let spec = HandleSpec {
            name: id.clone(),
            write_cache,
            rerror: match options.rerror.unwrap_or(ReadErrorAction::Auto) {
                ReadErrorAction::Auto => OnError::Auto,
                ReadErrorAction::Report => OnError::Report,
                ReadErrorAction::Ignore => OnError::Ignore,
                ReadErrorAction::Stop => OnError::Stop,
            },
            werror: match options.werror.unwrap_or(WriteErrorAction::Auto) {
                WriteErrorAction::Auto => OnError::Auto,
                WriteErrorAction::Report => OnError::Report,
                WriteErrorAction::Ignore => OnError::Ignore,
                WriteErrorAction::Stop => OnError::Stop,
                WriteErrorAction::Enospc => OnError::Enospc,
            },
            ..HandleSpec::default()
        };
        let node = match options.blockdev()? {
            None if interface == BlockInterfaceType::Virtio => {
                bail!("Device needs media, but drive is empty");
            }
            None => None,
            Some(args) => {
                let args = if options.snapshot == Some(true) { self.throwaway(args)? } else { args };
                let plan = plan(BlockdevOptions::take(Value::Object(args), &Path::Root)?)?;
                let node = open::open(&mut self.graph, &Formats::new(&mut self.fds, &self.objects), plan)?;
                Some(match options.copy_on_read {
                    Some(true) => self.copy_on_read(node)?,
                    _ => node,
                })
            }
        };
        let automatic = interface == BlockInterfaceType::Virtio;
        let handle = self.drives.add(&mut self.graph, node, spec, automatic)?;
        limits.apply(&handle, |name| {
            self.objects.throttle_group(name).or_else(|| self.graph.find_throttle_group(name))
        });
        if let Some(drive) = self.drives.find_mut(&id) {
            drive.read_only = options.is_read_only();
        }
        if automatic {
            let args = json!({ "driver": "virtio-blk-pci", "drive": id });
            self.add_device(args.as_object().unwrap_or(&Map::new()), false)?;
        }
        Ok(())
    }
}
