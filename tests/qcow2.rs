//! qcow2 against a model in memory and against qemu-img: random operations over all shapes of
//! image, several threads, both ways.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::bitmap::Bitmap;
use minivmm::block::driver::{Driver, Flags, Snapshot};
use minivmm::block::node::{Node, NodeOptions};
use minivmm::qcow2::create::{CreateOptions, Preallocation};
use minivmm::qcow2::header::Compression;
use minivmm::qcow2::mutant::Mutant;
use minivmm::qcow2::open::Options;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::*;

/// Options of an image for a random test.
fn shape(rng: &mut Rng) -> CreateOptions {
    let version = if rng.one_in(4) { 2 } else { 3 };
    let extended_l2 = version == 3 && rng.one_in(3);
    let bits = if extended_l2 { 14 + rng.below(3) } else { 9 + rng.below(9) };
    CreateOptions {
        size: (1 + rng.below(96)) * 512 * (1 + rng.below(40)),
        version,
        cluster_size: 1 << bits,
        refcount_bits: if version == 2 { 16 } else { 1 << rng.below(7) },
        extended_l2,
        compression: if version == 3 && rng.one_in(2) { Compression::Zstd } else { Compression::Zlib },
        ..CreateOptions::default()
    }
}

/// Now and then, guest data in another file, which may be the disk by itself.
fn outside(rng: &mut Rng, o: &mut CreateOptions, backed: bool) {
    if o.version == 3 && rng.one_in(6) {
        o.data_file = Some("data".into());
        o.data_file_raw = !backed && rng.one_in(2);
    }
}

/// What a bitmap ought to have.
struct Track {
    name: String,
    granularity: u64,
    enabled: bool,
    dirty: Vec<bool>,
}

impl Track {
    fn fill(&mut self, off: u64, len: u64, to: bool, size: u64) {
        for (n, flag) in (0..).zip(&mut self.dirty) {
            let at = n * self.granularity;
            let touched = off < size && at < off + len && off < at + self.granularity;
            *flag = if touched { to } else { *flag };
        }
    }

    /// Finds its bitmap in the image, with just that in it.
    fn check(&self, image: &dyn Driver, size: u64, say: &str) {
        let b =
            image.bitmaps().unwrap().find(&self.name).unwrap_or_else(|| panic!("{say}: no {}", self.name));
        assert!(!b.inconsistent() && b.persistent() && b.len() == size, "{say}: {}", self.name);
        assert_eq!((b.enabled(), b.granularity()), (self.enabled, self.granularity), "{say}");
        let got: Vec<bool> = (0..self.dirty.len() as u64).map(|n| b.is_dirty(n * self.granularity)).collect();
        assert_eq!(got, self.dirty, "{say}: {}", self.name);
    }
}

/// Some change of the bitmaps.
fn bitmap_step(image: &dyn Driver, tracks: &mut Vec<Track>, size: u64, rng: &mut Rng, step: u64, say: &str) {
    let (list, stored) = (image.bitmaps().unwrap(), image.stored_bitmaps().unwrap());
    let which = rng.below(tracks.len().max(1) as u64) as usize;
    match rng.below(6) {
        0 | 1 if tracks.len() < 4 => {
            let name = format!("bitmap{step}{}", "x".repeat(rng.below(30) as usize));
            let granularity = 512u64 << rng.below(8);
            if let Err(e) = stored.can_store(&name, granularity) {
                // Version 2 keeps none, and a header can be full.
                return assert!(
                    e.to_string().contains("v2 files") || e.to_string().contains("no room"),
                    "{say}: {e}"
                );
            }
            let bitmap = Bitmap::new(Some(&name), granularity as u32, size).unwrap();
            bitmap.set_persistent(true);
            let enabled = rng.one_in(2);
            bitmap.set_enabled(enabled);
            list.push(bitmap).unwrap();
            let dirty = vec![false; size.div_ceil(granularity) as usize];
            tracks.push(Track { name, granularity, enabled, dirty });
        }
        2 if !tracks.is_empty() => {
            let t = tracks.remove(which);
            stored.remove_stored(&t.name).unwrap_or_else(|e| panic!("{say}: remove: {e}"));
            list.remove(&list.find(&t.name).unwrap());
        }
        _ if !tracks.is_empty() => {
            let (t, off, len) = (&mut tracks[which], rng.below(size + 1), 1 + rng.below(size / 3 + 2));
            let bitmap = list.find(&t.name).unwrap();
            let on = !rng.one_in(3);
            if on {
                bitmap.mark(off, len)
            } else {
                bitmap.clear(off, len)
            }
            t.fill(off, len, on, size);
        }
        _ => {}
    }
}

struct Backing {
    node: Arc<Node>,
    bytes: Vec<u8>,
}

fn backing(rng: &mut Rng, size: u64) -> Backing {
    let len = (size / 512).saturating_sub(8) + rng.below(16);
    let bytes: Vec<u8> = (0..len * 512).map(|i| (i / 512 + i) as u8 | 1).collect();
    let options = NodeOptions { read_only: true, ..NodeOptions::default() };
    let node = Node::new("backing", Box::new(OnDisk(Disk::new(bytes.clone()))), options);
    Backing { node, bytes }
}

fn small_caches(rng: &mut Rng) -> Options {
    match rng.below(3) {
        0 => Options::default(),
        _ => Options {
            l2_cache_size: Some(1 << (9 + rng.below(8))),
            refcount_cache_size: Some(1 << (9 + rng.below(8))),
            ..Options::default()
        },
    }
}

