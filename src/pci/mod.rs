//! PCI: configuration space, BARs, MSI-X, slots. Knows nothing of what a device does.

pub mod function;
