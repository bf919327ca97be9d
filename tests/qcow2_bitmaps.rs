//! Bitmaps stored in qcow2 images: both ways with qemu-img, across power cuts, in broken images.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long.

#[path = "support/powercut.rs"]
mod powercut;
#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::bitmap::Bitmap;
use minivmm::block::driver::{Driver, Flags};
use minivmm::block::node::{Node, NodeOptions};
use minivmm::qcow2::create::CreateOptions;
use minivmm::qcow2::mutant::Mutant;
use minivmm::qcow2::open::Options;
use minivmm::sys::iov::Iov;
use powercut::{apply, cut};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::*;

/// The image as the disk of a guest.
fn guest(disk: &Arc<Disk>, options: Options) -> Arc<Node> {
    let read_only = options.read_only;
    let image = open_image(disk, None, options).expect("open");
    let options = NodeOptions { unmap: true, read_only, ..NodeOptions::default() };
    Node::new("disk", Box::new(image), options)
}

fn put(node: &Node, off: u64, data: &[u8]) {
    node.write(off, &Iov::from_slice(data), Flags::NONE).expect("write");
}

fn persistent(node: &Node, name: &str, granularity: u32) -> Arc<Bitmap> {
    node.driver.stored_bitmaps().unwrap().can_store(name, granularity.into()).expect("can be stored");
    let bitmap = node.add_bitmap(Some(name), granularity).expect("add");
    bitmap.set_persistent(true);
    bitmap
}

