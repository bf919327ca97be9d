//! What a node was opened with, and may be reopened with: in cells that requests read without a lock.
//!
//! Owns: the packing. Never: what the options mean. Threads: read by any; set by the control thread,
//! with the gates above closed. Locks: none.

use super::driver::Limits;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What becomes of a write of zeroes (`detect-zeroes`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// It is a write.
    #[default]
    Off,
    /// It is a zero request.
    On,
    /// It is a zero request that may give the space back.
    Unmap,
}

impl DetectZeroes {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }
}

/// The options that every node has, whatever its driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// Discard requests and unmapping zeroes reach the driver (`discard=unmap`).
    pub unmap: bool,
    /// What becomes of a write of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// The host's page cache is bypassed (`cache.direct`).
    pub direct: bool,
    /// Flushes do not reach the storage (`cache.no-flush`): fast, and lost in a host crash.
    pub no_flush: bool,
    /// False: each write is followed by a flush (`cache.writeback` of QEMU 2.8's `blockdev-add`).
    pub writeback: bool,
    /// Shares the image with everybody; only for read-only nodes.
    pub force_share: bool,
    /// Turns read-only by itself when it cannot be opened for writing.
    pub auto_read_only: bool,
    /// A filter that a command inserted and that the user gave no name: queries about drives pass it
    /// over.
    pub implicit: bool,
}

impl Default for NodeOptions {
    fn default() -> NodeOptions {
        NodeOptions {
            read_only: false,
            unmap: false,
            detect_zeroes: DetectZeroes::Off,
            direct: false,
            no_flush: false,
            writeback: true,
            force_share: false,
            auto_read_only: false,
            implicit: false,
        }
    }
}

/// [`NodeOptions`] that can be changed.
pub(super) struct OptionsCell(AtomicU32);

impl OptionsCell {
    pub(super) fn new(options: NodeOptions) -> OptionsCell {
        OptionsCell(AtomicU32::new(pack(options)))
    }

    pub(super) fn get(&self) -> NodeOptions {
        let bits = self.0.load(Ordering::Relaxed);
        let bit = |n: u32| bits >> n & 1 != 0;
        NodeOptions {
            read_only: bit(0),
            unmap: bit(1),
            direct: bit(2),
            no_flush: bit(3),
            writeback: bit(4),
            force_share: bit(5),
            auto_read_only: bit(6),
            implicit: bit(7),
            detect_zeroes: match bits >> 8 {
                0 => DetectZeroes::Off,
                1 => DetectZeroes::On,
                _ => DetectZeroes::Unmap,
            },
        }
    }

    pub(super) fn set(&self, options: NodeOptions) {
        self.0.store(pack(options), Ordering::Relaxed);
    }
}

fn pack(o: NodeOptions) -> u32 {
    let bits = [
        o.read_only,
        o.unmap,
        o.direct,
        o.no_flush,
        o.writeback,
        o.force_share,
        o.auto_read_only,
        o.implicit,
    ];
    let detect = match o.detect_zeroes {
        DetectZeroes::Off => 0,
        DetectZeroes::On => 1,
        DetectZeroes::Unmap => 2,
    };
    let flags = bits.iter().enumerate().fold(0, |all, (n, &on)| all | u32::from(on) << n);
    flags | detect << 8
}

/// [`Limits`] that can be changed.
pub(super) struct LimitsCell {
    /// `request_alignment`, and `memory_alignment` above it.
    alignments: AtomicU64,
    /// `discard_alignment`, and `cheap_zeroes` above it.
    rest: AtomicU64,
}

impl LimitsCell {
    pub(super) fn new(limits: Limits) -> LimitsCell {
        let cell = LimitsCell { alignments: AtomicU64::new(0), rest: AtomicU64::new(0) };
        cell.set(limits);
        cell
    }

    pub(super) fn get(&self) -> Limits {
        let (a, r) = (self.alignments.load(Ordering::Relaxed), self.rest.load(Ordering::Relaxed));
        Limits {
            request_alignment: a as u32,
            memory_alignment: (a >> 32) as u32,
            discard_alignment: r as u32,
            cheap_zeroes: r >> 32 != 0,
        }
    }

    pub(super) fn set(&self, l: Limits) {
        debug_assert!(l.request_alignment.is_power_of_two());
        debug_assert!(l.memory_alignment.is_power_of_two());
        let both = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        self.alignments.store(both(l.request_alignment, l.memory_alignment), Ordering::Relaxed);
        self.rest.store(both(l.discard_alignment, u32::from(l.cheap_zeroes)), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_read() {
        let mut n = NodeOptions::default();
        let cell = OptionsCell::new(n);
        assert_eq!(cell.get(), n);
        for set in [
            (|n| n.read_only = true) as fn(&mut NodeOptions),
            |n| n.unmap = true,
            |n| n.detect_zeroes = DetectZeroes::On,
            |n| n.direct = true,
            |n| n.no_flush = true,
            |n| n.writeback = false,
            |n| n.detect_zeroes = DetectZeroes::Unmap,
            |n| n.force_share = true,
            |n| n.auto_read_only = true,
            |n| n.implicit = true,
        ] {
            set(&mut n);
            assert_ne!(cell.get(), n);
            cell.set(n);
            assert_eq!(cell.get(), n);
        }
        let limits = Limits {
            request_alignment: 512,
            memory_alignment: 4096,
            discard_alignment: 65536,
            cheap_zeroes: true,
        };
        let cell = LimitsCell::new(Limits::default());
        assert_eq!(cell.get(), Limits::default());
        cell.set(limits);
        assert_eq!(cell.get(), limits);
    }
}
