//! Guests that write and verify, while snapshots are taken and jobs stream, commit, are paused, limited
//! and cancelled: what the guests see never changes, images name the right backing files, and qemu-img
//! finds nothing wrong.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long.

use super::backup::{self, Backup, BackupSpec};
use super::commit::{self, Commit};
use super::layers;
use super::mirror::{self, Mirror};
use super::registry::{JobEvent, JobKey, Jobs, Spec};
use super::stream::{self, Stream};
use super::table::{Kind, Status};
use crate::block::driver::{Flags, Perm};
use crate::block::file_open::FilePlan;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec, OnError};
use crate::block::node::Node;
use crate::block::open::{self, Backing, Child, Common, Plan};
use crate::block::snapshot::{Act, Overlay};
use crate::block::testing::{NoEnv, Rng, Scratch, qemu};
use crate::event::{Event, Events};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::plan::Qcow2Plan;
use crate::sys::inbox::Inbox;
use crate::sys::iov::{Iov, IovMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SIZE: u64 = 3 << 20;
const GUESTS: u64 = 3;
const SLOT: u64 = 1536;
/// At the end of the disk each guest has a field for itself, of whole clusters.
const FIELD: u64 = 128 << 10;
const SLOTS: u64 = (SIZE - GUESTS * FIELD) / SLOT;

fn seed() -> u64 {
    std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x05ee_d0b5)
}

fn seconds() -> u64 {
    std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(60)
}

fn name_of(node: &Node) -> String {
    let file = node.driver.edges().into_iter().find(|e| e.role == "file").and_then(|e| e.node());
    file.map(|f| f.driver.filename()).unwrap_or_default()
}

/// The control thread's things.
struct Desk {
    dir: Scratch,
    graph: Graph,
    jobs: Jobs,
    events: Events,
    rng: Rng,
    images: u64,
    ended: Vec<JobEvent>,
}

impl Desk {
    fn new(name: &str, seed: u64) -> Desk {
        Desk {
            dir: Scratch::new(name),
            graph: Graph::new(),
            jobs: Jobs::new(),
            events: Arc::new(Inbox::new().unwrap()),
            rng: Rng(seed),
            images: 0,
            ended: Vec::new(),
        }
    }

    fn plan(path: &str) -> Plan {
        Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", path)) }
    }

    /// A new image that records `below` as its backing file, open without it.
    fn image(&mut self, size: u64, below: Option<&Arc<Node>>) -> Arc<Node> {
        self.images += 1;
        let name = format!("i{}", self.images);
        let path = self.dir.file(&name, 0);
        let mut alone = Graph::new();
        let file = open::add(&mut alone, &NoEnv, Desk::plan(&path)).unwrap();
        let spec = HandleSpec { uses: Perm::ALL, shares: Perm::NONE, ..HandleSpec::default() };
        let user = alone.attach(Some(file.clone()), spec).unwrap();
        let cluster_size = [4096, 16384, 65536][self.rng.below(3) as usize];
        let options = CreateOptions {
            size,
            cluster_size,
            extended_l2: cluster_size > 4096 && self.rng.below(3) == 0,
            backing_file: below.map(|n| name_of(n)),
            backing_format: below.map(|n| n.driver.name().to_string()),
            ..CreateOptions::default()
        };
        create(&file, None, &options).unwrap();
        drop((file, user));
        alone.close_all();
        let driver = Qcow2Plan {
            backing: Backing::Nothing,
            ..Qcow2Plan::new(Child::New(Box::new(Desk::plan(&path))))
        };
        let common = Common { node_name: Some(name), unmap: Some(true), ..Common::default() };
        open::add(&mut self.graph, &NoEnv, Plan { common, driver: Box::new(driver) }).unwrap()
    }

    /// Acts on what the threads said.
    fn turn(&mut self) {
        for event in self.events.take() {
            if let Event::Job(serial) = event {
                self.jobs.serve(&mut self.graph, serial);
            }
        }
        self.ended.extend(std::mem::take(&mut self.jobs.out));
    }

