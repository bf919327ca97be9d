//! A network card's work (virtio 1.2, 5.1.6): frames between two queues and a backend.
//!
//! Owns: at most one frame that waits for buffers. Never: looks into a frame. Threads: the card's
//! own. Locks: a queue's own, for the moment of a pop or push.
//!
//! *Sending* takes no copy: the backend gets the driver's descriptors, header included, and it is
//! the backend (the kernel) that checks the header. *Receiving* takes one: a frame is read into a
//! buffer first, since how many of the driver's buffers it needs shows only then. While the driver
//! has none the backend is not read, so that frames wait, and are dropped, where their sender
//! sees it; a frame is lost here only when it could never fit.

use super::device::{Source, Worker};
use super::queue::{Chain, Queue};
use crate::net::netdev::{MAX_FRAME, Netdev, VNET_HDR};
use crate::sys::iov::IovMut;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Frames in one direction before the other has its turn.
const BURST: usize = 64;
/// The receive queue's number, and the transmit queue's.
const RX: u16 = 0;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// The one worker of a card.
pub struct NetWorker {
    netdev: Arc<dyn Netdev>,
    link: Arc<AtomicBool>,
    /// The driver took VIRTIO_NET_F_MRG_RXBUF.
    merge: bool,
    /// The driver took VIRTIO_NET_F_GUEST_CSUM.
    guest_csum: bool,
    buffer: Vec<u8>,
    /// Bytes of the frame in `buffer` that waits for room; 0: none.
    waiting: usize,
    /// The driver has, or may have, room for frames.
    room: bool,
    /// Frames are left in the transmit queue.
    unsent: bool,
    /// The backend is gone.
    dead: bool,
}

impl NetWorker {
    /// For a driver that took these features.
    pub fn new(netdev: Arc<dyn Netdev>, link: Arc<AtomicBool>, merge: bool, guest_csum: bool) -> NetWorker {
        NetWorker {
            netdev,
            link,
            merge,
            guest_csum,
            buffer: vec![0; MAX_FRAME],
            waiting: 0,
            room: true,
            unsent: false,
            dead: false,
        }
    }

    fn receive(&mut self, q: &Queue) {
        let mut done = Vec::new();
        for _ in 0..BURST {
            if self.waiting == 0 {
                if !q.has_work() {
                    self.room = false;
                    break;
                }
                self.waiting = match self.next_frame() {
                    Some(n) => n,
                    None => break,
                };
            }
            match self.deliver(q, &mut done) {
                Ok(true) => self.waiting = 0,
                Ok(false) => {
                    self.room = false;
                    break;
                }
                // The device is broken; what was answered before stays answered.
                Err(()) => break,
            }
        }
        if !done.is_empty() {
            q.push_all(done);
        }
    }

    /// Reads the next frame into the buffer; its length with the header.
    fn next_frame(&mut self) -> Option<usize> {
        for _ in 0..BURST {
            match self.netdev.recv(&mut IovMut::from_slice(&mut self.buffer)) {
                Ok(n) if n > VNET_HDR && self.link.load(Ordering::Relaxed) => {
                    if !self.guest_csum {
                        // Virtio 1.2, 5.1.6.4.1: nothing about checksums to one who did not ask.
                        self.buffer[0] = 0;
                    }
                    return Some(n);
                }
                // The cable is out, or there is nothing in it. (An empty read is also a socket's
                // end, which would be read again and again.)
                Ok(0) => {
                    self.fail(&io::ErrorKind::UnexpectedEof.into());
                    return None;
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.fail(&e);
                    return None;
                }
            }
        }
        None
    }

    /// The backend cannot be read any more: nothing will come.
    fn fail(&mut self, e: &io::Error) {
        log::warn!("{}: {e}; the network card receives nothing any more", self.netdev.info());
        self.dead = true;
    }

    /// Puts the waiting frame into the driver's buffers. Ok(false): there are too few, none was
    /// used. Err: the device is broken.
    fn deliver<'q>(&mut self, q: &'q Queue, done: &mut Vec<(Chain<'q>, usize)>) -> Result<bool, ()> {
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < self.waiting {
            let Some(chain) = q.pop() else {
                give_back(q, chains);
                return Ok(false);
            };
            // Without merging the first buffer holds all of it, or the frame is dropped: the
            // driver had to offer enough (virtio 1.2, 5.1.6.3.1). With merging it is dropped when
            // even all the buffers that a ring can hold are too small.
            if chain.writable_len() < VNET_HDR {
                give_back(q, chains);
                q.reject(chain, "a receive buffer that cannot hold a header");
                return Err(());
            }
            room += chain.writable_len();
            chains.push(chain);
            let hopeless = if self.merge { chains.len() == usize::from(q.size()) } else { true };
            if room < self.waiting && hopeless {
                give_back(q, chains);
                return Ok(true);
            }
        }
        // At most a queue's size of them.
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.buffer[NUM_BUFFERS].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.buffer[..self.waiting];
        for mut chain in chains {
            let n = rest.len().min(chain.writable_len());
            chain.writable_at(0, n).copy_from(0, &rest[..n]);
            rest = &rest[n..];
            done.push((chain, n));
        }
        Ok(true)
    }

    fn send(&mut self, q: &Queue) {
        let mut done: Vec<(Chain, usize)> = Vec::new();
        self.unsent = false;
        while let Some(chain) = q.pop() {
            let frame = chain.readable();
            if frame.len() < VNET_HDR {
                q.reject(chain, "a frame to send that has no header");
                break;
            }
            // What is too long for any network, or sent without a cable, is lost as on a real one.
            if frame.len() <= MAX_FRAME && self.link.load(Ordering::Relaxed) {
                match self.netdev.send(frame) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        q.unpop(chain);
                        self.unsent = true;
                        break;
                    }
                    // The backend does not take it (a bad header, the interface is down): lost.
                    Err(e) => log::debug!("{}: a frame was not sent: {e}", self.netdev.info()),
                    Ok(()) => {}
                }
            }
            done.push((chain, 0));
            if done.len() == BURST {
                // The backend is writable, so that the poll comes back at once for the rest.
                self.unsent = q.has_work();
                break;
            }
        }
        if !done.is_empty() {
            q.push_all(done);
        }
    }
}

fn give_back<'q>(q: &'q Queue, chains: Vec<Chain<'q>>) {
    chains.into_iter().rev().for_each(|chain| q.unpop(chain));
}

impl Worker for NetWorker {
    fn sources(&self) -> Vec<Source> {
        let mut events = 0;
        if self.room && !self.dead {
            events |= libc::POLLIN;
        }
        if self.unsent {
            events |= libc::POLLOUT;
        }
        if events == 0 { Vec::new() } else { vec![Source { fd: self.netdev.fd(), events }] }
    }

    fn on_queue(&mut self, n: u16, q: &Queue) {
        if n == RX {
            self.room = true;
            self.receive(q);
        } else {
            self.send(q);
        }
    }

    fn on_source(&mut self, _: usize, revents: i16, qs: &[Arc<Queue>]) {
        let [rx, tx] = qs else { return };
        let broken = revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0;
        if self.unsent && (broken || revents & libc::POLLOUT != 0) {
            self.send(tx);
        }
        if self.room && !self.dead && (broken || revents & libc::POLLIN != 0) {
            self.receive(rx);
        }
    }
}
