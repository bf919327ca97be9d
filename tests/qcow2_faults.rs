//! Errors at every moment of qcow2's life, injected by `blkdebug` as a user would: whatever fails, nothing that was
//! written is lost, nothing that was flushed is lost either when the process ends there, and `qemu-img check` finds
//! no error (leaked clusters are none).

use minivmm::block::debug::BlkdebugEvent;
use minivmm::block::driver::{Flags, Snapshot};
use minivmm::block::graph::Graph;
use minivmm::block::node::Node;
use minivmm::block::open;
use minivmm::control::formats::{BlockdevOptions, Formats, plan};
use minivmm::control::objects::Objects;
use minivmm::qapi::{Path, Wire};
use minivmm::sys::fdset::FdSets;
use minivmm::sys::iov::{Iov, IovMut};
use serde_json::{Value, json};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[path = "support/qcow2.rs"]
mod support;
use support::{Dir, Rng, contents, have_qemu, id_of, qemu, seed_and_time, tool};

const SECTOR: u64 = 512;
const SIZE: u64 = 2 << 20;
/// The backing file is shorter than the image.
const BACKING: u64 = SIZE - 100 * SECTOR;

/// No error, unless the image says that whoever opens it must rebuild its refcounts; leaks (3) may be.
fn check(path: &str, what: &str) {
    let dirty = std::fs::read(path).unwrap()[79] & 1 != 0;
    if dirty {
        Image::good(path, what).graph.close_all();
    }
    let (code, said) = tool("qemu-img", &["check", path]);
    assert!(code == 0 || code == 3, "{what}: qemu-img check says {code} about {path}: {said}");
}

/// What each sector may hold: ids of writers.
struct Model {
    /// Now.
    now: Vec<Vec<u32>>,
    /// After an end without a close: what was last flushed, or anything later.
    kept: Vec<Vec<u32>>,
}

impl Model {
    fn new() -> Model {
        let now: Vec<_> = (0..SIZE / SECTOR).map(|s| vec![u32::from(s < BACKING / SECTOR)]).collect();
        Model { kept: now.clone(), now }
    }

    /// A change of these sectors to `id` was tried.
    fn change(&mut self, first: u64, count: u64, id: u32, sure: bool) {
        for s in first as usize..(first + count) as usize {
            if sure {
                self.now[s].clear();
            }
            self.now[s].push(id);
            self.kept[s].push(id);
        }
    }

    fn flushed(&mut self) {
        self.kept.clone_from(&self.now);
    }
}

fn verify(node: &Node, allowed: &[Vec<u32>], what: &str) {
    let mut data = vec![0; SIZE as usize];
    // The error may have waited for this.
    let first = node.read(0, &mut IovMut::from_slice(&mut data));
    let done = first.or_else(|_| node.read(0, &mut IovMut::from_slice(&mut data)));
    done.unwrap_or_else(|e| panic!("{what}: reading: {e}"));
    for (s, sector) in data.chunks_exact(SECTOR as usize).enumerate() {
        let id = id_of(sector, s as u64);
        assert!(allowed[s].contains(&id), "{what}: sector {s} is {id}, not one of {:?}", allowed[s]);
    }
}

struct Image {
    graph: Graph,
    node: Arc<Node>,
}

impl Image {
    /// An image that must be good.
    fn good(path: &str, what: &str) -> Image {
        Image::open(path, json!({})).unwrap_or_else(|e| panic!("{what}: {e}"))
    }

    fn open(path: &str, file: Value) -> minivmm::error::Result<Image> {
        let (mut graph, mut fds, objects) = (Graph::new(), FdSets::new(), Objects::default());
        let mut file = file;
        // Nothing is lost with the host here, so nothing need reach its disk.
        let cache = json!({"no-flush": true});
        let image = json!({"driver": "file", "filename": path, "cache": cache});
        match file.get_mut("image") {
            Some(place) => *place = image,
            None => file = image,
        }
        let options = json!({"driver": "qcow2", "node-name": "q", "file": file, "discard": "unmap",
                             "l2-cache-size": 4096, "refcount-cache-size": 32768});
        let plan = plan(BlockdevOptions::take(options, &Path::Root)?)?;
        let node = open::add(&mut graph, &Formats::new(&mut fds, &objects), plan)?;
        Ok(Image { graph, node })
    }
}

