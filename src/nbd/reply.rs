//! Replies on their way out: several go to the socket in one system call.
//!
//! Owns: a thread's data buffer, and the replies that wait in it. The buffer is made once and used
//! for every request: a fresh one would be page-faulted in for each. Never: decides what a reply
//! says. Threads: one. Locks: the connection's send lock, for a call.

use super::export::Line;
use super::proto::*;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::Iov;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that each thread's buffer may have without asking.
pub const BUFFER: usize = 128 << 10;
/// Bytes that it may have if the server's budget allows: a huge page. Longer requests are done in
/// pieces.
const LARGE: usize = 2 << 20;
/// What data are aligned to: enough for O_DIRECT.
const ALIGN: usize = 4096;

/// A buffer that is as large as what it was used for, up to [`LARGE`].
pub(super) struct Buffer {
    data: AlignedBuf,
    /// Bytes at the front that replies wait in.
    used: usize,
    budget: Arc<dyn Budget>,
    /// What was taken from the budget.
    taken: usize,
}

/// Bytes that all threads of the server share.
pub(super) trait Budget: Send + Sync {
    /// How many are left.
    fn left(&self) -> &AtomicUsize;
}

impl Buffer {
    pub fn new(budget: Arc<dyn Budget>) -> Buffer {
        Buffer { data: AlignedBuf::new(0, ALIGN), used: 0, budget, taken: 0 }
    }

    /// Room for `len` bytes at once, or for as many as there can be, when nothing waits in it.
    fn grow(&mut self, len: usize) {
        debug_assert!(self.used == 0);
        let wanted = match len.checked_next_power_of_two() {
            Some(n) if n < LARGE / 2 => n.max(BUFFER),
            _ => LARGE,
        };
        if self.data.len() >= wanted {
            return;
        }
        let more = wanted.saturating_sub(BUFFER);
        let extra = more.saturating_sub(self.taken);
        let take = |left: usize| left.checked_sub(extra);
        let (order, left) = (Ordering::Relaxed, self.budget.left());
        let size = match left.fetch_update(order, order, take) {
            Ok(_) => {
                self.taken += extra;
                wanted
            }
            Err(_) => wanted.min(BUFFER.max(self.data.len())),
        };
        if size > self.data.len() {
            self.data = if size == LARGE { AlignedBuf::huge(size) } else { AlignedBuf::new(size, ALIGN) };
        }
    }

    /// One as small as at first, of the same budget.
    pub fn another(&self) -> Buffer {
        Buffer::new(self.budget.clone())
    }

    /// The bytes of a range that [`Outbox::room`] gave.
    pub fn bytes(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.data[range]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.budget.left().fetch_add(self.taken, Ordering::Relaxed);
    }
}

enum Data {
    None,
    Buffer(Range<usize>),
    Own(Vec<u8>),
}

/// See the module's head.
pub(super) struct Outbox<'a> {
    line: &'a Line,
    send: &'a Mutex<()>,
    pub buffer: Buffer,
    waiting: Vec<(Head, Data)>,
}

/// The fixed part of a reply or chunk.
struct Head {
    bytes: [u8; 40],
    len: usize,
}

impl Head {
    fn new(parts: &[&[u8]]) -> Head {
        let mut head = Head { bytes: [0; 40], len: 0 };
        for part in parts {
            head.bytes[head.len..head.len + part.len()].copy_from_slice(part);
            head.len += part.len();
        }
        head
    }
}

