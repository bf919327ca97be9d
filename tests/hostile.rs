//! A hostile guest against the virtio devices: rings filled by hand, registers hit at random, resets
//! and pauses in the middle of requests. Whatever it does, the device asks for a reset, or ignores
//! it; it works again after the reset; nothing beside guest memory is read or written; nothing
//! panics, and nothing hangs (every wait ends in a failure).
//!
//! The devices are the real ones behind the real transport, without KVM.

#[path = "hostile/attacks.rs"]
mod attacks;
#[path = "hostile/guest.rs"]
mod guest;
mod kit;

use attacks::{ATTACKS, Break, Survive};
use guest::*;
use kit::ram::{CANARY, HIGH, HIGH_LEN, LOW};
use kit::ring::{INDIRECT, NEXT, Ring, WRITE};
use kit::until;
use minivmm::machine::memory::Mem;
use minivmm::pci::function::PciDevice;
use minivmm::virtio::registers::{feature, status};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn a_disk_survives_every_bad_ring() {
    for workers in [1, 3] {
        let (mut g, _) = disk(2, workers);
        for without in [0, feature::EVENT_IDX] {
            for (what, attack) in ATTACKS {
                g.start(without);
                disk_works(&mut g);
                let free = g.free;
                let must = attack(&mut g.rings[1], free, 0);
                g.kick(1);
                if must == Break {
                    g.broken(what);
                    // It does no more work, on no queue, but what a worker was just about to take.
                    let works = |g: &mut Guest| {
                        let used = g.rings[0].used_idx();
                        g.poke(free, &header(4, 0));
                        let head = g.rings[0].chain(&[(free, 16, false), (free + 16, 1, true)]).unwrap();
                        g.rings[0].offer(head);
                        g.kick(0);
                        std::thread::sleep(Duration::from_millis(1));
                        g.rings[0].used_idx() != used
                    };
                    assert!((0..=workers).any(|_| !works(&mut g)), "{what}: a broken device works");
                } else {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            g.start(without);
            disk_works(&mut g);
        }
    }
}

#[test]
fn a_card_survives_every_bad_ring() {
    let (mut g, far) = card();
    for q in [0u16, 1] {
        for (what, attack) in ATTACKS {
            g.start(0);
            card_works(&mut g, &far);
            let free = g.free;
            let must = attack(&mut g.rings[usize::from(q)], free, if q == 0 { WRITE } else { 0 });
            g.kick(q);
            // The receive queue is looked at when there is a frame.
            far.send(&[0; 80]).unwrap();
            match must {
                Break => g.broken(what),
                Survive => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
    g.start(0);
    card_works(&mut g, &far);
}

#[test]
fn impossible_queues_break_the_device_at_driver_ok() {
    let (mut g, _) = disk(1, 1);
    let good = (64u64, RINGS, RINGS + 0x1000, RINGS + 0x2000);
    let wrong = [
        (0, good.1, good.2, good.3),
        (3, good.1, good.2, good.3),
        (63, good.1, good.2, good.3),
        (128, good.1, good.2, good.3),
        (0xffff, good.1, good.2, good.3),
        (64, good.1 + 8, good.2, good.3),
        (64, good.1, good.2 + 1, good.3),
        (64, good.1, good.2, good.3 + 2),
        (64, LOW, good.2, good.3),
        (64, LOW - 16, good.2, good.3),
        (64, good.1, LOW - 2, good.3),
        (64, good.1, good.2, LOW - 4),
        (64, !15u64, good.2, good.3),
        (64, good.1, !1u64, good.3),
        (64, good.1, good.2, !3u64),
        (64, HIGH + HIGH_LEN - 64, good.2, good.3),
    ];
    for (n, (size, desc, avail, used)) in [good].iter().chain(&wrong).enumerate() {
        g.write(STATUS, 1, 0);
        g.write(STATUS, 1, 3);
        g.accept(g.offered());
        g.write(STATUS, 1, 11);
        g.write(QUEUE_SELECT, 2, 0);
        g.write(QUEUE_SIZE, 2, *size);
        g.write(QUEUE_DESC, 8, *desc);
        g.write(QUEUE_DRIVER, 8, *avail);
        g.write(QUEUE_DEVICE, 8, *used);
        g.write(QUEUE_ENABLE, 2, 1);
        g.write(STATUS, 1, 15);
        let what = format!("{size} entries, {desc:x} {avail:x} {used:x}");
        assert_eq!(g.is_broken(), n > 0, "{what}");
        g.kick(0);
    }
    g.start(0);
    disk_works(&mut g);
}

#[test]
fn the_state_machine_takes_no_short_cuts() {
    let (mut g, _) = disk(1, 1);
    let offered = g.offered();
    // DRIVER_OK without anything before it.
    g.write(STATUS, 1, 4);
    assert_eq!(g.status() & status::DRIVER_OK, 0);
    g.kick(0);
    // Features that were not offered, and VERSION_1 left out.
    for features in [offered | 1 << 40, offered | 1 << 63, offered | 1, offered & !feature::VERSION_1, 0] {
        if features == offered {
            continue;
        }
        g.write(STATUS, 1, 0);
        g.write(STATUS, 1, 3);
        g.accept(features);
        g.write(STATUS, 1, 11);
        assert_eq!(g.status(), 3, "features {features:x} were accepted");
        g.write(STATUS, 1, 15);
        assert_eq!(g.status() & status::DRIVER_OK, 0);
    }
    // Neither features nor rings change once they are agreed on.
    g.prepare(0);
    g.accept(0);
    g.write(DRIVER_FEATURE_SELECT, 4, 0);
    assert_eq!(g.read(DRIVER_FEATURE, 4), offered & 0xffff_ffff);
    g.write(QUEUE_SELECT, 2, 0);
    g.write(QUEUE_DESC, 8, 0x10_0000);
    g.write(QUEUE_SIZE, 2, 2);
    g.write(QUEUE_ENABLE, 2, 0);
    assert_eq!((g.read(QUEUE_DESC, 8), g.read(QUEUE_SIZE, 2)), (RINGS, 64));
    assert_eq!(g.read(QUEUE_ENABLE, 2), 1);
    // DRIVER_OK twice, and bits that cannot be cleared.
    g.write(STATUS, 1, 15);
    g.write(STATUS, 1, 15);
    g.write(STATUS, 1, 1);
    assert_eq!(g.status(), 15);
    disk_works(&mut g);
    // A queue that does not exist.
    g.write(QUEUE_SELECT, 2, 1);
    assert_eq!((g.read(QUEUE_SIZE, 2), g.read(QUEUE_NOTIFY_OFF, 2)), (0, 0));
    g.write(QUEUE_SIZE, 2, 8);
    g.write(QUEUE_ENABLE, 2, 1);
    assert_eq!((g.read(QUEUE_SIZE, 2), g.read(QUEUE_ENABLE, 2)), (0, 0));
    for q in [1, 2, 63, 500, 1023] {
        g.kick(q);
    }
    disk_works(&mut g);
}

#[test]
fn registers_can_be_hit_in_any_way() {
    let mut rng = Rng::new(0x5eed_0001);
    let (mut g, state) = disk(2, 2);
    let (mut c, far) = card();
    for round in 0..60 {
        for g in [&mut g, &mut c] {
            if rng.below(2) == 0 {
                g.start(0);
            }
            for _ in 0..400 {
                let off = match rng.below(3) {
                    0 => rng.below(0x40),
                    1 => 0x1000 * rng.below(9) + rng.below(0x48),
                    _ => rng.below(0x1_0000 - 8),
                };
                let width = [1, 2, 4, 8, 3][rng.below(5) as usize];
                let value = match rng.below(3) {
                    0 => rng.below(16),
                    1 => rng.below(LOW),
                    _ => rng.draw(),
                };
                if rng.below(2) == 0 {
                    g.read(off, width);
                } else {
                    g.write(off, width, value);
                }
            }
        }
        if round % 20 == 19 {
            g.start(0);
            disk_works(&mut g);
            c.start(0);
            card_works(&mut c, &far);
        }
    }
    assert!(no_canary(&state.data.lock().unwrap()));
}

/// False when the bytes beside guest memory were read.
fn no_canary(data: &[u8]) -> bool {
    !data.windows(32).any(|w| w == [CANARY; 32])
}

#[test]
fn resets_in_the_middle_of_slow_requests_wait_for_them() {
    for workers in [1u16, 3] {
        let (mut g, state) = disk(2, workers);
        for round in 0..5 {
            g.start(0);
            state.hold(true);
            for n in 0..8u64 {
                let (q, at) = ((n % 2) as usize, g.free + n * 1024);
                g.poke(at, &header(1, n));
                g.poke(at + 16, &[round + 1; 512]);
                let head = g.rings[q].chain(&[(at, 528, false), (at + 600, 1, true)]).unwrap();
                g.rings[q].offer(head);
                g.kick(q as u16);
            }
            state.wait_inside(usize::from(workers));
            let other = state.clone();
            let opener = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(10));
                other.hold(false);
            });
            if round % 2 == 0 {
                g.write(STATUS, 1, 0);
            } else {
                g.pci.reset();
            }
            assert_eq!(g.status(), 0);
            assert_eq!(state.inside.load(Ordering::SeqCst), 0, "a request outlived the reset");
            // From here on no thread touches the guest.
            let before = g.peek(0, LOW as usize);
            std::thread::sleep(Duration::from_millis(5));
            assert!(g.peek(0, LOW as usize) == before, "guest memory was written after the reset");
            opener.join().unwrap();
        }
        g.start(0);
        disk_works(&mut g);
        // Unplugged, or the end of the program: for good.
        state.hold(true);
        let at = g.free;
        g.poke(at, &header(1, 3));
        let head = g.rings[0].chain(&[(at, 528, false), (at + 600, 1, true)]).unwrap();
        g.rings[0].offer(head);
        g.kick(0);
        state.wait_inside(1);
        let other = state.clone();
        let opener = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            other.hold(false);
        });
        g.pci.stop();
        assert_eq!(state.inside.load(Ordering::SeqCst), 0, "a request outlived the device");
        opener.join().unwrap();
        let asked = state.log.lock().unwrap().len();
        g.write(STATUS, 1, 3);
        g.accept(g.offered());
        g.write(STATUS, 1, 11);
        g.write(STATUS, 1, 15);
        g.kick(0);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(state.log.lock().unwrap().len(), asked, "it came back to life");
    }
}

