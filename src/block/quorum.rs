//! The driver `quorum`: several children that hold the same, written all, and read by vote.
//!
//! A read compares what the children say; what enough of them say (`vote-threshold`) is the answer,
//! the others are reported (`QUORUM_REPORT_BAD`) and, with `rewrite-corrupted`, corrected. With
//! `read-pattern=fifo` the first child that can be read is believed. A write or flush is good when
//! enough children did it.
//!
//! The children are asked one after the other, on the request's own thread: cached reads are over
//! before a thread would have started. Unlike in QEMU, requests cannot make children differ:
//!
//! * what a guest writes is copied aside first (it may change its memory meanwhile), and writes that
//!   overlap wait for each other;
//! * children that differ may be in the middle of a write. So a read that finds them to differ waits
//!   for the writes in its range, and is done again with none allowed: only that round counts, for
//!   reports and corrections, too;
//! * `discard` is not passed on: what discarded space reads as is each child's own affair. Nor is a
//!   request to write zeroes only if that is quick: some children might do it, and some not.
//!
//! Owns: the list of children. Never: knows what they are. Threads: I/O from any; children come and
//! go on the control thread, with the gates above closed. Locks: the list's own, for a clone; the
//! list of ranges in use, across I/O (a range in it makes only overlapping requests wait).

use super::driver::{Children, Driver, Extent, ExtentKind, Flags, ImageInfo, Limits, Perm};
use super::node::{Edge, Node, errno};
use super::open::{Child, Open, Opening};
use super::serial::Serial;
use crate::error::{Result, strerror};
use crate::event::{Event, Events, QuorumOp};
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use crate::{bail, wire_enum};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

wire_enum! {
    /// How the children of a quorum are read.
    pub enum QuorumReadPattern {
        /// All of them, and they vote.
        "quorum" Quorum,
        /// One after the other until one can be read.
        "fifo" Fifo,
    }
}

/// The driver, to be opened.
pub struct QuorumPlan {
    /// The children, in their order.
    pub children: Vec<Child>,
    /// How many children must agree.
    pub threshold: i64,
    /// Two children that must not differ: an error if they do, with QEMU's text in the log. (QEMU
    /// ends the process there.)
    pub blkverify: Option<bool>,
    /// Children that are outvoted are overwritten with the answer.
    pub rewrite_corrupted: Option<bool>,
    /// How they are read.
    pub read_pattern: Option<QuorumReadPattern>,
}

/// Reads are done in pieces of at most so many bytes: each child needs a buffer.
const PIECE: u64 = 1 << 20;

type List = Arc<[Arc<Edge>]>;

/// What a child answered: its data, or why not.
type Answer = io::Result<AlignedBuf>;

/// See the module's head.
pub struct Quorum {
    /// The node's name.
    name: String,
    children: RwLock<List>,
    /// The number of the next child.
    next: AtomicU32,
    threshold: usize,
    fifo: bool,
    blkverify: bool,
    rewrite: bool,
    /// The options as given.
    given: Map<String, Value>,
    /// In bytes: the children's, which nobody can change.
    len: u64,
    limits: Limits,
    ranges: Serial,
    events: Option<Events>,
}

impl QuorumPlan {
    fn given(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("vote-threshold".into(), json!(self.threshold));
        let flags = [("blkverify", self.blkverify), ("rewrite-corrupted", self.rewrite_corrupted)];
        for (name, value) in flags {
            map.extend(value.map(|v| (name.to_string(), json!(v))));
        }
        map.extend(self.read_pattern.map(|p| ("read-pattern".to_string(), json!(p.as_str()))));
        map
    }
}

