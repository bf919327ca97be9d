//! The images of a chain from one down to another: what lies in them, seen from above.
//!
//! Owns: nothing. Never: reads data. Threads: any, with a ticket of a handle above the images in hand,
//! or the control thread. Locks: none.

use crate::block::driver::ExtentKind;
use crate::block::node::Node;
use std::io;
use std::sync::Arc;

/// The image below: the backing file, filters left out.
pub fn below(node: &Arc<Node>) -> Option<Arc<Node>> {
    node.backing().map(Node::skip_filters)
}

/// All nodes from `top` on, itself and filters included, uppermost first.
pub fn nodes(top: &Arc<Node>) -> impl Iterator<Item = Arc<Node>> {
    std::iter::successors(Some(top.clone()), |n| n.filtered().or_else(|| n.backing()))
}

/// All images from `top` on, itself included, uppermost first, filters left out.
pub fn chain(top: Arc<Node>) -> impl Iterator<Item = Arc<Node>> {
    std::iter::successors(Some(top.skip_filters()), below)
}

/// What some images say of a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: what lies below them shows through.
    Nothing,
    /// It reads as zeroes, whatever lies below them.
    Zero,
    /// Data.
    Data,
}

/// What `images`, uppermost first, have at `off`, and for how many bytes, at most `len` > 0. Where an
/// image is shorter than the ones above, it reads as zeroes, and hides what lies below it.
pub fn find(images: &[Arc<Node>], off: u64, len: u64) -> io::Result<(Found, u64)> {
    let mut len = len;
    for image in images {
        let end = image.len();
        if off >= end {
            return Ok((Found::Zero, len));
        }
        let extent = image.status(off, len.min(end - off))?;
        len = extent.len;
        match extent.kind {
            ExtentKind::Data => return Ok((Found::Data, len)),
            ExtentKind::Zero => return Ok((Found::Zero, len)),
            ExtentKind::Unallocated => {}
        }
    }
    Ok((Found::Nothing, len))
}
