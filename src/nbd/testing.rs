//! For tests: a client of bytes; a server with one export of a disk in memory, and clients of it.

use super::driver::{BlockdevOptionsNbd, NbdPlan};
use super::export::{Context, Export, Registry, Spec};
use super::listener::{Server, Setup};
use super::proto::*;
use crate::block::driver::{Driver, Extent, ExtentKind, Flags, Limits, Perm};
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::node::{Node, NodeOptions};
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{Mem, MemState, NoEnv, Scratch};
use crate::error::Result;
use crate::qapi::{self, Wire};
use crate::sys::inbox::Inbox;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::listen;
use serde_json::json;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A disk in memory that knows where its zeroes are, and can be slow.
pub struct Sparse {
    pub mem: Mem,
    /// Milliseconds that each request takes.
    pub delay: Arc<AtomicU64>,
}

impl Sparse {
    fn wait(&self) {
        match self.delay.load(Ordering::SeqCst) {
            0 => {}
            n => std::thread::sleep(Duration::from_millis(n)),
        }
    }
}

impl Driver for Sparse {
    fn name(&self) -> &'static str {
        "sparse"
    }
    fn len(&self) -> u64 {
        self.mem.len()
    }
    fn limits(&self) -> Limits {
        self.mem.limits
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.wait();
        self.mem.read(off, to)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.wait();
        self.mem.write(off, from, flags)
    }
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.wait();
        self.mem.zero(off, len, flags)
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.mem.discard(off, len)
    }
    fn flush(&self) -> io::Result<()> {
        self.wait();
        self.mem.flush()
    }
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let data = self.mem.state.data.lock().unwrap();
        let unit = |at: u64| {
            let (from, end) = (at as usize, data.len().min(at as usize / 512 * 512 + 512));
            data[from..end].iter().all(|b| *b == 0)
        };
        let zero = unit(off);
        let mut end = (off / 512 + 1) * 512;
        while end < off + len && unit(end) == zero {
            end += 512;
        }
        let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
        Ok(Extent { kind, len: len.min(end - off), host_offset: None })
    }
}

/// See the module's head. The export is called `e`.
pub struct Rig {
    pub dir: Scratch,
    pub graph: Graph,
    pub registry: Arc<Registry>,
    pub server: Option<Server>,
    pub state: Arc<MemState>,
    pub delay: Arc<AtomicU64>,
    pub export: Arc<Export>,
}

impl Rig {
    pub fn new(test: &str, mem: Mem, writable: bool) -> Rig {
        let (state, delay) = (mem.state.clone(), Arc::new(AtomicU64::new(0)));
        let options = NodeOptions { unmap: true, ..NodeOptions::default() };
        let sparse = Sparse { mem, delay: delay.clone() };
        let node = Node::new("disk", Box::new(sparse), options);
        let mut graph = Graph::new();
        graph.add(node.clone()).unwrap();
        graph.own(&node);
        let write = if writable { Perm::WRITE } else { Perm::NONE };
        let spec = HandleSpec { uses: Perm::CONSISTENT_READ | write, ..HandleSpec::default() };
        let handle = graph.attach(Some(node.clone()), spec).unwrap();
        let spec = Spec {
            id: "e".into(),
            name: "e".into(),
            description: Some("a disk".into()),
            writable,
            contexts: vec![Context::Depth],
        };
        let export = Export::new(spec, handle, Arc::new(Inbox::new().unwrap()));
        let registry = Arc::new(Registry::default());
        registry.add(export.clone());
        let dir = Scratch::new(&format!("nbd-{test}"));
        let mut rig = Rig { dir, graph, registry, server: None, state, delay, export };
        rig.serve(0, Some(Duration::from_secs(10)));
        rig
    }

    /// Starts the server, again.
    pub fn serve(&mut self, max_connections: usize, handshake: Option<Duration>) {
        self.server = None;
        let (socket, file) = listen::on_path(self.path().as_ref()).unwrap();
        let setup = Setup { socket, file: Some(file), max_connections, handshake };
        self.server = Some(Server::start(setup, self.registry.clone()).unwrap());
    }

    pub fn path(&self) -> String {
        self.dir.path("s")
    }

    /// A node of the driver `nbd` on the export.
    pub fn client(&self, graph: &mut Graph, extra: serde_json::Value) -> Result<Arc<Node>> {
        client(graph, &self.path(), extra)
    }

