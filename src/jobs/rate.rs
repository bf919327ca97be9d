//! A limit of bytes per second.
//!
//! Work is done first and waited for after, so that even at one byte per second the first piece is
//! done at once. Owns: the arithmetic. Never: sleeps. Threads: any. Locks: none.

use std::time::{Duration, Instant};

/// How late a piece may be without the rest having to wait longer for it: what was not used up for
/// longer than this is lost, so that a job that stood still does not make up for it with a burst.
const SLACK: Duration = Duration::from_millis(50);

/// Longer than anybody waits, and short enough to be added to any time.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86400);

/// See the module's head.
#[derive(Debug)]
pub struct Rate {
    /// Bytes per second; 0: no limit.
    speed: u64,
    /// When all that was done would have been done at that speed.
    due: Option<Instant>,
}

impl Rate {
    /// `speed` in bytes per second; 0: no limit.
    pub fn new(speed: u64) -> Rate {
        Rate { speed, due: None }
    }

    /// Bytes per second; 0: no limit.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Another speed from `now` on. What was done too early for the old one is waited for at the new one:
    /// who sets the speed again and again does not get more.
    pub fn set(&mut self, speed: u64, now: Instant) {
        let early = self.wait_until(now).map_or(Duration::ZERO, |due| due - now);
        let bytes = early.as_nanos() * u128::from(self.speed) / 1_000_000_000;
        *self = Rate::new(speed);
        if bytes > 0 {
            self.spent(u64::try_from(bytes).unwrap_or(u64::MAX), now);
        }
    }

    /// Notes that `bytes` more were done by `now`.
    pub fn spent(&mut self, bytes: u64, now: Instant) {
        if self.speed == 0 {
            return;
        }
        let floor = now.checked_sub(SLACK).unwrap_or(now);
        // The first piece after a standstill begins now, not in the past.
        let from = self.due.map_or(now, |due| due.max(floor));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.speed);
        let time = u64::try_from(nanos).map_or(FOREVER, Duration::from_nanos).min(FOREVER);
        self.due = Some(from.checked_add(time).unwrap_or(from + Duration::from_secs(86400)));
    }

    /// Until when nothing more is to be done; `None`: go on.
    pub fn wait_until(&self, now: Instant) -> Option<Instant> {
        self.due.filter(|due| *due > now)
    }

    /// A good size for the next piece: small enough that a limit is kept within a second, a power of
    /// two, from 64 KiB to `most`.
    pub fn piece(&self, most: u64) -> u64 {
        match self.speed {
            0 => most,
            speed => (speed / 32).max(1).next_power_of_two().clamp((64 << 10).min(most), most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds that a job takes for `total` bytes when each piece itself takes `cost`.
    fn takes(speed: u64, total: u64, cost: Duration) -> f64 {
        let start = Instant::now();
        let mut rate = Rate::new(speed);
        let (mut now, mut done) = (start, 0);
        while done < total {
            let n = rate.piece(1 << 20).min(total - done);
            rate.spent(n, now);
            now += cost;
            done += n;
            now = rate.wait_until(now).unwrap_or(now);
        }
        (now - start).as_secs_f64()
    }

    #[test]
    fn a_speed_is_kept_within_five_percent() {
        for speed in [100_000u64, 1 << 20, 10 << 20, 300 << 20] {
            let got = takes(speed, speed * 4, Duration::from_micros(200));
            assert!((3.8..4.2).contains(&got), "{speed} B/s: 4 s of work took {got} s");
        }
        // What is not limited is not waited for.
        assert!(takes(0, 1 << 30, Duration::ZERO) == 0.0);
    }

    #[test]
    fn standing_still_is_not_made_up_for() {
        let start = Instant::now();
        let mut rate = Rate::new(1 << 20);
        rate.spent(1 << 20, start);
        assert_eq!(rate.wait_until(start), Some(start + Duration::from_secs(1)));
        let later = start + Duration::from_secs(60);
        assert_eq!(rate.wait_until(later), None);
        rate.spent(1 << 20, later);
        let due = rate.wait_until(later).unwrap();
        assert!(due >= later + Duration::from_millis(950), "a minute's pause was credited");
    }

    #[test]
    fn one_byte_a_second_overflows_nothing() {
        let now = Instant::now();
        let mut rate = Rate::new(1);
        for _ in 0..10 {
            rate.spent(u64::MAX, now);
        }
        assert!(rate.wait_until(now + Duration::from_secs(3600)).is_some());
        rate.set(0, now);
        assert_eq!(rate.wait_until(now), None);
    }

    #[test]
    fn another_speed_is_for_what_was_done_too_early_as_well() {
        let start = Instant::now();
        let after = |rate: &Rate, now: Instant| rate.wait_until(now).map_or(0.0, |t| (t - now).as_secs_f64());
        let mut rate = Rate::new(1 << 20);
        rate.spent(4 << 20, start);
        // A second later three quarters are left: for six seconds at half the speed.
        let now = start + Duration::from_secs(1);
        rate.set(1 << 19, now);
        assert!((5.99..6.01).contains(&after(&rate, now)), "{}", after(&rate, now));
        // The same again and again is no other.
        for _ in 0..100 {
            rate.set(1 << 19, now);
        }
        assert!((5.99..6.01).contains(&after(&rate, now)), "{}", after(&rate, now));
        // From next to nothing to a lot it is a moment.
        rate.set(1, now);
        rate.set(30 << 20, now);
        assert!((0.09..0.11).contains(&after(&rate, now)), "{}", after(&rate, now));
        rate.set(0, now);
        rate.set(1, now);
        assert_eq!(rate.wait_until(now), None);
    }
}
