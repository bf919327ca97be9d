//! The processors' threads: one per vCPU, its run loop, kick and pause.
//!
//! Owns: the vCPUs' descriptors and threads. Never: knows what is on the buses. Threads: control
//! makes, pauses, resumes, stops them; each vCPU sets itself up and runs on its own. Locks: each vCPU's descriptor in a
//! mutex that its thread holds while it runs, and control while it rests; `State`, a leaf.
//!
//! No wake-up is lost: control sets `request`, then the run page's `immediate_exit`, then sends a
//! signal (whose handler does nothing). The thread clears `immediate_exit` first and looks at
//! `request` after. So either it sees the request, or control's `immediate_exit` comes after the
//! clearing and KVM_RUN returns at once, or the signal interrupts it.

use super::bus::{Bus, Effect};
use super::cpu_state;
use super::irq::Controllers;
use super::kvm::{Identity, fail};
use crate::error::{Error, Result};
use crate::event::{Event, Events};
use crate::sys::thread::lock;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A vCPU thread's stack. Device code runs on it, nothing deep; only what is touched costs memory.
const STACK: usize = 256 << 10;

/// What all threads share.
pub struct Shared {
    /// I/O ports.
    pio: Arc<Bus>,
    /// Memory-mapped registers.
    mmio: Arc<Bus>,
    /// For the ends of level-triggered interrupts.
    controllers: Arc<Controllers>,
    /// The control thread's inbox.
    events: Events,
    /// What is asked of the threads, and how far they are.
    state: Mutex<State>,
    /// Signalled when `State::target` or `State::dead` changes.
    go: Condvar,
    /// Signalled when a thread has come to rest.
    rested: Condvar,
}

/// What the threads are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    /// Run the guest.
    Run,
    /// Rest.
    Pause,
    /// End.
    Quit,
}

/// What is asked of the threads, and how far they are.
struct State {
    target: Target,
    /// Threads that have set up their vCPU, or failed to.
    ready: usize,
    /// Why one could not.
    failure: Option<Error>,
    /// Threads that rest (or have ended).
    resting: usize,
    /// One bit per vCPU that must not run before a reset: the guest switched itself off, or failed.
    dead: u64,
}

/// The run page, which the vCPU's descriptor has mapped, as other threads may touch it.
struct RunPage(*mut kvm_run);

// SAFETY: only `immediate_exit` is accessed by other threads, atomically; see the methods.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// KVM_RUN returns at once while this is not zero.
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped as long as the VcpuFd lives, which `Vcpu` owns beside this. The
        // byte is written by us alone, always through here; the kernel only reads it.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) }
    }

    /// Bytes per element of the port access that KVM_RUN has just reported.
    fn io_size(&self) -> usize {
        // SAFETY: mapped, see above; after KVM_EXIT_IO the union holds `io`, and any bytes are a valid u8.
        usize::from(unsafe { (&raw const (*self.0).__bindgen_anon_1.io.size).read_volatile() })
    }

    /// The cause of KVM_EXIT_INTERNAL_ERROR.
    fn suberror(&self) -> u32 {
        // SAFETY: mapped, see above; any bytes are a valid u32.
        unsafe { (&raw const (*self.0).__bindgen_anon_1.internal.suberror).read_volatile() }
    }
}

/// One virtual processor.
pub struct Vcpu {
    index: usize,
    /// Before `fd`, which keeps the page mapped: fields drop in this order.
    run: RunPage,
    fd: Mutex<VcpuFd>,
    request: AtomicBool,
    tid: AtomicU32,
}

/// Why a run of the guest came to its end.
enum Stop {
    /// Control asked.
    Asked,
    /// It must not go on before a reset.
    Dead,
}

