use super::*;
use crate::block::testing::{At, Mem};
use crate::nbd::testing::{Raw, Rig};
use std::io::Write;

const SIZE: u64 = 40 << 20;

fn rig(test: &str, writable: bool) -> Rig {
    let rig = Rig::new(test, Mem::new(SIZE as usize), writable);
    let mut data = rig.state.data.lock().unwrap();
    data.iter_mut()
        .enumerate()
        .filter(|(n, _)| n & 0x10_0000 == 0)
        .for_each(|(n, b)| *b = (n >> 9) as u8 | 1);
    drop(data);
    rig
}

fn expected(rig: &Rig, at: u64, len: u32) -> Vec<u8> {
    rig.state.data.lock().unwrap()[at as usize..at as usize + len as usize].to_vec()
}

#[test]
fn simple_reads_of_all_lengths() {
    let rig = rig("simple", true);
    let mut c = Raw::go(&rig.path(), false, &[]);
    for (at, len) in [(0, 1), (1000, 5000), (0, 0), (7, 3 << 20), (0, MAX_PAYLOAD)] {
        c.request(0, cmd::READ, at, len);
        assert_eq!(c.simple(), 0);
        assert!(c.recv(len as usize) == expected(&rig, at, len), "{at}+{len}");
    }
    // A failure is told before the data, where it can be.
    rig.state.fail.store(libc::ENOSPC, Ordering::SeqCst);
    c.request(0, cmd::READ, 0, 512);
    assert_eq!(c.simple(), ENOSPC);
    // Where not, it ends the connection rather than pass for data.
    c.request(0, cmd::READ, 0, 8 << 20);
    assert!(
        c.is_over() || {
            c.recv(15);
            c.is_over()
        }
    );
    rig.wait_empty();
}

#[test]
fn structured_reads_have_holes_unless_they_must_not() {
    let rig = rig("chunks", true);
    let mut c = Raw::go(&rig.path(), true, &[]);
    for (at, len, flags) in [
        (0, 1u32, 0),
        (0, 4 << 20, 0),
        (0x8_0001, 0x10_0000, 0),
        (3, 5 << 20, cmd_flag::DF),
        (9, 65536, cmd_flag::DF),
    ] {
        c.request(flags, cmd::READ, at, len);
        let chunks = c.chunks();
        let mut got = vec![0xee; len as usize];
        let mut holes = 0;
        for (kind, payload) in &chunks {
            let from = if *kind == chunk::NONE { 0 } else { (be64(payload, 0) - at) as usize };
            match *kind {
                chunk::OFFSET_DATA => got[from..from + payload.len() - 8].copy_from_slice(&payload[8..]),
                chunk::OFFSET_HOLE => {
                    holes += 1;
                    got[from..from + be32(payload, 8) as usize].fill(0);
                }
                chunk::NONE => {}
                other => panic!("chunk {other}"),
            }
        }
        assert!(got == expected(&rig, at, len), "{at}+{len}");
        if flags & cmd_flag::DF != 0 {
            assert_eq!(chunks.iter().filter(|c| c.0 != chunk::NONE).count(), 1, "fragmented");
        } else if len > 1 << 20 {
            assert!(holes > 0);
        }
    }
    c.request(0, cmd::READ, 0, 0);
    assert_eq!(c.chunks(), [(chunk::NONE, vec![])]);
    // A failure in the middle: the data that were promised come, as zeroes, and the error with them.
    rig.state.fail.store(libc::EIO, Ordering::SeqCst);
    c.request(cmd_flag::DF, cmd::READ, 0, 4 << 20);
    let chunks = c.chunks();
    assert_eq!((chunks[0].0, chunks[0].1.len()), (chunk::OFFSET_DATA, (4 << 20) + 8));
    assert_eq!((chunks[1].0, be32(&chunks[1].1, 0)), (chunk::ERROR_OFFSET, EIO));
    c.request(0, cmd::READ, 512, 512);
    let chunks = c.chunks();
    assert_eq!((chunks[0].0, be64(&chunks[0].1, 6)), (chunk::ERROR_OFFSET, 512));
}

