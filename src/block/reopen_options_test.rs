use super::*;
use crate::block::driver::Flags;
use crate::block::filename;
use crate::block::handle::HandleSpec;
use crate::block::open;
use crate::block::testing::{Rng, Scratch};
use crate::control::formats::{BlockdevOptions, Formats, plan, wanted};
use crate::control::objects::Objects;
use crate::qapi::{Path, Wire};
use crate::sys::fdset::FdSets;
use crate::sys::iov::{Iov, IovMut};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};

fn add(graph: &mut Graph, options: Value) -> Arc<Node> {
    let (mut fds, objects) = (FdSets::new(), Objects::default());
    let given = options.as_object().cloned().unwrap();
    let plan = plan(BlockdevOptions::take(options, &Path::Root).unwrap()).unwrap();
    let node = open::add(graph, &Formats::new(&mut fds, &objects), plan).unwrap();
    open::remember(&node, &given);
    node
}

fn reopen(graph: &mut Graph, list: Value) -> Result<()> {
    let (mut fds, objects) = (FdSets::new(), Objects::default());
    let list = list.as_array().unwrap();
    let list: Vec<_> = list.iter().map(|v| wanted(v.as_object().cloned().unwrap()).unwrap()).collect();
    graph.reopen(&Formats::new(&mut fds, &objects), &list, |_, _| Ok(()))
}

#[test]
fn guests_verify_every_byte_while_their_nodes_are_reopened() {
    const LEN: u64 = 1 << 20;
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let dir = Scratch::new("reopen-stress");
    let path = dir.file("a", LEN + 8192);
    let mut graph = Graph::new();
    let options = |direct: bool, unmap: bool, detect: &str, offset: u64| {
        json!({"driver": "raw", "node-name": "disk", "offset": offset, "size": LEN,
               "discard": if unmap { "unmap" } else { "ignore" }, "detect-zeroes": detect,
               "cache": {"direct": direct}, "file": {"driver": "file", "filename": path}})
    };
    let node = add(&mut graph, options(false, false, "off", 4096));
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let guests: Vec<_> = (0..2u64)
        .map(|id| {
            let (disk, stop) = (disk.clone(), stop.clone());
            std::thread::spawn(move || {
                let (mut rng, half) = (Rng(seed + 1 + id), LEN / 2);
                let mut model = vec![0u8; half as usize];
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) || rounds < 50 {
                    rounds += 1;
                    let n = 1 + rng.below(9000) as usize;
                    let off = rng.below(half - n as u64);
                    let place = off as usize..off as usize + n;
                    let at = id * half + off;
                    let byte = if rng.below(3) == 0 { 0 } else { rng.draw() as u8 };
                    disk.write(at, &Iov::from_slice(&vec![byte; n]), Flags::NONE).unwrap();
                    model[place.clone()].fill(byte);
                    let mut back = vec![0xee; n];
                    disk.read(at, &mut IovMut::from_slice(&mut back)).unwrap();
                    assert_eq!(back, model[place], "guest {id} round {rounds}");
                }
                let mut all = vec![0xee; half as usize];
                disk.read(id * half, &mut IovMut::from_slice(&mut all)).unwrap();
                assert!(all == model);
            })
        })
        .collect();
    let mut rng = Rng(seed + 9);
    let can_direct = reopen(&mut graph, json!([options(true, false, "off", 4096)])).is_ok();
    for _ in 0..60 {
        let (direct, unmap) = (can_direct && rng.below(2) == 0, rng.below(2) == 0);
        let detect = ["off", "on", "unmap"][rng.below(if unmap { 3 } else { 2 }) as usize];
        reopen(&mut graph, json!([options(direct, unmap, detect, 4096)])).unwrap();
        assert_eq!((node.options().direct, node.options().unmap), (direct, unmap));
        let file = filename::primary(&node).unwrap();
        assert_eq!(file.limits().request_alignment > 1, direct);
        // One that fails in its last entry changes nothing.
        let e = reopen(
            &mut graph,
            json!([options(!direct, !unmap, "on", 0), {"driver": "raw", "node-name": "none", "file": "x"}]),
        );
        assert_eq!(e.unwrap_err().desc, "Failed to find node with node-name='none'");
        // A guest writes.
        let mut read_only = options(direct, unmap, detect, 4096);
        read_only["read-only"] = true.into();
        let e = reopen(&mut graph, json!([read_only])).unwrap_err();
        assert_eq!(e.desc, "Read-only block node 'disk' cannot support read-write users");
        assert_eq!((node.options().direct, node.read_only(), file.read_only()), (direct, false, false));
    }
    stop.store(true, Ordering::Relaxed);
    guests.into_iter().for_each(|g| g.join().unwrap());
    graph.detach(&disk);
    let mut read_only = options(false, false, "off", 4096);
    read_only["read-only"] = true.into();
    reopen(&mut graph, json!([read_only])).unwrap();
    let file = filename::primary(&node).unwrap();
    assert!(node.read_only() && file.read_only(), "a child that was defined with it follows");
    node.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap_err();
    reopen(&mut graph, json!([options(false, false, "off", 0)])).unwrap();
    assert!(!node.read_only() && !file.read_only());
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    disk.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[..512], [1; 512], "the window has moved");
}

#[test]
fn a_node_without_the_right_to_write_stays_as_it_was() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Scratch::new("reopen-ro");
    let path = dir.file("a", 4096);
    let mut graph = Graph::new();
    let options = |read_only: bool| {
        json!({"driver": "raw", "node-name": "r", "read-only": read_only,
               "file": {"driver": "file", "filename": path, "node-name": "f"}})
    };
    let node = add(&mut graph, options(true));
    let spec = HandleSpec { uses: super::super::driver::Perm::CONSISTENT_READ, ..HandleSpec::default() };
    let reader = graph.attach(Some(node.clone()), spec).unwrap();
    reopen(&mut graph, json!([options(false)])).unwrap();
    reopen(&mut graph, json!([options(true)])).unwrap();
    drop(reader);
    assert!(node.read_only());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    // A child by itself, whose parent stays as it is.
    let e = reopen(&mut graph, json!([{"driver": "file", "node-name": "f", "filename": "/another"}]));
    assert_eq!(e.unwrap_err().desc, "Cannot change the option 'filename'");
}
