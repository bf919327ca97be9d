//! Mirrors of disks in memory, under guests that write as fast as they can.

use super::*;
use crate::block::testing::{At, MemState};
use crate::jobs::registry::{JobKey, Spec};
use crate::jobs::table::Status;
use crate::jobs::testing::{Desk, Guests, assert_same, bytes, put};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Not a whole number of granules.
const LEN: usize = (8 << 20) + 5 * 512;

pub(in crate::jobs) fn plan(source: &Arc<Node>, target: &Arc<Node>) -> Plan {
    Plan {
        source: source.clone(),
        target: target.clone(),
        sync: Sync::Full { zeroed: true },
        commit: false,
        granularity: 65536,
        buf_size: 1 << 20,
        unmap: true,
        replaces: None,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        filter: None,
        active: false,
        backing: None,
    }
}

pub(in crate::jobs) fn start(desk: &mut Desk, plan: Plan, auto_finalize: bool) -> JobKey {
    let spec = Spec { auto_finalize, ..Spec::new("m", Kind::Mirror) };
    let (source, target) = (plan.source.clone(), plan.target.clone());
    desk.start(spec, &[&source, &target], |graph| Ok(Box::new(Mirror::new(graph, plan)?)))
}

/// A guest's disk, and a target.
pub(in crate::jobs) struct Pair {
    pub desk: Desk,
    pub disk: Arc<Node>,
    pub source: Arc<MemState>,
    pub target: Arc<Node>,
    pub copy: Arc<MemState>,
    pub guest: Arc<Handle>,
}

pub(in crate::jobs) fn pair(len: usize) -> Pair {
    let mut desk = Desk::new();
    let (disk, source) = desk.disk("disk", len);
    let (target, copy) = desk.disk("target", len);
    let guest = desk.guest(&disk);
    Pair { desk, disk, source, target, copy, guest }
}

/// How many bytes are written to a disk.
fn counted(state: &MemState) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let sum = count.clone();
    *state.hook.lock().unwrap() = Some(Arc::new(move |at, _, len| {
        if at == At::Write {
            sum.fetch_add(len, SeqCst);
        }
    }));
    count
}

#[test]
fn a_mirror_that_waits_to_be_finalized_leaves_the_guest_nothing_to_wait_for() {
    for active in [false, true] {
        let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
        let plan = Plan { active, ..plan(&disk, &target) };
        let guests = Guests::on(&guest, 0x11, true);
        let key = start(&mut desk, plan, false);
        desk.until_status(key, Status::Ready);
        desk.jobs.complete(key).unwrap();
        desk.until_status(key, Status::Pending);
        // All of the disk, more than once.
        guests.go_on(2000);
        drop(guests);
        assert!(Arc::ptr_eq(&guest.node().unwrap().skip_filters(), &disk));
        let written = counted(&copy);
        desk.jobs.finalize(&mut desk.graph, key).unwrap();
        assert!(written.load(SeqCst) <= LITTLE, "{} bytes at the end", written.load(SeqCst));
        desk.until("COMPLETED");
        assert!(Arc::ptr_eq(&guest.node().unwrap(), &target));
        assert_same(&bytes(&copy), &bytes(&source), "the mirror");
    }
}

