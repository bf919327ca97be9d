//! The configuration: a TOML file (and `--set` overrides) to typed tables and to QMP arguments.
//!
//! Owns: reading, and the checks that need nothing but the text: keys, types, duplicate names.
//! Never: opens, makes or changes anything. Threads: main. Locks: none.

use crate::config_tables;
use crate::config_tree::{self, Fault, Item, Node, Place, Sources, Top};
use crate::control::vm::Settings;
use serde_json::{Map, Value};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A configuration file may not be longer, in bytes.
const MAX_SIZE: u64 = 4 << 20;

/// Everything that the file says.
#[derive(Debug)]
pub struct Config {
    /// For messages.
    pub sources: Sources,
    /// `[machine]`
    pub settings: Settings,
    /// Where its `memory` stands.
    pub memory_at: Option<Place>,
    /// `[boot]`
    pub boot: Option<Boot>,
    /// `[[qmp]]`
    pub qmp: Vec<Qmp>,
    /// `[[serial]]`
    pub serial: Vec<Serial>,
    /// The tables that are arguments of a command, in the order of the file.
    pub tables: Vec<Table>,
}

/// `[boot]`: what the processors run.
#[derive(Clone, Debug)]
pub struct Boot {
    /// bzImage or ELF.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where `kernel` stands.
    pub kernel_at: Place,
    /// Where `initrd` stands.
    pub initrd_at: Place,
}

/// `[[qmp]]`: a monitor.
#[derive(Clone, Debug)]
pub struct Qmp {
    /// Where it talks.
    pub end: QmpEnd,
    /// Replies over several lines.
    pub pretty: bool,
    /// Where its end is named.
    pub at: Place,
}

/// Where a monitor talks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpEnd {
    /// A Unix socket to listen on.
    Socket(PathBuf),
    /// An inherited descriptor: a connected or listening socket.
    Fd(i32),
    /// Standard input and output.
    Stdio,
    /// `ADDRESS:PORT` to listen on.
    Tcp(String),
}

/// `[[serial]]`: a serial port.
#[derive(Clone, Debug)]
pub struct Serial {
    /// Its other end.
    pub end: SerialEnd,
    /// Where the table stands.
    pub at: Place,
}

/// The other end of a serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialEnd {
    /// Standard input and output.
    Stdio,
    /// A file that output is written to.
    File(PathBuf),
}

/// Which command a table is the arguments of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[[object]]`: `object-add`
    Object,
    /// `[[blockdev]]`: `blockdev-add`
    Blockdev,
    /// `[[drive]]`: `-drive`
    Drive,
    /// `[[device]]`: `device_add`
    Device,
    /// `[[netdev]]`: `netdev_add`
    Netdev,
    /// `[[fdset]]`: `-add-fd`
    Fdset,
    /// `[nbd-server]`: `nbd-server-start`
    NbdServer,
    /// `[[export]]`: `block-export-add`
    Export,
}

impl Kind {
    /// As it stands in the file.
    pub fn header(self) -> &'static str {
        match self {
            Kind::Object => "[[object]]",
            Kind::Blockdev => "[[blockdev]]",
            Kind::Drive => "[[drive]]",
            Kind::Device => "[[device]]",
            Kind::Netdev => "[[netdev]]",
            Kind::Fdset => "[[fdset]]",
            Kind::NbdServer => "[nbd-server]",
            Kind::Export => "[[export]]",
        }
    }
}

/// A table that is a command's arguments.
#[derive(Clone, Debug)]
pub struct Table {
    /// Which command.
    pub kind: Kind,
    /// The arguments, relative paths resolved.
    pub arguments: Map<String, Value>,
    /// The same with places.
    pub item: Item,
}

impl Table {
    /// The fault that an error of the command is, placed at the argument that it names, or whose
    /// value it quotes.
    pub fn fault(&self, error: &str) -> Fault {
        let header = self.kind.header();
        let (name, mut text) = named(error);
        // A device's properties are named with its model: 'virtio-blk-pci.drive'.
        let driver = self.arguments.get("driver").and_then(Value::as_str).unwrap_or("");
        let strip = |n| str::strip_prefix(n, driver).and_then(|n| n.strip_prefix('.')).unwrap_or(n);
        let mut at = name.map_or(&self.item.at, |name| self.item.place_of(strip(name)));
        if self.kind == Kind::Drive && name == Some("driver") && !self.arguments.contains_key("driver") {
            // It was written as 'format'.
            at = self.item.place_of("format");
            text = text.replacen("'driver'", "'format'", 1);
        }
        if *at == self.item.at {
            let mut best = 0;
            quoted(&self.item, error, &mut best, &mut at);
        }
        // What is wrong inside an image: its name says which.
        if *at == self.item.at
            && !error.contains('\'')
            && let Some((place, file)) = self.image()
        {
            at = place;
            text = format!("'{file}': {text}");
        }
        if error == "Block node is read-only" {
            text += " (give it write permission, or say read-only = true)";
        }
        Fault::new(at, format!("{header} {text}"))
    }
}

impl Table {
    /// The image's name, and where it stands.
    fn image(&self) -> Option<(&Place, &str)> {
        let mut item = &self.item;
        // Deeper nesting than that has a name of its own in the message, or none.
        for _ in 0..4 {
            let Node::Table(members) = &item.node else { return None };
            let m = members.iter().find(|m| m.key == "file" || m.key == "filename")?;
            match &m.item.node {
                Node::Str(s) => return Some((&m.at, s)),
                _ => item = &m.item,
            }
        }
        None
    }
}

