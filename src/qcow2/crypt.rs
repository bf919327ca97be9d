//! Encryption of guest data: where it happens on the way to and from the disk.
//!
//! What goes to the disk is encrypted in a buffer of ours, what comes from it is decrypted there:
//! guest memory holds plain text only, and a guest that changes it meanwhile changes nothing but
//! its own data. Every 512-byte sector is encrypted for itself, with an initialization vector made
//! of a sector number: with LUKS that of the place in the file that has the data, with the legacy
//! method that of the place on the guest's disk. Metadata, compressed clusters and stored bitmaps
//! are never encrypted.
//!
//! Owns: those two ways, and what opening and creating need to know. Never: knows a cipher
//! (`crypt_cipher.rs`) or LUKS's header (`crypt_luks.rs`): both are there with the cargo feature
//! `luks` only, and `crypt_absent.rs` stands in for them without it. Threads: any. Locks: none.

pub use super::crypt_luks::{Cipher, cbc_decrypt};

use super::Qcow2;
use super::crypt_luks;
use super::header::{Crypt, Header};
use super::io::read_clipped;
use crate::block::driver::Flags;
use crate::block::node::Node;
use crate::sys::buf::AlignedBuf;
use crate::sys::iov::{Iov, IovMut};
use serde_json::{Map, Value, json};
use std::io;

/// Bytes that are encrypted for themselves.
pub const SECTOR: u64 = 512;
/// How much goes through a buffer at once, in bytes: less than what malloc maps for itself.
const CHUNK: u64 = 64 << 10;

/// How to get at an image's data: `encrypt` of `blockdev-add`, with the secret's bytes.
#[derive(Clone)]
pub struct Unlock {
    /// The method that the options name.
    pub method: Crypt,
    /// The password; `None`: none was named.
    pub password: Option<Vec<u8>>,
    /// The name of the `secret` object that it is, if it is one.
    pub secret: Option<String>,
}

/// `encrypt` of a new image.
#[derive(Clone)]
pub struct CreateEncrypt {
    /// [`Crypt::Aes`] or [`Crypt::Luks`].
    pub method: Crypt,
    /// The password.
    pub password: Vec<u8>,
    /// The cipher's key, in bits: 128, 192 or 256. Like all that follows, for LUKS only.
    pub key_bits: u32,
    /// How sectors are made of blocks.
    pub mode: Mode,
    /// How sector numbers become initialization vectors.
    pub iv: IvGen,
    /// `ivgen-hash-alg`; `None`: SHA-256 if one is needed.
    pub iv_hash: Option<Hash>,
    /// What keys are derived with.
    pub hash: Hash,
    /// How long it takes here to derive a key, in milliseconds.
    pub iter_time: u64,
}

impl CreateEncrypt {
    /// QEMU's defaults for LUKS: AES-256 in XTS mode, `plain64`, SHA-256, two seconds.
    pub fn new(method: Crypt, password: Vec<u8>) -> CreateEncrypt {
        CreateEncrypt {
            method,
            password,
            key_bits: 256,
            mode: Mode::Xts,
            iv: IvGen::Plain64,
            iv_hash: None,
            hash: Hash::Sha256,
            iter_time: 2000,
        }
    }

    pub(super) fn unlock(&self) -> Unlock {
        Unlock { method: self.method, password: Some(self.password.clone()), secret: None }
    }
}

/// Passwords do not belong into a log.
impl std::fmt::Debug for CreateEncrypt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CreateEncrypt({:?} {} {:?} {:?})", self.method, self.key_bits, self.mode, self.iv)
    }
}

macro_rules! words {
    ($(#[doc = $doc:literal])* $Name:ident { $( $(#[doc = $vdoc:literal])* $Value:ident $word:literal, )* }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $Name { $( $(#[doc = $vdoc])* $Value, )* }

        impl $Name {
            /// All of them.
            pub const ALL: &'static [$Name] = &[$($Name::$Value),*];
            /// The word in LUKS's header and in QEMU's options.
            pub fn word(self) -> &'static str {
                match self { $( $Name::$Value => $word, )* }
            }
        }
    };
}

words! {
    /// How sectors are made of blocks.
    Mode {
        /// Cipher block chaining.
        Cbc "cbc",
        /// IEEE 1619; the key is two keys.
        Xts "xts",
    }
}

words! {
    /// How a sector's number becomes its initialization vector.
    IvGen {
        /// The number's low 32 bits.
        Plain "plain",
        /// The number.
        Plain64 "plain64",
        /// The number, encrypted with the key's hash.
        Essiv "essiv",
    }
}

words! {
    /// Hashes.
    Hash {
        /// SHA-1.
        Sha1 "sha1",
        /// SHA-224.
        Sha224 "sha224",
        /// SHA-256.
        Sha256 "sha256",
        /// SHA-384.
        Sha384 "sha384",
        /// SHA-512.
        Sha512 "sha512",
    }
}

/// An open image's encryption.
pub(super) struct Payload {
    cipher: Cipher,
    method: Crypt,
    /// `encrypt` of what `query-block` shows.
    pub info: Map<String, Value>,
    /// The name of the password's `secret` object.
    pub secret: Option<String>,
}