#[test]
fn every_wrong_request_has_its_error_and_the_next_is_served() {
    let rig = rig("wrong", true);
    let ro = Rig::new("wrong-ro", Mem::new(1 << 20), false);
    let mut c = Raw::go(&rig.path(), true, &[]);
    let mut r = Raw::go(&ro.path(), false, &[]);
    for (flags, kind, at, len, want) in [
        (0, cmd::TRIM, SIZE, 1, EINVAL),
        (0, cmd::TRIM, u64::MAX, 2, EINVAL),
        (0, cmd::WRITE_ZEROES, SIZE - 1, 2, ENOSPC),
        (0, cmd::CACHE, SIZE, 1, EINVAL),
        (0, 8, 0, 0, EINVAL),
        (0, 0xffff, 0, 0, EINVAL),
        (cmd_flag::DF, cmd::FLUSH, 0, 0, EINVAL),
        (1 << 9, cmd::TRIM, 0, 512, EINVAL),
        (cmd_flag::FUA, cmd::FLUSH, 0, 0, 0),
        (0, cmd::CACHE, 0, 100_000, 0),
        (cmd_flag::FUA, cmd::TRIM, 0, 4096, 0),
        (cmd_flag::FAST_ZERO | cmd_flag::NO_HOLE, cmd::WRITE_ZEROES, 0, 4096, 0),
    ] {
        c.request(flags, kind, at, len);
        assert_eq!(c.simple(), want, "{kind} {at}+{len}");
    }
    for (kind, at, len) in
        [(cmd::READ, SIZE - 1, 2), (cmd::READ, 0, MAX_PAYLOAD + 1), (cmd::BLOCK_STATUS, 0, 512)]
    {
        c.request(0, kind, at, len);
        let chunks = c.chunks();
        assert_eq!((chunks[0].0, be32(&chunks[0].1, 0)), (chunk::ERROR, EINVAL));
    }
    // The payload of a write that is refused is taken all the same.
    c.request(0, cmd::WRITE, SIZE - 10, 300_000);
    c.send(&vec![9; 300_000]);
    assert_eq!(c.simple(), ENOSPC);
    for kind in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
        r.request(0, kind, 0, 4096);
        if kind == cmd::WRITE {
            r.send(&[9; 4096]);
        }
        assert_eq!(r.simple(), EPERM);
    }
    r.request(cmd_flag::DF, cmd::READ, 0, 512);
    assert_eq!(r.simple(), EINVAL, "DF without structured replies");
    r.request(0, cmd::DISC, 0, 0);
    assert!(r.is_over());
    // More than anybody may send.
    c.request(0, cmd::WRITE, 0, MAX_PAYLOAD + 1);
    assert!(c.is_over());
}

#[test]
fn fast_zeroes_are_refused_where_they_are_not_fast() {
    let mut mem = Mem::new(1 << 20);
    mem.no_zero = true;
    let rig = Rig::new("fast", mem, true);
    rig.state.data.lock().unwrap().fill(7);
    let mut c = Raw::go(&rig.path(), false, &[]);
    c.request(cmd_flag::FAST_ZERO, cmd::WRITE_ZEROES, 0, 4096);
    assert_eq!(c.simple(), ENOTSUP);
    assert_eq!(expected(&rig, 0, 1), [7]);
    c.request(0, cmd::WRITE_ZEROES, 0, 4096);
    assert_eq!(c.simple(), 0);
    assert_eq!(expected(&rig, 4095, 2), [0, 7]);
}

#[test]
fn writes_of_all_lengths_and_fua() {
    let rig = rig("writes", true);
    let mut c = Raw::go(&rig.path(), false, &[]);
    for (at, len) in [(0u64, 1u32), (511, 4096), (0, 0), (3, 100_000), (1, 5 << 20), (0, MAX_PAYLOAD)] {
        let bytes: Vec<u8> = (0..len).map(|n| (n >> 3) as u8 ^ len as u8).collect();
        let before = rig.state.flushes.load(Ordering::SeqCst);
        c.request(cmd_flag::FUA, cmd::WRITE, at, len);
        c.send(&bytes);
        assert_eq!(c.simple(), 0);
        assert!(expected(&rig, at, len) == bytes, "{at}+{len}");
        let flushes = rig.state.flushes.load(Ordering::SeqCst) - before;
        assert_eq!(flushes, usize::from(len > 0), "one flush a write, after its last piece");
    }
}

