//! The bitmaps of a node, and what stands in for one while a job uses it.
//!
//! Owns: the list. Never: the bits. Threads: any for marking; the list is changed by the control
//! thread and by jobs. Locks: the list's, read while a write is noted, which is short: whoever
//! changes the list has no write under way that saw the old one.

use super::bitmap::{Bitmap, MAX_NAME, Refuse};
use super::mutant::{Bug, Mutant};
use super::node::Node;
use crate::bail;
use crate::error::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The bitmaps of one node, oldest first.
#[derive(Default)]
pub struct Bitmaps {
    /// False: there are none, and nobody looks at the list.
    any: AtomicBool,
    list: RwLock<Vec<Arc<Bitmap>>>,
}

impl Bitmaps {
    fn read(&self) -> RwLockReadGuard<'_, Vec<Arc<Bitmap>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Arc<Bitmap>>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Arc<Bitmap>> {
        self.read().clone()
    }

    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.read().iter().find(|b| b.name() == Some(name)).cloned()
    }

    /// Adds one.
    ///
    /// # Errors
    /// QEMU's texts: the name is there already, or too long.
    pub fn push(&self, bitmap: Arc<Bitmap>) -> Result<()> {
        let mut list = self.write();
        if let Some(name) = bitmap.name() {
            if list.iter().any(|b| b.name() == Some(name)) {
                bail!("Bitmap already exists: {name}");
            }
            if name.len() > MAX_NAME {
                bail!("Bitmap name too long: {name}");
            }
        }
        list.push(bitmap);
        self.any.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Adds those that an image has, whose names differ, to an empty list.
    pub fn fill(&self, bitmaps: Vec<Arc<Bitmap>>) {
        let mut list = self.write();
        list.extend(bitmaps);
        self.any.store(!list.is_empty(), Ordering::SeqCst);
    }

    /// Takes one away.
    pub fn remove(&self, bitmap: &Arc<Bitmap>) {
        let mut list = self.write();
        list.retain(|b| !Arc::ptr_eq(b, bitmap));
        self.any.store(!list.is_empty(), Ordering::SeqCst);
    }

    /// True when there is one. SeqCst on both sides: a write that does not see a new bitmap ended
    /// before that bitmap's maker goes on.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// Notes a change. `end`: the length of the node now.
    pub(super) fn mark(&self, off: u64, len: u64, end: u64) {
        for bitmap in self.read().iter() {
            // Some nodes grow with their writes.
            if off + len > bitmap.len() {
                bitmap.grow(end);
            }
            if bitmap.enabled() {
                bitmap.mark(off, len);
            }
        }
    }

    /// The node has another length.
    pub(super) fn resize(&self, len: u64) {
        self.read().iter().for_each(|b| b.resize(len));
    }
}

impl Node {
    /// Its bitmaps, newest first (the order of the queries).
    pub fn bitmaps(&self) -> Vec<Arc<Bitmap>> {
        self.bitmaps.read().iter().rev().cloned().collect()
    }

    /// The bitmap of that name.
    pub fn find_bitmap(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.bitmaps.find(name)
    }

    /// A new bitmap, clean and recording: it has every change that ends after this call returned.
    /// `granularity`: bytes, a power of two from 512 on. Jobs' own have no name.
    ///
    /// # Errors
    /// QEMU's texts: the name is there already or too long; wrong granularity.
    pub fn add_bitmap(&self, name: Option<&str>, granularity: u32) -> Result<Arc<Bitmap>> {
        let bitmap = Bitmap::new(name, granularity, self.len())?;
        self.insert_bitmap(bitmap.clone())?;
        Ok(bitmap)
    }

    /// Adds one that is complete.
    pub fn insert_bitmap(&self, bitmap: Arc<Bitmap>) -> Result<()> {
        self.bitmaps.push(bitmap.clone())?;
        // The node may have grown between.
        bitmap.grow(self.len());
        Ok(())
    }

    /// Takes a bitmap away; nothing marks it any more when this returns.
    pub fn remove_bitmap(&self, bitmap: &Arc<Bitmap>) {
        self.bitmaps.remove(bitmap);
    }

    /// Freezes a bitmap for a job: a new anonymous one notes, from now on, what it would have (so
    /// it does nothing if `bitmap` was disabled). End with [`Node::abdicate_bitmap`] or
    /// [`Node::reclaim_bitmap`].
    ///
    /// # Errors
    /// It is in use.
    pub fn create_successor(&self, bitmap: &Arc<Bitmap>) -> Result<Arc<Bitmap>> {
        bitmap.check(Refuse::Busy)?;
        if bitmap.successor().is_some() {
            bail!("Cannot create a successor for a bitmap that already has one");
        }
        let on = bitmap.enabled();
        // Below 2^32: it was made from one.
        let child = Bitmap::new(None, bitmap.granularity() as u32, self.len())?;
        child.set_enabled(on);
        bitmap.set_busy(true);
        bitmap.set_successor(Some(child.clone()));
        // Both at one moment for every writer.
        let mut list = self.bitmaps.write();
        bitmap.set_enabled(false);
        list.push(child.clone());
        drop(list);
        Ok(child)
    }

    /// The job used all of it: what `bitmap` had is forgotten, what was written meanwhile is in it.
    pub fn abdicate_bitmap(&self, bitmap: &Arc<Bitmap>) {
        bitmap.clear_all();
        self.reclaim_bitmap(bitmap);
    }

    /// The job failed: what was written meanwhile is added to what `bitmap` had.
    pub fn reclaim_bitmap(&self, bitmap: &Arc<Bitmap>) {
        if let Some(child) = bitmap.successor() {
            {
                // From here on every write is in both.
                let _list = self.bitmaps.write();
                bitmap.set_enabled(child.enabled());
            }
            if !Bug::here().is(Mutant::ForgetSuccessor) {
                bitmap.merge(&child);
            }
            bitmap.set_successor(None);
            self.remove_bitmap(&child);
        }
        bitmap.set_busy(false);
    }
}

#[cfg(test)]
#[path = "bitmaps_test.rs"]
mod tests;
