use super::*;
use crate::block::testing::{Mem, Rng};
use std::sync::atomic::AtomicUsize;

fn code(r: io::Result<()>) -> i32 {
    r.unwrap_err().raw_os_error().unwrap()
}

/// Random requests of any alignment against a plain vector, for drivers of several needs.
#[test]
fn any_request_does_what_it_does_on_a_plain_array() {
    for seed in 1..=12u64 {
        eprintln!("seed {seed}");
        let mut rng = Rng(seed);
        let request = [1u32, 1, 16, 64, 512][rng.below(5) as usize];
        let memory = [1u32, 1, 64, 512][rng.below(4) as usize];
        let grows = rng.below(2) == 0;
        let len = if grows { 5000 } else { 4096 + 512 * rng.below(9) };
        let mut mem = Mem::new(len as usize);
        mem.limits.request_alignment = request;
        mem.limits.memory_alignment = memory;
        mem.grows = grows;
        mem.no_zero = rng.below(2) == 0;
        let detect = [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap];
        let options = NodeOptions {
            detect_zeroes: detect[rng.below(3) as usize],
            unmap: rng.below(2) == 0,
            ..NodeOptions::default()
        };
        let node = Node::new("n", Box::new(mem), options);
        let mut model = vec![0u8; len as usize];
        let mut high = 0;
        for _ in 0..600 {
            let off = rng.below(len + 600);
            let n = rng.below(1500);
            let end = off + n;
            let fits = end <= node.len() || grows;
            match rng.below(4) {
                0 | 1 => {
                    // Unaligned memory on purpose.
                    let mut data = vec![0u8; n as usize + 3];
                    if rng.below(3) > 0 {
                        data.iter_mut().for_each(|b| *b = rng.draw() as u8);
                    }
                    let shift = rng.below(4) as usize;
                    let data = &data[shift.min(3)..][..n as usize];
                    let got = node.write(off, &Iov::from_slice(data), Flags::NONE);
                    if !fits {
                        assert_eq!(code(got), libc::EIO);
                        continue;
                    }
                    got.unwrap();
                    if n == 0 {
                        continue;
                    }
                    high = high.max(end);
                    if end as usize > model.len() {
                        model.resize(end as usize, 0);
                    }
                    model[off as usize..end as usize].copy_from_slice(data);
                }
                2 => {
                    let got = node.zero(off, n, Flags::MAY_UNMAP);
                    if !fits {
                        assert_eq!(code(got), libc::EIO);
                        continue;
                    }
                    got.unwrap();
                    if n == 0 {
                        continue;
                    }
                    high = high.max(end);
                    if end as usize > model.len() {
                        model.resize(end as usize, 0);
                    }
                    model[off as usize..end as usize].fill(0);
                }
                _ => {
                    let mut data = vec![0xAA; n as usize];
                    node.read(off, &mut IovMut::from_slice(&mut data)).unwrap();
                    for (i, &b) in data.iter().enumerate() {
                        let want = model.get(off as usize + i).copied().unwrap_or(0);
                        assert_eq!(b, want, "byte {}", off as usize + i);
                    }
                }
            }
            assert_eq!(node.wr_highest_offset(), high);
        }
        assert!(node.len() as usize >= model.len());
        assert!(node.len() < model.len() as u64 + u64::from(request));
    }
}

#[test]
fn large_unaligned_requests_go_through_the_bounce_buffer_in_pieces() {
    let mut mem = Mem::new(4 << 20);
    mem.limits.request_alignment = 4096;
    mem.limits.memory_alignment = 4096;
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    let data: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    node.write(12345, &Iov::from_slice(&data), Flags::NONE).unwrap();
    let disk = state.data.lock().unwrap().clone();
    assert!(disk[12345..12345 + data.len()] == data[..]);
    assert!(disk[..12345].iter().chain(&disk[12345 + data.len()..]).all(|&b| b == 0));
    let mut back = vec![0; data.len()];
    node.read(12345, &mut IovMut::from_slice(&mut back)).unwrap();
    assert!(back == data);
}

#[test]
fn neighbours_in_one_block_do_not_lose_each_others_writes() {
    let mut mem = Mem::new(4096);
    mem.limits.request_alignment = 512;
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let node = &node;
            s.spawn(move || {
                for round in 0..400u64 {
                    let value = [(t * 50 + round % 50 + 1) as u8; 100];
                    let at = 100 * t + 512 * (round % 3);
                    node.write(at, &Iov::from_slice(&value), Flags::NONE).unwrap();
                    let mut back = [0; 100];
                    node.read(at, &mut IovMut::from_slice(&mut back)).unwrap();
                    assert_eq!(back, value);
                }
            });
        }
    });
    assert!(state.data.lock().unwrap()[..400].iter().all(|&b| b != 0));
}

#[test]
fn read_only_nodes_refuse_every_change() {
    let options = NodeOptions { read_only: true, unmap: true, ..NodeOptions::default() };
    let node = Node::new("n", Box::new(Mem::new(4096)), options);
    assert_eq!(code(node.write(0, &Iov::from_slice(&[1]), Flags::NONE)), libc::EPERM);
    assert_eq!(code(node.zero(0, 1, Flags::NONE)), libc::EPERM);
    assert_eq!(code(node.discard(0, 1)), libc::EPERM);
    assert_eq!(code(node.resize(1)), libc::EACCES);
    node.read(0, &mut IovMut::from_slice(&mut [0; 16])).unwrap();
}

