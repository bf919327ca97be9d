use super::*;
use crate::sys::thread::spawn;
use crate::virtio::device::Thread;
use crate::virtio::rng::{Rng, RngConfig};
use crate::virtio::testing::ring::{self, Ring};
use crate::virtio::testing::{LOW, until};
use crate::virtio::testing_pci::pci::{self, Driver, Mmio};
use crate::virtio::testing_pci::{Board, Cpu, Echo, HOLD, PANIC, WAIT};
use std::time::Duration;

/// Offset of the data for requests; rings lie below.
const DATA: u64 = 0x10_0000;

type TestRing = Ring<Mem>;

/// A device that was started, with `features` besides VERSION_1; MSI-X data 0x40 + vector.
fn started(board: &Board, device: Arc<dyn VirtioDevice>, features: u64) -> (Driver<Cpu>, Vec<TestRing>) {
    let d = board.plug(device);
    let rings = start(board, &d, features);
    (d, rings)
}

fn start(board: &Board, d: &Driver<Cpu>, features: u64) -> Vec<TestRing> {
    assert!(d.negotiate(pci::VERSION_1 | features));
    d.enable_msix(0x40);
    assert_eq!(d.config_vector(0), 0);
    let rings = (0..d.num_queues())
        .map(|n| {
            let size = d.queue_size(n);
            let ring = Ring::new(board.ram.mem.clone(), size, 0x1000 + 0x4000 * u64::from(n));
            d.place_queue(n, size, ring.desc, ring.avail, ring.used);
            assert_eq!(d.queue_vector(n, n + 1), n + 1);
            d.enable_queue(n);
            ring
        })
        .collect();
    d.driver_ok();
    assert_eq!(d.status(), pci::ACKNOWLEDGE | pci::DRIVER | pci::FEATURES_OK | pci::DRIVER_OK);
    rings
}

/// Offers `bytes` and room for as many; the head.
fn request(board: &Board, ring: &mut TestRing, at: u64, bytes: &[u8]) -> u16 {
    assert!(board.ram.mem.write(at, bytes) && board.ram.mem.write(at + 0x1000, &[0; 16]));
    let len = bytes.len() as u32;
    let head = ring.chain(&[(at, len, false), (at + 0x1000, len, true)]).unwrap();
    ring.offer(head);
    head
}

fn reply(board: &Board, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert!(board.ram.mem.read(at + 0x1000, &mut bytes));
    bytes
}

#[test]
fn a_driver_finds_negotiates_and_is_served() {
    let board = Board::new();
    let (d, mut rings) = started(&board, Rng::new(RngConfig::default()).unwrap(), 0);
    assert_eq!(pci::find(&board.cpu, 4), Some(d.slot));
    assert_eq!(d.queue_size(0), 8);
    assert_eq!(d.queue_size(1), 0, "there is no second queue");
    let head = rings[0].chain(&[(DATA, 64, true)]).unwrap();
    rings[0].offer(head);
    d.kick(0);
    assert_eq!(until(|| rings[0].answer()), (head, 64));
    let mut bytes = [0; 64];
    assert!(board.ram.mem.read(DATA, &mut bytes) && bytes != [0; 64]);
    until(|| (board.caught.take(0x41) == 1).then_some(()));
    d.reset();
    assert_eq!((d.status(), d.queue_vector(0, 5)), (0, pci::NO_VECTOR));
}

#[test]
fn requests_in_the_ring_before_driver_ok_are_served_without_a_kick() {
    let board = Board::new();
    let d = board.plug(Echo::simple());
    assert!(d.negotiate(pci::VERSION_1));
    let mut ring = Ring::new(board.ram.mem.clone(), 64, 0x1000);
    d.place_queue(0, 64, ring.desc, ring.avail, ring.used);
    d.enable_queue(0);
    let head = request(&board, &mut ring, DATA, b"early");
    d.driver_ok();
    assert_eq!(until(|| ring.answer()), (head, 5));
    assert_eq!(reply(&board, DATA, 5), b"early");
}

