//! Block jobs beside qemu-storage-daemon: the same QMP commands on the same images, in turn; seconds of time and of CPU.
//!
//! Both daemons open the same qcow2 images. What a job writes to is made anew for each run; what it reads is written once
//! and is warm in the page cache (or, with O_DIRECT, is on the disk). Nobody else uses the images meanwhile.

use crate::util::{Bench, median, report};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of data in the full images.
const SIZE: u64 = 512 << 20;
/// Size of the sparse disk, of which a hundredth is data.
const SPARSE: u64 = 64 << 30;

/// Seconds of time and of CPU.
type Cost = (f64, f64);

struct Daemon {
    child: Child,
    out: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Daemon {
    fn start(mut command: Command, socket: &Path) -> Daemon {
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

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("read");
        serde_json::from_str(&line).expect("JSON")
    }

    fn send(&mut self, command: &Value) {
        writeln!(self.out, "{command}").expect("write");
    }

    fn run(&mut self, command: &Value) {
        self.send(command);
        loop {
            let answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }

    /// CPU of the whole process, with the threads that have ended, in seconds (steps of 10 ms).
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let tick = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        (tick(11) + tick(12)) / 100.0
    }

    /// Runs a job to its end; a ready one is completed.
    fn job(&mut self, command: &Value) -> Cost {
        let (begun, before) = (Instant::now(), self.cpu());
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
                    return (begun.elapsed().as_secs_f64(), self.cpu() - before);
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

fn img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn node(name: &str, file: &Path, direct: bool, backing: Option<&str>) -> Value {
    json!({ "execute": "blockdev-add", "arguments": {
        "driver": "qcow2", "node-name": name, "backing": backing, "cache": { "direct": direct },
        "file": { "driver": "file", "filename": file, "cache": { "direct": direct } } } })
}

/// The job's name, the nodes it needs (name, image is made anew, backing), and the command.
struct Kind {
    name: &'static str,
    nodes: &'static [(&'static str, bool, Option<&'static str>)],
    command: &'static str,
    goal: &'static str,
}

const KINDS: &[Kind] = &[
    Kind {
        name: "backup",
        nodes: &[("full", false, None), ("new", true, None)],
        command: r#"{"execute":"blockdev-backup","arguments":
            {"job-id":"j","device":"full","target":"new","sync":"full"}}"#,
        goal: "time <= 1, CPU <= 0.5",
    },
    Kind {
        name: "mirror",
        nodes: &[("full", false, None), ("new", true, None)],
        command: r#"{"execute":"blockdev-mirror","arguments":
            {"job-id":"j","device":"full","target":"new","sync":"full"}}"#,
        goal: "time <= 1, CPU <= 0.5",
    },
    Kind {
        name: "stream",
        nodes: &[("full", false, None), ("new", true, Some("full"))],
        command: r#"{"execute":"block-stream","arguments":{"job-id":"j","device":"new"}}"#,
        goal: "time <= 0.55 with O_DIRECT",
    },
    Kind {
        name: "commit",
        nodes: &[("new", true, None), ("full", false, Some("new"))],
        command: r#"{"execute":"block-commit","arguments":{"job-id":"j","device":"full"}}"#,
        goal: "time <= 1, CPU <= 0.5",
    },
];

fn once(mut daemon: Daemon, kind: &Kind, dir: &Path, size: u64, direct: bool) -> Cost {
    for (name, fresh, backing) in kind.nodes {
        let file = dir.join(format!("{name}.qcow2"));
        if *fresh {
            img(&["create", "-q", "-f", "qcow2", &file.display().to_string(), &size.to_string()]);
        }
        daemon.run(&node(name, &file, direct, *backing));
    }
    daemon.job(&serde_json::from_str(kind.command).expect("a command"))
}

pub fn run(b: &Bench) {
    let storage = |socket: &PathBuf| {
        let mut c = Command::new("qemu-storage-daemon");
        c.arg("--chardev").arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()));
        c.args(["--monitor", "chardev=c"]);
        c
    };
    let there =
        Command::new("qemu-storage-daemon").arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        println!("(no qemu-storage-daemon: no bench of jobs)");
        return;
    }
    let full = b.dir.join("full.qcow2");
    let name = full.display().to_string();
    for (what, size, sparse) in [("", SIZE, false), ("sparse ", SPARSE, true)] {
        img(&["create", "-q", "-f", "qcow2", &name, &size.to_string()]);
        let (count, step) = if sparse { (size / 100 / 65536, 6_553_600) } else { (size >> 16, 65536) };
        let fill = ["bench", "-q", "-w", "--pattern=7", "-s", "64k", "-d", "8", "-f", "qcow2"];
        let (count, step) = (count.to_string(), step.to_string());
        img(&[&fill[..], &["-c", &count, "-S", &step, &name]].concat());
        std::fs::File::open(&full).and_then(|f| f.sync_all()).expect("sync");
        for direct in [false, true] {
            if sparse && direct {
                continue;
            }
            for kind in KINDS {
                let (ours, qemu) = (b.dir.join("ours.sock"), b.dir.join("qemu.sock"));
                let config =
                    format!("[machine]\naccel = \"none\"\nmemory = \"16M\"\n[[qmp]]\nsocket = {ours:?}\n");
                let config = b.config("jobs.toml", &config);
                let (mut a, mut p): (Vec<Cost>, Vec<Cost>) = (vec![], vec![]);
                for _ in 0..b.rounds.min(3) {
                    let daemon = Daemon::start(b.minivmm(&config), &ours);
                    a.push(once(daemon, kind, &b.dir, size, direct));
                    p.push(once(Daemon::start(storage(&qemu), &qemu), kind, &b.dir, size, direct));
                }
                let pick = |v: &[Cost], f: fn(&Cost) -> f64| median(&mut v.iter().map(f).collect::<Vec<_>>());
                let mode = if direct { "O_DIRECT" } else { "cached" };
                let line = format!("{what}{}, {mode}", kind.name);
                report(&line, "s", pick(&a, |c| c.0), "storage-daemon", pick(&p, |c| c.0), kind.goal);
                report(&line, "s CPU", pick(&a, |c| c.1), "storage-daemon", pick(&p, |c| c.1), "");
            }
        }
    }
}
