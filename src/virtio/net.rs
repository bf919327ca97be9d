//! virtio-net: a network card (virtio 1.2, 5.1) on a [`Netdev`]. What its queues do is in
//! `net_io.rs`.
//!
//! Owns: the properties, the configuration space, which offloads both ends agreed on. Never: knows
//! what the backend is. Threads: vCPUs read the configuration (nothing is locked); control makes
//! it and sets the link; one thread of its own runs the [`NetWorker`] between DRIVER_OK and reset.
//! Locks: none.
//!
//! There is no control queue: the host's end filters nothing, so that there is nothing to control.

use super::device::{Kind, Task, Thread, Transport, VirtioDevice};
use super::net_io::NetWorker;
use super::queue::MAX_SIZE;
use crate::bail;
use crate::error::Result;
use crate::net::netdev::{Netdev, Offload};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// What the backend's offloads mean as features: for frames to the driver, and from it.
const OFFLOADS: [(Offload, u64, u64); 4] = [
    (Offload::CSUM, F_GUEST_CSUM, F_CSUM),
    (Offload::TSO4, F_GUEST_TSO4, F_HOST_TSO4),
    (Offload::TSO6, F_GUEST_TSO6, F_HOST_TSO6),
    (Offload::TSO_ECN, F_GUEST_ECN, F_HOST_ECN),
];

/// `status` bit 0: the link is up.
const LINK_UP: u8 = 1;
/// Bytes of `struct virtio_net_config` up to `mtu` (virtio 1.2, 5.1.4).
const CONFIG_LEN: usize = 12;

/// The properties of `virtio-net-pci`, with QEMU's names and defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConfig {
    /// Name for the thread and the log.
    pub id: String,
    /// The card's address.
    pub mac: [u8; 6],
    /// Entries of the receive queue; a power of two from 64 to 1024.
    pub rx_queue_size: u16,
    /// Entries of the transmit queue; a power of two from 64 to 1024.
    pub tx_queue_size: u16,
    /// Largest packet that the driver may count on, in bytes; 0: not told.
    pub host_mtu: u16,
    /// Frames may be spread over several buffers.
    pub mrg_rxbuf: bool,
    /// Checksums may be left to the other end.
    pub csum: bool,
    /// Segmentation may be left to the other end.
    pub gso: bool,
}

impl Default for NetConfig {
    fn default() -> NetConfig {
        NetConfig {
            id: String::new(),
            mac: default_mac(0),
            rx_queue_size: 256,
            tx_queue_size: 256,
            host_mtu: 0,
            mrg_rxbuf: true,
            csum: true,
            gso: true,
        }
    }
}

/// The address of the `n`th card that was given none, as QEMU counts them.
pub fn default_mac(n: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x12, 0x34, 0x56_u8.wrapping_add(n)]
}

/// An address written as six pairs of hexadecimal digits with colons (or dashes) between.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|p| (1..=2).contains(&p.len()))?;
        // from_str_radix would take a sign.
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| !part.starts_with('+'))?;
    }
    parts.next().is_none().then_some(mac)
}

impl NetConfig {
    /// Refuses what the card cannot be.
    pub fn check(&self) -> Result<()> {
        for (name, size) in [("rx_queue_size", self.rx_queue_size), ("tx_queue_size", self.tx_queue_size)] {
            if !(64..=MAX_SIZE).contains(&size) || !size.is_power_of_two() {
                bail!("Invalid {name} (= {size}), must be a power of 2 between 64 and {MAX_SIZE}.");
            }
        }
        if self.mac[0] & 1 != 0 {
            bail!("Property 'mac' must not be a multicast address");
        }
        if self.host_mtu != 0 && self.host_mtu < 68 {
            bail!("Property 'host_mtu' must be 0 or at least 68");
        }
        Ok(())
    }
}

