//! What a format, protocol or filter is: the [`Driver`] trait and its small types.
//!
//! A driver's calls block. They come from any number of threads at once; a driver locks what it
//! must and never across data I/O. Offsets and lengths are in bytes. [`Node`]
//! stands in front of every driver: it checks bounds, alignment and read-only, so that a driver
//! sees only requests of at least one byte that lie within `len()`, rounded up to its
//! `request_alignment`, and on that alignment (a driver that [`grows`](Driver::grows) also sees
//! writes beyond). A driver reaches its children through `edge.node()` and the methods of `Node`.

use super::bitmaps::Bitmaps;
use super::debug::Moments;
use super::node::{Edge, Node};
use super::reopen_options::{Ready, Reopening};
use super::throttle::Member;
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::ops::{BitAnd, BitOr, Not};
use std::sync::Arc;

/// A set of permissions (QEMU's `BLK_PERM_*`): what a user of a node does, or lets others do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Perm(pub u8);

impl Perm {
    /// Nothing.
    pub const NONE: Perm = Perm(0);
    /// Reads must see what was last written.
    pub const CONSISTENT_READ: Perm = Perm(1);
    /// Changes the data.
    pub const WRITE: Perm = Perm(2);
    /// Writes what is there already (copy-on-read, commit).
    pub const WRITE_UNCHANGED: Perm = Perm(4);
    /// Changes the length.
    pub const RESIZE: Perm = Perm(8);
    /// All of them.
    pub const ALL: Perm = Perm(15);

    /// True when every permission of `other` is in `self`.
    pub fn contains(self, other: Perm) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Perm {
    type Output = Perm;
    fn bitor(self, o: Perm) -> Perm {
        Perm(self.0 | o.0)
    }
}

impl BitAnd for Perm {
    type Output = Perm;
    fn bitand(self, o: Perm) -> Perm {
        Perm(self.0 & o.0)
    }
}

impl Not for Perm {
    type Output = Perm;
    fn not(self) -> Perm {
        Perm(!self.0 & Perm::ALL.0)
    }
}

/// How a write or zero request is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags(pub u8);

impl Flags {
    /// Nothing special.
    pub const NONE: Flags = Flags(0);
    /// On stable storage before the call returns (the node sees to it with a flush).
    pub const FUA: Flags = Flags(1);
    /// A zero request may give the space back.
    pub const MAY_UNMAP: Flags = Flags(2);
    /// A zero request fails with ENOTSUP rather than writing zeroes slowly.
    pub const NO_FALLBACK: Flags = Flags(4);
    /// A write may be stored compressed, if the format can: best in whole clusters.
    pub const COMPRESSED: Flags = Flags(8);
    /// Zeroes hide also what is not behind the image yet: nothing stored is not enough, if the format can say so.
    pub const HIDE: Flags = Flags(16);

    /// True when every flag of `other` is set.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Flags {
    type Output = Flags;
    fn bitor(self, o: Flags) -> Flags {
        Flags(self.0 | o.0)
    }
}

/// How much of new space is allocated in advance (QEMU's `PreallocMode`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// A format's tables; the data are holes in the file.
    Metadata,
    /// Also the file system's space.
    Falloc,
    /// Also written, as zeroes.
    Full,
}

impl Preallocation {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

/// What a driver needs and prefers. All in bytes; powers of two where they are alignments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Offsets and lengths must be multiples of this (1: any).
    pub request_alignment: u32,
    /// Each piece of memory must be at a multiple of this, and as long as a multiple of
    /// `request_alignment` (O_DIRECT; 1: any).
    pub memory_alignment: u32,
    /// Preferred unit of discard and zero requests (a format's cluster size), 0 if none.
    pub discard_alignment: u32,
    /// True when a zero request is cheap (no data is written).
    pub cheap_zeroes: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { request_alignment: 1, memory_alignment: 1, discard_alignment: 0, cheap_zeroes: false }
    }
}

impl Limits {
    /// Of a driver that takes any request and passes it on along `edge`: the node below aligns it.
    pub fn above(edge: &Edge) -> Limits {
        let below = edge.peek(Node::limits).unwrap_or_default();
        Limits { request_alignment: 1, memory_alignment: 1, ..below }
    }
}

