//! A network backend ([`Netdev`]), and the registry of those that the user has named.
//!
//! Owns: the names, and who uses which backend. Never: knows a card, or what a backend is made
//! of. Threads: the registry on the control thread; a backend's frames on its card's worker.
//! Locks: none.

use super::tap::{Tap, TapOptions};
use crate::bail;
use crate::error::{Class, Error, Result};
use crate::sys::iov::{Iov, IovMut};
use crate::wire_union;
use std::io;
use std::ops::{BitAnd, BitOr};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), which
/// has `num_buffers` always.
pub const VNET_HDR: usize = 12;

/// The longest frame that a backend hands out, its header included: a 64 KiB IP packet to be
/// segmented, with Ethernet header and VLAN tag, rounded up.
pub const MAX_FRAME: usize = VNET_HDR + 65536 + 128;

/// What the receiver of frames can do by itself, so that the sender need not (`TUN_F_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload(pub u32);

impl Offload {
    /// Nothing: whole frames with right checksums.
    pub const NONE: Offload = Offload(0);
    /// Checksums may be missing; the header says where they belong.
    pub const CSUM: Offload = Offload(libc::TUN_F_CSUM);
    /// TCP over IPv4 may be unsegmented.
    pub const TSO4: Offload = Offload(libc::TUN_F_TSO4);
    /// TCP over IPv6 may be unsegmented.
    pub const TSO6: Offload = Offload(libc::TUN_F_TSO6);
    /// … also when it carries the congestion bit.
    pub const TSO_ECN: Offload = Offload(libc::TUN_F_TSO_ECN);

    /// True when every bit of `other` is set.
    pub fn contains(self, other: Offload) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Offload {
    type Output = Offload;
    fn bitor(self, o: Offload) -> Offload {
        Offload(self.0 | o.0)
    }
}

impl BitAnd for Offload {
    type Output = Offload;
    fn bitand(self, o: Offload) -> Offload {
        Offload(self.0 & o.0)
    }
}

/// The host's end of a network card. None of its calls blocks.
pub trait Netdev: Send + Sync {
    /// Readable when a frame waits, writable when one can be sent. Constant.
    fn fd(&self) -> RawFd;

    /// What both sides may leave undone; empty for a backend without a header of its own. The
    /// header is there all the same (zeroes).
    fn offloads(&self) -> Offload;

    /// From now on the receiver of [`Netdev::recv`]'s frames can do `what`, and nothing else.
    fn set_offload(&self, what: Offload) -> io::Result<()>;

    /// Takes one frame: [`VNET_HDR`] bytes of header, then the frame; returns the length of both.
    /// `to` has room for [`MAX_FRAME`]. `WouldBlock`: there is none.
    fn recv(&self, to: &mut IovMut) -> io::Result<usize>;

    /// Sends one frame, header first. `WouldBlock`: not now; the frame was not sent.
    fn send(&self, from: &Iov) -> io::Result<()>;

    /// What QEMU's `info network` shows: `ifname=tap0,…`.
    fn info(&self) -> String;
}

wire_union! {
    /// A network backend.
    pub struct NetdevOptions {
        /// Its name.
        id: String,
    }
    /// What it is.
    "type" => pub enum Backend as backend {
        /// A tap interface of the host.
        "tap" Tap(TapOptions),
    }
}

impl NetdevOptions {
    /// Refuses what cannot be, without touching the host.
    pub fn check(&self) -> Result<()> {
        match &self.backend {
            Backend::Tap(tap) => tap.check(),
        }
    }
}

struct Entry {
    id: String,
    backend: Arc<dyn Netdev>,
    /// The card that has it.
    user: Option<String>,
}

/// The backends that the user has named, in the order of their making.
#[derive(Default)]
pub struct Netdevs {
    list: Vec<Entry>,
}

impl Netdevs {
    /// `netdev_add`. `fd` finds the descriptor of a `fd` member: a name that `getfd` gave, or the
    /// number of an inherited one.
    pub fn add(&mut self, options: &NetdevOptions, fd: impl FnOnce(&str) -> Result<OwnedFd>) -> Result<()> {
        self.check_id(&options.id)?;
        let backend: Arc<dyn Netdev> = match &options.backend {
            Backend::Tap(tap) => Arc::new(Tap::open(tap, fd)?),
        };
        self.insert(&options.id, backend)
    }

    /// Adds a backend that is open already.
    pub fn insert(&mut self, id: &str, backend: Arc<dyn Netdev>) -> Result<()> {
        self.check_id(id)?;
        self.list.push(Entry { id: id.to_string(), backend, user: None });
        Ok(())
    }

    fn check_id(&self, id: &str) -> Result<()> {
        // QEMU's id_wellformed().
        let letter = id.starts_with(|c: char| c.is_ascii_alphabetic());
        if !letter || !id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
            bail!("Parameter 'id' expects an identifier");
        }
        if self.find(id).is_some() {
            bail!("Duplicate ID '{id}'");
        }
        Ok(())
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.list.iter().position(|e| e.id == id)
    }

    /// Gives backend `id` to a card. `property` is what names it (`virtio-net-pci.netdev`), `user`
    /// the card's id or path.
    pub fn attach(&mut self, id: &str, property: &str, user: &str) -> Result<Arc<dyn Netdev>> {
        let Some(at) = self.find(id) else {
            bail!("Property '{property}' can't find value '{id}'");
        };
        let entry = &mut self.list[at];
        if entry.user.is_some() {
            bail!("Property '{property}' can't take value '{id}', it's in use");
        }
        entry.user = Some(user.to_string());
        Ok(entry.backend.clone())
    }

    /// The card is gone; another may have the backend.
    pub fn detach(&mut self, id: &str) {
        if let Some(at) = self.find(id) {
            self.list[at].user = None;
        }
    }

    /// `netdev_del`: forgets backend `id`. A card that has it keeps it until the card goes.
    pub fn remove(&mut self, id: &str) -> Result<()> {
        let Some(at) = self.find(id) else {
            return Err(Error::of(Class::DeviceNotFound, format!("Device '{id}' not found")));
        };
        self.list.remove(at);
        Ok(())
    }

    /// The backends: id, what it is, and whose it is.
    pub fn iter(&self) -> impl Iterator<Item = (&str, String, Option<&str>)> {
        self.list.iter().map(|e| (e.id.as_str(), e.backend.info(), e.user.as_deref()))
    }
}

#[cfg(test)]
#[path = "netdev_test.rs"]
mod tests;
