use super::*;
use crate::virtio::testing::ring::{INDIRECT, NEXT, Ring, WRITE};
use crate::virtio::testing::{GuestRam, HIGH, LOW, Told};

const BASE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;

struct Rig {
    ram: GuestRam,
    told: Arc<Told>,
    halt: Arc<Halt>,
    queue: Queue,
    ring: Ring<Mem>,
}

fn rig(size: u16, event_idx: bool) -> Rig {
    let ram = GuestRam::new();
    let (told, halt) = (Arc::new(Told::default()), Arc::new(Halt::default()));
    let queue = Queue::new(3, ram.mem.clone(), told.clone(), halt.clone());
    let ring = Ring::new(ram.mem.clone(), size, BASE);
    let setup = Setup { size, desc: ring.desc, avail: ring.avail, used: ring.used };
    assert!(!queue.is_enabled() && queue.pop().is_none());
    assert!(queue.enable(setup, 1024, event_idx));
    Rig { ram, told, halt, queue, ring }
}

impl Rig {
    fn offer(&mut self, len: u32) -> u16 {
        let head = self.ring.chain(&[(DATA, len, false), (DATA + 0x1000, len, true)]).unwrap();
        self.ring.offer(head);
        head
    }

    fn interrupts(&self) -> usize {
        self.told.interrupts.swap(0, Ordering::SeqCst)
    }

    fn word(&self, addr: u64) -> u16 {
        let mut b = [0; 2];
        assert!(self.ram.mem.read(addr, &mut b));
        u16::from_le_bytes(b)
    }
}

#[test]
fn a_chain_shows_what_the_driver_described() {
    let mut r = rig(8, false);
    assert!(r.ram.mem.write(DATA, b"abcdef") && r.ram.mem.write(HIGH, b"ghi"));
    let pieces = [
        (DATA, 2, false),
        (DATA + 2, 4, false),
        (HIGH, 3, false),
        (DATA + 64, 5, true),
        (HIGH + 64, 4, true),
    ];
    for indirect in [false, true] {
        let head = if indirect { r.ring.indirect(&pieces, 0x8000) } else { r.ring.chain(&pieces) }.unwrap();
        r.ring.offer(head);
        let mut chain = r.queue.pop().unwrap();
        assert_eq!((chain.head(), chain.readable().to_vec()), (head, b"abcdefghi".to_vec()));
        assert_eq!((chain.readable().iovecs().len(), chain.writable_len()), (3, 9));
        chain.writable_at(3, 4).copy_from(0, b"WXYZ");
        let (from, mut to) = chain.split();
        to.copy_from(0, &from.to_vec()[..3]);
        r.queue.push(chain, 7);
        assert_eq!(r.ring.answer(), Some((head, 7)));
        let (mut a, mut b) = ([0; 5], [0; 4]);
        assert!(r.ram.mem.read(DATA + 64, &mut a) && r.ram.mem.read(HIGH + 64, &mut b));
        assert_eq!((&a, &b), (b"abcWX", b"YZ\0\0"));
        assert!(r.queue.pop().is_none());
    }
    assert_eq!(*r.told.broken.lock().unwrap(), None);
}

#[test]
fn the_length_written_is_never_more_than_the_room() {
    let mut r = rig(8, false);
    let head = r.offer(16);
    let chain = r.queue.pop().unwrap();
    r.queue.push(chain, usize::MAX);
    assert_eq!(r.ring.answer(), Some((head, 16)));
}

#[test]
fn interrupts_follow_the_drivers_flag() {
    let mut r = rig(8, false);
    for (flag, interrupts) in [(0u16, 1), (1, 0), (0, 1)] {
        assert!(r.ram.mem.write(r.ring.avail, &flag.to_le_bytes()));
        r.offer(1);
        let chain = r.queue.pop().unwrap();
        r.queue.push(chain, 0);
        assert_eq!(r.interrupts(), interrupts);
        r.ring.answer().unwrap();
    }
}

#[test]
fn interrupts_follow_the_drivers_index() {
    let mut r = rig(8, true);
    let used_event = r.ring.avail + 4 + 2 * 8;
    let mut served = 0u16;
    let mut wishes = 0u16;
    // Over the wrap-around of the index, answer by answer and in batches: an interrupt comes
    // exactly when the used index passes the driver's wish.
    let mut x = 0x1234_5678_9abc_def1u64;
    for round in 0..40_000u32 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let batch = 1 + (x % 3) as u16;
        let wish = served.wrapping_add((x >> 8) as u16 % 6);
        assert!(r.ram.mem.write(used_event, &wish.to_le_bytes()));
        for _ in 0..batch {
            r.offer(1);
        }
        let chains: Vec<_> = std::iter::from_fn(|| r.queue.pop()).map(|c| (c, 0)).collect();
        assert_eq!(chains.len(), usize::from(batch));
        r.queue.push_all(chains);
        let passed = wish.wrapping_sub(served) < batch;
        assert_eq!(r.interrupts(), usize::from(passed), "round {round}: {served} + {batch}, wish {wish}");
        wishes = wishes.wrapping_add(u16::from(passed));
        served = served.wrapping_add(batch);
        for _ in 0..batch {
            r.ring.answer().unwrap();
        }
    }
    assert!(wishes > 0);
}