impl Open for QuorumPlan {
    fn name(&self) -> &'static str {
        "quorum"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let count = self.children.len();
        if count < 1 {
            bail!("Number of provided children must be 1 or more");
        }
        let Some(threshold) = usize::try_from(self.threshold).ok().filter(|n| *n > 0) else {
            bail!("Parameter 'vote-threshold' expects a value >= 1");
        };
        if threshold > count {
            bail!("threshold may not exceed children count");
        }
        let fifo = self.read_pattern == Some(QuorumReadPattern::Fifo);
        // They say how a vote goes, and there is none.
        let blkverify = !fifo && self.blkverify.unwrap_or(false);
        let rewrite = !fifo && self.rewrite_corrupted.unwrap_or(false);
        if blkverify && (count != 2 || threshold != 2) {
            bail!("blkverify=on can only be set if there are exactly two files and vote-threshold is 2");
        }
        if blkverify && rewrite {
            bail!("rewrite-corrupted=on cannot be used with blkverify=on");
        }
        let given = self.given();
        let mut children: Vec<Arc<Edge>> = Vec::new();
        let mut len = 0;
        let mut limits = Limits::default();
        for (n, child) in self.children.into_iter().enumerate() {
            let edge = cx.child(&format!("children.{n}"), child, wants(rewrite, (Perm::NONE, Perm::ALL)))?;
            let node = edge.need()?;
            if n == 0 {
                len = node.len();
            }
            check_len(&node, len)?;
            limits.memory_alignment = limits.memory_alignment.max(node.limits().memory_alignment);
            children.push(edge);
        }
        // What children want of memory they see to by themselves: here it saves them a copy.
        let limits = Limits { memory_alignment: 1, ..limits };
        Ok(Box::new(Quorum {
            name: cx.name().to_string(),
            // As many as were given: far below 2^32.
            next: AtomicU32::new(count as u32),
            children: RwLock::new(children.into()),
            threshold,
            fifo,
            blkverify,
            rewrite,
            given,
            len,
            limits,
            ranges: Serial::default(),
            events: cx.events(),
        }))
    }
}

fn wants(rewrite: bool, above: (Perm, Perm)) -> (Perm, Perm) {
    let own = if rewrite { Perm::WRITE } else { Perm::NONE };
    // Whoever else wrote to a child, or resized it, would make it differ from the others.
    (above.0 | own, above.1 & (Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED))
}

/// The children of a quorum are alike.
fn check_len(node: &Node, len: u64) -> Result<()> {
    if node.len() != len {
        bail!(
            "the children of a quorum must have the same length: '{}' has {} bytes, not {len}",
            node.name,
            node.len()
        );
    }
    Ok(())
}

/// What most errors say; the last one to come up wins a tie, as in QEMU.
fn common_error(errors: Vec<io::Error>) -> io::Error {
    let same = |a: &io::Error, b: &io::Error| a.raw_os_error() == b.raw_os_error() && a.kind() == b.kind();
    let mut best: Option<(usize, usize)> = None;
    for (n, e) in errors.iter().enumerate() {
        let first = !errors[..n].iter().any(|o| same(o, e));
        let votes = errors.iter().filter(|o| same(o, e)).count();
        if first && best.is_none_or(|(most, _)| votes >= most) {
            best = Some((votes, n));
        }
    }
    let found = best.and_then(|(_, n)| errors.into_iter().nth(n));
    found.unwrap_or_else(|| errno(libc::EIO))
}

/// The children that gave each answer, in the order in which the answers first came up.
fn versions(round: &[Answer]) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<usize>> = Vec::new();
    for (n, answer) in round.iter().enumerate() {
        let Ok(data) = answer else { continue };
        let same = |v: &&mut Vec<usize>| round[v[0]].as_ref().is_ok_and(|first| first[..] == data[..]);
        match out.iter_mut().find(same) {
            Some(version) => version.push(n),
            None => out.push(vec![n]),
        }
    }
    out
}

