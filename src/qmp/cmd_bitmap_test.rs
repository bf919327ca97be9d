use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};

/// Drives `d0`, `d1`, … on raw nodes `n0`, `n1`, … of 1 MiB.
fn drives(q: &mut Qmp, dir: &Scratch, count: usize) {
    for n in 0..count {
        let raw = dir.file(&format!("d{n}.raw"), 1 << 20);
        let args = json!({"id": format!("d{n}"), "if": "none", "file": raw, "format": "raw",
                          "node-name": format!("n{n}")});
        q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    }
}

fn say(q: &mut Qmp, line: &str) {
    assert_eq!(q.ok("human-monitor-command", json!({"command-line": line})), "");
}

/// Names, counts and whether they record, as `query-block` shows them.
fn shown(q: &mut Qmp, drive: usize) -> Value {
    let list = q.ok("query-block", json!({}))[drive]["inserted"]["dirty-bitmaps"].clone();
    let of = |b: &Value| json!([b["name"], b["count"], b["recording"]]);
    list.as_array().map_or(Value::Null, |l| l.iter().map(of).collect())
}

fn act(q: &mut Qmp, what: &str, name: &str) {
    q.ok(&format!("block-dirty-bitmap-{what}"), json!({"node": "d0", "name": name}));
}

#[test]
fn bitmaps_come_count_and_go() {
    let dir = Scratch::new("cmd-bitmap");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 2);
    assert_eq!(shown(&mut q, 0), Value::Null);
    q.ok("block-dirty-bitmap-add", json!({"node": "d0", "name": "a"}));
    q.ok("block-dirty-bitmap-add", json!({"node": "n0", "name": "b", "granularity": 512}));
    q.ok(
        "block-dirty-bitmap-add",
        json!({"node": "n0", "name": "c", "granularity": 1u32 << 31, "disabled": true}),
    );
    say(&mut q, "qemu-io d0 \"write -q 1000 100\"");
    assert_eq!(shown(&mut q, 0), json!([["c", 0, false], ["b", 1024, true], ["a", 65536, true]]));
    act(&mut q, "disable", "b");
    act(&mut q, "enable", "c");
    say(&mut q, "qemu-io d0 \"write -q 131072 100\"");
    assert_eq!(shown(&mut q, 0), json!([["c", 1u64 << 31, true], ["b", 1024, false], ["a", 131_072, true]]));
    act(&mut q, "clear", "a");
    act(&mut q, "remove", "c");
    // Of this node and of another, fine into coarse.
    q.ok("block-dirty-bitmap-add", json!({"node": "d1", "name": "z", "granularity": 4096}));
    say(&mut q, "qemu-io d1 \"write -q 524288 4096\"");
    q.ok(
        "block-dirty-bitmap-merge",
        json!({"node": "d0", "target": "a", "bitmaps": ["b", {"node": "n1", "name": "z"}]}),
    );
    q.ok("block-dirty-bitmap-merge", json!({"node": "d0", "target": "a", "bitmaps": []}));
    assert_eq!(shown(&mut q, 0), json!([["b", 1024, false], ["a", 131_072, true]]));
    let node = q.vm.graph.find("n0").unwrap().clone();
    let a = node.find_bitmap("a").unwrap();
    assert!(a.is_dirty(0) && a.is_dirty(524_288) && !a.is_dirty(131_072));
}

