//! Block jobs beside qemu-storage-daemon: the same QMP commands on the same images, in turn; seconds of time and of CPU.
//!
//! Both daemons open the same qcow2 images. What a job writes to is made anew for each run; what it reads is written once.
//! Before each run everything is synced, and the source is either all in the page cache, or (O_DIRECT) not at all there.
//! In the cached rows flushes are off on both sides (`cache.no-flush`): else it is the disk's write-back that is
//! measured, and only on the side that flushes. In the O_DIRECT rows flushes are done. A target's dirty pages go with
//! its file. Nobody else uses the images meanwhile; what jobs leave to a guest is `jobs_guest.rs`'s.
//!
//! CPU is the daemon's process clock, threads that have ended included. The line "a plain copy" is what the machine needs
//! for as many bytes with one thread, 1 MiB at a time, from file to file: no job that copies all of it through its own
//! memory can need less CPU by much.
//!
//! In a guest whose host takes free memory back, a page that lay free for seconds costs up to ten times as much to write
//! as one that was freed just now, in CPU, too, and whoever comes first pays: there only medians of several runs count.

use crate::util::{Bench, judge, median};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Size of the sparse disk, of which a hundredth is data.
const SPARSE: u64 = 64 << 30;

/// Seconds of time and of CPU.
type Cost = (f64, f64);

pub struct Daemon {
    pub child: Child,
    out: UnixStream,
    pub lines: BufReader<UnixStream>,
}

