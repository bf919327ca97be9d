//! From passwords to keys: PBKDF2, and LUKS's anti-forensic splitter.
//!
//! How long PBKDF2 takes is in the image's header, which may be hostile, or come from a machine that
//! is much faster than this one: a derivation that would take longer than the [`Patience`] left is
//! given up after a small part of it.
//!
//! Owns: those algorithms. Never: I/O. Threads: any. Locks: none.
//! Sources: RFC 8018, the LUKS1 on-disk format, section 2.4.

use super::crypt::{Hash, refuse};
use hmac::digest::{Digest, KeyInit};
use hmac::{Hmac, Mac};
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};
use std::io;
use std::time::{Duration, Instant};

/// Until when keys may be derived.
pub(super) struct Patience {
    end: Instant,
    all: Duration,
}

impl Patience {
    pub fn new(all: Duration) -> Patience {
        Patience { end: Instant::now() + all, all }
    }

    /// An error when `left` iterations will take too long, after `done` have been made since `begin`.
    fn check(&self, begin: Instant, done: u64, left: u64) -> io::Result<()> {
        let now = Instant::now();
        let needed = (now - begin).as_secs_f64() / done as f64 * left as f64;
        if needed > self.end.saturating_duration_since(now).as_secs_f64() {
            return Err(refuse(format!(
                "The LUKS header asks for too much: deriving its keys would take more than {} s ({} iterations)",
                self.all.as_secs(),
                done + left
            )));
        }
        Ok(())
    }
}

/// A hash, to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hasher(pub Hash);

/// Evaluates an expression with `$D` as the type of a hash.
macro_rules! with {
    ($hash:expr, $D:ident => $value:expr) => {
        match $hash {
            Hash::Sha1 => {
                type $D = Sha1;
                $value
            }
            Hash::Sha224 => {
                type $D = Sha224;
                $value
            }
            Hash::Sha256 => {
                type $D = Sha256;
                $value
            }
            Hash::Sha384 => {
                type $D = Sha384;
                $value
            }
            Hash::Sha512 => {
                type $D = Sha512;
                $value
            }
        }
    };
}

fn digest<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
    let mut d = D::new();
    parts.iter().for_each(|p| d.update(p));
    d.finalize().to_vec()
}

fn derive<M: Mac + KeyInit + Clone>(
    password: &[u8],
    salt: &[u8],
    iterations: u32,
    out: &mut [u8],
    patience: &Patience,
) -> io::Result<()> {
    let bad = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let keyed = <M as KeyInit>::new_from_slice(password).map_err(bad)?;
    let size = M::output_size();
    let blocks = out.len().div_ceil(size) as u64;
    let all = u64::from(iterations) * blocks;
    let (begin, mut done) = (Instant::now(), 0u64);
    for (n, part) in out.chunks_mut(size).enumerate() {
        let mut mac = keyed.clone();
        mac.update(salt);
        mac.update(&(n as u32 + 1).to_be_bytes());
        let mut u = mac.finalize().into_bytes();
        part.copy_from_slice(&u[..part.len()]);
        for _ in 1..iterations {
            let mut mac = keyed.clone();
            mac.update(&u);
            u = mac.finalize().into_bytes();
            part.iter_mut().zip(&u).for_each(|(a, b)| *a ^= b);
            done += 1;
            if done & 0xfff == 0 {
                patience.check(begin, done, all - done)?;
            }
        }
    }
    Ok(())
}

impl Hasher {
    /// Bytes of a digest.
    pub fn size(self) -> usize {
        match self.0 {
            Hash::Sha1 => 20,
            Hash::Sha224 => 28,
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of the parts, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        with!(self.0, D => digest::<D>(parts))
    }

    /// PBKDF2 with HMAC. Errors: it would take too long.
    pub fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        iterations: u32,
        out: &mut [u8],
        patience: &Patience,
    ) -> io::Result<()> {
        with!(self.0, D => derive::<Hmac<D>>(password, salt, iterations, out, patience))
    }

    /// How many iterations for `len` bytes take `time` on this machine.
    pub fn iterations(self, len: usize, time: Duration) -> io::Result<u64> {
        if time.is_zero() {
            return Ok(0);
        }
        let mut count = 1 << 12;
        loop {
            let begin = Instant::now();
            self.pbkdf2(b"password", &[0; 32], count, &mut vec![0; len], &Patience::new(time + PROBE * 100))?;
            let took = begin.elapsed();
            if took >= PROBE || count >= 1 << 24 {
                return Ok((f64::from(count) * time.as_secs_f64() / took.as_secs_f64().max(1e-9)) as u64);
            }
            count *= 2;
        }
    }

    /// Spreads every bit of `block` over all of it.
    fn diffuse(self, block: &mut [u8]) {
        for (n, part) in block.chunks_mut(self.size()).enumerate() {
            let digest = self.digest(&[&(n as u32).to_be_bytes(), part]);
            part.copy_from_slice(&digest[..part.len()]);
        }
    }

    /// The secret of which `material` consists, in stripes of `len` bytes. Without any one of them
    /// nothing of it can be had.
    pub fn merge(self, material: &[u8], len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        let mut stripes = material.chunks_exact(len).peekable();
        while let Some(stripe) = stripes.next() {
            all.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
            if stripes.peek().is_some() {
                self.diffuse(&mut all);
            }
        }
        all
    }

    /// The reverse of [`Hasher::merge`]: `material` has random bytes, of which the last stripe is
    /// replaced.
    pub fn split(self, secret: &[u8], material: &mut [u8]) {
        let (random, last) = material.split_at_mut(material.len() - secret.len());
        let mut all = vec![0; secret.len()];
        for stripe in random.chunks_exact(secret.len()) {
            all.iter_mut().zip(stripe).for_each(|(a, b)| *a ^= b);
            self.diffuse(&mut all);
        }
        for ((l, a), s) in last.iter_mut().zip(&all).zip(secret) {
            *l = a ^ s;
        }
    }
}

/// How long a measurement takes at least.
const PROBE: Duration = Duration::from_millis(20);
