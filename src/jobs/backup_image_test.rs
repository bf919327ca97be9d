//! Backups of random disks to random images, under guests that write in small pieces, with targets that
//! fail now and then and jobs that are cancelled: what the image has in the end is the disk as it was,
//! as qemu-img sees it.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long.

use super::backup::{Backup, BackupSpec, BitmapMode, Sync};
use super::job::Work;
use super::registry::{JobKey, Spec};
use super::table::{Kind, Status};
use super::testing::Desk;
use crate::block::driver::{Driver, Flags};
use crate::block::file_open::FilePlan;
use crate::block::handle::{Handle, OnError};
use crate::block::node::{DetectZeroes, Edge, Node, NodeOptions};
use crate::block::open::{self, Backing, Child, Common, Plan};
use crate::block::raw::RawPlan;
use crate::block::snapshot::{Act, Overlay};
use crate::block::testing::{NoEnv, Rng, Scratch, qemu};
use crate::qcow2::plan::Qcow2Plan;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// A filter whose requests fail now and then, after half of them was done.
struct Flaky {
    file: Arc<Edge>,
    /// One of so many fails; 0: none.
    one_of: u64,
    count: AtomicU64,
}

impl Flaky {
    fn fails(&self) -> bool {
        let n = self.count.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst);
        self.one_of > 0 && Rng(n | 1).below(self.one_of) == 0
    }
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

impl Driver for Flaky {
    fn name(&self) -> &'static str {
        "flaky"
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone()]
    }
    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }
    fn compresses(&self) -> bool {
        self.file.peek(|n| n.driver.compresses()).unwrap_or(false)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let file = self.file.need()?;
        if !self.fails() {
            return file.write(off, from, flags);
        }
        if !flags.contains(Flags::COMPRESSED) && from.len() > 1 {
            file.write(off, &from.slice(0, from.len() / 2), flags)?;
        }
        Err(no_space())
    }
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        if self.fails() {
            return Err(no_space());
        }
        self.file.need()?.zero(off, len, flags)
    }
}

struct Lab {
    dir: Scratch,
    desk: Desk,
    rng: Rng,
    files: u64,
    len: u64,
    /// The sector from which on guests write, or all of the disk is theirs.
    window: Arc<AtomicU64>,
    what: String,
}

/// How a disk of a lab is used at once.
struct Guests<'a> {
    stop: &'a AtomicBool,
}

impl Drop for Guests<'_> {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
    }
}

/// A guest's requests until it is told to stop; what fails, fails.
fn write_at_random(disk: &Handle, stop: &AtomicBool, seed: u64, window: &AtomicU64) {
    let (mut rng, len) = (Rng(seed | 1), disk.len());
    let sectors = len / 512;
    while !stop.load(SeqCst) {
        let first = match window.load(SeqCst) {
            u64::MAX => rng.below(sectors),
            from => (from + rng.below(512)).min(sectors - 1),
        };
        let most = [1, 8, 16, 150][rng.below(4) as usize];
        let n = (1 + rng.below(most)).min(sectors - first);
        let (first, n) = match rng.below(2) {
            0 => (first, n),
            _ => (first & !7, n.next_multiple_of(8).min(sectors - (first & !7))),
        };
        let (off, n) = (first * 512, n * 512);
        let _ = match rng.below(6) {
            0 => disk.zero(off, n, Flags::NONE),
            1 => disk.zero(off, n, Flags::MAY_UNMAP),
            2 => disk.discard(off, n),
            _ => disk.write(off, &Iov::from_slice(&vec![rng.draw() as u8; n as usize]), Flags::NONE),
        };
        if rng.below(8) == 0 {
            std::thread::sleep(Duration::from_micros(rng.below(2000)));
        }
    }
}