    fn snapshot(&mut self, disk: &Handle) {
        let node = disk.node().unwrap();
        let over = self.image(node.len(), Some(&node));
        let overlay = Act::Overlay(Overlay { node: node.clone(), over: over.clone() });
        self.graph.snapshot(&[overlay], &mut ()).unwrap();
        self.graph.disown(&over);
    }

    fn start(&mut self, kind: Kind, nodes: &[Arc<Node>], work: Box<dyn super::job::Work>) -> JobKey {
        let speed = if self.rng.below(4) == 0 { 1 << 20 } else { 0 };
        let auto_finalize = self.rng.below(3) > 0;
        let spec = Spec { speed, auto_finalize, ..Spec::new("job", kind) };
        let nodes: Vec<_> = nodes.iter().collect();
        let key = self.jobs.create(spec, &self.events.clone(), &nodes, || Ok(work)).unwrap();
        self.jobs.start(&mut self.graph, key);
        key
    }

    fn stream(&mut self, disk: &Handle) -> JobKey {
        let chain: Vec<_> = layers::chain(disk.node().unwrap()).collect();
        // At times into an image below the active one.
        let top = self.rng.below(chain.len() as u64 - 1) as usize;
        let count = self.rng.below((chain.len() - top) as u64) as usize;
        let plan = stream::Plan {
            top: chain[top].clone(),
            from: chain[top + 1..top + 1 + count].to_vec(),
            backing_file: None,
            on_error: OnError::Report,
            filter: None,
            id: "job".into(),
            name_of,
        };
        let work = Box::new(Stream::new(&mut self.graph, plan).unwrap());
        self.start(Kind::Stream, &chain, work)
    }

    fn commit(&mut self, disk: &Handle) -> JobKey {
        let chain: Vec<_> = layers::chain(disk.node().unwrap()).collect();
        let top = 1 + self.rng.below(chain.len() as u64 - 2) as usize;
        let base = top + 1 + self.rng.below((chain.len() - top - 1) as u64) as usize;
        let plan = commit::Plan {
            from: chain[top..base].to_vec(),
            base: chain[base].clone(),
            backing_file: None,
            on_error: OnError::Report,
            filter: None,
            name_of,
        };
        let work = Box::new(Commit::new(&mut self.graph, plan).unwrap());
        self.start(Kind::Commit, &chain, work)
    }

    fn commit_active(&mut self, disk: &Handle) -> JobKey {
        let chain: Vec<_> = layers::chain(disk.node().unwrap()).collect();
        let base = 1 + self.rng.below(chain.len() as u64 - 1) as usize;
        let work = self.active_commit(&chain, base);
        self.start(Kind::Commit, &chain, work)
    }

    fn active_commit(&mut self, chain: &[Arc<Node>], base: usize) -> Box<dyn super::job::Work> {
        let plan = mirror::Plan {
            sync: mirror::Sync::Top(chain[..base].to_vec()),
            commit: true,
            granularity: [4096, 65536][self.rng.below(2) as usize],
            ..mirror::tests::plan(&chain[0], &chain[base])
        };
        Box::new(Mirror::new(&mut self.graph, plan).unwrap())
    }

    /// To a new image, which the guest is switched over to when the job is completed.
    fn mirror(&mut self, disk: &Handle) -> JobKey {
        let source = disk.node().unwrap();
        let below = source.backing();
        let (sync, backing) = match (self.rng.below(3), below) {
            (0, Some(below)) => (mirror::Sync::Top(vec![source.clone()]), Some(below)),
            (1, _) => (mirror::Sync::None, Some(source.clone())),
            _ => (mirror::Sync::Full { zeroed: self.rng.below(2) == 0 }, None),
        };
        let target = self.image(source.len(), backing.as_ref());
        let plan = mirror::Plan {
            sync,
            active: self.rng.below(2) == 0,
            backing,
            granularity: [4096, 65536][self.rng.below(2) as usize],
            ..mirror::tests::plan(&source, &target)
        };
        let work = Box::new(Mirror::new(&mut self.graph, plan).unwrap());
        self.graph.disown(&target);
        self.start(Kind::Mirror, &[source, target], work)
    }

