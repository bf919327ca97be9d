//! What stops a VM and what brings it back: a full disk, a guest that switches off, a snapshot that
//! forgets. The tiny guest in the real binary on /dev/kvm.

#[path = "kit/process.rs"]
mod kit;

use kit::{Dir, Qmp, Vm, have_kvm};
use serde_json::json;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

fn machine(table: &str, mode: &str) -> String {
    format!(
        "[machine]\nmemory = \"16M\"\n{table}\n[boot]\nkernel = \"@GUEST\"\ncmdline = \"{mode}\"\n\
         [[serial]]\nstdio = true\n"
    )
}

/// Waits for a run state.
fn until(qmp: &mut Qmp, status: &str) {
    let end = Instant::now() + kit::LIMIT;
    while qmp.ok("query-status", json!({}))["status"] != status {
        assert!(Instant::now() < end, "never {status}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_guest_that_switches_off_can_be_kept_and_reset() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::start(&machine("shutdown = \"pause\"", "first"));
    let mut qmp = vm.qmp();
    vm.wait_output("F");
    until(&mut qmp, "shutdown");
    let refused = qmp.execute("cont", json!({})).unwrap_err();
    assert_eq!(refused["desc"], "Resetting the Virtual Machine is required");
    qmp.ok("system_reset", json!({}));
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "prelaunch");
    qmp.ok("cont", json!({}));
    qmp.wait_event("RESUME");
    let off = qmp.wait_event("SHUTDOWN");
    assert_eq!(off["data"], json!({"guest": true, "reason": "guest-shutdown"}));
    qmp.wait_event("STOP");
    qmp.ok("quit", json!({}));
    assert_eq!(vm.wait_exit(0).matches('F').count(), 2);
}

/// Runs `f` with a small file system at `dir` that nobody else sees; says so and skips without the
/// right to. `grow` in `f` makes it larger.
fn on_small_disk(dir: &Path, f: impl FnOnce(&dyn Fn()) + Send + 'static) {
    let at = CString::new(dir.as_os_str().as_bytes()).unwrap();
    let mount = move |flags, size: &std::ffi::CStr| {
        // SAFETY: all are strings that live through the call.
        unsafe { libc::mount(c"none".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), flags, size.as_ptr().cast()) }
    };
    std::thread::spawn(move || {
        // SAFETY: plain system calls; they concern this thread and its children only.
        let alone = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) == 0
        };
        if alone && mount(0, c"size=512k") == 0 {
            f(&|| assert_eq!(mount(libc::MS_REMOUNT, c"size=64m"), 0));
        } else {
            eprintln!("skipped: needs root (run it with sudo)");
        }
    })
    .join()
    .unwrap();
}

#[test]
fn a_full_disk_stops_the_vm_and_cont_tries_again() {
    if !have_kvm() {
        return;
    }
    let dir = Dir::new();
    let path = dir.join("small");
    std::fs::create_dir(&path).unwrap();
    let disk = path.join("d.raw");
    on_small_disk(&path.clone(), move |grow| {
        std::fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        let text = format!(
            "{}[[drive]]\nid = \"d0\"\nfile = \"{}\"\nformat = \"raw\"\n",
            machine("", "blkverify count=300"),
            disk.display()
        );
        let mut vm = Vm::start(&text);
        let mut qmp = vm.qmp();
        until(&mut qmp, "io-error");
        assert_eq!(qmp.ok("query-block", json!({}))[0]["io-status"], "nospace");
        // There is still no space: it stops at the same place.
        qmp.ok("cont", json!({}));
        qmp.wait_event("RESUME");
        qmp.wait_event("STOP");
        grow();
        qmp.ok("cont", json!({}));
        qmp.wait_event("SHUTDOWN");
        let out = vm.wait_exit(0);
        assert!(out.contains("blkverify: 300 rounds, 0 bad"), "{out}");
    });
}

#[test]
fn a_snapshot_forgets_what_was_written() {
    if !have_kvm() {
        return;
    }
    let dir = Dir::new();
    let disk = dir.join("d.raw");
    std::fs::write(&disk, vec![0x5a; 4 << 20]).unwrap();
    let text = format!(
        "{}[[drive]]\nfile = \"{}\"\nformat = \"raw\"\nsnapshot = true\n",
        machine("", "blkverify count=50"),
        disk.display()
    );
    let out = Vm::start(&text).wait_exit(0);
    assert!(out.contains("50 rounds, 0 bad"), "{out}");
    assert!(std::fs::read(&disk).unwrap() == vec![0x5a; 4 << 20], "the image has changed");
}
