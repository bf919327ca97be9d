//! `blockdev-create` of a file: what it is to be like, as far as its file system goes along. The real binary;
//! btrfs and XFS in an image that is mounted for the test alone.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, Qmp, Vm, have, run};
use serde_json::{Value, json};
use std::ffi::CString;
use std::path::{Path, PathBuf};

const CONFIG: &str = "[machine]\naccel = \"none\"\nmemory = \"16M\"\n";

/// Makes it; the job's error, if it ended with one.
fn create(qmp: &mut Qmp, options: Value) -> Option<String> {
    qmp.ok("blockdev-create", json!({"job-id": "new", "options": options}));
    while qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded" {}
    let jobs = qmp.ok("query-jobs", json!({}));
    qmp.ok("job-dismiss", json!({"id": "new"}));
    jobs[0]["error"].as_str().map(String::from)
}

/// Runs `f` with a directory on a file system that `tool` makes; says so and skips without the tool, or the
/// right to mount it.
fn on_a_file_system(tool: &'static str, package: &str, f: impl FnOnce(PathBuf) + Send + 'static) {
    let unable = "skipped: it mounts a file system, which needs root and a loop device (run it with sudo)";
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("{unable}");
    }
    if !have(tool, package) {
        return;
    }
    let dir = Dir::new();
    let (image, at) = (dir.join("image"), dir.join("mounted"));
    std::fs::create_dir(&at).unwrap();
    std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
    run(tool, &["-q", image.to_str().unwrap()]);
    std::thread::spawn(move || {
        let (private, none) = (libc::MS_REC | libc::MS_PRIVATE, CString::default());
        // SAFETY: system calls with C strings that live here; they change this thread's mounts, and those of
        // the processes that it starts.
        let alone = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none.as_ptr(), c"/".as_ptr(), none.as_ptr(), private, std::ptr::null()) == 0
        };
        // (mount(8) finds a loop device.)
        let mut mount = std::process::Command::new("mount");
        if !alone || !mount.args(["-o", "loop"]).args([&image, &at]).status().is_ok_and(|s| s.success()) {
            return eprintln!("{unable}");
        }
        f(at);
    })
    .join()
    .unwrap();
}

fn flags(path: &Path) -> String {
    let text = run("lsattr", &[path.to_str().unwrap()]);
    text.split(' ').next().unwrap().replace('-', "")
}

/// The hint of the file, as `query-named-block-nodes` tells it.
fn hint(qmp: &mut Qmp, path: &Path) -> Value {
    qmp.ok("blockdev-add", json!({"driver": "file", "node-name": "look", "filename": path}));
    let mut nodes = qmp.ok("query-named-block-nodes", json!({}));
    qmp.ok("blockdev-del", json!({"node-name": "look"}));
    let of = nodes.as_array_mut().unwrap().iter_mut().find(|n| n["node-name"] == "look").unwrap();
    assert_eq!(of["image"]["format-specific"]["type"], "file", "{of}");
    of["image"]["format-specific"]["data"]["extent-size-hint"].take()
}

#[test]
fn what_the_file_system_cannot_is_no_failure_and_what_cannot_be_is() {
    let mut vm = Vm::start(CONFIG);
    let mut qmp = vm.qmp();
    let path = vm.path("a.raw");
    let file = |more: Value| {
        let mut options = json!({"driver": "file", "filename": path, "size": 1 << 20});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let error = create(&mut qmp, file(json!({"extent-size-hint": 1u64 << 32, "nocow": true})));
    assert_eq!(error.as_deref(), Some("Extent size hint is too large"));
    assert!(!path.exists());
    for more in [
        json!({"nocow": true}),
        json!({"extent-size-hint": u32::MAX, "nocow": false}),
        json!({"extent-size-hint": 0}),
        json!({"preallocation": "falloc"}),
        json!({"preallocation": "full", "nocow": true}),
    ] {
        std::fs::write(&path, "what was there before").unwrap();
        assert_eq!(create(&mut qmp, file(more)), None);
        assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 20]);
    }
    std::fs::write(&path, "what was there before").unwrap();
    let error = create(&mut qmp, file(json!({"preallocation": "metadata"})));
    assert_eq!(error.as_deref(), Some("Unsupported preallocation mode: metadata"));
    assert_eq!(std::fs::read(&path).unwrap(), b"what was there before");
    let error = create(&mut qmp, file(json!({"filename": vm.path("no/a.raw")})));
    let want = format!("Could not create '{}': No such file or directory", vm.path("no/a.raw").display());
    assert_eq!(error, Some(want));
    let error = create(&mut qmp, file(json!({"size": i64::MAX})));
    assert_eq!(error.as_deref(), Some("Could not resize file: File too large"));
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
}

