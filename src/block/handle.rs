//! A root user of the graph: a guest disk, a job, an export. The only way into it.
//!
//! Owns: a gate, the root edge, what its user does and shares, statistics, the error policy.
//! Never: knows drivers. Threads: I/O from any; the setters on the control thread only.
//! Locks: leaves of its own (identity, callback), none across I/O.
//!
//! **A failing guest request**, for the writer of a device model. A request is
//!
//! ```text
//! match handle.write(off, &iov, flags) {
//!     Ok(()) => answer OK,
//!     Err(e) => match handle.on_error(false, &e) {
//!         ErrorAction::Ignore => answer OK,
//!         ErrorAction::Report => answer IOERR,
//!         ErrorAction::Stop   => keep the request, unanswered,
//!     },
//! }
//! ```
//!
//! `on_error` has then told the control thread (`Event::BlockIoError`), which emits
//! `BLOCK_IO_ERROR` and, for `Stop`, stops the VM. A kept request holds no ticket, so that the
//! graph can be changed meanwhile (more space, another node). The device puts kept requests first
//! in a list of its own and does them again, in order, when it next runs *after having been
//! paused and resumed* (`cont`); a reset of the device drops the list. Requests that come between
//! the error and the pause are done as usual: the guest may not count on an order among them.

use super::chain::{self, Contents};
use super::driver::{Extent, Flags, Limits, Perm};
use super::gate::Gate;
use super::node::{Edge, Node, errno};
use super::stats::{Kind, Stats};
use super::throttle::Member;
use super::tray::Tray;
use crate::event::{BlockIoError, ErrorAction, Event, Events};
use crate::sys::iov::{Iov, IovMut};
use crate::sys::thread::lock;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// What to do about a failed request (`rerror`, `werror`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnError {
    /// The device's default: report for reads, enospc for writes.
    #[default]
    Auto,
    /// Tell the guest.
    Report,
    /// Tell the guest that all is well.
    Ignore,
    /// Stop the VM.
    Stop,
    /// Stop the VM when there is no space left, tell the guest otherwise.
    Enospc,
}

impl OnError {
    /// The policy of that name, as in `-drive werror=`.
    pub fn from_word(word: &str) -> Option<OnError> {
        Some(match word {
            "auto" => OnError::Auto,
            "report" => OnError::Report,
            "ignore" => OnError::Ignore,
            "stop" => OnError::Stop,
            "enospc" => OnError::Enospc,
            _ => return None,
        })
    }

    fn action(self, read: bool, nospace: bool) -> ErrorAction {
        match self {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Report => ErrorAction::Report,
            OnError::Stop => ErrorAction::Stop,
            OnError::Auto if read => ErrorAction::Report,
            OnError::Auto | OnError::Enospc if nospace => ErrorAction::Stop,
            OnError::Auto | OnError::Enospc => ErrorAction::Report,
        }
    }
}

/// How the last stop on an error came about (`BlockDeviceIoStatus`); `cont` sets it to `Ok`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoStatus {
    /// None since the last `cont`.
    Ok,
    /// The VM stopped because of an I/O error.
    Failed,
    /// The VM stopped because there was no space left.
    NoSpace,
}