/// One image, many operations, one thread; then qemu-img's opinion.
fn round(seed: u64, steps: u64, qemu: bool, bug: Option<Mutant>) {
    let mut rng = Rng::new(seed);
    let mut o = shape(&mut rng);
    let under = rng.one_in(2).then(|| backing(&mut rng, o.size));
    outside(&mut rng, &mut o, under.is_some());
    let (disk, data) = fresh_pair(&o);
    let say = |what: &str| format!("{what}; SEED={seed} {o:?} backing={}", under.is_some());
    let mut model: Vec<u8> = under.as_ref().map_or(Vec::new(), |b| b.bytes.clone());
    model.resize(o.size as usize, 0);
    let open = |rng: &mut Rng| {
        let node = under.as_ref().map(|b| b.node.clone());
        open_pair(&disk, &data, node, Options { bug, ..small_caches(rng) })
            .unwrap_or_else(|e| panic!("{}: {e}", say("open")))
    };
    let mut image = open(&mut rng);
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    let mut tracks: Vec<Track> = Vec::new();
    for step in 0..steps {
        let size = model.len() as u64;
        let most = size.min(if rng.one_in(8) { 1 << 20 } else { 3 * o.cluster_size.max(4096) });
        let unit = if rng.one_in(2) { 512 } else { 1 };
        let (mut off, mut len) = (0, 0);
        if size > 0 {
            off = rng.below(size) / unit * unit;
            len = (1 + rng.below(most)).min(size - off) as usize;
        }
        let part = off as usize..off as usize + len;
        match rng.below(26) {
            24 | 25 => bitmap_step(&image, &mut tracks, size, &mut rng, step, &say("bitmaps")),
            22 | 23 if len > 0 => {
                // Whole clusters, or up to the end.
                let start = off / o.cluster_size * o.cluster_size;
                let end = (start + (1 + rng.below(3)) * o.cluster_size).min(size);
                let byte = rng.draw() as u8;
                let noise = rng.one_in(6);
                let data: Vec<u8> = (start..end)
                    .map(|i| if noise { rng.draw() as u8 } else { byte.wrapping_add((i / 97) as u8) })
                    .collect();
                let from = minivmm::sys::iov::Iov::from_slice(&data);
                image
                    .write(start, &from, Flags::COMPRESSED)
                    .unwrap_or_else(|e| panic!("{}: {e}", say("compressed")));
                model[start as usize..end as usize].copy_from_slice(&data);
            }
            20 | 21 if o.refcount_bits > 1 && data.is_none() => {
                let inside = image.internal().unwrap();
                let n = rng.below(snapshots.len() as u64 + 1) as usize;
                // Narrow refcounts cannot count all of it, the less so with several compressed
                // clusters in a host cluster; nothing has changed then.
                let narrow =
                    |e: &std::io::Error| o.refcount_bits <= 4 && e.kind() == std::io::ErrorKind::InvalidInput;
                let most = if o.refcount_bits == 2 { 1 } else { 5 };
                match rng.below(4) {
                    0 | 1 if snapshots.len() < most => {
                        let name = format!("snap{step}");
                        let snapshot = Snapshot { name: name.clone(), date_sec: 7, ..Snapshot::default() };
                        match inside.create_snapshot(snapshot) {
                            Ok(()) => snapshots.push((name, model.clone())),
                            Err(e) => assert!(narrow(&e), "{}: {e}", say("create")),
                        }
                    }
                    2 if n < snapshots.len() => {
                        let (name, old) = &snapshots[n];
                        match inside.apply_snapshot(None, Some(name)) {
                            Ok(()) => model.clone_from(old),
                            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => {
                                assert!(!tracks.is_empty(), "{}: {e}", say("apply"));
                            }
                            Err(e) => assert!(narrow(&e), "{}: {e}", say("apply")),
                        }
                    }
                    3 if n < snapshots.len() => {
                        let (name, _) = snapshots.remove(n);
                        inside
                            .delete_snapshot(None, Some(&name))
                            .unwrap_or_else(|e| panic!("{}: {e}", say("delete")));
                    }
                    _ => {}
                }
                let listed = inside.snapshots().unwrap_or_else(|e| panic!("{}: {e}", say("list")));
                let names: Vec<_> = listed.iter().map(|s| s.name.as_str()).collect();
                let mine: Vec<_> = snapshots.iter().map(|s| s.0.as_str()).collect();
                assert_eq!(names, mine, "{}", say("list"));
            }
            0..7 if len > 0 => {
                let byte = rng.draw() as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect();
                write(&image, off, &data).unwrap_or_else(|e| panic!("{}: {e}", say("write")));
                model[part].copy_from_slice(&data);
            }
            7..12 if len > 0 => {
                let got = read(&image, off, len).unwrap_or_else(|e| panic!("{}: {e}", say("read")));
                assert!(got == model[part.clone()], "{}", say(&format!("read at {off}+{len}")));
            }
            12..14 if len > 0 => {
                let flags = if rng.one_in(2) { Flags::MAY_UNMAP } else { Flags::NONE };
                match image.zero(off, len as u64, flags) {
                    Ok(()) => model[part].fill(0),
                    Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) && o.version == 2 => {}
                    Err(e) => panic!("{}", say(&format!("zero: {e}"))),
                }
            }
            14 | 15 if len > 0 => match image.discard(off, len as u64) {
                Ok(()) if o.data_file_raw => model[part].fill(0),
                Ok(()) => {
                    // Whole clusters read as zeroes; the rest is as it was.
                    let first = off.next_multiple_of(o.cluster_size);
                    let end = off + len as u64;
                    let last = if end == size { end } else { end / o.cluster_size * o.cluster_size };
                    if first < last {
                        model[first as usize..last as usize].fill(0);
                    }
                }
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTSUP), "{}", say("discard")),
            },
            16 => image.flush().unwrap_or_else(|e| panic!("{}: {e}", say("flush"))),
            // Of images of version 2 only those without snapshots can be resized.
            17 if rng.one_in(4) && (o.version > 2 || snapshots.is_empty()) => {
                let mut new = (size / 512 + 1 + rng.below(300)) / (1 + rng.below(3)) * 512;
                if !tracks.is_empty() {
                    // A bitmap of nothing is not stored.
                    new = new.max(512);
                }
                let how =
                    [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                let how = if new > size { how[rng.below(4) as usize] } else { how[0] };
                image.resize_with(new, how).unwrap_or_else(|e| panic!("{}: {e}", say("resize")));
                model.resize(new as usize, 0);
                for t in &mut tracks {
                    // As the node in front does.
                    image.bitmaps().unwrap().find(&t.name).unwrap().resize(new);
                    t.dirty.resize(new.div_ceil(t.granularity) as usize, false);
                }
            }
            18 if rng.one_in(4) => {
                image.close().unwrap_or_else(|e| panic!("{}: {e}", say("close")));
                drop(image);
                image = open(&mut rng);
                tracks.iter().for_each(|t| t.check(&image, size, &say("reopen")));
            }
            19 if rng.one_in(4) => {
                image.flush().unwrap_or_else(|e| panic!("{}: {e}", say("flush")));
                let report = image.check().unwrap_or_else(|e| panic!("{}: {e}", say("check")));
                assert!(report.errors.is_empty(), "{}: {report:?}", say("check"));
            }
            _ => {}
        }
    }
    let got = read(&image, 0, model.len()).unwrap_or_else(|e| panic!("{}: {e}", say("read")));
    assert!(got == model, "{}", say("the end"));
    image.close().unwrap_or_else(|e| panic!("{}: {e}", say("close")));
    tracks.iter().for_each(|t| t.check(&image, model.len() as u64, &say("the end")));
    let report = image.check().unwrap_or_else(|e| panic!("{}: {e}", say("check")));
    assert!(report.errors.is_empty() && report.leaks == 0, "{}: {report:?}", say("check"));
    if let Some(data) = &data
        && o.data_file_raw
    {
        assert!(data.copy() == model, "{}", say("the raw data file is something else"));
    }
    if qemu && data.is_none() {
        let dir = Dir::new("qcow2");
        let path = dir.save("image.qcow2", &disk);
        qemu_check(&path, false);
        if let Some(b) = &under {
            std::fs::write(dir.path("backing.raw"), &b.bytes).unwrap();
            let raw = dir.path("backing.raw");
            support::qemu(
                "qemu-img",
                &["rebase", "-u", "-F", "raw", "-b", raw.to_str().unwrap(), path.to_str().unwrap()],
            );
        }
        assert!(qemu_read(&dir, &path) == model, "{}", say("qemu-img reads something else"));
        let name = path.to_str().unwrap();
        for t in &tracks {
            // QEMU's copy of it, read by us.
            let g = t.granularity.to_string();
            support::qemu("qemu-img", &["bitmap", "--add", "-g", &g, "--merge", &t.name, name, "copy"]);
            let image =
                open_image(&Disk::new(std::fs::read(&path).unwrap()), None, Options::default()).unwrap();
            let copy = Track {
                name: "copy".into(),
                granularity: t.granularity,
                enabled: true,
                dirty: t.dirty.clone(),
            };
            copy.check(&image, model.len() as u64, &say("qemu-img bitmap --merge"));
            support::qemu("qemu-img", &["bitmap", "--remove", name, "copy"]);
        }
        if !tracks.is_empty() {
            qemu_check(&path, false);
        }
        // It goes to no snapshot else.
        tracks.iter().for_each(|t| _ = support::qemu("qemu-img", &["bitmap", "--remove", name, &t.name]));
        for (name, old) in &snapshots {
            let (code, text) = tool("qemu-img", &["snapshot", "-a", name, path.to_str().unwrap()]);
            if code != 0 && o.refcount_bits <= 4 {
                // It cannot count to that either.
                break;
            }
            assert_eq!(code, 0, "{}: {text}", say("qemu-img snapshot -a"));
            assert!(qemu_read(&dir, &path) == *old, "{}", say(&format!("snapshot {name}")));
            qemu_check(&path, false);
        }
    }
}

