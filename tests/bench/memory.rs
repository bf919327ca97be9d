//! Memory of a halted VM beyond its guest's 128 MiB.
//!
//! Measured while a second VM of the same program runs, as in a fleet: pages of the program and its
//! libraries are shared then, and only what a VM really adds is private. Pss shares them out by two.

use crate::util::{Bench, median, net, report, vm};
use std::io::Read;
use std::process::{Child, Command, Stdio};

const RAM_KIB: u64 = 128 << 10;

/// A VM that has printed its byte and halted; killed when dropped.
struct Halted(Child);

impl Halted {
    fn new(mut command: Command) -> Halted {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
        let n = child.stdout.as_mut().expect("piped").read(&mut [0]).expect("read");
        let halted = Halted(child);
        assert_eq!(n, 1, "{command:?} ended without a byte");
        std::thread::sleep(std::time::Duration::from_millis(100));
        halted
    }

    /// KiB: private (clean and dirty), and proportional, of all mappings but the guest's RAM; page tables.
    fn kib(&self) -> (f64, f64, f64) {
        let proc = format!("/proc/{}", self.0.id());
        let text = std::fs::read_to_string(format!("{proc}/smaps")).expect("smaps");
        let (mut private, mut pss, mut is_ram, mut rams, mut anonymous) = (0, 0, false, 0, false);
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let value = words.get(1).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
            match words[0] {
                // The mapping's size is that of RAM to the page: its flags (no reserve, huge pages or
                // none) keep the kernel from merging it with a neighbour.
                "Size:" => {
                    is_ram = anonymous && value == RAM_KIB;
                    rams += u32::from(is_ram);
                }
                "Private_Clean:" | "Private_Dirty:" if !is_ram => private += value,
                "Pss:" if !is_ram => pss += value,
                // start-end flags offset device inode [name]
                range if range.contains('-') => anonymous = words.get(4) == Some(&"0"),
                _ => {}
            }
        }
        assert_eq!(rams, 1, "mappings of {RAM_KIB} KiB: which is the guest's RAM?");
        let status = std::fs::read_to_string(format!("{proc}/status")).expect("status");
        let tables = status.lines().find_map(|l| l.strip_prefix("VmPTE:")?.trim().strip_suffix(" kB"));
        (private as f64, pss as f64, tables.and_then(|n| n.trim().parse().ok()).unwrap_or(0.0))
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Medians of [`Halted::kib`], with `other` alive beside it.
fn of(other: &dyn Fn() -> Command, one: &dyn Fn() -> Command) -> (f64, f64, f64) {
    let _other = Halted::new(other());
    let all: Vec<_> = (0..5).map(|_| Halted::new(one()).kib()).collect();
    let pick = |f: fn(&(f64, f64, f64)) -> f64| median(&mut all.iter().map(f).collect::<Vec<_>>());
    (pick(|x| x.0), pick(|x| x.1), pick(|x| x.2))
}

fn print(what: &str, ours: (f64, f64, f64), peer: &str, theirs: (f64, f64, f64), goal: &str) {
    report(&format!("private memory, {what}"), "KiB", ours.0, peer, theirs.0, goal);
    report(&format!("proportional, {what}"), "KiB", ours.1, peer, theirs.1, "");
    report(&format!("page tables, {what}"), "KiB", ours.2, peer, theirs.2, "");
}

pub fn run(b: &Bench) {
    let bare = b.config("memory.toml", &vm("halt"));
    // Two, each with its own disk and socket.
    let mut made = true;
    let with = [0, 1].map(|n| {
        let disk = b.dir.join(format!("memory{n}.qcow2"));
        let create =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("1G").status();
        made &= create.is_ok_and(|s| s.success());
        let socket = b.dir.join(format!("memory{n}.qmp"));
        let tables = format!(
            "[[qmp]]\nsocket = {socket:?}\n[[drive]]\nif = \"virtio\"\nformat = \"qcow2\"\nfile = {disk:?}\n"
        );
        b.config(&format!("memory{n}.toml"), &(vm("halt") + &tables + &net(n)))
    });
    let floor = || {
        let mut c = Command::new(&b.floor);
        c.args(["128", "halt"]);
        c
    };
    let plain = || b.minivmm(&bare);
    let (ours, least) = (of(&plain, &plain), of(&floor, &floor));
    print("bare", ours, "floor", least, "goal <= 700 KiB");
    if made {
        let full = of(&|| b.minivmm(&with[0]), &|| b.minivmm(&with[1]));
        print("qcow2 disk, QMP, net", full, "floor", least, "");
    }
    if b.qemu {
        let qemu = || b.qemu_microvm("halt", &[]);
        print("bare", ours, "QEMU microvm", of(&qemu, &qemu), "");
    }
}
