//! Limits on how fast disks are used: leaky buckets with bursts, in groups that share them fairly.
//!
//! A request that is too early waits on its own thread, before it has a ticket of a gate, so that the
//! graph can be changed meanwhile. Units leak out of a bucket at the rate `avg`; a request may go when
//! the bucket is not fuller than its size, and puts its own units in. Among the members of a group
//! that wait, each has its turn after the others; one member's requests keep their order.
//!
//! Owns: the buckets, the queue. Never: does I/O, knows a disk. Threads: any wait; control sets.
//! Locks: a group's, a leaf.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The largest value of a limit (QEMU's THROTTLE_VALUE_MAX).
pub const VALUE_MAX: u64 = 1_000_000_000_000_000;

/// The limit of one kind, in units (bytes or operations) a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In the long run; 0: none.
    pub avg: u64,
    /// In bursts; 0: bursts are a tenth of a second of `avg`.
    pub max: u64,
    /// How long a burst may last, in seconds; at least 1.
    pub length: u64,
}

impl Default for Limit {
    fn default() -> Limit {
        Limit { avg: 0, max: 0, length: 1 }
    }
}

/// Which limit: an index into [`Limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Bytes, read or written.
    BpsTotal,
    /// Bytes read.
    BpsRead,
    /// Bytes written.
    BpsWrite,
    /// Operations, reads or writes.
    OpsTotal,
    /// Reads.
    OpsRead,
    /// Writes.
    OpsWrite,
}

/// All of them, in the order of their numbers.
pub const ALL: [Which; 6] =
    [Which::BpsTotal, Which::BpsRead, Which::BpsWrite, Which::OpsTotal, Which::OpsRead, Which::OpsWrite];

/// The limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    limits: [Limit; 6],
    /// Bytes that are one operation: a longer request is several. 0: any request is one.
    pub iops_size: u64,
}

impl Limits {
    /// No limits yet; so many bytes are one operation.
    pub fn new(iops_size: u64) -> Limits {
        Limits { limits: Default::default(), iops_size }
    }

    /// One of them.
    pub fn get(&self, which: Which) -> Limit {
        self.limits[which as usize]
    }

    /// Sets one of them.
    pub fn set(&mut self, which: Which, limit: Limit) {
        self.limits[which as usize] = limit;
    }

    /// True when anything is limited.
    pub fn any(&self) -> bool {
        self.limits.iter().any(|l| l.avg > 0)
    }

    /// Whether these limits make sense together; QEMU's texts.
    pub fn check(&self) -> Result<(), String> {
        let avg = |w| self.get(w).avg > 0;
        let max = |w| self.get(w).max > 0;
        let both = |is: &dyn Fn(Which) -> bool, total, read, write| is(total) && (is(read) || is(write));
        if self.iops_size > 0 && !avg(Which::OpsTotal) && !avg(Which::OpsRead) && !avg(Which::OpsWrite) {
            return Err("iops size requires an iops value to be set".into());
        }
        for is in [&avg as &dyn Fn(Which) -> bool, &max] {
            if both(is, Which::BpsTotal, Which::BpsRead, Which::BpsWrite)
                || both(is, Which::OpsTotal, Which::OpsRead, Which::OpsWrite)
            {
                let text = "bps/iops/max total values and read/write values cannot be used at the same time";
                return Err(text.into());
            }
        }
        for Limit { avg, max, length } in self.limits {
            let wrong = match () {
                () if avg > VALUE_MAX || max > VALUE_MAX => {
                    return Err(format!("bps/iops/max values must be within [0, {VALUE_MAX}]"));
                }
                () if length == 0 => "the burst length cannot be 0",
                () if length > 1 && max == 0 => "burst length set without burst rate",
                () if max > 0 && length > VALUE_MAX / max => "burst length too high for this burst rate",
                () if max > 0 && avg == 0 => "bps_max/iops_max require corresponding bps/iops values",
                () if max > 0 && max < avg => "bps_max/iops_max cannot be lower than bps/iops",
                () => continue,
            };
            return Err(wrong.into());
        }
        Ok(())
    }
}

/// How full one bucket is, in units.
#[derive(Clone, Copy, Default)]
struct Level {
    level: f64,
    /// Of bursts longer than a second: what came in at more than the rate `max`.
    burst: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Read = 0,
    Write = 1,
}

struct Waiter {
    member: u64,
    seq: u64,
}

#[derive(Default)]
struct State {
    limits: Limits,
    levels: [Level; 6],
    /// Up to when the buckets have leaked.
    now: Duration,
    waiting: [VecDeque<Waiter>; 2],
    /// Who went last, by direction.
    last: [u64; 2],
    /// Who went last.
    last_of_all: u64,
    seq: u64,
    members: u64,
}

