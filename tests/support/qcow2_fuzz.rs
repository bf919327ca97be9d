//! Fuzz targets of the qcow2 driver: each takes any bytes, writes them over one kind of metadata
//! of a small valid image, and opens, reads, writes and closes what came of it.
//!
//! Every input is fine as long as nothing panics, hangs, takes much memory, or breaks a promise: a
//! read-only open writes nothing; an image whose metadata check clean keeps what is written to it
//! and still checks clean afterwards. libFuzzer calls [`any`] (`just fuzz`), `tests/qcow2_fuzz.rs`
//! calls the targets with random inputs.
//!
//! Input: which base image, how it is opened, then patches: kind, place (two bytes), value. What
//! is done with the image follows from the input, too.

use super::support::*;
use minivmm::block::bitmap::Bitmap;
use minivmm::block::driver::{Driver, Flags, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::qcow2::Qcow2;
use minivmm::qcow2::create::{self, CreateOptions};
use minivmm::qcow2::header::Compression;
use minivmm::qcow2::open::{self, Options};
use minivmm::sys::iov::Iov;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

/// What a target writes over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Area {
    Header,
    L1,
    L2,
    Reftable,
    Refblock,
    Snapshots,
    Bitmaps,
}

/// One for each kind of metadata.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("header", header),
    ("l1", l1),
    ("l2", l2),
    ("reftable", reftable),
    ("refblock", refblock),
    ("snapshots", snapshots),
    ("bitmaps", bitmaps),
];

pub fn header(input: &[u8]) {
    run(Area::Header, input);
}
pub fn l1(input: &[u8]) {
    run(Area::L1, input);
}
pub fn l2(input: &[u8]) {
    run(Area::L2, input);
}
pub fn reftable(input: &[u8]) {
    run(Area::Reftable, input);
}
pub fn refblock(input: &[u8]) {
    run(Area::Refblock, input);
}
pub fn snapshots(input: &[u8]) {
    run(Area::Snapshots, input);
}
pub fn bitmaps(input: &[u8]) {
    run(Area::Bitmaps, input);
}

/// The first byte says which target gets the rest.
pub fn any(input: &[u8]) {
    if let Some((which, rest)) = input.split_first() {
        TARGETS[usize::from(*which) % TARGETS.len()].1(rest);
    }
}

/// Most bytes that a file may grow to.
const MOST: u64 = 16 << 20;
/// How much of the disk's beginning is held against a model.
const WINDOW: u64 = 256 << 10;

struct Base {
    bytes: Vec<u8>,
    cluster: u64,
    backing: Option<Vec<u8>>,
    data: Option<Vec<u8>>,
}

