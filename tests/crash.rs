//! qcow2 across power cuts: the image is put on a disk that records every write and sync, and is
//! rebuilt as it could be after a cut at any of them: what was synced is there; of what was not,
//! each 512-byte sector is there or not, in any order.
//!
//! Every such state must open, be free of errors (leaks are allowed), and hold all that was
//! flushed: each sector has the contents of the last flush, or those of a later request.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long. For the test of the tests, `MUTANT=name`
//! takes one mutant only, and `SPAN=n` looks at so many workloads for one that catches it.

#[path = "support/powercut.rs"]
mod powercut;
#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Driver, Flags, Snapshot};
use minivmm::block::node::{Node, NodeOptions};
use minivmm::qcow2::create::CreateOptions;
use minivmm::qcow2::mutant::Mutant;
use minivmm::qcow2::open::Options;
use minivmm::sys::iov::Iov;
use powercut::{apply, cut};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::*;

/// What a sector holds: the request that wrote it; 0 for zeroes, `UNDER` for the backing file's.
type Id = u32;
const UNDER: Id = 0xffff_fffe;
/// The request that writes after the crash.
const AFTER: Id = 0xffff_fffd;

/// A request: what the log's length was when it began, and what it makes of which sectors.
struct Request {
    began: usize,
    sectors: std::ops::Range<u64>,
    id: Id,
}

/// What a completed flush promised: from this length of the log on, these contents.
struct Promise {
    at: usize,
    ids: Vec<Id>,
    requests: usize,
    /// The snapshots that exist, each with what it holds.
    snapshots: Vec<(String, Vec<Id>)>,
}

struct Run {
    start: Vec<u8>,
    log: Vec<Op>,
    requests: Vec<Request>,
    promises: Vec<Promise>,
    /// All sizes of the disk in sectors, with the length of the log from which on they are possible.
    sizes: Vec<(usize, u64)>,
    /// Snapshots that were being taken, and deleted, with the length of the log at the beginning.
    taken: Vec<(usize, String, Vec<Id>)>,
    deleted: Vec<(usize, String)>,
    under: Option<Arc<Node>>,
    options: CreateOptions,
}

fn caches(rng: &mut Rng, bug: Option<Mutant>) -> Options {
    match rng.below(2) {
        0 => Options { bug, ..Options::default() },
        _ => Options { l2_cache_size: Some(512), refcount_cache_size: Some(512), bug, ..Options::default() },
    }
}

