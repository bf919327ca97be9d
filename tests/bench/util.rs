//! What the benches share: the programs, their configs, medians and ratios.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The programs under test and a scratch directory that goes away.
pub struct Bench {
    pub rounds: usize,
    /// Rows whose names have this are wanted.
    only: String,
    /// Bytes of data in the images of jobs.
    pub size: u64,
    pub dir: PathBuf,
    pub floor: PathBuf,
    pub qemu: bool,
}

impl Bench {
    pub fn new(rounds: usize, only: String, mib: u64) -> Bench {
        let dir = std::env::temp_dir().join(format!("minivmm-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("scratch directory");
        let floor = dir.join("floor");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/floor.c");
        let built = Command::new("gcc").args(["-O2", "-o"]).arg(&floor).arg(source).status();
        assert!(built.is_ok_and(|s| s.success()), "gcc cannot build floor.c (apt-get install gcc)");
        let qemu = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_ok();
        if !qemu {
            println!("(no qemu-system-x86_64: its columns are left out)");
        }
        Bench { rounds, only, size: mib << 20, dir, floor, qemu }
    }

    /// Whether rows of that name were asked for (`only=TEXT`).
    pub fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// A config of `text` in the scratch directory.
    pub fn config(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, text).expect("config");
        path
    }

    /// The tables of a VM that does what the floor program's guest does.
    pub fn least_vm(&self) -> String {
        let kernel = self.dir.join("least.elf");
        fs::write(&kernel, least_guest()).expect("guest");
        let tiny = guest().display().to_string();
        vm("").replace(&tiny, &kernel.display().to_string())
    }

    /// minivmm with `config`.
    pub fn minivmm(&self, config: &Path) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_minivmm"));
        c.arg(config).stdin(Stdio::null());
        c
    }

    /// QEMU's smallest x86 machine with the tiny guest.
    pub fn qemu_microvm(&self, cmdline: &str, more: &[&str]) -> Command {
        self.qemu("microvm,acpi=off", cmdline, more)
    }

    /// QEMU's machine with PCI: microvm has it only together with ACPI and a firmware that assigns no addresses.
    pub fn qemu_q35(&self, cmdline: &str, more: &[&str]) -> Command {
        self.qemu("q35", cmdline, more)
    }

    fn qemu(&self, machine: &str, cmdline: &str, more: &[&str]) -> Command {
        let mut c = Command::new("qemu-system-x86_64");
        // A paravirtual KVM offers IA32_ARCH_CAPABILITIES, but lets no one set it; QEMU ends there.
        c.args([
            "-M",
            machine,
            "-accel",
            "kvm",
            "-cpu",
            "host,-arch-capabilities",
            "-m",
            "128",
            "-nodefaults",
        ]);
        c.args(["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"]);
        c.arg(guest()).args(["-append", cmdline]).args(more).stdin(Stdio::null());
        c
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The tiny guest.
pub fn guest() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/guest/guest.elf")
}

/// The floor's guest as a kernel: an ELF file whose 64-bit entry prints one byte on COM1 and switches
/// the machine off. The tiny guest does more before and after its byte, which is not the VMM's doing.
fn least_guest() -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 56;
    let code = [
        0xb0, 0x41, 0x66, 0xba, 0xf8, 0x03, 0xee, // mov $'A',%al; mov $0x3f8,%dx; out %al,%dx
        0xb0, 0x34, 0x66, 0xba, 0x00, 0x06,
        0xee, // mov $S5,%al; mov $0x600,%dx; out %al,%dx: sleep control
        0xf4, 0xeb, 0xfd, // hlt; jmp back
    ];
    // ELF-64 little-endian executable for x86-64, one program header: the file as it is, readable and
    // executable, so that its code lies at ENTRY.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for n in [2u16, 62, 1, 0] {
        file.extend(n.to_le_bytes());
    }
    for n in [ENTRY, 64, 0] {
        file.extend(n.to_le_bytes());
    }
    for n in [0u16, 0, 64, 56, 1, 0, 0, 0] {
        file.extend(n.to_le_bytes());
    }
    let len = code.len() as u64;
    for n in [5 << 32 | 1u64, HEADERS, ENTRY, ENTRY, len, len, 1] {
        file.extend(n.to_le_bytes());
    }
    file.extend(code);
    file
}

/// The tables every VM config of the benches starts with.
pub fn vm(cmdline: &str) -> String {
    format!(
        "[machine]\nmemory = \"128M\"\n[boot]\nkernel = {:?}\ncmdline = {cmdline:?}\n[[serial]]\nstdio = true\n",
        guest().display().to_string()
    )
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One line: what, ours, theirs, the ratio, and the goal.
pub fn report(what: &str, unit: &str, ours: f64, peer: &str, theirs: f64, goal: &str) {
    println!("{what:34} {ours:9.2} {unit:6} {peer:14} {theirs:9.2}  ratio {:5.2}  {goal}", ours / theirs);
}

/// As [`report`], for a goal that is a number: the ratio is to be at most (or, `at_least`, at least) that.
pub fn judge(what: &str, unit: &str, ours: f64, peer: &str, theirs: f64, (goal, at_least): (f64, bool)) {
    let ratio = ours / theirs;
    let met = if at_least { ratio >= goal } else { ratio <= goal };
    let sign = if at_least { ">=" } else { "<=" };
    let verdict = if met { "met" } else { "MISSED" };
    report(what, unit, ours, peer, theirs, &format!("goal {sign} {goal:.2}: {verdict}"));
}

/// A network card on a tap of its own, for root, who may make one; for others nothing.
pub fn net(n: usize) -> String {
    let root = std::fs::read_to_string("/proc/self/status").is_ok_and(|s| s.contains("\nUid:\t0\t0\t"));
    if !root {
        println!("(not root: no network card in what is called net)");
        return String::new();
    }
    format!(
        "[[netdev]]\ntype = \"tap\"\nid = \"n0\"\nifname = \"mvbench{n}\"\n\
         [[device]]\ndriver = \"virtio-net-pci\"\nnetdev = \"n0\"\n"
    )
}