/// What is at a place of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    /// Data in this node.
    Data,
    /// Reads as zeroes by this node's own word.
    Zero,
    /// Not in this node: what the backing node has, or zeroes without one.
    Unallocated,
}

/// The state of the `len` bytes that follow the offset asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// What is there.
    pub kind: ExtentKind,
    /// For how many bytes; at least 1, at most the length asked for.
    pub len: u64,
    /// Where it lies in the `file` child, if it does in one piece, uncompressed.
    pub host_offset: Option<u64>,
}

/// What `query-block` shows of an image beyond its name and size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageInfo {
    /// In bytes, for formats that have clusters.
    pub cluster_size: Option<u64>,
    /// Bytes that the image takes on its storage, if known.
    pub actual_size: Option<u64>,
    /// The image was not closed properly and is not repaired yet; `None` when that has no meaning.
    pub dirty: Option<bool>,
    /// Backing file, as the image's header names it.
    pub backing_filename: Option<String>,
    /// Backing format, as the header records it.
    pub backing_format: Option<String>,
    /// True when the data are encrypted.
    pub encrypted: bool,
    /// `format-specific`: QEMU's `type` and the members of its `data`.
    pub specific: Option<(&'static str, serde_json::Map<String, serde_json::Value>)>,
}

/// An internal snapshot (QEMU's `SnapshotInfo`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique in the image; empty when it is to be made.
    pub id: String,
    /// What a person calls it.
    pub name: String,
    /// When it was taken: seconds since the epoch…
    pub date_sec: u32,
    /// … and nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state that are stored with it.
    pub vm_state_size: u64,
    /// Virtual size of the disk at that time, in bytes.
    pub disk_size: u64,
    /// Instruction count, if that was recorded.
    pub icount: Option<u64>,
}

/// Formats that keep snapshots inside the image. Control thread only; requests wait meanwhile.
pub trait Internal {
    /// All snapshots, oldest first.
    fn snapshots(&self) -> io::Result<Vec<Snapshot>>;

    /// Takes one of the disk as it is; its size is filled in, and its id if that is empty.
    fn create_snapshot(&self, snapshot: Snapshot) -> io::Result<()>;

    /// Deletes the one of that id and name (one of them may be absent). ENOENT if there is none.
    fn delete_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<Snapshot>;

    /// Makes the disk what it was then. ENOENT if there is no such snapshot.
    fn apply_snapshot(&self, id: Option<&str>, name: Option<&str>) -> io::Result<()>;
}

/// Drivers whose children come and go (`x-blockdev-change`). Control thread only; requests wait
/// meanwhile.
pub trait Children {
    /// The role that `node` would have as a new child; or why it cannot be one.
    fn new_role(&self, node: &Node) -> Result<String>;

    /// Adds the child that `edge`, whose role [`Children::new_role`] gave, leads to.
    fn add(&self, edge: &Arc<Edge>);

    /// It could not stay: as if it had never been there.
    fn take_back(&self, edge: &Arc<Edge>);

    /// Whether a child may go.
    fn may_remove(&self) -> Result<()>;

    /// Takes a child away.
    fn remove(&self, edge: &Arc<Edge>);
}

/// What a driver does that has nothing of its own to say: a filter asks the node it filters.
fn pass<T>(driver: &(impl Driver + ?Sized), f: impl FnOnce(&Node) -> io::Result<T>) -> io::Result<T> {
    match driver.filtered() {
        Some(edge) => f(&*edge.need()?),
        None => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
    }
}

/// Formats that store bitmaps in the image. They are loaded when it is opened and stored when it is
/// closed, or turns read-only. Control thread only.
pub trait StoredBitmaps {
    /// Whether another bitmap can be stored; says why not.
    fn can_store(&self, name: &str, granularity: u64) -> io::Result<()>;

    /// Takes the stored form of a bitmap out of the image, if there is one.
    fn remove_stored(&self, name: &str) -> io::Result<()>;
}

/// A format, protocol or filter. See the module's head for who calls it and how. A filter says so
/// with [`Driver::filtered`]; then what it does not do itself is done by the node it filters. All
/// others have at least `len`, `read`, `write` and `flush`.
pub trait Driver: Send + Sync {
    /// The name in `blockdev-add`'s `driver` and in queries.
    fn name(&self) -> &'static str;

