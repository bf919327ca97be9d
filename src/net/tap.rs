//! The `tap` backend: an Ethernet interface of the host (`/dev/net/tun`).
//!
//! Owns: the descriptor. Never: makes, configures or removes a persistent interface, or runs a
//! script; the interface is what the user made it. Threads: opened on control, frames on the
//! card's worker. Locks: none.

use super::netdev::{Netdev, Offload, VNET_HDR};
use crate::bail;
use crate::error::{Error, Result, strerror};
use crate::sys::iov::{Iov, IovMut};
use crate::sys::tun;
use crate::wire_struct;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

const DEVICE: &str = "/dev/net/tun";

wire_struct! {
    /// A tap interface of the host. (QEMU's `NetdevTapOptions`, as far as they exist here.)
    pub struct TapOptions {
        /// The interface; without it the kernel makes `tap0`, `tap1`, …
        ifname: Option<String>,
        /// An open `/dev/net/tun` that is an interface already: a `getfd` name or a number.
        fd: Option<String>,
        /// Several of them; refused (one queue).
        fds: Option<String>,
        /// Only `no`: no scripts are run.
        script: Option<String>,
        /// Only `no`.
        downscript: Option<String>,
        /// Bytes that may be under way to the host; absent: no limit.
        sndbuf: Option<u64>,
        /// Frames come with a header, for checksum and segmentation offload; absent: if possible.
        vnet_hdr: Option<bool>,
        /// Only false: frames go through this process.
        vhost: Option<bool>,
        /// Only 1.
        queues: Option<u32>,
    }
}

// The macro derives what all structs have, which is not this.
#[allow(clippy::derivable_impls)]
impl Default for TapOptions {
    fn default() -> TapOptions {
        TapOptions {
            ifname: None,
            fd: None,
            fds: None,
            script: None,
            downscript: None,
            sndbuf: None,
            vnet_hdr: None,
            vhost: None,
            queues: None,
        }
    }
}

impl TapOptions {
    /// Refuses what no tap can be, without opening one.
    pub fn check(&self) -> Result<()> {
        let foreign = self.ifname.is_some()
            || self.script.is_some()
            || self.downscript.is_some()
            || self.vnet_hdr.is_some()
            || self.queues.is_some()
            || self.fds.is_some();
        if self.fd.is_some() && foreign {
            bail!(
                "ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, fds=, and vhostfds= \
                 are invalid with fd="
            );
        }
        if self.fds.is_some() || self.queues.is_some_and(|n| n != 1) {
            bail!("a tap has one queue here: pass one descriptor as 'fd', or leave 'queues' out");
        }
        for (key, value) in [("script", &self.script), ("downscript", &self.downscript)] {
            if value.as_deref().is_some_and(|v| v != "no") {
                bail!("'{key}' must be \"no\": no scripts are run; set the interface up beforehand");
            }
        }
        if self.vhost == Some(true) {
            bail!("'vhost' is not available: leave it out or set it to false");
        }
        if self.ifname.as_ref().is_some_and(|n| n.is_empty() || n.len() > 15 || n.contains(['/', '\0'])) {
            bail!("'ifname' must be the name of an interface, 1 to 15 characters");
        }
        Ok(())
    }
}

/// An open tap interface.
pub struct Tap {
    fd: OwnedFd,
    name: String,
    vnet_hdr: bool,
    offloads: Offload,
}

