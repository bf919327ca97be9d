//! Bringing up what the backing file has: the guest sees no difference.
//!
//! A cluster that is not allocated is reserved as for a write, filled with what reading gives, and
//! linked. So a guest's write to it either comes first, and then there is nothing to bring up, or it
//! waits until the cluster is linked, and goes over it.
//!
//! Owns: that. Never: decides what is worth it. Threads: any number. Locks: `meta` for reservation and
//! link; none while data move.

use super::Qcow2;
use super::io::Plan;
use super::meta::Meta;
use super::types::Entry;
use crate::block::node::Node;
use crate::sys::iov::Iov;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What there is to do at a place.
enum Step {
    /// Nothing up to there.
    Skip(u64),
    /// Somebody allocates there.
    Wait,
    /// To fill this reservation.
    Fill(Plan),
}

impl Meta {
    /// The next step of bringing up `range`.
    fn bring_up(&mut self, file: &Node, range: &Range<u64>, size: u64, zero: bool) -> io::Result<Step> {
        let geo = self.geo;
        let c = geo.cluster(range.start);
        if self.is_in_flight(&(c..c + 1)) {
            return Ok(Step::Wait);
        }
        let first = self.entry(file, c)?;
        if !first.is_unallocated() {
            return self.bring_up_units(file, range.start, &first);
        }
        self.ensure_l2(file, c)?;
        // All entries in one page, so that the link can do all or nothing.
        let per_page = geo.page_size() >> geo.entry_bits();
        let mut end = geo.clusters(range.start, range.end - range.start).end.min((c | (per_page - 1)) + 1);
        for r in self.in_flight.iter().filter(|r| r.start > c) {
            end = end.min(r.start);
        }
        let mut count = 1;
        while c + count < end && self.entry(file, c + count)?.is_unallocated() {
            count += 1;
        }
        // Of what lies around the range nobody said that it is zeroes.
        let whole = match range.end {
            end if end >= size => c + count,
            end => (c + count).min(end >> geo.cluster_bits),
        };
        let begins = range.start == c << geo.cluster_bits;
        if zero && geo.v3 && !geo.external && begins && whole > c {
            for c in c..whole {
                self.set_entry(file, c, &Entry { zero: geo.all_units(), ..Entry::default() })?;
            }
            return Ok(Step::Skip(whole << geo.cluster_bits));
        }
        if zero {
            count = 1;
        }
        let (host, fresh) = if geo.external {
            (c << geo.cluster_bits, false)
        } else {
            let (k, got, fresh) = self.alloc_run(file, count)?;
            count = got;
            (k << geo.cluster_bits, fresh)
        };
        self.in_flight.push(c..c + count);
        let write = c << geo.cluster_bits..(c + count) << geo.cluster_bits;
        let data = write.start..write.start;
        Ok(Step::Fill(Plan { range: c..c + count, host, new: true, fresh, write, data }))
    }

    /// The same in a cluster of which some units are there.
    fn bring_up_units(&mut self, file: &Node, off: u64, old: &Entry) -> io::Result<Step> {
        let geo = self.geo;
        let c = geo.cluster(off);
        let there = match old.compressed {
            Some(_) => geo.all_units(),
            None => old.data | old.zero,
        };
        let units = u64::from(geo.units());
        let missing = |unit: u64| there >> unit & 1 == 0;
        let at = geo.in_cluster(off) >> geo.unit_bits();
        let Some(first) = (at..units).find(|u| missing(*u)) else {
            return Ok(Step::Skip((c + 1) << geo.cluster_bits));
        };
        let stop = (first..units).find(|u| !missing(*u)).unwrap_or(units);
        let place = |unit: u64| (c << geo.cluster_bits) + (unit << geo.unit_bits());
        let ours = old.host.filter(|_| old.copied || geo.external);
        let (host, new, fresh, write) = match ours {
            Some(host) => {
                self.prepare_own(file, host, 1)?;
                (host, false, false, place(first)..place(stop))
            }
            None if geo.external => (c << geo.cluster_bits, true, false, place(first)..place(stop)),
            None => {
                self.may_free(old)?;
                let (k, _, fresh) = self.alloc_run(file, 1)?;
                // What a snapshot has, too, moves whole.
                let write = if old.data != 0 { place(0)..place(units) } else { place(first)..place(stop) };
                (k << geo.cluster_bits, true, fresh, write)
            }
        };
        self.in_flight.push(c..c + 1);
        let data = write.start..write.start;
        Ok(Step::Fill(Plan { range: c..c + 1, host, new, fresh, write, data }))
    }
}

impl Qcow2 {
    /// Makes `len` bytes at `off`, and what is in the same clusters, independent of the backing file.
    /// `zero`: the backing file reads as zeroes there, and does not change.
    pub(super) fn populate_at(&self, off: u64, len: u64, zero: bool) -> io::Result<()> {
        let (mut pos, end) = (off, off + len);
        let size = self.size.load(Ordering::SeqCst);
        while pos < end {
            let mut meta = self.lock();
            while meta.exclusive {
                meta = self.wait(meta);
            }
            if meta.corrupt {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            if meta.wants_checkpoint() {
                drop(meta);
                self.checkpoint(false)?;
                continue;
            }
            let step = self.file().and_then(|file| meta.bring_up(&file, &(pos..end), size, zero));
            match step {
                Ok(Step::Wait) => drop(self.wait(meta)),
                Ok(Step::Skip(to)) => pos = to,
                Ok(Step::Fill(plan)) => {
                    drop(meta);
                    pos = plan.write.end;
                    self.carry_out(&plan, 0, &Iov::new())?;
                }
                Err(e) => {
                    drop(meta);
                    return self.judge(Err(e));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "populate_test.rs"]
mod tests;