/// A random workload, recorded.
fn record(rng: &mut Rng, steps: u64, bug: Option<Mutant>) -> Run {
    let version = if rng.one_in(4) { 2 } else { 3 };
    let extended_l2 = version == 3 && rng.one_in(4);
    let options = CreateOptions {
        size: (64 + rng.below(400)) * 512,
        version,
        // Many small ones: they get new refcount blocks and bigger tables soon.
        cluster_size: if extended_l2 { 16384 } else { 512 << (rng.below(4) * rng.below(2)) },
        refcount_bits: if version == 2 { 16 } else { 1 << (rng.below(4) + rng.below(4)) },
        extended_l2,
        ..CreateOptions::default()
    };
    let sectors = options.size / 512;
    let under = rng.one_in(2).then(|| {
        let bytes: Vec<u8> = (0..sectors.saturating_sub(10)).flat_map(|s| contents(UNDER, s)).collect();
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        Node::new("backing", Box::new(OnDisk(Disk::new(bytes))), options)
    });
    let disk = fresh(&options);
    let start = disk.bytes.lock().unwrap().clone();
    *disk.log.lock().unwrap() = Some(Vec::new());
    let at = || disk.log.lock().unwrap().as_ref().unwrap().len();
    let mut image = open_image(&disk, under.clone(), caches(rng, bug)).expect("open");
    let mut ids: Vec<Id> = (0..sectors)
        .map(|s| if under.is_some() && s < sectors.saturating_sub(10) { UNDER } else { 0 })
        .collect();
    let mut run = Run {
        start,
        log: Vec::new(),
        requests: Vec::new(),
        promises: vec![Promise { at: 0, ids: ids.clone(), requests: 0, snapshots: Vec::new() }],
        taken: Vec::new(),
        deleted: Vec::new(),
        sizes: vec![(0, sectors)],
        under: under.clone(),
        options: options.clone(),
    };
    let per_cluster = options.cluster_size / 512;
    let mut snapshots: Vec<(String, Vec<Id>)> = Vec::new();
    // Narrow refcounts cannot count several compressed clusters in a cluster and snapshots of them.
    let snappy = version == 3 && options.refcount_bits >= 16 && rng.one_in(2);
    for step in 0..steps {
        let size = ids.len() as u64;
        let first = rng.below(size);
        let most = if rng.one_in(5) { 200 } else { 2 * per_cluster };
        let end = (first + 1 + rng.below(most)).min(size);
        let (began, id) = (at(), step as Id + 1);
        let mut note = |run: &mut Run, sectors: std::ops::Range<u64>, id: Id| {
            ids[sectors.start as usize..sectors.end as usize].fill(id);
            run.requests.push(Request { began, sectors, id });
        };
        match rng.below(if snappy { 19 } else { 16 }) {
            16.. => {
                let inside = image.internal().unwrap();
                let n = rng.below(snapshots.len() as u64 + 1) as usize;
                match rng.below(3) {
                    0 if snapshots.len() < 3 => {
                        let name = format!("snap{step}");
                        run.taken.push((began, name.clone(), ids.clone()));
                        let snapshot = Snapshot { name: name.clone(), ..Snapshot::default() };
                        inside.create_snapshot(snapshot).expect("create");
                        snapshots.push((name, ids.clone()));
                    }
                    1 if n < snapshots.len() => {
                        run.deleted.push((began, snapshots[n].0.clone()));
                        inside.delete_snapshot(None, Some(&snapshots[n].0)).expect("delete");
                        snapshots.remove(n);
                    }
                    2 if n < snapshots.len() => {
                        let (name, then) = &snapshots[n];
                        inside.apply_snapshot(None, Some(name)).expect("apply");
                        for (s, id) in then.iter().enumerate() {
                            let sectors = s as u64..s as u64 + 1;
                            run.requests.push(Request { began, sectors, id: *id });
                        }
                        if then.len() < ids.len() {
                            let sectors = then.len() as u64..ids.len() as u64;
                            run.requests.push(Request { began, sectors, id: 0 });
                        }
                        run.sizes.push((began, then.len() as u64));
                        ids.clone_from(then);
                    }
                    _ => continue,
                }
                let requests = run.requests.len();
                run.promises.push(Promise {
                    at: at(),
                    ids: ids.clone(),
                    requests,
                    snapshots: snapshots.clone(),
                });
            }
            0..8 => {
                let data: Vec<u8> = (first..end).flat_map(|s| contents(id, s)).collect();
                let flags = if rng.one_in(3) { Flags::COMPRESSED } else { Flags::NONE };
                image.write(first * 512, &Iov::from_slice(&data), flags).expect("write");
                note(&mut run, first..end, id);
            }
            8 | 9 => {
                let flags = if rng.one_in(2) { Flags::MAY_UNMAP } else { Flags::NONE };
                match image.zero(first * 512, (end - first) * 512, flags) {
                    Ok(()) => note(&mut run, first..end, 0),
                    // Part of it may have been done before it was refused? It must not.
                    Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTSUP)),
                }
            }
            10 | 11 => {
                let first = first.next_multiple_of(per_cluster);
                let end = if end == size { end } else { end / per_cluster * per_cluster };
                if first < end && image.discard(first * 512, (end - first) * 512).is_ok() {
                    note(&mut run, first..end, 0);
                }
            }
            12 | 13 => {
                image.flush().expect("flush");
                let requests = run.requests.len();
                run.promises.push(Promise {
                    at: at(),
                    ids: ids.clone(),
                    requests,
                    snapshots: snapshots.clone(),
                });
            }
            14 if rng.one_in(3) => {
                let new = (size + rng.below(100)).saturating_sub(rng.below(100)).max(8);
                // A resize to the same size does nothing, so it promises nothing.
                let new = if new == size { size + 1 } else { new };
                run.sizes.push((began, new));
                image.resize(new * 512).expect("resize");
                if new < size {
                    // Gone for good, once it is done; never back with a later growth.
                    run.requests.push(Request { began, sectors: new..size, id: 0 });
                }
                ids.resize(new as usize, 0);
                let requests = run.requests.len();
                run.promises.push(Promise {
                    at: at(),
                    ids: ids.clone(),
                    requests,
                    snapshots: snapshots.clone(),
                });
            }
            15 if rng.one_in(3) => {
                image.close().expect("close");
                drop(image);
                let requests = run.requests.len();
                run.promises.push(Promise {
                    at: at(),
                    ids: ids.clone(),
                    requests,
                    snapshots: snapshots.clone(),
                });
                image = open_image(&disk, under.clone(), caches(rng, bug)).expect("open");
            }
            _ => {}
        }
    }
    let _ = image.close();
    run.log = disk.log.lock().unwrap().take().unwrap();
    run
}

