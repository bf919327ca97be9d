//! The definitions as data and as text: `query-qmp-schema`, and the reference of `--help-qmp`.
//!
//! Owns: the schema's wire form (`SchemaInfo` of QEMU's `qapi/introspect.json`). Never: any one
//! command or type. Threads: control, or main before there is a VM. Locks: none.

use super::event::EVENTS;
use super::schema::{self, Command, Def, Member, Ty, Value};
use crate::error::{Error, Result};
use serde_json::json;
use std::collections::HashMap;
use std::fmt::Write;

/// All that `query-qmp-schema` lists: commands, events, then the types they use.
pub fn schema() -> Vec<Value> {
    let mut s = Schema { out: Vec::new(), numbers: HashMap::new(), todo: Vec::new(), next: 0 };
    for (name, c) in schema::names() {
        let (arg, ret) = (s.name(&c.args), s.name(&c.returns));
        let mut entry = json!({ "meta-type": "command", "name": name, "arg-type": arg, "ret-type": ret });
        if c.oob.is_some() {
            entry["allow-oob"] = Value::Bool(true);
        }
        s.out.push(entry);
    }
    for e in EVENTS {
        let arg = s.name(&e.data);
        s.out.push(json!({ "meta-type": "event", "name": e.name, "arg-type": arg }));
    }
    for ty in schema::BUILTINS {
        s.name(ty);
    }
    while let Some((name, ty)) = s.todo.pop() {
        s.define(name, &ty);
    }
    s.out
}

struct Schema {
    out: Vec<Value>,
    /// Rust name of a type → name in the schema.
    numbers: HashMap<String, String>,
    todo: Vec<(String, Ty)>,
    next: usize,
}

impl Schema {
    /// The name of a type in the schema; sees to it that the type is defined.
    fn name(&mut self, ty: &Ty) -> String {
        let key = match ty {
            Ty::Builtin(name, _) => name.to_string(),
            Ty::Array(of) => format!("[{}]", self.name(of)),
            Ty::Named(name, _) => format!("{name} "),
        };
        if let Some(name) = self.numbers.get(&key) {
            return name.clone();
        }
        let name = match ty {
            Ty::Builtin(..) | Ty::Array(_) => key.clone(),
            // Names of types are hidden, as QEMU does: clients must not depend on them.
            Ty::Named(..) => {
                self.next += 1;
                (self.next - 1).to_string()
            }
        };
        self.numbers.insert(key, name.clone());
        self.todo.push((name.clone(), *ty));
        name
    }

    fn member(&mut self, m: &Member) -> Value {
        let mut v = json!({ "name": m.name, "type": self.name(&m.ty) });
        if m.optional {
            v["default"] = Value::Null;
        }
        v
    }

    fn define(&mut self, name: String, ty: &Ty) {
        let entry = match ty {
            Ty::Builtin(_, json) => json!({ "meta-type": "builtin", "name": name, "json-type": json }),
            Ty::Array(of) => {
                json!({ "meta-type": "array", "name": name, "element-type": self.name(of) })
            }
            Ty::Named(_, def) => match def() {
                Def::Enum(words) => json!({
                    "meta-type": "enum",
                    "name": name,
                    "values": words.iter().map(|w| w.name).collect::<Vec<_>>(),
                    "members": words.iter().map(|w| json!({ "name": w.name })).collect::<Vec<_>>(),
                }),
                Def::Object(members) => {
                    let members: Vec<_> = members.iter().map(|m| self.member(m)).collect();
                    json!({ "meta-type": "object", "name": name, "members": members })
                }
                Def::Union { members, tag, variants } => {
                    let members: Vec<_> = members.iter().map(|m| self.member(m)).collect();
                    let variants: Vec<_> = variants
                        .iter()
                        .map(|(case, ty)| json!({ "case": case, "type": self.name(ty) }))
                        .collect();
                    json!({ "meta-type": "object", "name": name, "members": members,
                            "tag": tag, "variants": variants })
                }
                Def::Alternate(branches) => {
                    let members: Vec<_> = branches.iter().map(|b| json!({ "type": self.name(b) })).collect();
                    json!({ "meta-type": "alternate", "name": name, "members": members })
                }
            },
        };
        self.out.push(entry);
    }
}

