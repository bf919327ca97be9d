//! Of every kind of job: paused it makes no request, at any speed it ends without another one when it is
//! cancelled, and it is never faster than its limit. The requests that the job's own threads make are
//! counted where the disks are, in memory.

use super::backup::{Backup, BackupSpec};
use super::commit::{self, Commit};
use super::job::Work;
use super::mirror::{self, Mirror};
use super::registry::{JobKey, Spec};
use super::stream::{self, Stream};
use super::table::{Kind, Status};
use super::testing::{Desk, put};
use crate::block::driver::Perm;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec, OnError};
use crate::block::node::{Node, NodeOptions};
use crate::block::open::{self, Backing, Child, Common, Plan};
use crate::block::testing::{At, Mem, NoEnv};
use crate::error::Result;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::plan::Qcow2Plan;
use crate::sys::iov::Iov;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const LEN: u64 = 8 * MIB;

/// What a job may do without a look at its speed, in bytes: one piece, and what qcow2 needs besides.
const PIECE: u64 = MIB + 512 * 1024;

#[derive(Clone, Copy, PartialEq, Debug)]
enum What {
    Backup,
    Mirror,
    Stream,
    Commit,
    Active,
}

const ALL: [What; 5] = [What::Backup, What::Mirror, What::Stream, What::Commit, What::Active];

/// What the job's threads have asked of the disks.
#[derive(Default)]
struct Count {
    requests: AtomicU64,
    written: AtomicU64,
    /// Their requests wait.
    closed: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicU64,
    /// Requests of others count as well.
    all: AtomicBool,
}

impl Count {
    fn note(&self, at: At, len: u64) {
        let name = std::thread::current().name().unwrap_or_default().to_string();
        if !matches!(at, At::Read | At::Write) || !(self.all.load(SeqCst) || name.starts_with("job-")) {
            return;
        }
        self.requests.fetch_add(1, SeqCst);
        if at == At::Write {
            self.written.fetch_add(len, SeqCst);
        }
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            self.waiting.fetch_add(1, SeqCst);
            closed = self.opened.wait(closed).unwrap();
            self.waiting.fetch_sub(1, SeqCst);
        }
    }

    fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn now(&self) -> u64 {
        self.requests.load(SeqCst)
    }
}

/// A chain `base` ← `mid` ← `top` under a guest, a target, and a job on them.
struct Bed {
    desk: Desk,
    key: JobKey,
    guest: Arc<Handle>,
    count: Arc<Count>,
}

impl Bed {
    fn memory(desk: &mut Desk, name: &str, len: u64, count: &Arc<Count>) -> Arc<Node> {
        let mem = Mem { grows: true, ..Mem::new(len as usize) };
        let count = count.clone();
        *mem.state.hook.lock().unwrap() = Some(Arc::new(move |at, _, len| count.note(at, len)));
        let node = Node::new(name, Box::new(mem), NodeOptions::default());
        desk.graph.add(node.clone()).unwrap();
        desk.graph.own(&node);
        node
    }

    fn image(desk: &mut Desk, name: &str, below: Option<&Arc<Node>>, count: &Arc<Count>) -> Arc<Node> {
        let file = format!("{name}-file");
        let mem = Bed::memory(desk, &file, 0, count);
        let spec = HandleSpec { uses: Perm::ALL, shares: Perm::NONE, ..HandleSpec::default() };
        let user = desk.graph.attach(Some(mem.clone()), spec).unwrap();
        create(&mem, None, &CreateOptions { size: LEN, ..CreateOptions::default() }).unwrap();
        desk.graph.detach(&user);
        let backing = below.map_or(Backing::Nothing, |b| Backing::Child(Child::Node(b.name.clone())));
        let driver = Qcow2Plan { backing, ..Qcow2Plan::new(Child::Node(file)) };
        let common = Common { node_name: Some(name.into()), ..Common::default() };
        open::add(&mut desk.graph, &NoEnv, Plan { common, driver: Box::new(driver) }).unwrap()
    }

    fn new(what: What, speed: u64) -> Bed {
        Bed::with(what, speed, Arc::default())
    }

