//! From a configuration to a VM that is ready to run, top to bottom.
//!
//! Owns: the order. Nothing outside the process is made or changed before everything that can be
//! wrong has been looked at: first what is only read (images are opened and locked, but not
//! written), then what leaves a trace (files, sockets), last the guest. Never: decides what a
//! running VM does. Threads: main. Locks: none.

use crate::chardev::{chardev::Chardev, console, file};
use crate::config::{Boot, Config, Kind, Qmp, QmpEnd, Serial, SerialEnd, Table};
use crate::config_tree::Fault;
use crate::control::board::Board;
use crate::control::event_loop::{self, Source, TERMINATION};
use crate::control::vm::Vm;
use crate::error::{Error, Result, strerror};
use crate::machine::{Accel, BootConfig, Machine, MachineConfig};
use crate::nbd::options::NbdServerOptions;
use crate::net::netdev::{Netdev, NetdevOptions, Offload};
use crate::qapi::{Path, Wire};
use crate::qmp::fds::Conn;
use crate::qmp::schema::{self, Cx};
use crate::qmp::server::Server;
use crate::sys::inherit::Inherited;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::poll::Signals;
use crate::sys::process;
use crate::wire_struct;
use serde_json::Value;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path as FilePath;
use std::sync::Arc;

/// Bytes of a Unix socket's path (`sun_path` with its zero byte has 108).
const SOCKET_PATH_MAX: usize = 107;

/// Looks at everything that `config` names, without changing anything. /dev/kvm is not needed.
pub fn check(config: &Config) -> Result<(), String> {
    let mut vm = build(config, true).map_err(|f| config.sources.message(&f))?.vm;
    vm.graph.close_all();
    Ok(())
}

/// Runs the VM; the process's exit status.
pub fn run(config: &Config) -> Result<u8, String> {
    log::debug!("the configuration is read");
    // Before the first thread, which inherits it.
    let signals = Signals::block(&TERMINATION).map_err(|e| strerror(&e))?;
    let mut built = build(config, false).map_err(|f| config.sources.message(&f))?;
    let mut sources = open_ends(config, &mut built).map_err(|f| config.sources.message(&f))?;
    let mut vm = built.vm;
    start(&mut vm).map_err(|e| e.desc)?;
    log::debug!("the processors run");
    if !config.tables.is_empty() {
        // Opening a disk takes buffers that running one does not: 96 KiB with a qcow2 image.
        process::trim_heap();
    }
    let mut borrowed: Vec<&mut dyn Source> =
        sources.iter_mut().map(|s| &mut **s as &mut dyn Source).collect();
    let ran = event_loop::run(&mut vm, &signals, &mut borrowed);
    log::debug!("the end begins");
    // Disks are closed before the monitors are: a client that sees the end may use the images.
    vm.shut_down().map_err(|e| format!("the disks were not written back: {}", strerror(&e)))?;
    log::debug!("everything is closed");
    ran.map_err(|e| format!("the control loop failed: {}", strerror(&e)))
}

/// A VM of which nothing has left a trace yet.
struct Built {
    vm: Vm,
    inherited: Inherited,
}

fn build(config: &Config, check: bool) -> Result<Built, Fault> {
    let inherited = claim(config)?;
    let plain = |e: Error| Fault { at: None, text: e.desc };
    let mut vm = Vm::new(config.settings.clone()).map_err(|e| plain(e.into()))?;
    vm.attended = !config.qmp.is_empty();

    // The kernel's part first: memory before the interrupt controller is what makes it fast.
    let settings = &config.settings;
    let accel = if check { Accel::None } else { settings.accel };
    let wanted = MachineConfig { memory: settings.memory, topology: settings.topology, accel };
    let mut machine = Machine::new(&wanted, vm.events.clone()).map_err(|e| match &config.memory_at {
        Some(at) if e.desc.starts_with("memory of ") => Fault::new(at, format!("[machine] 'memory': {e}")),
        _ => plain(e),
    })?;
    log::debug!("the machine is there");
    let board = Board::new(&mut machine).map_err(plain)?;
    (vm.machine, vm.board) = (Some(machine), Some(board));

    vm.exports.expected = config.tables.iter().any(|t| t.kind == Kind::NbdServer);
    for table in &config.tables {
        add(&mut vm, &inherited, table, check).map_err(|e| table.fault(&e.desc))?;
    }
    if let Some(machine) = &mut vm.machine {
        if let Some(last) = config.serial.last() {
            let fault = |e: Error| Fault::new(&last.at, format!("[[serial]] {e}"));
            Board::announce_serial(machine, config.serial.len()).map_err(fault)?;
        }
        for serial in &config.serial {
            writable(serial)?;
        }
        for qmp in &config.qmp {
            makable(qmp)?;
        }
        if let Some(boot) = &config.boot {
            load(machine, boot)?;
        }
    }
    log::debug!("everything is open, and the kernel loaded");
    Ok(Built { vm, inherited })
}

