//! The configuration as a user meets it: the program, files, messages, exit statuses.
//!
//! Everything here runs with `accel = "none"`: it needs neither /dev/kvm nor root nor a network.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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
            .map(|p| (p.clone(), fs::read(&p).unwrap_or_default()))
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
    child.wait_with_output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// What is wrong, and the beginning of what the user reads.
const BAD: &[(&str, &str)] = &[
    ("x = 1\n", "c.toml:1:5: unknown table 'x' (there are: machine, boot, qmp,"),
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
    ("[[qmp]]\nfd = 77\n", "c.toml:1:1: [[qmp]] 'fd' 77 was not passed to this process: Bad file descriptor"),
    ("[[qmp]]\nfd = 1\n", "c.toml:1:1: [[qmp]] 'fd' 1 was not passed to this process: Bad file descriptor"),
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
];

#[test]
fn a_bad_configuration_is_named_by_line_and_column_and_changes_nothing() {
    let dir = Dir::new("bad");
    dir.write("disk.raw", vec![7; 1 << 20]);
    dir.write("text", "this is no kernel\n");
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