impl IoStatus {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

/// What a handle is made with.
#[derive(Clone)]
pub struct HandleSpec {
    /// Legacy drive name, or "".
    pub name: String,
    /// What its user does with the root node.
    pub uses: Perm,
    /// What its user lets others do.
    pub shares: Perm,
    /// False: each write is followed by a flush (`cache=writethrough`, `directsync`).
    pub write_cache: bool,
    /// What to do about a failed read.
    pub rerror: OnError,
    /// What to do about any other failed request.
    pub werror: OnError,
    /// For what a job needs of a node besides the disk that it works on: what it is for it, and the job
    /// as messages name it. Such a user does not make a node somebody's disk.
    pub job: Option<(&'static str, String)>,
}

impl Default for HandleSpec {
    /// A guest disk without a name: reads and writes, and lets others read and resize.
    fn default() -> HandleSpec {
        HandleSpec {
            name: String::new(),
            uses: Perm::CONSISTENT_READ | Perm::WRITE,
            shares: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED | Perm::RESIZE,
            write_cache: true,
            rerror: OnError::Auto,
            werror: OnError::Auto,
            job: None,
        }
    }
}

/// What [`Handle::submit`] does. Offsets and lengths are in bytes.
pub enum Request<'a, 'b> {
    /// Fills this from the offset on.
    Read(u64, &'a mut IovMut<'b>),
    /// Puts this at the offset.
    Write(u64, &'a Iov<'b>, Flags),
    /// Makes so many bytes from the offset on read as zeroes.
    Zero(u64, u64, Flags),
    /// Gives so many bytes from the offset on up; a hint.
    Discard(u64, u64),
    /// Makes all completed writes durable.
    Flush,
}

impl Request<'_, '_> {
    /// As what it is counted, and how many bytes.
    fn kind(&self) -> (Kind, u64) {
        match self {
            Request::Read(_, to) => (Kind::Read, to.len() as u64),
            Request::Write(_, from, _) => (Kind::Write, from.len() as u64),
            Request::Zero(_, len, _) => (Kind::Write, *len),
            Request::Discard(_, len) => (Kind::Unmap, *len),
            Request::Flush => (Kind::Flush, 0),
        }
    }
}

/// Who stands above a handle: for events and messages.
#[derive(Clone, Default)]
struct Owner {
    /// Id of the guest device, if it has one.
    id: String,
    /// QOM path of the guest device, or of a part of it.
    qom_path: String,
    events: Option<Events>,
}

type ResizeHook = Box<dyn Fn(u64) + Send + Sync>;

/// See the module's head. A request takes a ticket, follows the root edge, and is done by the
/// node there; errors are plain [`io::Error`]s (ENOMEDIUM without a node, EPERM for what the
/// handle was not opened for, EIO beyond the end).
pub struct Handle {
    pub(super) gate: Gate,
    pub(super) root: Arc<Edge>,
    name: String,
    /// [`HandleSpec::job`]'s name.
    job: Option<String>,
    uses: AtomicU8,
    shares: AtomicU8,
    /// Counters of `query-blockstats`.
    pub stats: Stats,
    write_cache: AtomicBool,
    /// There is a `throttle`: so that a request need not lock to see that there is none.
    limited: AtomicBool,
    throttle: Mutex<Option<Arc<Member>>>,
    policy: Mutex<(OnError, OnError)>,
    io_status: AtomicU8,
    owner: Mutex<Owner>,
    resized: Mutex<Option<ResizeHook>>,
    tray: OnceLock<Arc<Tray>>,
}

impl Handle {
    /// A handle on `node`, or on nothing (no medium). The graph must know it
    /// ([`Graph::attach`](super::graph::Graph::attach)) before anything else uses the node;
    /// alone it serves tests.
    pub fn new(node: Option<Arc<Node>>, spec: HandleSpec) -> Arc<Handle> {
        let (role, job) = spec.job.map_or(("root", None), |(role, job)| (role, Some(job)));
        Arc::new(Handle {
            gate: Gate::default(),
            root: Edge::new(role, node),
            name: spec.name,
            job,
            uses: AtomicU8::new(spec.uses.0),
            shares: AtomicU8::new(spec.shares.0),
            stats: Stats::default(),
            write_cache: AtomicBool::new(spec.write_cache),
            limited: AtomicBool::new(false),
            throttle: Mutex::new(None),
            policy: Mutex::new((spec.rerror, spec.werror)),
            io_status: AtomicU8::new(0),
            owner: Mutex::new(Owner::default()),
            resized: Mutex::new(None),
            tray: OnceLock::new(),
        })
    }

    fn with<T>(&self, f: impl FnOnce(&Node) -> io::Result<T>) -> io::Result<T> {
        // Whatever delays a request on purpose must do so before this line: nobody waits with a
        // ticket in hand.
        let _ticket = self.gate.enter();
        match self.root.node() {
            Some(node) => f(&node),
            None => Err(errno(libc::ENOMEDIUM)),
        }
    }

    /// Does something with a ticket in hand, and nothing that waits for another: for work on several
    /// nodes below this handle that no change of the graph may come between (a job's filter copying a
    /// piece from one child to another).
    pub fn inside<T>(&self, f: impl FnOnce(&Arc<Node>) -> io::Result<T>) -> io::Result<T> {
        let _ticket = self.gate.enter();
        match self.root.node() {
            Some(node) => f(&node),
            None => Err(errno(libc::ENOMEDIUM)),
        }
    }

    /// Does a request. `counted`: it is the guest's own, and shows in the statistics; tools that
    /// do as the guest would are not counted.
    pub fn submit(&self, request: Request, counted: bool) -> io::Result<()> {
        self.submit_while(|| true, request, counted)
    }