    /// Virtual length in bytes, now. Cheap: it is asked for at every request.
    fn len(&self) -> u64 {
        self.filtered().and_then(|e| e.peek(Node::len)).unwrap_or(0)
    }

    /// True when the length is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when a write beyond the end makes the node longer (a plain file), rather than an error.
    fn grows(&self) -> bool {
        self.filtered().and_then(|e| e.peek(|n| n.driver.grows())).unwrap_or(false)
    }

    /// Alignment and preferences; constant while the node is open, but for a reopen and a change of
    /// what is below.
    fn limits(&self) -> Limits {
        self.filtered().map_or_else(Limits::default, |e| Limits::above(e))
    }

    /// The children, by role. Control thread only.
    fn edges(&self) -> Vec<Arc<Edge>> {
        self.filtered().into_iter().cloned().collect()
    }

    /// For a filter, which shows what another node has: the edge to that node, one of
    /// [`Driver::edges`]. Users look through a filter, and some are told nothing of those that they
    /// did not ask for ([`NodeOptions::implicit`](super::node::NodeOptions)).
    fn filtered(&self) -> Option<&Arc<Edge>> {
        None
    }

    /// Its place in a group of limits, if its requests wait for them.
    fn throttled(&self) -> Option<Arc<Member>> {
        None
    }

    /// True when writes with [`Flags::COMPRESSED`] are stored compressed.
    fn compresses(&self) -> bool {
        self.filtered().and_then(|e| e.peek(|n| n.driver.compresses())).unwrap_or(false)
    }

