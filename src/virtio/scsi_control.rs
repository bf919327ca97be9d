//! The control queue and the event queue of a SCSI controller (virtio 1.2, 5.6.6.2 and 5.6.6.3).
//!
//! Owns: task management, asynchronous notifications, delivery of events. Never: does I/O or waits.
//! Threads: the one that slow devices share. Locks: `Bus::running` while it sweeps the rings (see
//! `scsi_io.rs`), `Bus::news` for a moment.
//!
//! A function that ends requests takes those that are still in the rings out of them, and answers
//! them; for those that a worker has in hand it waits, without blocking: the function goes back to
//! its queue, and the worker rings when it is through.

use super::device::{Source, Worker};
use super::queue::{Chain, Queue};
use super::scsi::{ASYNC_MEDIA_CHANGE, Bus, CONTROL_QUEUE, EVENT_LEN, EVENT_QUEUE, REQUEST_QUEUES};
use super::scsi_io::{plain, response};
use super::scsi_sense::Sense;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmm_sys_util::eventfd::EventFd;

/// Kinds of control requests.
const TMF: u32 = 0;
const AN_QUERY: u32 = 1;
const AN_SUBSCRIBE: u32 = 2;
/// Bytes that the driver sends with them.
const TMF_LEN: usize = 24;
const AN_LEN: usize = 16;

/// Task management functions.
const ABORT_TASK: u32 = 0;
const ABORT_TASK_SET: u32 = 1;
const CLEAR_TASK_SET: u32 = 3;
const I_T_NEXUS_RESET: u32 = 4;
const LOGICAL_UNIT_RESET: u32 = 5;
const QUERY_TASK: u32 = 6;
const QUERY_TASK_SET: u32 = 7;

/// A task management function.
#[derive(Clone, Copy, Debug)]
struct Function {
    subtype: u32,
    lun: [u8; 8],
    id: u64,
}

impl Function {
    fn concerns(&self, lun: &[u8; 8], id: u64) -> bool {
        match self.subtype {
            ABORT_TASK | QUERY_TASK => *lun == self.lun && id == self.id,
            I_T_NEXUS_RESET => lun[..2] == self.lun[..2],
            _ => *lun == self.lun,
        }
    }

    fn only_asks(&self) -> bool {
        matches!(self.subtype, QUERY_TASK | QUERY_TASK_SET)
    }

    fn resets(&self) -> bool {
        matches!(self.subtype, I_T_NEXUS_RESET | LOGICAL_UNIT_RESET)
    }
}

/// What became of a function so far.
enum Step {
    Answer(u8),
    /// When these requests have ended.
    Wait(Vec<u64>),
}

/// See the module's head.
pub struct ControlWorker {
    bus: Arc<Bus>,
    bell: Arc<EventFd>,
    /// The function at the head of the queue has swept the rings, and waits for these.
    waiting: Option<Vec<u64>>,
}

impl ControlWorker {
    /// The one of the controller with `bus`.
    pub fn new(bus: Arc<Bus>, bell: Arc<EventFd>) -> ControlWorker {
        ControlWorker { bus, bell, waiting: None }
    }

    fn control(&mut self, qs: &[Arc<Queue>]) {
        let q = &qs[usize::from(CONTROL_QUEUE)];
        while let Some(mut chain) = q.pop() {
            let mut bytes = [0; TMF_LEN];
            let len = chain.readable().len().min(TMF_LEN);
            chain.readable().copy_to(0, &mut bytes[..len]);
            let word =
                |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            match word(0) {
                TMF if len == TMF_LEN && chain.writable_len() >= 1 => {
                    let mut function = Function { subtype: word(4), lun: [0; 8], id: 0 };
                    function.lun.copy_from_slice(&bytes[8..16]);
                    function.lun = plain(function.lun);
                    function.id = u64::from(word(16)) | u64::from(word(20)) << 32;
                    match self.function(function, qs) {
                        Step::Answer(response) => {
                            self.waiting = None;
                            chain.writable_at(0, 1).copy_from(0, &[response]);
                            q.push(chain, 1);
                        }
                        Step::Wait(serials) => {
                            self.waiting = Some(serials);
                            return q.unpop(chain);
                        }
                    }
                }
                kind @ (AN_QUERY | AN_SUBSCRIBE) if len >= AN_LEN && chain.writable_len() >= 5 => {
                    let mut lun = [0; 8];
                    lun.copy_from_slice(&bytes[4..12]);
                    let (actual, response) = self.notifications(&lun, word(12), kind == AN_SUBSCRIBE);
                    let mut answer = actual.to_le_bytes().to_vec();
                    answer.push(response);
                    chain.writable_at(0, 5).copy_from(0, &answer);
                    q.push(chain, 5);
                }
                _ => return q.reject(chain, "a control request of no known kind or length"),
            }
        }
    }

