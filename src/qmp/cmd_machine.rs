//! The machine as a whole: name, run state, processors.
//!
//! Owns: the commands' form. Never: how the VM stops or runs (`control/vm.rs`). Threads: control.
//! Locks: none.

use super::schema::Cx;
use crate::control::state::RunState;
use crate::control::vm::{Cause, RebootAction, ShutdownAction};
use crate::error::Result;
use crate::machine::{Accel, CpuInfo};
use crate::{bail, commands, wire_enum, wire_struct};

commands! {
    /// The machine.
    pub static MACHINE;

    /// The VM's name, if it has one.
    "query-name" => query_name {} -> NameInfo;

    /// The VM's UUID; all zeroes when it was not given one.
    "query-uuid" => query_uuid {} -> UuidInfo;

    /// Whether the processors run on KVM.
    "query-kvm" => query_kvm {} -> KvmInfo;

    /// The processors' architecture.
    "query-target" => query_target {} -> TargetInfo;

    /// The run state.
    "query-status" => query_status {} -> StatusInfo;

    /// Stops the processors and the devices and flushes the disks. Event `STOP`, if they ran.
    "stop" => stop {} -> ();

    /// Lets the processors run, and forgets the I/O errors that may have stopped them: failed
    /// requests are tried again. Event `RESUME`, if they did not run.
    "cont" => cont {} -> ();

    /// Ends the process. Event `SHUTDOWN`; disks are flushed and closed before the connection is.
    "quit" => quit {} -> ();

    /// Resets the machine as its reset button would. Event `RESET`.
    "system_reset" => system_reset {} -> ();

    /// Presses the power button; what comes of it is the guest's affair. Event `POWERDOWN`.
    "system_powerdown" => system_powerdown {} -> ();

    /// Wakes a guest that has suspended itself; ours cannot.
    "system_wakeup" => system_wakeup {} -> ();

    /// Changes what a guest's reset and shutdown lead to.
    "set-action" => set_action {
        /// A reset, or a shutdown.
        reboot: Option<RebootAction>,
        /// The end of the process, or a pause in run state `shutdown`.
        shutdown: Option<ShutdownAction>,
    } -> ();

    /// The processors, with their program counters: it interrupts them for a moment. (Until QEMU
    /// 5.2; `query-cpus-fast` does not interrupt.)
    "query-cpus" => query_cpus {} -> Vec<CpuInfo28>;

    /// The processors.
    "query-cpus-fast" => query_cpus_fast {} -> Vec<CpuInfoFast>;

    /// Sets the processor that `query-cpus` shows as current.
    "cpu" => cpu {
        /// Its index.
        index: i64,
    } -> ();
}

wire_struct! {
    /// A name.
    pub struct NameInfo {
        /// The VM's name.
        name: Option<String>,
    }
}

wire_struct! {
    /// A UUID.
    pub struct UuidInfo {
        /// The VM's UUID.
        "UUID" uuid: String,
    }
}

wire_struct! {
    /// About KVM.
    pub struct KvmInfo {
        /// The processors run on it.
        enabled: bool,
        /// This program can use it.
        present: bool,
    }
}

wire_enum! {
    /// Architectures.
    pub enum SysEmuTarget {
        /// AMD64, Intel 64.
        "x86_64" X86_64,
    }
}

wire_struct! {
    /// An architecture.
    pub struct TargetInfo {
        /// The processors'.
        arch: SysEmuTarget,
    }
}

wire_enum! {
    impl RebootAction {
        /// The machine is reset.
        "reset" Reset,
        /// As if the guest had switched itself off.
        "shutdown" Shutdown,
    }
}

wire_enum! {
    impl ShutdownAction {
        /// The process ends.
        "poweroff" Poweroff,
        /// The VM stops in run state `shutdown`.
        "pause" Pause,
    }
}

wire_enum! {
    impl RunState {
        /// A processor cannot go on; only a reset helps.
        "internal-error" InternalError,
        /// Stopped because of an I/O error on a disk whose policy says so.
        "io-error" IoError,
        /// Stopped by a client.
        "paused" Paused,
        /// Nothing has run since the start or the last reset.
        "prelaunch" Prelaunch,
        /// The processors run.
        "running" Running,
        /// The guest has switched itself off; only a reset helps.
        "shutdown" Shutdown,
    }
}

wire_struct! {
    /// The run state.
    pub struct StatusInfo {
        /// The processors run.
        running: bool,
        /// In one word.
        status: RunState,
    }
}

wire_enum! {
    /// Architectures, in QEMU 2.8's words.
    pub enum CpuInfoArch {
        /// All kinds of x86.
        "x86" X86,
    }
}

wire_struct! {
    /// A processor, in QEMU 2.8's form.
    pub struct CpuInfo28 {
        /// Its index.
        "CPU" index: i64,
        /// It is the default of the human commands (see `cpu`).
        current: bool,
        /// It waits for an interrupt.
        halted: bool,
        /// Its path.
        qom_path: String,
        /// Its thread in the host.
        thread_id: i64,
        /// Its architecture.
        arch: CpuInfoArch,
        /// Program counter.
        pc: i64,
    }
}

