//! Single properties of the qcow2 driver: what is refused and how, what is repaired, what a
//! request costs, what stays bounded.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Driver, ExtentKind, Flags, Preallocation, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::qcow2::corrupt::Corruption;
use minivmm::qcow2::create::{self, CreateOptions};
use minivmm::qcow2::open::{self, Options};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use support::*;

fn base() -> CreateOptions {
    CreateOptions { size: 8 << 20, ..CreateOptions::default() }
}

fn syncs(disk: &Disk, f: impl FnOnce()) -> u64 {
    let before = disk.syncs.load(Ordering::SeqCst);
    f();
    disk.syncs.load(Ordering::SeqCst) - before
}

#[test]
fn an_in_place_write_and_a_flush_cost_one_sync() {
    let disk = fresh(&base());
    let image = open_image(&disk, None, Options::default()).unwrap();
    let both = |off: u64| {
        write(&image, off, &[1; 4096]).unwrap();
        image.flush().unwrap();
    };
    // The first also makes a table.
    assert_eq!(syncs(&disk, || both(0)), 2, "data and refcounts, then pointers");
    assert_eq!(syncs(&disk, || both(4096)), 1, "in place");
    assert_eq!(syncs(&disk, || both(1 << 20)), 2, "a new cluster");
    let writes = disk.writes.load(Ordering::SeqCst);
    write(&image, 8192, &[1; 4096]).unwrap();
    image.flush().unwrap();
    assert_eq!(disk.writes.load(Ordering::SeqCst), writes + 1, "the data and nothing else");
}