#[test]
fn kicks_are_asked_for_only_when_the_queue_ran_dry() {
    for event_idx in [false, true] {
        let mut r = rig(8, event_idx);
        let avail_event = r.ring.used + 4 + 8 * 8;
        let wants = |r: &Rig| match event_idx {
            true => r.word(avail_event) == r.ring.avail_idx(),
            false => r.word(r.ring.used) & 1 == 0,
        };
        assert!(!r.queue.prepare_sleep() && wants(&r), "a new queue");
        r.offer(1);
        r.queue.suppress_kicks();
        assert!(!wants(&r));
        assert!(r.queue.prepare_sleep(), "something came: look again before sleeping");
        assert!(!r.queue.prepare_sleep(), "but if it is left, it is left on purpose");
        let chain = r.queue.pop().unwrap();
        r.queue.push(chain, 0);
        assert!(r.queue.pop().is_none());
        assert!(!r.queue.prepare_sleep() && wants(&r));
        assert!(!r.queue.has_work());
        r.offer(1);
        assert!(r.queue.has_work());
    }
}

/// The second worker's last pop took the only request, after the first one had found none: when
/// the first one sleeps, kicks must come all the same, or the next request waits for the second.
#[test]
fn a_worker_that_sleeps_hears_of_what_comes_while_another_works() {
    use crate::virtio::kick::Kick;
    let mut r = rig(8, true);
    let kicks: Vec<Arc<Kick>> = (0..2).map(|_| Arc::new(Kick::new().unwrap())).collect();
    r.queue.set_workers(kicks.iter().map(|k| Waker::new(k.clone())).collect());
    assert!(r.queue.pop().is_none(), "the first worker");
    r.offer(1);
    let chain = r.queue.pop().expect("the second worker");
    kicks[0].prepare();
    assert!(!r.queue.prepare_sleep());
    let avail_event = r.ring.used + 4 + 8 * 8;
    assert_eq!(r.word(avail_event), r.ring.avail_idx(), "the next request brings a kick");
    let head = r.ring.chain(&[(DATA, 1, true)]).unwrap();
    r.ring.offer(head);
    assert!(r.queue.prepare_sleep(), "and one that is there already is not slept over");
    r.queue.push(chain, 0);
    let chain = r.queue.pop().expect("the next request");
    r.queue.push(chain, 0);
}

#[test]
fn several_answers_appear_at_once() {
    let mut r = rig(16, false);
    let heads: Vec<u16> = (0..5).map(|_| r.offer(4)).collect();
    let chains: Vec<_> = std::iter::from_fn(|| r.queue.pop()).map(|c| (c, 4)).collect();
    assert_eq!((chains.len(), r.ring.used_idx()), (5, 0));
    r.queue.push_all(chains);
    assert_eq!((r.ring.used_idx(), r.interrupts()), (5, 1));
    let answers: Vec<_> = std::iter::from_fn(|| r.ring.answer()).collect();
    assert_eq!(answers, heads.iter().map(|h| (*h, 4)).collect::<Vec<_>>());
}

#[test]
fn what_is_put_back_comes_next_and_on_hold_nothing_comes() {
    let mut r = rig(8, false);
    let heads: Vec<u16> = (0..3).map(|_| r.offer(4)).collect();
    let (a, b) = (r.queue.pop().unwrap(), r.queue.pop().unwrap());
    r.queue.unpop(b);
    r.queue.unpop(a);
    assert!(r.queue.has_work());
    let a = r.queue.pop().unwrap();
    assert_eq!(a.head(), heads[0]);
    let b = r.queue.pop().unwrap();
    r.queue.hold(a);
    r.queue.hold(b);
    assert!(r.queue.pop().is_none() && !r.queue.has_work() && !r.queue.prepare_sleep());
    r.queue.unpark();
    for head in heads {
        let chain = r.queue.pop().unwrap();
        assert_eq!(chain.head(), head);
        r.queue.push(chain, 0);
    }
    assert!(r.queue.pop().is_none());
}

