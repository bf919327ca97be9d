//! `encrypt` of an image: as `blockdev-add` and `blockdev-create` take it, and what it leads to.
//!
//! Owns: QAPI's forms of it. Never: ciphers (`qcow2/crypt*.rs`). Threads: control. Locks: none.

use super::objects::Objects;
use crate::bail;
use crate::error::{Error, Result};
use crate::qcow2::crypt::{CreateEncrypt, Hash, IvGen, Mode};
use crate::qcow2::header::Crypt;
use crate::{wire_enum, wire_struct, wire_union};

wire_struct! {
    /// Options of the legacy encryption.
    pub struct QCryptoBlockOptionsQCow {
        /// The `secret` object that is the password.
        "key-secret" key_secret: Option<String>,
    }
}

wire_struct! {
    /// Options of LUKS.
    pub struct QCryptoBlockOptionsLUKS {
        /// The `secret` object that is the password.
        "key-secret" key_secret: Option<String>,
    }
}

wire_union! {
    /// How to get at the data of an encrypted qcow2 image.
    pub struct BlockdevQcow2Encryption {}
    /// How it is encrypted.
    "format" => pub enum BlockdevQcow2EncryptionFormat as format {
        /// The legacy way: AES-128-CBC.
        "aes" Aes(QCryptoBlockOptionsQCow),
        /// LUKS1.
        "luks" Luks(QCryptoBlockOptionsLUKS),
    }
}

impl BlockdevQcow2Encryption {
    /// The method, and the name of the secret.
    pub fn method(self) -> (Crypt, Option<String>) {
        match self.format {
            BlockdevQcow2EncryptionFormat::Aes(o) => (Crypt::Aes, o.key_secret),
            BlockdevQcow2EncryptionFormat::Luks(o) => (Crypt::Luks, o.key_secret),
        }
    }
}

wire_enum! {
    /// Ciphers.
    pub enum QCryptoCipherAlgo {
        /// AES with a key of 128 bits.
        "aes-128" Aes128,
        /// Of 192 bits.
        "aes-192" Aes192,
        /// Of 256 bits.
        "aes-256" Aes256,
    }
    default Aes256
}

wire_enum! {
    impl Mode {
        /// Cipher block chaining.
        "cbc" Cbc,
        /// IEEE 1619; each key is two keys.
        "xts" Xts,
    }
}

wire_enum! {
    impl IvGen {
        /// The sector's number, its low 32 bits.
        "plain" Plain,
        /// The sector's number.
        "plain64" Plain64,
        /// The sector's number, encrypted with the key's hash.
        "essiv" Essiv,
    }
}

wire_enum! {
    impl Hash {
        /// SHA-1.
        "sha1" Sha1,
        /// SHA-224.
        "sha224" Sha224,
        /// SHA-256.
        "sha256" Sha256,
        /// SHA-384.
        "sha384" Sha384,
        /// SHA-512.
        "sha512" Sha512,
    }
}

wire_struct! {
    /// Options of a new LUKS header.
    pub struct QCryptoBlockCreateOptionsLUKS {
        /// The `secret` object that is the password.
        "key-secret" key_secret: Option<String>,
        /// The cipher (default: aes-256).
        "cipher-alg" cipher_alg: Option<QCryptoCipherAlgo>,
        /// How sectors are made of blocks (default: xts).
        "cipher-mode" cipher_mode: Option<Mode>,
        /// How sector numbers become initialization vectors (default: plain64).
        "ivgen-alg" ivgen_alg: Option<IvGen>,
        /// The hash for essiv (default: sha256).
        "ivgen-hash-alg" ivgen_hash_alg: Option<Hash>,
        /// What keys are derived with (default: sha256).
        "hash-alg" hash_alg: Option<Hash>,
        /// How long it takes here to derive a key, in milliseconds (default: 2000).
        "iter-time" iter_time: Option<i64>,
    }
}

wire_union! {
    /// How a new image is encrypted.
    pub struct QCryptoBlockCreateOptions {}
    /// The method.
    "format" => pub enum QCryptoBlockFormat as format {
        /// The legacy way: AES-128-CBC.
        "qcow" Qcow(QCryptoBlockOptionsQCow),
        /// LUKS1.
        "luks" Luks(QCryptoBlockCreateOptionsLUKS),
    }
}

impl QCryptoBlockCreateOptions {
    /// With the password, which `objects` has.
    pub fn resolve(self, objects: &Objects) -> Result<CreateEncrypt> {
        let password = |id: Option<String>| match id {
            Some(id) => objects.password(&id),
            None => Err(Error::new("Parameter 'encrypt.key-secret' is required for cipher")),
        };
        match self.format {
            QCryptoBlockFormat::Qcow(o) => Ok(CreateEncrypt::new(Crypt::Aes, password(o.key_secret)?)),
            QCryptoBlockFormat::Luks(o) => {
                let d = CreateEncrypt::new(Crypt::Luks, password(o.key_secret)?);
                Ok(CreateEncrypt {
                    key_bits: match o.cipher_alg.unwrap_or_default() {
                        QCryptoCipherAlgo::Aes128 => 128,
                        QCryptoCipherAlgo::Aes192 => 192,
                        QCryptoCipherAlgo::Aes256 => 256,
                    },
                    mode: o.cipher_mode.unwrap_or(d.mode),
                    iv: o.ivgen_alg.unwrap_or(d.iv),
                    iv_hash: o.ivgen_hash_alg,
                    hash: o.hash_alg.unwrap_or(d.hash),
                    iter_time: match o.iter_time.map(u64::try_from) {
                        None => d.iter_time,
                        Some(Ok(ms)) => ms,
                        Some(Err(_)) => bail!("Parameter 'iter-time' expects a non-negative value"),
                    },
                    ..d
                })
            }
        }
    }
}