/// The reference text of one command, or of all commands and events.
pub fn help(command: Option<&str>) -> Result<String> {
    let mut out = String::new();
    match command {
        Some(name) => match (schema::find(name), EVENTS.iter().find(|e| e.name == name)) {
            (Some(c), _) => command_help(&mut out, c),
            (None, Some(e)) => entry_help(&mut out, e.name, &[], e.doc, &e.data, None),
            (None, None) => {
                return Err(Error::new(format!(
                    "there is no command or event '{name}'; --help-qmp alone lists them all"
                )));
            }
        },
        None => {
            out.push_str("COMMANDS\n\n");
            let mut all: Vec<_> = schema::names().filter(|(name, c)| *name == c.name).collect();
            all.sort_by_key(|(name, _)| *name);
            all.iter().for_each(|(_, c)| command_help(&mut out, c));
            out.push_str("EVENTS\n\n");
            for e in EVENTS {
                entry_help(&mut out, e.name, &[], e.doc, &e.data, None);
            }
        }
    }
    Ok(out)
}

fn command_help(out: &mut String, c: &Command) {
    entry_help(out, c.name, c.aliases, c.doc, &c.args, Some(&c.returns));
}

// Writing to a String cannot fail, so the results below are not looked at.
fn entry_help(out: &mut String, name: &str, also: &[&str], doc: &[&str], data: &Ty, returns: Option<&Ty>) {
    let _ = write!(out, "{name}");
    for alias in also {
        let _ = write!(out, ", {alias}");
    }
    out.push('\n');
    for line in doc {
        let _ = writeln!(out, "   {line}");
    }
    let mut explained = Vec::new();
    type_help(out, data, 4, &mut explained);
    if let Some(returns) = returns.filter(|r| !is_empty(r)) {
        let _ = writeln!(out, "    Returns {}:", describe(returns));
        type_help(out, returns, 6, &mut explained);
    }
    out.push('\n');
}

fn is_empty(ty: &Ty) -> bool {
    matches!(ty, Ty::Named(_, def) if matches!(def(), Def::Object(members) if members.is_empty()))
}

/// `array of BlockInfo`
fn describe(ty: &Ty) -> String {
    match ty {
        Ty::Builtin("str", _) => "string".to_string(),
        Ty::Builtin(name, _) | Ty::Named(name, _) => name.to_string(),
        Ty::Array(of) => format!("array of {}", describe(of)),
    }
}

/// Appends `line` and `words`, over several lines of at most 100 columns.
fn wrap(out: &mut String, mut line: String, words: impl Iterator<Item = &'static str>, indent: usize) {
    for word in words {
        if line.chars().count() + 1 + word.chars().count() > 100 {
            let _ = writeln!(out, "{line}");
            line = " ".repeat(indent - 1);
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}

/// The members of a type, and of the types of these, each type once.
fn type_help(out: &mut String, ty: &Ty, indent: usize, explained: &mut Vec<&'static str>) {
    let (name, def) = match ty {
        Ty::Builtin(..) => return,
        Ty::Array(of) => return type_help(out, of, indent, explained),
        Ty::Named(name, def) => (*name, def()),
    };
    if explained.contains(&name) {
        return;
    }
    explained.push(name);
    let pad = " ".repeat(indent);
    match def {
        Def::Enum(words) => {
            let words: Vec<_> = words.iter().map(|w| w.name).collect();
            let _ = writeln!(out, "{pad}one of {}", words.join(", "));
        }
        Def::Object(members) => members_help(out, &members, indent, explained),
        Def::Union { members, tag, variants } => {
            members_help(out, &members, indent, explained);
            let mut left = &variants[..];
            while let Some((first, ty)) = left.first() {
                // Neighbours with the same members are explained together.
                let same = left.iter().take_while(|v| describe(&v.1) == describe(ty)).count();
                let words: Vec<_> = left[..same].iter().map(|v| v.0).collect();
                left = &left[same..];
                if is_empty(ty) {
                    continue;
                }
                let known = matches!(ty, Ty::Named(name, _) if explained.contains(name));
                if known {
                    let _ = writeln!(out, "{pad}with {tag} {first}: the members of {}", describe(ty));
                } else {
                    let _ = writeln!(out, "{pad}with {tag} {}:", words.join(" or "));
                    type_help(out, ty, indent + 2, explained);
                }
            }
        }
        Def::Alternate(branches) => {
            let names: Vec<_> = branches.iter().map(describe).collect();
            let _ = writeln!(out, "{pad}one of {}", names.join(", "));
            branches.iter().for_each(|b| type_help(out, b, indent + 2, explained));
        }
    }
}

fn members_help(out: &mut String, members: &[Member], indent: usize, explained: &mut Vec<&'static str>) {
    let pad = " ".repeat(indent);
    for m in members {
        let optional = if m.optional { ", optional" } else { "" };
        let head = format!("{pad}{} ({}{optional}):", m.name, describe(&m.ty));
        let words = m.doc.iter().flat_map(|l| l.split_whitespace());
        wrap(out, head, words, indent + 4);
        type_help(out, &m.ty, indent + 4, explained);
    }
}
