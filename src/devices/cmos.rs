//! The CMOS memory with its real-time clock.
//!
//! Owns: 128 bytes and how far the guest's clock is from the host's. The time is worked out when it
//! is read, and so are the flags of register C; only while the guest has the alarm or the update
//! interrupt enabled, a timer looks once a second. The periodic interrupt does not exist. Threads:
//! vCPUs, the timer's. Locks: its own mutex, then the timer's or the interrupt line's, both leaves.
//!
//! Source: Motorola MC146818A data sheet; byte 0x32 as century is the PC's convention (ACPI's FADT names it).

use crate::event::Event;
use crate::machine::bus::{BusDevice, Effect};
use crate::machine::irq::Line;
use crate::sys::alarm::Alarm;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// First port.
pub const PORT: u64 = 0x70;
/// Ports 0x70 (index) and 0x71 (data).
pub const LEN: u64 = 2;
/// The clock's interrupt line.
pub const IRQ: u32 = 8;
/// The byte that holds the century.
pub const CENTURY: u8 = 0x32;

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REG_A: usize = 10;
const REG_B: usize = 11;
const REG_C: usize = 12;
const REG_D: usize = 13;
const CENTURY_BYTE: usize = CENTURY as usize;

/// Register A: an update is about to happen.
const UIP: u8 = 0x80;
/// Register A at power-on: 32.768 kHz, periodic rate 1024 Hz.
const A_DEFAULT: u8 = 0x26;
/// Register B: the guest is setting the time.
const SET: u8 = 0x80;
/// Register B: binary, not BCD.
const BINARY: u8 = 4;
/// Register B: 24 hours, not 12 and a PM bit.
const HOUR24: u8 = 2;
/// Registers B (interrupt enabled) and C (it has happened): an update has ended.
const UPDATED: u8 = 0x10;
/// Registers B and C: the alarm time has come.
const ALARM: u8 = 0x20;
/// Register C: the line is high.
const INTERRUPT: u8 = 0x80;
/// Register D: the battery is good.
const VALID: u8 = 0x80;

const NANOS: i128 = 1_000_000_000;
/// UIP is set this long before the update (data sheet: 244 µs).
const UIP_NANOS: i128 = 244_000;

/// The host's clock: nanoseconds since 1970, UTC.
type Clock = Box<dyn Fn() -> i128 + Send + Sync>;

/// Clock and memory.
pub struct Cmos {
    state: Mutex<State>,
    clock: Clock,
    line: Line,
    alarm: Alarm,
}

struct State {
    index: u8,
    ram: [u8; 128],
    /// Guest time minus host time, in nanoseconds.
    offset: i128,
    /// The guest time up to which register C has been worked out, in seconds.
    seen: i64,
    /// The level on the line.
    high: bool,
}

impl Cmos {
    /// A clock that shows UTC and interrupts on `line`.
    pub fn new(line: Line) -> Arc<Cmos> {
        let now = || match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            // Below 2^95: a Duration has 64 bits of seconds.
            Ok(since) => since.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        Cmos::with_clock(line, Box::new(now))
    }

