//! The rules of [`blkdebug`](super::blkdebug): which request fails, which is held back.
//!
//! As in QEMU: a moment that brings an error takes the place of the errors that earlier moments
//! brought; among several rules for a moment the first decides; a breakpoint is gone once it holds
//! a request. What a request goes through is on its own thread. A request that comes to its
//! breakpoint while its format holds a lock is held at its next moment without one.
//!
//! Owns: rules, state, who is held. Never: does I/O, but for the two lines that QEMU prints and
//! reading the rules' file. Threads: any. Locks: its own; a held request holds none of it.

use super::blkdebug::{BlkdebugIOType, BlkdebugInjectErrorOptions, BlkdebugOptions, BlkdebugSetStateOptions};
use super::debug::{BlkdebugEvent, Locks, Moments};
use super::gate;
use super::node::errno;
use crate::bail;
use crate::error::{Error, Result, strerror};
use std::cell::Cell;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

/// What a request does; the order is that of [`BlkdebugIOType`].
pub(super) use super::blkdebug::BlkdebugIOType as Kind;

/// The most that is read of a file of rules, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

thread_local! {
    /// The last moment of this thread was under a lock.
    static LOCKED: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Inject { error: i32, once: bool, offset: Option<u64>, kinds: u8 },
    SetState(i64),
    Break(String),
}

#[derive(Clone, Debug)]
struct Rule {
    id: u64,
    event: BlkdebugEvent,
    /// 0: in any.
    state: i64,
    action: Action,
}

/// A request that is held back.
struct Held {
    id: u64,
    tag: String,
}

struct State {
    state: i64,
    rules: Vec<Rule>,
    /// The errors that the last moment brought: ids, the first decides.
    active: Vec<u64>,
    held: Vec<Held>,
    /// Who is to be held at his next moment without a lock.
    owing: Vec<(ThreadId, String)>,
    ids: u64,
    hurry: usize,
    closed: bool,
}

/// See the module's head.
pub(super) struct Rules {
    state: Mutex<State>,
    changed: Condvar,
}

fn kind_bit(kind: Kind) -> u8 {
    1 << kind as u8
}

fn inject(o: &BlkdebugInjectErrorOptions) -> Result<Action> {
    let number = o.errno.unwrap_or(i64::from(libc::EIO));
    let Some(error) = i32::try_from(number).ok().filter(|n| *n >= 0) else {
        bail!("Value '{number}' is out of range for parameter 'errno'");
    };
    let offset =
        match o.sector.unwrap_or(-1) {
            -1 => None,
            sector => Some(u64::try_from(sector).ok().and_then(|s| s.checked_mul(512)).ok_or_else(|| {
                Error::new(format!("Value '{sector}' is out of range for parameter 'sector'"))
            })?),
        };
    // Errors in what is only asked surprise: those must be asked for.
    let most = || Kind::ALL.iter().filter(|k| **k != Kind::BlockStatus).fold(0, |m, k| m | kind_bit(*k));
    let kinds = o.iotype.map_or_else(most, kind_bit);
    Ok(Action::Inject { error, once: o.once.unwrap_or(false), offset, kinds })
}

/// A rule as a file or the options have it.
type Parsed = (BlkdebugEvent, i64, Action);

/// Reads a file of rules: sections `[inject-error]` and `[set-state]` with lines `name = "value"`.
fn read_config(path: &str) -> Result<Vec<Parsed>> {
    let mut text = String::new();
    // A pipe must not make the control thread wait.
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let done = opened.and_then(|f| f.take(CONFIG_MAX).read_to_string(&mut text));
    done.map_err(|e| Error::new(format!("Could not read blkdebug config file: {}", strerror(&e))))?;
    parse_config(&text)
}

/// One section of a file of rules.
struct Section<'a> {
    name: &'a str,
    options: Vec<(&'a str, &'a str)>,
}

