//! The driver `nbd`: a disk on an NBD server.
//!
//! Owns: the connection, and what becomes of it: when it breaks, requests wait up to
//! `reconnect-delay` seconds for a new one and are sent again; after that, and without a delay at
//! once, they fail with EIO, and every later request tries again, once a second at most. A server
//! that is there but does not answer is waited for, however long: only it knows what has become of a
//! request. Who does not want to wait pulls the node ([`yank`](crate::block::yank)): the connection
//! is cut, and there is no other; nor is there for a socket that was passed. Never: holds up the end of the process ([`Driver::give_up`]).
//! Threads: I/O from any; whoever finds the connection gone makes the new one, the others wait; any
//! pulls. Locks: `link`, for moments, a leaf.

use super::client::{Broken, Client, Want};
use super::hello::{Found, hello};
use super::proto::*;
use super::uri::Location;
use crate::bail;
use crate::block::driver::{Driver, Extent, ExtentKind, Flags, Limits};
use crate::block::open::{Open, Opening};
use crate::block::reopen_options::{Ready, Reopening};
use crate::block::yank::Yankable;
use crate::error::{Error, Result};
use crate::sys::address::{SocketAddress, SocketAddressType};
use crate::sys::iov::{Iov, IovMut};
use crate::sys::stream::Stream;
use crate::sys::thread;
use crate::sys::unix;
use crate::wire_struct;
use serde_json::{Map, Value, json};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A handshake may take so long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The time between two tries to connect while somebody waits.
const RETRY: Duration = Duration::from_millis(200);
/// The same when nobody is to wait, and how long such a try may take.
const SELDOM: Duration = Duration::from_secs(1);
/// What is left of a server's time when the process, or the node, comes to its end.
const LAST: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

wire_struct! {
    /// Options of the driver `nbd`.
    pub struct BlockdevOptionsNbd {
        /// Where the server is.
        server: SocketAddress,
        /// The export's name; "" by default.
        export: Option<String>,
        /// Id of TLS credentials: there are none.
        "tls-creds" tls_creds: Option<String>,
        /// The server's name in its certificate.
        "tls-hostname" tls_hostname: Option<String>,
        /// The metadata context to show instead of what is allocated: what is dirty is shown as
        /// not allocated.
        "x-dirty-bitmap" dirty_bitmap: Option<String>,
        /// Seconds for which requests wait for a lost connection to come back (default: 0).
        "reconnect-delay" reconnect_delay: Option<u32>,
        /// Seconds for which a server is tried when the node is opened (default: 0: once).
        "open-timeout" open_timeout: Option<u32>,
    }
}

/// The driver, with its options or with a name that has them.
pub enum NbdPlan {
    /// As `blockdev-add` gives them.
    Options(Box<BlockdevOptionsNbd>),
    /// `nbd://…`, `nbd+unix://…`, `nbd:…`.
    Name(String),
}

impl Open for NbdPlan {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let o = match *self {
            NbdPlan::Options(o) => *o,
            NbdPlan::Name(name) => {
                let Location { server, export } = Location::parse(&name)?;
                BlockdevOptionsNbd {
                    server,
                    export: Some(export),
                    tls_creds: None,
                    tls_hostname: None,
                    dirty_bitmap: None,
                    reconnect_delay: None,
                    open_timeout: None,
                }
            }
        };
        if let Some(id) = o.tls_creds {
            bail!("No TLS credentials with id '{id}'");
        }
        if o.tls_hostname.is_some() {
            bail!("Parameter 'tls-hostname' needs TLS, which this client does not have");
        }
        let export = o.export.unwrap_or_default();
        if export.len() > MAX_STRING {
            bail!("export name too long to send to server");
        }
        let passed = match &o.server.kind {
            SocketAddressType::Fd(a) => {
                let fd = cx.passed(&a.str)?;
                if unix::kind(fd.as_fd()) == unix::Kind::Other {
                    bail!("File descriptor '{}' is not a socket", a.str);
                }
                Some(fd)
            }
            _ => None,
        };
        let once = passed.is_some();
        let place = Place {
            server: o.server,
            passed: Mutex::new(passed),
            export,
            context: o.dirty_bitmap.clone().unwrap_or_else(|| "base:allocation".into()),
        };
        let last = Instant::now() + Duration::from_secs(o.open_timeout.unwrap_or(0).into());
        let link = Arc::new(Shared::default());
        let own = link.clone();
        let yankable = cx.yanks().enter(cx.name(), move || own.cut());
        let client = loop {
            match place.connect(&link, last.max(Instant::now() + HANDSHAKE)) {
                Ok(client) => break client,
                Err(_) if link.hurry.load(Ordering::Acquire) => {
                    bail!("NBD server {}: yanked before there was a connection", place.server)
                }
                Err(e) if once || Instant::now() + RETRY >= last => return Err(e),
                Err(_) => std::thread::sleep(RETRY),
            }
        };
        let found = client.found.clone();
        if let Some(name) = o.dirty_bitmap.as_ref().filter(|_| found.context.is_none()) {
            client.leave();
            bail!("requested x-dirty-bitmap {name} not found");
        }
        if found.has(flag::READ_ONLY) && !cx.options.read_only {
            if !cx.options.auto_read_only {
                client.leave();
                bail!("request on write denied without write permission");
            }
            cx.options.read_only = true;
        }
        let mut own = link.lock();
        if link.hurry.load(Ordering::Acquire) {
            client.leave();
            bail!("NBD server {}: yanked when it was connected", place.server);
        }
        own.client = Some(Arc::new(client));
        drop(own);
        Ok(Box::new(Nbd {
            place,
            found,
            dirty: o.dirty_bitmap,
            delay: Duration::from_secs(o.reconnect_delay.unwrap_or(0).into()),
            link,
            yankable: Mutex::new(Some(yankable)),
        }))
    }
}

