//! For tests of jobs: the control thread's things, disks in memory, guests that write.

use super::job::Work;
use super::registry::{JobEvent, JobKey, Jobs, Spec};
use super::table::Status;
use crate::block::driver::Flags;
use crate::block::graph::Graph;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::{Node, NodeOptions};
use crate::block::testing::{Mem, MemState, Rng};
use crate::error::Result;
use crate::event::{Event, Events};
use crate::sys::inbox::Inbox;
use crate::sys::iov::Iov;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The control thread's things.
pub struct Desk {
    pub jobs: Jobs,
    pub graph: Graph,
    pub events: Events,
    /// What was told, in few words.
    pub told: Vec<String>,
    /// Those words; `None`: it is not worth any.
    pub say: fn(JobEvent) -> Option<String>,
}

/// The words for a test that has one job.
fn briefly(event: JobEvent) -> Option<String> {
    Some(match event {
        JobEvent::Status(_, s) => s.as_str().to_string(),
        JobEvent::Completed(r, e) => {
            format!("COMPLETED {}/{} {}", r.progress.offset, r.progress.len, e.unwrap_or_default())
        }
        JobEvent::Cancelled(_) => "CANCELLED".to_string(),
        JobEvent::Error { read, .. } => format!("ERROR {read}"),
        _ => return None,
    })
}

impl Desk {
    pub fn new() -> Desk {
        let events = Arc::new(Inbox::new().unwrap());
        Desk { jobs: Jobs::new(), graph: Graph::new(), events, told: Vec::new(), say: briefly }
    }

    /// A disk in memory, which the user owns.
    pub fn disk(&mut self, name: &str, len: usize) -> (Arc<Node>, Arc<MemState>) {
        let mem = Mem::new(len);
        let state = mem.state.clone();
        let options = NodeOptions { unmap: true, ..NodeOptions::default() };
        let node = Node::new(name, Box::new(mem), options);
        self.graph.add(node.clone()).unwrap();
        self.graph.own(&node);
        (node, state)
    }

    /// A guest's handle.
    pub fn guest(&mut self, node: &Arc<Node>) -> Arc<Handle> {
        self.graph.attach(Some(node.clone()), HandleSpec::default()).unwrap()
    }

    /// Acts on what is in the inbox, and notes what is told.
    pub fn turn(&mut self) {
        for event in self.events.take() {
            if let Event::Job(serial) = event {
                self.jobs.serve(&mut self.graph, serial);
            }
        }
        self.told.extend(std::mem::take(&mut self.jobs.out).into_iter().filter_map(self.say));
    }

    /// Turns until `what` was told, and forgets it and what was before it.
    pub fn until(&mut self, what: &str) -> String {
        let start = Instant::now();
        loop {
            self.turn();
            if let Some(at) = self.told.iter().position(|t| t.starts_with(what)) {
                return self.told.drain(..=at).next_back().unwrap();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no '{what}' in {:?}", self.told);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Turns until the job is in that state.
    pub fn until_status(&mut self, key: JobKey, status: Status) {
        self.until_any(key, &[status]);
    }

    /// Turns until the job is in one of these states.
    pub fn until_any(&mut self, key: JobKey, states: &[Status]) {
        let start = Instant::now();
        loop {
            self.turn();
            let at = self.jobs.at(key.0);
            if at.is_some_and(|at| states.contains(&self.jobs.list[at].status)) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "not {states:?}: {:?}", self.jobs.query());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a job on `nodes`, and starts it.
    pub fn start(
        &mut self,
        spec: Spec,
        nodes: &[&Arc<Node>],
        make: impl FnOnce(&mut Graph) -> Result<Box<dyn Work>>,
    ) -> JobKey {
        let graph = &mut self.graph;
        let key = self.jobs.create(spec, &self.events.clone(), nodes, || make(graph)).unwrap();
        self.jobs.start(&mut self.graph, key);
        key
    }
}

/// All bytes of a disk.
pub fn bytes(state: &MemState) -> Vec<u8> {
    state.data.lock().unwrap().clone()
}

/// Fails with the place of the first difference.
pub fn assert_same(a: &[u8], b: &[u8], what: &str) {
    assert_eq!(a.len(), b.len());
    let wrong = (0..a.len()).find(|&i| a[i] != b[i]);
    assert_eq!(wrong, None, "{what}: first difference");
}

/// Writes bytes.
pub fn put(handle: &Handle, off: u64, byte: u8, len: usize) {
    handle.write(off, &Iov::from_slice(&vec![byte; len]), Flags::NONE).unwrap();
}

/// Guests that write at random, as fast as they can, until dropped.
pub struct Guests {
    stop: Arc<AtomicBool>,
    /// How many requests they have done.
    pub count: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Guests {
    /// `discards`: they discard as well (a disk in memory does nothing then).
    pub fn on(handle: &Arc<Handle>, seed: u64, discards: bool) -> Guests {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let size = handle.len();
        let threads = (1..3)
            .map(|t| {
                let (handle, stop, writes) = (handle.clone(), stop.clone(), count.clone());
                let mut rng = Rng(seed.wrapping_mul(t * 2 + 1) | 1);
                std::thread::spawn(move || {
                    while !stop.load(SeqCst) {
                        let off = rng.below(size - 1);
                        let n = (1 + rng.below(70_000)).min(size - off);
                        let data = vec![rng.draw() as u8; n as usize];
                        match rng.below(5) {
                            0 => handle.zero(off, n, Flags::NONE).unwrap(),
                            1 if discards => handle.discard(0, size).unwrap(),
                            _ => handle.write(off, &Iov::from_slice(&data), Flags::NONE).unwrap(),
                        }
                        writes.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        let guests = Guests { stop, count, threads };
        guests.go_on(4);
        guests
    }

    /// Waits until they have done so many more.
    pub fn go_on(&self, more: u64) {
        let (from, start) = (self.count.load(SeqCst), Instant::now());
        while self.count.load(SeqCst) < from + more {
            assert!(start.elapsed() < Duration::from_secs(60), "the guests stand still");
            std::thread::yield_now();
        }
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        self.threads.drain(..).for_each(|t| t.join().unwrap());
    }
}
