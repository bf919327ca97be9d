//! The server's side of the fixed newstyle handshake: a client asks what there is, says what it
//! can, and chooses an export.
//!
//! Owns: nothing beyond the call. Never: touches a disk. Everything that a client sends is checked
//! before it is used; what it makes us keep is at most [`MAX_OPTION`] bytes. That it comes to an end
//! in time is the listener's affair. Threads: the connection's. Locks: the registry's, for moments.

use super::export::{Context, Export, Line, Member, Registry};
use super::proto::*;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::Arc;

/// An option with more data than that is refused, in bytes.
const MAX_OPTION: u32 = 64 << 10;

/// What a handshake came to.
pub(super) struct Session {
    pub member: Member,
    /// Replies to reads come in chunks; metadata can be asked for.
    pub structured: bool,
    /// The metadata contexts that the client chose, with their numbers.
    pub contexts: Vec<(u32, Context)>,
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Negotiates with the client. `None`: it has left in good order.
pub(super) fn negotiate(line: &Arc<Line>, registry: &Registry) -> io::Result<Option<Session>> {
    let mut hello = Vec::with_capacity(18);
    hello.extend(INIT_MAGIC.to_be_bytes());
    hello.extend(OPTS_MAGIC.to_be_bytes());
    hello.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    line.stream.send_all(&Iov::from_slice(&hello))?;
    let mut flags = [0; 4];
    line.stream.recv_all(&mut IovMut::from_slice(&mut flags))?;
    let flags = be32(&flags, 0);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(invalid("unknown client flags"));
    }
    let mut talk = Talk {
        line,
        registry,
        fixed: flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0,
        zeroes: flags & u32::from(FLAG_NO_ZEROES) == 0,
        structured: false,
        chosen: None,
    };
    loop {
        if let Some(end) = talk.option()? {
            return Ok(end);
        }
    }
}

/// `Some`: the handshake is over.
type Step = io::Result<Option<Option<Session>>>;

struct Talk<'a> {
    line: &'a Arc<Line>,
    registry: &'a Registry,
    fixed: bool,
    zeroes: bool,
    structured: bool,
    /// The export of the last OPT_SET_META_CONTEXT, and which of its contexts.
    chosen: Option<(Vec<u8>, Vec<usize>)>,
}