/// Which disk.
struct Place {
    server: SocketAddress,
    /// A socket that was passed, before it is used.
    passed: Mutex<Option<OwnedFd>>,
    export: String,
    context: String,
}

impl Place {
    fn connect(&self, link: &Shared, deadline: Instant) -> Result<Client> {
        let patience = deadline.min(Instant::now() + HANDSHAKE);
        let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let fd = passed.map_or_else(|| self.server.connect(patience), Ok)?;
        let stream = Arc::new(Stream::new(fd)?);
        link.lock().half = Some(stream.clone());
        let found = match link.hurry.load(Ordering::Acquire) {
            // Whoever has cut could not see it yet.
            true => Err(Error::new("yanked")),
            false => hello(&stream, &self.export, &self.context, deadline),
        };
        link.lock().half = None;
        Ok(Client::new(stream, found?))
    }
}

/// See the module's head.
pub struct Nbd {
    place: Place,
    /// What the first connection found; a new one must find the same.
    found: Found,
    dirty: Option<String>,
    delay: Duration,
    link: Arc<Shared>,
    /// Until it is closed.
    yankable: Mutex<Option<Yankable>>,
}

#[derive(Default)]
struct Shared {
    link: Mutex<Link>,
    /// There is another connection, or a try to have one has failed.
    changed: Condvar,
    /// The end is near, or has come: nobody waits for a new connection.
    hurry: AtomicBool,
}