/// A workload of several threads, recorded. Each sector has one thread that writes it, so that it
/// is known what was last; but clusters are shared.
fn record_threads(rng: &mut Rng, steps: u64, bug: Option<Mutant>) -> Run {
    const THREADS: u64 = 3;
    let options = CreateOptions {
        size: (192 + rng.below(200)) * 512,
        cluster_size: 512 << rng.below(4),
        refcount_bits: 8 << rng.below(4),
        ..CreateOptions::default()
    };
    let sectors = options.size / 512;
    let per_cluster = options.cluster_size / 512;
    // Behind this, whole clusters belong to thread 0, which discards them.
    let common = sectors / 4 * 3 / per_cluster * per_cluster;
    let disk = fresh(&options);
    let start = disk.copy();
    *disk.log.lock().unwrap() = Some(Vec::new());
    disk.jitter.store(40, std::sync::atomic::Ordering::SeqCst);
    let at = || disk.log.lock().unwrap().as_ref().unwrap().len();
    let image = open_image(&disk, None, caches(rng, bug)).expect("open");
    let ids = vec![0; sectors as usize];
    let run = Run {
        start,
        log: Vec::new(),
        requests: Vec::new(),
        promises: vec![Promise { at: 0, ids: ids.clone(), requests: 0, snapshots: Vec::new() }],
        taken: Vec::new(),
        deleted: Vec::new(),
        sizes: vec![(0, sectors)],
        under: None,
        options,
    };
    // What has completed: ids, and the requests in the order of their completion.
    let done = Mutex::new((ids, run));
    std::thread::scope(|s| {
        for t in 0..THREADS {
            let (image, done) = (&image, &done);
            let mut rng = Rng::new(rng.draw());
            s.spawn(move || {
                for step in 0..steps {
                    let id = (step * THREADS + t) as Id + 1;
                    let began = at();
                    let mut first = rng.below(common / 3 / THREADS) * 3 * THREADS + t * 3;
                    let mut end = (first + 1 + rng.below(3)).min(common);
                    if t == 0 && rng.one_in(3) {
                        first = common + rng.below(sectors - common);
                        end = (first + 1 + rng.below(12)).min(sectors);
                    }
                    let id = match rng.below(8) {
                        0 => {
                            let (ids, requests) = {
                                let done = done.lock().unwrap();
                                (done.0.clone(), done.1.requests.len())
                            };
                            image.flush().expect("flush");
                            let mut done = done.lock().unwrap();
                            done.1.promises.push(Promise { at: at(), ids, requests, snapshots: Vec::new() });
                            continue;
                        }
                        1 => {
                            image.zero(first * 512, (end - first) * 512, Flags::MAY_UNMAP).expect("zero");
                            0
                        }
                        2 if first >= common => {
                            first = first.next_multiple_of(per_cluster);
                            end = end / per_cluster * per_cluster;
                            if first >= end {
                                continue;
                            }
                            image.discard(first * 512, (end - first) * 512).expect("discard");
                            0
                        }
                        _ => {
                            let data: Vec<u8> = (first..end).flat_map(|s| contents(id, s)).collect();
                            let flags = if rng.one_in(3) { Flags::COMPRESSED } else { Flags::NONE };
                            image.write(first * 512, &Iov::from_slice(&data), flags).expect("write");
                            id
                        }
                    };
                    let mut done = done.lock().unwrap();
                    done.0[first as usize..end as usize].fill(id);
                    done.1.requests.push(Request { began, sectors: first..end, id });
                }
            });
        }
    });
    let _ = image.close();
    let (_, mut run) = done.into_inner().unwrap();
    run.log = disk.log.lock().unwrap().take().unwrap();
    run
}

struct Judge<'a> {
    run: &'a Run,
    say: String,
    dir: Option<Dir>,
    states: u64,
    /// Hashes of all of them, of all workloads.
    seen: &'a mut HashSet<u64>,
    verbose: bool,
}