#[test]
fn block_status_of_two_contexts() {
    let rig = rig("status", true);
    let mut c = Raw::go(&rig.path(), true, &["base:allocation", "qemu:allocation-depth"]);
    c.request(0, cmd::BLOCK_STATUS, 0x8_0000, 0x20_0000);
    let chunks = c.chunks();
    assert_eq!(chunks.len(), 2);
    let numbers = |b: &[u8]| b.chunks(4).map(|c| be32(c, 0)).collect::<Vec<_>>();
    assert_eq!(numbers(&chunks[0].1), [0, 0x8_0000, 0, 0x10_0000, 3, 0x8_0000, 0]);
    assert_eq!(numbers(&chunks[1].1), [1, 0x20_0000, 1]);
    c.request(cmd_flag::REQ_ONE, cmd::BLOCK_STATUS, 0x8_0000, 0x20_0000);
    assert_eq!(numbers(&c.chunks()[0].1), [0, 0x8_0000, 0]);
}

/// Sends `n` slow requests at once and gives the time until the last reply.
fn burst(c: &mut Raw, n: u32) -> Duration {
    let start = Instant::now();
    let all: Vec<u8> = (0..n)
        .flat_map(|i| {
            Request { flags: 0, kind: cmd::READ, cookie: 77, offset: u64::from(i) * 4096, len: 4096 }.bytes()
        })
        .collect();
    c.send(&all);
    for _ in 0..n {
        assert_eq!(c.simple(), 0);
        c.recv(4096);
    }
    start.elapsed()
}

#[test]
fn slow_requests_are_done_side_by_side() {
    let rig = rig("side", true);
    let mut c = Raw::go(&rig.path(), false, &[]);
    rig.delay.store(20, Ordering::SeqCst);
    burst(&mut c, 4);
    // 64 × 20 ms one after the other would be 1.3 s.
    let took = burst(&mut c, 64);
    assert!(took < Duration::from_millis(800), "{took:?}");
    drop(c);
    rig.wait_empty();
}

/// Flushes take their time on every disk, and say nothing of reads that come after them.
#[test]
fn after_slow_flushes_reads_do_not_change_threads() {
    let rig = rig("flushes", true);
    let readers = Arc::new(Mutex::new(Vec::new()));
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let seen = readers.clone();
    *rig.state.hook.lock().unwrap() = Some(Arc::new(move |at, _, _| match at {
        At::Read => seen.lock().unwrap().push(std::thread::current().id()),
        At::Flush => _ = held.lock().unwrap().recv(),
        _ => {}
    }));
    let mut c = Raw::go(&rig.path(), false, &[]);
    let request = |kind, len| Request { flags: 0, kind, cookie: 77, offset: 0, len }.bytes();
    c.send(&[request(cmd::FLUSH, 0), request(cmd::FLUSH, 0), request(cmd::READ, 512)].concat());
    // The flushes are others' work, who are both at it for long.
    assert_eq!(c.simple(), 0);
    c.recv(512);
    std::thread::sleep(Duration::from_millis(200));
    (0..2).for_each(|_| release.send(()).unwrap());
    (0..2).for_each(|_| assert_eq!(c.simple(), 0));
    for _ in 0..8 {
        c.request(0, cmd::READ, 0, 512);
        assert_eq!(c.simple(), 0);
        c.recv(512);
    }
    let readers = readers.lock().unwrap();
    assert_eq!(readers.len(), 9);
    assert!(readers.iter().all(|r| *r == readers[0]), "{readers:?}");
}

