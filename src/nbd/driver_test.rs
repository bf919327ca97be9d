use super::*;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::testing::{Mem, Rng, Scratch};
use crate::nbd::testing::{Rig, client, seed, soak};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const SIZE: u64 = 4 << 20;

/// Random requests of several threads, through a client and a server, against a plain model of
/// each thread's own part of the disk.
fn against_a_model(test: &str, limits: Limits, threads: u64) {
    let mut mem = Mem::new(SIZE as usize);
    mem.limits = limits;
    let rig = Rig::new(test, mem, true);
    let mut graph = Graph::new();
    let node = rig.client(&mut graph, json!({})).unwrap();
    let handle = graph.attach(Some(node), HandleSpec::default()).unwrap();
    let seed = seed(test);
    let end = Instant::now() + soak();
    std::thread::scope(|s| {
        for t in 0..threads {
            let handle = &handle;
            s.spawn(move || {
                let part = SIZE / threads;
                let mut rng = Rng(seed.wrapping_add(t * 7919));
                let mut model = vec![0u8; part as usize];
                let mut rounds = 0;
                while rounds < 50 || Instant::now() < end {
                    rounds += 1;
                    one(handle, &mut rng, t * part, &mut model);
                }
            });
        }
    });
    graph.close_all();
    rig.wait_empty();
}

fn one(handle: &Handle, rng: &mut Rng, base: u64, model: &mut [u8]) {
    let max = if rng.below(8) == 0 { model.len() as u64 } else { 9000 };
    let at = rng.below(model.len() as u64);
    let len = 1 + rng.below(max.min(model.len() as u64 - at));
    let (from, to) = (at as usize, (at + len) as usize);
    match rng.below(10) {
        0..=3 => {
            let mut got = vec![0xee; len as usize];
            handle.read(base + at, &mut IovMut::from_slice(&mut got)).unwrap();
            assert!(got == model[from..to], "read {at}+{len}");
        }
        4..=6 => {
            let byte = rng.draw() as u8;
            model[from..to].iter_mut().enumerate().for_each(|(n, b)| *b = byte.wrapping_add(n as u8));
            let flags = if rng.below(4) == 0 { Flags::FUA } else { Flags::NONE };
            // In uneven pieces.
            let mut iov = Iov::new();
            model[from..to].chunks(1 + rng.below(5000) as usize).for_each(|c| iov.push(c));
            handle.write(base + at, &iov, flags).unwrap();
        }
        7 => {
            model[from..to].fill(0);
            let flags = [Flags::NONE, Flags::MAY_UNMAP, Flags::FUA][rng.below(3) as usize];
            handle.zero(base + at, len, flags).unwrap();
        }
        8 => {
            let found = handle.status(base + at, len).unwrap();
            assert!(found.len >= 1 && found.len <= len);
            if found.kind == ExtentKind::Zero {
                assert!(model[from..from + found.len as usize].iter().all(|b| *b == 0), "{at}+{len}");
            }
        }
        _ => handle.flush().unwrap(),
    }
}

#[test]
fn requests_of_many_threads_do_what_a_model_does() {
    against_a_model("model", Limits::default(), 4);
}

#[test]
fn the_same_where_requests_must_be_aligned() {
    let limits = Limits { request_alignment: 512, memory_alignment: 4096, ..Limits::default() };
    against_a_model("model-512", limits, 3);
}

#[test]
fn what_the_server_says_is_what_the_node_is() {
    let rig = Rig::new("limits", Mem::new(3 << 20), false);
    let mut graph = Graph::new();
    let e = rig.client(&mut graph, json!({})).err().unwrap();
    assert_eq!(e.desc, "request on write denied without write permission");
    let e = rig.client(&mut graph, json!({"export": "nope"})).err().unwrap();
    assert_eq!(
        e.desc,
        "NBD export 'nope': Requested export not available (it says: export 'nope' not present)"
    );
    let e = rig.client(&mut graph, json!({"tls-creds": "t"})).err().unwrap();
    assert_eq!(e.desc, "No TLS credentials with id 't'");
    let e = client(&mut graph, &rig.dir.path("none"), json!({})).err().unwrap();
    assert!(e.desc.ends_with("No such file or directory"), "{e}");
    let e = rig.client(&mut graph, json!({"x-dirty-bitmap": "qemu:dirty-bitmap:b"})).err().unwrap();
    assert_eq!(e.desc, "requested x-dirty-bitmap qemu:dirty-bitmap:b not found");
    rig.wait_empty();
}

