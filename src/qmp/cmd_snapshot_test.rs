use crate::block::testing::{Scratch, qemu};
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};

/// Drives `d0`, `d1`, … on new images of 1 MiB, made by the command under test's own code.
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

/// The names of the nodes that drives have, by drive.
fn tops(q: &mut Qmp) -> Vec<String> {
    let drives = q.ok("query-block", json!({}));
    let name = |d: &Value| d["inserted"]["node-name"].as_str().unwrap().to_string();
    drives.as_array().unwrap().iter().map(name).collect()
}

fn count(q: &Qmp) -> usize {
    q.vm.graph.nodes().count()
}

#[test]
fn an_overlay_on_a_raw_disk_is_what_qemu_img_thinks_it_is() {
    let dir = Scratch::new("cmd-snap");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 1);
    say(&mut q, "qemu-io d0 \"write -q -P 1 0 64k\"");
    let path = dir.path("o.qcow2");
    q.ok("blockdev-snapshot-sync", json!({"device": "d0", "snapshot-file": path, "snapshot-node-name": "o"}));
    say(&mut q, "qemu-io d0 \"write -q -P 2 0 512\"");
    assert_eq!(std::fs::read(dir.path("d0.raw")).unwrap()[0], 1);
    assert_eq!(tops(&mut q), ["o"]);
    q.vm.drives.clear();
    q.vm.graph.close_all();
    let Some(tool) = qemu("qemu-img") else { return };
    let run = |args: &[&str]| {
        let done = std::process::Command::new(&tool).args(args).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice::<Value>(&done.stdout).unwrap()
    };
    let info = run(&["info", "--output=json", &path]);
    assert_eq!(info["backing-filename"], dir.path("d0.raw"));
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["virtual-size"], 1 << 20);
    run(&["check", "--output=json", &path]);
}

#[test]
fn a_transaction_happens_as_a_whole_or_not_at_all() {
    let dir = Scratch::new("cmd-txn");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 2);
    let sync = |device: &str, name: &str| {
        let data = json!({"device": device, "snapshot-file": dir.path(name), "snapshot-node-name": name});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let abort = json!({"type": "abort", "data": {}});
    let grouped = json!({"actions": [sync("d0", "a")], "properties": {"completion-mode": "grouped"}});
    let e = q.err("transaction", grouped);
    assert_eq!(
        e,
        "Action 'blockdev-snapshot-sync' does not support transaction property completion-mode = grouped"
    );
    q.ok("transaction", json!({"actions": []}));
    let nodes = count(&q);
    for (actions, want) in [
        (json!([abort]), "Transaction aborted using Abort action"),
        (json!([sync("d0", "a"), sync("d1", "b"), abort]), "Transaction aborted using Abort action"),
        (json!([sync("d0", "a"), sync("nope", "b")]), "Cannot find device='nope' nor node-name=''"),
        (json!([sync("d0", "a"), sync("d1", "a")]), "New overlay node-name already in use"),
        (
            json!([sync("d0", "a"), {"type": "blockdev-snapshot", "data": {"node": "n0", "overlay": "n1"}}]),
            "Node 'n0' is busy: node is used as backing hd of 'a'",
        ),
        (
            json!([sync("d0", "a"), {"type": "blockdev-snapshot", "data": {"node": "n1", "overlay": "a"}},
                   {"type": "blockdev-snapshot", "data": {"node": "n1", "overlay": "n1"}}]),
            "The overlay is already in use",
        ),
        (json!([{"type": "nope", "data": {}}]), "Parameter 'type' does not accept value 'nope'"),
    ] {
        let said = q.err("transaction", json!({"actions": actions}));
        assert!(said.ends_with(want), "{said} instead of {want}");
        assert_eq!((tops(&mut q), count(&q)), (vec!["n0".to_string(), "n1".into()], nodes), "{want}");
    }
    // One on top of the other, in one transaction: a drive means what it will have.
    let both = json!([sync("d0", "a"), sync("d1", "b"), sync("d0", "c")]);
    q.ok("transaction", json!({"actions": both}));
    assert_eq!(tops(&mut q), ["c", "b"]);
    let chain = q.ok("query-block", json!({}))[0]["inserted"]["backing_file_depth"].clone();
    assert_eq!(chain, 2);
    // A node means itself.
    let data = json!({"node-name": "a", "snapshot-file": dir.path("e"), "snapshot-node-name": "e"});
    let action = json!([{"type": "blockdev-snapshot-sync", "data": data}]);
    let e = q.err("transaction", json!({"actions": action}));
    assert_eq!(e, "Node 'a' is busy: node is used as backing hd of 'c'");
    // What was made is closed with the drives.
    q.vm.drives.clear();
    q.vm.graph.close_all();
    assert_eq!(count(&q), 0);
}

