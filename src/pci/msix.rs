//! MSI-X (PCI 3.0, 6.8.2): table, pending bits, masks.
//!
//! Owns: the vectors of one function. Never: knows what raises one. Threads: any fires; vCPUs read
//! and write the table. Locks: one Mutex a vector, held while the message is sent, so that a vector
//! is silent when the write that masks it has returned.

use super::config::Capability;
use crate::machine::irq::{Interrupts, Msi};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Message control: on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
const MASK_ALL: u16 = 1 << 14;
/// Vector control: masked. It is, after reset.
const MASKED: u32 = 1;
/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;

#[derive(Clone, Copy)]
struct Vector {
    msi: Msi,
    control: u32,
    pending: bool,
}

const FRESH: Vector = Vector { msi: Msi { addr: 0, data: 0 }, control: MASKED, pending: false };

/// Where the structures lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The BAR.
    pub bar: u8,
    /// Offset of the table in it; a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits in it; a multiple of 8.
    pub pba: u32,
}

/// The vectors of one function.
pub struct Msix {
    interrupts: Arc<dyn Interrupts>,
    place: Place,
    control: AtomicU16,
    vectors: Vec<Mutex<Vector>>,
}

impl Msix {
    /// `vectors` of them, 1 to [`MAX_VECTORS`], masked and off.
    pub fn new(interrupts: Arc<dyn Interrupts>, vectors: u16, place: Place) -> Msix {
        let vectors = (0..vectors.clamp(1, MAX_VECTORS)).map(|_| Mutex::new(FRESH)).collect();
        Msix { interrupts, place, control: AtomicU16::new(0), vectors }
    }

    /// How many there are.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// For the list in configuration space.
    pub fn capability(&self) -> Capability {
        let Place { bar, table, pba } = self.place;
        let mut body = (self.len() - 1).to_le_bytes().to_vec();
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pba | u32::from(bar)).to_le_bytes());
        Capability { id: 0x11, body, mask: (ENABLE | MASK_ALL).to_le_bytes().to_vec() }
    }

    /// True when messages are sent in place of INTx.
    pub fn is_enabled(&self) -> bool {
        self.control.load(Ordering::SeqCst) & ENABLE != 0
    }

    /// The driver wrote the message control word.
    pub fn set_control(&self, value: u16) {
        self.control.store(value & (ENABLE | MASK_ALL), Ordering::SeqCst);
        // Also a barrier for those who fire: see the module's head.
        (0..self.vectors.len()).for_each(|n| self.release(&mut self.lock(n)));
    }

    /// Sends vector `n`'s message, or notes that it is pending. Nothing when MSI-X is off or there
    /// is no such vector.
    pub fn fire(&self, n: u16) {
        if usize::from(n) < self.vectors.len() && self.is_enabled() {
            let mut vector = self.lock(usize::from(n));
            vector.pending = true;
            self.release(&mut vector);
        }
    }

    /// Off, masked, nothing pending.
    pub fn reset(&self) {
        self.control.store(0, Ordering::SeqCst);
        (0..self.vectors.len()).for_each(|n| *self.lock(n) = FRESH);
    }

    /// Vector `n` has nothing to say any more.
    pub fn forget(&self, n: u16) {
        if usize::from(n) < self.vectors.len() {
            self.lock(usize::from(n)).pending = false;
        }
    }

    /// The driver reads from offset `off` of the BAR; false when it does not lie in the table
    /// or among the pending bits.
    pub fn read(&self, off: u64, data: &mut [u8]) -> bool {
        for (n, byte) in data.iter_mut().enumerate() {
            match self.byte(off + n as u64) {
                Some(value) => *byte = value,
                None => return false,
            }
        }
        true
    }

    /// The driver writes at offset `off` of the BAR. Only aligned words of 4 or 8 bytes count, as
    /// the specification demands; pending bits are read-only.
    pub fn write(&self, off: u64, data: &[u8]) {
        let Some(at) = off.checked_sub(u64::from(self.place.table)) else { return };
        if !matches!(data.len(), 4 | 8) || at % data.len() as u64 != 0 {
            return;
        }
        for (n, word) in data.chunks_exact(4).enumerate() {
            let (at, word) = (at + 4 * n as u64, u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
            let Ok(index) = usize::try_from(at / ENTRY) else { return };
            if index >= self.vectors.len() {
                return;
            }
            let mut vector = self.lock(index);
            match at % ENTRY {
                0 => vector.msi.addr = vector.msi.addr >> 32 << 32 | u64::from(word & !3),
                4 => vector.msi.addr = u64::from(word) << 32 | vector.msi.addr & 0xffff_ffff,
                8 => vector.msi.data = word,
                _ => vector.control = word & MASKED,
            }
            self.release(&mut vector);
        }
    }

    fn lock(&self, n: usize) -> MutexGuard<'_, Vector> {
        self.vectors[n].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is pending and not masked.
    fn release(&self, vector: &mut Vector) {
        let open = self.control.load(Ordering::SeqCst) & (ENABLE | MASK_ALL) == ENABLE;
        if vector.pending && open && vector.control & MASKED == 0 {
            vector.pending = false;
            self.interrupts.send_msi(vector.msi);
        }
    }

    fn byte(&self, off: u64) -> Option<u8> {
        let count = self.vectors.len() as u64;
        if let Some(at) = off.checked_sub(u64::from(self.place.table)).filter(|at| *at < count * ENTRY) {
            let v = *self.lock((at / ENTRY) as usize);
            let mut entry = [0; ENTRY as usize];
            entry[..8].copy_from_slice(&v.msi.addr.to_le_bytes());
            entry[8..12].copy_from_slice(&v.msi.data.to_le_bytes());
            entry[12..].copy_from_slice(&v.control.to_le_bytes());
            return Some(entry[(at % ENTRY) as usize]);
        }
        let len = count.div_ceil(64) * 8;
        let at = off.checked_sub(u64::from(self.place.pba)).filter(|at| *at < len)?;
        let bits = (at * 8..at * 8 + 8).filter(|n| *n < count);
        Some(bits.fold(0, |byte, n| byte | u8::from(self.lock(n as usize).pending) << (n % 8)))
    }
}

#[cfg(test)]
#[path = "msix_test.rs"]
mod tests;