impl Judge<'_> {
    /// Every snapshot that was promised is there, and none that nobody took.
    fn snapshots(&self, image: &dyn Driver, promise: &Promise, point: usize, say: &str) {
        let there = image.internal().unwrap().snapshots().unwrap_or_else(|e| panic!("{say}: {e}"));
        for (name, _) in &promise.snapshots {
            let deleted = self.run.deleted.iter().any(|(at, n)| *at <= point && n == name);
            assert!(deleted || there.iter().any(|s| s.name == *name), "{say}: {name} is lost");
        }
        for s in &there {
            let taken = self.run.taken.iter().any(|(at, n, _)| *at <= point && *n == s.name);
            assert!(taken, "{say}: {} is from the future", s.name);
        }
    }

    /// Every snapshot holds what it held when it was taken.
    fn snapshots_hold(&self, image: &dyn Driver, say: &str) {
        let inside = image.internal().unwrap();
        for s in inside.snapshots().unwrap() {
            let (_, _, ids) = self.run.taken.iter().find(|(_, n, _)| *n == s.name).unwrap();
            inside.apply_snapshot(Some(&s.id), None).unwrap_or_else(|e| panic!("{say}: apply: {e}"));
            assert_eq!(image.len(), ids.len() as u64 * 512, "{say}: size of {}", s.name);
            let got = read(image, 0, ids.len() * 512).unwrap();
            for (n, bytes) in got.chunks_exact(512).enumerate() {
                assert_eq!(id_of(bytes, n as u64), ids[n], "{say}: sector {n} of {}", s.name);
            }
        }
    }

    /// Opens one state and holds it against what was promised at `point` of the log.
    fn state(&mut self, rng: &mut Rng, bytes: Vec<u8>, point: usize) {
        self.states += 1;
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        self.seen.insert(hasher.finish());
        let say = format!("{} point={point}", self.say);
        if let Some(dir) = &self.dir
            && self.states.is_multiple_of(97)
        {
            let path = dir.path("state.qcow2");
            std::fs::write(&path, &bytes).unwrap();
            // A dirty image says itself that it is to be repaired.
            if bytes[79] & 1 == 0 {
                qemu_check(&path, true);
            }
        }
        let disk = Disk::new(bytes);
        let image = open_image(&disk, self.run.under.clone(), Options::default())
            .unwrap_or_else(|e| panic!("{say}: open: {e}"));
        let report = image.check().unwrap_or_else(|e| panic!("{say}: check: {e}"));
        assert!(report.errors.is_empty(), "{say}: {report:?}");
        let promise = self.run.promises.iter().rfind(|p| p.at <= point).unwrap();
        self.snapshots(&image, promise, point, &say);
        let size = image.len() / 512;
        // A size is allowed if it was the last one before the cut, or one after the promise.
        let sizes = &self.run.sizes;
        let last = sizes.iter().rfind(|(at, _)| *at <= promise.at).unwrap().1;
        let fits = size == promise.ids.len() as u64
            || size == last
            || sizes.iter().any(|(at, s)| *at >= promise.at && *at <= point && *s == size);
        assert!(fits, "{say}: size {size}, promised {}", promise.ids.len());
        let got = read(&image, 0, image.len() as usize).unwrap_or_else(|e| panic!("{say}: read: {e}"));
        let mut allowed: Vec<Vec<Id>> =
            (0..size).map(|s| vec![promise.ids.get(s as usize).copied().unwrap_or(0)]).collect();
        for r in self.run.requests[promise.requests..].iter().filter(|r| r.began <= point) {
            for s in r.sectors.clone().filter(|s| *s < size) {
                allowed[s as usize].push(r.id);
            }
        }
        for (s, bytes) in got.chunks_exact(512).enumerate() {
            let id = id_of(bytes, s as u64);
            if !allowed[s].contains(&id) && self.verbose {
                eprintln!("sizes {:?}", self.run.sizes);
                for p in &self.run.promises {
                    eprintln!("promise at {}: {:x?} (of {} sectors)", p.at, p.ids.get(s), p.ids.len());
                }
                for r in self.run.requests.iter().filter(|r| r.sectors.contains(&(s as u64))) {
                    eprintln!("request began {}: {:x} {:?}", r.began, r.id, r.sectors);
                }
            }
            assert!(
                allowed[s].contains(&id),
                "{say}: sector {s} holds {id:#x} ({:02x?}), allowed {:x?}",
                &bytes[..8],
                allowed[s]
            );
        }
        if self.states.is_multiple_of(5) && size > 0 {
            // Life goes on.
            for _ in 0..6 {
                let s = rng.below(size);
                write(&image, s * 512, &contents(AFTER, s)).unwrap_or_else(|e| panic!("{say}: {e}"));
                let got = read(&image, s * 512, 512).unwrap();
                assert_eq!(id_of(&got, s), AFTER, "{say}: written after the cut");
            }
            self.snapshots_hold(&image, &say);
            image.close().unwrap_or_else(|e| panic!("{say}: close: {e}"));
            let report = image.check().unwrap();
            assert!(report.errors.is_empty(), "{say}: after the cut: {report:?}");
        }
    }
}

