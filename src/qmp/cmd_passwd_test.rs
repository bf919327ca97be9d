use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::json;

#[test]
fn what_is_not_encrypted_has_no_password() {
    let dir = Scratch::new("passwd");
    let raw = dir.file("a.raw", 1 << 20);
    let mut q = Qmp::new();
    let drive = json!({"id": "d0", "if": "none", "file": raw, "format": "raw", "node-name": "n0"});
    q.vm.add_drive(drive.as_object().unwrap().clone()).unwrap();
    for (args, want) in [
        (json!({"device": "d0", "password": "x"}), "Device 'd0' is not encrypted"),
        (json!({"node-name": "n0", "password": "x"}), "Node 'n0' is not encrypted"),
        (json!({"device": "nope", "password": "x"}), "Cannot find device='nope' nor node-name=''"),
        (json!({"device": "d0"}), "Parameter 'password' is missing"),
    ] {
        assert_eq!(q.err("block_passwd", args), want);
    }
}
