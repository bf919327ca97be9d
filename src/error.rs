//! The error that a user or a QMP client sees.
//!
//! Below the command handlers there is only [`std::io::Error`]; a handler turns it into an
//! [`Error`] once, with the words that QEMU uses, so that clients and scripts that match on
//! QEMU's texts keep working.

use std::fmt;

/// The error classes of QMP (`qapi/error.json`); clients may match on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Everything that has no class of its own.
    GenericError,
    /// The command is unknown, or not available in this mode.
    CommandNotFound,
    /// A device is there, but not active (balloon, a job that does not run).
    DeviceNotActive,
    /// No device of that name.
    DeviceNotFound,
    /// The kernel's KVM lacks something.
    KVMMissingCap,
}

impl Class {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::GenericError => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
            Class::DeviceNotFound => "DeviceNotFound",
            Class::KVMMissingCap => "KVMMissingCap",
        }
    }
}

/// An error as QMP carries it: `{"error": {"class": …, "desc": …}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What a client may match on.
    pub class: Class,
    /// What a person reads.
    pub desc: String,
}

/// The result of everything that can fail in a client's face.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A `GenericError`.
    pub fn new(desc: impl Into<String>) -> Error {
        Error { class: Class::GenericError, desc: desc.into() }
    }

    /// An error of another class.
    pub fn of(class: Class, desc: impl Into<String>) -> Error {
        Error { class, desc: desc.into() }
    }

    /// The same error with `prefix` before its text.
    pub fn context(mut self, prefix: impl fmt::Display) -> Error {
        self.desc = format!("{prefix}{}", self.desc);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Error {
        Error::new(strerror(&e))
    }
}

/// The text of an I/O error as C's `strerror` says it, without Rust's ` (os error N)`.
pub fn strerror(e: &std::io::Error) -> String {
    let text = e.to_string();
    match (e.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(at)) => text[..at].to_string(),
        _ => text,
    }
}

/// `Err(Error::new(format!(…)))`.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::error::Error::new(format!($($arg)*))) };
}
