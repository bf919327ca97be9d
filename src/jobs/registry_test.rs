//! Jobs that copy nothing: their states, and what is told of them in which order.

use super::super::job::{After, JobCtx, Stop, Work};
use super::super::testing::Desk;
use super::*;
use crate::block::driver::{Flags, Perm};
use crate::block::handle::{Handle, HandleSpec, IoStatus, OnError};
use crate::block::node::NodeOptions;
use crate::block::testing::Mem;
use crate::sys::iov::Iov;
use std::io;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// What was told, of any of several jobs.
fn in_full(event: JobEvent) -> Option<String> {
    Some(match event {
        JobEvent::Status(id, s) => format!("{id} {}", s.as_str()),
        JobEvent::Ready(r) => format!("{} READY {}/{}", r.id, r.progress.offset, r.progress.len),
        JobEvent::Completed(r, e) => format!("{} COMPLETED {}", r.id, e.unwrap_or_default()),
        JobEvent::Cancelled(r) => format!("{} CANCELLED", r.id),
        JobEvent::Pending(_, id) => format!("{id} PENDING"),
        JobEvent::Error { id, read, action } => format!("{id} ERROR {read} {action:?}"),
    })
}

impl Desk {
    fn of_many() -> Desk {
        Desk { say: in_full, ..Desk::new() }
    }

    /// Turns until `what` was told, and forgets nothing.
    fn until_told(&mut self, what: &str) {
        let start = Instant::now();
        loop {
            self.turn();
            if self.told.iter().any(|t| t == what) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no '{what}' in {:?}", self.told);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn make(&mut self, spec: Spec, script: Script) -> JobKey {
        self.jobs.create(spec, &self.events.clone(), &[], || Ok(Box::new(script))).unwrap()
    }

    fn go(&mut self, spec: Spec, script: Script) -> JobKey {
        let key = self.make(spec, script);
        self.jobs.start(&mut self.graph, key);
        key
    }

    fn status(&self, id: &str) -> Status {
        self.jobs.query().into_iter().find(|j| j.id == id).map_or(Status::Null, |j| j.status)
    }
}

type Run = Box<dyn FnMut(&JobCtx) -> Result<(), Stop> + Send>;

/// Work that does as it is told, and writes down what happens to it.
struct Script {
    run: Run,
    fails: bool,
    mirror: bool,
    log: Log,
}

type Log = Arc<Mutex<Vec<&'static str>>>;

fn log(l: &Log) -> MutexGuard<'_, Vec<&'static str>> {
    l.lock().unwrap()
}

impl Script {
    fn new(run: impl FnMut(&JobCtx) -> Result<(), Stop> + Send + 'static) -> Script {
        Script { run: Box::new(run), fails: false, mirror: false, log: Arc::default() }
    }

    fn mirror(run: impl FnMut(&JobCtx) -> Result<(), Stop> + Send + 'static) -> Script {
        Script { mirror: true, ..Script::new(run) }
    }
}

impl Work for Script {
    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        (self.run)(cx)
    }

    fn prepare(&mut self, _: &mut Graph) -> Result<()> {
        log(&self.log).push("prepare");
        if self.fails { Err(Error::new("cannot")) } else { Ok(()) }
    }

    fn commit(&mut self, _: &mut Graph) {
        log(&self.log).push("commit");
    }

    fn abort(&mut self, _: &mut Graph) {
        log(&self.log).push("abort");
    }

    fn clean(&mut self, _: &mut Graph) {
        log(&self.log).push("clean");
    }

    fn completes(&self) -> bool {
        self.mirror
    }

    fn cancels_softly(&self) -> bool {
        self.mirror
    }
}

fn spec(id: &str) -> Spec {
    Spec::new(id, Kind::Stream)
}

/// Sleeps until it is cancelled.
fn sleeper() -> Script {
    Script::new(|cx| {
        loop {
            cx.sleep(Duration::from_secs(1000))?;
        }
    })
}

