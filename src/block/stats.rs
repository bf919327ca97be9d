//! What a guest disk has done: the counters of `query-blockstats`.
//!
//! Owns: atomics. Threads: any. Locks: that of the intervals, if there are any, a leaf.

use super::timed::{Summary, Timed};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Read.
    Read,
    /// Write, and write-zeroes.
    Write,
    /// Flush.
    Flush,
    /// Discard.
    Unmap,
}

/// The kinds, in the order of their numbers.
pub const KINDS: [Kind; 4] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Unmap];

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    merged: AtomicU64,
    nanoseconds: AtomicU64,
}

/// One kind's counters at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// Bytes of successful requests.
    pub bytes: u64,
    /// Successful requests.
    pub operations: u64,
    /// Requests that failed in the block layer.
    pub failed: u64,
    /// Requests that the device refused (out of range, misaligned).
    pub invalid: u64,
    /// Requests that were merged into another one.
    pub merged: u64,
    /// Time spent, in nanoseconds.
    pub total_time_ns: u64,
}

/// See the module's head.
pub struct Stats {
    kinds: [Counters; 4],
    start: Instant,
    /// Nanoseconds from `start` to the last request's end; 0: none yet.
    last: AtomicU64,
    account_invalid: AtomicBool,
    account_failed: AtomicBool,
    /// There are intervals: so that a request need not lock to see that there are none.
    timing: AtomicBool,
    intervals: Mutex<Vec<Interval>>,
}

/// Latencies of the last so many seconds, of all but discards.
struct Interval {
    seconds: u64,
    kinds: [Timed; 3],
}

impl Default for Stats {
    fn default() -> Stats {
        Stats {
            kinds: Default::default(),
            start: Instant::now(),
            last: AtomicU64::new(0),
            account_invalid: AtomicBool::new(true),
            account_failed: AtomicBool::new(true),
            timing: AtomicBool::new(false),
            intervals: Mutex::default(),
        }
    }
}

impl Stats {
    /// The clock to hand back to [`Stats::done`], in nanoseconds.
    pub fn clock(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A request that began at `clock` has ended, well or not.
    pub fn done(&self, kind: Kind, bytes: u64, clock: u64, ok: bool) {
        let c = &self.kinds[kind as usize];
        if ok {
            c.bytes.fetch_add(bytes, Ordering::Relaxed);
            c.operations.fetch_add(1, Ordering::Relaxed);
        } else {
            c.failed.fetch_add(1, Ordering::Relaxed);
        }
        if ok || self.account_failed.load(Ordering::Relaxed) {
            let now = self.clock();
            c.nanoseconds.fetch_add(now.saturating_sub(clock), Ordering::Relaxed);
            self.last.fetch_max(now.max(1), Ordering::Relaxed);
            if self.timing.load(Ordering::Relaxed) {
                let mut intervals = self.intervals.lock().unwrap_or_else(PoisonError::into_inner);
                for timed in intervals.iter_mut().filter_map(|i| i.kinds.get_mut(kind as usize)) {
                    timed.account(now.saturating_sub(clock), now);
                }
            }
        }
    }

    /// From now on statistics of the last `seconds` (at least 1) are kept, too.
    pub fn add_interval(&self, seconds: u64) {
        let (now, period) = (self.clock(), seconds.saturating_mul(1_000_000_000));
        let kinds = std::array::from_fn(|_| Timed::new(period, now));
        let mut intervals = self.intervals.lock().unwrap_or_else(PoisonError::into_inner);
        intervals.push(Interval { seconds, kinds });
        self.timing.store(true, Ordering::Relaxed);
    }

    /// For each interval its length in seconds, and what was seen of reads, writes and flushes.
    pub fn timed(&self) -> Vec<(u64, [Summary; 3])> {
        let now = self.clock();
        let mut intervals = self.intervals.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |i: &mut Interval| (i.seconds, i.kinds.each_mut().map(|t| t.look(now)));
        intervals.iter_mut().map(one).collect()
    }

    /// The device refused a request before it came to the block layer.
    pub fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize].invalid.fetch_add(1, Ordering::Relaxed);
        if self.account_invalid.load(Ordering::Relaxed) {
            self.last.fetch_max(self.clock().max(1), Ordering::Relaxed);
        }
    }

    /// `n` requests were merged into another one.
    pub fn merged(&self, kind: Kind, n: u64) {
        self.kinds[kind as usize].merged.fetch_add(n, Ordering::Relaxed);
    }

    /// The counters of one kind.
    pub fn get(&self, kind: Kind) -> Snapshot {
        let c = &self.kinds[kind as usize];
        Snapshot {
            bytes: c.bytes.load(Ordering::Relaxed),
            operations: c.operations.load(Ordering::Relaxed),
            failed: c.failed.load(Ordering::Relaxed),
            invalid: c.invalid.load(Ordering::Relaxed),
            merged: c.merged.load(Ordering::Relaxed),
            total_time_ns: c.nanoseconds.load(Ordering::Relaxed),
        }
    }

    /// Nanoseconds since the last request; `None` before the first.
    pub fn idle_time_ns(&self) -> Option<u64> {
        match self.last.load(Ordering::Relaxed) {
            0 => None,
            last => Some(self.clock().saturating_sub(last)),
        }
    }

    /// Whether invalid and failed requests count as use of the disk (`stats-account-invalid`,
    /// `stats-account-failed`; both true by default).
    pub fn account(&self) -> (bool, bool) {
        (self.account_invalid.load(Ordering::Relaxed), self.account_failed.load(Ordering::Relaxed))
    }

    /// Sets what [`Stats::account`] tells.
    pub fn set_account(&self, invalid: bool, failed: bool) {
        self.account_invalid.store(invalid, Ordering::Relaxed);
        self.account_failed.store(failed, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_kind_and_outcome() {
        let s = Stats::default();
        assert_eq!(s.idle_time_ns(), None);
        let t = s.clock();
        s.done(Kind::Write, 4096, t, true);
        s.done(Kind::Write, 512, t, false);
        s.invalid(Kind::Read);
        s.merged(Kind::Read, 3);
        let w = s.get(Kind::Write);
        assert_eq!((w.bytes, w.operations, w.failed, w.invalid), (4096, 1, 1, 0));
        let r = s.get(Kind::Read);
        assert_eq!((r.bytes, r.operations, r.invalid, r.merged), (0, 0, 1, 3));
        assert!(s.idle_time_ns().is_some());
    }

    #[test]
    fn failed_and_invalid_requests_can_be_no_use() {
        let s = Stats::default();
        s.set_account(false, false);
        s.done(Kind::Read, 512, 0, false);
        s.invalid(Kind::Flush);
        assert_eq!(s.idle_time_ns(), None);
        assert_eq!(s.get(Kind::Read).total_time_ns, 0);
    }
}
