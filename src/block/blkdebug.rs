//! The driver `blkdebug`: passes requests on, and fails or holds those that its rules say. For
//! tests of what happens then.
//!
//! A rule belongs to a moment ([`BlkdebugEvent`]) of the format above, and perhaps to a state. It
//! injects an error (into requests that follow the moment, until another moment brings its own),
//! changes the state, or, as a breakpoint, holds the request back (rules.rs).
//!
//! A breakpoint holds requests that come through a gate (guests, jobs, exports, `qemu-io`), never
//! what the control thread does by itself. Where QEMU would wait for a held request for ever (a
//! change of the graph, a pause, the end of the process) it goes on here: see
//! [`Driver::hurry`]; breakpoints that hold nothing yet stay set.
//!
//! Owns: the limits, the rules. Never: looks at data. Threads: I/O from any. Locks: the rules' own,
//! never across I/O.

use super::blkdebug_rules::{Kind, Rules};
use super::debug::{BlkdebugEvent, Locks, Moments};
use super::driver::{Driver, Extent, Flags, ImageInfo, Limits, Perm};
use super::filename::names;
use super::node::{Edge, Node, errno};
use super::open::{Child, Open, Opening};
use super::reopen_options::{Ready, Reopening};
use crate::error::Result;
use crate::sys::iov::{Iov, IovMut};
use crate::{bail, wire_enum, wire_struct};
use serde_json::{Map, Value};
use std::io;
use std::sync::Arc;

wire_enum! {
    /// What kind of request fails.
    pub enum BlkdebugIOType {
        /// Reading.
        "read" Read,
        /// Writing.
        "write" Write,
        /// Writing zeroes.
        "write-zeroes" WriteZeroes,
        /// Giving space up.
        "discard" Discard,
        /// Making what was written durable.
        "flush" Flush,
        /// Asking what is where.
        "block-status" BlockStatus,
    }
}

wire_struct! {
    /// An error to be injected.
    pub struct BlkdebugInjectErrorOptions {
        /// When: requests after this moment fail.
        event: BlkdebugEvent,
        /// Only in this state (default: in any).
        state: Option<i64>,
        /// Only requests of this kind (default: all but `block-status`).
        iotype: Option<BlkdebugIOType>,
        /// The error's number (default: 5, EIO).
        errno: Option<i64>,
        /// Only requests for this 512-byte sector (default: any).
        sector: Option<i64>,
        /// Only once (default: false).
        once: Option<bool>,
        /// Fail at once and not later: there is no difference here.
        immediately: Option<bool>,
    }
}

wire_struct! {
    /// A change of state. The first state is 1.
    pub struct BlkdebugSetStateOptions {
        /// When.
        event: BlkdebugEvent,
        /// Only in this state (default: in any).
        state: Option<i64>,
        /// The new state.
        new_state: i64,
    }
}

wire_enum! {
    /// A permission.
    pub enum BlockPermission {
        /// Reads see what was last written.
        "consistent-read" ConsistentRead,
        /// Changes the data.
        "write" Write,
        /// Writes what is there already.
        "write-unchanged" WriteUnchanged,
        /// Changes the length.
        "resize" Resize,
    }
}

wire_struct! {
    /// Options of the driver `blkdebug`.
    pub struct BlkdebugOptions {
        /// A file with more rules.
        config: Option<String>,
        /// Requests must be multiples of this many bytes.
        align: Option<i64>,
        /// The longest read or write, in bytes; longer ones are split.
        "max-transfer" max_transfer: Option<i32>,
        /// Unit of zero requests, in bytes; the rest is written.
        "opt-write-zero" opt_write_zero: Option<i32>,
        /// The longest zero request, in bytes.
        "max-write-zero" max_write_zero: Option<i32>,
        /// Unit of discard requests, in bytes; the rest is ignored.
        "opt-discard" opt_discard: Option<i32>,
        /// The longest discard request, in bytes.
        "max-discard" max_discard: Option<i32>,
        /// Errors to be injected.
        "inject-error" inject_error: Option<Vec<BlkdebugInjectErrorOptions>>,
        /// Changes of state.
        "set-state" set_state: Option<Vec<BlkdebugSetStateOptions>>,
        /// What it does with the child beyond what its users do.
        "take-child-perms" take_child_perms: Option<Vec<BlockPermission>>,
        /// What it does not let others do with the child.
        "unshare-child-perms" unshare_child_perms: Option<Vec<BlockPermission>>,
    }
}

