use crate::block::driver::Internal;
use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};

/// A drive `d` on an overlay of 1 MiB, node `n`, with data in its first 64 KiB and a bitmap `b` that
/// has them.
fn disk(dir: &Scratch) -> Qmp {
    let mut q = Qmp::new();
    let base = dir.file("base.raw", 1 << 20);
    let args = json!({"id": "d", "if": "none", "file": base, "format": "raw", "node-name": "base"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    q.ok(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": dir.path("n"), "snapshot-node-name": "n"}),
    );
    q.ok("block-dirty-bitmap-add", json!({"node": "n", "name": "b"}));
    io(&mut q, "write -q -P 1 0 64k");
    q
}

fn io(q: &mut Qmp, line: &str) {
    let line = format!("qemu-io d \"{line}\"");
    assert_eq!(q.ok("human-monitor-command", json!({"command-line": line})), "", "{line}");
}

/// Number `n` of a transaction, by a letter.
fn action(dir: &Scratch, n: usize, letter: char) -> Value {
    let (over, copy) = (dir.path(&format!("o{n}")), dir.path(&format!("k{n}")));
    let (kind, data) = match letter {
        'E' => (
            "blockdev-snapshot-sync",
            json!({"device": "d", "snapshot-file": over, "snapshot-node-name": format!("o{n}")}),
        ),
        'N' => (
            "blockdev-snapshot-sync",
            json!({"node-name": "n", "snapshot-file": over, "snapshot-node-name": format!("o{n}")}),
        ),
        'I' => ("blockdev-snapshot-internal-sync", json!({"device": "d", "name": format!("s{n}")})),
        'J' => ("blockdev-snapshot-internal-sync", json!({"device": "n", "name": format!("s{n}")})),
        'B' => ("block-dirty-bitmap-add", json!({"node": "d", "name": format!("b{n}")})),
        'C' => ("block-dirty-bitmap-clear", json!({"node": "d", "name": "b"})),
        'R' => ("block-dirty-bitmap-remove", json!({"node": "d", "name": "b"})),
        'K' => (
            "drive-backup",
            json!({"device": "d", "job-id": format!("j{n}"), "target": copy, "sync": "full", "speed": 1,
                   "auto-dismiss": false}),
        ),
        'L' => (
            "drive-backup",
            json!({"device": "d", "job-id": format!("j{n}"), "target": copy, "sync": "incremental",
                   "bitmap": "b", "auto-dismiss": false}),
        ),
        'A' => ("abort", json!({})),
        other => panic!("{other}"),
    };
    json!({"type": kind, "data": data})
}

fn actions(dir: &Scratch, letters: &str) -> Value {
    letters.chars().enumerate().map(|(n, letter)| action(dir, n, letter)).collect()
}

/// The nodes below the drive, each with its snapshots and its bitmaps.
fn state(q: &mut Qmp) -> String {
    let root = q.vm.drives.find("d").unwrap().handle.node().unwrap();
    let mut out = Vec::new();
    for node in std::iter::successors(Some(root.skip_filters()), |n| n.backing()) {
        let inside = node.driver.internal().map(Internal::snapshots);
        let snapshots = inside.map(Result::unwrap).into_iter().flatten().map(|s| s.name);
        let bitmaps = node.bitmaps().into_iter();
        let bitmaps = bitmaps.filter_map(|b| Some(format!("{}={}", b.name()?, b.count())));
        out.push([vec![node.name.clone()], snapshots.collect(), bitmaps.collect()].concat().join(" "));
    }
    out.join(", ")
}

/// What QEMU 10 answers and does, unless it is said.
#[test]
fn actions_on_one_disk_happen_in_their_order_or_not_at_all() {
    let before = "n b=65536, base";
    let root = "Need a root block node";
    let backing = "Node 'n' is busy: node is used as backing hd of 'o0'";
    let missing = "Dirty bitmap 'b' not found";
    let bitmap_missing = "Bitmap 'b' could not be found";
    let in_use = "Bitmap 'b' is currently in use by another operation and cannot be used";
    // QEMU ends there, at an assertion.
    let job = "Node 'd' is busy: block device is in use by block job: backup";
    for (letters, want) in [
        ("EI", Ok("o0 s1, n b=65536, base")),
        ("IE", Ok("o1, n s0 b=65536, base")),
        ("EJ", Err(root)),
        ("EE", Ok("o1, o0, n b=65536, base")),
        ("NI", Ok("o0 s1, n b=65536, base")),
        ("NE", Ok("o1, o0, n b=65536, base")),
        ("EN", Err(backing)),
        ("NN", Err(backing)),
        ("EIEI", Ok("o2 s3, o0 s1, n b=65536, base")),
        ("II", Ok("n s0 s1 b=65536, base")),
        ("BE", Ok("o1, n b0=0 b=65536, base")),
        ("EB", Ok("o0 b1=0, n b=65536, base")),
        ("CE", Ok("o1, n b=0, base")),
        ("EC", Err(missing)),
        ("RE", Ok("o1, n, base")),
        ("RC", Err(in_use)),
        ("KI", Err(root)),
        ("KE", Err(job)),
        ("KN", Ok("o1, n b=65536, base")),
        ("LN", Ok("o1, n b=0, base")),
        ("EL", Err(bitmap_missing)),
        ("IL", Ok("n s0 b=0, base")),
        // QEMU looks for it on the job's filter: not found.
        ("LC", Err(in_use)),
        ("LR", Err(in_use)),
        ("CL", Ok("n b=0, base")),
        ("RL", Err(in_use)),
    ] {
        let dir = Scratch::new("txn-order");
        let mut q = disk(&dir);
        let nodes = q.vm.graph.nodes().count();
        // With an abort at the end it is the same error, or that.
        let e = q.err("transaction", json!({"actions": actions(&dir, &format!("{letters}A"))}));
        let abort = "Transaction aborted using Abort action";
        assert!(e == abort || Err(&e[..]) == want, "{letters}: {e}");
        if matches!(want, Err(text) if [missing, bitmap_missing, root].contains(&text)) {
            assert_ne!(e, abort, "{letters}");
        }
        assert_eq!((state(&mut q), q.vm.graph.nodes().count()), (before.to_string(), nodes), "{letters}A");
        assert_eq!(q.ok("query-jobs", json!({})), json!([]), "{letters}A");
        match want {
            Ok(state_after) => {
                q.ok("transaction", json!({"actions": actions(&dir, letters)}));
                while q
                    .ok("query-jobs", json!({}))
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|j| j["status"] != "concluded")
                {
                    q.vm.take_events();
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                assert_eq!(state(&mut q), state_after, "{letters}");
                io(&mut q, "write -q -P 2 64k 64k");
                io(&mut q, "read -q -P 1 0 64k");
            }
            Err(text) => {
                let e = q.err("transaction", json!({"actions": actions(&dir, letters)}));
                assert_eq!(e, text, "{letters}");
                let after = (state(&mut q), q.vm.graph.nodes().count());
                assert_eq!(after, (before.to_string(), nodes), "{letters}");
            }
        }
        // The bitmap is nobody's, and notes.
        io(&mut q, "write -q -P 3 128k 64k");
        let n = q.vm.graph.find("n").unwrap();
        assert!(n.find_bitmap("b").is_none_or(|b| !b.busy()), "{letters}");
        assert!(!n.read_only() || letters.contains(['E', 'N']), "{letters}");
    }
}

#[test]
fn what_fails_at_the_moment_undoes_all_that_was_done() {
    let dir = Scratch::new("txn-undo");
    let mut q = disk(&dir);
    let before = (state(&mut q), q.vm.graph.nodes().count());
    // The names of its jobs are looked at when they begin: this one is the fourth's.
    let mut list = actions(&dir, "CBIKNEK");
    list[6]["data"]["job-id"] = json!("j3");
    let e = q.err("transaction", json!({"actions": list}));
    assert_eq!(e, "Job ID 'j3' already in use");
    assert_eq!((state(&mut q), q.vm.graph.nodes().count()), before);
    assert_eq!(q.ok("query-jobs", json!({})), json!([]));
    // And is as good as before.
    for name in ["o4", "o5", "k3", "k6"] {
        std::fs::remove_file(dir.path(name)).unwrap();
    }
    io(&mut q, "write -q -P 2 64k 64k");
    q.ok("transaction", json!({"actions": actions(&dir, "CBIKNE")}));
    io(&mut q, "read -q -P 2 64k 64k");
    assert_eq!(state(&mut q), "o5, o4, n s2 b1=0 b=0, base");
}

#[test]
fn a_backup_with_a_snapshot_sees_what_the_guest_writes() {
    for (order, job) in [("EK", 1), ("KN", 0)] {
        backup_and_snapshot(order, job);
    }
}

fn backup_and_snapshot(order: &str, job: u32) {
    let dir = Scratch::new("txn-backup");
    let mut q = disk(&dir);
    io(&mut q, "write -q -P 1 0 1M");
    q.ok("transaction", json!({"actions": actions(&dir, order)}));
    let id = format!("j{job}");
    // Nothing of this, however far the copy has come.
    io(&mut q, "write -q -P 2 0 1M");
    q.ok("block-job-set-speed", json!({"device": id, "speed": 0}));
    while q.ok("query-jobs", json!({}))[0]["status"] != "concluded" {
        q.vm.take_events();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(q.ok("query-jobs", json!({}))[0].get("error"), None);
    q.ok("job-dismiss", json!({"id": id}));
    let copy = json!({"id": "k", "if": "none", "file": dir.path(&format!("k{job}")), "format": "qcow2"});
    q.vm.add_drive(copy.as_object().unwrap().clone()).unwrap();
    let line = "qemu-io k \"read -q -P 1 0 1M\"";
    assert_eq!(q.ok("human-monitor-command", json!({"command-line": line})), "");
    io(&mut q, "read -q -P 2 0 1M");
}

/// QEMU looks into the overlay, and copies nothing.
#[test]
fn a_backup_of_the_uppermost_image_is_of_the_one_before_the_overlay() {
    let dir = Scratch::new("txn-top");
    let mut q = disk(&dir);
    let copy = dir.file("t.raw", 1 << 20);
    let args = json!({"id": "copy", "if": "none", "file": copy, "format": "raw", "node-name": "t"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    let backup = json!({"device": "n", "job-id": "j", "target": "t", "sync": "top", "auto-dismiss": false});
    let actions = json!([{"type": "blockdev-backup", "data": backup}, action(&dir, 1, 'N')]);
    q.ok("transaction", json!({"actions": actions}));
    while q.ok("query-jobs", json!({}))[0]["status"] != "concluded" {
        q.vm.take_events();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(q.ok("query-jobs", json!({}))[0].get("error"), None);
    let bytes = std::fs::read(&copy).unwrap();
    assert!(bytes[..65536].iter().all(|b| *b == 1), "nothing was copied");
    assert!(bytes[65536..].iter().all(|b| *b == 0));
}
