//! The VM: everything that has a name, and what can be done to it as a whole.
//!
//! Owns: the registries, the run state, the outbox of QMP events, and whether the process goes on.
//! Never: sockets, JSON text, formats. Threads: control only; plain `&mut`. Locks: none of its own.

use super::board::Board;
use super::devices::Devices;
use super::exports::Exports;
use super::objects::Objects;
use super::qemu_io::QemuIo;
use super::state::RunState;
use crate::block::drive::Drives;
use crate::block::graph::Graph;
use crate::block::node::Node;
use crate::error::{Error, Result, strerror};
use crate::event::{BlockIoError, ErrorAction, Event, Events};
use crate::jobs::registry::Jobs;
use crate::machine::cpu::Topology;
use crate::machine::{Accel, Machine};
use crate::net::netdev::Netdevs;
use crate::sys::fdset::FdSets;
use crate::sys::inbox::Inbox;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

/// What a guest's reset leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootAction {
    /// A reset.
    Reset,
    /// What a shutdown leads to.
    Shutdown,
}

/// What a guest's shutdown leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownAction {
    /// The process ends.
    Poweroff,
    /// The VM stops in run state `shutdown` and waits for QMP.
    Pause,
}

/// The `[machine]` table: what does not change while the VM lives, and the policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `query-name`.
    pub name: Option<String>,
    /// `query-uuid`; zeroes when none was given.
    pub uuid: [u8; 16],
    /// Bytes of RAM.
    pub memory: u64,
    /// The processors, and the places for more.
    pub topology: Topology,
    /// Where the processors come from.
    pub accel: Accel,
    /// Do not start the processors until `cont`.
    pub paused: bool,
    /// What a guest's reset leads to.
    pub reboot: RebootAction,
    /// What a guest's shutdown leads to.
    pub shutdown: ShutdownAction,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            name: None,
            uuid: [0; 16],
            memory: 128 << 20,
            topology: Topology::default(),
            accel: Accel::Kvm,
            paused: false,
            reboot: RebootAction::Reset,
            shutdown: ShutdownAction::Poweroff,
        }
    }
}

/// Who wanted a reset or shutdown, and why (QMP's `ShutdownCause`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// `quit`.
    HostQmpQuit,
    /// `system_reset`.
    HostQmpSystemReset,
    /// SIGINT, SIGTERM, SIGHUP.
    HostSignal,
    /// The console's quit sequence.
    HostUi,
    /// The guest switched itself off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
}

impl Cause {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::HostQmpQuit => "host-qmp-quit",
            Cause::HostQmpSystemReset => "host-qmp-system-reset",
            Cause::HostSignal => "host-signal",
            Cause::HostUi => "host-ui",
            Cause::GuestShutdown => "guest-shutdown",
            Cause::GuestReset => "guest-reset",
        }
    }

    /// True when the guest did it.
    pub fn guest(self) -> bool {
        matches!(self, Cause::GuestShutdown | Cause::GuestReset)
    }

    fn data(self) -> Value {
        json!({ "guest": self.guest(), "reason": self.as_str() })
    }
}

/// An event for the QMP clients, in the order in which things happened.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name.
    pub name: &'static str,
    /// Its data; absent when it is empty.
    pub data: Option<Map<String, Value>>,
    /// When it happened.
    pub time: SystemTime,
}

