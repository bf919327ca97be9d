//! A TOML document as a tree in which every part knows its place, and overrides from the command
//! line merged into it.
//!
//! Owns: text and places, and how a place is shown. Never: knows which tables exist. Threads: main.
//! Locks: none.

use serde_json::{Map, Number, Value};
use std::fmt;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where something was written: a byte range of one of the [`Sources`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    source: usize,
    range: Range<usize>,
}

/// The texts that a configuration comes from: the file first, then each `--set`.
#[derive(Clone, Debug)]
pub struct Sources {
    texts: Vec<String>,
    /// As shown: the file's name as the user gave it.
    file: String,
}

/// What is wrong, and where.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Where; none for the configuration as a whole.
    pub at: Option<Place>,
    /// What, and what to do.
    pub text: String,
}

impl Fault {
    /// A fault at a place.
    pub fn new(at: &Place, text: impl Into<String>) -> Fault {
        Fault { at: Some(at.clone()), text: text.into() }
    }
}

impl Sources {
    /// The file's text, and the name to show for it.
    pub fn new(file: impl Into<String>, text: impl Into<String>) -> Sources {
        Sources { texts: vec![text.into()], file: file.into() }
    }

    /// `config.toml:12:3`, or `--set 'machine.name="x"'`.
    pub fn show(&self, at: &Place) -> String {
        let text = &self.texts[at.source];
        if at.source > 0 {
            return format!("--set '{text}'");
        }
        let before = text.get(..at.range.start.min(text.len())).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        format!("{}:{line}:{column}", self.file)
    }

    /// The line that the user reads.
    pub fn message(&self, fault: &Fault) -> String {
        match &fault.at {
            Some(at) => format!("{}: {}", self.show(at), fault.text),
            None => format!("{}: {}", self.file, fault.text),
        }
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub struct Item {
    /// The value itself; for a `[table]` its header.
    pub at: Place,
    /// What it is.
    pub node: Node,
}

/// A value.
#[derive(Clone, Debug)]
pub enum Node {
    /// true, false
    Bool(bool),
    /// An integer of TOML's range, or up to that of an unsigned 64-bit one.
    Int(i128),
    /// A finite float.
    Float(f64),
    /// A string.
    Str(String),
    /// An array, of tables also.
    Array(Vec<Item>),
    /// A table.
    Table(Vec<Member>),
}

/// A member of a table.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub key: String,
    /// Where the name stands.
    pub at: Place,
    /// Its value.
    pub item: Item,
}

impl Node {
    /// What a person calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Node::Bool(_) => "a boolean",
            Node::Int(_) => "an integer",
            Node::Float(_) => "a float",
            Node::Str(_) => "a string",
            Node::Array(_) => "an array",
            Node::Table(_) => "a table",
        }
    }
}

impl Item {
    /// The JSON value of the same meaning.
    pub fn json(&self) -> Value {
        match &self.node {
            Node::Bool(b) => Value::Bool(*b),
            Node::Int(i) => i64::try_from(*i)
                .map(Value::from)
                .or_else(|_| u64::try_from(*i).map(Value::from))
                .unwrap_or(Value::Null),
            Node::Float(f) => Number::from_f64(*f).map_or(Value::Null, Value::Number),
            Node::Str(s) => Value::String(s.clone()),
            Node::Array(items) => items.iter().map(Item::json).collect(),
            Node::Table(members) => Value::Object(json_members(members)),
        }
    }

    /// The place of the member that a path as QMP's messages write it (`file.filename`,
    /// `keys[0].data`) leads to, or of what comes nearest above it.
    pub fn place_of(&self, path: &str) -> &Place {
        let mut best = &self.at;
        let mut item = self;
        for step in path.split(['.', '[']).map(|s| s.trim_end_matches(']')) {
            match &item.node {
                Node::Table(members) => match members.iter().find(|m| m.key == step) {
                    Some(m) => (best, item) = (&m.at, &m.item),
                    None => break,
                },
                Node::Array(items) => match step.parse().ok().and_then(|n: usize| items.get(n)) {
                    Some(i) => (best, item) = (&i.at, i),
                    None => break,
                },
                _ => break,
            }
        }
        best
    }
}

/// The JSON object of the same meaning.
pub fn json_members(members: &[Member]) -> Map<String, Value> {
    members.iter().map(|m| (m.key.clone(), m.item.json())).collect()
}

/// Reads the file's text (the first of `sources`).
pub fn parse(sources: &Sources) -> Result<Item, Fault> {
    parse_source(sources, 0)
}

fn parse_source(sources: &Sources, source: usize) -> Result<Item, Fault> {
    let text = &sources.texts[source];
    let whole = Place { source, range: 0..0 };
    // The parser refuses what nests more than 80 deep, in dotted keys also: recursion is safe.
    let table = DeTable::parse(text).map_err(|e| {
        let range = e.span().unwrap_or(0..0);
        Fault::new(&Place { source, range }, format!("not TOML: {}", e.message().replace('\n', "; ")))
    })?;
    Ok(Item { at: whole, node: Node::Table(members(table.get_ref(), source)?) })
}

