//! The transmission phase: a client's requests, done.
//!
//! One thread receives. As long as requests are quick, it also does them itself, one after the
//! other, and sends their replies together: no request changes threads, and a batch costs two system
//! calls. When a request was slow and others had to wait for it, those that come are given to other
//! threads ([`Crew`]), each to one, for as long as they are slow and several are under way: a thread
//! waits for a slow disk, then, but the connection does not.
//!
//! Memory: a receive buffer per connection, a data buffer per thread ([`Outbox`]); longer requests
//! are done in pieces. Never: trusts a number of the client's before it is checked. Threads: the
//! connection's. Locks: `send`; with it in hand data may be read from the disk (a reply too long for
//! the buffer), never with a ticket in hand.

use super::crew::{Crew, Hand};
use super::export::{Context, Export, Line, Member};
use super::handshake::Session;
use super::listener::{House, Place};
use super::proto::*;
use super::reply::{Budget, Buffer, Outbox};
use super::status;
use crate::block::driver::Flags;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::thread;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Threads of a connection beside the one that receives.
const WORKERS: usize = 32;
/// Bytes that are received at a time, beyond long payloads.
const RECEIVE: usize = 64 << 10;
/// A request that takes longer is slow: more than a copy takes, with a busy machine allowed for.
const SLOW: Duration = Duration::from_micros(100);
/// The same where nothing is copied, but all comes from a disk.
const SLOW_DIRECT: Duration = Duration::from_micros(20);
/// A read that is so long is looked at for holes before.
const LOOK_FOR_HOLES: u32 = 64 << 10;
/// Bytes that one discard or zero request does with one ticket.
const STEP: u64 = 256 << 20;

/// A connection in its transmission phase; its last thread drops it.
struct Link {
    line: Arc<Line>,
    export: Arc<Export>,
    structured: bool,
    contexts: Vec<(u32, Context)>,
    send: Mutex<()>,
    crew: Crew<Job>,
    born: Instant,
    /// Until when requests are taken to be slow: nanoseconds after `born`.
    slow_until: AtomicU64,
    house: Arc<House>,
    _member: Member,
    // The last: with it the server forgets the connection.
    _place: Place,
}

impl Budget for House {
    fn left(&self) -> &AtomicUsize {
        &self.budget
    }
}

/// Serves until the client leaves or is shown out.
pub(super) fn run(session: Session, line: Arc<Line>, place: Place) {
    let link = Arc::new(Link {
        line,
        export: session.member.export.clone(),
        structured: session.structured,
        contexts: session.contexts,
        send: Mutex::new(()),
        crew: Crew::new(WORKERS),
        born: Instant::now(),
        slow_until: AtomicU64::new(0),
        house: place.house().clone(),
        _member: session.member,
        _place: place,
    });
    let _end = End(&link);
    let mut out = Outbox::new(&link.line, &link.send, Buffer::new(link.house.clone()));
    let mut rx = Receiver::new();
    let ended = match link.receive_all(&mut rx, &mut out) {
        // It may still want the replies to what it has sent.
        Err(e) if rx.is_end(&e) => out.flush(),
        other => other,
    };
    if let Err(e) = ended {
        // It has left in the middle of a word, or what it sends makes no sense.
        log::debug!("NBD: a client's connection ends: {e}");
        link.line.cut();
    }
}

/// Nobody receives any more, however that came about: the others finish what they have in hand.
struct End<'a>(&'a Link);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.line.cut();
        }
        self.0.crew.end();
    }
}

/// What has been received and not been looked at.
struct Receiver {
    buf: Vec<u8>,
    at: usize,
    end: usize,
    /// The last request had a long payload: the next one's had better go where it belongs.
    brief: bool,
}

impl Receiver {
    fn new() -> Receiver {
        Receiver { buf: vec![0; RECEIVE], at: 0, end: 0, brief: false }
    }

