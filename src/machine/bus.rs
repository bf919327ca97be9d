//! The port and memory-mapped I/O buses.
//!
//! Owns: which device answers at which address. Never: knows what a device is. Threads: vCPUs
//! read and write; control adds and removes; a vCPU moves a BAR. Locks: one RwLock, held for reading
//! during a device's call, so that [`Bus::remove`] returns only when no access is in flight.

use crate::event::Event;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// What an access asks for beyond the device itself. Done by the caller after the bus lock is gone.
pub enum Effect {
    /// Nothing.
    None,
    /// For the control thread.
    Post(Event),
    /// To be run on this thread with no lock held: it may add and remove ranges (a BAR moves), or
    /// wait for workers (a device reset).
    Run(Box<dyn FnOnce() + Send>),
}

/// A range of registers. Called on vCPU threads; never blocks on I/O. `off` is relative to the
/// start of the range; `data` is 1, 2, 4 or 8 bytes, little-endian, as the guest accessed it and
/// inside the range. Whatever a device does not know reads as zeroes and ignores writes.
pub trait BusDevice: Send + Sync {
    /// The guest reads.
    fn read(&self, off: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&self, off: u64, data: &[u8]) -> Effect;
}

/// First address → length and device; no two overlap.
type Ranges = BTreeMap<u64, (u64, Arc<dyn BusDevice>)>;

/// An address space of devices.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Ranges>,
}

impl Bus {
    /// Adds `device` at `base..base + len`. False when the range overlaps another or wraps around.
    #[must_use]
    pub fn add(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> bool {
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else { return false };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let overlaps = ranges.range(..end).next_back().is_some_and(|(start, (len, _))| start + len > base);
        if overlaps {
            return false;
        }
        ranges.insert(base, (len, device));
        true
    }

    /// Removes the range that starts at `base`; returns when no access to it is in flight.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Lets go of all devices; returns when no access to one is in flight.
    pub fn clear(&self) {
        let ranges = std::mem::take(&mut *self.ranges.write().unwrap_or_else(PoisonError::into_inner));
        // With the lock gone: a device may hold the bus itself.
        drop(ranges);
    }

    /// A guest's read. Where there is nothing, all bits are set.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        match Self::find(&ranges, addr, data.len()) {
            Some((off, device)) => {
                data.fill(0);
                device.read(off, data)
            }
            None => data.fill(0xff),
        }
    }

    /// A guest's write; returns what the caller must do now.
    #[must_use]
    pub fn write(&self, addr: u64, data: &[u8]) -> Effect {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        match Self::find(&ranges, addr, data.len()) {
            Some((off, device)) => device.write(off, data),
            None => Effect::None,
        }
    }

    fn find(ranges: &Ranges, addr: u64, size: usize) -> Option<(u64, &Arc<dyn BusDevice>)> {
        let (base, (len, device)) = ranges.range(..=addr).next_back()?;
        let off = addr - base;
        (off.checked_add(size as u64)? <= *len).then_some((off, device))
    }
}

#[cfg(test)]
#[path = "bus_test.rs"]
mod tests;
