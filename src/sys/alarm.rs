//! A timer that calls a function on a thread of its own, which exists only while the timer is set.
//!
//! For the rare timers of devices: what ticks all the time deserves a place in a poll set. Threads:
//! any sets; the alarm's own calls. Locks: its own mutex, a leaf; not held during the call.

use super::thread::{self, SMALL_STACK};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// See the module's head. Dropping it cancels.
pub struct Alarm {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    name: &'static str,
    call: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    when: Option<Instant>,
    running: bool,
}

impl Alarm {
    /// An alarm that is not set; `call` may set it again. The thread gets `name`.
    pub fn new(name: &'static str, call: impl Fn() + Send + Sync + 'static) -> Alarm {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Alarm { shared: Arc::new(Shared { state, changed, name, call: Box::new(call) }) }
    }

    /// Calls once at `when`, instead of any earlier setting; None: not at all. Never waits.
    pub fn set(&self, when: Option<Instant>) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.when == when {
            return;
        }
        state.when = when;
        if state.running {
            self.shared.changed.notify_one();
        } else if when.is_some() {
            let shared = self.shared.clone();
            match thread::spawn(shared.name, SMALL_STACK, move || shared.run()) {
                Ok(_) => state.running = true,
                Err(e) => log::error!("cannot start a timer ({}): {e}", self.shared.name),
            }
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.set(None);
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(when) = state.when {
            let left = when.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.when = None;
                drop(state);
                (self.call)();
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            } else {
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.running = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn it_calls_when_set_again_and_not_when_cancelled() {
        let (tx, rx) = channel();
        let tx = Mutex::new(tx);
        let alarm = Alarm::new("test", move || tx.lock().unwrap().send(Instant::now()).unwrap());
        for ms in [20, 1, 0] {
            let when = Instant::now() + Duration::from_millis(ms);
            alarm.set(Some(when));
            assert!(rx.recv_timeout(Duration::from_secs(10)).unwrap() >= when);
        }
        // Earlier than set before.
        alarm.set(Some(Instant::now() + Duration::from_secs(1000)));
        alarm.set(Some(Instant::now()));
        rx.recv_timeout(Duration::from_secs(10)).unwrap();
        alarm.set(Some(Instant::now() + Duration::from_millis(50)));
        alarm.set(None);
        assert!(rx.recv_timeout(Duration::from_millis(100)).is_err());
    }
}
