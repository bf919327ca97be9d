//! A hundred VMs, four at a time, each from exec to exit: VMs per second.

use crate::util::{Bench, median, report, vm};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

fn fleet(make: impl Fn() -> Command + Sync) -> f64 {
    let left = AtomicUsize::new(100);
    let start = Instant::now();
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
    100.0 / start.elapsed().as_secs_f64()
}

pub fn run(b: &Bench) {
    let config = b.config("fleet.toml", &vm("first"));
    let (mut ours, mut least) = (vec![], vec![]);
    for _ in 0..5 {
        least.push(fleet(|| {
            let mut c = Command::new(&b.floor);
            c.arg("128");
            c
        }));
        ours.push(fleet(|| b.minivmm(&config)));
    }
    report("fleet of 100", "VMs/s", median(&mut ours), "floor", median(&mut least), "goal >= 0.8");
}