#[test]
fn features_are_agreed_on_strictly() {
    let board = Board::new();
    let d = board.plug(Echo::simple());
    let all = 1 << 3 | 1 << 37 | feature::RING;
    assert_eq!(d.offered(), all);
    assert!(!d.negotiate(1 << 3), "without VERSION_1");
    assert!(!d.negotiate(all | 1 << 4), "with one that was not offered");
    assert!(!d.negotiate(all | 1 << 63));
    d.driver_ok();
    assert_eq!(d.status() & pci::DRIVER_OK, 0, "DRIVER_OK without FEATURES_OK");
    assert!(d.negotiate(all));
    assert_eq!(d.accepted(), all);
    d.accept(0);
    assert_eq!(d.accepted(), all, "features do not change after FEATURES_OK");
    d.set_status(pci::ACKNOWLEDGE);
    assert_ne!(d.status() & pci::FEATURES_OK, 0, "only a reset clears bits");
    d.reset();
    assert_eq!(d.accepted(), 0);
    for select in [2, 31, u32::MAX] {
        d.bus.w32(d.common, select);
        assert_eq!(d.bus.r32(d.common + 4), 0);
    }
}

#[test]
fn impossible_queues_break_the_device_and_a_reset_mends_it() {
    let board = Board::new();
    let d = board.plug(Echo::simple());
    let end = LOW - 0x1000;
    let cases: &[(u16, u64, u64, u64)] = &[
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (0xffff, 0x1000, 0x2000, 0x3000),
        (64, 0, 0, 0),
        (64, 0x1000, 0, 0x3000),
        (64, 0x1008, 0x2000, 0x3000),
        (64, 0x1000, 0x2001, 0x3000),
        (64, 0x1000, 0x2000, 0x3002),
        (64, LOW - 16, 0x2000, 0x3000),
        (64, 0x1000, LOW - 8, 0x3000),
        (64, 0x1000, 0x2000, LOW - 8),
        (64, end, end, 0xc000_0000),
        (64, u64::MAX - 15, 0x2000, 0x3000),
        (64, 0x1000, u64::MAX - 1, 0x3000),
        (64, 0x1000, 0x2000, u64::MAX - 3),
    ];
    for &(size, desc, avail, used) in cases {
        assert!(d.negotiate(pci::VERSION_1));
        d.enable_msix(0x40);
        d.config_vector(0);
        d.place_queue(0, size, desc, avail, used);
        d.enable_queue(0);
        d.driver_ok();
        let case = format!("{size} {desc:x} {avail:x} {used:x}");
        assert_ne!(d.status() & pci::NEEDS_RESET, 0, "{case}");
        assert_eq!(board.caught.take(0x40), 1, "{case}: the driver hears of it");
        d.kick(0);
        d.driver_ok();
    }
    let mut rings = start(&board, &d, 0);
    request(&board, &mut rings[0], DATA, b"again");
    d.kick(0);
    until(|| rings[0].answer());
}

#[test]
fn queues_do_not_change_while_they_are_in_use() {
    let board = Board::new();
    let (d, _rings) = started(&board, Echo::simple(), 0);
    let before = (d.bus.r64(d.common + 0x20), d.queue_size(0));
    d.place_queue(0, 8, 0xdead_0000, 0xdead_0000, 0xdead_0000);
    d.bus.w16(d.common + 0x1c, 0);
    assert_eq!((d.bus.r64(d.common + 0x20), d.queue_size(0)), before);
    assert_eq!(d.bus.r16(d.common + 0x1c), 1);
    // Without RING_RESET the register does nothing.
    d.bus.w16(d.common + 0x3a, 1);
    assert_eq!(d.bus.r16(d.common + 0x1c), 1);
    // Queues that are not there.
    for n in [1, 63, 64, 0xffff] {
        d.place_queue(n, 8, 0x1000, 0x2000, 0x3000);
        d.enable_queue(n);
        assert_eq!((d.bus.r16(d.common + 0x1c), d.queue_vector(n, 0)), (0, pci::NO_VECTOR));
        d.kick(n);
    }
    assert_eq!(d.status() & pci::NEEDS_RESET, 0);
}