/// Rules by which the `nth` occurrence of `event` fails: once, or from then on.
fn rules(event: BlkdebugEvent, errno: i32, nth: i64, once: bool) -> Value {
    let event = event.as_str();
    let steps: Vec<_> = (1..nth).map(|n| json!({"event": event, "state": n, "new_state": n + 1})).collect();
    let error = json!({"event": event, "state": nth, "errno": errno, "once": once});
    json!({"driver": "blkdebug", "image": null, "inject-error": [error], "set-state": steps})
}

/// How many requests failed.
fn work(image: &Image, model: &mut Model, rng: &mut Rng, rounds: u32) -> u32 {
    let node = &image.node;
    let internal = node.driver.internal().unwrap();
    let mut failures = 0;
    let mut failed = |done: io::Result<()>| {
        failures += u32::from(done.is_err());
        done.is_ok()
    };
    let mut snapshots = 0;
    for round in 0..rounds {
        let first = rng.below(SIZE / SECTOR - 1);
        let count = 1 + rng.below((SIZE / SECTOR - first).min(60));
        let (off, len) = (first * SECTOR, count * SECTOR);
        let id = 2 + round;
        match rng.below(16) {
            0 | 1 => {
                let done =
                    failed(node.zero(off, len, if rng.one_in(2) { Flags::MAY_UNMAP } else { Flags::NONE }));
                model.change(first, count, 0, done);
            }
            2 => {
                failed(node.discard(off, len));
                // Old data, or zeroes.
                model.change(first, count, 0, false);
            }
            3 => {
                if failed(node.flush()) {
                    model.flushed();
                }
            }
            4 if snapshots < 4 => {
                let snapshot = Snapshot { name: format!("s{snapshots}"), ..Snapshot::default() };
                if failed(internal.create_snapshot(snapshot)) {
                    snapshots += 1;
                }
            }
            5 if snapshots > 0 => {
                let name = format!("s{}", snapshots - 1);
                if failed(internal.delete_snapshot(None, Some(&name)).map(drop)) {
                    snapshots -= 1;
                }
            }
            6 => {
                let mut data = vec![0; len as usize];
                if failed(node.read(off, &mut IovMut::from_slice(&mut data))) {
                    for (s, sector) in (first..).zip(data.chunks_exact(SECTOR as usize)) {
                        let id = id_of(sector, s);
                        let may = &mut model.now[s as usize];
                        assert!(may.contains(&id), "sector {s} is {id}, not one of {may:?}");
                        *may = vec![id];
                    }
                }
            }
            what => {
                let flags = if what == 7 { Flags::COMPRESSED } else { Flags::NONE };
                let data: Vec<u8> = (first..first + count).flat_map(|s| contents(id, s)).collect();
                let done = failed(node.write(off, &Iov::from_slice(&data), flags));
                model.change(first, count, id, done);
            }
        }
    }
    failures
}

/// A new image with a backing file and something in it.
fn prepare(dir: &Dir, seed: u64) -> (String, Model) {
    let path = |name| dir.path(name).to_str().unwrap().to_string();
    let (base, path) = (path("base.raw"), path("a.qcow2"));
    let data: Vec<u8> = (0..BACKING / SECTOR).flat_map(|s| contents(1, s)).collect();
    std::fs::write(&base, data).unwrap();
    // Small tables, so that much happens: with clusters of 512 bytes an L2 table maps 32 KiB, and a refcount block
    // 32 KiB of the file. Larger ones are copied when they are written in part.
    let options =
        if seed.is_multiple_of(2) { "cluster_size=512,refcount_bits=64" } else { "cluster_size=2048" };
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "-F", "raw", "-b", &base, &path, "2M"]);
    let mut model = Model::new();
    let mut image = Image::open(&path, json!({})).unwrap();
    work(&image, &mut model, &mut Rng::new(seed), 40);
    image.graph.close_all();
    model.flushed();
    (path, model)
}

