//! Backups of disks in memory, under guests that go on writing.

use super::*;
use crate::block::driver::{Driver, Flags};
use crate::block::handle::HandleSpec;
use crate::block::node::Edge;
use crate::block::testing::Mem;
use crate::block::traffic::Watch;
use crate::jobs::registry::{JobKey, Spec};
use crate::jobs::table::{Kind, Status};
use crate::jobs::testing::{Desk, Guests, assert_same, bytes};
use crate::sys::iov::Iov;
use std::sync::atomic::Ordering::SeqCst;

/// Not a whole number of clusters.
const LEN: usize = (2 << 20) + 5 * 512;

/// Starts a backup; `then` runs at the very moment whose contents it is to have.
fn start(desk: &mut Desk, spec: BackupSpec, speed: i64, then: impl FnOnce()) {
    start_as(desk, "b", spec, speed, then);
}

fn start_as(desk: &mut Desk, id: &str, spec: BackupSpec, speed: i64, then: impl FnOnce()) -> JobKey {
    let source = spec.source.clone();
    let quiesced = desk.graph.quiesce(&[&source], &[]);
    let job = Spec { speed, ..Spec::new(id, Kind::Backup) };
    let events = desk.events.clone();
    let graph = &mut desk.graph;
    let make = || Ok(Box::new(Backup::new(graph, spec)?) as Box<dyn Work>);
    let key = desk.jobs.create(job, &events, &[&source], make).unwrap();
    then();
    drop(quiesced);
    desk.jobs.start(&mut desk.graph, key);
    key
}

fn spec(source: &Arc<Node>, target: &Arc<Node>, sync: Sync) -> BackupSpec {
    BackupSpec {
        source: source.clone(),
        target: target.clone(),
        sync,
        bitmap: None,
        compress: false,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        break_snapshot: false,
        filter: ("filter".into(), false),
    }
}

#[test]
fn a_full_backup_is_the_disk_as_it_was() {
    for round in 0..20 {
        let mut desk = Desk::new();
        let (disk, source) = desk.disk("disk", LEN);
        let (target, copy) = desk.disk("target", LEN);
        let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
        let guests = Guests::on(&guest, 0xb0b + round, false);
        let mut then = Vec::new();
        // at a speed that leaves the guests time
        start(&mut desk, spec(&disk, &target, Sync::Full), 40 << 20, || then = bytes(&source));
        // Whole clusters, also the last.
        let all = LEN.next_multiple_of(65536);
        desk.until(&format!("COMPLETED {all}/{all} "));
        drop(guests);
        assert_same(&bytes(&copy), &then, "the backup");
        desk.graph.delete("target").unwrap();
        assert_eq!(desk.graph.nodes().count(), 1, "nothing is left of the job");
    }
}

