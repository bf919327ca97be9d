//! Devices that are not on PCI: serial port, keyboard controller, clock.