    /// The client has closed its end, and all that it sent has been looked at.
    fn is_end(&self, e: &io::Error) -> bool {
        e.kind() == io::ErrorKind::UnexpectedEof && self.at == self.end
    }

    fn has(&self, len: usize) -> bool {
        self.end - self.at >= len
    }

    /// Receives once. False: nothing is there (only when it does not wait).
    fn more(&mut self, line: &Line, wait: bool) -> io::Result<bool> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
        } else if self.buf.len() - self.at < Request::SIZE {
            self.buf.copy_within(self.at..self.end, 0);
            (self.at, self.end) = (0, self.end - self.at);
        }
        let upto = if self.brief { self.at + Request::SIZE } else { self.buf.len() };
        match line.stream.recv(&mut self.buf[self.end..upto], wait) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.end += n;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !wait => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The next request, if its header is there.
    fn request(&mut self) -> io::Result<Option<Request>> {
        let Some(head) = self.buf[self.at..self.end].first_chunk() else { return Ok(None) };
        self.at += Request::SIZE;
        match Request::parse(head) {
            Some(request) => Ok(Some(request)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The next bytes of a payload.
    fn payload(&mut self, line: &Line, to: &mut [u8]) -> io::Result<()> {
        let n = to.len().min(self.end - self.at);
        to[..n].copy_from_slice(&self.buf[self.at..self.at + n]);
        self.at += n;
        line.stream.recv_all(&mut IovMut::from_slice(&mut to[n..]))
    }
}

/// Cuts the line when its thread panics: the others must not wait for ever.
struct Fuse<'a>(&'a Line);

impl Drop for Fuse<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cut();
        }
    }
}

/// A thread that does what it is given.
fn work(link: &Link, hand: &Arc<Hand<Job>>) {
    let _fuse = Fuse(&link.line);
    let Some((mut job, buffer)) = hand.take() else { return };
    let mut out = Outbox::new(&link.line, &link.send, buffer);
    loop {
        let start = link.now();
        if let Err(e) = link.perform(&job, &mut out).and_then(|()| out.flush()) {
            log::debug!("NBD: a client's replies cannot be sent: {e}");
            link.line.cut();
        }
        link.took(start, is_heavy(&job.request), || link.crew.is_busy());
        let buffer = out.take_buffer();
        match link.crew.next(hand, buffer) {
            Some(next) => (job, out.buffer) = next,
            None => return,
        }
    }
}

/// A request with what is left of it to do.
struct Job {
    request: Request,
    /// Where a write's payload is.
    payload: std::ops::Range<usize>,
}

impl Link {
    fn now(&self) -> u64 {
        self.born.elapsed().as_nanos() as u64
    }

    /// A request that began at `start` has been done. If it was slow, and others wait meanwhile,
    /// the next ones are taken to be slow, too, for eight times as long; not so if it was `heavy`: how
    /// long a flush takes says nothing of reads. Says when it is.
    fn took(&self, start: u64, heavy: bool, others: impl FnOnce() -> bool) -> u64 {
        let end = self.now();
        let took = end - start;
        let limit = if self.export.direct { SLOW_DIRECT } else { SLOW };
        if took > limit.as_nanos() as u64 && !heavy && others() {
            self.slow_until.fetch_max(end + 8 * took, Ordering::Relaxed);
        }
        end
    }

    /// Gives a request away. It comes back when there is nobody for it.
    fn give(self: &Arc<Self>, job: Job, out: &mut Outbox) -> Result<(), Job> {
        self.crew.give(job, &mut out.buffer, |hand| {
            let own = self.clone();
            let hired = thread::spawn("nbd-worker", thread::IO_STACK, move || work(&own, &hand));
            // Those that are there can do it all, only not at once.
            hired.inspect_err(|e| log::debug!("NBD: no thread for a connection: {e}")).is_ok()
        })
    }

