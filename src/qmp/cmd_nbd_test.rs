use crate::block::driver::Flags;
use crate::block::testing::Scratch;
use crate::qmp::cmd_blockdev::tests::Qmp;
use crate::sys::iov::{Iov, IovMut};
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
    q.ok("object-add", json!({"qom-type": "iothread", "id": "io"}));
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
        (
            json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": "nope"}),
            "iothread \"nope\" not found",
        ),
        (
            json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": "io", "fixed-iothread": true}),
            "iothread \"io\" cannot serve an export, whose clients have threads of their own: leave it out",
        ),
    ] {
        assert_eq!(q.err("block-export-add", args), want);
    }
    q.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true,
               "fixed-iothread": true}),
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

#[test]
fn a_client_is_reopened_read_only_or_writable_as_far_as_the_server_lets_it() {
    let dir = Scratch::new("nbd-reopen");
    let mut q = Qmp::new();
    let path = start(&mut q, &dir);
    node(&mut q, &dir, "far", false);
    let export = |id: &str, writable: bool| json!({"type": "nbd", "id": id, "name": id, "node-name": "far", "writable": writable});
    q.ok("block-export-add", export("rw", true));
    q.ok("block-export-add", export("ro", false));
    for (name, refused) in [("rw", false), ("ro", true)] {
        let server = json!({"type": "unix", "path": path});
        let client = |read_only: bool| json!({"driver": "nbd", "node-name": "n", "export": name, "server": server, "read-only": read_only});
        q.ok("blockdev-add", client(true));
        let mut raw = json!({"driver": "raw", "node-name": "r", "file": "n", "read-only": true});
        q.ok("blockdev-add", raw.clone());
        raw["read-only"] = json!(false);
        let both = q.run("blockdev-reopen", json!({"options": [client(false), raw]}));
        let n = q.vm.graph.find("n").unwrap().clone();
        assert_eq!((both.is_err(), n.read_only()), (refused, refused));
        if refused {
            assert_eq!(both.unwrap_err().desc, "Can't reopen read-only NBD mount as read/write");
            assert!(q.vm.graph.set_read_only(&n, false).is_err());
            assert!(n.read_only() && q.vm.graph.find("r").unwrap().read_only());
        } else {
            q.vm.graph.find("r").unwrap().write(0, &Iov::from_slice(&[5; 512]), Flags::NONE).unwrap();
            assert_eq!(std::fs::read(dir.path("far")).unwrap()[..512], [5; 512]);
        }
        for (key, value) in [
            ("export", json!("other")),
            ("server", json!({"type": "unix", "path": "/nowhere"})),
            ("reconnect-delay", json!(5)),
        ] {
            let mut other = client(true);
            other[key] = value;
            let e = q.err("blockdev-reopen", json!({"options": [other]}));
            assert_eq!(e, format!("Cannot change the option '{key}'"));
        }
        q.ok("blockdev-del", json!({"node-name": "r"}));
        q.ok("blockdev-reopen", json!({"options": [client(true)]}));
        assert!(n.read_only());
        drop(n);
        q.ok("blockdev-del", json!({"node-name": "n"}));
    }
}

#[test]
fn sockets_are_passed_to_client_and_server() {
    let dir = Scratch::new("nbd-passed");
    let mut q = Qmp::new();
    let pass = |q: &mut Qmp, name: &str, fd: std::os::fd::OwnedFd| q.conn.name_fd(name.into(), fd);
    let serve = |name: &str| json!({"addr": {"type": "fd", "data": {"str": name}}});
    let lost = |name: &str| format!("File descriptor named '{name}' has not been found");
    assert_eq!(q.err("nbd-server-start", serve("s")), lost("s"));
    pass(&mut q, "f", std::fs::File::open("/dev/null").unwrap().into());
    assert_eq!(q.err("nbd-server-start", serve("f")), "File descriptor 'f' is not a socket");
    pass(&mut q, "p", UnixStream::pair().unwrap().0.into());
    let e = q.err("nbd-server-start", serve("p"));
    assert_eq!(e, "Failed to listen on fd socket: Invalid argument");
    let path = dir.path("s");
    pass(&mut q, "s", std::os::unix::net::UnixListener::bind(&path).unwrap().into());
    q.ok("nbd-server-start", serve("s"));
    assert_eq!(q.err("closefd", json!({"fdname": "s"})), "File descriptor named 's' not found");
    node(&mut q, &dir, "n", false);
    q.ok("block-export-add", json!({"type": "nbd", "id": "n", "node-name": "n", "writable": true}));
    // The client.
    let add = |name: &str, export: &str| {
        json!({"driver": "nbd", "node-name": "c", "export": export, "reconnect-delay": 0,
               "server": {"type": "fd", "str": name}})
    };
    assert_eq!(q.err("blockdev-add", add("c", "n")), lost("c"));
    pass(&mut q, "f", std::fs::File::open("/dev/null").unwrap().into());
    assert_eq!(q.err("blockdev-add", add("f", "n")), "File descriptor 'f' is not a socket");
    for (export, good) in [("nope", false), ("n", true)] {
        pass(&mut q, "c", UnixStream::connect(&path).unwrap().into());
        let done = q.run("blockdev-add", add("c", export));
        assert_eq!(done.is_ok(), good, "{done:?}");
        let e = q.err("closefd", json!({"fdname": "c"}));
        assert_eq!(e, "File descriptor named 'c' not found", "it is taken for good");
    }
    let node = q.vm.graph.find("c").unwrap().clone();
    let shown = crate::block::filename::names(&node).shown();
    assert!(shown.contains(r#""server":{"str":"c","type":"fd"}"#), "{shown}");
    node.write(0, &Iov::from_slice(&[7; 512]), Flags::NONE).unwrap();
    assert_eq!(std::fs::read(dir.path("n")).unwrap()[..512], [7; 512]);
    // There is no other connection.
    q.ok("nbd-server-stop", json!({}));
    for _ in 0..2 {
        let e = node.read(0, &mut IovMut::from_slice(&mut [0; 512])).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
    }
    drop(node);
    q.ok("blockdev-del", json!({"node-name": "c"}));
}