#[test]
fn the_image_of_a_running_disk_is_not_overwritten() {
    let dir = Scratch::new("cmd-snap-own");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 1);
    say(&mut q, "qemu-io d0 \"write -q -P 1 0 64k\"");
    let before = std::fs::read(dir.path("d0.raw")).unwrap();
    let e = q.err("blockdev-snapshot-sync", json!({"device": "d0", "snapshot-file": dir.path("d0.raw")}));
    assert_eq!(e, "Error: Trying to create an image with the same filename as the backing file");
    assert_eq!(std::fs::read(dir.path("d0.raw")).unwrap(), before);
    assert_eq!(tops(&mut q), ["n0"]);
    // Nor when there are no locks, and whatever the file is called.
    let raw = dir.file("free.raw", 1 << 20);
    std::os::unix::fs::symlink(&raw, dir.path("link")).unwrap();
    let file = json!({"driver": "file", "filename": raw, "locking": "off"});
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "free", "file": file}));
    let snapshot = json!({"node-name": "free", "snapshot-file": dir.path("link"), "snapshot-node-name": "s"});
    let e = q.err("blockdev-snapshot-sync", snapshot);
    assert_eq!(e, "Error: Trying to create an image with the same filename as the backing file");
    let mirror =
        json!({"device": "d0", "job-id": "m", "target": dir.path("link"), "sync": "full", "format": "raw"});
    let e = q.err("drive-mirror", mirror);
    assert!(e.contains("link': it is the file of node '#block"), "{e}");
    assert_eq!(std::fs::read(&raw).unwrap(), [0; 1 << 20]);
}

#[test]
fn thresholds_and_names_of_backing_files() {
    let dir = Scratch::new("cmd-threshold");
    let mut q = Qmp::new();
    drives(&mut q, &dir, 1);
    q.ok("block-set-write-threshold", json!({"node-name": "n0", "write-threshold": 4096}));
    say(&mut q, "qemu-io d0 \"write -q 0 4096\"");
    assert!(q.vm.events.take().is_empty());
    say(&mut q, "qemu-io d0 \"write -q 4096 512\"");
    say(&mut q, "qemu-io d0 \"write -q 8192 512\"");
    for event in q.vm.events.take() {
        q.vm.handle(event);
    }
    let data = json!({"node-name": "n0", "amount-exceeded": 512, "write-threshold": 4096});
    let sent: Vec<_> = q.vm.outbox.iter().map(|e| (e.name, json!(e.data))).collect();
    assert_eq!(sent, [("BLOCK_WRITE_THRESHOLD", data)]);
    q.ok(
        "blockdev-snapshot-sync",
        json!({"device": "d0", "snapshot-file": dir.path("o"), "snapshot-node-name": "o"}),
    );
    let args =
        |image: &str, name: &str| json!({"device": "d0", "image-node-name": image, "backing-file": name});
    let e = q.err("change-backing-file", args("n0", "x"));
    assert_eq!(e, "not allowing backing file change on an image without a backing file");
    q.ok("change-backing-file", args("o", "other.raw"));
    let shown = q.ok("query-block", json!({}));
    let image = &shown[0]["inserted"]["image"];
    assert_eq!(image["full-backing-filename"], dir.path("other.raw"));
    // None, and one again: the node that is below stays.
    for (name, want) in [("", (None, None)), ("d0.raw", (Some("d0.raw"), Some("raw")))] {
        q.ok("change-backing-file", args("o", name));
        let o = q.vm.graph.find("o").unwrap();
        let info = o.driver.info();
        assert_eq!((info.backing_filename.as_deref(), info.backing_format.as_deref()), want);
        assert_eq!(o.backing().unwrap().name, "n0");
    }
    // One below stays read-only.
    q.ok(
        "blockdev-snapshot-sync",
        json!({"device": "d0", "snapshot-file": dir.path("p"), "snapshot-node-name": "p"}),
    );
    q.ok("change-backing-file", args("o", "third.raw"));
    let o = q.vm.graph.find("o").unwrap();
    assert!(o.read_only());
    assert_eq!(o.driver.info().backing_filename.as_deref(), Some("third.raw"));
    let e = q.err("change-backing-file", args("p", &"x".repeat(1024)));
    assert!(e.ends_with("': Invalid argument"), "{e}");
}

