//! NBD against programs that we did not write: qemu-img, qemu-io, nbdinfo, nbdcopy and fio as clients of our server, nbdkit and
//! qemu-nbd as servers of our client. The real binary, as a storage daemon.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, LIMIT, MINIVMM, Vm, have, run, skip};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DAEMON: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n";

const SERVER: &str = "[nbd-server]\naddr = { type = \"unix\", data = { path = \"@DIR/nbd\" } }\n";

fn have_qemu() -> bool {
    have("qemu-img", "qemu-utils") && have("qemu-io", "qemu-utils")
}

fn have_libnbd() -> bool {
    have("nbdinfo", "libnbd-bin") && have("nbdcopy", "libnbd-bin")
}

/// A qcow2 image with data, zeroes and nothing in it, and its raw copy: the names are `disk` and `raw`.
fn images(dir: &Dir) {
    let (disk, raw) = (dir.join("disk"), dir.join("raw"));
    let (disk, raw) = (disk.to_str().unwrap(), raw.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", disk, "32M"]);
    let mut args = vec!["-f", "qcow2"];
    for command in [
        "write -P 17 0 1M",
        "write -P 3 1234567 777777",
        "write -z 4M 2M",
        "write -P 9 20M 5M",
        "discard 21M 1M",
    ] {
        args.extend(["-c", command]);
    }
    args.push(disk);
    run("qemu-io", &args);
    run("qemu-img", &["convert", "-q", "-f", "qcow2", "-O", "raw", disk, raw]);
}

fn daemon(dir: Dir, tables: &str) -> Vm {
    let vm = Vm::start_in(dir, &format!("{DAEMON}{SERVER}{tables}"));
    // The server comes last but for the monitors, so it listens now.
    drop(vm.qmp());
    vm
}

fn uri(vm: &Vm, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", vm.path("nbd").display())
}

const QCOW2: &str = "[[blockdev]]\ndriver = \"qcow2\"\nnode-name = \"disk\"\ndiscard = \"unmap\"\nfile = { driver = \"file\", filename = \"disk\" }\n";

fn export(node: &str, more: &str) -> String {
    format!("[[export]]\ntype = \"nbd\"\nid = \"{node}\"\nnode-name = \"{node}\"\n{more}\n")
}

#[test]
fn images_are_copied_compared_and_mapped() {
    if !have_qemu() || !have_libnbd() {
        return;
    }
    let dir = Dir::new();
    images(&dir);
    let scratch =
        "[[blockdev]]\ndriver = \"file\"\nnode-name = \"copy\"\nfilename = \"copy\"\ndiscard = \"unmap\"\n";
    std::fs::File::create(dir.join("copy")).unwrap().set_len(32 << 20).unwrap();
    let tables = format!(
        "{QCOW2}{scratch}{}{}",
        export("disk", "allocation-depth = true\ndescription = \"a disk\""),
        export("copy", "writable = true")
    );
    let mut vm = daemon(dir, &tables);
    let (disk, copy) = (uri(&vm, "disk"), uri(&vm, "copy"));
    let raw = vm.path("raw");
    let raw = raw.to_str().unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &disk, raw]);
    // Zeroes and data lie where the image says.
    let map = |name: &str, format: &str| -> Vec<(u64, u64, bool)> {
        let text = run("qemu-img", &["map", "-f", format, "--output=json", name]);
        let list: Vec<Value> = serde_json::from_str(&text).unwrap();
        let mut out: Vec<(u64, u64, bool)> = Vec::new();
        for e in &list {
            let (start, len, zero) =
                (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["zero"] == true);
            match out.last_mut() {
                Some(last) if last.2 == zero => last.1 += len,
                _ => out.push((start, len, zero)),
            }
        }
        out
    };
    let image = vm.path("disk");
    // It is locked, but not against those who say that they do not care.
    let ours = map(&disk, "raw");
    let theirs = run("qemu-img", &["map", "-U", "-f", "qcow2", "--output=json", image.to_str().unwrap()]);
    let theirs: Vec<Value> = serde_json::from_str(&theirs).unwrap();
    let zeroes = |at: u64| {
        theirs.iter().any(|e| {
            e["zero"] == true
                && (e["start"].as_u64().unwrap()
                    ..e["start"].as_u64().unwrap() + e["length"].as_u64().unwrap())
                    .contains(&at)
        })
    };
    for (start, len, zero) in &ours {
        assert_eq!((zeroes(*start), zeroes(start + len - 1)), (*zero, *zero), "{ours:?} {theirs:?}");
    }
    assert!(ours.len() >= 5, "{ours:?}");
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", "--map", &disk])).unwrap();
    let total: u64 = info.as_array().unwrap().iter().map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 32 << 20);
    let depth = run("nbdinfo", &["--map=qemu:allocation-depth", &disk]);
    assert!(depth.contains("local") && depth.contains("absent"), "{depth}");
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &disk])).unwrap();
    let export = &info["exports"][0];
    assert_eq!((&export["is_read_only"], &export["description"]), (&json!(true), &json!("a disk")));
    assert_eq!(export["contexts"], json!(["base:allocation", "qemu:allocation-depth"]));
    let list: Value = serde_json::from_str(&run("nbdinfo", &["--json", "--list", &uri(&vm, "")])).unwrap();
    assert_eq!(list["exports"].as_array().unwrap().len(), 2);
    // Copied there and back by both families of tools.
    run("nbdcopy", &["--connections=4", raw, &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &copy, raw]);
    run("nbdcopy", &["--connections=4", "--requests=16", &disk, &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &copy, raw]);
    let back = vm.path("back");
    run("nbdcopy", &[&copy, back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == std::fs::read(raw).unwrap());
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", &disk, &copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &copy, raw]);
    // Holes came as holes.
    assert!(
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(vm.path("copy")).unwrap())
            < (20 << 20) / 512
    );
    let mut qmp = vm.qmp();
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
    assert!(!vm.path("nbd").exists(), "the socket's file stays");
    run("qemu-img", &["check", "-q", "-f", "qcow2", image.to_str().unwrap()]);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_asks_for_what_is_dirty() {
    if !have_qemu() || !have_libnbd() {
        return;
    }
    let dir = Dir::new();
    images(&dir);
    let mut vm = daemon(dir, QCOW2);
    let mut qmp = vm.qmp();
    qmp.ok("block-dirty-bitmap-add", json!({"node": "disk", "name": "b", "granularity": 65536}));
    let add = |id: &str, writable: bool, bitmap: &str| json!({"type": "nbd", "id": id, "node-name": "disk", "writable": writable, "bitmaps": [bitmap]});
    let error = |e: Result<Value, Value>| e.unwrap_err()["desc"].as_str().unwrap().to_string();
    assert_eq!(error(qmp.execute("block-export-add", add("e", true, "x"))), "Bitmap 'x' is not found");
    let refused = error(qmp.execute("block-export-add", add("e", false, "b")));
    assert_eq!(refused, "Enabled bitmap 'b' incompatible with readonly export");
    qmp.ok("block-export-add", add("e", true, "b"));
    let busy = error(qmp.execute("block-dirty-bitmap-remove", json!({"node": "disk", "name": "b"})));
    assert_eq!(busy, "Bitmap 'b' is currently in use by another operation and cannot be used");
    let e = uri(&vm, "disk");
    let mut args = vec!["-f", "raw"];
    for command in [
        "read -P 17 0 1M",
        "write -P 5 100000 200000",
        "write -z 8M 1M",
        "write -f -P 6 10M 64k",
        "discard 20M 1M",
        "aio_write -P 7 30M 64k",
        "aio_write -P 8 31M 64k",
        "aio_flush",
        "read -P 5 100000 200000",
        "read -P 0 8M 1M",
        "read -P 6 10M 64k",
        "read -P 0 20M 1M",
        "read -P 7 30M 64k",
        "read -P 8 31M 64k",
        "flush",
    ] {
        args.extend(["-c", command]);
    }
    args.push(&e);
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    let map = run("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:b", &e]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let dirty: Vec<(u64, u64)> = map
        .iter()
        .filter(|m| m["type"] == 1)
        .map(|m| (m["offset"].as_u64().unwrap(), m["length"].as_u64().unwrap()))
        .collect();
    let (k, m) = (1u64 << 10, 1u64 << 20);
    assert_eq!(
        dirty,
        [(64 * k, 256 * k), (8 * m, m), (10 * m, 64 * k), (20 * m, m), (30 * m, 64 * k), (31 * m, 64 * k)]
    );
    // A client keeps the export; without clients it goes, and the bitmap is free.
    qmp.ok("block-export-del", json!({"id": "e"}));
    qmp.wait_event("BLOCK_EXPORT_DELETED");
    qmp.ok("block-dirty-bitmap-remove", json!({"node": "disk", "name": "b"}));
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
    run("qemu-img", &["check", "-q", "-f", "qcow2", vm.path("disk").to_str().unwrap()]);
}