    /// To a new image: it, and what it is to hold: the disk as it is at the moment that the job begins.
    fn backup(&mut self, disk: &Handle) -> (JobKey, Arc<Node>, Vec<u8>) {
        let source = disk.node().unwrap();
        let target = self.image(source.len(), None);
        let quiet = self.graph.quiesce(&[&source], &[]);
        let mut then = vec![0xee; SIZE as usize];
        source.read(0, &mut IovMut::from_slice(&mut then)).unwrap();
        let spec = BackupSpec {
            source: source.clone(),
            target: target.clone(),
            sync: backup::Sync::Full,
            bitmap: None,
            compress: self.rng.below(3) == 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            break_snapshot: false,
            filter: ("before".into(), false),
        };
        let work = Box::new(Backup::new(&mut self.graph, spec).unwrap());
        drop(quiet);
        let key = self.start(Kind::Backup, &[source, target.clone()], work);
        (key, target, then)
    }

    /// Lets a job come to its end, with what a user may do to it on the way. How it ended.
    fn finish(&mut self, key: JobKey) -> &'static str {
        let begun = Instant::now();
        let cancel_at = (self.rng.below(4) == 0).then(|| Duration::from_micros(self.rng.below(60_000)));
        let mut told = false;
        loop {
            self.turn();
            let Some(job) = self.jobs.query().into_iter().next() else { break };
            if job.status == Status::Pending {
                // Guests go on meanwhile.
                std::thread::sleep(Duration::from_micros(self.rng.below(5000)));
                match self.rng.below(5) {
                    0 => self.jobs.cancel_block(&mut self.graph, key, false).unwrap(),
                    _ => self.jobs.finalize(&mut self.graph, key).unwrap(),
                }
                continue;
            }
            let active = matches!(job.status, Status::Running | Status::Ready);
            if active && cancel_at.is_some_and(|at| begun.elapsed() > at) && !told {
                let force = self.rng.below(2) == 0;
                self.jobs.cancel_block(&mut self.graph, key, force).unwrap();
                told = true;
            } else if job.status == Status::Ready && !told && self.rng.below(3) == 0 {
                self.jobs.complete(key).unwrap();
                told = true;
            } else if active && self.rng.below(200) == 0 {
                self.jobs.pause(key).unwrap();
                let until = Instant::now() + Duration::from_millis(5);
                while Instant::now() < until {
                    self.turn();
                }
                if self.jobs.query().iter().any(|j| j.paused && !j.status.is_completed()) {
                    self.jobs.resume(key).unwrap();
                }
            } else if active && self.rng.below(300) == 0 {
                self.jobs.set_speed(key, [0, 4 << 20][self.rng.below(2) as usize]).unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{job:?} does not end");
            std::thread::sleep(Duration::from_micros(200));
        }
        self.turn();
        let how = std::mem::take(&mut self.ended).into_iter().find_map(|e| match e {
            JobEvent::Completed(_, None) => Some("completed"),
            JobEvent::Completed(r, Some(why)) => panic!("{r:?}: {why}"),
            JobEvent::Cancelled(_) => Some("cancelled"),
            _ => None,
        });
        how.unwrap()
    }

    /// Images of other lengths at the bottom, with data where the ones above are short.
    fn short_chain(&mut self) -> Arc<Handle> {
        let low = self.image(SIZE, None);
        low.write(0, &Iov::from_slice(&vec![0x77; SIZE as usize]), Flags::NONE).unwrap();
        let mid = self.image(SIZE / 2, Some(&low));
        let top = self.image(SIZE, Some(&mid));
        for (over, below) in [(&mid, &low), (&top, &mid)] {
            let edge = over.backing_edge().unwrap();
            let quiet = self.graph.quiesce(&[over], &[]);
            self.graph.edit(&quiet, |e| e.set(&edge, Some(below.clone()))).unwrap();
            drop(quiet);
            self.graph.set_read_only(below, true).unwrap();
        }
        let disk = self.graph.attach(Some(top.clone()), HandleSpec::default()).unwrap();
        for node in [&low, &mid, &top] {
            self.graph.disown(node);
        }
        disk
    }

