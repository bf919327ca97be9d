use super::*;
use crate::block::driver::{Driver, Flags};
use crate::block::graph::Graph;
use crate::block::node::{Edge, NodeOptions};
use crate::block::open;
use crate::block::testing::{Mem, MemState};
use crate::control::formats::{BlockdevOptions, Formats, plan};
use crate::control::objects::Objects;
use crate::qapi::{Path, Wire};
use crate::sys::fdset::FdSets;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn add(graph: &mut Graph, options: Value) {
    let (mut fds, objects) = (FdSets::new(), Objects::default());
    let plan = plan(BlockdevOptions::take(options, &Path::Root).unwrap()).unwrap();
    let node = open::add(graph, &Formats::new(&mut fds, &objects), plan).unwrap();
    graph.own(&node);
}

/// Without the list this would not end.
#[test]
fn ways_without_number_to_one_node_are_flushed_and_closed_in_time() {
    let mut graph = Graph::new();
    add(&mut graph, json!({"driver": "null-co", "node-name": "n0", "size": 1 << 20}));
    for n in 1..60 {
        let (name, below) = (format!("n{n}"), format!("n{}", n - 1));
        add(
            &mut graph,
            match n % 4 {
                0 => json!({"driver": "blkverify", "node-name": name, "raw": below, "test": below}),
                _ => {
                    json!({"driver": "quorum", "node-name": name, "vote-threshold": 2, "children": [below, below]})
                }
            },
        );
    }
    graph.find("n59").unwrap().flush().unwrap();
    graph.flush_all().unwrap();
    graph.close_all();
    assert_eq!(graph.nodes().count(), 0);
}

/// Flushes each child in turn, and writes to the first before it does that again.
struct Twice(Vec<Arc<Edge>>);

impl Driver for Twice {
    fn name(&self) -> &'static str {
        "twice"
    }
    fn len(&self) -> u64 {
        4096
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        self.0.clone()
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.0[0].need()?.read(off, to)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.0[0].need()?.write(off, from, flags)
    }
    fn flush(&self) -> io::Result<()> {
        let flush = || self.0.iter().map(|e| e.need()?.flush()).collect::<Vec<_>>();
        let first: io::Result<()> = flush().into_iter().collect();
        self.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE)?;
        let second: io::Result<()> = flush().into_iter().collect();
        first.and(second)
    }
}

/// Hands on, so that a node in front of it does not count flushes of its own.
struct Pass(Arc<Edge>);

impl Driver for Pass {
    fn name(&self) -> &'static str {
        "pass"
    }
    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.0)
    }
}

fn two_ways() -> (Arc<Node>, Arc<MemState>) {
    let mem = Mem::new(4096);
    let state = mem.state.clone();
    let bottom = Node::new("bottom", Box::new(mem), NodeOptions::default());
    let pass = |name: &str, below: &Arc<Node>| {
        let edge = Edge::new("file", Some(below.clone()));
        Node::new(name, Box::new(Pass(edge)), NodeOptions::default())
    };
    let shared = pass("shared", &bottom);
    let sides = ["a", "b"].map(|name| Edge::new(name, Some(pass(name, &shared))));
    (Node::new("top", Box::new(Twice(sides.to_vec())), NodeOptions::default()), state)
}

#[test]
fn what_is_written_between_two_flushes_is_flushed() {
    let (top, state) = two_ways();
    for n in 1..4 {
        top.write(0, &Iov::from_slice(&[2; 512]), Flags::NONE).unwrap();
        top.flush().unwrap();
        assert_eq!(state.flushes.load(Ordering::Relaxed), 2 * n);
    }
}

#[test]
fn an_error_is_everybodys_and_is_forgotten_with_the_flush() {
    let (top, state) = two_ways();
    state.fail.store(libc::EIO, Ordering::Relaxed);
    let before = state.flushes.load(Ordering::Relaxed);
    assert!(top.flush().is_err());
    let tried = state.flushes.load(Ordering::Relaxed) - before;
    state.fail.store(0, Ordering::Relaxed);
    top.flush().unwrap();
    assert!(tried <= 1, "{tried}");
    WAY.with_borrow(|way| assert!(way.depth == 0 && way.done.is_empty()));
}
