//! The drivers `null-co` and `null-aio`: a disk without storage, for tests and benchmarks.
//!
//! Owns: a size and a latency. Threads: I/O from any. Locks: none.

use super::driver::{Driver, Extent, ExtentKind, Flags, Limits, Perm};
use super::node::Edge;
use super::open::{Open, Opening};
use super::reopen_options::{Ready, Reopening};
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Map, Value, json};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

crate::wire_struct! {
    /// Options of the drivers `null-co` and `null-aio`.
    pub struct BlockdevOptionsNull {
        /// Length in bytes; 1 GiB by default.
        size: Option<i64>,
        /// Nanoseconds that each request takes; 0 by default.
        "latency-ns" latency_ns: Option<u64>,
        /// Reads give zeroes; by default they leave the reader's memory as it is.
        "read-zeroes" read_zeroes: Option<bool>,
    }
}

/// One of the two drivers, with its options.
pub struct NullPlan {
    /// `null-co` or `null-aio`.
    pub name: &'static str,
    /// Their options.
    pub options: BlockdevOptionsNull,
}

/// See the module's head.
pub struct Null {
    name: &'static str,
    len: AtomicU64,
    latency: Duration,
    read_zeroes: bool,
    /// What was given of what matters.
    given: Map<String, Value>,
}

impl Open for NullPlan {
    fn name(&self) -> &'static str {
        self.name
    }

    fn open(self: Box<Self>, _: &mut Opening) -> Result<Box<dyn Driver>> {
        let o = self.options;
        let Ok(len) = u64::try_from(o.size.unwrap_or(1 << 30)) else {
            crate::bail!("size is invalid");
        };
        let latency = o.latency_ns.unwrap_or(0);
        if i64::try_from(latency).is_err() {
            crate::bail!("latency-ns is invalid");
        }
        let size = o.size.map(|n| ("size".to_string(), json!(n)));
        let zeroes = o.read_zeroes.map(|on| ("read-zeroes".to_string(), json!(on)));
        Ok(Box::new(Null {
            given: size.into_iter().chain(zeroes).collect(),
            name: self.name,
            len: AtomicU64::new(len),
            latency: Duration::from_nanos(latency),
            read_zeroes: o.read_zeroes.unwrap_or(false),
        }))
    }
}

impl Null {
    fn wait(&self) {
        if !self.latency.is_zero() {
            std::thread::sleep(self.latency);
        }
    }
}

impl Driver for Null {
    fn name(&self) -> &'static str {
        self.name
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        Limits { cheap_zeroes: true, ..Limits::default() }
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        above
    }

    fn read(&self, _: u64, to: &mut IovMut) -> io::Result<()> {
        self.wait();
        if self.read_zeroes {
            to.fill(0, to.len(), 0);
        }
        Ok(())
    }

    fn write(&self, _: u64, _: &Iov, _: Flags) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: Flags) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let kind = if self.read_zeroes { ExtentKind::Zero } else { ExtentKind::Data };
        Ok(Extent { kind, len, host_offset: Some(off) })
    }

    fn reopen<'a>(&'a self, _: &Reopening) -> Option<Result<Ready<'a>>> {
        Some(Ok(Box::new(|| {})))
    }

    fn filename(&self) -> String {
        if self.given.is_empty() { format!("{}://", self.name) } else { String::new() }
    }

    fn own_options(&self) -> Map<String, Value> {
        self.given.clone()
    }
}