/// Takes possession of the descriptors that the tables name.
fn claim(config: &Config) -> Result<Inherited, Fault> {
    let fdset = |t: &Table| t.arguments.get("fd").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
    let netdev = |t: &Table| t.arguments.get("fd").and_then(Value::as_str).and_then(|s| s.parse().ok());
    let mut named = Vec::new();
    for table in &config.tables {
        let (member, fds) = match table.kind {
            Kind::Fdset => ("fd", Vec::from_iter(fdset(table))),
            Kind::Netdev => ("fd", Vec::from_iter(netdev(table))),
            Kind::NbdServer => ("addr", sockets(table)),
            Kind::Blockdev => ("server", sockets(table)),
            _ => continue,
        };
        named.extend(fds.into_iter().map(|fd| (fd, table.item.place_of(member), table.kind.header())));
    }
    for qmp in &config.qmp {
        if let QmpEnd::Fd(fd) = qmp.end {
            named.push((fd, &qmp.at, "[[qmp]]"));
        }
    }
    Inherited::claim(named.iter().map(|n| n.0)).map_err(|(fd, e)| {
        let text = match fd {
            ..0 => format!("'fd' must be the number of an open descriptor, not {fd}"),
            0..=2 => format!(
                "'fd' {fd} is standard input, output or error; pass another, from 3 (a shell: 3<>FILE)"
            ),
            _ => format!("'fd' {fd} was not passed to this process: {}", strerror(&e)),
        };
        match named.iter().find(|n| n.0 == fd) {
            Some((_, at, header)) => Fault::new(at, format!("{header} {text}")),
            None => Fault { at: None, text },
        }
    })
}

/// One table of a command's arguments.
fn add(vm: &mut Vm, inherited: &Inherited, table: &Table, check: bool) -> Result<()> {
    let args = table.arguments.clone();
    let command = |vm: &mut Vm, name| {
        let mut conn = Conn::new();
        pass(inherited, table, &mut conn)?;
        schema::execute(&mut Cx { vm, conn: &mut conn }, name, args.clone()).map(drop)
    };
    match table.kind {
        Kind::Object => command(vm, "object-add"),
        Kind::Blockdev => command(vm, "blockdev-add"),
        Kind::Drive => vm.add_drive(args),
        Kind::Device => vm.add_device(&args, false),
        Kind::Netdev => {
            let options = NetdevOptions::take(Value::Object(args), &Path::Root)?;
            if check {
                // To open a tap is to make it.
                options.check()?;
                return vm.netdevs.insert(&options.id, Arc::new(Unplugged));
            }
            vm.netdevs.add(&options, |name| match name.parse() {
                Ok(n) => inherited.get(n).map_err(Error::from),
                Err(_) => Err(Error::new(format!("Parameter 'fd' expects a number, not '{name}'"))),
            })
        }
        Kind::Export => {
            let mut conn = Conn::new();
            schema::execute(&mut Cx { vm, conn: &mut conn }, "block-export-add", args).map(drop)
        }
        // To listen is to make it: that comes last. What it is made of is looked at now.
        Kind::NbdServer => NbdServerOptions::take(Value::Object(args), &Path::Root).map(drop),
        Kind::Fdset => {
            let options = AddFd::take(Value::Object(args), &Path::Root)?;
            let fd = inherited.get(options.fd)?;
            vm.fds.add(fd, Some(options.set), options.opaque).map(drop)
        }
    }
}

/// The numbers of the sockets that addresses in a table name: `{ type = "fd", str = "5" }`, or with
/// `data` around the `str`.
fn sockets(table: &Table) -> Vec<i32> {
    fn find(value: &Value, all: &mut Vec<i32>) {
        let Some(members) = value.as_object() else { return };
        if members.get("type").is_some_and(|kind| kind == "fd") {
            let name = members.get("data").unwrap_or(value).get("str").and_then(Value::as_str);
            all.extend(name.and_then(|n| n.parse::<i32>().ok()));
        }
        members.values().for_each(|v| find(v, all));
    }
    let mut all = Vec::new();
    table.arguments.values().for_each(|v| find(v, &mut all));
    all
}

/// Gives `conn` the sockets that the table names, as if a client had passed them under their numbers.
fn pass(inherited: &Inherited, table: &Table, conn: &mut Conn) -> Result<()> {
    sockets(table).into_iter().try_for_each(|n| {
        conn.name_fd(n.to_string(), inherited.get(n)?);
        Ok(())
    })
}

/// `[nbd-server]`: from here on clients are served.
fn serve(vm: &mut Vm, inherited: &Inherited, table: &Table) -> Result<()> {
    let mut conn = Conn::new();
    pass(inherited, table, &mut conn)?;
    let args = table.arguments.clone();
    schema::execute(&mut Cx { vm, conn: &mut conn }, "nbd-server-start", args).map(drop)
}

wire_struct! {
    /// `-add-fd`: puts an inherited descriptor into an fd set.
    struct AddFd {
        /// Its number.
        fd: i32,
        /// The set's.
        set: i64,
        /// A remark for `query-fdsets`.
        opaque: Option<String>,
    }
}

/// Stands for a network backend where nothing may be opened.
struct Unplugged;

