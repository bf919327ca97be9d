use super::*;
use crate::virtio::testing::Rig;

const DATA: u64 = 0x10_0000;

fn rng(max_bytes: u64, period: u32) -> Arc<Rng> {
    Rng::new(RngConfig { max_bytes, period }).unwrap()
}

#[test]
fn requests_are_filled_and_differ() {
    let mut r = Rig::new(Rng::new(RngConfig::default()).unwrap(), 0);
    r.offer(0, &[(DATA, 100, true), (DATA + 0x1000, 5000, true)]);
    r.offer(0, &[(DATA + 0x4000, 100, true)]);
    r.kick(0);
    assert_eq!((r.answer(0).1, r.answer(0).1), (5100, 100));
    assert_ne!(r.peek(DATA, 100), r.peek(DATA + 0x4000, 100));
    assert!(r.peek(DATA + 0x1000, 5000).windows(64).all(|w| w != [0; 64]));
}

#[test]
fn odd_requests_are_answered() {
    let mut r = Rig::new(Rng::new(RngConfig::default()).unwrap(), 0);
    r.offer(0, &[(DATA, 16, false)]);
    r.offer(0, &[(DATA, 1 << 20, true)]);
    r.kick(0);
    assert_eq!((r.answer(0).1, r.answer(0).1), (0, REQUEST_MAX as u32));
    assert!(r.peek(DATA + REQUEST_MAX as u64, 64) == [0; 64], "no more than it says");
}

#[test]
fn a_limit_is_kept_and_the_rest_comes_in_the_next_period() {
    let mut r = Rig::new(rng(100, 80), 0);
    let begin = Instant::now();
    for n in 0..3 {
        r.offer(0, &[(DATA + 0x1000 * n, 64, true)]);
    }
    r.kick(0);
    assert_eq!((r.answer(0).1, r.answer(0).1), (64, 36));
    r.answer(0);
    assert!(begin.elapsed() >= Duration::from_millis(75), "too early: {:?}", begin.elapsed());
}

#[test]
fn impossible_limits_are_refused() {
    assert!(Rng::new(RngConfig { period: 0, max_bytes: 1 }).is_err());
    assert!(Rng::new(RngConfig { period: 1, max_bytes: u64::MAX }).is_err());
}
