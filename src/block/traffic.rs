//! Whether a disk is in use at the moment: for jobs, which give way to those who use it.
//!
//! A node counts the requests that come to it while somebody watches. Who works on a disk watches the
//! nodes that its users come in by, which lie above those that he reads and writes himself. Jobs' requests do
//! not count: of two jobs on one disk, each would take the other for a guest.
//!
//! Owns: the counters. Never: holds anybody up. Threads: any. Locks: none.

use super::edit::is_above;
use super::graph::{Graph, Parent};
use super::node::Node;
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

thread_local! {
    static OF_A_JOB: Cell<bool> = const { Cell::new(false) };
}

/// What this thread asks for, it asks for a job: nobody gives way to that.
pub fn for_a_job() {
    OF_A_JOB.set(true);
}

/// A node's counter.
#[derive(Default)]
pub struct Traffic {
    watchers: AtomicU32,
    requests: AtomicU64,
}

impl Traffic {
    /// A request has come.
    #[inline]
    pub(super) fn note(&self) {
        // Without a watcher it costs a look at what nobody writes to.
        if self.watchers.load(Ordering::Relaxed) != 0 && !OF_A_JOB.get() {
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Has nodes count, as long as it lives.
pub struct Watch(Vec<Weak<Node>>);

impl Watch {
    /// Watches the uppermost nodes above `node`, or `node` itself. Control thread.
    pub fn above(graph: &Graph, node: &Arc<Node>) -> Watch {
        let parented = |n: &Arc<Node>| graph.parents(n).iter().any(|p| matches!(p, Parent::Node(..)));
        let tops = graph.nodes().filter(|n| is_above(n, &[node]) && !parented(n));
        let tops = tops.inspect(|n| _ = n.traffic.watchers.fetch_add(1, Ordering::Relaxed));
        Watch(tops.map(Arc::downgrade).collect())
    }

    /// How many reads and writes, but for jobs', have come since somebody began to watch; it only grows.
    pub fn requests(&self) -> u64 {
        let of = |n: Arc<Node>| n.traffic.requests.load(Ordering::Relaxed);
        self.0.iter().filter_map(Weak::upgrade).map(of).sum()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for node in self.0.iter().filter_map(Weak::upgrade) {
            node.traffic.watchers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