/// Catches: a wrong L2 index, COW without the backing's bytes, a stale page after eviction, a
/// freed cluster reused too early (its pages are filled with junk by the test's discard), refcounts
/// that do not match, a resize that leaves old data.
#[test]
fn random_operations_match_the_model() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let qemu = have_qemu();
    let mut n = 0;
    while n < 8 || Instant::now() < until {
        round(seed + n, 150, qemu && n % 4 == 0, None);
        n += 1;
    }
    eprintln!("{n} images");
}

/// Several threads on one image. Each has its own slots of 1000 bytes, interleaved with the
/// others', so that they share clusters; and all of them write and discard one common region,
/// where a sector may hold what any of them wrote there, or zeroes, but nothing else.
fn threads(seed: u64, steps: u64, bug: Option<Mutant>) {
    const THREADS: u64 = 4;
    const SLOT: u64 = 1000;
    let mut rng = Rng::new(seed);
    // With subclusters a write may end in one that others write in place.
    let extended_l2 = rng.one_in(2);
    let mut o = CreateOptions {
        size: 768 << 10,
        cluster_size: 1 << if extended_l2 { 14 + rng.below(3) } else { 9 + rng.below(6) },
        refcount_bits: 16,
        extended_l2,
        ..CreateOptions::default()
    };
    if bug.is_none() {
        outside(&mut rng, &mut o, false);
    }
    let (slots, common) = ((512 << 10) / SLOT, 1024..1536);
    let say = format!("SEED={seed} {o:?}");
    let (disk, data) = fresh_pair(&o);
    [Some(&disk), data.as_ref()].into_iter().flatten().for_each(|d| d.jitter.store(60, Ordering::Relaxed));
    let image = open_pair(&disk, &data, None, Options { bug, ..small_caches(&mut rng) }).expect("open");
    let pattern = |slot: u64, round: u8| -> Vec<u8> {
        (0..SLOT).map(|i| if round == 0 { 0 } else { (slot * 7 + i) as u8 ^ round }).collect()
    };
    let rounds: Vec<Vec<u8>> = std::thread::scope(|s| {
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (image, say, common) = (&image, &say, common.clone());
                let mut rng = Rng::new(seed * 31 + t);
                s.spawn(move || {
                    let mut rounds = vec![0u8; slots as usize];
                    for _ in 0..steps {
                        let slot = rng.below(slots / THREADS) * THREADS + t;
                        let round = &mut rounds[slot as usize];
                        let sector = common.start + rng.below(common.end - common.start - 32);
                        let n = 1 + rng.below(32);
                        match rng.below(16) {
                            0..6 => {
                                *round = (rng.draw() as u8).max(1);
                                write(image, slot * SLOT, &pattern(slot, *round)).expect("write");
                            }
                            6..9 => {
                                let got = read(image, slot * SLOT, SLOT as usize).expect("read");
                                assert!(got == pattern(slot, *round), "{say}: slot {slot}");
                            }
                            9..11 => {
                                let data: Vec<u8> =
                                    (sector..sector + n).flat_map(|s| contents(t as u32 + 1, s)).collect();
                                let flags = if rng.one_in(3) { Flags::COMPRESSED } else { Flags::NONE };
                                let from = minivmm::sys::iov::Iov::from_slice(&data);
                                image.write(sector * 512, &from, flags).expect("write");
                            }
                            11 | 12 => image.discard(sector * 512, n * 512).expect("discard"),
                            13 => {
                                let flags = if rng.one_in(2) { Flags::MAY_UNMAP } else { Flags::NONE };
                                image.zero(sector * 512, n * 512, flags).expect("zero");
                            }
                            14 => {
                                let got = read(image, sector * 512, n as usize * 512).expect("read");
                                for (i, b) in got.chunks_exact(512).enumerate() {
                                    let s = sector + i as u64;
                                    assert!(id_of(b, s) != STRANGE, "{say}: sector {s}: {:x?}", &b[..8]);
                                }
                            }
                            _ => image.flush().expect("flush"),
                        }
                    }
                    rounds
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().expect("thread")).collect()
    });
    for slot in 0..slots {
        let round = rounds[(slot % THREADS) as usize][slot as usize];
        let got = read(&image, slot * SLOT, SLOT as usize).expect("read");
        assert!(got == pattern(slot, round), "{say}: slot {slot} at the end");
    }
    for s in common {
        let got = read(&image, s * 512, 512).expect("read");
        assert!(id_of(&got, s) != STRANGE, "{say}: sector {s} at the end: {:x?}", &got[..8]);
    }
    image.close().expect("close");
    let report = image.check().expect("check");
    assert!(report.errors.is_empty() && report.leaks == 0, "{say}: {report:?}");
}

/// A write that allocates one subcluster and ends inside another that has data: what it does not
/// write of that one may be under another thread's write in place, and must not be written back.
#[test]
fn an_allocation_leaves_the_rest_of_a_neighbours_data_alone() {
    assert!(leaves_the_rest_alone(None));
    if cfg!(debug_assertions) {
        assert!(!leaves_the_rest_alone(Some(Mutant::WriteBack)), "this test notices nothing");
    }
}

fn leaves_the_rest_alone(bug: Option<Mutant>) -> bool {
    let o = CreateOptions {
        size: 64 << 10,
        cluster_size: 16 << 10,
        extended_l2: true,
        ..CreateOptions::default()
    };
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options { bug, ..Options::default() }).expect("open");
    write(&image, 512, &[1; 512]).expect("the second subcluster");
    let host = image.status(512, 512).expect("status").host_offset.expect("data");
    *disk.log.lock().unwrap() = Some(Vec::new());
    write(&image, 100, &[2; 500]).expect("the first, and a part of the second");
    let rest = host + 88..host + 512;
    let mut alone = true;
    for op in disk.log.lock().unwrap().take().unwrap() {
        if let Op::Write(at, data) = op {
            let end = at + data.len() as u64;
            alone &= end <= rest.start || rest.end <= at;
        }
    }
    let expected: Vec<u8> = [vec![0; 100], vec![2; 500], vec![1; 424]].concat();
    assert_eq!(read(&image, 0, 1024).expect("read"), expected);
    alone
}

