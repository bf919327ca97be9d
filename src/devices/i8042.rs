//! The keyboard controller: reset, A20 and the commands that drivers probe it with. No keyboard is
//! plugged in (yet): what is sent to one is answered as by an empty socket.
//!
//! Owns: the controller's registers; system control port B (0x61) between them. Threads: vCPUs.
//! Locks: its own mutex, then the interrupt line's, a leaf.
//!
//! Source: Intel 8042 as in the IBM PC/AT Technical Reference (1984), section 1 (keyboard controller).

use crate::event::Event;
use crate::machine::bus::{BusDevice, Effect};
use crate::machine::irq::Line;
use std::sync::{Mutex, PoisonError};

/// First port.
pub const PORT: u64 = 0x60;
/// Ports 0x60 (data) to 0x64 (command and status).
pub const LEN: u64 = 5;
/// The keyboard's interrupt line.
pub const IRQ: u32 = 1;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

/// Status: there is something to read at 0x60.
const OUTPUT_FULL: u8 = 1;
/// Status: the self test has passed.
const SYSTEM: u8 = 4;
/// Status: the last write was to 0x64.
const IS_COMMAND: u8 = 8;
/// Status: not locked.
const UNLOCKED: u8 = 0x10;
/// Status: what is at 0x60 comes from the mouse.
const FROM_MOUSE: u8 = 0x20;
/// Status: no device answered.
const TIMEOUT: u8 = 0x40;

/// Controller configuration: interrupt when the output buffer is full.
const INTERRUPT: u8 = 1;
/// Controller configuration: self test passed, keyboard and mouse clocks off.
const AT_RESET: u8 = 0x34;
/// Output port: not in reset, A20 on.
const OUTPUT_PORT: u8 = 3;
/// What an empty socket answers: "send again".
const RESEND: u8 = 0xfe;

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    line: Line,
}

struct State {
    config: u8,
    output_port: u8,
    /// What is at 0x60, with its status bits.
    output: Option<(u8, u8)>,
    last: u8,
    /// The command that takes the next byte written to 0x60.
    wants: Option<u8>,
    high: bool,
    refresh: bool,
    port_b: u8,
}

impl State {
    fn new() -> State {
        State {
            config: AT_RESET,
            output_port: OUTPUT_PORT,
            output: None,
            last: 0,
            wants: None,
            high: false,
            refresh: false,
            port_b: 0,
        }
    }

    fn command(&mut self, command: u8) -> Effect {
        self.wants = None;
        let mut reply = None;
        match command {
            0x20 => reply = Some((self.config, 0)),
            0x60 | 0xd1..=0xd4 => self.wants = Some(command),
            0xa7 => self.config |= 0x20,
            0xa8 => self.config &= !0x20,
            // Mouse port: no error, as with a port and nothing in it.
            0xa9 => reply = Some((0, 0)),
            0xaa => {
                self.config |= SYSTEM;
                reply = Some((0x55, 0));
            }
            0xab => reply = Some((0, 0)),
            0xad => self.config |= 0x10,
            0xae => self.config &= !0x10,
            0xc0 => reply = Some((0x80, 0)),
            0xd0 => reply = Some((self.output_port, 0)),
            // A20 off and on; it cannot be off here.
            0xdd | 0xdf => {}
            // Pulse output lines; bit 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => return Effect::Post(Event::Reset),
            _ => {}
        }
        if reply.is_some() {
            self.output = reply;
        }
        Effect::None
    }

    fn data(&mut self, byte: u8) -> Effect {
        match self.wants.take() {
            Some(0x60) => self.config = byte,
            Some(0xd1) => {
                self.output_port = byte | 2;
                if byte & 1 == 0 {
                    return Effect::Post(Event::Reset);
                }
            }
            Some(0xd2) => self.output = Some((byte, 0)),
            Some(0xd3) => self.output = Some((byte, FROM_MOUSE)),
            Some(0xd4) => self.output = Some((RESEND, FROM_MOUSE | TIMEOUT)),
            _ => self.output = Some((RESEND, TIMEOUT)),
        }
        Effect::None
    }
}

impl I8042 {
    /// A controller whose keyboard interrupt is `line`.
    pub fn new(line: Line) -> I8042 {
        I8042 { state: Mutex::new(State::new()), line }
    }

    /// Back to power-on state.
    pub fn reset(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let high = state.high;
        *state = State { high, ..State::new() };
        self.update(&mut state);
    }

    fn update(&self, state: &mut State) {
        // The mouse's line would be 12; there is no mouse.
        let high = state.config & INTERRUPT != 0 && state.output.is_some_and(|(_, s)| s & FROM_MOUSE == 0);
        if high != state.high {
            state.high = high;
            self.line.set(high);
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, off: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (port, byte) in (off..).zip(data) {
            *byte = match port {
                DATA => {
                    if let Some((byte, _)) = state.output.take() {
                        state.last = byte;
                    }
                    state.last
                }
                // Memory refresh toggles, timer 2 has run out: programs wait for both.
                PORT_B => {
                    state.refresh = !state.refresh;
                    0x20 | u8::from(state.refresh) << 4 | state.port_b
                }
                COMMAND => {
                    let full = state.output.map_or(0, |(_, status)| OUTPUT_FULL | status);
                    let command = if state.wants.is_some() { IS_COMMAND } else { 0 };
                    full | command | state.config & SYSTEM | UNLOCKED
                }
                _ => 0,
            };
        }
        self.update(&mut state);
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut effect = Effect::None;
        for (port, &byte) in (off..).zip(data) {
            let asked = match port {
                DATA => state.data(byte),
                PORT_B => {
                    state.port_b = byte & 0xf;
                    Effect::None
                }
                COMMAND => state.command(byte),
                _ => Effect::None,
            };
            if !matches!(asked, Effect::None) {
                effect = asked;
            }
        }
        self.update(&mut state);
        effect
    }
}

#[cfg(test)]
#[path = "i8042_test.rs"]
mod tests;
