//! virtio-rng: the smallest device (virtio 1.2, 5.4). Copy this one.
//!
//! Owns: its rate limit. Never: keeps random bytes. Threads: its worker runs on the thread that slow
//! devices share. Locks: none.
//!
//! To add a device: a file like this one, a row in `kinds.rs`, nothing else.

use super::device::{Kind, Source, Task, Thread, VirtioDevice, Worker};
use super::queue::{Chain, Queue};
use crate::bail;
use crate::error::Result;
use crate::sys::random;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::timerfd::TimerFd;

/// The most that one request gets; the driver asks again. Linux asks for 64 bytes.
const REQUEST_MAX: usize = 64 << 10;
/// What is fetched and copied at a time: the stack is small.
const PIECE: usize = 4096;

/// The properties of `virtio-rng-pci`, with QEMU's names and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngConfig {
    /// Bytes that the guest gets in each period at most.
    pub max_bytes: u64,
    /// The period, in milliseconds.
    pub period: u32,
}

impl Default for RngConfig {
    fn default() -> RngConfig {
        RngConfig { max_bytes: i64::MAX as u64, period: 1 << 16 }
    }
}

/// The face.
pub struct Rng {
    config: RngConfig,
}

impl Rng {
    /// An entropy device.
    pub fn new(config: RngConfig) -> Result<Arc<Rng>> {
        if config.period == 0 {
            bail!("'period' parameter expects a positive integer");
        }
        if config.max_bytes > i64::MAX as u64 {
            bail!("'max-bytes' parameter must be non-negative, and less than 2^63");
        }
        Ok(Arc::new(Rng { config }))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind { id: 4, class: 0x00_ff00, name: "virtio-rng" }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn read_config(&self, _off: u64, _data: &mut [u8]) {}

    fn start(&self, _acked: u64) -> io::Result<Vec<Task>> {
        let limited = self.config.max_bytes < i64::MAX as u64;
        let worker = RngWorker {
            config: self.config,
            left: self.config.max_bytes,
            period_ends: Instant::now(),
            timer: limited.then(TimerFd::new).transpose()?,
        };
        Ok(vec![Task {
            worker: Box::new(worker),
            queues: vec![0],
            thread: Thread::Slow,
            poll: Duration::ZERO,
        }])
    }
}

struct RngWorker {
    config: RngConfig,
    /// Bytes left in this period.
    left: u64,
    period_ends: Instant,
    /// Runs when a request waits for the next period. None without a limit.
    timer: Option<TimerFd>,
}

impl RngWorker {
    /// True when there are bytes to give. If not, the timer has been set.
    fn may_give(&mut self) -> bool {
        let Some(timer) = self.timer.as_mut() else { return true };
        let now = Instant::now();
        if now >= self.period_ends {
            self.left = self.config.max_bytes;
            self.period_ends = now + Duration::from_millis(u64::from(self.config.period));
        }
        if self.left > 0 {
            return true;
        }
        let rest = (self.period_ends - now).max(Duration::from_millis(1));
        if let Err(e) = timer.reset(rest, None) {
            log::error!("virtio-rng: timer: {e}");
        }
        false
    }

    /// Fills what the request asks for, as far as the limits go; bytes written.
    fn answer(&mut self, chain: &mut Chain) -> usize {
        let wanted = chain.writable_len().min(REQUEST_MAX);
        let len = usize::try_from(self.left).map_or(wanted, |left| wanted.min(left));
        let mut to = chain.writable();
        let mut buffer = [0; PIECE];
        let mut done = 0;
        while done < len {
            let piece = &mut buffer[..PIECE.min(len - done)];
            if let Err(e) = random::fill(piece) {
                log::error!("virtio-rng: getrandom: {e}");
                break;
            }
            to.copy_from(done, piece);
            done += piece.len();
        }
        if self.timer.is_some() {
            self.left -= done as u64;
        }
        done
    }
}

impl Worker for RngWorker {
    fn sources(&self) -> Vec<Source> {
        self.timer.iter().map(|t| Source { fd: t.as_raw_fd(), events: libc::POLLIN }).collect()
    }

    fn on_queue(&mut self, _n: u16, q: &Queue) {
        while self.may_give() {
            let Some(mut chain) = q.pop() else { return };
            let written = self.answer(&mut chain);
            q.push(chain, written);
        }
    }

    fn on_source(&mut self, _n: usize, _revents: i16, qs: &[Arc<Queue>]) {
        if let Some(timer) = self.timer.as_mut() {
            // It was readable; and if it was not, the next period is checked all the same.
            let _ = timer.wait();
        }
        self.on_queue(0, &qs[0]);
    }
}

#[cfg(test)]
#[path = "rng_test.rs"]
mod tests;