/// A single area.
fn one(at: u64, len: u64) -> Vec<std::ops::Range<u64>> {
    std::iter::once(at..at + len).collect()
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Base {
    /// Where the metadata of that kind are.
    fn area(&self, area: Area) -> Vec<std::ops::Range<u64>> {
        let b = &self.bytes;
        let table = |at: u64, entries: u64| -> Vec<u64> {
            (0..entries).map(|i| word(b, at + i * 8) & 0x00ff_ffff_ffff_fe00).filter(|o| *o != 0).collect()
        };
        let (l1, l1_size) = (word(b, 40), word(b, 32) & 0xffff_ffff);
        let (reftable, clusters) = (word(b, 48), word(b, 56) >> 32);
        let (snapshots, count) = (word(b, 64), word(b, 56) & 0xffff_ffff);
        let whole = |list: Vec<u64>| list.into_iter().map(|o| o..o + self.cluster).collect();
        match area {
            Area::Header => one(0, self.cluster.min(600)),
            Area::L1 => one(l1, l1_size * 8),
            Area::L2 => whole(table(l1, l1_size)),
            Area::Reftable => one(reftable, 64.min(clusters * self.cluster)),
            Area::Refblock => whole(table(reftable, clusters * self.cluster / 8)),
            Area::Snapshots if count > 0 => {
                let first = word(b, snapshots);
                vec![snapshots..snapshots + 160, first..first + 16]
            }
            Area::Snapshots => one(56, 16),
            Area::Bitmaps => self.bitmaps(),
        }
    }
}

impl Base {
    /// The extension, the directory, the tables; without bitmaps what could be the extension.
    fn bitmaps(&self) -> Vec<std::ops::Range<u64>> {
        let b = &self.bytes;
        let kind = 0x2385_2875_0000_0018u64.to_be_bytes();
        let Some(at) = b[..600.min(b.len())].windows(8).position(|w| w == kind) else { return one(72, 128) };
        let at = at as u64;
        let (size, offset) = (word(b, at + 16), word(b, at + 24));
        let mut areas = vec![at..at + 32, offset..offset + size];
        let mut entry = offset;
        while entry < offset + size {
            let (table, count) = (word(b, entry), word(b, entry + 8) >> 32);
            areas.push(table..table + count * 8);
            let (name, extra) = (word(b, entry + 16) >> 32 & 0xffff, word(b, entry + 16) & 0xffff_ffff);
            entry += (24 + name + extra).next_multiple_of(8);
        }
        areas
    }
}

fn base(options: CreateOptions, snapshots: bool, backed: bool) -> Base {
    let disk = Disk::new(Vec::new());
    let data = options.data_file.is_some().then(|| Disk::new(Vec::new()));
    create::create(&node(&disk), data.as_ref().map(node).as_ref(), &options).expect("create");
    let backing = backed.then(|| (0..WINDOW / 2).map(|i| (i / 300) as u8 | 1).collect::<Vec<u8>>());
    let under = backing.as_ref().map(|b| node(&Disk::new(b.clone())));
    let outside = data.as_ref().map(|d| edge("data-file", node(d)));
    let image =
        open::open(edge("file", node(&disk)), Edge::new("backing", under), outside, Options::default())
            .expect("open");
    let cluster = options.cluster_size;
    for n in 0..6u64 {
        let byte = n as u8 + 1;
        write(&image, n * 3 * cluster + 100, &vec![byte; cluster as usize + 700]).expect("write");
    }
    let pressed = vec![0x33; cluster as usize];
    image.write(30 * cluster, &Iov::from_slice(&pressed), Flags::COMPRESSED).expect("compressed");
    image.write(31 * cluster, &Iov::from_slice(&pressed), Flags::COMPRESSED).expect("compressed");
    if options.version > 2 && data.is_none() {
        image.zero(4 * cluster, 2 * cluster, Flags::NONE).expect("zero");
        image.zero(24 * cluster, cluster, Flags::MAY_UNMAP).expect("zero");
    }
    if snapshots {
        let inside = image.internal().unwrap();
        let snapshot = |name: &str| Snapshot { name: name.into(), ..Snapshot::default() };
        inside.create_snapshot(snapshot("one")).expect("snapshot");
        write(&image, 0, &vec![0x44; 2 * cluster as usize]).expect("write");
        inside.create_snapshot(snapshot("two")).expect("snapshot");
        write(&image, 3 * cluster, &[0x55; 100]).expect("write");
    }
    let disk_node = Node::new("disk", Box::new(image), NodeOptions::default());
    if options.version > 2 && options.cluster_size < 8192 {
        for (name, granularity) in [("a", 512), ("bb", 65536)] {
            let bitmap = disk_node.add_bitmap(Some(name), granularity).expect("bitmap");
            bitmap.set_persistent(true);
            bitmap.mark(0, 3 * cluster);
        }
    }
    disk_node.driver.close().expect("close");
    Base { bytes: disk.copy(), cluster, backing, data: data.map(|d| d.copy()) }
}

/// The images that are spoilt.
fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(|| {
        let o = |bits: u32, refcount_bits: u32| CreateOptions {
            // Some clusters of the last table are beyond the end.
            size: (3 << (2 * bits - 5)).clamp(96 << bits, 20 << 20) + 512,
            cluster_size: 1 << bits,
            refcount_bits,
            ..CreateOptions::default()
        };
        vec![
            base(o(9, 16), true, false),
            base(o(12, 16), true, true),
            base(CreateOptions { version: 2, ..o(9, 16) }, true, true),
            base(CreateOptions { extended_l2: true, ..o(14, 16) }, true, true),
            base(CreateOptions { compression: Compression::Zstd, ..o(10, 64) }, true, false),
            base(CreateOptions { lazy_refcounts: true, ..o(9, 1) }, false, false),
            base(CreateOptions { backing_file: Some("b".into()), ..o(10, 4) }, true, true),
            base(CreateOptions { data_file: Some("d".into()), ..o(12, 16) }, false, false),
        ]
    })
}

