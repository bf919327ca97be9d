//! The driver `copy-on-read`: a filter that writes what it has to read from a backing file into the
//! image it filters, so that it need not be read from there again.
//!
//! With `bottom` only what lies in the backing files down to that one is copied.
//!
//! A copy must not undo what a guest writes meanwhile: while a range is being looked at, read from
//! below and written, nobody else changes it.
//!
//! Owns: the list of requests in flight. Threads: I/O from any. Locks: that list's, never across I/O
//! (requests that overlap a copy wait for it on a condition variable).

use super::driver::{Driver, ExtentKind, Flags, Perm};
use super::node::{Edge, Node};
use super::open::{Child, Open, Opening};
use super::serial::Serial;
use crate::bail;
use crate::error::Result;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::{Arc, Weak};

/// The most that is copied at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// Options of `copy-on-read`.
pub struct CopyOnReadPlan {
    /// What is filtered.
    pub file: Child,
    /// The lowest image that data are copied from, by its node's name.
    pub bottom: Option<String>,
}

/// See the module's head.
pub struct CopyOnRead {
    file: Arc<Edge>,
    /// Copies begin and end at multiples of this, or at the end of the disk.
    granule: u64,
    bottom: Option<Weak<Node>>,
    serial: Serial,
}

impl Open for CopyOnReadPlan {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let file = cx.child("file", self.file, wants((Perm::NONE, Perm::ALL)))?;
        let node = file.need()?;
        let mut bottom = None;
        if let Some(name) = self.bottom {
            let Some(found) = cx.find(&name) else { bail!("Bottom node '{name}' not found") };
            if found.driver.filtered().is_some() {
                bail!("Bottom node '{name}' is a filter");
            }
            let mut chain = std::iter::successors(Some(node.clone().skip_filters()), below);
            if !chain.any(|n| Arc::ptr_eq(&n, &found)) {
                bail!("'{name}' is not in the chain of backing files of '{}'", node.name);
            }
            bottom = Some(Arc::downgrade(&found));
        }
        Ok(Box::new(CopyOnRead::new(file, bottom)?))
    }
}

/// A filter that is not in the graph yet: `-drive`'s `copy-on-read`.
pub fn above(node: &Arc<Node>) -> Result<Box<dyn Driver>> {
    let mut driver = CopyOnRead::new(Edge::new("file", Some(node.clone())), None)?;
    driver.file = Edge::new("file", None);
    Ok(Box::new(driver))
}

/// What a copy-on-read filter does with its child: besides what its users do, it writes what is
/// there already.
fn wants(above: (Perm, Perm)) -> (Perm, Perm) {
    (above.0 | Perm::WRITE_UNCHANGED, above.1 | Perm::WRITE_UNCHANGED)
}

/// The image behind `node`, which may be a filter itself, or above one.
fn below(node: &Arc<Node>) -> Option<Arc<Node>> {
    node.clone().skip_filters().backing().map(Node::skip_filters)
}

impl CopyOnRead {
    fn new(file: Arc<Edge>, bottom: Option<Weak<Node>>) -> Result<CopyOnRead> {
        let node = file.need()?;
        let granule = node.driver.info().cluster_size.unwrap_or(0).max(4096);
        Ok(CopyOnRead { file, granule, bottom, serial: Serial::default() })
    }

    /// Whether the first bytes of the range are to be copied, and how many are alike.
    fn missing(&self, node: &Arc<Node>, off: u64, len: u64) -> io::Result<(bool, u64)> {
        let extent = node.status(off, len)?;
        if extent.kind != ExtentKind::Unallocated {
            return Ok((false, extent.len));
        }
        let Some(bottom) = &self.bottom else { return Ok((true, extent.len)) };
        let mut len = extent.len;
        let is_bottom = |node: &Arc<Node>| bottom.upgrade().is_some_and(|b| Arc::ptr_eq(&b, node));
        if is_bottom(&node.clone().skip_filters()) {
            return Ok((false, len));
        }
        let mut image = below(node);
        while let Some(next) = image {
            if off >= next.len() {
                // Zeroes from here on, which are in no image.
                return Ok((false, len));
            }
            let extent = next.status(off, len.min(next.len() - off))?;
            len = extent.len;
            if extent.kind != ExtentKind::Unallocated {
                return Ok((true, len));
            }
            if is_bottom(&next) {
                break;
            }
            image = below(&next);
        }
        Ok((false, len))
    }

    /// Reads `to`, all of which was missing a moment ago, and writes it into the image.
    fn copy(&self, node: &Arc<Node>, off: u64, to: &mut IovMut) -> io::Result<()> {
        let end = off + to.len() as u64;
        let from = off - off % self.granule;
        let upto = end.next_multiple_of(self.granule).min(node.len());
        let _turn = self.serial.enter(from, upto, true);
        let mut buffer = AlignedBuf::new((upto - from).min(CHUNK.max(self.granule)) as usize, 4096);
        let mut at = from;
        while at < upto {
            let most = (upto - at).min(buffer.len() as u64);
            let (missing, len) = self.missing(node, at, most)?;
            let part = &mut buffer[..len as usize];
            node.read(at, &mut IovMut::from_slice(part))?;
            if missing {
                let zero = part.iter().all(|&b| b == 0);
                match zero {
                    true => node.zero(at, len, Flags::NONE)?,
                    false => node.write(at, &Iov::from_slice(part), Flags::NONE)?,
                }
            }
            let (first, last) = (at.max(off), (at + len).min(end));
            if first < last {
                let wanted = &part[(first - at) as usize..(last - at) as usize];
                to.copy_from((first - off) as usize, wanted);
            }
            at += len;
        }
        Ok(())
    }
}

impl Driver for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.file)
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        wants(above)
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let node = self.file.need()?;
        let (mut at, len) = (0, to.len());
        while at < len {
            let start = off + at as u64;
            let (missing, n) = self.missing(&node, start, (len - at) as u64)?;
            let mut part = to.slice(at, n as usize);
            match missing {
                true => self.copy(&node, start, &mut part)?,
                false => node.read(start, &mut part)?,
            }
            at += n as usize;
        }
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let _turn = self.serial.enter(off, off + from.len() as u64, false);
        self.file.need()?.write(off, from, flags)
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let _turn = self.serial.enter(off, off + len, false);
        self.file.need()?.zero(off, len, flags)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        let _turn = self.serial.enter(off, off + len, false);
        self.file.need()?.discard(off, len)
    }
}

#[cfg(test)]
#[path = "filter_copy_on_read_test.rs"]
mod tests;
