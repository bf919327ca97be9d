//! Growing and shrinking the disk.
//!
//! Owns: the order of a resize. Never: writes metadata itself. Threads: the control thread (any
//! one would do). Locks: `meta`; shrinking takes the image for itself while it cuts.
//!
//! Growing: the L1 table is made larger, what would show in the new part (the rest of the last
//! cluster, a longer backing file) becomes zeroes, what is to be allocated in advance is, and only
//! then the size changes. Shrinking: the
//! smaller size is made durable first, then the clusters behind it are given up. A crash in
//! between leaves clusters behind the end of the disk, where nobody reads; growing clears them.

use super::Qcow2;
use super::erase::Erase;
use super::header::MAX_L1_BYTES;
use super::meta::Meta;
use super::mutant::Mutant;
use crate::block::debug::BlkdebugEvent;
use crate::block::driver::{Flags, Preallocation};
use crate::block::node::Node;
use std::io;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Makes the disk `len` bytes long. See the module's head.
    ///
    /// # Errors
    /// QEMU's texts; nothing the guest sees has changed then.
    pub(super) fn resize_to(&self, len: u64, how: Preallocation) -> io::Result<()> {
        let invalid = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if !len.is_multiple_of(512) {
            return invalid("The new size must be a multiple of 512");
        }
        {
            let meta = self.lock();
            if meta.header.snapshots > 0 && !meta.geo.v3 {
                return invalid("Can't resize a v2 image which has snapshots");
            }
            if meta.geo.l1_entries(len) * 8 > MAX_L1_BYTES {
                return Err(io::Error::from_raw_os_error(libc::EFBIG));
            }
        }
        self.bitmaps_may_resize()?;
        let old = self.size.load(Ordering::SeqCst);
        match len.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(old, len, how),
            std::cmp::Ordering::Less if how != Preallocation::Off => {
                invalid("Preallocation can't be used for shrinking an image")
            }
            std::cmp::Ordering::Less => self.shrink(old, len),
        }
    }

    fn set_size(&self, len: u64) {
        let mut meta = self.lock();
        meta.header.size = len;
        meta.header_dirty = true;
        let whole = meta.geo.l1_entries(len).saturating_mul(meta.geo.cluster_size());
        let pages = meta.l2_most.min(whole) / meta.geo.page_size();
        meta.l2.allow(pages as usize);
        self.size.store(len, Ordering::SeqCst);
    }

    fn grow(&self, old: u64, len: u64, how: Preallocation) -> io::Result<()> {
        // A raw data file is good by itself only if no table says otherwise.
        let how = if self.raw_data() && how == Preallocation::Off { Preallocation::Metadata } else { how };
        let file = self.file()?;
        let result = self.lock().grow_l1(&file, len);
        self.judge(result)?;
        if let Some(edge) = &self.data_file {
            let data = self.node(edge)?;
            if data.len() < len {
                data.resize(len)?;
            }
        }
        // Only what is there already can show: clusters of an unfinished shrink, the last
        // cluster's rest, the backing file.
        let backing = self.backing.node().map_or(0, |n| n.len());
        let mut pos = if self.has_bug(Mutant::StaleGrowth) { len } else { old };
        while pos < len {
            let step = (len - pos).min(1 << 30);
            if pos >= backing && self.reads_zero(pos, step, backing)? {
                pos += step;
                continue;
            }
            match self.zero_at(pos, step, Flags::MAY_UNMAP) {
                Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => {
                    if !self.reads_zero(pos, step, backing)? {
                        self.write_zeroes_at(pos..pos + step)?;
                    }
                }
                other => other?,
            }
            pos += step;
        }
        if how != Preallocation::Off
            && let Err(e) = self.preallocate(old..len, how)
        {
            let _alone = self.exclusive();
            let (first, end) = (self.geo.round_up(old), self.geo.round_up(len));
            if let Err(e) = self.erase(first, end - first, Erase::Cut) {
                log::warn!("qcow2: clusters behind the end of the disk are not freed: {e}");
            }
            return Err(e);
        }
        // The header must not say the new size before the disk says what is there.
        self.checkpoint(true)?;
        self.set_size(len);
        self.checkpoint(true)
    }

    fn shrink(&self, old: u64, len: u64) -> io::Result<()> {
        let _alone = self.exclusive();
        self.set_size(len);
        if let Err(e) = self.checkpoint(true) {
            self.set_size(old);
            return Err(e);
        }
        // From here on the disk is shorter, whatever happens: what fails leaks.
        let first = self.geo.round_up(len);
        let end = self.geo.round_up(old);
        if first < end {
            self.moment(BlkdebugEvent::L1ShrinkFreeL2Clusters);
            let cut = self.erase(first, end - first, Erase::Cut);
            if let Err(e) = cut.and_then(|()| self.checkpoint(true)) {
                log::warn!("qcow2: clusters behind the new end of the disk are not freed: {e}");
            }
        }
        if let Some(edge) = &self.data_file
            && let Err(e) = self.node(edge).and_then(|data| data.resize(len))
        {
            log::warn!("qcow2: the data file stays longer than the disk: {e}");
        }
        Ok(())
    }
}

impl Meta {
    /// Makes the L1 table large enough for `size` bytes of disk.
    fn grow_l1(&mut self, file: &Node, size: u64) -> io::Result<()> {
        let need = self.geo.l1_entries(size);
        if need <= self.l1.entries.len() as u64 {
            return Ok(());
        }
        let clusters = self.geo.round_up(need * 8) >> self.geo.cluster_bits;
        file.moment_locked(BlkdebugEvent::L1GrowAllocTable);
        let (first, _) = self.alloc_tail(file, clusters)?;
        let old = self.geo.round_up(u64::from(self.header.l1_size) * 8) >> self.geo.cluster_bits;
        if old > 0 {
            self.free(self.header.l1_offset, old, false);
        }
        self.tables.extend(first..first + clusters);
        self.l1.entries.resize(need as usize, 0);
        self.l1.moved = true;
        self.header.l1_offset = first << self.geo.cluster_bits;
        // At most 4 Mi entries (MAX_L1_BYTES, checked by the caller).
        self.header.l1_size = need as u32;
        self.header_dirty = true;
        Ok(())
    }
}
