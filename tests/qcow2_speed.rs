//! The speed of the qcow2 driver beside the raw file, in this process, through the same nodes:
//! `cargo test --release --test qcow2_speed -- --ignored --nocapture`.

use minivmm::block::driver::Flags;
use minivmm::block::graph::Graph;
use minivmm::block::node::Node;
use minivmm::block::open;
use minivmm::control::formats::{BlockdevOptions, Formats, plan};
use minivmm::qapi::{Path, Wire};
use minivmm::qcow2::create::{CreateOptions, create};
use minivmm::sys::fdset::FdSets;
use minivmm::sys::iov::{Iov, IovMut};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 30;

fn cpu() -> Duration {
    // /proc has it in ticks of 10 ms, which is enough for a second of work.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

struct Rng(u64);
impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
    }
}

/// Time and CPU per request of `n` requests on each of `threads` threads.
fn run(name: &str, threads: u64, n: u64, f: impl Fn(u64, u64) + Sync) -> f64 {
    let (began, cpu0) = (Instant::now(), cpu());
    std::thread::scope(|s| {
        for t in 0..threads {
            let f = &f;
            s.spawn(move || (0..n).for_each(|i| f(t, i)));
        }
    });
    let all = (n * threads) as f64;
    let us = began.elapsed().as_secs_f64() * 1e6 / all;
    let cpu = (cpu() - cpu0).as_secs_f64() * 1e6 / all;
    println!("{name:44} {us:8.2} µs/request {cpu:8.2} µs CPU");
    us
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let dir = std::env::var("BENCH_DIR").unwrap_or_else(|_| "/tmp".into());
    let raw = format!("{dir}/speed-{}.raw", std::process::id());
    let image = format!("{dir}/speed-{}.qcow2", std::process::id());
    std::fs::File::create(&raw).unwrap();
    std::fs::File::create(&image).unwrap();
    let mut graph = Graph::new();
    let mut fds = FdSets::default();
    let formats = Formats::new(&mut fds);
    let mut add = |v: serde_json::Value| -> Arc<Node> {
        let options = BlockdevOptions::take(v, &Path::Root).unwrap();
        open::add(&mut graph, &formats, plan(options).unwrap()).unwrap()
    };
    let file = add(json!({"driver": "file", "filename": raw, "node-name": "r"}));
    let under = add(json!({"driver": "file", "filename": image, "node-name": "q"}));
    let blank = || create(&under, None, &CreateOptions { size: SIZE, ..CreateOptions::default() }).unwrap();
    blank();
    file.resize(SIZE).unwrap();
    let qcow2 = add(json!({"driver": "qcow2", "file": "q", "node-name": "img"}));
    let block = vec![7u8; 4096];
    let big = vec![9u8; 1 << 20];
    let write =
        |node: &Node, off: u64, data: &[u8]| node.write(off, &Iov::from_slice(data), Flags::NONE).unwrap();
    let pairs = [("raw", &file), ("qcow2", &qcow2)];
    let spread = |t: u64, i: u64| {
        let mut rng = Rng((t * 1_000_003 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        rng.below(SIZE / 4096) * 4096
    };
    for (name, node) in pairs {
        run(&format!("{name}: allocating write, 4 KiB random"), 1, 8000, |t, i| {
            write(node, spread(t, i), &block)
        });
    }
    // On another image, so that its clusters lie in order.
    let (raw2, image2) = (format!("{raw}.seq"), format!("{image}.seq"));
    std::fs::File::create(&raw2).unwrap();
    std::fs::File::create(&image2).unwrap();
    let file2 = add(json!({"driver": "file", "filename": raw2, "node-name": "r2"}));
    let under2 = add(json!({"driver": "file", "filename": image2, "node-name": "q2"}));
    create(&under2, None, &CreateOptions { size: SIZE, ..CreateOptions::default() }).unwrap();
    file2.resize(SIZE).unwrap();
    let second = add(json!({"driver": "qcow2", "file": "q2", "node-name": "img2"}));
    for (name, node) in [("raw", &file2), ("qcow2", &second)] {
        run(&format!("{name}: sequential write, 1 MiB, new"), 1, 512, |_, i| write(node, i << 20, &big));
        run(&format!("{name}: sequential write, 1 MiB, again"), 1, 512, |_, i| write(node, i << 20, &big));
        run(&format!("{name}: sequential read, 1 MiB, in order"), 1, 512, |_, i| {
            let mut buf = vec![0u8; 1 << 20];
            node.read(i << 20, &mut IovMut::from_slice(&mut buf)).unwrap();
        });
    }
    for (name, node) in pairs {
        run(&format!("{name}: sequential write, 1 MiB"), 1, 1024, |_, i| write(node, i << 20, &big));
    }
    for threads in [1, 4] {
        for (name, node) in pairs {
            run(
                &format!("{name}: in-place write, 4 KiB random, {threads}"),
                threads,
                100_000 / threads,
                |t, i| write(node, spread(t, i), &block),
            );
        }
        for (name, node) in pairs {
            run(&format!("{name}: read, 4 KiB random, {threads}"), threads, 200_000 / threads, |t, i| {
                let mut buf = [0u8; 4096];
                node.read(spread(t, i), &mut IovMut::from_slice(&mut buf)).unwrap();
            });
        }
    }
    for (name, node) in pairs {
        run(&format!("{name}: sequential read, 1 MiB"), 1, 1024, |_, i| {
            let mut buf = vec![0u8; 1 << 20];
            node.read(i << 20, &mut IovMut::from_slice(&mut buf)).unwrap();
        });
    }
    for (name, node) in pairs {
        run(&format!("{name}: write 4 KiB, flush each 32"), 1, 2000, |t, i| {
            write(node, spread(t, i), &block);
            if i % 32 == 31 {
                node.flush().unwrap();
            }
        });
    }
    for path in [raw, image, raw2, image2] {
        std::fs::remove_file(path).unwrap();
    }
}