impl Lab {
    fn new(seed: u64) -> Lab {
        static LABS: AtomicU64 = AtomicU64::new(0);
        let dir = Scratch::new(&format!("backups-{}", LABS.fetch_add(1, SeqCst)));
        let mut rng = Rng(seed);
        let len = (2 << 20) + rng.below(6000) * 512;
        Lab { dir, desk: Desk::new(), rng, files: 0, len, window: Arc::default(), what: String::new() }
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.rng.below(list.len() as u64) as usize]
    }

    fn tool(&self, args: &[&str]) {
        let out = Command::new("qemu-img").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.success(),
            "{args:?}: {said}{}; {}",
            String::from_utf8_lossy(&out.stdout),
            self.what
        );
    }

    /// A new image: its format and file. `raw`: it may be raw; `filled`: it may hold all of it at once, and
    /// so hide what it is laid above.
    fn create(&mut self, raw: bool, filled: bool) -> (&'static str, String) {
        self.files += 1;
        let path = self.dir.path(&format!("f{}", self.files));
        let len = self.len.to_string();
        if raw && self.rng.below(4) == 0 {
            // What was there before does not matter.
            let fill = vec![self.pick(&[0, 0xaa]); self.len as usize];
            std::fs::write(&path, if fill[0] == 0 { Vec::new() } else { fill }).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_len(self.len).unwrap();
            self.what += &format!(" raw {path}");
            return ("raw", path);
        }
        let cluster: u64 = self.pick(&[512, 4096, 65536, 65536, 2 << 20]);
        let mut options = format!("cluster_size={cluster}");
        if cluster >= 16384 && self.rng.below(3) == 0 {
            options += ",extended_l2=on";
        }
        match self.rng.below(6) {
            0 if filled => options += ",preallocation=metadata",
            1 => options += ",lazy_refcounts=on",
            2 => options += &format!(",data_file={path}.data"),
            _ => {}
        }
        self.what += &format!(" qcow2 {options}");
        self.tool(&["create", "-q", "-f", "qcow2", "-o", &options, &path, &len]);
        ("qcow2", path)
    }

    fn open(&mut self, (format, path): (&str, &str), backing: Backing) -> Arc<Node> {
        let direct = self.rng.below(3) == 0;
        let common = Common { unmap: Some(true), direct: Some(direct), ..Common::default() };
        let file = Plan { common, driver: Box::new(FilePlan::new("file", path)) };
        let file = Child::New(Box::new(file));
        let driver: Box<dyn open::Open> = match format {
            "raw" => Box::new(RawPlan { file, offset: None, size: None }),
            _ => Box::new(Qcow2Plan { backing, ..Qcow2Plan::new(file) }),
        };
        let detect = self.pick(&[DetectZeroes::Off, DetectZeroes::Off, DetectZeroes::Unmap]);
        let common =
            Common { detect_zeroes: Some(detect), ..Common { unmap: Some(true), ..Common::default() } };
        let node = open::open(&mut self.desk.graph, &NoEnv, Plan { common, driver }).unwrap();
        self.desk.graph.own(&node);
        node
    }

    /// A disk with data here and there; behind it an image with other data, if `backing`.
    fn disk(&mut self, backing: bool) -> (Arc<Node>, Option<String>) {
        let below = backing.then(|| {
            let path = self.dir.path("base");
            let bytes: Vec<u8> = (0..self.len).map(|i| 1 + (i >> 12) as u8 % 200).collect();
            std::fs::write(&path, bytes).unwrap();
            path
        });
        let (format, path) = self.create(!backing, true);
        let behind = match &below {
            None => Backing::Nothing,
            Some(path) => {
                let file = Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", path)) };
                let raw = RawPlan { file: Child::New(Box::new(file)), offset: None, size: None };
                let common = Common { read_only: Some(true), ..Common::default() };
                Backing::Child(Child::New(Box::new(Plan { common, driver: Box::new(raw) })))
            }
        };
        let node = self.open((format, &path), behind);
        for _ in 0..self.rng.below(30) {
            let off = self.rng.below(self.len / 512) * 512;
            let n = ((1 + self.rng.below(300)) * 512).min(self.len - off);
            let byte = self.rng.draw() as u8 | 1;
            node.write(off, &Iov::from_slice(&vec![byte; n as usize]), Flags::NONE).unwrap();
        }
        (node, below)
    }

    /// Starts a backup to a new image: what the disk was at that moment, the image, and its node.
    fn start(&mut self, disk: &Arc<Node>, sync: Sync, bitmap: Option<&BitmapSync>, flaky: bool) -> Begun {
        let (format, path) = self.create(sync == Sync::Full, sync == Sync::Full);
        let image = self.open((format, &path), Backing::Nothing);
        let one_of = if flaky { self.pick(&[0, 3, 20]) } else { 0 };
        let filter = Flaky {
            file: Edge::new("file", Some(image.clone())),
            one_of,
            count: AtomicU64::new(self.rng.below(1000)),
        };
        let options = NodeOptions { unmap: true, ..NodeOptions::default() };
        let target = Node::new(format!("flaky{}", self.files), Box::new(filter), options);
        self.desk.graph.add(target.clone()).unwrap();
        self.desk.graph.own(&target);
        let compress = format == "qcow2" && !self.what.contains("data_file") && self.rng.below(4) == 0;
        self.what += &format!(" compress {compress} {sync:?} fails {one_of}");
        let spec = BackupSpec {
            source: disk.clone(),
            target: target.clone(),
            sync,
            bitmap: bitmap.map(|b| (b.0.clone(), b.1)),
            compress,
            on_source_error: OnError::Report,
            on_target_error: OnError::Stop,
            break_snapshot: false,
            filter: ("before".into(), false),
        };
        let quiet = self.desk.graph.quiesce(&[disk], &[]);
        let mut then = vec![0xee; self.len as usize];
        disk.read(0, &mut IovMut::from_slice(&mut then)).unwrap();
        let graph = &mut self.desk.graph;
        let make = || Ok(Box::new(Backup::new(graph, spec)?) as Box<dyn Work>);
        let speed = [0, 0, 8 << 20][self.rng.below(3) as usize];
        let job = Spec { speed, ..Spec::new("b", Kind::Backup) };
        let key = self.desk.jobs.create(job, &self.desk.events.clone(), &[disk], make).unwrap();
        drop(quiet);
        // Guests come to much before the job does, at times.
        std::thread::sleep(Duration::from_micros(self.rng.below(3000)));
        self.desk.jobs.start(&mut self.desk.graph, key);
        Begun { key, then, path, format, nodes: [target, image] }
    }

    /// An overlay comes to lie above a disk, at times: guests write to it from now on.
    fn overlay(&mut self, disk: &Arc<Node>) {
        if self.rng.below(2) == 0 {
            return;
        }
        std::thread::sleep(Duration::from_micros(self.rng.below(5000)));
        let (format, path) = self.create(false, false);
        let over = self.open((format, &path), Backing::Nothing);
        self.what += " overlay";
        let act = Act::Overlay(Overlay { node: disk.clone(), over });
        self.desk.graph.snapshot(&[act], &mut ()).unwrap();
    }

    /// Lets it come to its end; true: a good one. The image is closed then.
    fn finish(&mut self, begun: Begun, cancel: bool) -> (bool, Vec<u8>, &'static str, String) {
        let start = Instant::now();
        let cancel_at = cancel.then(|| Duration::from_micros(self.rng.below(20_000)));
        while !self.desk.jobs.is_empty() {
            self.desk.turn();
            let Some(job) = self.desk.jobs.query().into_iter().next() else { break };
            if job.status == Status::Paused && job.paused {
                self.desk.jobs.resume(begun.key).unwrap();
            } else if job.status == Status::Running && cancel_at.is_some_and(|at| start.elapsed() > at) {
                self.desk.jobs.cancel(&mut self.desk.graph, begun.key, true).unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{job:?} does not end; {}", self.what);
            std::thread::sleep(Duration::from_micros(200));
        }
        self.desk.turn();
        let told = std::mem::take(&mut self.desk.told);
        for node in &begun.nodes {
            self.desk.graph.disown(node);
        }
        drop(begun.nodes);
        self.desk.graph.collect();
        if begun.format == "qcow2" {
            self.tool(&["check", "-q", &begun.path]);
        }
        (told.iter().any(|t| t.starts_with("COMPLETED")), begun.then, begun.format, begun.path)
    }

    fn compare(&self, format: &str, path: &str, then: &[u8]) {
        let raw = self.dir.path("raw");
        self.tool(&["convert", "-f", format, "-O", "raw", path, &raw]);
        let got = std::fs::read(&raw).unwrap();
        let wrong = (0..then.len()).find(|&i| got[i] != then[i]);
        assert_eq!(wrong, None, "{} bytes;{}", self.len, self.what);
    }

    /// To a few clusters, where they meet, or to everywhere.
    fn move_guests(&mut self) {
        let from = if self.rng.below(3) == 0 { u64::MAX } else { self.rng.below(self.len / 512) };
        self.window.store(from, SeqCst);
    }

    fn under_guests(&mut self, disk: &Arc<Node>, f: impl FnOnce(&mut Lab)) {
        let guest = self.desk.guest(disk);
        let stop = AtomicBool::new(false);
        let seed = self.rng.draw();
        self.move_guests();
        std::thread::scope(|s| {
            let stop = &stop;
            let _guests = Guests { stop };
            for n in 1..4u64 {
                let (guest, window) = (guest.clone(), self.window.clone());
                s.spawn(move || write_at_random(&guest, stop, seed.wrapping_mul(2 * n + 1), &window));
            }
            f(self);
        });
        self.desk.graph.detach(&guest);
    }
}

