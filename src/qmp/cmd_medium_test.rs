use super::super::cmd_blockdev::tests::Qmp;
use super::super::cmd_device::tests::{events, machine};
use crate::block::testing::Scratch;
use serde_json::{Value, json};

fn moved(open: bool) -> (&'static str, Value) {
    ("DEVICE_TRAY_MOVED", json!({"device": "", "id": "cd0", "tray-open": open}))
}

/// A machine with an empty drive `cd0`.
fn drive() -> Qmp {
    let mut q = machine();
    q.ok("device_add", json!({"driver": "scsi-cd", "id": "cd0"}));
    q
}

fn tray(q: &mut Qmp) -> std::sync::Arc<crate::block::tray::Tray> {
    q.vm.drives.of_device("cd0").unwrap().handle.tray().unwrap()
}

fn inserted(q: &mut Qmp) -> Value {
    q.ok("query-block", json!({}))[0]["inserted"].clone()
}

#[test]
fn media_are_changed_with_their_files() {
    let dir = Scratch::new("change-medium");
    let (a, b) = (dir.file("a", 1 << 20), dir.file("b", 2 << 20));
    let mut q = drive();
    let change = |more: Value| {
        let mut args = json!({"id": "cd0", "filename": a, "format": "raw"});
        args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        args
    };
    q.ok("blockdev-change-medium", change(json!({})));
    assert_eq!(events(&mut q), [moved(true), moved(false)]);
    assert_eq!((&inserted(&mut q)["file"], &inserted(&mut q)["ro"]), (&json!(a), &json!(true)));
    q.ok("blockdev-change-medium", change(json!({"filename": b, "read-only-mode": "read-write"})));
    assert_eq!(inserted(&mut q)["ro"], false);
    q.ok("blockdev-change-medium", change(json!({})));
    assert_eq!(inserted(&mut q)["ro"], false, "as the one before");
    q.ok("eject", json!({"id": "cd0"}));
    q.ok("blockdev-change-medium", change(json!({"read-only-mode": "retain"})));
    assert_eq!(inserted(&mut q)["ro"], false, "as the one before it was ejected");
    q.ok("blockdev-change-medium", change(json!({"read-only-mode": "read-only"})));
    assert_eq!(inserted(&mut q)["ro"], true);
    events(&mut q);
    // What cannot be opened leaves the old one in place.
    let e = q.err("blockdev-change-medium", json!({"id": "cd0", "filename": b}));
    assert!(e.starts_with("Parameter 'format' is missing"), "{e}");
    let none = dir.path("none");
    let e = q.err("blockdev-change-medium", json!({"id": "cd0", "filename": none}));
    assert_eq!(e, format!("Could not open '{none}': No such file or directory"));
    tray(&mut q).lock(true);
    let e = q.err("blockdev-change-medium", change(json!({"filename": b})));
    assert!(e.starts_with("Device 'cd0' is locked"), "{e}");
    assert_eq!((&inserted(&mut q)["file"], events(&mut q)), (&json!(a), vec![]));
    let nodes = q.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "no node is left behind: {nodes}");
    q.ok("blockdev-change-medium", change(json!({"filename": b, "force": true})));
    assert_eq!(inserted(&mut q)["file"], b);
    q.ok("eject", json!({"id": "/machine/peripheral/cd0"}));
    assert_eq!(q.ok("query-named-block-nodes", json!({})), json!([]));
}

