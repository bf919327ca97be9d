//! The job `backup`: a copy of a disk as it was when the job began, while the guest goes on writing.
//!
//! The job puts the filter [`copy_before_write`](crate::block::copy_before_write) above the disk and then copies cluster after cluster,
//! what the guest has not made it copy already. With a bitmap it copies what that says is dirty; the
//! bitmap is put aside at the very moment that the filter comes, so that it and the copy speak of the
//! same contents.
//!
//! Owns: which clusters are to be copied, what becomes of the bitmap. Never: who comes first to a
//! cluster (the filter's). Threads: the job's; `new`, `commit`, `abort`, `clean` on control. Locks: none.

use super::crew::{Crew, PIECE, Step, Todo};
use super::job::{After, JobCtx, Stop, Work, attach_source};
use super::layers;
use crate::bail;
use crate::block::bitmap::Bitmap;
use crate::block::copies::{Copied, Copies, CopyError, CopyOptions};
use crate::block::copy_before_write as cbw;
use crate::block::driver::{ExtentKind, Perm};
use crate::block::graph::Graph;
use crate::block::handle::{Handle, OnError};
use crate::block::mutant::{Bug, Mutant};
use crate::block::node::{Node, NodeOptions};
use crate::error::{Error, Result};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Clusters of this size at least are copied together, in bytes (QEMU's default).
const CLUSTER: u64 = 64 << 10;

/// What is copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sync {
    /// All of the disk.
    Full,
    /// What is in its uppermost image.
    Top,
    /// What the guest overwrites, before it does; until the job is cancelled.
    None,
    /// What the bitmap says.
    Bitmap,
}

/// When the bitmap forgets what was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitmapMode {
    /// When all of it was.
    OnSuccess,
    /// Never.
    Never,
    /// What was copied, also when the job fails later.
    Always,
}

/// A backup that is to be made.
pub struct BackupSpec {
    /// The disk.
    pub source: Arc<Node>,
    /// Where it goes.
    pub target: Arc<Node>,
    /// What is copied.
    pub sync: Sync,
    /// A bitmap of the source, and when it forgets.
    pub bitmap: Option<(Arc<Bitmap>, BitmapMode)>,
    /// Data are compressed.
    pub compress: bool,
    /// What a failed read of the disk leads to.
    pub on_source_error: OnError,
    /// What a failed write of the target leads to.
    pub on_target_error: OnError,
    /// A guest's write whose copy fails is done, and the backup is lost, instead of the reverse.
    pub break_snapshot: bool,
    /// The filter's name, and whether the user chose it.
    pub filter: (String, bool),
}

/// A bitmap while the job has it.
struct Synced {
    node: Arc<Node>,
    bitmap: Arc<Bitmap>,
    mode: BitmapMode,
}

/// See the module's head.
pub struct Backup {
    sync: Sync,
    copies: Arc<Copies>,
    filter: Arc<Node>,
    /// On the filter: for tickets.
    handle: Arc<Handle>,
    crew: Crew,
    /// The disk's uppermost image at the moment of which the copy is.
    top: Arc<Node>,
    bitmap: Option<Synced>,
    policies: (OnError, OnError),
    /// How much there is to copy, in bytes.
    total: u64,
    bug: Bug,
}

impl BackupSpec {
    /// What is wrong with it, as far as that can be said before there is a job.
    ///
    /// # Errors
    /// QEMU's texts.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        let BackupSpec { source, target, .. } = self;
        if Arc::ptr_eq(source, target) {
            bail!("Source and target cannot be the same");
        }
        if self.compress && !target.driver.compresses() {
            // The name is missing in QEMU too.
            bail!("Compression is not supported for this drive ");
        }
        if source.len() != target.len() {
            bail!("Source and target image have different sizes");
        }
        let (name, named) = &self.filter;
        if *named {
            graph.check_name(name).map_err(|e| e.context("Could not create node: "))?;
        }
        if target.read_only() {
            bail!("Could not create node: Block node is read-only");
        }
        Ok(())
    }
}