#[derive(Default)]
struct Link {
    client: Option<Arc<Client>>,
    /// When the last one broke.
    lost: Option<Instant>,
    /// When the last try to connect began.
    tried: Option<Instant>,
    /// Somebody is at it.
    trying: bool,
    /// A connection in its handshake.
    half: Option<Arc<Stream>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end, from outside: requests that wait fail, all that come fail, nothing connects again.
    fn cut(&self) {
        self.hurry.store(true, Ordering::Release);
        let link = self.lock();
        self.changed.notify_all();
        let (client, half) = (link.client.clone(), link.half.clone());
        drop(link);
        client.inspect(|c| c.hang_up());
        half.inspect(|s| s.shut_down());
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Nbd {
    /// The connection, or a new one, for which is waited until `reconnect-delay` is over.
    /// `until`: and not longer than that.
    fn client(&self, until: Option<Instant>) -> io::Result<Arc<Client>> {
        let mut link = self.link.lock();
        loop {
            if let Some(client) = &link.client {
                return Ok(client.clone());
            }
            if self.link.hurry.load(Ordering::Acquire) {
                return Err(eio());
            }
            let now = Instant::now();
            let end = link.lost.map_or(now, |lost| lost + self.delay);
            let end = until.map_or(end, |u| end.min(u));
            let patient = now < end;
            let pause = if patient { RETRY } else { SELDOM };
            if !link.trying && link.tried.is_none_or(|t| now >= t + pause) {
                link.trying = true;
                link.tried = Some(now);
                drop(link);
                let limit = if patient { end.clamp(now + RETRY, now + HANDSHAKE) } else { now + SELDOM };
                let found = self.reconnect(limit);
                link = self.link.lock();
                link.trying = false;
                match found {
                    // The end has come meanwhile.
                    Ok(client) if self.link.hurry.load(Ordering::Acquire) => client.leave(),
                    Ok(client) => {
                        log::info!("NBD server {}: connected again", self.place.server);
                        (link.client, link.lost) = (Some(Arc::new(client)), None);
                    }
                    Err(e) => log::debug!("NBD server {}: {e}", self.place.server),
                }
                self.link.changed.notify_all();
                continue;
            }
            if !patient {
                return Err(eio());
            }
            let waited = self.link.changed.wait_timeout(link, RETRY);
            (link, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn check_access(&self, read_only: bool) -> io::Result<()> {
        match read_only || !self.found.has(flag::READ_ONLY) {
            true => Ok(()),
            false => {
                let text = "Can't reopen read-only NBD mount as read/write";
                Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
            }
        }
    }

    fn reconnect(&self, deadline: Instant) -> Result<Client> {
        let client = self.place.connect(&self.link, deadline)?;
        let (old, new) = (&self.found, &client.found);
        let needed = flag::SEND_FLUSH | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        let differs = (old.size, old.min_block, old.context.is_some())
            != (new.size, new.min_block, new.context.is_some())
            || old.max_payload > new.max_payload
            || old.flags & !new.flags & needed != 0
            || new.flags & !old.flags & flag::READ_ONLY != 0;
        if differs {
            client.leave();
            return Err(Error::new("the export is not what it was"));
        }
        Ok(client)
    }

    /// The connection has broken.
    fn lost(&self, client: &Arc<Client>) {
        let mut link = self.link.lock();
        if link.client.as_ref().is_some_and(|c| Arc::ptr_eq(c, client)) {
            log::warn!("NBD server {}: the connection is lost", self.place.server);
            // The first try is at once.
            (link.client, link.lost, link.tried) = (None, Some(Instant::now()), None);
        }
    }

    /// Does a request, on as many connections as it takes.
    fn call(
        &self,
        mut f: impl FnMut(&Client) -> std::result::Result<io::Result<()>, Broken>,
    ) -> io::Result<()> {
        let mut until = None;
        loop {
            let client = self.client(until)?;
            match f(&client) {
                // It says that it is about to go: what comes after it may serve us.
                Ok(Err(e)) if e.raw_os_error() == Some(libc::ESHUTDOWN) && !self.delay.is_zero() => {
                    client.hang_up();
                    self.lost(&client);
                }
                Ok(done) => return done,
                Err(Broken) => self.lost(&client),
            }
            let now = Instant::now();
            if now >= *until.get_or_insert(now + self.delay) || self.link.hurry.load(Ordering::Acquire) {
                return Err(eio());
            }
        }
    }

    fn plain(&self, flags: u16, kind: u16, offset: u64, len: u32) -> io::Result<()> {
        let request = Request { flags, kind, cookie: 0, offset, len };
        self.call(|c| c.call(request, None, Want::Nothing))
    }

    /// A request without payload, in as many pieces as its length takes.
    fn long(&self, flags: u16, kind: u16, off: u64, len: u64) -> io::Result<()> {
        // Whole blocks that fit 32 bits, as large as is of any use.
        const PIECE: u64 = 1 << 30;
        let (mut at, end) = (off, off + len);
        while at < end {
            let n = PIECE.min(end - at);
            self.plain(flags, kind, at, n as u32)?;
            at += n;
        }
        Ok(())
    }
}

impl Driver for Nbd {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn len(&self) -> u64 {
        self.found.size
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.found.min_block,
            memory_alignment: 1,
            discard_alignment: self.found.preferred,
            cheap_zeroes: self.found.has(flag::SEND_WRITE_ZEROES),
        }
    }

    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        let max = self.found.max_payload as usize;
        let (mut at, len) = (0, to.len());
        while at < len {
            let n = max.min(len - at);
            let mut part = to.slice(at, n);
            let request =
                Request { flags: 0, kind: cmd::READ, cookie: 0, offset: off + at as u64, len: n as u32 };
            self.call(|c| c.call(request, None, Want::Data(&mut part)))?;
            at += n;
        }
        Ok(())
    }

    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        let max = self.found.max_payload as usize;
        let (mut at, len) = (0, from.len());
        while at < len {
            let n = max.min(len - at);
            let part = from.slice(at, n);
            let request =
                Request { flags: 0, kind: cmd::WRITE, cookie: 0, offset: off + at as u64, len: n as u32 };
            self.call(|c| c.call(request, Some(&part), Want::Nothing))?;
            at += n;
        }
        Ok(())
    }

    fn zero(&self, off: u64, len: u64, flags: Flags) -> io::Result<()> {
        let mut bits = 0;
        if !self.found.has(flag::SEND_WRITE_ZEROES) {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        if !flags.contains(Flags::MAY_UNMAP) {
            bits |= cmd_flag::NO_HOLE;
        }
        if flags.contains(Flags::NO_FALLBACK) {
            if !self.found.has(flag::SEND_FAST_ZERO) {
                return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
            }
            bits |= cmd_flag::FAST_ZERO;
        }
        self.long(bits, cmd::WRITE_ZEROES, off, len)
    }

    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        if !self.found.has(flag::SEND_TRIM) {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        self.long(0, cmd::TRIM, off, len)
    }

    fn flush(&self) -> io::Result<()> {
        // A server without it has nothing to flush.
        if self.found.has(flag::SEND_FLUSH) { self.plain(0, cmd::FLUSH, 0, 0) } else { Ok(()) }
    }

    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        let data = Extent { kind: ExtentKind::Data, len, host_offset: Some(off) };
        if self.found.context.is_none() {
            return Ok(data);
        }
        let block = u64::from(self.found.min_block);
        let most = u64::from(u32::MAX) / block * block;
        let n = len.next_multiple_of(block).min(most) as u32;
        let mut extent = None;
        let request =
            Request { flags: cmd_flag::REQ_ONE, kind: cmd::BLOCK_STATUS, cookie: 0, offset: off, len: n };
        self.call(|c| c.call(request, None, Want::Extent(&mut extent)))?;
        // The client sees to it that there is one.
        let (n, state) = extent.ok_or_else(eio)?;
        let kind = match (state & STATE_HOLE != 0, state & STATE_ZERO != 0) {
            (_, true) => ExtentKind::Zero,
            // Undefined contents are contents; of another context, bit 0 is what is asked for.
            (true, false) if self.dirty.is_some() => ExtentKind::Unallocated,
            _ => ExtentKind::Data,
        };
        Ok(Extent { kind, len: u64::from(n).min(len), host_offset: Some(off) })
    }

    fn filename(&self) -> String {
        // What cannot be said in such a name is said in a json: name.
        if self.dirty.is_some() || !self.delay.is_zero() {
            return String::new();
        }
        Location { server: self.place.server.clone(), export: self.place.export.clone() }.to_string()
    }

    fn own_options(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let server = match &self.place.server.kind {
            SocketAddressType::Inet(a) => json!({"type": "inet", "host": a.host, "port": a.port}),
            SocketAddressType::Unix(a) => json!({"type": "unix", "path": a.path}),
            SocketAddressType::Fd(a) => json!({"type": "fd", "str": a.str}),
        };
        map.insert("server".into(), server);
        if !self.place.export.is_empty() {
            map.insert("export".into(), json!(self.place.export));
        }
        if !self.delay.is_zero() {
            map.insert("reconnect-delay".into(), json!(self.delay.as_secs()));
        }
        if let Some(dirty) = &self.dirty {
            map.insert("x-dirty-bitmap".into(), json!(dirty));
        }
        map
    }

    /// The connection stays: nothing of its own can change.
    fn reopen<'a>(&'a self, how: &Reopening) -> Option<Result<Ready<'a>>> {
        Some(match self.check_access(how.options.read_only) {
            Ok(()) => Ok(Box::new(|| {})),
            Err(e) => Err(e.into()),
        })
    }

