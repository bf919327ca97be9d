//! AES in the modes of disks: CBC and XTS over 512-byte sectors.
//!
//! The modes are a few lines each on top of the `aes` crate, which gets as many blocks at once as the
//! mode allows: it has several of them under way in the processor at a time, and a call has its price.
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

type AesBlock = Block<Aes128>;

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

    fn encrypt(&self, blocks: &mut [AesBlock]) {
        match self {
            Key::K128(k) => k.encrypt_blocks(blocks),
            Key::K192(k) => k.encrypt_blocks(blocks),
            Key::K256(k) => k.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [AesBlock]) {
        match self {
            Key::K128(k) => k.decrypt_blocks(blocks),
            Key::K192(k) => k.decrypt_blocks(blocks),
            Key::K256(k) => k.decrypt_blocks(blocks),
        }
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

    /// The initialization vectors of `count` sectors.
    fn ivs(&self, first: u64, count: usize) -> Vec<AesBlock> {
        let number = |n: usize| {
            let sector = first.wrapping_add(n as u64);
            let mut iv = AesBlock::default();
            match &self.iv {
                Iv::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
                Iv::Plain64 | Iv::Essiv(_) => iv[..8].copy_from_slice(&sector.to_le_bytes()),
            }
            iv
        };
        let mut ivs: Vec<AesBlock> = (0..count).map(number).collect();
        if let Iv::Essiv(key) = &self.iv {
            key.encrypt(&mut ivs);
        }
        ivs
    }

    /// Encrypts `data`, whole sectors, of which the first has the number `sector`.
    pub(super) fn encrypt(&self, sector: u64, data: &mut [u8]) -> io::Result<()> {
        let blocks = blocks(data)?;
        let mut ivs = self.ivs(sector, blocks.len() / BLOCKS);
        match &self.keys {
            Keys::Cbc(key) => {
                // Each block needs the one before it, but sectors do not need each other.
                for n in 0..BLOCKS {
                    let column = || (n..).step_by(BLOCKS);
                    ivs.iter_mut().zip(column()).for_each(|(iv, at)| xor(iv, &blocks[at]));
                    key.encrypt(&mut ivs);
                    ivs.iter().zip(column()).for_each(|(iv, at)| blocks[at] = *iv);
                }
            }
            Keys::Xts { data, tweak } => {
                tweak.encrypt(&mut ivs);
                xor_tweaks(blocks, &ivs);
                data.encrypt(blocks);
                xor_tweaks(blocks, &ivs);
            }
        }
        Ok(())
    }

    /// The reverse of [`Cipher::encrypt`].
    pub(super) fn decrypt(&self, sector: u64, data: &mut [u8]) -> io::Result<()> {
        let blocks = blocks(data)?;
        let mut ivs = self.ivs(sector, blocks.len() / BLOCKS);
        match &self.keys {
            Keys::Cbc(key) => {
                let before = blocks.to_vec();
                key.decrypt(blocks);
                for (n, block) in blocks.iter_mut().enumerate() {
                    xor(block, if n % BLOCKS == 0 { &ivs[n / BLOCKS] } else { &before[n - 1] });
                }
            }
            Keys::Xts { data, tweak } => {
                tweak.encrypt(&mut ivs);
                xor_tweaks(blocks, &ivs);
                data.decrypt(blocks);
                xor_tweaks(blocks, &ivs);
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

/// The blocks of whole sectors.
fn blocks(data: &mut [u8]) -> io::Result<&mut [AesBlock]> {
    if !(data.len() as u64).is_multiple_of(SECTOR) {
        // The node in front of the driver aligns requests to what the driver says it needs.
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(AesBlock::slice_as_chunks_mut(data).0)
}

fn xor(block: &mut AesBlock, with: &AesBlock) {
    let bits = |b: &AesBlock| u128::from_ne_bytes((*b).into());
    *block = (bits(block) ^ bits(with)).to_ne_bytes().into();
}

/// XORs each block with its tweak: the first one's of each sector is given, and doubled in GF(2^128)
/// from one to the next.
fn xor_tweaks(blocks: &mut [AesBlock], first: &[AesBlock]) {
    for (sector, first) in blocks.chunks_exact_mut(BLOCKS).zip(first) {
        let mut tweak = u128::from_le_bytes((*first).into());
        for block in sector {
            *block = (u128::from_le_bytes((*block).into()) ^ tweak).to_le_bytes().into();
            // No branch: nobody could predict it.
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
        }
    }
}

/// AES-256-CBC over whole blocks, as encrypted `secret` objects have it.
pub fn cbc_decrypt(key: &[u8; 32], iv: &[u8; BLOCK], data: &mut [u8]) -> io::Result<()> {
    let blocks = AesBlock::slice_as_chunks_mut(data).0;
    let before = blocks.to_vec();
    Key::new(key)?.decrypt(blocks);
    let iv = AesBlock::from(*iv);
    for (block, last) in blocks.iter_mut().zip(std::iter::once(&iv).chain(&before)) {
        xor(block, last);
    }
    Ok(())
}
