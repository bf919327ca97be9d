//! Jobs in the real binary: what their errors lead to, and what is left when it is killed or told to
//! quit in the middle of one.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, Qmp, Vm, have, run};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// `base` ← `mid` ← `top`, of 16 MiB, each with data of its own, and what they show, as a raw file.
fn chain(dir: &Dir) {
    let path = |name: &str| dir.join(name).display().to_string();
    let mut below: Option<&str> = None;
    for (n, name) in ["base", "mid", "top"].into_iter().enumerate() {
        let image = path(name);
        match below {
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]),
            Some(b) => {
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path(b), "-F", "qcow2", &image])
            }
        };
        let mut args = vec!["-f".to_string(), "qcow2".to_string()];
        for k in 0..6 {
            let (at, byte) = ((k * 5 + n * 2) % 15, 16 * n + k + 1);
            args.extend(["-c".into(), format!("write -q -P {byte} {at}M 1536k")]);
        }
        args.push(image);
        run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
        below = Some(name);
    }
    run("qemu-img", &["convert", "-O", "raw", &path("top"), &path("raw")]);
}

const DRIVE: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n[[drive]]\nif = \"none\"\nid = \"d\"\n\
                     file = \"@DIR/top\"\nformat = \"qcow2\"\n";

/// Is the image good (it may have leaks), and does it show what the chain showed?
fn check(dir: &Path, image: &str) {
    let path = |name: &str| dir.join(name).display().to_string();
    let out = std::process::Command::new("qemu-img").args(["check", "-q", &path(image)]).output().unwrap();
    assert!(matches!(out.status.code(), Some(0 | 3)), "{image}: {}", String::from_utf8_lossy(&out.stdout));
    run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", &path(image), &path("raw")]);
}

fn event(qmp: &mut Qmp, name: &str) -> Value {
    qmp.wait_event(name)["data"].take()
}

/// Waits until a job has that state.
fn status(qmp: &mut Qmp, wanted: &str) {
    while event(qmp, "JOB_STATUS_CHANGE")["status"] != wanted {}
}

/// The jobs that are tried, and their arguments.
fn kinds() -> [(&'static str, Value); 4] {
    [
        ("block-stream", json!({"device": "d", "job-id": "j"})),
        ("block-stream", json!({"device": "d", "job-id": "j", "base": "@base"})),
        ("block-commit", json!({"device": "d", "job-id": "j", "top": "@mid"})),
        ("block-commit", json!({"device": "d", "job-id": "j"})),
    ]
}

/// The arguments with the paths of this test.
fn with_paths(mut args: Value, dir: &Path) -> Value {
    for value in args.as_object_mut().unwrap().values_mut() {
        if let Some(name) = value.as_str().and_then(|s| s.strip_prefix('@')) {
            *value = dir.join(name).display().to_string().into();
        }
    }
    args
}

/// In the middle of each job: killed, or told to quit. The images stay good, and a second start with the
/// same configuration does the job to its end.
#[test]
fn an_end_in_the_middle_leaves_good_images() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    for (n, (command, args)) in kinds().into_iter().enumerate() {
        for quit in [false, true] {
            let dir = Dir::new();
            chain(&dir);
            let mut vm = Vm::start_in(dir, DRIVE);
            let mut qmp = vm.qmp();
            let mut args = with_paths(args.clone(), &vm.path(""));
            args["speed"] = (8 * MIB).into();
            qmp.ok(command, args.clone());
            std::thread::sleep(Duration::from_millis(150 + 100 * n as u64));
            assert_eq!(qmp.ok("query-jobs", json!({})).as_array().unwrap().len(), 1, "it is over already");
            let start = Instant::now();
            if quit {
                qmp.ok("quit", json!({}));
                assert_eq!(event(&mut qmp, "BLOCK_JOB_CANCELLED")["device"], "j");
                vm.wait_exit(0);
                assert!(start.elapsed() < Duration::from_secs(5), "quit took {:?}", start.elapsed());
            } else {
                vm.signal(9);
                vm.wait();
            }
            let dir = vm.take_dir();
            check(&dir.join(""), "top");

            std::fs::remove_file(dir.join("qmp")).ok();
            let mut vm = Vm::start_in(dir, DRIVE);
            let mut qmp = vm.qmp();
            args["speed"] = 0.into();
            qmp.ok(command, args);
            if n == 3 {
                event(&mut qmp, "BLOCK_JOB_READY");
                qmp.ok("block-job-complete", json!({"device": "j"}));
            }
            let done = event(&mut qmp, "BLOCK_JOB_COMPLETED");
            assert_eq!(done.get("error"), None, "{done}");
            qmp.ok("quit", json!({}));
            vm.wait_exit(0);
            let backing = |image: &str| -> Value {
                let image = vm.path(image).display().to_string();
                let info: Value =
                    serde_json::from_str(&run("qemu-img", &["info", "--output=json", &image])).unwrap();
                info.get("backing-filename").cloned().unwrap_or_default()
            };
            let base = json!(vm.path("base").display().to_string());
            match n {
                0 => assert_eq!(backing("top"), Value::Null),
                1 | 2 => assert_eq!(backing("top"), base),
                _ => {}
            }
            check(&vm.path(""), if n == 3 { "base" } else { "top" });
        }
    }
}

