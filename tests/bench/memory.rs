//! Private memory of a halted VM beyond its guest's 128 MiB.

use crate::util::{Bench, median, report, vm};
use std::io::Read;
use std::process::{Command, Stdio};

/// KiB of Private_Clean and Private_Dirty over all mappings but the guest's RAM.
fn private_kib(pid: u32, ram_kib: u64) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut total, mut is_ram, mut seen_ram) = (0, false, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next().and_then(|v| v.parse::<u64>().ok())) else {
            continue;
        };
        match (key, value) {
            ("Size:", Some(size)) => {
                is_ram = !seen_ram && size >= ram_kib && size < 2 * ram_kib;
                seen_ram |= is_ram;
            }
            ("Private_Clean:" | "Private_Dirty:", Some(n)) if !is_ram => total += n,
            _ => {}
        }
    }
    assert!(seen_ram, "no mapping of {ram_kib} KiB: where is the guest's RAM?");
    total as f64
}

fn once(mut command: Command) -> f64 {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
    let n = child.stdout.as_mut().expect("piped").read(&mut [0]).expect("read");
    assert_eq!(n, 1, "{command:?} ended without a byte");
    std::thread::sleep(std::time::Duration::from_millis(100));
    let kib = private_kib(child.id(), 128 << 10);
    child.kill().expect("kill");
    child.wait().expect("wait");
    kib
}

pub fn run(b: &Bench) {
    let disk = b.dir.join("memory.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("1G").status();
    let bare = b.config("memory.toml", &vm("halt"));
    let socket = b.dir.join("memory.qmp");
    let with = b.config(
        "memory-disk.toml",
        &(vm("halt") + &format!("[[qmp]]\nsocket = {socket:?}\n[[drive]]\nif = \"virtio\"\nformat = \"qcow2\"\nfile = {disk:?}\n")),
    );
    let of = |f: &dyn Fn() -> Command| median(&mut (0..5).map(|_| once(f())).collect::<Vec<_>>());
    let least = of(&|| {
        let mut c = Command::new(&b.floor);
        c.args(["128", "halt"]);
        c
    });
    report("private memory, bare", "KiB", of(&|| b.minivmm(&bare)), "floor", least, "goal <= 700 KiB");
    if made.is_ok_and(|s| s.success()) {
        report("private memory, qcow2 disk and QMP", "KiB", of(&|| b.minivmm(&with)), "floor", least, "");
    }
    if b.qemu {
        let qemu = of(&|| b.qemu_microvm("halt", &[]));
        report("private memory, bare", "KiB", of(&|| b.minivmm(&bare)), "QEMU microvm", qemu, "");
    }
}
