use super::super::driver::Flags;
use super::super::node::{Node, NodeOptions};
use super::*;
use crate::block::testing::{Mem, Rng};
use crate::sys::iov::{Iov, IovMut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize};

fn node(len: usize) -> Arc<Node> {
    Node::new("n", Box::new(Mem::new(len)), NodeOptions { unmap: true, ..NodeOptions::default() })
}

fn write(node: &Node, off: u64, data: &[u8]) {
    node.write(off, &Iov::from_slice(data), Flags::NONE).unwrap();
}

#[test]
fn every_kind_of_change_is_noted_also_one_that_fails() {
    let mem = Mem::new(1 << 20);
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions { unmap: true, ..NodeOptions::default() });
    let b = node.add_bitmap(Some("b"), 4096).unwrap();
    let off = node.add_bitmap(Some("off"), 512).unwrap();
    off.set_enabled(false);
    write(&node, 4000, &[1; 200]);
    assert_eq!(b.next_dirty(0, u64::MAX, u64::MAX), Some(0..8192));
    node.zero(20000, 10, Flags::NONE).unwrap();
    node.discard(40960, 4096).unwrap();
    assert_eq!(b.count(), 4096 * 4);
    node.read(80000, &mut IovMut::from_slice(&mut [0; 9000])).unwrap();
    assert_eq!(b.count(), 4096 * 4);
    state.fail.store(libc::EIO, std::sync::atomic::Ordering::SeqCst);
    node.write(65536, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap_err();
    assert!(b.take(65536));
    // Refused requests change nothing.
    state.fail.store(0, std::sync::atomic::Ordering::SeqCst);
    node.write(1 << 20, &Iov::from_slice(&[1]), Flags::NONE).unwrap_err();
    assert_eq!((b.count(), off.count()), (4096 * 4, 0));
}

#[test]
fn names_order_and_removal() {
    let node = node(4096);
    let a = node.add_bitmap(Some("a"), 512).unwrap();
    node.add_bitmap(None, 512).unwrap();
    node.add_bitmap(None, 512).unwrap();
    node.add_bitmap(Some("b"), 512).unwrap();
    let names: Vec<_> = node.bitmaps().iter().map(|b| b.name().map(str::to_string)).collect();
    assert_eq!(names, [Some("b".into()), None, None, Some("a".into())]);
    assert_eq!(node.add_bitmap(Some("a"), 512).err().unwrap().desc, "Bitmap already exists: a");
    let long = "x".repeat(1024);
    assert_eq!(
        node.add_bitmap(Some(&long), 512).err().unwrap().desc,
        format!("Bitmap name too long: {long}")
    );
    assert!(node.add_bitmap(Some(&long[1..]), 512).is_ok());
    node.remove_bitmap(&a);
    assert!(node.find_bitmap("a").is_none() && node.find_bitmap("b").is_some());
    write(&node, 0, &[1]);
    assert_eq!(a.count(), 0);
}

#[test]
fn the_length_follows_the_node() {
    let mut mem = Mem::new(5000);
    mem.grows = true;
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    let b = node.add_bitmap(Some("b"), 512).unwrap();
    write(&node, 9000, &[1; 100]);
    assert_eq!((b.len(), b.next_dirty(0, u64::MAX, u64::MAX)), (9100, Some(8704..9100)));
    node.resize(4096).unwrap();
    assert_eq!((b.len(), b.count()), (4096, 0));
    node.resize(8192).unwrap();
    write(&node, 8191, &[1]);
    assert_eq!((b.len(), b.count()), (8192, 512));
}

#[test]
fn a_successor_stands_in() {
    let node = node(65536);
    let b = node.add_bitmap(Some("b"), 4096).unwrap();
    write(&node, 0, &[1]);
    let s = node.create_successor(&b).unwrap();
    assert!(b.busy() && b.recording() && !b.enabled());
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    assert_eq!(node.create_successor(&b).err().unwrap().desc, busy);
    write(&node, 8192, &[1]);
    assert_eq!((b.count(), s.count()), (4096, 4096));
    node.reclaim_bitmap(&b);
    assert_eq!((b.count(), b.busy(), node.bitmaps().len()), (8192, false, 1));
    node.create_successor(&b).unwrap();
    write(&node, 20480, &[1]);
    node.abdicate_bitmap(&b);
    assert_eq!(b.next_dirty(0, u64::MAX, u64::MAX), Some(20480..24576));
    assert!(b.enabled() && !b.busy());
    // A disabled one notes nothing, and stays so.
    b.set_enabled(false);
    node.create_successor(&b).unwrap();
    assert!(!b.recording());
    write(&node, 0, &[1]);
    node.abdicate_bitmap(&b);
    assert_eq!((b.count(), b.enabled()), (0, false));
}