    /// Receives until the client has said good-bye.
    fn receive_all(self: &Arc<Self>, rx: &mut Receiver, out: &mut Outbox) -> io::Result<()> {
        let mut oldest: Option<u64> = None;
        let mut batch = 0;
        loop {
            let Some(request) = rx.request()? else {
                // Who sends one request at a time does not send another before the reply.
                if batch <= 1 || !rx.more(&self.line, false)? {
                    out.flush()?;
                    (oldest, batch) = (None, 0);
                    rx.more(&self.line, true)?;
                }
                continue;
            };
            batch += 1;
            if request.kind == cmd::DISC {
                return out.flush();
            }
            let start = self.now();
            let mut slow = start < self.slow_until.load(Ordering::Relaxed);
            let heavy = is_heavy(&request);
            if !slow && heavy {
                out.flush()?;
                oldest = None;
                slow = rx.has(1) || rx.more(&self.line, false)?;
            }
            let mut todo = self.receive(rx, request, out, slow)?;
            if slow && let Some(job) = todo.take() {
                out.flush()?;
                oldest = None;
                match self.give(job, out) {
                    Ok(()) => continue,
                    Err(job) => todo = Some(job),
                }
            }
            if let Some(job) = todo {
                self.perform(&job, out)?;
            }
            let mut trouble = None;
            let end = self.took(start, heavy, || {
                rx.has(1)
                    || rx.more(&self.line, false).unwrap_or_else(|e| {
                        trouble = Some(e);
                        false
                    })
            });
            if let Some(e) = trouble {
                return Err(e);
            }
            // Nobody waits long for a reply that could be sent.
            if end - *oldest.get_or_insert(start) > SLOW.as_nanos() as u64 {
                out.flush()?;
                oldest = None;
            }
        }
    }

    /// Receives what belongs to a request. `None`: it is done already.
    fn receive(
        &self,
        rx: &mut Receiver,
        request: Request,
        out: &mut Outbox,
        slow: bool,
    ) -> io::Result<Option<Job>> {
        let checked = self.check(&request);
        if request.kind != cmd::WRITE {
            rx.brief = false;
            return match checked {
                Ok(()) => Ok(Some(Job { request, payload: 0..0 })),
                Err(code) => self.fail(&request, code, out).map(|()| None),
            };
        }
        let len = request.len as usize;
        rx.brief = len >= RECEIVE / 2;
        if request.len > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if checked.is_ok() && !slow && rx.has(len) && !self.export.direct {
            // Small, and all here: written from where it lies.
            let data = rx.at..rx.at + len;
            rx.at += len;
            let done = self.write(request.offset, &rx.buf[data], fua(&request));
            return out.simple(request.cookie, code(&done)).map(|()| None);
        }
        // In as many pieces as the buffer makes it; usually one.
        let mut done = checked.map_err(error_of);
        let mut at = 0;
        while at < len {
            let place = out.room(len - at)?;
            rx.payload(&self.line, out.buffer.bytes(place.clone()))?;
            if at == 0 && place.len() == len && done.is_ok() {
                return Ok(Some(Job { request, payload: place }));
            }
            let last = at + place.len() == len;
            if done.is_ok() {
                let flags = if last { fua(&request) } else { Flags::NONE };
                done = self.write(request.offset + at as u64, out.buffer.bytes(place.clone()), flags);
            }
            at += place.len();
        }
        out.simple(request.cookie, code(&done)).map(|()| None)
    }

    fn write(&self, offset: u64, data: &[u8], flags: Flags) -> io::Result<()> {
        self.export.handle.write(offset, &Iov::from_slice(data), flags)
    }