    /// The headers say what the graph says; only the active image is writable; no filter is left.
    fn check_chain(&self, disk: &Handle) {
        let top = disk.node().unwrap();
        assert!(top.filtered().is_none(), "{} was left", top.name);
        for (depth, image) in layers::chain(top).enumerate() {
            let below = image.backing();
            assert!(below.as_ref().is_none_or(|b| b.filtered().is_none()));
            let recorded = image.driver.info();
            assert_eq!(recorded.backing_filename, below.as_ref().map(|b| name_of(b)), "{}", image.name);
            assert_eq!(recorded.backing_format, below.as_ref().map(|b| b.driver.name().to_string()));
            assert_eq!(image.read_only(), depth > 0, "{}", image.name);
        }
    }
}

/// What a guest knows of its slots.
struct Guest {
    id: u64,
    rng: Rng,
    model: Vec<u8>,
    field: u8,
}

impl Guest {
    fn step(&mut self, disk: &Handle) {
        if self.rng.below(100) == 0 {
            self.step_field(disk);
        }
        let slot = self.rng.below(SLOTS / GUESTS) * GUESTS + self.id;
        let off = slot * SLOT;
        if self.rng.below(2) == 0 {
            let value = (self.rng.below(6) * 40) as u8;
            match value {
                0 => {
                    disk.zero(off, SLOT, if self.rng.below(2) == 0 { Flags::MAY_UNMAP } else { Flags::NONE })
                }
                _ => disk.write(off, &Iov::from_slice(&[value; SLOT as usize]), Flags::NONE),
            }
            .unwrap();
            self.model[slot as usize] = value;
        }
        if self.rng.below(200) == 0 {
            disk.flush().unwrap();
        }
        self.verify(disk, slot);
    }

    /// The same with all of its field.
    fn step_field(&mut self, disk: &Handle) {
        let off = SIZE - (self.id + 1) * FIELD;
        match self.rng.below(4) {
            0 => {
                self.field = 200;
                disk.write(off, &Iov::from_slice(&[200; FIELD as usize]), Flags::NONE).unwrap();
            }
            1 => {
                self.field = 0;
                disk.zero(off, FIELD, Flags::MAY_UNMAP).unwrap();
            }
            _ => {}
        }
        self.verify_field(disk);
    }

    fn verify_field(&self, disk: &Handle) {
        let mut back = vec![0xee; FIELD as usize];
        disk.read(SIZE - (self.id + 1) * FIELD, &mut IovMut::from_slice(&mut back)).unwrap();
        let bad = back.iter().position(|b| *b != self.field);
        assert_eq!(bad, None, "field of guest {}, which is {}", self.id, self.field);
    }

    fn verify(&self, disk: &Handle, slot: u64) {
        let mut back = [0xee; SLOT as usize];
        disk.read(slot * SLOT, &mut IovMut::from_slice(&mut back)).unwrap();
        let want = self.model[slot as usize];
        let bad = back.iter().position(|b| *b != want);
        assert!(bad.is_none(), "slot {slot}: {} instead of {want} at byte {bad:?}", back[bad.unwrap_or(0)]);
    }
}

/// What has not been seen yet.
fn missing(counts: &std::collections::BTreeMap<String, u32>) -> Option<&'static str> {
    let all = [
        "stream completed",
        "commit completed",
        "active commit completed",
        "mirror completed",
        "backup completed",
        "snapshot",
    ];
    all.into_iter().find(|what| !counts.contains_key(*what))
}

#[test]
fn guests_never_see_what_jobs_do() {
    let seed = seed();
    eprintln!("SEED={seed}");
    let counts = stress(seed, Duration::from_secs(seconds()), true);
    assert_eq!(missing(&counts), None);
}