/// Name, granularity, flags, as qemu-img shows them.
fn qemu_bitmaps(path: &Path) -> serde_json::Value {
    let text = qemu("qemu-img", &["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    info["format-specific"]["data"]["bitmaps"].clone()
}

fn bitmap(path: &Path, args: &[&str]) {
    let mut all = vec!["bitmap"];
    all.extend(&args[..args.len() - 1]);
    all.extend([path.to_str().unwrap(), args[args.len() - 1]]);
    qemu("qemu-img", &all);
}

fn load(path: &Path) -> Arc<Disk> {
    Disk::new(std::fs::read(path).unwrap())
}

/// What QEMU stores we read, what we store QEMU reads: it merges our bitmap into a new one, and that
/// is what we find.
#[test]
fn bitmaps_go_back_and_forth_with_qemu() {
    if !have_qemu() {
        return;
    }
    let list = [
        ("", 64 << 20, 65536),
        ("", (3 << 20) + 512, 512),
        ("cluster_size=512", 5 << 20, 512),
        ("cluster_size=512,refcount_bits=1", 1 << 20, 4096),
        ("cluster_size=2M", 64 << 20, 1024),
        ("extended_l2=on", 3 << 30, 65536),
        ("lazy_refcounts=on,cluster_size=4k", 100 << 20, 512),
        ("backing_file=DIR/base.raw,backing_fmt=raw", 10 << 20, 65536),
        ("backing_file=base.raw,backing_fmt=raw,cluster_size=1k", 10 << 20, 1 << 20),
        ("backing_file=DIR/base.raw,backing_fmt=raw,cluster_size=512", 10 << 20, 65536),
    ];
    for (n, (options, size, granularity)) in list.iter().enumerate() {
        let mut rng = Rng::new(n as u64 + 3);
        let dir = Dir::new("bitmaps");
        let path = dir.path("image.qcow2");
        let name = path.to_str().unwrap();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-u", name];
        std::fs::write(dir.path("base.raw"), [1; 100_000]).unwrap();
        let options = options.replace("DIR", dir.0.to_str().unwrap());
        let size_text = size.to_string();
        args.push(&size_text);
        if !options.is_empty() {
            args.splice(1..1, ["-o", &options]);
        }
        qemu("qemu-img", &args);
        let g = granularity.to_string();
        if !options.contains("DIR") && !options.contains("cluster_size=1k") {
            bitmap(&path, &["--add", "-g", &g, "theirs"]);
            bitmap(&path, &["--add", "off"]);
            bitmap(&path, &["--disable", "off"]);
            qemu("qemu-io", &["-f", "qcow2", "-c", "write 100k 33k", "-c", "write 700k 1k", name]);
        }
        // Loaded, written to, stored.
        let disk = load(&path);
        let node = guest(&disk, Options::default());
        if let Some(theirs) = node.find_bitmap("theirs") {
            let g = u64::from(*granularity);
            let clip = |a: u64, b: u64| (a / g * g, b.next_multiple_of(g).min(*size));
            let mut want = vec![clip(100 << 10, 133 << 10), clip(700 << 10, 701 << 10)];
            if want[0].1 >= want[1].0 {
                want = vec![(want[0].0, want[1].1)];
            }
            assert_eq!(runs(&theirs), want, "{options}");
            assert!(theirs.persistent() && theirs.enabled() && !theirs.inconsistent());
            let off = node.find_bitmap("off").unwrap();
            assert!(!off.enabled() && off.count() == 0);
        }
        let ours = persistent(&node, "ours", *granularity);
        let full = persistent(&node, "full", 512);
        full.mark(0, u64::MAX);
        for _ in 0..40 {
            let off = rng.below(size - 5000);
            put(&node, off, &vec![1; 1 + rng.below(5000) as usize]);
        }
        let (want, theirs) = (runs(&ours), node.find_bitmap("theirs").map(|b| runs(&b)));
        node.driver.close().expect("close");
        let path = dir.save("ours.qcow2", &disk);
        qemu_check(&path, false);
        let shown = qemu_bitmaps(&path);
        let entry = |name: &str| shown.as_array().unwrap().iter().find(|b| b["name"] == name).cloned();
        let ours = entry("ours").unwrap_or_else(|| panic!("{options}: {shown}"));
        assert_eq!(ours["granularity"], *granularity);
        assert_eq!(ours["flags"], serde_json::json!(["auto"]));
        if theirs.is_some() {
            assert_eq!(entry("off").unwrap()["flags"], serde_json::json!([]), "{options}");
        }
        bitmap(&path, &["--add", "-g", "512", "--merge", "ours", "--disable", "copy"]);
        bitmap(&path, &["--add", "-g", "4096", "--merge", "full", "--disable", "all"]);
        if theirs.is_some() {
            bitmap(&path, &["--clear", "off"]);
            bitmap(&path, &["--enable", "off"]);
        }
        qemu_check(&path, false);
        let disk = load(&path);
        let before = disk.copy();
        let node = guest(&disk, Options { read_only: true, ..Options::default() });
        for (name, want) in [("ours", Some(want.clone())), ("copy", Some(want)), ("theirs", theirs)] {
            if let Some(want) = want {
                let b = node.find_bitmap(name).unwrap_or_else(|| panic!("{options}: no {name}"));
                assert_eq!(runs(&b), want, "{options}: {name}");
                assert!(b.read_only());
            }
        }
        for name in ["full", "all"] {
            assert_eq!(runs(&node.find_bitmap(name).unwrap()), [(0, *size)], "{options}");
        }
        node.driver.close().expect("close");
        assert!(disk.copy() == before, "{options}: a read-only open wrote");
    }
}

/// After a crash a bitmap is inconsistent, can only be removed, and the image is whole.
#[test]
fn after_a_crash_they_are_inconsistent() {
    let disk = fresh(&CreateOptions { size: 8 << 20, ..CreateOptions::default() });
    let node = guest(&disk, Options::default());
    persistent(&node, "a", 65536);
    persistent(&node, "b", 4096);
    put(&node, 0, &[1; 100]);
    node.driver.close().unwrap();
    let node = guest(&disk, Options::default());
    assert_eq!(runs(&node.find_bitmap("b").unwrap()), [(0, 4096)]);
    persistent(&node, "new", 512);
    put(&node, 1 << 20, &[1; 100]);
    node.flush().unwrap();
    drop(node);
    // Nobody closed it.
    let crashed = disk.copy();
    let node = guest(&disk, Options { read_only: true, ..Options::default() });
    assert!(node.find_bitmap("a").unwrap().inconsistent());
    drop(node);
    let node = guest(&disk, Options::default());
    assert!(node.find_bitmap("new").is_none(), "it was in memory only");
    let a = node.find_bitmap("a").unwrap();
    assert!(a.inconsistent() && a.persistent() && !a.recording() && a.count() == 0);
    let e = a.check(minivmm::block::bitmap::Refuse::Change).unwrap_err();
    assert_eq!(e.desc, "Bitmap 'a' is inconsistent and cannot be used");
    let e = node.resize(16 << 20).unwrap_err().to_string();
    assert_eq!(e, "Bitmap 'a' is inconsistent and cannot be used");
    put(&node, 0, &[2; 100]);
    node.driver.close().unwrap();
    let stored = |disk: &Arc<Disk>| {
        let node = guest(disk, Options { read_only: true, ..Options::default() });
        let list = node.bitmaps();
        list.iter().rev().map(|b| (b.name().unwrap().to_string(), b.inconsistent())).collect::<Vec<_>>()
    };
    assert_eq!(stored(&disk), [("a".to_string(), true), ("b".into(), true)]);
    if have_qemu() {
        let dir = Dir::new("crashed");
        let path = dir.path("image.qcow2");
        std::fs::write(&path, &crashed).unwrap();
        qemu_check(&path, true);
        assert_eq!(qemu_bitmaps(&path)[0]["flags"], serde_json::json!(["in-use", "auto"]));
    }
    // Removed one by one; nothing is leaked.
    let node = guest(&disk, Options::default());
    for name in ["a", "b"] {
        node.driver.stored_bitmaps().unwrap().remove_stored(name).unwrap();
        node.remove_bitmap(&node.find_bitmap(name).unwrap());
        node.driver.stored_bitmaps().unwrap().remove_stored(name).unwrap();
    }
    assert_eq!(disk.copy()[95] & 1, 0, "the autoclear bit goes with the last");
    persistent(&node, "c", 4096);
    put(&node, 4096, &[2; 1]);
    node.driver.close().unwrap();
    assert_eq!(stored(&disk), [("c".to_string(), false)]);
    if have_qemu() {
        let dir = Dir::new("removed");
        let path = dir.save("image.qcow2", &disk);
        qemu_check(&path, false);
        bitmap(&path, &["--remove", "c"]);
        qemu_check(&path, false);
    }
}

/// Refcounts are rebuilt with the bitmaps' clusters in use, and a bitmap that was stored is good: the
/// dirty bit says nothing of bitmaps.
#[test]
fn they_survive_a_repair() {
    let o =
        CreateOptions { size: 4 << 20, cluster_size: 4096, lazy_refcounts: true, ..CreateOptions::default() };
    let disk = fresh(&o);
    let node = guest(&disk, Options::default());
    put(&node, 0, &[1; 300_000]);
    persistent(&node, "a", 512).mark(5000, 5000);
    persistent(&node, "b", 512).mark(0, u64::MAX);
    node.driver.close().unwrap();
    let (mut bytes, clean) = (disk.copy(), disk.copy());
    bytes[79] |= 1;
    // The refcounts are gone.
    let word = |at: usize| u64::from_be_bytes(clean[at..at + 8].try_into().unwrap()) as usize;
    let block = word(word(48));
    bytes[block + 100..block + 4096].fill(0);
    let disk = Disk::new(bytes);
    let image = open_image(&disk, None, Options::default()).unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
    let list = image.bitmaps().unwrap();
    assert_eq!(runs(&list.find("a").unwrap()), [(4608, 10240)]);
    assert_eq!(runs(&list.find("b").unwrap()), [(0, 4 << 20)]);
    write(&image, 1 << 20, &[2; 300_000]).unwrap();
    image.close().unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
}

/// A program that knows no bitmaps has written: they are gone at the first writable open, and the
/// next ones are as good as any.
#[test]
fn without_the_autoclear_bit_there_are_none() {
    let disk = fresh(&CreateOptions { size: 8 << 20, ..CreateOptions::default() });
    let node = guest(&disk, Options::default());
    persistent(&node, "a", 65536);
    node.driver.close().unwrap();
    disk.bytes.lock().unwrap()[95] &= !1;
    let before = disk.copy();
    let node = guest(&disk, Options { read_only: true, ..Options::default() });
    assert!(node.bitmaps().is_empty());
    drop(node);
    assert!(disk.copy() == before);
    let node = guest(&disk, Options::default());
    assert!(node.bitmaps().is_empty());
    node.driver.close().unwrap();
    if have_qemu() {
        let dir = Dir::new("autoclear");
        let path = dir.save("image.qcow2", &disk);
        let text = qemu("qemu-img", &["info", path.to_str().unwrap()]);
        assert!(!text.contains("inconsistent") && !text.contains("bitmaps:"), "{text}");
        qemu_check(&path, true);
        qemu("qemu-img", &["check", "-r", "leaks", path.to_str().unwrap()]);
        qemu_check(&path, false);
    }
    let node = guest(&disk, Options::default());
    persistent(&node, "b", 65536);
    node.driver.close().unwrap();
    let node = guest(&disk, Options { read_only: true, ..Options::default() });
    assert!(node.find_bitmap("b").is_some_and(|b| !b.inconsistent()));
}

/// Turned read-only they are stored and stay; turned writable again they are in use again.
#[test]
fn they_follow_the_image_when_it_turns_read_only() {
    let disk = fresh(&CreateOptions { size: 8 << 20, ..CreateOptions::default() });
    let node = guest(&disk, Options::default());
    let b = persistent(&node, "b", 4096);
    let mut want = Vec::new();
    for round in 0..4u64 {
        put(&node, round << 20, &[1; 4096]);
        want.push((round << 20, (round << 20) + 4096));
        node.driver.set_read_only(true).unwrap();
        assert!(b.read_only());
        let copy = Disk::new(disk.copy());
        let there = guest(&copy, Options { read_only: true, ..Options::default() });
        let stored = there.find_bitmap("b").unwrap();
        assert!(!stored.inconsistent());
        assert_eq!(runs(&stored), want);
        node.driver.set_read_only(false).unwrap();
        node.driver.begin_writing().unwrap();
        assert!(!b.read_only());
        let there = guest(&Disk::new(disk.copy()), Options { read_only: true, ..Options::default() });
        assert!(there.find_bitmap("b").unwrap().inconsistent());
    }
    node.driver.close().unwrap();
}

#[test]
fn they_follow_the_disks_length() {
    let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let mut node = guest(&disk, Options::default());
    let b = persistent(&node, "b", 512);
    b.mark(0, u64::MAX);
    for (size, want) in [
        (3 << 20, vec![(0, 1 << 20)]),
        (512, vec![(0, 512)]),
        (8 << 20, vec![(0, 512)]),
        ((5 << 20) + 512, vec![(0, 512)]),
    ] {
        node.resize(size).unwrap();
        node.driver.close().unwrap();
        let image = open_image(&disk, None, Options::default()).unwrap();
        let report = image.check().unwrap();
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
        node = Node::new("disk", Box::new(image), NodeOptions::default());
        assert_eq!(runs(&node.find_bitmap("b").unwrap()), want, "{size}");
    }
}

/// What cannot be stored is said before, and never harms the image.
#[test]
fn what_cannot_be_stored_is_refused() {
    let why = |o: CreateOptions, name: &str, granularity: u64| {
        let image = open_image(&fresh(&o), None, Options::default()).unwrap();
        image.stored_bitmaps().unwrap().can_store(name, granularity).unwrap_err().to_string()
    };
    let o = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let v2 = CreateOptions { version: 2, ..o.clone() };
    assert_eq!(why(v2, "b", 65536), "Cannot store dirty bitmaps in qcow2 v2 files");
    let huge = CreateOptions { size: 4 << 40, ..o.clone() };
    let large = "Too much space will be occupied by the bitmap. Use larger granularity";
    assert_eq!(why(huge, "b", 512), large);
    assert_eq!(why(o.clone(), &"x".repeat(1024), 512), "Name length exceeds maximum (1023 characters)");
    let full = CreateOptions { cluster_size: 512, backing_file: Some("x".repeat(370)), ..o.clone() };
    assert_eq!(why(full, "b", 512), "There is no room in the image's header for bitmaps");
    // Full while it is stored: the image stays good, the bitmap is lost.
    let disk = fresh(&o);
    let node = guest(&disk, Options::default());
    persistent(&node, "b", 512).mark(0, u64::MAX);
    put(&node, 0, &[1; 65536]);
    node.flush().unwrap();
    disk.fail_after.store(3, std::sync::atomic::Ordering::SeqCst);
    node.driver.close().unwrap_err();
    disk.fail_after.store(0, std::sync::atomic::Ordering::SeqCst);
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert!(image.check().unwrap().errors.is_empty());
    assert_eq!(read(&image, 0, 65536).unwrap(), [1; 65536]);
}

/// A bitmap as the recording knows it.
struct Known {
    name: String,
    bitmap: Arc<Bitmap>,
    /// What the disk was when it was made.
    base: Vec<u32>,
    /// What was stored, each with the length of the log when that began.
    stored: Vec<(usize, Vec<(u64, u64)>)>,
}

struct Run {
    start: Vec<u8>,
    log: Vec<Op>,
    known: Vec<Known>,
}

/// Sessions of writes, bitmaps that come and go, closes.
fn record(rng: &mut Rng, bug: Option<Mutant>) -> Run {
    let backing =
        [None, Some("b".to_string()), Some("/some/where/else/base.raw".into()), Some("x".repeat(450))];
    let o = CreateOptions {
        size: (64 + rng.below(600)) * 512,
        cluster_size: 1024 << rng.below(4),
        refcount_bits: 8 << rng.below(4),
        backing_file: backing[rng.below(4) as usize].clone(),
        backing_format: Some("raw".into()),
        ..CreateOptions::default()
    };
    let o = if o.backing_file.is_none() { CreateOptions { backing_format: None, ..o } } else { o };
    let sectors = o.size / 512;
    let disk = fresh(&o);
    let start = disk.copy();
    *disk.log.lock().unwrap() = Some(Vec::new());
    let at = || disk.log.lock().unwrap().as_ref().unwrap().len();
    let mut ids = vec![0u32; sectors as usize];
    let mut known: Vec<Known> = Vec::new();
    let mut gone: Vec<Known> = Vec::new();
    let mut id = 0;
    for _ in 0..3 {
        let node = guest(&disk, Options { bug, ..Options::default() });
        // The list is new; the names are not.
        known.retain_mut(|k| match node.find_bitmap(&k.name) {
            Some(b) => {
                assert!(
                    !b.inconsistent() && runs(&b) == k.stored.last().unwrap().1,
                    "{} is not what it was",
                    k.name
                );
                k.bitmap = b;
                true
            }
            None => panic!("{} is not stored", k.name),
        });
        for _ in 0..14 {
            let first = rng.below(sectors);
            let end = (first + 1 + rng.below(9)).min(sectors);
            match rng.below(10) {
                0 | 1 if known.len() < 3 => {
                    id += 1;
                    let name = format!("{id}{}", "n".repeat(rng.below(40) as usize));
                    let granularity = 512 << rng.below(4);
                    if node.driver.stored_bitmaps().unwrap().can_store(&name, granularity.into()).is_ok() {
                        let bitmap = persistent(&node, &name, granularity);
                        known.push(Known { name, bitmap, base: ids.clone(), stored: Vec::new() });
                    }
                }
                2 if !known.is_empty() => {
                    let k = known.swap_remove(rng.below(known.len() as u64) as usize);
                    node.driver.stored_bitmaps().unwrap().remove_stored(&k.name).expect("remove");
                    node.remove_bitmap(&k.bitmap);
                    gone.push(k);
                }
                3 => node.flush().expect("flush"),
                4 => {
                    node.zero(first * 512, (end - first) * 512, Flags::MAY_UNMAP).expect("zero");
                    ids[first as usize..end as usize].fill(0);
                }
                5 if rng.one_in(2) => {
                    known.iter_mut().for_each(|k| k.stored.push((at(), runs(&k.bitmap))));
                    node.driver.set_read_only(true).expect("read-only");
                    node.driver.set_read_only(false).expect("writable");
                    node.driver.begin_writing().expect("writable");
                }
                _ => {
                    id += 1;
                    let data: Vec<u8> = (first..end).flat_map(|s| contents(id, s)).collect();
                    put(&node, first * 512, &data);
                    ids[first as usize..end as usize].fill(id);
                }
            }
        }
        known.iter_mut().for_each(|k| k.stored.push((at(), runs(&k.bitmap))));
        node.driver.close().expect("close");
    }
    known.append(&mut gone);
    Run { start, log: disk.log.lock().unwrap().take().unwrap(), known }
}

/// One state: the image is good, and a bitmap that says it is good has every sector that changed
/// since it was made, and is one that was stored.
fn judge(run: &Run, bytes: Vec<u8>, point: usize, say: &str, qemu: Option<&Dir>) -> u64 {
    if let Some(dir) = qemu {
        let path = dir.path("state.qcow2");
        std::fs::write(&path, &bytes).unwrap();
        // Its backing file is not there.
        let name = path.to_str().unwrap();
        let image = format!(
            r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{name}"}}}}"#
        );
        let (code, text) = tool("qemu-img", &["check", &image]);
        assert!(code == 0 || code == 3, "{say}: qemu-img check: {code}: {text}");
    }
    let disk = Disk::new(bytes);
    let image = open_image(&disk, None, Options::default()).unwrap_or_else(|e| panic!("{say}: open: {e}"));
    let report = image.check().unwrap_or_else(|e| panic!("{say}: check: {e}"));
    assert!(report.errors.is_empty(), "{say}: {report:?}");
    let got = read(&image, 0, image.len() as usize).unwrap_or_else(|e| panic!("{say}: read: {e}"));
    let mut good = 0;
    for b in image.bitmaps().unwrap().all().iter().filter(|b| !b.inconsistent()) {
        good += 1;
        let name = b.name().unwrap();
        let known = run.known.iter().find(|k| k.name == name);
        let Known { base, stored, .. } = known.unwrap_or_else(|| panic!("{say}: {name}?"));
        for (s, bytes) in got.chunks_exact(512).enumerate() {
            let id = id_of(bytes, s as u64);
            assert!(
                id == base[s] || b.is_dirty(s as u64 * 512),
                "{say}: bitmap {name} does not know of sector {s}, which was {:#x} and is {id:#x}",
                base[s]
            );
        }
        let was = stored.iter().any(|(at, r)| *at <= point && *r == runs(b));
        assert!(was, "{say}: nobody stored {name} like this: {:?}", runs(b));
    }
    if point.is_multiple_of(3) {
        // Life goes on, also for the inconsistent ones.
        let node = Node::new("disk", Box::new(image), NodeOptions::default());
        put(&node, 0, &contents(7, 0));
        for b in node.bitmaps().iter().filter(|b| b.inconsistent()) {
            node.driver.stored_bitmaps().unwrap().remove_stored(b.name().unwrap()).unwrap();
            node.remove_bitmap(b);
        }
        let want: Vec<_> = node.bitmaps().iter().map(|b| (b.name().map(str::to_string), runs(b))).collect();
        node.driver.close().unwrap_or_else(|e| panic!("{say}: close: {e}"));
        let image = open_image(&disk, None, Options::default()).unwrap();
        assert!(image.check().unwrap().errors.is_empty(), "{say}: after the cut");
        let list = image.bitmaps().unwrap().all();
        let got: Vec<_> = list.iter().rev().map(|b| (b.name().map(str::to_string), runs(b))).collect();
        assert_eq!(got, want, "{say}");
    }
    good
}

fn cuts(seed: u64, qemu: bool, bug: Option<Mutant>) -> (u64, u64) {
    let mut rng = Rng::new(seed);
    let run = record(&mut rng, bug);
    let dir = qemu.then(|| Dir::new("bitmap-crash"));
    let (mut states, mut good) = (0, 0);
    let mut synced = run.start.clone();
    let mut open: Vec<Op> = Vec::new();
    let mut one = |rng: &mut Rng, synced: &[u8], open: &[Op], point: usize| {
        let say = format!("SEED={seed} point={point}");
        states += 1;
        let dir = dir.as_ref().filter(|_| states % 41 == 0);
        good += judge(&run, cut(rng, synced, open), point, &say, dir);
    };
    for (i, op) in run.log.iter().enumerate() {
        match op {
            Op::Sync => {
                one(&mut rng, &synced, &open, i);
                open.drain(..).for_each(|op| apply(&mut synced, &op));
            }
            op => {
                open.push(op.clone());
                one(&mut rng, &synced, &open, i + 1);
                one(&mut rng, &synced, &open, i + 1);
            }
        }
    }
    one(&mut rng, &synced, &[], run.log.len());
    (states, good)
}

#[test]
fn every_power_cut_leaves_bitmaps_right_or_inconsistent() {
    let (seed, until) = seed_and_time(Duration::from_secs(4));
    let qemu = have_qemu();
    let (mut n, mut states, mut good) = (0, 0, 0);
    while n < 3 || Instant::now() < until {
        let (s, g) = cuts(seed + n, qemu, None);
        (states, good) = (states + s, good + g);
        n += 1;
    }
    eprintln!("{states} crash states of {n} workloads; {good} bitmaps were right");
    assert!(good > 0);
}

#[test]
fn mutants_are_caught() {
    if !cfg!(debug_assertions) {
        return eprintln!("skipped: mutants exist only with debug assertions");
    }
    std::panic::set_hook(Box::new(|_| {}));
    let caught = |bug| (0..12).find(|seed| fails(|| _ = cuts(*seed, false, Some(bug))));
    let survivors: Vec<_> = [Mutant::BitmapNotInUse, Mutant::DirectoryFirst]
        .into_iter()
        .filter(|b| caught(*b).is_none())
        .collect();
    let _ = std::panic::take_hook();
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
}

/// Directories and tables with anything in them: no panic, no gigabytes, no bitmap that is wrong in
/// silence for want of a check of its place.
#[test]
fn broken_directories_do_no_harm() {
    let (seed, until) = seed_and_time(Duration::from_secs(2));
    let mut n = 0;
    while n < 20 || Instant::now() < until {
        let mut rng = Rng::new((seed + n) ^ 0xb17);
        n += 1;
        let cluster_size = 512 << rng.below(6);
        let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size, ..CreateOptions::default() });
        let node = guest(&disk, Options::default());
        for i in 0..1 + rng.below(3) {
            persistent(&node, &format!("b{i}"), 512 << rng.below(3)).mark(rng.below(1 << 20), 9000);
        }
        node.driver.close().unwrap();
        let bytes = disk.copy();
        let header = minivmm::qcow2::header::Header::parse(&bytes).unwrap();
        let ext = header.bitmaps.unwrap();
        let table = u64::from_be_bytes(bytes[ext.offset as usize..][..8].try_into().unwrap());
        for _ in 0..8 {
            let disk = Disk::new(bytes.clone());
            {
                let mut b = disk.bytes.lock().unwrap();
                for _ in 0..1 + rng.below(3) {
                    let (from, len) = [(ext.offset, ext.size), (table, 16), (112, 64)][rng.below(3) as usize];
                    let at = (from + rng.below(len)) as usize;
                    let edge = [0, 1, 2, 0x7f, 0x80, 0xff, rng.draw() as u8];
                    b[at] = edge[rng.below(7) as usize];
                }
            }
            let read_only = rng.one_in(3);
            let Ok(image) = open_image(&disk, None, Options { read_only, ..Options::default() }) else {
                continue;
            };
            let node =
                Node::new("disk", Box::new(image), NodeOptions { read_only, ..NodeOptions::default() });
            if !read_only {
                put(&node, rng.below(1 << 19), &[1; 5000]);
                if rng.one_in(2)
                    && let Some(b) = node.bitmaps().first()
                {
                    let _ = node.driver.stored_bitmaps().unwrap().remove_stored(b.name().unwrap());
                    node.remove_bitmap(b);
                }
            }
            let _ = node.driver.close();
        }
    }
}