impl Backup {
    /// Puts the filter in: from now on the target gets what the guest overwrites.
    ///
    /// # Errors
    /// QEMU's texts. Nothing has changed then.
    pub fn new(graph: &mut Graph, spec: BackupSpec) -> Result<Backup> {
        spec.check(graph)?;
        let BackupSpec { source, target, .. } = &spec;
        let unit = target.driver.info().cluster_size.unwrap_or(0).next_power_of_two();
        let options = CopyOptions {
            cluster: unit.max(CLUSTER),
            full: spec.sync == Sync::Full,
            // Of another target the rest is read from elsewhere, in the end, and it may turn out that a
            // cluster is not to be copied after a guest has come to it.
            parts: matches!(spec.sync, Sync::Full | Sync::Bitmap),
            compress: spec.compress,
            break_snapshot: spec.break_snapshot,
        };
        let (name, named) = &spec.filter;
        let node = NodeOptions { read_only: source.read_only(), implicit: !named, ..NodeOptions::default() };
        let (filter, copies) = cbw::filter((name, node), source, target, options)?;
        let wrong = |e: Error| e.context("Could not create node: ");
        graph.add(filter.clone()).map_err(wrong)?;
        // No write is under way now, and none begins: this is the disk that the copy will be.
        let quiesced = graph.quiesce(&[source], &[]);
        let mut total = copies.left();
        let bug = Bug::here();
        let done = (|| {
            let synced = match &spec.bitmap {
                None => None,
                Some((bitmap, mode)) => {
                    if !bug.is(Mutant::LateFreeze) {
                        source.create_successor(bitmap)?;
                    }
                    Some(Synced { node: source.clone(), bitmap: bitmap.clone(), mode: *mode })
                }
            };
            if spec.sync == Sync::Bitmap {
                copies.to_copy().clear_all();
                if let Some(s) = &synced {
                    copies.to_copy().merge(&s.bitmap);
                }
                total = copies.left();
            }
            let put = graph.edit(&quiesced, |edit| edit.insert_filter(&filter, source));
            if let (Err(_), Some(s)) = (&put, &synced) {
                s.node.reclaim_bitmap(&s.bitmap);
            }
            put.map(|()| synced)
        })();
        drop(quiesced);
        let bitmap = done.inspect_err(|_| graph.collect())?;
        let handle = attach_source(graph, &filter, Perm::CONSISTENT_READ, Perm::ALL);
        let policies = (spec.on_source_error, spec.on_target_error);
        match handle {
            Ok(handle) => {
                let crew = Crew::new(graph, &filter);
                let top = source.clone().skip_filters();
                Ok(Backup {
                    sync: spec.sync,
                    copies,
                    filter,
                    handle,
                    crew,
                    top,
                    bitmap,
                    policies,
                    total,
                    bug,
                })
            }
            Err(e) => {
                if let Some(s) = bitmap {
                    s.node.reclaim_bitmap(&s.bitmap);
                }
                remove(graph, &filter);
                Err(e)
            }
        }
    }

    /// Does `f` with a ticket; what fails there, the policies decide about: `None` is to try again.
    fn attempt<T>(&mut self, cx: &JobCtx, f: impl FnOnce(&Copies) -> Copied<T>) -> Result<Option<T>, Stop> {
        match self.handle.inside(|_| Ok(f(&self.copies)))? {
            Ok(answer) => Ok(Some(answer)),
            Err(e) => self.failed(cx, e).map(|()| None),
        }
    }

    /// The policies decide about a failed request; if this returns, it is to be tried again.
    fn failed(&self, cx: &JobCtx, e: CopyError) -> Result<(), Stop> {
        let (e, policy, read) = match e {
            CopyError::Source(e) => (e, self.policies.0, true),
            CopyError::Target(e) => (e, self.policies.1, false),
        };
        cx.on_error(policy, &e, read).map(drop)
    }

