use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::json;

fn say(q: &mut Qmp, line: &str) -> String {
    let answer = q.ok("human-monitor-command", json!({"command-line": line}));
    answer.as_str().unwrap().to_string()
}

fn with_drive(dir: &Scratch) -> Qmp {
    let raw = dir.file("d.raw", 1 << 20);
    let mut q = Qmp::new();
    let args = json!({"id": "d0", "if": "none", "file": raw, "format": "raw", "node-name": "n0"});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    q
}

#[test]
fn texts_of_the_human_monitor() {
    let dir = Scratch::new("hmp-texts");
    let mut q = with_drive(&dir);
    let wrong = |what: &str| format!("qemu-io: {what}\r\nTry \"help qemu-io\" for more information\r\n");
    let (missing, nameless) = (&*wrong("string expected"), &*wrong("block device name expected"));
    let extra = &*wrong("extraneous characters at the end of line");
    for (line, want) in [
        ("", ""),
        ("   ", ""),
        ("nosuch", "unknown command: 'nosuch'\r\n"),
        ("info nosuch", "unknown command: 'info nosuch'\r\n"),
        ("info status", "VM status: paused (prelaunch)\r\n"),
        ("qemu-io", nameless),
        ("qemu-io d0", missing),
        ("qemu-io d0 \"read 0 1", missing),
        ("qemu-io d0 length x", extra),
        ("qemu-io zz length", "Error: Cannot find device='' nor node-name='zz'\r\n"),
        ("qemu-io -d zz length", "Error: Device 'zz' not found\r\n"),
        ("qemu-io d0 \"sleep 0\"", ""),
        ("qemu-io d0 \"\"", ""),
    ] {
        assert_eq!(say(&mut q, line), want, "{line}");
    }
    let e = q.err("human-monitor-command", json!({"command-line": "", "cpu-index": 99}));
    assert_eq!(e, "Parameter 'cpu-index' expects a CPU number");
}

#[test]
fn writes_through_a_drive_and_a_node_reach_the_disk() {
    let dir = Scratch::new("hmp-write");
    let mut q = with_drive(&dir);
    assert_eq!(say(&mut q, "qemu-io d0 \"write -q -P 85 4096 512\""), "");
    assert_eq!(say(&mut q, "qemu-io d0 \"discard -q 0 512\""), "");
    assert_eq!(say(&mut q, "qemu-io n0 \"write -q -P 0x11 8k 1k\""), "");
    let bytes = std::fs::read(dir.path("d.raw")).unwrap();
    assert_eq!((bytes[4095], bytes[4096], bytes[4607], bytes[4608]), (0, 85, 85, 0));
    assert_eq!((bytes[8191], bytes[8192], bytes[9215], bytes[9216]), (0, 0x11, 0x11, 0));
    let stats = q.ok("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["wr_operations"], 0, "not counted");
    assert_eq!(stats[0]["stats"]["wr_highest_offset"], 9216);
    // The borrowed user of the node is gone.
    assert_eq!(q.vm.graph.handles().len(), 1);
}

#[test]
fn who_shares_no_writes_is_respected() {
    let dir = Scratch::new("hmp-perm");
    let raw = dir.file("d.raw", 1 << 20);
    let mut q = Qmp::new();
    q.ok(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r",
                                "file": {"driver": "file", "filename": raw, "node-name": "f"}}),
    );
    let e = say(&mut q, "qemu-io f \"write 0 512\"");
    assert!(!e.is_empty() || q.vm.graph.handles().is_empty());
    let spec = crate::block::handle::HandleSpec::default();
    let node = q.vm.graph.find("r").cloned();
    let disk = q.vm.graph.attach(node, spec).unwrap();
    let e = say(&mut q, "qemu-io r \"write 0 512\"");
    assert!(e.starts_with("Permission conflict on node 'r': permissions 'write'"), "{e}");
    assert_eq!(say(&mut q, "qemu-io r \"read -q 0 512\""), "");
    q.vm.graph.detach(&disk);
    assert_eq!(say(&mut q, "qemu-io r \"write -q 0 512\""), "");
}

/// A drive `d0` whose file is a blkdebug node.
fn with_blkdebug(dir: &Scratch) -> Qmp {
    let path = dir.file("d.raw", 1 << 20);
    let mut q = Qmp::new();
    let image = json!({"driver": "file", "filename": path});
    let file = json!({"driver": "blkdebug", "node-name": "dbg", "image": image});
    let args = json!({"id": "d0", "if": "none", "format": "raw", "file": file});
    q.vm.add_drive(args.as_object().unwrap().clone()).unwrap();
    q
}

#[test]
fn a_request_waits_at_its_breakpoint_for_resume() {
    let dir = Scratch::new("hmp-break");
    let mut q = with_blkdebug(&dir);
    let byte = |dir: &Scratch| std::fs::read(dir.path("d.raw")).unwrap()[0];
    for line in ["break write_aio A", "aio_write -q -P 7 0 512", "wait_break A"] {
        assert_eq!(say(&mut q, &format!("qemu-io d0 \"{line}\"")), "", "{line}");
    }
    assert_eq!(byte(&dir), 0);
    for line in ["resume A", "aio_flush"] {
        assert_eq!(say(&mut q, &format!("qemu-io d0 \"{line}\"")), "", "{line}");
    }
    assert_eq!(byte(&dir), 7);
}

#[test]
fn the_end_does_not_wait_for_a_breakpoint() {
    let dir = Scratch::new("hmp-break-end");
    let mut q = with_blkdebug(&dir);
    for line in ["break write_aio A", "aio_write -q -P 7 0 512", "wait_break A"] {
        assert_eq!(say(&mut q, &format!("qemu-io d0 \"{line}\"")), "", "{line}");
    }
    q.vm.shut_down().unwrap();
    assert_eq!(std::fs::read(dir.path("d.raw")).unwrap()[0], 7);
}

#[test]
fn reopen_makes_a_disk_read_only_and_writable_again() {
    let dir = Scratch::new("hmp-reopen");
    let mut q = with_drive(&dir);
    let byte = |dir: &Scratch| std::fs::read(dir.path("d.raw")).unwrap()[0];
    for (line, want) in [
        ("reopen -r -w", "Only one -r/-w option may be given\r\n"),
        ("reopen -c fast", "Invalid cache option: fast\r\n"),
        ("reopen -x", "reopen: invalid option or argument '-x'\r\n"),
        ("write -q -P 1 0 512", ""),
        ("reopen -r", ""),
        ("write -q -P 2 0 512", ""),
    ] {
        assert_eq!(say(&mut q, &format!("qemu-io d0 \"{line}\"")), want, "{line}");
    }
    assert!(q.vm.graph.find("n0").unwrap().read_only());
    assert_eq!(byte(&dir), 1, "the write failed, on standard output");
    for line in ["reopen -w", "write -q -P 3 0 512", "reopen -c unsafe", "reopen -c writethrough"] {
        assert_eq!(say(&mut q, &format!("qemu-io d0 \"{line}\"")), "", "{line}");
    }
    assert_eq!(byte(&dir), 3);
    assert!(!q.vm.drives.find("d0").unwrap().handle.write_cache());
}