#[test]
fn a_job_that_does_well() {
    let mut desk = Desk::of_many();
    let script = Script::new(|cx| {
        cx.progress(5, 5);
        Ok(())
    });
    let seen = script.log.clone();
    desk.go(spec("a"), script);
    desk.until_told("a null");
    let order = ["a created", "a running", "a waiting", "a pending", "a COMPLETED ", "a concluded", "a null"];
    assert_eq!(desk.told, order);
    assert_eq!(*log(&seen), ["prepare", "commit", "clean"]);
    assert!(desk.jobs.is_empty());
}

#[test]
fn jobs_that_fail_early_and_late() {
    let mut desk = Desk::of_many();
    desk.go(spec("a"), Script::new(|_| Err(io::Error::from_raw_os_error(libc::ENOSPC).into())));
    desk.until_told("a null");
    let order = [
        "a created",
        "a running",
        "a aborting",
        "a COMPLETED No space left on device",
        "a concluded",
        "a null",
    ];
    assert_eq!(desk.told, order);

    desk.told.clear();
    let late = Script { fails: true, ..Script::new(|_| Ok(())) };
    let seen = late.log.clone();
    desk.go(spec("b"), late);
    desk.until_told("b null");
    let order = [
        "b created",
        "b running",
        "b waiting",
        "b pending",
        "b aborting",
        "b COMPLETED cannot",
        "b concluded",
        "b null",
    ];
    assert_eq!(desk.told, order);
    assert_eq!(*log(&seen), ["prepare", "abort", "clean"]);

    desk.told.clear();
    desk.go(spec("c"), Script::new(|_| panic!("a defect")));
    desk.until_told("c COMPLETED Internal error: a defect");
}

#[test]
fn names_and_speeds() {
    let mut desk = Desk::of_many();
    let mut try_it = |id: &str, speed: i64| {
        let spec = Spec { speed, ..spec(id) };
        let made = desk.jobs.create(spec, &desk.events.clone(), &[], || Ok(Box::new(sleeper())));
        made.map_err(|e| e.desc)
    };
    for bad in ["", "1bad", "a/b"] {
        assert_eq!(try_it(bad, 0).unwrap_err(), format!("Invalid job ID '{bad}'"));
    }
    assert_eq!(try_it("a", -1).unwrap_err(), "Parameter 'speed' expects a non-negative value");
    try_it("Ab9-._", 0).unwrap();
    assert_eq!(try_it("Ab9-._", 0).unwrap_err(), "Job ID 'Ab9-._' already in use");
    desk.turn();
    assert_eq!(desk.told, ["a created", "a null", "Ab9-._ created"]);
    assert_eq!(desk.jobs.find("x").unwrap_err().desc, "Job not found");
    let e = desk.jobs.find_block("x").unwrap_err();
    assert_eq!((e.class, e.desc.as_str()), (Class::DeviceNotActive, "Block job 'x' not found"));
    // A job whose nodes cannot be had was one for a moment.
    let (made, events) = (|| Err(Error::new("no")), desk.events.clone());
    assert!(desk.jobs.create(spec("c"), &events, &[], made).is_err());
    desk.turn();
    assert_eq!(desk.told[3..], ["c created", "c null"]);
    desk.told.clear();
    // Never started: it ends without a word of its result.
    let key = desk.jobs.find("Ab9-._").unwrap();
    desk.jobs.cancel_sync(&mut desk.graph, key);
    desk.turn();
    assert_eq!(desk.told, ["Ab9-._ aborting", "Ab9-._ concluded", "Ab9-._ null"]);
}