/// The driver, to be opened.
pub struct BlkdebugPlan {
    /// What has the bytes.
    pub image: Child,
    /// The rest.
    pub options: BlkdebugOptions,
}

/// How long requests of a kind are.
#[derive(Clone, Copy)]
struct Pieces {
    /// Unit in bytes; 1: any.
    unit: u64,
    /// At most this; `u64::MAX`: any.
    max: u64,
}

impl Pieces {
    /// The multiples of the unit in a range, cut to the maximum: (offset, length).
    fn of(self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let step = (self.max - self.max % self.unit).max(self.unit);
        let mut at = start;
        std::iter::from_fn(move || {
            let n = step.min(end.saturating_sub(at));
            at += n;
            (n > 0).then(|| (at - n, n))
        })
    }
}

/// See the module's head.
pub struct Blkdebug {
    image: Arc<Edge>,
    options: BlkdebugOptions,
    take: Perm,
    unshare: Perm,
    limits: Limits,
    transfer: Pieces,
    zeroes: Pieces,
    discards: Pieces,
    rules: Rules,
}

fn perms(list: Option<&Vec<BlockPermission>>) -> Perm {
    list.into_iter().flatten().fold(Perm::NONE, |all, one| {
        all | match one {
            BlockPermission::ConsistentRead => Perm::CONSISTENT_READ,
            BlockPermission::Write => Perm::WRITE,
            BlockPermission::WriteUnchanged => Perm::WRITE_UNCHANGED,
            BlockPermission::Resize => Perm::RESIZE,
        }
    })
}

/// A size option, which must be below 2 GiB and a multiple of `of`; 0 when absent.
fn size(name: &str, value: Option<i64>, of: u64) -> Result<u64> {
    let value = value.unwrap_or(0);
    let Ok(bytes) = u64::try_from(value) else {
        bail!("Value '{value}' is out of range for parameter '{name}'");
    };
    if bytes >= i32::MAX as u64 || bytes % of != 0 {
        bail!("Cannot meet constraints with {name} {bytes}");
    }
    Ok(bytes)
}

impl Open for BlkdebugPlan {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let BlkdebugPlan { image, options } = *self;
        let rules = Rules::new(&options)?;
        let take = perms(options.take_child_perms.as_ref());
        let unshare = perms(options.unshare_child_perms.as_ref());
        let image = cx.child("image", image, (take, !unshare))?;
        let below = image.need()?.limits();
        let o = &options;
        let align = size("align", o.align, 1)?;
        if align != 0 && !align.is_power_of_two() {
            bail!("Cannot meet constraints with align {align}");
        }
        let unit = align.max(1);
        let max_transfer = size("max-transfer", o.max_transfer.map(i64::from), unit)?;
        let opt_zero = size("opt-write-zero", o.opt_write_zero.map(i64::from), unit)?.max(unit);
        let max_zero = size("max-write-zero", o.max_write_zero.map(i64::from), opt_zero)?;
        let opt_discard = size("opt-discard", o.opt_discard.map(i64::from), unit)?.max(unit);
        let max_discard = size("max-discard", o.max_discard.map(i64::from), opt_discard)?;
        let most = |n: u64| if n == 0 { u64::MAX } else { n };
        let driver = Blkdebug {
            image,
            take,
            unshare,
            limits: Limits {
                // Below 2 GiB: checked by `size`.
                request_alignment: unit as u32,
                memory_alignment: 1,
                discard_alignment: below.discard_alignment.max(opt_discard as u32),
                ..below
            },
            transfer: Pieces { unit, max: most(max_transfer) },
            zeroes: Pieces { unit: opt_zero, max: most(max_zero) },
            discards: Pieces { unit: opt_discard, max: most(max_discard) },
            options,
            rules,
        };
        driver.rules.moment(Some(BlkdebugEvent::None), Locks::Free);
        Ok(Box::new(driver))
    }
}

/// What is written where a zero request is too short for the driver's unit.
static ZEROES: [u8; 65536] = [0; 65536];

impl Blkdebug {
    fn write_zeroes(&self, image: &Node, start: u64, end: u64) -> io::Result<()> {
        let most = Pieces { unit: 1, max: self.transfer.max.min(ZEROES.len() as u64) };
        for (off, n) in most.of(start, end) {
            self.rules.check(Kind::Write, off, n)?;
            image.write(off, &Iov::from_slice(&ZEROES[..n as usize]), Flags::NONE)?;
        }
        Ok(())
    }
}

