//! A tray: open or closed, locked or not, and what the guest has still to hear about it.
//!
//! Owns: that state. Never: the medium (a handle's node), SCSI. Threads: control moves it for the
//! user; the device's workers move and lock it for the guest and fetch the news. Locks: its own,
//! leaves, not held while anything is called.
//!
//! What is in the drive is the guest's only while the tray is closed. A guest's move is told to the
//! control thread ([`Event::TrayMoved`]); a user's move is told to the guest by
//! [`Tray::take_event`] and [`Tray::take_attention`].

use crate::event::{Event, Events};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Media events of MMC's GET EVENT STATUS NOTIFICATION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaEvent {
    /// The user wants the medium; the guest is to unlock the tray and open it.
    EjectRequest = 1,
    /// A medium has come, perhaps another one.
    NewMedia = 2,
    /// The medium has gone.
    MediaRemoval = 3,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    locked: bool,
    event: Option<MediaEvent>,
    /// The medium may be another one than the guest knows.
    attention: bool,
    /// Moves of the guest's that control has not been told of, or not yet heard.
    untold: u32,
    /// There were too many: what control hears last is not where the tray is.
    skipped: bool,
}

/// Moves that control is told of before it has heard the first: a guest that does nothing but move
/// its tray fills no memory.
const UNTOLD: u32 = 32;

type Hook = Box<dyn Fn() + Send + Sync>;

/// See the module's head.
pub struct Tray {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
    qom_path: String,
    events: Events,
}

impl Tray {
    /// The closed tray of the device at `qom_path`.
    pub fn new(qom_path: &str, events: Events) -> Arc<Tray> {
        let (state, hook) = (Mutex::default(), Mutex::new(None));
        Arc::new(Tray { state, hook, qom_path: qom_path.into(), events })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while it is open.
    pub fn is_open(&self) -> bool {
        self.state().open
    }

    /// True while the guest prevents the removal of the medium.
    pub fn is_locked(&self) -> bool {
        self.state().locked
    }

    /// Calls `hook` when the guest has something to fetch. Control thread.
    pub fn on_news(&self, hook: Option<Hook>) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    fn news(&self) {
        if let Some(hook) = &*self.hook.lock().unwrap_or_else(PoisonError::into_inner) {
            hook();
        }
    }

    /// The user moves it, whatever the lock says; false when it is there already.
    pub fn set_open(&self, open: bool) -> bool {
        let moved = self.state().set_open(open);
        if moved {
            self.news();
        }
        moved
    }

    /// The user asks the guest to open it; `force` takes the lock away.
    pub fn request_eject(&self, force: bool) {
        {
            let mut state = self.state();
            state.event = Some(MediaEvent::EjectRequest);
            state.locked &= !force;
        }
        self.news();
    }

    /// The guest moves it; false when it has locked it.
    pub fn guest_move(&self, open: bool) -> bool {
        let mut state = self.state();
        if open && !state.open && state.locked {
            return false;
        }
        if state.set_open(open) {
            self.tell(state, open);
        }
        true
    }

    fn tell(&self, mut state: MutexGuard<State>, open: bool) {
        if state.untold >= UNTOLD {
            state.skipped = true;
            return;
        }
        state.untold += 1;
        drop(state);
        self.events.post(Event::TrayMoved { qom_path: self.qom_path.clone(), open });
    }

    /// Control has heard of a move, to `open`; where the tray has gone since without its being told.
    pub fn told(&self, open: bool) -> Option<bool> {
        let mut state = self.state();
        state.untold = state.untold.saturating_sub(1);
        let caught_up = state.untold == 0 && std::mem::take(&mut state.skipped);
        (caught_up && state.open != open).then_some(state.open)
    }

    /// The guest prevents or allows the removal of the medium.
    pub fn lock(&self, locked: bool) {
        self.state().locked = locked;
    }

    /// The next event for the guest.
    pub fn take_event(&self) -> Option<MediaEvent> {
        self.state().event.take()
    }

    /// True once after the medium may have changed.
    pub fn take_attention(&self) -> bool {
        std::mem::take(&mut self.state().attention)
    }

    /// The device is reset: closed, unlocked, no news.
    pub fn reset(&self) {
        let mut state = self.state();
        let (untold, skipped) = (state.untold, state.skipped);
        let was_open = std::mem::replace(&mut *state, State { untold, skipped, ..State::default() }).open;
        if was_open {
            self.tell(state, false);
        }
    }
}

impl State {
    fn set_open(&mut self, open: bool) -> bool {
        if self.open == open {
            return false;
        }
        self.open = open;
        self.event = Some(if open { MediaEvent::MediaRemoval } else { MediaEvent::NewMedia });
        self.attention = !open;
        true
    }
}

#[cfg(test)]
#[path = "tray_test.rs"]
mod tests;
