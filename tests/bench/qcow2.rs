//! The qcow2 driver below the devices, in this process: beside the raw file through the same nodes, and beside
//! `qemu-img bench` on an image of the same kind with the same requests.
//!
//! The n-th request goes to `n * STRIDE` modulo the image's size, which is how `qemu-img bench -S` walks too: every block
//! once, far from its neighbours. In flight means threads here and coroutines there. The page cache is warm and holds
//! everything, so that what is measured is the program and not the disk. CPU is that of the whole process, without what
//! opening the image takes.

use crate::util::{Bench, median, report};
use minivmm::block::driver::Flags;
use minivmm::block::graph::Graph;
use minivmm::block::node::Node;
use minivmm::block::open;
use minivmm::control::formats::{BlockdevOptions, Formats, plan};
use minivmm::control::objects::Objects;
use minivmm::qapi::{Path as Where, Wire};
use minivmm::sys::fdset::FdSets;
use minivmm::sys::iov::{Iov, IovMut};
use serde_json::json;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

/// Size of every image but the wide one, in bytes.
const SIZE: u64 = 512 << 20;
/// An odd number of 4 KiB blocks, so that the walk meets every block.
const STRIDE: u64 = 40_503 * 4096;

/// What the image is like before the requests.
#[derive(Clone, Copy, PartialEq)]
enum Image {
    /// Every cluster is written.
    Full,
    /// Clusters and tables are there, data is not.
    Prealloc,
    /// Nothing is there; a new one for each run.
    Fresh,
    /// The same, of 100 GiB: the requests are at home in all of its L2 tables.
    Wide,
}

impl Image {
    /// In bytes.
    fn size(self) -> u64 {
        if self == Image::Wide { 100 << 30 } else { SIZE }
    }

    /// A new one for each run.
    fn is_new(self) -> bool {
        matches!(self, Image::Fresh | Image::Wide)
    }
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    image: Image,
    write: bool,
    size: u64,
    stride: u64,
    threads: u64,
    count: u64,
    /// A flush after each so many writes; 0: none.
    flush: u64,
    goal: &'static str,
}

/// Microseconds of time and of CPU per request.
type Cost = (f64, f64);

fn cpu() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: t is a timespec that the call fills in.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut t) };
    t.tv_sec as f64 * 1e6 + t.tv_nsec as f64 / 1e3
}

/// CPU time of the children that were waited for, in microseconds.
fn children_cpu() -> f64 {
    // SAFETY: all zeroes is a rusage, and the call fills it in.
    let mut r: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut r) };
    let us = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    us(r.ru_utime) + us(r.ru_stime)
}

fn qemu_img(args: &[&str], path: &Path) -> bool {
    Command::new("qemu-img").args(args).arg(path).output().is_ok_and(|o| o.status.success())
}

/// Lets the page cache hold the file in pages of 4 KiB: how large those are that writing it left there is chance, and a
/// small write to a large one takes the kernel up to twenty times as long.
pub fn small_pages(file: &std::fs::File) {
    let mut block = [0; 4096];
    // SAFETY: the descriptor is open, and both calls are hints.
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
        libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM);
    }
    let len = file.metadata().expect("metadata").len();
    for at in (0..len.min(2 * SIZE)).step_by(block.len()) {
        file.read_at(&mut block, at).expect("read");
    }
}

/// An image in that state. `Full` has its data in the order of the disk, as a converted one has.
fn make(b: &Bench, format: &str, image: Image) -> PathBuf {
    let path = b.dir.join(format!("speed-{format}-{}", image as u8));
    let size = image.size().to_string();
    let options = match (image, format) {
        (Image::Fresh | Image::Wide, _) | (Image::Prealloc, "raw") => "preallocation=off",
        (Image::Prealloc, _) => "preallocation=metadata",
        (Image::Full, _) => "preallocation=off",
    };
    let name = path.display().to_string();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", format, "-o", options, &name, &size])
        .status()
        .is_ok_and(|s| s.success());
    assert!(made, "qemu-img create {name}");
    if image == Image::Full {
        let count = (SIZE >> 20).to_string();
        let fill = ["bench", "-q", "-w", "--pattern=7", "-s", "1M", "-d", "1", "-c", &count, "-f", format];
        assert!(qemu_img(&fill, &path), "qemu-img bench {name}");
    }
    // else the kernel writes it back while we measure, and its pages are locked at times
    let file = std::fs::File::open(&path).expect("open");
    file.sync_all().expect("sync");
    small_pages(&file);
    path
}

/// The case through minivmm's nodes.
fn ours(format: &str, path: &Path, case: &Case) -> Cost {
    let mut graph = Graph::new();
    let mut fds = FdSets::default();
    let objects = Objects::default();
    let formats = Formats::new(&mut fds, &objects);
    let file = json!({"driver": "file", "filename": path, "node-name": "file"});
    let options = match format {
        "raw" => file,
        _ => json!({"driver": format, "file": file, "node-name": "image"}),
    };
    let options = BlockdevOptions::take(options, &Where::Root).expect("options");
    let node = open::add(&mut graph, &formats, plan(options).expect("plan")).expect("the image opens");
    graph.own(&node);
    let (began, used) = (Instant::now(), cpu());
    std::thread::scope(|s| {
        for t in 0..case.threads {
            let node = &node;
            s.spawn(move || walk(node, case, t));
        }
    });
    let n = case.count as f64;
    let cost = (began.elapsed().as_secs_f64() * 1e6 / n, (cpu() - used) / n);
    drop(node);
    graph.close_all();
    cost
}