#[test]
fn a_tiny_vm_pays_little_memory() {
    let disk = fresh(&CreateOptions { size: 10 << 30, ..base() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(image.cache_bytes(), 0, "nothing is loaded before it is used");
    for i in 0..64 {
        write(&image, i * 70_000, &[1; 4096]).unwrap();
    }
    image.flush().unwrap();
    assert!(image.cache_bytes() <= 32 << 10, "{}", image.cache_bytes());
}

#[test]
fn caches_stay_within_their_sizes() {
    let disk = fresh(&CreateOptions { size: 8 << 40, cluster_size: 4096, ..base() });
    let sizes =
        Options { l2_cache_size: Some(64 << 10), refcount_cache_size: Some(64 << 10), ..Options::default() };
    let image = open_image(&disk, None, sizes).unwrap();
    let mut rng = Rng::new(1);
    let places: Vec<u64> = (0..400).map(|_| rng.below(8 << 30) * 1024).collect();
    for (i, off) in places.iter().enumerate() {
        write(&image, *off, &[i as u8; 512]).unwrap();
    }
    assert!(image.cache_bytes() <= 160 << 10, "{}", image.cache_bytes());
    for (i, off) in places.iter().enumerate() {
        assert_eq!(read(&image, *off, 512).unwrap(), [i as u8; 512]);
    }
    image.close().unwrap();
    assert!(image.check().unwrap().errors.is_empty());
}

/// An image of 8 TiB with an L2 cache of 1 MiB, which holds the tables of 8 GiB: small writes all over
/// it, several to a cluster, overwritten, zeroed and discarded.
#[test]
fn a_small_cache_serves_a_large_disk() {
    let (seed, until) = seed_and_time(std::time::Duration::from_secs(3));
    let mut n = 0;
    while n < 1 || std::time::Instant::now() < until {
        let mut rng = Rng::new(seed + n);
        let cluster = [512, 4096, 65536][rng.below(3) as usize];
        // 512-byte clusters reach 128 GiB at most (L1 of 32 MiB).
        let size: u64 = if cluster == 512 { 128 << 30 } else { 8 << 40 };
        let options = CreateOptions { size, cluster_size: cluster, ..base() };
        let say = format!("SEED={} {options:?}", seed + n);
        let disk = fresh(&options);
        let sizes = Options { l2_cache_size: Some(1 << 20), ..Options::default() };
        let image = open_image(&disk, None, sizes).expect("open");
        let mut model: std::collections::BTreeMap<u64, u8> = Default::default();
        let mut sectors: Vec<u64> = (0..600).map(|_| rng.below(size / 512)).collect();
        for i in 0..3000u64 {
            let near = rng.below(sectors.len() as u64) as usize;
            let s = match rng.below(4) {
                0 if cluster * sectors.len() as u64 <= 256 << 20 => {
                    sectors.push(rng.below(size / 512));
                    sectors[sectors.len() - 1]
                }
                1 => (sectors[near] + rng.below(8)).min(size / 512 - 1),
                _ => sectors[near],
            };
            let whole = s * 512 / cluster * cluster;
            match rng.below(10) {
                0 => {
                    image.zero(s * 512, 512, Flags::MAY_UNMAP).expect("zero");
                    model.insert(s, 0);
                }
                1 => {
                    image.discard(whole, cluster.min(size - whole)).expect("discard");
                    let gone: Vec<u64> =
                        model.range(whole / 512..(whole + cluster) / 512).map(|(s, _)| *s).collect();
                    gone.iter().for_each(|s| _ = model.insert(*s, 0));
                }
                2..5 => {
                    let got = read(&image, s * 512, 512).expect("read");
                    let want = model.get(&s).copied().unwrap_or(0);
                    assert!(got.iter().all(|b| *b == want), "{say}: sector {s}");
                }
                _ => {
                    write(&image, s * 512, &[i as u8 | 1; 512]).expect("write");
                    model.insert(s, i as u8 | 1);
                }
            }
            if i % 512 == 0 {
                // Dirty pages are kept beyond that until they are written: not many.
                assert!(image.cache_bytes() <= 3 << 20, "{say}: {} bytes", image.cache_bytes());
            }
        }
        image.close().expect("close");
        drop(image);
        let image = open_image(&disk, None, Options::default()).expect("open");
        for (s, want) in &model {
            let got = read(&image, s * 512, 512).expect("read");
            assert!(got.iter().all(|b| b == want), "{say}: sector {s} at the end");
        }
        let report = image.check().expect("check");
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "{say}: {report:?}");
        if have_qemu() {
            let dir = Dir::new("large");
            let path = dir.save("image.qcow2", &disk);
            qemu_check(&path, false);
            let samples: Vec<String> =
                model.iter().take(100).map(|(s, want)| format!("read -P {want} {} 512", s * 512)).collect();
            let mut args: Vec<&str> = samples.iter().flat_map(|s| ["-c", s.as_str()]).collect();
            args.push(path.to_str().unwrap());
            let text = qemu("qemu-io", &args);
            assert!(!text.contains("Pattern verification failed"), "{say}: {text}");
        }
        n += 1;
    }
    eprintln!("{n} disks");
}

/// Pages go when nobody used them for an interval, whether or not anything is written.
#[test]
fn caches_shrink_when_idle() {
    let disk = fresh(&CreateOptions { size: 100 << 30, ..base() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    (0..300).for_each(|i| write(&image, i * (300 << 20), &[1; 512]).unwrap());
    image.flush().unwrap();
    drop(image);
    for read_only in [false, true] {
        let options = |interval| Options { read_only, cache_clean_interval: interval, ..Options::default() };
        let image = open_image(&disk, None, options(None)).unwrap();
        (0..300).for_each(|i| _ = read(&image, i * (300 << 20), 512).unwrap());
        let full = image.cache_bytes();
        assert!(full >= 300 * 4096, "{full}");
        // QEMU's default.
        let minutes = |n: u64| std::time::Instant::now() + std::time::Duration::from_secs(n * 60);
        assert!(image.tidy(minutes(9)).is_some_and(|next| next < minutes(10)));
        assert_eq!(image.cache_bytes(), full, "too early");
        image.tidy(minutes(11));
        read(&image, 0, 512).unwrap();
        image.tidy(minutes(22));
        assert!(
            (4096..=2 * 4096).contains(&image.cache_bytes()),
            "one page was used: {}",
            image.cache_bytes()
        );
        image.tidy(minutes(33));
        assert_eq!(image.cache_bytes(), 0);
        assert_eq!(read(&image, 0, 512).unwrap(), [1; 512]);
        let image = open_image(&disk, None, options(Some(0))).unwrap();
        read(&image, 0, 512).unwrap();
        assert_eq!(image.tidy(minutes(1000)), None);
        assert!(image.cache_bytes() > 0);
    }
}

/// The cache options: what QEMU refuses is refused, in its words.
#[test]
fn cache_options_are_qemus() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("cache-options");
    let disk = fresh(&CreateOptions { size: 1 << 30, ..base() });
    let path = dir.save("image.qcow2", &disk);
    let word = |name: &str, n: Option<u64>| n.map_or(String::new(), |n| format!(",{name}={n}"));
    let some = [None, Some(0), Some(64 << 10), Some(1 << 20), Some(1 << 50)];
    let entries = [None, Some(256), Some(512), Some(3000), Some(65536), Some(1 << 17)];
    let mut cases: Vec<[Option<u64>; 5]> = Vec::new();
    for all in some {
        for l2 in some {
            cases.extend(some.map(|refs| [all, l2, refs, None, None]));
        }
    }
    cases.extend(entries.map(|e| [Some(1), Some(2), None, e, None]));
    cases.extend(entries.map(|e| [None, None, None, e, None]));
    cases.extend([0, 5, u64::from(u32::MAX), 1 << 32].map(|i| [None, None, None, None, Some(i)]));
    for [all, l2, refs, entry, interval] in cases {
        let image = format!(
            "driver=qcow2,file.filename={}{}{}{}{}{}",
            path.to_str().unwrap(),
            word("cache-size", all),
            word("l2-cache-size", l2),
            word("refcount-cache-size", refs),
            word("l2-cache-entry-size", entry),
            word("cache-clean-interval", interval),
        );
        let (_, text) = tool("qemu-io", &["--image-opts", "-c", "quit", &image]);
        if text.contains("allocate") {
            // It takes the memory at once.
            continue;
        }
        let theirs = text.trim();
        let options = Options {
            cache_size: all,
            l2_cache_size: l2,
            refcount_cache_size: refs,
            l2_cache_entry_size: entry,
            cache_clean_interval: interval,
            ..Options::default()
        };
        let ours = open_image(&disk, None, options).err().map(|e| e.to_string());
        match ours {
            Some(ours) => assert!(theirs.ends_with(&ours), "{image}: {ours:?} but {theirs:?}"),
            None => assert_eq!(theirs, "", "{image}: we take it"),
        }
    }
}

fn overwrite(disk: &Disk, at: usize, bytes: &[u8]) {
    disk.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Guest data never go where metadata are, whatever an L2 entry says.
#[test]
fn metadata_are_not_overwritten_by_the_guest() {
    // Header, refcount table, refcount block, L1 table, L2 table.
    for victim in [0u64, 1, 2, 3, 4] {
        let disk = fresh(&base());
        let image = open_image(&disk, None, Options::default()).unwrap();
        write(&image, 0, &[1; 512]).unwrap();
        image.close().unwrap();
        let l2 = 4usize << 16;
        let entry = (victim << 16 | 1 << 63).to_be_bytes();
        overwrite(&disk, l2 + 8, &entry);
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = told.clone();
        let options = Options {
            on_corrupt: Some(Box::new(move |c| tell.lock().unwrap().push(c.clone()))),
            ..Options::default()
        };
        let image = open_image(&disk, None, options).unwrap();
        let before = disk.copy();
        let result = write(&image, 65536, &[0xee; 512]);
        if victim == 0 {
            // No offset at all: the cluster is simply not allocated.
            result.unwrap();
            continue;
        }
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO), "cluster {victim}");
        assert!(write(&image, 0, &[2; 512]).is_err(), "nothing is written any more");
        let what = ["qcow2_header", "refcount table", "refcount block", "active L1 table", "active L2 table"];
        let said = Corruption {
            msg: format!("Preventing invalid write on metadata (overlaps with {})", what[victim as usize]),
            at: Some((victim << 16, 512)),
            fatal: true,
        };
        assert_eq!(*told.lock().unwrap(), [said]);
        let mut after = disk.copy();
        assert_eq!(after[79] & 2, 2, "the corrupt bit");
        after[79] &= !2;
        assert!(after == before, "nothing else was written");
        assert_eq!(read(&image, 0, 512).unwrap(), [1; 512], "reading goes on");
        drop(image);
        let error = open_image(&disk, None, Options::default()).err().unwrap();
        assert_eq!(error.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
        let options = Options { read_only: true, ..Options::default() };
        assert_eq!(read(&open_image(&disk, None, options).unwrap(), 0, 512).unwrap(), [1; 512]);
    }
}

#[test]
fn tables_in_one_place_are_refused() {
    let disk = fresh(&CreateOptions { size: 2 << 30, ..base() });
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 512]).unwrap();
    image.close().unwrap();
    let l1 = 3usize << 16;
    let first = disk.copy()[l1..l1 + 8].to_vec();
    overwrite(&disk, l1 + 8, &first);
    let error = open_image(&disk, None, Options::default()).err().unwrap();
    assert!(error.to_string().contains("metadata overlap"), "{error}");
}