    /// Which notifications there are, and that the driver wants them.
    fn notifications(&self, lun: &[u8; 8], wanted: u32, subscribe: bool) -> (u32, u8) {
        let Ok(unit) = self.bus.resolve(lun) else { return (0, response::BAD_TARGET) };
        let actual = if unit.tray.is_some() { wanted & ASYNC_MEDIA_CHANGE } else { 0 };
        if subscribe {
            unit.subscribed.store(actual, Ordering::Relaxed);
        }
        (actual, response::OK)
    }

    fn function(&self, function: Function, qs: &[Arc<Queue>]) -> Step {
        if let Some(serials) = &self.waiting
            && !serials.is_empty()
        {
            let mut running = self.bus.running();
            if running.any(serials) {
                running.awaited = true;
                return Step::Wait(serials.clone());
            }
            drop(running);
            return self.finish(function);
        }
        let whole_target = function.subtype == I_T_NEXUS_RESET;
        match self.bus.resolve(&function.lun) {
            Ok(_) => {}
            Err(true) if whole_target => {}
            Err(true) => return Step::Answer(response::INCORRECT_LUN),
            Err(false) => return Step::Answer(response::BAD_TARGET),
        }
        match function.subtype {
            ABORT_TASK | ABORT_TASK_SET | CLEAR_TASK_SET | I_T_NEXUS_RESET | LOGICAL_UNIT_RESET
            | QUERY_TASK | QUERY_TASK_SET => self.sweep(function, qs),
            _ => Step::Answer(response::FUNCTION_REJECTED),
        }
    }

    /// Ends what is in the rings, and finds what is not in them any more.
    fn sweep(&self, function: Function, qs: &[Arc<Queue>]) -> Step {
        let mut running = self.bus.running();
        if running.any_held() {
            // The VM is about to stop for an error; then those in the rings can be reached.
            running.awaited = true;
            return Step::Wait(Vec::new());
        }
        let mut found = false;
        for q in &qs[usize::from(REQUEST_QUEUES)..] {
            let mut kept: Vec<Chain> = Vec::new();
            // More than the ring has entries no honest driver has under way; one that offers the
            // same ones while they are taken would have this go on for ever.
            for _ in 0..q.size() {
                let Some(mut chain) = q.pop() else { break };
                let header = self.bus.header(&chain);
                let concerned = header.is_some_and(|h| function.concerns(&h.lun, h.id));
                found |= concerned;
                if !concerned || function.only_asks() {
                    kept.push(chain);
                    continue;
                }
                let why = if function.resets() { response::RESET } else { response::ABORTED };
                let len = self.bus.answer(&mut chain, why, Ok(0));
                q.push(chain, len);
            }
            let kick = !kept.is_empty();
            kept.into_iter().rev().for_each(|chain| q.unpop(chain));
            if kick {
                q.kick();
            }
        }
        let serials = running.find(|e| function.concerns(&e.lun, e.id));
        if function.only_asks() {
            let yes = found || !serials.is_empty();
            return Step::Answer(if yes { response::FUNCTION_SUCCEEDED } else { response::OK });
        }
        if !serials.is_empty() {
            running.awaited = true;
            return Step::Wait(serials);
        }
        drop(running);
        self.finish(function)
    }

    fn finish(&self, function: Function) -> Step {
        if function.resets() {
            for unit in self.bus.units().iter() {
                let address = unit.address;
                let whole = function.subtype == I_T_NEXUS_RESET && address.target == function.lun[1];
                if whole || self.bus.resolve(&function.lun).is_ok_and(|u| Arc::ptr_eq(&u, unit)) {
                    unit.reset_by_driver(Sense::UNIT_RESET);
                }
            }
        }
        // FUNCTION COMPLETE
        Step::Answer(response::OK)
    }

    fn deliver(&self, q: &Queue) {
        loop {
            // A buffer first: without one the news stay.
            let Some(mut chain) = q.pop() else { return };
            if chain.writable_len() < EVENT_LEN {
                return q.reject(chain, "an event buffer that is too short");
            }
            let Some(event) = self.bus.news().take() else { return q.unpop(chain) };
            chain.writable_at(0, EVENT_LEN).copy_from(0, &event);
            q.push(chain, EVENT_LEN);
        }
    }
}

impl Worker for ControlWorker {
    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.bell.as_raw_fd(), events: libc::POLLIN }]
    }

    fn on_queue(&mut self, n: u16, q: &Queue) {
        match n {
            // Functions reach for all queues: on the bell.
            CONTROL_QUEUE => _ = self.bell.write(1),
            _ => self.deliver(q),
        }
    }

    fn on_source(&mut self, _: usize, _: i16, qs: &[Arc<Queue>]) {
        // It was readable; and if not, looking once more does no harm.
        let _ = self.bell.read();
        self.control(qs);
        self.deliver(&qs[usize::from(EVENT_QUEUE)]);
    }
}

#[cfg(test)]
#[path = "scsi_control_test.rs"]
mod tests;
