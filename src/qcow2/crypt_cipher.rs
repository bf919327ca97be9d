//! AES in the modes of disks: CBC and XTS over 512-byte sectors.
//!
//! The modes are a few lines each on top of the `aes` crate, which gets all 32 blocks of a sector at
//! once where the mode allows it: it has several of them under way in the processor at a time.
//!
//! Owns: keys, modes, initialization vectors. Never: I/O. Threads: any at once. Locks: none.
//! Sources: IEEE 1619 (XTS), NIST SP 800-38A (CBC), dm-crypt's documentation (`plain`, `plain64`,
//! `essiv`).

use super::crypt::{IvGen, Mode, SECTOR, refuse};
use super::crypt_kdf::Hasher;
use aes::cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use std::io;

/// Bytes of a block of AES.
const BLOCK: usize = 16;
/// Blocks of a sector.
const BLOCKS: usize = SECTOR as usize / BLOCK;

type Blocks = [Block<Aes128>; BLOCKS];

/// An AES key, expanded.
enum Key {
    K128(Box<Aes128>),
    K192(Box<Aes192>),
    K256(Box<Aes256>),
}

impl Key {
    fn new(bytes: &[u8]) -> io::Result<Key> {
        let bad = |_| refuse(format!("No AES cipher with key size {} available", bytes.len()));
        Ok(match bytes.len() {
            16 => Key::K128(Box::new(Aes128::new_from_slice(bytes).map_err(bad)?)),
            24 => Key::K192(Box::new(Aes192::new_from_slice(bytes).map_err(bad)?)),
            _ => Key::K256(Box::new(Aes256::new_from_slice(bytes).map_err(bad)?)),
        })
    }

    fn encrypt(&self, blocks: &mut [Block<Aes128>]) {
        match self {
            Key::K128(k) => k.encrypt_blocks(blocks),
            Key::K192(k) => k.encrypt_blocks(blocks),
            Key::K256(k) => k.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [Block<Aes128>]) {
        match self {
            Key::K128(k) => k.decrypt_blocks(blocks),
            Key::K192(k) => k.decrypt_blocks(blocks),
            Key::K256(k) => k.decrypt_blocks(blocks),
        }
    }

    fn encrypt_one(&self, bytes: [u8; BLOCK]) -> [u8; BLOCK] {
        let mut block = [Block::<Aes128>::from(bytes)];
        self.encrypt(&mut block);
        block[0].into()
    }
}

enum Keys {
    Cbc(Key),
    Xts { data: Key, tweak: Key },
}

enum Iv {
    Plain,
    Plain64,
    Essiv(Key),
}

/// What encrypts an image's sectors.
pub struct Cipher {
    keys: Keys,
    iv: Iv,
}

impl Cipher {
    /// `key`: for XTS both keys, one after the other. `hasher` is for ESSIV.
    pub(super) fn new(mode: Mode, iv: IvGen, hasher: Hasher, key: &[u8]) -> io::Result<Cipher> {
        let keys = match mode {
            Mode::Cbc => Keys::Cbc(Key::new(key)?),
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Keys::Xts { data: Key::new(data)?, tweak: Key::new(tweak)? }
            }
        };
        let iv = match iv {
            IvGen::Plain => Iv::Plain,
            IvGen::Plain64 => Iv::Plain64,
            IvGen::Essiv => Iv::Essiv(Key::new(&hasher.digest(&[key]))?),
        };
        Ok(Cipher { keys, iv })
    }

    fn iv(&self, sector: u64) -> [u8; BLOCK] {
        let mut iv = [0; BLOCK];
        match &self.iv {
            Iv::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Iv::Plain64 => iv[..8].copy_from_slice(&sector.to_le_bytes()),
            Iv::Essiv(key) => {
                iv[..8].copy_from_slice(&sector.to_le_bytes());
                iv = key.encrypt_one(iv);
            }
        }
        iv
    }

    /// Encrypts `data`, whole sectors, of which the first has the number `sector`.
    pub(super) fn encrypt(&self, sector: u64, data: &mut [u8]) -> io::Result<()> {
        self.each(sector, data, |iv, blocks| match &self.keys {
            Keys::Cbc(key) => {
                let mut last = iv;
                for block in blocks {
                    xor(block, &last);
                    key.encrypt(std::slice::from_mut(block));
                    last = (*block).into();
                }
            }
            Keys::Xts { data, tweak } => {
                let tweaks = tweaks(tweak.encrypt_one(iv));
                blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
                data.encrypt(blocks);
                blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
            }
        })
    }

    /// The reverse of [`Cipher::encrypt`].
    pub(super) fn decrypt(&self, sector: u64, data: &mut [u8]) -> io::Result<()> {
        self.each(sector, data, |iv, blocks| match &self.keys {
            Keys::Cbc(key) => {
                let before: Blocks = *blocks;
                key.decrypt(blocks);
                xor(&mut blocks[0], &iv);
                for (block, last) in blocks[1..].iter_mut().zip(&before) {
                    xor(block, &(*last).into());
                }
            }
            Keys::Xts { data, tweak } => {
                let tweaks = tweaks(tweak.encrypt_one(iv));
                blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
                data.decrypt(blocks);
                blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
            }
        })
    }

    fn each(&self, first: u64, data: &mut [u8], f: impl Fn([u8; BLOCK], &mut Blocks)) -> io::Result<()> {
        if !(data.len() as u64).is_multiple_of(SECTOR) {
            // The node in front of the driver aligns requests to what the driver says it needs.
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        for (n, sector) in data.chunks_exact_mut(SECTOR as usize).enumerate() {
            let mut blocks = Blocks::default();
            for (block, bytes) in blocks.iter_mut().zip(sector.chunks_exact(BLOCK)) {
                block.copy_from_slice(bytes);
            }
            f(self.iv(first.wrapping_add(n as u64)), &mut blocks);
            for (block, bytes) in blocks.iter().zip(sector.chunks_exact_mut(BLOCK)) {
                bytes.copy_from_slice(block);
            }
        }
        Ok(())
    }

    /// True if the other one has the same keys.
    pub(super) fn same(&self, other: &Cipher) -> io::Result<bool> {
        let mut probe = [[0; SECTOR as usize]; 2];
        self.encrypt(1, &mut probe[0])?;
        other.encrypt(1, &mut probe[1])?;
        Ok(probe[0] == probe[1])
    }
}

fn xor(block: &mut Block<Aes128>, with: &[u8; BLOCK]) {
    block.iter_mut().zip(with).for_each(|(a, b)| *a ^= b);
}

/// The tweak of each block: doubled in GF(2^128) from one to the next.
fn tweaks(first: [u8; BLOCK]) -> [[u8; BLOCK]; BLOCKS] {
    let mut tweak = u128::from_le_bytes(first);
    let mut all = [[0; BLOCK]; BLOCKS];
    for t in &mut all {
        *t = tweak.to_le_bytes();
        tweak = tweak << 1 ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
    }
    all
}

/// AES-256-CBC over whole blocks, as encrypted `secret` objects have it.
pub fn cbc_decrypt(key: &[u8; 32], iv: &[u8; BLOCK], data: &mut [u8]) -> io::Result<()> {
    let key = Key::new(key)?;
    let mut last = *iv;
    for bytes in data.chunks_exact_mut(BLOCK) {
        let mut block = Block::<Aes128>::default();
        block.copy_from_slice(bytes);
        let next = block;
        key.decrypt(std::slice::from_mut(&mut block));
        xor(&mut block, &last);
        bytes.copy_from_slice(&block);
        last = next.into();
    }
    Ok(())
}
