//! Who may do what with the nodes of a job, in the real binary, as QEMU has it: what is refused while a
//! job runs, waits, and is over, with which text; and what a backup lets be done to its disk.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, Qmp, Vm, have, run};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

const NOTHING: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n";

/// `base` ← `mid` ← `top` of 8 MiB, all data, and targets of that size.
fn images(dir: &Dir) -> bool {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return false;
    }
    let path = |name: &str| dir.join(name).display().to_string();
    for (name, below) in [
        ("base", None),
        ("mid", Some("base")),
        ("top", Some("mid")),
        ("t1", None),
        ("t2", None),
        ("t3", None),
    ] {
        let image = path(name);
        match below {
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"]),
            Some(b) => {
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path(b), "-F", "qcow2", &image])
            }
        };
        let byte = ["base", "mid", "top"].iter().position(|n| *n == name);
        if let Some(byte) = byte {
            let write = format!("write -q -P {} 0 {}M", byte + 1, 8 >> byte);
            run("qemu-io", &["-f", "qcow2", "-c", &write, &image]);
        }
    }
    true
}

fn add(vm: &Vm, qmp: &mut Qmp, name: &str, backing: Value) {
    let file = json!({"driver": "file", "filename": vm.path(name)});
    qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}));
}

fn start() -> Option<(Vm, Qmp)> {
    let dir = Dir::new();
    if !images(&dir) {
        return None;
    }
    let vm = Vm::start_in(dir, NOTHING);
    let mut qmp = vm.qmp();
    let chain = [("base", Value::Null), ("mid", json!("base")), ("top", json!("mid"))];
    for (name, backing) in chain.into_iter().chain(["t1", "t2", "t3"].map(|t| (t, Value::Null))) {
        add(&vm, &mut qmp, name, backing);
    }
    Some((vm, qmp))
}

fn refused(qmp: &mut Qmp, command: &str, args: Value) -> String {
    let text = format!("{command} {args}");
    let said = qmp.execute(command, args).expect_err(&text);
    said["desc"].as_str().unwrap_or_default().to_string()
}

fn until(qmp: &mut Qmp, wanted: &str) {
    while qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != wanted {}
}

