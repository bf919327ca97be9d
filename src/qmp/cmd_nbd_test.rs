use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;

fn start(q: &mut Qmp, dir: &Scratch) -> String {
    let path = dir.path("nbd.sock");
    q.ok("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
    path
}

fn node(q: &mut Qmp, dir: &Scratch, name: &str, read_only: bool) {
    let image = dir.file(name, 1 << 20);
    q.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": name, "filename": image, "read-only": read_only}),
    );
}

fn events(q: &mut Qmp) -> Vec<String> {
    q.vm.take_events();
    let deleted = q.vm.outbox.drain(..).filter(|e| e.name == "BLOCK_EXPORT_DELETED");
    deleted.map(|e| e.data.unwrap()["id"].as_str().unwrap().to_string()).collect()
}

#[test]
fn the_texts_of_servers_and_exports() {
    let dir = Scratch::new("nbd-texts");
    let mut q = Qmp::new();
    node(&mut q, &dir, "n", false);
    node(&mut q, &dir, "ro", true);
    let add = |id: &str, node: &str| json!({"type": "nbd", "id": id, "node-name": node});
    assert_eq!(q.err("block-export-add", add("e", "n")), "NBD server not running");
    assert_eq!(q.err("nbd-server-stop", json!({})), "NBD server not running");
    let addr = json!({"type": "unix", "data": {"path": dir.path("s")}});
    let tls = json!({"addr": addr, "tls-creds": "tls0"});
    assert_eq!(q.err("nbd-server-start", tls), "No TLS credentials with id 'tls0'");
    let plain = json!({"addr": {"type": "unix", "data": {"path": dir.path("n")}}});
    let taken = q.err("nbd-server-start", plain);
    assert!(taken.contains("it exists and is not a socket"), "{taken}");
    let path = start(&mut q, &dir);
    let again = json!({"addr": {"type": "unix", "data": {"path": path}}});
    assert_eq!(q.err("nbd-server-start", again), "NBD server already running");
    for (args, want) in [
        (add("1e", "n"), "Invalid block export id"),
        (add("e", "nope"), "Cannot find device='' nor node-name='nope'"),
        (
            json!({"type": "nbd", "id": "e", "node-name": "ro", "writable": true}),
            "Cannot export read-only node as writable",
        ),
        (
            json!({"type": "fuse", "id": "e", "node-name": "n"}),
            "Parameter 'type' does not accept value 'fuse'",
        ),
    ] {
        assert_eq!(q.err("block-export-add", args), want);
    }
    q.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true}),
    );
    assert_eq!(q.err("block-export-add", add("e", "n")), "Block export id 'e' is already in use");
    let same = json!({"type": "nbd", "id": "f", "node-name": "n", "name": "x"});
    assert_eq!(q.err("block-export-add", same), "NBD server already has export named 'x'");
    // Read-only nodes are made read-only exports by the old command.
    q.ok("nbd-server-add", json!({"device": "ro", "writable": true}));
    assert!(q.err("block_resize", json!({"node-name": "n", "size": 4096})).contains("resize"));
    assert_eq!(q.err("blockdev-del", json!({"node-name": "n"})), "Node n is in use");
    assert_eq!(q.err("block-export-del", json!({"id": "no"})), "Export 'no' is not found");
    q.ok("nbd-server-stop", json!({}));
    assert_eq!(events(&mut q), ["ro", "e"], "newest first");
    assert!(!std::path::Path::new(&path).exists(), "the socket's file stays");
    q.ok("blockdev-del", json!({"node-name": "n"}));
}

fn talk(path: &str, name: &str) -> UnixStream {
    use std::io::{Read, Write};
    let mut s = UnixStream::connect(path).unwrap();
    let mut hello = [0; 18];
    s.read_exact(&mut hello).unwrap();
    let mut out = 3u32.to_be_bytes().to_vec();
    out.extend(0x4948_4156_454f_5054u64.to_be_bytes());
    out.extend(1u32.to_be_bytes());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    s.write_all(&out).unwrap();
    s.read_exact(&mut [0; 10]).unwrap();
    s
}

#[test]
fn clients_keep_an_export_unless_they_are_shown_out() {
    let dir = Scratch::new("nbd-remove");
    let mut q = Qmp::new();
    node(&mut q, &dir, "n", false);
    let path = start(&mut q, &dir);
    q.ok("nbd-server-add", json!({"device": "n", "name": "e", "writable": true}));
    let mut client = talk(&path, "e");
    assert_eq!(q.err("nbd-server-remove", json!({"name": "e"})), "export 'e' still in use");
    assert_eq!(events(&mut q), [""; 0]);
    q.ok("nbd-server-remove", json!({"name": "e", "mode": "hard"}));
    // It may take a moment until the client's thread has left.
    let gone = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        events(&mut q) == ["e"]
    });
    assert!(gone, "the export stays");
    assert_eq!(std::io::Read::read(&mut client, &mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(q.ok("query-block-exports", json!({})), Value::Array(vec![]));
    // A client that does nothing does not hold up the end.
    q.ok("nbd-server-add", json!({"device": "n", "name": "e"}));
    let _stuck = talk(&path, "e");
    let _mute = UnixStream::connect(&path).unwrap();
    q.ok("nbd-server-stop", json!({}));
    assert_eq!(events(&mut q), ["e"]);
}