/// Catches: overlapping allocations that do not wait for each other, a cluster punched or reused
/// while a request is at it, a link before the data.
#[test]
fn threads_share_an_image() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let mut n = 0;
    while n < 2 || Instant::now() < until {
        threads(seed + n, 400, None);
        n += 1;
    }
    eprintln!("{n} images");
}

/// A write in place is slow; meanwhile its cluster is discarded, and others allocate. True when none
/// of them got the cluster that the slow write is still to land in.
fn slow_write_hits_nobody(bug: Option<Mutant>) -> bool {
    let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options { bug, ..Options::default() }).expect("open");
    write(&image, 0, &[1; 4096]).expect("the cluster");
    image.flush().expect("flush");
    disk.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|s| {
        let slow = s.spawn(|| write(&image, 0, &[HELD; 4096]));
        disk.wait_held();
        image.discard(0, 4096).expect("discard");
        for n in 1..64 {
            image.flush().expect("flush");
            write(&image, n * 4096, &[2; 4096]).expect("another cluster");
        }
        disk.hold.store(false, Ordering::SeqCst);
        slow.join().expect("thread").expect("the slow write");
    });
    read(&image, 4096, 63 * 4096).expect("read").iter().all(|b| *b == 2)
}

#[test]
fn a_cluster_is_not_reused_while_a_request_is_at_it() {
    assert!(slow_write_hits_nobody(None));
    if cfg!(debug_assertions) {
        assert!(!slow_write_hits_nobody(Some(Mutant::NoGrace)), "this test notices nothing");
    }
}

