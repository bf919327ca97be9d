//! The client's side of the handshake: which export, and what the server can do.
//!
//! Owns: nothing beyond the call. Never: waits longer than until its deadline, however slowly a
//! server talks; keeps more than [`MAX_REPLY`] bytes of what it says. Threads: whoever connects.
//! Locks: none.

use super::proto::*;
use crate::bail;
use crate::error::{Error, Result, strerror};
use crate::sys::iov::Iov;
use crate::sys::stream::Stream;
use std::io;
use std::time::Instant;

/// The longest reply to an option, in bytes.
const MAX_REPLY: u32 = 64 << 10;

/// What the server has, and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Length of the export in bytes.
    pub size: u64,
    /// `flag::*`
    pub flags: u16,
    /// Replies to reads come in chunks.
    pub structured: bool,
    /// The number of the metadata context, if the server has it.
    pub context: Option<u32>,
    /// Alignment of requests in bytes, a power of two.
    pub min_block: u32,
    /// What is best, in bytes.
    pub preferred: u32,
    /// The longest payload, in bytes.
    pub max_payload: u32,
}

impl Found {
    /// True when all the transmission flags are there.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

struct Talk<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Reply {
    /// What the server says about an error.
    fn text(&self) -> String {
        let why = match self.kind {
            rep::ERR_UNSUP => "the server does not know the option",
            rep::ERR_POLICY => "the server's policy forbids it",
            rep::ERR_INVALID => "the server finds it invalid",
            rep::ERR_PLATFORM => "the server's platform cannot do it",
            rep::ERR_TLS_REQD => "the server requires TLS, which this client does not have",
            rep::ERR_UNKNOWN => "Requested export not available",
            rep::ERR_SHUTDOWN => "the server is shutting down",
            rep::ERR_BLOCK_SIZE_REQD => "the server requires its block size to be kept",
            _ => "the server refuses",
        };
        match self.data.is_empty() {
            true => why.to_string(),
            false => {
                let plain = |c: char| if c.is_control() { ' ' } else { c };
                let says: String = String::from_utf8_lossy(&self.data).chars().map(plain).collect();
                format!("{why} (it says: {says})")
            }
        }
    }
}

fn plain(e: io::Error) -> Error {
    let why = match e.kind() {
        io::ErrorKind::UnexpectedEof => "the server has closed the connection".into(),
        io::ErrorKind::TimedOut => "the server does not answer in time".into(),
        _ => strerror(&e),
    };
    Error::new(format!("Failed to negotiate with the NBD server: {why}"))
}

impl Talk<'_> {
    fn recv<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.recv_by(&mut bytes, self.deadline).map_err(plain)?;
        Ok(bytes)
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let sent =
            self.stream.set_patience(Some(left)).and_then(|()| self.stream.send_all(&Iov::from_slice(bytes)));
        sent.map_err(plain)
    }

    fn option(&self, option: u32, data: &[u8]) -> Result<()> {
        let mut out = OPTS_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.send(&out)
    }

    fn reply(&self, option: u32) -> Result<Reply> {
        let head = self.recv::<20>()?;
        let (kind, len) = (be32(&head, 12), be32(&head, 16));
        if be64(&head, 0) != REP_MAGIC || be32(&head, 8) != option {
            bail!("The NBD server's reply to option {option} makes no sense");
        }
        if len > MAX_REPLY {
            bail!("The NBD server's reply to option {option} is too long ({len} bytes)");
        }
        let mut data = vec![0; len as usize];
        self.stream.recv_by(&mut data, self.deadline).map_err(plain)?;
        Ok(Reply { kind, data })
    }
}

/// Negotiates for the export `name`; `context` is the metadata to ask about.
pub(super) fn hello(stream: &Stream, name: &str, context: &str, deadline: Instant) -> Result<Found> {
    let talk = Talk { stream, deadline };
    let found = talk.hello(name, context)?;
    stream.set_patience(None)?;
    Ok(found)
}