#[test]
fn a_pause_in_the_middle_loses_and_doubles_nothing() {
    let mut rng = Rng::new(0x5eed_0002);
    for workers in [1, 3] {
        let (mut g, state) = disk(2, workers);
        g.start(0);
        let (mut offered, mut answered) = (0u64, 0u64);
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end {
            for q in 0..2 {
                while g.rings[q].room() > 2 {
                    let at = g.free + (offered % 128) * 1024;
                    g.poke(at, &header(0, offered % 64));
                    let ring = &mut g.rings[q];
                    let head = ring.chain(&[(at, 16, false), (at + 16, 513, true)]).unwrap();
                    ring.offer(head);
                    offered += 1;
                }
                g.kick(q as u16);
            }
            if rng.below(3) == 0 {
                std::thread::sleep(Duration::from_micros(rng.below(300)));
            }
            g.pci.pause();
            let reads = state.log.lock().unwrap().len();
            let used: Vec<u16> = g.rings.iter().map(Ring::used_idx).collect();
            g.kick(0);
            if rng.below(4) == 0 {
                std::thread::sleep(Duration::from_micros(300));
            }
            assert_eq!(state.log.lock().unwrap().len(), reads, "it reads while it is paused");
            assert!(g.rings.iter().map(Ring::used_idx).eq(used), "it answers while it is paused");
            g.pci.resume();
            for ring in &mut g.rings {
                while ring.answer().is_some() {
                    answered += 1;
                }
            }
        }
        until(|| {
            for ring in &mut g.rings {
                while ring.answer().is_some() {
                    answered += 1;
                }
            }
            (answered == offered).then_some(())
        });
        assert_eq!(state.log.lock().unwrap().len() as u64, offered);
    }
}