#[test]
fn the_guest_has_a_say_in_its_tray() {
    let mut q = drive();
    tray(&mut q).lock(true);
    assert_eq!(q.ok("query-block", json!({}))[0]["locked"], true);
    q.ok("blockdev-open-tray", json!({"id": "cd0"}));
    assert!(!tray(&mut q).is_open() && events(&mut q).is_empty());
    assert_eq!(
        q.err("eject", json!({"id": "cd0"})),
        "Device 'cd0' is locked and force was not specified, wait for tray to open and try again"
    );
    // The guest does what it was asked for.
    tray(&mut q).lock(false);
    assert!(tray(&mut q).guest_move(true));
    assert_eq!(events(&mut q), [moved(true)]);
    assert!(tray(&mut q).guest_move(false));
    assert_eq!(events(&mut q), [moved(false)]);
    tray(&mut q).lock(true);
    q.ok("eject", json!({"id": "cd0", "force": true}));
    assert_eq!(events(&mut q), [moved(true)]);
    assert_eq!(q.ok("query-block", json!({}))[0]["locked"], false);
    // A device that goes while its tray is open.
    q.ok("device_del", json!({"id": "cd0"}));
    assert_eq!(events(&mut q).len(), 1);
}

#[test]
fn the_older_commands_take_either_name() {
    let dir = Scratch::new("x-medium");
    let mut q = drive();
    q.ok("blockdev-add", json!({"driver": "file", "node-name": "n", "filename": dir.file("a", 4096)}));
    q.ok("blockdev-open-tray", json!({"id": "cd0"}));
    q.ok("x-blockdev-insert-medium", json!({"id": "cd0", "node-name": "n"}));
    q.ok("x-blockdev-remove-medium", json!({"device": "cd0"}));
    q.ok("x-blockdev-insert-medium", json!({"device": "cd0", "node-name": "n"}));
    assert_eq!(
        q.err("x-blockdev-insert-medium", json!({"id": "cd0", "node-name": "n"})),
        "Node 'n' is already in use"
    );
    q.ok("blockdev-add", json!({"driver": "null-co", "node-name": "m"}));
    assert_eq!(
        q.err("blockdev-insert-medium", json!({"id": "cd0", "node-name": "m"})),
        "There already is a medium in the device"
    );
    q.ok("blockdev-close-tray", json!({"id": "cd0"}));
    assert_eq!(q.err("x-blockdev-remove-medium", json!({"id": "cd0"})), "Tray of device 'cd0' is not open");
    assert_eq!(q.err("x-blockdev-remove-medium", json!({})), "Need exactly one of 'device' and 'id'");
    assert_eq!(q.err("eject", json!({"id": "scsi0"})), "Device does not have a block device backend");
}

#[test]
fn a_node_that_others_write_cannot_be_inserted_and_nothing_changes() {
    let dir = Scratch::new("medium-perm");
    let mut q = machine();
    let raw = |name: &str| json!({"driver": "file", "node-name": name, "filename": dir.file(name, 4096)});
    q.ok("blockdev-add", raw("a"));
    q.ok("blockdev-add", raw("b"));
    q.ok("device_add", json!({"driver": "scsi-hd", "id": "cd0", "drive": "a", "removable": true}));
    q.ok("blockdev-add", json!({"driver": "raw", "node-name": "above", "file": "b"}));
    q.ok("device_add", json!({"driver": "scsi-hd", "id": "sd1", "drive": "above"}));
    q.ok("eject", json!({"id": "cd0"}));
    let e = q.err("blockdev-insert-medium", json!({"id": "cd0", "node-name": "b"}));
    assert!(e.starts_with("Permission conflict on node 'b'"), "{e}");
    assert_eq!(inserted(&mut q), Value::Null);
    q.ok("blockdev-insert-medium", json!({"id": "cd0", "node-name": "a"}));
    // A medium that is only read, in a drive that writes.
    q.ok("eject", json!({"id": "cd0"}));
    let read_only = json!({"driver": "raw", "node-name": "ro", "read-only": true, "file": "a"});
    q.ok("blockdev-add", read_only);
    q.ok("blockdev-insert-medium", json!({"id": "cd0", "node-name": "ro"}));
    let drive = q.vm.drives.of_device("cd0").unwrap();
    assert!(drive.handle.read_only());
    assert_eq!(q.err("eject", json!({"id": "sd1"})), "Device 'sd1' is not removable");
}