/// Small clusters of 4 KiB on an image of 1 MiB.
fn simple(bug: Option<Mutant>) -> (Arc<Disk>, minivmm::qcow2::Qcow2) {
    let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options { bug, ..Options::default() }).expect("open");
    (disk, image)
}

/// Two writes allocate the same cluster, the first is slow. True when both are there in the end.
fn overlapping_allocations_are_both_there(bug: Option<Mutant>) -> bool {
    let (disk, image) = simple(bug);
    disk.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|s| {
        let slow = s.spawn(|| write(&image, 0, &[HELD; 2048]));
        disk.wait_held();
        let other = s.spawn(|| write(&image, 2048, &[2; 2048]));
        // It waits for the first, or else is soon done.
        let until = Instant::now() + Duration::from_millis(500);
        while !other.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        disk.hold.store(false, Ordering::SeqCst);
        slow.join().expect("thread").expect("the slow write");
        other.join().expect("thread").expect("the other");
    });
    read(&image, 0, 4096).expect("read") == [[HELD; 2048], [2; 2048]].concat()
}

/// A write allocates a cluster that was used before, and is slow. True when readers see what was
/// there before until it is done.
fn readers_see_no_cluster_before_its_data(bug: Option<Mutant>) -> bool {
    let (disk, image) = simple(bug);
    write(&image, 4096, &[1; 4096]).expect("a cluster");
    image.flush().expect("flush");
    image.discard(4096, 4096).expect("discard");
    image.flush().expect("flush");
    disk.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|s| {
        let slow = s.spawn(|| write(&image, 0, &[HELD; 4096]));
        disk.wait_held();
        let seen = read(&image, 0, 4096).expect("read");
        disk.hold.store(false, Ordering::SeqCst);
        slow.join().expect("thread").expect("the slow write");
        seen.iter().all(|b| *b == 0)
    })
}

/// Giving a freed cluster back to the file system is slow; others allocate meanwhile. True when their
/// data are there in the end.
fn a_slow_punch_hits_nobody(bug: Option<Mutant>) -> bool {
    let (disk, image) = simple(bug);
    write(&image, 0, &[1; 4096]).expect("a cluster");
    image.flush().expect("flush");
    image.discard(0, 4096).expect("discard");
    disk.hold_discard.store(true, Ordering::SeqCst);
    std::thread::scope(|s| {
        let flush = s.spawn(|| image.flush());
        disk.wait_held();
        (1..64).for_each(|n| write(&image, n * 4096, &[2; 4096]).expect("another cluster"));
        disk.hold_discard.store(false, Ordering::SeqCst);
        flush.join().expect("thread").expect("flush");
    });
    read(&image, 4096, 63 * 4096).expect("read").iter().all(|b| *b == 2)
}

/// In an external data file a discarded cluster is given back while a reader may still be on its way to
/// it: it becomes zeroes there, never anything else.
#[test]
fn a_cluster_of_a_data_file_is_given_back_as_zeroes() {
    let o = CreateOptions { size: 1 << 20, data_file: Some("data".into()), ..CreateOptions::default() };
    let (disk, data) = fresh_pair(&o);
    let image = open_pair(&disk, &data, None, Options::default()).expect("open");
    write(&image, 0, &[1; 4096]).expect("write");
    image.discard(0, 65536).expect("discard");
    assert!(data.unwrap().copy()[..65536].iter().all(|b| *b == 0));
}

/// A write in place behind the end of the file, which must grow first; meanwhile the cluster is
/// discarded and becomes someone else's. True when that one's data are there in the end.
fn a_look_up_is_not_used_after_the_file_grew(bug: Option<Mutant>) -> bool {
    let (disk, image) = simple(None);
    write(&image, 0, &[1; 4096]).expect("a cluster");
    image.close().expect("close");
    // Only the data cluster is behind the cut.
    let host = image.status(0, 4096).expect("status").host_offset.expect("data");
    drop(image);
    disk.bytes.lock().unwrap().truncate(host as usize);
    let image = open_image(&disk, None, Options { bug, ..Options::default() }).expect("open");
    std::thread::scope(|s| {
        let slow = s.spawn(|| write(&image, 0, &[3; 4096]));
        // The file's growth is the sign that it has looked.
        let until = Instant::now() + Duration::from_secs(10);
        while disk.copy().len() as u64 <= host && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        image.discard(0, 4096).expect("discard");
        for n in 1..64 {
            image.flush().expect("flush");
            write(&image, n * 4096, &[2; 4096]).expect("another cluster");
        }
        slow.join().expect("thread").expect("the slow write");
    });
    read(&image, 4096, 63 * 4096).expect("read").iter().all(|b| *b == 2)
}