/// Options of the chain's nodes with a `blkdebug` below the image of that name.
fn nodes(dir: &Path, faulty: &str, rule: &Value) -> Value {
    let path = |name: &str| dir.join(name).display().to_string();
    let mut node = Value::Null;
    for name in ["base", "mid", "top"] {
        let mut file = json!({"driver": "file", "filename": path(name)});
        if name == faulty {
            file = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
        }
        node = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": node});
    }
    node
}

/// A request that fails once, on either side, at every policy.
#[test]
fn errors_at_every_policy() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    // The command, whose requests fail, when, how, and which side that is.
    let cases = [
        ("block-stream", "base", "read_aio", 5, "read"),
        ("block-stream", "top", "write_aio", 28, "read"),
        ("block-commit", "mid", "read_aio", 5, "read"),
        ("block-commit", "base", "write_aio", 28, "write"),
        ("block-commit active", "top", "read_aio", 5, "read"),
        ("block-commit active", "base", "write_aio", 28, "write"),
    ];
    for (what, faulty, at, errno, side) in cases {
        for policy in ["report", "ignore", "stop", "enospc"] {
            let dir = Dir::new();
            chain(&dir);
            let mut vm = Vm::start_in(dir, "[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
            let mut qmp = vm.qmp();
            let rule = json!({"event": at, "errno": errno, "once": true});
            qmp.ok("blockdev-add", nodes(&vm.path(""), faulty, &rule));
            let mut args = json!({"device": "top", "job-id": "j", "on-error": policy});
            if what == "block-commit" {
                args["top-node"] = "mid".into();
            }
            let case = format!("{what}, {faulty}, {policy}");
            qmp.ok(what.split(' ').next().unwrap(), args);
            let error = event(&mut qmp, "BLOCK_JOB_ERROR");
            let pauses = policy == "stop" || (policy == "enospc" && errno == 28);
            let action = match policy {
                _ if pauses => "stop",
                "ignore" => "ignore",
                _ => "report",
            };
            let want = json!({"device": "j", "operation": side, "action": action});
            assert_eq!(error, want, "{case}");
            if pauses {
                status(&mut qmp, "paused");
                let job = &qmp.ok("query-block-jobs", json!({}))[0];
                let io_status = if errno == 28 { "nospace" } else { "failed" };
                assert_eq!((&job["io-status"], &job["paused"]), (&json!(io_status), &json!(true)), "{case}");
                // What the job counts on cannot be changed under it.
                let file = json!({"driver": "file", "filename": "x"});
                let other =
                    json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": Value::Null});
                let kind = if what == "block-stream" { "stream" } else { "commit" };
                let busy = format!("Node 'top' is busy: block device is in use by block job: {kind}");
                let link = match what {
                    "block-commit" => "Cannot replace implicit backing child of top",
                    _ => "Cannot change frozen 'backing' link from 'top' to 'mid'",
                };
                for (command, args, text) in [
                    ("blockdev-reopen", json!({"options": [other]}), link),
                    ("block_resize", json!({"node-name": "top", "size": 32 * MIB}), &busy),
                    ("block-stream", json!({"device": "top", "job-id": "k"}), &busy),
                ] {
                    let said = qmp.execute(command, args).unwrap_err();
                    assert_eq!(said["desc"], text, "{case}, {command}");
                }
                qmp.ok("block-job-resume", json!({"device": "j"}));
                let job = &qmp.ok("query-block-jobs", json!({}));
                assert!(job.get(0).is_none_or(|j| j["io-status"] == "ok"), "{case}: {job}");
            }
            // What a stream has to leave out must go on showing through: it fails in the end.
            let fails = action == "report" || (action == "ignore" && what == "block-stream");
            if what == "block-commit active" && !fails {
                event(&mut qmp, "BLOCK_JOB_READY");
                qmp.ok("block-job-complete", json!({"device": "j"}));
            }
            let done = event(&mut qmp, "BLOCK_JOB_COMPLETED");
            let text = if errno == 28 { "No space left on device" } else { "Input/output error" };
            assert_eq!(done.get("error"), fails.then(|| json!(text)).as_ref(), "{case}");
            qmp.ok("quit", json!({}));
            vm.wait_exit(0);
            let switched = what == "block-commit active" && !fails;
            check(&vm.path(""), if switched { "base" } else { "top" });
        }
    }
}

