//! A client's connection in its transmission phase: many threads' requests over one socket.
//!
//! There is no thread that receives. Whoever waits for a reply and finds nobody receiving does it:
//! it reads the head of what comes, and when that belongs to somebody else's request it hands the
//! role over to that thread, which reads the data straight to where they go. A single request at a
//! time is thus done by one thread, and no data are copied.
//!
//! Owns: the socket, which requests are under way, the receive buffer. Never: connects, tries
//! again. What a server sends is checked before it is believed; what makes no sense ends the
//! connection. Threads: any. Locks: `send` for a call; `state`, for moments, after it.

use super::hello::Found;
use super::proto::*;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::stream::Stream;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Requests under way at a time; more wait.
const SLOTS: usize = 64;
/// Bytes that are received at a time, beyond data that go where they belong.
const RECEIVE: usize = 8 << 10;
/// Pieces that a server may cut one read into before it is taken for mad.
const FRAGMENTS: usize = 4096;

/// The connection is of no use any more. The request may or may not have been done.
#[derive(Debug)]
pub(super) struct Broken;

/// What a request gives back, besides success.
pub(super) enum Want<'a, 'b> {
    Nothing,
    /// Data, here.
    Data(&'a mut IovMut<'b>),
    /// The first extent: length and flags.
    Extent(&'a mut Option<(u32, u32)>),
}

pub(super) struct Client {
    stream: Arc<Stream>,
    /// What the server said when it was connected.
    pub found: Found,
    send: Mutex<()>,
    state: Mutex<State>,
    free: Condvar,
    wake: [Condvar; SLOTS],
}

struct State {
    /// The role of the one who receives, while nobody has it.
    receiver: Option<Receiver>,
    slots: Vec<Slot>,
    /// How many requests there were.
    serial: u64,
    broken: bool,
}

#[derive(Default)]
struct Slot {
    /// 0: free.
    cookie: u64,
    /// Sleeps until there is mail.
    waits: bool,
    mail: Option<(Receiver, Option<Head>)>,
}

struct Receiver {
    buf: Vec<u8>,
    at: usize,
    end: usize,
}

/// The head of a reply, or of a chunk of one.
#[derive(Clone, Copy, Debug)]
enum Head {
    Simple { cookie: u64, error: u32 },
    Chunk { cookie: u64, flags: u16, kind: u16, len: u32 },
}

impl Head {
    fn cookie(&self) -> u64 {
        match self {
            Head::Simple { cookie, .. } | Head::Chunk { cookie, .. } => *cookie,
        }
    }
}

fn nonsense() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

impl Receiver {
    fn need(&mut self, stream: &Stream, len: usize) -> io::Result<()> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
        }
        if self.buf.len() - self.at < len {
            self.buf.copy_within(self.at..self.end, 0);
            (self.at, self.end) = (0, self.end - self.at);
        }
        while self.end - self.at < len {
            match stream.recv(&mut self.buf[self.end..], true)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.end += n,
            }
        }
        Ok(())
    }

    /// The next bytes, at most [`RECEIVE`].
    fn take<const N: usize>(&mut self, stream: &Stream) -> io::Result<[u8; N]> {
        self.need(stream, N)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.buf[self.at..self.at + N]);
        self.at += N;
        Ok(bytes)
    }

    fn skip(&mut self, stream: &Stream, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            self.need(stream, 1)?;
            let n = left.min(self.end - self.at);
            self.at += n;
            left -= n;
        }
        Ok(())
    }

    fn data(&mut self, stream: &Stream, to: &mut IovMut) -> io::Result<()> {
        let n = to.len().min(self.end - self.at);
        to.copy_from(0, &self.buf[self.at..self.at + n]);
        self.at += n;
        match to.len() - n {
            0 => Ok(()),
            rest => stream.recv_all(&mut to.slice(n, rest)),
        }
    }

    fn head(&mut self, stream: &Stream) -> io::Result<Head> {
        let magic = be32(&self.take::<4>(stream)?, 0);
        match magic {
            SIMPLE_REPLY_MAGIC => {
                let b = self.take::<12>(stream)?;
                Ok(Head::Simple { error: be32(&b, 0), cookie: be64(&b, 4) })
            }
            STRUCTURED_REPLY_MAGIC => {
                let b = self.take::<16>(stream)?;
                let (flags, kind) = (be16(&b, 0), be16(&b, 2));
                Ok(Head::Chunk { flags, kind, cookie: be64(&b, 4), len: be32(&b, 12) })
            }
            _ => Err(nonsense()),
        }
    }
}

/// What has been received of a reply.
struct Progress {
    request: Request,
    /// Parts of a read that are there, sorted, not touching.
    have: Vec<(u64, u64)>,
    error: Option<u32>,
    status: bool,
}

