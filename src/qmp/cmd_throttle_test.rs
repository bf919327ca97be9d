use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn with(more: Value) -> Value {
    let mut args = json!({"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    for (name, value) in more.as_object().unwrap() {
        args[name] = value.clone();
    }
    args
}

fn drives(q: &mut Qmp, dir: &Scratch) {
    for n in 0..2 {
        let raw = dir.file(&format!("d{n}.raw"), 1 << 20);
        let args = json!({"id": format!("d{n}"), "if": "none", "file": raw, "format": "raw"});
        q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    }
    q.vm.add_drive(json!({"id": "cd", "if": "none"}).as_object().unwrap().clone()).unwrap();
}

#[test]
fn limits_are_set_shown_shared_and_taken_away() {
    let dir = Scratch::new("throttle-set");
    let mut q = Qmp::new();
    drives(&mut q, &dir);
    for (args, want) in [
        (with(json!({"device": "nope"})), "Device 'nope' not found"),
        (with(json!({"id": "nope"})), "Device 'nope' not found"),
        (with(json!({"device": "cd", "bps": 1})), "Device has no medium"),
        (
            with(json!({"device": "d0", "bps": -1})),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (
            with(json!({"device": "d0", "bps": 1, "bps_max": 1, "bps_max_length": 0})),
            "the burst length cannot be 0",
        ),
    ] {
        assert_eq!(q.err("block_set_io_throttle", args), want);
    }
    q.ok(
        "block_set_io_throttle",
        with(json!({"device": "d0", "bps": 1000, "bps_max": 8000, "bps_max_length": 60})),
    );
    q.ok(
        "block_set_io_throttle",
        with(json!({"device": "d1", "iops_rd": 7, "iops_size": 4096, "group": "g"})),
    );
    // Other limits, and no word about the group.
    q.ok("block_set_io_throttle", with(json!({"device": "d1", "iops_rd": 7, "iops_size": 4096})));
    let shown = q.ok("query-block", json!({}));
    let (a, b) = (&shown[0]["inserted"], &shown[1]["inserted"]);
    assert_eq!(
        (&a["bps"], &a["bps_max"], &a["bps_max_length"], &a["group"]),
        (&json!(1000), &json!(8000), &json!(60), &json!("d0"))
    );
    assert_eq!((&b["iops_rd"], &b["iops_size"], &b["group"]), (&json!(7), &json!(4096), &json!("g")));
    assert!(
        b.get("iops_rd_max").is_none()
            && a.get("bps_rd_max_length").is_none()
            && a.get("iops_size").is_none()
    );
    // The second joins the first one's group: both have the new limits.
    q.ok("block_set_io_throttle", with(json!({"device": "d1", "bps": 5, "group": "d0"})));
    let shown = q.ok("query-block", json!({}));
    for n in 0..2 {
        assert_eq!((&shown[n]["inserted"]["bps"], &shown[n]["inserted"]["group"]), (&json!(5), &json!("d0")));
    }
    q.ok("block_set_io_throttle", with(json!({"device": "d0"})));
    let shown = q.ok("query-block", json!({}));
    assert!(shown[0]["inserted"].get("group").is_none() && shown[0]["inserted"]["bps"] == 0);
    assert_eq!(shown[1]["inserted"]["bps"], 5);
}

#[test]
fn a_stop_does_not_wait_for_a_throttled_request() {
    let dir = Scratch::new("throttle-stop");
    let mut q = Qmp::new();
    drives(&mut q, &dir);
    q.ok("block_set_io_throttle", with(json!({"device": "d0", "bps": 1})));
    let handle = q.vm.drives.find("d0").unwrap().handle.clone();
    let write = |byte: u8| {
        let handle = handle.clone();
        std::thread::spawn(move || {
            let data = vec![byte; 65536];
            handle.write(0, &crate::sys::iov::Iov::from_slice(&data), crate::block::driver::Flags::NONE)
        })
    };
    write(1).join().unwrap().unwrap();
    let waits = write(2);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waits.is_finished(), "it must wait for 18 hours");
    // A change of the graph does not wait for it either: it has no ticket.
    let start = Instant::now();
    let args = json!({"device": "d0", "snapshot-file": dir.path("o"), "snapshot-node-name": "o"});
    q.ok("blockdev-snapshot-sync", args);
    assert!(!waits.is_finished());
    let hurry = q.vm.graph.hurry();
    waits.join().unwrap().unwrap();
    drop(hurry);
    assert!(start.elapsed() < Duration::from_secs(5));
    // It went to the overlay, which was there when it got its ticket.
    assert_eq!(std::fs::read(dir.path("d0.raw")).unwrap()[0], 1);
    let waits = write(3);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!waits.is_finished(), "the limit is there again");
    q.ok("block_set_io_throttle", with(json!({"device": "d0"})));
    waits.join().unwrap().unwrap();
}