fn fio_nbd() -> bool {
    if !have("fio", "fio") {
        return false;
    }
    let known = Command::new("fio").arg("--enghelp=nbd").output().is_ok_and(|o| o.status.success());
    if !known {
        skip("fio's engine nbd", "install a fio that is built with libnbd");
    }
    known
}

fn fio(uri: &str, args: &[&str]) -> String {
    let uri = format!("--uri={uri}");
    let mut all = vec!["--name=t", "--ioengine=nbd", &uri, "--output-format=terse", "--verify_state_save=0"];
    all.extend(args);
    run("fio", &all)
}

#[test]
fn fio_reads_back_what_it_wrote_while_the_graph_changes() {
    if !have_qemu() || !fio_nbd() {
        return;
    }
    let dir = Dir::new();
    images(&dir);
    let mut vm = daemon(dir, &format!("{QCOW2}{}", export("disk", "writable = true")));
    let e = uri(&vm, "disk");
    let dir = vm.path("");
    let changes = std::thread::spawn({
        let mut qmp = vm.qmp();
        move || {
            // Snapshots under its feet.
            for n in 0..6 {
                std::thread::sleep(Duration::from_millis(150));
                let args = json!({"node-name": if n == 0 { "disk".into() } else { format!("s{}", n - 1) },
                                  "snapshot-node-name": format!("s{n}"), "format": "qcow2",
                                  "snapshot-file": dir.join(format!("s{n}"))});
                qmp.ok("blockdev-snapshot-sync", args);
            }
            qmp
        }
    });
    for (bs, depth) in [("4k", "32"), ("512-64k", "8")] {
        let (bs, depth) = (format!("--bsrange={bs}"), format!("--iodepth={depth}"));
        let bs =
            if bs.contains('-') && bs.matches('-').count() > 2 { bs } else { bs.replace("bsrange", "bs") };
        fio(
            &e,
            &[
                "--rw=randrw",
                "--size=24M",
                &bs,
                &depth,
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
            ],
        );
    }
    fio(&e, &["--rw=write", "--size=32M", "--bs=1M", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1"]);
    let mut qmp = changes.join().unwrap();
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
    for n in 0..6 {
        run("qemu-img", &["check", "-q", "-f", "qcow2", vm.path(&format!("s{n}")).to_str().unwrap()]);
    }
}

#[test]
fn the_server_listens_on_tcp_and_on_what_it_is_given() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new();
    images(&dir);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = format!(
        "[nbd-server]\naddr = {{ type = \"inet\", data = {{ host = \"127.0.0.1\", port = \"{port}\" }} }}\n"
    );
    let vm = Vm::start_in(dir, &format!("{DAEMON}{server}{QCOW2}{}", export("disk", "")));
    let mut qmp = vm.qmp();
    let raw = vm.path("raw");
    let raw = raw.to_str().unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &format!("nbd://127.0.0.1:{port}/disk"), raw]);
    // Once more, on a socket that the process is started with.
    qmp.ok("nbd-server-stop", json!({}));
    qmp.ok("quit", json!({}));
    let dir = Dir::new();
    images(&dir);
    let listener = UnixListener::bind(dir.join("nbd")).unwrap();
    let fd = listener.as_raw_fd();
    let server = "[nbd-server]\naddr = { type = \"fd\", data = { str = \"77\" } }\n";
    let config = dir.join("c.toml");
    let qmp = dir.join("qmp");
    std::fs::write(
        &config,
        format!("{DAEMON}{server}{QCOW2}{}[[qmp]]\nsocket = {qmp:?}\n", export("disk", "")),
    )
    .unwrap();
    let vm = Vm::spawn(dir, passing(fd, config));
    drop(vm.qmp());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri(&vm, "disk"), vm.path("raw").to_str().unwrap()],
    );
    // And its client on one that is connected.
    let connected = UnixStream::connect(vm.path("nbd")).unwrap();
    let dir = Dir::new();
    let (config, qmp) = (dir.join("c.toml"), dir.join("qmp"));
    let node = "[[blockdev]]\ndriver = \"raw\"\nnode-name = \"n\"\nread-only = true\n\
                file = { driver = \"nbd\", export = \"disk\", server = { type = \"fd\", str = \"77\" } }\n";
    std::fs::write(&config, format!("{DAEMON}{node}[[qmp]]\nsocket = {qmp:?}\n")).unwrap();
    let client = Vm::spawn(dir, passing(connected.as_raw_fd(), config));
    drop(connected);
    let nodes = client.qmp().ok("query-named-block-nodes", json!({"flat": true}));
    let n = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
    assert_eq!(n["image"]["virtual-size"], std::fs::metadata(vm.path("raw")).unwrap().len());
}