/// Seconds of CPU that a process has used, all threads together, also those that have ended.
fn cpu(pid: u32) -> f64 {
    let (mut clock, mut t) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both write what they are given the address of.
    let done = unsafe {
        match libc::clock_getcpuclockid(pid.cast_signed(), &mut clock) {
            0 => libc::clock_gettime(clock, &mut t),
            e => e,
        }
    };
    assert_eq!(done, 0, "the clock of process {pid}");
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

impl Daemon {
    pub fn start(mut command: Command, socket: &Path) -> Daemon {
        let _ = std::fs::remove_file(socket);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("spawn");
        let begun = Instant::now();
        let out = loop {
            match UnixStream::connect(socket) {
                Ok(s) => break s,
                Err(_) if begun.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(e) => panic!("{}: {e}", socket.display()),
            }
        };
        let lines = BufReader::new(out.try_clone().expect("clone"));
        let mut daemon = Daemon { child, out, lines };
        daemon.read();
        daemon.run(&json!({ "execute": "qmp_capabilities" }));
        daemon
    }

    pub fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("read");
        serde_json::from_str(&line).expect("JSON")
    }

    pub fn send(&mut self, command: &Value) {
        writeln!(self.out, "{command}").expect("write");
    }

    pub fn run(&mut self, command: &Value) -> Value {
        self.send(command);
        loop {
            let mut answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }

    /// Runs a job to its end; a ready one is completed.
    fn job(&mut self, command: &Value) -> Cost {
        let pid = self.child.id();
        let (begun, before) = (Instant::now(), cpu(pid));
        self.send(command);
        loop {
            let answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            match answer.get("event").and_then(Value::as_str) {
                Some("BLOCK_JOB_READY") => {
                    self.send(&json!({ "execute": "job-complete", "arguments": { "id": "j" } }));
                }
                Some("BLOCK_JOB_COMPLETED") => {
                    assert!(answer["data"].get("error").is_none(), "{answer}");
                    return (begun.elapsed().as_secs_f64(), cpu(pid) - before);
                }
                _ => {}
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

pub fn node(name: &str, file: &Path, direct: bool, backing: Option<&str>) -> Value {
    let cache = json!({ "direct": direct, "no-flush": !direct });
    json!({ "execute": "blockdev-add", "arguments": {
        "driver": "qcow2", "node-name": name, "backing": backing, "cache": cache,
        "file": { "driver": "file", "filename": file, "cache": cache } } })
}

/// Everything is on the disk; `file` is in the page cache, or not at all.
pub fn settle(file: &Path, direct: bool) {
    // SAFETY: no memory is involved.
    unsafe { libc::sync() };
    let file = File::open(file).expect("open");
    if direct {
        // SAFETY: as above; the descriptor is the file's.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        return;
    }
    let (mut buf, mut at) = (vec![0; 1 << 20], 0);
    while let n @ 1.. = file.read_at(&mut buf, at).expect("read") {
        at += n as u64;
    }
}

/// qemu-storage-daemon and minivmm, each with a monitor and nothing else.
pub fn daemon(b: &Bench, ours: bool) -> Daemon {
    let socket = b.dir.join(if ours { "ours.sock" } else { "qemu.sock" });
    if ours {
        let text = format!("[machine]\naccel = \"none\"\nmemory = \"16M\"\n[[qmp]]\nsocket = {socket:?}\n");
        return Daemon::start(b.minivmm(&b.config("jobs.toml", &text)), &socket);
    }
    let mut c = Command::new("qemu-storage-daemon");
    c.arg("--chardev").arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()));
    c.args(["--monitor", "chardev=c"]);
    Daemon::start(c, &socket)
}

/// The job's name, the nodes it needs (name, image is made anew, backing), and the command.
pub struct Kind {
    pub name: &'static str,
    pub nodes: &'static [(&'static str, bool, Option<&'static str>)],
    pub command: &'static str,
}

const KINDS: &[Kind] = &[
    Kind {
        name: "backup",
        nodes: &[("full", false, None), ("new", true, None)],
        command: r#"{"execute":"blockdev-backup","arguments":
            {"job-id":"j","device":"full","target":"new","sync":"full"}}"#,
    },
    Kind {
        name: "mirror",
        nodes: &[("full", false, None), ("new", true, None)],
        command: r#"{"execute":"blockdev-mirror","arguments":
            {"job-id":"j","device":"full","target":"new","sync":"full"}}"#,
    },
    Kind {
        name: "stream",
        nodes: &[("full", false, None), ("new", true, Some("full"))],
        command: r#"{"execute":"block-stream","arguments":{"job-id":"j","device":"new"}}"#,
    },
    Kind {
        name: "commit",
        nodes: &[("new", true, None), ("full", false, Some("new"))],
        command: r#"{"execute":"block-commit","arguments":{"job-id":"j","device":"full"}}"#,
    },
];

/// The job of this name.
pub fn kind(name: &str) -> &'static Kind {
    KINDS.iter().find(|k| k.name == name).expect("a kind of job")
}

fn once(b: &Bench, ours: bool, kind: &Kind, size: u64, direct: bool) -> Cost {
    let file = |name: &str| b.dir.join(format!("{name}.qcow2"));
    let new = file("new");
    // With the old one go its dirty pages.
    let _ = std::fs::remove_file(&new);
    img(&["create", "-q", "-f", "qcow2", &new.display().to_string(), &size.to_string()]);
    settle(&file("full"), direct);
    let mut daemon = daemon(b, ours);
    for (name, _, backing) in kind.nodes {
        daemon.run(&node(name, &file(name), direct, *backing));
    }
    let cost = daemon.job(&serde_json::from_str(kind.command).expect("a command"));
    drop(daemon);
    let _ = std::fs::remove_file(&new);
    cost
}