#[test]
fn cancel_pause_and_quit_do_not_wait_for_a_sleep() {
    let mut desk = Desk::of_many();
    let key = desk.go(spec("a"), sleeper());
    // A limit of a byte a second, and a piece of a MiB.
    let slow = Script::new(|cx| {
        loop {
            cx.advance(1 << 20);
            cx.throttle(1 << 20)?;
        }
    });
    let slow = desk.go(Spec { speed: 1, ..spec("b") }, slow);
    let start = Instant::now();
    desk.jobs.pause(key).unwrap();
    desk.jobs.pause(slow).unwrap();
    assert_eq!(desk.jobs.pause(key).unwrap_err().desc, "Job is already paused");
    desk.until_told("a paused");
    desk.until_told("b paused");
    let denied = desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap_err();
    assert_eq!(denied.desc, "The block job for device 'a' is currently paused");
    let verb = desk.jobs.complete(key).unwrap_err();
    assert_eq!(verb.desc, "Job 'a' in state 'paused' cannot accept command verb 'complete'");
    desk.told.clear();
    desk.jobs.resume(slow).unwrap();
    desk.until_told("b running");
    assert_eq!(desk.jobs.resume(slow).unwrap_err().desc, "Can't resume a job that was not paused");
    desk.jobs.cancel_block(&mut desk.graph, slow, false).unwrap();
    desk.until_told("b null");
    assert_eq!(desk.told, ["b running", "b aborting", "b CANCELLED", "b concluded", "b null"]);
    desk.jobs.cancel_all(&mut desk.graph);
    desk.turn();
    assert_eq!(desk.told[5..], ["a running", "a aborting", "a CANCELLED", "a concluded", "a null"]);
    assert!(desk.jobs.is_empty());
    assert!(start.elapsed() < Duration::from_millis(1000), "took {:?}", start.elapsed());
}

#[test]
fn a_paused_job_does_nothing_and_a_new_speed_counts_at_once() {
    let mut desk = Desk::of_many();
    let count = Arc::new(AtomicU64::new(0));
    let counter = count.clone();
    let work = Script::new(move |cx| {
        loop {
            counter.fetch_add(1, SeqCst);
            cx.throttle(1 << 16)?;
        }
    });
    let key = desk.go(Spec { speed: 1 << 20, ..spec("a") }, work);
    std::thread::sleep(Duration::from_millis(300));
    desk.jobs.pause(key).unwrap();
    desk.until_told("a paused");
    let at = count.load(SeqCst);
    assert!((3..=8).contains(&at), "{at} pieces of 64 KiB in 0.3 s at 1 MiB/s");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(count.load(SeqCst), at);
    desk.jobs.set_speed(key, 1).unwrap();
    desk.jobs.resume(key).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let at = count.load(SeqCst);
    desk.jobs.set_speed(key, 0).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(count.load(SeqCst) > at + 100, "it slept on");
    let bad = desk.jobs.set_speed(key, -1).unwrap_err();
    assert_eq!(bad.desc, "Parameter 'speed' expects a non-negative value");
    desk.jobs.cancel_all(&mut desk.graph);
}

#[test]
fn finalize_and_dismiss_by_hand() {
    let mut desk = Desk::of_many();
    let by_hand = Spec { auto_finalize: false, auto_dismiss: false, ..spec("a") };
    let script = Script::new(|_| Ok(()));
    let seen = script.log.clone();
    let key = desk.go(by_hand, script);
    desk.until_told("a PENDING");
    assert!(log(&seen).is_empty());
    let no = desk.jobs.dismiss(&mut desk.graph, key).unwrap_err();
    assert_eq!(no.desc, "Job 'a' in state 'pending' cannot accept command verb 'dismiss'");
    desk.jobs.finalize(&mut desk.graph, key).unwrap();
    desk.turn();
    assert_eq!(desk.told[2..], ["a waiting", "a pending", "a PENDING", "a COMPLETED ", "a concluded"]);
    assert_eq!(desk.status("a"), Status::Concluded);
    desk.jobs.dismiss(&mut desk.graph, key).unwrap();
    assert!(desk.jobs.is_empty());

    // A pending one can still be cancelled.
    let by_hand = Spec { auto_finalize: false, ..spec("b") };
    let key = desk.go(by_hand, Script::new(|_| Ok(())));
    desk.until_told("b PENDING");
    desk.told.clear();
    desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap();
    desk.turn();
    assert_eq!(desk.told, ["b aborting", "b CANCELLED", "b concluded", "b null"]);
}