/// A start with `fd` as number 77.
fn passing(fd: i32, config: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(MINIVMM);
    command.arg(config);
    // SAFETY: async-signal-safe calls that touch no memory; a number that is far from any in use.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 77) {
            77 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    command
}

#[test]
fn what_the_configuration_gets_wrong_is_told_with_its_place() {
    let dir = Dir::new();
    std::fs::write(dir.join("raw"), vec![0; 1 << 20]).unwrap();
    let node = "[[blockdev]]\ndriver = \"file\"\nnode-name = \"n\"\nfilename = \"raw\"\n";
    let socket = "[nbd-server]\naddr = { type = \"unix\", data = { path = \"s\" } }\n";
    for (text, want) in [
        (format!("{node}{}", export("n", "")), "[[export]] NBD server not running"),
        (format!("{socket}{}", export("n", "")), "Cannot find device='' nor node-name='n'"),
        (format!("{socket}{node}{}", export("n", "nonsense = 1")), "'nonsense' is unexpected"),
        (format!("{node}[nbd-server]\nport = 1\n"), "'addr' is missing"),
        (format!("{node}[nbd-server]\naddr = {{ type = \"vsock\" }}\n"), "does not accept value 'vsock'"),
        (
            format!("{node}[nbd-server]\naddr = {{ type = \"unix\", data = {{ path = \"raw\" }} }}\n"),
            "not a socket",
        ),
        (format!("{node}{socket}tls-creds = \"t\"\n"), "No TLS credentials with id 't'"),
        (
            format!("{node}[nbd-server]\naddr = {{ type = \"fd\", data = {{ str = \"9\" }} }}\n"),
            "was not passed",
        ),
        (format!("{node}{socket}{}{}", export("n", ""), export("n", "")), "is taken already"),
    ] {
        let config = dir.join("c.toml");
        std::fs::write(&config, format!("{DAEMON}{text}")).unwrap();
        let out = Command::new(MINIVMM).arg(&config).stdin(Stdio::null()).output().unwrap();
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.code() == Some(1) && err.contains(want) && err.contains("c.toml:"),
            "{text}\n{err}"
        );
    }
    assert!(!dir.join("s").exists());
}