/// Each kind of job, and which of its nodes are in what use as long as it runs: `j`: by the job; `d`: it is
/// a disk of the job; `n`: by a node only; `b`: as a backing file.
const KINDS: [(&str, &str, &str, &str); 5] = [
    ("backup", "blockdev-backup", r#"{"device": "top", "target": "t1", "sync": "full"}"#, "bbnj"),
    ("mirror", "blockdev-mirror", r#"{"device": "top", "target": "t1", "sync": "full"}"#, "bbjd"),
    ("stream", "block-stream", r#"{"device": "top"}"#, "jjj-"),
    ("commit", "block-commit", r#"{"device": "top", "top-node": "mid", "base-node": "base"}"#, "ddj-"),
    ("commit", "block-commit", r#"{"device": "top", "base-node": "base"}"#, "djj-"),
];

fn job(args: &str, more: Value) -> Value {
    let mut args: Value = serde_json::from_str(args).unwrap();
    args["job-id"] = "j".into();
    for (key, value) in more.as_object().unwrap() {
        args[key] = value.clone();
    }
    args
}

/// What `blockdev-del` says of the four nodes in these uses. Nothing: it takes the node away.
fn check_del(qmp: &mut Qmp, kind: &str, uses: &str, above: [&str; 2]) {
    for (n, used) in uses.bytes().enumerate() {
        let node = ["base", "mid", "top", "t1"][n];
        let want = match used {
            b'j' => format!("Node '{node}' is busy: block device is in use by block job: {kind}"),
            b'd' => format!("Node {node} is in use"),
            b'n' => format!("Block device {node} is in use"),
            b'b' => format!("Node '{node}' is busy: node is used as backing hd of '{}'", above[n]),
            _ => continue,
        };
        assert_eq!(refused(qmp, "blockdev-del", json!({"node-name": node})), want, "{kind} {uses}");
    }
}

#[test]
fn nodes_of_a_job_are_in_use() {
    for (kind, command, args, uses) in KINDS {
        let Some((_vm, mut qmp)) = start() else { return };
        qmp.ok(command, job(args, json!({"speed": 1})));
        check_del(&mut qmp, kind, uses, ["mid", "top"]);
        qmp.ok("job-pause", json!({"id": "j"}));
        check_del(&mut qmp, kind, uses, ["mid", "top"]);
        // Nobody writes to what lies under a disk, or to what a job counts on.
        for node in ["base", "mid"] {
            let said = refused(&mut qmp, "block_resize", json!({"node-name": node, "size": 16 * MIB}));
            assert!(said.starts_with(&format!("Node '{node}' is busy: ")), "{said}");
            let args = json!({"job-id": "k", "device": "t3", "target": node, "sync": "none"});
            let said = refused(&mut qmp, "blockdev-mirror", args);
            assert!(said.starts_with(&format!("Node '{node}' is busy: ")), "{said}");
        }
        for command in ["block-commit", "blockdev-mirror"] {
            let mut args = json!({"job-id": "k", "device": "top"});
            if command == "blockdev-mirror" {
                args["target"] = "t3".into();
                args["sync"] = "none".into();
            }
            assert_eq!(refused(&mut qmp, command, args), "Need a root block node");
        }
        if kind == "stream" {
            let said =
                qmp.ok("human-monitor-command", json!({"command-line": "qemu-io mid \"write 0 512\""}));
            let said = said.as_str().unwrap().to_string();
            assert!(said.contains("'write' are both required by an unnamed block device"), "{said}");
        }
        qmp.ok("job-cancel", json!({"id": "j"}));
        until(&mut qmp, "null");
        for node in ["top", "mid", "base", "t1"] {
            qmp.ok("blockdev-del", json!({"node-name": node}));
        }
    }
}

/// What a job that is over, but not dismissed, still has: as in QEMU nothing, but a stream and a commit.
#[test]
fn nodes_of_a_job_that_is_over() {
    let over = [("bb--", true), ("bb--", true), ("jjj-", true), ("bjj-", true), ("bb--", true)];
    for ((kind, command, args, _), (uses, _)) in KINDS.into_iter().zip(over) {
        for cancelled in [false, true] {
            let Some((_vm, mut qmp)) = start() else { return };
            let speed = u64::from(cancelled);
            qmp.ok(command, job(args, json!({"auto-dismiss": false, "speed": speed})));
            if cancelled {
                qmp.ok("block-job-cancel", json!({"device": "j", "force": true}));
            } else if kind == "mirror" || args.contains(r#""device": "top", "base"#) {
                qmp.wait_event("BLOCK_JOB_READY");
                qmp.ok("block-job-complete", json!({"device": "j"}));
            }
            until(&mut qmp, "concluded");
            // A commit that failed lets go; one that did not has made `base` the backing file of `top`.
            let commit = kind == "commit" && uses == "bjj-";
            let (uses, above) = match cancelled {
                true if commit => ("bb--", ["mid", "top"]),
                _ if commit => (uses, ["top", ""]),
                _ => (uses, ["mid", "top"]),
            };
            check_del(&mut qmp, kind, uses, above);
            if uses.starts_with('j') || (commit && !cancelled) {
                let args = json!({"job-id": "k", "device": "mid", "target": "t3", "sync": "none"});
                let busy = format!("Node 'mid' is busy: block device is in use by block job: {kind}");
                assert_eq!(refused(&mut qmp, "blockdev-backup", args), busy);
            }
            qmp.ok("job-dismiss", json!({"id": "j"}));
            for node in ["top", "mid", "base", "t1", "t2", "t3"] {
                qmp.ok("blockdev-del", json!({"node-name": node}));
            }
        }
    }
}

fn io(qmp: &mut Qmp, node: &str, command: &str) {
    let line = format!("qemu-io {node} \"{command}\"");
    assert_eq!(qmp.ok("human-monitor-command", json!({"command-line": line})), "", "{command}");
}

/// A backup keeps nobody from its disk: another one, a stream, and a snapshot go well beside it, if they
/// name the node; the drive is the backup's filter.
#[test]
fn a_backup_lets_others_at_its_disk() {
    let dir = Dir::new();
    if !images(&dir) {
        return;
    }
    let drive = "[[drive]]\nif = \"none\"\nid = \"d\"\nnode-name = \"top\"\nfile = \"@DIR/top\"\nformat = \"qcow2\"\n";
    let mut vm = Vm::start_in(dir, &format!("{NOTHING}{drive}"));
    let mut qmp = vm.qmp();
    for target in ["t1", "t2", "t3"] {
        add(&vm, &mut qmp, target, Value::Null);
    }
    let backup = |id: &str, device: &str, target: &str| json!({"job-id": id, "device": device, "target": target, "sync": "full", "speed": 1});
    qmp.ok("blockdev-backup", backup("a", "top", "t1"));
    io(&mut qmp, "d", "write -q -P 9 7M 64k");
    qmp.ok("blockdev-backup", backup("b", "top", "t2"));
    io(&mut qmp, "d", "write -q -P 10 7M 128k");
    let busy = "Node 'd' is busy: block device is in use by block job: backup";
    assert_eq!(refused(&mut qmp, "blockdev-backup", backup("c", "d", "t3")), busy);
    let busy = "Node 't1' is busy: block device is in use by block job: backup";
    assert_eq!(refused(&mut qmp, "blockdev-backup", backup("c", "top", "t1")), busy);
    let said = refused(&mut qmp, "blockdev-backup", backup("c", "t3", "top"));
    assert!(said.starts_with("Could not create node: Permission conflict on node 'top': "), "{said}");
    assert_eq!(refused(&mut qmp, "blockdev-backup", backup("a", "top", "t3")), "Job ID 'a' already in use");
    let mut named = backup("c", "top", "t3");
    named["filter-node-name"] = "t2".into();
    let text = "Could not create node: Duplicate nodes with node-name='t2'";
    assert_eq!(refused(&mut qmp, "blockdev-backup", named), text);

    // The disk gets all of its data, and an overlay, under the two filters.
    qmp.ok("block-stream", json!({"job-id": "s", "device": "top"}));
    // Jobs that were refused were forgotten at once.
    until(&mut qmp, "concluded");
    until(&mut qmp, "null");
    let new = vm.path("new");
    let args = json!({"node-name": "top", "snapshot-file": new, "snapshot-node-name": "new"});
    qmp.ok("blockdev-snapshot-sync", args);
    io(&mut qmp, "d", "write -q -P 11 7M 192k");
    for id in ["b", "a"] {
        qmp.ok("block-job-set-speed", json!({"device": id, "speed": 0}));
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"].take();
        assert_eq!(
            (&done["device"], &done["len"], &done["offset"]),
            (&json!(id), &json!(8 * MIB), &done["len"])
        );
        assert_eq!(done.get("error"), None);
    }
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
    let read = |image: &str, commands: [&str; 4]| {
        let image = vm.path(image).display().to_string();
        let args = commands.iter().flat_map(|c| ["-c", c]).chain(["-f", "qcow2", &image]);
        let said = run("qemu-io", &args.collect::<Vec<_>>());
        assert!(!said.contains("failed"), "{image}: {said}");
        run("qemu-img", &["check", "-q", &image]);
    };
    let old = ["read -P 3 0 2M", "read -P 2 2M 2M"];
    read("t1", [old[0], old[1], "read -P 1 4M 4M", "read -P 1 7M 64k"]);
    read("t2", [old[0], old[1], "read -P 9 7M 64k", "read -P 1 7232k 960k"]);
    read("new", [old[0], old[1], "read -P 11 7M 192k", "read -P 1 4M 3M"]);
}

/// The last cluster counts as a whole one.
#[test]
fn the_length_of_a_backup_is_whole_clusters() {
    for (size, cluster, len) in [
        (512, 65536, 65536),
        (MIB + 512, 4096, MIB + 65536),
        (MIB + 512, 2 * MIB, 2 * MIB),
        (MIB, 65536, MIB),
    ] {
        let dir = Dir::new();
        if !have("qemu-img", "qemu-utils") {
            return;
        }
        let (image, raw) = (dir.join("t1").display().to_string(), dir.join("raw"));
        std::fs::write(&raw, vec![7; usize::try_from(size).unwrap()]).unwrap();
        let option = format!("cluster_size={cluster}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &image, &size.to_string()]);
        let mut vm = Vm::start_in(dir, NOTHING);
        let mut qmp = vm.qmp();
        add(&vm, &mut qmp, "t1", Value::Null);
        qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "raw", "filename": raw}));
        qmp.ok("blockdev-backup", json!({"job-id": "j", "device": "raw", "target": "t1", "sync": "full"}));
        let done = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"].take();
        assert_eq!(
            (&done["len"], &done["offset"]),
            (&json!(len), &json!(len)),
            "{size} in clusters of {cluster}"
        );
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
        let image = vm.path("t1").display().to_string();
        run(
            "qemu-img",
            &["compare", "-q", "-f", "qcow2", "-F", "raw", &image, &vm.path("raw").display().to_string()],
        );
    }
}