#[test]
fn a_cancelled_job_ends_at_once_whatever_its_speed() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    let copies = ["drive-backup", "drive-mirror"].map(|command| {
        let args =
            json!({"device": "d", "job-id": "j", "target": "@copy", "format": "qcow2", "sync": "full"});
        (command, args)
    });
    for (command, args) in kinds().into_iter().chain(copies) {
        let dir = Dir::new();
        chain(&dir);
        let mut vm = Vm::start_in(dir, DRIVE);
        let mut qmp = vm.qmp();
        let mut args = with_paths(args, &vm.path(""));
        args["speed"] = 1.into();
        qmp.ok(command, args);
        std::thread::sleep(Duration::from_millis(50));
        // What is left would take it months. How soon it ends, `just bench jobs only=speed` says; that it
        // makes no request before it does, src/jobs/pace_test.rs.
        qmp.ok("block-job-cancel", json!({"device": "j"}));
        event(&mut qmp, "BLOCK_JOB_CANCELLED");
        status(&mut qmp, "null");
        // The chain is as before, and no filter is left.
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(nodes.as_array().unwrap().len(), 6, "{nodes}");
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
        check(&vm.path(""), "top");
    }
}

/// QEMU 2.8 called it `buf_size`, in `blockdev-mirror` only.
#[test]
fn the_buffer_of_a_mirror_has_two_names() {
    let mut vm = Vm::start("[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
    let mut qmp = vm.qmp();
    for name in ["a", "b"] {
        qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": MIB}));
    }
    let args = |members: &[(&str, i64)]| {
        let mut args = json!({"device": "a", "target": "b", "sync": "full", "job-id": "j"});
        members.iter().for_each(|(name, size)| args[*name] = json!(size));
        args
    };
    let both = qmp.execute("blockdev-mirror", args(&[("buf-size", 65536), ("buf_size", 65536)])).unwrap_err();
    assert_eq!(both["desc"], "'buf-size' and 'buf_size' cannot be specified at the same time");
    for name in ["buf-size", "buf_size"] {
        let bad = qmp.execute("blockdev-mirror", args(&[(name, -1)])).unwrap_err();
        assert_eq!(bad["desc"], "Invalid parameter 'buf-size'");
        qmp.ok("blockdev-mirror", args(&[(name, 65536)]));
        event(&mut qmp, "BLOCK_JOB_READY");
        qmp.ok("block-job-cancel", json!({"device": "j"}));
        event(&mut qmp, "BLOCK_JOB_COMPLETED");
        status(&mut qmp, "null");
    }
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
}

/// The backups of a transaction begin at one moment, but not two at one target, nor one at another's.
#[test]
fn backups_of_a_transaction_do_not_share_a_target() {
    let mut vm = Vm::start("[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
    let mut qmp = vm.qmp();
    for name in ["a", "b", "t", "u"] {
        qmp.ok("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": MIB}));
    }
    let backup = |from: &str, to: &str| {
        let data = json!({"device": from, "target": to, "sync": "full", "job-id": format!("{from}{to}")});
        json!({"type": "blockdev-backup", "data": data})
    };
    for (one, two) in [(("a", "t"), ("b", "t")), (("a", "t"), ("t", "u"))] {
        let actions = json!({"actions": [backup(one.0, one.1), backup(two.0, two.1)]});
        let said = qmp.execute("transaction", actions).unwrap_err();
        assert_eq!(said["desc"], "Node 't' is busy: block device is in use by block job: backup");
        assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    }
    // One disk twice is fine.
    qmp.ok("transaction", json!({"actions": [backup("a", "t"), backup("a", "u")]}));
    for _ in 0..2 {
        assert_eq!(event(&mut qmp, "BLOCK_JOB_COMPLETED").get("error"), None);
    }
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
}