/// A mirror in sync: ready, and then as it is told.
fn ready(ended: Sender<&'static str>) -> Script {
    Script::mirror(move |cx| {
        cx.progress(7, 7);
        cx.ready();
        loop {
            if cx.completing() || cx.stopping() {
                ended.send(if cx.completing() { "complete" } else { "stop" }).unwrap();
                return Ok(());
            }
            cx.sleep(Duration::from_secs(1000))?;
        }
    })
}

#[test]
fn ready_jobs_complete_or_are_cancelled_softly_or_not() {
    let mut desk = Desk::of_many();
    let (tx, rx): (_, Receiver<&'static str>) = channel();
    let key = desk.go(spec("a"), ready(tx.clone()));
    desk.until_told("a READY 7/7");
    desk.jobs.pause(key).unwrap();
    desk.until_told("a standby");
    desk.jobs.complete(key).unwrap();
    desk.jobs.resume(key).unwrap();
    desk.until_told("a null");
    assert_eq!(rx.recv().unwrap(), "complete");
    let order = [
        "a created",
        "a running",
        "a ready",
        "a READY 7/7",
        "a standby",
        "a ready",
        "a waiting",
        "a pending",
        "a COMPLETED ",
        "a concluded",
        "a null",
    ];
    assert_eq!(desk.told, order);

    for (id, force, end) in [("b", false, "b COMPLETED "), ("c", true, "c CANCELLED")] {
        let key = desk.go(spec(id), ready(tx.clone()));
        desk.until_told(&format!("{id} ready"));
        desk.jobs.cancel_block(&mut desk.graph, key, force).unwrap();
        desk.until_told(&format!("{id} null"));
        assert!(desk.told.iter().any(|t| t == end), "{:?}", desk.told);
    }
    assert_eq!(rx.recv().unwrap(), "stop");

    // While it waits to be finalized it holds its disk, and says that it is paused; a cancel needs no force.
    let by_hand = Spec { auto_finalize: false, ..spec("d") };
    let key = desk.go(by_hand, ready(tx));
    desk.until_told("d ready");
    assert!(!desk.jobs.query()[0].paused);
    desk.jobs.complete(key).unwrap();
    desk.until_told("d PENDING");
    assert!(desk.jobs.query()[0].paused);
    desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap();
    desk.until_told("d null");
}

#[test]
fn a_job_that_ends_before_it_pauses_is_not_paused() {
    let (go, gone) = channel();
    let (told, tells) = channel();
    let mut desk = Desk::of_many();
    let script = Script::new(move |_| {
        told.send(()).unwrap();
        let _ = gone.recv();
        Ok(())
    });
    let key = desk.go(Spec { auto_finalize: false, ..spec("p") }, script);
    tells.recv().unwrap();
    desk.jobs.pause(key).unwrap();
    go.send(()).unwrap();
    desk.until_told("p pending");
    assert!(!desk.jobs.query()[0].paused, "nobody could resume it any more");
    desk.jobs.cancel_block(&mut desk.graph, key, false).unwrap();
    desk.until_told("p CANCELLED");
}

#[test]
fn a_ready_job_at_rest_is_not_busy_though_its_thread_runs() {
    let (go, gone) = channel();
    let (told, tells) = channel();
    let mut desk = Desk::of_many();
    let script = Script::mirror(move |cx| {
        cx.at_rest();
        cx.ready();
        let _ = gone.recv();
        // A look whether there is work: a sleep and a pause leave it at rest.
        cx.sleep(Duration::from_millis(1))?;
        told.send(()).unwrap();
        let _ = gone.recv();
        cx.at_work();
        told.send(()).unwrap();
        let _ = gone.recv();
        Ok(())
    });
    desk.go(spec("m"), script);
    desk.until_told("m READY 0/0");
    let busy = |desk: &Desk| desk.jobs.query().into_iter().find(|j| j.id == "m").map(|j| j.now.busy);
    assert_eq!(busy(&desk), Some(false), "ready was told, and nothing is done");
    go.send(()).unwrap();
    tells.recv().unwrap();
    assert_eq!(busy(&desk), Some(false), "after a sleep");
    go.send(()).unwrap();
    tells.recv().unwrap();
    assert_eq!(busy(&desk), Some(true));
    go.send(()).unwrap();
    desk.until_told("m null");
}

#[test]
fn errors_and_their_policies() {
    let mut desk = Desk::of_many();
    let fail = |policy, code| {
        Script::new(move |cx| {
            for n in 0.. {
                if n == 2 {
                    return Ok(());
                }
                let after = cx.on_error(policy, &io::Error::from_raw_os_error(code), n == 0)?;
                assert_eq!(after, if policy == OnError::Ignore { After::Ignored } else { After::Again });
            }
            Ok(())
        })
    };
    desk.go(spec("r"), fail(OnError::Report, libc::EIO));
    desk.until_told("r COMPLETED Input/output error");
    assert!(desk.told.contains(&"r ERROR true Report".to_string()));
    desk.go(spec("e"), fail(OnError::Enospc, libc::EIO));
    desk.until_told("e COMPLETED Input/output error");
    desk.go(spec("i"), fail(OnError::Ignore, libc::EIO));
    desk.until_told("i COMPLETED ");
    for (id, policy) in [("s", OnError::Stop), ("n", OnError::Enospc), ("u", OnError::Auto)] {
        desk.told.clear();
        let key = desk.go(spec(id), fail(policy, libc::ENOSPC));
        for read in [true, false] {
            desk.until_told(&format!("{id} paused"));
            let job = desk.jobs.query().remove(0);
            assert!(job.paused && job.now.io_status == IoStatus::NoSpace && !job.now.busy);
            assert!(desk.told.contains(&format!("{id} ERROR {read} Stop")));
            desk.told.clear();
            desk.jobs.resume(key).unwrap();
            // After the first it may have failed again by now.
            assert!(read || desk.jobs.query()[0].now.io_status == IoStatus::Ok);
        }
        desk.until_told(&format!("{id} COMPLETED "));
    }
}

#[test]
fn a_transaction_succeeds_or_fails_together() {
    let mut desk = Desk::of_many();
    let txn = Some(desk.jobs.new_txn());
    let (go, wait) = channel::<()>();
    let one = desk.make(Spec { txn, ..spec("a") }, Script::new(|_| Ok(())));
    let two = Script::new(move |_| wait.recv().map_err(|_| Stop::Cancelled));
    let two = desk.make(Spec { txn, ..spec("b") }, two);
    desk.jobs.start(&mut desk.graph, one);
    desk.jobs.start(&mut desk.graph, two);
    desk.until_told("a waiting");
    assert!(!desk.told.contains(&"a pending".to_string()));
    go.send(()).unwrap();
    desk.until_told("a null");
    assert_eq!(
        desk.told[4..],
        [
            "a waiting",
            "b waiting",
            "b pending",
            "a pending",
            "b COMPLETED ",
            "b concluded",
            "b null",
            "a COMPLETED ",
            "a concluded",
            "a null"
        ]
    );

    desk.told.clear();
    let txn = Some(desk.jobs.new_txn());
    let scripts = [
        Script::new(|_| Ok(())),
        sleeper(),
        Script::new(|cx| {
            cx.sleep(Duration::from_millis(50))?;
            Err(Stop::Failed(Error::new("bad")))
        }),
    ];
    let logs: Vec<_> = scripts.iter().map(|s| s.log.clone()).collect();
    for (id, script) in ["a", "b", "c"].into_iter().zip(scripts) {
        desk.go(Spec { txn, ..spec(id) }, script);
    }
    desk.until_told("c null");
    for end in ["a CANCELLED", "b CANCELLED", "c COMPLETED bad", "a null", "b null"] {
        assert!(desk.told.iter().any(|t| t == end), "no {end} in {:?}", desk.told);
    }
    logs.iter().for_each(|l| assert_eq!(*log(l), ["abort", "clean"]));
}

/// A disk of nothing, and a guest's handle on it.
fn disk(graph: &mut Graph) -> (Arc<Node>, Arc<Handle>) {
    let node = Node::new("disk", Box::new(Mem::new(1 << 20)), NodeOptions::default());
    graph.add(node.clone()).unwrap();
    let guest = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    (node, guest)
}

#[test]
fn a_held_guest_waits_until_the_job_has_ended() {
    let mut desk = Desk::of_many();
    let (node, guest) = disk(&mut desk.graph);
    let ends = Arc::new(AtomicBool::new(false));
    let writes = Arc::new(AtomicU64::new(0));
    let (stop, count, user) = (ends.clone(), writes.clone(), guest.clone());
    let writer = std::thread::spawn(move || {
        while !stop.load(SeqCst) {
            user.write(0, &Iov::from_slice(&[0; 512]), Flags::NONE).unwrap();
            count.fetch_add(1, SeqCst);
        }
    });
    let own = super::super::job::attach(&mut desk.graph, &node, Perm::CONSISTENT_READ, Perm::ALL).unwrap();
    let (source, mine, count) = (node.clone(), own.clone(), writes.clone());
    let works = Script::new(move |cx| {
        // The first time it gives it up.
        for last in [false, true] {
            assert!(cx.hold_guest(from_ref(&source), from_ref(&mine))?);
            // The guest counts after its write.
            std::thread::sleep(Duration::from_millis(20));
            let before = count.load(SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            mine.inside(|n| n.read(0, &mut crate::sys::iov::IovMut::from_slice(&mut [0; 512])))?;
            assert_eq!(count.load(SeqCst), before, "the guest was not held");
            if last {
                assert!(cx.confirm_hold());
                std::thread::sleep(Duration::from_millis(50));
                assert_eq!(count.load(SeqCst), before, "the guest was let go before the end");
                return Ok(());
            }
            cx.release_guest();
            while count.load(SeqCst) < before + 2 {
                cx.sleep(Duration::from_millis(1))?;
            }
            assert!(!cx.confirm_hold());
        }
        Ok(())
    });
    let key = desk.go(spec("a"), works);
    desk.until_told("a null");
    assert!(desk.told.contains(&"a COMPLETED ".to_string()), "{:?}", desk.told);
    assert!(desk.jobs.at(key.0).is_none());
    let after = writes.load(SeqCst);
    let start = Instant::now();
    while writes.load(SeqCst) < after + 10 {
        assert!(start.elapsed() < Duration::from_secs(10), "the guest is held for ever");
        std::thread::sleep(Duration::from_millis(1));
    }

    // A job that sits on the guest loses it, and is told so.
    let (source, mine) = (node.clone(), own.clone());
    let works = Script::new(move |cx| {
        assert!(cx.hold_guest(from_ref(&source), from_ref(&mine))?);
        std::thread::sleep(HOLD + Duration::from_millis(200));
        assert!(!cx.confirm_hold());
        Ok(())
    });
    desk.go(spec("b"), works);
    desk.until_told("b COMPLETED ");
    ends.store(true, SeqCst);
    writer.join().unwrap();
    desk.graph.detach(&own);
    desk.graph.detach(&guest);
}

#[test]
fn a_guest_let_go_can_be_held_again_at_once() {
    let mut desk = Desk::of_many();
    let (node, guest) = disk(&mut desk.graph);
    let own = super::super::job::attach(&mut desk.graph, &node, Perm::CONSISTENT_READ, Perm::ALL).unwrap();
    let (source, mine) = (node.clone(), own.clone());
    let works = Script::new(move |cx| {
        for _ in 0..3000 {
            assert!(cx.hold_guest(from_ref(&source), from_ref(&mine))?);
            cx.release_guest();
        }
        Ok(())
    });
    desk.go(spec("a"), works);
    desk.until_told("a COMPLETED ");
    desk.graph.detach(&own);
    desk.graph.detach(&guest);
}