#[test]
fn halted_it_gives_nothing_and_disabled_it_forgets() {
    let mut r = rig(8, false);
    r.offer(4);
    r.halt.pause(true);
    assert!(r.queue.pop().is_none() && !r.queue.has_work());
    r.halt.pause(false);
    let chain = r.queue.pop().unwrap();
    r.queue.disable();
    r.queue.push(chain, 4);
    assert_eq!((r.ring.used_idx(), r.interrupts()), (0, 0), "nobody waits for it any more");
    assert!(r.queue.pop().is_none() && r.told.broken.lock().unwrap().is_none());
}

#[test]
fn a_broken_ring_stops_all_queues_of_the_device() {
    let mut r = rig(8, false);
    let other = Queue::new(4, r.ram.mem.clone(), r.told.clone(), r.halt.clone());
    let mut ring = Ring::new(r.ram.mem.clone(), 8, 0x9000);
    assert!(other.enable(Setup { size: 8, desc: ring.desc, avail: ring.avail, used: ring.used }, 8, false));
    let head = ring.chain(&[(DATA, 1, false)]).unwrap();
    ring.offer(head);
    r.ring.set_avail_idx(9);
    assert!(r.queue.pop().is_none());
    assert_eq!(r.told.broken.lock().unwrap().as_deref(), Some("queue 3: available index jumps"));
    assert!(other.pop().is_none());
    assert!(!r.queue.is_enabled());
}

#[test]
#[should_panic(expected = "dropped without an answer")]
fn a_forgotten_request_is_noticed() {
    let mut r = rig(8, false);
    r.offer(4);
    drop(r.queue.pop());
}

/// Random rings: whatever is popped lies in guest memory, and nothing panics.
#[test]
fn random_rings_never_reach_host_memory() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x0bad_5eed_0bad_5eedu64);
    println!("SEED={seed}");
    let mut x = seed;
    let mut random = move |n: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) % n
    };
    let ram = GuestRam::new();
    let map = ram.mem.map();
    let regions: Vec<(usize, usize)> = [(0, LOW), (HIGH, crate::virtio::testing::HIGH_LEN)]
        .iter()
        .map(|(base, len)| {
            use vm_memory::GuestMemoryBackend;
            (map.get_host_address(GuestAddress(*base)).unwrap() as usize, *len as usize)
        })
        .collect();
    let (mut popped, mut broken) = (0, 0);
    for _ in 0..20_000 {
        let (told, halt) = (Arc::new(Told::default()), Arc::new(Halt::default()));
        let queue = Queue::new(0, ram.mem.clone(), told.clone(), halt);
        let mut ring = Ring::new(ram.mem.clone(), 16, BASE);
        let setup = Setup { size: 16, desc: ring.desc, avail: ring.avail, used: ring.used };
        assert!(queue.enable(setup, 16, random(2) == 0));
        let addresses = [DATA, 0x8000, LOW - 64, LOW, HIGH - 8, HIGH + 0xf_fff0, u64::MAX - 3, BASE];
        let lengths = [0, 1, 16, 32, 256, 4096, 1 << 20, u32::MAX];
        for table in [ring.desc, 0x8000] {
            for n in 0..16 {
                let (at, len) = (addresses[random(3) as usize * random(3) as usize % 8], random(4) as usize);
                let mut flags = if random(4) == 0 { 0 } else { NEXT };
                flags |= if random(3) == 0 { WRITE } else { 0 };
                flags |= if random(8) == 0 { INDIRECT } else { 0 };
                let next = if random(20) == 0 { random(0x1_0000) } else { n + 1 } as u16;
                let len = lengths[if random(10) == 0 { 4 + len } else { len }];
                ring.describe_in(table, n as u16, at + random(4), len, flags, next);
            }
        }
        for _ in 0..random(6) {
            ring.offer(random(17) as u16);
        }
        if random(10) == 0 {
            ring.set_avail_idx(random(0x1_0000) as u16);
        }
        while let Some(mut chain) = queue.pop() {
            popped += 1;
            let (from, to) = chain.split();
            for piece in from.iovecs().iter().chain(to.iovecs()) {
                let (start, len) = (piece.iov_base as usize, piece.iov_len);
                let inside = |r: &(usize, usize)| start >= r.0 && start + len <= r.0 + r.1;
                assert!(regions.iter().any(inside), "a piece outside guest memory");
            }
            let len = chain.writable_len();
            chain.writable().fill(0, len.min(64), 0x11);
            queue.push(chain, len);
        }
        broken += usize::from(told.broken.lock().unwrap().is_some());
    }
    assert!(popped > 1000 && broken > 1000, "{popped} popped, {broken} broken: not much of a test");
    ram.check_canaries();
}
