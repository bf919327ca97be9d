use super::*;
use crate::block::driver::{Driver, Extent, ExtentKind, Flags};
use crate::block::node::{NodeOptions, errno};
use crate::block::perm::for_backing;
use crate::block::testing::{Mem, Rng};
use crate::sys::iov::{Iov, IovMut};
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Passes everything on, and says what it was told.
struct Filter {
    edge: Arc<Edge>,
    told: Arc<Mutex<Vec<(Perm, Perm)>>>,
    /// set_perm fails when it is asked for this.
    refuses: Perm,
    closed: Arc<AtomicUsize>,
    wants: Option<(Perm, Perm)>,
}

impl Filter {
    fn new(role: &str, below: Option<Arc<Node>>) -> Filter {
        Filter {
            edge: Edge::new(role, below),
            told: Arc::default(),
            refuses: Perm::NONE,
            closed: Arc::default(),
            wants: None,
        }
    }
}

impl Driver for Filter {
    fn name(&self) -> &'static str {
        "filter"
    }
    fn len(&self) -> u64 {
        self.edge.node().map_or(0, |n| n.len())
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.edge.clone()]
    }
    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        match (self.wants, &*edge.role) {
            (Some(wants), _) => wants,
            (None, "backing") => for_backing(above),
            (None, _) => above,
        }
    }
    fn set_perm(&self, uses: Perm, shares: Perm) -> io::Result<()> {
        if uses & self.refuses != Perm::NONE {
            return Err(errno(libc::EAGAIN));
        }
        self.told.lock().unwrap().push((uses, shares));
        Ok(())
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.edge.need()?.read(off, to)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.edge.need()?.write(off, from, flags)
    }
    fn flush(&self) -> io::Result<()> {
        self.edge.need()?.flush()
    }
    fn close(&self) -> io::Result<()> {
        self.closed.fetch_add(1, Ordering::SeqCst);
        self.flush()
    }
}

/// Copy-on-write in blocks of 512 bytes, in memory: what a snapshot puts on top.
struct Overlay {
    backing: Arc<Edge>,
    len: u64,
    blocks: Mutex<HashMap<u64, [u8; 512]>>,
}

impl Overlay {
    fn block(&self, n: u64) -> io::Result<[u8; 512]> {
        if let Some(b) = self.blocks.lock().unwrap().get(&n) {
            return Ok(*b);
        }
        let mut b = [0; 512];
        self.backing.need()?.read(n * 512, &mut IovMut::from_slice(&mut b))?;
        Ok(b)
    }
}

impl Driver for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.backing.clone()]
    }
    fn limits(&self) -> crate::block::driver::Limits {
        crate::block::driver::Limits { request_alignment: 512, ..Default::default() }
    }
    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        for_backing(above)
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        for i in 0..to.len() / 512 {
            to.copy_from(i * 512, &self.block(off / 512 + i as u64)?);
        }
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        for i in 0..from.len() / 512 {
            let mut b = [0; 512];
            from.copy_to(i * 512, &mut b);
            self.blocks.lock().unwrap().insert(off / 512 + i as u64, b);
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, _: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { kind: ExtentKind::Data, len, host_offset: None })
    }
}

const LEN: usize = 64 * 1024;

fn mem(name: &str) -> (Arc<Node>, Arc<crate::block::testing::MemState>) {
    let mem = Mem::new(LEN);
    let state = mem.state.clone();
    (Node::new(name, Box::new(mem), NodeOptions::default()), state)
}

fn filter(name: &str, role: &str, below: &Arc<Node>) -> Arc<Node> {
    Node::new(name, Box::new(Filter::new(role, Some(below.clone()))), NodeOptions::default())
}

fn contents(node: &Arc<Node>) -> Vec<u8> {
    let mut all = vec![0; LEN];
    node.read(0, &mut IovMut::from_slice(&mut all)).unwrap();
    all
}

