use super::*;
use crate::block::driver::{Driver, Flags, Limits};
use crate::block::node::{Edge, NodeOptions};
use crate::block::open::{self, Child, Common, Plan};
use crate::block::raw::RawPlan;
use crate::block::testing::NoEnv;
use crate::sys::iov::{Iov, IovMut};

/// A layer of 10 letters of 100 bytes each: `d`ata, `z`ero, `-` not here.
struct Layer(&'static str, Option<Arc<Edge>>);

impl Driver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }
    fn len(&self) -> u64 {
        self.0.len() as u64 * 100
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        self.1.iter().cloned().collect()
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn read(&self, _: u64, _: &mut IovMut) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &Iov, _: Flags) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let kind = match self.0.as_bytes()[off as usize / 100] {
            b'd' => ExtentKind::Data,
            b'z' => ExtentKind::Zero,
            _ => ExtentKind::Unallocated,
        };
        Ok(Extent { kind, len: len.min(100 - off % 100), host_offset: None })
    }
}

fn layer(letters: &'static str, backing: Option<Arc<Node>>) -> Arc<Node> {
    let edge = backing.map(|node| Edge::new("backing", Some(node)));
    Node::new(letters, Box::new(Layer(letters, edge)), NodeOptions::default())
}

fn at(node: &Node, off: u64) -> (bool, u32, u64) {
    let c = contents(node, off, 1 << 20).unwrap();
    (c.zero, c.depth, c.len)
}

#[test]
fn each_place_is_found_where_it_lies() {
    let base = layer("dd-", None);
    let mid = layer("d-z--d", Some(base));
    let top = layer("-----dz", Some(mid));
    assert_eq!(at(&top, 0), (false, 2, 100));
    assert_eq!(at(&top, 150), (false, 3, 50), "from where it was asked");
    assert_eq!(at(&top, 200), (true, 2, 100));
    assert_eq!(at(&top, 300), (true, 0, 100), "beyond the end of the last one");
    assert_eq!(at(&top, 500), (false, 1, 100));
    assert_eq!(at(&top, 600), (true, 1, 100));
    assert_eq!(contents(&top, 0, 30).unwrap().len, 30);
}

/// `raw` once passed on its child's "not in this node", which its users took for zeroes.
#[test]
fn a_raw_window_into_an_overlay_has_the_contents_of_the_chain() {
    let mut graph = crate::block::graph::Graph::new();
    let base = layer("ddd", None);
    let behind = Edge::new("backing", Some(base.clone()));
    let top = Node::new("top", Box::new(Layer("--d", Some(behind))), NodeOptions::default());
    graph.add(base).unwrap();
    graph.add(top).unwrap();
    let raw = RawPlan { file: Child::Node("top".into()), offset: Some(50), size: None };
    let plan =
        Plan { common: Common { node_name: Some("raw".into()), ..Common::default() }, driver: Box::new(raw) };
    let node = open::add(&mut graph, &NoEnv, plan).unwrap();
    assert_eq!(at(&node, 0), (false, 1, 50));
}
