use super::*;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::NodeOptions;
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{Mem, MemState, NoEnv, Rng};
use crate::sys::inbox::Inbox;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

const LEN: usize = 256 << 10;

struct Setup {
    graph: Graph,
    disks: Vec<Arc<MemState>>,
    events: Events,
}

impl Setup {
    /// Memory disks `m0`, `m1`…
    fn new(count: usize) -> Setup {
        let events: Events = Arc::new(Inbox::new().unwrap());
        let mut graph = Graph::new();
        graph.report_to(events.clone());
        let mut setup = Setup { graph, disks: Vec::new(), events };
        (0..count).for_each(|_| setup.add_disk(LEN));
        setup
    }

    fn add_disk(&mut self, len: usize) {
        let mem = Mem::new(len);
        self.disks.push(mem.state.clone());
        let name = format!("m{}", self.disks.len() - 1);
        let node = Node::new(name, Box::new(mem), NodeOptions::default());
        self.graph.add(node.clone()).unwrap();
        self.graph.own(&node);
    }

    fn plan(&self, threshold: i64) -> QuorumPlan {
        let children = (0..self.disks.len()).map(|n| Child::Node(format!("m{n}"))).collect();
        QuorumPlan { children, threshold, blkverify: None, rewrite_corrupted: None, read_pattern: None }
    }

    fn open(&mut self, plan: QuorumPlan) -> Result<Arc<Node>> {
        let common = Common { node_name: Some("q".into()), ..Common::default() };
        open::add(&mut self.graph, &NoEnv, Plan { common, driver: Box::new(plan) })
    }

    fn disk(&mut self, plan: QuorumPlan) -> Arc<Handle> {
        let node = self.open(plan).unwrap();
        self.graph.attach(Some(node), HandleSpec::default()).unwrap()
    }

    fn fail(&self, n: usize, code: i32) {
        self.disks[n].fail.store(code, Ordering::SeqCst);
    }

    fn corrupt(&self, n: usize, at: usize) {
        self.disks[n].data.lock().unwrap()[at] ^= 0xff;
    }

    /// What was posted, in short.
    fn told(&self) -> Vec<String> {
        let short = |e| match e {
            Event::QuorumReportBad { op, error, node_name, sector_num, sectors_count } => {
                let why = error.unwrap_or("outvoted".into());
                format!("{node_name} {} {sector_num}+{sectors_count}: {why}", op.as_str())
            }
            Event::QuorumFailure { node_name, sector_num, sectors_count } => {
                format!("{node_name} {sector_num}+{sectors_count}")
            }
            other => panic!("{other:?}"),
        };
        self.events.take().into_iter().map(short).collect()
    }
}

fn get(disk: &Handle, off: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0xee; len];
    disk.read(off, &mut IovMut::from_slice(&mut data)).map(|()| data)
}

fn put(disk: &Handle, off: u64, data: &[u8]) -> io::Result<()> {
    disk.write(off, &Iov::from_slice(data), Flags::NONE)
}