/// A random descriptor: good enough now and then to come far.
fn random_descriptor(rng: &mut Rng, ring: &Ring<Mem>, table: u64, n: u16, free: u64, mild: bool) {
    if mild {
        let len = [1, 16, 17, 512, 1024, 4096][rng.below(6) as usize];
        let next = (n + 1) % ring.size;
        let flags = [0, NEXT, WRITE, NEXT | WRITE][rng.below(4) as usize];
        return ring.describe_in(table, n, free + rng.below(0x8000), len, flags, next);
    }
    let addr = match rng.below(12) {
        0 => rng.draw(),
        1 => LOW - rng.below(64),
        2 => HIGH + HIGH_LEN - rng.below(64),
        3 => HIGH + rng.below(HIGH_LEN),
        4 => ring.desc + rng.below(0x1000),
        5 => u64::MAX - rng.below(64),
        _ => free + rng.below(0x8000),
    };
    let len = match rng.below(10) {
        0 => rng.draw() as u32,
        1 => 0,
        2 => rng.below(0x10000) as u32,
        3 | 4 => 16 * rng.below(8) as u32,
        5 => 1,
        6 | 7 => 16,
        _ => 512 * rng.below(4) as u32,
    };
    let flags = match rng.below(8) {
        0 => rng.draw() as u16,
        1 => INDIRECT,
        2 => 0,
        3 | 4 => WRITE,
        5 => NEXT,
        _ => NEXT | WRITE,
    };
    let next = match rng.below(10) {
        0 => rng.draw() as u16,
        _ => rng.below(u64::from(ring.size)) as u16,
    };
    ring.describe_in(table, n, addr, len, flags, next);
}

