use super::*;
use crate::machine::memory::Mem;
use crate::virtio::queue::Setup;
use crate::virtio::testing::ring::Ring;
use crate::virtio::testing::{GuestRam, Told, until};
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

const DATA: u64 = 0x10_0000;

/// Answers everything; counts how often it was called.
struct Counter {
    calls: Arc<AtomicUsize>,
    stop: Option<Duration>,
}

impl Worker for Counter {
    fn on_queue(&mut self, _n: u16, q: &Queue) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        while let Some(chain) = q.pop() {
            if let Some(time) = self.stop {
                std::thread::sleep(time);
            }
            q.push(chain, 0);
        }
    }
}

struct Rig {
    ram: GuestRam,
    told: Arc<Told>,
    ring: Ring<Mem>,
    queues: Arc<[Arc<Queue>]>,
    slow: Arc<SlowThread>,
    halt: Arc<Halt>,
    event_idx: bool,
    poll: Duration,
}

fn rig(event_idx: bool) -> Rig {
    let ram = GuestRam::new();
    let (told, halt) = (Arc::new(Told::default()), Arc::new(Halt::default()));
    let ring = Ring::new(ram.mem.clone(), 16, 0x1000);
    let queue = Queue::new(0, ram.mem.clone(), told.clone(), halt.clone());
    let setup = Setup { size: 16, desc: ring.desc, avail: ring.avail, used: ring.used };
    assert!(queue.enable(setup, 16, event_idx));
    let queues: Arc<[Arc<Queue>]> = Arc::new([Arc::new(queue)]);
    Rig { ram, told, ring, queues, slow: Arc::default(), halt, event_idx, poll: Duration::ZERO }
}

impl Rig {
    fn crew(&self, workers: Vec<(Box<dyn Worker>, Thread)>) -> Crew {
        let task = |(worker, thread)| Task { worker, queues: vec![0], thread, poll: self.poll };
        let tasks = workers.into_iter().map(task).collect();
        let transport: Arc<dyn Transport> = self.told.clone();
        Crew::start(tasks, self.queues.clone(), self.halt.clone(), &transport, &self.slow).unwrap()
    }

    fn word(&self, addr: u64) -> u16 {
        let mut b = [0; 2];
        assert!(self.ram.mem.read(addr, &mut b));
        u16::from_le_bytes(b)
    }

    /// Offers a request; kicks only if the device asked for it, as a driver does. True if it kicked.
    fn offer(&mut self) -> bool {
        let old = self.ring.avail_idx();
        let head = self.ring.chain(&[(DATA, 16, false)]).unwrap();
        self.ring.offer(head);
        fence(Ordering::SeqCst);
        let wanted = match self.event_idx {
            true => {
                let event = self.word(self.ring.used + 4 + 8 * 16);
                let new = old.wrapping_add(1);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            false => self.word(self.ring.used) & 1 == 0,
        };
        if wanted {
            self.queues[0].kick();
        }
        wanted
    }
}

fn own(n: usize) -> Thread {
    Thread::Own(format!("test{n}"))
}

/// A driver that kicks only when it must, and workers that sleep whenever they can: an answer that
/// does not come is a wake-up that was lost.
#[test]
fn no_wake_up_is_lost() {
    let cases = [(1, false), (1, true), (3, false), (3, true)];
    for ((workers, event_idx), micros) in cases.iter().flat_map(|c| [(*c, 0), (*c, 20)]) {
        let mut r = Rig { poll: Duration::from_micros(micros), ..rig(event_idx) };
        let calls = Arc::new(AtomicUsize::new(0));
        let worker = |n| {
            let worker = Counter { calls: calls.clone(), stop: None };
            (Box::new(worker) as Box<dyn Worker>, if workers == 1 { Thread::Slow } else { own(n) })
        };
        let crew = r.crew((0..workers).map(worker).collect());
        let (mut kicks, mut x) = (0, 0x1234_5678_9abc_def1u64);
        let end = Instant::now() + Duration::from_secs(20);
        for _ in 0..10_000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            for _ in 0..1 + x % 3 {
                kicks += usize::from(r.offer());
            }
            // Sometimes at once, sometimes after the worker went to sleep.
            (0..x >> 8 & 0xff).for_each(|_| std::hint::spin_loop());
            while r.ring.room() < 16 {
                if r.ring.answer().is_none() {
                    assert_eq!(*r.told.broken.lock().unwrap(), None);
                    assert!(Instant::now() < end, "a wake-up was lost");
                    std::thread::yield_now();
                }
            }
        }
        println!(
            "{workers} workers, event_idx {event_idx}, poll {micros} us: {kicks} kicks, {calls:?} calls"
        );
        drop(crew);
    }
}

