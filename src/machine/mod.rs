//! The machine below the devices: KVM, memory, processors, buses, interrupts, boot.
//!
//! [`Machine`] is all of it as one thing that the control thread builds, starts, pauses, resets and
//! stops. Knows no QMP and no block layer.
//!
//! Owns: the VM and what belongs to no device. Never: decides when (control does). Threads: control
//! alone calls it; what it hands out (buses, memory, interrupts) is for all. Locks: none of its own;
//! the order on vCPU threads is `Bus (read) → device Mutex → inbox`.

mod acpi;
mod acpi_aml;
pub mod acpi_pm;
pub mod boot;
mod boot_elf;
mod boot_linux;
pub mod bus;
pub mod cpu;
pub mod cpu_state;
pub mod ioapic;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod vcpu;

use self::acpi_pm::AcpiPm;
use self::boot::Boot;
use self::bus::Bus;
use self::cpu::Topology;
use self::cpu_state::Start;
use self::irq::{Controllers, Interrupts, Line};
use self::layout::Layout;
use self::memory::Mem;
use self::vcpu::{Processors, Shared};
use crate::bail;
use crate::error::{Error, Result};
use crate::event::Events;
use std::path::PathBuf;
use std::sync::Arc;

/// Bits of a physical address where there is no processor to ask.
const PHYS_BITS: u32 = 39;

/// What runs the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Accel {
    /// Linux's KVM.
    #[default]
    Kvm,
    /// Nothing: the processors idle for ever. For machines without /dev/kvm.
    None,
}

/// What `[machine]` says.
#[derive(Clone, Debug, Default)]
pub struct MachineConfig {
    /// Bytes of RAM, a multiple of 4096, at least `layout::MEMORY_MIN`.
    pub memory: u64,
    /// Processors and how they are arranged.
    pub topology: Topology,
    /// What runs them.
    pub accel: Accel,
}

/// What `[boot]` says, its paths resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootConfig {
    /// A bzImage, or an ELF with a PVH note or a 64-bit entry.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Which devices at fixed places the ACPI tables must name. Set before [`Machine::load`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// 16550 serial ports: I/O base and IOAPIC pin (`layout::COM1`).
    pub serial: Vec<(u16, u8)>,
    /// An i8042 at 0x60 and 0x64.
    pub i8042: bool,
    /// A CMOS clock at 0x70.
    pub cmos: bool,
    /// A PCI root with ECAM at `layout::ECAM`.
    pub pci: bool,
}

/// One processor, for `query-cpus` and `query-cpus-fast`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// 0, 1, …
    pub index: usize,
    /// Socket, core and thread, each counted from 0 inside the level above.
    pub place: (u32, u32, u32),
    /// The host thread's id; 0 when there is none.
    pub thread_id: u32,
}

/// The machine.
pub struct Machine {
    /// None without KVM. The first field: the threads end before anything else goes.
    processors: Option<Processors>,
    /// The I/O ports.
    pub pio: Arc<Bus>,
    /// The memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Lines and messages.
    pub interrupts: Arc<dyn Interrupts>,
    /// Addresses that depend on the configuration.
    pub layout: Layout,
    /// For the ACPI tables.
    pub platform: Platform,
    pm: Arc<AcpiPm>,
    controllers: Arc<Controllers>,
    topology: Topology,
    boot: Option<Boot>,
    /// Something has run since memory was all zeroes.
    used: bool,
    /// RAM. The last field: the kernel has it mapped into the VM.
    pub mem: Mem,
}