fn random_ring(rng: &mut Rng, ring: &mut Ring<Mem>, free: u64, mild: bool) {
    for n in 0..ring.size {
        random_descriptor(rng, ring, ring.desc, n, free, mild);
    }
    // Often a good start: header, data, status.
    for n in (0..if mild { 48 } else { 6 }).step_by(3) {
        let body = if rng.below(2) == 0 { 0 } else { WRITE };
        ring.describe(n, free + 16 * rng.below(0x200), 16, NEXT, n + 1);
        ring.describe(n + 1, free + rng.below(0x7000), 512 * rng.below(5) as u32, NEXT | body, n + 2);
        ring.describe(n + 2, free + rng.below(0x8000), 1 + rng.below(3) as u32, WRITE, 0);
    }
    for _ in 0..1 + rng.below(8) {
        let head = match rng.below(16) {
            0 if !mild => rng.draw() as u16,
            1 if !mild || rng.below(8) == 0 => rng.below(u64::from(ring.size)) as u16,
            _ => 3 * rng.below(if mild { 16 } else { 2 }) as u16,
        };
        ring.offer(head);
    }
    if !mild && rng.below(32) == 0 {
        ring.set_avail_idx(rng.draw() as u16);
    }
}

/// Random memory for requests: headers of every type, indirect tables.
fn random_memory(rng: &mut Rng, g: &Guest) {
    for _ in 0..32 {
        let sector = if rng.below(3) == 0 { rng.draw() } else { rng.below(DISK as u64 / 512) };
        let kind = if rng.below(4) == 0 { rng.draw() as u32 } else { rng.below(16) as u32 };
        g.poke(g.free + 16 * rng.below(0x200), &header(kind, sector));
        let (table, n) = (g.free + 16 * rng.below(0x100), rng.below(8) as u16);
        random_descriptor(rng, &g.rings[0], table, n, g.free, false);
    }
    g.poke(g.free, &header(rng.below(16) as u32, rng.below(DISK as u64 / 512)));
}