/// An image that QEMU left in the middle of lazy refcounts.
#[test]
fn dirty_images_are_repaired_when_they_are_opened_for_writing() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("dirty");
    let path = dir.path("image.qcow2");
    let name = path.to_str().unwrap();
    qemu("qemu-img", &["create", "-f", "qcow2", "-o", "lazy_refcounts=on", name, "64M"]);
    let (_, text) = tool(
        "qemu-io",
        &["-c", "write -P 9 0 3M", "-c", "write -P 8 40M 64k", "-c", "flush", "-c", "abort", name],
    );
    let disk = Disk::new(std::fs::read(&path).unwrap());
    assert_eq!(disk.copy()[79] & 1, 1, "qemu-io did not leave it dirty: {text}");
    let before = disk.copy();
    let image = open_image(&disk, None, Options { read_only: true, ..Options::default() }).unwrap();
    assert!(!image.check().unwrap().errors.is_empty(), "the refcounts are wrong");
    assert_eq!(image.info().dirty, Some(true));
    drop(image);
    assert!(disk.copy() == before, "a read-only open writes nothing");
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(image.info().dirty, Some(false));
    let (_, data) = image.info().specific.unwrap();
    assert_eq!(data["lazy-refcounts"], true, "the feature stays on");
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
    assert!(read(&image, 0, 3 << 20).unwrap().iter().all(|b| *b == 9));
    write(&image, 20 << 20, &[3; 100_000]).unwrap();
    image.close().unwrap();
    let path = dir.save("repaired.qcow2", &disk);
    qemu_check(&path, false);
}

