//! Internal snapshots when things go wrong: each change of the file may fail, for once or from then
//! on; a read that began before; and power cuts in images of version 2, which have no dirty bit, beside QEMU's own order.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Driver, Flags, Internal, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::qcow2::Qcow2;
use minivmm::qcow2::create::CreateOptions;
use minivmm::qcow2::mutant::Mutant;
use minivmm::qcow2::open::{self, Options};
use minivmm::sys::iov::{Iov, IovMut};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::*;

const SIZE: usize = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Create,
    Delete,
    Apply,
}

const ALL: [What; 3] = [What::Create, What::Delete, What::Apply];

/// An image with snapshots `a` and `b`, whose disk differs from both; and the three contents.
fn start(version: u32) -> (Arc<Disk>, [Vec<u8>; 3]) {
    let o = CreateOptions { size: SIZE as u64, cluster_size: 512, version, ..CreateOptions::default() };
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options::default()).expect("open");
    let mut now = vec![0; SIZE];
    let mut put = |off: usize, len: usize, byte: u8| {
        write(&image, off as u64, &vec![byte; len]).expect("write");
        now[off..off + len].fill(byte);
        now.clone()
    };
    let take = |name: &str| {
        let snapshot = Snapshot { name: name.into(), ..Snapshot::default() };
        image.internal().unwrap().create_snapshot(snapshot).expect("create");
    };
    put(0, 9000, 1);
    let a = put(100 << 10, 3000, 2);
    take("a");
    let b = put(4000, 9000, 3);
    take("b");
    let last = put(2000, 4000, 4);
    image.close().expect("close");
    (disk, [a, b, last])
}

fn act(image: &Qcow2, what: What) -> io::Result<()> {
    let inside = image.internal().unwrap();
    match what {
        What::Create => inside.create_snapshot(Snapshot { name: "c".into(), ..Snapshot::default() }),
        What::Delete => inside.delete_snapshot(None, Some("b")).map(drop),
        What::Apply => inside.apply_snapshot(None, Some("a")),
    }
}