    /// Does a request of a guest that means the medium that is there as long as `same` says so, which
    /// is asked when nothing can come between any more; ENOMEDIUM if not.
    pub fn submit_while(
        &self,
        same: impl FnOnce() -> bool,
        request: Request,
        counted: bool,
    ) -> io::Result<()> {
        let (kind, bytes) = request.kind();
        let clock = self.stats.clock();
        // Without a ticket in hand.
        if self.limited.load(Ordering::Acquire)
            && matches!(kind, Kind::Read | Kind::Write)
            && let Some(member) = self.throttled()
        {
            member.wait(kind == Kind::Read, bytes);
        }
        let done = self.with(|n| match same() {
            true => self.perform(n, request),
            false => Err(errno(libc::ENOMEDIUM)),
        });
        if counted {
            self.stats.done(kind, bytes, clock, done.is_ok());
        }
        done
    }

    fn perform(&self, n: &Node, request: Request) -> io::Result<()> {
        match request {
            Request::Read(off, to) => {
                in_bounds(n, off, to.len() as u64)?;
                n.read(off, to)
            }
            Request::Write(off, from, flags) => {
                self.allowed(Perm::WRITE)?;
                in_bounds(n, off, from.len() as u64)?;
                n.write(off, from, self.with_cache(flags))
            }
            Request::Zero(off, len, flags) => {
                self.allowed(Perm::WRITE)?;
                in_bounds(n, off, len)?;
                n.zero(off, len, self.with_cache(flags))
            }
            Request::Discard(off, len) => {
                self.allowed(Perm::WRITE)?;
                in_bounds(n, off, len)?;
                n.discard(off, len)
            }
            Request::Flush => n.flush(),
        }
    }

    fn allowed(&self, perm: Perm) -> io::Result<()> {
        if self.uses().contains(perm) { Ok(()) } else { Err(errno(libc::EPERM)) }
    }

    /// Length of the disk in bytes; 0 without a medium.
    pub fn len(&self) -> u64 {
        self.with(|n| Ok(n.len())).unwrap_or(0)
    }

    /// True when the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the disk needs and prefers.
    pub fn limits(&self) -> Limits {
        self.with(|n| Ok(n.limits())).unwrap_or_default()
    }

    /// True when the node below refuses writes, or the handle was not opened for them.
    pub fn read_only(&self) -> bool {
        self.allowed(Perm::WRITE).is_err() || self.with(|n| Ok(n.read_only())).unwrap_or(false)
    }

    /// Reads `to.len()` bytes at `off`.
    pub fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.submit(Request::Read(off, to), true)
    }

    /// Writes all of `from` at `off`.
    pub fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.submit(Request::Write(off, from, flags), true)
    }