/// See the module's head.
pub struct Net {
    config: NetConfig,
    netdev: Arc<dyn Netdev>,
    queue_sizes: [u16; 2],
    link: Arc<AtomicBool>,
    transport: OnceLock<Arc<dyn Transport>>,
}

impl Net {
    /// A card on `netdev`. Control thread.
    pub fn new(config: NetConfig, netdev: Arc<dyn Netdev>) -> Result<Arc<Net>> {
        config.check()?;
        Ok(Arc::new(Net {
            queue_sizes: [config.rx_queue_size, config.tx_queue_size],
            config,
            netdev,
            link: Arc::new(AtomicBool::new(true)),
            transport: OnceLock::new(),
        }))
    }

    /// The properties it was made with.
    pub fn config(&self) -> &NetConfig {
        &self.config
    }

    /// Plugs the cable in, or pulls it: without it nothing is received and what is sent is lost.
    pub fn set_link(&self, up: bool) {
        if self.link.swap(up, Ordering::SeqCst) != up
            && let Some(transport) = self.transport.get()
        {
            transport.config_changed();
        }
    }

    fn offloads(&self) -> impl Iterator<Item = &'static (Offload, u64, u64)> {
        let all = self.netdev.offloads();
        let (csum, gso) = (self.config.csum, self.config.csum && self.config.gso);
        OFFLOADS
            .iter()
            .filter(move |(o, ..)| all.contains(*o) && if *o == Offload::CSUM { csum } else { gso })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind { id: 1, class: 0x02_00_00, name: "virtio-net" }
    }

    fn features(&self) -> u64 {
        let mtu = if self.config.host_mtu != 0 { F_MTU } else { 0 };
        let merge = if self.config.mrg_rxbuf { F_MRG_RXBUF } else { 0 };
        let offloads = self.offloads().fold(0, |all, (_, guest, host)| all | guest | host);
        F_MAC | F_STATUS | mtu | merge | offloads
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, off: u64, data: &mut [u8]) {
        let mut bytes = [0; CONFIG_LEN];
        bytes[..6].copy_from_slice(&self.config.mac);
        bytes[6] = if self.link.load(Ordering::SeqCst) { LINK_UP } else { 0 };
        bytes[8] = 1; // one pair of queues
        bytes[10..].copy_from_slice(&self.config.host_mtu.to_le_bytes());
        let Ok(off) = usize::try_from(off) else { return };
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(off)) {
            *to = *from;
        }
    }

    fn attach(&self, transport: Arc<dyn Transport>) {
        // A second transport would be an error of the caller; the first one stays.
        let _ = self.transport.set(transport);
    }

    fn start(&self, acked: u64) -> io::Result<Vec<Task>> {
        // Virtio 1.2, 5.1.3.1: segmentation needs checksums, ECN needs segmentation. A driver that
        // breaks this rule gets less.
        let has = |bit: u64| acked & bit != 0;
        let wanted = self.offloads().filter(|(o, guest, _)| {
            let needs = match *o {
                Offload::CSUM => true,
                Offload::TSO_ECN => has(F_GUEST_CSUM) && has(F_GUEST_TSO4 | F_GUEST_TSO6),
                _ => has(F_GUEST_CSUM),
            };
            has(*guest) && needs
        });
        let offload = wanted.fold(Offload::NONE, |all, (o, ..)| all | *o);
        self.netdev.set_offload(offload)?;
        let worker =
            NetWorker::new(self.netdev.clone(), self.link.clone(), has(F_MRG_RXBUF), has(F_GUEST_CSUM));
        Ok(vec![Task {
            worker: Box::new(worker),
            queues: vec![0, 1],
            thread: Thread::Own(format!("net {}", self.config.id)),
            poll: Duration::ZERO,
        }])
    }

    fn reset(&self) {
        // It can fail only when the interface is gone; the next start then says so.
        let _ = self.netdev.set_offload(Offload::NONE);
    }
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;

#[cfg(test)]
#[path = "net_tap_test.rs"]
mod tap_tests;