    /// Only what is in the uppermost image: the rest need not be copied.
    fn leave_out_lower(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let (mut at, top) = (0, self.top.clone());
        while at < self.copies.len() {
            cx.pause_point()?;
            let step = self.attempt(cx, |copies| {
                let (source, _) = copies.nodes().map_err(CopyError::Source)?;
                let left = copies.len() - at;
                // An overlay may have come since, in which nothing is yet; the image may have gone since.
                if !layers::nodes(&source).any(|n| Arc::ptr_eq(&n, &top)) {
                    return Ok(left);
                }
                let found = top.status(at, left).map_err(CopyError::Source)?;
                if found.kind == ExtentKind::Unallocated {
                    // only clusters that lie in it as a whole
                    let first = at.next_multiple_of(copies.cluster());
                    let end = at + found.len;
                    let end = if end >= copies.len() { end } else { end & !(copies.cluster() - 1) };
                    if first < end {
                        let stop = copies.leave_out(first..end);
                        // what a guest is having copied is, wherever it lies
                        return Ok(if stop < end { stop + copies.cluster() } else { end } - at);
                    }
                }
                Ok(found.len)
            })?;
            at += step.unwrap_or(0);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Stop> {
        if self.copies.broken() {
            return Err(Stop::Failed(Error::new(
                "a write of the guest could not be copied before it was done",
            )));
        }
        Ok(())
    }

    /// What there is to do at `off`, and for how many of `len` bytes: true: to copy it.
    fn look(&self, off: u64, len: u64, most: u64) -> Copied<(bool, u64)> {
        let copies = &self.copies;
        match copies.to_copy().next_dirty(off, off + len, most) {
            None => Ok((false, len)),
            Some(next) if next.start > off => Ok((false, next.start - off)),
            Some(next) => match copies.skip_zeroes(off)? {
                0 => Ok((true, next.end - off)),
                n => Ok((false, n)),
            },
        }
    }

    /// Copies the next piece.
    fn step(&self, cx: &JobCtx, todo: &Todo) -> Step<(Range<u64>, CopyError)> {
        let copies = &self.copies;
        if copies.broken() {
            return Ok(None);
        }
        // A request without a node to go to is the disk's.
        let inside = |f: &dyn Fn() -> Copied<(bool, u64)>| {
            self.handle.inside(|_| Ok(f())).unwrap_or_else(|e| Err(CopyError::Source(e)))
        };
        let mut wrong = None;
        let taken = todo.take(|off, len| {
            // As long as QEMU's, whatever the speed: that says how long to wait after a piece.
            inside(&|| self.look(off, len, PIECE)).map_err(|e| {
                wrong = Some(e);
                io::ErrorKind::Other.into()
            })
        });
        let Some((range, found)) = taken else { return Ok(None) };
        if let Some(e) = wrong {
            return Err((range, e));
        }
        let mut bytes = 0;
        if matches!(found, Ok(true)) {
            let mut at = range.start;
            while at < range.end {
                let done = inside(&|| {
                    let done = copies.copy_next(at, range.end)?;
                    Ok(done.map_or((false, range.end), |r| (true, r.end)))
                });
                at = done.map_err(|e| (range.clone(), e))?.1;
            }
            bytes = range.end - range.start;
        }
        if copies.take_help() {
            self.crew.was_helped();
        }
        cx.progress(self.total.saturating_sub(copies.left()), self.total);
        // Nobody waits after the last piece.
        Ok(Some(bytes).filter(|_| !todo.is_empty() && copies.left() > 0))
    }

    fn copy_all(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        let total = self.total;
        cx.progress(total.saturating_sub(self.copies.left()), total);
        let step = |todo: &Todo| self.step(cx, todo);
        self.crew.work_off(cx, self.copies.len(), step, |_, e| {
            self.check()?;
            // Ignored or not, what was not copied must be.
            self.failed(cx, e).map(|()| After::Again)
        })?;
        self.check()?;
        cx.progress(total, total);
        Ok(())
    }
}

fn remove(graph: &mut Graph, filter: &Arc<Node>) {
    if let Err(e) = graph.remove_filter(filter) {
        log::error!("node '{}' stays in the graph: {e}", filter.name);
    }
}

impl Work for Backup {
    fn total(&self) -> Option<u64> {
        (self.sync != Sync::Top).then_some(self.total)
    }

    fn run(&mut self, cx: &JobCtx) -> Result<(), Stop> {
        if let (true, Some(s)) = (self.bug.is(Mutant::LateFreeze), &self.bitmap) {
            s.node.create_successor(&s.bitmap)?;
        }
        if self.sync == Sync::None {
            loop {
                self.check()?;
                // Also when it is cancelled.
                let slept = cx.sleep(Duration::from_millis(200));
                cx.progress(self.total.saturating_sub(self.copies.left()), self.total);
                slept?;
            }
        }
        if self.sync == Sync::Top {
            self.leave_out_lower(cx)?;
            self.total = self.copies.left();
        }
        self.copy_all(cx)?;
        while self
            .attempt(cx, |copies| {
                copies.nodes().and_then(|(_, target)| target.flush()).map_err(CopyError::Target)
            })?
            .is_none()
        {}
        self.check()
    }

    fn commit(&mut self, _: &mut Graph) {
        if let Some(s) = self.bitmap.take() {
            match s.mode {
                BitmapMode::Never => s.node.reclaim_bitmap(&s.bitmap),
                BitmapMode::OnSuccess | BitmapMode::Always => s.node.abdicate_bitmap(&s.bitmap),
            }
        }
    }

    fn abort(&mut self, _: &mut Graph) {
        if let Some(s) = self.bitmap.take() {
            if s.mode == BitmapMode::Always {
                // What was copied is on the target, whatever became of the rest.
                s.bitmap.clear_all();
                s.bitmap.merge(self.copies.to_copy());
            }
            s.node.reclaim_bitmap(&s.bitmap);
        }
    }

    fn filter(&self) -> Option<&Arc<Node>> {
        Some(&self.filter)
    }

    fn clean(&mut self, graph: &mut Graph) {
        graph.detach(&self.handle);
        remove(graph, &self.filter);
    }
}

#[cfg(test)]
#[path = "backup_test.rs"]
mod tests;