impl Talk<'_> {
    fn hello(&self, name: &str, context: &str) -> Result<Found> {
        if be64(&self.recv::<8>()?, 0) != INIT_MAGIC || be64(&self.recv::<8>()?, 0) != OPTS_MAGIC {
            bail!("The server does not speak NBD (newstyle)");
        }
        let flags = be16(&self.recv::<2>()?, 0);
        let ours = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.send(&u32::from(ours).to_be_bytes())?;
        let mut found = Found {
            size: 0,
            flags: 0,
            structured: false,
            context: None,
            min_block: 1,
            preferred: 0,
            max_payload: MAX_PAYLOAD,
        };
        let fixed = flags & FLAG_FIXED_NEWSTYLE != 0;
        if fixed {
            self.option(opt::STRUCTURED_REPLY, &[])?;
            found.structured = self.reply(opt::STRUCTURED_REPLY)?.kind == rep::ACK;
        }
        if found.structured {
            found.context = self.context(name, context)?;
        }
        if !fixed || !self.go(name, &mut found)? {
            self.option(opt::EXPORT_NAME, name.as_bytes())?;
            let head = self.recv::<10>()?;
            (found.size, found.flags) = (be64(&head, 0), be16(&head, 8));
            if flags & FLAG_NO_ZEROES == 0 {
                self.recv::<124>()?;
            }
        }
        if !found.has(flag::HAS_FLAGS) {
            found.flags = flag::HAS_FLAGS | (found.flags & flag::READ_ONLY);
        }
        let (size, block) = (found.size, u64::from(found.min_block));
        if size > i64::MAX as u64 - (1 << 32) {
            bail!("The NBD export is absurdly large ({size} bytes)");
        }
        if size % block != 0 {
            bail!("export size {size} is not multiple of minimum block size {block}");
        }
        Ok(found)
    }

    /// The number of the metadata context; `None`: the server does not have it.
    fn context(&self, name: &str, context: &str) -> Result<Option<u32>> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend(1u32.to_be_bytes());
        data.extend((context.len() as u32).to_be_bytes());
        data.extend(context.as_bytes());
        self.option(opt::SET_META_CONTEXT, &data)?;
        let mut id = None;
        loop {
            let reply = self.reply(opt::SET_META_CONTEXT)?;
            match reply.kind {
                rep::ACK => return Ok(id),
                rep::META_CONTEXT if reply.data.get(4..) == Some(context.as_bytes()) => {
                    id = Some(be32(&reply.data, 0));
                }
                rep::META_CONTEXT => bail!("The NBD server selected a context that it was not asked for"),
                kind if kind & rep::ERR != 0 => return Ok(None),
                kind => bail!("The NBD server's reply (type {kind}) makes no sense"),
            }
        }
    }

    /// False: the server does not know the option.
    fn go(&self, name: &str, found: &mut Found) -> Result<bool> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.option(opt::GO, &data)?;
        let mut export = false;
        loop {
            let reply = self.reply(opt::GO)?;
            match reply.kind {
                rep::ACK if export => return Ok(true),
                rep::ACK => bail!("The NBD server says nothing about the export"),
                rep::ERR_UNSUP => return Ok(false),
                rep::INFO => export |= self.info(&reply.data, found)?,
                kind if kind & rep::ERR != 0 => bail!("NBD export '{name}': {}", reply.text()),
                kind => bail!("The NBD server's reply (type {kind}) makes no sense"),
            }
        }
    }

    /// True when it was about the export's size.
    fn info(&self, data: &[u8], found: &mut Found) -> Result<bool> {
        let mut at = Cursor(data);
        let malformed = || Error::new("The NBD server's information is malformed");
        match at.u16().ok_or_else(malformed)? {
            info::EXPORT => {
                found.size = at.u64().ok_or_else(malformed)?;
                found.flags = at.u16().ok_or_else(malformed)?;
                Ok(true)
            }
            info::BLOCK_SIZE => {
                found.min_block = at.u32().ok_or_else(malformed)?;
                found.preferred = at.u32().ok_or_else(malformed)?;
                let max = at.u32().ok_or_else(malformed)?;
                if !found.min_block.is_power_of_two() || found.min_block > 65536 {
                    bail!("server minimum block size {} is not a power of 2 up to 64K", found.min_block);
                }
                if max < found.min_block {
                    bail!("server maximum block size {max} is smaller than its minimum");
                }
                // Whole blocks, and no more than everybody takes.
                found.max_payload = max.min(MAX_PAYLOAD) / found.min_block * found.min_block;
                Ok(false)
            }
            _ => Ok(false),
        }
    }
}

#[cfg(test)]
#[path = "hello_test.rs"]
mod tests;
