//! The user's terminal (or pipes) as a console: standard input and output.
//!
//! Owns: raw mode, the escape keys (`Ctrl-A x` and so on). Never: ends the VM when its input ends.
//! Threads: the chardev's. Locks: none.

use super::chardev::{Backend, Chardev};
use crate::event::{Event, Events};
use crate::sys::fdio::Output;
use crate::sys::tty::{self, RawMode};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

/// What `Ctrl-A h` prints.
const HELP: &str = "\r\n\
    Ctrl-A h      this help\r\n\
    Ctrl-A x      quit minivmm\r\n\
    Ctrl-A Ctrl-A send Ctrl-A\r\n";
const CTRL_A: u8 = 1;

/// What a key does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    Quit,
    Help,
}

/// Takes the escape sequences out of the input.
#[derive(Default)]
struct Keys {
    /// The last byte was Ctrl-A.
    escaped: bool,
}

impl Keys {
    fn take(&mut self, input: &[u8], to: &mut Vec<u8>, mut act: impl FnMut(Escape)) {
        for &byte in input {
            if !std::mem::take(&mut self.escaped) {
                if byte == CTRL_A {
                    self.escaped = true;
                } else {
                    to.push(byte);
                }
                continue;
            }
            match byte {
                b'x' => act(Escape::Quit),
                b'h' | b'?' => act(Escape::Help),
                CTRL_A => to.push(CTRL_A),
                // Ctrl-A c is kept for a monitor; other keys mean nothing.
                _ => {}
            }
        }
    }
}

struct Console {
    input: Option<File>,
    output: Output,
    keys: Keys,
    events: Events,
    terminal: Option<RawMode>,
}

impl Backend for Console {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(|f| f.as_fd())
    }

    fn read(&mut self, to: &mut Vec<u8>) -> io::Result<bool> {
        let Some(input) = &mut self.input else { return Ok(false) };
        let mut buf = [0; 1024];
        let n = match input.read(&mut buf) {
            Ok(0) => {
                self.input = None;
                return Ok(false);
            }
            Ok(n) => n,
            // A terminal that hung up says EIO: that is an end like any other.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                self.input = None;
                return Ok(false);
            }
            Err(e) => {
                if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                    self.input = None;
                }
                return Err(e);
            }
        };
        let (output, events) = (&mut self.output, &self.events);
        self.keys.take(&buf[..n], to, |escape| match escape {
            Escape::Quit => events.post(Event::ConsoleQuit),
            Escape::Help => {
                // A help that the terminal does not take now is not worth waiting for.
                let _ = output.write(HELP.as_bytes());
            }
        });
        Ok(true)
    }

    fn drops_input(&self) -> bool {
        self.terminal.is_some()
    }

    fn output(&self) -> BorrowedFd<'_> {
        self.output.fd()
    }

    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.output.write(data)
    }

    fn immediate(&self) -> Option<Output> {
        self.output.immediate()
    }
}

/// /dev/null: an input that has ended, and needs no thread to find that out.
fn is_null(file: &File) -> bool {
    let null = libc::makedev(1, 3);
    file.metadata().is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == null)
}

/// The chardev on standard input and output. A terminal becomes raw now, and itself again when the
/// chardev is closed or the process ends in any way. `Ctrl-A x` posts [`Event::ConsoleQuit`].
pub fn open(label: &str, events: Events) -> io::Result<Arc<Chardev>> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let terminal = if tty::is_terminal(input.as_fd()) { Some(RawMode::enter(input.as_fd())?) } else { None };
    let (input, output) = (Some(input).filter(|f| !is_null(f)), Output::new(output)?);
    Chardev::new(label, Box::new(Console { input, output, keys: Keys::default(), events, terminal }))
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
