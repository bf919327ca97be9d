//! The texts of qemu-io: how its commands are written, and how it reports.
//!
//! Owns: nothing. Never: does I/O. Threads: any. Locks: none.

use std::fmt::Write as _;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Why a command ends early.
#[derive(Debug)]
pub(super) enum Stop {
    /// With this text.
    Says(String),
    /// The request failed.
    Failed(io::Error),
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Stop {
        Stop::Failed(e)
    }
}

/// A command's words.
pub(super) struct Args<'a>(&'a [String]);

/// Them, taken apart.
#[derive(Debug)]
pub(super) struct Given {
    options: Vec<(char, String)>,
    /// What is no option.
    pub plain: Vec<String>,
}

impl Given {
    /// True when the option was given.
    pub fn has(&self, option: char) -> bool {
        self.options.iter().any(|(o, _)| *o == option)
    }

    /// The last value of the option.
    pub fn value(&self, option: char) -> Option<&str> {
        self.options.iter().rfind(|(o, _)| *o == option).map(|(_, v)| v.as_str())
    }
}

impl<'a> Args<'a> {
    /// The first word is the command's name.
    pub fn new(words: &'a [String]) -> Args<'a> {
        Args(words)
    }

    /// The command's name.
    pub fn name(&self) -> &'a str {
        self.0.first().map_or("", String::as_str)
    }

    /// The words of a command that has no options, and exactly `count` arguments.
    pub fn exactly(&self, count: usize) -> Result<&'a [String], Stop> {
        let given = self.0.get(1..).unwrap_or_default();
        if given.len() == count {
            return Ok(given);
        }
        let (name, has) = (self.name(), given.len());
        Err(Stop::Says(format!("bad argument count {has} to {name}, expected {count} arguments")))
    }

    /// Takes the words apart as getopt(3) does. `known`: the options' letters, a colon after those
    /// with a value; `plain`: how many other words there may be.
    pub fn take(&mut self, known: &str, plain: RangeInclusive<usize>) -> Result<Given, Stop> {
        let name = self.name();
        let mut given = Given { options: Vec::new(), plain: Vec::new() };
        let mut words = self.0.iter().skip(1);
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|l| !l.is_empty()) else {
                given.plain.push(word.clone());
                continue;
            };
            let mut rest = letters.chars();
            while let Some(letter) = rest.next() {
                let at = known.find(letter).filter(|_| letter != ':');
                let Some(at) = at else {
                    return Err(Stop::Says(format!("{name}: invalid option -- '{letter}'")));
                };
                let mut value = String::new();
                if known[at + 1..].starts_with(':') {
                    value = rest.by_ref().collect();
                    if value.is_empty() {
                        let none = format!("{name}: option requires an argument -- '{letter}'");
                        value = words.next().cloned().ok_or(Stop::Says(none))?;
                    }
                }
                given.options.push((letter, value));
            }
        }
        let count = given.plain.len();
        if !plain.contains(&count) {
            let (low, high) = (plain.start(), plain.end());
            let expected = if *low == 0 && *high == 0 { "0".into() } else { format!("at least {low}") };
            return Err(Stop::Says(format!(
                "bad argument count {count} to {name}, expected {expected} arguments"
            )));
        }
        Ok(given)
    }
}

/// A number of bytes: `512`, `0x200`, `64k`, `1.5M`.
pub(super) fn size(text: &str) -> Result<u64, Stop> {
    let bad = || {
        let why = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix";
        Stop::Says(format!("{why} -- {text}"))
    };
    let large = || Stop::Says(format!("Parsing error: argument too large -- {text}"));
    let value = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u64::from_str_radix(hex, 16).map_err(|_| large())?
    } else {
        let (digits, shift) = match text.chars().last().map(|c| c.to_ascii_lowercase()) {
            Some(c) if c.is_ascii_digit() => (text, 0),
            Some(c) => {
                let power = "bkmgtpe".find(c).ok_or_else(bad)?;
                (&text[..text.len() - 1], 10 * power)
            }
            None => return Err(bad()),
        };
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let numeric = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        let empty = whole.is_empty() && part.is_empty();
        if empty || !numeric(whole) || !numeric(part) || (shift == 0 && digits.contains('.')) {
            return Err(bad());
        }
        let whole: u64 = format!("0{whole}").parse().map_err(|_| large())?;
        let unit = 1u64 << shift;
        let part: f64 = format!("0.{part}0").parse().map_err(|_| bad())?;
        // Less than one unit: at most 2^60.
        let part = (part * unit as f64).round() as u64;
        whole.checked_mul(unit).and_then(|n| n.checked_add(part)).ok_or_else(large)?
    };
    if i64::try_from(value).is_err() { Err(large()) } else { Ok(value) }
}

/// A byte: decimal, `0x…` or octal `0…`.
pub(super) fn pattern(text: &str) -> Result<u8, Stop> {
    let value = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(hex), _) => u8::from_str_radix(hex, 16),
        (None, Some(octal)) if !octal.is_empty() => u8::from_str_radix(octal, 8),
        _ => text.parse(),
    };
    value.map_err(|_| Stop::Says(format!("{text} is not a valid pattern byte")))
}

/// A number of bytes with its unit, as qemu-io prints it.
pub(super) fn cvtstr(value: f64) -> String {
    let units = [(60, " EiB"), (50, " PiB"), (40, " TiB"), (30, " GiB"), (20, " MiB"), (10, " KiB")];
    let found = units.into_iter().find(|(bits, _)| value >= (1u64 << bits) as f64);
    let (text, unit) = match found {
        Some((bits, unit)) => (format!("{:.3}", value / (1u64 << bits) as f64), unit),
        None => (format!("{value:.6}"), " bytes"),
    };
    // As strstr(3) finds it.
    let text = text.find(".000").map_or(text.as_str(), |at| &text[..at]);
    format!("{text}{unit}")
}

/// The two lines that follow a request.
pub(super) fn report(out: &mut String, op: &str, off: u64, len: u64, time: Duration) {
    let seconds = time.as_secs_f64().max(1e-9);
    let (whole, hundredths) = (time.as_secs(), time.subsec_millis() / 10);
    let clock = match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, 0) => format!("00.{hundredths:02} sec"),
        (h, m, s) => format!("{h}:{m:02}:{s:02}.{hundredths:02}"),
    };
    let (bytes, rate) = (cvtstr(len as f64), cvtstr(len as f64 / seconds));
    let _ = writeln!(out, "{op} {len}/{len} bytes at offset {off}");
    let _ = writeln!(out, "{bytes}, 1 ops; {clock} ({rate}/sec and {:.4} ops/sec)", 1.0 / seconds);
}

/// The bytes in hexadecimal and as text, 16 in a line.
pub(super) fn dump(out: &mut String, off: u64, data: &[u8]) {
    for (n, line) in data.chunks(16).enumerate() {
        let _ = write!(out, "{:08x}:  ", off + 16 * n as u64);
        for byte in line {
            let _ = write!(out, "{byte:02x} ");
        }
        out.push(' ');
        out.extend(line.iter().map(|&b| if b.is_ascii_alphanumeric() { char::from(b) } else { '.' }));
        out.push('\n');
    }
}
