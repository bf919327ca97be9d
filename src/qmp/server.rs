//! The monitors: who may connect where, whose turn it is, and what everybody is told.
//!
//! Owns: the listening sockets and their files, the clients, the rate limits of events. A listening
//! socket serves one client at a time; the next waits in the kernel's queue. Requests of different
//! monitors are taken in turn, one at a time; the events that one causes go out before its reply.
//! Never blocks. Never: what a command does. Threads: control. Locks: none.

use super::client::{Client, Stream};
use super::dispatch;
use super::event::{self, Limiter};
use super::fds::Conn;
use super::oob::Line;
use super::schema::{Cx, Value};
use super::wire::Message;
use crate::control::event_loop::Source;
use crate::control::vm::Vm;
use crate::sys::fdio::Output;
use crate::sys::inbox::Inbox;
use crate::sys::listen::{self, SocketFile};
use crate::sys::poll::{PollSet, Token};
use crate::sys::unix;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests of one turn; then the rest of the VM has its turn.
const TURN: usize = 256;

/// After a failed accept (no descriptors left), nobody is let in for so long: the client still waits
/// in the kernel's queue, and asking at once would get the same answer for ever.
const PATIENCE: Duration = Duration::from_millis(500);

/// All monitors.
#[derive(Default)]
pub struct Server {
    monitors: Vec<Monitor>,
    limiter: Limiter,
    /// Where bytes are read to; empty while there is no client.
    scratch: Vec<u8>,
    /// The last turn ended before the requests did.
    more: bool,
    /// Clients with threads of their own post here. Made for the first.
    ready: Option<Arc<Inbox<()>>>,
}

struct Monitor {
    conn: Conn,
    listener: Option<Listener>,
    client: Option<Party>,
    pretty: bool,
    token: Option<Token>,
}

/// A client, and who reads it.
enum Party {
    /// The server.
    Plain(Box<Client>),
    /// A thread of its own: it may speak out of band.
    Oob(Line),
}

impl Party {
    fn next_message(&mut self, conn: &mut Conn) -> Option<Message> {
        match self {
            Party::Plain(client) => client.next_message(conn),
            Party::Oob(line) => line.next_message(conn),
        }
    }

    fn push(&mut self, message: &Value) {
        match self {
            Party::Plain(client) => client.push(message),
            Party::Oob(line) => line.push(message),
        }
    }

    fn flush(&mut self) {
        match self {
            Party::Plain(client) => client.flush(),
            Party::Oob(line) => line.flush(),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Party::Plain(client) => client.is_over(),
            Party::Oob(line) => line.is_over(),
        }
    }

    /// Gives the client a thread of its own. Without one it is as good, as long as nothing hangs.
    fn part(self, vm: &Vm, ready: &mut Option<Arc<Inbox<()>>>) -> Party {
        let Party::Plain(client) = self else { return self };
        let inbox = match ready.clone().map_or_else(|| Inbox::new().map(Arc::new), Ok) {
            Ok(inbox) => inbox,
            Err(e) => {
                log::warn!("QMP: no out-of-band execution: {e}");
                return Party::Plain(client);
            }
        };
        *ready = Some(inbox.clone());
        match Line::start(*client, vm.graph.yanks().clone(), inbox) {
            Ok(line) => Party::Oob(line),
            Err(back) => {
                log::warn!("QMP: no thread for out-of-band execution: {}", back.1);
                Party::Plain(Box::new(back.0))
            }
        }
    }
}

struct Listener {
    fd: OwnedFd,
    /// Not before then.
    not_before: Option<Instant>,
    /// The file of a socket that we made.
    _file: Option<SocketFile>,
}

impl Server {
    /// No monitors.
    pub fn new() -> Server {
        Server::default()
    }

    /// Listens on a Unix socket at `path`, which must not exist; the file of a socket on which
    /// nobody listens any more is replaced.
    pub fn listen(&mut self, path: &Path, pretty: bool) -> io::Result<()> {
        let (listener, file) = listen::on_path(path)?;
        self.add_listener(listener, Some(file), pretty);
        Ok(())
    }

