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
    /// Counts its moves: the medium is the same as long as there is none.
    moves: u64,
    /// Moves of the guest's that control has not been told of, or not yet heard.
    untold: u32,
}

/// Moves that control is told of before it has heard the first: a guest that does nothing but move
/// its tray fills no memory.
const UNTOLD: u32 = 32;

/// Why a guest cannot reach the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// The tray is open.
    Open,
    /// It may be another one, and the guest has not been told: with this it is.
    Changed,
}

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
            return;
        }
        state.untold += 1;
        drop(state);
        self.events.post(Event::TrayMoved { qom_path: self.qom_path.clone(), open });
    }

    /// Control has heard of a move, to `open`, and has said so; where the tray is by now, if that was
    /// the last it hears and is not true any more: there were too many moves, or the user has moved it
    /// since, which was told before.
    pub fn told(&self, open: bool) -> Option<bool> {
        let mut state = self.state();
        state.untold = state.untold.saturating_sub(1);
        (state.untold == 0 && state.open != open).then_some(state.open)
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

    /// Whether the guest may do something with the medium that it knows: only as long as
    /// [`Tray::moves`] is what this answers.
    pub fn reach(&self) -> Result<u64, Unreachable> {
        let mut state = self.state();
        if state.open {
            return Err(Unreachable::Open);
        }
        if std::mem::take(&mut state.attention) {
            return Err(Unreachable::Changed);
        }
        Ok(state.moves)
    }

    /// How often it has moved.
    pub fn moves(&self) -> u64 {
        self.state().moves
    }

    /// The device is reset: closed, unlocked, no news.
    pub fn reset(&self) {
        let mut state = self.state();
        let (untold, was_open) = (state.untold, state.open);
        let moves = state.moves + u64::from(was_open);
        *state = State { untold, moves, ..State::default() };
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
        self.moves += 1;
        self.event = Some(if open { MediaEvent::MediaRemoval } else { MediaEvent::NewMedia });
        self.attention = !open;
        true
    }
}

#[cfg(test)]
#[path = "tray_test.rs"]
mod tests;