#[test]
fn a_server_that_is_late_is_waited_for_at_the_start() {
    let mut rig = Rig::new("late", Mem::new(1 << 20), true);
    let path = rig.path();
    rig.server = None;
    let t = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        rig.serve(0, None);
        rig
    });
    let mut graph = Graph::new();
    let node = client(&mut graph, &path, json!({"open-timeout": 10})).unwrap();
    assert_eq!(node.len(), 1 << 20);
    graph.close_all();
    drop(t.join().unwrap());
}

#[test]
fn requests_outlive_a_server_that_comes_back() {
    let mut rig = Rig::new("again", Mem::new(1 << 20), true);
    let mut graph = Graph::new();
    let node = rig.client(&mut graph, json!({"reconnect-delay": 20})).unwrap();
    let handle = graph.attach(Some(node), HandleSpec::default()).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let (handle, stop) = (&handle, &stop);
            s.spawn(move || {
                let mut n = 0u32;
                while !stop.load(Ordering::SeqCst) || n < 20 {
                    n += 1;
                    let bytes = n.to_le_bytes().repeat(1024);
                    let at = t * 65536 + u64::from(n % 16) * 4096;
                    handle.write(at, &Iov::from_slice(&bytes), Flags::NONE).unwrap();
                    let mut got = vec![0; 4096];
                    handle.read(at, &mut IovMut::from_slice(&mut got)).unwrap();
                    assert!(got == bytes, "write {n} of thread {t} is lost");
                }
            });
        }
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(60));
            rig.serve(0, None);
        }
        rig.server = None;
        std::thread::sleep(Duration::from_millis(300));
        rig.serve(0, None);
        stop.store(true, Ordering::SeqCst);
    });
    graph.close_all();
}

#[test]
fn a_lost_server_is_an_error_at_once_or_after_the_delay() {
    for (delay, least) in [(0, 0), (1, 900)] {
        let mut rig = Rig::new(&format!("lost{delay}"), Mem::new(1 << 20), true);
        let mut graph = Graph::new();
        let node = rig.client(&mut graph, json!({"reconnect-delay": delay})).unwrap();
        rig.server = None;
        let start = Instant::now();
        let e = node.read(0, &mut IovMut::from_slice(&mut [0; 512])).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
        let took = start.elapsed().as_millis();
        assert!(took >= least && took < least + 3000, "{took} ms");
        // From now on it is known.
        let start = Instant::now();
        node.read(0, &mut IovMut::from_slice(&mut [0; 512])).unwrap_err();
        assert!(start.elapsed().as_millis() < 1500);
        // And it comes back by itself.
        rig.serve(0, None);
        std::thread::sleep(SELDOM);
        node.read(0, &mut IovMut::from_slice(&mut [0; 512])).unwrap();
        graph.close_all();
    }
}

/// A server that shakes hands and then does what `then` does.
fn puppet(path: &str, then: impl Fn(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut s, _)) = listener.accept() {
            let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
            hello.extend(OPTS_MAGIC.to_be_bytes());
            // Not fixed: the client can do nothing but choose.
            hello.extend(FLAG_NO_ZEROES.to_be_bytes());
            s.write_all(&hello).unwrap();
            s.read_exact(&mut [0; 4 + 17]).unwrap();
            let mut out = (1u64 << 20).to_be_bytes().to_vec();
            out.extend((flag::HAS_FLAGS | flag::SEND_FLUSH).to_be_bytes());
            s.write_all(&out).unwrap();
            then(s);
        }
    });
}

