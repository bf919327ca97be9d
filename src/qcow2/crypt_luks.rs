//! LUKS1's header: unlocking it with a password, and making one. And the legacy method, which has
//! none.
//!
//! The header comes from a file that may be hostile: how much is read is bounded by the ciphers that
//! there are and LUKS's 4000 stripes (256 KB), and how long it takes by [`PATIENCE`].
//!
//! Owns: the header's form. Never: knows where in the file it is. Threads: control, or the one that
//! creates an image. Locks: none. Source: the LUKS1 on-disk format specification 1.2.3; the texts
//! are QEMU's.

pub use super::crypt_cipher::{Cipher, cbc_decrypt};

use super::crypt::{CreateEncrypt, Hash, IvGen, Mode, refuse};
use super::crypt_kdf::{Hasher, Patience};
use super::types::{be32, be64};
use crate::sys::random;
use serde_json::{Map, Value, json};
use std::io;
use std::time::Duration;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Bytes of the header without key material.
const LENGTH: usize = 592;
const SECTOR: u64 = 512;
const SLOTS: usize = 8;
/// Where the first slot stands, and how long each is.
const SLOT: (usize, usize) = (208, 48);
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Always that many.
const STRIPES: u32 = 4000;
/// The fewest iterations of a new image.
const MIN_ITERATIONS: u64 = 1000;
/// How long unlocking may take in all.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest `iter-time`: images that take longer than [`PATIENCE`] could not be opened here.
const MAX_ITER_TIME: u64 = 20_000;

struct Slot {
    active: bool,
    iterations: u32,
    salt: [u8; 32],
    /// In bytes.
    offset: u64,
}

/// A header, checked.
struct Luks {
    key_bits: usize,
    mode: Mode,
    iv: IvGen,
    iv_hash: Option<Hash>,
    hash: Hasher,
    key_len: usize,
    /// In bytes.
    payload: u64,
    digest: [u8; 20],
    salt: [u8; 32],
    iterations: u32,
    uuid: String,
    slots: Vec<Slot>,
}

/// Nothing to say: the ciphers are there.
pub(super) fn available() -> io::Result<()> {
    Ok(())
}

/// A text of the header, which ends with a zero byte.
fn text<'a>(b: &'a [u8], at: usize, len: usize, what: &str) -> io::Result<&'a str> {
    let field = &b[at..at + len];
    let Some(end) = field.iter().position(|b| *b == 0) else {
        return Err(refuse(format!("LUKS header {what} is not NUL terminated")));
    };
    std::str::from_utf8(&field[..end]).map_err(|_| refuse(format!("LUKS header {what} is not a text")))
}

fn find<T: Copy>(all: &[T], word: impl Fn(T) -> &'static str, wanted: &str, what: &str) -> io::Result<T> {
    let known = all.iter().copied().find(|t| word(*t) == wanted);
    known.ok_or_else(|| refuse(format!("{what} '{wanted}' is not supported")))
}

fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&b[at..at + N]);
    out
}