/// The word of `encrypt.format`.
fn word(method: Crypt) -> &'static str {
    match method {
        Crypt::None => "none",
        Crypt::Aes => "aes",
        Crypt::Luks => "luks",
    }
}

pub(super) fn refuse(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

fn info(method: Crypt) -> Map<String, Value> {
    Map::from_iter([("format".to_string(), word(method).into())])
}

/// Whether options fit an image.
///
/// # Errors
/// QEMU's texts.
pub(super) fn check(image: Crypt, options: Option<Crypt>) -> io::Result<()> {
    match options {
        Some(method) if image == Crypt::None => Err(refuse(format!(
            "No encryption in image header, but options specified format '{}'",
            word(method)
        ))),
        Some(method) if method != image => Err(refuse(format!(
            "Header reported '{}' encryption format but options specify '{}'",
            word(image),
            word(method)
        ))),
        _ => Ok(()),
    }
}

/// Finds the encryption of the image with this header in `file`; `None`: it has none.
///
/// # Errors
/// QEMU's texts: options that do not fit, no key, the wrong password, a broken LUKS header.
pub(super) fn open(file: &Node, header: &Header, how: Option<&Unlock>) -> io::Result<Option<Payload>> {
    let method = header.crypt;
    check(method, how.map(|u| u.method))?;
    if method == Crypt::None {
        return Ok(None);
    }
    crypt_luks::available()?;
    let Some(password) = how.and_then(|u| u.password.as_deref()) else {
        return Err(refuse("Parameter 'encrypt.key-secret' is required for cipher"));
    };
    let mut info = info(method);
    let cipher = match method {
        Crypt::Luks => {
            let (cipher, more) = crypt_luks::unlock(&mut reader(file, header)?, password)?;
            info.extend(more);
            cipher
        }
        _ => crypt_luks::legacy(password)?,
    };
    let secret = how.and_then(|u| u.secret.clone());
    Ok(Some(Payload { cipher, method, info, secret }))
}

/// Reads from the LUKS header: at an offset in it, into a buffer.
fn reader(file: &Node, header: &Header) -> io::Result<impl FnMut(u64, &mut [u8]) -> io::Result<()>> {
    let Some((at, len)) = header.crypto else {
        return Err(refuse("Missing CRYPTO header for crypt method 2"));
    };
    Ok(move |off: u64, to: &mut [u8]| {
        if off.checked_add(to.len() as u64).is_none_or(|end| end > len) {
            return Err(refuse("Request for data outside of extension header"));
        }
        if at + off + to.len() as u64 > file.len() {
            return Err(refuse("LUKS header lies beyond the end of the file"));
        }
        file.read(at + off, &mut IovMut::from_slice(to))
    })
}

impl Payload {
    /// `encrypt` of the options that open the image again.
    pub fn options(&self) -> Value {
        json!({ "format": word(self.method), "key-secret": self.secret })
    }

    fn sector(&self, host: u64, guest: u64) -> u64 {
        (if self.method == Crypt::Luks { host } else { guest }) / SECTOR
    }

    /// Reads guest data that lie at `host` in `node`, and are at `guest` on the disk. (What lies behind
    /// the end of the file is no data yet: its contents do not matter.)
    pub fn read(&self, node: &Node, host: u64, guest: u64, to: &mut IovMut) -> io::Result<()> {
        let (len, mut pos) = (to.len() as u64, 0);
        let mut buf = buffer(node, len);
        while pos < len {
            let n = CHUNK.min(len - pos) as usize;
            let part = &mut buf[..n];
            read_clipped(node, host + pos, 0, n, &mut IovMut::from_slice(part))?;
            self.cipher.decrypt(self.sector(host + pos, guest + pos), part)?;
            to.copy_from(pos as usize, part);
            pos += n as u64;
        }
        Ok(())
    }

    /// Writes guest data, which are at `guest` on the disk, to `host` in `node`.
    pub fn write(&self, node: &Node, host: u64, guest: u64, from: &Iov) -> io::Result<()> {
        let (len, mut pos) = (from.len() as u64, 0);
        let mut buf = buffer(node, len);
        while pos < len {
            let n = CHUNK.min(len - pos) as usize;
            let part = &mut buf[..n];
            from.copy_to(pos as usize, part);
            self.cipher.encrypt(self.sector(host + pos, guest + pos), part)?;
            node.write(host + pos, &Iov::from_slice(part), Flags::NONE)?;
            pos += n as u64;
        }
        Ok(())
    }
}

fn buffer(node: &Node, len: u64) -> AlignedBuf {
    AlignedBuf::new(CHUNK.min(len) as usize, node.limits().memory_alignment.max(16) as usize)
}

impl Qcow2 {
    /// True if `password` opens the image. ENOTSUP: it is not encrypted.
    pub(super) fn password_fits(&self, password: &[u8]) -> io::Result<bool> {
        let Some(payload) = &self.crypt else { return Err(io::Error::from_raw_os_error(libc::ENOTSUP)) };
        let header = self.lock().header.clone();
        let file = self.file()?;
        let found = match payload.method {
            Crypt::Luks => {
                crypt_luks::unlock(&mut reader(&file, &header)?, password).map(|(cipher, _)| cipher)
            }
            _ => crypt_luks::legacy(password),
        };
        match found {
            Ok(cipher) => cipher.same(&payload.cipher),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(e) => Err(e),
        }
    }
}
