use super::*;
use crate::control::state::RunState;
use crate::control::vm::{Cause, Settings};
use crate::qmp::client::HIGH_WATER;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};

/// A server with a VM, driven by hand.
pub(super) struct Rig {
    pub(super) server: Server,
    pub(super) vm: Vm,
}

/// The client's end.
pub(super) struct Peer {
    pub(super) stream: UnixStream,
    pub(super) got: Vec<u8>,
}

impl Rig {
    pub(super) fn new() -> Rig {
        Rig { server: Server::new(), vm: Vm::new(Settings::default()).unwrap() }
    }

    /// A monitor on a socket pair, its greeting taken.
    pub(super) fn connect(&mut self) -> Peer {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.server.adopt(theirs.into(), false).unwrap();
        let mut peer = Peer::new(ours);
        self.run();
        assert!(peer.next().unwrap()["QMP"].is_object());
        peer
    }

    /// The same, negotiated.
    fn negotiated(&mut self) -> Peer {
        let mut peer = self.connect();
        assert_eq!(self.ask(&mut peer, json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        peer
    }

    /// One turn of the loop; true when it ended before the requests did.
    pub(super) fn turn(&mut self, wait: Duration) -> bool {
        let mut set = PollSet::default();
        self.server.prepare(&mut self.vm, &mut set);
        set.until(Instant::now() + wait);
        set.wait().unwrap();
        self.server.dispatch(&mut self.vm, &set);
        self.server.more
    }

    /// Turns until nothing is left to do.
    fn run(&mut self) {
        for _ in 0..8 {
            while self.turn(Duration::ZERO) {}
        }
    }

    pub(super) fn ask(&mut self, peer: &mut Peer, request: Value) -> Value {
        peer.send(request.to_string().as_bytes());
        self.run();
        peer.next().expect("no reply")
    }
}

impl Peer {
    fn new(stream: UnixStream) -> Peer {
        stream.set_nonblocking(true).unwrap();
        Peer { stream, got: Vec::new() }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).unwrap();
    }

    pub(super) fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd]) {
        assert_eq!(unix::send_fds(self.stream.as_fd(), bytes, fds).unwrap(), bytes.len());
    }

    /// Takes what is there; the next line, if one is complete.
    pub(super) fn next(&mut self) -> Option<Value> {
        let mut buf = [0; 65536];
        while let Ok(n @ 1..) = (&self.stream).read(&mut buf) {
            self.got.extend_from_slice(&buf[..n]);
        }
        let end = self.got.windows(2).position(|w| w == b"\r\n")?;
        let line: Vec<u8> = self.got.drain(..end + 2).collect();
        Some(serde_json::from_slice(&line).unwrap())
    }

    fn all(&mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.next()).collect()
    }

    fn at_end(&mut self) -> bool {
        self.next();
        matches!((&self.stream).read(&mut [0; 1]), Ok(0))
    }
}

pub(super) fn name(e: &Value) -> &str {
    e["event"].as_str().unwrap_or("reply")
}

/// A pipe: when all its writers are closed, the reader sees the end.
pub(super) struct Pipe(std::io::PipeReader, Option<std::io::PipeWriter>);

impl Pipe {
    pub(super) fn new() -> Pipe {
        let (r, w) = std::io::pipe().unwrap();
        unix::set_nonblocking(r.as_fd(), true).unwrap();
        Pipe(r, Some(w))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.1.as_ref().unwrap().as_fd()
    }

