//! QMP round trips beside a plain echo server in another process, and QEMU: requests of 28 bytes and of 4 KiB.

use crate::util::{Bench, median, report};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Reads what there is and writes it back.
pub fn echo_server(socket: &str) {
    let listener = UnixListener::bind(socket).expect("bind");
    let (mut stream, _) = listener.accept().expect("accept");
    let mut buffer = vec![0; 65536];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
}

struct Peer {
    child: Child,
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Peer {
    fn new(mut command: Command, socket: &Path, qmp: bool) -> Peer {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("spawn");
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(s) => break s,
                Err(_) if start.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(e) => panic!("{}: {e}", socket.display()),
            }
        };
        let mut peer = Peer { child, stream, buffer: vec![0; 65536] };
        if qmp {
            peer.line();
            peer.stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").expect("write");
            peer.line();
        }
        peer
    }

    /// Reads up to a line's end.
    fn line(&mut self) {
        loop {
            let n = self.stream.read(&mut self.buffer).expect("read");
            assert_ne!(n, 0, "the peer is gone");
            if self.buffer[n - 1] == b'\n' {
                return;
            }
        }
    }

    /// Median microseconds of `count` round trips.
    fn p50(&mut self, request: &[u8], count: usize) -> f64 {
        let mut times: Vec<f64> = (0..count)
            .map(|_| {
                let start = Instant::now();
                self.stream.write_all(request).expect("write");
                self.line();
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        median(&mut times)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn run(b: &Bench) {
    let paths = ["echo.sock", "mini.sock", "qemu.sock"].map(|n| b.dir.join(n));
    let config = b.config(
        "qmp.toml",
        &format!("[machine]\naccel = \"none\"\nmemory = \"16M\"\n[[qmp]]\nsocket = {:?}\n", paths[1]),
    );
    let mut server = Command::new(std::env::current_exe().expect("own path"));
    server.arg("echo-server").arg(&paths[0]);
    let mut echo = Peer::new(server, &paths[0], false);
    let mut ours = Peer::new(b.minivmm(&config), &paths[1], true);
    let mut qemu = b.qemu.then(|| {
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-M", "none", "-display", "none", "-nodefaults", "-qmp"]);
        c.arg(format!("unix:{},server=on,wait=off", paths[2].display()));
        Peer::new(c, &paths[2], true)
    });
    let long = format!("{{\"execute\":\"query-name\",\"id\":\"{}\"}}\n", "x".repeat(4096 - 32));
    for (size, request, goal) in
        [("28 bytes", "{\"execute\":\"query-version\"}\n", "goal <= 2"), ("4 KiB", &long, "goal <= 3")]
    {
        let (mut e, mut o, mut q) = (vec![], vec![], vec![]);
        for _ in 0..5 {
            e.push(echo.p50(request.as_bytes(), 3000));
            o.push(ours.p50(request.as_bytes(), 3000));
            if let Some(qemu) = &mut qemu {
                // It reads a byte a system call: 4 KiB take it 16 ms.
                q.push(qemu.p50(request.as_bytes(), 30));
            }
        }
        report(&format!("QMP round trip, {size}"), "us", median(&mut o), "echo server", median(&mut e), goal);
        if qemu.is_some() {
            report(&format!("QMP round trip, {size}"), "us", median(&mut o), "QEMU", median(&mut q), "");
        }
    }
}