/// These need no luck: what must not happen would, each time.
#[test]
fn slow_requests_harm_nobody() {
    type Case = (fn(Option<Mutant>) -> bool, Mutant);
    let cases: [Case; 4] = [
        (overlapping_allocations_are_both_there, Mutant::NoWait),
        (readers_see_no_cluster_before_its_data, Mutant::LinkBeforeData),
        (a_slow_punch_hits_nobody, Mutant::LatePunch),
        (a_look_up_is_not_used_after_the_file_grew, Mutant::StaleLookup),
    ];
    for (case, mutant) in cases {
        assert!(case(None), "without {mutant:?}");
        if cfg!(debug_assertions) {
            assert!(!case(Some(mutant)), "this test does not notice {mutant:?}");
        }
    }
}

/// A request panics while its data are on their way: nobody waits for it for ever, and what it was
/// to write is not half there.
#[test]
fn a_panic_in_data_io_holds_up_nobody() {
    let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options::default()).expect("open");
    disk.hold.store(true, Ordering::SeqCst);
    assert!(fails(std::panic::AssertUnwindSafe(|| _ = write(&image, 0, &[PANIC; 4096]))));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|s| {
        let image = &image;
        s.spawn(move || {
            assert!(read(image, 0, 512).expect("read").iter().all(|b| *b == 0));
            write(image, 0, &[3; 4096]).expect("the same cluster");
            image.discard(0, 4096).expect("discard");
            image.close().expect("close");
            tell.send(()).unwrap();
        });
        // A hang cannot be joined.
        if told.recv_timeout(Duration::from_secs(20)).is_err() {
            eprintln!("a request hangs");
            std::process::abort();
        }
    });
    let report = image.check().expect("check");
    assert!(report.errors.is_empty(), "{report:?}");
}

/// A table that its L1 entry does not call ours, but whose entries do: only in broken images. The
/// write must not look for its place for ever.
#[test]
fn flags_that_contradict_each_other_do_not_hang_a_write() {
    for external in [false, true] {
        let o = CreateOptions {
            size: 1 << 20,
            cluster_size: 4096,
            data_file: external.then(|| "data".into()),
            ..CreateOptions::default()
        };
        let (disk, outside) = (Disk::new(Vec::new()), Disk::new(Vec::new()));
        let data = external.then(|| node(&outside));
        minivmm::qcow2::create::create(&node(&disk), data.as_ref(), &o).expect("create");
        let open = || {
            let data = external.then(|| edge("data-file", node(&outside)));
            let backing = minivmm::block::node::Edge::new("backing", None);
            minivmm::qcow2::open::open(edge("file", node(&disk)), backing, data, Options::default())
        };
        let image = open().expect("open");
        write(&image, 0, &[1; 4096]).expect("write");
        write(&image, 8192, &[1; 4096]).expect("write");
        image.close().expect("close");
        let l1 = u64::from_be_bytes(disk.copy()[40..48].try_into().unwrap()) as usize;
        disk.bytes.lock().unwrap()[l1] &= 0x7f;
        let image = open().expect("open");
        write(&image, 1024, &[2; 7000]).expect("write");
        assert_eq!(read(&image, 0, 1024).expect("read"), [1; 1024]);
        assert_eq!(read(&image, 1024, 7000).expect("read"), [2; 7000]);
    }
}

/// The suite notices these bugs.
#[test]
fn mutants_are_caught() {
    if !cfg!(debug_assertions) {
        return eprintln!("skipped: mutants exist only with debug assertions");
    }
    std::panic::set_hook(Box::new(|_| {}));
    // The mutants of several threads: `slow_requests_harm_nobody` and its neighbours.
    let mut survivors = Vec::new();
    for bug in [Mutant::NoCopy, Mutant::StaleGrowth] {
        let caught = (0..200).find(|seed| fails(|| round(*seed, 150, false, Some(bug))));
        eprintln!("{bug:?}: caught by workload {caught:?}");
        match caught {
            // By the mutant, not by the workload itself.
            Some(seed) => round(seed, 150, false, None),
            None => survivors.push(bug),
        }
    }
    let _ = std::panic::take_hook();
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
}

/// Compressible here, random there, zeroes elsewhere.
fn picture(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    for (i, piece) in out.chunks_mut(7000).enumerate() {
        match rng.below(4) {
            0 => piece.iter_mut().for_each(|b| *b = rng.draw() as u8),
            1 => piece.iter_mut().enumerate().for_each(|(j, b)| *b = (j / 50 + i) as u8),
            2 => piece.fill(i as u8 | 1),
            _ => {}
        }
    }
    out
}