    fn set_read_only(&self, read_only: bool) -> io::Result<()> {
        self.check_access(read_only)
    }

    fn give_up(&self) {
        if self.link.hurry.swap(true, Ordering::AcqRel) {
            return;
        }
        let link = self.link.lock();
        self.link.changed.notify_all();
        let Some(client) = link.client.clone() else { return };
        drop(link);
        // Slow servers have a chance to finish; dead ones do not keep us.
        client.set_patience(Some(LAST));
        let late = client.clone();
        let watch = move || {
            std::thread::sleep(LAST);
            late.hang_up();
        };
        if thread::spawn("nbd-hurry", thread::SMALL_STACK, watch).is_err() {
            client.hang_up();
        }
    }

    fn close(&self) -> io::Result<()> {
        drop(self.yankable.lock().unwrap_or_else(PoisonError::into_inner).take());
        // A node that goes has been flushed by whoever used it, but who knows.
        if let Some(client) = self.link.lock().client.clone() {
            client.set_patience(Some(LAST));
        }
        self.link.hurry.store(true, Ordering::Release);
        let alive = self.link.lock().client.is_some();
        let flushed = if alive && !self.found.has(flag::READ_ONLY) { self.flush() } else { Ok(()) };
        if let Some(client) = self.link.lock().client.take() {
            client.leave();
        }
        flushed
    }
}

#[cfg(test)]
#[path = "driver_test.rs"]
mod tests;
