use crate::block::handle::HandleSpec;
use crate::block::testing::{Scratch, qemu};
use crate::qmp::cmd_blockdev::tests::Qmp;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Value, json};

fn chain(dir: &Scratch) -> Option<(String, String)> {
    let img = qemu("qemu-img")?;
    let (base, top) = (dir.path("base.raw"), dir.path("top.qcow2"));
    std::fs::write(&base, vec![7; 1 << 20]).unwrap();
    let run = |args: &[&str]| {
        let out = std::process::Command::new(&img).args(args).output().unwrap();
        assert!(out.status.success(), "{out:?}");
    };
    run(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &top]);
    Some((base, top))
}

#[test]
fn a_backing_file_is_shown_in_full_or_flat() {
    let dir = Scratch::new("query-chain");
    let Some((base, top)) = chain(&dir) else { return };
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "filename": top});
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let all = q.ok("query-named-block-nodes", json!({}));
    let of = |all: &Value| {
        let list = all.as_array().unwrap();
        list.iter().find(|n| n["node-name"] == "top").unwrap().clone()
    };
    let n = of(&all);
    assert_eq!((&n["backing_file_depth"], &n["backing_file"]), (&json!(1), &json!(base)));
    let image = &n["image"];
    assert_eq!(image["backing-filename"], "base.raw", "as the image names it");
    assert_eq!(image["full-backing-filename"], json!(base));
    assert_eq!(image["backing-filename-format"], "raw");
    assert_eq!(image["backing-image"]["filename"], json!(base));
    assert_eq!(image["backing-image"]["format"], "raw");
    assert_eq!(image["format-specific"]["data"]["compat"], "1.1");
    let n = of(&q.ok("query-named-block-nodes", json!({"flat": true})));
    assert_eq!(n["backing_file_depth"], 0);
    assert!(n["image"].get("backing-image").is_none());
    // What only options can say is a json: name.
    q.ok("blockdev-del", json!({"node-name": "top"}));
    let add = json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": null});
    q.ok("blockdev-add", add);
    let n = of(&q.ok("query-named-block-nodes", json!({})));
    let name = n["file"].as_str().unwrap().strip_prefix("json:").unwrap();
    let options: Value = serde_json::from_str(name).unwrap();
    assert_eq!(options["backing"], Value::Null);
    assert_eq!(options["file"]["filename"], json!(top));
    // … and opens the same again.
    let mut again = options.clone();
    again["node-name"] = json!("again");
    q.ok("blockdev-del", json!({"node-name": "top"}));
    q.ok("blockdev-add", again);
}

#[test]
fn statistics_are_the_drives_and_go_down_to_the_backing_file() {
    let dir = Scratch::new("query-stats");
    let Some((_, top)) = chain(&dir) else { return };
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "filename": top});
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let node = q.vm.graph.find("top").cloned();
    let spec = HandleSpec { name: "d0".into(), ..HandleSpec::default() };
    let vm = &mut q.vm;
    let disk = vm.drives.add(&mut vm.graph, node, spec, false).unwrap();
    let mut data = [0; 4096];
    disk.read(0, &mut IovMut::from_slice(&mut data)).unwrap();
    assert_eq!(data, [7; 4096]);
    disk.write(65536, &Iov::from_slice(&[1; 512]), Default::default()).unwrap();
    assert!(disk.read(1 << 20, &mut IovMut::from_slice(&mut data)).is_err());
    let all = q.ok("query-blockstats", json!({}));
    let d = &all[0];
    let s = &d["stats"];
    assert_eq!((&d["device"], &d["node-name"]), (&json!("d0"), &json!("top")));
    assert_eq!((&s["rd_bytes"], &s["rd_operations"]), (&json!(4096), &json!(1)));
    assert_eq!(s["failed_rd_operations"], 1);
    assert_eq!((&s["wr_bytes"], &s["wr_highest_offset"]), (&json!(512), &json!(66048)));
    assert!(s["idle_time_ns"].is_u64() && s["account_failed"] == true);
    assert!(d["parent"]["stats"]["wr_highest_offset"].as_u64().unwrap() > 65536);
    assert_eq!(d["parent"]["driver-specific"]["driver"], "file");
    assert_eq!(d["parent"]["stats"]["account_failed"], false);
    assert_eq!(d["backing"]["stats"]["wr_highest_offset"], 0);
    assert!(d["backing"]["parent"]["node-name"].is_string(), "the raw node's file");
    let block = q.ok("query-block", json!({}));
    assert_eq!(block[0]["device"], "d0");
    assert_eq!(block[0]["removable"], true, "no device has it");
    assert!(block[0].get("qdev").is_none() && block[0].get("io-status").is_none());
}

