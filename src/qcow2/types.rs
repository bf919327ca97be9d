//! The units of the format: geometry, L1 and L2 entries, refcount fields. No I/O, no state.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Host cluster management", "Cluster mapping" and
//! "Extended L2 Entries". Numbers on disk are big-endian; here they are native.
//!
//! A *unit* is the smallest piece of guest disk that has a state of its own: a whole cluster in
//! standard images, one of 32 subclusters with extended L2 entries. An entry is decoded into one
//! shape for both ([`Entry`]): bit masks over its units (1 or 32 of them).

use std::ops::Range;

/// Bits 9–55 of an L1, L2 or bitmap-table entry: a cluster-aligned offset into the image file.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9–63 of a refcount-table entry.
pub const REFTABLE_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Bit 63: the refcount is exactly one, the cluster or table may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62: a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard descriptor: reads as zeroes.
pub const ZERO: u64 = 1;

/// What never changes while an image is open: sizes and shifts that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size (9–21).
    pub cluster_bits: u32,
    /// log2 of a refcount's width in bits (0–6).
    pub refcount_order: u32,
    /// L2 entries are 16 bytes and have subclusters.
    pub extended: bool,
    /// Guest clusters lie in another file, at their guest offset, and are not refcounted.
    pub external: bool,
    /// The zero flag exists (version 3).
    pub v3: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of an L2 entry's size in bytes.
    pub fn entry_bits(&self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// log2 of the number of entries in an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// Units in a cluster: 1 or 32.
    pub fn units(&self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// log2 of a unit's size in bytes.
    pub fn unit_bits(&self) -> u32 {
        if self.extended { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Bytes in a unit.
    pub fn unit_size(&self) -> u64 {
        1 << self.unit_bits()
    }

    /// A mask with one bit for every unit of a cluster.
    pub fn all_units(&self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Metadata are cached and written in pages of this many bytes.
    pub fn page_size(&self) -> u64 {
        self.cluster_size().min(4096)
    }

    /// Which guest cluster holds byte `off`.
    pub fn cluster(&self, off: u64) -> u64 {
        off >> self.cluster_bits
    }

    /// Where in its cluster byte `off` lies.
    pub fn in_cluster(&self, off: u64) -> u64 {
        off & (self.cluster_size() - 1)
    }

    /// `off` rounded up to whole clusters. Saturates far beyond every limit of the format.
    pub fn round_up(&self, off: u64) -> u64 {
        off.saturating_add(self.cluster_size() - 1) & !(self.cluster_size() - 1)
    }

    /// The clusters that `len` > 0 bytes at `off` touch.
    pub fn clusters(&self, off: u64, len: u64) -> Range<u64> {
        self.cluster(off)..self.cluster(off + len - 1) + 1
    }

    /// How many L1 entries `size` bytes of guest disk need.
    pub fn l1_entries(&self, size: u64) -> u64 {
        let shift = self.cluster_bits + self.l2_bits();
        (size >> shift) + u64::from(size & ((1 << shift) - 1) != 0)
    }

    /// Index into L1 for guest cluster `c`.
    pub fn l1_index(&self, c: u64) -> u64 {
        c >> self.l2_bits()
    }

    /// Index into its L2 table for guest cluster `c`.
    pub fn l2_index(&self, c: u64) -> u64 {
        c & ((1 << self.l2_bits()) - 1)
    }

    /// log2 of the number of refcounts in a refcount block.
    pub fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn refcount_max(&self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << (1u64 << self.refcount_order)) - 1 }
    }

    /// Where in a compressed descriptor the sector count begins.
    fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Where in the file compressed data must end: their descriptors cannot say more.
    pub fn compressed_limit(&self) -> u64 {
        1 << self.compressed_shift().min(56)
    }

    /// The entry that the words of an L2 table say (`bitmap` is 0 in standard images).
    ///
    /// # Errors
    /// What is wrong with it, in words: the image is corrupt then.
    pub fn decode(&self, word: u64, bitmap: u64) -> Result<Entry, &'static str> {
        if word & COMPRESSED != 0 {
            if self.external {
                return Err("compressed cluster in an image with an external data file");
            }
            let shift = self.compressed_shift();
            let offset = word & ((1 << shift) - 1) & ((1 << 56) - 1);
            let sectors = ((word & (COMPRESSED - 1)) >> shift) + 1;
            let bytes = sectors * 512 - (offset & 511);
            return Ok(Entry {
                host: None,
                copied: false,
                data: 0,
                zero: 0,
                compressed: Some((offset, bytes)),
            });
        }
        let copied = word & COPIED != 0;
        let offset = word & OFFSET_MASK;
        if offset & (self.cluster_size() - 1) != 0 {
            return Err("Data cluster offset unaligned");
        }
        let host = (offset != 0 || (self.external && copied)).then_some(offset);
        let (data, zero) = if self.extended {
            let data = (bitmap & u64::from(u32::MAX)) as u32;
            let zero = (bitmap >> 32) as u32;
            if data & zero != 0 {
                return Err("subcluster is both allocated and zero");
            }
            if data != 0 && host.is_none() {
                return Err("subclusters are allocated in no cluster");
            }
            (data, zero)
        } else if word & ZERO != 0 {
            if !self.v3 {
                return Err("zero cluster entry in an image of version 2");
            }
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        Ok(Entry { host, copied: copied && host.is_some(), data, zero, compressed: None })
    }

    /// The words of `entry` (not for compressed ones, which are copied or replaced whole).
    pub fn encode(&self, entry: &Entry) -> (u64, u64) {
        debug_assert!(entry.compressed.is_none());
        let mut word = entry.host.unwrap_or(0);
        if entry.copied {
            word |= COPIED;
        }
        if self.extended {
            return (word, u64::from(entry.zero) << 32 | u64::from(entry.data));
        }
        if entry.zero != 0 {
            word |= ZERO;
        }
        (word, 0)
    }

    /// The word of a compressed entry for `bytes` bytes at file offset `offset`.
    pub fn encode_compressed(&self, offset: u64, bytes: u64) -> u64 {
        let sectors = ((offset & 511) + bytes).div_ceil(512);
        COMPRESSED | (sectors - 1) << self.compressed_shift() | offset
    }
}

/// What an L2 entry says about one guest cluster, standard or extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// The host cluster, also when no unit of it holds data (preallocated).
    pub host: Option<u64>,
    /// The host cluster has refcount one: it may be written in place.
    pub copied: bool,
    /// Units that hold data.
    pub data: u32,
    /// Units that read as zeroes.
    pub zero: u32,
    /// File offset and number of bytes (to the end of the last sector) of compressed data.
    pub compressed: Option<(u64, u64)>,
}

impl Entry {
    /// True when nothing is there: the backing file shows through.
    pub fn is_unallocated(&self) -> bool {
        self.host.is_none() && self.zero == 0 && self.compressed.is_none()
    }
}

/// The refcount with index `i` in `block` (any page of one, with `i` counted in that page).
pub fn refcount_get(block: &[u8], order: u32, i: usize) -> u64 {
    match order {
        0..=2 => {
            let bit = i << order;
            let mask = (1u16 << (1 << order)) - 1;
            u64::from(u16::from(block[bit / 8]) >> (bit % 8) & mask)
        }
        _ => {
            let bytes = 1usize << (order - 3);
            block[i * bytes..][..bytes].iter().fold(0, |v, b| v << 8 | u64::from(*b))
        }
    }
}

/// Sets the refcount with index `i`; `value` fits, as the caller has checked.
pub fn refcount_set(block: &mut [u8], order: u32, i: usize, value: u64) {
    match order {
        0..=2 => {
            let bit = i << order;
            let mask = ((1u16 << (1 << order)) - 1) as u8;
            let byte = &mut block[bit / 8];
            *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        }
        _ => {
            let bytes = 1usize << (order - 3);
            block[i * bytes..][..bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
        }
    }
}

/// Reads the big-endian word at byte `at`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

/// Reads the big-endian 32-bit word at byte `at`.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

#[cfg(test)]
#[path = "types_test.rs"]
mod tests;