/// See the module's head.
pub struct Vm {
    /// The `[machine]` table.
    pub settings: Settings,
    /// QMP's run state. Changed by [`Vm::stop`], [`Vm::cont`] and [`Vm::reset`] only.
    pub run_state: RunState,
    /// What the other threads have to say; cloned into every one of them.
    pub events: Events,
    /// Events for the QMP clients; the server takes them before it writes a reply.
    pub outbox: Vec<QmpEvent>,
    /// Fd sets (`add-fd`, `/dev/fdset/N`).
    pub fds: FdSets,
    /// The guest's disks, and those that wait for a device.
    pub drives: Drives,
    /// What sits around the processors; there when the machine is.
    pub board: Option<Board>,
    /// The guest devices.
    pub devices: Devices,
    /// The machine; none in a VM that is being made. Goes after the devices, which hold its
    /// descriptors.
    pub machine: Option<Machine>,
    /// The block graph: nodes, and the handles that use them.
    pub graph: Graph,
    /// The block jobs.
    pub jobs: Jobs,
    /// How many drives of each interface there were: `virtio`, `none`.
    pub(super) drive_numbers: (u32, u32),
    /// Files without a name that drives with `snapshot` write to.
    pub(super) temporary: Vec<File>,
    /// The network backends.
    pub netdevs: Netdevs,
    /// What `object-add` has made.
    pub objects: Objects,
    /// The default CPU of the human commands (`cpu`).
    pub current_cpu: i64,
    /// What is exported over NBD, and the server.
    pub exports: Exports,
    /// The human command `qemu-io`.
    pub qemu_io: QemuIo,
    /// There is a monitor: somebody who can deal with a VM that has stopped.
    pub attended: bool,
    /// Set once the process is to end: its exit status.
    exit: Option<u8>,
}

impl Vm {
    /// A VM with nothing in it, in run state `prelaunch`. Fails only without file descriptors.
    pub fn new(settings: Settings) -> io::Result<Vm> {
        let events = Arc::new(Inbox::new()?);
        let mut graph = Graph::new();
        graph.report_to(events.clone());
        Ok(Vm {
            settings,
            run_state: RunState::Prelaunch,
            events,
            outbox: Vec::new(),
            fds: FdSets::new(),
            drives: Drives::new(),
            machine: None,
            board: None,
            graph,
            jobs: Jobs::new(),
            drive_numbers: (0, 0),
            temporary: Vec::new(),
            devices: Devices::default(),
            netdevs: Netdevs::default(),
            objects: Objects::default(),
            current_cpu: 0,
            exports: Exports::default(),
            qemu_io: QemuIo::default(),
            attended: false,
            exit: None,
        })
    }

    /// Queues an event for the QMP clients. `data` is an object, or null for none.
    pub fn emit(&mut self, name: &'static str, data: Value) {
        let data = match data {
            Value::Object(map) => Some(map),
            _ => None,
        };
        self.outbox.push(QmpEvent { name, data, time: SystemTime::now() });
    }

    /// The exit status, once the process is to end.
    pub fn exit(&self) -> Option<u8> {
        self.exit
    }

    fn become_state(&mut self, next: RunState) {
        debug_assert!(self.run_state.may_become(next), "{:?} to {next:?}", self.run_state);
        self.run_state = next;
    }

    /// Stops a running VM and goes to `state`; does nothing to one that does not run. When it
    /// returns, no processor runs, no request is on its way to a disk, and all data are flushed.
    pub fn stop(&mut self, state: RunState) {
        if !self.run_state.is_running() {
            return;
        }
        self.halt();
        // Nobody has a request under way now.
        if let Err(e) = self.graph.flush_all() {
            log::error!("flushing the disks of a stopped VM: {}", strerror(&e));
        }
        self.become_state(state);
        self.emit("STOP", Value::Null);
    }

    /// Runs a VM that does not.
    pub fn cont(&mut self) -> Result<()> {
        if self.run_state.is_running() {
            return Ok(());
        }
        // A request that failed before the stop is told before it is tried again: told later, it
        // would stop the VM once more for an error that is over.
        self.take_events();
        if self.run_state.needs_reset() {
            return Err(Error::new("Resetting the Virtual Machine is required"));
        }
        self.drives.reset_io_status();
        self.become_state(RunState::Running);
        self.emit("RESUME", Value::Null);
        self.go();
        Ok(())
    }

