use super::*;
use crate::block::handle::HandleSpec;
use crate::block::node::{Node, NodeOptions};
use crate::block::testing::{Mem, Scratch, qemu};

fn disk(len: usize) -> Arc<Handle> {
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    let node = Node::new("n", Box::new(Mem::new(len)), options);
    Handle::new(Some(node), HandleSpec::default())
}

fn text(handle: &Handle, line: &str) -> String {
    let words: Vec<String> = line.split(' ').filter(|w| !w.is_empty()).map(String::from).collect();
    let mut out = String::new();
    command(handle, &words, &UnderWay::default(), &mut out);
    out
}

/// Without what depends on the clock.
fn steady(text: &str) -> Vec<String> {
    let lines = text.lines().map(|l| l.rsplit("qemu-io> ").next().unwrap_or(l));
    let lines = lines.filter(|l| !l.is_empty()).map(|l| match l.split_once(" ops; ") {
        Some((ops, _)) => format!("{ops} ops"),
        None => l.to_string(),
    });
    lines.collect()
}

/// Lines that the real tool and ours must answer alike, in this order, on a disk of 16 MiB.
const SCRIPT: &[&str] = &[
    "read -P 0 0 64k",
    "write -P 5 0 4k",
    "write -P0x61 512 32",
    "read -v 504 41",
    "write -z -u 0 1M",
    "read -P 3 0 4k",
    "read -P 0 -s 512 -l 1k 0 4k",
    "read -P 3 -s 1k -l 512 512 4k",
    "write -P 010 1M 1.5k",
    "read -P 8 1M 1536",
    "length",
    "l",
    "flush",
    "discard 0 1M",
    "write -f 0 512",
    "write -q 0 4k",
    "w 1k 3k",
    "r 1k 3k",
    "d 0 64k",
    "sleep 1",
    "read x 5",
    "read 0 y",
    "read 0 1kk",
    "read 0 .5k",
    "write -u 0 4k",
    "write -z -P 3 0 4k",
    "read 100M 4k",
    "read 16M 512",
    "write 16776704 1k",
    "discard 100M 4k",
    "read -P 300 0 1",
    "read -P x 0 1",
    "read -P 3 -s 0 -l 99k 0 4k",
    "read 0 3G",
    "write -z 0 0x1000",
];

#[test]
fn answers_as_the_real_tool_does() {
    let Some(tool) = qemu("qemu-io") else { return };
    let dir = Scratch::new("qemu-io");
    let image = dir.file("a.raw", 16 << 20);
    let ours = disk(16 << 20);
    for line in SCRIPT {
        let run = std::process::Command::new(&tool)
            .args(["-f", "raw", "-d", "unmap", "-c", line, &image])
            .output()
            .unwrap();
        let want = steady(&String::from_utf8_lossy(&run.stdout));
        assert_eq!(steady(&text(&ours, line)), want, "{line}");
    }
}

#[test]
fn what_is_not_understood_is_said() {
    let d = disk(4096);
    for (line, want) in [
        ("foo", "command \"foo\" not found"),
        ("read", "bad argument count 0 to read, expected at least 2 arguments"),
        ("read -Z 0 1", "read: invalid option -- 'Z'"),
        ("read -: 0 1", "read: invalid option -- ':'"),
        ("read 0 1 -P", "read: option requires an argument -- 'P'"),
        ("length 5", "bad argument count 1 to length, expected 0 arguments"),
        ("write -c 0 512", "write: invalid option -- 'c'"),
        ("read 0 99999999999999999999", "Parsing error: argument too large -- 99999999999999999999"),
        ("read 0 16E", "Parsing error: argument too large -- 16E"),
        ("read 0 é", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- é"),
        ("aio_read 4096 512", "readv failed: Input/output error"),
        ("aio_write 4096 512", "aio_write failed: Input/output error"),
    ] {
        assert_eq!(text(&d, line).trim_end(), want, "{line}");
    }
}

#[test]
fn only_asynchronous_requests_are_counted() {
    let d = disk(8192);
    for line in ["read -q 0 512", "write -q 0 512", "flush", "discard -q 0 512", "read -q 8192 1"] {
        text(&d, line);
    }
    for kind in crate::block::stats::KINDS {
        assert_eq!(d.stats.get(kind), Default::default(), "{kind:?}");
    }
    for line in ["aio_read 0 512", "aio_write 0 1k", "aio_read 8192 1", "aio_write -i 0 512", "aio_flush"] {
        text(&d, line);
    }
    let (r, w, f) = (d.stats.get(Kind::Read), d.stats.get(Kind::Write), d.stats.get(Kind::Flush));
    assert_eq!((r.operations, r.bytes, r.failed, r.invalid), (1, 512, 1, 0));
    assert_eq!((w.operations, w.bytes, w.failed, w.invalid), (1, 1024, 0, 1));
    assert_eq!(f.operations, 1);
}

#[test]
fn requests_go_on_behind_the_callers_back_and_a_flush_waits_for_them() {
    let d = disk(8192);
    let io = QemuIo::default();
    for n in 0..8 {
        assert_eq!(io.run(&d, &format!("aio_write -q -P {} {} 512", n + 1, n * 512), false), "");
    }
    assert_eq!(io.run(&d, "aio_flush", false), "");
    assert_eq!(d.stats.get(Kind::Write).operations, 8);
    let mut data = vec![0; 4096];
    d.read(0, &mut IovMut::from_slice(&mut data)).unwrap();
    assert!(data.chunks(512).enumerate().all(|(n, c)| c.iter().all(|&b| b as usize == n + 1)));
    *io.0.lock() = (MOST, 0);
    let full = io.run(&d, "length", true);
    assert_eq!(full, "Error: 64 qemu-io commands are under way already\r\n");
}

#[test]
fn times_above_a_second_have_another_form() {
    let said = |ms| {
        let mut out = String::new();
        super::super::qemu_io_text::report(&mut out, "wrote", 0, 4096, Duration::from_millis(ms));
        out.lines().nth(1).unwrap().to_string()
    };
    assert_eq!(said(36), "4 KiB, 1 ops; 00.03 sec (111.111 KiB/sec and 27.7778 ops/sec)");
    // Recorded from the real tool on a null-co with this latency.
    assert!(said(1236).starts_with("4 KiB, 1 ops; 0:00:01.23 ("), "{}", said(1236));
    assert!(said(61236).starts_with("4 KiB, 1 ops; 0:01:01.23 ("), "{}", said(61236));
}

#[test]
fn breakpoints_need_a_blkdebug() {
    let d = disk(4096);
    for (line, want) in [
        ("break", "bad argument count 0 to break, expected 2 arguments"),
        ("wait_break", "bad argument count 0 to wait_break, expected 1 arguments"),
        ("break write_aio A B", "bad argument count 3 to break, expected 2 arguments"),
        ("break write_aio A", "Could not set breakpoint: Operation not supported"),
        ("remove_break A", "Could not remove breakpoint A: Operation not supported"),
        ("resume A", "Could not resume request: Operation not supported"),
    ] {
        assert_eq!(text(&d, line).trim_end(), want, "{line}");
    }
}