/// A file on the host, as a driver of our own disks would be too large for these.
fn host_disk(path: &std::path::Path) -> Arc<Disk> {
    Disk::new(std::fs::read(path).unwrap())
}

#[test]
fn guest_data_in_an_external_file() {
    if !have_qemu() {
        return;
    }
    for raw in [false, true] {
        let dir = Dir::new("external");
        let (path, data) = (dir.path("image.qcow2"), dir.path("data"));
        let (name, data_name) = (path.to_str().unwrap(), data.to_str().unwrap());
        let options = format!("data_file={data_name},data_file_raw={}", if raw { "on" } else { "off" });
        qemu("qemu-img", &["create", "-f", "qcow2", "-o", &options, name, "4M"]);
        qemu("qemu-io", &["-c", "write -P 5 64k 100k", name]);
        let (disk, outside) = (host_disk(&path), host_disk(&data));
        let open = |with: bool| {
            let data = with.then(|| edge("data-file", node(&outside)));
            open::open(edge("file", node(&disk)), Edge::new("backing", None), data, Options::default())
        };
        let error = open(false).err().unwrap();
        assert_eq!(error.to_string(), "'data-file' is required for this image");
        let image = open(true).unwrap();
        let mut model = vec![0; 4 << 20];
        model[64 << 10..164 << 10].fill(5);
        assert!(read(&image, 0, model.len()).unwrap() == model, "raw={raw}");
        let mut rng = Rng::new(7);
        // Through a node, which writes zeroes where the driver cannot say them.
        let unmap = NodeOptions { unmap: true, ..NodeOptions::default() };
        let image = Node::new("image", Box::new(image), unmap);
        for i in 0..80u64 {
            let long = if i % 4 == 0 { 300_000 } else { 9000 };
            let off = rng.below((4 << 20) - long);
            let len = 1 + rng.below(long) as usize;
            match i % 8 {
                4 => {
                    image.discard(off, len as u64).unwrap();
                    let cluster = if raw { 1 } else { 65536 };
                    let (first, last) =
                        (off.next_multiple_of(cluster), (off + len as u64) / cluster * cluster);
                    if first < last {
                        model[first as usize..last as usize].fill(0);
                    }
                }
                0 => {
                    image.zero(off, len as u64, Flags::MAY_UNMAP).unwrap();
                    model[off as usize..off as usize + len].fill(0);
                }
                _ => {
                    let bytes = vec![i as u8; len];
                    write(&*image.driver, off, &bytes).unwrap();
                    model[off as usize..off as usize + len].copy_from_slice(&bytes);
                }
            }
        }
        image.driver.close().unwrap();
        assert!(read(&*image.driver, 0, model.len()).unwrap() == model, "raw={raw}");
        if raw {
            assert!(outside.copy() == model, "the data file is an image by itself");
        }
        std::fs::write(&path, disk.copy()).unwrap();
        std::fs::write(&data, outside.copy()).unwrap();
        qemu_check(&path, false);
        assert!(qemu_read(&dir, &path) == model, "raw={raw}: qemu-img reads something else");
    }
}

/// The same, made by us.
#[test]
fn our_external_files_are_qemus() {
    if !have_qemu() {
        return;
    }
    for raw in [false, true] {
        let dir = Dir::new("external");
        let (image, outside) = (Disk::new(Vec::new()), Disk::new(Vec::new()));
        let options = CreateOptions {
            size: 2 << 20,
            data_file: Some(dir.path("data").to_str().unwrap().into()),
            data_file_raw: raw,
            ..base()
        };
        let error = create::create(&node(&image), None, &options).unwrap_err();
        assert!(error.to_string().contains("data file"), "{error}");
        create::create(&node(&image), Some(&node(&outside)), &options).unwrap();
        let path = dir.save("image.qcow2", &image);
        let data = dir.save("data", &outside);
        let name = path.to_str().unwrap();
        qemu_check(&path, false);
        qemu("qemu-io", &["-c", "write -P 5 64k 100k", name]);
        let file = std::fs::read(data).unwrap();
        assert_eq!(file.len(), 2 << 20);
        assert!(file[64 << 10..164 << 10].iter().all(|b| *b == 5));
        qemu_check(&path, false);
    }
}