/// What copying `bytes` from file to file takes: see the module's head.
fn plain_copy(b: &Bench, bytes: u64, direct: bool) -> Cost {
    const PIECE: usize = 1 << 20;
    let (from, to) = (b.dir.join("plain.from"), b.dir.join("plain.to"));
    let mut data = vec![7u8; PIECE + 4096];
    // On a page, as O_DIRECT wants it.
    let at = data.as_ptr().align_offset(4096);
    let buf = &mut data[at..at + PIECE];
    let pieces = bytes / PIECE as u64;
    let out = File::create(&from).expect("create");
    for n in 0..pieces {
        out.write_all_at(buf, n * PIECE as u64).expect("write");
    }
    drop(out);
    settle(&from, direct);
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let source = File::options().read(true).custom_flags(flags).open(&from).expect("open");
    let target =
        File::options().write(true).create(true).truncate(true).custom_flags(flags).open(&to).expect("open");
    target.set_len(bytes).expect("truncate");
    let (begun, before) = (Instant::now(), cpu(std::process::id()));
    for n in 0..pieces {
        source.read_exact_at(buf, n * PIECE as u64).expect("read");
        target.write_all_at(buf, n * PIECE as u64).expect("write");
    }
    let cost = (begun.elapsed().as_secs_f64(), cpu(std::process::id()) - before);
    let _ = (std::fs::remove_file(&from), std::fs::remove_file(&to));
    cost
}

/// Makes `full.qcow2`: all of it data, or, of a sparse disk, 64 KiB in every 6.25 MiB.
pub fn fill(b: &Bench, size: u64, sparse: bool) -> PathBuf {
    let full = b.dir.join("full.qcow2");
    let name = full.display().to_string();
    img(&["create", "-q", "-f", "qcow2", &name, &size.to_string()]);
    let (count, step) = if sparse { (size / 100 / 65536, 6_553_600) } else { (size >> 16, 65536) };
    let fill = ["bench", "-q", "-w", "--pattern=7", "-s", "64k", "-d", "8", "-f", "qcow2"];
    let (count, step) = (count.to_string(), step.to_string());
    img(&[&fill[..], &["-c", &count, "-S", &step, &name]].concat());
    full
}

fn page(b: &Bench, what: &str, size: u64, direct: bool, sparse: bool) {
    let pick = |v: &[Cost], f: fn(&Cost) -> f64| median(&mut v.iter().map(f).collect::<Vec<_>>());
    let rounds = b.rounds.min(3);
    let bytes = if sparse { size / 100 } else { size };
    let plain: Vec<Cost> = (0..rounds).map(|_| plain_copy(b, bytes, direct)).collect();
    let (time, cpu) = (pick(&plain, |c| c.0), pick(&plain, |c| c.1));
    println!("({what}: a plain copy of {} MiB takes {time:.2} s, {cpu:.2} s of CPU)", bytes >> 20);
    for kind in KINDS {
        let mut costs = [vec![], vec![]];
        for round in 0..rounds {
            // Who comes first changes.
            for side in [round % 2, 1 - round % 2] {
                costs[side].push(once(b, side == 0, kind, size, direct));
            }
        }
        let [a, z] = costs;
        let line = format!("{}, {what}", kind.name);
        let goal = match (sparse, kind.name, direct) {
            (true, ..) => 1.0 / 3.0,
            (_, "stream", true) => 1.0 / 1.8,
            _ => 1.0,
        };
        judge(&line, "s", pick(&a, |c| c.0), "storage-daemon", pick(&z, |c| c.0), (goal, false));
        judge(&line, "s CPU", pick(&a, |c| c.1), "storage-daemon", pick(&z, |c| c.1), (0.5, false));
    }
}

pub fn run(b: &Bench) {
    let there =
        Command::new("qemu-storage-daemon").arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        println!("(no qemu-storage-daemon: no bench of jobs)");
        return;
    }
    if b.wants("sparse") {
        fill(b, SPARSE, true);
        page(b, "sparse", SPARSE, false, true);
    }
    fill(b, b.size, false);
    for (what, name, direct) in [("cached", "cached", false), ("direct", "O_DIRECT", true)] {
        if b.wants(what) {
            page(b, name, b.size, direct, false);
        }
    }
    if b.wants("guest") {
        crate::jobs_guest::run(b);
    }
    if b.wants("speed") {
        crate::jobs_speed::run(b);
    }
}