/// Images that qemu-img made, with each of its options: read, written, read by qemu-img; written
/// by qemu-io, read again.
#[test]
fn images_go_back_and_forth_with_qemu() {
    if !have_qemu() {
        return;
    }
    let (seed, _) = seed_and_time(Duration::ZERO);
    let list = [
        ("", false),
        ("", true),
        ("compression_type=zstd", true),
        ("compat=0.10", true),
        ("cluster_size=512", true),
        ("cluster_size=512,refcount_bits=64", false),
        ("cluster_size=4k,refcount_bits=1", false),
        ("cluster_size=2M", true),
        ("cluster_size=2M,compression_type=zstd,refcount_bits=8", true),
        ("extended_l2=on", true),
        ("extended_l2=on,cluster_size=16k,refcount_bits=2", false),
        ("lazy_refcounts=on", false),
        ("preallocation=metadata", false),
        ("preallocation=metadata,extended_l2=on", false),
        ("preallocation=full,cluster_size=8k", false),
    ];
    for (n, (options, compress)) in list.iter().enumerate() {
        let mut rng = Rng::new(seed + n as u64);
        let dir = Dir::new("interop");
        let (raw, path) = (dir.path("raw"), dir.path("image.qcow2"));
        let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
        let mut model = picture(&mut rng, (3 << 20) + 512 * 77);
        std::fs::write(raw, &model).unwrap();
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", raw, name];
        if !options.is_empty() {
            args.splice(1..1, ["-o", options]);
        }
        if *compress {
            args.insert(1, "-c");
        }
        qemu("qemu-img", &args);
        let load = || Disk::new(std::fs::read(&path).unwrap());
        let disk = load();
        let before = disk.bytes.lock().unwrap().clone();
        let image = open_image(&disk, None, Options { read_only: true, ..Options::default() }).expect("open");
        assert!(read(&image, 0, model.len()).unwrap() == model, "{options}: read");
        image.close().unwrap();
        assert!(*disk.bytes.lock().unwrap() == before, "{options}: a read-only open wrote");
        let image = open_image(&disk, None, small_caches(&mut rng)).expect("open");
        for _ in 0..60 {
            let off = rng.below(model.len() as u64 - 9000);
            let data = vec![rng.draw() as u8; 1 + rng.below(9000) as usize];
            write(&image, off, &data).expect("write");
            model[off as usize..off as usize + data.len()].copy_from_slice(&data);
        }
        assert!(read(&image, 0, model.len()).unwrap() == model, "{options}: after writing");
        image.close().expect("close");
        let report = image.check().expect("check");
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "{options}: {report:?}");
        std::fs::write(&path, &*disk.bytes.lock().unwrap()).unwrap();
        qemu_check(&path, false);
        assert!(qemu_read(&dir, &path) == model, "{options}: qemu-img reads something else");
        qemu(
            "qemu-io",
            &["-c", "write -P 7 100k 33k", "-c", "write -z -u 1M 300k", "-c", "discard 2M 256k", name],
        );
        model = qemu_read(&dir, &path);
        let image = open_image(&load(), None, Options::default()).expect("open");
        assert!(read(&image, 0, model.len()).unwrap() == model, "{options}: after qemu-io");
        let report = image.check().expect("check");
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "{options}: {report:?}");
    }
}

/// Images that we made, with each option: qemu-img checks and writes them.
#[test]
fn our_images_are_qemus() {
    if !have_qemu() {
        return;
    }
    let base = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let list = [
        base.clone(),
        CreateOptions { version: 2, ..base.clone() },
        CreateOptions { size: 0, ..base.clone() },
        CreateOptions { cluster_size: 512, refcount_bits: 64, ..base.clone() },
        CreateOptions { cluster_size: 512, size: 4 << 30, refcount_bits: 64, ..base.clone() },
        CreateOptions { cluster_size: 2 << 20, refcount_bits: 1, ..base.clone() },
        CreateOptions { extended_l2: true, lazy_refcounts: true, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Metadata, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Falloc, cluster_size: 512, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Full, version: 2, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Metadata, extended_l2: true, ..base.clone() },
        CreateOptions { compression: Compression::Zstd, size: 64 << 40, ..base.clone() },
    ];
    for o in list {
        let disk = fresh(&o);
        let dir = Dir::new("create");
        let path = dir.save("image.qcow2", &disk);
        let name = path.to_str().unwrap();
        qemu_check(&path, false);
        if o.preallocation != Preallocation::Off && !o.extended_l2 {
            let image = open_image(&disk, None, Options::default()).unwrap();
            let all = image.status(0, o.size).unwrap();
            assert_eq!(all.kind, minivmm::block::driver::ExtentKind::Data, "{o:?}");
            assert!(read(&image, 0, o.size as usize).unwrap().iter().all(|b| *b == 0));
            let len = disk.copy().len();
            write(&image, 12345, &[1; 100_000]).unwrap();
            image.close().unwrap();
            assert_eq!(disk.copy().len(), len, "a write allocated something");
        }
        if o.size > 0 {
            qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 5 4k 100k", name]);
            let image = open_image(&Disk::new(std::fs::read(&path).unwrap()), None, Options::default());
            let image = image.expect("open");
            assert!(read(&image, 4096, 100 << 10).unwrap().iter().all(|b| *b == 5), "{o:?}");
            assert!(image.info().specific.is_some());
        }
        let info = qemu("qemu-img", &["info", "--output=json", name]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let image = open_image(&disk, None, Options { read_only: true, ..Options::default() }).unwrap();
        let (kind, data) = image.info().specific.unwrap();
        let theirs = &info["format-specific"];
        assert_eq!(theirs["type"], kind);
        assert_eq!(theirs["data"], serde_json::Value::Object(data), "{o:?}");
    }
}

/// An image with something of everything, for the hostile tests.
fn victim(rng: &mut Rng) -> Vec<u8> {
    let mut o = shape(rng);
    o.size = 256 << 10;
    o.cluster_size = o.cluster_size.min(16384);
    o.backing_file = rng.one_in(2).then(|| "backing.raw".into());
    o.backing_format = o.backing_file.as_ref().map(|_| "raw".into());
    let disk = fresh(&o);
    let image = open_image(&disk, None, Options::default()).expect("open");
    for _ in 0..12 {
        let off = rng.below(o.size - 20000);
        write(&image, off, &vec![rng.draw() as u8; 1 + rng.below(20000) as usize]).expect("write");
    }
    let _ = image.zero(0, 20000, Flags::MAY_UNMAP);
    image.close().expect("close");
    disk.copy()
}

/// Uses an image, whatever it is. Errors are fine, panics are not; nor is a read-only open that
/// writes.
fn abuse(bytes: Vec<u8>, rng: &mut Rng) {
    let read_only = rng.one_in(4);
    let disk = Disk::new(bytes);
    let before = read_only.then(|| disk.bytes.lock().unwrap().clone());
    let options = Options { read_only, ..small_caches(rng) };
    let Ok(image) = open_image(&disk, None, options) else { return };
    let size = image.len();
    for _ in 0..12 {
        if size == 0 {
            break;
        }
        let off = rng.below(size.min(1 << 20));
        let len = (1 + rng.below(30000)).min(size - off);
        match rng.below(8) {
            0..3 => drop(read(&image, off, len as usize)),
            3..5 => drop(write(&image, off, &vec![1; len as usize])),
            5 => drop(image.zero(off, len, Flags::MAY_UNMAP)),
            6 => drop(image.discard(off, len)),
            _ => drop(image.flush()),
        }
        drop(image.status(off, len));
    }
    if rng.one_in(4) {
        drop(image.resize((size / 512 + rng.below(1000)) * 512));
    }
    drop(image.check());
    drop(image.close());
    if let Some(before) = before {
        assert!(*disk.bytes.lock().unwrap() == before, "a read-only open wrote");
    }
}

/// Images with broken metadata: no panic, no endless loop, no gigabytes.
#[test]
fn broken_images_do_no_harm() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let mut n = 0;
    while n < 20 || Instant::now() < until {
        let mut rng = Rng::new(seed + n / 16);
        let mut bytes = victim(&mut rng);
        rng = Rng::new((seed + n) ^ 0x5eed);
        let cluster = 1u64 << (u64::from(bytes[23]) & 31);
        for _ in 0..1 + rng.below(6) {
            // Mostly where metadata are: header, first clusters, words in general.
            let at = match rng.below(4) {
                0 => rng.below(112),
                1 => rng.below(8) * cluster + rng.below(64),
                2 => rng.below(bytes.len() as u64 / cluster) * cluster + rng.below(16),
                _ => rng.below(bytes.len() as u64),
            } as usize
                % (bytes.len() - 8);
            match rng.below(5) {
                0 => bytes[at] ^= 1 << rng.below(8),
                1 => bytes[at] = rng.draw() as u8,
                2 => bytes[at..at + 8].copy_from_slice(&rng.draw().to_be_bytes()),
                3 => {
                    let k = rng.below(bytes.len() as u64 / cluster + 2) * cluster;
                    let at = at & !7;
                    bytes[at..at + 8].copy_from_slice(&(k | 1 << 63).to_be_bytes());
                }
                _ => bytes.truncate((at + 8).max(600)),
            }
            if (bytes.len() as u64) < 1200.max(2 * cluster) {
                break;
            }
        }
        let case = std::panic::AssertUnwindSafe(|| abuse(bytes, &mut Rng::new(seed + n)));
        assert!(std::panic::catch_unwind(case).is_ok(), "panic; SEED={seed} n={n}");
        n += 1;
    }
    eprintln!("{n} broken images");
}

