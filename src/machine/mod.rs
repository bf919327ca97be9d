//! The machine below the devices: KVM, memory, processors, buses, interrupts, boot.
//!
//! [`Machine`] is all of it as one thing that the control thread builds, starts, pauses, resets and
//! stops. Knows no QMP and no block layer.
//!
//! Owns: the VM and what belongs to no device. Never: decides when (control does). Threads: control
//! alone calls it; what it hands out (buses, memory, interrupts) is for all. Locks: none of its own;
//! the order on vCPU threads is `Bus (read) → device Mutex → inbox`.

pub mod acpi_pm;
pub mod bus;
pub mod cpu;
pub mod ioapic;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod memory;

use self::acpi_pm::AcpiPm;
use self::bus::Bus;
use self::cpu::Topology;
use self::irq::{Controllers, Interrupts, Line};
use self::layout::Layout;
use self::memory::Mem;
use crate::bail;
use crate::error::{Error, Result};
use crate::event::Events;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// The I/O ports.
    pub pio: Arc<Bus>,
    /// The memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// RAM. Declared after what uses it in the kernel: fields drop in this order.
    pub mem: Mem,
    /// Lines and messages.
    pub interrupts: Arc<dyn Interrupts>,
    /// Addresses that depend on the configuration.
    pub layout: Layout,
    /// For the ACPI tables.
    pub platform: Platform,
    pm: Arc<AcpiPm>,
    controllers: Arc<Controllers>,
    config: MachineConfig,
}

impl Machine {
    /// A machine with memory, buses, interrupt controllers and (with KVM) processors that do not
    /// run yet.
    pub fn new(config: &MachineConfig, _events: Events) -> Result<Machine> {
        let (memory, page) = (config.memory, 4096);
        if memory < layout::MEMORY_MIN || memory % page != 0 {
            bail!(
                "memory of {memory} bytes: at least {} MiB, in multiples of {page} bytes",
                layout::MEMORY_MIN >> 20
            );
        }
        let kvm = match config.accel {
            Accel::Kvm => Some(kvm::open()?),
            Accel::None => None,
        };
        let phys_bits = 39;
        let layout = Layout::new(memory, phys_bits).ok_or_else(|| {
            Error::new(format!(
                "memory of {memory} bytes does not fit into {phys_bits} bits of physical address"
            ))
        })?;
        let mem = Mem::for_layout(&layout)?;
        let vm = kvm.as_ref().map(|kvm| kvm::Vm::new(kvm, &mem)).transpose()?;
        let controllers = Arc::new(Controllers::new(vm.as_ref().map(|vm| vm.fd.clone())));
        let interrupts: Arc<dyn Interrupts> = controllers.clone();
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let pm = Arc::new(AcpiPm::new(Line::new(interrupts.clone(), u32::from(layout::GED_IRQ))));
        let ok = pio.add(u64::from(layout::ACPI_PM), u64::from(layout::ACPI_PM_LEN), pm.clone())
            && mmio.add(layout::IOAPIC, 0x1000, controllers.clone());
        debug_assert!(ok, "the buses were empty");
        Ok(Machine {
            pio,
            mmio,
            mem,
            interrupts,
            layout,
            platform: Platform::default(),
            pm,
            controllers,
            config: config.clone(),
        })
    }

    /// Puts a kernel, its initrd and tables into memory, and the first processor at its entry.
    /// Reports what is wrong with the files; call it before [`Machine::start`].
    pub fn load(&mut self, boot: &BootConfig) -> Result<()> {
        bail!("{}: this build cannot boot kernels", boot.kernel.display())
    }

    /// Starts the processors' threads, and the processors.
    pub fn start(&mut self) -> Result<()> {
        self.start_paused()?;
        self.resume();
        Ok(())
    }

    /// Starts the processors' threads; the processors run from [`Machine::resume`] on.
    pub fn start_paused(&mut self) -> Result<()> {
        Ok(())
    }

    /// Stops the processors; returns when none touches a device or memory.
    pub fn pause(&mut self) {}

    /// Lets the processors run (on).
    pub fn resume(&mut self) {}

    /// Back to the state after [`Machine::load`]: processors, interrupt controllers, kernel image.
    /// Only while paused; the devices reset themselves.
    pub fn reset(&mut self) -> Result<()> {
        self.controllers.reset();
        self.pm.reset();
        Ok(())
    }

    /// Ends the processors' threads, for good.
    pub fn stop(&mut self) {}

    /// Presses the power button.
    pub fn power_button(&self) {
        self.pm.raise(acpi_pm::EVENT_POWER_BUTTON);
    }

    /// The processors.
    pub fn cpus(&self) -> Vec<CpuInfo> {
        let topology = &self.config.topology;
        (0..topology.cpus())
            .map(|index| CpuInfo { index, place: topology.place(index), thread_id: 0 })
            .collect()
    }

    /// For each processor: its program counter, and whether it has halted. Interrupts running
    /// processors for a moment.
    pub fn cpu_states(&mut self) -> Vec<(u64, bool)> {
        vec![(0, true); self.config.topology.cpus()]
    }
}