/// One run; true when the error came.
fn run(event: BlkdebugEvent, errno: i32, nth: i64, once: bool, seed: u64) -> bool {
    let what = format!("{} {errno} nth={nth} once={once} seed={seed}", event.as_str());
    let dir = Dir::new("qcow2-faults");
    let (path, mut model) = prepare(&dir, seed);
    let rng = &mut Rng::new(seed + 1);
    // It may fail to open: then nothing has happened.
    let Ok(mut image) = Image::open(&path, rules(event, errno, nth, once)) else {
        check(&path, &what);
        let mut image = Image::good(&path, &what);
        verify(&image.node, &model.now, &what);
        image.graph.close_all();
        return true;
    };
    let failures = work(&image, &mut model, rng, 90);
    // The process ends: what is in the file now is what there is.
    let left = dir.path("left.qcow2").to_str().unwrap().to_string();
    std::fs::copy(&path, &left).unwrap();
    check(&left, &format!("{what}, left"));
    let mut survivor = Image::good(&left, &what);
    verify(&survivor.node, &model.kept, &format!("{what}, left"));
    survivor.graph.close_all();
    // Or it goes on: an error that was for once is over.
    let whole = once && (image.node.flush().is_ok() || image.node.flush().is_ok());
    if once && !whole {
        // Only an image that cannot tell what it is any more refuses to go on.
        assert!(
            image.node.write(0, &Iov::from_slice(&contents(2, 0)), Flags::NONE).is_err(),
            "{what}: no flush"
        );
    }
    if whole {
        verify(&image.node, &model.now, &what);
    }
    image.graph.close_all();
    drop(image);
    check(&path, &format!("{what}, closed"));
    let mut again = Image::good(&path, &what);
    verify(&again.node, if whole { &model.now } else { &model.kept }, &format!("{what}, closed"));
    again.graph.close_all();
    failures > 0
}

/// The moments that qcow2 has here. (Others are names of QEMU's that do not happen.)
const HAPPEN: &[&str] = &[
    "l1_update",
    "l2_load",
    "l2_update",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "cow_read",
    "cow_write",
    "refblock_load",
    "refblock_update_part",
    "refblock_alloc_hookup",
    "refblock_alloc",
    "cluster_alloc",
    "flush_to_os",
    "flush_to_disk",
    "pwritev",
    "none",
];

/// What is logged belongs to the output of a test that fails.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        eprintln!("{}: {}", record.level(), record.args());
    }
    fn flush(&self) {}
}

#[test]
fn an_error_at_any_moment_loses_nothing() {
    if !have_qemu() {
        return;
    }
    let _ = log::set_logger(&Log).map(|()| log::set_max_level(log::LevelFilter::Warn));
    let (seed, until) = seed_and_time(Duration::ZERO);
    let came: Mutex<Vec<&str>> = Mutex::default();
    let next = AtomicUsize::new(0);
    let some = || {
        loop {
            let n = next.fetch_add(1, Ordering::SeqCst);
            let round = n / BlkdebugEvent::ALL.len();
            if round > 0 && Instant::now() > until {
                break;
            }
            let event = BlkdebugEvent::ALL[n % BlkdebugEvent::ALL.len()];
            let cases = [(libc::EIO, 1, true), (libc::ENOSPC, 5, true), (libc::EIO, 2, false)];
            let cases = if HAPPEN.contains(&event.as_str()) { &cases[..] } else { &cases[..1] };
            for (i, &(errno, nth, once)) in cases.iter().enumerate() {
                // None has no second time.
                let nth = if event == BlkdebugEvent::None { 1 } else { nth };
                if run(event, errno, nth, once, seed + 10 * n as u64 + i as u64) {
                    came.lock().unwrap().push(event.as_str());
                }
            }
        }
    };
    std::thread::scope(|s| {
        s.spawn(some);
        s.spawn(some);
    });
    let mut came = came.into_inner().unwrap();
    // What happens seldom did not, perhaps, after its error was armed: it gets more chances.
    for name in HAPPEN {
        let event =
            BlkdebugEvent::ALL.iter().copied().find(|e| e.as_str() == *name).expect("a moment's name");
        for n in 0..20 {
            if came.contains(name) {
                break;
            }
            if run(event, libc::EIO, 1, true, seed + 1_000_000 + n) {
                came.push(name);
            }
        }
    }
    let missing: Vec<_> = HAPPEN.iter().filter(|e| !came.contains(*e)).collect();
    assert!(
        missing.is_empty(),
        "no error came at {missing:?}: the moments are gone, or the work is too small"
    );
}