// ---- our client on servers that we did not write

/// A server process, killed at the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a server and waits until its socket takes connections.
fn server(socket: &Path, tool: &str, args: &[&str]) -> Server {
    let _ = std::fs::remove_file(socket);
    let start = || Server(Command::new(tool).args(args).stdin(Stdio::null()).spawn().unwrap());
    let (mut server, begin) = (start(), Instant::now());
    // It says hello, then; a client that leaves at once is no news to it.
    while UnixStream::connect(socket).is_err() {
        assert!(begin.elapsed() < LIMIT, "{tool} {args:?} does not listen");
        std::thread::sleep(Duration::from_millis(10));
        if let Some(status) = server.0.try_wait().unwrap() {
            eprintln!("{tool} ended at once ({status}); once more");
            let _ = std::fs::remove_file(socket);
            server = start();
        }
    }
    server
}

/// Shows what minivmm said when its test fails.
struct Told<'a>(&'a Vm);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0.messages());
        }
    }
}

fn nbdkit(socket: &Path, args: &[&str]) -> Server {
    let mut all = vec!["-f", "-U", socket.to_str().unwrap()];
    all.extend(args);
    server(socket, "nbdkit", &all)
}

fn have_nbdkit() -> bool {
    have("nbdkit", "nbdkit")
}