    /// What this driver does with child `edge`, and what it lets others do with it, when its own
    /// users together use and share `above` (uses, shares). Answer in the same order.
    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        let _ = edge;
        above
    }

    /// Permissions have changed to (uses, shares): take or release file locks, reopen read-write.
    /// An error leaves everything as it was.
    fn set_perm(&self, uses: Perm, shares: Perm) -> io::Result<()> {
        let _ = (uses, shares);
        Ok(())
    }

    /// Reads `to.len()` bytes at `off`.
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        pass(self, |n| n.read(off, to))
    }

    /// Writes all of `from` at `off`. A driver may ignore [`Flags::FUA`]: the node flushes.
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        pass(self, |n| n.write(off, from, flags))
    }

    /// Makes `len` bytes at `off` read as zeroes. ENOTSUP: the node writes zeroes itself.
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        pass(self, |n| n.zero(off, len, flags))
    }

    /// Says that the contents of `len` bytes at `off` are not needed. ENOTSUP: the node ignores
    /// the request (it is a hint).
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        pass(self, |n| n.discard(off, len))
    }

    /// Makes `len` bytes at `off` independent of the backing file: what is not allocated there gets
    /// what reading gives. Writers may come at any time. `zero`: the backing file is known to read as
    /// zeroes there, and does not change. ENOTSUP: there is no backing file.
    fn populate(&self, off: u64, len: u64, zero: bool) -> io::Result<()> {
        pass(self, |n| n.populate(off, len, zero))
    }

    /// Every write that returned before this call is on stable storage when this returns.
    fn flush(&self) -> io::Result<()> {
        pass(self, Node::flush)
    }

    /// What is at `off`; `len` > 0 bytes are of interest.
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        match self.filtered() {
            Some(edge) => edge.need()?.status(off, len),
            None => Ok(Extent { kind: ExtentKind::Data, len, host_offset: Some(off) }),
        }
    }

    /// Changes the virtual length to `len` bytes. New space reads as zeroes.
    fn resize(&self, len: u64) -> io::Result<()> {
        pass(self, |n| n.resize(len))
    }

    /// Makes it `len` bytes long for a format that will fill what is new by and by. Space for that may be found
    /// at once, if writes are the faster for it; none need be.
    fn grow(&self, len: u64) -> io::Result<()> {
        self.resize(len)
    }

    /// The same, allocating new space in advance.
    fn resize_with(&self, len: u64, how: Preallocation) -> io::Result<()> {
        if how == Preallocation::Off {
            return self.resize(len);
        }
        let text = format!("Unsupported preallocation mode '{}'", how.as_str());
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    /// What `query-block` shows.
    fn info(&self) -> ImageInfo {
        let Some(below) = self.filtered().and_then(|e| e.node()) else { return ImageInfo::default() };
        let ImageInfo { cluster_size, actual_size, dirty, encrypted, .. } = below.driver.info();
        ImageInfo { cluster_size, actual_size, dirty, encrypted, ..ImageInfo::default() }
    }

    /// Snapshots inside the image, if the format has them.
    fn internal(&self) -> Option<&dyn Internal> {
        None
    }

    /// Bitmaps stored in the image, if the format has them.
    fn stored_bitmaps(&self) -> Option<&dyn StoredBitmaps> {
        None
    }

    /// The list in which the node in front keeps its bitmaps: for formats that store them.
    fn bitmaps(&self) -> Option<Arc<Bitmaps>> {
        None
    }

    /// The name of a protocol's file, or a special one (`blkdebug:…`); "" if there is none. The
    /// names of formats follow from their children's ([`names`](super::filename::names)).
    fn filename(&self) -> String {
        String::new()
    }

    /// The driver's own options as `blockdev-add` takes them, children left out: for the `json:`
    /// name of a node that no plain file name describes.
    fn own_options(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// Device and inode number of the file that a protocol stands on: tells loops of backing files.
    fn file_id(&self) -> Option<(u64, u64)> {
        None
    }

    /// The node turns read-only, or writable; nobody writes to it at the moment. Before it turns
    /// read-only its children can still be written: what is held in memory goes out. When it turns
    /// writable they cannot be written yet ([`Driver::begin_writing`]). An error leaves it as it was.
    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        let _ = read_only;
        Ok(())
    }

    /// The node has turned writable, and its children are writable too: repairs what a read-only
    /// user must not touch.
    fn begin_writing(&self) -> io::Result<()> {
        Ok(())
    }

    /// True if `password` is that of this encrypted image. ENOTSUP: it is not encrypted.
    fn check_password(&self, password: &[u8]) -> io::Result<bool> {
        pass(self, |n| n.driver.check_password(password))
    }

    /// Makes ready to become what `how` says; the answer is called when all others are ready too,
    /// with no request under way. `None`: it cannot be reopened. What is not taken from `how` may not
    /// change.
    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        let _ = how;
        None
    }

    /// Records another name for the backing file in the image, whose format stays; the node that
    /// is below stays too. ENOTSUP: this format has no such name.
    fn set_backing_name(&self, name: &str) -> io::Result<()> {
        let _ = name;
        Err(io::Error::from_raw_os_error(libc::ENOTSUP))
    }

    /// Records another backing file, name and format, in the image, or none; the node that is below
    /// stays. What was written before is on stable storage first, so that the image is good with the
    /// old name and with the new one. Not during another call of this one or of
    /// [`Driver::set_backing_name`]. ENOTSUP: this format has no such name.
    fn set_backing(&self, backing: Option<(&str, &str)>) -> io::Result<()> {
        let _ = backing;
        Err(io::Error::from_raw_os_error(libc::ENOTSUP))
    }

    /// `driver-specific` of `query-blockstats`.
    fn stats(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        None
    }

    /// Somebody waits until no request is here any more: as long as this was called more often with
    /// true than with false, no request is held back on purpose (by a limit, a breakpoint), and those
    /// that are held go on. What comes without a ticket ([`holds_ticket`](super::gate::holds_ticket))
    /// is the control thread's own and must not be held back at any time. Control thread.
    fn hurry(&self, on: bool) {
        let _ = on;
    }

    /// For drivers whose children come and go.
    fn children(&self) -> Option<&dyn Children> {
        None
    }

    /// What the moments of the format above mean to a driver for tests; constant.
    fn moments(&self) -> Option<&dyn Moments> {
        None
    }

    /// The process is about to end: requests to somebody who does not answer fail soon, from now
    /// on. Control thread; requests may be under way.
    fn give_up(&self) {}

    /// Gives up memory that was not needed for long, and says when it wants to be asked again. For
    /// moments only: requests may wait for it. Control thread.
    fn tidy(&self, now: std::time::Instant) -> Option<std::time::Instant> {
        let _ = now;
        None
    }

    /// Writes back what is held in memory and marks the image clean. Called once, by the control
    /// thread, when no request runs any more; afterwards the node is dropped. A filter that is on
    /// nothing any more has nothing to write.
    fn close(&self) -> io::Result<()> {
        match self.filtered() {
            Some(edge) if edge.node().is_none() => Ok(()),
            _ => self.flush(),
        }
    }
}
