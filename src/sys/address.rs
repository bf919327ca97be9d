//! Socket addresses as QMP writes them, and how to listen on them and connect to them.
//!
//! Owns: nothing. Never: waits for longer than it is told, except for the resolver. Threads: any.
//! Locks: none.

use super::poll::PollSet;
use super::unix;
use crate::bail;
use crate::error::{Error, Result, strerror};
use crate::{wire_struct, wire_union};
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

wire_struct! {
    /// An address of TCP.
    pub struct InetSocketAddress {
        /// Host name or number; for listening, "" is every address.
        host: String,
        /// Port number.
        port: String,
        /// The host is a number: nobody is asked for it.
        numeric: Option<bool>,
        /// For listening: the last port to try.
        to: Option<u16>,
        /// Accept addresses of IPv4.
        ipv4: Option<bool>,
        /// Accept addresses of IPv6.
        ipv6: Option<bool>,
        /// Notice a peer that is gone without a word (always on).
        "keep-alive" keep_alive: Option<bool>,
    }
}

wire_struct! {
    /// An address of a Unix socket.
    pub struct UnixSocketAddress {
        /// Its file.
        path: String,
    }
}

wire_struct! {
    /// A socket that was passed to the process.
    pub struct FdSocketAddress {
        /// Its name (`getfd`).
        str: String,
    }
}

wire_union! {
    /// Where a server is.
    pub struct SocketAddress {}
    /// The kind of address.
    "type" => pub enum SocketAddressType as kind {
        /// TCP.
        "inet" Inet(InetSocketAddress),
        /// A Unix socket.
        "unix" Unix(UnixSocketAddress),
        /// A socket that is connected already; when that connection is lost, there is no other.
        "fd" Fd(FdSocketAddress),
    }
}

impl InetSocketAddress {
    /// Only a host and a port.
    pub fn new(host: &str, port: &str) -> InetSocketAddress {
        let (host, port) = (host.to_string(), port.to_string());
        InetSocketAddress { host, port, numeric: None, to: None, ipv4: None, ipv6: None, keep_alive: None }
    }

    fn resolve(&self, host: &str) -> Result<Vec<SocketAddr>> {
        let lost = |why: &str| {
            Error::new(format!("address resolution failed for {}:{}: {why}", self.host, self.port))
        };
        let port: u16 = self.port.parse().map_err(|_| lost("the port must be a number up to 65535"))?;
        let all: Vec<SocketAddr> = match host.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, port)],
            Err(_) if self.numeric == Some(true) => return Err(lost("the host is not a number")),
            Err(_) => (host, port).to_socket_addrs().map_err(|e| lost(&e.to_string()))?.collect(),
        };
        let (v4, v6) =
            (self.ipv4.unwrap_or(self.ipv6 != Some(true)), self.ipv6.unwrap_or(self.ipv4 != Some(true)));
        let found: Vec<_> = all.into_iter().filter(|a| if a.is_ipv4() { v4 } else { v6 }).collect();
        if found.is_empty() { Err(lost("no address of the kind that is wanted")) } else { Ok(found) }
    }

    /// Listens, without blocking, on the first address that can be had.
    pub fn listen(&self) -> Result<OwnedFd> {
        let hosts: &[&str] = if self.host.is_empty() { &["::", "0.0.0.0"] } else { &[&self.host] };
        let mut last = None;
        for host in hosts {
            // One that is not wanted; the other may be.
            let Ok(addresses) = self.resolve(host) else { continue };
            for address in addresses {
                for port in address.port()..=self.to.unwrap_or(0).max(address.port()) {
                    match TcpListener::bind(SocketAddr::new(address.ip(), port)) {
                        Ok(listener) => {
                            listener.set_nonblocking(true)?;
                            return Ok(listener.into());
                        }
                        Err(e) => last = Some(e),
                    }
                }
            }
        }
        match last {
            Some(e) if e.kind() == io::ErrorKind::AddrInUse => {
                bail!("Failed to find an available port: {}", strerror(&e))
            }
            Some(e) => bail!("Failed to bind socket to {}:{}: {}", self.host, self.port, strerror(&e)),
            // The reason, once more.
            None => self.resolve(&self.host).and_then(|_| bail!("no address to listen on")),
        }
    }
}