#[test]
fn a_bad_ring_breaks_the_device_not_the_process() {
    let board = Board::new();
    let (d, mut rings) = started(&board, Echo::simple(), 0);
    let broken = |what: &str, d: &Driver<Cpu>| {
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while d.status() & pci::NEEDS_RESET == 0 {
            assert!(std::time::Instant::now() < end, "not noticed: {what}");
            std::thread::yield_now();
        }
        until(|| (board.caught.take(0x40) > 0).then_some(()));
    };
    let ring = &mut rings[0];
    ring.set_avail_idx(65);
    d.kick(0);
    broken("an index that jumps", &d);
    let (next, write, indirect) = (ring::NEXT, ring::WRITE, ring::INDIRECT);
    let table = 0x2_0000;
    type Bad<'a> = (&'a str, &'a dyn Fn(&mut TestRing) -> u16);
    let cases: &[Bad] = &[
        ("a head out of range", &|_| 64),
        ("a head far out of range", &|_| 0xffff),
        ("a loop", &|r| {
            r.describe(0, DATA, 16, next, 1);
            r.describe(1, DATA, 16, next, 0);
            0
        }),
        ("a loop of one", &|r| {
            r.describe(0, DATA, 16, next, 0);
            0
        }),
        ("a next out of range", &|r| {
            r.describe(0, DATA, 16, next, 64);
            0
        }),
        ("an address outside memory", &|r| {
            r.describe(0, LOW, 16, 0, 0);
            0
        }),
        ("an address that wraps around", &|r| {
            r.describe(0, u64::MAX - 7, 16, write, 0);
            0
        }),
        ("a piece across the end of memory", &|r| {
            r.describe(0, LOW - 8, 16, write, 0);
            0
        }),
        ("a length of 4 GiB", &|r| {
            r.describe(0, DATA, u32::MAX, 0, 0);
            0
        }),
        ("readable after writable", &|r| {
            r.describe(0, DATA, 16, write | next, 1);
            r.describe(1, DATA, 16, 0, 0);
            0
        }),
        ("readable after writable of length 0", &|r| {
            r.describe(0, DATA, 0, write | next, 1);
            r.describe(1, DATA, 16, 0, 0);
            0
        }),
        ("a table of odd length", &|r| {
            r.describe(0, table, 17, indirect, 0);
            0
        }),
        ("an empty table", &|r| {
            r.describe(0, table, 0, indirect, 0);
            0
        }),
        ("a table outside memory", &|r| {
            r.describe(0, LOW, 32, indirect, 0);
            0
        }),
        ("a table in a table", &|r| {
            r.describe(0, table, 32, indirect, 0);
            r.describe_in(table, 0, table, 32, indirect, 0);
            0
        }),
        ("a loop in a table", &|r| {
            r.describe(0, table, 32, indirect, 0);
            r.describe_in(table, 0, DATA, 16, next, 1);
            r.describe_in(table, 1, DATA, 16, next, 0);
            0
        }),
        ("too long a table", &|r| {
            r.describe(0, table, 1025 * 16, indirect, 0);
            (0..1025).for_each(|n| {
                r.describe_in(table, n, DATA, 16, if n < 1024 { next } else { 0 }, n + 1);
            });
            0
        }),
    ];
    for (what, make) in cases {
        let mut rings = start(&board, &d, pci::INDIRECT_DESC);
        board.caught.take(0x40);
        let head = make(&mut rings[0]);
        rings[0].offer(head);
        d.kick(0);
        broken(what, &d);
        assert_eq!(rings[0].used_idx(), 0, "{what}: no answer");
    }
    // And 1024 are not too many.
    let mut rings = start(&board, &d, pci::INDIRECT_DESC);
    rings[0].describe(0, table, 1024 * 16, indirect, 0);
    for n in 0..1024 {
        let last = if n < 1023 { next } else { 0 };
        rings[0].describe_in(table, n, DATA, 16, write | last, n + 1);
    }
    rings[0].offer(0);
    d.kick(0);
    until(|| (rings[0].used_idx() == 1).then_some(()));
}