fn members(table: &DeTable<'_>, source: usize) -> Result<Vec<Member>, Fault> {
    table
        .iter()
        .map(|(key, value)| {
            let at = Place { source, range: key.span() };
            Ok(Member { key: key.get_ref().to_string(), at, item: item(value, source)? })
        })
        .collect()
}

fn item(value: &Spanned<DeValue<'_>>, source: usize) -> Result<Item, Fault> {
    let at = Place { source, range: value.span() };
    let node = match value.get_ref() {
        DeValue::String(s) => Node::Str(s.to_string()),
        DeValue::Boolean(b) => Node::Bool(*b),
        DeValue::Integer(i) => match i128::from_str_radix(i.as_str(), i.radix()) {
            Ok(n) if (i64::MIN as i128..=u64::MAX as i128).contains(&n) => Node::Int(n),
            _ => return Err(Fault::new(&at, "the number is too large")),
        },
        DeValue::Float(f) => match f.as_str().parse::<f64>() {
            Ok(n) if n.is_finite() => Node::Float(n),
            _ => return Err(Fault::new(&at, "not a finite number")),
        },
        DeValue::Datetime(_) => return Err(Fault::new(&at, "a date has no use here")),
        DeValue::Array(a) => Node::Array(a.iter().map(|v| item(v, source)).collect::<Result<_, _>>()?),
        DeValue::Table(t) => Node::Table(members(t, source)?),
    };
    Ok(Item { at, node })
}

/// Merges `KEY = VALUE` of a `--set` into the tree. Parts of the key name members, or elements of an
/// array: by index (one past the last adds one), or by their `id` or `node-name`. `arrays` are the
/// names at the top that stand for arrays of tables, also while there is none.
pub fn set(root: &mut Item, sources: &mut Sources, text: &str, arrays: &[&str]) -> Result<(), Fault> {
    sources.texts.push(text.to_string());
    let source = sources.texts.len() - 1;
    let new = parse_source(sources, source).map_err(|mut f| {
        let shape = "expected KEY=VALUE in TOML, where a string needs quotes: 'machine.name=\"vm7\"'";
        f.text = format!("{shape} ({})", f.text);
        f
    })?;
    let empty = matches!(&new.node, Node::Table(m) if m.is_empty());
    if empty {
        return Err(Fault::new(&new.at, "sets nothing; expected KEY=VALUE"));
    }
    if let (Node::Table(news), Node::Table(olds)) = (&new.node, &mut root.node) {
        for m in news {
            let absent = !olds.iter().any(|o| o.key == m.key);
            if absent && arrays.contains(&m.key.as_str()) && matches!(m.item.node, Node::Table(_)) {
                let item = Item { at: m.item.at.clone(), node: Node::Array(Vec::new()) };
                olds.push(Member { key: m.key.clone(), at: m.at.clone(), item });
            }
        }
    }
    merge(root, new)
}

fn merge(old: &mut Item, new: Item) -> Result<(), Fault> {
    match (&mut old.node, new.node) {
        (Node::Table(olds), Node::Table(news)) => {
            for m in news {
                match olds.iter_mut().find(|o| o.key == m.key) {
                    Some(o) => {
                        if !matches!(m.item.node, Node::Table(_)) {
                            o.at = m.at;
                        }
                        merge(&mut o.item, m.item)?;
                    }
                    None => olds.push(m),
                }
            }
        }
        (Node::Array(items), Node::Table(news)) => {
            for m in news {
                let named = |i: &Item| match &i.node {
                    Node::Table(t) => t.iter().any(|x| {
                        (x.key == "id" || x.key == "node-name")
                            && matches!(&x.item.node, Node::Str(s) if *s == m.key)
                    }),
                    _ => false,
                };
                let index = m.key.parse().ok().or_else(|| items.iter().position(named));
                match index {
                    Some(n) if n < items.len() => merge(&mut items[n], m.item)?,
                    Some(n) if n == items.len() => items.push(m.item),
                    Some(_) => {
                        let text = format!("there is no element {}: the array has {}", m.key, items.len());
                        return Err(Fault::new(&m.at, text));
                    }
                    None => {
                        let text = format!("no element has index, id or node-name '{}'", m.key);
                        return Err(Fault::new(&m.at, text));
                    }
                }
            }
        }
        (_, node) => *old = Item { at: new.at, node },
    }
    Ok(())
}

/// A table at the top, or an element of an array of tables.
#[derive(Clone, Debug)]
pub struct Top {
    /// The table's name.
    pub key: String,
    /// Its members.
    pub item: Item,
    /// True for an element of an array.
    pub element: bool,
}

/// What a configuration consists of, in the order of the text.
pub fn tops(root: Item) -> Vec<Top> {
    let Node::Table(members) = root.node else { return Vec::new() };
    let mut all = Vec::new();
    for Member { key, item, .. } in members {
        match item.node {
            Node::Array(items) => {
                all.extend(items.into_iter().map(|item| Top { key: key.clone(), item, element: true }));
            }
            _ => all.push(Top { key, item, element: false }),
        }
    }
    // Elements that a --set added come last, in the order of the options.
    all.sort_by_key(|t| (t.item.at.source, t.item.at.range.start));
    all
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
