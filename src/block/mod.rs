//! The block layer: nodes in a graph, and the gate through which everybody reaches them.
//!
//! Knows no jobs, no guests and no QMP.
//!
//! Lock order (take only rightwards): `Ticket → Edge (clone, drop) → a driver's own locks →
//! bitmap list / stats / inbox`.

pub mod bitmap;
pub mod bitmaps;
pub mod blkdebug;
mod blkdebug_rules;
pub mod blkverify;
pub mod chain;
pub mod copies;
pub mod copy_before_write;
pub mod debug;
pub mod drive;
pub mod driver;
pub mod edge;
pub mod edit;
pub mod file;
pub mod file_open;
mod filelock;
pub mod filename;
pub mod filter_compress;
pub mod filter_copy_on_read;
pub mod filter_preallocate;
pub mod filter_throttle;
mod flush_once;
pub mod gate;
pub mod graph;
pub mod handle;
pub mod medium;
pub mod mutant;
pub mod node;
mod node_options;
pub mod null;
pub mod open;
pub mod perm;
pub mod quorum;
pub mod raw;
mod reopen;
pub mod reopen_options;
pub mod serial;
pub mod snapshot;
pub mod stats;
#[cfg(test)]
pub mod testing;
pub mod throttle;
pub mod timed;
pub mod traffic;
pub mod tray;
pub mod yank;