#[test]
fn registers_take_any_access_and_the_device_survives() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x9e37_79b9_7f4a_7c15u64);
    println!("SEED={seed}");
    let mut x = seed;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let board = Board::new();
    let tasks = vec![(vec![0, 1], Thread::Own("echo".into())), (vec![0], Thread::Slow)];
    let d = board.plug(Echo::new(2, tasks));
    let spaces = [(d.bar, BAR_SIZE), (pci::config(d.slot, 0), 0x1000), (pci::ECAM, 0x10_0000)];
    for (base, len) in spaces {
        for off in (0..len).filter(|off| len < 0x1_0000 || off % 0x1000 < 0x80) {
            for width in [1, 2, 4, 8].into_iter().filter(|w| off + w <= len) {
                let mut data = [0; 8];
                board.cpu.load(base + off, &mut data[..width as usize]);
                board.cpu.store(base + off, &random().to_le_bytes()[..width as usize]);
            }
        }
    }
    // The same at random, often in the common configuration, so that states are reached.
    let bar = |board: &Board| Driver::new(board.cpu.clone(), d.slot).bar;
    board.root.reset();
    let mut base = bar(&board);
    let mut statuses = std::collections::BTreeSet::new();
    for n in 0..200_000 {
        let width = 1 << (random() % 4);
        let off = match random() % 8 {
            0 => random() % (BAR_SIZE - 8),
            1 => NOTIFY + random() % 16,
            2 => TABLE + random() % 64,
            _ => random() % common::LEN,
        };
        let value = match random() % 4 {
            0 => random(),
            1 => random() % 4,
            2 => random() & 0x3f_fff0,
            _ => 0x01 << (random() % 40),
        };
        let (off, width, value) = match random() % 10 {
            // What a real driver does now and then, or nothing would ever start.
            0 => (0x14, 1, [1, 3, 11, 15][(random() % 4) as usize]),
            1 => (0x08, 4, 1),
            2 => (0x0c, 4, 1),
            3 => ([0x20, 0x28, 0x30][(random() % 3) as usize], 8, 0x1000 * (1 + random() % 8)),
            _ => (off, width, value),
        };
        board.cpu.store(base + off, &value.to_le_bytes()[..width as usize]);
        let mut data = [0; 8];
        board.cpu.load(base + off, &mut data[..width as usize]);
        statuses.insert(board.cpu.r8(base + 0x14));
        if n % 1000 == 999 {
            board.root.reset();
            base = bar(&board);
        }
    }
    assert!(statuses.iter().any(|s| s & pci::DRIVER_OK != 0), "the device never started: {statuses:x?}");
    board.root.reset();
    let d = Driver::new(board.cpu.clone(), d.slot);
    let mut rings = start(&board, &d, 0);
    request(&board, &mut rings[0], DATA, b"alive");
    d.kick(0);
    until(|| rings[0].answer());
}

#[test]
fn a_reset_waits_for_the_request_in_hand() {
    let board = Board::new();
    let echo = Echo::simple();
    let (d, mut rings) = started(&board, echo.clone(), 0);
    request(&board, &mut rings[0], DATA, &[WAIT, 7]);
    request(&board, &mut rings[0], DATA + 0x4000, b"never");
    d.kick(0);
    until(|| (echo.gate.waiting.load(Ordering::SeqCst) == 1).then_some(()));
    let (other, gate) = (d.clone(), echo.gate.clone());
    let resetting = spawn("reset", 128 << 10, move || other.reset()).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert!(!resetting.is_finished(), "reset came back while a worker had the guest's memory");
    assert_ne!(d.status(), 0, "reset is not done");
    gate.open();
    resetting.join().unwrap();
    assert_eq!((d.status(), echo.resets.load(Ordering::SeqCst)), (0, 2));
    assert_eq!(echo.done.load(Ordering::SeqCst), 1, "what waited in the ring is not begun");
    d.kick(0);
}