    fn with_clock(line: Line, clock: Clock) -> Arc<Cmos> {
        let mut ram = [0; 128];
        (ram[REG_A], ram[REG_B], ram[REG_D]) = (A_DEFAULT, HOUR24, VALID);
        let state = State { index: 0, ram, offset: 0, seen: seconds(clock()), high: false };
        Arc::new_cyclic(|this: &Weak<Cmos>| {
            let this = this.clone();
            let tick = move || {
                if let Some(cmos) = this.upgrade() {
                    cmos.update(&mut cmos.lock());
                }
            };
            Cmos { state: Mutex::new(state), clock, line, alarm: Alarm::new("rtc", tick) }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the line and the timer agree with the registers.
    fn update(&self, state: &mut State) {
        let enabled = state.ram[REG_B] & (ALARM | UPDATED);
        let mut next = None;
        if enabled != 0 && state.runs() {
            let now = (self.clock)() + state.offset;
            state.ram[REG_C] |= state.flags(seconds(now));
            // The moment after the next update. Less than 2^30: a second.
            let left = Duration::from_nanos((NANOS - now.rem_euclid(NANOS)) as u64);
            next = Some(Instant::now() + left);
        }
        let high = state.ram[REG_C] & enabled != 0;
        if high != state.high {
            state.high = high;
            self.line.set(high);
        }
        self.alarm.set(next);
    }

    /// Sets a byte of the memory proper (0x0e to 0x7f, not the century); others are left alone.
    pub fn set_nvram(&self, index: u8, value: u8) {
        let mut state = self.lock();
        let at = usize::from(index);
        if (REG_D + 1..128).contains(&at) && at != CENTURY_BYTE {
            state.ram[at] = value;
        }
    }

    /// A reset of the machine: the clock runs on, its interrupts are off.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.ram[REG_B] &= !0x70;
        state.ram[REG_C] = 0;
        self.update(&mut state);
    }

    fn read_data(&self, state: &mut State) -> u8 {
        let at = usize::from(state.index);
        if state.runs() {
            let now = (self.clock)() + state.offset;
            match at {
                SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY_BYTE => {
                    state.show(seconds(now))
                }
                REG_A if NANOS - now.rem_euclid(NANOS) <= UIP_NANOS => return state.ram[REG_A] | UIP,
                REG_C => state.ram[REG_C] |= state.flags(seconds(now)),
                _ => {}
            }
        }
        if at != REG_C {
            return state.ram[at];
        }
        // Reading it clears it.
        let flags = std::mem::take(&mut state.ram[REG_C]);
        let high = flags & state.ram[REG_B] & (ALARM | UPDATED) != 0;
        self.update(state);
        flags | if high { INTERRUPT } else { 0 }
    }

    fn write_data(&self, state: &mut State, value: u8) -> Effect {
        let at = usize::from(state.index);
        let ran = state.runs();
        let now = (self.clock)();
        match at {
            REG_A | REG_B => {
                // Stopped now, the clock shows the time at which it was stopped.
                if ran {
                    state.show(seconds(now + state.offset));
                }
                let held = at == REG_A && state.ram[REG_A] & 0x60 == 0x60;
                state.ram[at] = if at == REG_A { value & !UIP } else { value };
                if !ran && state.runs() {
                    // Out of divider reset the first update comes after half a second.
                    return state.set(now, if held { NANOS / 2 } else { 0 });
                }
            }
            REG_C | REG_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY_BYTE => {
                if !ran {
                    state.ram[at] = value;
                    return Effect::None;
                }
                let guest = now + state.offset;
                state.show(seconds(guest));
                state.ram[at] = value;
                return state.set(now, guest.rem_euclid(NANOS));
            }
            _ => state.ram[at] = value,
        }
        Effect::None
    }
}

impl State {
    /// Not being set, and not with its divider held in reset.
    fn runs(&self) -> bool {
        self.ram[REG_B] & SET == 0 && self.ram[REG_A] & 0x60 != 0x60
    }

    /// What has happened up to `now` since the last call, for register C.
    fn flags(&mut self, now: i64) -> u8 {
        let seen = std::mem::replace(&mut self.seen, now);
        if now <= seen {
            return 0;
        }
        // Of a long time nobody asks which second it was; a day holds every alarm.
        let alarm = (seen.max(now - 86_400)..now).any(|before| self.alarm_at(before + 1));
        UPDATED | if alarm { ALARM } else { 0 }
    }

    fn alarm_at(&self, time: i64) -> bool {
        let second = time.rem_euclid(60) as u8;
        let minute = (time.div_euclid(60)).rem_euclid(60) as u8;
        let hour = (time.div_euclid(3600)).rem_euclid(24) as u8;
        let fits = |at: usize, now: u8| self.ram[at] & 0xc0 == 0xc0 || self.ram[at] == now;
        fits(SECONDS_ALARM, self.encode(second))
            && fits(MINUTES_ALARM, self.encode(minute))
            && fits(HOURS_ALARM, self.encode_hour(hour))
    }

    /// Puts `time` (seconds since 1970) into the registers.
    fn show(&mut self, time: i64) {
        let days = time.div_euclid(86_400);
        let second = time.rem_euclid(86_400);
        let (year, month, day) = date(days);
        self.ram[SECONDS] = self.encode((second % 60) as u8);
        self.ram[MINUTES] = self.encode((second / 60 % 60) as u8);
        self.ram[HOURS] = self.encode_hour((second / 3600) as u8);
        // 1970-01-01 was a Thursday; Sunday is 1.
        self.ram[WEEKDAY] = self.encode(((days + 4).rem_euclid(7) + 1) as u8);
        self.ram[DAY] = self.encode(day);
        self.ram[MONTH] = self.encode(month);
        self.ram[YEAR] = self.encode(year.rem_euclid(100) as u8);
        self.ram[CENTURY_BYTE] = self.encode(year.div_euclid(100).rem_euclid(100) as u8);
    }

    /// Makes the registers the time, `fraction` of a second gone; says how far that is from `now`.
    fn set(&mut self, now: i128, fraction: i128) -> Effect {
        let year =
            i64::from(self.decode(self.ram[CENTURY_BYTE])) * 100 + i64::from(self.decode(self.ram[YEAR]));
        let days = days(year, self.decode(self.ram[MONTH]), self.decode(self.ram[DAY]));
        let time = days * 86_400
            + i64::from(self.decode_hour(self.ram[HOURS])) * 3600
            + i64::from(self.decode(self.ram[MINUTES])) * 60
            + i64::from(self.decode(self.ram[SECONDS]));
        self.offset = i128::from(time) * NANOS + fraction - now;
        self.seen = time;
        Effect::Post(Event::RtcChange { offset: time - seconds(now) })
    }

    fn encode(&self, n: u8) -> u8 {
        if self.ram[REG_B] & BINARY != 0 { n } else { ((n / 10) << 4) | (n % 10) }
    }

    fn decode(&self, n: u8) -> u8 {
        if self.ram[REG_B] & BINARY != 0 { n } else { (n >> 4) * 10 + (n & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.ram[REG_B] & HOUR24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, hour: u8) -> u8 {
        if self.ram[REG_B] & HOUR24 != 0 {
            return self.decode(hour);
        }
        self.decode(hour & 0x7f) % 12 + if hour & 0x80 != 0 { 12 } else { 0 }
    }
}

/// Whole seconds, rounded down. Clamped, though no clock gets there.
fn seconds(nanos: i128) -> i64 {
    nanos.div_euclid(NANOS).try_into().unwrap_or(0)
}

/// Days since 1970-01-01 of a date in the Gregorian calendar, months and days beyond their range
/// counted on. Years begin in March here, so that the leap day is the last one.
fn days(year: i64, month: u8, day: u8) -> i64 {
    let month = i64::from(month) - 1;
    let (year, month) = (year + month.div_euclid(12), month.rem_euclid(12));
    let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (153 * month + 2) / 5 + i64::from(day) - 1 - 719_468
}

/// The date of a day since 1970-01-01.
fn date(days: i64) -> (i64, u8, u8) {
    let days = days + 719_468; // since 0000-03-01
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year + i64::from(month >= 10);
    (year, (if month < 10 { month + 3 } else { month - 9 }) as u8, day as u8)
}

impl BusDevice for Cmos {
    fn read(&self, off: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (port, byte) in (off..).zip(data) {
            // The index cannot be read back, on PCs.
            *byte = if port == 1 { self.read_data(&mut state) } else { 0xff };
        }
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        let mut state = self.lock();
        let mut effect = Effect::None;
        for (port, &byte) in (off..).zip(data) {
            match port {
                // Bit 7 masks the NMI, which does not exist.
                0 => state.index = byte & 0x7f,
                1 => {
                    effect = self.write_data(&mut state, byte);
                    self.update(&mut state);
                }
                _ => {}
            }
        }
        effect
    }
}

#[cfg(test)]
#[path = "cmos_test.rs"]
mod tests;
