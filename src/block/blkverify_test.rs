use super::*;
use crate::block::node::NodeOptions;
use crate::block::testing::{Mem, MemState, Rng};
use std::sync::atomic::Ordering;

fn pair() -> (Arc<Node>, [Arc<MemState>; 2]) {
    let (raw, test) = (Mem::new(64 << 10), Mem::new(64 << 10));
    let states = [raw.state.clone(), test.state.clone()];
    let edge =
        |role: &str, mem| Edge::new(role, Some(Node::new(role, Box::new(mem), NodeOptions::default())));
    let driver = Blkverify { raw: edge("raw", raw), test: edge("test", test), ranges: Serial::default() };
    (Node::new("v", Box::new(driver), NodeOptions { unmap: true, ..NodeOptions::default() }), states)
}

fn get(node: &Node, off: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    node.read(off, &mut IovMut::from_slice(&mut data)).map(|()| data)
}

#[test]
fn what_is_equal_passes() {
    let (node, [raw, test]) = pair();
    let mut rng = Rng(5);
    let mut model = vec![0u8; 64 << 10];
    for _ in 0..500 {
        let off = rng.below(60 << 10) as usize;
        let len = 1 + rng.below(4096) as usize;
        match rng.below(3) {
            0 => {
                let byte = rng.draw() as u8;
                node.write(off as u64, &Iov::from_slice(&vec![byte; len]), Flags::NONE).unwrap();
                model[off..off + len].fill(byte);
            }
            1 => {
                node.zero(off as u64, len as u64, Flags::NONE).unwrap();
                model[off..off + len].fill(0);
            }
            _ => assert_eq!(get(&node, off as u64, len).unwrap(), model[off..off + len]),
        }
    }
    node.discard(0, 4096).unwrap();
    assert_eq!(*raw.data.lock().unwrap(), *test.data.lock().unwrap());
    assert_eq!(raw.zeroes.load(Ordering::SeqCst) + raw.discards.load(Ordering::SeqCst), 0);
    node.flush().unwrap();
    assert_eq!((raw.flushes.load(Ordering::SeqCst), test.flushes.load(Ordering::SeqCst)), (0, 1));
}

#[test]
fn a_difference_is_an_error() {
    let (node, [raw, test]) = pair();
    test.data.lock().unwrap()[1000] = 1;
    assert_eq!(get(&node, 0, 1000).unwrap(), [0; 1000]);
    assert_eq!(get(&node, 0, 1001).unwrap_err().raw_os_error(), Some(libc::EIO));
    raw.fail.store(libc::ENOSPC, Ordering::SeqCst);
    let done = node.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE);
    assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::EIO));
    test.fail.store(libc::ENOSPC, Ordering::SeqCst);
    let done = node.write(0, &Iov::from_slice(&[1; 512]), Flags::NONE);
    assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOSPC), "both say so");
}

#[test]
fn differences_are_told_in_qemus_words() {
    let buf = |byte| {
        let mut data = AlignedBuf::new(4, 16);
        data[2] = byte;
        Ok(data)
    };
    assert_eq!(difference(100, &buf(0), &buf(0)), None);
    assert_eq!(difference(100, &buf(0), &buf(1)).unwrap(), "contents mismatch at offset 102");
    assert_eq!(difference(0, &buf(0), &Err(errno(5))).unwrap(), "return value mismatch 0 != -5");
    assert_eq!(difference(0, &Err(errno(5)), &Err(errno(5))), None);
}
