//! What the tests of virtio devices are made with: a driver's end of a queue, guest memory, a disk,
//! a network backend.
//! Shared by the unit tests and by `tests/hostile.rs`; not every one uses everything.
#![allow(dead_code)]

pub mod disk;
pub mod netns;
pub mod ram;
pub mod ring;
pub mod wire;

use std::time::{Duration, Instant};

/// When a test that waits gives up.
pub fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Waits until `f` gives something.
pub fn until<T>(mut f: impl FnMut() -> Option<T>) -> T {
    let end = deadline();
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "it does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
