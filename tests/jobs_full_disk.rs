//! Jobs whose target is on a full disk: a small file system that only the test sees, and the real binary.
//! Each job at each policy; where it pauses, space is made, and nothing is missing in the end.

#[path = "kit/process.rs"]
mod kit;
#[path = "support/small_disk.rs"]
mod small_disk;

use kit::{Dir, Qmp, Vm, have, run};
use serde_json::{Value, json};
use small_disk::{fill, on_a_small_disk};
use std::path::Path;

/// A disk with 3 MiB of data, of 8.
fn disk(path: &Path, backing: Option<&Path>) {
    let path = path.to_str().unwrap();
    match backing {
        None => run("qemu-img", &["create", "-q", "-f", "qcow2", path, "8M"]),
        Some(b) => {
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", b.to_str().unwrap(), path])
        }
    };
}

fn write(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(path.to_str().unwrap());
    run("qemu-io", &args);
}

fn event(qmp: &mut Qmp, name: &str) -> Value {
    qmp.wait_event(name)["data"].take()
}

fn node(name: &str, path: &Path, backing: &Value) -> Value {
    json!({"driver": "qcow2", "node-name": name, "discard": "unmap", "backing": backing,
           "file": {"driver": "file", "filename": path}})
}

const CONFIG: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n";

/// What writes to the full disk.
const JOBS: [&str; 6] = [
    "blockdev-backup",
    "drive-backup",
    "blockdev-mirror",
    "block-commit",
    "block-commit active",
    "block-stream",
];

struct Scene<'a> {
    job: &'static str,
    policy: &'static str,
    small: &'a Path,
}

impl Scene<'_> {
    /// The job's command, after the nodes for it are there, and the image that is to be complete then.
    fn begin(&self, qmp: &mut Qmp, dir: &Dir) -> (Value, std::path::PathBuf) {
        let (low, mid, top) = (dir.join("low"), dir.join("mid"), dir.join("top"));
        let target = self.small.join("target");
        let (mut low_at, mut top_at) = (low, top);
        match self.job {
            // What is written to is on the small disk.
            "block-commit" | "block-commit active" => low_at = self.small.join("low"),
            "block-stream" => top_at = self.small.join("top"),
            _ => {}
        }
        disk(&low_at, None);
        write(&low_at, &["write -q -P 1 0 64k", "write -q -P 1 5M 64k"]);
        disk(&mid, Some(&low_at));
        write(&mid, &["write -q -P 2 1M 2M"]);
        disk(&top_at, Some(&mid));
        write(&top_at, &["write -q -P 3 4M 64k"]);
        run(
            "qemu-img",
            &["convert", "-O", "raw", top_at.to_str().unwrap(), dir.join("raw").to_str().unwrap()],
        );
        let chain = node("top", &top_at, &node("mid", &mid, &node("low", &low_at, &Value::Null)));
        qmp.ok("blockdev-add", chain);
        let policy = self.policy;
        let mut args = json!({"device": "top", "job-id": "j"});
        let copy = |args: &mut Value| {
            args["sync"] = "full".into();
            args["on-target-error"] = policy.into();
        };
        let complete = match self.job {
            "drive-backup" => {
                copy(&mut args);
                args["target"] = target.display().to_string().into();
                args["format"] = "qcow2".into();
                target
            }
            "blockdev-backup" | "blockdev-mirror" => {
                disk(&target, None);
                qmp.ok("blockdev-add", node("target", &target, &Value::Null));
                copy(&mut args);
                args["target"] = "target".into();
                target
            }
            what => {
                args["on-error"] = policy.into();
                if what == "block-commit" {
                    args["top-node"] = "mid".into();
                }
                if what == "block-commit active" { low_at } else { top_at }
            }
        };
        (args, complete)
    }

    fn play(&self) {
        let case = format!("{}, {}", self.job, self.policy);
        let mut vm = Vm::start(CONFIG);
        let mut qmp = vm.qmp();
        let dir = Dir::new();
        let (args, complete) = self.begin(&mut qmp, &dir);
        let filling = fill(self.small, if self.job == "drive-backup" { 512 << 10 } else { 128 << 10 });
        qmp.ok(self.job.split(' ').next().unwrap(), args);
        let error = event(&mut qmp, "BLOCK_JOB_ERROR");
        let action = match self.policy {
            "report" => "report",
            "ignore" => "ignore",
            _ => "stop",
        };
        // A stream counts its one image as what it reads.
        let side = if self.job == "block-stream" { "read" } else { "write" };
        assert_eq!(error, json!({"device": "j", "operation": side, "action": action}), "{case}");
        if action == "stop" {
            // The first time without any space.
            for space in [false, true] {
                while event(&mut qmp, "JOB_STATUS_CHANGE")["status"] != "paused" {}
                let job = &qmp.ok("query-block-jobs", json!({}))[0];
                assert_eq!(
                    (&job["io-status"], &job["paused"]),
                    (&json!("nospace"), &json!(true)),
                    "{case}: {job}"
                );
                if space {
                    std::fs::remove_file(&filling).unwrap();
                }
                let (verb, name) = if space { ("job-resume", "id") } else { ("block-job-resume", "device") };
                qmp.ok(verb, json!({name: "j"}));
            }
        } else {
            std::fs::remove_file(&filling).unwrap();
        }
        let fails = action == "report" || (action == "ignore" && self.job == "block-stream");
        if matches!(self.job, "blockdev-mirror" | "block-commit active") && !fails {
            event(&mut qmp, "BLOCK_JOB_READY");
            qmp.ok("block-job-complete", json!({"device": "j"}));
        }
        let done = event(&mut qmp, "BLOCK_JOB_COMPLETED");
        assert_eq!(
            done.get("error"),
            fails.then(|| json!("No space left on device")).as_ref(),
            "{case}: {done}"
        );
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
        // If it failed, what it read from is as it was.
        let image = if !fails {
            complete
        } else if self.job == "block-stream" {
            self.small.join("top")
        } else {
            dir.join("top")
        };
        let (image, raw) = (image.to_str().unwrap().to_string(), dir.join("raw").display().to_string());
        let check = std::process::Command::new("qemu-img").args(["check", "-q", &image]).output().unwrap();
        assert!(matches!(check.status.code(), Some(0 | 3)), "{case}: {check:?}");
        run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", &image, &raw]);
        for file in std::fs::read_dir(self.small).unwrap().flatten() {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
}

#[test]
fn a_job_whose_target_is_full_ends_or_waits_as_the_policy_says() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    on_a_small_disk(8, |small| {
        for job in JOBS {
            for policy in ["report", "ignore", "stop", "enospc"] {
                Scene { job, policy, small: &small }.play();
            }
        }
    });
}