/// Payloads travel with their requests, whoever does those, and whatever size buffers have by then.
#[test]
fn slow_writes_of_all_lengths_keep_their_payloads() {
    let rig = rig("payloads", true);
    let mut c = Raw::go(&rig.path(), false, &[]);
    rig.delay.store(3, Ordering::SeqCst);
    let lens = [1u32, 4096, 70_000, 200_000, 1 << 20, 3 << 20, 512, 65536];
    for round in 0..12u8 {
        let mut at = 0;
        let mut model = vec![0; 8 << 20];
        model.copy_from_slice(&expected(&rig, 0, 8 << 20));
        let mut requests = Vec::new();
        for n in 0..lens.len() {
            let len = lens[(n + usize::from(round)) % lens.len()];
            let bytes: Vec<u8> = (0..len).map(|i| (i >> 4) as u8 ^ (n as u8) << 4 ^ round).collect();
            requests.extend(Request { flags: 0, kind: cmd::WRITE, cookie: 77, offset: at, len }.bytes());
            requests.extend(&bytes);
            model[at as usize..at as usize + len as usize].copy_from_slice(&bytes);
            at += u64::from(len) + 7;
        }
        c.send(&requests);
        (0..lens.len()).for_each(|_| assert_eq!(c.simple(), 0));
        assert!(expected(&rig, 0, 8 << 20) == model, "round {round}");
    }
    drop(c);
    rig.wait_empty();
}

/// A client that has nothing more to say may still listen.
#[test]
fn who_closes_the_sending_end_gets_all_replies() {
    let rig = rig("half", true);
    for delay in [0, 3] {
        rig.delay.store(delay, Ordering::SeqCst);
        for round in 0..20u32 {
            let mut c = Raw::go(&rig.path(), false, &[]);
            let all: Vec<u8> = (0..40 + round)
                .flat_map(|i| {
                    let offset = u64::from(i) * 4096;
                    Request { flags: 0, kind: cmd::READ, cookie: 77, offset, len: 4096 }.bytes()
                })
                .collect();
            c.send(&all);
            c.0.shutdown(std::net::Shutdown::Write).unwrap();
            for _ in 0..40 + round {
                assert_eq!(c.simple(), 0);
                c.recv(4096);
            }
            assert!(c.is_over());
        }
    }
    rig.wait_empty();
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let mut rig = rig("stuck", true);
    let mut stuck = Raw::go(&rig.path(), false, &[]);
    // As much as fits, in both directions.
    stuck.0.set_nonblocking(true).unwrap();
    let request = Request { flags: 0, kind: cmd::READ, cookie: 1, offset: 0, len: 1 << 20 }.bytes();
    for _ in 0..50 {
        while stuck.0.write(&request).is_ok() {}
        std::thread::sleep(Duration::from_millis(2));
    }
    // In the middle of a write's payload.
    let mut half = Raw::go(&rig.path(), false, &[]);
    half.request(0, cmd::WRITE, 0, 1 << 20);
    half.send(&[1; 1000]);
    let mut good = Raw::go(&rig.path(), false, &[]);
    good.request(0, cmd::READ, 0, 512);
    assert_eq!(good.simple(), 0);
    // Neither a change of the graph nor the end waits for them.
    let handle = rig.export.handle.clone();
    let start = Instant::now();
    drop(rig.graph.quiesce_handles(vec![handle]));
    rig.server = None;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(rig.export.clients(), 0);
}

#[test]
fn the_end_waits_for_requests_at_the_disk_and_threads_end() {
    let mut rig = rig("end", true);
    rig.delay.store(300, Ordering::SeqCst);
    let mut clients: Vec<_> = (0..4).map(|_| Raw::go(&rig.path(), false, &[])).collect();
    for c in &mut clients {
        for i in 0..4 {
            c.request(0, cmd::WRITE, i * 4096, 4096);
            c.send(&[5; 4096]);
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    rig.server = None;
    // Nobody is at the disk any more.
    let before = expected(&rig, 0, 65536);
    std::thread::sleep(Duration::from_millis(400));
    assert!(before == expected(&rig, 0, 65536));
    assert_eq!(Arc::strong_count(&rig.export), 2, "the registry's, and ours");
}

#[test]
fn the_budget_for_buffers_comes_back() {
    let rig = rig("budget", true);
    let whole = rig.server.as_ref().unwrap().budget();
    let mut clients: Vec<_> = (0..8).map(|_| Raw::go(&rig.path(), false, &[])).collect();
    for c in &mut clients {
        c.request(0, cmd::READ, 0, 4 << 20);
        assert_eq!(c.simple(), 0);
        c.recv(4 << 20);
    }
    assert!(rig.server.as_ref().unwrap().budget() < whole);
    drop(clients);
    rig.wait_empty();
    assert_eq!(rig.server.as_ref().unwrap().budget(), whole);
}
