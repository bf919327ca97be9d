//! The network block device: exports of nodes to NBD clients, and the driver `nbd`, which is a
//! client itself.
//!
//! The server: one thread listens (`listener.rs`), one thread a connection negotiates
//! (`handshake.rs`) and then serves requests (`serve.rs`); connections on which slow requests queue
//! up get more threads. Every request goes through its export's [`Handle`], so that a change of the
//! graph waits for requests and requests wait for it. A client that does not read, or stops in the
//! middle of a request, holds up nobody but itself.
//!
//! The client: `driver.rs` has the connection (`client.rs`, `hello.rs`) and replaces it when it is
//! lost.
//!
//! TLS is left out: a client that asks for it is told so, and who needs it puts a tunnel in front.
//!
//! Lock order: `registry → export's lines`; `link`; `client's send → its state`; `send → (ticket and below)`; the
//! crew's list, a hand's. The control thread takes the first two only.
//!
//! [`Handle`]: crate::block::handle::Handle

mod client;
mod crew;
pub mod driver;
pub mod export;
mod handshake;
mod hello;
pub mod listener;
pub mod options;
pub mod proto;
mod reply;
mod serve;
mod status;
#[cfg(test)]
pub(crate) mod testing;
pub mod uri;
