//! The tables of the configuration: which there are, their members and types.
//!
//! Owns: the list of tables, and what is checked of each without looking at anything else. Never:
//! opens or makes anything. Threads: main. Locks: none.

use crate::config::{Boot, Kind, Parts, Qmp, QmpEnd, Serial, SerialEnd, Table, names};
use crate::config_tree::{Fault, Item, Member, Node, Place, Sources, Top};
use crate::control::vm::{RebootAction, Settings, ShutdownAction};
use crate::machine::Accel;
use crate::machine::cpu::Topology;
use crate::machine::layout::{CPUS_MAX, MEMORY_MIN};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The names of arrays of tables.
pub(crate) const ARRAYS: &[&str] =
    &["qmp", "serial", "object", "blockdev", "drive", "device", "netdev", "fdset", "export"];

/// The names of tables.
const TABLES: &[&str] = &["machine", "boot", "nbd-server"];

/// Reads the tables, in the order of the file.
pub(crate) fn read(tops: Vec<Top>, dir: &Path, sources: &Sources) -> Result<Parts, Fault> {
    let mut parts = Parts::default();
    let mut taken: BTreeMap<(&'static str, String), Place> = BTreeMap::new();
    for t in &tops {
        let array = ARRAYS.contains(&t.key.as_str());
        if !array && !TABLES.contains(&t.key.as_str()) {
            let known: Vec<_> = TABLES.iter().chain(ARRAYS).copied().collect();
            let text = format!("unknown table '{}' (there are: {})", t.key, known.join(", "));
            return Err(Fault::new(&t.item.at, text));
        }
        if !matches!(t.item.node, Node::Table(_)) || t.element != array {
            return Err(Fault::new(&t.item.at, format!("'{}' must be written as {}", t.key, header(&t.key))));
        }
        for (space, name, at) in names(t) {
            if let Some(first) = taken.insert((space, name.clone()), at.clone()) {
                let first = sources.show(&first);
                let header = header(&t.key);
                let key = space.split(' ').next_back().unwrap_or(space);
                let text = format!("{header} '{key}': the {space} '{name}' is taken already, at {first}");
                return Err(Fault::new(&at, text));
            }
        }
    }
    for t in tops {
        match t.key.as_str() {
            "machine" => {
                parts.settings = machine(Reader::new("[machine]", &t.item, dir))?;
                parts.memory_at = Some(t.item.place_of("memory").clone());
            }
            "boot" => parts.boot = Some(boot(Reader::new("[boot]", &t.item, dir))?),
            "qmp" => parts.qmp.push(qmp(Reader::new("[[qmp]]", &t.item, dir))?),
            "serial" => parts.serial.push(serial(Reader::new("[[serial]]", &t.item, dir))?),
            "object" => parts.tables.push(table(Kind::Object, t.item, dir)),
            "blockdev" => parts.tables.push(table(Kind::Blockdev, t.item, dir)),
            "drive" => parts.tables.push(table(Kind::Drive, t.item, dir)),
            "device" => parts.tables.push(table(Kind::Device, t.item, dir)),
            "netdev" => parts.tables.push(table(Kind::Netdev, t.item, dir)),
            "nbd-server" => parts.tables.push(table(Kind::NbdServer, t.item, dir)),
            "export" => parts.tables.push(table(Kind::Export, t.item, dir)),
            _ => parts.tables.push(table(Kind::Fdset, t.item, dir)),
        }
    }
    stdio_once(&parts)?;
    Ok(parts)
}

fn header(key: &str) -> String {
    if ARRAYS.contains(&key) { format!("[[{key}]]") } else { format!("[{key}]") }
}

fn stdio_once(parts: &Parts) -> Result<(), Fault> {
    let qmp = parts.qmp.iter().filter(|q| q.end == QmpEnd::Stdio).map(|q| &q.at);
    let serial = parts.serial.iter().filter(|s| s.end == SerialEnd::Stdio).map(|s| &s.at);
    match qmp.chain(serial).nth(1) {
        Some(at) => Err(Fault::new(at, "'stdio' has one user: another table has it already")),
        None => Ok(()),
    }
}

fn table(kind: Kind, item: Item, dir: &Path) -> Table {
    let mut arguments = match item.json() {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    match kind {
        Kind::Blockdev => {
            resolve(&mut arguments, "filename", dir);
            // JSON has a null, TOML has not: no backing file is written as "".
            null_backing(&mut arguments);
        }
        Kind::Drive => {
            resolve(&mut arguments, "filename", dir);
            null_backing(&mut arguments);
            if let Some(Value::String(s)) = arguments.get_mut("file") {
                *s = relative_to(dir, s);
            }
        }
        Kind::Object => {
            if let Some(Value::String(s)) = arguments.get_mut("file") {
                *s = relative_to(dir, s);
            }
        }
        Kind::NbdServer => resolve(&mut arguments, "path", dir),
        Kind::Device | Kind::Netdev | Kind::Fdset | Kind::Export => {}
    }
    Table { kind, arguments, item }
}

/// `name` as seen from `dir`, unless it is absolute or has a protocol before it (`nbd:…`).
fn relative_to(dir: &Path, name: &str) -> String {
    let protocol = name.split_once(':').is_some_and(|(p, _)| !p.contains('/'));
    if name.is_empty() || protocol || dir.as_os_str().is_empty() {
        return name.to_string();
    }
    dir.join(name).to_string_lossy().into_owned()
}

fn resolve(map: &mut Map<String, Value>, key: &str, dir: &Path) {
    for (name, value) in map.iter_mut() {
        match value {
            Value::String(s) if name == key => *s = relative_to(dir, s),
            Value::Object(inner) => resolve(inner, key, dir),
            Value::Array(items) => {
                items.iter_mut().filter_map(Value::as_object_mut).for_each(|m| resolve(m, key, dir));
            }
            _ => {}
        }
    }
}

fn null_backing(map: &mut Map<String, Value>) {
    for (name, value) in map.iter_mut() {
        match value {
            Value::String(s) if name == "backing" && s.is_empty() => *value = Value::Null,
            Value::Object(inner) => null_backing(inner),
            _ => {}
        }
    }
}

fn machine(mut r: Reader) -> Result<Settings, Fault> {
    let d = Settings::default();
    let name = r.string("name")?;
    let uuid = match r.string("uuid")? {
        Some(s) => parse_uuid(&s)
            .ok_or_else(|| r.fault("uuid", "expects a UUID (550e8400-e29b-41d4-a716-446655440000)"))?,
        None => d.uuid,
    };
    let memory = r.size("memory")?.unwrap_or(d.memory);
    if memory < MEMORY_MIN || memory % 4096 != 0 {
        let text = format!("must be at least {}M, and a multiple of 4K", MEMORY_MIN >> 20);
        return Err(r.fault("memory", &text));
    }
    let part = |r: &mut Reader, key| -> Result<Option<u32>, Fault> {
        Ok(r.int(key, 1..=CPUS_MAX as i64)?.map(|n| n as u32))
    };
    let cpus = part(&mut r, "cpus")?;
    let max_cpus = part(&mut r, "max-cpus")?;
    let (sockets, cores, threads) =
        (part(&mut r, "sockets")?, part(&mut r, "cores")?, part(&mut r, "threads")?);
    let given = sockets.unwrap_or(1) * cores.unwrap_or(1) * threads.unwrap_or(1);
    let max = max_cpus.or(cpus.map(|c| c.max(given))).unwrap_or(given);
    let cpus = cpus.unwrap_or(max);
    if cpus > max {
        return Err(r.fault("max-cpus", &format!("must be at least 'cpus' ({cpus})")));
    }
    let topology = Topology::new(max, sockets, cores, threads).map_err(|e| {
        let keys = ["max-cpus", "sockets", "cores", "threads", "cpus"];
        let key = keys.into_iter().find(|k| r.has(k)).unwrap_or("cpus");
        r.fault(key, &format!("does not fit: {e}"))
    })?;
    let accel = r.word("accel", &[("kvm", Accel::Kvm), ("none", Accel::None)])?.unwrap_or(d.accel);
    let paused = r.boolean("paused")?.unwrap_or(d.paused);
    let reboot = r.word("reboot", &[("reset", RebootAction::Reset), ("shutdown", RebootAction::Shutdown)])?;
    let shutdown =
        r.word("shutdown", &[("poweroff", ShutdownAction::Poweroff), ("pause", ShutdownAction::Pause)])?;
    r.finish()?;
    Ok(Settings {
        name,
        uuid,
        memory,
        topology: topology.with_present(cpus),
        accel,
        paused,
        reboot: reboot.unwrap_or(d.reboot),
        shutdown: shutdown.unwrap_or(d.shutdown),
    })
}

fn boot(mut r: Reader) -> Result<Boot, Fault> {
    let kernel = r.path("kernel")?;
    let initrd = r.path("initrd")?;
    let cmdline = r.string("cmdline")?.unwrap_or_default();
    if cmdline.contains('\0') {
        return Err(r.fault("cmdline", "must not contain a NUL"));
    }
    let Some(kernel) = kernel else {
        return Err(r.missing("kernel"));
    };
    let (kernel_at, initrd_at) = (r.place("kernel").clone(), r.place("initrd").clone());
    r.finish()?;
    Ok(Boot { kernel, initrd, cmdline, kernel_at, initrd_at })
}

fn qmp(mut r: Reader) -> Result<Qmp, Fault> {
    let ends = [
        r.path("socket")?.map(QmpEnd::Socket),
        r.int("fd", 0..=i64::from(i32::MAX))?.map(|n| QmpEnd::Fd(n as i32)),
        r.boolean("stdio")?.filter(|&b| b).map(|_| QmpEnd::Stdio),
        r.string("tcp")?.map(QmpEnd::Tcp),
    ];
    let end = r.one_of(ends, "'socket', 'fd', 'stdio = true' or 'tcp'")?;
    if let QmpEnd::Tcp(addr) = &end
        && !addr.parse::<std::net::SocketAddr>().is_ok_and(|a| a.ip().is_loopback())
    {
        return Err(r.fault("tcp", "expects ADDRESS:PORT on the loopback interface (127.0.0.1:4444)"));
    }
    let pretty = r.boolean("pretty")?.unwrap_or(false);
    r.finish()?;
    let key = match end {
        QmpEnd::Socket(_) => "socket",
        QmpEnd::Fd(_) => "fd",
        QmpEnd::Stdio => "stdio",
        QmpEnd::Tcp(_) => "tcp",
    };
    Ok(Qmp { end, pretty, at: r.place(key).clone() })
}

fn serial(mut r: Reader) -> Result<Serial, Fault> {
    let ends =
        [r.boolean("stdio")?.filter(|&b| b).map(|_| SerialEnd::Stdio), r.path("file")?.map(SerialEnd::File)];
    let end = r.one_of(ends, "'stdio = true' or 'file'")?;
    r.finish()?;
    Ok(Serial { end, at: r.item.at.clone() })
}

/// `550e8400-e29b-41d4-a716-446655440000`
fn parse_uuid(s: &str) -> Option<[u8; 16]> {
    let shape = s.len() == 36 && [8, 13, 18, 23].iter().all(|&i| s.as_bytes()[i] == b'-');
    let hex: Vec<u8> = s.bytes().filter(|&b| b != b'-').collect();
    if !shape || hex.len() != 32 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(hex.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(uuid)
}

/// Bytes: `4096`, or `"4K"`, `"128M"`, `"1.5G"`, with QEMU's suffixes (powers of 1024).
pub(crate) fn parse_size(s: &str) -> Option<u64> {
    let split = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, suffix) = s.split_at(split);
    let shift = match suffix {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let bytes = whole.parse::<u64>().ok()?.checked_mul(1u64 << shift)?;
    if part.is_empty() {
        // "1." is as wrong as ".5".
        return (!number.ends_with('.')).then_some(bytes);
    }
    if shift == 0 || part.len() > 9 {
        return None;
    }
    let scale = 10u128.pow(part.len() as u32);
    let extra = (part.parse::<u128>().ok()? << shift) / scale;
    bytes.checked_add(u64::try_from(extra).ok()?)
}

/// Takes members from a table one by one, each with its type; what is left at the end is unknown.
struct Reader<'a> {
    header: &'static str,
    item: &'a Item,
    dir: &'a Path,
    known: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn new(header: &'static str, item: &'a Item, dir: &'a Path) -> Reader<'a> {
        Reader { header, item, dir, known: Vec::new() }
    }

    fn members(&self) -> &'a [Member] {
        match &self.item.node {
            Node::Table(members) => members,
            _ => &[],
        }
    }

    fn has(&self, key: &str) -> bool {
        self.members().iter().any(|m| m.key == key)
    }

    fn place(&self, key: &str) -> &'a Place {
        self.item.place_of(key)
    }

    fn fault(&self, key: &str, text: &str) -> Fault {
        Fault::new(self.place(key), format!("{} '{key}' {text}", self.header))
    }

    fn missing(&self, key: &str) -> Fault {
        Fault::new(&self.item.at, format!("{} '{key}' is missing", self.header))
    }

    fn take<T>(
        &mut self,
        key: &'static str,
        want: &str,
        f: impl FnOnce(&Node) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        self.known.push(key);
        let Some(m) = self.members().iter().find(|m| m.key == key) else { return Ok(None) };
        match f(&m.item.node) {
            Some(value) => Ok(Some(value)),
            None => Err(self.fault(key, &format!("must be {want}, not {}", show(&m.item.node)))),
        }
    }

    fn string(&mut self, key: &'static str) -> Result<Option<String>, Fault> {
        self.take(key, "a string", |n| match n {
            Node::Str(s) => Some(s.clone()),
            _ => None,
        })
    }

    fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, Fault> {
        let dir = self.dir;
        self.take(key, "the name of a file", |n| match n {
            Node::Str(s) if !s.is_empty() && !s.contains('\0') => Some(dir.join(s)),
            _ => None,
        })
    }

    fn boolean(&mut self, key: &'static str) -> Result<Option<bool>, Fault> {
        self.take(key, "true or false", |n| match n {
            Node::Bool(b) => Some(*b),
            _ => None,
        })
    }

    fn int(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, Fault> {
        let want = match *range.end() {
            end if end == i64::from(i32::MAX) => format!("a number from {}", range.start()),
            end => format!("a number from {} to {end}", range.start()),
        };
        self.take(key, &want, |n| match n {
            Node::Int(i) => i64::try_from(*i).ok().filter(|i| range.contains(i)),
            _ => None,
        })
    }

    fn size(&mut self, key: &'static str) -> Result<Option<u64>, Fault> {
        self.take(key, "a number of bytes or a size like \"128M\"", |n| match n {
            Node::Int(i) => u64::try_from(*i).ok(),
            Node::Str(s) => parse_size(s),
            _ => None,
        })
    }

    fn word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Result<Option<T>, Fault> {
        let list: Vec<_> = words.iter().map(|(w, _)| format!("\"{w}\"")).collect();
        self.take(key, &list.join(" or "), |n| match n {
            Node::Str(s) => words.iter().find(|(w, _)| w == s).map(|(_, t)| *t),
            _ => None,
        })
    }

    fn one_of<T, const N: usize>(&self, ends: [Option<T>; N], names: &str) -> Result<T, Fault> {
        let mut given = ends.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(one), None) => Ok(one),
            _ => Err(Fault::new(&self.item.at, format!("{} needs exactly one of {names}", self.header))),
        }
    }

    fn finish(&self) -> Result<(), Fault> {
        match self.members().iter().find(|m| !self.known.contains(&m.key.as_str())) {
            None => Ok(()),
            Some(m) => {
                let text =
                    format!("{} '{}' is unknown (there are: {})", self.header, m.key, self.known.join(", "));
                Err(Fault::new(&m.at, text))
            }
        }
    }
}

/// A value as a message shows it.
fn show(node: &Node) -> String {
    match node {
        Node::Str(s) if s.len() <= 40 => format!("\"{}\"", s.escape_debug()),
        Node::Int(i) => i.to_string(),
        Node::Bool(b) => b.to_string(),
        other => other.kind().to_string(),
    }
}

#[cfg(test)]
#[path = "config_tables_test.rs"]
mod tests;
