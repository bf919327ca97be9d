//! Block status: what a client is told of a range, for each metadata context that it chose.
//!
//! Owns: nothing. Threads: the connection's; every look at the disk takes its own ticket. Locks:
//! none.

use super::export::{Context, Export, Line};
use super::proto::{STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use std::io;

/// Extents of one answer, and looks at the disk for one: enough for anybody, and soon over. A
/// client asks again from where the answer ends.
const EXTENTS: usize = 4096;

/// The payload of a status chunk: the context's number, then lengths and flags.
pub(super) fn payload(
    export: &Export,
    line: &Line,
    (id, context): &(u32, Context),
    (offset, len): (u64, u32),
    one: bool,
) -> io::Result<Vec<u8>> {
    let end = offset + u64::from(len);
    let (mut at, mut looks) = (offset, 0);
    let mut extents: Vec<(u32, u32)> = Vec::new();
    while at < end && looks < EXTENTS && !line.is_cut() {
        let (n, flags) = match look(export, context, at, end - at) {
            // What is known already is of use.
            Err(_) if !extents.is_empty() => break,
            other => other?,
        };
        // It fits: the request's length does, and an extent is at most as long.
        let n = n.min(end - at) as u32;
        match extents.last_mut() {
            Some((len, last)) if *last == flags => *len += n,
            Some(_) if one => break,
            _ => extents.push((n, flags)),
        }
        at += u64::from(n);
        looks += 1;
    }
    if extents.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
    }
    let mut out = id.to_be_bytes().to_vec();
    for (len, flags) in extents {
        out.extend(len.to_be_bytes());
        out.extend(flags.to_be_bytes());
    }
    Ok(out)
}

/// One extent: its length and flags.
fn look(export: &Export, context: &Context, at: u64, len: u64) -> io::Result<(u64, u32)> {
    match context {
        Context::Allocation => {
            let c = export.handle.contents(at, len)?;
            Ok((c.len, if c.zero { STATE_HOLE | STATE_ZERO } else { 0 }))
        }
        Context::Depth => {
            let c = export.handle.contents(at, len)?;
            Ok((c.len, c.depth))
        }
        Context::Bitmap(bitmap) => {
            let end = at + len;
            if bitmap.is_dirty(at) {
                return Ok((bitmap.next_clean(at, end).unwrap_or(end) - at, STATE_DIRTY));
            }
            // It may have become dirty meanwhile.
            let next = bitmap.next_dirty(at, end, 1).map_or(end, |run| run.start);
            Ok(if next > at {
                (next - at, 0)
            } else {
                (len.min(bitmap.granularity() - at % bitmap.granularity()), STATE_DIRTY)
            })
        }
    }
}
