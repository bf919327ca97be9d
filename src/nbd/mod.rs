//! The network block device: exports of nodes to NBD clients, and the driver `nbd`, which is a
//! client itself.
//!
//! The server: one thread listens (`listener.rs`), one thread a connection negotiates
//! (`handshake.rs`) and then serves requests (`serve.rs`); connections on which slow requests queue
//! up get more threads. Every request goes through its export's [`Handle`], so that a change of the
//! graph waits for requests and requests wait for it. A client that does not read, or stops in the
//! middle of a request, holds up nobody but itself.
//!
//! TLS is left out: a client that asks for it is told so, and who needs it puts a tunnel in front.
//!
//! Lock order: `registry → export's lines`; `receive → send → (ticket and below)`. The control
//! thread takes the first two only.
//!
//! [`Handle`]: crate::block::handle::Handle

pub mod export;
mod handshake;
pub mod listener;
pub mod options;
pub mod proto;
mod reply;
mod serve;
mod status;