    fn with(what: What, speed: u64, count: Arc<Count>) -> Bed {
        let mut desk = Desk::new();
        let base = Bed::image(&mut desk, "base", None, &count);
        fill(&mut desk, &base, 1);
        let mid = Bed::image(&mut desk, "mid", Some(&base), &count);
        if what != What::Stream {
            fill(&mut desk, &mid, 2);
        }
        let top = Bed::image(&mut desk, "top", Some(&mid), &count);
        if what == What::Active {
            fill(&mut desk, &top, 3);
        }
        let target = Bed::memory(&mut desk, "target", LEN, &count);
        let guest = desk.guest(&top);
        let kind = match what {
            What::Backup => Kind::Backup,
            What::Mirror => Kind::Mirror,
            What::Stream => Kind::Stream,
            What::Commit | What::Active => Kind::Commit,
        };
        let spec = Spec { speed: speed.cast_signed(), ..Spec::new("j", kind) };
        let key = desk.start(spec, &[], |graph| work(graph, what, [base, mid, top, target]));
        Bed { desk, key, guest, count }
    }

    /// Turns until `done`.
    fn until(&mut self, what: &str, done: impl Fn(&Bed) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {:?}", self.desk.jobs.query());
            self.desk.turn();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn cancel(&mut self) {
        self.desk.jobs.cancel(&mut self.desk.graph, self.key, true).unwrap();
    }
}

fn fill(desk: &mut Desk, node: &Arc<Node>, byte: u8) {
    let handle = desk.guest(node);
    (0..LEN / MIB).for_each(|n| put(&handle, n * MIB, byte, MIB as usize));
    desk.graph.detach(&handle);
}

fn work(graph: &mut Graph, what: What, [base, mid, top, target]: [Arc<Node>; 4]) -> Result<Box<dyn Work>> {
    let name_of = |n: &Node| n.name.clone();
    let on_error = OnError::Report;
    Ok(match what {
        What::Backup => {
            let spec = BackupSpec {
                source: top,
                target,
                sync: super::backup::Sync::Full,
                bitmap: None,
                compress: false,
                on_source_error: on_error,
                on_target_error: on_error,
                break_snapshot: false,
                filter: ("filter".into(), false),
            };
            Box::new(Backup::new(graph, spec)?)
        }
        What::Mirror => Box::new(Mirror::new(graph, mirror::tests::plan(&top, &target))?),
        What::Active => {
            let plan = mirror::Plan {
                sync: mirror::Sync::Top(vec![top.clone(), mid]),
                commit: true,
                ..mirror::tests::plan(&top, &base)
            };
            Box::new(Mirror::new(graph, plan)?)
        }
        What::Stream => {
            let (from, id) = (vec![mid, base], "j".into());
            let plan = stream::Plan { top, from, backing_file: None, on_error, filter: None, id, name_of };
            Box::new(Stream::new(graph, plan)?)
        }
        What::Commit => {
            let from = vec![mid];
            let plan = commit::Plan { from, base, backing_file: None, on_error, filter: None, name_of };
            Box::new(Commit::new(graph, plan)?)
        }
    })
}

#[test]
fn a_paused_job_makes_no_request() {
    for what in ALL {
        let mut bed = Bed::new(what, 4 * MIB);
        bed.until("something is done", |b| b.count.now() > 0);
        bed.desk.jobs.pause(bed.key).unwrap();
        bed.desk.until_status(bed.key, Status::Paused);
        let before = bed.count.now();
        // Two pieces would be due.
        std::thread::sleep(Duration::from_millis(500));
        bed.desk.turn();
        assert_eq!(bed.count.now(), before, "{what:?}");
        let progress = bed.desk.jobs.query()[0].now.progress;
        assert!(progress.offset < progress.len, "{what:?} was over before");
        if what == What::Backup {
            // The guest's writes go on having copied what was there, and that only.
            let (written, all) = (bed.count.written.load(SeqCst), 64 << 10);
            bed.count.all.store(true, SeqCst);
            bed.guest.write(LEN - 512, &Iov::from_slice(&[9; 512]), Default::default()).unwrap();
            bed.count.all.store(false, SeqCst);
            let more = bed.count.written.load(SeqCst) - written;
            assert!(more >= all, "{more} bytes");
        }
        bed.desk.jobs.resume(bed.key).unwrap();
        bed.desk.until_status(bed.key, Status::Running);
        let before = bed.count.now();
        bed.until("it goes on", |b| b.count.now() > before || b.desk.jobs.is_empty());
        bed.desk.jobs.cancel_all(&mut bed.desk.graph);
    }
}

#[test]
fn a_job_that_waits_for_its_speed_ends_without_another_request() {
    for what in ALL {
        for quits in [false, true] {
            // What is left would take it days.
            let mut bed = Bed::new(what, 1);
            bed.until("it waits", |b| !b.desk.jobs.query()[0].now.busy && b.count.now() > 0);
            let before = bed.count.now();
            if quits {
                bed.desk.jobs.cancel_all(&mut bed.desk.graph);
            } else {
                bed.cancel();
            }
            bed.desk.until("CANCELLED");
            assert!(bed.desk.jobs.is_empty());
            assert_eq!(bed.count.now(), before, "{what:?}");
        }
    }
}

#[test]
fn a_cancelled_job_finishes_the_pieces_in_hand_and_begins_none() {
    for what in ALL {
        let count = Arc::new(Count::default());
        // From its first request on, however late this thread comes to look.
        count.close();
        let mut bed = Bed::with(what, 0, count);
        bed.until("a request", |b| b.count.waiting.load(SeqCst) > 0);
        bed.cancel();
        let written = bed.count.written.load(SeqCst);
        bed.count.open();
        bed.desk.until("CANCELLED");
        let more = bed.count.written.load(SeqCst) - written;
        // Two threads, each with a piece.
        assert!(more <= 2 * PIECE, "{what:?}: {more} bytes after the cancel");
    }
}

/// Asserts, as long as the job runs, that it has written no more than its speed allowed; what is done
/// with it at each look, and the speed from then on.
fn is_not_faster(what: What, speed: u64, mut at_look: impl FnMut(&mut Bed, u64) -> u64) {
    let mut begun = Instant::now();
    let mut bed = Bed::new(what, speed);
    let (mut speed, mut allowed, mut looks) = (speed, PIECE as f64, 0);
    while !bed.desk.jobs.is_empty() && !bed.desk.jobs.query()[0].ready {
        let written = bed.count.written.load(SeqCst);
        // The clock after the bytes, and 50 ms that a job may make up for.
        let now = Instant::now();
        let most = allowed + speed as f64 * ((now - begun).as_secs_f64() + 0.05);
        assert!(written as f64 <= most, "{what:?}: {written} bytes, {most} allowed");
        looks += 1;
        let next = at_look(&mut bed, looks);
        if next != speed {
            // What the old speed allowed until it was no more.
            allowed += speed as f64 * begun.elapsed().as_secs_f64();
            begun = now;
            speed = next;
        }
        bed.desk.turn();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(bed.count.written.load(SeqCst) >= LEN, "{what:?} has not written its data");
    bed.desk.jobs.cancel_all(&mut bed.desk.graph);
}

#[test]
fn no_job_is_faster_than_its_limit() {
    for what in ALL {
        is_not_faster(what, 16 * MIB, |_, _| 16 * MIB);
    }
}

#[test]
fn no_job_is_faster_when_its_limit_changes() {
    for what in ALL {
        is_not_faster(what, 8 * MIB, |bed, looks| {
            let speed = if looks < 100 { 8 * MIB } else { 24 * MIB };
            if looks == 100 {
                bed.desk.jobs.set_speed(bed.key, (24 * MIB).cast_signed()).unwrap();
            }
            speed
        });
    }
}

#[test]
fn who_sets_the_limit_again_and_again_gets_no_more() {
    for what in ALL {
        is_not_faster(what, 16 * MIB, |bed, looks| {
            let speed = [16 * MIB, 15 * MIB][looks as usize % 2];
            let told = bed.desk.jobs.set_speed(bed.key, speed.cast_signed());
            assert!(told.is_ok() || bed.desk.jobs.query().iter().all(|j| j.status.is_completed()));
            16 * MIB
        });
    }
}