impl<'a> Outbox<'a> {
    pub fn new(line: &'a Line, send: &'a Mutex<()>, buffer: Buffer) -> Outbox<'a> {
        Outbox { line, send, buffer, waiting: Vec::new() }
    }

    /// The buffer, whose place an empty one takes. Replies that could not be sent are forgotten.
    pub fn take_buffer(&mut self) -> Buffer {
        self.waiting.clear();
        self.buffer.used = 0;
        let empty = self.buffer.another();
        std::mem::replace(&mut self.buffer, empty)
    }

    /// A place for up to `len` > 0 bytes of data, aligned; at most as long as the buffer can be.
    /// Replies that are in the way are sent. The place is free again unless a reply takes it.
    pub fn room(&mut self, len: usize) -> io::Result<Range<usize>> {
        if self.buffer.used + len > self.buffer.data.len() {
            self.flush()?;
            self.buffer.grow(len);
        }
        let at = self.buffer.used;
        Ok(at..at + len.min(self.buffer.data.len() - at))
    }

    fn push(&mut self, head: Head, data: Data) -> io::Result<()> {
        if let Data::Buffer(range) = &data {
            self.buffer.used = range.end.next_multiple_of(ALIGN).min(self.buffer.data.len());
        }
        self.waiting.push((head, data));
        // One system call takes 1024 pieces.
        if self.waiting.len() >= 256 { self.flush() } else { Ok(()) }
    }

    /// A reply without data.
    pub fn simple(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        self.push(Head::new(&[&simple_reply(cookie, error)]), Data::None)
    }

    /// A simple reply with the data in a place of the buffer.
    pub fn simple_data(&mut self, cookie: u64, data: Range<usize>) -> io::Result<()> {
        self.push(Head::new(&[&simple_reply(cookie, 0)]), Data::Buffer(data))
    }

    /// A chunk of data that was read at `offset`.
    pub fn data(&mut self, cookie: u64, offset: u64, data: Range<usize>, done: bool) -> io::Result<()> {
        let head =
            chunk_head(cookie, u16::from(done) * chunk::DONE, chunk::OFFSET_DATA, 8 + data.len() as u32);
        self.push(Head::new(&[&head, &offset.to_be_bytes()]), Data::Buffer(data))
    }

    /// A chunk that says that `len` bytes at `offset` are zeroes.
    pub fn hole(&mut self, cookie: u64, offset: u64, len: u32, done: bool) -> io::Result<()> {
        let head = chunk_head(cookie, u16::from(done) * chunk::DONE, chunk::OFFSET_HOLE, 12);
        self.push(Head::new(&[&head, &offset.to_be_bytes(), &len.to_be_bytes()]), Data::None)
    }

    /// The end of a reply: nothing more, and no error.
    pub fn none(&mut self, cookie: u64) -> io::Result<()> {
        self.push(Head::new(&[&chunk_head(cookie, chunk::DONE, chunk::NONE, 0)]), Data::None)
    }

    /// The end of a reply: an error. `offset`: where it happened.
    pub fn error(&mut self, cookie: u64, error: u32, offset: Option<u64>) -> io::Result<()> {
        let (kind, len) = if offset.is_some() { (chunk::ERROR_OFFSET, 14) } else { (chunk::ERROR, 6) };
        let head = chunk_head(cookie, chunk::DONE, kind, len);
        let offset = offset.map(u64::to_be_bytes);
        let at: &[u8] = offset.as_ref().map_or(&[], |o| o);
        // No text: two zero bytes are its length.
        self.push(Head::new(&[&head, &error.to_be_bytes(), &[0, 0], at]), Data::None)
    }

    /// A chunk of extents (`payload`: as it travels).
    pub fn status(&mut self, cookie: u64, payload: Vec<u8>, done: bool) -> io::Result<()> {
        let flags = u16::from(done) * chunk::DONE;
        let head = chunk_head(cookie, flags, chunk::BLOCK_STATUS, payload.len() as u32);
        self.push(Head::new(&[&head]), Data::Own(payload))
    }

    /// Sends all that waits.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let mut iov = Iov::new();
        for (head, data) in &self.waiting {
            iov.push(&head.bytes[..head.len]);
            match data {
                Data::None => {}
                Data::Buffer(range) => iov.push(&self.buffer.data[range.clone()]),
                Data::Own(bytes) => iov.push(bytes),
            }
        }
        let turn = self.send.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.line.stream.send_all(&iov);
        drop(turn);
        drop(iov);
        self.waiting.clear();
        self.buffer.used = 0;
        sent
    }

    /// Sends `head`, then `len` bytes that `fill` puts into pieces of the buffer, as one message:
    /// nobody else sends in between. `fill` gets the position, and its error ends the connection.
    pub fn stream(
        &mut self,
        head: &[u8],
        len: usize,
        mut fill: impl FnMut(usize, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.flush()?;
        self.buffer.grow(len);
        let turn = self.send.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        while at < len {
            let n = (len - at).min(self.buffer.data.len());
            let part = &mut self.buffer.data[..n];
            fill(at, part)?;
            let mut iov = Iov::new();
            if at == 0 {
                iov.push(head);
            }
            iov.push(part);
            self.line.stream.send_all(&iov)?;
            at += n;
        }
        drop(turn);
        Ok(())
    }
}