    /// Closes our own writer; is there another one?
    fn held(&mut self) -> bool {
        self.1 = None;
        match self.0.read(&mut [0; 1]) {
            Ok(0) => false,
            Ok(_) => panic!("data in the pipe"),
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Is there none? A process that another test starts may have it for a moment.
    fn closed(&mut self) -> bool {
        let start = Instant::now();
        while self.held() {
            if start.elapsed() > Duration::from_secs(5) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

#[test]
fn requests_sent_ahead_are_answered_in_order_in_one_go() {
    let mut rig = Rig::new();
    let mut peer = rig.connect();
    let mut text = br#"{"execute":"qmp_capabilities"}"#.to_vec();
    for n in 0..1000 {
        text.extend(format!(r#"{{"execute":"query-status","id":{n}}}"#).bytes());
    }
    peer.send(&text);
    rig.run();
    let replies = peer.all();
    let ids: Vec<_> = replies.iter().skip(1).map(|r| r["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (0..1000).collect::<Vec<_>>());
}

#[test]
fn descriptors_go_to_the_request_that_they_came_with() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    let (mut one, mut two, mut three) = (Pipe::new(), Pipe::new(), Pipe::new());
    let getfd = |name: &str| format!(r#"{{"execute":"getfd","arguments":{{"fdname":"{name}"}}}}"#);
    // The first request has none, although the next message, read in one go with it, has some.
    peer.send(getfd("none").as_bytes());
    peer.send_fds((getfd("one") + &getfd("second")).as_bytes(), &[one.fd()]);
    peer.send_fds(getfd("two").as_bytes(), &[two.fd(), three.fd()]);
    rig.run();
    let replies = peer.all();
    let errors: Vec<_> = replies.iter().map(|r| r["error"]["desc"].as_str().unwrap_or("")).collect();
    let none = "No file descriptor supplied via SCM_RIGHTS";
    assert_eq!(errors, [none, "", none, ""]);
    // Of several the first is taken and the others are closed.
    assert!(one.held() && two.held() && three.closed());
    let closefd = |name| json!({"execute": "closefd", "arguments": {"fdname": name}});
    assert_eq!(rig.ask(&mut peer, closefd("two")), json!({"return": {}}));
    assert!(two.closed() && one.held());
}

#[test]
fn a_descriptor_that_nobody_took_waits_until_the_next_ones_come() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    let (mut one, mut two, mut three) = (Pipe::new(), Pipe::new(), Pipe::new());
    // In front of half a request; with a request that fails before its handler; replaced.
    peer.send_fds(b" ", &[one.fd()]);
    rig.run();
    peer.send_fds(br#"{"execute":"getfd"}"#, &[two.fd()]);
    rig.run();
    assert_eq!(peer.next().unwrap()["error"]["desc"], "Parameter 'fdname' is missing");
    assert!(one.closed());
    let late = json!({"execute": "getfd", "arguments": {"fdname": "late"}});
    assert_eq!(rig.ask(&mut peer, late), json!({"return": {}}));
    assert!(two.held());
    // Rejected by the handler: closed.
    peer.send_fds(br#"{"execute":"add-fd","arguments":{"fdset-id":-1}}"#, &[three.fd()]);
    rig.run();
    assert_eq!(peer.next().unwrap()["error"]["desc"], "Parameter 'fdset-id' expects a non-negative value");
    assert!(three.closed());
}

#[test]
fn a_client_that_is_gone_leaves_its_names_but_not_what_it_sent_last() {
    let dir = std::env::temp_dir().join(format!("minivmm-server-names-{}", std::process::id()));
    let mut rig = Rig::new();
    rig.server.listen(&dir, false).unwrap();
    let (mut one, mut two) = (Pipe::new(), Pipe::new());
    let mut a = Peer::new(UnixStream::connect(&dir).unwrap());
    a.send_fds(
        br#"{"execute":"qmp_capabilities"}{"execute":"getfd","arguments":{"fdname":"x"}}"#,
        &[one.fd()],
    );
    rig.run();
    a.send_fds(br#"{"execute":"query-st"#, &[two.fd()]);
    rig.run();
    assert_eq!(a.all().len(), 3);
    let mut b = Peer::new(UnixStream::connect(&dir).unwrap());
    rig.run();
    assert!(b.next().is_none(), "two clients at once");
    drop(a);
    rig.run();
    assert!(one.held() && two.closed());
    // The next client is greeted at once, and negotiates for itself.
    assert!(b.next().unwrap()["QMP"].is_object());
    let closefd = json!({"execute": "closefd", "arguments": {"fdname": "x"}});
    assert_eq!(rig.ask(&mut b, closefd.clone())["error"]["class"], "CommandNotFound");
    rig.ask(&mut b, json!({"execute": "qmp_capabilities"}));
    assert_eq!(rig.ask(&mut b, closefd), json!({"return": {}}));
    assert!(one.closed());
}

#[test]
fn events_go_to_all_who_have_negotiated_and_before_the_reply() {
    let mut rig = Rig::new();
    let mut silent = rig.connect();
    let (mut a, mut b) = (rig.negotiated(), rig.negotiated());
    rig.vm.run_state = RunState::Running;
    a.send(br#"{"execute":"stop","id":1}{"execute":"query-status","id":2}"#);
    rig.run();
    let got: Vec<_> = a.all();
    assert_eq!(got.iter().map(name).collect::<Vec<_>>(), ["STOP", "reply", "reply"]);
    assert_eq!((&got[1]["id"], &got[2]["return"]["status"]), (&json!(1), &json!("paused")));
    assert_eq!(b.all().iter().map(name).collect::<Vec<_>>(), ["STOP"]);
    assert!(silent.all().is_empty());
    // Also those that no client caused.
    rig.vm.emit("POWERDOWN", Value::Null);
    rig.run();
    assert_eq!(b.all().iter().map(name).collect::<Vec<_>>(), ["POWERDOWN"]);
}

#[test]
fn limited_events_come_when_their_time_has_come() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    for offset in 0..5 {
        rig.vm.emit("RTC_CHANGE", json!({"offset": offset, "qom-path": "/machine/rtc"}));
    }
    rig.run();
    let offsets = |list: Vec<Value>| list.iter().map(|e| e["data"]["offset"].clone()).collect::<Vec<_>>();
    assert_eq!(offsets(peer.all()), [0]);
    // The deadline, and nothing else, ends the wait.
    let start = Instant::now();
    let mut got = Vec::new();
    while got.is_empty() && start.elapsed() < Duration::from_secs(30) {
        rig.turn(Duration::from_secs(30));
        got = peer.all();
    }
    assert_eq!(offsets(got), [4]);
    assert!((900..10_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
}

#[test]
fn a_client_that_does_not_read_is_not_read_from_and_hinders_nobody() {
    let mut rig = Rig::new();
    let (mut lazy, mut busy) = (rig.negotiated(), rig.negotiated());
    // Each reply repeats 64 KiB of id; 100 of them do not fit into 1 MiB and a socket.
    let id = "x".repeat(64 << 10);
    let request = format!(r#"{{"execute":"query-status","id":"{id}"}}"#);
    lazy.stream.set_nonblocking(true).unwrap();
    let (mut sent, mut stuck) = (0, 0);
    let all = request.as_bytes().repeat(100);
    while sent < all.len() && stuck < 50 {
        match (&lazy.stream).write(&all[sent..]) {
            Ok(n) => (sent, stuck) = (sent + n, 0),
            Err(_) => {
                rig.run();
                stuck += 1;
            }
        }
    }
    assert!(sent < all.len(), "the server has taken in everything");
    assert_eq!(rig.ask(&mut busy, json!({"execute": "query-status", "id": 1}))["id"], 1);
    // Once it reads, it gets every reply.
    let mut replies = Vec::new();
    let start = Instant::now();
    while replies.len() < 100 && start.elapsed() < Duration::from_secs(60) {
        if let Ok(n) = (&lazy.stream).write(&all[sent..]) {
            sent += n;
        }
        rig.run();
        replies.extend(lazy.all());
    }
    assert_eq!(replies.len(), 100);
    assert!(replies.iter().all(|r| r["id"].as_str() == Some(&id)));
}

#[test]
fn short_requests_with_long_replies_do_not_pile_up() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    // All of them arrive in one read.
    peer.send(&br#"{"execute":"query-qmp-schema"}"#.repeat(200));
    rig.run();
    let Some(Party::Plain(client)) = &rig.server.monitors[0].client else { panic!("no client") };
    let unsent = client.unsent();
    assert!(unsent > HIGH_WATER && unsent < HIGH_WATER + 200_000, "{unsent} bytes wait");
    let mut replies = 0;
    let start = Instant::now();
    while replies < 200 && start.elapsed() < Duration::from_secs(60) {
        replies += peer.all().len();
        rig.run();
    }
    assert_eq!(replies, 200);
}

#[test]
fn a_client_that_never_reads_events_is_cut_off_at_last() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    let text = "x".repeat(1 << 20);
    for n in 0..40 {
        let data = json!({"qom-path": n.to_string(), "device": "", "operation": "read", "action": "report", "reason": text});
        rig.vm.emit("BLOCK_IO_ERROR", data);
        rig.run();
    }
    assert!(peer.at_end());
}

#[test]
fn what_is_sent_before_the_end_is_answered() {
    let mut rig = Rig::new();
    let mut peer = rig.connect();
    peer.send(br#"{"execute":"qmp_capabilities"}{"execute":"query-status","id":7} {"execute":"quer"#);
    peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    rig.run();
    assert_eq!(peer.next().unwrap(), json!({"return": {}}));
    assert_eq!(peer.next().unwrap()["id"], 7);
    assert!(peer.at_end());
}

#[test]
fn what_is_sent_by_a_client_that_goes_at_once_is_run() {
    let mut rig = Rig::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Peer::new(ours);
    let pipe = Pipe::new();
    (&peer.stream).write_all(br#"{"execute": "qmp_capabilities"}"#).unwrap();
    // More than one turn runs, and the last one comes with a descriptor.
    let many = br#"{"execute": "query-name"}"#.repeat(2 * TURN);
    (&peer.stream).write_all(&many).unwrap();
    let last = br#"{"execute": "getfd", "arguments": {"fdname": "a"}}"#;
    assert_eq!(unix::send_fds(peer.stream.as_fd(), last, &[pipe.fd()]).unwrap(), last.len());
    (&peer.stream).write_all(br#"{"execute": "quit"}"#).unwrap();
    drop(peer);
    rig.server.adopt(theirs.into(), false).unwrap();
    rig.run();
    assert_eq!(rig.vm.exit(), Some(0), "the quit was lost");
    // A client that is gone with nothing left to run leaves its place.
    let mut rig = Rig::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    rig.server.adopt(theirs.into(), false).unwrap();
    rig.run();
    assert!(rig.server.monitors[0].client.is_none());
}

#[test]
fn after_quit_nothing_is_run() {
    let mut rig = Rig::new();
    let mut peer = rig.negotiated();
    peer.send(br#"{"execute":"quit"}{"execute":"query-status"}"#);
    rig.run();
    rig.server.finish(&mut rig.vm);
    assert_eq!(rig.vm.exit(), Some(0));
    let got = peer.all();
    assert_eq!(got.iter().map(name).collect::<Vec<_>>(), ["SHUTDOWN", "reply"]);
    assert_eq!(got[0]["data"], json!({"guest": false, "reason": Cause::HostQmpQuit.as_str()}));
}

#[test]
fn a_socket_file_comes_and_goes_with_its_listener() {
    let path = std::env::temp_dir().join(format!("minivmm-server-file-{}", std::process::id()));
    let mut server = Server::new();
    // What is no socket stays.
    fs::write(&path, "precious").unwrap();
    assert_eq!(server.listen(&path, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();
    // A socket that nobody listens on is replaced.
    drop(UnixListener::bind(&path).unwrap());
    server.listen(&path, false).unwrap();
    UnixStream::connect(&path).unwrap();
    // One in use is not; also when so many wait there that one more would have to wait.
    let mut other = Server::new();
    assert_eq!(other.listen(&path, false).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    let mut crowd = Vec::new();
    while let Ok(fd) = unix::connect(&path) {
        crowd.push(fd);
        assert!(crowd.len() < 100_000, "the queue has no end");
    }
    assert_eq!(other.listen(&path, false).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(crowd);
    drop(server);
    assert!(!path.exists());
    // Nor is a successor's file removed.
    let mut first = Server::new();
    first.listen(&path, false).unwrap();
    fs::remove_file(&path).unwrap();
    other.listen(&path, false).unwrap();
    drop(first);
    assert!(path.exists());
    drop(other);
    assert!(!path.exists());
}

#[test]
fn tcp_is_for_loopback_only() {
    let mut rig = Rig::new();
    for bad in ["0.0.0.0:0", "[::]:0", "192.0.2.1:4444", "localhost", "4444", ""] {
        let e = rig.server.listen_tcp(bad, false).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput, "{bad}");
    }
    rig.server.listen_tcp("127.0.0.1:0", false).unwrap();
    let fd = rig.server.monitors[0].listener.as_ref().unwrap().fd.try_clone().unwrap();
    let address = TcpListener::from(fd).local_addr().unwrap();
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
    tcp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut text = Vec::new();
    for _ in 0..500 {
        rig.run();
        let mut buf = [0; 4096];
        let n = tcp.read(&mut buf).unwrap_or(0);
        text.extend_from_slice(&buf[..n]);
        if text.ends_with(b"{\"return\": {}}\r\n") {
            return;
        }
    }
    panic!("no answer: {}", String::from_utf8_lossy(&text));
}

#[test]
fn two_pipes_are_a_monitor_too() {
    let mut rig = Rig::new();
    let (input, mut to_server) = std::io::pipe().unwrap();
    let (mut from_server, output) = std::io::pipe().unwrap();
    unix::set_nonblocking(from_server.as_fd(), true).unwrap();
    let output = Output::new(File::from(OwnedFd::from(output))).unwrap();
    rig.server.add_client(Stream::Files(OwnedFd::from(input).into(), output), true);
    to_server.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
    rig.run();
    drop(to_server);
    rig.run();
    let mut text = String::new();
    from_server.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("{\r\n    \"QMP\": {\r\n"), "{text}");
    assert!(text.ends_with("\r\n}\r\n{\r\n    \"return\": {\r\n    }\r\n}\r\n"), "{text}");
    assert!(rig.server.monitors[0].client.is_none());
}

#[test]
fn inherited_descriptors_listen_or_talk() {
    let path = std::env::temp_dir().join(format!("minivmm-server-adopt-{}", std::process::id()));
    let mut rig = Rig::new();
    let listener = UnixListener::bind(&path).unwrap();
    rig.server.adopt(listener.into(), false).unwrap();
    for _ in 0..2 {
        let mut peer = Peer::new(UnixStream::connect(&path).unwrap());
        rig.run();
        assert!(peer.next().unwrap()["QMP"].is_object());
        drop(peer);
        rig.run();
    }
    // The file is not ours.
    drop(rig);
    assert!(path.exists());
    fs::remove_file(&path).unwrap();
}

#[test]
fn many_requests_of_one_client_do_not_shut_out_another() {
    let mut rig = Rig::new();
    let (mut greedy, mut modest) = (rig.negotiated(), rig.negotiated());
    greedy.send(&br#"{"execute":"query-name"}"#.repeat(1000));
    modest.send(br#"{"execute":"query-name","id":1}"#);
    let more = rig.turn(Duration::ZERO);
    assert!(more, "a turn has its end");
    assert_eq!(modest.next().unwrap()["id"], 1);
    assert!(greedy.all().len() < 1000);
    rig.run();
    let rest = greedy.all().len();
    assert!(rest > 0, "the rest is lost");
}