/// The most memory that a process has used, in KiB.
fn peak(vm: &Vm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A disk of 1 TiB that holds a little at both ends: each job gets by with its buffers and its bitmaps, of
/// which a finely dirty MiB costs 4 KiB and the rest nothing.
#[test]
fn a_job_on_a_huge_disk_takes_little_memory() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    for (command, most) in
        [("blockdev-mirror", 24 << 10), ("blockdev-backup", 24 << 10), ("block-stream", 16 << 10)]
    {
        let dir = Dir::new();
        let path = |name: &str| dir.join(name).display().to_string();
        let (disk, over, target) = (path("disk"), path("over"), path("target"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", &disk, "1T"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -q 0 4M", "-c", "write -q 1048572M 4M", &disk]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &disk, "-F", "qcow2", &over]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", &target, "1T"]);
        let mut vm = Vm::start_in(dir, "[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
        let mut qmp = vm.qmp();
        let file = |path: &str| json!({"driver": "file", "filename": path});
        let below = json!({"driver": "qcow2", "node-name": "low", "file": file(&disk)});
        qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "d", "file": file(&over), "backing": below}),
        );
        qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": file(&target)}));
        let before = peak(&vm);
        let mut args = json!({"device": "d", "job-id": "j"});
        if command != "block-stream" {
            (args["target"], args["sync"]) = ("t".into(), "full".into());
        }
        qmp.ok(command, args);
        if command == "blockdev-mirror" {
            event(&mut qmp, "BLOCK_JOB_READY");
            qmp.ok("block-job-complete", json!({"device": "j"}));
        }
        assert_eq!(event(&mut qmp, "BLOCK_JOB_COMPLETED").get("error"), None);
        let grown = peak(&vm) - before;
        eprintln!("{command}: {grown} KiB");
        assert!(grown < most, "{command}: {grown} KiB");
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
    }
}

/// Killed, or told to quit, while a copy is made: the source is good, a copy that was finished before is
/// complete, and after a second start with the same configuration the job is done.
#[test]
fn an_end_in_the_middle_of_a_copy_leaves_source_and_finished_targets_good() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    for command in ["drive-backup", "drive-mirror"] {
        for quit in [false, true] {
            let dir = Dir::new();
            chain(&dir);
            let mut vm = Vm::start_in(dir, DRIVE);
            let copy = |qmp: &mut Qmp, vm: &Vm, name: &str, speed: u64| {
                let target = vm.path(name).display().to_string();
                let args = json!({"device": "d", "job-id": "j", "target": target, "format": "qcow2",
                                  "sync": "full", "speed": speed});
                qmp.ok(command, args);
            };
            let finish = |qmp: &mut Qmp| {
                if command == "drive-mirror" {
                    event(qmp, "BLOCK_JOB_READY");
                    // Without the switch: the configuration names the source.
                    qmp.ok("block-job-cancel", json!({"device": "j"}));
                }
                assert_eq!(event(qmp, "BLOCK_JOB_COMPLETED").get("error"), None);
            };
            let mut qmp = vm.qmp();
            copy(&mut qmp, &vm, "first", 0);
            finish(&mut qmp);
            status(&mut qmp, "null");
            copy(&mut qmp, &vm, "second", 8 * MIB);
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(qmp.ok("query-jobs", json!({})).as_array().unwrap().len(), 1, "it is over already");
            if quit {
                qmp.ok("quit", json!({}));
                assert_eq!(event(&mut qmp, "BLOCK_JOB_CANCELLED")["device"], "j");
                vm.wait_exit(0);
            } else {
                vm.signal(9);
                vm.wait();
            }
            let dir = vm.take_dir();
            check(&dir.join(""), "top");
            check(&dir.join(""), "first");
            std::fs::remove_file(dir.join("qmp")).ok();
            let mut vm = Vm::start_in(dir, DRIVE);
            let mut qmp = vm.qmp();
            copy(&mut qmp, &vm, "second", 0);
            finish(&mut qmp);
            qmp.ok("quit", json!({}));
            vm.wait_exit(0);
            check(&vm.path(""), "top");
            check(&vm.path(""), "second");
        }
    }
}

