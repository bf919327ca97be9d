//! A hundred VMs, four at a time, each from exec to exit: VMs per second, and CPU time of each.

use crate::util::{Bench, median, report};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Milliseconds of CPU time of all children that have ended.
fn children() -> f64 {
    // proc_pid_stat(5): cutime and cstime are fields 16 and 17, in ticks of 10 ms; behind the name in
    // parentheses they are the 14th and 15th.
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    let fields = stat.rsplit(')').next().expect("stat").split_whitespace();
    fields.skip(13).take(2).map(|n| n.parse::<f64>().expect("ticks") * 10.0).sum()
}

/// (VMs per second, milliseconds of CPU time per VM)
fn fleet(make: impl Fn() -> Command + Sync) -> (f64, f64) {
    let left = AtomicUsize::new(100);
    let (start, before) = (Instant::now(), children());
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                    let status = make().stdout(Stdio::null()).stderr(Stdio::null()).status().expect("spawn");
                    assert!(status.success(), "{status}");
                }
            });
        }
    });
    (100.0 / start.elapsed().as_secs_f64(), (children() - before) / 100.0)
}

pub fn run(b: &Bench) {
    let config = b.config("fleet.toml", &b.least_vm());
    let (mut ours, mut least) = (vec![], vec![]);
    for _ in 0..5 {
        least.push(fleet(|| {
            let mut c = Command::new(&b.floor);
            c.arg("128");
            c
        }));
        ours.push(fleet(|| b.minivmm(&config)));
    }
    let pick = |v: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| median(&mut v.iter().map(f).collect::<Vec<_>>());
    report("fleet of 100", "VMs/s", pick(&ours, |x| x.0), "floor", pick(&least, |x| x.0), "goal >= 0.8");
    report("fleet of 100", "ms CPU", pick(&ours, |x| x.1), "floor", pick(&least, |x| x.1), "");
}
