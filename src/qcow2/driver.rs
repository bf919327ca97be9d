//! `impl Driver`: the face of an image towards the block layer.
//!
//! Owns: nothing; each call goes to the file that does it. Threads: as
//! [`Driver`](crate::block::driver::Driver) says.

use super::Qcow2;
use super::bitmap_dir::Stored;
use super::crypt::{Payload, SECTOR};
use super::header;
use super::meta::{Map, Meta};
use super::open::{self, Options};
use crate::block::bitmaps::Bitmaps;
use crate::block::debug::BlkdebugEvent;
use crate::block::driver::{
    Driver, Extent, ExtentKind, Flags, ImageInfo, Internal, Limits, Perm, Preallocation, Snapshot,
    StoredBitmaps,
};
use crate::block::node::Edge;
use crate::block::perm;
use crate::block::reopen_options::{Ready, Reopening};
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Map as Object, Value, json};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Seconds after which unused pages are given up, unless `cache-clean-interval` says otherwise.
const CLEAN_INTERVAL: u64 = 600;

impl Qcow2 {
    pub(super) fn new(
        file: Arc<Edge>,
        backing: Arc<Edge>,
        data_file: Option<Arc<Edge>>,
        size: u64,
        meta: Meta,
        crypt: Option<Payload>,
        options: Options,
    ) -> Qcow2 {
        Qcow2 {
            file,
            backing,
            data_file,
            geo: meta.geo,
            crypt,
            read_only: AtomicBool::new(options.read_only),
            punch: AtomicBool::new(options.pass_discard_request.unwrap_or(true)),
            size: AtomicU64::new(size),
            meta: Mutex::new(meta),
            changed: Condvar::new(),
            flush: Mutex::new(()),
            started: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            users: [AtomicUsize::new(0), AtomicUsize::new(0)],
            awaited: AtomicBool::new(false),
            decompressed: Mutex::new(None),
            bitmaps: Arc::default(),
            bug: options.bug,
            clean_interval: AtomicU64::new(options.cache_clean_interval.unwrap_or(CLEAN_INTERVAL)),
            on_corrupt: options.on_corrupt,
        }
    }

    /// True when nothing may be written, not even what belongs to no request.
    pub(super) fn read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    fn must_be_writable(&self) -> io::Result<()> {
        if self.read_only() { Err(io::Error::from_raw_os_error(libc::EPERM)) } else { Ok(()) }
    }

    /// Writes everything back, and what was freed too. Under exclusive use.
    pub(super) fn drain(&self) -> io::Result<()> {
        // What the first round frees goes out with the second; the third finds nothing.
        for _ in 0..3 {
            self.checkpoint(true)?;
            if self.is_clean() {
                break;
            }
        }
        Ok(())
    }

    /// Writes everything back and gives up what the file is longer than it needs to be: it was
    /// made so to save system calls. Under exclusive use.
    fn trim(&self) -> io::Result<()> {
        self.drain()?;
        let mut meta = self.lock();
        let end = (meta.fresh << meta.geo.cluster_bits).max(meta.opened_len);
        if end < meta.file_len {
            self.file()?.resize(end)?;
            meta.file_len = end;
        }
        Ok(())
    }

    /// Gives up pages that were not used since the last time, if that was long ago.
    fn clean_caches(&self, now: Instant) -> Option<Instant> {
        let interval = match self.clean_interval.load(Ordering::Relaxed) {
            0 => return None,
            seconds => Duration::from_secs(seconds),
        };
        let mut meta = self.lock();
        let due = meta.cleaned.checked_add(interval)?;
        if now < due {
            return Some(due);
        }
        meta.cleaned = now;
        meta.l2.trim();
        meta.refs.trim();
        drop(meta);
        *self.decompressed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        now.checked_add(interval)
    }

    /// True when nothing is left to be written.
    fn is_clean(&self) -> bool {
        let meta = self.lock();
        meta.l2.dirty() + meta.refs.dirty() == 0
            && meta.l1.dirty.is_empty()
            && meta.reftable.dirty.is_empty()
            && !meta.header_dirty
            && meta.freed.is_empty()
            && meta.unreachable.is_empty()
            && meta.grace.is_empty()
    }

