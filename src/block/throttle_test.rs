use super::*;
use crate::block::testing::Rng;
use std::sync::atomic::{AtomicBool, AtomicU64};

fn limits(list: &[(Which, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (which, avg) in list {
        limits.set(*which, Limit { avg: *avg, ..Limit::default() });
    }
    limits
}

#[test]
fn the_texts_of_limits_that_make_no_sense() {
    let total_and_read = "bps/iops/max total values and read/write values cannot be used at the same time";
    let one = |avg, max, length| {
        let mut l = Limits::default();
        l.set(Which::BpsRead, Limit { avg, max, length });
        l
    };
    let size = Limits { iops_size: 1, ..limits(&[(Which::BpsTotal, 5)]) };
    for (limits, want) in [
        (limits(&[(Which::BpsTotal, 1), (Which::BpsRead, 1)]), total_and_read),
        (limits(&[(Which::OpsTotal, 1), (Which::OpsWrite, 1)]), total_and_read),
        (size, "iops size requires an iops value to be set"),
        (one(VALUE_MAX + 1, 0, 1), "bps/iops/max values must be within [0, 1000000000000000]"),
        (one(u64::MAX, 0, 1), "bps/iops/max values must be within [0, 1000000000000000]"),
        (one(1, 0, 0), "the burst length cannot be 0"),
        (one(1, 0, 2), "burst length set without burst rate"),
        (one(1, VALUE_MAX, 2), "burst length too high for this burst rate"),
        (one(0, 5, 1), "bps_max/iops_max require corresponding bps/iops values"),
        (one(6, 5, 1), "bps_max/iops_max cannot be lower than bps/iops"),
    ] {
        assert_eq!(limits.check().unwrap_err(), want);
    }
    for good in [Limits::default(), one(VALUE_MAX, VALUE_MAX, 1), one(5, 5, 60)] {
        good.check().unwrap();
    }
}

/// Requests at random against random limits, on a clock of our own: over any time never more than
/// the burst and the rate allow, and not much less as long as there is work.
#[test]
fn rates_are_kept_from_both_sides() {
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut rng = Rng(seed + 1);
    for round in 0..20 {
        let bytes = rng.below(2) == 0;
        // Operations are counted one by one.
        let avg = 1000 + rng.below(if bytes { 1 << 20 } else { 200 });
        let (max, length) = match rng.below(3) {
            0 => (0, 1),
            1 => (avg + rng.below(10 * avg), 1),
            _ => (avg + rng.below(10 * avg), 1 + rng.below(5)),
        };
        let limit = Limit { avg, max, length };
        let which = if bytes { Which::BpsWrite } else { Which::OpsTotal };
        let mut state = State::default();
        state.limits.set(which, limit);
        state.limits.iops_size = if bytes { 0 } else { rng.below(2) * 4096 };
        state.limits.check().unwrap();
        let biggest = avg / 20 + 1;
        let (mut now, mut used) = (Duration::ZERO, 0.0);
        let end = Duration::from_secs(30 + length * max / avg);
        while now < end {
            state.leak(now);
            let wait = state.wait(Direction::Write);
            if !wait.is_zero() {
                // The clock has nanoseconds.
                now += wait + Duration::from_nanos(1);
                continue;
            }
            let size = 1 + rng.below(biggest);
            state.account(Direction::Write, size);
            used += match state.limits.iops_size {
                _ if bytes => size as f64,
                0 => 1.0,
                s => (size as f64 / s as f64).max(1.0),
            };
            let bucket = if max == 0 { avg as f64 / 10.0 } else { (max * length) as f64 };
            let most = bucket + avg as f64 * now.as_secs_f64() + biggest as f64;
            assert!(used <= most * 1.0001, "round {round}: {used} of {most} at {now:?} with {limit:?}");
            if length > 1 {
                let rate = max as f64 * (now.as_secs_f64() + 0.1) + biggest as f64;
                assert!(used <= rate * 1.0001, "round {round}: a burst of {used}, not {rate}, at {now:?}");
            }
        }
        let least = avg as f64 * end.as_secs_f64() * 0.95;
        assert!(used >= least, "round {round}: only {used} of {least} with {limit:?}");
    }
}

/// So many operations that each of `counts` got within `time`.
fn race(group: &Arc<Group>, threads: &[(usize, bool)], time: Duration) -> Vec<u64> {
    let members = threads.iter().map(|t| t.0).max().unwrap() + 1;
    let members: Vec<_> = (0..members).map(|_| group.join()).collect();
    let counts: Arc<Vec<AtomicU64>> = Arc::new(members.iter().map(|_| AtomicU64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let running: Vec<_> = threads
        .iter()
        .map(|&(n, read)| {
            let (member, counts, stop) = (members[n].clone(), counts.clone(), stop.clone());
            std::thread::spawn(move || {
                loop {
                    member.wait(read, 512);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    counts[n].fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    std::thread::sleep(time);
    stop.store(true, Ordering::SeqCst);
    let got = counts.iter().map(|c| c.load(Ordering::SeqCst)).collect();
    // Nobody waits for long whose disk is in a hurry.
    members.iter().for_each(|m| m.exempt(true));
    running.into_iter().for_each(|t| t.join().unwrap());
    got
}

#[test]
fn members_share_alike_however_many_requests_each_has() {
    let group = Group::new("g");
    group.set_limits(limits(&[(Which::OpsTotal, 200)]));
    // Member 0 has six threads that read and write, 1 and 2 have one each.
    let threads = [(0, true), (0, false), (0, true), (0, true), (0, true), (0, true), (1, true), (2, true)];
    let got = race(&group, &threads, Duration::from_secs(2));
    let all: u64 = got.iter().sum();
    // 20 at once, then 200 a second; on a machine that may be busy.
    assert!((300..=430).contains(&all), "{got:?}");
    let (one, two) = (got[1] as f64, got[2] as f64);
    assert!((one / two - 1.0).abs() < 0.3, "{got:?}");
    assert!(one >= all as f64 * 0.15 && two >= all as f64 * 0.15, "{got:?}");
}

#[test]
fn members_share_alike_also_when_one_reads_and_the_other_writes() {
    let group = Group::new("g");
    group.set_limits(limits(&[(Which::OpsTotal, 200)]));
    let writers = [(0, false); 6];
    let got = race(&group, &[&writers[..], &[(1, true)]].concat(), Duration::from_secs(2));
    let all: u64 = got.iter().sum();
    assert!(got.iter().all(|n| *n as f64 > all as f64 * 0.4), "{got:?}");
    // One that does both, and one that does not.
    let both = [(0, false), (0, false), (0, true), (0, true), (1, true)];
    let got = race(&group, &both, Duration::from_secs(2));
    let all: u64 = got.iter().sum();
    assert!(got.iter().all(|n| *n as f64 > all as f64 * 0.3), "{got:?}");
}

#[test]
fn neither_direction_starves_the_other_and_separate_limits_are_separate() {
    let group = Group::new("g");
    group.set_limits(limits(&[(Which::BpsTotal, 100 * 512)]));
    let got = race(&group, &[(0, true), (1, false)], Duration::from_secs(1));
    let (least, most) = (*got.iter().min().unwrap() as f64, *got.iter().max().unwrap() as f64);
    assert!(least > most * 0.6, "{got:?}");
    group.set_limits(limits(&[(Which::OpsRead, 20)]));
    let got = race(&group, &[(0, true), (1, false)], Duration::from_millis(300));
    assert!(got[0] <= 12 && got[1] > 1000, "{got:?}");
}

#[test]
fn whoever_waits_goes_on_when_the_limits_go() {
    let group = Group::new("g");
    group.set_limits(limits(&[(Which::BpsTotal, 1)]));
    let member = group.join();
    member.wait(true, 1 << 30);
    for way in 0..2 {
        let waiter = {
            let member = member.clone();
            std::thread::spawn(move || member.wait(true, 1 << 30))
        };
        while group.lock().waiting[0].is_empty() {
            std::thread::yield_now();
        }
        assert!(!waiter.is_finished());
        if way == 0 {
            member.exempt(true);
            waiter.join().unwrap();
            member.exempt(false);
        } else {
            group.set_limits(Limits::default());
            waiter.join().unwrap();
        }
        assert!(group.lock().waiting.iter().all(VecDeque::is_empty));
    }
}
