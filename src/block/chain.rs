//! What a reader finds at a place of a disk, wherever in the chain of backing files it lies.
//!
//! Owns: nothing. Never: reads data. Threads: any, with a ticket in hand
//! ([`Handle::contents`](super::handle::Handle::contents)) or on the control thread. Locks: none.

use super::driver::{Extent, ExtentKind};
use super::node::Node;
use std::io;
use std::sync::Arc;

/// What [`contents`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contents {
    /// It reads as zeroes, and nothing need be stored for that.
    pub zero: bool,
    /// In which image it was found: 1 is the uppermost, 2 the one behind it; 0: in none. Filters
    /// do not count.
    pub depth: u32,
    /// For how many bytes; at least 1.
    pub len: u64,
}

/// What is at `off` of `node`, for at most `len` > 0 bytes.
pub fn contents(node: &Node, off: u64, len: u64) -> io::Result<Contents> {
    let mut below: Option<Arc<Node>> = None;
    let mut len = len;
    let mut depth = 1;
    loop {
        let node = below.as_deref().unwrap_or(node);
        if let Some(edge) = node.driver.filtered() {
            below = Some(edge.need()?);
            continue;
        }
        let Extent { kind, len: n, .. } = node.status(off, len)?;
        len = n;
        match kind {
            ExtentKind::Data => return Ok(Contents { zero: false, depth, len }),
            ExtentKind::Zero => return Ok(Contents { zero: true, depth, len }),
            ExtentKind::Unallocated => {}
        }
        let backing = node.driver.edges().into_iter().find(|e| e.role == "backing");
        match backing.and_then(|e| e.node()) {
            Some(next) => below = Some(next),
            None => return Ok(Contents { zero: true, depth: 0, len }),
        }
        depth += 1;
        // Beyond the end of a shorter backing file nothing is stored at all.
        let end = below.as_ref().map_or(0, |n| n.len());
        if off >= end {
            return Ok(Contents { zero: true, depth: 0, len });
        }
        len = len.min(end - off);
    }
}

/// True when nothing lies behind an image, now or once it is opened as its header says: what it does
/// not hold are zeroes.
pub fn stands_alone(image: &Node) -> bool {
    let below = image.filtered();
    let image = below.as_deref().unwrap_or(image);
    if image.driver.filtered().is_some() {
        return stands_alone(image);
    }
    let backing = image.driver.edges().into_iter().find(|e| e.role == "backing");
    backing.and_then(|e| e.node()).is_none() && image.driver.info().backing_filename.is_none()
}

#[cfg(test)]
#[path = "chain_test.rs"]
mod tests;