#[test]
fn paused_it_finishes_the_request_in_hand_and_holds_the_rest() {
    let board = Board::new();
    let echo = Echo::simple();
    let (d, mut rings) = started(&board, echo.clone(), 0);
    request(&board, &mut rings[0], DATA, &[WAIT]);
    request(&board, &mut rings[0], DATA + 0x4000, b"later");
    d.kick(0);
    until(|| (echo.gate.waiting.load(Ordering::SeqCst) == 1).then_some(()));
    let root = board.root.clone();
    let pausing = spawn("pause", 128 << 10, move || root.pause()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!pausing.is_finished());
    echo.gate.open();
    pausing.join().unwrap();
    assert_eq!(rings[0].used_idx(), 1);
    d.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rings[0].used_idx(), 1, "paused, it takes nothing");
    board.root.resume();
    until(|| (rings[0].used_idx() == 2).then_some(()));
    assert_eq!(reply(&board, DATA + 0x4000, 5), b"later");
}

#[test]
fn a_request_on_hold_comes_again_after_resume() {
    let board = Board::new();
    let echo = Echo::simple();
    let (d, mut rings) = started(&board, echo.clone(), 0);
    let first = request(&board, &mut rings[0], DATA, &[HOLD, 5, 6]);
    let second = request(&board, &mut rings[0], DATA + 0x4000, b"second");
    d.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rings[0].used_idx(), 0, "nothing overtakes it");
    board.root.pause();
    board.root.resume();
    assert_eq!(until(|| rings[0].answer()), (first, 3));
    assert_eq!(until(|| rings[0].answer()), (second, 6));
    assert_eq!(reply(&board, DATA, 3), [HOLD, 5, 6]);
}

#[test]
fn a_panic_breaks_its_device_and_no_other() {
    let board = Board::new();
    let slow = || Echo::new(1, vec![(vec![0], Thread::Slow)]);
    let (a, mut a_rings) = started(&board, slow(), 0);
    let d = board.plug(slow());
    assert!(d.negotiate(pci::VERSION_1));
    let mut ring = Ring::new(board.ram.mem.clone(), 64, 0x8_0000);
    d.place_queue(0, 64, ring.desc, ring.avail, ring.used);
    d.enable_queue(0);
    d.driver_ok();
    request(&board, &mut a_rings[0], DATA, &[PANIC]);
    a.kick(0);
    until(|| (a.status() & pci::NEEDS_RESET != 0).then_some(()));
    request(&board, &mut ring, DATA + 0x4000, b"unharmed");
    d.kick(0);
    until(|| ring.answer());
    assert_eq!(d.status() & pci::NEEDS_RESET, 0);
    // And the first one is as new after a reset.
    let mut rings = start(&board, &a, 0);
    request(&board, &mut rings[0], DATA, b"new");
    a.kick(0);
    until(|| rings[0].answer());
}

#[test]
fn several_workers_serve_one_queue_at_once() {
    let board = Board::new();
    let own = |n| (vec![0], Thread::Own(format!("echo{n}")));
    let echo = Echo::new(1, (0..4).map(own).collect());
    let (d, mut rings) = started(&board, echo.clone(), pci::EVENT_IDX);
    for n in 0..4 {
        request(&board, &mut rings[0], DATA + 0x4000 * n, &[WAIT, n as u8]);
    }
    // One kick for all of them.
    d.kick(0);
    until(|| (echo.gate.waiting.load(Ordering::SeqCst) == 4).then_some(()));
    echo.gate.open();
    for _ in 0..4 {
        until(|| rings[0].answer());
    }
}

#[test]
fn one_queue_is_reset_while_the_other_goes_on() {
    let board = Board::new();
    let echo = Echo::new(2, vec![(vec![0, 1], Thread::Own("echo".into()))]);
    let (d, mut rings) = started(&board, echo, pci::RING_RESET);
    d.select(0);
    d.bus.w16(d.common + 0x3a, 1);
    assert_eq!((d.bus.r16(d.common + 0x3a), d.bus.r16(d.common + 0x1c)), (0, 0));
    assert_eq!(d.queue_size(0), 64);
    request(&board, &mut rings[1], DATA, b"one");
    d.kick(1);
    until(|| rings[1].answer());
    let mut ring = Ring::new(board.ram.mem.clone(), 16, 0x8_0000);
    d.place_queue(0, 16, ring.desc, ring.avail, ring.used);
    request(&board, &mut ring, DATA, b"zero");
    d.kick(0);
    d.queue_vector(0, 1);
    d.enable_queue(0);
    until(|| ring.answer());
    // Coming back with nonsense breaks the device.
    d.select(0);
    d.bus.w16(d.common + 0x3a, 1);
    d.place_queue(0, 16, !15, 0x2000, 0x3000);
    d.enable_queue(0);
    assert_ne!(d.status() & pci::NEEDS_RESET, 0);
}