/// All processors of a machine.
pub struct Processors {
    vcpus: Vec<Arc<Vcpu>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Processors {
    /// Processors around the new vCPUs `fds`. Their threads set them up by `identity`, then rest.
    pub fn new(fds: Vec<VcpuFd>, identity: Identity, shared: Shared) -> Result<Processors> {
        static HANDLER: Once = Once::new();
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        let mut installed = Ok(());
        HANDLER.call_once(|| installed = register_signal_handler(SIGRTMIN(), nothing));
        installed.map_err(|e| Error::new(format!("cannot install the kick signal's handler: {e}")))?;
        let vcpu = |(index, mut fd): (usize, VcpuFd)| {
            let run = RunPage(fd.get_kvm_run());
            let (request, tid) = (AtomicBool::new(false), AtomicU32::new(0));
            Arc::new(Vcpu { index, run, fd: Mutex::new(fd), request, tid })
        };
        let vcpus = fds.into_iter().enumerate().map(vcpu).collect();
        let (shared, identity) = (Arc::new(shared), Arc::new(identity));
        let mut processors = Processors { vcpus, threads: Vec::new(), shared };
        for vcpu in &processors.vcpus {
            let (vcpu, shared, identity) = (vcpu.clone(), processors.shared.clone(), identity.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{}", vcpu.index))
                .stack_size(STACK)
                .spawn(move || vcpu.thread(&shared, identity))
                .map_err(|e| Error::new(format!("cannot start a processor's thread: {e}")))?;
            processors.threads.push(thread);
        }
        Ok(processors)
    }

    /// Waits until every vCPU is set up; tells what went wrong with one.
    fn ready(&self) -> Result<()> {
        let mut state = lock(&self.shared.state);
        while state.ready < self.vcpus.len() {
            state = self.shared.rested.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.clone().map_or(Ok(()), Err)
    }

    /// Asks all threads for something. Those that rest, all of them, need no kick: they look at the
    /// target under the same lock before they run.
    fn set_target(&self, target: Target) {
        let mut state = lock(&self.shared.state);
        state.target = target;
        let all_rest = state.resting == self.threads.len();
        drop(state);
        self.shared.go.notify_all();
        if target != Target::Run && !all_rest {
            self.kick();
        }
    }

    fn kick(&self) {
        for (vcpu, thread) in self.vcpus.iter().zip(&self.threads) {
            vcpu.request.store(true, SeqCst);
            vcpu.run.immediate_exit().store(1, SeqCst);
            // It cannot fail: the thread is not joined yet, and the signal is valid.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Stops the guest; returns when every thread rests.
    pub fn pause(&self) {
        self.set_target(Target::Pause);
        let mut state = lock(&self.shared.state);
        while state.resting < self.threads.len() {
            state = self.shared.rested.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the guest run on.
    pub fn resume(&self) {
        self.set_target(Target::Run);
    }

    /// True while the guest is meant to run.
    pub fn running(&self) -> bool {
        lock(&self.shared.state).target == Target::Run
    }

    /// Ends the threads.
    pub fn stop(&mut self) {
        self.set_target(Target::Quit);
        for thread in self.threads.drain(..) {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
    }

    /// The host's thread id of vCPU `index`.
    pub fn thread_id(&self, index: usize) -> u32 {
        loop {
            match self.vcpus[index].tid.load(SeqCst) {
                // The thread's first act is to set it.
                0 => std::thread::yield_now(),
                tid => return tid,
            }
        }
    }

    /// Program counter and whether it has halted, for each; only while paused.
    pub fn states(&self) -> Vec<(u64, bool)> {
        let state = |vcpu: &Arc<Vcpu>| {
            let fd = lock(&vcpu.fd);
            let runnable = |s: kvm_bindings::kvm_mp_state| s.mp_state == KVM_MP_STATE_RUNNABLE;
            let halted = |s: kvm_bindings::kvm_mp_state| s.mp_state == KVM_MP_STATE_HALTED || !runnable(s);
            (fd.get_regs().map_or(0, |r| r.rip), fd.get_mp_state().is_ok_and(halted))
        };
        self.vcpus.iter().map(state).collect()
    }

    /// Runs `f` on each vCPU; only while paused. After it, those that had to wait for a reset run again.
    pub fn reset(&self, f: impl Fn(usize, &VcpuFd) -> Result<()>) -> Result<()> {
        for vcpu in &self.vcpus {
            f(vcpu.index, &lock(&vcpu.fd))?;
        }
        lock(&self.shared.state).dead = 0;
        Ok(())
    }

    /// Puts the first vCPU at a kernel's entry; only while it rests.
    pub fn enter(&self, start: &cpu_state::Start) -> Result<()> {
        // The kernel checks control registers against CPUID.
        self.ready()?;
        self.vcpus.first().map_or(Ok(()), |vcpu| cpu_state::enter(&lock(&vcpu.fd), start))
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// What the threads share before any is made.
    pub fn new(pio: Arc<Bus>, mmio: Arc<Bus>, controllers: Arc<Controllers>, events: Events) -> Shared {
        let state = State { target: Target::Pause, ready: 0, failure: None, resting: 0, dead: 0 };
        let (state, go, rested) = (Mutex::new(state), Condvar::new(), Condvar::new());
        Shared { pio, mmio, controllers, events, state, go, rested }
    }

    /// Rests until there is something to run; false when the thread must end.
    fn rest(&self, vcpu: &Vcpu, dead: bool) -> bool {
        let mut state = lock(&self.state);
        if dead {
            state.dead |= 1 << vcpu.index;
        }
        let mut counted = false;
        loop {
            let go = match state.target {
                Target::Quit => Some(false),
                Target::Run if state.dead >> vcpu.index & 1 == 0 => Some(true),
                _ => None,
            };
            match go {
                Some(go) => {
                    // With the lock held: a later pause sets the target, then this flag again.
                    vcpu.request.store(false, SeqCst);
                    state.resting -= usize::from(counted && go);
                    return go;
                }
                None if !counted => {
                    counted = true;
                    state.resting += 1;
                    self.rested.notify_all();
                }
                None => {}
            }
            state = self.go.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does what a device asked for, with no lock held. True when this vCPU must not go on.
    fn act(&self, effect: Effect) -> bool {
        match effect {
            Effect::None => false,
            Effect::Run(f) => {
                f();
                false
            }
            Effect::Post(event) => {
                // As on real hardware, the instruction that switches the machine off is its last.
                let last = matches!(event, Event::Reset | Event::Shutdown | Event::DebugExit { .. });
                self.events.post(event);
                last
            }
        }
    }
}

impl Vcpu {
    fn thread(&self, shared: &Shared, identity: Arc<Identity>) {
        // SAFETY: no arguments, cannot fail.
        self.tid.store(unsafe { libc::gettid() } as u32, SeqCst);
        let given = identity.give(self.index, &lock(&self.fd));
        // With the last thread's, /dev/kvm is closed.
        drop(identity);
        let (mut dead, mut ran) = (given.is_err(), false);
        {
            let mut state = lock(&shared.state);
            state.ready += 1;
            state.failure = state.failure.take().or(given.err());
            shared.rested.notify_all();
        }
        while shared.rest(self, dead) {
            let mut fd = lock(&self.fd);
            if ran {
                // The guest's watchdogs must not take the pause for a hang. It has no kvmclock? Then
                // the call fails, and does not matter.
                let _ = fd.kvmclock_ctrl();
            }
            ran = true;
            let result = catch_unwind(AssertUnwindSafe(|| self.run(&mut fd, shared)));
            dead = match result {
                Ok(Ok(stop)) => matches!(stop, Stop::Dead),
                Ok(Err(e)) => {
                    log::error!("vcpu{}: {e}\n{}", self.index, cpu_state::describe(&fd));
                    shared.events.post(Event::VcpuFailed { cpu: self.index, why: e.desc });
                    true
                }
                Err(_) => {
                    let why = "a device's register code panicked".to_string();
                    shared.events.post(Event::VcpuFailed { cpu: self.index, why });
                    true
                }
            };
        }
    }

    /// Runs the guest until control asks for something, or the guest is at its end.
    fn run(&self, fd: &mut VcpuFd, shared: &Shared) -> Result<Stop> {
        let mut unfinished = false;
        loop {
            self.run.immediate_exit().store(0, SeqCst);
            // The only place that looks: a second one after the access would leave a gap for requests
            // that come between the two.
            if self.request.load(SeqCst) {
                let dead = unfinished && self.complete(fd, shared)?;
                return Ok(if dead { Stop::Dead } else { Stop::Asked });
            }
            #[cfg(test)]
            gap::widen();
            match self.once(fd, shared)? {
                Exit::Nothing => unfinished = false,
                Exit::Access { last: false } => unfinished = true,
                Exit::Access { last: true } => {
                    self.complete(fd, shared)?;
                    return Ok(Stop::Dead);
                }
                Exit::Last => return Ok(Stop::Dead),
            }
        }
    }

    /// KVM finishes an access (writes the destination register, steps over the instruction) only
    /// in the next KVM_RUN: lets it do that and no more, so that the registers are those between
    /// two instructions. True when that was the end of the guest.
    fn complete(&self, fd: &mut VcpuFd, shared: &Shared) -> Result<bool> {
        loop {
            self.run.immediate_exit().store(1, SeqCst);
            match self.once(fd, shared)? {
                // An access in several pieces (a string instruction, a page crossed): the next piece.
                Exit::Access { last: false } => {}
                Exit::Access { last: true } | Exit::Last => return Ok(true),
                Exit::Nothing => return Ok(false),
            }
        }
    }

    /// One KVM_RUN.
    fn once(&self, fd: &mut VcpuFd, shared: &Shared) -> Result<Exit> {
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                for piece in data.chunks_mut(self.run.io_size().max(1)) {
                    shared.pio.read(u64::from(port), piece);
                }
                Ok(Exit::Access { last: false })
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let mut last = false;
                for piece in data.chunks(self.run.io_size().max(1)) {
                    last |= shared.act(shared.pio.write(u64::from(port), piece));
                }
                Ok(Exit::Access { last })
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                for (at, len) in pieces(data.len()) {
                    shared.mmio.read(addr.wrapping_add(at as u64), &mut data[at..at + len]);
                }
                Ok(Exit::Access { last: false })
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                let mut last = false;
                for (at, len) in pieces(data.len()) {
                    last |= shared.act(shared.mmio.write(addr.wrapping_add(at as u64), &data[at..at + len]));
                }
                Ok(Exit::Access { last })
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                shared.controllers.eoi(vector);
                Ok(Exit::Nothing)
            }
            // A triple fault resets the machine.
            Ok(VcpuExit::Shutdown) => {
                shared.events.post(Event::Reset);
                Ok(Exit::Last)
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                const SHUTDOWN: u32 = 1;
                const RESET: u32 = 2;
                shared.events.post(match kind {
                    SHUTDOWN => Event::Shutdown,
                    RESET => Event::Reset,
                    kind => return Err(Error::new(format!("KVM reports system event {kind}"))),
                });
                Ok(Exit::Last)
            }
            Ok(VcpuExit::InternalError) => Err(Error::new(match self.run.suberror() {
                1 => "KVM cannot emulate an instruction of the guest".to_string(),
                n => format!("KVM reports internal error {n}"),
            })),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Err(Error::new(format!("KVM cannot enter the guest: hardware reason {reason:#x}")))
            }
            Ok(VcpuExit::Intr) => Ok(Exit::Nothing),
            Ok(exit) => Err(Error::new(format!("unexpected exit from KVM: {exit:?}"))),
            // EINTR: a kick. EAGAIN: a processor that waits for INIT or SIPI has got one (or not yet).
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(Exit::Nothing),
            Err(e) => Err(fail("KVM_RUN", e)),
        }
    }
}

/// What one KVM_RUN came back with, handled.
enum Exit {
    /// Go on.
    Nothing,
    /// An access to a device, which KVM has yet to finish. `last`: the guest must not go on.
    Access { last: bool },
    /// The guest must not go on.
    Last,
}

/// Splits an access of `len` bytes (KVM reports up to 8, any number where one crosses a page) into
/// the sizes that devices know.
fn pieces(len: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = if matches!(len, 1 | 2 | 4 | 8) { len } else { 1 };
    (0..len).step_by(step).map(move |at| (at, step))
}

/// Widens the gap between the look at the request and KVM_RUN, some nanoseconds, so that a test
/// can hit it at will.
#[cfg(test)]
pub mod gap {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    /// How long it is to be; zero: as it is.
    pub static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

    /// Waits for that long.
    pub fn widen() {
        let gap = Duration::from_nanos(NANOSECONDS.load(SeqCst));
        let start = Instant::now();
        while start.elapsed() < gap {
            std::hint::spin_loop();
        }
    }
}