#[test]
fn a_server_that_does_not_answer_holds_up_no_end() {
    let dir = Scratch::new("nbd-mute");
    let path = dir.path("s");
    puppet(&path, |s| {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(60));
            drop(s);
        });
    });
    let mut graph = Graph::new();
    let node = client(&mut graph, &path, json!({"reconnect-delay": 3600})).unwrap();
    let reader = node.clone();
    let t = std::thread::spawn(move || reader.read(0, &mut IovMut::from_slice(&mut [0; 512])));
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    graph.give_up();
    assert!(t.join().unwrap().is_err());
    drop(node);
    graph.close_all();
    assert!(start.elapsed() < LAST * 4, "{:?}", start.elapsed());
    // Also where nobody had a request under way.
    let node = client(&mut graph, &path, json!({})).unwrap();
    drop(node);
    let start = Instant::now();
    graph.close_all();
    assert!(start.elapsed() < LAST * 2, "{:?}", start.elapsed());
}

#[test]
fn a_server_that_goes_is_lost_or_its_word_is_passed_on() {
    for (delay, want) in [(20, None), (0, Some(libc::ESHUTDOWN))] {
        let dir = Scratch::new(&format!("nbd-goes{delay}"));
        let path = dir.path("s");
        let first = AtomicBool::new(true);
        puppet(&path, move |mut s| {
            let code = if first.swap(false, Ordering::SeqCst) { ESHUTDOWN } else { 0 };
            let mut request = [0; Request::SIZE];
            while s.read_exact(&mut request).is_ok() {
                let mut reply = simple_reply(be64(&request, 8), code).to_vec();
                if code == 0 && request[7] == 0 {
                    reply.extend([7; 512]);
                }
                s.write_all(&reply).unwrap();
            }
        });
        let mut graph = Graph::new();
        let node = client(&mut graph, &path, json!({"reconnect-delay": delay})).unwrap();
        let read = node.read(0, &mut IovMut::from_slice(&mut [0; 512]));
        assert_eq!(read.err().and_then(|e| e.raw_os_error()), want);
        drop(node);
        graph.close_all();
    }
}

#[test]
fn a_server_that_talks_nonsense_is_left() {
    let dir = Scratch::new("nbd-mad");
    let seed = seed("nonsense");
    for n in 0..40u64 {
        let path = dir.path(&format!("s{n}"));
        puppet(&path, move |mut s| {
            let mut rng = Rng(seed.wrapping_add(n));
            let mut request = [0; Request::SIZE];
            while s.read_exact(&mut request).is_ok() {
                let mut reply = simple_reply(be64(&request, 8), 0).to_vec();
                reply.extend([7; 512]);
                match rng.below(5) {
                    // The right reply.
                    0 => {}
                    // One of its bytes is wrong.
                    1 => reply[rng.below(16) as usize] ^= 1 << rng.below(8),
                    // It ends early.
                    2 => reply.truncate(rng.below(500) as usize),
                    // A chunk, which was not agreed on.
                    3 => reply = chunk_head(be64(&request, 8), chunk::DONE, chunk::NONE, 0).to_vec(),
                    _ => reply = (0..rng.below(600)).map(|_| rng.draw() as u8).collect(),
                }
                if s.write_all(&reply).is_err() || rng.below(3) == 0 {
                    return;
                }
            }
        });
        let mut graph = Graph::new();
        let node = client(&mut graph, &path, json!({})).unwrap();
        let reader = node.clone();
        let t = std::thread::spawn(move || {
            for _ in 0..3 {
                let mut got = [0; 512];
                if reader.read(0, &mut IovMut::from_slice(&mut got)).is_ok() {
                    assert_eq!(got, [7; 512]);
                }
            }
        });
        // What waits for more of a reply that was cut is let go at the end.
        std::thread::sleep(Duration::from_millis(20));
        graph.give_up();
        t.join().unwrap();
        drop(node);
        graph.close_all();
    }
}
