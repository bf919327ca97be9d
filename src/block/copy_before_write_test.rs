use super::*;
use crate::block::driver::Extent;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::mutant::with;
use crate::block::testing::{At, Mem, MemState, Rng};
use crate::sys::iov::IovMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize};

const CLUSTER: u64 = 4096;
const LEN: usize = 64 * 4096 + 1024;

struct Setup {
    graph: Graph,
    disk: Arc<Node>,
    target: Arc<Node>,
    source_state: Arc<MemState>,
    target_state: Arc<MemState>,
    guest: Arc<Handle>,
}

fn setup(fill: &[u8]) -> Setup {
    let mut graph = Graph::new();
    let (source, target) = (Mem::new(LEN), Mem::new(LEN));
    let (source_state, target_state) = (source.state.clone(), target.state.clone());
    source_state.data.lock().unwrap().copy_from_slice(fill);
    let disk = Node::new("disk", Box::new(source), NodeOptions::default());
    let target = Node::new("target", Box::new(target), NodeOptions::default());
    for node in [&disk, &target] {
        graph.add(node.clone()).unwrap();
        graph.own(node);
    }
    let guest = graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    Setup { graph, disk, target, source_state, target_state, guest }
}

const OPTIONS: CopyOptions =
    CopyOptions { cluster: CLUSTER, full: true, parts: false, compress: false, break_snapshot: false };

/// A guest's write has no more copied than it must.
const PARTS: CopyOptions = CopyOptions { cluster: 4 * CLUSTER, parts: true, ..OPTIONS };

fn job_handle(graph: &mut Graph, filter: &Arc<Node>) -> Arc<Handle> {
    let spec = HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::ALL, ..HandleSpec::default() };
    graph.attach(Some(filter.clone()), spec).unwrap()
}