/// What jobs did how often. `all`: goes on until each kind of them has ended well.
pub(super) fn stress(seed: u64, time: Duration, all: bool) -> std::collections::BTreeMap<String, u32> {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let mut desk = Desk::new(&format!("jobs-stress-{}", RUNS.fetch_add(1, SeqCst)), seed);
    let disk = desk.short_chain();
    let mut whole = vec![0xee; SIZE as usize];
    disk.read(0, &mut IovMut::from_slice(&mut whole)).unwrap();
    let first: Vec<u8> = whole.chunks(SLOT as usize).map(|c| c[0]).collect();
    let stop = AtomicBool::new(false);
    let requests = AtomicU64::new(0);
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    std::thread::scope(|s| {
        let guests: Vec<_> = (0..GUESTS)
            .map(|id| {
                let (disk, stop, requests, model) = (disk.clone(), &stop, &requests, first.clone());
                s.spawn(move || {
                    let mut guest = Guest { id, rng: Rng(seed ^ (id + 1) << 40), model, field: 0 };
                    while !stop.load(SeqCst) {
                        guest.step(&disk);
                        requests.fetch_add(1, SeqCst);
                    }
                    guest
                })
            })
            .collect();
        // A failure here must let the guests end.
        let control = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let end = Instant::now() + time;
            // However slow the machine is, each kind of job has to end well once.
            let last = end + Duration::from_secs(120);
            let more = |counts: &_| all && missing(counts).is_some() && Instant::now() < last;
            while (Instant::now() < end || more(&counts)) && !guests.iter().any(|g| g.is_finished()) {
                let depth = layers::chain(disk.node().unwrap()).count();
                let what = desk.rng.below(if depth > 6 { 5 } else { 8 });
                let (name, key) = match what {
                    3 => ("mirror", desk.mirror(&disk)),
                    4 => {
                        let (key, target, then) = desk.backup(&disk);
                        let how = desk.finish(key);
                        *counts.entry(format!("backup {how}")).or_default() += 1;
                        desk.check_chain(&disk);
                        let mut copy = vec![0xee; SIZE as usize];
                        target.read(0, &mut IovMut::from_slice(&mut copy)).unwrap();
                        let wrong = (0..copy.len()).find(|&i| copy[i] != then[i]);
                        assert!(how == "cancelled" || wrong.is_none(), "the backup differs at {wrong:?}");
                        desk.graph.disown(&target);
                        drop(target);
                        desk.graph.collect();
                        continue;
                    }
                    0 if depth > 1 => ("stream", desk.stream(&disk)),
                    1 if depth > 2 => ("commit", desk.commit(&disk)),
                    2 if depth > 1 => ("active commit", desk.commit_active(&disk)),
                    _ => {
                        desk.snapshot(&disk);
                        *counts.entry("snapshot".into()).or_default() += 1;
                        desk.check_chain(&disk);
                        std::thread::sleep(Duration::from_micros(desk.rng.below(5000)));
                        continue;
                    }
                };
                let how = desk.finish(key);
                *counts.entry(format!("{name} {how}")).or_default() += 1;
                desk.check_chain(&disk);
                // Whatever counts is open.
                desk.dir.sweep("i");
            }
            desk.jobs.cancel_all(&mut desk.graph);
        }));
        stop.store(true, SeqCst);
        let guests: Vec<_> = guests.into_iter().map(|g| g.join()).collect();
        control.unwrap();
        for guest in guests {
            let guest = guest.unwrap();
            (guest.id..SLOTS).step_by(GUESTS as usize).for_each(|slot| guest.verify(&disk, slot));
            guest.verify_field(&disk);
        }
    });
    eprintln!("{} requests; {counts:?}", requests.load(SeqCst));
    disk.read(0, &mut IovMut::from_slice(&mut whole)).unwrap();
    let images: Vec<_> = layers::chain(disk.node().unwrap()).map(|n| name_of(&n)).collect();
    desk.graph.close_all();
    let Some(tool) = qemu("qemu-img") else { return counts };
    for image in &images {
        let out = std::process::Command::new(&tool).args(["check", "-q", image]).output().unwrap();
        assert!(out.status.success(), "{image}: {}", String::from_utf8_lossy(&out.stderr));
    }
    let raw = desk.dir.path("raw");
    let done =
        std::process::Command::new(&tool).args(["convert", "-O", "raw", &images[0], &raw]).status().unwrap();
    assert!(done.success());
    assert!(std::fs::read(&raw).unwrap() == whole, "qemu-img reads something else");
    counts
}

