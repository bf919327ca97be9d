use super::*;
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{NoEnv, Scratch};
use crate::sys::iov::IovMut;

fn plan(path: &str, align: Option<u64>, size: Option<u64>) -> Plan {
    let file = Child::New(Box::new(open::from_file_name(&NoEnv, path).unwrap()));
    let common = Common { node_name: Some("p".into()), ..Common::default() };
    Plan { common, driver: Box::new(PreallocatePlan { file, align, size }) }
}

#[test]
fn the_file_grows_ahead_of_its_data_and_is_cut_in_the_end() {
    let dir = Scratch::new("prealloc");
    let path = dir.file("image", 0);
    let length = || std::fs::metadata(&path).unwrap().len();
    let mut graph = Graph::new();
    let node = open::add(&mut graph, &NoEnv, plan(&path, Some(65536), Some(1 << 20))).unwrap();
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    node.write(0, &Iov::from_slice(&[1; 1000]), Flags::NONE).unwrap();
    assert_eq!(node.len(), 1000);
    assert_eq!(length(), (1000u64 + (1 << 20)).next_multiple_of(65536));
    let reached = length();
    node.write(500_000, &Iov::from_slice(&[2; 1000]), Flags::NONE).unwrap();
    assert_eq!((node.len(), length()), (501_000, reached), "there was room");
    let mut gap = [9; 4];
    node.read(1000, &mut IovMut::from_slice(&mut gap)).unwrap();
    assert_eq!(gap, [0; 4]);
    graph.detach(&disk);
    assert_eq!(length(), 501_000, "nobody writes any more");
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    node.zero(501_000, 24, Flags::NONE).unwrap();
    assert!(length() > 501_024);
    graph.resize(&node, 600_000).unwrap();
    assert_eq!((node.len(), length()), (600_000, 600_000));
    graph.detach(&disk);
    drop(node);
    graph.close_all();
    assert_eq!(length(), 600_000);
}

#[test]
fn alignments_that_are_none_are_refused() {
    let dir = Scratch::new("prealloc-align");
    let path = dir.file("image", 0);
    let mut graph = Graph::new();
    for bad in [0, 100, 1 << 63] {
        let e = open::add(&mut graph, &NoEnv, plan(&path, Some(bad), None)).err().unwrap();
        assert!(e.to_string().starts_with("prealloc-align parameter of preallocate filter is not"), "{e}");
    }
    assert_eq!(graph.nodes().count(), 0);
}