#[test]
fn without_msix_the_line_is_raised_and_reading_the_status_lowers_it() {
    let board = Board::new();
    let echo = Echo::simple();
    let d = board.plug(echo.clone());
    let gsi = 16 + u32::from(d.slot) % 4;
    assert!(d.negotiate(pci::VERSION_1));
    let mut ring = Ring::new(board.ram.mem.clone(), 64, 0x1000);
    d.place_queue(0, 64, ring.desc, ring.avail, ring.used);
    d.enable_queue(0);
    d.driver_ok();
    request(&board, &mut ring, DATA, b"x");
    d.kick(0);
    until(|| board.caught.line(gsi).then_some(()));
    assert_eq!((d.bus.r8(d.isr), d.bus.r8(d.isr)), (1, 0));
    assert!(!board.caught.line(gsi));
    let before = d.generation();
    echo.up.get().unwrap().config_changed();
    assert!(board.caught.line(gsi));
    assert_ne!(d.generation(), before);
    // INTX_DISABLE silences it, whatever the device wants.
    let command = pci::config(d.slot, 4);
    d.bus.w16(command, d.bus.r16(command) | 1 << 10);
    assert!(!board.caught.line(gsi));
    d.bus.w16(command, d.bus.r16(command) & !(1 << 10));
    assert!(board.caught.line(gsi));
    // So does MSI-X.
    d.enable_msix(0x40);
    assert!(!board.caught.line(gsi));
    assert!(board.caught.messages.lock().unwrap().is_empty());
    d.bus.w16(pci::config(d.slot, d.msix + 2), 0);
    assert!(board.caught.line(gsi));
    d.reset();
    assert!(!board.caught.line(gsi));
}

/// A cause that comes while the driver reads the status is in what it reads, or the line is high.
#[test]
fn without_msix_no_interrupt_is_lost() {
    let board = Board::new();
    let echo = Echo::simple();
    let d = board.plug(echo.clone());
    let gsi = 16 + u32::from(d.slot) % 4;
    start(&board, &d, 0);
    d.bus.w16(pci::config(d.slot, d.msix + 2), 0);
    let up = echo.up.get().unwrap().clone();
    // Odd while the other thread is to say that something has changed; MAX: the end.
    let turn = std::sync::atomic::AtomicUsize::new(0);
    let rounds = 2_000;
    let lost = std::thread::scope(|s| {
        s.spawn(|| {
            loop {
                match turn.load(Ordering::SeqCst) {
                    usize::MAX => break,
                    n if n % 2 == 0 => std::thread::yield_now(),
                    n => {
                        up.config_changed();
                        turn.store(n + 1, Ordering::SeqCst);
                    }
                }
            }
        });
        let lost = (0..rounds).find_map(|round| {
            turn.store(2 * round + 1, Ordering::SeqCst);
            let mut seen = 0;
            while turn.load(Ordering::SeqCst) % 2 == 1 {
                seen |= d.bus.r8(d.isr);
            }
            let line = board.caught.line(gsi);
            let left = d.bus.r8(d.isr);
            (left != 0 && !line || left | seen == 0).then_some((round, seen, left, line))
        });
        turn.store(usize::MAX, Ordering::SeqCst);
        lost
    });
    assert_eq!(lost, None, "round, causes read, causes left, level of the line");
}