/// What the disk holds, and the names of the snapshots, before and after.
fn states(what: What, contents: &[Vec<u8>; 3]) -> [(Vec<u8>, Vec<&'static str>); 2] {
    let before = (contents[2].clone(), vec!["a", "b"]);
    let after = match what {
        What::Create => (contents[2].clone(), vec!["a", "b", "c"]),
        What::Delete => (contents[2].clone(), vec!["a"]),
        What::Apply => (contents[0].clone(), vec!["a", "b"]),
    };
    [before, after]
}

fn state(image: &Qcow2) -> (Vec<u8>, Vec<String>) {
    let data = read(image, 0, image.len() as usize).expect("read");
    let list = image.internal().unwrap().snapshots().expect("list");
    (data, list.into_iter().map(|s| s.name).collect())
}

/// The index of the state that the image is in.
fn which(image: &Qcow2, states: &[(Vec<u8>, Vec<&'static str>); 2], say: &str) -> usize {
    let now = state(image);
    let found = states.iter().position(|(data, names)| *data == now.0 && *names == now.1);
    found.unwrap_or_else(|| panic!("{say}: neither as before nor as after: {:?}", now.1))
}

/// Every snapshot holds what it did.
fn snapshots_hold(image: &Qcow2, contents: &[Vec<u8>; 3], say: &str) {
    let inside = image.internal().unwrap();
    for s in inside.snapshots().expect("list") {
        inside.apply_snapshot(Some(&s.id), None).unwrap_or_else(|e| panic!("{say}: apply {}: {e}", s.name));
        let old = match s.name.as_str() {
            "a" => &contents[0],
            "b" => &contents[1],
            _ => &contents[2],
        };
        assert!(state(image).0 == *old, "{say}: snapshot {}", s.name);
    }
}

/// Opens what is on the disk now, as after a crash: one of the two states, in order.
fn reopen(bytes: Vec<u8>, states: &[(Vec<u8>, Vec<&'static str>); 2], contents: &[Vec<u8>; 3], say: &str) {
    let disk = Disk::new(bytes);
    let image = open_image(&disk, None, Options::default()).unwrap_or_else(|e| panic!("{say}: open: {e}"));
    let report = image.check().expect("check");
    assert!(report.errors.is_empty(), "{say}: on disk: {report:?}");
    which(&image, states, say);
    snapshots_hold(&image, contents, say);
    image.close().expect("close");
    let report = image.check().expect("check");
    assert!(report.errors.is_empty(), "{say}: at the end: {report:?}");
}

/// Catches: an operation that answers with an error but has been done, or with success and has not
/// been; memory that says one thing and the disk another; an image that is still written to when
/// its refcounts could not be put right.
#[test]
fn an_error_means_as_before() {
    for what in ALL {
        let (disk, contents) = start(3);
        let (bytes, states) = (disk.copy(), states(what, &contents));
        for once in [true, false] {
            let mut refused = 0;
            for n in 1.. {
                let say = format!("{what:?}, change {n} fails, once: {once}");
                let disk = Disk::new(bytes.clone());
                let image = open_image(&disk, None, Options::default()).expect("open");
                disk.fail_once.store(once, Ordering::SeqCst);
                disk.fail_after.store(n, Ordering::SeqCst);
                let done = act(&image, what);
                let hit = match once {
                    true => !disk.fail_once.load(Ordering::SeqCst),
                    false => disk.fail_after.load(Ordering::SeqCst) == 1,
                };
                disk.fail_once.store(false, Ordering::SeqCst);
                disk.fail_after.store(0, Ordering::SeqCst);
                // The process could end here.
                reopen(disk.copy(), &states, &contents, &say);
                let now = which(&image, &states, &say);
                let mut wanted = states[now].0.clone();
                // The disk is well again: either the image is, too, or it says that it is not.
                let first = write(&image, 3000, &[9; 700]);
                match (&done, &first) {
                    (Ok(()), _) => assert_eq!(now, 1, "{say}: it says that it is done"),
                    (Err(_), Ok(())) => assert_eq!(now, 0, "{say}: an error"),
                    (Err(_), Err(_)) => {}
                }
                match first {
                    Ok(()) => {
                        wanted[3000..3700].fill(9);
                        image.close().unwrap_or_else(|e| panic!("{say}: close: {e}"));
                        assert!(state(&image).0 == wanted, "{say}: after a write");
                        let report = image.check().expect("check");
                        assert!(report.errors.is_empty(), "{say}: {report:?}");
                        snapshots_hold(&image, &contents, &say);
                    }
                    Err(e) => {
                        assert_eq!(e.raw_os_error(), Some(libc::EIO), "{say}");
                        assert!(!once, "{say}: one failure could have been repaired");
                        refused += 1;
                        let before = disk.copy();
                        drop(image.close());
                        assert!(disk.copy() == before, "{say}: it was written to");
                        reopen(before, &states, &contents, &say);
                    }
                }
                if !hit {
                    assert!(n > 8, "{say}: nothing failed");
                    break;
                }
            }
            assert!(once || refused > 0, "{what:?}: no failure was beyond repair");
        }
    }
}

fn cut(synced: &[u8], open: &[Op], keep: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut bytes = synced.to_vec();
    for (_, op) in open.iter().enumerate().filter(|(i, _)| keep(*i)) {
        apply(&mut bytes, op);
    }
    bytes
}

fn apply(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(off, data) => {
            let end = *off as usize + data.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*off as usize..end].copy_from_slice(data);
        }
        Op::Resize(len) => bytes.resize(*len as usize, 0),
        Op::Sync => {}
    }
}

/// `qemu-img check -r all` mends it: no error is left, and no leak. Answers whether there were errors.
fn mends(path: &Path, say: &str) -> bool {
    let name = path.to_str().unwrap();
    let (code, _) = tool("qemu-img", &["check", "-f", "qcow2", name]);
    let (_, text) = tool("qemu-img", &["check", "-q", "-f", "qcow2", "-r", "all", name]);
    let (after, all) = tool("qemu-img", &["check", "-f", "qcow2", name]);
    assert_eq!(after, 0, "{say}: {text}{all}");
    code == 2
}

/// Version 2 has no dirty bit, so a power cut within an operation may leave refcounts and COPIED
/// flags that do not agree. No data are at risk: the image opens and holds one of the two states with
/// all its snapshots, with and without a repair, and `qemu-img check -r all` puts it right.
#[test]
fn power_cuts_in_version_2() {
    let qemu = have_qemu();
    let (seed, _) = seed_and_time(std::time::Duration::ZERO);
    let mut rng = Rng::new(seed);
    let dir = Dir::new("snapshot-v2");
    for what in ALL {
        let (disk, contents) = start(2);
        let states = states(what, &contents);
        let mut synced = disk.copy();
        *disk.log.lock().unwrap() = Some(Vec::new());
        let image = open_image(&disk, None, Options::default()).expect("open");
        act(&image, what).expect("the operation");
        drop(image);
        let log = disk.log.lock().unwrap().take().unwrap();
        let (mut open, mut errors, mut all): (Vec<Op>, u32, u32) = (Vec::new(), 0, 0);
        for (i, op) in log.iter().enumerate() {
            match op {
                Op::Sync => open.drain(..).for_each(|op| apply(&mut synced, &op)),
                op => open.push(op.clone()),
            }
            let bits = rng.draw();
            for (n, bytes) in
                [cut(&synced, &open, |_| true), cut(&synced, &open, |i| bits >> (i % 64) & 1 != 0)]
                    .into_iter()
                    .enumerate()
            {
                let say = format!("{what:?}, SEED={seed}, change {i}.{n}");
                all += 1;
                // As it is: all is there, and stays there.
                let disk = Disk::new(bytes.clone());
                let image = open_image(&disk, None, Options::default()).expect("open");
                which(&image, &states, &say);
                snapshots_hold(&image, &contents, &say);
                drop(image);
                if qemu && (n == 1 || i % 3 == 0) {
                    let path = dir.path("state.qcow2");
                    std::fs::write(&path, &bytes).unwrap();
                    errors += u32::from(mends(&path, &say));
                    let disk = Disk::new(std::fs::read(&path).unwrap());
                    reopen(disk.copy(), &states, &contents, &say);
                }
            }
        }
        eprintln!("{what:?}: {errors} of {all} states need a repair");
        assert!(what != What::Apply || errors == 0, "applying needs no repair");
    }
}

/// A power cut that keeps, of what was not synced, one write alone: the one that should have come
/// last, too.
fn one_write_alone(what: What, bug: Option<Mutant>) {
    let (disk, contents) = start(3);
    let states = states(what, &contents);
    let mut synced = disk.copy();
    *disk.log.lock().unwrap() = Some(Vec::new());
    let image = open_image(&disk, None, Options { bug, ..Options::default() }).expect("open");
    act(&image, what).expect("the operation");
    drop(image);
    let log = disk.log.lock().unwrap().take().unwrap();
    let mut open: Vec<Op> = Vec::new();
    for (i, op) in log.iter().enumerate() {
        if !matches!(op, Op::Sync) {
            open.push(op.clone());
            continue;
        }
        for n in 0..open.len() {
            let bytes = cut(&synced, &open, |i| i == n);
            reopen(bytes, &states, &contents, &format!("{what:?}, of the sync at {i} write {n}"));
        }
        open.drain(..).for_each(|op| apply(&mut synced, &op));
    }
}

#[test]
fn no_write_is_on_disk_before_what_it_needs() {
    ALL.into_iter().for_each(|what| one_write_alone(what, None));
    if cfg!(debug_assertions) {
        std::panic::set_hook(Box::new(|_| {}));
        let noticed = fails(|| one_write_alone(What::Apply, Some(Mutant::MovedUnsynced)));
        let _ = std::panic::take_hook();
        assert!(noticed, "this test notices nothing");
    }
}

/// The same for QEMU's own order: `qemu-img snapshot` on a layer that records what is written.
#[test]
fn qemus_own_order_has_that_window_too() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("snapshot-qemu");
    for (what, arguments) in
        [(What::Create, ["-c", "c"]), (What::Delete, ["-d", "b"]), (What::Apply, ["-a", "a"])]
    {
        let (disk, _) = start(2);
        let path = dir.save("image.qcow2", &disk);
        let (name, log) = (path.to_str().unwrap(), dir.path("log"));
        std::fs::write(&log, "").unwrap();
        let image = format!(
            "driver=qcow2,file.driver=blklogwrites,file.file.driver=file,file.file.filename={name},\
             file.log.driver=file,file.log.filename={}",
            log.to_str().unwrap()
        );
        let args = ["snapshot", "--image-opts", arguments[0], arguments[1], &image];
        let (code, text) = tool("qemu-img", &args);
        if code != 0 && text.contains("Unknown driver") {
            return eprintln!("skipped: this qemu-img has no driver blklogwrites");
        }
        assert_eq!(code, 0, "{text}");
        // A super block, then entries, each with its data, all in units of 512 bytes.
        let log = std::fs::read(&log).unwrap();
        let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
        let (entries, mut at, mut bytes) = (word(16), 512, disk.copy());
        let (mut flushed, mut errors) = (bytes.clone(), 0);
        for _ in 0..entries {
            let (sector, count, flags) = (word(at) as usize, word(at + 8) as usize, word(at + 16));
            at += 512;
            if flags & 4 == 0 {
                let data = &log[at..at + count * 512];
                at += count * 512;
                let end = (sector + count) * 512;
                bytes.resize(bytes.len().max(end), 0);
                bytes[sector * 512..end].copy_from_slice(data);
            }
            // What a completed flush left: a cut here cannot leave anything better.
            if flags & 1 != 0 && bytes != flushed {
                flushed.clone_from(&bytes);
                std::fs::write(&path, &bytes).unwrap();
                errors += u32::from(mends(&path, "QEMU's"));
            }
        }
        eprintln!("{what:?}: {errors} states of QEMU's own need a repair");
        assert!(errors > 0 || what == What::Apply, "{what:?}: QEMU has a better order now: use it");
    }
}

/// Reads of the places `at` wait, each once, until their place is taken away from `held`.
#[derive(Default)]
struct Gates {
    at: [AtomicU64; 2],
    held: [AtomicU64; 2],
}

struct Gated(OnDisk, Arc<Gates>);

impl Driver for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn grows(&self) -> bool {
        true
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        for (at, held) in self.1.at.iter().zip(&self.1.held) {
            if off != 0 && at.compare_exchange(off, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                held.store(off, Ordering::SeqCst);
                until(|| held.load(Ordering::SeqCst) != off);
            }
        }
        self.0.read(off, to)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.0.write(off, from, flags)
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.0.discard(off, len)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn resize(&self, len: u64) -> io::Result<()> {
        self.0.resize(len)
    }
}

/// Waits, but not for ever; answers whether it became true.
fn until(f: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(2);
    while !f() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    f()
}

/// A read is at the L2 page that it missed when a snapshot's deletion begins. It must not go on to the data
/// before that is over: what the deletion frees could not go while it is there, and the flags would be set
/// by refcounts that are still to be lowered.
#[test]
fn a_read_that_missed_its_page_waits_for_a_deletion() {
    let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).expect("open");
    write(&image, 0, &[1; 8192]).expect("write");
    image.create_snapshot(Snapshot { name: "s".into(), ..Snapshot::default() }).expect("create");
    image.close().expect("close");
    let word = |at: u64| u64::from_be_bytes(disk.copy()[at as usize..][..8].try_into().unwrap());
    let (snapshots, table) = (word(64), word(word(40)) & 0x00ff_ffff_ffff_fe00);
    let data = word(table) & 0x00ff_ffff_ffff_fe00;
    let gates = Arc::new(Gates::default());
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    let file = Node::new("file", Box::new(Gated(OnDisk(disk.clone()), gates.clone())), options);
    let image =
        open::open(edge("file", file), Edge::new("backing", None), None, Options::default()).expect("open");
    std::thread::scope(|s| {
        let [page, list] = &gates.at;
        let [reader, deleter] = &gates.held;
        page.store(table, Ordering::SeqCst);
        let read = s.spawn(|| read(&image, 0, 4096));
        assert!(until(|| reader.load(Ordering::SeqCst) == table), "the read is at its page");
        list.store(snapshots, Ordering::SeqCst);
        let delete = s.spawn(|| image.delete_snapshot(None, Some("s")));
        assert!(until(|| deleter.load(Ordering::SeqCst) == snapshots), "the deletion has begun");
        page.store(data, Ordering::SeqCst);
        reader.store(0, Ordering::SeqCst);
        // Time enough to go on, if it does.
        std::thread::sleep(Duration::from_millis(100));
        page.store(0, Ordering::SeqCst);
        deleter.store(0, Ordering::SeqCst);
        delete.join().expect("thread").expect("delete");
        reader.store(0, Ordering::SeqCst);
        assert_eq!(read.join().expect("thread").expect("read"), [1; 4096]);
    });
    image.close().expect("close");
    let report = image.check().expect("check");
    assert!(report.errors.is_empty() && report.leaks == 0, "{report:?}");
}
