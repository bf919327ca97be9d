//! The way down from a node, past filters and to backing files; and what a reader finds at a place of
//! a disk, wherever in the chain of backing files it lies.
//!
//! Owns: nothing. Never: reads data. Threads: any, with a ticket in hand
//! ([`Handle::contents`](super::handle::Handle::contents)) or on the control thread. Locks: none.

use super::driver::{Extent, ExtentKind};
use super::node::{Edge, Node};
use std::io;
use std::sync::Arc;

impl Node {
    /// The node below that this one filters, if it is a filter.
    pub fn filtered(&self) -> Option<Arc<Node>> {
        self.driver.filtered()?.node()
    }

    /// This node, or the first below it that is no filter.
    pub fn skip_filters(self: Arc<Node>) -> Arc<Node> {
        let mut node = self;
        while let Some(below) = node.filtered() {
            node = below;
        }
        node
    }

    /// This node, or the first below it that the user knows of.
    pub fn skip_implicit(self: Arc<Node>) -> Arc<Node> {
        let mut node = self;
        while node.options().implicit
            && let Some(below) = node.filtered()
        {
            node = below;
        }
        node
    }

    /// The edge to the backing file, if it is of a format that has one.
    pub fn backing_edge(&self) -> Option<Arc<Edge>> {
        self.driver.edges().into_iter().find(|e| e.role == "backing")
    }

    /// The node that is the backing file, which may be a filter.
    pub fn backing(&self) -> Option<Arc<Node>> {
        self.backing_edge()?.node()
    }
}

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
        match node.backing() {
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
    image.backing().is_none() && image.driver.info().backing_filename.is_none()
}

#[cfg(test)]
#[path = "chain_test.rs"]
mod tests;
