//! Statistics of the last minutes: smallest, largest and mean latency, and how many requests were
//! under way, over an interval of a set length (`timed_stats` of `query-blockstats`).
//!
//! As in QEMU there are two windows of that length, half of it apart, which are emptied as they end;
//! the older one is looked at, so that it always covers at least the half.
//!
//! Owns: the windows. Never: reads a clock. Threads: any, under the lock of [`stats`](super::stats).

/// What was seen since a window was emptied.
#[derive(Clone, Copy)]
struct Window {
    min: u64,
    max: u64,
    sum: u64,
    count: u64,
    /// When it ends, in nanoseconds.
    end: u64,
}

impl Window {
    fn new(end: u64) -> Window {
        Window { min: u64::MAX, max: 0, sum: 0, count: 0, end }
    }
}

/// What [`Timed::look`] answers; latencies in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// The smallest; 0 if there was none.
    pub min: u64,
    /// The largest.
    pub max: u64,
    /// The mean.
    pub avg: u64,
    /// How many requests were under way, in the mean.
    pub depth: f64,
}

/// See the module's head.
pub struct Timed {
    /// In nanoseconds.
    period: u64,
    windows: [Window; 2],
}

impl Timed {
    /// For intervals of `period` nanoseconds, from `now` on.
    pub fn new(period: u64, now: u64) -> Timed {
        Timed { period, windows: [Window::new(now + period / 2), Window::new(now + period)] }
    }

    /// The window that is older, after those that are over have been emptied.
    fn current(&mut self, now: u64) -> Window {
        for w in &mut self.windows {
            if w.end <= now {
                *w = Window::new(now + self.period - (now - w.end) % self.period);
            }
        }
        let [a, b] = self.windows;
        if a.end < b.end { a } else { b }
    }

    /// A request that took `latency` nanoseconds has ended.
    pub fn account(&mut self, latency: u64, now: u64) {
        self.current(now);
        for w in &mut self.windows {
            w.min = w.min.min(latency);
            w.max = w.max.max(latency);
            w.sum = w.sum.saturating_add(latency);
            w.count += 1;
        }
    }

    /// What there was.
    pub fn look(&mut self, now: u64) -> Summary {
        let w = self.current(now);
        let elapsed = self.period.saturating_sub(w.end - now);
        Summary {
            min: if w.count > 0 { w.min } else { 0 },
            max: w.max,
            avg: w.sum.checked_div(w.count).unwrap_or(0),
            depth: if elapsed > 0 { w.sum as f64 / elapsed as f64 } else { 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_window_is_looked_at() {
        let mut t = Timed::new(100, 1000);
        assert_eq!(t.look(1000), Summary::default());
        t.account(10, 1010);
        t.account(30, 1020);
        // The first window began half a period before.
        let s = t.look(1040);
        assert_eq!((s.min, s.max, s.avg), (10, 30, 20));
        assert!((s.depth - 40.0 / 90.0).abs() < 1e-9);
        // It has ended: the other one has the same, and more.
        t.account(5, 1060);
        let s = t.look(1090);
        assert_eq!((s.min, s.max, s.avg), (5, 30, 15));
        assert!((s.depth - 45.0 / 90.0).abs() < 1e-9);
        // Only what came after the first was emptied.
        assert_eq!(t.look(1100).max, 5);
        // Long after.
        assert_eq!(t.look(5_000).max, 0);
        t.account(7, 5_000);
        assert_eq!((t.look(5_001).min, t.look(5_001).avg), (7, 7));
    }
}