impl Section<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.options.iter().rfind(|(n, _)| *n == name).map(|(_, v)| *v)
    }

    fn number(&self, name: &str) -> Result<Option<i64>> {
        let bad = |_| Error::new(format!("Parameter '{name}' expects a number"));
        self.get(name).map(|v| v.parse().map_err(bad)).transpose()
    }

    fn switch(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(_) => bail!("Parameter '{name}' expects 'on' or 'off'"),
        }
    }

    fn rule(&self) -> Result<Parsed> {
        let Some(word) = self.get("event") else {
            bail!("Missing event name for rule");
        };
        let bad = |word: &str| Error::new(format!("invalid parameter value: {word}"));
        let event = BlkdebugEvent::from_word(word).ok_or_else(|| bad(word))?;
        let state = self.number("state")?;
        if self.name == "set-state" {
            let new_state = self.number("new_state")?.unwrap_or(0);
            return Ok((event, state.unwrap_or(0), Action::SetState(new_state)));
        }
        let iotype = self.get("iotype").map(|w| BlkdebugIOType::from_word(w).ok_or_else(|| bad(w)));
        let options = BlkdebugInjectErrorOptions {
            event,
            state,
            iotype: iotype.transpose()?,
            errno: self.number("errno")?,
            sector: self.number("sector")?,
            once: self.switch("once")?,
            immediately: self.switch("immediately")?,
        };
        Ok((event, state.unwrap_or(0), inject(&options)?))
    }
}

fn parse_config(text: &str) -> Result<Vec<Parsed>> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(head) = line.strip_prefix('[') {
            // A section may have a name of its own, which means nothing: [inject-error "x"].
            let name = head.split([']', ' ']).next().unwrap_or_default();
            if !head.ends_with(']') || !["inject-error", "set-state"].contains(&name) {
                bail!("There is no option group '{name}'");
            }
            sections.push(Section { name, options: Vec::new() });
            continue;
        }
        let Some(section) = sections.last_mut() else {
            bail!("no group defined");
        };
        let known: &[&str] = match section.name {
            "set-state" => &["event", "state", "new_state"],
            _ => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
        };
        let name = line.split([' ', '=']).next().unwrap_or_default();
        if !known.contains(&name) {
            bail!("Invalid parameter '{name}'");
        }
        let value = line[name.len()..].trim_start().strip_prefix('=').map(str::trim);
        let value = value.and_then(|v| v.strip_prefix('"')?.strip_suffix('"'));
        let Some(value) = value else {
            bail!("blkdebug: '{line}' is not of the form name = \"value\"");
        };
        section.options.push((name, value));
    }
    sections.iter().map(Section::rule).collect()
}

/// The line that QEMU prints; a reader who went away is no matter.
fn say(what: &str, tag: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "blkdebug: {what} request '{tag}'").and_then(|()| out.flush());
}

