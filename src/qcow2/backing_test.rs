use super::*;
use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::testing::{Mem, MemState};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::open::{Options, open};
use std::sync::Arc;

fn memory() -> (Arc<Node>, Arc<MemState>) {
    let mut mem = Mem::new(0);
    mem.grows = true;
    let state = mem.state.clone();
    (Node::new("file", Box::new(mem), NodeOptions::default()), state)
}

fn image(options: &CreateOptions) -> (Qcow2, Arc<MemState>) {
    let (node, state) = memory();
    create(&node, None, options).unwrap();
    let (file, backing) = (Edge::new("file", Some(node)), Edge::new("backing", None));
    (open(file, backing, None, Options::default()).unwrap(), state)
}

fn options(cluster_size: u64, version: u32) -> CreateOptions {
    CreateOptions {
        size: 1 << 20,
        version,
        cluster_size,
        backing_file: Some("/a/base.qcow2".into()),
        backing_format: Some("qcow2".into()),
        ..CreateOptions::default()
    }
}

fn on_disk(state: &MemState) -> Header {
    Header::parse(&state.data.lock().unwrap()[..]).unwrap()
}

#[test]
fn each_name_is_found_again_and_nothing_else_changes() {
    for (cluster_size, version) in [(65536, 3), (65536, 2), (4096, 3), (2048, 3), (1024, 2)] {
        let (image, state) = image(&options(cluster_size, version));
        let before = on_disk(&state);
        for name in ["b", "/some/where/else.qcow2", &"x".repeat(700), "c", &"y".repeat(699), "json:{}"] {
            image.rename_backing(name, None).unwrap();
            let now = on_disk(&state);
            assert_eq!(now.backing_file.as_deref(), Some(name), "{cluster_size} v{version}");
            assert_eq!(now, Header { backing_file: now.backing_file.clone(), ..before.clone() });
            assert_eq!(image.lock().header.backing_file.as_deref(), Some(name));
        }
    }
}

#[test]
fn a_name_goes_and_another_one_comes() {
    for (cluster_size, version) in [(65536, 3), (65536, 2), (4096, 3), (1024, 2)] {
        for start in [Some("/a/base.qcow2"), None] {
            let mut o = options(cluster_size, version);
            o.backing_file = start.map(String::from);
            o.backing_format = start.map(|_| "qcow2".into());
            let (image, state) = image(&o);
            for (name, format) in [("b", "raw"), ("/some/where", "qcow2"), (&*"x".repeat(600), "raw")] {
                image.forget_backing().unwrap();
                assert_eq!(on_disk(&state).backing_file, None);
                assert!(image.rename_backing(name, None).is_err(), "without a format");
                image.rename_backing(name, Some(format)).unwrap();
                let now = on_disk(&state);
                let said = (now.backing_file.as_deref(), now.backing_format.as_deref());
                assert_eq!(said, (Some(name), Some(format)), "{cluster_size} v{version}");
                let meta = image.lock();
                let known = (meta.header.backing_file.as_deref(), meta.header.backing_format.as_deref());
                assert_eq!(known, said);
            }
        }
    }
}

#[test]
fn a_crash_leaves_the_old_name_or_the_new_one() {
    // The second of the two writes is lost: what is there must still be the old header.
    let (image, state) = image(&options(65536, 3));
    for (n, name) in ["/b", &"long".repeat(100), "short", "/a/somewhat/longer"].into_iter().enumerate() {
        let before = state.data.lock().unwrap().clone();
        let old = on_disk(&state);
        image.rename_backing(name, None).unwrap();
        let mut torn = state.data.lock().unwrap().clone();
        torn[..512].copy_from_slice(&before[..512]);
        assert_eq!(Header::parse(&torn).unwrap(), old, "step {n}");
    }
}

#[test]
fn names_that_cannot_be_recorded() {
    let (with, _) = image(&options(65536, 3));
    let (without, _) =
        image(&CreateOptions { backing_file: None, backing_format: None, ..options(65536, 3) });
    for (image, name) in [(&with, ""), (&with, &"x".repeat(1024)), (&without, "b")] {
        let e = image.rename_backing(name, None).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
    }
    let (small, state) = image(&options(512, 2));
    let before = on_disk(&state);
    assert!(small.rename_backing(&"x".repeat(600), None).is_err(), "it does not fit into the cluster");
    assert_eq!(on_disk(&state), before);
}

#[test]
fn another_format_and_no_backing_file_at_all() {
    let (image, state) = image(&options(65536, 3));
    for (name, format) in
        [("/a/b.raw", "raw"), ("/c.qcow2", "qcow2"), ("/d", "a-longer-format"), ("/e", "raw")]
    {
        let before = state.data.lock().unwrap().clone();
        let old = on_disk(&state);
        image.rename_backing(name, Some(format)).unwrap();
        let now = on_disk(&state);
        assert_eq!(now.backing_file.as_deref(), Some(name));
        assert_eq!(now.backing_format.as_deref(), Some(format));
        assert_eq!(image.lock().header.backing_format.as_deref(), Some(format));
        if format.len() <= 8 && old.backing_format.is_some_and(|f| f.len() <= 8) {
            // Without the write of the first sector the image has the old name and format.
            let mut torn = state.data.lock().unwrap().clone();
            torn[..SECTOR].copy_from_slice(&before[..SECTOR]);
            let torn = Header::parse(&torn).unwrap();
            assert_eq!(torn.backing_file, old.backing_file);
        }
    }
    image.forget_backing().unwrap();
    assert_eq!(on_disk(&state).backing_file, None);
    assert!(image.rename_backing("x", None).is_err());
}
