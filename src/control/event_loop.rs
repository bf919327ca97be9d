//! The control thread's loop: one poll(2) over the inbox, the signals and the sources.
//!
//! Owns: the poll set and its order of work. Never: knows what a source is (the QMP server stands
//! on a floor above) or what an event leads to ([`Vm::take_events`]). Threads: control. Locks: none.

use super::vm::{Cause, Vm};
use crate::sys::poll::{PollSet, Signals};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

/// Something with descriptors that the loop serves: the QMP server.
pub trait Source {
    /// Says what to wait for in the coming turn (descriptors and deadlines). It may keep the
    /// tokens for [`Source::dispatch`].
    fn prepare(&mut self, vm: &mut Vm, set: &mut PollSet);

    /// Serves what is ready. Called in every turn, also when none of its descriptors is ready:
    /// deadlines may have passed, and [`Vm::outbox`] may have something in it.
    fn dispatch(&mut self, vm: &mut Vm, set: &PollSet);

    /// The VM ends: sends what is still to be sent (the last events and replies), without waiting
    /// for a client that does not read. Descriptors stay open until the source is dropped, which
    /// happens after the disks are closed.
    fn finish(&mut self, vm: &mut Vm);
}

/// The signals that end the VM in an orderly way.
pub const TERMINATION: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Runs until the VM ends; the exit status. The inbox goes first in a turn, so that what a client
/// asks for sees what has happened before.
pub fn run(vm: &mut Vm, signals: &Signals, sources: &mut [&mut dyn Source]) -> io::Result<u8> {
    let mut set = PollSet::default();
    loop {
        set.clear();
        let inbox = set.add(vm.events.as_raw_fd(), libc::POLLIN);
        let signal = set.add(signals.as_raw_fd(), libc::POLLIN);
        sources.iter_mut().for_each(|s| s.prepare(vm, &mut set));
        if let Some(when) = vm.graph.tidy(Instant::now()) {
            set.until(when);
        }
        set.wait()?;
        if set.ready(signal) != 0 {
            while let Some(number) = signals.take() {
                log::info!("signal {number}: the VM ends");
                vm.quit(Cause::HostSignal, 0);
            }
        }
        if set.ready(inbox) != 0 {
            vm.take_events();
        }
        sources.iter_mut().for_each(|s| s.dispatch(vm, &set));
        if let Some(status) = vm.exit() {
            // Their last events are still told.
            vm.end_jobs();
            sources.iter_mut().for_each(|s| s.finish(vm));
            return Ok(status);
        }
    }
}

#[cfg(test)]
#[path = "event_loop_test.rs"]
mod tests;
