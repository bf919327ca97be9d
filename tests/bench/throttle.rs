//! Limits of drives, as `block_set_io_throttle` sets them: what requests get of them over ten seconds, on disks that are
//! as fast as can be, after a second in which the burst at the start is used up. Goal: between 0.95 and 1.05 of every
//! limit; of a group each of two drives that both want more gets half, whatever their numbers of requests are. There is
//! no peer: the limit is what it is compared with.

use crate::util::Bench;
use minivmm::block::driver::Flags;
use minivmm::block::handle::Handle;
use minivmm::control::vm::{Settings, Vm};
use minivmm::qmp::fds::Conn;
use minivmm::qmp::schema::{self, Cx};
use minivmm::sys::iov::{Iov, IovMut};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WARM: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(10);

/// What some threads of a guest do: on which drive, how, and how long a request is in bytes.
struct Load {
    drive: usize,
    write: bool,
    bytes: usize,
    threads: usize,
}

fn object(v: Value) -> Map<String, Value> {
    v.as_object().expect("an object").clone()
}

fn limit(vm: &mut Vm, drive: usize, limits: &Value) {
    let mut args =
        object(json!({"device": format!("d{drive}"), "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0,
                                 "iops_rd": 0, "iops_wr": 0}));
    args.extend(object(limits.clone()));
    let done = schema::execute(&mut Cx { vm, conn: &mut Conn::new() }, "block_set_io_throttle", args);
    done.unwrap_or_else(|e| panic!("{limits}: {e}"));
}

fn request(handle: &Handle, load: &Load, buffer: &mut [u8]) {
    let done = match load.write {
        true => handle.write(0, &Iov::from_slice(buffer), Flags::NONE),
        false => handle.read(0, &mut IovMut::from_slice(buffer)),
    };
    done.expect("a null device fails nothing");
}

/// Requests per second of each load.
fn measure(vm: &mut Vm, loads: &[Load]) -> Vec<f64> {
    let handles: Vec<Arc<Handle>> = loads
        .iter()
        .map(|l| vm.drives.find(&format!("d{}", l.drive)).expect("it is there").handle.clone())
        .collect();
    let counts: Vec<AtomicU64> = loads.iter().map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for ((load, handle), count) in loads.iter().zip(&handles).zip(&counts) {
            for _ in 0..load.threads {
                s.spawn(|| {
                    let mut buffer = vec![0; load.bytes];
                    while !stop.load(Ordering::Relaxed) {
                        request(handle, load, &mut buffer);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        let now = || counts.iter().map(|c| c.load(Ordering::Relaxed)).collect::<Vec<_>>();
        std::thread::sleep(WARM);
        let (start, before) = (Instant::now(), now());
        std::thread::sleep(TIME);
        let (time, after) = (start.elapsed().as_secs_f64(), now());
        stop.store(true, Ordering::Relaxed);
        // Whoever waits goes on.
        (0..2).for_each(|drive| limit(vm, drive, &json!({})));
        before.iter().zip(after).map(|(b, a)| (a - b) as f64 / time).collect()
    })
}

/// One line a limit: what it was, what there was.
fn report(what: &str, unit: &str, got: f64, limit: f64) {
    let ratio = got / limit;
    let verdict = if (0.95..=1.05).contains(&ratio) { "" } else { "  MISSED" };
    println!("{what:44} {got:12.1} of {limit:12.1} {unit:8} ratio {ratio:5.3}{verdict}");
}

pub fn run(_: &Bench) {
    let mut vm = Vm::new(Settings::default()).expect("a VM without a machine");
    for n in 0..2 {
        vm.add_drive(object(
            json!({"id": format!("d{n}"), "if": "none", "format": "null-co", "size": 1 << 30}),
        ))
        .expect("a drive");
    }
    let load = |drive, write, bytes, threads| Load { drive, write, bytes, threads };
    for (bytes, bps) in [(4096, 4.0e6), (65536, 200.0e6)] {
        limit(&mut vm, 0, &json!({"bps": bps as u64}));
        let got = measure(&mut vm, &[load(0, false, bytes, 2), load(0, true, bytes, 2)]);
        report(
            &format!("bps, reads and writes of {bytes}"),
            "bytes/s",
            (got[0] + got[1]) * bytes as f64,
            bps,
        );
    }
    limit(&mut vm, 0, &json!({"iops": 500}));
    let got = measure(&mut vm, &[load(0, false, 4096, 1), load(0, true, 512, 3)]);
    report("iops, reads and writes", "ops/s", got[0] + got[1], 500.0);
    limit(&mut vm, 0, &json!({"iops_rd": 300, "bps_wr": 2_000_000, "bps_rd": 50_000_000}));
    let got = measure(&mut vm, &[load(0, false, 4096, 2), load(0, true, 8192, 2)]);
    report("several: iops_rd, and bps_rd out of reach", "ops/s", got[0], 300.0);
    report("several: bps_wr", "bytes/s", got[1] * 8192.0, 2.0e6);
    limit(&mut vm, 0, &json!({"iops": 1000, "bps": 2_000_000}));
    let got = measure(&mut vm, &[load(0, false, 8192, 2), load(0, true, 8192, 2)]);
    report("several: bps, and iops out of reach", "bytes/s", (got[0] + got[1]) * 8192.0, 2.0e6);
    limit(&mut vm, 0, &json!({"iops": 200, "iops_size": 4096}));
    let got = measure(&mut vm, &[load(0, true, 16384, 2)]);
    report("iops_size 4096, writes of 16384", "ops/s", got[0], 50.0);
    limit(&mut vm, 0, &json!({"bps": 1_000_000, "bps_max": 5_000_000, "bps_max_length": 1}));
    let got = measure(&mut vm, &[load(0, true, 65536, 4)]);
    // The bucket of a burst holds five seconds' worth, and takes as long to fill: a second of it is the warming up.
    println!("bps 1 MB/s after a burst of up to 5 MB: {:.1} bytes/s in 10 s", got[0] * 65536.0);
    for drive in 0..2 {
        limit(&mut vm, drive, &json!({"iops": 400, "group": "both"}));
    }
    let got = measure(&mut vm, &[load(0, true, 512, 6), load(1, false, 512, 1)]);
    report("a group: all of it", "ops/s", got[0] + got[1], 400.0);
    report("a group: the drive with six requests", "ops/s", got[0], 200.0);
    report("a group: the drive with one", "ops/s", got[1], 200.0);
    vm.shut_down().expect("nothing to write");
}
