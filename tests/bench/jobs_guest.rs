//! What jobs leave to a guest, beside qemu-storage-daemon: the requests per second of a client of the disk's NBD export,
//! which is the same on both sides, without a job, and while one of each kind runs on the disk.
//!
//! Measured from the job's start for [`TIME`], or until the job has copied all, if that comes first. The images are those of
//! `jobs.rs`, as are their state before each run and what the cached and the O_DIRECT rows mean.

use crate::jobs::{Kind, daemon, img, kind, node, settle};
use crate::nbd::Client;
use crate::util::{Bench, judge, median};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Of one measurement, at most.
const TIME: Duration = Duration::from_millis(1500);

/// Requests under way at a time.
const DEPTH: usize = 8;

/// Random requests of 4 KiB over `size` bytes until `over` or for [`TIME`]: how many in a second.
fn load(c: &mut Client, write: bool, size: u64, over: &AtomicBool) -> f64 {
    let payload = [5u8; 4096];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut send = |c: &mut Client| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, u8::from(write)]);
        request.extend(state.to_be_bytes());
        request.extend((state % (size / 4096) * 4096).to_be_bytes());
        request.extend(4096u32.to_be_bytes());
        if write {
            request.extend(payload);
        }
        c.stream.write_all(&request).expect("send");
    };
    for _ in 0..DEPTH {
        send(c);
    }
    let begun = Instant::now();
    let mut done = 0u64;
    while begun.elapsed() < TIME && !over.load(SeqCst) {
        c.reply();
        send(c);
        done += 1;
    }
    let rate = done as f64 / begun.elapsed().as_secs_f64();
    (0..DEPTH).for_each(|_| c.reply());
    rate
}

/// Requests per second of the guest of `disk`, in the images of `of`, with this job or without one.
fn once(b: &Bench, ours: bool, (of, disk): (&Kind, &str), job: bool, direct: bool, write: bool) -> f64 {
    let file = |name: &str| b.dir.join(format!("{name}.qcow2"));
    let (new, socket) = (file("new"), b.dir.join("guest.sock"));
    let _ = (std::fs::remove_file(&new), std::fs::remove_file(&socket));
    img(&["create", "-q", "-f", "qcow2", &new.display().to_string(), &b.size.to_string()]);
    settle(&file("full"), direct);
    let mut daemon = daemon(b, ours);
    for (name, _, backing) in of.nodes {
        daemon.run(&node(name, &file(name), direct, *backing));
    }
    daemon.run(&json!({ "execute": "nbd-server-start", "arguments": {
        "addr": { "type": "unix", "data": { "path": socket } } } }));
    daemon.run(&json!({ "execute": "block-export-add", "arguments": {
        "type": "nbd", "id": "e", "name": "e", "node-name": disk, "writable": true } }));
    let mut client = Client::connect(&socket, true);
    if job {
        daemon.run(&serde_json::from_str(of.command).expect("a command"));
    }
    let over = Arc::new(AtomicBool::new(false));
    let rest = BufReader::new(daemon.lines.get_ref().try_clone().expect("clone"));
    let lines = std::mem::replace(&mut daemon.lines, rest);
    let told = over.clone();
    // Ends with the daemon.
    let events = std::thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            match event["event"].as_str() {
                Some("BLOCK_JOB_READY") => told.store(true, SeqCst),
                Some("BLOCK_JOB_COMPLETED") => {
                    assert!(event["data"].get("error").is_none(), "{event}");
                    told.store(true, SeqCst);
                }
                _ => {}
            }
        }
    });
    let rate = load(&mut client, write, b.size, &over);
    drop(daemon);
    events.join().expect("events");
    let _ = std::fs::remove_file(&new);
    rate
}

/// A mirror for which every write of the guest goes to both sides.
const ACTIVE: Kind = Kind {
    name: "write-blocking mirror",
    nodes: &[("full", false, None), ("new", true, None)],
    command: r#"{"execute":"blockdev-mirror","arguments":
        {"job-id":"j","device":"full","target":"new","sync":"full","copy-mode":"write-blocking"}}"#,
};

pub fn run(b: &Bench) {
    // Which jobs run on a disk of the same images, and its name.
    let disks = [
        (vec![kind("mirror"), &ACTIVE, kind("backup")], "full"),
        (vec![kind("stream")], "new"),
        (vec![kind("commit")], "full"),
    ];
    for (mode, direct) in [("cached", false), ("O_DIRECT", true)] {
        for (what, write) in [("reads", false), ("writes", true)] {
            for (kinds, disk) in &disks {
                let both = |of: &Kind, job: bool| {
                    let mut rates = [vec![], vec![]];
                    for round in 0..b.rounds.min(3) {
                        for side in [round % 2, 1 - round % 2] {
                            rates[side].push(once(b, side == 0, (of, *disk), job, direct, write) / 1e3);
                        }
                    }
                    rates.map(|mut r| median(&mut r))
                };
                let [alone, theirs] = both(kinds[0], false);
                let line = |job: &str| format!("guest {what}, {mode}, {job}");
                let without = line(&format!("no {}", kinds[0].name));
                judge(&without, "kIO/s", alone, "storage-daemon", theirs, (1.0, true));
                for kind in kinds {
                    let [ours, theirs] = both(kind, true);
                    judge(&line(kind.name), "kIO/s", ours, "storage-daemon", theirs, (1.0, true));
                    judge("  of what it has alone", "kIO/s", ours, "no job", alone, (0.5, true));
                }
            }
        }
    }
}