/// Two at once: each target has the disk as it was at its own moment, whoever ends first and however.
#[test]
fn two_backups_of_one_disk_have_each_its_own_moment() {
    for round in 0..24 {
        let mut desk = Desk::new();
        let (disk, source) = desk.disk("disk", LEN);
        let copies = ["one", "two"].map(|name| desk.disk(name, LEN));
        let guest = desk.guest(&disk);
        let guests = Guests::on(&guest, 0xd0b1e + round, false);
        // Who is the first to end, and who is cancelled: 0 and 1, or nobody.
        let (slow, cancelled) = ((round % 2) as usize, (round / 2 % 3) as usize);
        let (mut moments, mut keys) = (Vec::new(), Vec::new());
        for (n, (target, _)) in copies.iter().enumerate() {
            let mut spec = spec(&disk, target, Sync::Full);
            spec.filter = (format!("filter{n}"), false);
            let speed = if n == slow { 20 << 20 } else { 60 << 20 };
            let mut then = Vec::new();
            keys.push(start_as(&mut desk, &format!("b{n}"), spec, speed, || then = bytes(&source)));
            moments.push(then);
            guests.go_on(20);
        }
        if let Some(key) = keys.get(cancelled) {
            guests.go_on(20);
            if desk.jobs.at(key.0).is_some_and(|at| desk.jobs.list[at].status == Status::Running) {
                desk.jobs.cancel(&mut desk.graph, *key, true).unwrap();
            }
        }
        let begun = std::time::Instant::now();
        while !desk.jobs.is_empty() {
            desk.turn();
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", desk.jobs.query());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(guests);
        for (n, (_, copy)) in copies.iter().enumerate() {
            if n != cancelled {
                assert_same(&bytes(copy), &moments[n], &format!("round {round}, backup {n}"));
            }
        }
        assert_eq!(desk.graph.nodes().count(), 3, "nothing is left of the jobs");
        // The guest writes to the disk itself again, and to nothing else.
        let before = copies.each_ref().map(|(_, copy)| bytes(copy));
        guest.write(0, &Iov::from_slice(&[0x5a; 512]), Flags::NONE).unwrap();
        assert!(Arc::ptr_eq(&guest.node().unwrap(), &disk));
        assert!(copies.iter().zip(before).all(|((_, copy), b)| bytes(copy) == b));
    }
}

/// What a backup shows of the disk behind its target is the disk: it is no user of it that jobs give way to.
#[test]
fn a_target_behind_which_the_disk_lies_is_no_user_of_it() {
    let mut desk = Desk::new();
    let (disk, _) = desk.disk("disk", LEN);
    let (target, _) = desk.disk("target", LEN);
    let over = Node::new("over", Box::new(Over::new(&target, &disk)), NodeOptions::default());
    desk.graph.add(over.clone()).unwrap();
    desk.graph.own(&over);
    let guest = desk.guest(&disk);
    let backup = Backup::new(&mut desk.graph, spec(&disk, &over, Sync::Full)).unwrap();
    let watch = Watch::above(&desk.graph, &backup.filter);
    let put = |node: &Node| node.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    put(&over);
    let mut buf = [0; 512];
    over.read(0, &mut crate::sys::iov::IovMut::from_slice(&mut buf)).unwrap();
    assert_eq!(watch.requests(), 0);
    guest.write(0, &Iov::from_slice(&[2; 512]), Flags::NONE).unwrap();
    assert_eq!(watch.requests(), 1);
    drop(watch);
    let mut backup = backup;
    backup.clean(&mut desk.graph);
    // The same for a mirror.
    let plan = crate::jobs::mirror::tests::plan(&disk, &over);
    let mut mirror = crate::jobs::mirror::Mirror::new(&mut desk.graph, plan).unwrap();
    let filter = mirror.filter().unwrap().clone();
    let watch = Watch::above(&desk.graph, &filter);
    put(&over);
    assert_eq!(watch.requests(), 0);
    guest.write(0, &Iov::from_slice(&[3; 512]), Flags::NONE).unwrap();
    assert_eq!(watch.requests(), 1);
    drop(watch);
    mirror.clean(&mut desk.graph);
}

/// An image that is all there, with a backing file all the same.
struct Over {
    file: Arc<Edge>,
    backing: Arc<Edge>,
}

impl Over {
    fn new(file: &Arc<Node>, backing: &Arc<Node>) -> Over {
        Over {
            file: Edge::new("file", Some(file.clone())),
            backing: Edge::new("backing", Some(backing.clone())),
        }
    }
}

impl Driver for Over {
    fn name(&self) -> &'static str {
        "over"
    }
    fn len(&self) -> u64 {
        LEN as u64
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone(), self.backing.clone()]
    }
    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "backing" { (Perm::CONSISTENT_READ, Perm::ALL) } else { above }
    }
    fn read(&self, off: u64, to: &mut crate::sys::iov::IovMut) -> io::Result<()> {
        self.file.need()?.read(off, to)
    }
    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        self.file.need()?.write(off, from, flags)
    }
    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        self.file.need()?.zero(off, len, flags)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn incremental_backups_restore_any_point() {
    let mut desk = Desk::new();
    let (disk, source) = desk.disk("disk", LEN);
    let (target, copy) = desk.disk("target", LEN);
    let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let bitmap = disk.add_bitmap(Some("b0"), 65536).unwrap();
    let mut then = Vec::new();
    // The bitmap is clean and the target empty, as the disk is.
    for round in 0..25 {
        let guests = Guests::on(&guest, 0xcafe + round, false);
        let mut spec = spec(&disk, &target, Sync::Bitmap);
        let mode = if round % 5 == 4 { BitmapMode::Always } else { BitmapMode::OnSuccess };
        spec.bitmap = Some((bitmap.clone(), mode));
        start(&mut desk, spec, 60 << 20, || then = bytes(&source));
        assert!(bitmap.busy());
        if round % 3 == 2 {
            // A backup that does not end keeps what it did not copy; what it did copy is on the target,
            // newer than the last whole backup: the next whole one makes up for it.
            std::thread::sleep(Duration::from_millis(5));
            let key = desk.jobs.find("b").unwrap();
            desk.jobs.cancel(&mut desk.graph, key, true).unwrap();
            desk.until("null");
        } else {
            desk.until("COMPLETED");
            desk.until("null");
            drop(guests);
            assert_same(&bytes(&copy), &then, &format!("round {round}"));
        }
        assert!(!bitmap.busy() && bitmap.enabled());
        assert_eq!(disk.bitmaps().len(), 1, "no successor is left");
    }
}

