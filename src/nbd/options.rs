//! The options of the server and of exports, as QMP and the configuration write them.
//!
//! Owns: their form. Never: opens anything. Threads: control. Locks: none.

use crate::sys::address::{InetSocketAddress, UnixSocketAddress};
use crate::{wire_enum, wire_struct, wire_union};

wire_struct! {
    /// A socket that was passed to the process.
    pub struct Fd {
        /// Its name (`getfd`).
        str: String,
    }
}

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
        data: Fd,
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

wire_enum! {
    /// What becomes of an export's clients.
    pub enum BlockExportRemoveMode {
        /// They keep it from being removed.
        "safe" Safe,
        /// They are disconnected.
        "hard" Hard,
    }
    default Safe
}

wire_struct! {
    /// An export for NBD clients.
    pub struct BlockExportOptionsNbd {
        /// Its name for clients; the node's by default.
        name: Option<String>,
        /// What clients show to people.
        description: Option<String>,
        /// Clients can ask in which image of the chain a place lies (`qemu:allocation-depth`).
        "allocation-depth" allocation_depth: Option<bool>,
    }
}

wire_union! {
    /// An export.
    pub struct BlockExportOptions {}
    /// Its protocol.
    "type" => pub enum BlockExportType as kind {
        /// NBD.
        "nbd" Nbd(BlockExportOptionsNbd),
    }
    .. {
        /// Its name for QMP; unique among exports.
        id: String,
        /// What is exported.
        "node-name" node_name: String,
        /// Clients may write; by default they may not.
        writable: Option<bool>,
        /// Each write is followed by a flush; by default clients flush.
        writethrough: Option<bool>,
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