#[test]
fn a_disk_grows_very_large_and_shrinks_again() {
    let disk = fresh(&base());
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 512]).unwrap();
    image.resize(64 << 40).unwrap();
    write(&image, (64 << 40) - 512, &[2; 512]).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open_image(&disk, None, Options::default()).unwrap();
    assert_eq!(image.len(), 64 << 40);
    assert_eq!(read(&image, (64 << 40) - 512, 512).unwrap(), [2; 512]);
    assert_eq!(image.status(1 << 40, 1 << 40).unwrap().kind, ExtentKind::Unallocated);
    image.resize(1 << 20).unwrap();
    image.resize(2 << 20).unwrap();
    assert_eq!(read(&image, 0, 513).unwrap()[511..], [1, 0]);
    image.close().unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
    assert_eq!(image.resize(1000).unwrap_err().to_string(), "The new size must be a multiple of 512");
}

/// Growing with each way of preallocation: where `qemu-img resize` would have put something, there is
/// something, it reads as zeroes, and a write to it allocates nothing.
#[test]
fn new_space_is_allocated_in_advance() {
    use ExtentKind::{Data, Unallocated, Zero};
    let all = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (how, extended, backed) in
        all.into_iter().flat_map(|h| [(h, false, false), (h, true, false), (h, false, true), (h, true, true)])
    {
        let say = format!("{how:?}, extended: {extended}, backed: {backed}");
        let (old, new) = ((1u64 << 20) + 512, 3u64 << 20);
        let disk = fresh(&CreateOptions { size: old, extended_l2: extended, ..base() });
        let backing = backed.then(|| node(&Disk::new(vec![7; 2 << 20])));
        let image = open_image(&disk, backing.clone(), Options::default()).unwrap();
        write(&image, 1000, &[1; 512]).unwrap();
        image.resize_with(new, how).unwrap_or_else(|e| panic!("{say}: {e}"));
        let mut model = vec![if backed { 7 } else { 0 }; old as usize];
        model[1000..1512].fill(1);
        model.resize(new as usize, 0);
        assert!(read(&image, 0, new as usize).unwrap() == model, "{say}");
        let first = old.next_multiple_of(65536);
        let kind = image.status(first, 65536).unwrap().kind;
        match (how, extended) {
            (Preallocation::Off, _) => assert!([Unallocated, Zero].contains(&kind), "{say}: {kind:?}"),
            (_, true) => assert!([Unallocated, Zero].contains(&kind), "{say}: {kind:?}: subclusters are not"),
            _ => assert_eq!(image.status(first, new - first).unwrap().kind, Data, "{say}"),
        }
        image.close().unwrap();
        let len = disk.copy().len();
        if how != Preallocation::Off {
            write(&image, first + 100, &vec![2; (new - first) as usize - 100]).unwrap();
            image.close().unwrap();
            assert_eq!(disk.copy().len(), len, "{say}: a write allocated something");
        }
        let report = image.check().unwrap();
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "{say}: {report:?}");
        let shorter = image.resize_with(512, how).err().map(|e| e.to_string());
        let wanted =
            (how != Preallocation::Off).then_some("Preallocation can't be used for shrinking an image");
        assert_eq!(shorter.as_deref(), wanted);
    }
}

