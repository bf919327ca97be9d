//! The NBD server beside qemu-storage-daemon: requests per second, and the daemon's CPU per request, from a small client of ours
//! that is the same for both: it keeps so many requests under way on one connection, with structured replies, as today's clients
//! do. Its own work is a part of both sides' time, which draws the ratios towards 1.
//!
//! Both daemons run from the start, each on an image of its own, made the same way. A load is given to them in turn, a short slice
//! each, A B B A, so that both see the same machine; printed are the medians of the slices. The page cache holds both images
//! whole, in pages of 4 KiB, in the rows called cached, and nothing of them in the rows called direct. Before a slice that writes
//! both images are synced: what is measured is the write, not the disk's write-back of the slice before.
//!
//! At depth 1 there is a third side, the floor: a loop of recv, pread or pwrite, and sendmsg, without options, checks, errors,
//! formats or threads. Its CPU is what the kernel takes for the least that a server can do: where that
//! is more than half of QEMU's, the goal cannot be reached by a server that sleeps while it waits. It depends on where the
//! scheduler puts client and server: on one processor a wake-up is cheap, between two that sleep it costs more than all the rest.

use crate::util::{Bench, median, report};
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SIZE: u64 = 256 << 20;
/// Of one slice.
const TIME: Duration = Duration::from_millis(200);

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b[..4].try_into().expect("four bytes"))
}

pub struct Client {
    pub stream: UnixStream,
    buf: Vec<u8>,
    at: usize,
    end: usize,
}