impl SocketAddress {
    /// Connects, before `deadline`. A socket that was passed cannot be connected again.
    pub fn connect(&self, deadline: Instant) -> Result<OwnedFd> {
        match &self.kind {
            SocketAddressType::Unix(a) => loop {
                match unix::connect(Path::new(&a.path)) {
                    // Its queue is full: there is nothing to poll for.
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                        std::thread::sleep(std::time::Duration::from_millis(10));
                    }
                    Err(e) => bail!("Failed to connect to '{}': {}", a.path, strerror(&e)),
                    Ok(fd) => return Ok(fd),
                }
            },
            SocketAddressType::Inet(a) => {
                let mut last = None;
                for address in a.resolve(&a.host)? {
                    match connect_tcp(address, deadline) {
                        Ok(fd) => return Ok(fd),
                        Err(e) => last = Some(e),
                    }
                }
                let why = last.map_or_else(|| "no address".into(), |e| strerror(&e));
                bail!("Failed to connect to '{}:{}': {why}", a.host, a.port)
            }
            SocketAddressType::Fd(a) => bail!("File descriptor named '{}' has not been found", a.str),
        }
    }
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            SocketAddressType::Unix(a) => f.write_str(&a.path),
            SocketAddressType::Inet(a) => write!(f, "{}:{}", a.host, a.port),
            SocketAddressType::Fd(a) => write!(f, "file descriptor '{}'", a.str),
        }
    }
}

fn connect_tcp(address: SocketAddr, deadline: Instant) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved; the new descriptor is owned by nothing else.
    let fd = unsafe {
        match libc::socket(family, kind, 0) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    // SAFETY: plain data, for which zeroes are valid.
    let (mut v4, mut v6): (libc::sockaddr_in, libc::sockaddr_in6) = unsafe { mem::zeroed() };
    let (pointer, len): (*const libc::sockaddr, usize) = match address {
        SocketAddr::V4(a) => {
            v4.sin_family = libc::AF_INET as libc::sa_family_t;
            v4.sin_port = a.port().to_be();
            v4.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
            ((&raw const v4).cast(), mem::size_of_val(&v4))
        }
        SocketAddr::V6(a) => {
            v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            v6.sin6_port = a.port().to_be();
            v6.sin6_addr.s6_addr = a.ip().octets();
            v6.sin6_scope_id = a.scope_id();
            ((&raw const v6).cast(), mem::size_of_val(&v6))
        }
    };
    // SAFETY: the pointer is to a local of that length.
    if unsafe { libc::connect(fd.as_raw_fd(), pointer, len as libc::socklen_t) } == 0 {
        return Ok(fd);
    }
    let e = io::Error::last_os_error();
    if e.raw_os_error() != Some(libc::EINPROGRESS) {
        return Err(e);
    }
    let mut set = PollSet::default();
    loop {
        set.clear();
        let token = set.add(fd.as_raw_fd(), libc::POLLOUT);
        set.until(deadline);
        set.wait()?;
        if set.ready(token) != 0 {
            break;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
    }
    let mut code: libc::c_int = 0;
    let mut len = mem::size_of_val(&code) as libc::socklen_t;
    // SAFETY: `code` is a c_int and `len` its size.
    let rc = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len)
    };
    match (rc, code) {
        (0, 0) => Ok(fd),
        (0, code) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn tcp_is_listened_on_and_connected_to_and_ports_are_tried_in_turn() {
        let soon = || Instant::now() + Duration::from_secs(5);
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        let taken = InetSocketAddress::new("127.0.0.1", &port.to_string());
        let e = taken.listen().unwrap_err();
        assert!(e.desc.starts_with("Failed to find an available port"), "{e}");
        let more = InetSocketAddress { to: Some(port.saturating_add(50)), ..taken.clone() };
        let second = TcpListener::from(more.listen().unwrap());
        let port = second.local_addr().unwrap().port().to_string();
        let kind = SocketAddressType::Inet(InetSocketAddress::new("localhost", &port));
        let only4 = InetSocketAddress { ipv4: Some(true), ..InetSocketAddress::new("localhost", &port) };
        assert!(only4.resolve("localhost").unwrap().iter().all(SocketAddr::is_ipv4));
        SocketAddress { kind }.connect(soon()).unwrap();
        drop((first, second));
        let nobody = SocketAddress { kind: SocketAddressType::Inet(taken) };
        assert!(nobody.connect(soon()).unwrap_err().desc.contains("Connection refused"));
        let numeric = InetSocketAddress { numeric: Some(true), ..InetSocketAddress::new("localhost", "1") };
        assert!(numeric.resolve("localhost").unwrap_err().desc.contains("not a number"));
    }
}