/// A raw external data file stays good by itself, however it grows; and a failure on the way leaves
/// the disk as it was.
#[test]
fn external_data_files_grow_with_the_disk() {
    for raw in [false, true] {
        let (disk, outside) = (Disk::new(Vec::new()), Disk::new(Vec::new()));
        let options =
            CreateOptions { size: 1 << 20, data_file: Some("d".into()), data_file_raw: raw, ..base() };
        create::create(&node(&disk), Some(&node(&outside)), &options).unwrap();
        // Longer than the disk, with something behind its end.
        outside.bytes.lock().unwrap().resize((1 << 20) + 5000, 9);
        let data = edge("data-file", node(&outside));
        let image =
            open::open(edge("file", node(&disk)), Edge::new("backing", None), Some(data), Options::default())
                .unwrap();
        image.resize(2 << 20).unwrap();
        assert!(read(&image, 0, 2 << 20).unwrap().iter().all(|b| *b == 0), "raw: {raw}");
        if raw {
            assert!(outside.copy().iter().all(|b| *b == 0), "the data file says something else");
            assert_eq!(outside.copy().len(), 2 << 20);
        }
        image.resize_with(3 << 20, Preallocation::Full).unwrap();
        assert_eq!(image.status(2 << 20, 1 << 20).unwrap().len, 1 << 20);
        image.resize(1 << 20).unwrap();
        assert_eq!(outside.copy().len(), 1 << 20);
        image.close().unwrap();
        let report = image.check().unwrap();
        assert_eq!((report.errors.len(), report.leaks), (0, 0), "raw: {raw}: {report:?}");
    }
    let disk = fresh(&base());
    let image = open_image(&disk, None, Options::default()).unwrap();
    disk.most.store(20 << 20, Ordering::SeqCst);
    assert!(image.resize_with(64 << 20, Preallocation::Full).is_err());
    assert_eq!(image.len(), 8 << 20);
    image.close().unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.errors.len(), report.leaks), (0, 0), "{report:?}");
    image.resize(64 << 20).unwrap();
    assert!(read(&image, 8 << 20, 56 << 20).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn snapshots_are_listed_as_they_were_taken() {
    let disk = fresh(&base());
    let image = open_image(&disk, None, Options::default()).unwrap();
    let inside = image.internal().unwrap();
    let snapshot = |name: &str| Snapshot {
        name: name.into(),
        date_sec: 1_700_000_000,
        date_nsec: 5,
        vm_clock_nsec: 1_500_000_000,
        ..Snapshot::default()
    };
    inside.create_snapshot(snapshot("one")).unwrap();
    inside.create_snapshot(snapshot("two")).unwrap();
    let gone = inside.delete_snapshot(Some("1"), Some("one")).unwrap();
    assert_eq!((gone.name.as_str(), gone.disk_size), ("one", 8 << 20));
    inside.create_snapshot(snapshot("three")).unwrap();
    let ids: Vec<_> = inside.snapshots().unwrap().into_iter().map(|s| (s.id, s.name)).collect();
    assert_eq!(ids, [("2".into(), "two".into()), ("3".into(), String::from("three"))]);
    let missing = inside.delete_snapshot(Some("2"), Some("three")).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
    image.close().unwrap();
    if have_qemu() {
        let dir = Dir::new("list");
        let path = dir.save("image.qcow2", &disk);
        let text = qemu("qemu-img", &["snapshot", "-l", path.to_str().unwrap()]);
        assert!(text.contains("two") && text.contains("00:00:01.500"), "{text}");
        qemu_check(&path, false);
    }
}

/// While a flush is on its way, others share it: no more syncs than one or two flushes need.
#[test]
fn flushes_of_several_threads_are_shared() {
    let disk = fresh(&base());
    let image = open_image(&disk, None, Options::default()).unwrap();
    write(&image, 0, &[1; 4096]).unwrap();
    image.flush().unwrap();
    disk.jitter.store(20_000, Ordering::SeqCst);
    let done = Mutex::new(0);
    let n = syncs(&disk, || {
        std::thread::scope(|s| {
            for t in 0..16 {
                let (image, done) = (&image, &done);
                s.spawn(move || {
                    write(image, t * 4096, &[2; 4096]).unwrap();
                    image.flush().unwrap();
                    *done.lock().unwrap() += 1;
                });
            }
        });
    });
    assert_eq!(*done.lock().unwrap(), 16);
    assert!(n < 16, "{n} syncs for 16 flushes");
}

/// Through the front door: a chain of files, named as images name them.
#[test]
fn chains_open_by_their_recorded_names() {
    use minivmm::block::graph::Graph;
    use minivmm::control::formats::{BlockdevOptions, Formats, plan};
    use minivmm::qapi::{Path, Wire};
    use serde_json::json;
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("chain");
    let path = |name: &str| dir.path(name).to_str().unwrap().to_string();
    let mut model: Vec<u8> = (0..(1u32 << 20) + 512).map(|i| (i >> 8) as u8 | 1).collect();
    std::fs::write(path("base.raw"), &model).unwrap();
    let create = |name: &str, backing: &str, format: &str, size: &str| {
        let name = path(name);
        qemu("qemu-img", &["create", "-f", "qcow2", "-u", "-b", backing, "-F", format, &name, size]);
    };
    create("mid.qcow2", "base.raw", "raw", "2M");
    create("top.qcow2", "mid.qcow2", "qcow2", "3M");
    qemu("qemu-io", &["-c", "write -P 66 100k 10k", &path("mid.qcow2")]);
    model.resize(3 << 20, 0);
    model[100 << 10..110 << 10].fill(66);
    let mut fds = minivmm::sys::fdset::FdSets::new();
    let open = |graph: &mut Graph, fds: &mut minivmm::sys::fdset::FdSets, read_only: bool| {
        let options = json!({"driver": "qcow2", "node-name": "top", "read-only": read_only,
            "file": {"driver": "file", "filename": path("top.qcow2")}});
        let options = BlockdevOptions::take(options, &Path::Root).unwrap();
        minivmm::block::open::add(graph, &Formats::new(fds, &Default::default()), plan(options).unwrap())
    };
    let mut graph = Graph::new();
    let node = open(&mut graph, &mut fds, false).unwrap();
    let whole = |node: &Node| {
        let mut buf = vec![0xaa; 3 << 20];
        node.read(0, &mut minivmm::sys::iov::IovMut::from_slice(&mut buf)).unwrap();
        buf
    };
    assert!(whole(&node) == model);
    let put = |off: u64, data: &[u8]| {
        node.write(off, &minivmm::sys::iov::Iov::from_slice(data), Flags::NONE).unwrap();
    };
    put(104 << 10, &[77; 3000]);
    model[104 << 10..(104 << 10) + 3000].fill(77);
    node.zero(1 << 20, 70_000, Flags::MAY_UNMAP).unwrap();
    model[1 << 20..(1 << 20) + 70_000].fill(0);
    assert!(whole(&node) == model);
    let (code, text) = tool("qemu-io", &["-c", "write 0 512", &path("top.qcow2")]);
    assert!(code != 0 && text.contains("lock"), "it is locked: {text}");
    node.flush().unwrap();
    drop(node);
    drop(graph);
    let top = dir.path("top.qcow2");
    qemu_check(&top, true);
    assert!(qemu_read(&dir, &top) == model);
    let before = std::fs::read(&top).unwrap();
    let mut graph = Graph::new();
    let node = open(&mut graph, &mut fds, true).unwrap();
    assert!(whole(&node) == model);
    assert!(node.write(0, &minivmm::sys::iov::Iov::from_slice(&[1]), Flags::NONE).is_err());
    drop(graph);
    drop(node);
    assert!(std::fs::read(&top).unwrap() == before);
}

/// What an image names as its data file is the name of a file, nothing else; and it takes a config to
/// have another one, or none for an image that needs none.
#[test]
fn a_data_file_is_a_plain_file() {
    use minivmm::block::graph::Graph;
    use minivmm::control::formats::{BlockdevOptions, Formats, plan};
    use minivmm::qapi::{Path, Wire};
    use serde_json::json;
    let dir = Dir::new("data-file-name");
    let own = dir.path("data").to_str().unwrap().to_string();
    let names = [
        own.clone(),
        format!("file:{own}"),
        "json:{\"driver\":\"null-co\",\"size\":8388608}".into(),
        "nbd://localhost/".into(),
        "/dev/fdset/7".into(),
        "/dev".into(),
        String::new(),
    ];
    for name in names {
        let options = CreateOptions { data_file: Some(name.clone()), ..base() };
        let (disk, outside) = fresh_pair(&options);
        let path = dir.save("image.qcow2", &disk);
        std::fs::write(&own, outside.unwrap().copy()).unwrap();
        let open = |with: Option<&str>| {
            let mut fds = minivmm::sys::fdset::FdSets::new();
            let mut graph = Graph::new();
            let mut options = json!({"driver": "qcow2", "node-name": "top",
                "file": {"driver": "file", "filename": path.to_str().unwrap()}});
            if let Some(file) = with {
                options["data-file"] = json!({"driver": "file", "filename": file});
            }
            let options = BlockdevOptions::take(options, &Path::Root).unwrap();
            let objects = Default::default();
            let node = minivmm::block::open::add(
                &mut graph,
                &Formats::new(&mut fds, &objects),
                plan(options).unwrap(),
            );
            node.map(drop).map_err(|e| e.to_string())
        };
        let done = open(None);
        assert_eq!(done.is_ok(), name == own, "{name}: {done:?}");
        open(Some(&own)).unwrap_or_else(|e| panic!("the config's own instead of '{name}': {e}"));
        if name.starts_with("json") && have_qemu() {
            let (_, theirs) = tool("qemu-io", &["-c", "quit", path.to_str().unwrap()]);
            assert!(theirs.trim().ends_with(&done.unwrap_err()), "{theirs}");
        }
    }
    // Not needed, not taken.
    let path = dir.save("plain.qcow2", &fresh(&base()));
    let mut fds = minivmm::sys::fdset::FdSets::new();
    let options = json!({"driver": "qcow2", "node-name": "top", "data-file": {"driver": "file", "filename": own},
        "file": {"driver": "file", "filename": path.to_str().unwrap()}});
    let plan = plan(BlockdevOptions::take(options, &Path::Root).unwrap()).unwrap();
    let e = minivmm::block::open::add(&mut Graph::new(), &Formats::new(&mut fds, &Default::default()), plan);
    let text = "'data-file' can only be set for images with an external data file";
    assert_eq!(e.map(drop).unwrap_err().to_string(), text);
}

/// A backing chain that comes back to itself, and one without an end, are refused in bounded time.
#[test]
fn chains_end() {
    use minivmm::block::graph::Graph;
    use minivmm::control::formats::{BlockdevOptions, Formats, plan};
    use minivmm::qapi::{Path, Wire};
    use serde_json::json;
    let dir = Dir::new("chain-loop");
    let image = |name: &str, backing: &str| {
        let options = CreateOptions {
            backing_file: Some(backing.into()),
            backing_format: Some("qcow2".into()),
            ..base()
        };
        dir.save(name, &fresh(&options))
    };
    let open = |name: &str| {
        let mut fds = minivmm::sys::fdset::FdSets::new();
        let file = dir.path(name);
        let options = json!({"driver": "qcow2", "node-name": "top",
            "file": {"driver": "file", "filename": file.to_str().unwrap()}});
        let plan = plan(BlockdevOptions::take(options, &Path::Root).unwrap()).unwrap();
        let done =
            minivmm::block::open::add(&mut Graph::new(), &Formats::new(&mut fds, &Default::default()), plan);
        done.map(drop).map_err(|e| e.to_string())
    };
    image("self", "self");
    image("a", "b");
    image("b", "sub/../c");
    image("c", "a");
    for name in ["self", "a"] {
        let e = open(name).err();
        assert!(e.as_ref().is_some_and(|e| e.contains("loop") || e.contains("lock")), "{name}: {e:?}");
    }
    (0..300).for_each(|n| drop(image(&format!("n{n}"), &format!("n{}", n + 1))));
    // With as much stack as the control thread has; test threads have less.
    let e = std::thread::scope(|s| {
        let deep = std::thread::Builder::new().stack_size(8 << 20);
        deep.spawn_scoped(s, || open("n0").unwrap_err()).unwrap().join().unwrap()
    });
    assert!(e.contains("longer than") || e.contains("deep"), "{e}");
}

/// Clusters smaller than the blocks of a disk that bypasses the page cache: several threads
/// change different clusters of one block.
#[test]
fn small_clusters_on_a_direct_file() {
    use minivmm::block::graph::Graph;
    use minivmm::control::formats::{BlockdevOptions, Formats, plan};
    use minivmm::qapi::{Path, Wire};
    use minivmm::sys::iov::{Iov, IovMut};
    use serde_json::json;
    let dir = Dir::new("direct");
    let path = dir.path("image.qcow2");
    let options = CreateOptions { size: 1 << 20, cluster_size: 512, ..base() };
    let disk = fresh(&options);
    dir.save("image.qcow2", &disk);
    let options = json!({"driver": "qcow2", "node-name": "top", "discard": "unmap",
        "file": {"driver": "file", "filename": path.to_str().unwrap(), "cache": {"direct": true}}});
    let mut fds = minivmm::sys::fdset::FdSets::new();
    let mut graph = Graph::new();
    let options = BlockdevOptions::take(options, &Path::Root).unwrap();
    let node = match minivmm::block::open::add(
        &mut graph,
        &Formats::new(&mut fds, &Default::default()),
        plan(options).unwrap(),
    ) {
        Ok(node) => node,
        Err(e) if e.to_string().contains("O_DIRECT") => return eprintln!("skipped: {e}"),
        Err(e) => panic!("{e}"),
    };
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let node = &node;
            s.spawn(move || {
                let mut rng = Rng::new(t + 1);
                let mut last = [0u8; 250];
                for _ in 0..250 {
                    let slot = rng.below(250);
                    let off = (slot * 4 + t) * 1000;
                    if rng.one_in(3) {
                        let mut buf = vec![0xaa; 1000];
                        node.read(off, &mut IovMut::from_slice(&mut buf)).unwrap();
                        assert!(buf.iter().all(|b| *b == last[slot as usize]), "slot {slot} of {t}");
                    } else {
                        last[slot as usize] = rng.draw() as u8;
                        let data = [last[slot as usize]; 1000];
                        node.write(off, &Iov::from_slice(&data), Flags::NONE).unwrap();
                    }
                    if rng.one_in(40) {
                        node.flush().unwrap();
                    }
                }
            });
        }
    });
    node.driver.close().unwrap();
    drop(node);
    drop(graph);
    if have_qemu() {
        qemu_check(&path, false);
    }
}