/// Writers write, each place a few times; a copier takes granules and copies them. When all is quiet and the
/// last granules are copied, the copy is the disk.
#[test]
fn no_write_is_lost_to_a_copier() {
    let seconds: u64 = std::env::var("SOAK").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut seed = 1;
    while std::time::Instant::now() < end {
        copier(seed);
        seed += 1;
    }
}

fn copier(seed: u64) {
    const GRANULE: u64 = 512;
    const PLACE: u64 = 40 * GRANULE;
    const PLACES: u64 = 64;
    const WRITERS: u64 = 3;
    let len = (PLACE * PLACES) as usize;
    let (source, target) = (node(len), node(len));
    let b = source.add_bitmap(None, GRANULE as u32).unwrap();
    let copy = || {
        let mut at = 0;
        while let Some(run) = b.next_dirty(at, u64::MAX, GRANULE) {
            at = run.end;
            if b.take(run.start) {
                let mut data = vec![0; (run.end - run.start) as usize];
                source.read(run.start, &mut IovMut::from_slice(&mut data)).unwrap();
                write(&target, run.start, &data);
            }
        }
    };
    let running = AtomicUsize::new(WRITERS as usize);
    std::thread::scope(|s| {
        for n in 0..WRITERS {
            let (source, running) = (&source, &running);
            s.spawn(move || {
                let mut rng = Rng(seed * WRITERS + n + 1);
                for place in (0..PLACES).filter(|p| p % WRITERS == n) {
                    let off = place * PLACE + rng.below(PLACE / 2);
                    let len = 1 + rng.below(PLACE / 2) as usize;
                    (0..4).for_each(|_| write(source, off, &vec![1 | rng.draw() as u8; len]));
                }
                running.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            });
        }
        while running.load(std::sync::atomic::Ordering::SeqCst) > 0 {
            copy();
        }
    });
    copy();
    let all = |n: &Arc<Node>| {
        let mut data = vec![0; len];
        n.read(0, &mut IovMut::from_slice(&mut data)).unwrap();
        data
    };
    assert!(all(&source) == all(&target), "seed {seed}");
    assert_eq!(b.count(), 0);
}

/// Each write is in the bitmap or in what a job took, whenever successors come and go.
#[test]
fn no_write_is_lost_while_successors_come_and_go() {
    let node = node(512 * 4096);
    let b = node.add_bitmap(Some("b"), 512).unwrap();
    let written: Vec<AtomicI32> = (0..4096).map(|_| AtomicI32::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut seen = vec![false; 4096];
    std::thread::scope(|s| {
        for n in 0..2u64 {
            let (node, written, stop) = (&node, &written, &stop);
            s.spawn(move || {
                let mut rng = Rng(n + 7);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let g = rng.below(4096);
                    write(node, g * 512, &[1; 512]);
                    written[g as usize].store(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
        let mut rng = Rng(3);
        for round in 0..200 {
            node.create_successor(&b).unwrap();
            if round % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            if rng.below(2) == 0 {
                node.reclaim_bitmap(&b);
            } else {
                // The job "copied" what was there; that is known to be in `seen` from now on.
                (0..4096).filter(|g| b.is_dirty(g * 512)).for_each(|g| seen[g as usize] = true);
                node.abdicate_bitmap(&b);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for (g, w) in written.iter().enumerate() {
        let w = w.load(std::sync::atomic::Ordering::SeqCst) == 1;
        assert!(!w || seen[g] || b.is_dirty(g as u64 * 512), "granule {g}");
    }
    assert_eq!(node.bitmaps().len(), 1);
}
