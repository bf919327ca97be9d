//! The properties of a device, typed: from what `device_add` or a `[[device]]` table says.
//!
//! Owns: parsing with QEMU's messages. Never: knows a device. Threads: control. Locks: none.
//!
//! As in QEMU, a value may be of the property's JSON type or a string that says it: `4` or `"4"`,
//! `true` or `"on"`, `4096` or `"4k"`.

use crate::bail;
use crate::error::Result;
use serde_json::{Map, Value};

/// What a property's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Any text.
    Text,
    /// `true`, `false`, `"on"`, `"off"`.
    Bool,
    /// `"on"`, `"off"` or `"auto"`.
    OnOffAuto,
    /// An unsigned number of so many bits: 8, 16, 32 or 64.
    Number(u32),
    /// Bytes, with an optional suffix; below 4 GiB.
    Size32,
    /// One of these words.
    Word(&'static [&'static str]),
}

/// A property: its name, and what its value is.
pub type Property = (&'static str, Type);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Parsed {
    Text(String),
    Bool(bool),
    Number(u64),
}

/// The properties that were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    model: &'static str,
    values: Vec<(&'static str, Parsed)>,
}

impl Properties {
    /// Parses `args`, of which `driver` is not one. `tables` are the properties that `model` has.
    pub fn parse(
        model: &'static str,
        tables: &[&'static [Property]],
        args: &Map<String, Value>,
    ) -> Result<Properties> {
        let mut values = Vec::new();
        for (name, value) in args.iter().filter(|(name, _)| *name != "driver") {
            let known = tables.iter().copied().flatten().find(|(known, _)| known == name);
            let Some((name, ty)) = known else { bail!("Property '{model}.{name}' not found") };
            values.push((*name, parse(name, *ty, value)?));
        }
        Ok(Properties { model, values })
    }

    fn get(&self, name: &str) -> Option<&Parsed> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// The model that they belong to.
    pub fn model(&self) -> &'static str {
        self.model
    }

    /// A text, word, or `on`/`off`/`auto`.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Parsed::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A switch.
    pub fn switch(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            Parsed::Bool(on) => Some(*on),
            _ => None,
        }
    }

    /// A number or size; `T` is as wide as the property's type says.
    pub fn number<T: TryFrom<u64>>(&self, name: &str) -> Option<T> {
        match self.get(name)? {
            Parsed::Number(n) => T::try_from(*n).ok(),
            _ => None,
        }
    }

    /// QEMU's message for a value that makes no sense.
    pub fn bad_value(&self, name: &str) -> String {
        let value = self.text(name).unwrap_or_default();
        format!("Property '{}.{name}' doesn't take value '{value}'", self.model)
    }
}

/// A scalar as the text that would say it.
fn as_text(name: &str, value: &Value) -> Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Number(n) => n.to_string(),
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        _ => bail!("Invalid parameter type for '{name}', expected: string"),
    })
}

fn parse(name: &str, ty: Type, value: &Value) -> Result<Parsed> {
    let text = as_text(name, value)?;
    Ok(match ty {
        Type::Text => Parsed::Text(text),
        Type::Bool => match &*text {
            "on" | "yes" | "true" | "y" => Parsed::Bool(true),
            "off" | "no" | "false" | "n" => Parsed::Bool(false),
            _ => bail!("Parameter '{name}' expects 'on' or 'off'"),
        },
        Type::OnOffAuto => word(name, &["auto", "on", "off"], text)?,
        Type::Word(words) => word(name, words, text)?,
        Type::Number(bits) => {
            let Some(n) = number(&text) else { bail!("Parameter '{name}' expects uint64") };
            if bits < 64 && n >> bits != 0 {
                bail!("Parameter '{name}' expects uint{bits}_t");
            }
            Parsed::Number(n)
        }
        Type::Size32 => match size(&text) {
            Some(n) if n <= u64::from(u32::MAX) => Parsed::Number(n),
            Some(n) => {
                bail!("Property {name} doesn't take value {n} (maximum: {})", u32::MAX)
            }
            None => bail!("Parameter '{name}' expects a size"),
        },
    })
}

fn word(name: &str, words: &[&str], text: String) -> Result<Parsed> {
    if !words.contains(&&*text) {
        bail!("Parameter '{name}' does not accept value '{text}'");
    }
    Ok(Parsed::Text(text))
}

/// Decimal, or hexadecimal behind `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
        None if !text.starts_with('+') => text.parse().ok(),
        _ => None,
    }
}

/// A number of bytes with QEMU's suffixes: B, K, M, G, T, P, E, of 1024 each.
fn size(text: &str) -> Option<u64> {
    let last = text.chars().last()?;
    let power = match last.to_ascii_uppercase() {
        'B' => 0,
        'K' => 1,
        'M' => 2,
        'G' => 3,
        'T' => 4,
        'P' => 5,
        'E' => 6,
        _ => return number(text),
    };
    // A hexadecimal number may end in B or E.
    match text.starts_with("0x") {
        true => number(text),
        false => number(&text[..text.len() - 1])?.checked_mul(1 << (10 * power)),
    }
}

#[cfg(test)]
#[path = "properties_test.rs"]
mod tests;
