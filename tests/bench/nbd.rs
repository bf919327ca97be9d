//! The NBD server beside qemu-storage-daemon, on the same images: requests per second, and the daemon's CPU per request, from a
//! small client of ours that is the same for both: it keeps so many requests under way on one connection, with structured
//! replies, as today's clients do. Its own work is a part of both sides' time, which draws the ratios towards 1.

use crate::util::{Bench, median, report};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SIZE: u64 = 256 << 20;
/// Of one measurement.
const TIME: Duration = Duration::from_millis(700);

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b[..4].try_into().expect("four bytes"))
}

struct Client {
    stream: UnixStream,
    buf: Vec<u8>,
    at: usize,
    end: usize,
}

impl Client {
    fn connect(path: &Path) -> Client {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(10), "{}: {e}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut c = Client { stream, buf: vec![0; 256 << 10], at: 0, end: 0 };
        c.skip(18);
        let option = |n: u32, data: &[u8]| {
            [&b"IHAVEOPT"[..], &n.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
        };
        let hello = [&3u32.to_be_bytes()[..], &option(8, &[]), &option(7, b"\0\0\0\x01e\0\0")].concat();
        c.stream.write_all(&hello).expect("hello");
        for wanted in [8, 7] {
            loop {
                let head: Vec<u8> = c.take(20).to_vec();
                c.skip(be32(&head[16..]) as usize);
                assert_eq!(be32(&head[8..]), wanted);
                match be32(&head[12..]) {
                    1 => break,
                    3 => {}
                    other => panic!("option {wanted}: {other:#x}"),
                }
            }
        }
        c
    }

    fn take(&mut self, n: usize) -> &[u8] {
        while self.end - self.at < n {
            if self.buf.len() - self.at < n {
                self.buf.copy_within(self.at..self.end, 0);
                (self.at, self.end) = (0, self.end - self.at);
            }
            let got = self.stream.read(&mut self.buf[self.end..]).expect("read");
            assert!(got > 0, "the server has hung up");
            self.end += got;
        }
        self.at += n;
        &self.buf[self.at - n..self.at]
    }

    fn skip(&mut self, mut n: usize) {
        while n > 0 {
            let part = n.min(65536);
            self.take(part);
            n -= part;
        }
    }

    fn read_once(&mut self) {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0; 20]);
        request.extend(4096u32.to_be_bytes());
        self.stream.write_all(&request).expect("send");
        self.reply();
    }

    /// The next reply to end.
    fn reply(&mut self) {
        loop {
            let head: [u8; 16] = self.take(16).try_into().expect("sixteen bytes");
            if be32(&head) == 0x6744_6698 {
                assert_eq!(be32(&head[4..]), 0, "an error");
                return;
            }
            assert_eq!(be32(&head), 0x668e_33ef, "nonsense");
            let (done, kind) = (head[5] & 1 != 0, u16::from_be_bytes([head[6], head[7]]));
            assert!(kind < 0x8000, "an error");
            let len = be32(self.take(4)) as usize;
            self.skip(len);
            if done {
                return;
            }
        }
    }
}

/// What is measured.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    bytes: u32,
    random: bool,
    depth: usize,
}

/// Requests per second.
fn drive(c: &mut Client, load: Load) -> (f64, u64) {
    let payload: Vec<u8> = (0..load.bytes).map(|n| n as u8 | 1).collect();
    let blocks = SIZE / u64::from(load.bytes);
    let (mut state, mut next) = (0x9e37_79b9_7f4a_7c15u64, 0u64);
    let mut request = Vec::with_capacity(28 + payload.len());
    let mut send = |c: &mut Client| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        next += 1;
        let block = if load.random { state } else { next } % blocks;
        request.clear();
        request.extend(0x2560_9513u32.to_be_bytes());
        request.extend([0, 0, 0, u8::from(load.write)]);
        request.extend(next.to_be_bytes());
        request.extend((block * u64::from(load.bytes)).to_be_bytes());
        request.extend(load.bytes.to_be_bytes());
        if load.write {
            request.extend(&payload);
        }
        c.stream.write_all(&request).expect("send");
    };
    for _ in 0..load.depth {
        send(c);
    }
    let start = Instant::now();
    let mut done = 0u64;
    while start.elapsed() < TIME {
        c.reply();
        send(c);
        done += 1;
    }
    let rate = done as f64 / start.elapsed().as_secs_f64();
    for _ in 0..load.depth {
        c.reply();
    }
    (rate, done + load.depth as u64)
}