type BitmapSync = (Arc<crate::block::bitmap::Bitmap>, BitmapMode);

/// A backup that has begun.
struct Begun {
    key: JobKey,
    then: Vec<u8>,
    path: String,
    format: &'static str,
    nodes: [Arc<Node>; 2],
}

/// All of a disk.
fn full(seed: u64) {
    let mut lab = Lab::new(seed);
    let (disk, _) = lab.disk(false);
    lab.under_guests(&disk, |lab| {
        let begun = lab.start(&disk, Sync::Full, None, true);
        lab.overlay(&disk);
        let cancel = lab.rng.below(6) == 0;
        let (good, then, format, path) = lab.finish(begun, cancel);
        if good {
            lab.compare(format, &path, &then);
        } else {
            assert!(cancel, "{}", lab.what);
        }
    });
}

/// What an overlay has, to an image that is laid above the same base later.
fn top(seed: u64) {
    let mut lab = Lab::new(seed);
    let (disk, base) = lab.disk(true);
    let base = base.unwrap();
    lab.under_guests(&disk, |lab| {
        let begun = lab.start(&disk, Sync::Top, None, true);
        lab.overlay(&disk);
        let (good, then, _, path) = lab.finish(begun, false);
        assert!(good, "{}", lab.what);
        lab.tool(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", &base, &path]);
        lab.compare("qcow2", &path, &then);
    });
}

/// A chain of what has changed since the one before, each image laid above that before it when it is done.
fn incremental(seed: u64) {
    let mut lab = Lab::new(seed);
    let (disk, _) = lab.disk(false);
    let granularity = lab.pick(&[4096, 65536, 1 << 20]);
    let quiet = lab.desk.graph.quiesce(&[&disk], &[]);
    let mut base = vec![0xee; lab.len as usize];
    disk.read(0, &mut IovMut::from_slice(&mut base)).unwrap();
    let bitmap = disk.add_bitmap(Some("b0"), granularity).unwrap();
    drop(quiet);
    let mut last = ("raw", lab.dir.path("chain"));
    std::fs::write(&last.1, &base).unwrap();
    lab.under_guests(&disk, |lab| {
        for _ in 0..5 {
            let mode = lab.pick(&[BitmapMode::OnSuccess, BitmapMode::Always]);
            let begun = lab.start(&disk, Sync::Bitmap, Some(&(bitmap.clone(), mode)), true);
            let cancel = lab.rng.below(3) == 0;
            lab.what += &format!(" {mode:?} cancel {cancel}");
            let (good, then, _, path) = lab.finish(begun, cancel);
            assert!(good || cancel, "{}", lab.what);
            // One that did not end is part of the chain if the bitmap forgot what it has.
            if good || mode == BitmapMode::Always {
                lab.tool(&["rebase", "-u", "-f", "qcow2", "-F", last.0, "-b", &last.1, &path]);
                last = ("qcow2", path);
            }
            if good {
                lab.compare(last.0, &last.1, &then);
            }
            lab.move_guests();
            std::thread::sleep(Duration::from_millis(lab.rng.below(20)));
        }
    });
}

fn run(name: &str, seed: u64, f: fn(u64)) {
    if qemu("qemu-img").is_none() {
        return;
    }
    let first = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let time: u64 = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    let end = Instant::now() + Duration::from_secs(time);
    let mut seed = first.unwrap_or(seed);
    let mut runs = 0;
    while runs == 0 || Instant::now() < end {
        eprintln!("{name}: SEED={seed}");
        f(seed);
        seed = seed.wrapping_add(0x1_0001);
        runs += 1;
    }
    eprintln!("{name}: {runs} runs");
}

#[test]
fn a_full_backup_is_the_disk_as_it_was() {
    run("full", 0x5eed_0101, full);
}

#[test]
fn what_an_overlay_has_can_be_laid_above_its_base_again() {
    run("top", 0x5eed_0202, top);
}

#[test]
fn a_chain_of_incremental_backups_has_every_moment() {
    run("incremental", 0x5eed_0303, incremental);
}