/// Every cut of one workload; notes the states. Answers how many there were.
fn cuts(seed: u64, threads: bool, qemu: bool, bug: Option<Mutant>, seen: &mut HashSet<u64>) -> u64 {
    let mut rng = Rng::new(seed);
    let run = match threads {
        false => record(&mut rng, 60, bug),
        true => record_threads(&mut rng, 40, bug),
    };
    let say = format!("SEED={seed} {:?} backing={}", run.options, run.under.is_some());
    let dir = qemu.then(|| Dir::new("crash"));
    let mut judge = Judge { run: &run, say, dir, states: 0, seen, verbose: bug.is_none() };
    let mut synced = run.start.clone();
    let mut open: Vec<Op> = Vec::new();
    for (i, op) in run.log.iter().enumerate() {
        match op {
            Op::Sync => {
                // Before it returns all may still be lost.
                let bytes = cut(&mut rng, &synced, &open);
                judge.state(&mut rng, bytes, i);
                open.drain(..).for_each(|op| apply(&mut synced, &op));
            }
            op => {
                open.push(op.clone());
                for _ in 0..2 {
                    let bytes = cut(&mut rng, &synced, &open);
                    judge.state(&mut rng, bytes, i + 1);
                }
            }
        }
    }
    judge.state(&mut rng, synced, run.log.len());
    judge.states
}

/// Catches: data linked before they are written or synced; refcounts raised too late or lowered
/// too early; a cluster punched or reused while the disk still refers to it; a moved table that
/// the header names too early; a shrink that leaves stale data for a later growth.
#[test]
fn every_power_cut_leaves_a_good_image_with_all_that_was_flushed() {
    let (seed, until) = seed_and_time(Duration::from_secs(5));
    let qemu = have_qemu();
    let (mut n, mut states, mut seen) = (0, 0, HashSet::new());
    // A soak has that many different ones, however slow the machine is.
    let least = if std::env::var_os("SOAK").is_some() { 100_000 } else { 1 };
    while n < 3 || seen.len() < least || Instant::now() < until {
        states += cuts(seed + n, false, qemu, None, &mut seen);
        n += 1;
    }
    eprintln!("{states} crash states, {} different ones, of {n} workloads", seen.len());
}

/// The same with several threads at once. Not repeatable by its seed, for threads meet by chance.
#[test]
fn power_cuts_under_several_threads() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let qemu = have_qemu();
    let (mut n, mut states, mut seen) = (0, 0, HashSet::new());
    while n < 2 || Instant::now() < until {
        states += cuts(seed + n, true, qemu, None, &mut seen);
        n += 1;
    }
    eprintln!("{states} crash states, {} different ones, of {n} workloads", seen.len());
}

/// The suite notices these bugs: each makes some state of some workload fail.
#[test]
fn mutants_are_caught() {
    if !cfg!(debug_assertions) {
        return eprintln!("skipped: mutants exist only with debug assertions");
    }
    std::panic::set_hook(Box::new(|_| {}));
    let span = std::env::var("SPAN").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    // With the workload to begin with: one that is known to catch it saves time.
    let list = [
        (Mutant::LinkBeforeData, 1),
        (Mutant::NoBarrier, 0),
        (Mutant::EarlyFree, 0),
        (Mutant::HalfMovedTable, 4),
        (Mutant::TableBeforeBlock, 18),
        (Mutant::RefcountsLast, 0),
        (Mutant::DirtyTable, 51),
        (Mutant::StaleGrowth, 9),
    ];
    let only = std::env::var("MUTANT").ok();
    let survivors: Vec<Mutant> = list
        .into_iter()
        .filter(|(bug, _)| only.as_ref().is_none_or(|name| *name == format!("{bug:?}")))
        .filter(|(bug, first)| {
            let began = Instant::now();
            let caught = (*first..first + span)
                .find(|n| fails(|| _ = cuts(*n, false, false, Some(*bug), &mut HashSet::new())));
            eprintln!("{bug:?}: caught by workload {caught:?}, {:?}", began.elapsed());
            if let Some(n) = caught {
                // By the mutant, not by the workload itself.
                cuts(n, false, false, None, &mut HashSet::new());
            }
            caught.is_none()
        })
        .map(|(bug, _)| bug)
        .collect();
    let alone = fails(|| _ = cuts(0, true, false, Some(Mutant::NoBarrier), &mut HashSet::new()));
    let _ = std::panic::take_hook();
    assert!(alone, "not caught with several threads: NoBarrier");
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
}