/// Writes what `rest` says over the image.
fn patch(base: &Base, area: Area, mut rest: &[u8]) -> Vec<u8> {
    let mut bytes = base.bytes.clone();
    let areas = base.area(area);
    let total: u64 = areas.iter().map(|r| r.end - r.start).sum();
    while let [kind, high, low, tail @ ..] = rest {
        let place = u64::from(*high) << 8 | u64::from(*low);
        let mut at = match kind & 0x80 {
            0 => place % total,
            // Anywhere.
            _ => place * 8 % bytes.len() as u64,
        };
        if kind & 0x80 == 0 {
            for r in &areas {
                let len = r.end - r.start;
                if at < len {
                    at += r.start;
                    break;
                }
                at -= len;
            }
        }
        let wants = [1, 1, 4, 8, 3, 0][usize::from(kind & 0x7f) % 6];
        let (value, tail) = tail.split_at(wants.min(tail.len()));
        let mut value = value.to_vec();
        value.resize(wants, 0);
        rest = tail;
        match usize::from(kind & 0x7f) % 6 {
            1 => value[0] ^= bytes.get(at as usize).copied().unwrap_or(0),
            4 => {
                // A pointer: flags, cluster.
                let cluster = u64::from(value[1]) << 8 | u64::from(value[2]);
                let flags = u64::from(value[0] & 0xc0) << 56 | u64::from(value[0] & 1);
                value = ((cluster % 600 * base.cluster) | flags).to_be_bytes().to_vec();
                at &= !7;
            }
            5 if bytes.len() > 1024 => {
                bytes.truncate((place as usize * 8).clamp(1024, bytes.len()));
                continue;
            }
            _ => {}
        }
        let end = (at as usize + value.len()).min(bytes.len());
        if (at as usize) < end {
            let n = end - at as usize;
            bytes[at as usize..end].copy_from_slice(&value[..n]);
        }
    }
    bytes
}

fn run(area: Area, input: &[u8]) {
    let [which, how, rest @ ..] = input else { return };
    let base = &bases()[usize::from(*which) % bases().len()];
    let disk = Disk::new(patch(base, area, rest));
    disk.most.store(MOST, Ordering::Relaxed);
    // What is done follows from the input.
    let seed =
        input.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = Rng::new(seed);
    let read_only = how & 1 != 0;
    let before = read_only.then(|| disk.copy());
    let Ok(image) = open_patched(base, &disk, *how) else { return };
    play(&image, &mut rng);
    if how & 8 == 0 {
        drop(image.close());
    }
    drop(image);
    if let Some(before) = before {
        assert!(*disk.bytes.lock().unwrap() == before, "a read-only open wrote");
    }
    // As it was left, perhaps without having been closed.
    if let Ok(image) = open_patched(base, &disk, how & !1) {
        play(&image, &mut rng);
        drop(image.close());
    }
}

fn open_patched(base: &Base, disk: &Arc<Disk>, how: u8) -> io::Result<Qcow2> {
    let file = node(disk);
    let asks = open::read_header(&file)?.needs_data_file();
    let data = (asks || how & 16 != 0).then(|| {
        let outside = Disk::new(base.data.clone().unwrap_or_default());
        outside.most.store(MOST, Ordering::Relaxed);
        edge("data-file", node(&outside))
    });
    let backing = base.backing.as_ref().map(|b| {
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        Node::new("backing", Box::new(OnDisk(Disk::new(b.clone()))), options)
    });
    let small = how & 2 != 0;
    let options = Options {
        read_only: how & 1 != 0,
        l2_cache_size: small.then_some(512),
        refcount_cache_size: small.then_some(512),
        ..Options::default()
    };
    open::open(edge("file", file), Edge::new("backing", backing), data, options)
}