impl Tap {
    /// Opens the interface that `options` name. See [`super::netdev::Netdevs::add`] for `fd`.
    pub fn open(options: &TapOptions, fd: impl FnOnce(&str) -> Result<OwnedFd>) -> Result<Tap> {
        options.check()?;
        let (fd, name, vnet_hdr) = match &options.fd {
            Some(name) => passed(name, fd(name)?)?,
            None => by_name(options)?,
        };
        let fail = |what: &str, e: io::Error| Error::new(format!("{what} of {name}: {}", strerror(&e)));
        let mut offloads = Offload::NONE;
        if vnet_hdr {
            tun::set_vnet_hdr_len(fd.as_fd(), VNET_HDR as i32)
                .map_err(|e| fail("could not set the header length", e))?;
            // What the kernel refuses is not offered: ask for less until it agrees.
            let tso = Offload::TSO4 | Offload::TSO6;
            for try_ in
                [Offload::CSUM | tso | Offload::TSO_ECN, Offload::CSUM | tso, Offload::CSUM, Offload::NONE]
            {
                if tun::set_offload(fd.as_fd(), try_.0).is_ok() {
                    offloads = try_;
                    break;
                }
            }
            // Until a guest says otherwise it gets plain frames.
            tun::set_offload(fd.as_fd(), 0).map_err(|e| fail("could not set the offloads", e))?;
        }
        if let Some(bytes) = options.sndbuf {
            let bytes = if bytes == 0 { i32::MAX } else { i32::try_from(bytes).unwrap_or(i32::MAX) };
            tun::set_sndbuf(fd.as_fd(), bytes).map_err(|e| fail("could not set 'sndbuf'", e))?;
        }
        Ok(Tap { fd, name, vnet_hdr, offloads })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn by_name(options: &TapOptions) -> Result<(OwnedFd, String, bool)> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
    let fd: OwnedFd = file
        .map_err(|e| {
            let remedy = match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV) => "; load the kernel module: modprobe tun",
                Some(libc::EACCES | libc::EPERM) => {
                    "; make it readable and writable for this user, or pass an open tap as 'fd'"
                }
                _ => "",
            };
            Error::new(format!("could not open {DEVICE}: {}{remedy}", strerror(&e)))
        })?
        .into();
    let kernel_can = tun::features(fd.as_fd()).is_ok_and(|f| f & libc::IFF_VNET_HDR != 0);
    if options.vnet_hdr == Some(true) && !kernel_can {
        bail!("vnet_hdr=1 requested, but no kernel support for IFF_VNET_HDR available");
    }
    let vnet_hdr = options.vnet_hdr.unwrap_or(true) && kernel_can;
    let wanted = options.ifname.as_deref().unwrap_or("tap%d");
    let name = tun::attach(fd.as_fd(), wanted, vnet_hdr).map_err(|e| {
        let remedy = match e.raw_os_error() {
            Some(libc::EPERM) => format!(
                "; making or using an interface needs CAP_NET_ADMIN, unless it was made for this user: \
                 ip tuntap add dev {} mode tap vnet_hdr user $USER",
                options.ifname.as_deref().unwrap_or("tap0")
            ),
            Some(libc::EBUSY) => "; another process has the interface open: stop it, or name \
                                  another 'ifname'"
                .to_string(),
            Some(libc::EINVAL) => "; the interface exists and is not a single-queue tap: name another \
                                   'ifname', or make it with: ip tuntap add dev NAME mode tap"
                .to_string(),
            _ => String::new(),
        };
        Error::new(format!("could not configure {DEVICE} ({wanted}): {}{remedy}", strerror(&e)))
    })?;
    Ok((fd, name, vnet_hdr))
}

fn passed(name: &str, fd: OwnedFd) -> Result<(OwnedFd, String, bool)> {
    tun::set_nonblocking(fd.as_fd())
        .map_err(|e| Error::new(format!("{name}: Can't use file descriptor {name}: {}", strerror(&e))))?;
    let (ifname, flags) = tun::attached(fd.as_fd()).map_err(|e| {
        Error::new(format!(
            "Unable to query TUNGETIFF on FD {name}: {}; 'fd' must be an open {DEVICE} with an \
             interface attached",
            strerror(&e)
        ))
    })?;
    if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
        bail!("'fd' {name} ({ifname}) must be a tap (not tun) opened with IFF_TAP and IFF_NO_PI");
    }
    Ok((fd, ifname, flags & libc::IFF_VNET_HDR != 0))
}

impl Netdev for Tap {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn offloads(&self) -> Offload {
        self.offloads
    }

    fn set_offload(&self, what: Offload) -> io::Result<()> {
        if self.vnet_hdr { tun::set_offload(self.fd.as_fd(), (what & self.offloads).0) } else { Ok(()) }
    }

    fn recv(&self, to: &mut IovMut) -> io::Result<usize> {
        if self.vnet_hdr {
            return tun::read_frame(self.fd.as_fd(), to);
        }
        let room = to.len() - VNET_HDR;
        let n = tun::read_frame(self.fd.as_fd(), &mut to.slice(VNET_HDR, room))?;
        to.fill(0, VNET_HDR, 0);
        Ok(n + VNET_HDR)
    }

    fn send(&self, from: &Iov) -> io::Result<()> {
        let skip = if self.vnet_hdr { 0 } else { VNET_HDR };
        tun::write_frame(self.fd.as_fd(), &from.slice(skip, from.len() - skip)).map(|_| ())
    }

    fn info(&self) -> String {
        format!("type=tap,ifname={},vnet_hdr={}", self.name, if self.vnet_hdr { "on" } else { "off" })
    }
}

#[cfg(test)]
#[path = "tap_test.rs"]
mod tests;
