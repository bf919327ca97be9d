//! The processors' identity: topology, CPUID, MSRs and their state at power-on.
//!
//! Owns: what a vCPU is told about itself. Never: runs one (`vcpu.rs`). Threads: control. Locks: none.

use super::layout::CPUS_MAX;
use crate::bail;
use crate::error::Result;

/// How the processors are arranged. The default is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Topology { sockets: 1, cores: 1, threads: 1 }
    }
}

impl Topology {
    /// The arrangement of `cpus` processors; what is None is computed as QEMU's `-smp` does since
    /// 6.2: one thread a core, one socket, and the rest cores.
    pub fn new(
        cpus: u32,
        sockets: Option<u32>,
        cores: Option<u32>,
        threads: Option<u32>,
    ) -> Result<Topology> {
        if [Some(cpus), sockets, cores, threads].contains(&Some(0)) {
            bail!("Invalid CPU topology: CPU topology parameters must be greater than zero");
        }
        if cpus as usize > CPUS_MAX {
            bail!("Invalid SMP CPUs {cpus}. The max CPUs supported by machine 'minivmm' is {CPUS_MAX}");
        }
        let left = |used: [Option<u32>; 2]| {
            let used = used.iter().flatten().try_fold(1u32, |a, b| a.checked_mul(*b));
            used.map_or(1, |used| (cpus / used).max(1))
        };
        let (s, c, t) = match (sockets, cores, threads) {
            (s, None, t) => (s.unwrap_or(1), left([s, t]), t.unwrap_or(1)),
            (None, c @ Some(n), t) => (left([c, t]), n, t.unwrap_or(1)),
            (s @ Some(n), c @ Some(m), t) => (n, m, t.unwrap_or_else(|| left([s, c]))),
        };
        let product = u64::from(s).saturating_mul(u64::from(c)).saturating_mul(u64::from(t));
        if product != u64::from(cpus) {
            bail!(
                "Invalid CPU topology: product of the hierarchy must match maxcpus: \
                 sockets ({s}) * cores ({c}) * threads ({t}) != maxcpus ({cpus})"
            );
        }
        Ok(Topology { sockets: s, cores: c, threads: t })
    }

    /// Processors in all, 1 to `layout::CPUS_MAX`.
    pub fn cpus(&self) -> usize {
        (self.sockets * self.cores * self.threads) as usize
    }

    /// Sockets, cores a socket, threads a core.
    pub fn shape(&self) -> (u32, u32, u32) {
        (self.sockets, self.cores, self.threads)
    }

    /// Socket, core and thread of processor `index`.
    pub fn place(&self, index: usize) -> (u32, u32, u32) {
        let index = index as u32;
        (index / (self.cores * self.threads), index / self.threads % self.cores, index % self.threads)
    }
}