#[test]
fn qemus_words_for_what_is_wrong() {
    let dir = Scratch::new("cmd-bitmap-errors");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 1);
    q.ok("blockdev-add", json!({"driver": "null-co", "node-name": "other", "size": 8192}));
    q.ok("block-dirty-bitmap-add", json!({"node": "other", "name": "small"}));
    q.ok("block-dirty-bitmap-add", json!({"node": "n0", "name": "a"}));
    let long = "x".repeat(1024);
    for (args, want) in [
        (json!({"node": "n0", "name": ""}), "Bitmap name cannot be empty".to_string()),
        (json!({"node": "n0", "name": long}), format!("Bitmap name too long: {long}")),
        (
            json!({"node": "n0", "name": "b", "granularity": 3}),
            "Granularity must be power of 2 and at least 512".into(),
        ),
        (json!({"node": "n0", "name": "a"}), "Bitmap already exists: a".into()),
        (json!({"node": "x", "name": "a"}), "Cannot find device='x' nor node-name='x'".into()),
        (
            json!({"node": "n0", "name": "p", "persistent": true}),
            "Can't store persistent bitmaps to d0: Operation not supported".into(),
        ),
        (
            json!({"node": "other", "name": "p", "persistent": true}),
            "Can't store persistent bitmaps to other: Operation not supported".into(),
        ),
    ] {
        assert_eq!(q.err("block-dirty-bitmap-add", args), want);
    }
    for what in ["remove", "clear", "enable", "disable"] {
        let command = format!("block-dirty-bitmap-{what}");
        assert_eq!(q.err(&command, json!({"node": "x", "name": "a"})), "Node 'x' not found");
        assert_eq!(q.err(&command, json!({"node": "n0", "name": "x"})), "Dirty bitmap 'x' not found");
    }
    let merge = |target: &str, from: Value| json!({"node": "d0", "target": target, "bitmaps": from});
    for (args, want) in [
        (merge("x", json!(["a"])), "Dirty bitmap 'x' not found"),
        (merge("a", json!(["x"])), "Dirty bitmap 'x' not found"),
        (merge("a", json!([{"node": "x", "name": "a"}])), "Node 'x' not found"),
        (merge("a", json!([{"node": "other", "name": "a"}])), "Dirty bitmap 'a' not found"),
        (
            merge("a", json!([{"node": "other", "name": "small"}])),
            "Bitmaps are of different sizes (destination size is 1048576, source size is 8192) and can't be merged",
        ),
        (merge("a", json!([1])), "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr"),
    ] {
        assert_eq!(q.err("block-dirty-bitmap-merge", args), want);
    }
    let node = q.vm.graph.find("n0").unwrap().clone();
    node.create_successor(&node.find_bitmap("a").unwrap()).unwrap();
    for what in ["remove", "clear", "enable", "disable"] {
        let e = q.err(&format!("block-dirty-bitmap-{what}"), json!({"node": "n0", "name": "a"}));
        assert_eq!(e, "Bitmap 'a' is currently in use by another operation and cannot be used");
    }
}

#[test]
fn a_transaction_of_bitmaps_is_undone_as_a_whole() {
    let dir = Scratch::new("cmd-bitmap-txn");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 2);
    q.ok("block-dirty-bitmap-add", json!({"node": "d0", "name": "a", "granularity": 512}));
    say(&mut q, "qemu-io d0 \"write -q 0 512\"");
    q.ok("block-dirty-bitmap-add", json!({"node": "d0", "name": "b", "granularity": 512}));
    say(&mut q, "qemu-io d0 \"write -q 4096 512\"");
    act(&mut q, "disable", "b");
    let before = shown(&mut q, 0);
    assert_eq!(before, json!([["b", 512, false], ["a", 1024, true]]));
    let on = |what: &str, name: &str| json!({"type": format!("block-dirty-bitmap-{what}"), "data": {"node": "d0", "name": name}});
    let merge = |to: &str, from: &[&str]| json!({"type": "block-dirty-bitmap-merge", "data": {"node": "d0", "target": to, "bitmaps": from}});
    let abort = json!({"type": "abort", "data": {}});
    let all = [
        on("clear", "a"),
        on("add", "n"),
        merge("n", &["b"]),
        on("enable", "b"),
        on("disable", "a"),
        on("remove", "a"),
    ];
    let snap = json!({"type": "blockdev-snapshot-sync", "data": {"device": "d1", "snapshot-file": dir.path("o"), "snapshot-node-name": "o"}});
    let with = |last: Value| {
        let mut list = vec![snap.clone()];
        list.extend(all.iter().cloned());
        list.push(last);
        json!({"actions": list})
    };
    for (last, want) in [
        (abort, "Transaction aborted using Abort action"),
        (on("clear", "x"), "Dirty bitmap 'x' not found"),
        (on("add", "b"), "Bitmap already exists: b"),
        (on("clear", "a"), "Bitmap 'a' is currently in use by another operation and cannot be used"),
        (merge("n", &["b", "x"]), "Dirty bitmap 'x' not found"),
    ] {
        assert_eq!(q.err("transaction", with(last)), want);
        assert_eq!(shown(&mut q, 0), before, "{want}");
        assert!(q.vm.graph.find("o").is_none());
    }
    let node = q.vm.graph.find("n0").unwrap().clone();
    let a = node.find_bitmap("a").unwrap();
    assert!(a.is_dirty(0) && a.is_dirty(4096) && !a.busy());
    q.ok("transaction", with(on("enable", "n")));
    assert_eq!(shown(&mut q, 0), json!([["n", 65536, true], ["b", 512, true]]));
    // A drive means what it will have.
    q.ok("transaction", json!({"actions": [
        {"type": "blockdev-snapshot-sync", "data": {"device": "d0", "snapshot-file": dir.path("p"), "snapshot-node-name": "p"}},
        on("add", "top")]}));
    assert_eq!(shown(&mut q, 0), json!([["top", 0, true]]));
}

