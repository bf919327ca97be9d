//! Names of exports, as QEMU takes them: `nbd://HOST:PORT/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`,
//! and the older `nbd:HOST:PORT:exportname=EXPORT`, `nbd:unix:PATH:exportname=EXPORT`.
//!
//! Owns: their form, both ways. Never: connects. Threads: any. Locks: none.

use crate::bail;
use crate::error::Result;
use crate::sys::address::{InetSocketAddress, SocketAddress, SocketAddressType, UnixSocketAddress};
use std::fmt;

/// The port of NBD.
const PORT: &str = "10809";

/// An export on a server.
#[derive(Clone, Debug, PartialEq)]
pub struct Location {
    /// Where the server is.
    pub server: SocketAddress,
    /// The export's name.
    pub export: String,
}

/// The protocols whose names [`Location::parse`] takes.
pub const PROTOCOLS: &[&str] = &["nbd", "nbd+tcp", "nbd+unix"];

fn inet(host: &str, port: &str) -> SocketAddress {
    SocketAddress { kind: SocketAddressType::Inet(InetSocketAddress::new(host, port)) }
}

fn unix(path: &str) -> SocketAddress {
    SocketAddress { kind: SocketAddressType::Unix(UnixSocketAddress { path: path.into() }) }
}

impl Location {
    /// From its name.
    pub fn parse(name: &str) -> Result<Location> {
        let Some((scheme, rest)) = name.split_once("://") else { return old(name) };
        let (authority, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let export = decode(path.strip_prefix('/').unwrap_or(path))?;
        let server = match scheme {
            "nbd+unix" => {
                // As in QEMU: nothing but the socket.
                let Some(socket) = query.strip_prefix("socket=").filter(|s| !s.contains('&')) else {
                    bail!("'{name}': nbd+unix:///EXPORT?socket=PATH is expected");
                };
                if !authority.is_empty() {
                    bail!("'{name}': a Unix socket has no host");
                }
                unix(&decode(socket)?)
            }
            "nbd" | "nbd+tcp" => {
                if authority.is_empty() || !query.is_empty() {
                    bail!("'{name}': nbd://HOST:PORT/EXPORT is expected");
                }
                // An IPv6 address stands in brackets.
                let port_at = authority.rfind(':').filter(|at| authority.rfind(']').is_none_or(|b| b < *at));
                let (host, port) =
                    port_at.map_or((authority, PORT), |at| (&authority[..at], &authority[at + 1..]));
                inet(&decode(host.trim_matches(['[', ']']))?, port)
            }
            _ => bail!("Unknown protocol '{scheme}'"),
        };
        Ok(Location { server, export })
    }
}

/// `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH[:exportname=NAME]`
fn old(name: &str) -> Result<Location> {
    let rest = name.strip_prefix("nbd:").unwrap_or(name);
    let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let server = match address.strip_prefix("unix:") {
        Some("") => bail!("'{name}': the socket's path is missing"),
        Some(path) => unix(path),
        None => match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && !port.is_empty() => {
                inet(host.trim_matches(['[', ']']), port)
            }
            _ => bail!("'{name}': nbd:HOST:PORT or nbd:unix:PATH is expected"),
        },
    };
    Ok(Location { server, export: export.into() })
}

/// Takes %XX apart.
fn decode(s: &str) -> Result<String> {
    let mut out = Vec::new();
    let mut bytes = s.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| (b as char).to_digit(16));
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => bail!("'{s}': two hexadecimal digits are expected after %"),
        }
    }
    match String::from_utf8(out) {
        Ok(s) if !s.contains('\0') => Ok(s),
        _ => bail!("'{s}' is not the name of anything"),
    }
}

fn encode(s: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for b in s.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' | b'~' => {
                write!(f, "{}", b as char)?
            }
            b => write!(f, "%{b:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server.kind {
            // No name leads there.
            SocketAddressType::Fd(_) => Ok(()),
            SocketAddressType::Unix(a) => {
                f.write_str("nbd+unix://")?;
                if !self.export.is_empty() {
                    f.write_str("/")?;
                    encode(&self.export, f)?;
                }
                f.write_str("?socket=")?;
                encode(&a.path, f)
            }
            SocketAddressType::Inet(a) => {
                let bracket = a.host.contains(':');
                let (open, close) = if bracket { ("[", "]") } else { ("", "") };
                write!(f, "nbd://{open}{}{close}:{}", a.host, a.port)?;
                if !self.export.is_empty() {
                    f.write_str("/")?;
                    encode(&self.export, f)?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_and_made() {
        for (name, server, export, back) in [
            ("nbd://h", inet("h", "10809"), "", "nbd://h:10809"),
            ("nbd://h:1/a%20b/c", inet("h", "1"), "a b/c", "nbd://h:1/a%20b/c"),
            ("nbd+tcp://[::1]:7/x", inet("::1", "7"), "x", "nbd://[::1]:7/x"),
            ("nbd://[::1]", inet("::1", "10809"), "", "nbd://[::1]:10809"),
            ("nbd+unix:///e?socket=/a%3fb", unix("/a?b"), "e", "nbd+unix:///e?socket=/a%3Fb"),
            ("nbd+unix://?socket=s", unix("s"), "", "nbd+unix://?socket=s"),
            ("nbd:h:5", inet("h", "5"), "", "nbd://h:5"),
            ("nbd:h:5:exportname=x:y", inet("h", "5"), "x:y", "nbd://h:5/x%3Ay"),
            ("nbd:unix:/tmp/s:exportname=e", unix("/tmp/s"), "e", "nbd+unix:///e?socket=/tmp/s"),
        ] {
            let want = Location { server, export: export.into() };
            let got = Location::parse(name).unwrap();
            assert_eq!(got, want, "{name}");
            assert_eq!(got.to_string(), back);
            assert_eq!(Location::parse(back).unwrap(), want);
        }
        for bad in
            ["nbd:", "nbd://", "nbd+unix:///e", "nbd+unix://h/e?socket=s", "nbd://h/%4", "nbd:unix:", "nbd:h"]
        {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
