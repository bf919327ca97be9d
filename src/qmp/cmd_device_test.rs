use super::super::cmd_blockdev::tests::Qmp;
use crate::block::testing::Scratch;
use crate::control::board::Board;
use crate::machine::{Accel, Machine, MachineConfig};
use serde_json::{Value, json};

/// A machine with a SCSI controller `scsi0`.
pub(crate) fn machine() -> Qmp {
    let mut q = Qmp::new();
    let config = MachineConfig { memory: 16 << 20, accel: Accel::None, ..Default::default() };
    let mut machine = Machine::new(&config, q.vm.events.clone()).unwrap();
    q.vm.board = Some(Board::new(&mut machine).unwrap());
    q.vm.machine = Some(machine);
    let scsi = json!({ "driver": "virtio-scsi-pci", "id": "scsi0" });
    q.vm.add_device(scsi.as_object().unwrap(), false).unwrap();
    q
}

/// Name and data of the events so far.
pub(crate) fn events(q: &mut Qmp) -> Vec<(&'static str, Value)> {
    q.vm.take_events();
    let data = |e: crate::control::vm::QmpEvent| (e.name, Value::Object(e.data.unwrap_or_default()));
    q.vm.outbox.drain(..).map(data).collect()
}

#[test]
fn a_disk_comes_and_goes() {
    let dir = Scratch::new("device-add");
    let mut q = machine();
    q.ok("blockdev-add", json!({"driver": "file", "node-name": "n0", "filename": dir.file("d", 1 << 20)}));
    q.ok("device_add", json!({"driver": "scsi-hd", "id": "sd0", "drive": "n0", "bus": "scsi0.0", "lun": 3}));
    let block = q.ok("query-block", json!({}));
    assert_eq!((&block[0]["qdev"], &block[0]["removable"]), (&json!("sd0"), &json!(false)));
    assert!(block[0].get("tray_open").is_none());
    assert_eq!(q.err("blockdev-del", json!({"node-name": "n0"})), "Node n0 is in use");
    q.ok("device_del", json!({"id": "sd0"}));
    let gone = json!({"device": "sd0", "path": "/machine/peripheral/sd0"});
    assert_eq!(events(&mut q), [("DEVICE_DELETED", gone)]);
    assert_eq!(q.ok("query-block", json!({})), json!([]));
    q.ok("blockdev-del", json!({"node-name": "n0"}));
    // Those without an id are numbered once and for all.
    q.ok("device_add", json!({"driver": "scsi-cd"}));
    q.ok("device_add", json!({"driver": "scsi-cd", "id": ""}));
    q.ok("device_del", json!({"id": "/machine/peripheral-anon/device[0]"}));
    q.ok("device_add", json!({"driver": "scsi-cd"}));
    q.ok("device_del", json!({"id": "/machine/peripheral-anon/device[2]"}));
    q.ok("device_del", json!({"id": "/machine/peripheral-anon/device[1]"}));
    assert!(events(&mut q).iter().all(|e| e.1.get("device").is_none()));
}

#[test]
fn what_cannot_come_or_go_leaves_nothing() {
    let dir = Scratch::new("device-add-errors");
    let mut q = machine();
    q.ok("blockdev-add", json!({"driver": "file", "node-name": "n0", "filename": dir.file("d", 1 << 20)}));
    q.ok("device_add", json!({"driver": "scsi-cd", "id": "cd0"}));
    let before = q.ok("query-block", json!({}));
    for (args, want) in [
        (json!({"driver": "scsi-hd", "scsi-id": 0, "lun": 0, "drive": "n0"}), "lun already used by 'cd0'"),
        (json!({"driver": "scsi-hd", "channel": 1, "drive": "n0"}), "bad scsi channel id: 1"),
        (json!({"driver": "scsi-hd", "lun": 16384, "drive": "n0"}), "bad scsi device lun: 16384"),
        (
            json!({"driver": "scsi-hd", "drive": "n0", "logical_block_size": 1000}),
            "parameter logical_block_size must be a power of 2",
        ),
        (
            json!({"driver": "scsi-hd", "drive": "n0", "serial": "s".repeat(37)}),
            "Property 'serial' must have at most 36 printable ASCII characters",
        ),
        (json!({"driver": "virtio-scsi-pci"}), "Bus 'pcie.0' does not support hotplugging"),
        (
            json!({"driver": "virtio-rng-pci", "bus": "scsi0.0"}),
            "Device 'virtio-rng-pci' can't go on SCSI bus",
        ),
        (json!({"driver": "scsi-cd", "rotation_rate": 1}), "Property 'scsi-cd.rotation_rate' not found"),
    ] {
        assert_eq!(q.err("device_add", args.clone()), want, "{args}");
    }
    assert_eq!(q.err("device_del", json!({"id": "scsi0"})), "Bus 'pcie.0' does not support hotplugging");
    assert_eq!(q.err("device_del", json!({"id": "/objects"})), "/objects is not a device");
    assert_eq!(q.ok("query-block", json!({})), before);
    q.ok("blockdev-del", json!({"node-name": "n0"}));
    assert!(events(&mut q).is_empty());
    // Nowhere to plug it.
    let mut q = Qmp::new();
    assert_eq!(q.err("device_add", json!({"driver": "scsi-cd"})), "there is no machine");
}