/// The guest's own write, whose copy does not fit: it fails, rather than the backup.
#[test]
fn a_write_whose_copy_does_not_fit_fails() {
    if !have("qemu-img", "qemu-utils") || !have("qemu-io", "qemu-utils") {
        return;
    }
    on_a_small_disk(8, |small| {
        let mut vm = Vm::start(CONFIG);
        let mut qmp = vm.qmp();
        let (disk_at, target) = (vm.path("disk"), small.join("target"));
        disk(&disk_at, None);
        write(&disk_at, &["write -q -P 1 0 4M"]);
        disk(&target, None);
        qmp.ok("blockdev-add", node("disk", &disk_at, &Value::Null));
        qmp.ok("blockdev-add", node("target", &target, &Value::Null));
        let filling = fill(&small, 128 << 10);
        qmp.ok(
            "blockdev-backup",
            json!({"device": "disk", "target": "target", "sync": "none", "job-id": "j", "filter-node-name": "f"}),
        );
        let io = json!({"command-line": "qemu-io f \"write -P 2 0 1M\""});
        qmp.ok("human-monitor-command", io.clone());
        vm.wait_output("No space left");
        std::fs::remove_file(&filling).unwrap();
        qmp.ok("human-monitor-command", io);
        vm.wait_output("wrote 1048576");
        qmp.ok("block-job-cancel", json!({"device": "j"}));
        event(&mut qmp, "BLOCK_JOB_CANCELLED");
        qmp.ok("quit", json!({}));
        vm.wait_exit(0);
        run("qemu-io", &["-f", "qcow2", "-c", "read -q -P 1 0 1M", target.to_str().unwrap()]);
        run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "read -q -P 2 0 1M",
                "-c",
                "read -q -P 1 1M 3M",
                disk_at.to_str().unwrap(),
            ],
        );
    });
}
