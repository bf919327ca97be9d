//! The logger: one line a message on standard error.
//!
//! Owns: the format. Threads: any. Locks: standard error's, for one write.

use log::{LevelFilter, Log, Metadata, Record};
use std::io::Write;

struct Stderr;

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
        // All threads but the first have names.
        let thread = std::thread::current();
        // One write, so that the lines of several threads and processes do not mix. Control
        // characters (a guest's or an image's text may be quoted) must not reach the terminal.
        let text = record.args().to_string().replace(|c: char| c.is_control(), "?");
        let line = format!(
            "minivmm: {}.{:06} {} {}: {text}\n",
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
    static LOGGER: Stderr = Stderr;
    // It fails only when there is a logger already, which is then this one.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}