impl Netdev for Unplugged {
    fn fd(&self) -> RawFd {
        -1
    }
    fn offloads(&self) -> Offload {
        Offload::NONE
    }
    fn set_offload(&self, _: Offload) -> io::Result<()> {
        Ok(())
    }
    fn recv(&self, _: &mut IovMut) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send(&self, _: &Iov) -> io::Result<()> {
        Ok(())
    }
    fn info(&self) -> String {
        String::new()
    }
}

/// Opens what leaves a trace: sockets first, which take their files away when anything fails after
/// them; then files for output, and the terminal.
fn open_ends(config: &Config, built: &mut Built) -> Result<Vec<Box<dyn Source>>, Fault> {
    let Built { vm, inherited } = built;
    let mut server = Server::new();
    for qmp in &config.qmp {
        let pretty = qmp.pretty;
        let (name, result) = match &qmp.end {
            QmpEnd::Socket(path) => (format!("'socket' {}", path.display()), server.listen(path, pretty)),
            QmpEnd::Tcp(address) => (format!("'tcp' {address}"), server.listen_tcp(address, pretty)),
            QmpEnd::Fd(n) => (format!("'fd' {n}"), inherited.get(*n).and_then(|fd| server.adopt(fd, pretty))),
            QmpEnd::Stdio => ("'stdio'".to_string(), server.stdio(pretty)),
        };
        result.map_err(|e| Fault::new(&qmp.at, format!("[[qmp]] {name}: {}", strerror(&e))))?;
    }
    for table in config.tables.iter().filter(|t| t.kind == Kind::NbdServer) {
        serve(vm, inherited, table).map_err(|e| table.fault(&e.desc))?;
    }
    for (n, serial) in config.serial.iter().enumerate() {
        let label = format!("serial{n}");
        let fault = |text: String| Fault::new(&serial.at, format!("[[serial]] {text}"));
        let chardev: Arc<Chardev> = match &serial.end {
            SerialEnd::Stdio => console::open(&label, vm.events.clone()).map_err(|e| fault(strerror(&e)))?,
            SerialEnd::File(path) => file::open(&label, path, false)
                .map_err(|e| fault(format!("'file' {}: {}", path.display(), strerror(&e))))?,
        };
        if let (Some(machine), Some(board)) = (&vm.machine, &mut vm.board) {
            board.add_serial(machine, chardev).map_err(|e| fault(e.desc))?;
        }
    }
    Ok(vec![Box::new(server)])
}

/// Could the port's file be made? Not certain before it is, but the usual mistakes are found.
fn writable(serial: &Serial) -> Result<(), Fault> {
    let SerialEnd::File(path) = &serial.end else { return Ok(()) };
    let fault = |e: &str| Fault::new(&serial.at, format!("[[serial]] 'file' {}: {e}", path.display()));
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(FilePath::new("."));
    match (std::fs::metadata(dir), std::fs::metadata(path)) {
        (Err(e), _) => Err(fault(&strerror(&e))),
        (_, Ok(m)) if m.is_dir() => Err(fault("Is a directory")),
        _ => Ok(()),
    }
}

/// Could the monitor's socket be made? As [`writable`].
fn makable(qmp: &Qmp) -> Result<(), Fault> {
    let QmpEnd::Socket(path) = &qmp.end else { return Ok(()) };
    let fault = |e: &str| Fault::new(&qmp.at, format!("[[qmp]] 'socket' {}: {e}", path.display()));
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(FilePath::new("."));
    match (std::fs::metadata(dir), std::fs::symlink_metadata(path)) {
        (Err(e), _) => Err(fault(&strerror(&e))),
        (Ok(m), _) if !m.is_dir() => Err(fault("Not a directory")),
        (_, Ok(m)) if !m.file_type().is_socket() => Err(fault("it exists and is not a socket")),
        _ if path.as_os_str().len() > SOCKET_PATH_MAX => {
            Err(fault(&format!("the path is longer than {SOCKET_PATH_MAX} bytes")))
        }
        _ => Ok(()),
    }
}

fn load(machine: &mut Machine, boot: &Boot) -> Result<(), Fault> {
    for (key, path, at) in
        [("kernel", Some(&boot.kernel), &boot.kernel_at), ("initrd", boot.initrd.as_ref(), &boot.initrd_at)]
    {
        // Said here, where the place is known; what is wrong inside is the loader's.
        if let Some(Err(e)) = path.map(std::fs::metadata) {
            let name = path.map_or(String::new(), |p| p.display().to_string());
            return Err(Fault::new(at, format!("[boot] '{key}' {name}: {}", strerror(&e))));
        }
    }
    let files = BootConfig {
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        cmdline: boot.cmdline.clone(),
    };
    machine.load(&files).map_err(|e| {
        let initrd = boot.initrd.as_ref().map(|p| format!("{}: ", p.display()));
        let at = match initrd {
            Some(name) if e.desc.starts_with(&name) => &boot.initrd_at,
            _ => &boot.kernel_at,
        };
        Fault::new(at, format!("[boot] {e}"))
    })
}

fn start(vm: &mut Vm) -> Result<()> {
    if let Some(machine) = &mut vm.machine {
        machine.start_paused()?;
    }
    if !vm.settings.paused {
        vm.cont()?;
    }
    Ok(())
}
