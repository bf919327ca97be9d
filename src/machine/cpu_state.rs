//! The processors' registers: at the kernel's entry, and back at power-on.
//!
//! Owns: which registers are set to what. Never: runs a vCPU. Threads: control, while the vCPU
//! does not run. Locks: none; the caller holds the vCPU's.

use super::kvm::fail;
use super::layout;
use crate::error::Result;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_dtable,
    kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

/// How the first processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing was loaded: it has halted with interrupts off.
    Idle,
    /// The 64-bit entry of the Linux/x86 boot protocol: long mode, the first 4 GiB mapped to
    /// themselves, RSI = `boot_params`.
    Long {
        /// The entry point.
        rip: u64,
        /// What RSI points to.
        boot_params: u64,
    },
    /// PVH (Xen's docs/misc/pvh): 32-bit protected mode without paging, EBX = `hvm_start_info`.
    Pvh {
        /// The entry point.
        rip: u64,
        /// What EBX points to.
        start_info: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 2;

/// Flat 4 GiB segments with these selectors; [`GDT_TABLE`] holds the same in memory.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// The descriptors for the selectors above, the code segment in its 64-bit or 32-bit form.
pub fn gdt(start: &Start) -> [u64; 6] {
    let code = match start {
        Start::Long { .. } => 0x00af_9b00_0000_ffff,
        _ => 0x00cf_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0]
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn task() -> kvm_segment {
    kvm_segment { limit: 0x67, selector: TASK, type_: 11, present: 1, ..Default::default() }
}

/// Sets the special registers for `start`, in what KVM made at the vCPU's creation (so that the
/// APIC base stays what it is).
fn special(sregs: &mut kvm_sregs, start: &Start) {
    let long = matches!(start, Start::Long { .. });
    sregs.cs = segment(CODE, 11, long);
    let data = segment(DATA, 3, false);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = task();
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: 6 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    if long {
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0, 0);
    }
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// MSRs that firmware would have set: fast string operations on (Intel: else Linux distrusts
/// `rep movsb`), and memory cached by default with the MTRRs enabled (else Linux does without PAT).
const FIRMWARE_MSRS: [(u32, u64); 2] = [(MSR_MISC_ENABLE, 1), (MSR_MTRR_DEF_TYPE, 1 << 11 | 6)];

/// What a reset must undo besides: KVM's own (the kernel would go on writing into the guest's
/// memory), system calls, PAT, timers, speculation control.
const RESET_MSRS: [(u32, u64); 19] = [
    (0x4b56_4d00, 0), // wall clock
    (0x4b56_4d01, 0), // system time
    (0x4b56_4d02, 0), // asynchronous page faults
    (0x4b56_4d03, 0), // steal time
    (0x4b56_4d04, 0), // paravirtual end of interrupt
    (0x4b56_4d05, 1), // halt polling
    (0x4b56_4d06, 0), // asynchronous page faults: interrupt
    (0x6e0, 0),       // TSC deadline
    (0x174, 0),       // SYSENTER CS, ESP, EIP
    (0x175, 0),
    (0x176, 0),
    (0xc000_0081, 0), // STAR, LSTAR, CSTAR, SFMASK
    (0xc000_0082, 0),
    (0xc000_0083, 0),
    (0xc000_0084, 0),
    (0xc000_0102, 0),               // KERNEL_GS_BASE
    (0xc000_0103, 0),               // TSC_AUX
    (0x277, 0x0007_0406_0007_0406), // PAT
    (0x48, 0),                      // SPEC_CTRL
];

/// Sets each of `msrs` that the vCPU has.
fn set_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry { index, data, ..Default::default() };
    let mut rest: Vec<_> = msrs.iter().map(entry).collect();
    while !rest.is_empty() {
        // It stops at the first that the vCPU does not have: go on behind that one.
        let set = Msrs::from_entries(&rest).ok().and_then(|m| fd.set_msrs(&m).ok()).unwrap_or(0);
        rest.drain(..(set + 1).min(rest.len()));
    }
}

/// What each new vCPU needs, beyond CPUID, before it can be started or sent INIT and SIPI.
pub fn create(fd: &VcpuFd) {
    set_msrs(fd, &FIRMWARE_MSRS);
}

/// Puts the first processor at the kernel's entry.
pub fn enter(fd: &VcpuFd, start: &Start) -> Result<()> {
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, rsp: layout::BOOT_STACK, ..Default::default() };
    match *start {
        Start::Idle => {
            let idle = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
            return fd.set_mp_state(idle).map_err(|e| fail("KVM_SET_MP_STATE", e));
        }
        Start::Long { rip, boot_params } => (regs.rip, regs.rsi) = (rip, boot_params),
        Start::Pvh { rip, start_info } => (regs.rip, regs.rbx) = (rip, start_info),
    }
    let mut sregs = fd.get_sregs().map_err(|e| fail("KVM_GET_SREGS", e))?;
    special(&mut sregs, start);
    fd.set_sregs(&sregs).map_err(|e| fail("KVM_SET_SREGS", e))?;
    fd.set_regs(&regs).map_err(|e| fail("KVM_SET_REGS", e))
}