    /// Waits until nobody is connected.
    pub fn wait_empty(&self) {
        for _ in 0..500 {
            if self.server.as_ref().is_none_or(|s| s.connections() == 0) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("connections stay");
    }
}

/// A node of the driver `nbd` on the export `e` behind a Unix socket.
pub fn client(graph: &mut Graph, path: &str, extra: serde_json::Value) -> Result<Arc<Node>> {
    let mut options = json!({"server": {"type": "unix", "path": path}, "export": "e"});
    let all = options.as_object_mut().unwrap();
    extra.as_object().unwrap().iter().for_each(|(k, v)| {
        all.insert(k.clone(), v.clone());
    });
    let options = BlockdevOptionsNbd::take(options, &qapi::Path::Root)?;
    let common = Common { node_name: Some("c".into()), unmap: Some(true), ..Common::default() };
    open::add(graph, &NoEnv, Plan { common, driver: Box::new(NbdPlan::Options(Box::new(options))) })
}

/// How long the random tests run.
pub fn soak() -> Duration {
    Duration::from_secs(std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(1))
}

/// Where they begin.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 | 1
    });
    println!("{test}: SEED={seed}");
    seed
}

/// A client that says what it likes.
pub struct Raw(pub UnixStream);

/// A reply to an option, or to a request.
pub type Reply = (u32, Vec<u8>);

impl Raw {
    /// Connects and gives the client flags.
    pub fn new(path: &str, flags: u32) -> Raw {
        let mut s = UnixStream::connect(path).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut hello = [0; 18];
        s.read_exact(&mut hello).unwrap();
        assert_eq!(hello, *b"NBDMAGICIHAVEOPT\0\x03");
        s.write_all(&flags.to_be_bytes()).unwrap();
        Raw(s)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn recv(&mut self, n: usize) -> Vec<u8> {
        let mut out = vec![0; n];
        self.0.read_exact(&mut out).unwrap();
        out
    }

    /// The server has closed.
    pub fn is_over(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }

    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<Reply> {
        self.send(
            &[&OPTS_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]
                .concat(),
        );
        let mut out = Vec::new();
        loop {
            let head = self.recv(20);
            assert_eq!((be64(&head, 0), be32(&head, 8)), (REP_MAGIC, option));
            let data = self.recv(be32(&head, 16) as usize);
            let kind = be32(&head, 12);
            out.push((kind, data));
            if kind == rep::ACK || kind & rep::ERR != 0 {
                return out;
            }
        }
    }

    /// Up to the transmission phase, with structured replies or without, and contexts.
    pub fn go(path: &str, structured: bool, contexts: &[&str]) -> Raw {
        let mut raw = Raw::new(path, 3);
        if structured {
            assert_eq!(raw.option(opt::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
        }
        if !contexts.is_empty() {
            assert_eq!(raw.option(opt::SET_META_CONTEXT, &queries("e", contexts)).len(), contexts.len() + 1);
        }
        assert_eq!(raw.option(opt::GO, &name("e", &[])).last().unwrap().0, rep::ACK);
        raw
    }

    pub fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32) {
        self.send(&Request { flags, kind, cookie: 77, offset, len }.bytes());
    }

    /// A simple reply: its error.
    pub fn simple(&mut self) -> u32 {
        let head = self.recv(16);
        assert_eq!((be32(&head, 0), be64(&head, 8)), (SIMPLE_REPLY_MAGIC, 77));
        be32(&head, 4)
    }

    /// All chunks of a reply: kind and payload.
    pub fn chunks(&mut self) -> Vec<(u16, Vec<u8>)> {
        let mut out = Vec::new();
        loop {
            let head = self.recv(20);
            assert_eq!((be32(&head, 0), be64(&head, 8)), (STRUCTURED_REPLY_MAGIC, 77));
            let payload = self.recv(be32(&head, 16) as usize);
            out.push((be16(&head, 6), payload));
            if be16(&head, 4) & chunk::DONE != 0 {
                return out;
            }
        }
    }
}

/// The data of OPT_GO and OPT_INFO.
pub fn name(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|w| out.extend(w.to_be_bytes()));
    out
}

/// The data of OPT_LIST_META_CONTEXT and OPT_SET_META_CONTEXT.
pub fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out.extend((queries.len() as u32).to_be_bytes());
    for q in queries {
        out.extend((q.len() as u32).to_be_bytes());
        out.extend(q.as_bytes());
    }
    out
}