    /// Bytes of memory that the metadata caches hold now.
    pub fn cache_bytes(&self) -> usize {
        let meta = self.lock();
        meta.l2.bytes() + meta.refs.bytes()
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn compresses(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            discard_alignment: self.geo.cluster_size() as u32,
            cheap_zeroes: self.geo.v3,
            request_alignment: if self.crypt.is_some() { SECTOR as u32 } else { 1 },
            ..Limits::default()
        }
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        let mut edges = vec![self.file.clone(), self.backing.clone()];
        edges.extend(self.data_file.clone());
        edges
    }

    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        match edge.role.as_str() {
            "backing" => perm::for_backing(above),
            "data-file" => perm::for_data(above),
            _ => perm::for_metadata(above, !self.read_only()),
        }
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.read_at(off, to)
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.must_be_writable()?;
        if flags.contains(Flags::COMPRESSED) {
            return self.write_compressed(off, from);
        }
        self.write_at(off, from)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.must_be_writable()?;
        self.zero_at(off, len, flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.must_be_writable()?;
        self.discard_at(off, len)
    }

    fn populate(&self, off: u64, len: u64, zero: bool) -> io::Result<()> {
        self.must_be_writable()?;
        self.populate_at(off, len, zero)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only() {
            return Ok(());
        }
        self.moment(BlkdebugEvent::FlushToOs);
        self.checkpoint(true)
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let mut meta = self.lock();
        let (map, len) = loop {
            match meta.lookup(off, len) {
                Ok(run) => break run,
                Err(miss) => meta = self.resolve(meta, miss)?,
            }
        };
        let (kind, host_offset) = match map {
            Map::Data(host) => {
                let plain = self.data_file.is_none() && self.crypt.is_none();
                (ExtentKind::Data, Some(host).filter(|_| plain))
            }
            Map::Zero => (ExtentKind::Zero, None),
            Map::Unallocated => (ExtentKind::Unallocated, None),
            Map::Compressed(..) => (ExtentKind::Data, None),
        };
        Ok(Extent { kind, len, host_offset })
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.resize_with(len, Preallocation::Off)
    }

    fn resize_with(&self, len: u64, how: Preallocation) -> io::Result<()> {
        self.must_be_writable()?;
        self.resize_to(len, how)
    }

    fn stored_bitmaps(&self) -> Option<&dyn StoredBitmaps> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<Arc<Bitmaps>> {
        Some(self.bitmaps.clone())
    }

    fn internal(&self) -> Option<&dyn Internal> {
        Some(self)
    }