impl Luks {
    fn parse(b: &[u8; LENGTH]) -> io::Result<Luks> {
        if &b[..6] != MAGIC {
            return Err(refuse("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes([b[6], b[7]]);
        if version != 1 {
            return Err(refuse(format!("LUKS version {version} is not supported")));
        }
        let cipher = text(b, 8, 32, "cipher name")?;
        let mode = text(b, 40, 32, "cipher mode")?;
        let hash = text(b, 72, 32, "hash spec")?;
        let uuid = text(b, 168, 40, "UUID")?.to_string();
        if cipher != "aes" {
            return Err(refuse(format!("Cipher '{cipher}' is not supported")));
        }
        let Some((mode, iv)) = mode.split_once('-') else {
            return Err(refuse(format!("Unexpected cipher mode string format '{mode}'")));
        };
        let (iv, iv_hash) = match iv.split_once(':') {
            Some((iv, hash)) => (iv, Some(find(Hash::ALL, Hash::word, hash, "Hash algorithm")?)),
            None => (iv, None),
        };
        let mode = find(Mode::ALL, Mode::word, mode, "Cipher mode")?;
        let iv = find(IvGen::ALL, IvGen::word, iv, "IV generator")?;
        if iv == IvGen::Essiv && iv_hash.is_none() {
            return Err(refuse("Missing IV generator hash specification"));
        }
        let key_len = be32(b, 108) as usize;
        let bits = if mode == Mode::Xts { key_len * 4 } else { key_len.saturating_mul(8) };
        if ![128, 192, 256].contains(&bits) || !key_len.is_multiple_of(8) {
            return Err(refuse(format!("Algorithm 'aes' with key size {key_len} bytes is not supported")));
        }
        let luks = Luks {
            key_bits: bits,
            mode,
            iv,
            // Other generators have no use for it, though QEMU may write one.
            iv_hash: iv_hash.filter(|_| iv == IvGen::Essiv),
            hash: Hasher(find(Hash::ALL, Hash::word, hash, "Hash algorithm")?),
            key_len,
            payload: u64::from(be32(b, 104)) * SECTOR,
            digest: array(b, 112),
            salt: array(b, 132),
            iterations: be32(b, 164),
            uuid,
            slots: (0..SLOTS).map(|n| slot(b, n)).collect::<io::Result<_>>()?,
        };
        if luks.iterations == 0 {
            return Err(refuse("LUKS key iteration count is zero"));
        }
        luks.check_places()?;
        Ok(luks)
    }

    /// Bytes of a slot's key material.
    fn material(&self) -> u64 {
        (self.key_len as u64) * u64::from(STRIPES)
    }

    fn check_places(&self) -> io::Result<()> {
        let len = self.material().next_multiple_of(SECTOR);
        for (n, a) in self.slots.iter().enumerate() {
            if a.offset < LENGTH as u64 {
                return Err(refuse(format!("Keyslot {n} is overlapping with the LUKS header")));
            }
            if self.payload != 0 && a.offset + len > self.payload {
                return Err(refuse(format!("Keyslot {n} is overlapping with the encrypted payload")));
            }
            for (m, b) in self.slots.iter().enumerate().skip(n + 1) {
                if a.offset < b.offset + len && b.offset < a.offset + len {
                    return Err(refuse(format!("Keyslots {n} and {m} are overlapping in the header")));
                }
            }
        }
        Ok(())
    }

    fn cipher(&self, key: &[u8]) -> io::Result<Cipher> {
        Cipher::new(self.mode, self.iv, Hasher(self.iv_hash.unwrap_or(Hash::Sha256)), key)
    }

    /// The key that was made of the password: does it open the slot's material?
    fn open_slot(
        &self,
        slot: &Slot,
        read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
        password: &[u8],
        patience: &Patience,
    ) -> io::Result<Option<Cipher>> {
        let mut key = vec![0; self.key_len];
        self.hash.pbkdf2(password, &slot.salt, slot.iterations, &mut key, patience)?;
        let mut material = vec![0; self.material().next_multiple_of(SECTOR) as usize];
        read(slot.offset, &mut material)?;
        self.cipher(&key)?.decrypt(0, &mut material)?;
        material.truncate(self.material() as usize);
        let master = self.hash.merge(&material, self.key_len);
        let mut digest = [0; 20];
        self.hash.pbkdf2(&master, &self.salt, self.iterations, &mut digest, patience)?;
        if digest == self.digest { self.cipher(&master).map(Some) } else { Ok(None) }
    }

    /// `QCryptoBlockInfoLUKS`.
    fn info(&self) -> Map<String, Value> {
        let slot = |s: &Slot| match s.active {
            true => {
                json!({ "active": true, "iters": s.iterations, "stripes": STRIPES, "key-offset": s.offset })
            }
            false => json!({ "active": false, "key-offset": s.offset }),
        };
        let mut info = Map::new();
        let mut put = |name: &str, value: Value| info.insert(name.to_string(), value);
        put("cipher-alg", format!("aes-{}", self.key_bits).into());
        put("cipher-mode", self.mode.word().into());
        put("ivgen-alg", self.iv.word().into());
        if let Some(hash) = self.iv_hash {
            put("ivgen-hash-alg", hash.word().into());
        }
        put("hash-alg", self.hash.0.word().into());
        put("detached-header", false.into());
        put("payload-offset", self.payload.into());
        put("master-key-iters", self.iterations.into());
        put("uuid", self.uuid.clone().into());
        put("slots", self.slots.iter().map(slot).collect());
        info
    }
}

fn slot(b: &[u8; LENGTH], n: usize) -> io::Result<Slot> {
    let at = SLOT.0 + n * SLOT.1;
    let (state, iterations, stripes) = (be32(b, at), be32(b, at + 4), be32(b, at + 44));
    if state != ACTIVE && state != INACTIVE {
        return Err(refuse(format!("Keyslot {n} state (active/disable) is corrupted")));
    }
    if stripes != STRIPES {
        return Err(refuse(format!("Keyslot {n} is corrupted (stripes count {stripes} != {STRIPES})")));
    }
    if state == ACTIVE && iterations == 0 {
        return Err(refuse(format!("Keyslot {n} iteration count is zero")));
    }
    let offset = u64::from(be32(b, at + 40)) * SECTOR;
    Ok(Slot { active: state == ACTIVE, iterations, salt: array(b, at + 8), offset })
}

/// Unlocks the header that `read` reads from (offset, buffer): the cipher of the payload, and what
/// `query-block` shows of the header.
///
/// # Errors
/// `PermissionDenied`: the password fits no slot. `InvalidInput`: what is wrong with the header.
pub(super) fn unlock(
    read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    password: &[u8],
) -> io::Result<(Cipher, Map<String, Value>)> {
    let mut bytes = [0; LENGTH];
    read(0, &mut bytes)?;
    let luks = Luks::parse(&bytes)?;
    let patience = Patience::new(PATIENCE);
    for slot in luks.slots.iter().filter(|s| s.active) {
        if let Some(cipher) = luks.open_slot(slot, read, password, &patience)? {
            return Ok((cipher, luks.info()));
        }
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "Invalid password, cannot unlock any keyslot"))
}

/// The legacy method: the password's first 16 bytes are the key, right or wrong.
pub(super) fn legacy(password: &[u8]) -> io::Result<Cipher> {
    let mut key = [0; 16];
    let len = password.len().min(key.len());
    key[..len].copy_from_slice(&password[..len]);
    Cipher::new(Mode::Cbc, IvGen::Plain64, Hasher(Hash::Sha256), &key)
}

/// A new header with one slot, and that slot's key material: the bytes of the header's space.
///
/// # Errors
/// Options that do not go together, in QEMU's words where it has some.
pub(super) fn format(o: &CreateEncrypt) -> io::Result<Vec<u8>> {
    if ![128, 192, 256].contains(&o.key_bits) {
        return Err(refuse(format!("Algorithm 'aes-{}' is not supported", o.key_bits)));
    }
    if o.key_bits == 192 && o.mode == Mode::Cbc {
        // Its key material is no whole number of sectors; QEMU (10.0) aborts on such an image.
        return Err(refuse("Algorithm 'aes-192' is not supported with cipher mode 'cbc'"));
    }
    if o.iter_time > MAX_ITER_TIME {
        return Err(refuse(format!("iter-time must be at most {MAX_ITER_TIME} ms")));
    }
    let iv_hash = match (o.iv, o.iv_hash) {
        (IvGen::Essiv, hash) => Some(hash.unwrap_or(Hash::Sha256)),
        (_, hash) => hash,
    };
    let key_len = o.key_bits as usize / if o.mode == Mode::Xts { 4 } else { 8 };
    let hash = Hasher(o.hash);
    let key = |bytes: &[u8]| Cipher::new(o.mode, o.iv, Hasher(iv_hash.unwrap_or(Hash::Sha256)), bytes);
    let time = Duration::from_millis(o.iter_time);
    let count = |len: usize, time: Duration| -> io::Result<u32> {
        let n = hash.iterations(len, time)?.max(MIN_ITERATIONS);
        Ok(u32::try_from(n).unwrap_or(u32::MAX))
    };

    let mut master = vec![0; key_len];
    random::fill(&mut master)?;
    // Fails before the time is spent.
    key(&master)?;
    let mut salts = [0; 64];
    random::fill(&mut salts)?;
    let patience = Patience::new(PATIENCE);
    let master_iterations = count(20, time / 8)?;
    let slot_iterations = count(key_len, time)?;
    let mut digest = [0; 20];
    hash.pbkdf2(&master, &salts[..32], master_iterations, &mut digest, &patience)?;
    let mut slot_key = vec![0; key_len];
    hash.pbkdf2(&o.password, &salts[32..], slot_iterations, &mut slot_key, &patience)?;

    let len = key_len * STRIPES as usize;
    let mut material = vec![0; len];
    random::fill(&mut material)?;
    hash.split(&master, &mut material);
    material.resize(len.next_multiple_of(SECTOR as usize), 0);
    key(&slot_key)?.encrypt(0, &mut material)?;

    // Every part begins at a multiple of 4096, as everybody's.
    let space = len.next_multiple_of(4096);
    let mut b = vec![0; 4096 + SLOTS * space];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    let sectors = |bytes: usize| ((bytes as u64 / SECTOR) as u32).to_be_bytes();
    let iv_text = iv_hash.map_or(String::new(), |h| format!(":{}", h.word()));
    put(0, MAGIC);
    put(6, &1u16.to_be_bytes());
    put(8, b"aes");
    put(40, format!("{}-{}{iv_text}", o.mode.word(), o.iv.word()).as_bytes());
    put(72, o.hash.word().as_bytes());
    put(104, &sectors(4096 + SLOTS * space));
    put(108, &(key_len as u32).to_be_bytes());
    put(112, &digest);
    put(132, &salts[..32]);
    put(164, &master_iterations.to_be_bytes());
    put(168, uuid()?.as_bytes());
    for n in 0..SLOTS {
        let at = SLOT.0 + n * SLOT.1;
        put(at, &(if n == 0 { ACTIVE } else { INACTIVE }).to_be_bytes());
        put(at + 40, &sectors(4096 + n * space));
        put(at + 44, &STRIPES.to_be_bytes());
    }
    put(SLOT.0 + 4, &slot_iterations.to_be_bytes());
    put(SLOT.0 + 8, &salts[32..]);
    put(4096, &material);
    Ok(b)
}

/// A random UUID (version 4) in text.
fn uuid() -> io::Result<String> {
    let mut u = [0; 16];
    random::fill(&mut u)?;
    u[6] = u[6] & 0x0f | 0x40;
    u[8] = u[8] & 0x3f | 0x80;
    let hex = format!("{:016x}{:016x}", be64(&u, 0), be64(&u, 8));
    Ok([&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"))
}