/// Seconds of CPU that the process has used, all its threads' together.
fn cpu(pid: u32) -> f64 {
    let mut total = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("task").flatten() {
        if let Ok(s) = std::fs::read_to_string(task.path().join("schedstat")) {
            total += s.split(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) / 1e9;
        }
    }
    total
}

struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(mut command: Command, socket: &Path) -> Daemon {
        let _ = std::fs::remove_file(socket);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("spawn");
        Daemon { child, socket: socket.to_path_buf() }
    }

    /// (requests per second, microseconds of the daemon's CPU per request)
    fn measure(&self, load: Load) -> (f64, f64) {
        let mut client = Client::connect(&self.socket);
        // Warm: threads are started, caches filled.
        for _ in 0..200 {
            client.read_once();
        }
        let before = cpu(self.child.id());
        let (rate, done) = drive(&mut client, load);
        (rate, (cpu(self.child.id()) - before) / done as f64 * 1e6)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ours(b: &Bench, image: &Path, format: &str, direct: bool) -> Daemon {
    let socket = b.dir.join("nbd-ours");
    let config = b.config(
        "nbd.toml",
        &format!(
            "[machine]\naccel = \"none\"\nmemory = \"16M\"\n\
             [[blockdev]]\ndriver = \"{format}\"\nnode-name = \"d\"\ncache = {{ direct = {direct} }}\n\
             file = {{ driver = \"file\", filename = {image:?} }}\n\
             [nbd-server]\naddr = {{ type = \"unix\", data = {{ path = {socket:?} }} }}\n\
             [[export]]\ntype = \"nbd\"\nid = \"e\"\nname = \"e\"\nnode-name = \"d\"\nwritable = true\n"
        ),
    );
    Daemon::start(b.minivmm(&config), &socket)
}

fn theirs(b: &Bench, image: &Path, format: &str, direct: bool) -> Daemon {
    let socket = b.dir.join("nbd-theirs");
    let (cache, aio) = if direct { ("on", "native") } else { ("off", "threads") };
    let mut c = Command::new("qemu-storage-daemon");
    let file = format!("driver=file,node-name=f,filename={},cache.direct={cache},aio={aio}", image.display());
    c.args(["--blockdev", &file]);
    c.args(["--blockdev", &format!("driver={format},node-name=d,file=f,cache.direct={cache}")]);
    c.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    c.args(["--export", "type=nbd,id=e,node-name=d,name=e,writable=on"]);
    Daemon::start(c, &socket)
}

pub fn run(b: &Bench) {
    let there = Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("(no qemu-storage-daemon: nothing to compare with)");
        return;
    }
    for format in ["raw", "qcow2"] {
        let image = b.dir.join(format!("nbd.{format}"));
        let size = SIZE.to_string();
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(&size).status();
        assert!(made.is_ok_and(|s| s.success()), "qemu-img");
        // All of it has data: what is measured are reads of data and writes in place.
        let fill = format!("write -q -P 7 0 {size}");
        let filled = Command::new("qemu-io").args(["-f", format, "-c", &fill]).arg(&image).status();
        assert!(filled.is_ok_and(|s| s.success()), "qemu-io");
        for direct in [false, true] {
            for (what, write, bytes, depth) in [
                ("read 4 KiB", false, 4096, 1),
                ("read 4 KiB", false, 4096, 32),
                ("write 4 KiB", true, 4096, 1),
                ("write 4 KiB", true, 4096, 32),
                ("read 1 MiB", false, 1 << 20, 4),
                ("write 1 MiB", true, 1 << 20, 4),
            ] {
                let load = Load { write, bytes, random: bytes == 4096, depth };
                let (mut a, mut z) = (vec![], vec![]);
                for _ in 0..3.min(b.rounds) {
                    a.push(ours(b, &image, format, direct).measure(load));
                    z.push(theirs(b, &image, format, direct).measure(load));
                }
                let pick = |v: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| {
                    median(&mut v.iter().map(f).collect::<Vec<_>>())
                };
                let cached = if direct { "direct" } else { "cached" };
                let what = format!("{format} {cached} {what} depth {depth}");
                let goal = if direct { "(goal ≥ 1.0)" } else { "(goal ≥ 1.5)" };
                report(
                    &what,
                    "kIO/s",
                    pick(&a, |r| r.0 / 1e3),
                    "qemu-storage-d",
                    pick(&z, |r| r.0 / 1e3),
                    goal,
                );
                let goal = if depth == 1 { "(goal ≤ 0.5)" } else { "" };
                report("  CPU a request", "µs", pick(&a, |r| r.1), "qemu-storage-d", pick(&z, |r| r.1), goal);
            }
        }
    }
}