#[test]
fn the_target_gets_the_disk_as_it_was_under_writing_guests() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_0001);
    println!("SEED={seed}");
    let mut rng = Rng(seed);
    for round in 0..30 {
        let fill: Vec<u8> = (0..LEN).map(|i| if (i >> 13) & 1 == 0 { rng.draw() as u8 } else { 0 }).collect();
        let mut s = setup(&fill);
        for state in [&s.source_state, &s.target_state] {
            state.sparse.store(round % 4 < 2, Ordering::SeqCst);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicUsize::new(0));
        let guests: Vec<_> = (0..3)
            .map(|t| {
                let (guest, stop, writes) = (s.guest.clone(), stop.clone(), writes.clone());
                let mut rng = Rng(seed ^ (round * 7 + t + 1) << 20);
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let off = rng.below(LEN as u64 - 1);
                        let n = (1 + rng.below(9000)).min(LEN as u64 - off);
                        let data = vec![rng.draw() as u8 | 1; n as usize];
                        match rng.below(4) {
                            0 => guest.zero(off, n, Flags::NONE).unwrap(),
                            1 => guest.discard(off, n).unwrap(),
                            _ => guest.write(off, &Iov::from_slice(&data), Flags::NONE).unwrap(),
                        }
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        while writes.load(Ordering::Relaxed) < 10 {
            std::thread::yield_now();
        }
        let options = if round % 2 == 0 { PARTS } else { OPTIONS };
        let (filter, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &s.target, options).unwrap();
        s.graph.add(filter.clone()).unwrap();
        let quiesced = s.graph.quiesce(&[&s.disk], &[]);
        // nobody writes now: this is the disk that the copy is to be
        let then = s.source_state.data.lock().unwrap().clone();
        s.graph.edit(&quiesced, |edit| edit.insert_filter(&filter, &s.disk)).unwrap();
        drop(quiesced);
        let job = job_handle(&mut s.graph, &filter);
        let mut at = 0;
        while at < copies.len() {
            let done = job.inside(|_| {
                let skipped = copies.skip_zeroes(at).unwrap();
                if skipped > 0 {
                    return Ok(Some(at..at + skipped));
                }
                Ok(copies.copy_next(at, copies.len()).unwrap())
            });
            match done.unwrap() {
                Some(range) => at = range.end,
                None => break,
            }
            if rng.below(4) == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(copies.to_copy().count(), 0);
        stop.store(true, Ordering::Relaxed);
        guests.into_iter().for_each(|g| g.join().unwrap());
        let got = s.target_state.data.lock().unwrap().clone();
        let wrong = (0..LEN).find(|&i| got[i] != then[i]);
        assert_eq!(wrong, None, "round {round}: the copy differs from the disk as it was");
        s.graph.detach(&job);
        s.graph.remove_filter(&filter).unwrap();
        assert!(Arc::ptr_eq(&s.guest.node().unwrap(), &s.disk));
    }
}

#[test]
fn a_failed_copy_fails_the_write_or_breaks_the_copy() {
    for break_snapshot in [false, true] {
        let fill = vec![5; LEN];
        let mut s = setup(&fill);
        let (filter, copies) = filter(
            ("cbw", NodeOptions::default()),
            &s.disk,
            &s.target,
            CopyOptions { break_snapshot, ..OPTIONS },
        )
        .unwrap();
        s.graph.insert_filter(&filter, &s.disk).unwrap();
        s.target_state.fail.store(libc::ENOSPC, Ordering::SeqCst);
        let done = s.guest.write(100, &Iov::from_slice(&[9; 10]), Flags::NONE);
        assert_eq!(copies.broken(), break_snapshot);
        let byte = s.source_state.data.lock().unwrap()[100];
        if break_snapshot {
            done.unwrap();
            assert_eq!(byte, 9);
        } else {
            // nothing was written, nothing is lost: with space again the same write works
            assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(byte, 5);
            s.target_state.fail.store(0, Ordering::SeqCst);
            s.guest.write(100, &Iov::from_slice(&[9; 10]), Flags::NONE).unwrap();
            assert_eq!(s.target_state.data.lock().unwrap()[..4096], [5; 4096]);
            assert_eq!(s.target_state.data.lock().unwrap()[4096], 0);
        }
    }
}

#[test]
fn only_what_is_to_be_copied_is() {
    let mut s = setup(&vec![5; LEN]);
    let (filter, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &s.target, OPTIONS).unwrap();
    copies.to_copy().clear_all();
    copies.to_copy().mark(8192, 1);
    s.graph.insert_filter(&filter, &s.disk).unwrap();
    s.guest.write(0, &Iov::from_slice(&[9; 16384]), Flags::NONE).unwrap();
    let target = s.target_state.data.lock().unwrap().clone();
    assert!(target[..8192].iter().all(|&b| b == 0));
    assert!(target[8192..12288].iter().all(|&b| b == 5));
    assert!(target[12288..].iter().all(|&b| b == 0));
}

/// What the target got: all of it are zeroes before.
fn copied(s: &Setup) -> Vec<std::ops::Range<u64>> {
    let target = s.target_state.data.lock().unwrap();
    let blocks: Vec<bool> = target.chunks(4096).map(|block| block.iter().all(|&b| b == 5)).collect();
    let mut list = Vec::new();
    let mut at = 0;
    for run in blocks.chunk_by(|a, b| a == b) {
        if run[0] {
            list.push(at * 4096..(at + run.len() as u64) * 4096);
        }
        at += run.len() as u64;
    }
    list
}

#[test]
fn a_write_has_copied_what_it_overwrites_and_the_job_the_rest() {
    let mut s = setup(&vec![5; LEN]);
    let (filter, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &s.target, PARTS).unwrap();
    s.graph.insert_filter(&filter, &s.disk).unwrap();
    let write =
        |off: u64, len: usize| s.guest.write(off, &Iov::from_slice(&vec![9; len]), Flags::NONE).unwrap();
    let all = (LEN as u64).next_multiple_of(4 * CLUSTER);
    write(5000, 10);
    assert_eq!(copied(&s), vec![4096..8192]);
    assert_eq!((copies.left(), copies.done.count()), (all, 0));
    // Not again: that would be the new data.
    write(4096, 4096);
    // A whole cluster in the midst, and a part of the next.
    write(15000, 20000);
    assert_eq!(copied(&s), [4096..8192, 12288..36864]);
    let size = 4 * CLUSTER;
    assert_eq!((copies.left(), copies.done.count()), (all - size, size));
    // With the last block the cluster is copied.
    write(0, 1);
    write(8192, 1);
    assert_eq!((copies.left(), copies.done.count()), (all - 2 * size, 2 * size));
    // The short block at the end, too.
    write(LEN as u64 - 1, 1);
    assert_eq!(copies.left(), all - 3 * size);
    let job = job_handle(&mut s.graph, &filter);
    while job.inside(|_| Ok(copies.copy_next(0, copies.len()).unwrap())).unwrap().is_some() {}
    assert_eq!(copies.left(), 0);
    assert!(s.target_state.data.lock().unwrap().iter().all(|&b| b == 5));
    // What the job copied was no guest's.
    assert_eq!(copies.done.count(), 3 * size);
}

#[test]
fn whole_clusters_where_parts_will_not_do() {
    let on_disk = |s: &mut Setup| {
        let over = Node::new("over", Box::new(Over::on(&s.disk)), NodeOptions::default());
        s.graph.add(over.clone()).unwrap();
        s.graph.own(&over);
        over
    };
    type Target<'a> = &'a dyn Fn(&mut Setup) -> Arc<Node>;
    let itself: Target = &|s| s.target.clone();
    let list: [(CopyOptions, Target, u64); 5] = [
        (PARTS, itself, CLUSTER),
        (CopyOptions { parts: false, ..PARTS }, itself, 4 * CLUSTER),
        (CopyOptions { compress: true, ..PARTS }, itself, 4 * CLUSTER),
        (PARTS, &on_disk, 4 * CLUSTER),
        (CopyOptions { cluster: CLUSTER, ..PARTS }, itself, CLUSTER),
    ];
    for (n, (options, target, grain)) in list.into_iter().enumerate() {
        let mut s = setup(&vec![5; LEN]);
        let target = target(&mut s);
        let (_, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &target, options).unwrap();
        assert_eq!(copies.grain(), grain, "case {n}");
    }
    // Of a large disk the blocks are larger, or their bits would be too many.
    for (len, block) in [(0, 4096), (128 << 30, 4096), (256 << 30, 8192), (1 << 40, 32 << 10)] {
        assert_eq!(crate::block::copies::block_size(len), block);
    }
}

#[test]
fn zeroes_are_skipped_by_whole_clusters() {
    let mut fill = vec![0; LEN];
    fill[..4096].fill(5);
    let mut s = setup(&fill);
    s.source_state.sparse.store(true, Ordering::SeqCst);
    s.target_state.sparse.store(true, Ordering::SeqCst);
    let options = CopyOptions { parts: false, ..PARTS };
    let (filter, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &s.target, options).unwrap();
    s.graph.insert_filter(&filter, &s.disk).unwrap();
    // A job may be there after an error.
    assert_eq!(copies.skip_zeroes(8192).unwrap(), 0);
    assert!(copies.to_copy().is_dirty(0));
    assert!(copies.skip_zeroes(4 * CLUSTER).unwrap() > 0);
}

/// While a guest has a block copied, the job finds zeroes there, and another guest writes to the same block.
#[test]
fn zeroes_that_somebody_copies_are_not_skipped() {
    let is_zero = |parts: bool| {
        let mut s = setup(&vec![0; LEN]);
        s.source_state.sparse.store(true, Ordering::SeqCst);
        s.target_state.sparse.store(true, Ordering::SeqCst);
        let options = CopyOptions { parts, ..PARTS };
        let (filter, copies) = filter(("cbw", NodeOptions::default()), &s.disk, &s.target, options).unwrap();
        s.graph.insert_filter(&filter, &s.disk).unwrap();
        let job = job_handle(&mut s.graph, &filter);
        let (other, first) = (s.guest.clone(), AtomicBool::new(true));
        let hook = move |at, _, _| {
            if at != At::Status || !first.swap(false, Ordering::SeqCst) {
                return;
            }
            let (job, copies, other) = (job.clone(), copies.clone(), other.clone());
            let writer = std::thread::spawn(move || {
                job.inside(|_| Ok(copies.skip_zeroes(0).unwrap())).unwrap();
                other.write(1024, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
            });
            // It waits for this copy, or it should.
            let begun = std::time::Instant::now();
            while !writer.is_finished() && begun.elapsed().as_millis() < 300 {
                std::thread::yield_now();
            }
        };
        *s.source_state.hook.lock().unwrap() = Some(Arc::new(hook));
        s.guest.write(0, &Iov::from_slice(&[2; 512]), Flags::NONE).unwrap();
        *s.source_state.hook.lock().unwrap() = None;
        s.target_state.data.lock().unwrap().iter().all(|&b| b == 0)
    };
    for parts in [false, true] {
        assert!(is_zero(parts), "parts {parts}");
        assert!(!with(Some(Mutant::LeaveOutTaken), || is_zero(parts)), "parts {parts}: not noticed");
    }
}

#[test]
fn a_target_may_stand_on_the_disk_itself() {
    // An overlay over the disk gets what the disk had: who reads the overlay sees the disk as it was.
    let mut graph = Graph::new();
    let source = Mem::new(LEN);
    let state = source.state.clone();
    state.data.lock().unwrap()[..16 * CLUSTER as usize].fill(5);
    let disk = Node::new("disk", Box::new(source), NodeOptions::default());
    graph.add(disk.clone()).unwrap();
    graph.own(&disk);
    let overlay = Node::new("overlay", Box::new(Over::on(&disk)), NodeOptions::default());
    graph.add(overlay.clone()).unwrap();
    graph.own(&overlay);
    let guest = graph.attach(Some(disk.clone()), HandleSpec::default()).unwrap();
    let (filter, _copies) = filter(("cbw", NodeOptions::default()), &disk, &overlay, OPTIONS).unwrap();
    graph.insert_filter(&filter, &disk).unwrap();
    guest.write(0, &Iov::from_slice(&[9; 100]), Flags::NONE).unwrap();
    assert_eq!(state.data.lock().unwrap()[0], 9);
    let mut byte = [0; 1];
    overlay.read(0, &mut IovMut::from_slice(&mut byte)).unwrap();
    assert_eq!(byte, [5]);
    overlay.read(CLUSTER, &mut IovMut::from_slice(&mut byte)).unwrap();
    assert_eq!(byte, [5]);
    // Zeroes that only show through from the disk are gone once it is written.
    guest.write(20 * CLUSTER, &Iov::from_slice(&[9; 100]), Flags::NONE).unwrap();
    overlay.read(20 * CLUSTER, &mut IovMut::from_slice(&mut byte)).unwrap();
    assert_eq!(byte, [0]);
    graph.remove_filter(&filter).unwrap();
}

/// A simple overlay: whole clusters in memory, the rest from the backing node.
struct Over {
    backing: Arc<Edge>,
    clusters: Mutex<std::collections::HashMap<u64, Vec<u8>>>,
}

impl Over {
    fn on(node: &Arc<Node>) -> Over {
        Over { backing: Edge::new("backing", Some(node.clone())), clusters: Mutex::default() }
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
        vec![self.backing.clone()]
    }
    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        crate::block::perm::for_backing(above)
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let mut all = vec![0; to.len()];
        self.backing.need()?.read(off, &mut IovMut::from_slice(&mut all))?;
        let clusters = self.clusters.lock().unwrap();
        for (i, byte) in all.iter_mut().enumerate() {
            let at = off + i as u64;
            if let Some(c) = clusters.get(&(at / CLUSTER)) {
                *byte = c[(at % CLUSTER) as usize];
            }
        }
        to.copy_from(0, &all);
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        assert_eq!(off % CLUSTER, 0);
        for (i, part) in from.to_vec().chunks(CLUSTER as usize).enumerate() {
            self.clusters.lock().unwrap().insert(off / CLUSTER + i as u64, part.to_vec());
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let kind = match self.clusters.lock().unwrap().contains_key(&(off / CLUSTER)) {
            true => crate::block::driver::ExtentKind::Data,
            false => crate::block::driver::ExtentKind::Unallocated,
        };
        Ok(Extent { kind, len: len.min(CLUSTER - off % CLUSTER), host_offset: None })
    }
}
