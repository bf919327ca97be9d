//! The tiny guest in the real binary on /dev/kvm: every device at a fixed place, the console, ways out.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, MINIVMM, Vm, fixtures, guest, have, have_kvm, run};
use serde_json::json;
use std::process::Command;
use std::time::{Duration, Instant};

/// A VM without disk that runs the guest in `mode`.
fn config(mode: &str) -> String {
    format!(
        "[machine]\nmemory = \"16M\"\n[boot]\nkernel = \"@GUEST\"\ncmdline = \"{mode}\"\n[[serial]]\nstdio = true\n"
    )
}

fn runs(mode: &str, expected: &[&str]) {
    if !have_kvm() {
        return;
    }
    let out = Vm::start(&config(mode)).wait_exit(0);
    for text in expected {
        assert!(out.contains(text), "{mode}: no '{text}' in:\n{out}");
    }
}

#[test]
fn the_committed_guest_is_what_its_sources_make() {
    let script = fixtures().join("guest/build.sh");
    let script = script.to_str().unwrap();
    let digest = run("sh", &[script, "--digest"]);
    let elf = std::fs::read(guest()).unwrap();
    let has = |text: &str| elf.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(has(digest.trim()), "the sources have changed: run fixtures/guest/build.sh and commit guest.elf");
    // Another compiler makes another file, which proves nothing.
    if !have("gcc", "gcc") {
        return;
    }
    let version = run("gcc", &["--version"]);
    let version = version.lines().next().unwrap_or_default();
    let made_by = version.trim_start_matches("gcc").trim();
    if !has(&format!("GCC: {made_by}")) {
        eprintln!("skipped: guest.elf was not made by this compiler ({made_by})");
        return;
    }
    let dir = Dir::new();
    let again = dir.join("guest.elf");
    run("sh", &[script, again.to_str().unwrap()]);
    assert!(std::fs::read(again).unwrap() == elf, "built again it is another file");
}

#[test]
fn first_byte_and_power_off() {
    runs("first", &["F"]);
}

#[test]
fn hello_without_a_disk() {
    runs("hello", &["Hello from the tiny guest.\n", "pci 00:0.0 ", "no disk\n"]);
}

#[test]
fn pci_by_ports() {
    runs("cf8", &["pci 00:0.0 "]);
}

#[test]
fn timers() {
    runs("timer", &["10 timer interrupts by "]);
    runs("timer count-down", &["10 timer interrupts by count"]);
    runs("timer xapic", &["10 timer interrupts by "]);
}

#[test]
fn processors() {
    for (cpus, apic) in [(1, ""), (4, ""), (3, " xapic")] {
        if !have_kvm() {
            return;
        }
        let text = config(&format!("smp{apic}")).replace("[boot]", &format!("cpus = {cpus}\n[boot]"));
        let out = Vm::start(&text).wait_exit(0);
        assert!(out.ends_with(&format!("{cpus} processors\n")), "{out}");
    }
}

#[test]
fn the_clock_shows_the_time() {
    if !have_kvm() {
        return;
    }
    let date = |out: &str| out.trim().to_string();
    let before = date(&run("date", &["-u", "+rtc %Y-%m-%d"]));
    let out = Vm::start(&config("rtc")).wait_exit(0);
    let after = date(&run("date", &["-u", "+rtc %Y-%m-%d"]));
    // One-digit numbers are not padded by the guest.
    let day = |s: &str| {
        s.split(' ').nth(1).unwrap_or("").split('-').map(|n| n.parse().unwrap_or(0)).collect::<Vec<u32>>()
    };
    assert!([day(&before), day(&after)].contains(&day(&out)), "{before} or {after}, not {out}");
}

#[test]
fn resets() {
    runs("reset", &["resetting\nback again\n"]);
    runs("crash", &["crashing\nback again\n"]);
}

#[test]
fn a_reset_is_the_end_when_the_policy_says_so() {
    if !have_kvm() {
        return;
    }
    let out = Vm::start(&config("reset").replace("[boot]", "reboot = \"shutdown\"\n[boot]")).wait_exit(0);
    assert_eq!(out, "resetting\n");
}

#[test]
fn the_debug_exit_port_gives_the_exit_status() {
    if !have_kvm() {
        return;
    }
    // Not there without being named.
    Vm::start(&config("exit=3")).wait_exit(0);
    let named = config("exit=3") + "[[device]]\ndriver = \"isa-debug-exit\"\n";
    Vm::start(&named).wait_exit(7);
}