impl Quorum {
    fn list(&self) -> List {
        self.children.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn post(&self, event: Event) {
        if let Some(events) = &self.events {
            events.post(event);
        }
    }

    fn sectors(off: u64, len: u64) -> (u64, u64) {
        (off / 512, (off + len).div_ceil(512) - off / 512)
    }

    fn report_bad(&self, op: QuorumOp, child: &Edge, (off, len): (u64, u64), e: Option<&io::Error>) {
        let (sector_num, sectors_count) = Quorum::sectors(off, len);
        let node_name = child.peek(|n| n.name.clone()).unwrap_or_default();
        let error = e.map(strerror);
        self.post(Event::QuorumReportBad { op, error, node_name, sector_num, sectors_count });
    }

    fn report_failure(&self, (off, len): (u64, u64)) {
        let (sector_num, sectors_count) = Quorum::sectors(off, len);
        self.post(Event::QuorumFailure { node_name: self.name.clone(), sector_num, sectors_count });
    }

    /// A buffer that no child has to copy.
    fn buffer(list: &List, len: u64) -> AlignedBuf {
        let align = list.iter().filter_map(|e| e.peek(|n| n.limits().memory_alignment)).max();
        AlignedBuf::new(len as usize, align.unwrap_or(1).max(16) as usize)
    }

    fn ask_all(list: &List, off: u64, len: u64) -> Vec<Answer> {
        let ask = |edge: &Arc<Edge>| {
            let mut data = Quorum::buffer(list, len);
            edge.need()?.read(off, &mut IovMut::from_slice(&mut data))?;
            Ok(data)
        };
        list.iter().map(ask).collect()
    }

    /// Reads a piece by vote.
    fn vote(&self, list: &List, off: u64, len: u64) -> Answer {
        let round = Quorum::ask_all(list, off, len);
        if versions(&round).len() <= 1 {
            return self.count(list, (off, len), round);
        }
        // Perhaps in the middle of a write: once more, with nobody writing here.
        let _turn = self.ranges.enter(off, off + len, true);
        let round = Quorum::ask_all(list, off, len);
        self.count(list, (off, len), round)
    }

    /// Counts the votes, and reports and corrects who was outvoted (nobody writes there then).
    fn count(&self, list: &List, at: (u64, u64), mut round: Vec<Answer>) -> Answer {
        for (answer, child) in round.iter().zip(list.iter()) {
            if let Err(e) = answer {
                self.report_bad(QuorumOp::Read, child, at, Some(e));
            }
        }
        if round.iter().filter(|a| a.is_ok()).count() < self.threshold {
            self.report_failure(at);
            return Err(common_error(round.into_iter().filter_map(Result::err).collect()));
        }
        let versions = versions(&round);
        if self.blkverify && versions.len() > 1 {
            self.say_where(at, &round);
            return Err(errno(libc::EIO));
        }
        // The last one wins a tie, as in QEMU.
        let winner = versions.iter().enumerate().max_by_key(|(n, v)| (v.len(), *n));
        let Some((winner, voters)) = winner else { return Err(errno(libc::EIO)) };
        if versions.len() > 1 && voters.len() < self.threshold {
            self.report_failure(at);
            return Err(errno(libc::EIO));
        }
        let data = std::mem::replace(&mut round[voters[0]], Err(errno(libc::EIO)))?;
        let outvoted = versions.iter().enumerate().filter(|(n, _)| *n != winner).flat_map(|(_, v)| v);
        for child in outvoted.map(|n| &list[*n]) {
            self.report_bad(QuorumOp::Read, child, at, None);
            if self.rewrite {
                let fixed = child.need().and_then(|c| c.write(at.0, &Iov::from_slice(&data), Flags::NONE));
                if let Err(e) = fixed {
                    log::warn!("quorum '{}': '{}' stays corrupted: {e}", self.name, child.role);
                }
            }
        }
        Ok(data)
    }

    /// Where the two children of `blkverify` differ, in QEMU's words.
    fn say_where(&self, (off, len): (u64, u64), round: &[Answer]) {
        if let [Ok(a), Ok(b)] = round
            && let Some(at) = a.iter().zip(b.iter()).position(|(a, b)| a != b)
        {
            let at = off + at as u64;
            log::error!("quorum: offset={off} bytes={len} contents mismatch at offset {at}");
        }
    }

    fn read_fifo(&self, list: &List, off: u64, to: &mut IovMut) -> io::Result<()> {
        let mut last = errno(libc::EIO);
        for child in list.iter() {
            match child.need().and_then(|c| c.read(off, to)) {
                Ok(()) => return Ok(()),
                Err(e) => {
                    self.report_bad(QuorumOp::Read, child, (off, to.len() as u64), Some(&e));
                    last = e;
                }
            }
        }
        Err(last)
    }

    /// Lets every child change a range; good if enough of them could.
    fn change(&self, off: u64, len: u64, f: impl Fn(&Node) -> io::Result<()>) -> io::Result<()> {
        let list = self.list();
        let _turn = self.ranges.enter(off, off + len, true);
        let mut errors = Vec::new();
        for child in list.iter() {
            if let Err(e) = child.need().and_then(|c| f(&c)) {
                self.report_bad(QuorumOp::Write, child, (off, len), Some(&e));
                errors.push(e);
            }
        }
        if list.len() - errors.len() < self.threshold {
            self.report_failure((off, len));
            return Err(common_error(errors));
        }
        Ok(())
    }
}

impl Driver for Quorum {
    fn name(&self) -> &'static str {
        "quorum"
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        self.list().to_vec()
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        wants(self.rewrite, above)
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let list = self.list();
        if self.fifo {
            return self.read_fifo(&list, off, to);
        }
        let (mut at, len) = (0, to.len() as u64);
        while at < len {
            let n = PIECE.min(len - at);
            let data = self.vote(&list, off + at, n)?;
            to.copy_from(at as usize, &data);
            at += n;
        }
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let len = from.len() as u64;
        let mut data = Quorum::buffer(&self.list(), len);
        from.copy_to(0, &mut data);
        self.change(off, len, |child| child.write(off, &Iov::from_slice(&data), flags))
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        if flags.contains(Flags::NO_FALLBACK) {
            return Err(errno(libc::ENOTSUP));
        }
        self.change(off, len, |child| child.zero(off, len, flags))
    }

