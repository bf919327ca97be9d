//! PCI: configuration space, BARs, MSI-X, slots. Knows nothing of what a device does.
//!
//! There is no firmware: [`root::PciRoot::plug`] gives every BAR its address, and the operating
//! system only has to switch decoding on (it may move them).

pub mod config;
pub mod function;
pub mod msix;
pub mod root;