/// Back to what KVM makes at creation. `first` is the bootstrap processor; the others wait for
/// INIT and SIPI, by which the kernel sets the rest of their registers.
pub fn reset(fd: &VcpuFd, first: bool, apic_id: u32) -> Result<()> {
    const APIC_BASE: u64 = layout::LAPIC | 1 << 11;
    let mut sregs = fd.get_sregs().map_err(|e| fail("KVM_GET_SREGS", e))?;
    // The state after INIT (Intel SDM 3, table 10-1); real mode at the reset vector.
    let real = |selector: u16, base: u64, type_: u8| kvm_segment {
        base,
        limit: 0xffff,
        selector,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    let data = real(0, 0, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = real(0xf000, 0xffff_0000, 11);
    sregs.tr = kvm_segment { limit: 0xffff, type_: 11, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { limit: 0xffff, type_: 2, present: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { limit: 0xffff, ..Default::default() };
    sregs.idt = kvm_dtable { limit: 0xffff, ..Default::default() };
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer) = (0x6000_0010, 0, 0, 0, 0, 0);
    sregs.interrupt_bitmap = [0; 4];
    // xAPIC mode again, before the APIC's registers are read in that mode's form.
    sregs.apic_base = APIC_BASE | u64::from(first) << 8;
    fd.set_sregs(&sregs).map_err(|e| fail("KVM_SET_SREGS", e))?;
    let regs = kvm_regs { rip: 0xfff0, rflags: RFLAGS_RESERVED, ..Default::default() };
    fd.set_regs(&regs).map_err(|e| fail("KVM_SET_REGS", e))?;
    fd.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
        .map_err(|e| fail("KVM_SET_FPU", e))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: 1, ..Default::default() };
    // Neither is there on every processor; where they are not, nothing is to be reset.
    let _ = fd.set_xcrs(&xcrs);
    let _ = fd.set_debug_regs(&kvm_debugregs { dr6: 0xffff_0ff0, dr7: 0x400, ..Default::default() });
    set_msrs(fd, &RESET_MSRS);
    set_msrs(fd, &FIRMWARE_MSRS);
    reset_lapic(fd, apic_id)?;
    // No exception, interrupt or NMI is pending, and none is blocked.
    fd.set_vcpu_events(&kvm_vcpu_events::default()).map_err(|e| fail("KVM_SET_VCPU_EVENTS", e))?;
    let mp_state = if first { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(|e| fail("KVM_SET_MP_STATE", e))
}

/// The local APIC's registers after power-up (Intel SDM 3, 11.4.7.1); its version stays.
fn reset_lapic(fd: &VcpuFd, apic_id: u32) -> Result<()> {
    const ID: usize = 0x20;
    const VERSION: usize = 0x30;
    // DFR, spurious vector, and all local vectors masked: CMCI, timer, thermal, PMC, LINT0, LINT1, error.
    const SET: [(usize, u32); 9] = [
        (0xe0, u32::MAX),
        (0xf0, 0xff),
        (0x2f0, 1 << 16),
        (0x320, 1 << 16),
        (0x330, 1 << 16),
        (0x340, 1 << 16),
        (0x350, 1 << 16),
        (0x360, 1 << 16),
        (0x370, 1 << 16),
    ];
    let mut lapic = fd.get_lapic().map_err(|e| fail("KVM_GET_LAPIC", e))?;
    for (at, byte) in lapic.regs.iter_mut().enumerate() {
        if at & !0xf != VERSION {
            *byte = 0;
        }
    }
    // KVM leaves the id in x2APIC's form when a reset leads from that mode straight back to xAPIC's:
    // read as xAPIC's it is 0 for every processor, and no INIT finds one.
    for (at, value) in SET.into_iter().chain([(ID, apic_id << 24)]) {
        for (byte, v) in lapic.regs[at..].iter_mut().zip(value.to_le_bytes()) {
            *byte = v as _;
        }
    }
    fd.set_lapic(&lapic).map_err(|e| fail("KVM_SET_LAPIC", e))
}

/// A vCPU's registers as text, for the log.
pub fn describe(fd: &VcpuFd) -> String {
    let (Ok(r), Ok(s)) = (fd.get_regs(), fd.get_sregs()) else { return "no registers".into() };
    format!(
        "RAX={:016x} RBX={:016x} RCX={:016x} RDX={:016x}\nRSI={:016x} RDI={:016x} RBP={:016x} RSP={:016x}\n\
         R8 ={:016x} R9 ={:016x} R10={:016x} R11={:016x}\nR12={:016x} R13={:016x} R14={:016x} R15={:016x}\n\
         RIP={:016x} RFL={:08x}\nCS={:04x} {:016x} {:08x} SS={:04x} GDT={:016x} IDT={:016x}\n\
         CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} EFER={:016x}",
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.rsp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        r.rip,
        r.rflags,
        s.cs.selector,
        s.cs.base,
        s.cs.limit,
        s.ss.selector,
        s.gdt.base,
        s.idt.base,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer
    )
}
