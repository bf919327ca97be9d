//! A disk whose storage is full: the guest's write stops the VM, and `cont` does it again. The tiny
//! guest in the real binary, on a small file system that only this test sees.

#[path = "kit/process.rs"]
mod kit;
#[path = "support/small_disk.rs"]
mod small_disk;

use kit::{Vm, fixtures, have, have_kvm, run};
use serde_json::json;
use small_disk::fill;
use std::path::{Path, PathBuf};

/// Runs `f` with a directory that has 1 MiB in all.
fn on_a_small_disk(f: impl FnOnce(PathBuf) + Send + 'static) {
    if have_kvm() {
        small_disk::on_a_small_disk(1, f);
    }
}

fn stops_and_goes_on(small: &Path, image: &Path, format: &str) {
    let filling = fill(small, 0);
    let text = format!(
        "[machine]\nmemory = \"16M\"\npaused = true\n[boot]\nkernel = \"@GUEST\"\n[[serial]]\nstdio = true\n\
         [[drive]]\nif = \"virtio\"\nid = \"d0\"\nfile = {image:?}\nformat = \"{format}\"\n"
    );
    let mut vm = Vm::start(&text);
    let mut qmp = vm.qmp();
    qmp.ok("cont", json!({}));
    let event = qmp.wait_event("BLOCK_IO_ERROR")["data"].take();
    assert_eq!((&event["device"], &event["operation"]), (&json!("d0"), &json!("write")));
    assert_eq!((&event["action"], &event["nospace"]), (&json!("stop"), &json!(true)));
    assert_eq!(event["reason"], "No space left on device");
    // The first `cont` comes before there is space. (A second BLOCK_IO_ERROR may come a second later:
    // there is at most one in a second.)
    for space in [false, true] {
        qmp.wait_event("STOP");
        assert_eq!(qmp.ok("query-status", json!({}))["status"], "io-error");
        assert_eq!(qmp.ok("query-block", json!({}))[0]["io-status"], "nospace");
        assert!(!vm.output().contains("sector 128"), "{}", vm.output());
        if space {
            std::fs::remove_file(&filling).unwrap();
        }
        qmp.ok("cont", json!({}));
    }
    assert!(vm.wait_exit(0).contains("sector 128: written by the tiny guest: verified"));
}

#[test]
fn a_write_to_a_full_raw_disk_is_done_after_cont() {
    on_a_small_disk(|small| {
        let image = small.join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        stops_and_goes_on(&small, &image, "raw");
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[128 * 512..].starts_with(b"written by the tiny guest"));
    });
}

#[test]
fn a_write_to_a_full_qcow2_overlay_is_done_after_cont() {
    if !have("qemu-img", "qemu-utils") {
        return;
    }
    on_a_small_disk(|small| {
        let (image, base) = (small.join("disk.qcow2"), fixtures().join("hello.qcow2"));
        let (image_text, base) = (image.to_str().unwrap(), base.to_str().unwrap());
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, image_text]);
        stops_and_goes_on(&small, &image, "qcow2");
        run("qemu-img", &["check", "-q", image_text]);
        // The guest writes what the fixture has there already.
        run("qemu-img", &["compare", "-q", image_text, base]);
    });
}