    /// Resets the machine. A VM that does not run goes to `prelaunch`.
    pub fn reset(&mut self, cause: Cause) {
        let hurry = self.graph.hurry();
        if self.run_state.is_running() {
            self.halt();
        } else {
            self.become_state(RunState::Prelaunch);
        }
        // What the guest asked for before the reset was done is done with it.
        for event in self.events.take().into_iter().filter(|e| *e != Event::Reset) {
            self.events.post(event);
        }
        if let Some(board) = &self.board {
            board.reset();
        }
        drop(hurry);
        let done = self.machine.as_mut().map_or(Ok(()), Machine::reset);
        self.emit("RESET", cause.data());
        match done {
            Ok(()) if self.run_state.is_running() => self.go(),
            Ok(()) => {}
            Err(e) => self.broken(&format!("the machine cannot be reset: {e}")),
        }
    }

    /// Presses the power button.
    pub fn powerdown(&mut self) {
        self.emit("POWERDOWN", Value::Null);
        if let Some(machine) = &self.machine {
            machine.power_button();
        }
    }

    /// The processors first, so that no device is given work; then the devices.
    fn halt(&mut self) {
        let _hurry = self.graph.hurry();
        if let Some(machine) = &mut self.machine {
            machine.pause();
        }
        if let Some(board) = &self.board {
            board.pause();
        }
    }

    /// The reverse of [`Vm::halt`].
    fn go(&mut self) {
        if let Some(board) = &self.board {
            board.resume();
        }
        if let Some(machine) = &mut self.machine {
            machine.resume();
        }
    }

    /// The end: nothing runs any more, and all disks are written back and closed. The first error
    /// of a disk is returned.
    pub fn shut_down(&mut self) -> io::Result<()> {
        self.graph.give_up();
        let _hurry = self.graph.hurry();
        // The threads end where they would pause: to pause first would only wait twice.
        if let Some(machine) = &mut self.machine {
            machine.stop();
        }
        if let Some(board) = &self.board {
            board.stop();
        }
        self.end_jobs();
        self.close_exports();
        let flushed = self.graph.flush_all();
        self.drives.clear();
        self.graph.close_all();
        flushed
    }

    /// Cancels all jobs, and waits: what they have done so far is undone, or of no use.
    pub fn end_jobs(&mut self) {
        self.jobs.cancel_all(&mut self.graph);
        self.tell_jobs();
    }

    /// The VM cannot go on. It stays for a client to look at, unless there is none who could.
    fn broken(&mut self, why: &str) {
        log::error!("{why}");
        if self.run_state.is_running() {
            self.stop(RunState::InternalError);
        } else {
            self.run_state = RunState::InternalError;
        }
        if !self.attended {
            self.exit.get_or_insert(1);
        }
    }

    /// Ends the process with `status`, whatever the shutdown policy is.
    pub fn quit(&mut self, cause: Cause, status: u8) {
        if self.exit.is_none() {
            self.emit("SHUTDOWN", cause.data());
            self.exit = Some(status);
        }
    }

    fn guest_shutdown(&mut self, cause: Cause) {
        match self.settings.shutdown {
            ShutdownAction::Poweroff => self.quit(cause, 0),
            ShutdownAction::Pause => {
                self.emit("SHUTDOWN", cause.data());
                self.stop(RunState::Shutdown);
            }
        }
    }

    /// Does what the other threads' events lead to.
    pub fn take_events(&mut self) {
        let mut reset = false;
        for event in self.events.take() {
            // Nothing happens after the end: clients have been told SHUTDOWN.
            if self.exit.is_some() {
                break;
            }
            // Several processors may ask for the same reset.
            if event != Event::Reset || !std::mem::replace(&mut reset, true) {
                self.handle(event);
            }
        }
    }

