//! Network backends: what stands at the host's end of a guest's network card.
//!
//! Knows nothing of virtio: a frame is bytes behind a header of `struct virtio_net_hdr`'s form.

pub mod netdev;
pub mod tap;