impl Machine {
    /// A machine with memory, buses, interrupt controllers and (with KVM) processors that do not
    /// run yet. Without [`Machine::load`] they idle.
    pub fn new(config: &MachineConfig, events: Events) -> Result<Machine> {
        let (memory, page) = (config.memory, 4096);
        if memory < layout::MEMORY_MIN || !memory.is_multiple_of(page) {
            bail!(
                "memory of {memory} bytes: at least {} MiB, in multiples of {page} bytes",
                layout::MEMORY_MIN >> 20
            );
        }
        let host = match config.accel {
            Accel::Kvm => Some(kvm::open()?),
            Accel::None => None,
        };
        let phys_bits = host.as_ref().map_or(PHYS_BITS, |_| kvm::phys_bits());
        let layout = Layout::new(memory, phys_bits).ok_or_else(|| {
            Error::new(format!(
                "memory of {memory} bytes does not fit into {phys_bits} bits of physical address"
            ))
        })?;
        let mem = Mem::for_layout(&layout)?;
        let vm = host.as_ref().map(|host| host.create_vm(&mem)).transpose()?;
        let controllers = Arc::new(Controllers::new(vm.clone()));
        let interrupts: Arc<dyn Interrupts> = controllers.clone();
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let pm = Arc::new(AcpiPm::new(Line::new(interrupts.clone(), u32::from(layout::GED_IRQ))));
        let ok = pio.add(u64::from(layout::ACPI_PM), u64::from(layout::ACPI_PM_LEN), pm.clone())
            && mmio.add(layout::IOAPIC, 0x1000, controllers.clone());
        debug_assert!(ok, "the buses were empty");
        let topology = config.topology;
        let processors = match (host, &vm) {
            (Some(host), Some(vm)) => {
                let (fds, identity) = host.create_vcpus(vm, &topology)?;
                Some(Processors::new(
                    fds,
                    identity,
                    Shared::new(pio.clone(), mmio.clone(), controllers.clone(), events),
                )?)
            }
            _ => None,
        };
        Ok(Machine {
            processors,
            pio,
            mmio,
            interrupts,
            layout,
            platform: Platform::default(),
            pm,
            controllers,
            topology,
            boot: None,
            used: false,
            mem,
        })
    }

    /// Puts a kernel, its initrd and tables into memory, and the first processor at its entry.
    /// Reports what is wrong with the files; call it before [`Machine::start`].
    pub fn load(&mut self, boot: &BootConfig) -> Result<()> {
        self.boot = Some(Boot::open(boot)?);
        self.enter()
    }

    /// Loads what is to be booted, and puts the first processor at its beginning.
    fn enter(&mut self) -> Result<()> {
        let start = match &mut self.boot {
            Some(boot) => {
                let tables = acpi::build(&self.layout, &self.topology, &self.platform)?;
                boot::write(&self.mem, layout::ACPI, &tables)?;
                boot.load(&self.mem, &self.layout, layout::ACPI, !self.used)?
            }
            None => Start::Idle,
        };
        self.used = true;
        self.processors.as_ref().map_or(Ok(()), |p| p.enter(&start))
    }

    /// Starts the processors.
    pub fn start(&mut self) -> Result<()> {
        self.start_paused()?;
        self.resume();
        Ok(())
    }

    /// Makes the processors ready; they run from [`Machine::resume`] on.
    pub fn start_paused(&mut self) -> Result<()> {
        if self.used { Ok(()) } else { self.enter() }
    }

    /// Stops the processors; returns when none touches a device or memory.
    pub fn pause(&mut self) {
        if let Some(p) = &self.processors {
            p.pause();
        }
    }

    /// Lets the processors run (on).
    pub fn resume(&mut self) {
        if let Some(p) = &self.processors {
            p.resume();
        }
    }

    /// Back to the state after [`Machine::load`]: processors, interrupt controllers, kernel image.
    /// Only while paused; the devices reset themselves.
    pub fn reset(&mut self) -> Result<()> {
        self.controllers.reset();
        self.pm.reset();
        if let Some(p) = &self.processors {
            p.reset(|index, fd| cpu_state::reset(fd, index == 0, self.topology.apic_id(index)))?;
        }
        self.enter()
    }

    /// Ends the processors' threads, for good.
    pub fn stop(&mut self) {
        if let Some(p) = &mut self.processors {
            p.stop();
        }
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.pm.raise(acpi_pm::EVENT_POWER_BUTTON);
    }

    /// The processors.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        let thread_id = |index| self.processors.as_ref().map_or(0, |p| p.thread_id(index));
        (0..self.topology.cpus())
            .map(|index| CpuInfo { index, place: self.topology.place(index), thread_id: thread_id(index) })
            .collect()
    }

    /// For each processor: its program counter, and whether it has halted. Interrupts running
    /// processors for a moment.
    pub fn cpu_states(&mut self) -> Vec<(u64, bool)> {
        let Some(p) = &self.processors else { return vec![(0, true); self.topology.cpus()] };
        let running = p.running();
        if running {
            p.pause();
        }
        let states = p.states();
        if running {
            p.resume();
        }
        states
    }
}

impl Drop for Machine {
    /// The last references to the VM's descriptor are devices', which the buses hold, some of which
    /// hold the buses. The VM must be closed before the process ends: a process that ends with it
    /// open waits for two SRCU grace periods (of its memory's notifiers, and of the VM's), the
    /// second too soon after the first to be expedited: 12 ms instead of 0.1 ms (Linux 6.18).
    fn drop(&mut self) {
        self.stop();
        self.pio.clear();
        self.mmio.clear();
    }
}

#[cfg(test)]
mod guest_smp_test;
#[cfg(test)]
mod guest_test;