impl Progress {
    /// Notes that a part of a read has come. Each byte comes once, and was asked for.
    fn got(&mut self, at: u64, len: u64) -> io::Result<()> {
        let (start, end) = (self.request.offset, self.request.offset + u64::from(self.request.len));
        let upto = at.checked_add(len).filter(|e| *e <= end).ok_or_else(nonsense)?;
        if self.request.kind != cmd::READ || len == 0 || at < start {
            return Err(nonsense());
        }
        let n = self.have.partition_point(|(s, _)| *s < at);
        let before = n.checked_sub(1).map(|b| self.have[b].1);
        let after = self.have.get(n).map(|h| h.0);
        if before.is_some_and(|e| e > at) || after.is_some_and(|s| s < upto) {
            return Err(nonsense());
        }
        match (before == Some(at), after == Some(upto)) {
            (true, true) => {
                self.have[n - 1].1 = self.have[n].1;
                self.have.remove(n);
            }
            (true, false) => self.have[n - 1].1 = upto,
            (false, true) => self.have[n].0 = at,
            (false, false) if self.have.len() >= FRAGMENTS => return Err(nonsense()),
            (false, false) => self.have.insert(n, (at, upto)),
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        let (start, len) = (self.request.offset, u64::from(self.request.len));
        self.have.len() == 1 && self.have[0] == (start, start + len)
    }
}

impl Client {
    /// A connection whose handshake found this.
    pub fn new(stream: Arc<Stream>, found: Found) -> Client {
        let receiver = Receiver { buf: vec![0; RECEIVE], at: 0, end: 0 };
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        Client {
            stream,
            found,
            send: Mutex::new(()),
            state: Mutex::new(State { receiver: Some(receiver), slots, serial: 0, broken: false }),
            free: Condvar::new(),
            wake: [const { Condvar::new() }; SLOTS],
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection: all requests fail with [`Broken`].
    pub fn hang_up(&self) {
        let mut state = self.state();
        state.broken = true;
        self.stream.shut_down();
        self.free.notify_all();
        self.wake.iter().for_each(|w| w.notify_all());
    }

    /// Says good-bye, and ends it.
    pub fn leave(&self) {
        let bye = Request { flags: 0, kind: cmd::DISC, cookie: 0, offset: 0, len: 0 };
        if !self.is_broken() {
            // Whoever does not take it in time sees the end.
            let _ = self.stream.set_patience(Some(Duration::from_millis(200)));
            let _turn = self.send.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = self.stream.send_all(&Iov::from_slice(&bye.bytes()));
        }
        self.hang_up();
    }

    /// It has ended.
    pub fn is_broken(&self) -> bool {
        self.state().broken
    }

    /// Calls on the socket wait no longer than that.
    pub fn set_patience(&self, time: Option<Duration>) {
        // A socket that cannot even do this is at its end.
        let _ = self.stream.set_patience(time);
    }

    /// Does a request (its cookie is given here), with `payload` behind it, and waits for the
    /// reply. The inner result is what the server says.
    pub fn call(
        &self,
        mut request: Request,
        payload: Option<&Iov>,
        mut want: Want,
    ) -> Result<io::Result<()>, Broken> {
        let slot = self.enter(&mut request.cookie)?;
        let done = self.exchange(slot, request, payload, &mut want);
        if done.is_err() {
            self.hang_up();
            let mut state = self.state();
            // Mail for nobody goes with it.
            state.slots[slot] = Slot::default();
        }
        done.map_err(|_| Broken)
    }

    /// Waits for a place, and takes it.
    fn enter(&self, cookie: &mut u64) -> Result<usize, Broken> {
        let mut state = self.state();
        loop {
            if state.broken {
                return Err(Broken);
            }
            if let Some(slot) = state.slots.iter().position(|s| s.cookie == 0) {
                state.serial += 1;
                *cookie = state.serial * SLOTS as u64 + slot as u64;
                state.slots[slot].cookie = *cookie;
                return Ok(slot);
            }
            state = self.free.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Frees the place, and finds a successor as the one who receives: the one who has waited
    /// longest, whose reply is most likely the next.
    fn depart(&self, slot: usize, receiver: Receiver) {
        let mut state = self.state();
        state.slots[slot] = Slot::default();
        self.free.notify_one();
        let waiting = state.slots.iter().enumerate().filter(|(_, s)| s.waits && s.mail.is_none());
        match waiting.min_by_key(|(_, s)| s.cookie).map(|(n, _)| n) {
            Some(next) => {
                state.slots[next].mail = Some((receiver, None));
                self.wake[next].notify_one();
            }
            None => state.receiver = Some(receiver),
        }
    }

    /// Waits until this thread is to receive.
    fn receiver(&self, slot: usize) -> io::Result<(Receiver, Option<Head>)> {
        let mut state = self.state();
        loop {
            if state.broken {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if let Some(mail) = state.slots[slot].mail.take() {
                return Ok(mail);
            }
            if let Some(receiver) = state.receiver.take() {
                return Ok((receiver, None));
            }
            state.slots[slot].waits = true;
            state = self.wake[slot].wait(state).unwrap_or_else(PoisonError::into_inner);
            state.slots[slot].waits = false;
        }
    }

    fn exchange(
        &self,
        slot: usize,
        request: Request,
        payload: Option<&Iov>,
        want: &mut Want,
    ) -> io::Result<io::Result<()>> {
        let head = request.bytes();
        let mut out = Iov::from_slice(&head);
        payload.into_iter().for_each(|p| out.append(p));
        {
            let _turn = self.send.lock().unwrap_or_else(PoisonError::into_inner);
            self.stream.send_all(&out)?;
        }
        let mut progress = Progress { request, have: Vec::new(), error: None, status: false };
        let mut mine: Option<Receiver> = None;
        loop {
            let (mut receiver, head) = match mine.take() {
                Some(receiver) => (receiver, None),
                None => self.receiver(slot)?,
            };
            let head = match head {
                Some(head) => head,
                None => receiver.head(&self.stream)?,
            };
            if head.cookie() != request.cookie {
                self.hand_over(receiver, head)?;
            } else if let Some(done) = self.reply(head, &mut receiver, &mut progress, want)? {
                self.depart(slot, receiver);
                return Ok(done);
            } else {
                mine = Some(receiver);
            }
        }
    }

    /// Gives the role to the thread whose reply comes next.
    fn hand_over(&self, receiver: Receiver, head: Head) -> io::Result<()> {
        let slot = (head.cookie() % SLOTS as u64) as usize;
        let mut state = self.state();
        if head.cookie() == 0 || state.slots[slot].cookie != head.cookie() {
            return Err(nonsense());
        }
        state.slots[slot].mail = Some((receiver, Some(head)));
        self.wake[slot].notify_one();
        Ok(())
    }

    /// Receives what follows a head. `Some`: the reply is complete.
    fn reply(
        &self,
        head: Head,
        rx: &mut Receiver,
        progress: &mut Progress,
        want: &mut Want,
    ) -> io::Result<Option<io::Result<()>>> {
        let request = progress.request;
        let (flags, kind, len) = match head {
            Head::Simple { error: 0, .. } => {
                match (request.kind, want) {
                    // These have replies in chunks.
                    (cmd::BLOCK_STATUS, _) => return Err(nonsense()),
                    (cmd::READ, _) if self.found.structured => return Err(nonsense()),
                    (cmd::READ, Want::Data(to)) => rx.data(&self.stream, to)?,
                    _ => {}
                }
                return Ok(Some(Ok(())));
            }
            Head::Simple { error, .. } => return Ok(Some(Err(error_of(error)))),
            Head::Chunk { .. } if !self.found.structured => return Err(nonsense()),
            Head::Chunk { flags, kind, len, .. } => (flags, kind, len as usize),
        };
        match kind {
            chunk::NONE if len == 0 && flags & chunk::DONE != 0 => {}
            chunk::OFFSET_DATA if len > 8 => {
                let at = be64(&rx.take::<8>(&self.stream)?, 0);
                progress.got(at, len as u64 - 8)?;
                let Want::Data(to) = want else { return Err(nonsense()) };
                let at = (at - request.offset) as usize;
                rx.data(&self.stream, &mut to.slice(at, len - 8))?;
            }
            chunk::OFFSET_HOLE if len == 12 => {
                let b = rx.take::<12>(&self.stream)?;
                let (at, n) = (be64(&b, 0), be32(&b, 8));
                progress.got(at, n.into())?;
                let Want::Data(to) = want else { return Err(nonsense()) };
                to.fill((at - request.offset) as usize, n as usize, 0);
            }
            chunk::BLOCK_STATUS if len >= 12 && len % 8 == 4 => {
                let b = rx.take::<12>(&self.stream)?;
                let (id, n, state) = (be32(&b, 0), be32(&b, 4), be32(&b, 8));
                // More than was asked for can be said; no more than fits the largest request.
                rx.skip(&self.stream, len - 12)?;
                let Want::Extent(to) = want else { return Err(nonsense()) };
                if Some(id) != self.found.context || n == 0 || progress.status || len > 4 + (8 << 20) {
                    return Err(nonsense());
                }
                progress.status = true;
                **to = Some((n, state));
            }
            kind if kind & chunk::ERR != 0 && (6..=MAX_STRING + 64).contains(&len) => {
                let b = rx.take::<6>(&self.stream)?;
                let (code, text) = (be32(&b, 0), usize::from(be16(&b, 4)));
                if code == 0 || text > len - 6 {
                    return Err(nonsense());
                }
                rx.skip(&self.stream, len - 6)?;
                progress.error.get_or_insert(code);
            }
            _ => return Err(nonsense()),
        }
        if flags & chunk::DONE == 0 {
            return Ok(None);
        }
        let whole = match request.kind {
            cmd::READ => progress.is_whole(),
            cmd::BLOCK_STATUS => progress.status,
            _ => true,
        };
        match progress.error {
            Some(code) => Ok(Some(Err(error_of(code)))),
            None if whole => Ok(Some(Ok(()))),
            None => Err(nonsense()),
        }
    }
}

#[cfg(test)]
#[path = "client_test.rs"]
mod tests;