    /// Makes `len` bytes at `off` read as zeroes.
    pub fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.submit(Request::Zero(off, len, flags), true)
    }

    /// Gives `len` bytes at `off` up; a hint.
    pub fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.submit(Request::Discard(off, len), true)
    }

    /// Makes all completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.submit(Request::Flush, true)
    }

    /// What is at `off`.
    pub fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        self.with(|n| n.status(off, len))
    }

    /// What a reader finds at `off`, wherever in the chain of images it lies; `len` > 0.
    pub fn contents(&self, off: u64, len: u64) -> io::Result<Contents> {
        self.with(|n| chain::contents(n, off, len))
    }

    fn with_cache(&self, flags: Flags) -> Flags {
        if self.write_cache() { flags } else { flags | Flags::FUA }
    }

    /// The device refused a request of this kind before it came here (out of range, misaligned).
    pub fn invalid(&self, kind: Kind) {
        self.stats.invalid(kind);
    }

    /// True: a write may stay in a cache until the guest flushes. The device tells the guest so
    /// (virtio-blk's `writeback`), and may change it when the guest asks.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }

    /// Sets [`Handle::write_cache`].
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
    }

    /// A guest request failed: decides what to do, notes it, and tells the control thread. See
    /// the module's head for what the device does next.
    pub fn on_error(&self, read: bool, e: &io::Error) -> ErrorAction {
        let code = e.raw_os_error();
        let nospace = code == Some(libc::ENOSPC);
        let (rerror, werror) = *lock(&self.policy);
        let action = if read { rerror } else { werror }.action(read, nospace);
        if action == ErrorAction::Stop {
            let status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
            // The first one stays, as in QEMU, until `cont`.
            let _ = self.io_status.compare_exchange(0, status as u8, Ordering::Relaxed, Ordering::Relaxed);
        }
        let owner = lock(&self.owner).clone();
        if let Some(events) = owner.events {
            events.post(Event::BlockIoError(BlockIoError {
                qom_path: owner.qom_path,
                device: self.name.clone(),
                node_name: self.root.node().map(|n| n.name.clone()),
                read,
                action,
                nospace,
                reason: crate::error::strerror(e),
            }));
        }
        action
    }

    /// How the last stop on an error came about.
    pub fn io_status(&self) -> IoStatus {
        match self.io_status.load(Ordering::Relaxed) {
            0 => IoStatus::Ok,
            1 => IoStatus::Failed,
            _ => IoStatus::NoSpace,
        }
    }

    /// `cont`: whatever stopped the VM is over.
    pub fn reset_io_status(&self) {
        self.io_status.store(0, Ordering::Relaxed);
    }

    /// The policy for failed reads and for all others.
    pub fn policy(&self) -> (OnError, OnError) {
        *lock(&self.policy)
    }

    /// Sets the policy for failed reads and for all others.
    pub fn set_policy(&self, rerror: OnError, werror: OnError) {
        *lock(&self.policy) = (rerror, werror);
    }

    /// The group whose limits hold for this disk, and its place there.
    pub fn throttled(&self) -> Option<Arc<Member>> {
        lock(&self.throttle).clone()
    }

    /// Puts the disk into another group, or into none. Requests that wait go on.
    pub fn throttle(&self, member: Option<Arc<Member>>) {
        self.limited.store(member.is_some(), Ordering::Release);
        let old = std::mem::replace(&mut *lock(&self.throttle), member);
        if let Some(old) = old {
            old.exempt(true);
        }
    }

    /// Legacy drive name, or "".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// It makes a node somebody's disk ([`HandleSpec::job`]).
    pub fn is_disk(&self) -> bool {
        self.job.is_none()
    }

    /// The guest device that uses this handle from now on: its id ("" without one), its QOM path,
    /// and where its errors are posted. Control thread.
    pub fn set_owner(&self, id: &str, qom_path: &str, events: Option<Events>) {
        *lock(&self.owner) = Owner { id: id.into(), qom_path: qom_path.into(), events };
    }

    /// QOM path of the guest device, or of the part of it that has the disk; "" without one.
    pub fn qom_path(&self) -> String {
        lock(&self.owner).qom_path.clone()
    }

    /// Calls `hook` with the new length whenever the disk's length or medium changes: on the
    /// control thread; the gate may be closed. It must not wait for a worker, nor make a request.
    pub fn on_resize(&self, hook: Option<Box<dyn Fn(u64) + Send + Sync>>) {
        *lock(&self.resized) = hook;
    }

    /// The graph has changed the length below.
    pub(crate) fn resized(&self) {
        // Not by a request: the gate may be closed, by the very thread that is here.
        let len = self.root.peek(Node::len).unwrap_or(0);
        if let Some(hook) = &*lock(&self.resized) {
            hook(len);
        }
    }

    /// The tray, for a device with removable media.
    pub fn tray(&self) -> Option<Arc<Tray>> {
        self.tray.get().cloned()
    }

    /// Gives it a tray; once, before its device uses it.
    pub(crate) fn set_tray(&self, tray: Arc<Tray>) {
        // A second device would be an error of the caller: a drive has one in its life.
        let _ = self.tray.set(tray);
    }

    /// The root node, if there is a medium. Control thread.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.root.node()
    }

    /// What the user does with the node.
    pub fn uses(&self) -> Perm {
        Perm(self.uses.load(Ordering::Relaxed))
    }

    /// What the user lets others do.
    pub fn shares(&self) -> Perm {
        Perm(self.shares.load(Ordering::Relaxed))
    }

    /// Only the graph calls it, which then checks the whole graph.
    pub(super) fn set_perm(&self, uses: Perm, shares: Perm) {
        self.uses.store(uses.0, Ordering::Relaxed);
        self.shares.store(shares.0, Ordering::Relaxed);
    }

    /// How messages about permissions name this user.
    pub fn describe(&self) -> String {
        if let Some(job) = &self.job {
            return job.clone();
        }
        let id = lock(&self.owner).id.clone();
        match (self.name.is_empty(), id.is_empty()) {
            (false, _) => format!("block device '{}'", self.name),
            (true, false) => format!("block device '{id}'"),
            (true, true) => "an unnamed block device".into(),
        }
    }
}

fn in_bounds(node: &Node, off: u64, n: u64) -> io::Result<()> {
    match off.checked_add(n) {
        Some(end) if end <= node.len() => Ok(()),
        _ => Err(errno(libc::EIO)),
    }
}

#[cfg(test)]
#[path = "handle_test.rs"]
mod tests;