impl Talk<'_> {
    fn option(&mut self) -> Step {
        let mut head = [0; 16];
        self.line.stream.recv_all(&mut IovMut::from_slice(&mut head))?;
        if be64(&head, 0) != OPTS_MAGIC {
            return Err(invalid("bad magic number before an option"));
        }
        let (option, len) = (be32(&head, 8), be32(&head, 12));
        if len > MAX_PAYLOAD {
            return Err(invalid("an option with absurdly much data"));
        }
        if !self.fixed && option != opt::EXPORT_NAME {
            return Err(invalid("an option that only fixed newstyle has"));
        }
        if len > MAX_OPTION {
            self.skip(len)?;
            if option == opt::EXPORT_NAME {
                return Err(invalid("the export's name is too long"));
            }
            return self.refuse(option, rep::ERR_TOO_BIG, "too much data");
        }
        let mut data = vec![0; len as usize];
        self.line.stream.recv_all(&mut IovMut::from_slice(&mut data))?;
        match option {
            opt::EXPORT_NAME => self.export_name(&data),
            opt::ABORT => {
                // The client may have gone without waiting for it.
                let _ = self.reply(option, rep::ACK, &[]);
                Ok(Some(None))
            }
            opt::LIST if !data.is_empty() => self.refuse(option, rep::ERR_INVALID, "no data expected"),
            opt::LIST => self.list(),
            opt::INFO | opt::GO => self.go(option, &data),
            opt::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(option, rep::ERR_INVALID, "no data expected")
            }
            opt::STRUCTURED_REPLY if self.structured => {
                self.refuse(option, rep::ERR_INVALID, "structured replies are agreed on already")
            }
            opt::STRUCTURED_REPLY => {
                self.structured = true;
                self.ack(option)
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, &data),
            opt::STARTTLS if !data.is_empty() => self.refuse(option, rep::ERR_INVALID, "no data expected"),
            opt::STARTTLS => self.refuse(option, rep::ERR_POLICY, "this server has no TLS"),
            _ => self.refuse(option, rep::ERR_UNSUP, "unknown option"),
        }
    }

    fn skip(&self, len: u32) -> io::Result<()> {
        let (mut left, mut sink) = (len as usize, vec![0; 16 << 10]);
        while left > 0 {
            let n = left.min(sink.len());
            self.line.stream.recv_all(&mut IovMut::from_slice(&mut sink[..n]))?;
            left -= n;
        }
        Ok(())
    }

    fn reply(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut head = Vec::with_capacity(20 + data.len());
        head.extend(REP_MAGIC.to_be_bytes());
        head.extend(option.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend((data.len() as u32).to_be_bytes());
        head.extend(data);
        self.line.stream.send_all(&Iov::from_slice(&head))
    }

    fn ack(&self, option: u32) -> Step {
        self.reply(option, rep::ACK, &[]).map(|()| None)
    }

    fn refuse(&self, option: u32, kind: u32, text: &str) -> Step {
        self.reply(option, kind, text.as_bytes()).map(|()| None)
    }

    fn session(&self, member: Member) -> Option<Session> {
        let of_this = |(name, _): &&(Vec<u8>, Vec<usize>)| *name == member.export.name.as_bytes();
        let chosen = self.chosen.as_ref().filter(of_this).map_or(&[][..], |(_, list)| list);
        // The export may have been replaced by another of the same name since.
        let contexts = &member.export.contexts;
        let contexts = chosen.iter().filter_map(|&n| Some((n as u32, contexts.get(n)?.clone()))).collect();
        Some(Session { structured: self.structured, contexts, member })
    }

    fn export_name(&self, name: &[u8]) -> Step {
        let member = self.registry.named(name).and_then(|e| e.join(self.line));
        let Some(member) = member else { return Err(invalid("no such export")) };
        let mut out = Vec::with_capacity(134);
        out.extend(member.export.size.to_be_bytes());
        out.extend(member.export.flags(self.structured).to_be_bytes());
        if self.zeroes {
            out.extend([0; 124]);
        }
        self.line.stream.send_all(&Iov::from_slice(&out))?;
        Ok(Some(self.session(member)))
    }

    fn list(&self) -> Step {
        for export in self.registry.all().iter().filter(|e| !e.is_closing()) {
            let mut out = (export.name.len() as u32).to_be_bytes().to_vec();
            out.extend(export.name.as_bytes());
            out.extend(export.description.as_deref().unwrap_or("").as_bytes());
            self.reply(opt::LIST, rep::SERVER, &out)?;
        }
        self.ack(opt::LIST)
    }

    fn unknown(&self, option: u32, name: &[u8]) -> Step {
        let text = format!("export '{}' not present", String::from_utf8_lossy(name));
        self.refuse(option, rep::ERR_UNKNOWN, &text)
    }

    fn go(&self, option: u32, data: &[u8]) -> Step {
        let parse = || {
            let mut at = Cursor(data);
            let name = at.string()?;
            let n = at.u16()?;
            let wanted: Option<Vec<u16>> = (0..n).map(|_| at.u16()).collect();
            at.0.is_empty().then_some((name, wanted?))
        };
        let Some((name, wanted)) = parse() else {
            return self.refuse(option, rep::ERR_INVALID, "malformed request");
        };
        if name.len() > MAX_STRING {
            return self.refuse(option, rep::ERR_INVALID, "the export's name is too long");
        }
        let Some(export) = self.registry.named(name) else { return self.unknown(option, name) };
        let tell = |kind: u16, data: &[u8]| {
            let mut out = kind.to_be_bytes().to_vec();
            out.extend(data);
            self.reply(option, rep::INFO, &out)
        };
        if wanted.contains(&info::NAME) {
            tell(info::NAME, export.name.as_bytes())?;
        }
        if let Some(text) = export.description.as_ref().filter(|_| wanted.contains(&info::DESCRIPTION)) {
            tell(info::DESCRIPTION, text.as_bytes())?;
        }
        // A client that did not ask will not keep to a minimum; it need not.
        let mut sizes = export.block_sizes();
        if !wanted.contains(&info::BLOCK_SIZE) {
            sizes[0] = 1;
        }
        tell(info::BLOCK_SIZE, &sizes.map(u32::to_be_bytes).concat())?;
        let mut out = export.size.to_be_bytes().to_vec();
        out.extend(export.flags(self.structured).to_be_bytes());
        tell(info::EXPORT, &out)?;
        if option == opt::INFO {
            return self.ack(option);
        }
        let Some(member) = export.join(self.line) else { return self.unknown(option, name) };
        self.reply(option, rep::ACK, &[])?;
        Ok(Some(self.session(member)))
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> Step {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.chosen = None;
        }
        if !self.structured {
            let text = "structured replies must be agreed on before";
            return self.refuse(option, rep::ERR_INVALID, text);
        }
        let parse = || {
            let mut at = Cursor(data);
            let name = at.string()?;
            let n = at.u32()?;
            // Each takes four bytes at least, so the data's length bounds how many there are.
            let queries: Option<Vec<&[u8]>> = (0..n).map(|_| at.string()).collect();
            at.0.is_empty().then_some((name, queries?))
        };
        let Some((name, queries)) = parse() else {
            return self.refuse(option, rep::ERR_INVALID, "malformed request");
        };
        if name.len() > MAX_STRING || queries.iter().any(|q| q.len() > MAX_STRING) {
            return self.refuse(option, rep::ERR_INVALID, "a name is too long");
        }
        let Some(export) = self.registry.named(name) else { return self.unknown(option, name) };
        let picked = pick(&export, &queries, set);
        for &n in &picked {
            let id = if set { n as u32 } else { 0 };
            let mut out = id.to_be_bytes().to_vec();
            out.extend(export.contexts[n].name().as_bytes());
            self.reply(option, rep::META_CONTEXT, &out)?;
        }
        if set {
            self.chosen = Some((name.to_vec(), picked));
        }
        self.ack(option)
    }
}

/// Which contexts of the export the queries mean. To list, a query may end after a namespace (or
/// `qemu:dirty-bitmap:`), and none at all means all; to set, each names one.
fn pick(export: &Export, queries: &[&[u8]], set: bool) -> Vec<usize> {
    let means = |query: &[u8], name: &str| {
        let wildcard = !set && query.ends_with(b":") && name.as_bytes().starts_with(query);
        query == name.as_bytes() || wildcard
    };
    let names = export.contexts.iter().map(Context::name).enumerate();
    let all = !set && queries.is_empty();
    names.filter(|(_, name)| all || queries.iter().any(|q| means(q, name))).map(|(n, _)| n).collect()
}

#[cfg(test)]
#[path = "handshake_test.rs"]
mod tests;
