//! What stands for the ciphers in a build without the cargo feature `luks`: refusals that say how
//! to get them.
//!
//! Owns: the text. Threads: any. Locks: none.

use super::crypt::{CreateEncrypt, refuse};
use serde_json::{Map, Value};
use std::io;

/// There is none.
pub enum Cipher {}

impl Cipher {
    pub(super) fn encrypt(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn decrypt(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn same(&self, _: &Cipher) -> io::Result<bool> {
        match *self {}
    }
}

fn absent<T>(what: &str) -> io::Result<T> {
    Err(refuse(format!("{what} need a minivmm with ciphers: build it with cargo build --features luks")))
}

pub(super) fn available() -> io::Result<()> {
    absent("Encrypted images")
}

pub(super) fn unlock(
    _: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    _: &[u8],
) -> io::Result<(Cipher, Map<String, Value>)> {
    absent("Encrypted images")
}

pub(super) fn legacy(_: &[u8]) -> io::Result<Cipher> {
    absent("Encrypted images")
}

pub(super) fn format(_: &CreateEncrypt) -> io::Result<Vec<u8>> {
    absent("Encrypted images")
}

/// Refused.
pub fn cbc_decrypt(_: &[u8; 32], _: &[u8; 16], _: &mut [u8]) -> io::Result<()> {
    absent("Encrypted secrets")
}

#[cfg(test)]
#[path = "crypt_absent_test.rs"]
mod tests;
