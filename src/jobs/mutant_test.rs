//! The tests notice: each bug of [`Mutant`](crate::block::mutant::Mutant) breaks a small scene in which
//! the threads meet as the scene says, and those that need no such meeting break the stress test.
//!
//! A scene is played without the bug, too, and must end well then.

use super::backup::{self, Backup, BackupSpec, BitmapMode};
use super::job::{JobCtx, Stop, Work};
use super::mirror::Plan;
use super::mirror::tests::{Pair, pair, plan, start};
use super::registry::Spec;
use super::stress_test::{short, stress};
use super::table::{Kind, Status};
use super::testing::{Desk, bytes, put};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, OnError};
use crate::block::mutant::{Mutant, with};
use crate::block::node::Node;
use crate::block::testing::{At, MemState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LEN: usize = 3 << 20;

/// The scene ends well, and with the bug it does not.
fn caught(mutant: Mutant, scene: impl Fn() -> bool) {
    assert!(with(None, &scene), "the scene itself ends badly");
    let well = with(Some(mutant), || catch_unwind(AssertUnwindSafe(&scene)).unwrap_or(false));
    assert!(!well, "{mutant:?} is not noticed");
}

/// Does something once on the first request of a job (or of a guest) at that moment.
fn once(state: &MemState, when: At, by_job: bool, what: impl Fn(u64, u64) + Send + Sync + 'static) {
    let first = AtomicBool::new(true);
    *state.hook.lock().unwrap() = Some(Arc::new(move |at, off, len| {
        let job = std::thread::current().name().is_some_and(|n| n.starts_with("job-"));
        if at == when && job == by_job && first.swap(false, SeqCst) {
            what(off, len);
        }
    }));
}

/// Another thread's write, waited for, if it does not wait itself for what the caller does.
fn write_beside(guest: &Arc<Handle>, off: u64, len: usize) {
    let guest = guest.clone();
    let thread = std::thread::spawn(move || put(&guest, off, 1, len));
    let until = Instant::now() + Duration::from_secs(1);
    while !thread.is_finished() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Switches the guest over; true when the copy is what the disk was.
fn completes(mut pair: Pair, key: super::registry::JobKey) -> bool {
    pair.desk.until_status(key, Status::Ready);
    pair.desk.jobs.complete(key).unwrap();
    pair.desk.until("COMPLETED");
    bytes(&pair.source) == bytes(&pair.copy)
}

/// A guest writes what a mirror has just read.
fn write_after_read(active: bool) -> bool {
    let mut p = pair(LEN);
    p.source.data.lock().unwrap().fill(9);
    let guest = p.guest.clone();
    once(&p.source, At::HasRead, true, move |off, _| write_beside(&guest, off, 4096));
    let key = start(&mut p.desk, Plan { active, ..plan(&p.disk, &p.target) }, true);
    p.desk.until_status(key, Status::Ready);
    // The guest's thread may have had to wait for its turn.
    let begun = Instant::now();
    while bytes(&p.source)[0] != 1 && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    completes(p, key)
}

#[test]
fn clear_after_read() {
    caught(Mutant::ClearAfterRead, || write_after_read(false));
}

#[test]
fn no_turn() {
    caught(Mutant::NoTurn, || write_after_read(true));
}

#[test]
fn mark_before_data() {
    caught(Mutant::MarkBeforeData, || {
        let mut p = pair(LEN);
        let key = start(&mut p.desk, plan(&p.disk, &p.target), true);
        p.desk.until_status(key, Status::Ready);
        let dirty = p.guest.node().unwrap().bitmaps().remove(0);
        let copies = Arc::new(AtomicU64::new(0));
        let count = copies.clone();
        *p.copy.hook.lock().unwrap() = Some(Arc::new(move |at, _, _| {
            count.fetch_add(u64::from(at == At::HasWritten), SeqCst);
        }));
        // Before its data are there: if it is marked already, the job is quick.
        once(&p.source, At::Write, false, move |off, _| {
            let (marked, begun) = (dirty.is_dirty(off), Instant::now());
            while marked && copies.load(SeqCst) == 0 && begun.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        put(&p.guest, 65536, 1, 4096);
        completes(p, key)
    });
}

#[test]
fn no_drain() {
    caught(Mutant::NoDrain, || {
        let mut p = pair(LEN);
        let key = start(&mut p.desk, plan(&p.disk, &p.target), false);
        p.desk.until_status(key, Status::Ready);
        p.desk.jobs.complete(key).unwrap();
        p.desk.until_status(key, Status::Pending);
        put(&p.guest, 100, 1, 4096);
        p.desk.jobs.finalize(&mut p.desk.graph, key).unwrap();
        p.desk.until("COMPLETED");
        bytes(&p.source) == bytes(&p.copy)
    });
}

#[test]
fn no_flush() {
    caught(Mutant::NoFlush, || {
        let mut p = pair(LEN);
        let key = start(&mut p.desk, plan(&p.disk, &p.target), true);
        p.desk.until_status(key, Status::Ready);
        let safe = Arc::new(AtomicBool::new(false));
        let now = safe.clone();
        *p.copy.hook.lock().unwrap() = Some(Arc::new(move |at, _, _| match at {
            At::HasWritten => now.store(false, SeqCst),
            At::Flush => now.store(true, SeqCst),
            _ => {}
        }));
        put(&p.guest, 100, 1, 4096);
        completes(p, key) && safe.load(SeqCst)
    });
}

#[test]
fn no_remark() {
    caught(Mutant::NoRemark, || {
        let mut p = pair(LEN);
        p.source.data.lock().unwrap().fill(9);
        let state = p.copy.clone();
        once(&p.copy, At::Write, true, move |_, _| state.fail.store(libc::ENOSPC, SeqCst));
        let plan = Plan { on_target_error: OnError::Enospc, ..plan(&p.disk, &p.target) };
        let key = start(&mut p.desk, plan, true);
        p.desk.until("ERROR false");
        p.desk.until_status(key, Status::Paused);
        p.copy.fail.store(0, SeqCst);
        p.copy.data.lock().unwrap().fill(0);
        p.desk.jobs.resume(key).unwrap();
        completes(p, key)
    });
}

fn backup(p: &Pair, sync: backup::Sync) -> BackupSpec {
    BackupSpec {
        source: p.disk.clone(),
        target: p.target.clone(),
        sync,
        bitmap: None,
        compress: false,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        break_snapshot: false,
        filter: ("filter".into(), false),
    }
}

fn start_backup(desk: &mut Desk, spec: BackupSpec, speed: i64) -> super::registry::JobKey {
    let source = spec.source.clone();
    let job = Spec { speed, ..Spec::new("b", Kind::Backup) };
    desk.start(job, &[&source], |graph| Ok(Box::new(Backup::new(graph, spec)?)))
}

/// A guest overwrites `len` bytes at `off`, which the job has not come to; true when the copy is the
/// disk as it was.
fn overwritten(off: u64, len: usize) -> bool {
    let mut p = pair(LEN);
    p.source.data.lock().unwrap().fill(9);
    // The first piece, and no more.
    let spec = backup(&p, backup::Sync::Full);
    let key = start_backup(&mut p.desk, spec, 1);
    put(&p.guest, off, 1, len);
    p.desk.jobs.set_speed(key, 0).unwrap();
    p.desk.until("COMPLETED");
    bytes(&p.copy) == [9; LEN]
}

#[test]
fn partial_cluster() {
    caught(Mutant::PartialCluster, || overwritten(LEN as u64 - 1000, 100));
}

#[test]
fn part_is_whole() {
    caught(Mutant::PartIsWhole, || overwritten(LEN as u64 - 65536, 4096));
}

#[test]
fn whole_again() {
    caught(Mutant::WholeAgain, || overwritten(LEN as u64 - 65536, 4096));
}

#[test]
fn copy_after_write() {
    caught(Mutant::CopyAfterWrite, || overwritten(LEN as u64 - 65536, 65536));
}

#[test]
fn no_claim_wait() {
    caught(Mutant::NoClaimWait, || {
        let mut p = pair(LEN);
        p.source.data.lock().unwrap().fill(9);
        let guest = p.guest.clone();
        once(&p.source, At::Read, true, move |off, _| write_beside(&guest, off, 4096));
        let spec = backup(&p, backup::Sync::Full);
        start_backup(&mut p.desk, spec, 0);
        p.desk.until("COMPLETED");
        bytes(&p.copy) == [9; LEN]
    });
}

#[test]
fn late_freeze() {
    caught(Mutant::LateFreeze, || {
        let mut p = pair(LEN);
        let bitmap = p.disk.add_bitmap(Some("b0"), 65536).unwrap();
        let mode = Some((bitmap.clone(), BitmapMode::OnSuccess));
        let spec = BackupSpec { bitmap: mode, ..backup(&p, backup::Sync::Bitmap) };
        let job = Spec::new("b", Kind::Backup);
        let graph = &mut p.desk.graph;
        let make = || Ok(Box::new(Backup::new(graph, spec)?) as Box<dyn Work>);
        let key = p.desk.jobs.create(job, &p.desk.events.clone(), &[&p.disk], make).unwrap();
        // Before its thread begins: the disk of before is what the backup shows.
        put(&p.guest, 0, 1, 4096);
        p.desk.jobs.start(&mut p.desk.graph, key);
        p.desk.until("COMPLETED");
        // The next one has to copy it.
        bitmap.is_dirty(0)
    });
}

#[test]
fn forget_successor() {
    caught(Mutant::ForgetSuccessor, || {
        let mut p = pair(LEN);
        let bitmap = p.disk.add_bitmap(Some("b0"), 65536).unwrap();
        bitmap.mark(0, LEN as u64);
        bitmap.clear(LEN as u64 - 1, 1);
        let mode = Some((bitmap.clone(), BitmapMode::OnSuccess));
        let spec = BackupSpec { bitmap: mode, ..backup(&p, backup::Sync::Bitmap) };
        let key = start_backup(&mut p.desk, spec, 1);
        put(&p.guest, LEN as u64 - 100, 1, 100);
        p.desk.jobs.cancel(&mut p.desk.graph, key, true).unwrap();
        p.desk.until("CANCELLED");
        bitmap.is_dirty(LEN as u64 - 1)
    });
}

/// Work that ends when it is told to, and notes what becomes of it.
struct Alone {
    ends: Option<std::sync::mpsc::Receiver<()>>,
    became: Arc<Mutex<Vec<&'static str>>>,
}

impl Work for Alone {
    fn run(&mut self, _: &JobCtx) -> Result<(), Stop> {
        match &self.ends {
            None => Ok(()),
            Some(wait) => wait.recv().map_err(|_| std::io::Error::from_raw_os_error(libc::EIO).into()),
        }
    }

    fn commit(&mut self, _: &mut Graph) {
        self.became.lock().unwrap().push("good");
    }
}

#[test]
fn commit_alone() {
    caught(Mutant::CommitAlone, || {
        let mut desk = Desk::new();
        let txn = Some(desk.jobs.new_txn());
        let (end, ends) = std::sync::mpsc::channel();
        let became = Arc::<Mutex<Vec<_>>>::default();
        let nodes: &[&Arc<Node>] = &[];
        let spec = |id| Spec { txn, ..Spec::new(id, Kind::Backup) };
        for (id, ends) in [("a", None), ("b", Some(ends))] {
            let work = Alone { ends, became: became.clone() };
            desk.start(spec(id), nodes, |_| Ok(Box::new(work)));
        }
        desk.until("waiting");
        // The other one fails.
        drop(end);
        desk.until("COMPLETED");
        became.lock().unwrap().is_empty()
    });
}

#[test]
fn no_tail_and_no_zeroes() {
    for (mutant, job) in [(Mutant::NoTail, 1), (Mutant::NoZeroes, 0)] {
        caught(mutant, || {
            short(job);
            true
        });
    }
}

/// Guests who know what they wrote, and a few seconds of random jobs for each bug.
#[test]
fn the_stress_test_notices() {
    let list = [
        Mutant::ClearAfterRead,
        Mutant::NoDrain,
        Mutant::PartialCluster,
        Mutant::CopyAfterWrite,
        Mutant::PartIsWhole,
        Mutant::WholeAgain,
    ];
    for mutant in list {
        let begun = Instant::now();
        let seen = (1..=8).find(|seed| {
            let run = || with(Some(mutant), || _ = stress(seed * 0x9e37, Duration::from_secs(8), false));
            catch_unwind(AssertUnwindSafe(run)).is_err()
        });
        eprintln!("{mutant:?}: noticed by run {seen:?}, after {:?}", begun.elapsed());
        assert!(seen.is_some(), "{mutant:?} is not noticed");
    }
}