fn code<T: std::fmt::Debug>(done: io::Result<T>) -> i32 {
    done.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn options_that_make_no_sense() {
    let mut s = Setup::new(2);
    let plan = |s: &Setup, threshold, f: &dyn Fn(&mut QuorumPlan)| {
        let mut plan = s.plan(threshold);
        f(&mut plan);
        plan
    };
    let only_two = "blkverify=on can only be set if there are exactly two files and vote-threshold is 2";
    for (plan, want) in [
        (plan(&s, 0, &|_| ()), "Parameter 'vote-threshold' expects a value >= 1"),
        (plan(&s, -1, &|_| ()), "Parameter 'vote-threshold' expects a value >= 1"),
        (plan(&s, 3, &|_| ()), "threshold may not exceed children count"),
        (plan(&s, 1, &|p| p.children.clear()), "Number of provided children must be 1 or more"),
        (plan(&s, 1, &|p| p.blkverify = Some(true)), only_two),
        (
            plan(&s, 2, &|p| (p.blkverify, p.rewrite_corrupted) = (Some(true), Some(true))),
            "rewrite-corrupted=on cannot be used with blkverify=on",
        ),
    ] {
        assert_eq!(s.open(plan).err().unwrap().desc, want);
    }
    s.add_disk(LEN + 512);
    let plan = s.plan(1);
    let e = s.open(plan).err().unwrap().desc;
    assert_eq!(e, "the children of a quorum must have the same length: 'm2' has 262656 bytes, not 262144");
    assert_eq!(s.graph.nodes().count(), 3);
}

#[test]
fn a_majority_wins_and_the_others_are_reported() {
    let mut s = Setup::new(3);
    let plan = s.plan(2);
    let disk = s.disk(plan);
    put(&disk, 1000, &[7; 5000]).unwrap();
    s.corrupt(1, 2000);
    assert_eq!(get(&disk, 1024, 2048).unwrap(), [7; 2048]);
    assert_eq!(s.told(), ["m1 read 2+4: outvoted"]);
    // Where they agree nobody is told of.
    assert_eq!(get(&disk, 1000, 1000).unwrap(), [7; 1000]);
    s.fail(0, libc::ENXIO);
    let e = code(get(&disk, 1900, 200));
    assert_eq!(
        (e, s.told()),
        (libc::EIO, vec!["m0 read 3+2: No such device or address".into(), "q 3+2".into()])
    );
    s.fail(2, libc::ENXIO);
    let nodev = "read 0+1: No such device or address";
    assert_eq!(code(get(&disk, 0, 512)), libc::ENXIO);
    assert_eq!(s.told(), [format!("m0 {nodev}"), format!("m2 {nodev}"), "q 0+1".into()]);
}

#[test]
fn outvoted_children_are_corrected_if_asked() {
    let mut s = Setup::new(3);
    let plan = QuorumPlan { rewrite_corrupted: Some(true), ..s.plan(2) };
    let disk = s.disk(plan);
    put(&disk, 0, &[9; 4096]).unwrap();
    s.corrupt(2, 5);
    assert_eq!(get(&disk, 0, 512).unwrap(), [9; 512]);
    assert_eq!(s.told(), ["m2 read 0+1: outvoted"]);
    assert_eq!(s.disks[2].data.lock().unwrap()[5], 9);
    get(&disk, 0, 4096).unwrap();
    assert!(s.told().is_empty());
}

#[test]
fn the_last_version_wins_a_tie_and_the_threshold_decides() {
    let mut s = Setup::new(2);
    let plan = s.plan(1);
    let disk = s.disk(plan);
    s.corrupt(0, 0);
    assert_eq!(get(&disk, 0, 1).unwrap(), [0]);
    assert_eq!(s.told(), ["m0 read 0+1: outvoted"]);
}

#[test]
fn writes_and_flushes_need_enough_children() {
    let mut s = Setup::new(3);
    let plan = s.plan(2);
    let disk = s.disk(plan);
    s.fail(1, libc::ENOSPC);
    put(&disk, 512, &[1; 512]).unwrap();
    disk.flush().unwrap();
    disk.zero(0, 512, Flags::NONE).unwrap();
    let full = ": No space left on device";
    assert_eq!(
        s.told(),
        [format!("m1 write 1+1{full}"), format!("m1 flush 0+0{full}"), format!("m1 write 0+1{full}")]
    );
    s.fail(0, libc::EIO);
    s.fail(2, libc::EIO);
    assert_eq!(code(put(&disk, 0, &[1; 512])), libc::EIO);
    assert_eq!(s.told().last().unwrap(), "q 0+1");
    assert_eq!(code(disk.flush()), libc::EIO);
    assert!(s.told().iter().all(|t| t.contains("flush")));
}

#[test]
fn fifo_believes_the_first_that_can_be_read() {
    let mut s = Setup::new(2);
    let plan = QuorumPlan { read_pattern: Some(QuorumReadPattern::Fifo), ..s.plan(1) };
    let disk = s.disk(plan);
    s.corrupt(0, 3);
    assert_eq!(get(&disk, 3, 1).unwrap(), [0xff]);
    assert!(s.told().is_empty());
    s.fail(0, libc::EIO);
    assert_eq!(get(&disk, 3, 1).unwrap(), [0]);
    assert_eq!(s.told(), ["m0 read 0+1: Input/output error"]);
}

#[test]
fn blkverify_fails_on_a_difference() {
    let mut s = Setup::new(2);
    let plan = QuorumPlan { blkverify: Some(true), ..s.plan(2) };
    let disk = s.disk(plan);
    put(&disk, 0, &[1; 512]).unwrap();
    assert_eq!(get(&disk, 0, 512).unwrap(), [1; 512]);
    s.corrupt(0, 100);
    assert_eq!(code(get(&disk, 0, 512)), libc::EIO);
    let (q, m) = (s.graph.find("q").unwrap().clone(), s.graph.find("m0").unwrap().clone());
    s.add_disk(LEN);
    let m2 = s.graph.find("m2").unwrap().clone();
    let e = s.graph.add_child(&q, &m2).unwrap_err().desc;
    assert_eq!(e, "Cannot add a child to a quorum in blkverify mode");
    assert_eq!(s.graph.add_child(&m, &m2).unwrap_err().desc, "The node m0 does not support adding a child");
}

#[test]
fn zeroes_are_known_only_where_all_children_know() {
    let mut s = Setup::new(2);
    let plan = s.plan(2);
    let disk = s.disk(plan);
    assert_eq!(disk.status(0, 512).unwrap().kind, ExtentKind::Data);
    disk.discard(0, 4096).unwrap();
    assert!(s.disks.iter().all(|d| d.discards.load(Ordering::SeqCst) == 0));
    let flags = Flags::NO_FALLBACK;
    assert_eq!(code(disk.zero(0, 4096, flags)), libc::ENOTSUP);
}

#[test]
fn nobody_else_may_write_to_a_child() {
    let mut s = Setup::new(2);
    let plan = s.plan(2);
    s.disk(plan);
    let child = s.graph.find("m0").unwrap().clone();
    let spec = HandleSpec { shares: Perm::ALL, ..HandleSpec::default() };
    let e = s.graph.attach(Some(child), spec).err().unwrap().desc;
    assert!(e.contains("'write' are both required by an unnamed block device"), "{e}");
    assert!(e.contains("and unshared by node 'q' (uses node 'm0' as 'children.0' child)"), "{e}");
}

#[test]
fn the_error_of_most() {
    let list = |codes: &[i32]| common_error(codes.iter().map(|c| errno(*c)).collect()).raw_os_error();
    assert_eq!(list(&[5, 28, 5]), Some(5));
    assert_eq!(list(&[5, 28, 28]), Some(28));
    assert_eq!(list(&[5, 28]), Some(28));
    assert_eq!(list(&[]), Some(libc::EIO));
}

/// One child of three lies at random; every read is what was written, at any offset and length.
#[test]
fn two_of_three_survive_a_corrupted_child_under_random_requests() {
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut rng = Rng(seed | 1);
    for rewrite in [false, true] {
        let mut s = Setup::new(3);
        let plan = QuorumPlan { rewrite_corrupted: Some(rewrite), ..s.plan(2) };
        let disk = s.disk(plan);
        let mut model = vec![0u8; LEN];
        for _ in 0..3000 {
            let off = rng.below(LEN as u64 - 1) as usize;
            let n = 1 + rng.below((LEN - off).min(9000) as u64) as usize;
            match rng.below(6) {
                0 | 1 => {
                    let byte = rng.draw() as u8;
                    put(&disk, off as u64, &vec![byte; n]).unwrap();
                    model[off..off + n].fill(byte);
                }
                2 => {
                    disk.zero(off as u64, n as u64, Flags::NONE).unwrap();
                    model[off..off + n].fill(0);
                }
                // Always the same child: two may not lie at one place.
                3 => s.corrupt(1, off),
                4 => {
                    s.fail(1, libc::EIO);
                    put(&disk, off as u64, &vec![3; n]).unwrap();
                    s.fail(1, 0);
                    model[off..off + n].fill(3);
                }
                _ => assert_eq!(get(&disk, off as u64, n).unwrap(), model[off..off + n]),
            }
        }
        assert_eq!(get(&disk, 0, LEN).unwrap(), model);
        let same = *s.disks[1].data.lock().unwrap() == model;
        assert_eq!(same, rewrite);
        assert_eq!(*s.disks[0].data.lock().unwrap(), model);
    }
}

/// Threads write and read overlapping ranges: no read fails for a write that is under way, nobody
/// is reported, and the children end alike. Without the ranges' list this fails at once.
#[test]
fn writes_that_overlap_do_not_make_children_differ() {
    let mut s = Setup::new(3);
    let plan = QuorumPlan { rewrite_corrupted: Some(true), ..s.plan(3) };
    let disk = s.disk(plan);
    std::thread::scope(|scope| {
        for n in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                let mut rng = Rng(n + 1);
                for _ in 0..2000 {
                    let off = rng.below(8) * 700;
                    match rng.below(2) {
                        0 => put(disk, off, &vec![rng.draw() as u8; 4096]).unwrap(),
                        _ => drop(get(disk, off, 4096).unwrap()),
                    }
                }
            });
        }
    });
    assert_eq!(s.told(), [""; 0]);
    let all: Vec<_> = s.disks.iter().map(|d| d.data.lock().unwrap().clone()).collect();
    assert!(all[0] == all[1] && all[1] == all[2]);
}