    /// Does what an event from another thread leads to.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Reset => match self.settings.reboot {
                RebootAction::Reset => self.reset(Cause::GuestReset),
                RebootAction::Shutdown => self.guest_shutdown(Cause::GuestReset),
            },
            Event::Shutdown => self.guest_shutdown(Cause::GuestShutdown),
            Event::RtcChange { offset } => {
                self.emit("RTC_CHANGE", json!({ "offset": offset, "qom-path": "/machine/rtc" }));
            }
            Event::WriteThreshold { node_name, exceeded, threshold } => {
                let data = json!({ "node-name": node_name, "amount-exceeded": exceeded,
                                   "write-threshold": threshold });
                self.emit("BLOCK_WRITE_THRESHOLD", data);
            }
            Event::ImageCorrupted { node_name, msg, at, fatal } => {
                let is_root = |n: Arc<Node>| n.name == node_name;
                let drive = self.drives.iter().find(|d| d.handle.node().is_some_and(is_root));
                let mut data = json!({ "device": drive.map_or("", |d| d.name()),
                                       "node-name": node_name, "msg": msg, "fatal": fatal });
                if let Some((offset, size)) = at {
                    (data["offset"], data["size"]) = (Value::from(offset), Value::from(size));
                }
                self.emit("BLOCK_IMAGE_CORRUPTED", data);
            }
            Event::QuorumReportBad { op, error, node_name, sector_num, sectors_count } => {
                let mut data = json!({ "type": op.as_str(), "node-name": node_name, "sector-num": sector_num,
                                       "sectors-count": sectors_count });
                if let Some(error) = error {
                    data["error"] = error.into();
                }
                self.emit("QUORUM_REPORT_BAD", data);
            }
            Event::QuorumFailure { node_name, sector_num, sectors_count } => {
                let of_drive = |n: Arc<Node>| n.name == node_name;
                let drive = self.drives.iter().find(|d| d.handle.node().is_some_and(of_drive));
                let drive = drive.map(|d| d.name().to_string());
                let reference = drive.filter(|d| !d.is_empty()).unwrap_or(node_name);
                let data = json!({ "reference": reference, "sector-num": sector_num,
                                   "sectors-count": sectors_count });
                self.emit("QUORUM_FAILURE", data);
            }
            Event::BlockIoError(e) => self.block_io_error(e),
            Event::TrayMoved { qom_path, open } => {
                self.tray_moved(&qom_path, open);
                let tray = self.drives.of_device(&qom_path).and_then(|d| d.handle.tray());
                if let Some(open) = tray.and_then(|t| t.told(open)) {
                    self.tray_moved(&qom_path, open);
                }
            }
            Event::DeviceDeleted { id, qom_path } => {
                let mut data = json!({ "path": qom_path });
                if !id.is_empty() {
                    data["device"] = id.into();
                }
                self.emit("DEVICE_DELETED", data);
            }
            Event::Job(serial) => {
                self.jobs.serve(&mut self.graph, serial);
                self.tell_jobs();
            }
            Event::VcpuFailed { cpu, why } => self.broken(&format!("CPU {cpu} cannot go on: {why}")),
            Event::DebugExit { status } => self.quit(Cause::GuestShutdown, status),
            Event::ConsoleQuit => self.quit(Cause::HostUi, 0),
            Event::ExportIdle => self.reap_exports(),
            Event::Wake => {}
        }
    }

    /// Tells the clients that the tray of the device at `qom_path` has moved.
    pub fn tray_moved(&mut self, qom_path: &str, open: bool) {
        let Some(drive) = self.drives.of_device(qom_path) else { return };
        let Some(device) = &drive.device else { return };
        let data = json!({ "device": drive.name(), "id": device.qdev, "tray-open": open });
        self.emit("DEVICE_TRAY_MOVED", data);
    }

    fn block_io_error(&mut self, e: BlockIoError) {
        let stop = e.action == ErrorAction::Stop;
        let mut data = json!({
            "qom-path": e.qom_path,
            "device": e.device,
            "operation": if e.read { "read" } else { "write" },
            "action": match e.action {
                ErrorAction::Ignore => "ignore",
                ErrorAction::Report => "report",
                ErrorAction::Stop => "stop",
            },
            "nospace": e.nospace,
            "reason": e.reason,
        });
        if let Some(name) = e.node_name {
            data["node-name"] = Value::from(name);
        }
        self.emit("BLOCK_IO_ERROR", data);
        if stop {
            self.stop(RunState::IoError);
        }
    }
}

#[cfg(test)]
#[path = "vm_test.rs"]
mod tests;