#[test]
fn typed_characters_come_back_by_interrupt() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&config("echo"));
    vm.wait_output("type:\n");
    vm.send(b"hello");
    vm.wait_output("hello");
    // More than a FIFO, and a Ctrl-A for the guest.
    let long: String = (0..3000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    vm.send(format!("\n{long}\x01\x01.\n").as_bytes());
    vm.wait_output(&format!("{long}\x01.\n"));
    vm.send(b"\x04");
    vm.wait_exit(0);
}

#[test]
fn the_end_of_input_is_not_the_end_of_the_vm() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&config("echo"));
    vm.close_input();
    vm.wait_output("type:\n");
    std::thread::sleep(Duration::from_millis(100));
    vm.qmp().ok("quit", json!({}));
    vm.wait_exit(0);
}

#[test]
fn ctrl_a_x_quits_also_a_guest_that_does_not_read() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&config("halt"));
    vm.wait_output("H");
    vm.send(b"who reads this?\x01h\x01x");
    let out = vm.wait_exit(0);
    assert!(out.contains("Ctrl-A x"), "help: {out}");
}

#[test]
fn signals_end_it_in_order() {
    if !have_kvm() {
        return;
    }
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut vm = Vm::start(&config("halt"));
        vm.wait_output("H");
        vm.signal(signal);
        assert_eq!(vm.wait_exit(0), "H");
    }
}

#[test]
fn all_output_is_written_before_the_end() {
    if !have_kvm() {
        return;
    }
    // Nobody reads until the guest has long gone.
    let dir = Dir::new();
    let fifo = dir.join("out");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    let holder = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let text = config("hello").replace("stdio = true", "file = \"@DIR/out\"");
    let mut vm = Vm::start_in(dir, &text);
    let mut out = String::new();
    vm.wait_exit(0);
    drop(vm);
    use std::io::Read;
    let mut buf = [0; 4096];
    let n = (&holder).read(&mut buf).unwrap();
    out.push_str(std::str::from_utf8(&buf[..n]).unwrap());
    assert!(out.starts_with("Hello") && out.ends_with("no disk\n"), "{out}");
}

#[test]
fn pausing_stops_the_guest_and_continuing_goes_on() {
    if !have_kvm() {
        return;
    }
    let vm = Vm::start(&config("spin"));
    vm.wait_output("count ");
    let mut qmp = vm.qmp();
    qmp.ok("stop", json!({}));
    qmp.wait_event("STOP");
    // What the chardev still had in hand.
    std::thread::sleep(Duration::from_millis(100));
    let at = vm.output().len();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(vm.output().len(), at, "it runs on");
    qmp.ok("cont", json!({}));
    qmp.wait_event("RESUME");
    let start = Instant::now();
    while vm.output().len() == at {
        assert!(start.elapsed() < kit::LIMIT, "it does not go on");
        std::thread::sleep(Duration::from_millis(5));
    }
    qmp.ok("quit", json!({}));
}

#[test]
fn the_power_button_reaches_the_guest() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&config("button"));
    vm.wait_output("press the power button\n");
    let mut qmp = vm.qmp();
    qmp.ok("system_powerdown", json!({}));
    qmp.wait_event("POWERDOWN");
    let event = qmp.wait_event("SHUTDOWN");
    assert_eq!(event["data"], json!({"guest": true, "reason": "guest-shutdown"}));
    assert!(vm.wait_exit(0).ends_with("pressed\n"));
}

#[test]
fn system_reset_starts_the_guest_again() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&config("echo"));
    vm.wait_output("type:\n");
    let mut qmp = vm.qmp();
    qmp.ok("system_reset", json!({}));
    qmp.wait_event("RESET");
    vm.wait_output("type:\ntype:\n");
    vm.send(b"ok\x04");
    assert!(vm.wait_exit(0).ends_with("type:\nok"));
}

/// A terminal: the master's end and the slave's path.
fn terminal() -> (std::fs::File, std::fs::File) {
    use std::os::fd::FromRawFd;
    let (mut master, mut slave) = (-1, -1);
    let (name, termios, size) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: openpty fills the two descriptors, which no one else owns.
    unsafe {
        assert_eq!(libc::openpty(&mut master, &mut slave, name, termios, size), 0);
        (std::fs::File::from_raw_fd(master), std::fs::File::from_raw_fd(slave))
    }
}

