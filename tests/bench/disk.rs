//! virtio-blk: requests per second and host CPU per request, from the tiny guest's polling driver, on cached images.
//!
//! The guest says `start` and `end` on the console around its loop; the host takes the time between them, and the CPU time
//! of all threads but the vCPUs' (a polling vCPU is always busy).

use crate::util::{Bench, median, report, vm};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const COUNT: u32 = 10_000;

/// Seconds of CPU of all threads of `pid` that are no vCPU.
fn cpu(pid: u32) -> f64 {
    let mut total = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("task").flatten() {
        let Ok(name) = std::fs::read_to_string(task.path().join("comm")) else { continue };
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            continue;
        }
        // nanoseconds on the CPU (Documentation/scheduler/sched-stats.rst)
        if let Ok(s) = std::fs::read_to_string(task.path().join("schedstat")) {
            total += s.split(' ').next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) / 1e9;
        }
    }
    total
}

/// (requests per second, microseconds of CPU per request)
fn once(mut command: Command) -> Option<(f64, f64)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let found = (|| {
        lines.by_ref().find(|l| l.contains("start"))?;
        let (begin, before) = (Instant::now(), cpu(child.id()));
        lines.by_ref().find(|l| l.contains("end"))?;
        let (time, used) = (begin.elapsed().as_secs_f64(), cpu(child.id()) - before);
        Some((f64::from(COUNT) / time, used / f64::from(COUNT) * 1e6))
    })();
    let _ = child.kill();
    let _ = child.wait();
    found
}

fn image(path: &Path, format: &str) -> bool {
    let mut c = Command::new("qemu-img");
    c.args(["create", "-q", "-f", format, "-o"]).arg(if format == "raw" {
        "preallocation=full"
    } else {
        "preallocation=metadata"
    });
    c.arg(path).arg("64M").status().is_ok_and(|s| s.success())
}

pub fn run(b: &Bench) {
    for format in ["raw", "qcow2"] {
        let disk = b.dir.join(format!("disk.{format}"));
        if !image(&disk, format) {
            println!("(no qemu-img: no disk bench)");
            return;
        }
        for depth in [1, 32] {
            for op in ["read", "write"] {
                let cmdline = format!("blkbench op={op} depth={depth} count={COUNT}");
                let text = vm(&cmdline)
                    + &format!("[[drive]]\nif = \"virtio\"\nformat = \"{format}\"\nfile = {disk:?}\n");
                let config = b.config("disk.toml", &text);
                let drive = format!("if=none,id=d,format={format},file={}", disk.display());
                let (mut ours, mut theirs) = (vec![], vec![]);
                for _ in 0..3 {
                    ours.extend(once(b.minivmm(&config)));
                    if b.qemu {
                        let more = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"];
                        theirs.extend(once(b.qemu_q35(&cmdline, &more)));
                    }
                }
                let what = format!("{format} {op} 4 KiB, depth {depth}");
                let pick = |v: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| {
                    median(&mut v.iter().map(f).collect::<Vec<_>>())
                };
                if ours.is_empty() {
                    println!("{what}: the guest did not finish");
                } else if theirs.is_empty() {
                    println!(
                        "{what:34} {:9.0} req/s {:6.2} us CPU/req",
                        pick(&ours, |x| x.0),
                        pick(&ours, |x| x.1)
                    );
                } else {
                    report(&what, "req/s", pick(&ours, |x| x.0), "QEMU q35", pick(&theirs, |x| x.0), "");
                    report(&what, "us CPU", pick(&ours, |x| x.1), "QEMU q35", pick(&theirs, |x| x.1), "");
                }
            }
        }
    }
}