#[test]
fn an_image_is_not_its_own_data_file() {
    let mut vm = Vm::start(CONFIG);
    let mut qmp = vm.qmp();
    let path = vm.path("a.qcow2");
    std::fs::write(&path, "what was there before").unwrap();
    let file = json!({"driver": "file", "filename": path});
    qmp.ok("blockdev-add", json!({"driver": "file", "filename": path, "node-name": "f"}));
    for (file, data) in [
        (file.clone(), file.clone()),
        (json!("f"), json!("f")),
        (file.clone(), json!({"driver": "raw", "file": "f"})),
    ] {
        let error =
            create(&mut qmp, json!({"driver": "qcow2", "file": file, "data-file": data, "size": 1 << 20}));
        assert_eq!(error.as_deref(), Some("Failed to get shared \"resize\" lock"));
        assert_eq!(std::fs::read(&path).unwrap(), b"what was there before");
    }
    qmp.ok("blockdev-del", json!({"node-name": "f"}));
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
}

#[test]
fn a_disk_is_only_so_long() {
    let mut vm = Vm::start(CONFIG);
    let mut qmp = vm.qmp();
    let path = vm.path("a.qcow2");
    std::fs::write(&path, "").unwrap();
    for (size, want) in [
        (1u64 << 62, "Failed to grow the L1 table: File too large"),
        ((1 << 63) - 512, "offset(9223372036854775296) exceeds maximum(9223372035781033984)"),
        (1 << 63, "Image size cannot be negative"),
    ] {
        let file = json!({"driver": "file", "filename": path});
        let error = create(&mut qmp, json!({"driver": "qcow2", "file": file, "size": size}));
        assert_eq!(error, Some(format!("Could not resize image: {want}")));
    }
    qmp.ok("quit", json!({}));
    vm.wait_exit(0);
}

#[test]
fn no_copy_on_write_on_btrfs() {
    on_a_file_system("mkfs.btrfs", "btrfs-progs", |at| {
        let mut vm = Vm::start(CONFIG);
        let mut qmp = vm.qmp();
        for (nocow, want) in [(json!({}), ""), (json!({"nocow": true}), "C"), (json!({"nocow": false}), "")] {
            let path = at.join(format!("{nocow}.raw"));
            std::fs::write(&path, "what was there before").unwrap();
            let mut options = json!({"driver": "file", "filename": path, "size": 1 << 20});
            options.as_object_mut().unwrap().extend(nocow.as_object().unwrap().clone());
            assert_eq!(create(&mut qmp, options), None);
            assert_eq!(flags(&path), want);
        }
        qmp.ok("quit", json!({}));
        let (_, _, messages) = vm.wait();
        assert!(!messages.contains("extent size hint"), "nobody asked for one: {messages}");
    });
}

#[test]
fn space_in_large_pieces_on_xfs() {
    on_a_file_system("mkfs.xfs", "xfsprogs", |at| {
        let mut vm = Vm::start(CONFIG);
        let mut qmp = vm.qmp();
        for (given, want) in [(None, json!(1 << 20)), (Some(0), Value::Null), (Some(65536), json!(65536))] {
            let path = at.join("a.raw");
            std::fs::write(&path, "what was there before").unwrap();
            let mut options = json!({"driver": "file", "filename": path, "size": 1 << 20});
            if let Some(given) = given {
                options["extent-size-hint"] = json!(given);
            }
            assert_eq!(create(&mut qmp, options), None);
            assert_eq!(hint(&mut qmp, &path), want);
            std::fs::remove_file(&path).unwrap();
        }
        // Also of images that other commands make.
        qmp.ok(
            "blockdev-add",
            json!({"driver": "null-co", "size": 1 << 20, "node-name": "n", "read-zeroes": true}),
        );
        for format in ["qcow2", "raw"] {
            let path = at.join(format);
            std::fs::write(&path, "what was there before").unwrap();
            let job = json!({"device": "n", "job-id": "b", "sync": "full", "target": path, "format": format});
            qmp.ok("drive-backup", job);
            qmp.wait_event("BLOCK_JOB_COMPLETED");
            while qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "null" {}
            assert_eq!(hint(&mut qmp, &path), 1 << 20, "{format}");
        }
        let path = at.join("odd.raw");
        let odd = json!({"driver": "file", "filename": path, "size": 512, "extent-size-hint": 1000});
        assert_eq!(create(&mut qmp, odd), None);
        assert_eq!(hint(&mut qmp, &path), Value::Null);
        qmp.ok("quit", json!({}));
        let (_, _, messages) = vm.wait();
        assert_eq!(
            messages.matches("Failed to set extent size hint: Invalid argument").count(),
            1,
            "{messages}"
        );
    });
}