/// What can be done with bitmaps. They do not change the disk.
fn mark(image: &Qcow2, rng: &mut Rng) {
    let (Some(list), Some(stored)) = (image.bitmaps(), image.stored_bitmaps()) else { return };
    for bitmap in list.all() {
        match rng.below(6) {
            0 => {
                drop(stored.remove_stored(bitmap.name().unwrap_or_default()));
                list.remove(&bitmap);
            }
            1..4 => bitmap.mark(rng.below(image.len().max(1)), 70_000),
            _ => {}
        }
    }
    let granularity = 512u32 << rng.below(6);
    if rng.one_in(2)
        && stored.can_store("new", granularity.into()).is_ok()
        && let Ok(bitmap) = Bitmap::new(Some("new"), granularity, image.len())
    {
        bitmap.set_persistent(true);
        drop(list.push(bitmap));
    }
}

/// Some requests. If all is in order at the beginning, it must be at the end.
fn play(image: &Qcow2, rng: &mut Rng) {
    let clean = image.check().is_ok_and(|r| r.errors.is_empty());
    let window = |image: &Qcow2| read(image, 0, image.len().min(WINDOW) as usize).ok();
    let mut model = if clean { window(image) } else { None };
    if rng.one_in(2) {
        mark(image, rng);
    }
    for step in 0..10u64 {
        let size = image.len();
        if size == 0 {
            break;
        }
        let far = rng.one_in(6);
        let off = if far { rng.below(size) } else { rng.below(size.min(WINDOW)) };
        let len = (1 + rng.below(9000)).min(size - off);
        let part = |m: &Vec<u8>| off.min(m.len() as u64) as usize..(off + len).min(m.len() as u64) as usize;
        let fill = |model: &mut Option<Vec<u8>>, done: io::Result<()>, byte: u8| match (model, done) {
            (Some(m), Ok(())) => {
                let range = part(m);
                m[range].fill(byte);
            }
            // A failed request may have done a part.
            (model, Err(e)) if e.raw_os_error() != Some(libc::ENOTSUP) => *model = None,
            _ => {}
        };
        let byte = step as u8 + 0x60;
        match rng.below(16) {
            0 | 1 => drop(read(image, off, len as usize)),
            2..7 => fill(&mut model, write(image, off, &vec![byte; len as usize]), byte),
            7 => fill(&mut model, image.zero(off, len, Flags::MAY_UNMAP), 0),
            8 => fill(&mut model, image.zero(off, len, Flags::NONE), 0),
            9 => {
                let done = image.discard(off, len);
                model = if done.is_ok() && model.is_some() { window(image) } else { None };
            }
            10 => {
                let data = vec![byte; len as usize];
                fill(&mut model, image.write(off, &Iov::from_slice(&data), Flags::COMPRESSED), byte);
            }
            11 => drop(image.flush()),
            12 => drop(image.status(off, len)),
            13 => {
                let new = (size / 512).saturating_add(rng.below(400)).saturating_sub(rng.below(200)) * 512;
                let done = image.resize(new);
                // As the node does, which is not here.
                image.bitmaps().iter().for_each(|list| list.all().iter().for_each(|b| b.resize(image.len())));
                match (done, &mut model) {
                    (Ok(()), Some(m)) => m.resize(new.min(WINDOW) as usize, 0),
                    (Err(_), m) => *m = None,
                    _ => {}
                }
                // What came into the window from behind it is not known.
                if size > WINDOW && new < WINDOW || new > size && size < WINDOW {
                    model = model.and_then(|_| window(image));
                }
            }
            _ => {
                let inside = image.internal().unwrap();
                let list = inside.snapshots().unwrap_or_default();
                let name = list.first().map(|s| s.name.as_str());
                let before = model.clone();
                let done = match rng.below(3) {
                    0 => inside.create_snapshot(Snapshot { name: "new".into(), ..Snapshot::default() }),
                    1 => inside.delete_snapshot(None, name).map(drop),
                    _ => {
                        model = None;
                        let done = inside.apply_snapshot(None, name);
                        if done.is_err() {
                            model = before;
                        } else if clean {
                            model = window(image);
                        }
                        done
                    }
                };
                if let Err(e) = done
                    && e.raw_os_error() == Some(libc::EIO)
                {
                    model = None;
                }
            }
        }
    }
    if let Some(model) = model {
        let got = window(image).expect("what could be read before");
        assert!(got == model, "an image in order lost what was written to it");
        let report = image.check().expect("what could be checked before");
        assert!(report.errors.is_empty(), "{report:?}");
    }
}
