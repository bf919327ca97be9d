//! Bringing up under a writing guest: what the guest sees never changes.

use super::super::create::{CreateOptions, create};
use super::super::open;
use crate::block::driver::{ExtentKind, Flags};
use crate::block::node::{Edge, Node, NodeOptions};
use crate::block::testing::{Mem, Rng};
use crate::sys::iov::{Iov, IovMut};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

fn memory(len: u64) -> Arc<Node> {
    Node::new("mem", Box::new(Mem::new(len as usize)), NodeOptions::default())
}

/// An image over `backing`.
fn image(options: CreateOptions, backing: &Arc<Node>) -> Arc<Node> {
    let file = memory(0);
    create(&file, None, &options).unwrap();
    let (file, backing) = (Edge::new("file", Some(file)), Edge::new("backing", Some(backing.clone())));
    let driver = open::open(file, backing, None, open::Options::default()).unwrap();
    Node::new("image", Box::new(driver), NodeOptions::default())
}

fn options(extended: bool) -> CreateOptions {
    let cluster_size = if extended { 16384 } else { 4096 };
    CreateOptions { size: SIZE, cluster_size, extended_l2: extended, ..CreateOptions::default() }
}

fn read(node: &Node, off: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0xee; len as usize];
    node.read(off, &mut IovMut::from_slice(&mut buf)).unwrap();
    buf
}

fn unallocated(node: &Node) -> u64 {
    let (mut at, mut n) = (0, 0);
    while at < node.len() {
        let e = node.status(at, node.len() - at).unwrap();
        n += if e.kind == ExtentKind::Unallocated { e.len } else { 0 };
        at += e.len;
    }
    n
}

#[test]
fn all_of_it_comes_up_once_and_stays_what_it_is() {
    for extended in [false, true] {
        let backing = memory(SIZE);
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 512 % 251) as u8 + 1).collect();
        backing.write(0, &Iov::from_slice(&bytes), Flags::NONE).unwrap();
        let node = image(options(extended), &backing);
        let internal = node.driver.internal().unwrap();
        // Some of it is there: data, zeroes, shared with a snapshot; whole clusters and parts.
        let mut model = bytes.clone();
        let mut put = |off: u64, len: u64, byte: u8| {
            model[off as usize..(off + len) as usize].fill(byte);
            match byte {
                0 => node.zero(off, len, Flags::MAY_UNMAP).unwrap(),
                _ => node.write(off, &Iov::from_slice(&vec![byte; len as usize]), Flags::NONE).unwrap(),
            }
        };
        put(3000, 700, 1);
        put(32768, 16384, 0);
        put(100_000, 512, 2);
        put(100_000, 512, 0);
        put(200_000, 9000, 3);
        internal
            .create_snapshot(crate::block::driver::Snapshot { name: "s".into(), ..Default::default() })
            .unwrap();
        put(202_000, 512, 4);
        assert!(unallocated(&node) > SIZE / 2);
        node.populate(5000, 100_000, false).unwrap();
        assert!(unallocated(&node) > SIZE / 2, "it brings up what was asked for, not all");
        node.populate(0, SIZE, false).unwrap();
        assert_eq!(unallocated(&node), 0);
        assert!(read(&node, 0, SIZE) == model);
        // Nothing of the backing file is needed any more.
        backing.write(0, &Iov::from_slice(&vec![0xff; SIZE as usize]), Flags::NONE).unwrap();
        assert!(read(&node, 0, SIZE) == model);
        node.driver.close().unwrap();
        assert!(read(&node, 0, SIZE) == model);
    }
}

#[test]
fn zeroes_come_up_as_zeroes() {
    let backing = memory(SIZE);
    let node = image(options(false), &backing);
    node.write(8192, &Iov::from_slice(&[7; 100]), Flags::NONE).unwrap();
    node.populate(0, SIZE, true).unwrap();
    let e = node.status(0, 8192).unwrap();
    assert_eq!((e.kind, e.len), (ExtentKind::Zero, 8192));
    assert_eq!(node.status(8192, 1).unwrap().kind, ExtentKind::Data);
    assert_eq!(read(&node, 8192, 101), [vec![7; 100], vec![0]].concat());
    assert_eq!(unallocated(&node), 0);
}

#[test]
fn zeroes_that_end_within_a_cluster_leave_the_rest_of_it_alone() {
    let backing = memory(SIZE);
    backing.write(0, &Iov::from_slice(&vec![9; SIZE as usize]), Flags::NONE).unwrap();
    backing.write(4096 + 1024, &Iov::from_slice(&vec![0; 3 * 4096]), Flags::NONE).unwrap();
    let node = image(options(false), &backing);
    let before = read(&node, 0, SIZE);
    node.populate(4096 + 1024, 3 * 4096, true).unwrap();
    assert!(read(&node, 0, SIZE) == before);
    assert_eq!(node.status(8192, 4096).unwrap().kind, ExtentKind::Zero);
    assert_eq!(unallocated(&node), SIZE - 4 * 4096);
}

/// One image, brought up from its begin to its end while guests write to it.
fn race(seed: u64, extended: bool) {
    let backing = memory(SIZE);
    backing.write(0, &Iov::from_slice(&vec![9; SIZE as usize]), Flags::NONE).unwrap();
    let node = image(options(extended), &backing);
    // Each guest has its own sectors, so that it knows what must be there.
    let guests: Vec<_> = (0..3u64)
        .map(|id| {
            let node = node.clone();
            std::thread::spawn(move || {
                let mut rng = Rng(seed ^ (id << 32));
                let mut model = vec![9u8; (SIZE / 512) as usize];
                for _ in 0..400 {
                    let sector = rng.below(SIZE / 512 / 3) * 3 + id;
                    let byte = rng.below(8) as u8;
                    match byte {
                        0 => node.zero(sector * 512, 512, Flags::NONE).unwrap(),
                        _ => node.write(sector * 512, &Iov::from_slice(&[byte; 512]), Flags::NONE).unwrap(),
                    }
                    model[sector as usize] = byte;
                    let got = read(&node, sector * 512, 512);
                    assert!(got.iter().all(|b| *b == byte), "sector {sector}");
                }
                (id, model)
            })
        })
        .collect();
    let mut rng = Rng(seed);
    let mut at = 0;
    while at < SIZE {
        let len = (rng.below(20_000) + 1).min(SIZE - at);
        node.populate(at, len, false).unwrap();
        at += len;
    }
    for guest in guests {
        let (id, model) = guest.join().unwrap();
        for sector in (id..SIZE / 512).step_by(3) {
            let got = read(&node, sector * 512, 512);
            assert!(got.iter().all(|b| *b == model[sector as usize]), "sector {sector}");
        }
    }
    assert_eq!(unallocated(&node), 0);
    node.driver.close().unwrap();
}

#[test]
fn a_writing_guest_is_not_overwritten() {
    for n in 0..40 {
        let seed = 0x9_0b1e + n;
        eprintln!("seed {seed:#x}");
        race(seed, n % 2 == 1);
    }
}