fn walk(node: &Arc<Node>, case: &Case, thread: u64) {
    let mut buf = vec![9u8; case.size as usize];
    for i in (thread..case.count).step_by(case.threads as usize) {
        let off = i * case.stride % case.image.size();
        if case.write {
            node.write(off, &Iov::from_slice(&buf), Flags::NONE).expect("write");
            if case.flush != 0 && i % case.flush == case.flush - 1 {
                node.flush().expect("flush");
            }
        } else {
            node.read(off, &mut IovMut::from_slice(&mut buf)).expect("read");
        }
    }
}

/// The case through `qemu-img bench`, which says itself how long it took.
fn theirs(path: &Path, case: &Case) -> Option<Cost> {
    let run = |count: u64| {
        let mut c = Command::new("qemu-img");
        c.args(["bench", "-f", "qcow2", "-t", "writeback", "-c", &count.to_string()]);
        c.args(["-d", &case.threads.to_string(), "-s", &case.size.to_string()]);
        c.args(["-S", &case.stride.to_string()]);
        if case.write {
            c.args(["-w", "--pattern=9"]);
        }
        if case.flush != 0 {
            c.arg(format!("--flush-interval={}", case.flush));
        }
        let before = children_cpu();
        let out = c.arg(path).output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8(out.stdout).ok()?;
        let seconds: f64 = text.split("completed in ").nth(1)?.split(' ').next()?.parse().ok()?;
        Some((seconds * 1e6, children_cpu() - before))
    };
    // what a process takes that does next to nothing is not the requests' cost
    let start = if case.image.is_new() { 0.0 } else { run(case.threads)?.1 };
    let (time, used) = run(case.count)?;
    let n = case.count as f64;
    Some((time / n, (used - start).max(0.0) / n))
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |name, image, write, threads, count, goal| {
        let small = Case { name, image, write, size: 4096, stride: STRIDE, threads, count, flush: 0, goal };
        out.push(small);
    };
    let (read, place) = ("goal 1.3 of raw, CPU at depth 1", "goal 1.3 of raw, CPU at depth 1");
    for (threads, goal) in [(1, read), (4, ""), (32, "")] {
        add("read, written image", Image::Full, false, threads, 100_000, goal);
    }
    for (threads, goal) in [(1, place), (4, ""), (32, "")] {
        add("write, written image", Image::Full, true, threads, 60_000, goal);
    }
    for threads in [1, 4, 32] {
        add("read, preallocated metadata", Image::Prealloc, false, threads, 100_000, "");
        add("write, preallocated metadata", Image::Prealloc, true, threads, 30_000, "");
        add("read, fresh image", Image::Fresh, false, threads, 100_000, "");
        let goal = if threads == 1 { "goal 3 of raw; 0.33 of QEMU's CPU" } else { "" };
        add("write, fresh image", Image::Fresh, true, threads, 8000, goal);
    }
    let size = 1 << 20;
    let mut big = |name, image, write| {
        let goal = "goal 1.05 of raw";
        let count = SIZE / size;
        out.push(Case { name, image, write, size, stride: size, threads: 1, count, flush: 0, goal });
    };
    big("read 1 MiB in order", Image::Full, false);
    big("write 1 MiB in order", Image::Full, true);
    big("write 1 MiB in order, fresh", Image::Fresh, true);
    let name = "write, fresh, flush each 32";
    let flushed = Case {
        name,
        image: Image::Fresh,
        write: true,
        size: 4096,
        stride: STRIDE,
        threads: 1,
        count: 4000,
        flush: 32,
        goal: "",
    };
    out.push(flushed);
    // The longest step that qemu-img bench takes is below 2 GiB.
    let wide = Case {
        name: "write, fresh image of 100 GiB",
        image: Image::Wide,
        write: true,
        size: 4096,
        stride: 317_383 * 4096,
        threads: 1,
        count: 20_000,
        flush: 0,
        goal: "",
    };
    out.extend([1, 4].map(|threads| Case {
        threads,
        goal: if threads == 1 { "goal 1 of QEMU's" } else { "" },
        ..wide
    }));
    out
}

pub fn run(b: &Bench) {
    if !Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success()) {
        println!("(no qemu-img: no qcow2 bench)");
        return;
    }
    let rounds = b.rounds.min(5);
    for image in [Image::Full, Image::Prealloc, Image::Fresh, Image::Wide] {
        for case in cases().iter().filter(|c| c.image == image) {
            let (mut raw, mut qcow2, mut qemu) = (vec![], vec![], vec![]);
            let fixed = |format| (!image.is_new()).then(|| make(b, format, image));
            let (fixed_raw, fixed_qcow2) = (fixed("raw"), fixed("qcow2"));
            let path =
                |fixed: &Option<PathBuf>, format| fixed.clone().unwrap_or_else(|| make(b, format, image));
            // the first round warms the page cache and is not counted
            for round in 0..=rounds {
                let costs = (
                    ours("raw", &path(&fixed_raw, "raw"), case),
                    ours("qcow2", &path(&fixed_qcow2, "qcow2"), case),
                    theirs(&path(&fixed_qcow2, "qcow2"), case),
                );
                if round > 0 {
                    raw.push(costs.0);
                    qcow2.push(costs.1);
                    qemu.extend(costs.2);
                }
            }
            let pick = |v: &[Cost], f: fn(&Cost) -> f64| median(&mut v.iter().map(f).collect::<Vec<_>>());
            let what = format!("{}, depth {}", case.name, case.threads);
            let sides = [("raw", &raw, case.goal), ("qemu-img bench", &qemu, "")];
            for (peer, theirs, goal) in sides.into_iter().filter(|s| !s.1.is_empty()) {
                report(&what, "us", pick(&qcow2, |c| c.0), peer, pick(theirs, |c| c.0), goal);
                report(&what, "us CPU", pick(&qcow2, |c| c.1), peer, pick(theirs, |c| c.1), goal);
            }
        }
    }
}
