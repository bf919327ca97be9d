//! What sits around the processors: the PCI root, and the devices at fixed places.
//!
//! Owns: those devices, and in which order they are paused and reset. Never: knows what is on a PCI
//! slot. Threads: control. Locks: none.

use crate::chardev::chardev::Chardev;
use crate::devices::cmos::{self, Cmos};
use crate::devices::debug_exit::{self, DebugExit};
use crate::devices::i8042::{self, I8042};
use crate::devices::serial::{self, Serial};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::machine::bus::BusDevice;
use crate::machine::irq::Line;
use crate::machine::layout::{ECAM, MMIO32, PCI_CONF1, PCI_IRQ};
use crate::pci::root::PciRoot;
use crate::qapi::{Path, Wire};
use crate::wire_struct;
use serde_json::{Map, Value};
use std::sync::Arc;

/// See the module's head.
pub struct Board {
    /// The PCI root.
    pub pci: Arc<PciRoot>,
    serial: Vec<Arc<Serial>>,
    i8042: Arc<I8042>,
    cmos: Arc<Cmos>,
}

wire_struct! {
    /// A port that ends the VM with an exit status that the guest chooses.
    pub struct DebugExitOptions {
        /// `isa-debug-exit`
        driver: String,
        /// Its name.
        id: Option<String>,
        /// Its port.
        iobase: Option<u32>,
        /// How many.
        iosize: Option<u32>,
    }
}

/// Serial ports at most.
const SERIAL_MAX: usize = serial::PORTS.len();

impl Board {
    /// Puts the PCI root, the keyboard controller (for its reset line) and the clock on the buses.
    /// A guest without them does not find a way to reboot, and waits 15 s for a clock that is not
    /// there; they cost nothing while nobody uses them.
    pub fn new(machine: &mut Machine) -> Result<Board> {
        let interrupts = &machine.interrupts;
        // Below 4 GiB, where also small guests have mapped it; 512 MiB are plenty for registers.
        let pci = PciRoot::new(machine.mmio.clone(), interrupts, PCI_IRQ.into(), MMIO32);
        let i8042 = Arc::new(I8042::new(Line::new(interrupts.clone(), i8042::IRQ)));
        let cmos = Cmos::new(Line::new(interrupts.clone(), cmos::IRQ));
        port(machine, PCI_CONF1.into(), 8, pci.ports())?;
        port(machine, i8042::PORT, i8042::LEN, i8042.clone())?;
        port(machine, cmos::PORT, cmos::LEN, cmos.clone())?;
        if !machine.mmio.add(ECAM.start, ECAM.end - ECAM.start, pci.ecam()) {
            return Err(Error::new("no place for PCI's configuration space"));
        }
        machine.platform.pci = true;
        machine.platform.i8042 = true;
        machine.platform.cmos = true;
        Ok(Board { pci, serial: Vec::new(), i8042, cmos })
    }

    /// Says in the firmware's tables that there will be `n` serial ports; before the kernel is loaded.
    pub fn announce_serial(machine: &mut Machine, n: usize) -> Result<()> {
        if n > SERIAL_MAX {
            return Err(Error::new(format!("there are {SERIAL_MAX} serial ports at most")));
        }
        // Ports and pins of PC hardware are below 2^16 and 2^8.
        let ports = serial::PORTS.iter().zip(serial::IRQS).take(n);
        machine.platform.serial = ports.map(|(&base, irq)| (base as u16, irq as u8)).collect();
        Ok(())
    }

    /// Adds the next serial port.
    pub fn add_serial(&mut self, machine: &Machine, chardev: Arc<Chardev>) -> Result<()> {
        let n = self.serial.len();
        let (Some(&base), Some(&irq)) = (serial::PORTS.get(n), serial::IRQS.get(n)) else {
            return Err(Error::new(format!("there are {SERIAL_MAX} serial ports at most")));
        };
        let device = Serial::new(Line::new(machine.interrupts.clone(), irq), chardev);
        port(machine, base, serial::LEN, device.clone())?;
        self.serial.push(device);
        Ok(())
    }

    /// Adds QEMU's `isa-debug-exit`, as `device_add`'s arguments describe it.
    pub fn add_debug_exit(&self, machine: &Machine, args: &Map<String, Value>) -> Result<()> {
        let options = DebugExitOptions::take(Value::Object(args.clone()), &Path::Root)?;
        let base = options.iobase.unwrap_or(debug_exit::EXIT_PORT as u32);
        let size = options.iosize.unwrap_or(debug_exit::EXIT_LEN as u32);
        if u64::from(base) + u64::from(size) > 1 << 16 {
            return Err(Error::new("Parameter 'iobase' expects a port below 65536"));
        }
        port(machine, base.into(), size.into(), Arc::new(DebugExit))
    }

    /// All devices stop taking work. The processors are stopped.
    pub fn pause(&self) {
        self.pci.pause();
    }

    /// All devices go on. Before the processors do.
    pub fn resume(&self) {
        self.pci.resume();
    }

    /// All devices back to power-on state. The processors are stopped.
    pub fn reset(&self) {
        self.pci.reset();
        self.serial.iter().for_each(|s| s.reset());
        self.i8042.reset();
        self.cmos.reset();
    }

    /// All devices stop for good, and what they have still to print is printed.
    pub fn stop(&self) {
        self.pci.stop();
        self.serial.iter().for_each(|s| s.chardev().close());
    }
}

fn port(machine: &Machine, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<()> {
    if machine.pio.add(base, len, device) {
        return Ok(());
    }
    Err(Error::new(format!("the I/O ports from {base:#x} on are taken")))
}
