//! The options of the server, as QMP and the configuration write them.
//!
//! Owns: their form. Never: opens anything. Threads: control. Locks: none.

use crate::sys::address::{FdSocketAddress, InetSocketAddress, UnixSocketAddress};
use crate::{wire_struct, wire_union};

wire_struct! {
    /// Wraps the options of one kind of address.
    pub struct InetSocketAddressWrapper {
        /// The options.
        data: InetSocketAddress,
    }
}

wire_struct! {
    /// Wraps the options of one kind of address.
    pub struct UnixSocketAddressWrapper {
        /// The options.
        data: UnixSocketAddress,
    }
}

wire_struct! {
    /// Wraps the options of one kind of address.
    pub struct FdSocketAddressWrapper {
        /// The options.
        data: FdSocketAddress,
    }
}

wire_union! {
    /// Where to listen.
    pub struct SocketAddressLegacy {}
    /// The kind of address.
    "type" => pub enum SocketAddressLegacyType as kind {
        /// TCP.
        "inet" Inet(InetSocketAddressWrapper),
        /// A Unix socket.
        "unix" Unix(UnixSocketAddressWrapper),
        /// A socket that listens already.
        "fd" Fd(FdSocketAddressWrapper),
    }
}

wire_struct! {
    /// How to serve.
    pub struct NbdServerOptions {
        /// Seconds that a client may take to choose an export (default: 10; 0: any time).
        "handshake-max-seconds" handshake: Option<u32>,
        /// Id of TLS credentials: there are none.
        "tls-creds" tls_creds: Option<String>,
        /// Id of an authorization object: there are none.
        "tls-authz" tls_authz: Option<String>,
        /// Clients at a time (default: 100; 0: any number); more have to wait.
        "max-connections" max_connections: Option<u32>,
        /// Where to listen.
        addr: SocketAddressLegacy,
    }
}
