//! A flush comes to each node once, however many ways lead there: a graph of 25 levels in which each
//! node is below the next by two edges has millions.
//!
//! While a thread flushes a node, every further flush of a node that was flushed on the way, and has
//! not been written to since, has the result of the first: what had been written by then is on stable
//! storage, or never will be. A format that writes between two flushes of its file changes the file's
//! count, and is not fooled.
//!
//! Owns: that list, one a thread. Never: flushes. Threads: any. Locks: none.

use super::node::{Node, errno};
use std::cell::RefCell;
use std::io;

/// Room that is kept for the next flush, in nodes.
const KEPT: usize = 64;

/// A node that was flushed, the count of its changes before that, and the result: an errno.
type Done = (*const Node, u64, Result<(), i32>);

#[derive(Default)]
struct Way {
    /// How many flushes of this thread have begun and not ended: one inside the other.
    depth: u32,
    done: Vec<Done>,
}

thread_local! {
    static WAY: RefCell<Way> = RefCell::default();
}

/// One flush on the way; the last to end forgets everything, also when it panics.
struct Level;

impl Level {
    fn new() -> Level {
        WAY.with_borrow_mut(|way| way.depth += 1);
        Level
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        WAY.with_borrow_mut(|way| {
            way.depth -= 1;
            if way.depth == 0 {
                way.done.clear();
                way.done.shrink_to(KEPT);
            }
        });
    }
}

/// Flushes `node`, whose count of changes is `changes`, with `flush`, unless that is done.
pub(super) fn once(node: &Node, changes: u64, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let at: *const Node = node;
    let known = WAY.with_borrow(|way| way.done.iter().find(|d| d.0 == at && d.1 == changes).map(|d| d.2));
    if let Some(done) = known {
        return done.map_err(errno);
    }
    let _level = Level::new();
    let done = flush();
    WAY.with_borrow_mut(|way| {
        way.done.retain(|d| d.0 != at);
        let result = done.as_ref().map(drop).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        way.done.push((at, changes, result));
    });
    done
}

#[cfg(test)]
#[path = "flush_once_test.rs"]
mod tests;
