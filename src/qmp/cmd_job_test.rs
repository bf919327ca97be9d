//! What is told of jobs that cannot be, and what may be done to the nodes of one that is.

use crate::block::driver::Perm;
use crate::block::handle::HandleSpec;
use crate::block::testing::Scratch;
use crate::jobs::registry::JobEvent;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};

/// A drive `d` on the node `low` with an overlay `top`, and other nodes of 1 MiB: `t`, and the read-only
/// `ro`.
fn disks(dir: &Scratch) -> Qmp {
    let mut q = Qmp::new();
    let args = json!({"id": "d", "if": "none", "file": dir.file("low.raw", 1 << 20), "format": "raw",
                      "node-name": "low"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    let over = dir.path("top.qcow2");
    q.ok(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": over, "snapshot-node-name": "top"}),
    );
    for (name, read_only) in [("t", false), ("ro", true)] {
        let file = json!({"driver": "file", "filename": dir.file(name, 1 << 20)});
        q.ok(
            "blockdev-add",
            json!({"driver": "raw", "node-name": name, "read-only": read_only, "file": file}),
        );
    }
    q
}

/// `command` fails with this; and what is told of jobs.
fn refused(q: &mut Qmp, command: &str, args: Value) -> (String, Vec<String>) {
    q.vm.jobs.out.clear();
    let text = q.err(command, args);
    let told = q.vm.jobs.out.drain(..).map(|e| match e {
        JobEvent::Status(id, status) => format!("{id} {}", status.as_str()),
        other => format!("{other:?}"),
    });
    (text, told.collect())
}

#[test]
fn a_job_that_cannot_be_is_refused_as_qemu_does_it() {
    let dir = Scratch::new("cmd-job-refused");
    let mut q = disks(&dir);
    let taken = "Duplicate nodes with node-name='t'";
    let prefixed = &format!("Could not create node: {taken}");
    let negative = "Parameter 'speed' expects a non-negative value";
    let replaces = "Failed to find node with node-name='nix'";
    let sync = "Sync mode 'bitmap' not supported";
    let granularity = "Parameter 'granularity' expects a power of 2";
    let locked = "Block node is read-only";
    let frozen = "Could not create node: Block node is read-only";
    let sized = "Source and target image have different sizes";
    let was: &[&str] = &["j created", "j null"];
    let file = json!({"driver": "file", "filename": dir.file("small", 1 << 16)});
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "small", "file": file}));
    for (command, more, text, told) in [
        ("blockdev-mirror", json!({"speed": -1}), negative, was),
        ("blockdev-mirror", json!({"filter-node-name": "t", "speed": -1}), taken, &[]),
        ("blockdev-mirror", json!({"target": "ro"}), locked, was),
        ("blockdev-mirror", json!({"sync": "bitmap", "granularity": 1000}), granularity, &[]),
        ("blockdev-mirror", json!({"sync": "bitmap", "replaces": "nix"}), replaces, &[]),
        ("blockdev-mirror", json!({"sync": "bitmap", "buf-size": -1}), sync, &[]),
        ("blockdev-mirror", json!({"target": "top", "buf-size": -1}), "Invalid parameter 'buf-size'", &[]),
        ("blockdev-backup", json!({"filter-node-name": "t", "speed": -1}), prefixed, &[]),
        ("blockdev-backup", json!({"target": "small", "speed": -1}), sized, &[]),
        ("blockdev-backup", json!({"target": "ro"}), frozen, &[]),
        ("block-stream", json!({"filter-node-name": "t", "speed": -1}), prefixed, &[]),
        ("block-commit", json!({"filter-node-name": "t", "speed": -1}), taken, &[]),
    ] {
        let mut args = json!({"device": "top", "job-id": "j"});
        if command.starts_with("blockdev") {
            args["target"] = "t".into();
            args["sync"] = "full".into();
        }
        more.as_object().unwrap().iter().for_each(|(key, value)| args[key.as_str()] = value.clone());
        let (said, seen) = refused(&mut q, command, args.clone());
        assert_eq!(
            (said.as_str(), seen),
            (text, told.iter().map(|t| t.to_string()).collect()),
            "{command} {args}"
        );
    }
    // The filter of a commit of other images than the active one comes later.
    let over = dir.path("over.qcow2");
    q.ok(
        "blockdev-snapshot-sync",
        json!({"device": "d", "snapshot-file": over, "snapshot-node-name": "over"}),
    );
    let args = json!({"device": "over", "top-node": "top", "job-id": "j", "filter-node-name": "t"});
    let (said, seen) = refused(&mut q, "block-commit", args);
    assert_eq!((said.as_str(), seen.len()), (taken, 2));
    assert_eq!(q.ok("query-jobs", json!({})), json!([]));
    // A file that some other node has is not mistaken for the backing file.
    let args = json!({"device": "top", "job-id": "j", "sync": "top", "target": dir.path("t")});
    let (said, _) = refused(&mut q, "drive-backup", args);
    assert!(!said.contains("backing file"), "{said}");
}

