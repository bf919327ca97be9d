//! The object `secret`: a password or key, given in the request or read from a file.
//!
//! Owns: finding its bytes, with QEMU's texts (`crypto/secret_common.c` in effect). Never: uses them.
//! Threads: control. Locks: none.

use super::objects::{Object, Objects};
use crate::bail;
use crate::error::{Error, Result, strerror};
use crate::qcow2::crypt::cbc_decrypt;
use crate::{wire_enum, wire_struct};
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// The longest file that a secret is read from, in bytes: a key, not a disk.
const MAX_FILE: u64 = 1 << 20;

wire_enum! {
    /// How a secret is written.
    pub enum QCryptoSecretFormat {
        /// As it is.
        "raw" Raw,
        /// In base64.
        "base64" Base64,
    }
}

wire_struct! {
    /// A password or key. Exactly one of `data` and `file` is needed.
    pub struct SecretProperties {
        /// The secret itself. Who can read the request, or the configuration, knows it.
        data: Option<String>,
        /// The file that has it. Not with a line feed at its end, which would be part of it.
        file: Option<String>,
        /// How it is written (default: raw).
        format: Option<QCryptoSecretFormat>,
        /// The secret that this one is encrypted with: a key of 32 bytes, for AES-256-CBC.
        keyid: Option<String>,
        /// The initialization vector of that encryption: 16 bytes in base64.
        iv: Option<String>,
    }
}

/// A secret's bytes; overwritten when it goes.
pub struct Secret(Vec<u8>);

impl Secret {
    /// Finds the bytes. `objects` has the secret that `keyid` names.
    pub fn load(options: &SecretProperties, objects: &Objects) -> Result<Secret> {
        let bytes = match (&options.data, &options.file) {
            (Some(_), Some(_)) => bail!("'file' and 'data' are mutually exclusive"),
            (None, None) => bail!("Either 'file' or 'data' must be provided"),
            (Some(data), None) => data.clone().into_bytes(),
            (None, Some(path)) => {
                read(path).map_err(|why| Error::new(format!("Unable to read {path}: {why}")))?
            }
        };
        let bytes = match options.format {
            Some(QCryptoSecretFormat::Base64) => base64(&bytes)?,
            Some(QCryptoSecretFormat::Raw) | None => bytes,
        };
        let bytes = match &options.keyid {
            Some(keyid) => decrypt(bytes, objects.secret(keyid)?, options.iv.as_deref())?,
            None => bytes,
        };
        Ok(Secret(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Or the compiler may find that nobody reads what was just written.
        std::hint::black_box(&self.0);
    }
}

impl Object for Secret {}

/// A file's contents; the error is the end of a sentence.
fn read(path: &str) -> std::result::Result<Vec<u8>, String> {
    let open = |e| format!("Failed to open file “{path}”: {}", strerror(&e));
    let reading = |e| format!("Error reading file “{path}”: {}", strerror(&e));
    // Not to wait for the other end of a FIFO.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(open)?;
    let kind = file.metadata().map_err(reading)?;
    let mut bytes = Vec::new();
    if !kind.is_file() && !kind.is_dir() {
        return Err(format!("Error reading file “{path}”: Not a regular file"));
    }
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(reading)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("Error reading file “{path}”: {}", strerror(&too_large())));
    }
    Ok(bytes)
}

fn too_large() -> std::io::Error {
    std::io::Error::from_raw_os_error(libc::EFBIG)
}

/// Base64 as RFC 4648 has it, line ends ignored. (QEMU drops an incomplete last group without a
/// word, and so a part of the password; that is an error here.)
pub fn base64(text: &[u8]) -> Result<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|b| !b"\r\n".contains(b)).collect();
    let padding = text.iter().rev().take_while(|b| **b == b'=').count();
    let digits = &text[..text.len() - padding];
    let value = |digit: u8| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let Some(values) = digits.iter().map(|d| value(*d)).collect::<Option<Vec<u8>>>() else {
        bail!("Base64 data contains invalid characters");
    };
    if padding > 2 || !text.len().is_multiple_of(4) {
        bail!("Base64 data is not complete");
    }
    let mut bytes = Vec::with_capacity(values.len() * 3 / 4);
    for group in values.chunks(4) {
        let bits = group.iter().enumerate().fold(0u32, |bits, (n, v)| bits | u32::from(*v) << (18 - 6 * n));
        // Two digits are one byte, three are two, four are three.
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Ok(bytes)
}

/// AES-256-CBC with PKCS #7 padding.
fn decrypt(mut bytes: Vec<u8>, key: &Secret, iv: Option<&str>) -> Result<Vec<u8>> {
    let Ok(key) = key.0.as_slice().try_into() else { bail!("Key should be 32 bytes in length") };
    let Some(iv) = iv else { bail!("IV is required to decrypt secret") };
    let iv = base64(iv.as_bytes())?;
    let Ok(iv) = iv.as_slice().try_into() else {
        bail!("IV should be 16 bytes in length not {}", iv.len());
    };
    if !bytes.len().is_multiple_of(16) {
        bail!("Length {} must be a multiple of block size 16", bytes.len());
    }
    cbc_decrypt(key, iv, &mut bytes)?;
    // Of nothing there is no padding.
    let Some(padding) = bytes.last().map(|last| usize::from(*last)) else { return Ok(bytes) };
    if padding > 16 {
        bail!("Incorrect number of padding bytes ({padding}) found on decrypted data");
    }
    bytes.truncate(bytes.len() - padding);
    Ok(bytes)
}

#[cfg(test)]
#[path = "secret_test.rs"]
mod tests;