impl Driver for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn filtered(&self) -> Option<&Arc<Edge>> {
        Some(&self.image)
    }

    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        (above.0 | self.take, above.1 & !self.unshare)
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let image = self.image.need()?;
        for (at, n) in self.transfer.of(off, off + to.len() as u64) {
            self.rules.check(Kind::Read, at, n)?;
            image.read(at, &mut to.slice((at - off) as usize, n as usize))?;
        }
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, flags: Flags) -> io::Result<()> {
        let image = self.image.need()?;
        for (at, n) in self.transfer.of(off, off + from.len() as u64) {
            self.rules.check(Kind::Write, at, n)?;
            image.write(at, &from.slice((at - off) as usize, n as usize), flags)?;
        }
        Ok(())
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let image = self.image.need()?;
        let (unit, end) = (self.zeroes.unit, off + len);
        let first = off.next_multiple_of(unit).min(end);
        let last = (end - end % unit).max(first);
        if (first, last) != (off, end) && flags.contains(Flags::NO_FALLBACK) {
            return Err(errno(libc::ENOTSUP));
        }
        self.write_zeroes(&image, off, first)?;
        for (at, n) in self.zeroes.of(first, last) {
            self.rules.check(Kind::WriteZeroes, at, n)?;
            image.zero(at, n, flags)?;
        }
        self.write_zeroes(&image, last, end)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        let image = self.image.need()?;
        let (unit, end) = (self.discards.unit, off + len);
        for (at, n) in self.discards.of(off.next_multiple_of(unit), end - end % unit) {
            self.rules.check(Kind::Discard, at, n)?;
            image.discard(at, n)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.rules.check(Kind::Flush, 0, 0)?;
        self.image.need()?.flush()
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        self.rules.check(Kind::BlockStatus, off, len)?;
        let mut extent = self.image.need()?.status(off, len)?;
        extent.host_offset = Some(off);
        Ok(extent)
    }

    /// Its rules stay.
    fn reopen<'a>(&'a self, _: &Reopening) -> Option<Result<Ready<'a>>> {
        Some(Ok(Box::new(|| {})))
    }

    /// As in QEMU, not even how much space it takes.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn filename(&self) -> String {
        let only_rules = BlkdebugOptions { config: self.options.config.clone(), ..BlkdebugOptions::none() };
        let below = self.image.node().map(|n| names(&n).exact).unwrap_or_default();
        if self.options != only_rules || below.is_empty() {
            return String::new();
        }
        format!("blkdebug:{}:{below}", self.options.config.as_deref().unwrap_or_default())
    }

    fn own_options(&self) -> Map<String, Value> {
        self.options.flat()
    }

    fn file_id(&self) -> Option<(u64, u64)> {
        self.image.node().and_then(|n| n.driver.file_id())
    }

    fn moments(&self) -> Option<&dyn Moments> {
        Some(&self.rules)
    }

    fn hurry(&self, on: bool) {
        self.rules.hurry(on);
    }

    /// What is below is closed by itself: an injected error is no matter here.
    fn close(&self) -> io::Result<()> {
        self.rules.close();
        Ok(())
    }
}

impl BlkdebugOptions {
    /// No option.
    pub fn none() -> BlkdebugOptions {
        BlkdebugOptions {
            config: None,
            align: None,
            max_transfer: None,
            opt_write_zero: None,
            max_write_zero: None,
            opt_discard: None,
            max_discard: None,
            inject_error: None,
            set_state: None,
            take_child_perms: None,
            unshare_child_perms: None,
        }
    }

    /// As QEMU writes options in a `json:` name: `inject-error.0.event`.
    fn flat(&self) -> Map<String, Value> {
        fn put(name: String, value: Value, out: &mut Map<String, Value>) {
            match value {
                Value::Object(map) => map.into_iter().for_each(|(k, v)| put(format!("{name}.{k}"), v, out)),
                Value::Array(list) => {
                    list.into_iter().enumerate().for_each(|(n, v)| put(format!("{name}.{n}"), v, out));
                }
                value => {
                    out.insert(name, value);
                }
            }
        }
        let mut out = Map::new();
        if let Value::Object(map) = crate::qapi::Wire::give(self.clone()) {
            map.into_iter().for_each(|(name, value)| put(name, value, &mut out));
        }
        out
    }
}

#[cfg(test)]
#[path = "blkdebug_test.rs"]
mod tests;