/// Guest threads write and verify slots of their own while the control thread moves the data to
/// another node and spoils the old one, puts filters in and takes them out, and takes snapshots.
/// A request that is still under way at the old place when the new one is in use loses its data.
#[test]
fn guests_never_see_the_graph_change() {
    let seed = 0x9E37_79B9_7F4A_7C15;
    eprintln!("seed {seed}");
    let mut graph = Graph::new();
    let (first, mut storage) = mem("n0");
    graph.add(first.clone()).unwrap();
    // Two disks on the same node: all gates above it must be closed.
    let spec = HandleSpec { shares: Perm::ALL, ..HandleSpec::default() };
    let other = graph.attach(Some(first.clone()), spec.clone()).unwrap();
    let handle = graph.attach(Some(first), spec).unwrap();
    let (stop, requests) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut counts = [0; 4];
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let handle = if t % 2 == 0 { &handle } else { &other };
            let (stop, requests) = (&stop, &requests);
            s.spawn(move || {
                let mut rng = Rng(seed + t);
                // Slots of 1000 bytes at odd offsets, the threads' own ones interleaved.
                let slots = LEN as u64 / 4000;
                let mut model = vec![0u8; slots as usize];
                while !stop.load(Ordering::Relaxed) {
                    let n = rng.below(slots);
                    let off = n * 4000 + t * 1000;
                    if rng.below(2) == 0 {
                        let value = rng.draw() as u8;
                        handle.write(off, &Iov::from_slice(&[value; 1000]), Flags::NONE).unwrap();
                        model[n as usize] = value;
                    } else {
                        let mut back = [0xEE; 1000];
                        handle.read(off, &mut IovMut::from_slice(&mut back)).unwrap();
                        assert_eq!(back, [model[n as usize]; 1000], "thread {t}, slot {n}");
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // A failure here must let the threads end.
        let control = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut rng = Rng(seed);
            // `SOAK`: seconds, for a long run.
            let soak = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
            let end = Instant::now() + Duration::from_secs(soak);
            let mut serial = 0;
            let mut depth = 0;
            while Instant::now() < end {
                serial += 1;
                let name = format!("n{serial}");
                let top = handle.node().unwrap();
                // A long chain only makes it slow: flatten it at times.
                match if depth > 6 { 0 } else { rng.below(4) } {
                    0 => {
                        let (new, state) = mem(&name);
                        graph.add(new.clone()).unwrap();
                        let quiet = graph.quiesce(&[&top], &[]);
                        let all = contents(&top);
                        new.write(0, &Iov::from_slice(&all), Flags::NONE).unwrap();
                        graph.edit(&quiet, |e| e.replace(&top, &new, None)).unwrap();
                        storage.data.lock().unwrap().fill(0x55);
                        drop((quiet, top));
                        graph.collect();
                        storage = state;
                        depth = 0;
                        counts[0] += 1;
                    }
                    1 => {
                        let new = filter(&name, "file", &top);
                        graph.add(new.clone()).unwrap();
                        let quiet = graph.quiesce(&[&top], &[]);
                        graph.edit(&quiet, |e| e.replace(&top, &new, Some(&new))).unwrap();
                        depth += 1;
                        counts[1] += 1;
                    }
                    2 if top.driver.name() == "filter" => {
                        let below = top.driver.edges()[0].node().unwrap();
                        let quiet = graph.quiesce(&[&top], &[]);
                        graph.edit(&quiet, |e| e.replace(&top, &below, None)).unwrap();
                        drop((quiet, top));
                        graph.collect();
                        depth -= 1;
                        counts[2] += 1;
                    }
                    _ => {
                        let overlay = Overlay {
                            backing: Edge::new("backing", Some(top.clone())),
                            len: LEN as u64,
                            blocks: Mutex::default(),
                        };
                        let new = Node::new(name, Box::new(overlay), NodeOptions::default());
                        let quiet = graph.quiesce(&[&top], &[]);
                        let edge = new.driver.edges()[0].clone();
                        edge.set(None);
                        graph.add(new.clone()).unwrap();
                        graph
                            .edit(&quiet, |e| {
                                e.replace(&top, &new, None)?;
                                e.set(&edge, Some(top.clone()))
                            })
                            .unwrap();
                        depth += 1;
                        counts[3] += 1;
                    }
                }
                std::thread::sleep(Duration::from_micros(rng.below(1500)));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        control.unwrap();
    });
    eprintln!(
        "{} requests; {} moves, {} filters in, {} out, {} snapshots",
        requests.load(Ordering::Relaxed),
        counts[0],
        counts[1],
        counts[2],
        counts[3]
    );
    assert!(counts.iter().all(|&n| n > 3), "{counts:?}");
}

#[test]
fn an_edit_that_fails_did_not_happen() {
    let mut graph = Graph::new();
    let (a, b) = (mem("a").0, mem("b").0);
    for n in [&a, &b] {
        graph.add(n.clone()).unwrap();
        graph.own(n);
    }
    let handle = graph.attach(Some(a.clone()), HandleSpec::default()).unwrap();
    let quiet = graph.quiesce(&[&a, &b], &[]);
    let done = graph.edit(&quiet, |e| {
        e.set_root(&handle, Some(b.clone()))?;
        assert!(Arc::ptr_eq(&handle.node().unwrap(), &b));
        Err(Error::new("no"))
    });
    assert_eq!(done.unwrap_err().desc, "no");
    assert!(Arc::ptr_eq(&handle.node().unwrap(), &a));
    // Somebody else writes to b and does not share that.
    drop(quiet);
    let other = graph.attach(Some(b.clone()), HandleSpec::default()).unwrap();
    let quiet = graph.quiesce(&[&a, &b], &[]);
    let e = graph.edit(&quiet, |e| e.set_root(&handle, Some(b.clone()))).unwrap_err();
    assert!(e.desc.starts_with("Permission conflict on node 'b'"), "{e}");
    assert!(Arc::ptr_eq(&handle.node().unwrap(), &a));
    drop(quiet);
    graph.detach(&other);
    let quiet = graph.quiesce(&[&a, &b], &[]);
    graph.edit(&quiet, |e| e.set_root(&handle, Some(b.clone()))).unwrap();
    assert!(Arc::ptr_eq(&handle.node().unwrap(), &b));
}

#[test]
fn cycles_are_refused() {
    let mut graph = Graph::new();
    let a = mem("a").0;
    let f = filter("f", "file", &a);
    let g = filter("g", "file", &f);
    for n in [&a, &f, &g] {
        graph.add(n.clone()).unwrap();
        graph.own(n);
    }
    let quiet = graph.quiesce(&[&a], &[]);
    let edge = f.driver.edges()[0].clone();
    for to in [&f, &g] {
        let e = graph.edit(&quiet, |e| e.set(&edge, Some(to.clone()))).unwrap_err();
        assert!(e.desc.contains("would be its own child"), "{e}");
        assert!(Arc::ptr_eq(&edge.node().unwrap(), &a));
    }
}

#[test]
fn a_second_writer_is_refused_by_name() {
    let mut graph = Graph::new();
    let a = mem("a").0;
    graph.add(a.clone()).unwrap();
    let spec = |name: &str| HandleSpec { name: name.into(), ..HandleSpec::default() };
    let first = graph.attach(Some(a.clone()), spec("disk0")).unwrap();
    let refused = graph.attach(Some(a.clone()), spec("")).err().unwrap();
    assert_eq!(
        refused.desc,
        "Permission conflict on node 'a': permissions 'write' are both required by block \
         device 'disk0' (uses node 'a' as 'root' child) and unshared by an unnamed block device \
         (uses node 'a' as 'root' child)."
    );
    assert_eq!(graph.handles().len(), 1, "nothing is left of the refused one");
    // A reader is welcome, also through a filter.
    let f = filter("f", "file", &a);
    graph.add(f.clone()).unwrap();
    let reads = HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::ALL, ..spec("reader") };
    let reader = graph.attach(Some(f.clone()), reads).unwrap();
    // One that does not bear writers is not.
    let e = graph.set_perm(&reader, Perm::CONSISTENT_READ, Perm::CONSISTENT_READ).unwrap_err();
    assert!(e.desc.contains("required by block device 'disk0'"), "{e}");
    assert!(e.desc.contains("unshared by node 'f' (uses node 'a' as 'file' child)"), "{e}");
    assert_eq!(reader.shares(), Perm::ALL, "as before");
    graph.detach(&first);
    graph.set_perm(&reader, Perm::CONSISTENT_READ, Perm::CONSISTENT_READ).unwrap();
}

#[test]
fn writers_and_read_only_nodes_do_not_go_together() {
    let mut graph = Graph::new();
    let options = NodeOptions { read_only: true, ..NodeOptions::default() };
    let a = Node::new("a", Box::new(Mem::new(512)), options);
    graph.add(a.clone()).unwrap();
    graph.own(&a);
    let e = graph.attach(Some(a.clone()), HandleSpec::default()).err().unwrap();
    assert_eq!(e.desc, "Block node is read-only");
    let reads = HandleSpec { uses: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    graph.attach(Some(a.clone()), reads).unwrap();
    assert_eq!(graph.resize(&a, 0).unwrap_err().desc, "Image is read-only");
}

#[test]
fn a_driver_that_cannot_have_a_permission_undoes_it_for_all() {
    let mut graph = Graph::new();
    let mut low = Filter::new("file", Some(mem("a").0));
    low.refuses = Perm::WRITE;
    let low = Node::new("low", Box::new(low), NodeOptions::default());
    let high = Filter::new("file", Some(low.clone()));
    let told = high.told.clone();
    let high = Node::new("high", Box::new(high), NodeOptions::default());
    graph.add(low).unwrap();
    graph.add(high.clone()).unwrap();
    graph.own(&high);
    let e = graph.attach(Some(high.clone()), HandleSpec::default()).err().unwrap();
    assert_eq!(e.desc, "Resource temporarily unavailable");
    let told = told.lock().unwrap().clone();
    assert_eq!(told.len(), 2, "given and taken back: {told:?}");
    assert!(told[0].0.contains(Perm::WRITE));
    assert_eq!(told[1], (Perm::NONE, Perm::ALL));
    assert!(graph.handles().is_empty());
}

#[test]
fn unused_nodes_are_closed_once_and_parents_first() {
    let mut graph = Graph::new();
    let (a, state) = mem("a");
    let f = Filter::new("file", Some(a.clone()));
    let closed = f.closed.clone();
    let f = Node::new("f", Box::new(f), NodeOptions::default());
    graph.add(a).unwrap();
    graph.add(f.clone()).unwrap();
    let handle = graph.attach(Some(f.clone()), HandleSpec::default()).unwrap();
    handle.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    drop(f);
    graph.collect();
    assert_eq!(closed.load(Ordering::SeqCst), 0, "in use");
    graph.detach(&handle);
    assert_eq!(closed.load(Ordering::SeqCst), 1);
    assert!(state.flushes.load(Ordering::SeqCst) > 0, "the child was there to be flushed");
    assert_eq!(graph.nodes().count(), 0);
    let e = handle.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::ENOMEDIUM));
}

#[test]
fn in_use_is_said_by_how() {
    let mut graph = Graph::new();
    let a = mem("a").0;
    let f = filter("ov", "backing", &a);
    for n in [&a, &f] {
        graph.add(n.clone()).unwrap();
        graph.own(n);
    }
    assert_eq!(graph.delete("a").unwrap_err().desc, "Node 'a' is busy: node is used as backing hd of 'ov'");
    let reads = HandleSpec { uses: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    let handle = graph.attach(Some(f.clone()), reads).unwrap();
    assert_eq!(graph.delete("ov").unwrap_err().desc, "Node ov is in use");
    graph.detach(&handle);
    drop((f, a));
    graph.delete("ov").unwrap();
    graph.delete("a").unwrap();
    assert_eq!(graph.nodes().count(), 0);
}

#[test]
fn a_resize_is_told_to_those_above_and_needs_their_consent() {
    let mut graph = Graph::new();
    let a = mem("a").0;
    let f = filter("f", "file", &a);
    graph.add(a.clone()).unwrap();
    graph.add(f.clone()).unwrap();
    let handle = graph.attach(Some(f), HandleSpec::default()).unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let s = seen.clone();
    handle.on_resize(Some(Box::new(move |len| s.store(len as usize, Ordering::SeqCst))));
    graph.resize(&a, 4096).unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 4096);
    graph.set_perm(&handle, Perm::CONSISTENT_READ, Perm::CONSISTENT_READ).unwrap();
    let e = graph.resize(&a, 8192).unwrap_err();
    assert!(e.desc.contains("permissions 'resize' are both required by"), "{e}");
    assert_eq!(a.len(), 4096);
}

#[test]
fn names() {
    let mut graph = Graph::new();
    let handle = graph.attach(None, HandleSpec { name: "drive0".into(), ..HandleSpec::default() }).unwrap();
    for (name, want) in [
        ("", "Invalid node-name: ''"),
        ("1a", "Invalid node-name: '1a'"),
        ("a b", "Invalid node-name: 'a b'"),
        ("drive0", "node-name=drive0 is conflicting with a device id"),
        (&"n".repeat(32), "Node name too long"),
    ] {
        assert_eq!(graph.check_name(name).unwrap_err().desc, want);
    }
    graph.check_name(&"n".repeat(31)).unwrap();
    graph.check_name("a-b.c_d9").unwrap();
    graph.detach(&handle);
    graph.check_name("drive0").unwrap();
    assert_eq!((graph.auto_name(), graph.auto_name()), ("#block001".into(), "#block002".into()));
}

#[test]
fn wants_of_a_driver_go_down_the_whole_way() {
    let mut graph = Graph::new();
    let a = mem("a").0;
    let mut f = Filter::new("file", Some(a.clone()));
    f.wants = Some((Perm::WRITE, Perm::CONSISTENT_READ));
    let f = Node::new("f", Box::new(f), NodeOptions::default());
    graph.add(a.clone()).unwrap();
    graph.add(f.clone()).unwrap();
    let e = graph.attach(Some(a), HandleSpec::default()).err().unwrap();
    assert!(e.desc.contains("node 'f'"), "{e}");
}