impl Rules {
    pub fn new(o: &BlkdebugOptions) -> Result<Rules> {
        let mut list = o.config.as_deref().map(read_config).transpose()?.unwrap_or_default();
        for i in o.inject_error.iter().flatten() {
            list.push((i.event, i.state.unwrap_or(0), inject(i)?));
        }
        for BlkdebugSetStateOptions { event, state, new_state } in o.set_state.iter().flatten() {
            list.push((*event, state.unwrap_or(0), Action::SetState(*new_state)));
        }
        let state = State {
            state: 1,
            rules: Vec::new(),
            active: Vec::new(),
            held: Vec::new(),
            owing: Vec::new(),
            ids: 0,
            hurry: 0,
            closed: false,
        };
        let rules = Rules { state: Mutex::new(state), changed: Condvar::new() };
        for (event, state, action) in list {
            rules.lock().add(event, state, action);
        }
        Ok(rules)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request must fail.
    pub fn check(&self, kind: Kind, off: u64, len: u64) -> io::Result<()> {
        let mut s = self.lock();
        let hit = s.active.iter().find_map(|id| {
            let rule = s.rules.iter().find(|r| r.id == *id)?;
            let Action::Inject { error, once, offset, kinds } = rule.action else { return None };
            let there = offset.is_none_or(|at| at >= off && at - off < len);
            (there && kinds & kind_bit(kind) != 0).then_some((*id, error, once))
        });
        let Some((id, error, once)) = hit.filter(|(_, error, _)| *error != 0) else { return Ok(()) };
        if once {
            s.remove(id);
        }
        Err(errno(error))
    }

    /// See [`Driver::hurry`](super::driver::Driver::hurry).
    pub fn hurry(&self, on: bool) {
        let mut s = self.lock();
        if on {
            s.hurry += 1;
            self.changed.notify_all();
        } else {
            s.hurry -= 1;
        }
    }

    /// The node is closed: nobody waits any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Holds the calling request back until it is resumed.
    fn hold(&self, tag: String) {
        // Without the lock: standard output may be full.
        say("Suspended", &tag);
        let mut s = self.lock();
        s.ids += 1;
        let id = s.ids;
        s.held.push(Held { id, tag: tag.clone() });
        self.changed.notify_all();
        while s.hurry == 0 && !s.closed && s.held.iter().any(|h| h.id == id) {
            s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
        let held = s.held.len();
        s.held.retain(|h| h.id != id);
        let by_hurry = s.held.len() != held;
        drop(s);
        if by_hurry {
            say("Resuming", &tag);
        }
    }

    /// Lets requests of that tag go on: the newest, or all. False: there is none.
    fn release(&self, tag: &str, all: bool) -> bool {
        let mut any = false;
        loop {
            let newest = self.lock().held.iter().rfind(|h| h.tag == tag).map(|h| h.id);
            let Some(id) = newest else { return any };
            say("Resuming", tag);
            self.lock().held.retain(|h| h.id != id);
            self.changed.notify_all();
            any = true;
            if !all {
                return true;
            }
        }
    }
}

impl State {
    fn add(&mut self, event: BlkdebugEvent, state: i64, action: Action) {
        self.ids += 1;
        self.rules.push(Rule { id: self.ids, event, state, action });
    }

    fn remove(&mut self, id: u64) {
        self.rules.retain(|r| r.id != id);
        self.active.retain(|a| *a != id);
    }

    /// Does what the rules for `event` say; answers the breakpoints that the caller came to.
    fn happens(&mut self, event: BlkdebugEvent) -> Vec<String> {
        let may_wait = gate::holds_ticket() && self.hurry == 0 && !self.closed;
        let (now, mut next) = (self.state, self.state);
        let (mut errors, mut breaks, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        // The last one first, as in QEMU: the first has the last word.
        let here = |r: &&Rule| r.event == event && (r.state == 0 || r.state == now);
        for rule in self.rules.iter().rev().filter(here) {
            match &rule.action {
                Action::Inject { .. } => errors.insert(0, rule.id),
                Action::SetState(state) => next = *state,
                Action::Break(tag) if may_wait => {
                    breaks.push(tag.clone());
                    gone.push(rule.id);
                }
                Action::Break(_) => {}
            }
        }
        if !errors.is_empty() {
            self.active = errors;
        }
        gone.into_iter().for_each(|id| self.remove(id));
        self.state = next;
        breaks
    }
}

impl Moments for Rules {
    fn moment(&self, event: Option<BlkdebugEvent>, locks: Locks) {
        let locked = match locks {
            Locks::AsBefore => LOCKED.get(),
            new => new == Locks::Held,
        };
        LOCKED.set(locked);
        let Some(event) = event else { return };
        let mut s = self.lock();
        let mut breaks = s.happens(event);
        if breaks.is_empty() && s.owing.is_empty() {
            return;
        }
        let me = std::thread::current().id();
        if locked {
            s.owing.extend(breaks.into_iter().map(|tag| (me, tag)));
            return;
        }
        breaks.extend(s.owing.extract_if(.., |(thread, _)| *thread == me).map(|(_, tag)| tag));
        drop(s);
        breaks.into_iter().for_each(|tag| self.hold(tag));
    }

    fn set_break(&self, event: &str, tag: &str) -> io::Result<()> {
        let event = BlkdebugEvent::from_word(event).ok_or_else(|| errno(libc::ENOENT))?;
        self.lock().add(event, 0, Action::Break(tag.to_string()));
        Ok(())
    }

    fn remove_break(&self, tag: &str) -> io::Result<()> {
        let mut s = self.lock();
        let before = s.rules.len();
        s.rules.retain(|r| !matches!(&r.action, Action::Break(t) if t == tag));
        let removed = s.rules.len() != before;
        drop(s);
        if self.release(tag, true) || removed { Ok(()) } else { Err(errno(libc::ENOENT)) }
    }

    fn resume(&self, tag: &str) -> io::Result<()> {
        if self.release(tag, false) { Ok(()) } else { Err(errno(libc::ENOENT)) }
    }

    fn wait_break(&self, tag: &str) {
        let mut s = self.lock();
        while !s.closed && !s.held.iter().any(|h| h.tag == tag) {
            s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