#[test]
fn a_backup_says_at_once_how_long_it_is_and_does_not_wait_after_its_last_piece() {
    let mut desk = Desk::new();
    let (disk, _) = desk.disk("disk", LEN);
    let (target, _) = desk.disk("target", LEN);
    let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let bitmap = disk.add_bitmap(Some("b0"), 65536).unwrap();
    guest.write(0, &Iov::from_slice(&[1; 70_000]), Flags::NONE).unwrap();
    let mut spec = spec(&disk, &target, Sync::Bitmap);
    spec.bitmap = Some((bitmap, BitmapMode::OnSuccess));
    // Behind the two dirty granules the disk is clean: at a byte a second a wait would be for a day.
    start(&mut desk, spec, 1, || ());
    assert_eq!(desk.jobs.query()[0].now.progress.len, 2 << 16, "before its thread has run, perhaps");
    desk.until(&format!("COMPLETED {}/{} ", 2 << 16, 2 << 16));
}

#[test]
fn a_bitmap_that_never_forgets_keeps_all() {
    let mut desk = Desk::new();
    let (disk, _) = desk.disk("disk", LEN);
    let (target, _) = desk.disk("target", LEN);
    let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let bitmap = disk.add_bitmap(Some("b0"), 65536).unwrap();
    guest.write(0, &Iov::from_slice(&[1; 70_000]), Flags::NONE).unwrap();
    for (mode, left) in [(BitmapMode::Never, 2 << 16), (BitmapMode::OnSuccess, 0)] {
        let mut spec = spec(&disk, &target, Sync::Bitmap);
        spec.bitmap = Some((bitmap.clone(), mode));
        start(&mut desk, spec, 0, || ());
        desk.until(&format!("COMPLETED {}/{} ", 2 << 16, 2 << 16));
        assert_eq!(bitmap.count(), left);
    }
}

#[test]
fn a_backup_that_waits_for_space_loses_nothing() {
    let mut desk = Desk::new();
    let (disk, source) = desk.disk("disk", LEN);
    let (target, copy) = desk.disk("target", LEN);
    source.data.lock().unwrap().fill(7);
    let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let mut spec = spec(&disk, &target, Sync::Full);
    spec.on_target_error = OnError::Enospc;
    copy.fail.store(libc::ENOSPC, SeqCst);
    start(&mut desk, spec, 0, || ());
    desk.until("ERROR false");
    let job = &desk.jobs.query()[0];
    assert_eq!((job.status, job.paused), (Status::Paused, true));
    // the guest's own writes fail as well then, and are not lost in silence
    let done = guest.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE);
    assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    copy.fail.store(0, SeqCst);
    guest.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    let key = desk.jobs.find("b").unwrap();
    desk.jobs.resume(key).unwrap();
    desk.until("COMPLETED");
    assert_same(&bytes(&copy), &vec![7; LEN], "the backup");
    assert_eq!(bytes(&source)[0], 1);
}

