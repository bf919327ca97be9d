//! The gate: the one mechanism that makes every change of the graph safe.
//!
//! Each [`Handle`](super::handle::Handle) has one. A request holds a [`Ticket`] from before it
//! looks at the graph until its last effect on it. The control thread closes the gate, waits until
//! no ticket is out, changes the graph, and opens it again; requests that come meanwhile wait in
//! [`Gate::enter`].
//!
//! Owns: a counter. Never: knows what is behind it. Threads: any enter; only the control thread
//! closes. Rules that make it deadlock-free: a thread holds at most one ticket (asserted in debug
//! builds); nobody waits for the control thread, for throttling or for a stopped VM with a ticket
//! in hand; all gates are closed before the first is waited for, so gates need no order.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

thread_local! {
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// True when the calling thread holds a ticket: what it does is part of a request, whose user waits
/// for it, and not the control thread's own business.
pub fn holds_ticket() -> bool {
    HELD.get()
}

#[derive(Default)]
struct State {
    inside: usize,
    /// How often it was closed and not opened yet: sections of the control thread nest.
    closed: usize,
}

/// See the module's head.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// The right to be behind the gate; dropping it is leaving.
pub struct Ticket<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the gate is open, and goes in.
    pub fn enter(&self) -> Ticket<'_> {
        let held = HELD.replace(true);
        debug_assert!(!held, "a thread holds at most one ticket");
        let mut state = self.lock();
        while state.closed > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        Ticket(self)
    }

    /// Closes the gate; does not wait. Control thread only.
    pub(super) fn close(&self) {
        self.lock().closed += 1;
    }

    /// Waits until nobody is inside. Control thread only, after [`Gate::close`].
    pub(super) fn wait_empty(&self) {
        let mut state = self.lock();
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate once for a [`Gate::close`].
    pub(super) fn open(&self) {
        self.lock().closed -= 1;
        self.changed.notify_all();
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        HELD.set(false);
        let mut state = self.0.lock();
        state.inside -= 1;
        let wake = state.inside == 0 && state.closed > 0;
        drop(state);
        if wake {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
#[path = "gate_test.rs"]
mod tests;