    fn info(&self) -> ImageInfo {
        let meta = self.lock();
        let h = &meta.header;
        let mut data = Object::new();
        if h.version < 3 {
            data.insert("compat".into(), "0.10".into());
        } else {
            data.insert("compat".into(), "1.1".into());
            if let Some(name) = &h.data_file {
                data.insert("data-file".into(), name.as_str().into());
            }
            if meta.geo.external {
                let raw = h.autoclear & header::AUTOCLEAR_DATA_FILE_RAW != 0;
                data.insert("data-file-raw".into(), raw.into());
            }
            let lazy = h.compatible & header::COMPAT_LAZY_REFCOUNTS != 0;
            data.insert("lazy-refcounts".into(), lazy.into());
            let corrupt = h.incompatible & header::INCOMPAT_CORRUPT != 0;
            data.insert("corrupt".into(), corrupt.into());
            data.insert("extended-l2".into(), meta.geo.extended.into());
        }
        if !meta.stored.is_empty() {
            let flags = |s: &Stored| {
                let all = [(s.in_use, "in-use"), (s.auto, "auto")];
                all.into_iter().filter(|f| f.0).map(|f| f.1).collect::<Vec<_>>()
            };
            let of = |s: &Stored| json!({ "name": s.name, "granularity": 1u64 << s.granularity_bits, "flags": flags(s) });
            data.insert("bitmaps".into(), meta.stored.iter().map(of).collect());
        }
        data.insert("refcount-bits".into(), Value::from(1u64 << h.refcount_order));
        if let Some(crypt) = &self.crypt {
            data.insert("encrypt".into(), Value::Object(crypt.info.clone()));
        }
        data.insert("compression-type".into(), h.compression.as_str().into());
        ImageInfo {
            cluster_size: Some(meta.geo.cluster_size()),
            actual_size: self.file.node().and_then(|n| n.driver.info().actual_size),
            backing_filename: h.backing_file.clone(),
            backing_format: h.backing_format.clone(),
            encrypted: h.crypt != header::Crypt::None,
            dirty: Some(h.incompatible & header::INCOMPAT_DIRTY != 0),
            specific: Some(("qcow2", data)),
        }
    }

    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let ready = || -> Result<Ready<'a>> {
            let options = Options {
                cache_size: how.take_size("cache-size")?,
                l2_cache_size: how.take_size("l2-cache-size")?,
                l2_cache_entry_size: how.take_size("l2-cache-entry-size")?,
                refcount_cache_size: how.take_size("refcount-cache-size")?,
                pass_discard_request: how.take("pass-discard-request").and_then(Value::as_bool),
                cache_clean_interval: how.take_size("cache-clean-interval")?,
                ..Options::default()
            };
            let (l2, refs, most) = open::cache_sizes(&self.lock().header, &options)?;
            Ok(Box::new(move || {
                let page = self.geo.page_size();
                let mut meta = self.lock();
                meta.l2.set_capacity((l2 / page) as usize);
                meta.refs.set_capacity((refs / page) as usize);
                meta.l2_most = most;
                drop(meta);
                let seconds = options.cache_clean_interval.unwrap_or(CLEAN_INTERVAL);
                self.clean_interval.store(seconds, Ordering::Relaxed);
                self.punch.store(options.pass_discard_request.unwrap_or(true), Ordering::Relaxed);
            }))
        };
        Some(ready())
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        if read_only == self.read_only() {
            return Ok(());
        }
        let _alone = self.exclusive();
        if read_only {
            if !self.lock().corrupt {
                let done = self.store_bitmaps().and_then(|()| self.trim());
                if let Err(e) = done {
                    self.use_bitmaps()?;
                    return Err(e);
                }
                self.freeze_bitmaps();
            }
        } else {
            let mut meta = self.lock();
            if meta.corrupt || meta.header.incompatible & header::INCOMPAT_CORRUPT != 0 {
                let text = "qcow2: Image is corrupt; cannot be opened read/write";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            meta.tables.clear();
            meta.find_tables(&*self.file()?)?;
        }
        self.read_only.store(read_only, Ordering::SeqCst);
        Ok(())
    }

    fn begin_writing(&self) -> io::Result<()> {
        self.prepare_to_write()
    }

    fn own_options(&self) -> Object<String, Value> {
        let encrypt = self.crypt.as_ref().filter(|c| c.secret.is_some()).map(|c| c.options());
        encrypt.map(|e| ("encrypt".to_string(), e)).into_iter().collect()
    }

    fn check_password(&self, password: &[u8]) -> io::Result<bool> {
        self.password_fits(password)
    }

    fn set_backing_name(&self, name: &str) -> io::Result<()> {
        self.must_be_writable()?;
        self.rename_backing(name, None)
    }

    fn set_backing(&self, backing: Option<(&str, &str)>) -> io::Result<()> {
        self.must_be_writable()?;
        match backing {
            Some((name, format)) => self.rename_backing(name, Some(format)),
            None => self.forget_backing(),
        }
    }

    fn tidy(&self, now: Instant) -> Option<Instant> {
        self.clean_caches(now)
    }

    fn close(&self) -> io::Result<()> {
        if self.read_only() || self.lock().corrupt {
            return Ok(());
        }
        let _alone = self.exclusive();
        let stored = self.store_bitmaps();
        self.trim()?;
        stored?;
        *self.decompressed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
}

impl Internal for Qcow2 {
    fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Ok(self.list_snapshots()?.into_iter().map(|e| e.into_info()).collect())
    }

    fn create_snapshot(&self, snapshot: Snapshot) -> io::Result<()> {
        self.must_be_writable()?;
        self.take_snapshot(snapshot)
    }

    fn delete_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<Snapshot> {
        self.must_be_writable()?;
        self.drop_snapshot(id, name)
    }

    fn apply_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<()> {
        self.must_be_writable()?;
        if !self.bitmaps.all().is_empty() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "Device has active dirty bitmaps"));
        }
        self.go_to_snapshot(id, name)
    }
}