#[test]
fn guests_that_are_faster_than_the_target_cannot_keep_a_mirror_from_its_end() {
    let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
    // The job's own writes there are slow.
    let written = Arc::new(AtomicU64::new(0));
    let sum = written.clone();
    *copy.hook.lock().unwrap() = Some(Arc::new(move |at, _, len| {
        if at == At::Write && std::thread::current().name().is_some_and(|n| n.starts_with("job-")) {
            sum.fetch_add(len, SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
    }));
    let guests = Guests::on(&guest, 0x22, true);
    let key = start(&mut desk, plan(&disk, &target), true);
    desk.until_status(key, Status::Ready);
    guests.go_on(100);
    desk.jobs.complete(key).unwrap();
    // In its last turn the control thread has the guest held.
    let mut held;
    loop {
        let before = written.load(SeqCst);
        desk.turn();
        held = written.load(SeqCst) - before;
        if desk.jobs.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    assert!(held <= LITTLE + PIECE, "{held} bytes were copied while the guest waited");
    drop(guests);
    desk.until("COMPLETED");
    assert!(Arc::ptr_eq(&guest.node().unwrap(), &target));
    assert_eq!(bytes(&source).len(), bytes(&copy).len());
}

#[test]
fn a_mirror_that_is_stopped_holds_the_disk_of_then() {
    for active in [false, true] {
        let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
        source.data.lock().unwrap().fill(9);
        let key = start(&mut desk, Plan { active, ..plan(&disk, &target) }, false);
        desk.until_status(key, Status::Ready);
        desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap();
        desk.until_status(key, Status::Pending);
        put(&guest, 0, 1, 70_000);
        desk.jobs.finalize(&mut desk.graph, key).unwrap();
        desk.until("COMPLETED");
        assert!(Arc::ptr_eq(&guest.node().unwrap(), &disk));
        assert_same(&bytes(&copy), &[9; LEN], "the copy");
    }
}

#[test]
fn a_paused_mirror_does_no_io() {
    let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
    source.data.lock().unwrap().fill(9);
    let count = Arc::new(AtomicU64::new(0));
    for state in [&source, &copy] {
        let requests = count.clone();
        *state.hook.lock().unwrap() = Some(Arc::new(move |_, _, _| {
            if std::thread::current().name().is_some_and(|n| n.starts_with("job-")) {
                requests.fetch_add(1, SeqCst);
            }
        }));
    }
    let key = start(&mut desk, plan(&disk, &target), true);
    for status in [Status::Paused, Status::Standby] {
        if status == Status::Standby {
            desk.jobs.resume(key).unwrap();
            desk.until_status(key, Status::Ready);
        }
        desk.jobs.pause(key).unwrap();
        // On a busy machine it may be ready the first time, too.
        desk.until_any(key, &[status, Status::Standby]);
        let before = count.load(SeqCst);
        put(&guest, 0, 1, 1 << 20);
        std::thread::sleep(Duration::from_millis(250));
        assert_eq!(count.load(SeqCst), before, "{status:?}");
    }
    desk.jobs.resume(key).unwrap();
    desk.until_status(key, Status::Ready);
    desk.jobs.complete(key).unwrap();
    desk.until("COMPLETED");
    assert_same(&bytes(&copy), &bytes(&source), "the mirror");
}

#[test]
fn a_mirror_that_waits_to_be_finalized_can_be_cancelled() {
    let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
    let key = start(&mut desk, plan(&disk, &target), false);
    desk.until_status(key, Status::Ready);
    desk.jobs.complete(key).unwrap();
    desk.until_status(key, Status::Pending);
    desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap();
    desk.until("CANCELLED");
    assert!(Arc::ptr_eq(&guest.node().unwrap(), &disk));
    put(&guest, 0, 1, 512);
    assert_eq!((bytes(&source)[0], bytes(&copy)[0]), (1, 0));
}

#[test]
fn a_target_that_fails_while_the_job_waits_is_not_switched_to() {
    // Little is made up for at the end; more than that is not, for the guest would have to wait.
    for (len, done) in [(100_000, true), (2 << 20, false)] {
        let Pair { mut desk, disk, source, target, copy, guest } = pair(LEN);
        source.data.lock().unwrap().fill(9);
        let key = start(&mut desk, plan(&disk, &target), false);
        desk.until_status(key, Status::Ready);
        desk.jobs.complete(key).unwrap();
        desk.until_status(key, Status::Pending);
        copy.fail.store(libc::ENOSPC, SeqCst);
        put(&guest, 300, 1, len);
        copy.fail.store(0, SeqCst);
        desk.jobs.finalize(&mut desk.graph, key).unwrap();
        let end = desk.until("COMPLETED");
        assert_eq!(end.contains("No space left on device"), !done, "{end}");
        assert!(Arc::ptr_eq(&guest.node().unwrap(), if done { &target } else { &disk }));
        if done {
            assert_same(&bytes(&copy), &bytes(&source), "the mirror");
        }
        assert!(bytes(&source)[300..300 + len].iter().all(|b| *b == 1));
    }
}

/// Zeroes that make the target like the disk must not come after a write of the guest that went to both.
#[test]
fn zeroes_for_the_target_do_not_overtake_the_guest() {
    let Pair { mut desk, disk, source, target, copy, guest } = pair(1 << 20);
    source.sparse.store(true, SeqCst);
    copy.data.lock().unwrap().fill(0xee);
    let plan = Plan { active: true, sync: Sync::Full { zeroed: false }, ..plan(&disk, &target) };
    let writer = Arc::new(std::sync::Mutex::new(None));
    let (place, first) = (writer.clone(), AtomicBool::new(true));
    *copy.hook.lock().unwrap() = Some(Arc::new(move |at, off, _| {
        // Between the look at the disk and the zeroes. The guest's write may have to wait for them.
        if at == At::Write && off == 0 && first.swap(false, SeqCst) {
            let guest = guest.clone();
            let thread = std::thread::spawn(move || put(&guest, 4096, 7, 4096));
            let until = Instant::now() + Duration::from_millis(200);
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            *place.lock().unwrap() = Some(thread);
        }
    }));
    let key = start(&mut desk, plan, true);
    desk.until_status(key, Status::Ready);
    writer.lock().unwrap().take().expect("nothing was zeroed").join().unwrap();
    desk.jobs.complete(key).unwrap();
    desk.until("COMPLETED");
    let copy = bytes(&copy);
    assert!(copy[4096..8192].iter().all(|b| *b == 7), "the guest's write is lost");
    assert!(copy[..4096].iter().all(|b| *b == 0));
}
