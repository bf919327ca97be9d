//! Rings that no honest driver makes.

use crate::kit::ram::{HIGH, HIGH_LEN, LOW};
use crate::kit::ring::{INDIRECT, NEXT, Ring, WRITE};
use minivmm::machine::memory::Mem;

/// What a hostile ring must lead to.
#[derive(Clone, Copy, PartialEq)]
pub enum Must {
    /// The ring is impossible: NEEDS_RESET.
    Break,
    /// The device may also answer, or wait.
    Survive,
}
pub use Must::{Break, Survive};

pub type Attack = fn(&mut Ring<Mem>, u64, u16) -> Must;

/// Ring, free memory, the flag of a descriptor that fits the queue's direction.
pub const ATTACKS: &[(&str, Attack)] = &[
    ("a descriptor that is its own next", |r, at, f| {
        r.describe(0, at, 16, f | NEXT, 0);
        r.offer(0);
        Break
    }),
    ("two descriptors in a circle", |r, at, f| {
        r.describe(0, at, 16, f | NEXT, 1);
        r.describe(1, at, 16, f | NEXT, 0);
        r.offer(0);
        Break
    }),
    ("a next behind the table", |r, at, f| {
        r.describe(0, at, 16, f | NEXT, r.size);
        r.offer(0);
        Break
    }),
    ("a next far behind the table", |r, at, f| {
        r.describe(0, at, 16, f | NEXT, 0xffff);
        r.offer(0);
        Break
    }),
    ("a head behind the table", |r, _, _| {
        r.offer(r.size);
        Break
    }),
    ("a head far behind the table", |r, _, _| {
        r.offer(0xffff);
        Break
    }),
    ("a readable descriptor after a writable one", |r, at, _| {
        r.describe(0, at, 16, WRITE | NEXT, 1);
        r.describe(1, at, 16, 0, 0);
        r.offer(0);
        Break
    }),
    ("an address that wraps around", |r, _, f| {
        r.describe(0, u64::MAX - 7, 16, f, 0);
        r.offer(0);
        Break
    }),
    ("an address in the hole", |r, _, f| {
        r.describe(0, LOW + 4096, 16, f, 0);
        r.offer(0);
        Break
    }),
    ("a piece that leaves low memory", |r, _, f| {
        r.describe(0, LOW - 8, 16, f, 0);
        r.offer(0);
        Break
    }),
    ("a piece that leaves high memory", |r, _, f| {
        r.describe(0, HIGH + HIGH_LEN - 8, 16, f, 0);
        r.offer(0);
        Break
    }),
    ("a piece before high memory", |r, _, f| {
        r.describe(0, HIGH - 8, 16, f, 0);
        r.offer(0);
        Break
    }),
    ("a length of 4 GiB", |r, at, f| {
        r.describe(0, at, u32::MAX, f, 0);
        r.offer(0);
        Break
    }),
    ("a second piece in the hole", |r, at, f| {
        r.describe(0, at, 16, f | NEXT, 1);
        r.describe(1, LOW, 1, f, 0);
        r.offer(0);
        Break
    }),
    ("an available index that jumps", |r, _, _| {
        r.set_avail_idx(r.avail_idx().wrapping_add(r.size + 1));
        Break
    }),
    ("an available index that goes back", |r, _, _| {
        r.set_avail_idx(r.avail_idx().wrapping_sub(1));
        Break
    }),
    ("an indirect table in the hole", |r, _, _| {
        r.describe(0, LOW + 16, 32, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table that leaves memory", |r, _, f| {
        r.describe_in(LOW - 16, 0, 0x100, 16, f | NEXT, 1);
        r.describe(0, LOW - 16, 32, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table that wraps around", |r, _, _| {
        r.describe(0, u64::MAX - 15, 32, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an empty indirect table", |r, at, _| {
        r.describe(0, at, 0, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table of 17 bytes", |r, at, f| {
        r.describe_in(at, 0, 0x100, 16, f, 0);
        r.describe(0, at, 17, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table of 15 bytes", |r, at, _| {
        r.describe(0, at, 15, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table of 4 GiB", |r, at, f| {
        r.describe_in(at, 0, 0x100, 16, f | NEXT, 0);
        r.describe(0, at, 0xffff_fff0, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table in an indirect table", |r, at, f| {
        r.describe_in(at + 4096, 0, at, 16, f, 0);
        r.describe_in(at, 0, at + 4096, 16, INDIRECT, 0);
        r.describe(0, at, 16, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect table that is its own", |r, at, _| {
        r.describe_in(at, 0, at, 16, INDIRECT | NEXT, 0);
        r.describe(0, at, 16, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("a loop in an indirect table", |r, at, f| {
        r.describe_in(at, 0, at, 16, f | NEXT, 1);
        r.describe_in(at, 1, at, 16, f | NEXT, 0);
        r.describe(0, at, 32, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("a next behind an indirect table", |r, at, f| {
        r.describe_in(at, 0, at, 16, f | NEXT, 1);
        r.describe_in(at, 1, at, 16, f, 0);
        r.describe(0, at, 16, INDIRECT, 0);
        r.offer(0);
        Break
    }),
    ("an indirect descriptor that goes on", |r, at, f| {
        r.describe_in(at, 0, at, 16, f, 0);
        r.describe(0, at, 16, INDIRECT | NEXT, 1);
        r.describe(1, at, 16, f, 0);
        r.offer(0);
        Survive
    }),
    ("a writable indirect table", |r, at, f| {
        r.describe_in(at, 0, at, 16, f, 0);
        r.describe(0, at, 16, INDIRECT | WRITE, 0);
        r.offer(0);
        Survive
    }),
    ("unknown flags", |r, at, f| {
        r.describe(0, at, 16, f | 0xfff8, 0);
        r.offer(0);
        Survive
    }),
    ("a descriptor without length in the hole", |r, _, f| {
        r.describe(0, LOW + 16, 0, f, 0);
        r.offer(0);
        Survive
    }),
    ("a full ring of the same head", |r, at, f| {
        r.describe(0, at, 16, f, 0);
        (0..r.size).for_each(|_| r.offer(0));
        Survive
    }),
    ("data that lie in the ring itself", |r, _, f| {
        r.describe(0, r.desc, (r.end() - r.desc) as u32, f, 0);
        (0..r.size).for_each(|_| r.offer(0));
        Survive
    }),
    ("a full ring of zeroes", |r, _, _| {
        r.set_avail_idx(r.avail_idx().wrapping_add(r.size));
        Survive
    }),
];
