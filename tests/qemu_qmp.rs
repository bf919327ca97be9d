//! QEMU's official Python client connects and runs a session: `tests/qemu_qmp.py`.

#[path = "kit/process.rs"]
mod kit;

use kit::{LIMIT, Vm, skip};
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn the_official_python_client_runs_a_session() {
    let installed = Command::new("python3").args(["-c", "import qemu.qmp"]).output();
    if !installed.is_ok_and(|o| o.status.success()) {
        return skip("Python's qemu.qmp", "pip install qemu.qmp");
    }
    let vm = Vm::start("[machine]\nname = \"python\"\naccel = \"none\"\nmemory = \"16M\"\n");
    let socket = vm.path("qmp");
    let start = Instant::now();
    while !socket.exists() && start.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_qmp.py");
    let out = Command::new("python3").arg(script).arg(socket).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("session done"), "{text}");
}
