//! The processors' identity: topology and CPUID.
//!
//! Owns: what a vCPU is told about itself. Never: runs one (`vcpu.rs`). Threads: any. Locks: none.
//! Sources: Intel SDM 2 (CPUID) and 3, 9.9 (topology); AMD APM 3, appendix E.

use super::layout::CPUS_MAX;
use crate::bail;
use crate::error::Result;
use kvm_bindings::kvm_cpuid_entry2 as Entry;

/// How the processors are arranged. The default is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
    present: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Topology { sockets: 1, cores: 1, threads: 1, present: 1 }
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
        Ok(Topology { sockets: s, cores: c, threads: t, present: cpus })
    }

    /// The same places with only the first `cpus` of them taken. (All are, at least one.)
    pub fn with_present(self, cpus: u32) -> Topology {
        Topology { present: cpus.clamp(1, self.present), ..self }
    }

    /// Processors that there are, 1 to `layout::CPUS_MAX`.
    pub fn cpus(&self) -> usize {
        self.present as usize
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

/// Bits that hold numbers below `n`.
fn width(n: u32) -> u32 {
    n.next_power_of_two().trailing_zeros()
}

impl Topology {
    /// The local APIC's id of processor `index`: its place in fields of whole bits, as CPUID leaf
    /// 0xb tells the guest to take them apart. Below 255 for every valid topology.
    pub fn apic_id(&self, index: usize) -> u32 {
        let (socket, core, thread) = self.place(index);
        let threads = width(self.threads);
        (socket << width(self.cores) | core) << threads | thread
    }

    /// Bits of the APIC id below the core's number, and below the socket's.
    fn shifts(&self) -> (u32, u32) {
        (width(self.threads), width(self.threads) + width(self.cores))
    }
}

const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
/// CPUID leaves whose content is the topology; the host's own must not shine through.
const TOPOLOGY_LEAVES: [u32; 3] = [0xb, 0x1f, 0x8000_0026];

/// What every processor's CPUID says, from what KVM `supported`s; [`for_cpu`] adds the rest.
pub fn common(supported: &[Entry], topology: &Topology, tsc_deadline: bool) -> Vec<Entry> {
    let mut out: Vec<Entry> =
        supported.iter().filter(|e| !TOPOLOGY_LEAVES.contains(&e.function)).copied().collect();
    let vendor = out.iter().find(|e| e.function == 0).map(|e| (e.ebx, e.edx, e.ecx));
    let amd = matches!(
        vendor.map(|(b, d, c)| [b, d, c].map(u32::to_le_bytes).concat()).as_deref(),
        Some(b"AuthenticAMD" | b"HygonGenuine")
    );
    let (_, per_socket) = topology.shifts();
    let logical = topology.cores * topology.threads;
    for e in &mut out {
        match e.function {
            0 => e.eax = e.eax.max(0xb),
            1 => {
                // Bit 31: a hypervisor is present. KVM offers the TSC-deadline timer (bit 24) by a
                // capability, and not every version by this leaf.
                e.ecx |= 1 << 31 | u32::from(tsc_deadline) << 24;
                e.ebx = e.ebx & 0xff00 | (1 << per_socket) << 16;
                e.edx = e.edx & !(1 << 28) | u32::from(logical > 1) << 28;
            }
            4 if e.eax & 0x1f != 0 => {
                let cores = (1u32 << width(topology.cores)) - 1;
                e.eax = e.eax & 0x3fff | (shared_by(e.eax, topology) - 1) << 14 | cores.min(63) << 26;
            }
            // The thermal leaf: KVM emulates nothing of it but the always running APIC timer.
            6 => (e.eax, e.ebx, e.ecx, e.edx) = (e.eax & 4, 0, 0, 0),
            // KVM's own leaves are numbered from here ("KVMKVMKVM").
            0x4000_0000 => e.eax = e.eax.max(0x4000_0001),
            0x8000_0001 if amd => e.ecx = e.ecx & !2 | u32::from(logical > 1) << 1,
            0x8000_0008 if amd => e.ecx = e.ecx & !0xf0ff | (logical - 1) & 0xff | per_socket << 12,
            0x8000_0008 => e.ecx = 0,
            0x8000_001d if e.eax & 0x1f != 0 => {
                e.eax = e.eax & 0x3fff | (shared_by(e.eax, topology) - 1) << 14;
            }
            _ => {}
        }
    }
    out
}

/// Processors (by whole bits of the APIC id) that share the cache that leaf 4's `eax` describes.
fn shared_by(eax: u32, topology: &Topology) -> u32 {
    let (per_core, per_socket) = topology.shifts();
    match eax >> 5 & 7 {
        3.. => 1 << per_socket,
        _ => 1 << per_core,
    }
}

/// The CPUID of processor `index`, from what is [`common`].
pub fn for_cpu(common: &[Entry], topology: &Topology, index: usize) -> Vec<Entry> {
    let (id, (socket, _, _)) = (topology.apic_id(index), topology.place(index));
    let (per_core, per_socket) = topology.shifts();
    let mut out = common.to_vec();
    for e in &mut out {
        match e.function {
            1 => e.ebx |= id << 24,
            0x8000_001e => {
                (e.eax, e.ebx, e.ecx) = (id, (id & ((1 << per_socket) - 1)) >> per_core, socket);
                e.ebx |= (topology.threads - 1) << 8;
            }
            _ => {}
        }
    }
    // Leaf 0xb (and 0x1f where the processor has it): one level a subleaf, then an invalid one.
    // EAX: shift to the next level; EBX: processors here; ECX: level type, number; EDX: APIC id.
    let max = common.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for function in [0xb, 0x1f].into_iter().filter(|f| *f <= max) {
        let levels =
            [(per_core, topology.threads, 1), (per_socket, topology.cores * topology.threads, 2), (0, 0, 0)];
        for (index, (eax, ebx, kind)) in (0..).zip(levels) {
            let ecx = kind << 8 | index;
            let flags = SIGNIFICANT_INDEX;
            out.push(Entry { function, index, flags, eax, ebx, ecx, edx: id, ..Entry::default() });
        }
    }
    out
}

#[cfg(test)]
#[path = "cpu_test.rs"]
mod tests;