    /// Listens on `address` (`127.0.0.1:4444`), which must be a loopback address: whoever can
    /// connect rules the VM.
    pub fn listen_tcp(&mut self, address: &str, pretty: bool) -> io::Result<()> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let address: SocketAddr = address
            .parse()
            .map_err(|_| invalid("not an address and port, such as 127.0.0.1:4444".to_string()))?;
        if !address.ip().is_loopback() {
            return Err(invalid(format!("{} is not a loopback address (127.0.0.1, ::1)", address.ip())));
        }
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        self.add_listener(listener.into(), None, pretty);
        Ok(())
    }

    /// Uses an inherited descriptor: a listening socket, a connected one, or another file that can
    /// be read and written.
    pub fn adopt(&mut self, fd: OwnedFd, pretty: bool) -> io::Result<()> {
        let stream = match unix::kind(fd.as_fd()) {
            unix::Kind::Listener => {
                unix::set_nonblocking(fd.as_fd(), true)?;
                self.add_listener(fd, None, pretty);
                return Ok(());
            }
            unix::Kind::Unix => Stream::Unix(fd),
            unix::Kind::Socket => Stream::Socket(fd),
            unix::Kind::Other => Stream::Files(fd.try_clone()?.into(), Output::new(fd.into())?),
        };
        self.add_client(stream, pretty);
        Ok(())
    }

    /// Uses standard input and output.
    pub fn stdio(&mut self, pretty: bool) -> io::Result<()> {
        let input: File = io::stdin().as_fd().try_clone_to_owned()?.into();
        let output: File = io::stdout().as_fd().try_clone_to_owned()?.into();
        self.add_client(Stream::Files(input, Output::new(output)?), pretty);
        Ok(())
    }

    fn add_listener(&mut self, fd: OwnedFd, file: Option<SocketFile>, pretty: bool) {
        let listener = Some(Listener { fd, not_before: None, _file: file });
        self.monitors.push(Monitor { conn: Conn::new(), listener, client: None, pretty, token: None });
    }

    fn add_client(&mut self, stream: Stream, pretty: bool) {
        let mut monitor = Monitor { conn: Conn::new(), listener: None, client: None, pretty, token: None };
        monitor.greet(stream);
        self.monitors.push(monitor);
    }

    /// Sends the events that have happened, and those whose time has come, to all clients that
    /// have negotiated.
    fn send_events(&mut self, vm: &mut Vm) {
        vm.tell_jobs();
        if vm.outbox.is_empty() && !self.limiter.waits() {
            return;
        }
        let now = Instant::now();
        let mut due = self.limiter.due(now);
        due.extend(vm.outbox.drain(..).filter_map(|e| self.limiter.admit(e, now)));
        for e in &due {
            let message = event::message(e);
            let listening = self.monitors.iter_mut().filter(|m| m.conn.negotiated);
            listening.filter_map(|m| m.client.as_mut()).for_each(|c| c.push(&message));
        }
    }

    /// Answers requests, one of each monitor in turn.
    fn serve(&mut self, vm: &mut Vm) {
        self.more = false;
        let mut left = TURN;
        loop {
            let mut any = false;
            for n in 0..self.monitors.len() {
                // After `quit` nothing is run any more.
                if vm.exit().is_some() {
                    return;
                }
                let Monitor { conn, client: Some(client), .. } = &mut self.monitors[n] else { continue };
                let Some(message) = client.next_message(conn) else { continue };
                let reply = dispatch::answer(&mut Cx { vm, conn }, message);
                self.send_events(vm);
                let Monitor { conn, client, .. } = &mut self.monitors[n];
                if let Some(mut party) = client.take() {
                    party.push(&reply);
                    let enabled = conn.oob && matches!(party, Party::Plain(_));
                    *client = Some(if enabled { party.part(vm, &mut self.ready) } else { party });
                }
                any = true;
                left = left.saturating_sub(1);
            }
            if !any {
                return;
            }
            if left == 0 {
                self.more = true;
                return;
            }
        }
    }

    /// Sends what can be sent, and forgets the clients that are gone.
    fn flush(&mut self) {
        for m in &mut self.monitors {
            let Some(client) = &mut m.client else { continue };
            client.flush();
            if client.is_over() {
                m.client = None;
                m.conn.hang_up();
            }
        }
        if self.monitors.iter().all(|m| m.client.is_none()) {
            self.scratch = Vec::new();
        }
    }
}

impl Source for Server {
    fn prepare(&mut self, _: &mut Vm, set: &mut PollSet) {
        for m in &mut self.monitors {
            m.token = None;
            match (&mut m.client, &mut m.listener) {
                (Some(Party::Plain(client)), _) => client.prepare(set),
                (Some(Party::Oob(_)), _) => {}
                (None, Some(listener)) => m.token = listener.prepare(set),
                (None, None) => {}
            }
        }
        if let Some(ready) = &self.ready {
            set.add(ready.as_raw_fd(), libc::POLLIN);
        }
        if let Some(when) = self.limiter.deadline() {
            set.until(when);
        }
        if self.more {
            set.until(Instant::now());
        }
    }

    fn dispatch(&mut self, vm: &mut Vm, set: &PollSet) {
        // Events first: what has happened before a request is told before its reply.
        self.send_events(vm);
        if let Some(ready) = &self.ready {
            ready.take();
        }
        for m in &mut self.monitors {
            match &mut m.client {
                Some(Party::Plain(client)) => client.exchange(set, &mut self.scratch),
                Some(Party::Oob(_)) => {}
                None => m.accept(set),
            }
        }
        self.serve(vm);
        self.flush();
    }

    fn finish(&mut self, vm: &mut Vm) {
        self.send_events(vm);
        self.flush();
    }
}

impl Listener {
    fn prepare(&mut self, set: &mut PollSet) -> Option<Token> {
        match self.not_before {
            Some(when) if when > Instant::now() => {
                set.until(when);
                None
            }
            _ => Some(set.add(self.fd.as_raw_fd(), libc::POLLIN)),
        }
    }
}

impl Monitor {
    fn greet(&mut self, stream: Stream) {
        let mut client = Client::new(stream, self.pretty);
        client.push(&dispatch::greeting());
        self.client = Some(Party::Plain(Box::new(client)));
    }

    fn accept(&mut self, set: &PollSet) {
        let Some(listener) = &mut self.listener else { return };
        if self.token.take().is_none_or(|token| set.ready(token) == 0) {
            return;
        }
        match unix::accept(listener.fd.as_fd()) {
            Ok(fd) if unix::kind(fd.as_fd()) == unix::Kind::Unix => self.greet(Stream::Unix(fd)),
            Ok(fd) => {
                let tcp = TcpStream::from(fd);
                // Without it replies may wait for the client's acknowledgements; it works as well.
                let _ = tcp.set_nodelay(true);
                self.greet(Stream::Socket(tcp.into()));
            }
            // WouldBlock: it is gone again already.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                log::warn!("QMP: cannot accept a client: {e}");
                listener.not_before = Some(Instant::now() + PATIENCE);
            }
        }
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;

#[cfg(test)]
#[path = "oob_test.rs"]
mod oob_tests;