/// The argument that an error of QMP's kind is about, and the error in our words.
fn named(error: &str) -> (Option<&str>, String) {
    for prefix in ["Parameter '", "Property '", "Invalid parameter '", "'"] {
        if let Some((name, rest)) = error.strip_prefix(prefix).and_then(|r| r.split_once('\'')) {
            return (Some(name), format!("'{name}'{rest}"));
        }
    }
    let types =
        error.strip_prefix("Invalid parameter type for '").and_then(|r| r.split_once("', expected: "));
    match types {
        Some((name, want)) => (Some(name), format!("'{name}' must be of type {want}")),
        None => (None, error.to_string()),
    }
}

/// Finds the member with the longest string that `error` quotes (as it is, or as the end of a path).
fn quoted<'a>(item: &'a Item, error: &str, best: &mut usize, at: &mut &'a Place) {
    let Node::Table(members) = &item.node else { return };
    for m in members {
        match &m.item.node {
            Node::Str(s) if s.len() > *best => {
                if [format!("'{s}'"), format!("/{s}'")].iter().any(|q| error.contains(q)) {
                    (*best, *at) = (s.len(), &m.at);
                }
            }
            _ => quoted(&m.item, error, best, at),
        }
    }
}

impl Config {
    /// Reads `file` (`-`: standard input) and the overrides. The error is a line for the user.
    pub fn read(file: &Path, sets: &[String]) -> Result<Config, String> {
        let shown = if file == Path::new("-") { "<stdin>".into() } else { file.display().to_string() };
        let text = read_text(file).map_err(|e| format!("{shown}: {e}"))?;
        // Relative paths are relative to the file; standard input has no place of its own.
        let dir = match file.parent() {
            Some(dir) if file != Path::new("-") => dir.to_path_buf(),
            _ => PathBuf::new(),
        };
        Config::parse(&shown, &text, &dir, sets)
    }

    /// The configuration that `text` and the overrides make; `shown` is its name in messages.
    pub fn parse(shown: &str, text: &str, dir: &Path, sets: &[String]) -> Result<Config, String> {
        let mut sources = Sources::new(shown, text);
        let mut read = || -> Result<Parts, Fault> {
            let mut root = config_tree::parse(&sources)?;
            for text in sets {
                config_tree::set(&mut root, &mut sources, text, config_tables::ARRAYS)?;
            }
            config_tables::read(config_tree::tops(root), dir, &sources)
        };
        match read() {
            Ok(p) => {
                let Parts { settings, memory_at, boot, qmp, serial, tables } = p;
                Ok(Config { sources, settings, memory_at, boot, qmp, serial, tables })
            }
            Err(fault) => Err(sources.message(&fault)),
        }
    }
}

/// A [`Config`] without its text.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub settings: Settings,
    pub memory_at: Option<Place>,
    pub boot: Option<Boot>,
    pub qmp: Vec<Qmp>,
    pub serial: Vec<Serial>,
    pub tables: Vec<Table>,
}

fn read_text(file: &Path) -> Result<String, String> {
    // Room for most of them: each read beyond is a system call.
    let mut bytes = Vec::with_capacity(8192);
    let explain = |e: std::io::Error| crate::error::strerror(&e);
    if file == Path::new("-") {
        std::io::stdin().lock().take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(explain)?;
    } else {
        let file = std::fs::File::open(file).map_err(explain)?;
        file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(explain)?;
    }
    if bytes.len() as u64 > MAX_SIZE {
        return Err("too long for a configuration (4 MiB at most)".into());
    }
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        format!("line {line}: not UTF-8")
    })
}

/// Every member that has a name which must be unique: its table's kind, the name, and its place.
pub(crate) fn names(top: &Top) -> Vec<(&'static str, String, Place)> {
    let mut all = Vec::new();
    // An export names a node that is there.
    if top.key != "export" {
        collect(&top.item, "node-name", "node-name", &mut all);
    }
    if top.key == "qmp"
        && let Node::Table(members) = &top.item.node
    {
        for m in members.iter().filter(|m| m.key == "socket") {
            if let Node::Str(s) = &m.item.node {
                all.push(("socket", s.clone(), m.item.at.clone()));
            }
        }
    }
    let space = match top.key.as_str() {
        "object" => "object id",
        "drive" => "drive id",
        "device" => "device id",
        "netdev" => "netdev id",
        "export" => "export id",
        _ => return all,
    };
    if let Node::Table(members) = &top.item.node
        && let Some(m) = members.iter().find(|m| m.key == "id")
        && let Node::Str(s) = &m.item.node
    {
        all.push((space, s.clone(), m.item.at.clone()));
    }
    all
}

fn collect(item: &Item, key: &str, space: &'static str, all: &mut Vec<(&'static str, String, Place)>) {
    match &item.node {
        Node::Table(members) => {
            for m in members {
                match &m.item.node {
                    Node::Str(s) if m.key == key => {
                        all.push((space, s.clone(), m.item.at.clone()));
                    }
                    _ => collect(&m.item, key, space, all),
                }
            }
        }
        Node::Array(items) => items.iter().for_each(|i| collect(i, key, space, all)),
        _ => {}
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