#[test]
fn errors_end_it_or_not_as_the_policy_says() {
    for (fails, policy, told) in [
        ("source", OnError::Report, "ERROR true"),
        ("target", OnError::Report, "ERROR false"),
        ("target", OnError::Ignore, "ERROR false"),
    ] {
        let mut desk = Desk::new();
        let (disk, source) = desk.disk("disk", LEN);
        let (target, copy) = desk.disk("target", LEN);
        source.data.lock().unwrap().fill(7);
        let bad = if fails == "source" { &source } else { &copy };
        bad.fail.store(libc::EIO, SeqCst);
        let mut spec = spec(&disk, &target, Sync::Full);
        (spec.on_source_error, spec.on_target_error) = (policy, policy);
        start(&mut desk, spec, 0, || ());
        desk.until(told);
        if policy == OnError::Report {
            desk.until("COMPLETED 0/");
        } else {
            bad.fail.store(0, SeqCst);
            desk.until("COMPLETED");
            assert_same(&bytes(&copy), &vec![7; LEN], "the backup");
        }
        assert!(disk.driver.name() == "mem" && desk.graph.nodes().count() == 2, "the filter is gone");
    }
}

#[test]
fn sync_none_has_what_was_overwritten() {
    let mut desk = Desk::new();
    let (disk, source) = desk.disk("disk", LEN);
    let (target, copy) = desk.disk("target", LEN);
    source.data.lock().unwrap().fill(7);
    let guest = desk.graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    start(&mut desk, spec(&disk, &target, Sync::None), 0, || ());
    guest.write(65536 + 100, &Iov::from_slice(&[1; 100]), Flags::NONE).unwrap();
    let key = desk.jobs.find("b").unwrap();
    desk.jobs.cancel(&mut desk.graph, key, true).unwrap();
    desk.until("CANCELLED");
    let copy = bytes(&copy);
    assert!(copy[..65536].iter().all(|&b| b == 0) && copy[131_072..].iter().all(|&b| b == 0));
    assert!(copy[65536..131_072].iter().all(|&b| b == 7));
    guest.write(0, &Iov::from_slice(&[1; 100]), Flags::NONE).unwrap();
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut desk = Desk::new();
    let (disk, _) = desk.disk("disk", LEN);
    let (target, _) = desk.disk("target", LEN);
    let small = Node::new("small", Box::new(Mem::new(512)), NodeOptions::default());
    desk.graph.add(small.clone()).unwrap();
    desk.graph.own(&small);
    let text = |d: &mut Desk, s| Backup::new(&mut d.graph, s).err().unwrap().desc;
    assert_eq!(text(&mut desk, spec(&disk, &disk, Sync::Full)), "Source and target cannot be the same");
    let sizes = "Source and target image have different sizes";
    assert_eq!(text(&mut desk, spec(&disk, &small, Sync::Full)), sizes);
    let compressed = BackupSpec { compress: true, ..spec(&disk, &target, Sync::Full) };
    assert_eq!(text(&mut desk, compressed), "Compression is not supported for this drive ");
    assert_eq!(desk.graph.nodes().count(), 3);
}

/// A cluster that the uppermost image does not have is copied as a whole or not at all, also when a guest
/// comes to it before the job does: the target may be laid above the same image later.
#[test]
fn sync_top_leaves_no_cluster_in_part() {
    let mut desk = Desk::new();
    let (disk, source) = desk.disk("disk", LEN);
    let (target, copy) = desk.disk("target", LEN);
    source.sparse.store(true, SeqCst);
    copy.data.lock().unwrap().fill(7);
    let guest = desk.guest(&disk);
    let graph = &mut desk.graph;
    let spec = spec(&disk, &target, Sync::Top);
    let make = || Ok(Box::new(Backup::new(graph, spec)?) as Box<dyn Work>);
    let job = Spec::new("b", Kind::Backup);
    let key = desk.jobs.create(job, &desk.events.clone(), &[&disk], make).unwrap();
    // Afterwards it is as if it had never come.
    guest.write(65536 + 4096, &Iov::from_slice(&[0; 4096]), Flags::NONE).unwrap();
    desk.jobs.start(&mut desk.graph, key);
    desk.until("COMPLETED");
    let copy = bytes(&copy);
    for cluster in copy.chunks(65536) {
        assert!(cluster.iter().all(|b| *b == cluster[0]));
    }
}
