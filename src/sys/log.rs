//! The logger: one line a message on standard error.
//!
//! Owns: the format, and the limit of what goes out: a guest can provoke messages as often as it
//! likes (break a device, reset it, break it again), and must fill neither a disk nor a terminal.
//! Threads: any. Locks: the limit's, a leaf; standard error's, for one write.

use log::{Level, LevelFilter, Log, Metadata, Record};
use std::io::Write;
use std::sync::{Mutex, PoisonError};

/// So many messages may come at once…
const BURST: u64 = 200;
/// …and so many a second for ever.
const PER_SECOND: u64 = 10;
/// Parts of a message's allowance: time is counted in them.
const NANOS_PER_MESSAGE: u64 = 1_000_000_000 / PER_SECOND;

/// A bucket of allowances, one a message.
struct Limit {
    /// When the bucket was, or will be, empty of debts: nanoseconds on the monotonic clock.
    paid_until: u64,
    /// Messages swallowed since the last one that went out.
    lost: u64,
}

impl Limit {
    /// True when a message may go out at `now` (nanoseconds).
    fn allows(&mut self, now: u64) -> bool {
        let start = self.paid_until.max(now);
        if start - now > (BURST - 1) * NANOS_PER_MESSAGE {
            self.lost += 1;
            return false;
        }
        self.paid_until = start + NANOS_PER_MESSAGE;
        true
    }
}

struct Stderr {
    limit: Mutex<Limit>,
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a local of the right type.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
        let mut lost = 0;
        // Who asks for debugging output wants all of it.
        if record.level() <= Level::Info {
            let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
            if !limit.allows(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64) {
                return;
            }
            lost = std::mem::take(&mut limit.lost);
        }
        let before = match lost {
            0 => String::new(),
            n => format!("minivmm: {}.{:06} warn: {n} messages were left out\n", t.tv_sec, t.tv_nsec / 1000),
        };
        // All threads but the first have names.
        let thread = std::thread::current();
        // One write, so that the lines of several threads and processes do not mix. Control
        // characters (a guest's or an image's text may be quoted) must not reach the terminal.
        let text = record.args().to_string().replace(|c: char| c.is_control(), "?");
        let line = format!(
            "{before}minivmm: {}.{:06} {} {}: {text}\n",
            t.tv_sec,
            t.tv_nsec / 1000,
            record.level().as_str().to_ascii_lowercase(),
            thread.name().unwrap_or("main"),
        );
        // Where standard error is gone there is no one to tell.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Sends everything up to `level` to standard error.
pub fn init(level: LevelFilter) {
    static LOGGER: Stderr = Stderr { limit: Mutex::new(Limit { paid_until: 0, lost: 0 }) };
    // It fails only when there is a logger already, which is then this one.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_its_rate_and_counted() {
        let mut limit = Limit { paid_until: 0, lost: 0 };
        let start = 1_000_000_000_000;
        let burst = (0..1000).filter(|_| limit.allows(start)).count() as u64;
        assert_eq!((burst, limit.lost), (BURST, 1000 - BURST));
        // Ten seconds of a message a millisecond.
        let more = (1..=10_000).filter(|ms| limit.allows(start + ms * 1_000_000)).count() as u64;
        assert_eq!(more, 10 * PER_SECOND);
        // A quiet hour later all of the burst is there again.
        let later = start + 3_600_000_000_000;
        assert_eq!((0..1000).filter(|_| limit.allows(later)).count() as u64, BURST);
    }
}
