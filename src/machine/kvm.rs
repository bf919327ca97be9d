//! /dev/kvm: opening it, checking what it can do, making the virtual machine.
//!
//! Owns: the VM's file descriptor and the order of the calls that make it. Never: knows a device.
//! Threads: control makes it; vCPU threads set up their vCPU; any may signal interrupts. Locks: none.
//!
//! The order of calls is the start-up time. Measured on a 6.18 kernel: making a VM 0.13–0.25 ms; a
//! memory slot 0.12 ms while there is no interrupt controller in the kernel, 4–9 ms once there is
//! a full one (each slot then waits for an SRCU grace period); a split interrupt controller 2 µs;
//! a vCPU 0.05–0.12 ms; closing the VM 0.2 ms with a split controller and 12–23 ms with a full one.
//! Hence: slots first, then the split controller, then vCPUs; no PIC, no PIT, no routing table
//! (messages go by KVM_SIGNAL_MSI), no ioeventfd.

use super::cpu::{self, Topology};
use super::memory::Mem;
use super::{cpu_state, layout};
use crate::error::{Error, Result, strerror};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::ffi::CString;
use std::io;
use std::sync::{Arc, OnceLock};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

const PATH: &str = "/dev/kvm";
const OR_NONE: &str = "(or set accel = \"none\" in [machine] to run without processors)";

/// /dev/kvm, checked.
pub struct Host {
    kvm: Kvm,
}

/// What the vCPUs are told about themselves. Shared by their threads, which each set up their own.
///
/// KVM_GET_SUPPORTED_CPUID takes 0.27 ms where the host is itself a guest (each of its CPUID
/// instructions traps), as long as making the VM: hence it is called on the first vCPU's thread,
/// while the control thread goes on opening files and loading the kernel.
pub struct Identity {
    kvm: Kvm,
    topology: Topology,
    common: OnceLock<Result<Vec<kvm_cpuid_entry2>>>,
}

/// What is needed beyond API version 12, with the kernel that brought it.
const NEEDED: [(Cap, &str, &str); 6] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "2.6.25"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "2.6.26"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "2.6.26"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "3.5"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "4.5"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "4.11"),
];

/// Opens /dev/kvm and checks it. The error is one line that names the file and the remedy.
pub fn open() -> Result<Host> {
    open_path(PATH)
}

fn open_path(path: &str) -> Result<Host> {
    let c_path = CString::new(path).map_err(|_| Error::new("a path with a zero byte"))?;
    let kvm = Kvm::new_with_path(&c_path).map_err(|e| {
        let e = io::Error::from(e);
        let remedy = match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "load the kvm_intel or kvm_amd module and enable virtualization in the firmware"
            }
            Some(libc::EACCES | libc::EPERM) => {
                "add yourself to the group that owns it: sudo usermod -aG kvm $USER, then log in again"
            }
            _ => "check that it is KVM's device",
        };
        Error::new(format!("{path}: {}: {remedy} {OR_NONE}", strerror(&e)))
    })?;
    match kvm.get_api_version() {
        v if v == KVM_API_VERSION as i32 => {}
        v if v < 0 => {
            let e = io::Error::last_os_error();
            return Err(Error::new(format!("{path}: not a KVM device ({}) {OR_NONE}", strerror(&e))));
        }
        v => {
            return Err(Error::new(format!(
                "{path}: speaks KVM API version {v}, not {KVM_API_VERSION}: use a kernel of this century {OR_NONE}"
            )));
        }
    }
    if let Some((_, name, since)) = NEEDED.iter().find(|(cap, _, _)| !kvm.check_extension(*cap)) {
        return Err(Error::new(format!("{path}: lacks {name}: use Linux {since} or newer {OR_NONE}")));
    }
    Ok(Host { kvm })
}

/// The error of a call that there is no remedy for.
pub fn fail(what: &str, e: kvm_ioctls::Error) -> Error {
    Error::new(format!("{PATH}: {what}: {}", strerror(&io::Error::from(e))))
}

impl Host {
    /// Makes a virtual machine with memory `mem` and the split interrupt controller; vCPUs come after.
    pub fn create_vm(&self, mem: &Mem) -> Result<Arc<VmFd>> {
        let fd = loop {
            match self.kvm.create_vm() {
                // A signal during the call (a timer, a debugger) is no reason to give up.
                Err(e) if e.errno() == libc::EINTR => continue,
                r => break r.map_err(|e| fail("KVM_CREATE_VM", e))?,
            }
        };
        // Only Intel processors without "unrestricted guest" use these two; elsewhere they cost nothing.
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(|e| fail("KVM_SET_IDENTITY_MAP_ADDR", e))?;
        fd.set_tss_address(layout::TSS as usize).map_err(|e| fail("KVM_SET_TSS_ADDR", e))?;
        for (slot, region) in mem.map().iter().enumerate() {
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host.map_err(|e| Error::new(format!("guest memory: {e}")))? as u64,
            };
            // SAFETY: the region is mapped, and stays so as long as the VM lives: Machine keeps both and
            // drops the memory last; no Rust reference into it exists, only volatile accesses.
            unsafe { fd.set_user_memory_region(slot) }.map_err(|e| fail("KVM_SET_USER_MEMORY_REGION", e))?;
        }
        // After the slots: see the head of this file.
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = u64::from(layout::IOAPIC_PINS);
        fd.enable_cap(&split).map_err(|e| fail("KVM_CAP_SPLIT_IRQCHIP", e))?;
        Ok(Arc::new(fd))
    }

    /// Makes the vCPUs of `vm`, and what tells them who they are.
    pub fn create_vcpus(self, vm: &VmFd, topology: &Topology) -> Result<(Vec<VcpuFd>, Identity)> {
        let mut vcpus = Vec::with_capacity(topology.cpus());
        for index in 0..topology.cpus() {
            let id = u64::from(topology.apic_id(index));
            vcpus.push(vm.create_vcpu(id).map_err(|e| fail(&format!("KVM_CREATE_VCPU {id}"), e))?);
        }
        Ok((vcpus, Identity { kvm: self.kvm, topology: *topology, common: OnceLock::new() }))
    }
}

impl Identity {
    /// Tells processor `index` who it is: CPUID and MSRs. Its registers are for control to set.
    pub fn give(&self, index: usize, vcpu: &VcpuFd) -> Result<()> {
        let common = self.common.get_or_init(|| {
            let supported = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
            let supported = supported.map_err(|e| fail("KVM_GET_SUPPORTED_CPUID", e))?;
            let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
            Ok(cpu::common(supported.as_slice(), &self.topology, tsc_deadline))
        });
        let common = common.as_ref().map_err(Clone::clone)?;
        let cpuid = CpuId::from_entries(&cpu::for_cpu(common, &self.topology, index))
            .map_err(|e| Error::new(format!("{PATH}: too many CPUID entries: {e:?}")))?;
        vcpu.set_cpuid2(&cpuid).map_err(|e| fail("KVM_SET_CPUID2", e))?;
        cpu_state::create(vcpu);
        Ok(())
    }
}

/// Bits of a physical address of this host's processor.
pub fn phys_bits() -> u32 {
    #[allow(unused_unsafe)] // safe in newer versions of the standard library
    // SAFETY: every x86-64 processor has the instruction and (AMD APM 3, appendix E) this leaf.
    let leaf = unsafe { std::arch::x86_64::__cpuid(0x8000_0008) };
    leaf.eax & 0xff
}

#[cfg(test)]
#[path = "kvm_test.rs"]
mod tests;