impl Client {
    /// `hello`: with a handshake, which the floor has not.
    pub fn connect(path: &Path, hello: bool) -> Client {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(10), "{}: {e}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut c = Client { stream, buf: vec![0; 256 << 10], at: 0, end: 0 };
        if !hello {
            return c;
        }
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

    /// The next reply to end.
    pub fn reply(&mut self) {
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

/// Seconds of CPU that all threads of the process have used, also those that are gone.
fn cpu(pid: u32) -> f64 {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: each call writes the one value it is given.
    let rc =
        unsafe { libc::clock_getcpuclockid(pid as i32, &mut clock) + libc::clock_gettime(clock, &mut time) };
    assert_eq!(rc, 0, "the CPU time of process {pid}");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A server, a connection to it, and its image.
struct Side {
    child: Child,
    client: Client,
    image: File,
    /// Of each slice: requests per second, microseconds of the server's CPU per request.
    seen: Vec<(f64, f64)>,
}

impl Side {
    fn start(mut command: Command, socket: &Path, image: &Path, hello: bool) -> Side {
        let _ = std::fs::remove_file(socket);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("spawn");
        let client = Client::connect(socket, hello);
        Side { child, client, image: File::open(image).expect("image"), seen: vec![] }
    }

    fn slice(&mut self, load: Load) {
        if load.write {
            self.image.sync_all().expect("sync");
        }
        let before = cpu(self.child.id());
        let (rate, done) = drive(&mut self.client, load);
        self.seen.push((rate, (cpu(self.child.id()) - before) / done as f64 * 1e6));
    }

    /// The medians of the slices, but for the first, which warms up.
    fn medians(&mut self) -> (f64, f64) {
        let seen = self.seen.split_off(1);
        self.seen.clear();
        let pick = |f: fn(&(f64, f64)) -> f64| median(&mut seen.iter().map(f).collect::<Vec<_>>());
        (pick(|s| s.0), pick(|s| s.1))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The floor's process: serves one client on the raw image at `path`, without a handshake.
pub fn floor_server(socket: &str, path: &str, direct: bool) {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).write(true).custom_flags(flags).open(path).expect("image");
    let (mut stream, _) = UnixListener::bind(socket).expect("bind").accept().expect("accept");
    let mut memory = vec![0; 3 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    // A page to receive a request, which ends where the page of its data begins.
    let memory = &mut memory[start..start + 2 * 4096];
    loop {
        let (mut got, mut len) = (0, 28);
        while got < len {
            match stream.read(&mut memory[4096 - 28 + got..]) {
                Ok(0) | Err(_) => return,
                Ok(n) => got += n,
            }
            len = if memory[4096 - 28 + 7] == 1 { 28 + 4096 } else { 28 };
        }
        let head: [u8; 28] = memory[4096 - 28..4096].try_into().expect("28 bytes");
        let offset = u64::from_be_bytes(head[16..24].try_into().expect("8 bytes"));
        let (reply, sent);
        if head[7] == 1 {
            file.write_all_at(&memory[4096..], offset).expect("write");
            reply = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &head[8..16]].concat();
            sent = stream.write(&reply);
        } else {
            file.read_exact_at(&mut memory[4096..], offset).expect("read");
            let len = 8 + 4096u32;
            reply = [
                &0x668e_33efu32.to_be_bytes()[..],
                &[0, 1, 0, 1],
                &head[8..16],
                &len.to_be_bytes(),
                &head[16..24],
            ]
            .concat();
            sent = stream.write_vectored(&[IoSlice::new(&reply), IoSlice::new(&memory[4096..])]);
        }
        assert!(sent.is_ok_and(|n| n == reply.len() + if head[7] == 1 { 0 } else { 4096 }), "a short send");
    }
}

fn floor(b: &Bench, image: &Path, direct: bool) -> Side {
    let socket = b.dir.join("nbd-floor");
    let mut c = Command::new(std::env::current_exe().expect("this program"));
    c.arg("nbd-floor").arg(&socket).arg(image).arg(direct.to_string());
    Side::start(c, &socket, image, false)
}

fn ours(b: &Bench, image: &Path, format: &str, direct: bool) -> Side {
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
    Side::start(b.minivmm(&config), &socket, image, true)
}

fn theirs(b: &Bench, image: &Path, format: &str, direct: bool) -> Side {
    let socket = b.dir.join("nbd-theirs");
    let (cache, aio) = if direct { ("on", "native") } else { ("off", "threads") };
    let mut c = Command::new("qemu-storage-daemon");
    let file = format!("driver=file,node-name=f,filename={},cache.direct={cache},aio={aio}", image.display());
    c.args(["--blockdev", &file]);
    c.args(["--blockdev", &format!("driver={format},node-name=d,file=f,cache.direct={cache}")]);
    c.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    c.args(["--export", "type=nbd,id=e,node-name=d,name=e,writable=on"]);
    Side::start(c, &socket, image, true)
}

/// An image, all of it data: what is measured are reads of data and writes in place.
fn make(b: &Bench, format: &str, whose: &str, direct: bool) -> PathBuf {
    let image = b.dir.join(format!("nbd-{whose}.{format}"));
    let size = SIZE.to_string();
    let made = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&image).arg(&size).status();
    assert!(made.is_ok_and(|s| s.success()), "qemu-img");
    let fill = format!("write -q -P 7 0 {size}");
    let filled = Command::new("qemu-io").args(["-f", format, "-c", &fill]).arg(&image).status();
    assert!(filled.is_ok_and(|s| s.success()), "qemu-io");
    let file = File::open(&image).expect("image");
    file.sync_all().expect("sync");
    if direct {
        // SAFETY: a hint about an open descriptor.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    } else {
        crate::qcow2::small_pages(&file);
    }
    image
}

pub fn run(b: &Bench) {
    let there = Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("(no qemu-storage-daemon: nothing to compare with)");
        return;
    }
    for format in ["raw", "qcow2"] {
        for direct in [false, true] {
            let name = format!("{format} {}", if direct { "direct" } else { "cached" });
            if !b.wants(&name) {
                continue;
            }
            let mut sides = vec![
                ours(b, &make(b, format, "ours", direct), format, direct),
                theirs(b, &make(b, format, "theirs", direct), format, direct),
            ];
            sides.push(floor(b, &make(b, "raw", "floor", direct), direct));
            for (what, write, bytes, depth) in [
                ("read 4 KiB", false, 4096, 1),
                ("read 4 KiB", false, 4096, 32),
                ("write 4 KiB", true, 4096, 1),
                ("write 4 KiB", true, 4096, 32),
                ("read 1 MiB", false, 1 << 20, 4),
                ("write 1 MiB", true, 1 << 20, 4),
            ] {
                let load = Load { write, bytes, random: bytes == 4096, depth };
                let used = if depth == 1 { 3 } else { 2 };
                for round in 0..=b.rounds.min(10) {
                    for n in 0..used {
                        let n = if round % 2 == 0 { n } else { used - 1 - n };
                        sides[n].slice(load);
                    }
                }
                let all: Vec<_> = sides[..used].iter_mut().map(Side::medians).collect();
                let (a, z) = (all[0], all[1]);
                let goal = if direct { "(goal ≥ 1.0)" } else { "(goal ≥ 1.5)" };
                let what = format!("{name} {what} depth {depth}");
                report(&what, "kIO/s", a.0 / 1e3, "qemu-storage-d", z.0 / 1e3, goal);
                let goal = if depth == 1 { "(goal ≤ 0.5)" } else { "" };
                report("  CPU a request", "µs", a.1, "qemu-storage-d", z.1, goal);
                if let Some(f) = all.get(2) {
                    report("  beside the floor", "kIO/s", a.0 / 1e3, "floor", f.0 / 1e3, "");
                    report("  CPU a request", "µs", a.1, "floor", f.1, "");
                }
            }
        }
    }
}