impl State {
    fn leak(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.now).as_secs_f64();
        self.now = self.now.max(now);
        for (level, limit) in self.levels.iter_mut().zip(&self.limits.limits) {
            level.level = (level.level - limit.avg as f64 * seconds).max(0.0);
            level.burst = (level.burst - limit.max as f64 * seconds).max(0.0);
        }
    }

    fn buckets(direction: Direction) -> [Which; 4] {
        match direction {
            Direction::Read => [Which::BpsTotal, Which::BpsRead, Which::OpsTotal, Which::OpsRead],
            Direction::Write => [Which::BpsTotal, Which::BpsWrite, Which::OpsTotal, Which::OpsWrite],
        }
    }

    /// How long until a request in that direction may go, as the buckets are now.
    fn wait(&self, direction: Direction) -> Duration {
        let mut seconds: f64 = 0.0;
        for which in State::buckets(direction) {
            let (Limit { avg, max, length }, Level { level, burst }) =
                (self.limits.get(which), self.levels[which as usize]);
            let (avg, max) = (avg as f64, max as f64);
            if avg == 0.0 {
                continue;
            }
            let size = if max == 0.0 { avg / 10.0 } else { max * length as f64 };
            seconds = seconds.max((level - size) / avg);
            if length > 1 {
                seconds = seconds.max((burst - max / 10.0) / max);
            }
        }
        // Less than a nanosecond is nothing.
        Duration::from_secs_f64(seconds.min(1e9))
    }

    fn account(&mut self, direction: Direction, bytes: u64) {
        let size = self.limits.iops_size;
        let operations = if size > 0 && bytes > size { bytes as f64 / size as f64 } else { 1.0 };
        let [bps_total, bps, ops_total, ops] = State::buckets(direction);
        for (which, units) in
            [(bps_total, bytes as f64), (bps, bytes as f64), (ops_total, operations), (ops, operations)]
        {
            if self.limits.get(which).avg > 0 {
                let level = &mut self.levels[which as usize];
                level.level += units;
                level.burst += units;
            }
        }
    }

    /// Whose turn it is in that direction: the first request of the member that comes next.
    fn next(&self, direction: Direction) -> Option<&Waiter> {
        let last = self.last[direction as usize];
        let queue = &self.waiting[direction as usize];
        // Members have numbers from 1 on; those up to the last one come after the others.
        queue.iter().min_by_key(|w| (w.member <= last, w.member, w.seq))
    }

    /// True when it is the turn of request `seq`, but for the buckets.
    fn is_turn(&self, direction: Direction, seq: u64) -> bool {
        if self.next(direction).is_none_or(|w| w.seq != seq) {
            return false;
        }
        // The two directions may share a bucket: then the members take turns, whatever they do.
        let (Some(own), Some(other)) = (self.next(direction), self.rival(direction)) else { return true };
        let rank = |w: &Waiter| (w.member <= self.last_of_all, w.member, w.seq);
        rank(own) < rank(other)
    }

    /// The request of the other direction that may go now, too.
    fn rival(&self, direction: Direction) -> Option<&Waiter> {
        let other = if direction == Direction::Read { Direction::Write } else { Direction::Read };
        self.next(other).filter(|_| self.wait(other).is_zero())
    }
}

/// Disks that share limits.
pub struct Group {
    /// Its name, as queries show it.
    pub name: String,
    start: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

impl Group {
    /// A group without limits.
    pub fn new(name: &str) -> Arc<Group> {
        Arc::new(Group {
            name: name.into(),
            start: Instant::now(),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// Sets its limits, which must make sense ([`Limits::check`]). What was used up is forgotten.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = self.lock();
        state.leak(self.start.elapsed());
        state.limits = limits;
        state.levels = Default::default();
        drop(state);
        self.changed.notify_all();
    }

    /// A new member.
    pub fn join(self: &Arc<Group>) -> Arc<Member> {
        let mut state = self.lock();
        state.members += 1;
        Arc::new(Member { group: self.clone(), number: state.members, exempt: AtomicU32::new(0) })
    }
}

/// A disk in a group.
pub struct Member {
    group: Arc<Group>,
    number: u64,
    /// How many reasons there are not to wait.
    exempt: AtomicU32,
}

impl Member {
    /// Its group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// From now on nobody waits, and who does goes on: the disk leaves the group, or somebody waits
    /// for its requests. To be called once more with false.
    pub fn exempt(&self, on: bool) {
        if on {
            self.exempt.fetch_add(1, Ordering::SeqCst);
            // The lock orders this after a waiter's look at it.
            drop(self.group.lock());
            self.group.changed.notify_all();
        } else {
            self.exempt.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits until a read (or a write) of so many bytes may begin.
    pub fn wait(&self, read: bool, bytes: u64) {
        let direction = if read { Direction::Read } else { Direction::Write };
        let group = &*self.group;
        let mut state = group.lock();
        state.leak(group.start.elapsed());
        let first = state.waiting[direction as usize].is_empty() && state.rival(direction).is_none();
        if first && state.wait(direction).is_zero() {
            state.account(direction, bytes);
            return;
        }
        state.seq += 1;
        let seq = state.seq;
        state.waiting[direction as usize].push_back(Waiter { member: self.number, seq });
        loop {
            state.leak(group.start.elapsed());
            let free = self.exempt.load(Ordering::SeqCst) > 0 || !state.limits.any();
            let wait = state.wait(direction);
            let turn = state.is_turn(direction, seq);
            if free || (turn && wait.is_zero()) {
                state.waiting[direction as usize].retain(|w| w.seq != seq);
                if !free {
                    state.last[direction as usize] = self.number;
                    state.last_of_all = self.number;
                }
                state.account(direction, bytes);
                drop(state);
                group.changed.notify_all();
                return;
            }
            let sleep = |s| group.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
            state = match turn {
                true => group.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
                false => sleep(state),
            };
        }
    }
}

#[cfg(test)]
#[path = "throttle_test.rs"]
mod tests;
