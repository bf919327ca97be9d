use super::*;
use crate::block::driver::Flags;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::open::{self, Backing, Child, Common, Plan};
use crate::block::testing::{NoEnv, Rng, Scratch};
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::plan::Qcow2Plan;
use crate::sys::iov::{Iov, IovMut};
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 4 << 20;

fn named(name: &str) -> Common {
    Common { node_name: Some(name.into()), ..Common::default() }
}

fn file(path: &str) -> Plan {
    let driver = Box::new(crate::block::file_open::FilePlan::new("file", path));
    Plan { common: Common::default(), driver }
}

/// A new image without a backing file, open.
fn image(graph: &mut Graph, dir: &Scratch, name: &str, size: u64) -> Arc<Node> {
    let path = dir.file(name, 0);
    let mut alone = Graph::new();
    let below = open::add(&mut alone, &NoEnv, Plan { common: named("new"), ..file(&path) }).unwrap();
    let user = HandleSpec { shares: crate::block::driver::Perm::NONE, ..HandleSpec::default() };
    let user = alone.attach(Some(below.clone()), user).unwrap();
    create(&below, None, &CreateOptions { size, ..CreateOptions::default() }).unwrap();
    drop((below, user));
    alone.close_all();
    let driver = Qcow2Plan { backing: Backing::Nothing, ..Qcow2Plan::new(Child::New(Box::new(file(&path)))) };
    open::add(graph, &NoEnv, Plan { common: named(name), driver: Box::new(driver) }).unwrap()
}

fn put(disk: &Handle, off: u64, byte: u8, len: usize) {
    disk.write(off, &Iov::from_slice(&vec![byte; len]), Flags::NONE).unwrap();
}

fn get(disk: &Handle, off: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    disk.read(off, &mut IovMut::from_slice(&mut data)).unwrap();
    data
}

fn look(node: &Node, off: u64) -> u8 {
    let mut data = [0xee];
    node.read(off, &mut IovMut::from_slice(&mut data)).unwrap();
    data[0]
}

fn inside(node: &Arc<Node>, name: &str) -> Act {
    let snapshot = Snapshot { name: name.into(), ..Snapshot::default() };
    Act::Inside(Inside { node: node.clone(), device: "d".into(), snapshot })
}

fn overlay(node: &Arc<Node>, over: &Arc<Node>) -> Act {
    Act::Overlay(Overlay { node: node.clone(), over: over.clone() })
}

#[test]
fn what_was_written_before_is_below_and_read_only() {
    let dir = Scratch::new("snap-below");
    let mut graph = Graph::new();
    let (base, over) = (image(&mut graph, &dir, "base", SIZE), image(&mut graph, &dir, "over", SIZE));
    let disk = graph.attach(Some(base.clone()), HandleSpec::default()).unwrap();
    put(&disk, 0, 1, 4096);
    graph.snapshot(&[overlay(&base, &over)], &mut ()).unwrap();
    assert!(Arc::ptr_eq(&disk.node().unwrap(), &over));
    put(&disk, 0, 2, 512);
    assert_eq!(get(&disk, 0, 1024), [[2; 512], [1; 512]].concat());
    assert_eq!((look(&base, 0), look(&base, 512)), (1, 1));
    assert!(base.read_only() && !over.read_only());
    // Its file has been let go of: somebody else may have it for reading.
    let mut other = Graph::new();
    let common = Common { read_only: Some(true), ..named("other") };
    let driver = Box::new(Qcow2Plan::new(Child::New(Box::new(file(&dir.path("base"))))));
    let again = open::add(&mut other, &NoEnv, Plan { common, driver }).unwrap();
    assert_eq!(look(&again, 0), 1, "on the disk, not only in memory");
    assert_eq!(again.len(), SIZE);
    // And it can be written to again, once nobody has it.
    drop(again);
    other.close_all();
    graph.set_read_only(&base, false).unwrap();
    assert!(!base.read_only());
    base.write(1 << 20, &Iov::from_slice(&[9; 512]), Flags::NONE).unwrap();
    assert_eq!(get(&disk, 1 << 20, 1), [9]);
    graph.set_read_only(&base, true).unwrap();
    assert_eq!(look(&base, 1 << 20), 9);
}

#[test]
fn a_snapshot_that_fails_changes_nothing() {
    let dir = Scratch::new("snap-undo");
    let mut graph = Graph::new();
    let a = image(&mut graph, &dir, "a", SIZE);
    let b = image(&mut graph, &dir, "b", SIZE);
    let over = image(&mut graph, &dir, "over", SIZE);
    let disk = graph.attach(Some(a.clone()), HandleSpec::default()).unwrap();
    put(&disk, 0, 7, 512);
    // The second cannot be: it would be its own backing file.
    let acts =
        [inside(&a, "one"), overlay(&a, &over), inside(&over, "in"), inside(&b, "two"), overlay(&b, &b)];
    let e = graph.snapshot(&acts, &mut ()).unwrap_err();
    assert!(e.desc.contains("its own child"), "{e}");
    assert!(Arc::ptr_eq(&disk.node().unwrap(), &a));
    assert!(graph.parents(&over).is_empty() && backing_edge(&over).unwrap().node().is_none());
    for node in [&a, &b, &over] {
        assert!(node.driver.internal().unwrap().snapshots().unwrap().is_empty(), "undone");
        assert!(!node.read_only());
    }
    put(&disk, 0, 8, 512);
    // A snapshot that is there already, as the second.
    graph.snapshot(&[inside(&b, "two")], &mut ()).unwrap();
    assert_eq!(b.driver.internal().unwrap().snapshots().unwrap().len(), 1);
}