/// A daemon that has the export `""` of the server at `@DIR/back` as node `n`, and exports that.
fn proxy(dir: Dir, more: &str) -> Vm {
    let node = format!(
        "[[blockdev]]\ndriver = \"nbd\"\nnode-name = \"n\"\ndiscard = \"unmap\"\nserver = {{ type = \"unix\", path = \"@DIR/back\" }}\n{more}\n"
    );
    daemon(dir, &format!("{node}{}", export("n", "writable = true")))
}

fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(uri);
    let out = Command::new("qemu-io").args(&args).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

const ROUND: &[&str] = &[
    "write -P 5 0 4M",
    "write -P 6 12345 54321",
    "write -z 5M 1M",
    "discard 6M 1M",
    "write -f -P 7 8M 512",
    "read -P 6 12345 54321",
    "read -P 5 100000 1M",
    "read -P 0 5M 1M",
    "read -P 7 8M 512",
    "flush",
];

#[test]
fn our_client_copes_with_all_kinds_of_servers() {
    if !have_qemu() || !have_nbdkit() || !have_libnbd() {
        return;
    }
    for filters in [
        &[][..],
        &["--filter=nozero", "--filter=noextents"],
        &["--filter=blocksize-policy"],
        &["--filter=noparallel", "--filter=readahead"],
        &["--filter=delay"],
        &["--no-sr"],
        &["--newstyle"],
    ] {
        let dir = Dir::new();
        let mut args = filters.to_vec();
        args.extend(["memory", "size=16M"]);
        if filters.contains(&"--filter=blocksize-policy") {
            args.extend([
                "blocksize-minimum=4096",
                "blocksize-preferred=65536",
                "blocksize-maximum=1M",
                "blocksize-error-policy=error",
            ]);
        }
        if filters.contains(&"--filter=delay") {
            args.extend(["delay-read=3ms", "delay-write=5ms", "delay-zero=20ms"]);
        }
        let _server = nbdkit(&dir.join("back"), &args);
        let mut vm = proxy(dir, "");
        let text = qemu_io(&uri(&vm, "n"), ROUND);
        let bad = ["failed", "error", "verification"].iter().any(|w| text.contains(w));
        assert!(!bad && text.matches(" bytes at offset ").count() == 9, "{filters:?}: {text}");
        run("nbdinfo", &["--map", &uri(&vm, "n")]);
        let mut qmp = vm.qmp();
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
    }
}