#[test]
fn a_disk_that_a_job_has_put_a_filter_on_is_busy() {
    let dir = Scratch::new("snapshot-busy");
    let path = dir.file("d.raw", 1 << 20);
    let mut q = Qmp::new();
    let drive = json!({"id": "d0", "if": "none", "file": path, "format": "raw"});
    q.vm.add_drive(drive.as_object().unwrap().clone()).unwrap();
    q.ok("blockdev-add", json!({"driver": "null-co", "node-name": "t", "size": 1 << 20}));
    let backup = json!({"job-id": "j", "device": "d0", "target": "t", "sync": "full", "speed": 1});
    q.ok("blockdev-backup", backup);
    let args = json!({"device": "d0", "snapshot-file": dir.path("over")});
    let e = q.err("blockdev-snapshot-sync", args.clone());
    assert!(e.ends_with("is busy: block device is in use by block job: backup"), "{e}");
    q.ok("block-job-cancel", json!({"device": "j", "force": true}));
    while q.ok("query-block-jobs", json!({})) != json!([]) {
        q.vm.take_events();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    q.ok("blockdev-snapshot-sync", args);
}

#[test]
fn a_header_may_say_as_an_absolute_path_what_is_called_by_a_relative_one() {
    let dir = Scratch::new("filename-relative");
    let full = dir.file("base.raw", 1 << 20);
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count());
    let relative = format!("{up}{}", full.trim_start_matches('/'));
    let mut q = Qmp::new();
    let drive = json!({"id": "d", "if": "none", "file": relative, "format": "raw"});
    q.vm.add_drive(drive.as_object().unwrap().clone()).unwrap();
    for over in ["a", "b"].map(|name| dir.path(name)) {
        q.ok("blockdev-snapshot-sync", json!({"device": "d", "snapshot-file": over}));
        let shown = q.ok("query-block", json!({}))[0]["inserted"]["file"].clone();
        assert_eq!(shown, over);
    }
}

#[test]
fn filters_come_between_an_image_and_its_file_and_its_disk() {
    let Some(img) = crate::block::testing::qemu("qemu-img") else { return };
    let dir = Scratch::new("cmd-filters");
    let path = dir.path("a.qcow2");
    let made = std::process::Command::new(img).args(["create", "-q", "-f", "qcow2", &path, "16M"]).status();
    assert!(made.unwrap().success());
    let mut q = Qmp::new();
    q.ok("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    let file = json!({"driver": "file", "node-name": "f", "filename": path});
    q.ok("blockdev-add", file);
    let image = json!({"driver": "qcow2", "node-name": "i", "file": "f"});
    q.ok("blockdev-add", image.clone());
    let throttle = |name: &str, file: &str| json!({"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file});
    q.ok("blockdev-add", throttle("t", "i"));
    q.ok("blockdev-add", json!({"driver": "copy-on-read", "node-name": "c", "file": "t"}));
    say(&mut q, "qemu-io c \"write -q -P 1 0 64k\"");
    // Internal snapshots of what the filters show are the image's.
    q.ok("blockdev-snapshot-internal-sync", json!({"device": "c", "name": "s"}));
    say(&mut q, "qemu-io c \"write -q -P 2 0 64k\"");
    let i = q.vm.graph.find("i").unwrap().clone();
    assert_eq!(i.driver.internal().unwrap().snapshots().unwrap().len(), 1);
    let e = q.err("blockdev-snapshot-internal-sync", json!({"device": "c", "name": "s"}));
    assert_eq!(e, "Snapshot with name 's' already exists on device 'c'");
    assert_eq!(
        q.ok("blockdev-snapshot-delete-internal-sync", json!({"device": "c", "name": "s"}))["name"],
        "s"
    );
    // A limit between the image and its file, and away again; but no other file.
    q.ok("blockdev-add", throttle("below", "f"));
    let mut options = image;
    for name in ["below", "f", "below"] {
        options["file"] = json!(name);
        q.ok("blockdev-reopen", json!({"options": [options]}));
        assert_eq!(crate::block::filename::primary(&i).unwrap().name, name);
        say(&mut q, "qemu-io c \"read -q -P 2 0 64k\"");
        say(&mut q, "qemu-io c \"write -q -P 2 1M 64k\"");
    }
    q.ok("blockdev-add", json!({"driver": "file", "node-name": "other", "filename": dir.file("o", 1 << 20)}));
    options["file"] = json!("other");
    let e = q.err("blockdev-reopen", json!({"options": [options]}));
    assert_eq!(e, "Cannot change the option 'file'");
    for name in ["c", "t", "i", "below", "f", "other"] {
        q.ok("blockdev-del", json!({"node-name": name}));
    }
    assert_eq!(count(&q), 0);
}