    fn flush(&self) -> io::Result<()> {
        let list = self.list();
        let mut errors = Vec::new();
        for child in list.iter() {
            if let Err(e) = child.need().and_then(|c| c.flush()) {
                self.report_bad(QuorumOp::Flush, child, (0, 0), Some(&e));
                errors.push(e);
            }
        }
        if list.len() - errors.len() < self.threshold { Err(common_error(errors)) } else { Ok(()) }
    }

    /// Zeroes only where all children say so.
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let (mut data, mut zero) = (0, len);
        for child in self.list().iter() {
            let extent = child.need()?.status(off, len)?;
            match extent.kind {
                ExtentKind::Zero => zero = zero.min(extent.len),
                _ => data = data.max(extent.len),
            }
        }
        Ok(match data {
            0 => Extent { kind: ExtentKind::Zero, len: zero, host_offset: None },
            _ => Extent { kind: ExtentKind::Data, len: data, host_offset: None },
        })
    }

    fn info(&self) -> ImageInfo {
        // Every node once: there may be ways without number to one that several others are above.
        let (mut seen, mut actual_size) = (HashSet::new(), None);
        let mut todo: Vec<_> = self.list().iter().filter_map(|e| e.node()).collect();
        while let Some(node) = todo.pop() {
            if !seen.insert(Arc::as_ptr(&node)) {
                continue;
            }
            let passes = matches!(node.driver.name(), "raw" | "quorum" | "throttle" | "copy-on-read");
            match passes {
                true => todo.extend(node.driver.edges().iter().filter_map(|e| e.node())),
                false => {
                    let size = node.driver.info().actual_size;
                    actual_size = size.map(|n| n + actual_size.unwrap_or(0)).or(actual_size);
                }
            }
        }
        ImageInfo { actual_size, ..ImageInfo::default() }
    }

    fn own_options(&self) -> Map<String, Value> {
        self.given.clone()
    }

    fn children(&self) -> Option<&dyn Children> {
        Some(self)
    }
}

impl Children for Quorum {
    fn new_role(&self, node: &Node) -> Result<String> {
        if self.blkverify {
            bail!("Cannot add a child to a quorum in blkverify mode");
        }
        let next = self.next.load(Ordering::Relaxed);
        if next == u32::MAX {
            bail!("Too many children");
        }
        check_len(node, self.len)?;
        Ok(format!("children.{next}"))
    }

    fn add(&self, edge: &Arc<Edge>) {
        self.next.fetch_add(1, Ordering::Relaxed);
        let mut list = self.children.write().unwrap_or_else(PoisonError::into_inner);
        *list = list.iter().chain([edge]).cloned().collect();
    }

    fn take_back(&self, edge: &Arc<Edge>) {
        self.remove(edge);
        self.next.fetch_sub(1, Ordering::Relaxed);
    }

    fn may_remove(&self) -> Result<()> {
        if self.list().len() <= self.threshold {
            let least = self.threshold;
            bail!("The number of children cannot be lower than the vote threshold {least}");
        }
        Ok(())
    }

    fn remove(&self, edge: &Arc<Edge>) {
        let mut list = self.children.write().unwrap_or_else(PoisonError::into_inner);
        *list = list.iter().filter(|e| !Arc::ptr_eq(e, edge)).cloned().collect();
    }
}

#[cfg(test)]
#[path = "quorum_test.rs"]
mod tests;