/// What stands in for a backup's start: one bitmap ends where the other begins.
#[test]
fn no_write_falls_between_two_bitmaps_of_a_transaction() {
    let dir = Scratch::new("cmd-bitmap-hand");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 1);
    let handle = q.vm.drives.find("d0").unwrap().handle.clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut next = 0u64;
    std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let mut n = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && n < 2048 {
                handle
                    .write(
                        n * 512,
                        &crate::sys::iov::Iov::from_slice(&[1; 512]),
                        crate::block::driver::Flags::NONE,
                    )
                    .unwrap();
                n += 1;
            }
            n
        });
        let add = |n: usize| json!({"type": "block-dirty-bitmap-add", "data": {"node": "d0", "name": format!("b{n}"), "granularity": 512}});
        q.ok("transaction", json!({"actions": [add(0)]}));
        for n in 1..20 {
            let off = json!({"type": "block-dirty-bitmap-disable", "data": {"node": "d0", "name": format!("b{}", n - 1)}});
            q.ok("transaction", json!({"actions": [off, add(n)]}));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        next = writer.join().unwrap();
    });
    let node = q.vm.graph.find("n0").unwrap().clone();
    let list = node.bitmaps();
    let first = list.iter().filter_map(|b| b.next_dirty(0, u64::MAX, 1)).map(|r| r.start / 512).min();
    for n in first.unwrap_or(next)..next {
        let in_one = list.iter().filter(|b| b.is_dirty(n * 512)).count();
        assert_eq!(in_one, 1, "sector {n} of {next}");
    }
}

/// A drive `d0` on `o`, a new qcow2 image on top of a raw disk.
fn qcow2_drive(q: &mut Qmp, dir: &Scratch) -> String {
    drives(q, dir, 1);
    let path = dir.path("o.qcow2");
    q.ok("blockdev-snapshot-sync", json!({"device": "d0", "snapshot-file": path, "snapshot-node-name": "o"}));
    path
}

fn quit(mut q: Qmp) {
    q.vm.drives.clear();
    q.vm.graph.close_all();
}