/// The options of `top`, with others.
fn top(dir: &Scratch, more: Value) -> Value {
    let file = json!({"driver": "file", "filename": dir.path("top.qcow2")});
    let mut node = json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": "low"});
    more.as_object().unwrap().iter().for_each(|(key, value)| node[key.as_str()] = value.clone());
    json!({"options": [node]})
}

#[test]
fn nodes_of_a_job_get_other_options_but_no_other_children() {
    let dir = Scratch::new("cmd-job-reopen");
    let link = "Cannot change frozen 'backing' link from 'top' to 'low'";
    let written = |name: &str| format!("Read-only block node '{name}' cannot support read-write users");
    for (command, driver) in
        [("block-stream", "copy-on-read"), ("block-commit", "mirror_top"), ("blockdev-mirror", "mirror_top")]
    {
        let mut q = disks(&dir);
        let mut args = json!({"device": "d", "job-id": "j", "speed": 1});
        if command == "blockdev-mirror" {
            args["target"] = "t".into();
            args["sync"] = "full".into();
        }
        q.ok("human-monitor-command", json!({"command-line": "qemu-io d \"write -q -P 1 0 64k\""}));
        q.ok(command, args);
        // The job's filter is there, and not the disk.
        let nodes = q.ok("query-named-block-nodes", json!({}));
        assert!(nodes.as_array().unwrap().iter().any(|n| n["drv"] == driver), "{command}: {nodes}");
        assert_eq!(q.ok("query-block", json!({}))[0]["inserted"]["node-name"], "top", "{command}");

        for other in [
            json!({"cache": {"no-flush": true}}),
            json!({"detect-zeroes": "on"}),
            json!({"l2-cache-size": 1 << 20}),
        ] {
            q.ok("blockdev-reopen", top(&dir, other));
        }
        assert_eq!(q.err("blockdev-reopen", top(&dir, json!({"read-only": true}))), written("top"));
        let e = q.err("blockdev-reopen", top(&dir, json!({"backing": null})));
        let busy = "Node 'top' is busy: block device is in use by block job: mirror";
        assert_eq!(e, if command == "blockdev-mirror" { busy } else { link }, "{command}");
        if command == "blockdev-mirror" {
            let file = json!({"driver": "file", "filename": dir.path("t")});
            let target = |key: &str, value: Value| {
                let mut node = json!({"driver": "raw", "node-name": "t", "file": file});
                node[key] = value;
                json!({"options": [node]})
            };
            q.ok("blockdev-reopen", target("discard", json!("unmap")));
            assert_eq!(q.err("blockdev-reopen", target("read-only", json!(true))), written("t"));
            let busy = "Node 't' is busy: block device is in use by block job: mirror";
            assert_eq!(q.err("blockdev-reopen", target("offset", json!(512))), busy);
            // Nobody gets to see a copy that is not complete.
            let node = q.vm.graph.find("t").cloned();
            let reader =
                HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::ALL, ..HandleSpec::default() };
            let e = q.vm.graph.attach(node, reader).err().unwrap();
            assert!(e.desc.contains("permissions 'consistent read' are both required"), "{e}");
        }
        q.vm.jobs.cancel_all(&mut q.vm.graph);
        let nodes = q.ok("query-named-block-nodes", json!({}));
        assert!(nodes.as_array().unwrap().iter().all(|n| n["drv"] != driver), "{command}: {nodes}");
        q.vm.drives.clear();
        q.vm.graph.close_all();
    }
}

#[test]
fn the_filter_of_a_stream_stays_while_nobody_is_above_it() {
    let dir = Scratch::new("cmd-job-filter");
    let mut q = disks(&dir);
    q.ok("human-monitor-command", json!({"command-line": "qemu-io d \"write -q -P 1 0 64k\""}));
    q.vm.drives.clear();
    q.vm.graph.close_all();
    let file = json!({"driver": "file", "filename": dir.path("top.qcow2")});
    let low = json!({"driver": "raw", "file": {"driver": "file", "filename": dir.path("low.raw")}});
    q.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": file, "backing": low}));
    q.ok("block-stream", json!({"device": "n", "job-id": "j", "speed": 1, "filter-node-name": "f"}));
    q.vm.graph.collect();
    assert!(q.vm.graph.find("f").is_some());
    q.vm.jobs.cancel_all(&mut q.vm.graph);
    assert!(q.vm.graph.find("f").is_none());
    q.vm.graph.close_all();
}