/// Two bitmaps in one place: nobody writes to such an image.
#[test]
fn tables_in_one_place_are_refused() {
    let disk = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let node = guest(&disk, Options::default());
    persistent(&node, "a", 4096).mark(0, 1);
    persistent(&node, "b", 4096).mark(0, 1);
    node.driver.close().unwrap();
    let good = disk.copy();
    let dir = minivmm::qcow2::header::Header::parse(&good).unwrap().bitmaps.unwrap().offset as usize;
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let (a, b) = (word(dir), word(dir + 32));
    let data = word(a);
    // A table on a table, data on data, on a table, on the header's cluster, on the refcount table.
    for (at, value) in [(dir + 32, a), (b, data), (b, a), (b, dir), (b, word(48)), (dir + 32, word(40))] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&(value as u64).to_be_bytes());
        let disk = Disk::new(bytes.clone());
        let e = open_image(&disk, None, Options::default()).err().expect("refused").to_string();
        assert!(e.contains("metadata overlap") || e.contains("is not possible"), "{e}");
        assert!(disk.copy() == bytes, "it was written to");
    }
}

/// As many bitmaps as there may be open and close in no time.
#[test]
fn the_most_bitmaps() {
    let disk = fresh(&CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    let list: Vec<_> =
        (0..65535).map(|n| Bitmap::new(Some(&n.to_string()), 65536, 1 << 20).unwrap()).collect();
    list.iter().for_each(|b| b.set_persistent(true));
    list[7].mark(0, 1);
    image.bitmaps().unwrap().fill(list);
    let e = image.stored_bitmaps().unwrap().can_store("x", 512).unwrap_err().to_string();
    assert_eq!(e, "Maximum number of persistent bitmaps is already reached");
    // Not all of them here: a test build takes its time.
    let most = image.bitmaps().unwrap();
    most.all().iter().skip(10_000).for_each(|b| b.set_persistent(false));
    let began = Instant::now();
    image.close().unwrap();
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(image.bitmaps().unwrap().all().len(), 10_000);
    assert_eq!(image.bitmaps().unwrap().find("7").unwrap().count(), 65536);
    image.close().unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
    eprintln!("{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(30));
}

/// 8 bytes of table stand for 2 MiB of bits: that is bounded.
#[test]
fn a_small_file_does_not_become_gigabytes() {
    let o = CreateOptions { size: 2 << 40, cluster_size: 2 << 20, ..CreateOptions::default() };
    let disk = fresh(&o);
    let node = guest(&disk, Options::default());
    for i in 0..4 {
        persistent(&node, &format!("b{i}"), 512);
    }
    node.driver.close().unwrap();
    // Every table says "all ones": 512 MiB each.
    let mut bytes = disk.copy();
    let ext = minivmm::qcow2::header::Header::parse(&bytes).unwrap().bitmaps.unwrap();
    let mut at = ext.offset as usize;
    for _ in 0..4 {
        let table = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let entries = u32::from_be_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        assert_eq!(entries, 256);
        (0..entries).for_each(|e| bytes[table + e * 8 + 7] = 1);
        at += 32;
    }
    let e = open_image(&Disk::new(bytes), None, Options::default()).err().expect("refused").to_string();
    assert_eq!(e, "The image's bitmaps have more than 1073741824 bytes");
}
