//! The configuration as a user meets it: the program, files, messages, exit statuses.
//!
//! Everything here runs with `accel = "none"`: it needs neither /dev/kvm nor root nor a network.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A directory of its own for each test, removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("minivmm-config-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    fn write(&self, name: &str, data: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, data).unwrap();
        path
    }

    /// Names, lengths and contents: what must not change.
    fn state(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().path())
            // Not a FIFO: it would be waited for.
            .map(|p| (p.clone(), if p.is_file() { fs::read(&p).unwrap_or_default() } else { Vec::new() }))
            .collect();
        all.sort();
        all
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn minivmm(dir: &Path, args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_minivmm"))
        .args(args)
        .current_dir(dir)
        .env_remove("MINIVMM_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input closes it.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    Running(child).wait()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// What is wrong, and the beginning of what the user reads.
const BAD: &[(&str, &str)] = &[
    ("x = 1\n", "c.toml:1:5: unknown table 'x' (there are: machine, boot, nbd-server, qmp,"),
    ("[machine]\nname = \n", "c.toml:2:8: not TOML: "),
    ("[machine]\n[machine]\n", "c.toml:2:2: not TOML: duplicate key"),
    (
        "[machine]\n\n  nam = \"x\"\n",
        "c.toml:3:3: [machine] 'nam' is unknown (there are: name, uuid, memory,",
    ),
    ("[machine]\nname = 1\n", "c.toml:2:1: [machine] 'name' must be a string, not 1"),
    (
        "[machine]\nmemory = \"12Q\"\n",
        "c.toml:2:1: [machine] 'memory' must be a number of bytes or a size like",
    ),
    ("[machine]\nmemory = 4096\n", "c.toml:2:1: [machine] 'memory' must be at least 16M"),
    ("[machine]\nmemory = -1\n", "c.toml:2:1: [machine] 'memory' must be"),
    ("[machine]\nuuid = \"x\"\n", "c.toml:2:1: [machine] 'uuid' expects a UUID"),
    ("[machine]\ncpus = 0\n", "c.toml:2:1: [machine] 'cpus' must be a number from 1 to 64, not 0"),
    ("[machine]\ncpus = 65\n", "c.toml:2:1: [machine] 'cpus' must be a number from 1 to 64, not 65"),
    ("[machine]\ncpus = 4\nmax-cpus = 2\n", "c.toml:3:1: [machine] 'max-cpus' must be at least 'cpus' (4)"),
    (
        "[machine]\ncpus = 4\nthreads = 3\n",
        "c.toml:3:1: [machine] 'threads' does not fit: Invalid CPU topology",
    ),
    (
        "[machine]\naccel = \"tcg\"\n",
        "c.toml:2:1: [machine] 'accel' must be \"kvm\" or \"none\", not \"tcg\"",
    ),
    ("[machine]\npaused = \"yes\"\n", "c.toml:2:1: [machine] 'paused' must be true or false, not \"yes\""),
    ("[machine]\nreboot = \"x\"\n", "c.toml:2:1: [machine] 'reboot' must be \"reset\" or \"shutdown\""),
    ("[machine]\nshutdown = \"x\"\n", "c.toml:2:1: [machine] 'shutdown' must be \"poweroff\" or \"pause\""),
    ("[[machine]]\n", "c.toml:1:1: 'machine' must be written as [machine]"),
    ("[drive]\n", "c.toml:1:1: 'drive' must be written as [[drive]]"),
    ("drive = [1]\n", "c.toml:1:10: 'drive' must be written as [[drive]]"),
    ("[boot]\ncmdline = \"x\"\n", "c.toml:1:1: [boot] 'kernel' is missing"),
    ("[boot]\nkernel = \"none\"\n", "c.toml:2:1: [boot] 'kernel' none: No such file or directory"),
    ("[boot]\nkernel = \"text\"\n", "c.toml:2:1: [boot] "),
    ("[boot]\nkernel = \"text\"\ninitrd = \"none\"\n", "c.toml:3:1: [boot] 'initrd' none: No such file"),
    ("[[qmp]]\n", "c.toml:1:1: [[qmp]] needs exactly one of 'socket', 'fd', 'stdio = true' or 'tcp'"),
    ("[[qmp]]\nsocket = \"s\"\nstdio = true\n", "c.toml:1:1: [[qmp]] needs exactly one of"),
    ("[[qmp]]\nfd = 77\n", "c.toml:2:1: [[qmp]] 'fd' 77 was not passed to this process: Bad file descriptor"),
    ("[[qmp]]\nfd = 1\n", "c.toml:2:1: [[qmp]] 'fd' 1 is standard input, output or error"),
    ("[[qmp]]\ntcp = \"localhost\"\n", "c.toml:2:1: [[qmp]] 'tcp' expects ADDRESS:PORT"),
    ("[[qmp]]\nstdio = true\n[[serial]]\nstdio = true\n", "c.toml:3:1: 'stdio' has one user"),
    ("[[serial]]\n", "c.toml:1:1: [[serial]] needs exactly one of"),
    ("[[fdset]]\nfd = 88\nset = 1\n", "c.toml:2:1: [[fdset]] 'fd' 88 was not passed to this process"),
    ("[[fdset]]\nset = 1\n", "c.toml:1:1: [[fdset]] 'fd' is missing"),
    ("[[blockdev]]\n", "c.toml:1:1: [[blockdev]] 'driver' is missing"),
    (
        "[[blockdev]]\ndriver = \"nosuch\"\n",
        "c.toml:2:1: [[blockdev]] 'driver' does not accept value 'nosuch'",
    ),
    (
        "[[blockdev]]\ndriver = \"raw\"\nnode-name = \"n\"\nfile = { driver = \"file\",\n   filename = 1 }\n",
        "c.toml:5:4: [[blockdev]] 'file.filename' must be of type string",
    ),
    (
        "[[blockdev]]\ndriver = \"file\"\nnode-name = \"n\"\nfilename = \"text\"\nwrong = 1\n",
        "c.toml:5:1: [[blockdev]] 'wrong' is unexpected",
    ),
    (
        "[[blockdev]]\ndriver = \"file\"\nnode-name = \"n\"\nfilename = \"none\"\n",
        "c.toml:4:1: [[blockdev]] Could not open 'none': No such file or directory",
    ),
    (
        "[[blockdev]]\ndriver = \"null-co\"\nnode-name = \"n\"\n[[blockdev]]\ndriver = \"null-co\"\nnode-name = \"n\"\n",
        "c.toml:6:13: [[blockdev]] 'node-name': the node-name 'n' is taken already, at c.toml:3:13",
    ),
    ("[[drive]]\nfile = \"disk.raw\"\n", "c.toml:1:1: [[drive]] 'format' is missing: 'raw', 'qcow2'"),
    (
        "[[drive]]\nfile = \"none\"\nformat = \"raw\"\n",
        "c.toml:2:1: [[drive]] Could not open 'none': No such file",
    ),
    (
        "[[drive]]\nfile = \"gluster:x\"\nformat = \"raw\"\n",
        "c.toml:1:1: [[drive]] Unknown protocol 'gluster'",
    ),
    (
        "[[drive]]\nfile = \"json:{\"\nformat = \"raw\"\n",
        "c.toml:2:1: [[drive]] 'json:{': Could not parse the JSON options",
    ),
    (
        "[[drive]]\nfile = 'json:{\"driver\": \"file\", \"filename\": \"no\"}'\nformat = \"raw\"\n",
        "c.toml:1:1: [[drive]] Could not open 'no': No such file or directory",
    ),
    ("[[drive]]\nfile = 5\nformat = \"raw\"\n", "c.toml:2:1: [[drive]] 'file' must be of type string"),
    ("[[drive]]\nif = \"ide\"\n", "c.toml:2:1: [[drive]] 'if' does not accept value 'ide'"),
    ("[[drive]]\ncache = \"x\"\n", "c.toml:2:1: [[drive]] 'cache' does not accept value 'x'"),
    ("[[drive]]\nif = \"virtio\"\n", "c.toml:1:1: [[drive]] Device needs media, but drive is empty"),
    ("[[drive]]\nif = \"none\"\nid = \"0x\"\n", "c.toml:3:1: [[drive]] 'id' expects an identifier"),
    (
        "[[drive]]\nif = \"none\"\nid = \"a\"\n[[drive]]\nif = \"none\"\nid = \"a\"\n",
        "c.toml:6:6: [[drive]] 'id': the drive id 'a' is taken already, at c.toml:3:6",
    ),
    ("[[device]]\n", "c.toml:1:1: [[device]] 'driver' is missing"),
    ("[[device]]\ndriver = \"x\"\n", "c.toml:2:1: [[device]] 'x' is not a valid device model name"),
    (
        "[[device]]\ndriver = \"virtio-blk-pci\"\ndrive = \"no\"\n",
        "c.toml:3:1: [[device]] 'virtio-blk-pci.drive' can't find value 'no'",
    ),
    (
        "[[device]]\ndriver = \"virtio-rng-pci\"\nnope = 1\n",
        "c.toml:3:1: [[device]] 'virtio-rng-pci.nope' not found",
    ),
    (
        "[[device]]\ndriver = \"virtio-rng-pci\"\nid = \"r\"\n[[device]]\ndriver = \"virtio-rng-pci\"\nid = \"r\"\n",
        "c.toml:6:6: [[device]] 'id': the device id 'r' is taken already, at c.toml:3:6",
    ),
    ("[[netdev]]\ntype = \"tap\"\n", "c.toml:1:1: [[netdev]] 'id' is missing"),
    ("[[netdev]]\nid = \"n\"\ntype = \"x\"\n", "c.toml:3:1: [[netdev]] 'type' does not accept value 'x'"),
    (
        "[[netdev]]\nid = \"n\"\ntype = \"tap\"\nifname = 1\n",
        "c.toml:4:1: [[netdev]] 'ifname' must be of type string",
    ),
    (
        "[machine]\naccel = \"none\"\nmemory = \"1T\"\n",
        "c.toml:3:1: [machine] 'memory': memory of 1099511627776 bytes does not fit into",
    ),
    (
        "[boot]\nkernel = \"text\"\n[[qmp]]\nsocket = \"/nowhere/x\"\n",
        "c.toml:4:1: [[qmp]] 'socket' /nowhere/x: No such file or directory",
    ),
    (
        "[[qmp]]\npretty = true\nsocket = \"text\"\n",
        "c.toml:3:1: [[qmp]] 'socket' text: it exists and is not",
    ),
    (
        "[[qmp]]\nsocket = \"x\"\n[[qmp]]\nsocket = \"x\"\n",
        "c.toml:4:10: [[qmp]] 'socket': the socket 'x' is taken already, at c.toml:2:10",
    ),
    ("[[qmp]]\npretty = true\nfd = 99\n", "c.toml:3:1: [[qmp]] 'fd' 99 was not passed to this process: Bad"),
    ("[[fdset]]\nset = 1\nfd = 0\n", "c.toml:3:1: [[fdset]] 'fd' 0 is standard input, output or error"),
    ("[boot]\nkernel = \"fifo\"\n", "c.toml:2:1: [boot] fifo: not a regular file"),
    ("[boot]\ninitrd = \"fifo\"\nkernel = \"text\"\n", "c.toml:2:1: [boot] fifo: not a regular file"),
    (
        "[[drive]]\nformat = \"qcow2\"\nfile = \"disk.raw\"\n",
        "c.toml:3:1: [[drive]] 'disk.raw': Image is not in qcow2 format",
    ),
    (
        "[[drive]]\nfile = \"disk.raw\"\nformat = \"vmdk\"\n",
        "c.toml:3:1: [[drive]] 'format' does not accept value 'vmdk'",
    ),
    (
        "[[drive]]\nformat = \"raw\"\nfile = \"\\u001b[31m\"\n",
        "c.toml:3:1: [[drive]] Could not open '?[31m': No such file",
    ),
    (
        "[[netdev]]\ntype = \"tap\"\nid = \"n\"\nifname = \"a/b\"\n",
        "c.toml:4:1: [[netdev]] 'ifname' must be the name of an interface",
    ),
];

#[test]
fn a_bad_configuration_is_named_by_line_and_column_and_changes_nothing() {
    let dir = Dir::new("bad");
    dir.write("disk.raw", vec![7; 1 << 20]);
    dir.write("text", "this is no kernel\n");
    assert!(Command::new("mkfifo").arg(dir.0.join("fifo")).status().unwrap().success());
    let mut wrong = Vec::new();
    for (text, want) in BAD {
        // Whatever would be made by the good tables around the bad one must not be made.
        let around = "[[qmp]]\nsocket = \"qmp.sock\"\n[[serial]]\nfile = \"serial.log\"\n\
                      [[drive]]\nid = \"good\"\nfile = \"disk.raw\"\nformat = \"raw\"\n";
        let clash = text.contains("[[qmp]]") || text.contains("[[serial]]") || !text.contains("[[");
        let text = if clash { text.to_string() } else { format!("{text}{around}") };
        dir.write("c.toml", &text);
        let before = dir.state();
        for check in [&["c.toml"][..], &["--check", "c.toml"]] {
            let args = [&["--set", "machine.accel='none'"][..], check].concat();
            let args = if text.contains("machine") || text.contains("x = 1") { check } else { &args };
            let out = minivmm(&dir.0, args, "");
            let said = stderr(&out);
            if out.status.code() != Some(1)
                || !said.starts_with(&format!("minivmm: {want}"))
                || said.lines().count() != 1
            {
                wrong.push(format!("{text:?} ({args:?})\n  wanted: {want}\n  said {:?}: {said}", out.status));
            }
            assert!(out.stdout.is_empty(), "{text}: {:?}", out.stdout);
        }
        assert_eq!(dir.state(), before, "something was made or changed by {text:?}");
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// What every table can say at once.
const GOOD: &str = r#"
[machine]
name = "vm"
uuid = "550e8400-e29b-41d4-a716-446655440000"
memory = "16M"
cpus = 2
max-cpus = 4
threads = 2
accel = "none"
paused = true
reboot = "shutdown"
shutdown = "pause"

[[qmp]]
socket = "qmp.sock"
pretty = false

[[serial]]
file = "serial.log"

[[blockdev]]
driver = "raw"
node-name = "fmt"
read-only = true
file = { driver = "file", filename = "disk.raw", node-name = "prot" }

[[blockdev]]
driver = "null-co"
node-name = "null"
size = 1048576

[[drive]]
if = "virtio"
id = "d0"
file = "other.raw"
format = "raw"
cache = "writethrough"
discard = "unmap"
detect-zeroes = "unmap"
werror = "stop"
rerror = "report"

[[drive]]
if = "none"
snapshot = true
file = "disk.raw"
format = "raw"

[[drive]]
if = "none"

[[device]]
driver = "virtio-blk-pci"
drive = "null"
id = "vd0"

[[device]]
driver = "virtio-rng-pci"
addr = "1f"

[[device]]
driver = "isa-debug-exit"
"#;

fn good(name: &str) -> Dir {
    let dir = Dir::new(name);
    dir.write("disk.raw", vec![7; 1 << 20]);
    dir.write("other.raw", vec![8; 1 << 20]);
    dir.write("c.toml", GOOD);
    dir
}

/// A running program, killed when the test fails.
struct Running(Child);

impl Running {
    fn start(dir: &Path, args: &[&str]) -> Running {
        let child = Command::new(env!("CARGO_BIN_EXE_minivmm"))
            .args(args)
            .current_dir(dir)
            .env_remove("MINIVMM_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Running(child.unwrap())
    }

    fn connect(&mut self, socket: &Path) -> Qmp {
        let end = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > end => panic!("{}: {e}", socket.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
            assert!(self.0.try_wait().unwrap().is_none(), "it ended");
        };
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut qmp = Qmp(BufReader::new(stream));
        qmp.line();
        qmp.ask("qmp_capabilities");
        qmp
    }

    fn wait(mut self) -> Output {
        // Meanwhile, or a full pipe keeps it from ending.
        fn all(mut from: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
            std::thread::spawn(move || {
                let mut to = Vec::new();
                from.read_to_end(&mut to).unwrap();
                to
            })
        }
        let stdout = all(self.0.stdout.take().unwrap());
        let stderr = all(self.0.stderr.take().unwrap());
        let end = Instant::now() + Duration::from_secs(20);
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.0.wait().unwrap();
        Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    /// The answer, events left out.
    fn ask(&mut self, command: &str) -> serde_json::Value {
        writeln!(self.0.get_mut(), "{{\"execute\": \"{command}\"}}").unwrap();
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "no answer to {command}");
            let mut v: serde_json::Value = serde_json::from_str(&line).unwrap();
            if v.get("event").is_none() {
                assert!(v.get("return").is_some(), "{command}: {line}");
                return v["return"].take();
            }
        }
    }
}

#[test]
fn a_good_configuration_is_checked_without_a_trace_and_runs() {
    let dir = good("good");
    let before = dir.state();
    let out = minivmm(&dir.0, &["--check", "c.toml"], "");
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
    assert_eq!(dir.state(), before, "--check left a trace");

    let mut vm = Running::start(&dir.0, &["c.toml"]);
    let mut qmp = vm.connect(&dir.0.join("qmp.sock"));
    assert_eq!(qmp.ask("query-name")["name"], "vm");
    assert_eq!(qmp.ask("query-uuid")["UUID"], "550e8400-e29b-41d4-a716-446655440000");
    assert_eq!(qmp.ask("query-status")["status"], "prelaunch");
    assert_eq!(qmp.ask("query-cpus-fast").as_array().unwrap().len(), 2);
    let blocks = qmp.ask("query-block");
    let names: Vec<_> = blocks.as_array().unwrap().iter().map(|b| b["device"].as_str().unwrap()).collect();
    assert_eq!(names, ["d0", "none0", "none1", ""]);
    assert_eq!(blocks[0]["inserted"]["cache"]["writeback"], false);
    assert_eq!(blocks[1]["inserted"]["drv"], "qcow2");
    assert_eq!(blocks[1]["inserted"]["backing_file"], "disk.raw");
    assert!(blocks[2].get("inserted").is_none());
    qmp.ask("cont");
    assert_eq!(qmp.ask("query-status")["status"], "running");
    qmp.ask("quit");
    assert!(qmp.line().is_empty(), "the connection is closed");
    let out = vm.wait();
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
    assert!(!dir.0.join("qmp.sock").exists(), "the socket stays behind");
    let disks: Vec<_> =
        dir.state().into_iter().filter(|(p, _)| p.extension().is_some_and(|e| e == "raw")).collect();
    assert!(disks.iter().all(|d| before.contains(d)), "a disk has changed");
}

#[test]
fn relative_paths_are_relative_to_the_file_and_overrides_win() {
    let dir = good("relative");
    let sub = dir.0.join("elsewhere");
    fs::create_dir(&sub).unwrap();
    let sets = [
        "--set",
        "machine.name=\"vm7\"",
        "--set",
        "qmp.0.socket=\"seven.sock\"",
        "--set",
        "machine.paused=false",
    ];
    let mut vm = Running::start(&sub, &[&sets[..], &["../c.toml"]].concat());
    let mut qmp = vm.connect(&dir.0.join("seven.sock"));
    assert_eq!(qmp.ask("query-name")["name"], "vm7");
    assert_eq!(qmp.ask("query-status")["status"], "running");
    assert!(dir.0.join("serial.log").exists());
    // A second one of the fleet may not have the same disk for writing.
    let out = minivmm(&dir.0, &["--set", "qmp.0.socket=\"eight.sock\"", "c.toml"], "");
    assert_eq!(out.status.code(), Some(1));
    let said = stderr(&out);
    assert!(
        said.contains("minivmm: c.toml:35:1: [[drive]] 'other.raw': Failed to get \"write\" lock\n"),
        "{said}"
    );
    assert!(said.contains("Is another process using the image [other.raw]?"), "{said}");
    assert!(!dir.0.join("eight.sock").exists());
    drop(qmp);
    // SAFETY: the process is our child, and not waited for yet.
    assert_eq!(unsafe { libc::kill(vm.0.id() as i32, libc::SIGTERM) }, 0);
    let out = vm.wait();
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
    assert!(!dir.0.join("seven.sock").exists());
}

#[test]
fn standard_input_is_a_configuration() {
    let dir = good("stdin");
    let out = minivmm(&dir.0, &["--check", "-"], GOOD);
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
    let out = minivmm(&dir.0, &["--check", "-"], &GOOD.replace("cpus = 2", "cpus = true"));
    assert_eq!(out.status.code(), Some(1));
    assert!(stderr(&out).starts_with("minivmm: <stdin>:6:1: [machine] 'cpus' must be"), "{}", stderr(&out));
}

#[test]
fn the_command_line_speaks_plainly() {
    let dir = Dir::new("argv");
    let run = |args: &[&str]| minivmm(&dir.0, args, "");
    for (args, want) in [
        (&[][..], "minivmm: which configuration?"),
        (&["none.toml"], "minivmm: none.toml: No such file or directory"),
        (&["/"], "minivmm: /: Is a directory"),
        (&["--frob"], "minivmm: unknown option '--frob'"),
        (&["--help-qmp", "nosuch"], "minivmm: "),
        (&["--log", "x", "c"], "minivmm: unknown level 'x'"),
    ] {
        let out = run(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(stderr(&out).starts_with(want), "{args:?}: {}", stderr(&out));
    }
    for (args, want) in [
        (&["--help"][..], "Usage: minivmm"),
        (&["--version"], "minivmm 0"),
        (&["--help-qmp"], "query-status"),
        (&["--help-qmp", "cont"], "RESUME"),
    ] {
        let out = run(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}");
        assert!(String::from_utf8_lossy(&out.stdout).contains(want), "{args:?}");
        assert!(out.stderr.is_empty());
    }
}

#[test]
fn a_descriptor_can_be_passed_as_monitor_and_into_a_set() {
    use std::os::fd::AsRawFd;
    let dir = good("passed");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let disk = fs::OpenOptions::new().read(true).write(true).open(dir.0.join("other.raw")).unwrap();
    let (monitor, file) = (theirs.as_raw_fd(), disk.as_raw_fd());
    let text = format!(
        "[machine]\naccel = 'none'\n[[qmp]]\nfd = {monitor}\n[[fdset]]\nfd = {file}\nset = 3\nopaque = 'x'\n\
         [[drive]]\nif = 'none'\nformat = 'raw'\nfile = '/dev/fdset/3'\n"
    );
    dir.write("fd.toml", text);
    // The shell lets the descriptors through: ours are close-on-exec.
    let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
    command
        .arg("fd.toml")
        .current_dir(&dir.0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for fd in [monitor, file] {
        // SAFETY: the descriptor is open; only its flag changes.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
    }
    let vm = Running(command.spawn().unwrap());
    drop((theirs, disk));
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut qmp = Qmp(BufReader::new(ours));
    qmp.line();
    qmp.ask("qmp_capabilities");
    let sets = qmp.ask("query-fdsets");
    assert_eq!((&sets[0]["fdset-id"], &sets[0]["fds"][0]["opaque"]), (&3.into(), &"x".into()));
    assert_eq!(qmp.ask("query-block")[0]["inserted"]["file"], "/dev/fdset/3");
    qmp.ask("quit");
    let out = vm.wait();
    assert_eq!((out.status.code(), stderr(&out).as_str()), (Some(0), ""));
}

/// A xorshift generator; the seed is in the message of every failure.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below as u64) as usize
    }
}

/// Ways to break a text: bytes changed, removed, inserted, lines swapped or doubled, the end cut off.
fn mutate(text: &[u8], r: &mut Random) -> Vec<u8> {
    const TOKENS: &[&str] = &[
        "[",
        "]",
        "[[",
        "=",
        "\"",
        "'",
        "{",
        "}",
        ".",
        "#",
        "\n",
        "-1",
        "1e9",
        "true",
        "99999999999999999999",
        "é",
        "\0",
        "inf",
    ];
    let mut text = text.to_vec();
    for _ in 0..=r.next(4) {
        let at = r.next(text.len().max(1)).min(text.len());
        match r.next(6) {
            0 if at < text.len() => text[at] = r.next(256) as u8,
            1 if at < text.len() => drop(text.remove(at)),
            2 => drop(text.splice(at..at, TOKENS[r.next(TOKENS.len())].bytes())),
            3 => text.truncate(at.max(1)),
            _ => {
                let mut lines: Vec<_> = text.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
                let (a, b) = (r.next(lines.len()), r.next(lines.len()));
                if r.next(2) == 0 {
                    lines.swap(a, b)
                } else {
                    lines.insert(a, lines[b].clone())
                }
                text = lines.join(&b'\n');
            }
        }
    }
    text
}

#[test]
fn no_text_makes_it_panic() {
    let seed = 0x6d69_6e69_766d_6d00 | u64::from(std::process::id() % 251);
    let mut r = Random(seed);
    let dir = good("mutations");
    let disks =
        |dir: &Dir| [fs::read(dir.0.join("disk.raw")).unwrap(), fs::read(dir.0.join("other.raw")).unwrap()];
    let before = disks(&dir);
    for round in 0..300 {
        let text = mutate(GOOD.as_bytes(), &mut r);
        fs::write(dir.0.join("m.toml"), &text).unwrap();
        let out = minivmm(&dir.0, &["--check", "m.toml"], "");
        let said = stderr(&out);
        let shown = String::from_utf8_lossy(&text);
        assert_eq!(out.status.signal(), None, "seed {seed:#x} round {round}: killed\n{shown}");
        match out.status.code() {
            Some(0) => assert_eq!(said, "", "seed {seed:#x} round {round}"),
            Some(1) => {
                let ok = said.lines().count() > 0 && said.lines().all(|l| l.starts_with("minivmm: m.toml"));
                assert!(ok, "seed {seed:#x} round {round}: {said}\n{shown}");
            }
            code => panic!("seed {seed:#x} round {round}: exit {code:?}: {said}\n{shown}"),
        }
    }
    assert!(disks(&dir) == before, "seed {seed:#x}: a disk has changed");
    assert!(
        !dir.0.join("qmp.sock").exists() && !dir.0.join("serial.log").exists(),
        "seed {seed:#x}: a trace"
    );
}