#[test]
fn ranges_that_wrap_or_exceed_the_largest_disk_are_errors() {
    let mut mem = Mem::new(4096);
    mem.grows = true;
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    for off in [u64::MAX, u64::MAX - 1, MAX_LEN, i64::MAX as u64] {
        assert_eq!(code(node.read(off, &mut IovMut::from_slice(&mut [0; 16]))), libc::EIO);
        assert_eq!(code(node.write(off, &Iov::from_slice(&[0; 16]), Flags::NONE)), libc::EIO);
        assert_eq!(code(node.zero(off, 16, Flags::NONE)), libc::EIO);
        assert_eq!(code(node.discard(off, 16)), libc::EIO);
        assert!(node.status(off, 16).is_err());
    }
    assert_eq!(code(node.resize(MAX_LEN + 1)), libc::EFBIG);
}

#[test]
fn discard_reaches_the_driver_only_when_asked_for_and_in_whole_blocks() {
    for (unmap, off, len, want) in
        [(false, 0, 4096, 0), (true, 0, 4096, 1), (true, 1, 600, 0), (true, 1, 1100, 1), (true, 0, 511, 0)]
    {
        let mut mem = Mem::new(4096);
        mem.limits.request_alignment = 512;
        let state = mem.state.clone();
        let node = Node::new("n", Box::new(mem), NodeOptions { unmap, ..NodeOptions::default() });
        node.discard(off, len).unwrap();
        assert_eq!(state.discards.load(Ordering::SeqCst), want, "{unmap} {off} {len}");
    }
}

#[test]
fn zero_falls_back_to_writing_unless_told_not_to() {
    let mut mem = Mem::new(4096);
    mem.no_zero = true;
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    node.write(0, &Iov::from_slice(&[5; 4096]), Flags::NONE).unwrap();
    assert_eq!(code(node.zero(0, 512, Flags::NO_FALLBACK)), libc::ENOTSUP);
    assert!(state.data.lock().unwrap().iter().all(|&b| b == 5));
    node.zero(0, 512, Flags::NONE).unwrap();
    assert!(state.data.lock().unwrap()[..512].iter().all(|&b| b == 0));
}

#[test]
fn a_flush_is_done_when_something_changed_and_after_a_failed_flush() {
    let mem = Mem::new(4096);
    let state = mem.state.clone();
    let flushes = || state.flushes.load(Ordering::SeqCst);
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    node.flush().unwrap();
    assert_eq!(flushes(), 1, "the first is always done");
    node.flush().unwrap();
    assert_eq!(flushes(), 1);
    node.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap();
    state.fail.store(libc::EIO, Ordering::SeqCst);
    assert_eq!(code(node.flush()), libc::EIO);
    state.fail.store(0, Ordering::SeqCst);
    node.flush().unwrap();
    assert_eq!(flushes(), 3);
    // A failed write may have written something.
    state.fail.store(libc::ENOSPC, Ordering::SeqCst);
    assert_eq!(code(node.write(0, &Iov::from_slice(&[1; 8]), Flags::NONE)), libc::ENOSPC);
    state.fail.store(0, Ordering::SeqCst);
    node.flush().unwrap();
    assert_eq!(flushes(), 4);
    node.write(0, &Iov::from_slice(&[1]), Flags::FUA).unwrap();
    assert_eq!(flushes(), 5, "FUA flushes");
}

#[test]
fn no_flush_does_not_and_writethrough_does_after_each_write() {
    let mem = Mem::new(4096);
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions { no_flush: true, ..Default::default() });
    node.write(0, &Iov::from_slice(&[1]), Flags::FUA).unwrap();
    node.flush().unwrap();
    assert_eq!(state.flushes.load(Ordering::SeqCst), 0);
    let mem = Mem::new(4096);
    let state = mem.state.clone();
    let node = Node::new("n", Box::new(mem), NodeOptions { writeback: false, ..Default::default() });
    node.write(0, &Iov::from_slice(&[1]), Flags::NONE).unwrap();
    node.zero(0, 100, Flags::NONE).unwrap();
    assert_eq!(state.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn the_threshold_is_told_once_by_how_much_it_was_exceeded() {
    let node = Node::new("n", Box::new(Mem::new(4096)), NodeOptions::default());
    let told = Arc::new(AtomicUsize::new(0));
    let t = told.clone();
    node.set_write_threshold(
        1000,
        Box::new(move |by| {
            t.fetch_add(by as usize, Ordering::SeqCst);
        }),
    );
    node.write(0, &Iov::from_slice(&[1; 1000]), Flags::NONE).unwrap();
    assert_eq!((told.load(Ordering::SeqCst), node.write_threshold()), (0, 1000));
    node.write(900, &Iov::from_slice(&[1; 200]), Flags::NONE).unwrap();
    node.write(900, &Iov::from_slice(&[1; 300]), Flags::NONE).unwrap();
    assert_eq!((told.load(Ordering::SeqCst), node.write_threshold()), (100, 0));
}

#[test]
fn a_driver_that_needs_aligned_requests_is_asked_for_aligned_places() {
    let mut mem = Mem::new(4096);
    mem.limits.request_alignment = 512;
    let node = Node::new("n", Box::new(mem), NodeOptions::default());
    for (off, len) in [(0, 4096), (1, 1), (700, 2000), (3584, 9000), (4095, 1)] {
        let inside = len.min(4096 - off);
        let wanted = Extent { kind: ExtentKind::Data, len: inside, host_offset: Some(off) };
        assert_eq!(node.status(off, len).unwrap(), wanted, "{off}+{len}");
    }
}
