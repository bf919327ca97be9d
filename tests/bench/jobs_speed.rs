//! How well jobs keep to a limit, and how soon they end when they are cancelled; qemu-storage-daemon beside them.
//!
//! A limit: a job runs for some seconds at 20 MiB/s, then at 40 MiB/s without a break; what its progress says at
//! two moments of each time, by the clock of this program, as a ratio of the limit. It is to be within 5 %.
//!
//! A cancel: the time from the command to the event `BLOCK_JOB_CANCELLED`, median and longest, of jobs that copy as
//! fast as they can, all in the page cache, and of such that wait (1 byte a second). It is to take 100 ms at most.

use crate::jobs::{Daemon, daemon, img, node, settle};
use crate::util::{Bench, median};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const MIB: f64 = 1048576.0;

/// Each speed is kept up for so long.
const TIME: Duration = Duration::from_secs(3);

/// What a job needs before it has come into its pace.
const FIRST: Duration = Duration::from_millis(500);

/// The name, the nodes (name, backing), and the command.
type Row = (&'static str, &'static [(&'static str, Option<&'static str>)], &'static str, Value);

fn rows() -> [Row; 5] {
    const PAIR: &[(&str, Option<&str>)] = &[("full", None), ("new", None)];
    let copy = json!({ "device": "full", "target": "new", "sync": "full" });
    let mid = json!({ "device": "over", "top-node": "full" });
    [
        ("backup", PAIR, "blockdev-backup", copy.clone()),
        ("mirror", PAIR, "blockdev-mirror", copy),
        ("stream", &[("full", None), ("new", Some("full"))], "block-stream", json!({ "device": "new" })),
        ("commit", &[("new", None), ("full", Some("new")), ("over", Some("full"))], "block-commit", mid),
        ("active", &[("new", None), ("full", Some("new"))], "block-commit", json!({ "device": "full" })),
    ]
}

/// A daemon with the nodes; all images but `full` are made anew.
fn ready(b: &Bench, ours: bool, row: &Row) -> Daemon {
    let file = |name: &str| b.dir.join(format!("{name}.qcow2"));
    for (name, _) in row.1.iter().filter(|(name, _)| *name != "full") {
        let _ = std::fs::remove_file(file(name));
        img(&["create", "-q", "-f", "qcow2", &file(name).display().to_string(), &b.size.to_string()]);
    }
    settle(&file("full"), false);
    let mut daemon = daemon(b, ours);
    for (name, backing) in row.1 {
        daemon.run(&node(name, &file(name), false, *backing));
    }
    daemon
}

fn start(daemon: &mut Daemon, row: &Row, speed: u64) {
    let mut args = row.3.clone();
    args["job-id"] = "j".into();
    args["speed"] = speed.into();
    daemon.run(&json!({ "execute": row.2, "arguments": args }));
}

/// The progress in bytes, and when.
fn progress(daemon: &mut Daemon) -> (f64, Instant) {
    let jobs = daemon.run(&json!({ "execute": "query-jobs" }));
    (jobs[0]["current-progress"].as_f64().expect("a job"), Instant::now())
}

/// Bytes per second at each of the two limits, as ratios of them.
fn paces(b: &Bench, ours: bool, row: &Row) -> [f64; 2] {
    let limits = [20 << 20, 40 << 20];
    let mut daemon = ready(b, ours, row);
    start(&mut daemon, row, limits[0]);
    limits.map(|limit| {
        let speed = json!({ "device": "j", "speed": limit });
        daemon.run(&json!({ "execute": "block-job-set-speed", "arguments": speed }));
        std::thread::sleep(FIRST);
        let (from, begun) = progress(&mut daemon);
        std::thread::sleep(TIME);
        let (to, end) = progress(&mut daemon);
        (to - from) / (end - begun).as_secs_f64() / limit as f64
    })
}

/// Milliseconds from the cancel to its event.
fn cancel(daemon: &mut Daemon, row: &Row, speed: u64) -> Option<f64> {
    start(daemon, row, speed);
    std::thread::sleep(Duration::from_millis(30));
    let begun = Instant::now();
    daemon.send(&json!({ "execute": "job-cancel", "arguments": { "id": "j" } }));
    let (mut time, mut answered, mut over) = (None, false, false);
    while !answered || !over {
        let answer = daemon.read();
        answered |= answer.get("return").is_some() || answer.get("error").is_some();
        if answer["event"] == "BLOCK_JOB_CANCELLED" {
            time = Some(begun.elapsed().as_secs_f64() * 1000.0);
        }
        over |= answer["event"] == "JOB_STATUS_CHANGE" && answer["data"]["status"] == "null";
        // It was over before.
        over |= answer.get("error").is_some();
    }
    time
}

pub fn run(b: &Bench) {
    for row in rows() {
        let [ours, theirs] = [true, false].map(|ours| paces(b, ours, &row));
        for (n, limit) in [20, 40].into_iter().enumerate() {
            let verdict = if (0.95..=1.05).contains(&ours[n]) { "met" } else { "MISSED" };
            println!(
                "{:34} {:9.3} of it   storage-daemon {:9.3}  goal 0.95 to 1.05: {verdict}",
                format!("{}, limit {limit} MiB/s", row.0),
                ours[n],
                theirs[n]
            );
        }
    }
    for row in rows() {
        for (what, speed) in [("copying", 0), ("waiting", 1)] {
            let times = [true, false].map(|ours| {
                let mut daemon = ready(b, ours, &row);
                let times: Vec<f64> =
                    (0..b.rounds.min(15)).filter_map(|_| cancel(&mut daemon, &row, speed)).collect();
                let longest = times.iter().copied().fold(0.0, f64::max);
                (median(&mut times.clone()), longest, times.len())
            });
            let [(ours, longest, count), (theirs, their_longest, _)] = times;
            let verdict = if longest <= 100.0 { "met" } else { "MISSED" };
            println!(
                "{:34} {ours:9.2} ms, longest of {count} {longest:.2}  storage-daemon {theirs:.2}, {their_longest:.2}  \
                 goal <= 100 ms: {verdict}",
                format!("{}, cancel while {what}", row.0)
            );
        }
    }
    println!("(images of {} MiB)", b.size as f64 / MIB);
}
