//! Guest memory between canaries, for tests.

use super::ring::Memory;
use minivmm::machine::memory::Mem;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory below the hole: `0..LOW`.
pub const LOW: u64 = 4 << 20;
/// Where memory goes on …
pub const HIGH: u64 = 1 << 32;
/// … for so many bytes.
pub const HIGH_LEN: u64 = 1 << 20;
/// The canaries' byte: nobody else writes it, so that it must never come to a disk or network.
pub const CANARY: u8 = 0xcc;
const CANARY_LEN: usize = 64 << 10;

/// Two regions of guest memory, each with a canary on both sides.
pub struct GuestRam {
    /// As devices see it.
    pub mem: Mem,
    around: Vec<(usize, usize)>,
}

impl Default for GuestRam {
    fn default() -> GuestRam {
        GuestRam::new()
    }
}

impl GuestRam {
    /// Zeroed.
    pub fn new() -> GuestRam {
        let mut around = Vec::new();
        let mut regions = Vec::new();
        for (base, len) in [(0, LOW as usize), (HIGH, HIGH_LEN as usize)] {
            let all = len + 2 * CANARY_LEN;
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a fresh mapping, never unmapped; the region built on its middle part owns no
            // mapping of its own.
            let region = unsafe {
                let p = libc::mmap(std::ptr::null_mut(), all, prot, flags, -1, 0).cast::<u8>();
                assert_ne!(p.cast(), libc::MAP_FAILED);
                for at in [0, CANARY_LEN + len] {
                    p.add(at).write_bytes(CANARY, CANARY_LEN);
                    around.push((p.add(at).expose_provenance(), CANARY_LEN));
                }
                MmapRegion::build_raw(p.add(CANARY_LEN), len, prot, flags).unwrap()
            };
            regions.push(GuestRegionMmap::new(region, GuestAddress(base)).unwrap());
        }
        GuestRam { mem: Mem::new(GuestMemoryMmap::from_regions(regions).unwrap()), around }
    }

    /// Panics when anything was written beside guest memory.
    pub fn check_canaries(&self) {
        for &(p, len) in &self.around {
            // SAFETY: mapped for good; nobody writes it, which is what is being checked.
            let bytes =
                unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(p), len) };
            assert!(bytes.iter().all(|b| *b == CANARY), "host memory beside the guest's was written");
        }
    }
}

impl Memory for Mem {
    fn get(&self, addr: u64, to: &mut [u8]) {
        assert!(self.read(addr, to), "the test reads outside memory");
    }
    fn put(&self, addr: u64, from: &[u8]) {
        assert!(self.write(addr, from), "the test writes outside memory");
    }
}