#[test]
fn random_rings_do_no_harm() {
    let mut rng = Rng::new(0x5eed_0003);
    let (mut g, state) = disk(2, 2);
    let (mut c, far) = card();
    far.set_nonblocking(true).unwrap();
    let end = Instant::now() + Duration::from_secs(2);
    let (mut rounds, mut broken) = (0, 0);
    let mut frames = vec![0; 70000];
    while Instant::now() < end {
        for g in [&mut g, &mut c] {
            g.start(if rng.below(2) == 0 { feature::EVENT_IDX } else { 0 });
            let mild = rng.below(2) == 0;
            if mild {
                g.poke(g.free, &[0; 0x8000]);
            }
            for _ in 0..1 + rng.below(4) {
                random_memory(&mut rng, g);
                for q in 0..2 {
                    let free = g.free;
                    random_ring(&mut rng, &mut g.rings[q], free, mild);
                    g.kick(q as u16);
                }
                // While the device works on them.
                random_memory(&mut rng, g);
                let _ = far.send(&vec![7; rng.below(3000) as usize + 13]);
                let _ = far.recv(&mut frames).map(|n| assert!(no_canary(&frames[..n])));
                if rng.below(2) == 0 {
                    std::thread::sleep(Duration::from_micros(rng.below(300)));
                }
            }
            broken += usize::from(g.is_broken());
            rounds += 1;
        }
    }
    eprintln!("{rounds} rounds, {broken} ended broken, {} disk requests", state.log.lock().unwrap().len());
    let requests = state.log.lock().unwrap().len();
    assert!(broken > 0 && broken < rounds && requests > rounds / 10, "not random enough");
    far.set_nonblocking(false).unwrap();
    g.start(0);
    disk_works(&mut g);
    c.start(0);
    card_works(&mut c, &far);
    assert!(no_canary(&state.data.lock().unwrap()));
}

#[test]
fn processors_that_race_with_each_other_and_with_control_do_no_harm() {
    let seed = Rng::new(0x5eed_0004).0;
    let (g, state) = disk(2, 2);
    let stop = AtomicBool::new(false);
    // Control pauses only when the processors stand still.
    let running = RwLock::new(());
    let g = &g;
    std::thread::scope(|scope| {
        for n in 0..3 {
            let (stop, running) = (&stop, &running);
            scope.spawn(move || {
                let mut rng = Rng(seed + n);
                while !stop.load(Ordering::SeqCst) {
                    let _going = running.read().unwrap();
                    match rng.below(6) {
                        0 => g.write(STATUS, 1, [0, 3, 11, 15][rng.below(4) as usize]),
                        1 => g.accept(g.offered()),
                        2 => {
                            g.write(STATUS, 1, 0);
                            g.write(STATUS, 1, 3);
                            g.accept(g.offered());
                            g.write(STATUS, 1, 11);
                            for q in 0..2u64 {
                                g.write(QUEUE_SELECT, 2, q);
                                g.write(QUEUE_DESC, 8, RINGS + q * 0x4000);
                                g.write(QUEUE_DRIVER, 8, RINGS + q * 0x4000 + 0x1000);
                                g.write(QUEUE_DEVICE, 8, RINGS + q * 0x4000 + 0x2000);
                                g.write(QUEUE_ENABLE, 2, 1);
                            }
                            g.write(STATUS, 1, 15);
                        }
                        3 => g.kick(rng.below(3) as u16),
                        4 => {
                            // The rings change under the device.
                            let at = RINGS + 2 * rng.below(0x4000);
                            g.poke(at, &(rng.below(64) as u16).to_le_bytes());
                        }
                        _ => drop(g.read(rng.below(0x9000), 4)),
                    }
                }
            });
        }
        let mut rng = Rng(seed + 9);
        let end = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < end {
            match rng.below(4) {
                0 => g.pci.reset(),
                1 => {
                    let _still = running.write().unwrap();
                    g.pci.pause();
                    let inside = state.inside.load(Ordering::SeqCst);
                    assert_eq!(inside, 0, "a request runs in a paused device");
                    g.pci.resume();
                }
                _ => std::thread::sleep(Duration::from_micros(rng.below(500))),
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    g.pci.reset();
    assert_eq!(g.status(), 0);
}
