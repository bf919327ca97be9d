//! One client of a monitor: bytes in, messages out of them; messages in, bytes out of them.
//!
//! Owns: the connection, both buffers, and the file descriptors that came with bytes which are not
//! read yet. Never blocks. Never: knows what a message means. Threads: control. Locks: none.

use super::fds::Conn;
use super::schema::Value;
use super::wire::{self, Message, Parser};
use crate::sys::fdio::Output;
use crate::sys::poll::{PollSet, Token};
use crate::sys::unix;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Bytes of one read.
const READ: usize = 32 << 10;
/// While more than this waits to be sent, nothing is read from the client and no request of it is
/// run.
pub const HIGH_WATER: usize = 1 << 20;
/// A client that lets more than this pile up (by events, since it does not read) is cut off.
const TOO_MUCH: usize = 16 << 20;
/// Memory that a buffer keeps when it is empty.
const KEEP: usize = 8 << 10;

/// What the bytes travel on.
pub enum Stream {
    /// A Unix socket: descriptors come with the bytes.
    Unix(OwnedFd),
    /// Another socket.
    Socket(OwnedFd),
    /// Two files, as standard input and output.
    Files(File, Output),
}

/// See the module's head.
pub struct Client {
    stream: Stream,
    parser: Parser,
    /// Bytes that were received, and how many of them are parsed.
    input: Vec<u8>,
    parsed: usize,
    /// Descriptors, and with which byte of `input` they came.
    fds: Option<(usize, Vec<OwnedFd>)>,
    /// Bytes to send, and how many of them are sent.
    output: Vec<u8>,
    sent: usize,
    pretty: bool,
    /// No more bytes come.
    ended: bool,
    /// It takes no more bytes; what it has sent is still run, as a client expects that sends its
    /// requests and goes.
    deaf: bool,
    /// It is of no more use.
    gone: bool,
    tokens: [Option<Token>; 2],
}

impl Client {
    /// A client that has just come.
    pub fn new(stream: Stream, pretty: bool) -> Client {
        Client {
            stream,
            parser: Parser::new(),
            input: Vec::new(),
            parsed: 0,
            fds: None,
            output: Vec::new(),
            sent: 0,
            pretty,
            ended: false,
            deaf: false,
            gone: false,
            tokens: [None; 2],
        }
    }

    /// Bytes that wait to be sent.
    pub fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    fn wants_input(&self) -> bool {
        !self.ended && self.parsed == self.input.len() && self.unsent() <= HIGH_WATER
    }

    /// True when nothing more can come of it.
    pub fn is_over(&self) -> bool {
        self.gone || (self.ended && self.parsed == self.input.len() && self.unsent() == 0)
    }

    /// True when it will be of no more use, whatever it has sent.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// True when there is something that it waits for.
    pub fn waits(&self) -> bool {
        !self.gone && (self.wants_input() || self.unsent() > 0)
    }

    /// Says what it waits for.
    pub fn prepare(&mut self, set: &mut PollSet) {
        let input = if self.wants_input() { libc::POLLIN } else { 0 };
        let output = if self.unsent() > 0 { libc::POLLOUT } else { 0 };
        self.tokens = match &self.stream {
            Stream::Unix(fd) | Stream::Socket(fd) => [Some(set.add(fd.as_raw_fd(), input | output)), None],
            // A file at its end would be ready for ever: polled only when it is wanted.
            Stream::Files(from, to) => [
                (input != 0).then(|| set.add(from.as_raw_fd(), input)),
                (output != 0).then(|| set.add(to.fd().as_raw_fd(), output)),
            ],
        };
    }

    /// Reads and writes what poll(2) says is possible. `scratch` is where the bytes go first.
    pub fn exchange(&mut self, set: &PollSet, scratch: &mut Vec<u8>) {
        let ready = |token: Option<Token>| token.map_or(0, |t| set.ready(t));
        let [input, output] = self.tokens.map(ready);
        // Not known to the next set, in case the next turn comes without prepare().
        self.tokens = [None; 2];
        let trouble = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;
        if (input | output) & libc::POLLOUT != 0 || output & trouble != 0 {
            self.flush();
        }
        if input & (libc::POLLIN | trouble) == 0 {
            return;
        }
        if self.wants_input() {
            self.receive(scratch);
        } else if input & trouble != 0 {
            // It has closed both directions: nobody will read what is not sent yet.
            self.give_up_output();
        }
    }

    fn receive(&mut self, scratch: &mut Vec<u8>) {
        scratch.resize(READ, 0);
        let received = match &mut self.stream {
            Stream::Unix(fd) => unix::recv(fd.as_fd(), scratch),
            Stream::Socket(fd) => {
                unix::plain(fd.as_fd(), scratch).map(|len| unix::Received { len, fds: None })
            }
            Stream::Files(from, _) => from.read(scratch).map(|len| unix::Received { len, fds: None }),
        };
        match received {
            Ok(unix::Received { len: 0, .. }) => self.ended = true,
            Ok(received) => {
                self.input.clear();
                self.input.shrink_to(KEEP);
                self.input.extend_from_slice(&scratch[..received.len]);
                self.parsed = 0;
                self.fds = received.fds;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                log::debug!("QMP: a client is gone: {e}");
                self.gone = true;
            }
        }
    }

    /// The next message, if one is complete. The descriptors that came up to its last byte go to
    /// `conn` first.
    pub fn next_message(&mut self, conn: &mut Conn) -> Option<Message> {
        if self.gone || self.unsent() > HIGH_WATER || self.parsed == self.input.len() {
            return None;
        }
        let (used, message) = self.parser.feed(&self.input[self.parsed..]);
        self.parsed += used;
        if let Some((at, fds)) = self.fds.take() {
            if at < self.parsed {
                for fd in &fds {
                    // As QEMU does: whoever uses it does not expect EAGAIN. What cannot be set
                    // (O_PATH) is left as it is.
                    let _ = unix::set_nonblocking(fd.as_fd(), false);
                }
                conn.receive(fds);
            } else {
                self.fds = Some((at, fds));
            }
        }
        message
    }

    /// Queues a message for sending.
    pub fn push(&mut self, message: &Value) {
        if self.gone || self.deaf {
            return;
        }
        if self.unsent() > TOO_MUCH {
            log::warn!("QMP: a client that does not read is cut off");
            self.gone = true;
            return;
        }
        wire::write_line(message, self.pretty, &mut self.output);
    }

    fn give_up_output(&mut self) {
        self.deaf = true;
        self.output = Vec::new();
        self.sent = 0;
    }

    /// Sends what can be sent without waiting.
    pub fn flush(&mut self) {
        while self.unsent() > 0 && !self.gone {
            let data = &self.output[self.sent..];
            let result = match &mut self.stream {
                Stream::Unix(fd) | Stream::Socket(fd) => unix::send(fd.as_fd(), data),
                Stream::Files(_, to) => to.write(data),
            };
            match result {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::debug!("QMP: a client does not listen any more: {e}");
                    self.give_up_output();
                }
            }
        }
        if self.unsent() == 0 {
            self.output.clear();
            self.output.shrink_to(KEEP);
            self.sent = 0;
        } else if self.sent > HIGH_WATER {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }
}
