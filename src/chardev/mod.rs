//! Character backends: where a serial port or a monitor reads and writes.
