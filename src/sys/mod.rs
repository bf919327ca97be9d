//! System calls behind small safe functions. Knows nothing of virtual machines.

pub mod address;
pub mod alarm;
pub mod buf;
pub mod fdio;
pub mod fdset;
pub mod file_attr;
pub mod inbox;
pub mod inherit;
pub mod iov;
pub mod listen;
pub mod log;
pub mod ofd;
pub mod poll;
pub mod process;
pub mod random;
pub mod stream;
pub mod thread;
pub mod tty;
pub mod tun;
pub mod unix;