/// A second start with that image.
fn again(path: &str) -> Qmp {
    let mut q = Qmp::new();
    let args = json!({"id": "d0", "if": "none", "file": path, "format": "qcow2", "node-name": "o"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    q
}

#[test]
fn persistent_ones_survive_quit_and_not_a_crash() {
    let dir = Scratch::new("cmd-bitmap-stored");
    let mut q = Qmp::new();
    let path = qcow2_drive(&mut q, &dir);
    q.ok(
        "block-dirty-bitmap-add",
        json!({"node": "d0", "name": "a", "persistent": true, "granularity": 4096}),
    );
    q.ok("block-dirty-bitmap-add", json!({"node": "o", "name": "b", "persistent": true, "disabled": true}));
    q.ok("block-dirty-bitmap-add", json!({"node": "o", "name": "c"}));
    say(&mut q, "qemu-io d0 \"write -q 8192 512\"");
    quit(q);
    let mut q = again(&path);
    assert_eq!(shown(&mut q, 0), json!([["b", 0, false], ["a", 4096, true]]));
    let list = q.ok("query-block", json!({}));
    let inside = &list[0]["inserted"]["image"]["format-specific"]["data"]["bitmaps"];
    assert_eq!(
        *inside,
        json!([{"name": "a", "granularity": 4096, "flags": ["in-use", "auto"]},
               {"name": "b", "granularity": 65536, "flags": ["in-use"]}])
    );
    say(&mut q, "qemu-io d0 \"write -q 0 512\"");
    q.ok("block-dirty-bitmap-remove", json!({"node": "o", "name": "b"}));
    quit(q);
    let mut q = again(&path);
    assert_eq!(shown(&mut q, 0), json!([["a", 8192, true]]));
    say(&mut q, "qemu-io d0 \"write -q 65536 512\"");
    // What a crash leaves.
    std::fs::copy(&path, dir.path("crashed")).unwrap();
    quit(q);
    let mut q = again(&dir.path("crashed"));
    let list = q.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"].clone();
    assert_eq!(
        list,
        json!([{"name": "a", "count": 0, "granularity": 4096, "recording": false, "busy": false,
                "persistent": true, "inconsistent": true}])
    );
    for what in ["clear", "enable", "disable"] {
        let e = q.err(&format!("block-dirty-bitmap-{what}"), json!({"node": "o", "name": "a"}));
        assert_eq!(e, "Bitmap 'a' is inconsistent and cannot be used");
    }
    let e = q.err("block-dirty-bitmap-add", json!({"node": "o", "name": "a", "persistent": true}));
    assert_eq!(e, "Bitmap already exists: a");
    let e = q.err("block_resize", json!({"device": "d0", "size": 2 << 20}));
    assert_eq!(e, "Bitmap 'a' is inconsistent and cannot be used");
    q.ok("block-dirty-bitmap-remove", json!({"node": "o", "name": "a"}));
    q.ok("block_resize", json!({"device": "d0", "size": 2 << 20}));
    let large = json!({"node": "o", "name": "a", "persistent": true, "granularity": 512});
    q.ok("block-dirty-bitmap-add", large);
    quit(q);
    if let Some(tool) = crate::block::testing::qemu("qemu-img") {
        for name in [path, dir.path("crashed")] {
            let done = std::process::Command::new(&tool).args(["check", &name]).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        }
    }
}

#[test]
fn below_a_snapshot_they_are_read_only() {
    let dir = Scratch::new("cmd-bitmap-below");
    let mut q = Qmp::new();
    let path = qcow2_drive(&mut q, &dir);
    q.ok("block-dirty-bitmap-add", json!({"node": "o", "name": "a", "persistent": true}));
    say(&mut q, "qemu-io d0 \"write -q 0 512\"");
    let over = json!({"device": "d0", "snapshot-file": dir.path("p.qcow2"), "snapshot-node-name": "p"});
    q.ok("blockdev-snapshot-sync", over);
    for what in ["clear", "remove"] {
        let e = q.err(&format!("block-dirty-bitmap-{what}"), json!({"node": "o", "name": "a"}));
        assert_eq!(e, "Bitmap 'a' is readonly and cannot be modified");
    }
    say(&mut q, "qemu-io d0 \"write -q 65536 512\"");
    // Stored already: a crash does it no harm.
    std::fs::copy(&path, dir.path("crashed")).unwrap();
    let mut other = again(&dir.path("crashed"));
    assert_eq!(shown(&mut other, 0), json!([["a", 65536, true]]));
    // It is merged into one on top.
    q.ok("block-dirty-bitmap-add", json!({"node": "d0", "name": "t"}));
    q.ok(
        "block-dirty-bitmap-merge",
        json!({"node": "d0", "target": "t", "bitmaps": [{"node": "o", "name": "a"}]}),
    );
    assert_eq!(shown(&mut q, 0), json!([["t", 65536, true]]));
    // For a moment writable: its bitmaps are in use, and stored again.
    q.ok("change-backing-file", json!({"device": "d0", "image-node-name": "o", "backing-file": "other.raw"}));
    let node = q.vm.graph.find("o").unwrap().clone();
    assert!(node.read_only() && node.find_bitmap("a").is_some_and(|a| a.read_only() && a.count() == 65536));
    quit(q);
}