wire_struct! {
    /// Where a processor sits.
    pub struct CpuInstanceProperties {
        /// Which socket.
        "socket-id" socket: Option<i64>,
        /// Which core of the socket.
        "core-id" core: Option<i64>,
        /// Which thread of the core.
        "thread-id" thread: Option<i64>,
    }
}

wire_struct! {
    /// A processor.
    pub struct CpuInfoFast {
        /// Its index.
        "cpu-index" index: i64,
        /// Its path.
        "qom-path" qom_path: String,
        /// Its thread in the host.
        "thread-id" thread_id: i64,
        /// Where it sits.
        props: Option<CpuInstanceProperties>,
        /// Its architecture.
        target: SysEmuTarget,
    }
}

fn query_name(cx: &mut Cx) -> Result<NameInfo> {
    Ok(NameInfo { name: cx.vm.settings.name.clone() })
}

fn query_uuid(cx: &mut Cx) -> Result<UuidInfo> {
    let mut uuid = String::with_capacity(36);
    for (i, byte) in cx.vm.settings.uuid.iter().enumerate() {
        let dash = if [4, 6, 8, 10].contains(&i) { "-" } else { "" };
        uuid += &format!("{dash}{byte:02x}");
    }
    Ok(UuidInfo { uuid })
}

fn query_kvm(cx: &mut Cx) -> Result<KvmInfo> {
    Ok(KvmInfo { enabled: cx.vm.settings.accel == Accel::Kvm, present: true })
}

fn query_target(_: &mut Cx) -> Result<TargetInfo> {
    Ok(TargetInfo { arch: SysEmuTarget::X86_64 })
}

fn query_status(cx: &mut Cx) -> Result<StatusInfo> {
    Ok(StatusInfo { running: cx.vm.run_state.is_running(), status: cx.vm.run_state })
}

fn stop(cx: &mut Cx) -> Result<()> {
    cx.vm.stop(RunState::Paused);
    Ok(())
}

fn cont(cx: &mut Cx) -> Result<()> {
    cx.vm.cont()
}

fn quit(cx: &mut Cx) -> Result<()> {
    cx.vm.quit(Cause::HostQmpQuit, 0);
    Ok(())
}

fn system_reset(cx: &mut Cx) -> Result<()> {
    cx.vm.reset(Cause::HostQmpSystemReset);
    Ok(())
}

fn system_powerdown(cx: &mut Cx) -> Result<()> {
    cx.vm.powerdown();
    Ok(())
}

fn system_wakeup(_: &mut Cx) -> Result<()> {
    bail!("Unable to wake up: guest is not in suspended state");
}

fn set_action(cx: &mut Cx, reboot: Option<RebootAction>, shutdown: Option<ShutdownAction>) -> Result<()> {
    let settings = &mut cx.vm.settings;
    settings.reboot = reboot.unwrap_or(settings.reboot);
    settings.shutdown = shutdown.unwrap_or(settings.shutdown);
    Ok(())
}

fn cpus(cx: &Cx) -> Vec<CpuInfo> {
    let mut cpus = cx.vm.machine.as_ref().map_or(Vec::new(), |m| m.cpus());
    for cpu in &mut cpus {
        // A processor that no thread runs belongs to the main thread, which idles for it: 0 would
        // mean "yourself" to the system calls that a client may hand it to.
        if cpu.thread_id == 0 {
            cpu.thread_id = std::process::id();
        }
    }
    cpus
}

fn qom_path(index: usize) -> String {
    format!("/machine/unattached/device[{index}]")
}

fn query_cpus(cx: &mut Cx) -> Result<Vec<CpuInfo28>> {
    let states = cx.vm.machine.as_mut().map_or(Vec::new(), |m| m.cpu_states());
    let current = cx.vm.current_cpu;
    let one = |(cpu, (pc, halted)): (CpuInfo, (u64, bool))| CpuInfo28 {
        index: cpu.index as i64,
        current: cpu.index as i64 == current,
        halted,
        qom_path: qom_path(cpu.index),
        thread_id: cpu.thread_id.into(),
        arch: CpuInfoArch::X86,
        // As QEMU has it: addresses of the kernel half are negative.
        pc: pc as i64,
    };
    Ok(cpus(cx).into_iter().zip(states).map(one).collect())
}

fn query_cpus_fast(cx: &mut Cx) -> Result<Vec<CpuInfoFast>> {
    let one = |cpu: CpuInfo| {
        let (socket, core, thread) = cpu.place;
        CpuInfoFast {
            index: cpu.index as i64,
            qom_path: qom_path(cpu.index),
            thread_id: cpu.thread_id.into(),
            props: Some(CpuInstanceProperties {
                socket: Some(socket.into()),
                core: Some(core.into()),
                thread: Some(thread.into()),
            }),
            target: SysEmuTarget::X86_64,
        }
    };
    Ok(cpus(cx).into_iter().map(one).collect())
}

fn cpu(cx: &mut Cx, index: i64) -> Result<()> {
    if !cpus(cx).iter().any(|c| c.index as i64 == index) {
        bail!("Parameter 'index' expects a CPU number");
    }
    cx.vm.current_cpu = index;
    Ok(())
}

#[cfg(test)]
#[path = "cmd_machine_test.rs"]
mod tests;