/// Children with garbage in them come and go while guests write and check what they wrote; a scrub
/// (a read of the whole disk) corrects the new one before the oldest goes.
#[test]
fn children_come_and_go_while_guests_write() {
    let mut s = Setup::new(3);
    let plan = QuorumPlan { rewrite_corrupted: Some(true), ..s.plan(2) };
    let disk = s.disk(plan);
    let soak = std::env::var("SOAK").ok().and_then(|t| t.parse().ok()).unwrap_or(2);
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let part = LEN / 4;
    let models: Vec<_> = (0..4).map(|_| Mutex::new(vec![0u8; part])).collect();
    let mut rounds = 0;
    std::thread::scope(|scope| {
        for (n, model) in models.iter().enumerate() {
            let (disk, stop, requests) = (&disk, &stop, &requests);
            scope.spawn(move || {
                let mut rng = Rng(n as u64 + 77);
                let mut model = model.lock().unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let off = rng.below(part as u64 - 1) as usize;
                    let len = 1 + rng.below((part - off).min(5000) as u64) as usize;
                    let at = (n * part + off) as u64;
                    if rng.below(2) == 0 {
                        let byte = rng.draw() as u8;
                        put(disk, at, &vec![byte; len]).unwrap();
                        model[off..off + len].fill(byte);
                    } else {
                        assert_eq!(get(disk, at, len).unwrap(), model[off..off + len], "at {at}");
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let until = Instant::now() + Duration::from_secs(soak);
        let q = s.graph.find("q").unwrap().clone();
        // A panic here must end the others, too.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while Instant::now() < until {
                s.add_disk(LEN);
                let newest = s.disks.len() - 1;
                s.disks[newest].data.lock().unwrap().fill(0xa5);
                let node = s.graph.find(&format!("m{newest}")).unwrap().clone();
                s.graph.add_child(&q, &node).unwrap();
                get(&disk, 0, LEN).unwrap();
                let oldest = q.driver.edges()[0].role.clone();
                s.graph.remove_child(&q, &oldest).unwrap();
                s.graph.delete(&format!("m{}", newest - 3)).unwrap();
                rounds += 1;
            }
        }));
        stop.store(true, Ordering::Relaxed);
        done.unwrap();
    });
    eprintln!("{rounds} children, {} requests", requests.load(Ordering::Relaxed));
    assert!(rounds > 2);
    for (n, model) in models.iter().enumerate() {
        assert_eq!(get(&disk, (n * part) as u64, part).unwrap(), *model.lock().unwrap());
    }
    // The quorum and its three children.
    assert_eq!(s.graph.nodes().count(), 4);
    assert_eq!(s.graph.find("q").unwrap().driver.edges()[0].role, format!("children.{rounds}"));
}
