//! qcow2 against a model in memory and against qemu-img: random operations over all shapes of
//! image, several threads, both ways.
//!
//! `SEED=n` repeats a run, `SOAK=seconds` makes it long.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Driver, Flags};
use minivmm::block::node::{Node, NodeOptions};
use minivmm::qcow2::create::CreateOptions;
use minivmm::qcow2::open::Options;
use std::sync::Arc;
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
        ..CreateOptions::default()
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
fn round(seed: u64, steps: u64, qemu: bool) {
    let mut rng = Rng::new(seed);
    let o = shape(&mut rng);
    let under = rng.one_in(2).then(|| backing(&mut rng, o.size));
    let disk = fresh(&o);
    let say = |what: &str| format!("{what}; SEED={seed} {o:?} backing={}", under.is_some());
    let mut model: Vec<u8> = under.as_ref().map_or(Vec::new(), |b| b.bytes.clone());
    model.resize(o.size as usize, 0);
    let open = |rng: &mut Rng| {
        let node = under.as_ref().map(|b| b.node.clone());
        open_image(&disk, node, small_caches(rng)).expect(&say("open"))
    };
    let mut image = open(&mut rng);
    for _ in 0..steps {
        let size = model.len() as u64;
        let most = size.min(if rng.one_in(8) { 1 << 20 } else { 3 * o.cluster_size.max(4096) });
        let unit = if rng.one_in(2) { 512 } else { 1 };
        let (mut off, mut len) = (0, 0);
        if size > 0 {
            off = rng.below(size) / unit * unit;
            len = (1 + rng.below(most)).min(size - off) as usize;
        }
        let part = off as usize..off as usize + len;
        match rng.below(20) {
            0..7 if len > 0 => {
                let byte = rng.draw() as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect();
                write(&image, off, &data).expect(&say("write"));
                model[part].copy_from_slice(&data);
            }
            7..12 if len > 0 => {
                let got = read(&image, off, len).expect(&say("read"));
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
            16 => image.flush().expect(&say("flush")),
            17 if rng.one_in(4) => {
                let new = (size / 512 + 1 + rng.below(300)) / (1 + rng.below(3)) * 512;
                image.resize(new).expect(&say("resize"));
                model.resize(new as usize, 0);
            }
            18 if rng.one_in(4) => {
                image.close().expect(&say("close"));
                drop(image);
                image = open(&mut rng);
            }
            19 if rng.one_in(4) => {
                image.flush().expect(&say("flush"));
                let report = image.check().expect(&say("check"));
                assert!(report.errors.is_empty(), "{}: {report:?}", say("check"));
            }
            _ => {}
        }
    }
    let got = read(&image, 0, model.len()).expect(&say("read"));
    assert!(got == model, "{}", say("the end"));
    image.close().expect(&say("close"));
    let report = image.check().expect(&say("check"));
    assert!(report.errors.is_empty() && report.leaks == 0, "{}: {report:?}", say("check"));
    if qemu {
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
        round(seed + n, 150, qemu && n % 4 == 0);
        n += 1;
    }
    eprintln!("{n} images");
}
