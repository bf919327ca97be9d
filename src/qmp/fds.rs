//! One monitor as the command handlers see it: its file descriptors and its negotiation.
//!
//! Owns: the descriptors that came with requests and were not taken yet, and those that `getfd`
//! gave a name. The latter belong to the monitor, not to its client: the next client finds them. Never:
//! fd sets (`sys/fdset.rs`: they belong to the VM), sockets. Threads: control. Locks: none.

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::os::fd::OwnedFd;

/// A monitor's state that outlives its client, and what the client negotiated.
#[derive(Debug, Default)]
pub struct Conn {
    pending: Vec<OwnedFd>,
    named: HashMap<String, OwnedFd>,
    /// `qmp_capabilities` has succeeded: commands run, events are sent.
    pub negotiated: bool,
    /// Out-of-band execution was enabled.
    pub oob: bool,
}

impl Conn {
    /// A monitor without a client: for commands that the configuration gives.
    pub fn new() -> Conn {
        Conn::default()
    }

    /// Descriptors have come with a message. Those of an earlier message that nobody took are
    /// closed.
    pub fn receive(&mut self, fds: Vec<OwnedFd>) {
        self.pending = fds;
    }

    /// Takes all descriptors that came and that nobody took, if there are any.
    pub fn take_pending(&mut self) -> Option<Vec<OwnedFd>> {
        (!self.pending.is_empty()).then(|| std::mem::take(&mut self.pending))
    }

    /// Takes the first descriptor that came with the request, and closes the others.
    pub fn take_fd(&mut self) -> Result<OwnedFd> {
        let fds = std::mem::take(&mut self.pending);
        fds.into_iter().next().ok_or_else(|| Error::new("No file descriptor supplied via SCM_RIGHTS"))
    }

    /// Gives `fd` a name. A descriptor that has the name already is closed.
    pub fn name_fd(&mut self, name: String, fd: OwnedFd) {
        self.named.insert(name, fd);
    }

    /// Closes a named descriptor (`closefd`).
    pub fn close_named(&mut self, name: &str) -> Result<()> {
        match self.named.remove(name) {
            Some(_) => Ok(()),
            None => Err(Error::new(format!("File descriptor named '{name}' not found"))),
        }
    }

    /// Takes a named descriptor for good, as a command that uses one by name does (`netdev_add`,
    /// `chardev-add`, …).
    pub fn take_named(&mut self, name: &str) -> Result<OwnedFd> {
        self.named
            .remove(name)
            .ok_or_else(|| Error::new(format!("File descriptor named '{name}' has not been found")))
    }

    /// The client has gone: the next one negotiates anew. Named descriptors stay, those that no
    /// command took are closed.
    pub fn hang_up(&mut self) {
        self.pending.clear();
        self.negotiated = false;
        self.oob = false;
    }
}
