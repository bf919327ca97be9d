//! A server that is connected but does not answer: whoever waits for it is let go by an out-of-band `yank`, although the thread
//! that runs commands waits itself. The server is qemu-nbd, stopped by a signal.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, LIMIT, Vm, have, run};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// qemu-nbd on a raw image, at the socket `back`.
struct Server(Child);

impl Server {
    fn start(dir: &Dir) -> Server {
        let (disk, socket) = (dir.join("far"), dir.join("back"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-f", "raw", "-k"]).arg(&socket).arg(&disk).stdin(Stdio::null());
        let server = Server(command.spawn().unwrap());
        let begin = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(begin.elapsed() < LIMIT, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// From now on it is mute.
    fn freeze(&self) {
        run("kill", &["-STOP", &self.0.id().to_string()]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const CONFIG: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n\
    [nbd-server]\naddr = { type = \"unix\", data = { path = \"@DIR/nbd\" } }\n\
    [[blockdev]]\ndriver = \"nbd\"\nnode-name = \"n\"\nreconnect-delay = 3600\nserver = { type = \"unix\", path = \"@DIR/back\" }\n\
    [[export]]\ntype = \"nbd\"\nid = \"n\"\nnode-name = \"n\"\nwritable = true\n";

/// A client that matches replies by their ids.
struct Oob(BufReader<UnixStream>, Vec<Value>);

impl Oob {
    fn new(vm: &Vm) -> Oob {
        drop(vm.qmp());
        let begin = Instant::now();
        let stream = loop {
            match UnixStream::connect(vm.path("qmp")) {
                Ok(s) => break s,
                Err(e) => assert!(begin.elapsed() < LIMIT, "{e}"),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut client = Oob(BufReader::new(stream), vec![]);
        assert!(client.next()["QMP"].is_object());
        client.send(json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 0}));
        client.reply(0);
        client
    }

    fn send(&mut self, request: Value) {
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap_or_else(|e| panic!("nobody answers: {e}"));
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }

    /// The reply with that id; others that come before it are kept.
    fn reply(&mut self, id: u32) -> Value {
        loop {
            if let Some(at) = self.1.iter().position(|m| m["id"] == id) {
                return self.1.swap_remove(at);
            }
            let message = self.next();
            self.1.push(message);
        }
    }

    /// Sees that request 1 hangs, and lets it go with number 3.
    fn yank(&mut self) {
        std::thread::sleep(Duration::from_millis(300));
        let far = json!([{"type": "block-node", "node-name": "n"}]);
        self.send(json!({"exec-oob": "query-yank", "id": 2}));
        assert_eq!(self.reply(2)["return"], far);
        assert!(self.1.iter().all(|m| m["id"] != 1), "it did not hang: {:?}", self.1);
        self.send(json!({"exec-oob": "yank", "arguments": {"instances": far}, "id": 3}));
        assert_eq!(self.reply(3)["return"], json!({}));
    }
}

fn start() -> Option<(Server, Vm)> {
    if !have("qemu-nbd", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return None;
    }
    let dir = Dir::new();
    let server = Server::start(&dir);
    Some((server, Vm::start_in(dir, CONFIG)))
}

fn qemu_io(vm: &Vm, command: &str) -> Command {
    let mut c = Command::new("qemu-io");
    c.args(["-f", "raw", "-c", command]).arg(format!("nbd+unix:///n?socket={}", vm.path("nbd").display()));
    c
}

#[test]
fn a_stop_that_waits_for_a_mute_server_is_let_go() {
    let Some((server, mut vm)) = start() else { return };
    let mut client = Oob::new(&vm);
    // Something that is not flushed yet.
    let write = json!({"command-line": "qemu-io n \"write -q -P 6 8k 4k\""});
    client.send(json!({"execute": "human-monitor-command", "arguments": write, "id": 8}));
    assert_eq!(client.reply(8)["return"], "");
    server.freeze();
    client.send(json!({"execute": "stop", "id": 1}));
    client.yank();
    assert_eq!(client.reply(1)["return"], json!({}));
    // The node is of no use any more, at once and for good, and it can go.
    let begin = Instant::now();
    let out = qemu_io(&vm, "read 0 4k").output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("read failed: Input/output error"), "{out:?}");
    assert!(begin.elapsed() < Duration::from_secs(30));
    client.send(json!({"execute": "block-export-del", "arguments": {"id": "n", "mode": "hard"}, "id": 4}));
    assert_eq!(client.reply(4)["return"], json!({}));
    client.send(json!({"execute": "quit", "id": 5}));
    client.reply(5);
    // What was not flushed is lost, which is said.
    vm.wait_exit(1);
}

#[test]
fn a_graph_change_that_waits_for_a_mute_server_is_let_go() {
    let Some((server, vm)) = start() else { return };
    let mut client = Oob::new(&vm);
    server.freeze();
    let reader = qemu_io(&vm, "read 0 4k").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let over = vm.path("over");
    run("qemu-img", &["create", "-q", "-f", "qcow2", over.to_str().unwrap(), "1M"]);
    let file = json!({"driver": "file", "filename": over});
    let args = json!({"driver": "qcow2", "node-name": "over", "backing": null, "file": file});
    client.send(json!({"execute": "blockdev-add", "arguments": args, "id": 7}));
    assert_eq!(client.reply(7)["return"], json!({}));
    client.send(
        json!({"execute": "blockdev-snapshot", "arguments": {"node": "n", "overlay": "over"}, "id": 1}),
    );
    client.yank();
    client.reply(1);
    let out = reader.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("read failed: Input/output error"), "{text}");
}

#[test]
fn a_node_that_waits_for_its_server_to_shake_hands_is_let_go() {
    let Some((server, vm)) = start() else { return };
    let mut client = Oob::new(&vm);
    server.freeze();
    let args = json!({"driver": "nbd", "node-name": "late", "open-timeout": 3600,
        "server": {"type": "unix", "path": vm.path("back")}});
    client.send(json!({"execute": "blockdev-add", "arguments": args, "id": 1}));
    std::thread::sleep(Duration::from_millis(300));
    let late = json!({"type": "block-node", "node-name": "late"});
    client.send(json!({"exec-oob": "query-yank", "id": 2}));
    assert_eq!(client.reply(2)["return"][0], late);
    client.send(json!({"exec-oob": "yank", "arguments": {"instances": [late]}, "id": 3}));
    assert_eq!(client.reply(3)["return"], json!({}));
    let text = client.reply(1)["error"]["desc"].as_str().unwrap().to_string();
    assert!(text.ends_with("yanked before there was a connection"), "{text}");
    client.send(json!({"execute": "query-yank", "id": 4}));
    assert_eq!(client.reply(4)["return"], json!([{"type": "block-node", "node-name": "n"}]));
}
