use super::*;
use crate::block::driver::{Driver, Flags, Limits, Perm};
use crate::block::handle::HandleSpec;
use crate::block::node::NodeOptions;
use crate::block::testing::Mem;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A filter that counts writes, and may refuse to share what its users write.
struct Counting {
    edge: Arc<Edge>,
    writes: Arc<AtomicUsize>,
    alone: bool,
}

impl Driver for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }
    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.edge)
    }
    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if self.alone { (above.0, above.1 & !Perm::WRITE) } else { above }
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.edge.need()?.write(off, from, flags)
    }
}

fn counting(name: &str, alone: bool) -> (Arc<Node>, Arc<AtomicUsize>) {
    let writes = Arc::new(AtomicUsize::new(0));
    let driver = Box::new(Counting { edge: Edge::new("file", None), writes: writes.clone(), alone });
    (Node::new(name, driver, NodeOptions { implicit: true, ..NodeOptions::default() }), writes)
}

#[test]
fn a_filter_comes_and_goes_under_a_writing_guest() {
    let mut graph = Graph::new();
    let disk = Node::new("disk", Box::new(Mem::new(4096)), NodeOptions::default());
    graph.add(disk.clone()).unwrap();
    graph.own(&disk);
    let handle = graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let guest = {
        let (handle, stop) = (handle.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut n: u64 = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                handle.write(8, &Iov::from_slice(&n.to_le_bytes()), Flags::NONE).unwrap();
                let mut back = [0; 8];
                handle.read(8, &mut IovMut::from_slice(&mut back)).unwrap();
                assert_eq!(u64::from_le_bytes(back), n);
            }
        })
    };
    for round in 0..50 {
        let (filter, writes) = counting(&format!("filter{round}"), true);
        graph.insert_filter(&filter, &disk).unwrap();
        assert!(Arc::ptr_eq(&handle.node().unwrap(), &filter));
        assert!(Arc::ptr_eq(&handle.node().unwrap().skip_implicit(), &disk));
        while writes.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        graph.remove_filter(&filter).unwrap();
        assert!(Arc::ptr_eq(&handle.node().unwrap(), &disk));
        assert!(graph.find(&filter.name).is_none(), "the filter is closed");
    }
    stop.store(true, Ordering::Relaxed);
    guest.join().unwrap();
}

#[test]
fn a_filter_that_the_users_do_not_allow_leaves_no_trace() {
    let mut graph = Graph::new();
    let disk = Node::new("disk", Box::new(Mem::new(4096)), NodeOptions::default());
    graph.add(disk.clone()).unwrap();
    graph.own(&disk);
    let spec = || HandleSpec { shares: Perm::ALL, ..HandleSpec::default() };
    let one = graph.attach(Some(disk.clone()), spec()).unwrap();
    // A second writer that is not above the filter afterwards.
    let (other, _) = counting("other", false);
    graph.insert_filter(&other, &disk).unwrap();
    let two = graph.attach(Some(disk.clone()), spec()).unwrap();
    let (filter, _) = counting("alone", true);
    let quiesced = graph.quiesce(&[&disk], &[]);
    graph.add(filter.clone()).unwrap();
    let done = graph.edit(&quiesced, |edit| {
        edit.set_root(&two, Some(filter.clone()))?;
        edit.set(filter.driver.filtered().unwrap(), Some(disk.clone()))
    });
    drop(quiesced);
    assert!(done.unwrap_err().to_string().starts_with("Permission conflict on node 'disk'"));
    assert!(filter.filtered().is_none());
    assert!(Arc::ptr_eq(&two.node().unwrap(), &disk));
    assert!(Arc::ptr_eq(&one.node().unwrap(), &other));
    let plain = graph.remove_filter(&disk).unwrap_err();
    assert_eq!(plain.to_string(), "Node 'disk' is not a filter");
}

#[test]
fn a_filter_passes_on_what_it_does_not_say_itself() {
    let mut graph = Graph::new();
    let limits = Limits { request_alignment: 512, discard_alignment: 65536, ..Limits::default() };
    let mem = Mem { grows: true, limits: Limits { cheap_zeroes: true, ..limits }, ..Mem::new(4096) };
    let disk = Node::new("disk", Box::new(mem), NodeOptions::default());
    graph.add(disk.clone()).unwrap();
    graph.own(&disk);
    let handle = graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let (filter, _) = counting("filter", false);
    assert_eq!(filter.limits(), Limits::default(), "it is on nothing");
    graph.insert_filter(&filter, &disk).unwrap();
    // It takes any request, and the disk aligns it.
    let passed = Limits { request_alignment: 1, cheap_zeroes: true, ..limits };
    assert_eq!(filter.limits(), passed);
    // A format above may have to write beyond the end.
    filter.write(5000, &Iov::from_slice(b"more"), Flags::NONE).unwrap();
    assert_eq!(handle.len(), 5120);
    let mut back = [0; 4];
    filter.read(5000, &mut IovMut::from_slice(&mut back)).unwrap();
    assert_eq!(&back, b"more");
    // A medium with other needs below it.
    let other = Mem { limits: Limits { discard_alignment: 4096, ..Limits::default() }, ..Mem::new(4096) };
    let other = Node::new("other", Box::new(other), NodeOptions::default());
    graph.add(other.clone()).unwrap();
    let quiesced = graph.quiesce(&[&filter], &[]);
    let edge = filter.driver.filtered().unwrap();
    graph.edit(&quiesced, |edit| edit.set(edge, Some(other.clone()))).unwrap();
    drop(quiesced);
    assert_eq!(filter.limits().discard_alignment, 4096);
    graph.remove_filter(&filter).unwrap();
    assert!(filter.driver.close().is_ok(), "it is on nothing, and has nothing to write");
}