#[test]
fn errors_of_a_server_are_errors_of_the_disk_and_pass() {
    if !have_qemu() || !have_nbdkit() {
        return;
    }
    let dir = Dir::new();
    let trigger = dir.join("fail");
    let file = format!("error-file={}", trigger.display());
    let args = ["--filter=error", "memory", "size=16M", "error=ENOSPC", "error-rate=100%", &file];
    let _server = nbdkit(&dir.join("back"), &args);
    let vm = proxy(dir, "");
    let e = uri(&vm, "n");
    assert!(!qemu_io(&e, ROUND).contains("failed"));
    std::fs::write(&trigger, "").unwrap();
    let text = qemu_io(&e, &["write -P 1 0 4k", "write -z 1M 64k"]);
    assert_eq!(text.matches("No space left on device").count(), 2, "{text}");
    std::fs::remove_file(&trigger).unwrap();
    assert!(!qemu_io(&e, ROUND).contains("failed"));
}

#[test]
fn a_server_that_is_killed_and_comes_back_loses_nothing() {
    if !have_nbdkit() || !fio_nbd() {
        return;
    }
    let dir = Dir::new();
    let (socket, image) = (dir.join("back"), dir.join("image"));
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let image = image.to_str().unwrap().to_string();
    let first = nbdkit(&socket, &["file", &image]);
    let mut vm = proxy(dir, "reconnect-delay = 30");
    let e = uri(&vm, "n");
    let told = Told(&vm);
    // The kills are this thread's: a server may end with the thread that started it.
    let load = std::thread::spawn(move || {
        let limit = ["--rw=randwrite", "--size=16M", "--bs=4k", "--iodepth=16", "--rate_iops=2500"];
        fio(&e, &[&limit[..], &["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]].concat());
    });
    let mut last = first;
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(300));
        drop(last);
        std::thread::sleep(Duration::from_millis(100));
        last = nbdkit(&socket, &["file", &image]);
    }
    load.join().unwrap();
    drop(told);
    // Without a server the end still comes.
    drop(last);
    let mut qmp = vm.qmp();
    let start = Instant::now();
    qmp.ok("quit", json!({}));
    let _ = vm.wait();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn images_lie_on_servers_and_names_lead_to_them() {
    if !have_qemu() || !have("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = Dir::new();
    images(&dir);
    let base = dir.join("disk");
    let base = base.to_str().unwrap();
    run("qemu-img", &["bitmap", "--add", "-g", "64k", base, "b"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 4 2M 64k", base]);
    let socket = dir.join("back");
    let _server = server(
        &socket,
        "qemu-nbd",
        &["-t", "-e", "8", "-x", "base", "-B", "b", "-f", "qcow2", "-k", socket.to_str().unwrap(), base],
    );
    // An overlay whose header names the export.
    let top = dir.join("top");
    let name = format!("nbd+unix:///base?socket={}", socket.display());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &name, "-F", "raw", top.to_str().unwrap()]);
    let tables = format!(
        "[[blockdev]]\ndriver = \"qcow2\"\nnode-name = \"top\"\nfile = {{ driver = \"file\", filename = \"top\" }}\n{}\
         [[blockdev]]\ndriver = \"nbd\"\nnode-name = \"dirty\"\nread-only = true\nexport = \"base\"\n\
         server = {{ type = \"unix\", path = \"@DIR/back\" }}\nx-dirty-bitmap = \"qemu:dirty-bitmap:b\"\n",
        export("top", "writable = true\nallocation-depth = true")
    );
    let vm = daemon(dir, &tables);
    let e = uri(&vm, "top");
    let text = qemu_io(
        &e,
        &["read -P 17 0 1M", "read -P 4 2M 64k", "write -P 1 1M 64k", "read -P 1 1M 64k", "read -P 9 20M 1M"],
    );
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    let mut qmp = vm.qmp();
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let file = |name: &str| {
        nodes.as_array().unwrap().iter().find(|n| n["node-name"] == name).unwrap()["file"].clone()
    };
    assert!(file("dirty").as_str().unwrap().starts_with("json:"), "{}", file("dirty"));
    let backing =
        nodes.as_array().unwrap().iter().find(|n| n["drv"] == "nbd" && n["node-name"] != "dirty").unwrap();
    assert_eq!(backing["file"], json!(name));
    qmp.ok("quit", json!({}));
}