/// Verbs in tight loops, whatever state the job is in by then: an answer to each, and an end to the job.
#[test]
fn verbs_race_with_the_job() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    let dir = Dir::new();
    chain(&dir);
    let mut vm = Vm::start_in(dir, DRIVE);
    let mut qmp = vm.qmp();
    let verbs =
        ["job-pause", "job-resume", "job-complete", "job-finalize", "block-job-cancel", "job-dismiss"];
    let mut draw = 0x2545_f491_u32;
    for round in 0..60 {
        let target = vm.path(&format!("copy{}", round % 2)).display().to_string();
        let mut args = json!({"device": "d", "job-id": "j", "target": target, "format": "qcow2", "sync": "full",
                              "auto-finalize": round % 3 == 0, "auto-dismiss": round % 5 != 0});
        if round % 2 == 0 {
            args["copy-mode"] = "write-blocking".into();
        }
        let command = if round % 2 == 0 { "drive-mirror" } else { "drive-backup" };
        qmp.ok(command, args);
        let start = Instant::now();
        loop {
            draw = draw.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let mut verb = verbs[(draw >> 16) as usize % verbs.len()];
            if verb == "job-complete" && command == "drive-mirror" {
                // It would move the disk to the copy, which the next round overwrites.
                verb = "job-resume";
            }
            let key = if verb.starts_with("block") { "device" } else { "id" };
            _ = qmp.execute(verb, json!({key: "j"}));
            let jobs = qmp.ok("query-jobs", json!({}));
            if jobs.as_array().unwrap().is_empty() {
                break;
            }
            assert!(start.elapsed() < kit::LIMIT, "{command}: {jobs}");
        }
    }
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(nodes.as_array().unwrap().len(), 6, "{nodes}");
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
    check(&vm.path(""), "top");
}

/// EIO on either side of a copy, once, at every policy.
#[test]
fn errors_of_copies_at_every_policy() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    for command in ["blockdev-backup", "blockdev-mirror"] {
        for (side, faulty, at) in [("read", "mid", "read_aio"), ("write", "", "write_aio")] {
            for policy in ["report", "ignore", "stop", "enospc"] {
                let case = format!("{command}, {side}, {policy}");
                let dir = Dir::new();
                chain(&dir);
                let target = dir.join("copy").display().to_string();
                run("qemu-img", &["create", "-q", "-f", "qcow2", &target, "16M"]);
                let mut vm = Vm::start_in(dir, "[machine]\naccel = \"none\"\nmemory = \"16M\"\n");
                let mut qmp = vm.qmp();
                let rule = json!({"event": at, "errno": 5, "once": true});
                qmp.ok("blockdev-add", nodes(&vm.path(""), faulty, &rule));
                let mut file = json!({"driver": "file", "filename": target});
                if side == "write" {
                    file = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
                }
                qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "copy", "file": file}));
                let mut args = json!({"device": "top", "target": "copy", "job-id": "j", "sync": "full"});
                args[if side == "read" { "on-source-error" } else { "on-target-error" }] = policy.into();
                qmp.ok(command, args);
                let action = if matches!(policy, "stop" | "ignore") { policy } else { "report" };
                let error = event(&mut qmp, "BLOCK_JOB_ERROR");
                assert_eq!(error, json!({"device": "j", "operation": side, "action": action}), "{case}");
                if action == "stop" {
                    status(&mut qmp, "paused");
                    assert_eq!(qmp.ok("query-block-jobs", json!({}))[0]["io-status"], "failed", "{case}");
                    qmp.ok("block-job-resume", json!({"device": "j"}));
                }
                if command == "blockdev-mirror" && action != "report" {
                    event(&mut qmp, "BLOCK_JOB_READY");
                    qmp.ok("block-job-complete", json!({"device": "j"}));
                }
                let done = event(&mut qmp, "BLOCK_JOB_COMPLETED");
                let failed = (action == "report").then(|| json!("Input/output error"));
                assert_eq!(done.get("error"), failed.as_ref(), "{case}");
                qmp.ok("quit", json!({}));
                vm.wait_exit(0);
                check(&vm.path(""), if failed.is_some() { "top" } else { "copy" });
            }
        }
    }
}