/// A disk that fails: each request says so, and what was written before it failed, or after it
/// recovers, is there.
#[test]
fn a_failing_disk_loses_nothing_that_was_acknowledged() {
    let (seed, until) = seed_and_time(Duration::from_secs(2));
    let mut n = 0;
    while n < 20 || Instant::now() < until {
        let mut rng = Rng::new(seed + n);
        let o = shape(&mut rng);
        let disk = fresh(&o);
        let say = format!("SEED={} {o:?}", seed + n);
        let image = open_image(&disk, None, small_caches(&mut rng)).expect("open");
        let sectors = o.size / 512;
        // What each sector may hold: more than one thing after a failed write.
        let mut ids: Vec<Vec<u32>> = vec![vec![0]; sectors as usize];
        for id in 1..120 {
            match rng.below(12) {
                0 => disk.fail_after.store(1 + rng.below(12), Ordering::SeqCst),
                1..4 => disk.fail_after.store(0, Ordering::SeqCst),
                _ => {}
            }
            let first = rng.below(sectors);
            let end = (first + 1 + rng.below(40)).min(sectors);
            let (done, id) = match rng.below(10) {
                0..6 => {
                    let data: Vec<u8> = (first..end).flat_map(|s| contents(id, s)).collect();
                    (write(&image, first * 512, &data), id)
                }
                6 => (image.zero(first * 512, (end - first) * 512, Flags::MAY_UNMAP), 0),
                7 => {
                    let _ = image.flush();
                    continue;
                }
                _ => {
                    if let Ok(got) = read(&image, first * 512, (end - first) as usize * 512) {
                        for (s, b) in (first..end).zip(got.chunks_exact(512)) {
                            assert!(ids[s as usize].contains(&id_of(b, s)), "{say}: sector {s}");
                        }
                    }
                    continue;
                }
            };
            for s in first..end {
                match &done {
                    Ok(()) => ids[s as usize] = vec![id],
                    Err(_) => ids[s as usize].push(id),
                }
            }
        }
        disk.fail_after.store(0, Ordering::SeqCst);
        image.close().unwrap_or_else(|e| panic!("{say}: {e}"));
        let image = open_image(&disk, None, Options::default()).expect("open");
        for s in 0..sectors {
            let got = read(&image, s * 512, 512).expect("read");
            assert!(ids[s as usize].contains(&id_of(&got, s)), "{say}: sector {s} at the end");
        }
        let report = image.check().expect("check");
        assert!(report.errors.is_empty(), "{say}: {report:?}");
        n += 1;
    }
}