#[test]
fn configuration_space_has_a_window_on_the_registers() {
    let board = Board::new();
    let d = board.plug(Echo::simple());
    let c = |reg| pci::config(d.slot, d.window + reg);
    let point = |off: u64, len: u32| {
        d.bus.w8(c(4), 0);
        d.bus.w32(c(8), off as u32);
        d.bus.w32(c(12), len);
    };
    point(d.common - d.bar + 0x12, 2);
    assert_eq!(d.bus.r32(c(16)), 1, "num_queues");
    point(d.device - d.bar + 4, 4);
    assert_eq!(d.bus.r32(c(16)), 0x0706_0504);
    d.bus.w32(c(16), 0x1234_5678);
    assert_eq!(d.bus.r32(d.device + 4), 0x1234_5678);
    // The device's state machine hears it too, reset included.
    point(d.common - d.bar + 0x14, 1);
    d.bus.w8(c(16), pci::ACKNOWLEDGE);
    assert_eq!(d.status(), pci::ACKNOWLEDGE);
    d.bus.w8(c(16), 0);
    assert_eq!(d.status(), 0);
    // Nonsense leads nowhere.
    for (off, len) in [(BAR_SIZE, 4), (BAR_SIZE - 2, 4), (1, 2), (0, 3), (0, 0), (0, u32::MAX), (u64::MAX, 1)]
    {
        point(off, len);
        d.bus.w32(c(16), 0xffff_ffff);
        d.bus.r32(c(16));
    }
    d.bus.w8(c(4), 3);
    d.bus.r32(c(16));
    assert_eq!(d.status(), 0);
}

#[test]
fn nothing_runs_before_driver_ok_or_after_reset() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks
            .filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok())
            .filter(|name| name.trim() == "echo-life")
            .count()
    };
    let board = Board::new();
    let echo = Echo::new(1, vec![(vec![0], Thread::Own("echo-life".into()))]);
    let d = board.plug(echo);
    assert_eq!(threads(), 0);
    let _rings = start(&board, &d, 0);
    // A thread gives itself its name.
    crate::virtio::testing::until(|| (threads() == 1).then_some(()));
    d.reset();
    assert_eq!(threads(), 0);
    let _rings = start(&board, &d, 0);
    board.root.unplug(d.slot);
    assert_eq!(threads(), 0);
    assert_eq!(d.bus.r32(d.common), u32::MAX, "the registers are gone");
}

/// Two processors drive the device against each other while control pauses it: nothing hangs, and
/// afterwards it works.
#[test]
fn processors_may_fight_over_the_device() {
    let board = Board::new();
    let own = |n| (vec![0, 1], Thread::Own(format!("echo{n}")));
    let d = board.plug(Echo::new(2, vec![own(0), own(1), (vec![1], Thread::Slow)]));
    let fighters: Vec<_> = (1..=2u64)
        .map(|n| {
            let (d, mem) = (d.clone(), board.ram.mem.clone());
            std::thread::spawn(move || {
                let mut x = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(n);
                for _ in 0..400 {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    match x >> 8 & 3 {
                        // Not `reset`, which waits for a status that the other may change again.
                        0 => d.set_status(0),
                        1 => d.kick((x >> 16 & 1) as u16),
                        2 => {
                            d.select((x >> 16 & 1) as u16);
                            d.bus.w16(d.common + 0x3a, 1);
                        }
                        _ => {
                            d.set_status(0);
                            d.set_status(pci::ACKNOWLEDGE | pci::DRIVER);
                            d.accept(pci::VERSION_1 | pci::RING_RESET | pci::EVENT_IDX);
                            d.set_status(pci::FEATURES_OK);
                            for q in 0..2 {
                                let base = 0x1000 + 0x4000 * u64::from(q) + 0x2_0000 * n;
                                let mut ring = Ring::new(mem.clone(), 64, base);
                                d.place_queue(q, 64, ring.desc, ring.avail, ring.used);
                                d.enable_queue(q);
                                let head = ring.chain(&[(DATA, 8, false), (DATA + 64, 8, true)]).unwrap();
                                ring.offer(head);
                            }
                            d.driver_ok();
                        }
                    }
                }
            })
        })
        .collect();
    while fighters.iter().any(|f| !f.is_finished()) {
        board.root.pause();
        board.root.resume();
        std::thread::sleep(Duration::from_micros(200));
    }
    fighters.into_iter().for_each(|f| f.join().unwrap());
    let mut rings = start(&board, &d, 0);
    for (n, ring) in rings.iter_mut().enumerate() {
        request(&board, ring, DATA, b"peace");
        d.kick(n as u16);
        until(|| ring.answer());
    }
}