#[test]
fn a_burst_needs_one_kick() {
    let mut r = rig(true);
    let worker = Counter { calls: Arc::default(), stop: Some(Duration::from_millis(2)) };
    let _crew = r.crew(vec![(Box::new(worker), own(0))]);
    std::thread::sleep(Duration::from_millis(20));
    let kicks = (0..10).filter(|_| r.offer()).count();
    assert_eq!(kicks, 1);
    for _ in 0..10 {
        until(|| r.ring.answer());
    }
}

/// Leaves everything in the queue; takes one request for each event of its source.
struct OnDemand {
    source: Arc<EventFd>,
    calls: Arc<AtomicUsize>,
}

impl Worker for OnDemand {
    fn sources(&self) -> Vec<crate::virtio::device::Source> {
        vec![crate::virtio::device::Source { fd: self.source.as_raw_fd(), events: libc::POLLIN }]
    }
    fn on_queue(&mut self, _n: u16, _q: &Queue) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
    fn on_source(&mut self, n: usize, revents: i16, qs: &[Arc<Queue>]) {
        assert_eq!((n, revents), (0, libc::POLLIN));
        self.source.read().unwrap();
        if let Some(chain) = qs[0].pop() {
            qs[0].push(chain, 0);
        }
    }
}

#[test]
fn a_queue_left_full_on_purpose_costs_nothing_until_its_source_is_ready() {
    let mut r = rig(true);
    let (source, calls) = (Arc::new(EventFd::new(0).unwrap()), Arc::new(AtomicUsize::new(0)));
    let worker = OnDemand { source: source.clone(), calls: calls.clone() };
    let crew = r.crew(vec![(Box::new(worker), own(0))]);
    for _ in 0..5 {
        r.offer();
    }
    std::thread::sleep(Duration::from_millis(50));
    let before = calls.load(Ordering::SeqCst);
    assert!(before < 20, "{before} calls: it spins");
    for n in 1..=3 {
        source.write(1).unwrap();
        until(|| (r.ring.used_idx() == n).then_some(()));
    }
    // Paused, its source is not asked either.
    crew.pause();
    source.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(r.ring.used_idx(), 3);
    crew.resume();
    until(|| (r.ring.used_idx() == 4).then_some(()));
}

struct Panics;

impl Worker for Panics {
    fn on_queue(&mut self, _n: u16, _q: &Queue) {}
    fn sources(&self) -> Vec<crate::virtio::device::Source> {
        panic!("in sources")
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        panic!("in drop");
    }
}

#[test]
fn panics_anywhere_end_the_device_only() {
    let r = rig(false);
    let crew = r.crew(vec![(Box::new(Panics), Thread::Slow)]);
    let why = until(|| r.told.broken.lock().unwrap().clone());
    assert_eq!(why, "a worker panicked: in sources");
    // Everything still answers.
    crew.pause();
    crew.resume();
    drop(crew);
    let mut other = Rig { slow: r.slow.clone(), ..rig(false) };
    let worker = Counter { calls: Arc::default(), stop: None };
    let _crew = other.crew(vec![(Box::new(worker), Thread::Slow)]);
    other.offer();
    until(|| other.ring.answer());
}

