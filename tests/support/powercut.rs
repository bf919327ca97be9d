//! What may be left of a disk after a power cut.

use super::support::{Op, Rng};

/// Does an operation.
pub fn apply(bytes: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(off, data) => {
            let end = *off as usize + data.len();
            if end > bytes.len() {
                bytes.resize(end, 0);
            }
            bytes[*off as usize..end].copy_from_slice(data);
        }
        Op::Resize(len) => bytes.resize(*len as usize, 0),
        Op::Sync => {}
    }
}

/// The sectors of an operation, each as one that can be lost alone.
fn pieces(op: &Op) -> Vec<Op> {
    match op {
        Op::Write(off, data) => {
            let mut out = Vec::new();
            let mut pos = 0;
            while pos < data.len() {
                let n = (512 - (*off as usize + pos) % 512).min(data.len() - pos);
                out.push(Op::Write(off + pos as u64, data[pos..pos + n].to_vec()));
                pos += n;
            }
            out
        }
        other => vec![other.clone()],
    }
}

/// A disk after a power cut: all of `synced`, and what chance leaves of `open`.
pub fn cut(rng: &mut Rng, synced: &[u8], open: &[Op]) -> Vec<u8> {
    let mut bytes = synced.to_vec();
    let mut left: Vec<Op> = match rng.below(5) {
        0 => Vec::new(),
        1 => open.to_vec(),
        // Whole operations are kept or lost.
        2 => open.iter().filter(|_| rng.one_in(2)).cloned().collect(),
        // The last ones only: strict reordering.
        3 => open.iter().skip(rng.below(open.len() as u64 + 1) as usize).cloned().collect(),
        _ => open.iter().flat_map(pieces).filter(|_| rng.one_in(2)).collect(),
    };
    if rng.one_in(2) {
        for i in (1..left.len()).rev() {
            left.swap(i, rng.below(i as u64 + 1) as usize);
        }
    }
    left.iter().for_each(|op| apply(&mut bytes, op));
    bytes
}