#[test]
fn an_active_commit_that_waits_to_be_finalized_leaves_nothing_to_copy() {
    let mut desk = Desk::new("jobs-commit-waits", seed());
    let disk = desk.short_chain();
    let chain: Vec<_> = layers::chain(disk.node().unwrap()).collect();
    let work = desk.active_commit(&chain, 2);
    let spec = Spec { auto_finalize: false, ..Spec::new("job", Kind::Commit) };
    let nodes: Vec<_> = chain.iter().collect();
    let key = desk.jobs.create(spec, &desk.events.clone(), &nodes, || Ok(work)).unwrap();
    desk.jobs.start(&mut desk.graph, key);
    let until = |desk: &mut Desk, status| {
        let start = Instant::now();
        while desk.jobs.query().first().is_some_and(|j| j.status != status) {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", desk.jobs.query());
            desk.turn();
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    until(&mut desk, Status::Ready);
    desk.jobs.complete(key).unwrap();
    until(&mut desk, Status::Pending);
    for slot in 0..SIZE / SLOT {
        disk.write(slot * SLOT, &Iov::from_slice(&[slot as u8; SLOT as usize]), Flags::NONE).unwrap();
    }
    disk.zero(5000, 100_000, Flags::MAY_UNMAP).unwrap();
    disk.discard(0, SIZE / 2).unwrap();
    let left: u64 = chain[0].bitmaps().iter().map(|b| b.count()).sum();
    assert_eq!(left, 0, "bytes are left to be copied while the guest waits");
    let mut before = vec![0; SIZE as usize];
    disk.read(0, &mut IovMut::from_slice(&mut before)).unwrap();
    desk.jobs.finalize(&mut desk.graph, key).unwrap();
    until(&mut desk, Status::Null);
    assert!(Arc::ptr_eq(&disk.node().unwrap(), &chain[2]));
    let mut after = vec![0; SIZE as usize];
    disk.read(0, &mut IovMut::from_slice(&mut after)).unwrap();
    assert!(before == after);
}

#[test]
fn a_short_image_hides_what_lies_below_it() {
    (0..3).for_each(short);
}

/// A stream (0), a commit (1) or a stream of everything (2) with a short image between long ones.
pub(super) fn short(job: u32) {
    {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, SeqCst);
        let mut desk = Desk::new(&format!("jobs-short-{run}"), seed());
        let disk = desk.short_chain();
        let look = || {
            let mut whole = vec![0xee; SIZE as usize];
            disk.read(0, &mut IovMut::from_slice(&mut whole)).unwrap();
            whole
        };
        let before = look();
        assert_eq!((before[0], before[SIZE as usize - 1]), (0x77, 0));
        let chain: Vec<_> = layers::chain(disk.node().unwrap()).collect();
        let (top, mid, base) = (chain[0].clone(), chain[1].clone(), chain[2].clone());
        let (backing_file, on_error, filter) = (None, OnError::Report, None);
        let from = vec![mid];
        let (kind, work): (_, Box<dyn super::job::Work>) = match job {
            0 => {
                let plan = stream::Plan {
                    top,
                    from,
                    backing_file,
                    on_error,
                    filter: None,
                    id: "job".into(),
                    name_of,
                };
                (Kind::Stream, Box::new(Stream::new(&mut desk.graph, plan).unwrap()))
            }
            1 => {
                let plan = commit::Plan { from, base, backing_file, on_error, filter, name_of };
                (Kind::Commit, Box::new(Commit::new(&mut desk.graph, plan).unwrap()))
            }
            // All of it, down to nothing.
            _ => {
                let from = vec![chain[1].clone(), base];
                let plan = stream::Plan {
                    top,
                    from,
                    backing_file,
                    on_error,
                    filter: None,
                    id: "job".into(),
                    name_of,
                };
                (Kind::Stream, Box::new(Stream::new(&mut desk.graph, plan).unwrap()))
            }
        };
        let key = desk.start(kind, &chain, work);
        drop(chain);
        let start = Instant::now();
        while !desk.jobs.is_empty() {
            desk.turn();
            if desk.jobs.query().first().is_some_and(|j| j.status == Status::Pending) {
                desk.jobs.finalize(&mut desk.graph, key).unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", desk.jobs.query());
            std::thread::sleep(Duration::from_millis(1));
        }
        desk.turn();
        let good = |e: &JobEvent| matches!(e, JobEvent::Completed(_, None));
        assert!(desk.ended.iter().any(good), "{:?}", desk.ended);
        desk.check_chain(&disk);
        assert!(look() == before, "job {job} has changed what the guest sees");
    }
}

/// What a guest zeroes hides what is behind it, also when the disk has become another image, whose backing
/// file was not there before.
#[test]
fn zeroes_on_a_mirror_whose_backing_file_comes_later_hide_it() {
    // `named`: the new image's header speaks of it.
    for (none, active, late, named) in (0..16).map(|n| (n & 1 > 0, n & 2 > 0, n & 4 > 0, n & 8 > 0)) {
        let mut desk = Desk::new(&format!("jobs-bare-{none}-{active}-{late}-{named}"), seed());
        let disk = desk.short_chain();
        // Data everywhere, and an overlay.
        disk.write(0, &Iov::from_slice(&vec![0x55; SIZE as usize]), Flags::NONE).unwrap();
        desk.snapshot(&disk);
        let top = disk.node().unwrap();
        let below = if none { top.clone() } else { top.backing().unwrap() };
        let hide = || {
            disk.zero(1 << 20, 256 << 10, Flags::MAY_UNMAP).unwrap();
            disk.zero(2 << 20, 1536, Flags::NONE).unwrap();
        };
        let sync = match none {
            true => mirror::Sync::None,
            false => mirror::Sync::Top(vec![top.clone()]),
        };
        if !late {
            hide();
        }
        let target = desk.image(SIZE, named.then_some(&below));
        let backing = Some(below);
        let plan = mirror::Plan { sync, active, backing, ..mirror::tests::plan(&top, &target) };
        let work = Box::new(Mirror::new(&mut desk.graph, plan).unwrap());
        desk.graph.disown(&target);
        let key = desk
            .jobs
            .create(Spec::new("job", Kind::Mirror), &desk.events.clone(), &[&top, &target], || Ok(work))
            .unwrap();
        desk.jobs.start(&mut desk.graph, key);
        let start = Instant::now();
        while !desk.jobs.is_empty() {
            desk.turn();
            if desk.jobs.query().first().is_some_and(|j| j.status == Status::Ready) {
                if late {
                    hide();
                }
                desk.jobs.complete(key).unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(Arc::ptr_eq(&disk.node().unwrap(), &target));
        let mut whole = vec![0xee; SIZE as usize];
        disk.read(0, &mut IovMut::from_slice(&mut whole)).unwrap();
        let is = |at: usize, n: usize, v: u8| whole[at..at + n].iter().all(|b| *b == v);
        assert!(is(1 << 20, 256 << 10, 0), "none {none} active {active} late {late} named {named}");
        assert!(is(2 << 20, 1536, 0), "none {none} active {active} late {late} named {named}");
        assert!(is((2 << 20) + 1536, 4096, 0x55), "none {none} active {active} late {late} named {named}");
    }
}
