//! A 16550A serial port.
//!
//! Owns: the port's registers and FIFOs. Never: blocks; knows what is behind its chardev. Threads:
//! vCPUs read and write registers; the chardev's thread brings input and room. Locks: its own mutex,
//! then (inside it) the chardev's queues or the interrupt line, both leaves.
//!
//! Source: National Semiconductor PC16550D data sheet (June 1995), section 8. Departures: characters
//! take no time, so a receive FIFO below its trigger level reports the timeout interrupt at once, and
//! the transmitter is busy only while the chardev takes nothing more. The interrupt line is not gated
//! by OUT2: small kernels that never set it work on other emulators, too.

use crate::chardev::chardev::{Chardev, Frontend};
use crate::machine::bus::{BusDevice, Effect};
use crate::machine::irq::Line;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// First port of COM1 to COM4.
pub const PORTS: [u64; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
/// Interrupt lines of COM1 to COM4.
pub const IRQS: [u32; 4] = [4, 3, 4, 3];
/// How many ports a serial port has.
pub const LEN: u64 = 8;

/// Depth of both FIFOs.
const FIFO: usize = 16;

// Register offsets. 0 is RBR (read), THR (write), and with LCR.DLAB the divisor's low byte.
const DATA: u64 = 0;
const IER: u64 = 1; // with DLAB the divisor's high byte
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RX: u8 = 1;
const IER_THRE: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;

const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_THRE: u8 = 2;
const IIR_RX: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;
const FCR_CLEAR_TX: u8 = 4;
const FCR_DMA: u8 = 8;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 1;
const MCR_RTS: u8 = 2;
const MCR_OUT1: u8 = 4;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;

const LSR_READY: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_ERRORS: u8 = 0x1e;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;

const MSR_DELTAS: u8 = 0xf;
const MSR_TERI: u8 = 4;
const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;

/// A serial port on a chardev.
pub struct Serial {
    state: Mutex<State>,
    chardev: Arc<Chardev>,
    line: Line,
}

struct State {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// The error bits that are latched until LSR is read.
    errors: u8,
    msr: u8,
    scr: u8,
    rx: VecDeque<u8>,
    /// What the chardev did not take. Empty nearly always.
    tx: VecDeque<u8>,
    /// The transmitter became empty (or its interrupt was enabled while it was), and neither IIR
    /// was read nor THR written since.
    thre: bool,
    /// The level on the line.
    high: bool,
}

impl State {
    fn new() -> State {
        State {
            divisor: 12, // 9600 baud
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            errors: 0,
            msr: MSR_DCD | MSR_DSR | MSR_CTS,
            scr: 0,
            rx: VecDeque::new(),
            tx: VecDeque::new(),
            thre: false,
            high: false,
        }
    }

    fn depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            _ if self.fcr & FCR_ENABLE == 0 => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// The interrupt of highest priority, as IIR's low nibble tells it.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.errors != 0 {
            IIR_LINE
        } else if self.ier & IER_RX != 0 && self.rx.len() >= self.trigger() {
            IIR_RX
        } else if self.ier & IER_RX != 0 && !self.rx.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_THRE != 0 && self.thre {
            IIR_THRE
        } else if self.ier & IER_MODEM != 0 && self.msr & MSR_DELTAS != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// A character arrives.
    fn receive(&mut self, byte: u8) {
        if self.rx.len() < self.depth() {
            self.rx.push_back(byte);
            return;
        }
        self.errors |= LSR_OVERRUN;
        // With FIFOs the newcomer is lost; without, it takes the old one's place.
        if self.depth() == 1 {
            self.rx.clear();
            self.rx.push_back(byte);
        }
    }

    fn set_mcr(&mut self, mcr: u8) {
        self.mcr = mcr & 0x1f;
        let lines = if self.mcr & MCR_LOOP != 0 {
            [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
                .iter()
                .filter(|(out, _)| self.mcr & out != 0)
                .fold(0, |lines, (_, line)| lines | line)
        } else {
            MSR_DCD | MSR_DSR | MSR_CTS
        };
        let changed = (lines ^ self.msr) & 0xf0;
        let mut deltas = changed >> 4;
        // Of RI only the trailing edge counts.
        if lines & MSR_RI != 0 {
            deltas &= !MSR_TERI;
        }
        self.msr = lines | (self.msr & MSR_DELTAS) | deltas;
    }

    fn set_fcr(&mut self, fcr: u8) {
        // Switching the FIFOs on or off empties them.
        let switched = (fcr ^ self.fcr) & FCR_ENABLE != 0;
        if switched || fcr & FCR_CLEAR_RX != 0 {
            self.rx.clear();
        }
        if (switched || fcr & FCR_CLEAR_TX != 0) && !self.tx.is_empty() {
            self.tx.clear();
            self.thre = true;
        }
        // Without bit 0 the other bits are not programmed.
        self.fcr = if fcr & FCR_ENABLE != 0 { fcr & (FCR_ENABLE | FCR_DMA | FCR_TRIGGER) } else { 0 };
    }
}

impl Serial {
    /// A port that interrupts on `line` and talks to `chardev`.
    pub fn new(line: Line, chardev: Arc<Chardev>) -> Arc<Serial> {
        let serial = Arc::new(Serial { state: Mutex::new(State::new()), chardev, line });
        let frontend: Arc<dyn Frontend> = serial.clone();
        serial.chardev.attach(Arc::downgrade(&frontend));
        serial
    }

    /// Back to power-on state. What the chardev has not taken yet is lost.
    pub fn reset(&self) {
        let mut state = self.lock();
        let high = state.high;
        *state = State { high, ..State::new() };
        self.fill(&mut state);
        self.update(&mut state);
    }

    /// The chardev behind it.
    pub fn chardev(&self) -> &Arc<Chardev> {
        &self.chardev
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the line agree with the registers. Under the lock, so that levels keep their order.
    fn update(&self, state: &mut State) {
        let high = state.cause() != IIR_NONE;
        if high != state.high {
            state.high = high;
            self.line.set(high);
        }
    }

    /// Gives the chardev what waits in the transmitter.
    fn transmit(&self, state: &mut State) {
        let before = state.tx.len();
        while !state.tx.is_empty() {
            let n = self.chardev.write(state.tx.as_slices().0);
            if n == 0 {
                break;
            }
            state.tx.drain(..n);
        }
        if before > 0 && state.tx.is_empty() {
            state.thre = true;
        }
    }

    /// Fills the receiver from the chardev. In loopback mode the outside is cut off.
    fn fill(&self, state: &mut State) {
        let room = state.depth().saturating_sub(state.rx.len());
        if room > 0 && state.mcr & MCR_LOOP == 0 {
            let mut buf = [0; FIFO];
            let n = self.chardev.take(&mut buf[..room]);
            state.rx.extend(&buf[..n]);
        }
    }

    fn read_register(&self, state: &mut State, register: u64) -> u8 {
        match register {
            DATA if state.lcr & LCR_DLAB != 0 => state.divisor.to_le_bytes()[0],
            DATA => {
                let byte = state.rx.pop_front().unwrap_or(0);
                if state.rx.is_empty() {
                    self.fill(state);
                }
                byte
            }
            IER if state.lcr & LCR_DLAB != 0 => state.divisor.to_le_bytes()[1],
            IER => state.ier,
            IIR_FCR => {
                let cause = state.cause();
                if cause == IIR_THRE {
                    state.thre = false;
                }
                if state.fcr & FCR_ENABLE != 0 { cause | IIR_FIFOS } else { cause }
            }
            LCR => state.lcr,
            MCR => state.mcr,
            LSR => {
                let empty = if state.tx.is_empty() { LSR_THRE | LSR_TEMT } else { 0 };
                let ready = if state.rx.is_empty() { 0 } else { LSR_READY };
                empty | ready | std::mem::take(&mut state.errors) & LSR_ERRORS
            }
            MSR => {
                let msr = state.msr;
                state.msr &= !MSR_DELTAS;
                msr
            }
            SCR => state.scr,
            _ => 0,
        }
    }

    fn write_register(&self, state: &mut State, register: u64, value: u8) {
        match register {
            DATA if state.lcr & LCR_DLAB != 0 => state.divisor = state.divisor & 0xff00 | u16::from(value),
            DATA if state.mcr & MCR_LOOP != 0 => {
                state.receive(value);
                state.thre = true;
            }
            DATA => {
                state.thre = false;
                // A guest that writes into a full transmitter loses the character.
                if state.tx.len() < state.depth() {
                    state.tx.push_back(value);
                    self.transmit(state);
                }
            }
            IER if state.lcr & LCR_DLAB != 0 => {
                state.divisor = state.divisor & 0xff | u16::from(value) << 8;
            }
            IER => {
                let enabled = value & !state.ier;
                state.ier = value & 0xf;
                // Enabling it while the transmitter is empty interrupts at once: drivers rely on it.
                if enabled & IER_THRE != 0 && state.tx.is_empty() {
                    state.thre = true;
                }
            }
            IIR_FCR => {
                state.set_fcr(value);
                self.fill(state);
            }
            LCR => state.lcr = value,
            MCR => {
                state.set_mcr(value);
                self.fill(state);
            }
            SCR => state.scr = value,
            _ => {} // LSR and MSR are for the factory.
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, off: u64, data: &mut [u8]) {
        let mut state = self.lock();
        // A wide access is one of each port, as on the ISA bus.
        for (register, byte) in (off..).zip(data) {
            *byte = self.read_register(&mut state, register);
        }
        self.update(&mut state);
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        let mut state = self.lock();
        for (register, &byte) in (off..).zip(data) {
            self.write_register(&mut state, register, byte);
        }
        self.update(&mut state);
        Effect::None
    }
}

impl Frontend for Serial {
    fn input_ready(&self) {
        let mut state = self.lock();
        self.fill(&mut state);
        self.update(&mut state);
    }

    fn output_room(&self) {
        let mut state = self.lock();
        self.transmit(&mut state);
        self.update(&mut state);
    }
}

#[cfg(test)]
#[path = "serial_test.rs"]
mod tests;