    /// Whether the request may be done as it is; else the error's number.
    fn check(&self, r: &Request) -> Result<(), u32> {
        let writes = matches!(r.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let flags = match r.kind {
            cmd::READ if self.structured => cmd_flag::DF,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        if r.kind > cmd::BLOCK_STATUS || r.flags & !(flags | cmd_flag::FUA) != 0 {
            return Err(EINVAL);
        }
        if writes && !self.export.writable {
            return Err(EPERM);
        }
        if r.kind == cmd::FLUSH {
            return Ok(());
        }
        let end = r.offset.checked_add(u64::from(r.len));
        if end.is_none_or(|end| end > self.export.size) {
            return Err(if matches!(r.kind, cmd::WRITE | cmd::WRITE_ZEROES) { ENOSPC } else { EINVAL });
        }
        match r.kind {
            cmd::READ if r.len > MAX_PAYLOAD => Err(EINVAL),
            cmd::BLOCK_STATUS if self.contexts.is_empty() || r.len == 0 => Err(EINVAL),
            _ => Ok(()),
        }
    }

    /// The reply to a request that failed as a whole.
    fn fail(&self, r: &Request, code: u32, out: &mut Outbox) -> io::Result<()> {
        match self.structured && matches!(r.kind, cmd::READ | cmd::BLOCK_STATUS) {
            true => out.error(r.cookie, code, None),
            false => out.simple(r.cookie, code),
        }
    }

    /// Does a request that has been checked, and replies. An error ends the connection.
    fn perform(&self, job: &Job, out: &mut Outbox) -> io::Result<()> {
        let r = &job.request;
        let handle = &self.export.handle;
        let (offset, len) = (r.offset, u64::from(r.len));
        let done = match r.kind {
            cmd::READ => return self.read(r, out),
            cmd::BLOCK_STATUS => return self.block_status(r, out),
            cmd::WRITE if len == 0 => Ok(()),
            cmd::WRITE => self.write(offset, out.buffer.bytes(job.payload.clone()), fua(r)),
            cmd::FLUSH => handle.flush(),
            cmd::TRIM => self.in_steps(offset, len, |at, n, last| {
                handle.discard(at, n)?;
                if last && r.flags & cmd_flag::FUA != 0 { handle.flush() } else { Ok(()) }
            }),
            cmd::WRITE_ZEROES => {
                let hole = if r.flags & cmd_flag::NO_HOLE == 0 { Flags::MAY_UNMAP } else { Flags::NONE };
                if r.flags & cmd_flag::FAST_ZERO != 0 {
                    // At once: when it cannot be done quickly, nothing must have been done.
                    handle.zero(offset, len, hole | Flags::NO_FALLBACK | fua(r))
                } else {
                    self.in_steps(offset, len, |at, n, last| {
                        handle.zero(at, n, if last { hole | fua(r) } else { hole })
                    })
                }
            }
            // The only one left: check() has seen to that.
            _ => self.cache(offset, len, out),
        };
        let code = match code(&done) {
            ENOTSUP if r.flags & cmd_flag::FAST_ZERO == 0 => EINVAL,
            code => code,
        };
        out.simple(r.cookie, code)
    }

    /// A long request in steps, between which the graph can change and the line be cut.
    fn in_steps(
        &self,
        offset: u64,
        len: u64,
        mut step: impl FnMut(u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            if self.line.is_cut() {
                return Err(io::Error::from_raw_os_error(libc::ESHUTDOWN));
            }
            let n = STEP.min(end - at);
            step(at, n, at + n == end)?;
            at += n;
        }
        Ok(())
    }

    fn cache(&self, offset: u64, len: u64, out: &mut Outbox) -> io::Result<()> {
        // A hint: enough of it to be of use, not so much that it keeps a thread for long.
        let (mut at, end) = (offset, offset + len.min(u64::from(MAX_PAYLOAD)));
        while at < end && !self.line.is_cut() {
            let place = out.room((end - at).min(1 << 20) as usize)?;
            let n = place.len() as u64;
            self.export.handle.read(at, &mut IovMut::from_slice(out.buffer.bytes(place)))?;
            at += n;
        }
        Ok(())
    }

    fn read(&self, r: &Request, out: &mut Outbox) -> io::Result<()> {
        let (handle, len) = (&self.export.handle, r.len as usize);
        if len == 0 {
            return if self.structured { out.none(r.cookie) } else { out.simple(r.cookie, 0) };
        }
        if self.structured && r.flags & cmd_flag::DF == 0 {
            return self.read_chunks(r, out);
        }
        let place = out.room(len)?;
        if place.len() == len {
            let read = handle.read(r.offset, &mut IovMut::from_slice(out.buffer.bytes(place.clone())));
            return match (read, self.structured) {
                (Ok(()), true) => out.data(r.cookie, r.offset, place, true),
                (Ok(()), false) => out.simple_data(r.cookie, place),
                (Err(e), _) => self.fail(r, error_code(&e), out),
            };
        }
        // Longer than the buffer: the head goes out before all is read.
        if !self.structured {
            // A failure after that can only be told by the end of the connection.
            return out.stream(&simple_reply(r.cookie, 0), len, |at, to| {
                handle.read(r.offset + at as u64, &mut IovMut::from_slice(to))
            });
        }
        let mut head = chunk_head(r.cookie, 0, chunk::OFFSET_DATA, 8 + r.len).to_vec();
        head.extend(r.offset.to_be_bytes());
        let mut failed = None;
        out.stream(&head, len, |at, to| {
            let offset = r.offset + at as u64;
            if failed.is_none()
                && let Err(e) = handle.read(offset, &mut IovMut::from_slice(to))
            {
                failed = Some((error_code(&e), offset));
            }
            if failed.is_some() {
                to.fill(0);
            }
            Ok(())
        })?;
        match failed {
            Some((code, offset)) => out.error(r.cookie, code, Some(offset)),
            None => out.none(r.cookie),
        }
    }

    fn read_chunks(&self, r: &Request, out: &mut Outbox) -> io::Result<()> {
        let handle = &self.export.handle;
        let (mut at, end) = (r.offset, r.offset + u64::from(r.len));
        while at < end {
            let mut n = end - at;
            if r.len >= LOOK_FOR_HOLES {
                // Who cannot tell can still be read.
                if let Ok(c) = handle.contents(at, n) {
                    n = n.min(c.len);
                    if c.zero {
                        out.hole(r.cookie, at, n as u32, at + n == end)?;
                        at += n;
                        continue;
                    }
                }
            }
            let place = out.room(n as usize)?;
            n = place.len() as u64;
            if let Err(e) = handle.read(at, &mut IovMut::from_slice(out.buffer.bytes(place.clone()))) {
                return out.error(r.cookie, error_code(&e), Some(at));
            }
            out.data(r.cookie, at, place, at + n == end)?;
            at += n;
        }
        Ok(())
    }

    fn block_status(&self, r: &Request, out: &mut Outbox) -> io::Result<()> {
        let one = r.flags & cmd_flag::REQ_ONE != 0;
        let mut all = Vec::new();
        for context in &self.contexts {
            match status::payload(&self.export, &self.line, context, (r.offset, r.len), one) {
                Ok(payload) => all.push(payload),
                Err(e) => return out.error(r.cookie, error_code(&e), None),
            }
        }
        let last = all.len() - 1;
        for (n, payload) in all.into_iter().enumerate() {
            out.status(r.cookie, payload, n == last)?;
        }
        Ok(())
    }
}

fn fua(r: &Request) -> Flags {
    if r.flags & cmd_flag::FUA != 0 { Flags::FUA } else { Flags::NONE }
}

/// Most likely to take long.
fn is_heavy(r: &Request) -> bool {
    r.kind != cmd::READ && (r.kind != cmd::WRITE || r.flags & cmd_flag::FUA != 0)
}

/// The number in a reply.
fn code(done: &io::Result<()>) -> u32 {
    done.as_ref().err().map_or(0, error_code)
}

#[cfg(test)]
#[path = "serve_test.rs"]
mod tests;