#[test]
fn an_empty_drive_has_no_medium() {
    let mut q = Qmp::new();
    let spec = HandleSpec { name: "d0".into(), ..HandleSpec::default() };
    let vm = &mut q.vm;
    vm.drives.add(&mut vm.graph, None, spec, false).unwrap();
    let block = q.ok("query-block", json!({}));
    assert!(block[0].get("inserted").is_none());
    let stats = q.ok("query-blockstats", json!({}));
    assert!(stats[0].get("node-name").is_none() && stats[0].get("parent").is_none());
    assert_eq!(stats[0]["stats"]["wr_highest_offset"], 0);
    assert_eq!(q.err("block_resize", json!({"device": "d0", "size": 512})), "Device 'd0' has no medium");
}

#[test]
fn options_of_a_node_are_shown() {
    let dir = Scratch::new("query-options");
    let path = dir.file("a", 1 << 20);
    let mut q = Qmp::new();
    q.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "discard": "unmap", "detect-zeroes": "unmap",
               "cache": {"no-flush": true, "writeback": false}, "read-only": true, "offset": 512,
               "file": {"driver": "file", "filename": path}}),
    );
    let all = q.ok("query-named-block-nodes", json!({}));
    let n = &all[0];
    assert_eq!((&n["detect_zeroes"], &n["ro"]), (&json!("unmap"), &json!(true)));
    assert_eq!(n["cache"], json!({"writeback": false, "direct": false, "no-flush": true}));
    assert!(n["file"].as_str().unwrap().contains("\"offset\":512"), "{}", n["file"]);
    assert_eq!(all[1]["cache"]["no-flush"], true, "inherited");
    assert_eq!(all[1]["ro"], true);
}

/// Requests go down a chain by recursion, on threads whose stacks are small.
#[test]
fn the_longest_chain_fits_on_a_workers_stack() {
    let dir = Scratch::new("query-deep");
    let Some(img) = qemu("qemu-img") else { return };
    let mut below = "n0.raw".to_string();
    std::fs::write(dir.path(&below), vec![9; 1 << 20]).unwrap();
    // One image, copied with another name in its header: making 200 with qemu-img takes long.
    let run = |args: &[&str]| {
        let out = std::process::Command::new(&img).args(args).output().unwrap();
        assert!(out.status.success(), "{out:?}");
    };
    let first = dir.path("n001");
    run(&["create", "-q", "-f", "qcow2", "-b", "n0.raw", "-F", "raw", &first]);
    let second = dir.path("n2");
    run(&["create", "-q", "-f", "qcow2", "-b", "n001", "-F", "qcow2", &second]);
    let bytes = std::fs::read(&second).unwrap();
    let at = bytes.windows(4).position(|w| w == b"n001").unwrap();
    for i in 2..200 {
        let mut copy = bytes.clone();
        copy[at..at + 4].copy_from_slice(format!("n{:03}", i - 1).as_bytes());
        below = format!("n{i:03}");
        std::fs::write(dir.path(&below), copy).unwrap();
    }
    let file = json!({"driver": "file", "filename": dir.path(&below)});
    let on_control = move || deep(file);
    crate::sys::thread::spawn("control", MAIN_STACK, on_control).unwrap().join().unwrap();
}

/// What the main thread has by default (`ulimit -s`).
const MAIN_STACK: usize = 8 << 20;

fn deep(file: Value) {
    let mut q = Qmp::new();
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let all = q.ok("query-named-block-nodes", json!({}));
    assert_eq!(all.as_array().unwrap().len(), 400);
    let node = q.vm.graph.find("top").cloned();
    let disk = q.vm.graph.attach(node, HandleSpec::default()).unwrap();
    let work = move || {
        let mut data = [0; 4096];
        disk.read(512, &mut IovMut::from_slice(&mut data)).unwrap();
        assert_eq!(data, [9; 4096]);
        disk.write(70000, &Iov::from_slice(&[1; 512]), Default::default()).unwrap();
        disk.zero(140000, 512, Default::default()).unwrap();
        disk.discard(0, 65536).unwrap();
        disk.flush().unwrap();
    };
    // A release build needs less; half of it must do for a debug build.
    let half = crate::sys::thread::IO_STACK / 2;
    crate::sys::thread::spawn("deep", half, work).unwrap().join().unwrap();
}

