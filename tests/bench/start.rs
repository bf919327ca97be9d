//! From exec to the guest's first byte, and to the end of the process, of a VM of 128 MiB.

use crate::util::{Bench, median, net, report, vm};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// (milliseconds to the first byte, milliseconds to the reaped exit)
fn once(mut command: Command) -> (f64, f64) {
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().expect("spawn");
    let mut out = child.stdout.take().expect("piped");
    let n = out.read(&mut [0]).expect("read");
    let first = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!(n, 1, "{command:?} ended without a byte");
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).expect("read");
    child.wait().expect("wait");
    (first, start.elapsed().as_secs_f64() * 1e3)
}

pub fn run(b: &Bench) {
    let disk = b.dir.join("start.raw");
    std::fs::File::create(&disk).and_then(|f| f.set_len(16 << 20)).expect("disk");
    let bare = b.config("start.toml", &b.least_vm());
    let tiny = b.config("start-tiny.toml", &vm("first"));
    let with = b.config(
        "start-disk.toml",
        &(b.least_vm() + &format!("[[drive]]\nif = \"virtio\"\nformat = \"raw\"\nfile = {disk:?}\n[[device]]\ndriver = \"virtio-rng-pci\"\n") + &net(0)),
    );
    let floor = || {
        let mut c = Command::new(&b.floor);
        c.arg("128");
        c
    };
    let (mut ours, mut tinies, mut disks, mut least, mut qemu) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..b.rounds {
        least.push(once(floor()));
        ours.push(once(b.minivmm(&bare)));
        disks.push(once(b.minivmm(&with)));
        tinies.push(once(b.minivmm(&tiny)));
        if b.qemu {
            qemu.push(once(b.qemu_microvm("first", &[])));
        }
    }
    let first = |v: &[(f64, f64)]| median(&mut v.iter().map(|x| x.0).collect::<Vec<_>>());
    let whole = |v: &[(f64, f64)]| median(&mut v.iter().map(|x| x.1).collect::<Vec<_>>());
    report("exec to first byte", "ms", first(&ours), "floor", first(&least), "goal <= 1.8");
    report("exec to first byte, disk, rng, net", "ms", first(&disks), "floor", first(&least), "");
    report("exec to exit", "ms", whole(&ours), "floor", whole(&least), "goal <= 2");
    report("exec to exit, disk, rng, net", "ms", whole(&disks), "floor", whole(&least), "");
    report("exec to first byte, tiny guest", "ms", first(&tinies), "floor", first(&least), "");
    report("exec to exit, tiny guest", "ms", whole(&tinies), "floor", whole(&least), "");
    if b.qemu {
        report(
            "exec to first byte, tiny guest",
            "ms",
            first(&tinies),
            "QEMU microvm",
            first(&qemu),
            "goal <= 0.15",
        );
    }
}