#[test]
fn several_disks_at_once_and_a_longer_overlay() {
    let dir = Scratch::new("snap-several");
    let mut graph = Graph::new();
    let mut list = Vec::new();
    let mut disks = Vec::new();
    for n in 0..3 {
        let node = image(&mut graph, &dir, &format!("n{n}"), SIZE);
        let over = image(&mut graph, &dir, &format!("o{n}"), SIZE + n * 65536);
        disks.push(graph.attach(Some(node.clone()), HandleSpec::default()).unwrap());
        list.push(overlay(&node, &over));
    }
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    for disk in &disks {
        let told = told.clone();
        disk.on_resize(Some(Box::new(move |len| told.lock().unwrap().push(len))));
    }
    graph.snapshot(&list, &mut ()).unwrap();
    assert_eq!(*told.lock().unwrap(), [SIZE + 65536, SIZE + 2 * 65536]);
    let overs = list.iter().filter_map(Act::overlay);
    assert!(disks.iter().zip(overs).all(|(d, o)| Arc::ptr_eq(&d.node().unwrap(), &o.over)));
}

/// Guests write numbers to slots of their own and verify every byte that they read, while overlays
/// and internal snapshots are taken under them at random. At the end every layer shows exactly what
/// its moment had: for each slot, a value that was there between the calls around the snapshot.
#[test]
fn guests_verify_every_byte_while_snapshots_are_taken() {
    const SLOT: usize = 1000;
    const SLOTS: u64 = 64;
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let dir = Scratch::new("snap-stress");
    let mut graph = Graph::new();
    let mut top = image(&mut graph, &dir, "base", SIZE);
    let disk = graph.attach(Some(top.clone()), HandleSpec::default()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let guests: Vec<_> = (0..3u64)
        .map(|me| {
            let (disk, stop) = (disk.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut rng = Rng(seed * 7 + me + 1);
                let mut model = [0u8; SLOTS as usize];
                let mut requests = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let slot = rng.below(SLOTS);
                    let off = (slot * 3 + me) * SLOT as u64 * 5;
                    match rng.below(8) {
                        0..4 => {
                            model[slot as usize] = rng.draw() as u8;
                            put(&disk, off, model[slot as usize], SLOT);
                        }
                        4 => {
                            model[slot as usize] = 0;
                            disk.zero(off, SLOT as u64, Flags::NONE).unwrap();
                        }
                        5 if rng.below(20) == 0 => disk.flush().unwrap(),
                        _ => {
                            let data = get(&disk, off, SLOT);
                            let want = model[slot as usize];
                            assert!(data.iter().all(|&b| b == want), "slot {slot} of {me} at {off}");
                        }
                    }
                    requests += 1;
                }
                (model, requests)
            })
        })
        .collect();
    let mut rng = Rng(seed + 99);
    let mut layers = vec![top.clone()];
    for n in 0..12 {
        std::thread::sleep(std::time::Duration::from_millis(rng.below(40)));
        if rng.below(3) == 0 {
            graph.snapshot(&[inside(&top, &format!("i{n}"))], &mut ()).unwrap();
        } else {
            let over = image(&mut graph, &dir, &format!("o{n}"), SIZE);
            graph.snapshot(&[overlay(&top, &over)], &mut ()).unwrap();
            top = over;
            layers.push(top.clone());
        }
    }
    stop.store(true, Ordering::Relaxed);
    for (me, guest) in guests.into_iter().enumerate() {
        let (model, requests) = guest.join().unwrap();
        assert!(requests > 100, "guest {me} was held up: {requests} requests");
        for (slot, &want) in model.iter().enumerate() {
            let off = (slot as u64 * 3 + me as u64) * SLOT as u64 * 5;
            assert!(get(&disk, off, SLOT).iter().all(|&b| b == want));
            // A write is in one layer as a whole: requests are not cut by a snapshot.
            for layer in &layers {
                let mut data = vec![0; SLOT];
                layer.read(off, &mut IovMut::from_slice(&mut data)).unwrap();
                assert!(data.iter().all(|b| *b == data[0]), "a torn write below");
            }
        }
    }
    assert_eq!(layers.iter().filter(|l| !l.read_only()).count(), 1);
    graph.detach(&disk);
}