#[test]
fn pausing_resuming_and_stopping_under_load_loses_nothing() {
    let mut r = rig(true);
    let worker = |n| (Box::new(Counter { calls: Arc::default(), stop: None }) as Box<dyn Worker>, own(n));
    let crew = r.crew((0..2).map(worker).collect());
    for n in 0..2000 {
        r.offer();
        if n % 3 == 0 {
            crew.pause();
            let before = r.ring.used_idx();
            std::thread::yield_now();
            assert_eq!(r.ring.used_idx(), before, "a worker works while paused");
            crew.resume();
        }
        until(|| r.ring.answer());
    }
    r.offer();
    drop(crew);
    assert!(r.slow.0.lock().unwrap().is_none());
}

#[test]
fn the_slow_thread_lives_as_long_as_it_has_users() {
    let slow: Arc<SlowThread> = Arc::default();
    let (a, b) = (Rig { slow: slow.clone(), ..rig(false) }, Rig { slow: slow.clone(), ..rig(false) });
    let start =
        |r: &Rig| r.crew(vec![(Box::new(Counter { calls: Arc::default(), stop: None }), Thread::Slow)]);
    let users = || slow.0.lock().unwrap().as_ref().map(|(_, n)| *n);
    let (one, two) = (start(&a), start(&b));
    assert_eq!(users(), Some(2));
    drop(one);
    assert_eq!(users(), Some(1));
    drop(two);
    assert_eq!(users(), None);
}

#[test]
fn patience_is_learned_from_short_sleeps_and_lost_by_a_long_one() {
    let max = Duration::from_millis(5);
    let mut patience = Patience { window: Duration::ZERO, pace: Pace::default() };
    assert!(!patience.watch(|| panic!("an idle loop does not even look")));
    patience.sleep(max, || ());
    assert_eq!(patience.window, Patience::FIRST);
    (0..20).for_each(|_| patience.sleep(max, || ()));
    assert_eq!(patience.window, max);
    assert!(patience.watch(|| true) && !patience.watch(|| false));
    patience.sleep(max, || std::thread::sleep(max * 2));
    assert_eq!(patience.window, Duration::ZERO);
    patience.sleep(Duration::ZERO, || ());
    assert_eq!(patience.window, Duration::ZERO);
}

#[test]
fn patience_grows_and_shrinks_at_the_pace_of_its_iothread() {
    let max = Duration::from_millis(5);
    let mut patience = Patience { window: Duration::ZERO, pace: Pace { grow: 10, shrink: 4 } };
    patience.sleep(max, || ());
    patience.sleep(max, || ());
    assert_eq!(patience.window, Patience::FIRST * 10);
    patience.sleep(max, || std::thread::sleep(max * 2));
    assert_eq!(patience.window, Patience::FIRST * 10 / 4);
}

#[test]
fn devices_share_an_iothread_that_outlives_them() {
    let io = Arc::new(IoThread::start("IO x", Duration::ZERO, Pace::default()).unwrap());
    let task = format!("/proc/self/task/{}", io.id());
    assert_eq!(std::fs::read_to_string(format!("{task}/comm")).unwrap(), "IO x\n");
    let (mut a, mut b) = (rig(false), rig(false));
    let worker = || Box::new(Counter { calls: Arc::default(), stop: None }) as Box<dyn Worker>;
    let one = a.crew(vec![(worker(), Thread::Io(io.clone()))]);
    let two = b.crew(vec![(worker(), Thread::Io(io.clone()))]);
    for r in [&mut a, &mut b] {
        r.offer();
        until(|| r.ring.answer());
    }
    drop(two);
    a.offer();
    until(|| a.ring.answer());
    drop(one);
    assert_eq!(Arc::strong_count(&io), 1);
    drop(io);
    assert!(!std::path::Path::new(&task).exists(), "the thread goes with its object");
}
