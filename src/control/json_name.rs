//! The options in a `json:{…}` file name, in the forms that QEMU takes and writes them.
//!
//! Besides nested objects QEMU knows names with points, `"file.filename": "x"`, where numbers make a
//! list (`"children.0.driver"`), and writes some options so itself.
//!
//! Owns: making nested options of both. Never: knows a driver, but for what QEMU leaves out of its
//! own names. Threads: control. Locks: none.

use crate::bail;
use crate::error::Result;
use serde_json::{Map, Value};

/// More than any graph that can be opened needs; all of this is recursive.
const MAX_DEPTH: usize = 600;

/// The options as `blockdev-add` takes them.
pub fn nested(options: Value) -> Result<Value> {
    let Value::Object(flat) = options else { return Ok(options) };
    let mut all = Map::new();
    for (name, value) in flat {
        insert(&mut all, &name, value, MAX_DEPTH)?;
    }
    Ok(lists(Value::Object(all)))
}

/// Puts `value` where `name` leads, into objects that are made as needed.
fn insert(into: &mut Map<String, Value>, name: &str, value: Value, depth: usize) -> Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        bail!("the options are nested more than {MAX_DEPTH} deep")
    };
    let (first, rest) = match name.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (name, None),
    };
    match (rest, value) {
        (Some(rest), value) => match into.entry(first).or_insert_with(|| Value::Object(Map::new())) {
            Value::Object(inner) => insert(inner, rest, value, depth),
            _ => bail!("Cannot mix scalar and non-scalar keys"),
        },
        (None, Value::Object(members)) => {
            match into.entry(first).or_insert_with(|| Value::Object(Map::new())) {
                Value::Object(inner) => {
                    members.into_iter().try_for_each(|(n, v)| insert(inner, &n, v, depth))
                }
                _ => bail!("Cannot mix scalar and non-scalar keys"),
            }
        }
        (None, value) => match into.insert(first.to_string(), value) {
            None => Ok(()),
            Some(_) => bail!("Cannot mix scalar and non-scalar keys"),
        },
    }
}

/// Objects whose members are 0, 1, 2… are lists.
fn lists(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let count = members.len();
            let mut items: Vec<Option<Value>> = vec![None; count];
            let mut named = Map::new();
            for (name, value) in members {
                let value = lists(value);
                match name.parse::<usize>().ok().and_then(|n| items.get_mut(n)) {
                    Some(item) if item.is_none() => *item = Some(value),
                    _ => drop(named.insert(name, value)),
                }
            }
            if count > 0 && items.iter().all(Option::is_some) {
                return Value::Array(items.into_iter().flatten().collect());
            }
            // Some have names: numbers are names, too.
            named.extend(items.into_iter().enumerate().filter_map(|(n, v)| Some((n.to_string(), v?))));
            complete(&mut named);
            Value::Object(named)
        }
        Value::Array(items) => Value::Array(items.into_iter().map(lists).collect()),
        scalar => scalar,
    }
}

/// What may be left out: that a file is a file; and how an image is encrypted, which its header says
/// (images with the other method are opened in no emulator).
fn complete(options: &mut Map<String, Value>) {
    if let Some(Value::Object(file)) = options.get_mut("file")
        && file.contains_key("filename")
    {
        file.entry("driver").or_insert_with(|| "file".into());
    }
    if options.get("driver").and_then(Value::as_str) == Some("qcow2")
        && let Some(Value::Object(encrypt)) = options.get_mut("encrypt")
    {
        encrypt.entry("format").or_insert_with(|| "luks".into());
    }
}

#[cfg(test)]
#[path = "json_name_test.rs"]
mod tests;
