//! The driver `blkverify`: does everything on two nodes, and compares. For tests of formats.
//!
//! `raw` has what is right, `test` is what is tested; who reads gets what `test` says. A difference
//! is an error for whoever asks, with QEMU's text in the log. (QEMU ends the process there.) As in
//! quorum.rs, writes that overlap wait for each other, and a read that finds a difference looks again
//! with nobody writing there.
//!
//! Owns: the ranges in use. Threads: I/O from any. Locks: that list's own.

use super::driver::{Driver, Flags, ImageInfo, Limits, Perm};
use super::filename::names;
use super::node::{Edge, Node, errno};
use super::open::{Child, Open, Opening};
use super::perm;
use super::serial::Serial;
use crate::error::Result;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::Arc;

/// The driver, to be opened.
pub struct BlkverifyPlan {
    /// What is right.
    pub raw: Child,
    /// What is tested.
    pub test: Child,
}

/// Reads are done in pieces of at most so many bytes.
const PIECE: u64 = 1 << 20;

/// See the module's head.
pub struct Blkverify {
    raw: Arc<Edge>,
    test: Arc<Edge>,
    ranges: Serial,
}

impl Open for BlkverifyPlan {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let nobody = (Perm::NONE, Perm::ALL);
        let raw = cx.child("raw", self.raw, nobody)?;
        let test = cx.child("test", self.test, perm::for_data(nobody))?;
        Ok(Box::new(Blkverify { raw, test, ranges: Serial::default() }))
    }
}

/// The error's number, as QEMU compares results; 0 is none.
fn code<T>(done: &io::Result<T>) -> i32 {
    done.as_ref().err().map_or(0, |e| -e.raw_os_error().unwrap_or(libc::EIO))
}

/// One side's answer to a read.
fn ask(node: &Node, off: u64, len: u64) -> io::Result<AlignedBuf> {
    let mut data = AlignedBuf::new(len as usize, node.limits().memory_alignment.max(16) as usize);
    node.read(off, &mut IovMut::from_slice(&mut data)).map(|()| data)
}

/// Why two answers are not the same.
fn difference(off: u64, test: &io::Result<AlignedBuf>, raw: &io::Result<AlignedBuf>) -> Option<String> {
    match (test, raw) {
        (Ok(a), Ok(b)) => {
            let at = a.iter().zip(b.iter()).position(|(a, b)| a != b)?;
            Some(format!("contents mismatch at offset {}", off + at as u64))
        }
        _ if code(test) == code(raw) => None,
        _ => Some(format!("return value mismatch {} != {}", code(test), code(raw))),
    }
}

fn differ(op: &str, off: u64, len: u64, why: &str) -> io::Error {
    log::error!("blkverify: {op} offset={off} bytes={len} {why}");
    errno(libc::EIO)
}

impl Blkverify {
    fn piece(&self, off: u64, len: u64) -> io::Result<AlignedBuf> {
        let (raw, test) = (self.raw.need()?, self.test.need()?);
        let both = || (ask(&test, off, len), ask(&raw, off, len));
        let mut answers = both();
        if difference(off, &answers.0, &answers.1).is_some() {
            let _turn = self.ranges.enter(off, off + len, true);
            answers = both();
            if let Some(why) = difference(off, &answers.0, &answers.1) {
                return Err(differ("read", off, len, &why));
            }
        }
        answers.0
    }
}

impl Driver for Blkverify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn len(&self) -> u64 {
        self.test.peek(Node::len).unwrap_or(0)
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.raw.clone(), self.test.clone()]
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.raw)
    }

    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "test" { perm::for_data(above) } else { above }
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let (mut at, len) = (0, to.len() as u64);
        while at < len {
            let n = PIECE.min(len - at);
            to.copy_from(at as usize, &self.piece(off + at, n)?);
            at += n;
        }
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let (raw, test) = (self.raw.need()?, self.test.need()?);
        // A guest may change its memory while the two are written.
        let mut data = AlignedBuf::new(from.len(), test.limits().memory_alignment.max(16) as usize);
        from.copy_to(0, &mut data);
        let (len, data) = (from.len() as u64, Iov::from_slice(&data));
        let _turn = self.ranges.enter(off, off + len, true);
        let done = test.write(off, &data, flags);
        let right = raw.write(off, &data, flags);
        if code(&done) != code(&right) {
            let why = format!("return value mismatch {} != {}", code(&done), code(&right));
            return Err(differ("write", off, len, &why));
        }
        done
    }

    /// Zeroes are data here, as in QEMU.
    fn zero(&self, _: u64, _: u64, _: Flags) -> io::Result<()> {
        Err(errno(libc::ENOTSUP))
    }

    /// What discarded space reads as is the affair of each of the two.
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(errno(libc::ENOTSUP))
    }

    /// What is right need not last.
    fn flush(&self) -> io::Result<()> {
        self.test.need()?.flush()
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.raw.need()?.resize(len)?;
        self.test.need()?.resize(len)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn filename(&self) -> String {
        let name = |edge: &Edge| edge.node().map(|n| names(&n).exact).unwrap_or_default();
        let (raw, test) = (name(&self.raw), name(&self.test));
        if raw.is_empty() || test.is_empty() { String::new() } else { format!("blkverify:{raw}:{test}") }
    }
}

#[cfg(test)]
#[path = "blkverify_test.rs"]
mod tests;