#[test]
fn a_graph_has_a_greatest_depth() {
    let climb = || {
        let mut q = Qmp::new();
        q.ok("blockdev-add", json!({"driver": "null-co", "node-name": "r0"}));
        for i in 1..256 {
            let (name, file) = (format!("r{i}"), format!("r{}", i - 1));
            q.ok("blockdev-add", json!({"driver": "raw", "node-name": name, "file": file}));
        }
        let more = json!({"driver": "raw", "node-name": "more", "file": "r255"});
        assert_eq!(q.err("blockdev-add", more), "Node 'more' would stand on more than 256 others");
        let mut nested = json!({"driver": "null-co"});
        for _ in 0..1000 {
            nested = json!({"driver": "raw", "file": nested});
        }
        assert_eq!(q.err("blockdev-add", nested), "the definition is nested more than 256 deep");
        let all = q.ok("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(all.as_array().unwrap().len(), 256);
    };
    crate::sys::thread::spawn("control", MAIN_STACK, climb).unwrap().join().unwrap();
}

/// A qcow2 image whose second guest cluster lies where its L2 table is.
fn contradictory(dir: &Scratch) -> Option<String> {
    let img = qemu("qemu-img")?;
    let path = dir.path("c.qcow2");
    let done = std::process::Command::new(&img).args(["create", "-q", "-f", "qcow2", &path, "8M"]).status();
    assert!(done.unwrap().success());
    let io = std::process::Command::new(img.replace("qemu-img", "qemu-io"))
        .args(["-f", "qcow2", "-c", "write -P 1 0 512", &path])
        .output();
    assert!(io.unwrap().status.success());
    let mut bytes = std::fs::read(&path).unwrap();
    let word = |bytes: &[u8], at: usize| {
        (u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize
    };
    let l2 = word(&bytes, word(&bytes, 40));
    bytes[l2 + 8..l2 + 16].copy_from_slice(&(l2 as u64 | 1 << 63).to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    Some(path)
}

#[test]
fn a_corrupt_image_is_told_of_once_and_written_no_more() {
    let dir = Scratch::new("query-corrupt");
    let Some(path) = contradictory(&dir) else { return };
    let mut q = Qmp::new();
    let args = json!({"id": "d0", "if": "none", "file": path, "format": "qcow2", "node-name": "n0"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    fn corrupt(q: &mut Qmp) -> Value {
        let drives = q.ok("query-block", json!({}));
        drives[0]["inserted"]["image"]["format-specific"]["data"]["corrupt"].clone()
    }
    assert_eq!(corrupt(&mut q), false);
    for request in ["write 64k 512", "write 64k 512", "write 0 512", "discard 0 64k", "flush"] {
        q.ok("human-monitor-command", json!({"command-line": format!("qemu-io d0 \"{request}\"")}));
    }
    q.vm.take_events();
    let msg = "Preventing invalid write on metadata (overlaps with active L2 table)";
    let data = json!({"device": "d0", "node-name": "n0", "msg": msg, "offset": 4 << 16, "size": 512,
                      "fatal": true});
    let sent: Vec<_> = q.vm.outbox.iter().map(|e| (e.name, json!(e.data))).collect();
    assert_eq!(sent, [("BLOCK_IMAGE_CORRUPTED", data)]);
    assert_eq!(corrupt(&mut q), true);
    let before = std::fs::read(&path).unwrap();
    q.vm.drives.clear();
    q.vm.graph.close_all();
    let after = std::fs::read(&path).unwrap();
    assert!(
        before == after && after[79] & 2 != 0,
        "the corrupt bit is there, and nothing was written after it"
    );
    // Only reading is left.
    let open = |read_only: bool| {
        json!({"driver": "qcow2", "node-name": "again", "read-only": read_only,
               "file": {"driver": "file", "filename": path}})
    };
    assert_eq!(q.err("blockdev-add", open(false)), "qcow2: Image is corrupt; cannot be opened read/write");
    q.ok("blockdev-add", open(true));
}

#[test]
fn a_corrupt_image_that_is_only_read_is_told_of_once_and_not_marked() {
    let dir = Scratch::new("query-corrupt-ro");
    let Some(path) = contradictory(&dir) else { return };
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[(4 << 16) + 14] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    let mut q = Qmp::new();
    let file = json!({"driver": "file", "filename": path});
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "n0", "read-only": true, "file": file}));
    let node = q.vm.graph.find("n0").unwrap().clone();
    for _ in 0..2 {
        assert!(node.read(65536, &mut IovMut::from_slice(&mut [0; 512])).is_err());
    }
    q.vm.take_events();
    let msg = "Data cluster offset unaligned (guest offset: 0x10000)";
    let data = json!({"device": "", "node-name": "n0", "msg": msg, "fatal": false});
    let sent: Vec<_> = q.vm.outbox.iter().map(|e| (e.name, json!(e.data))).collect();
    assert_eq!(sent, [("BLOCK_IMAGE_CORRUPTED", data)]);
    assert!(std::fs::read(&path).unwrap() == bytes);
}