/// The settings of a terminal, as stty prints them.
fn settings(slave: &std::fs::File) -> String {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", slave.as_raw_fd());
    let path = std::fs::read_link(path).unwrap();
    run("stty", &["-a", "-F", path.to_str().unwrap()])
}

/// A process that does not outlive its test.
struct OnTerminal(std::process::Child);

impl OnTerminal {
    fn kill(&self, signal: i32) {
        run("kill", &[&format!("-{signal}"), &self.0.id().to_string()]);
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(ended) = self.0.try_wait().unwrap() {
                return ended;
            }
            assert!(start.elapsed() < kit::LIMIT, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// minivmm with its console on a terminal, once that is raw.
fn on_terminal(dir: &Dir, slave: &std::fs::File, mode: &str) -> OnTerminal {
    let path = dir.join("config.toml");
    std::fs::write(&path, config(mode).replace("@GUEST", guest().to_str().unwrap())).unwrap();
    let child = Command::new(MINIVMM)
        .arg(&path)
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .spawn()
        .unwrap();
    let child = OnTerminal(child);
    wait_raw(slave);
    child
}

fn wait_raw(slave: &std::fs::File) {
    let start = Instant::now();
    while !settings(slave).contains("-icanon") {
        assert!(start.elapsed() < kit::LIMIT, "never raw");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_stopped_console_is_raw_again_when_it_goes_on() {
    use std::io::Write;
    if !have_kvm() {
        return;
    }
    let (mut master, slave) = terminal();
    let dir = Dir::new();
    let mut child = on_terminal(&dir, &slave, "halt");
    child.kill(libc::SIGSTOP);
    // As a shell does that takes its terminal back.
    use std::os::fd::AsRawFd;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd())).unwrap();
    run("stty", &["-F", path.to_str().unwrap(), "sane"]);
    assert!(!settings(&slave).contains("-icanon"));
    child.kill(libc::SIGCONT);
    wait_raw(&slave);
    master.write_all(b"\x01x").unwrap();
    assert!(child.wait().success());
}

#[test]
fn a_terminal_is_raw_meanwhile_and_itself_again_on_every_way_out() {
    use std::io::Write;
    if !have_kvm() {
        return;
    }
    let ways: [(&str, &str, Option<i32>, Option<i32>); 7] = [
        ("halt", "\x01x", None, Some(0)),
        ("echo", "\x04", None, Some(0)),
        ("halt", "", Some(libc::SIGTERM), Some(0)),
        ("halt", "", Some(libc::SIGHUP), Some(0)),
        ("halt", "", Some(libc::SIGQUIT), None),
        ("halt", "", Some(libc::SIGSEGV), None),
        ("halt", "", Some(libc::SIGABRT), None),
    ];
    for (mode, keys, signal, status) in ways {
        let (mut master, slave) = terminal();
        let before = settings(&slave);
        assert!(before.contains("isig icanon") && !before.contains("-isig"), "{before}");
        let dir = Dir::new();
        let mut child = on_terminal(&dir, &slave, mode);
        std::thread::sleep(Duration::from_millis(50));
        master.write_all(keys.as_bytes()).unwrap();
        if let Some(signal) = signal {
            child.kill(signal);
        }
        let ended = child.wait();
        assert_eq!(ended.code(), status, "{mode} {signal:?}: {ended}");
        assert_eq!(settings(&slave), before, "{mode} {signal:?}");
    }
}

/// A VM with a new disk of `size` in format `format`.
fn with_disk(mode: &str, format: &str, size: &str) -> Option<(Dir, String)> {
    if !have_kvm() || !have("qemu-img", "qemu-utils") {
        return None;
    }
    let dir = Dir::new();
    run("qemu-img", &["create", "-q", "-f", format, dir.join("disk").to_str().unwrap(), size]);
    let drive = format!("[[drive]]\nif = \"virtio\"\nfile = \"@DIR/disk\"\nformat = \"{format}\"\n");
    Some((dir, config(mode) + &drive))
}

#[test]
fn the_first_run_of_the_readme() {
    if !have_kvm() {
        return;
    }
    let image = fixtures().join("hello.qcow2");
    let before = std::fs::read(&image).unwrap();
    let mut command = Command::new(MINIVMM);
    command.arg(fixtures().join("hello.toml"));
    let out = Vm::spawn(Dir::new(), command).wait_exit(0);
    assert!(out.contains("sector 0: This text lies in sector 0 of a qcow2 image.\n"), "{out}");
    assert!(out.ends_with("sector 128: written by the tiny guest: verified\n"), "{out}");
    assert!(std::fs::read(&image).unwrap() == before, "the run has changed the fixture");
}

#[test]
fn what_the_guest_writes_is_in_the_image() {
    for format in ["raw", "qcow2"] {
        let Some((dir, text)) = with_disk("hello", format, "1M") else { return };
        let disk = dir.join("disk");
        let mut vm = Vm::start_in(dir, &text);
        let out = vm.wait_exit(0);
        assert!(out.ends_with("sector 128: written by the tiny guest: verified\n"), "{format}: {out}");
        let disk = disk.to_str().unwrap();
        if format == "qcow2" {
            run("qemu-img", &["check", "-q", disk]);
        }
        let flat = vm.path("flat");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", disk, flat.to_str().unwrap()]);
        let data = std::fs::read(flat).unwrap();
        assert_eq!(data.len(), 1 << 20);
        assert!(data[65536..].starts_with(b"written by the tiny guest\0"), "{format}");
    }
}

#[test]
fn patterns_all_over_a_disk_read_back() {
    for format in ["raw", "qcow2"] {
        let Some((dir, text)) = with_disk("blkverify count=500", format, "9M") else { return };
        let mut vm = Vm::start_in(dir, &text);
        let out = vm.wait_exit(0);
        assert!(out.contains("blkverify: 500 rounds, 0 bad\n"), "{format}: {out}");
        if format == "qcow2" {
            run("qemu-img", &["check", "-q", vm.path("disk").to_str().unwrap()]);
        }
    }
}

#[test]
fn many_requests_in_flight() {
    for (mode, format) in [("depth=32 op=read", "raw"), ("depth=32 op=write", "qcow2"), ("depth=1", "qcow2")]
    {
        let mode = format!("blkbench count=2000 {mode}");
        let Some((dir, text)) = with_disk(&mode, format, "16M") else { return };
        let mut vm = Vm::start_in(dir, &text);
        let out = vm.wait_exit(0);
        assert!(out.contains(": 2000 requests, 0 errors, "), "{mode}: {out}");
    }
}

#[test]
fn a_disk_interrupts_by_message() {
    for apic in ["", " xapic"] {
        let Some((dir, text)) = with_disk(&format!("msix{apic}"), "raw", "1M") else { return };
        assert_eq!(Vm::start_in(dir, &text).wait_exit(0), "10 disk interrupts\n");
    }
}

#[test]
fn random_bytes() {
    if !have_kvm() {
        return;
    }
    let text = config("rng") + "[[device]]\ndriver = \"virtio-rng-pci\"\n";
    let out = Vm::start(&text).wait_exit(0);
    let bytes: Vec<&str> = out.trim().split(' ').collect();
    assert_eq!(bytes[..3], ["32", "random", "bytes:"], "{out}");
    assert!(bytes[3..].iter().any(|b| b != &bytes[3]), "{out}");
}

#[test]
fn a_ping_through_a_tap() {
    if !have_kvm() || !have("unshare", "util-linux") {
        return;
    }
    // A network namespace of its own needs root; so does making the tap.
    let setup = "ip tuntap add dev t0 mode tap && ip addr add 192.0.2.1/24 dev t0 && ip link set t0 up";
    let probe = Command::new("unshare").args(["-n", "sh", "-c", setup]).output().unwrap();
    if !probe.status.success() {
        let why = String::from_utf8_lossy(&probe.stderr).trim().to_string();
        eprintln!("skipped: no tap ({why}): run the tests as root, with iproute2 and /dev/net/tun");
        return;
    }
    let dir = Dir::new();
    let path = dir.join("config.toml");
    let netdev = "[[netdev]]\ntype = \"tap\"\nid = \"n\"\nifname = \"t0\"\nscript = \"no\"\ndownscript = \"no\"\n\
                  [[device]]\ndriver = \"virtio-net-pci\"\nnetdev = \"n\"\n";
    std::fs::write(&path, config("net").replace("@GUEST", guest().to_str().unwrap()) + netdev).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-n", "sh", "-c", &format!("{setup} && exec \"$@\""), "sh", MINIVMM]).arg(path);
    assert_eq!(Vm::spawn(dir, command).wait_exit(0), "ping 1: ok\nping 2: ok\nping 3: ok\n");
}
