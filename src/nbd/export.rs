//! What is exported: a disk with a name, and who uses it.
//!
//! Owns: the list of exports, each with its [`Handle`] and its clients' connections. Never: speaks
//! the protocol, decides when an export ends (the control thread does). Threads: the control thread
//! adds and takes away, connections look up. Locks: the list's, then an export's own; both for
//! moments.
//!
//! [`Handle`]: crate::block::handle::Handle

use super::proto::{MAX_PAYLOAD, flag};
use crate::block::bitmap::Bitmap;
use crate::block::handle::Handle;
use crate::event::{Event, Events};
use crate::sys::stream::Stream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A client's connection as others see it.
#[derive(Debug)]
pub struct Line {
    /// Its socket.
    pub stream: Stream,
    cut: AtomicBool,
}

impl Line {
    /// An open one.
    pub fn new(stream: Stream) -> Line {
        Line { stream, cut: AtomicBool::new(false) }
    }

    /// Ends it: whoever waits for the client is let go, requests in hand end early.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.stream.shut_down();
    }

    /// It has been cut.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

/// A kind of metadata that clients can ask about.
#[derive(Clone)]
pub enum Context {
    /// `base:allocation`: where zeroes are.
    Allocation,
    /// `qemu:allocation-depth`: in which image of the chain a place was found.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: what has been written. The export keeps it from being changed.
    Bitmap(Arc<Bitmap>),
}

impl Context {
    /// Its name on the wire.
    pub fn name(&self) -> String {
        match self {
            Context::Allocation => "base:allocation".into(),
            Context::Depth => "qemu:allocation-depth".into(),
            Context::Bitmap(b) => format!("qemu:dirty-bitmap:{}", b.name().unwrap_or_default()),
        }
    }
}

/// What an export is made with.
pub struct Spec {
    /// Its name for QMP.
    pub id: String,
    /// Its name for clients.
    pub name: String,
    /// What people are told about it.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// The metadata that can be asked about, besides `base:allocation`.
    pub contexts: Vec<Context>,
}

/// An exported disk.
pub struct Export {
    /// Its name for QMP.
    pub id: String,
    /// Its name for clients.
    pub name: String,
    /// What people are told about it.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// The way to the disk.
    pub handle: Arc<Handle>,
    /// Its length in bytes: nobody may change it while it is exported.
    pub size: u64,
    /// Alignment (in bytes, a power of two) that requests should have.
    pub alignment: u32,
    /// Memory that requests come from must be aligned.
    pub direct: bool,
    /// The metadata that can be asked about; the first is `base:allocation`.
    pub contexts: Vec<Context>,
    lines: Mutex<Lines>,
    events: Events,
}

#[derive(Default)]
struct Lines {
    closing: bool,
    open: Vec<Arc<Line>>,
}

impl Export {
    /// An export of what `handle` is on. `events` hears [`Event::ExportIdle`] when the last client
    /// of a closing export has gone.
    pub fn new(spec: Spec, handle: Arc<Handle>, events: Events) -> Arc<Export> {
        let (size, limits) = (handle.len(), handle.limits());
        let fits = size % u64::from(limits.request_alignment) == 0 && limits.request_alignment <= 65536;
        let mut contexts = vec![Context::Allocation];
        contexts.extend(spec.contexts);
        Arc::new(Export {
            id: spec.id,
            name: spec.name,
            description: spec.description,
            writable: spec.writable,
            handle,
            size,
            // The last bytes of an odd length must be within reach; the node below copes.
            alignment: if fits { limits.request_alignment } else { 1 },
            direct: limits.memory_alignment > 1,
            contexts,
            lines: Mutex::default(),
            events,
        })
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flags that clients are told.
    pub fn flags(&self, structured: bool) -> u16 {
        let writes = match self.writable {
            true => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
            false => flag::READ_ONLY,
        };
        let df = if structured { flag::SEND_DF } else { 0 };
        // All connections use one handle, whose flush covers what any of them wrote.
        flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | flag::CAN_MULTI_CONN
            | writes
            | df
    }

    /// Minimum, preferred and maximum size of a request, in bytes.
    pub fn block_sizes(&self) -> [u32; 3] {
        [self.alignment, self.alignment.max(4096), MAX_PAYLOAD]
    }

    /// Enters a client. `None`: the export is being closed.
    pub(super) fn join(self: &Arc<Self>, line: &Arc<Line>) -> Option<Member> {
        let mut lines = self.lines();
        if lines.closing {
            return None;
        }
        lines.open.push(line.clone());
        Some(Member { export: self.clone(), line: line.clone() })
    }

    /// How many clients use it.
    pub fn clients(&self) -> usize {
        self.lines().open.len()
    }

    /// It takes no new clients.
    pub fn is_closing(&self) -> bool {
        self.lines().closing
    }

    /// Takes no clients from now on and cuts the lines of those that are there. Does not wait.
    pub fn close(&self) {
        let mut lines = self.lines();
        lines.closing = true;
        lines.open.iter().for_each(|l| l.cut());
    }
}

/// A client's use of an export; dropping it is leaving.
pub(super) struct Member {
    pub export: Arc<Export>,
    line: Arc<Line>,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut lines = self.export.lines();
        lines.open.retain(|l| !Arc::ptr_eq(l, &self.line));
        if lines.closing && lines.open.is_empty() {
            self.export.events.post(Event::ExportIdle);
        }
    }
}

/// All exports, oldest first.
#[derive(Default)]
pub struct Registry(RwLock<Vec<Arc<Export>>>);

impl Registry {
    /// All exports, oldest first.
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The one of that id.
    pub fn find(&self, id: &str) -> Option<Arc<Export>> {
        self.all().into_iter().find(|e| e.id == id)
    }

    /// The one that clients know by that name.
    pub fn named(&self, name: &[u8]) -> Option<Arc<Export>> {
        self.all().into_iter().find(|e| e.name.as_bytes() == name && !e.is_closing())
    }

    /// Adds one.
    pub fn add(&self, export: Arc<Export>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(export);
    }

    /// Forgets one.
    pub fn remove(&self, export: &Arc<Export>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|e| !Arc::ptr_eq(e, export));
    }
}
