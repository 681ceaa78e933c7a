//! Ciphers between the sectors of a disk and the bytes in an image file.
//!
//! Each works on single sectors, by the number that the sector has on the virtual disk, so that it does not matter where in
//! the file a sector lies. Only sectors that are in the file are encrypted; those that read as zeros are nowhere.

use std::fmt;

use aes::cipher::{BlockModeDecrypt, BlockModeEncrypt, KeyInit, KeyIvInit, array::Array};
use aes::{Aes128, Aes256};
use xts_mode::Xts128;

use crate::Sector;

const SECTOR: usize = 512;

/// A key that is ready for use.
pub enum Cipher {
    /// AES-128 in XTS mode, as XenServer encrypts VHDs with a key of 32 bytes. The tweak is the low 32 bits of the sector
    /// number (dm-crypt's "plain"), so it comes again after 2 TiB.
    XtsAes128(Box<Xts128<Aes128>>),
    /// AES-256 in XTS mode, the same with a key of 64 bytes.
    XtsAes256(Box<Xts128<Aes256>>),
    /// AES-128 in CBC mode, as QEMU encrypts qcow images. The initial vector is the sector number in 64 bits, little endian
    /// (dm-crypt's "plain64"). It is weak: equal beginnings of a sector show when it is written again.
    CbcAes128(Box<[u8; 16]>),
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.write_str(match self {
            Cipher::XtsAes128(_) => "XtsAes128",
            Cipher::XtsAes256(_) => "XtsAes256",
            Cipher::CbcAes128(_) => "CbcAes128",
        })
    }
}

impl Cipher {
    /// XTS with a key of 32 or 64 bytes, of which the second half is for the tweak; `None` for another length.
    pub fn xts(key: &[u8]) -> Option<Cipher> {
        let (data, tweak) = key.split_at_checked(key.len() / 2)?;
        match key.len() {
            32 => {
                let (data, tweak) = (Aes128::new_from_slice(data).ok()?, Aes128::new_from_slice(tweak).ok()?);
                Some(Cipher::XtsAes128(Box::new(Xts128::new(data, tweak))))
            }
            64 => {
                let (data, tweak) = (Aes256::new_from_slice(data).ok()?, Aes256::new_from_slice(tweak).ok()?);
                Some(Cipher::XtsAes256(Box::new(Xts128::new(data, tweak))))
            }
            _ => None,
        }
    }

    /// CBC with a passphrase: its first 16 bytes, filled up with zeros, are the key.
    pub fn cbc(passphrase: &[u8]) -> Cipher {
        let mut key = [0; 16];
        for (to, from) in key.iter_mut().zip(passphrase) {
            *to = *from;
        }
        Cipher::CbcAes128(Box::new(key))
    }

    /// Encrypts whole sectors, of which `sector` is the first.
    pub fn encrypt(&self, sector: Sector, bytes: &mut [u8]) {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR)) {
            match self {
                Cipher::XtsAes128(xts) => xts.encrypt_sector(bytes, plain(number).into()),
                Cipher::XtsAes256(xts) => xts.encrypt_sector(bytes, plain(number).into()),
                Cipher::CbcAes128(key) => {
                    let mut cbc = cbc::Encryptor::<Aes128>::new(&Array(**key), &Array(plain64(number)));
                    cbc.encrypt_blocks(blocks(bytes));
                }
            }
        }
    }

    /// Decrypts whole sectors, of which `sector` is the first.
    pub fn decrypt(&self, sector: Sector, bytes: &mut [u8]) {
        for (number, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR)) {
            match self {
                Cipher::XtsAes128(xts) => xts.decrypt_sector(bytes, plain(number).into()),
                Cipher::XtsAes256(xts) => xts.decrypt_sector(bytes, plain(number).into()),
                Cipher::CbcAes128(key) => {
                    let mut cbc = cbc::Decryptor::<Aes128>::new(&Array(**key), &Array(plain64(number)));
                    cbc.decrypt_blocks(blocks(bytes));
                }
            }
        }
    }
}

fn blocks(bytes: &mut [u8]) -> &mut [Array<u8, aes::cipher::consts::U16>] {
    Array::slice_as_chunks_mut(bytes).0
}

fn plain(sector: Sector) -> [u8; 16] {
    plain64(sector & u64::from(u32::MAX))
}

fn plain64(sector: Sector) -> [u8; 16] {
    u128::from(sector).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ciphers() -> [Cipher; 3] {
        [
            Cipher::xts(&[7; 32]).unwrap(),
            Cipher::xts(&[7; 64]).unwrap(),
            Cipher::cbc(b"a passphrase too long"),
        ]
    }

    fn bytes(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks_exact(2);
        digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    /// The vectors 4 to 6 and 10 of IEEE 1619-2007, annex B: those whose data units are sectors, by the first and the last block.
    #[test]
    fn xts_is_that_of_ieee_1619() {
        let short = "2718281828459045235360287471352631415926535897932384626433832795";
        let long = "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279\
                    502884197169399375105820974944592";
        let first_unit = || -> Vec<u8> { (0..=255).cycle().take(SECTOR).collect() };
        let (mut unit, mut last_key) = (Vec::new(), "");
        for (key, number, head, tail) in [
            (short, 0, "27a7479befa1d476489f308cd4cfa6e2", "0a282df920147beabe421ee5319d0568"),
            (short, 1, "264d3ca8512194fec312c8c9891f279f", "fd2a89ccb45e001a03a867b187f225dd"),
            (short, 2, "fa762a3680b76007928ed4a4f49a9456", "4bcf518138dc3a25c5e236171a2d01d6"),
            (long, 0xff, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151"),
        ] {
            let cipher = Cipher::xts(&bytes(key)).unwrap();
            // Each but the first of a key encrypts what the one before has given.
            if key != last_key {
                (unit, last_key) = (first_unit(), key);
            }
            let plain = unit.clone();
            cipher.encrypt(number, &mut unit);
            let seen = (&unit[..16], &unit[SECTOR - 16..]);
            assert_eq!(seen, (&*bytes(head), &*bytes(tail)), "{cipher:?}, data unit {number}");
            let mut back = unit.clone();
            cipher.decrypt(number, &mut back);
            assert_eq!(back, plain);
        }
    }

    #[test]
    fn what_was_encrypted_is_decrypted_sector_by_sector() {
        for cipher in ciphers() {
            let plain: Vec<u8> = (0..2048_u32).map(|i| (i % 251) as u8).collect();
            let mut bytes = plain.clone();
            cipher.encrypt(9, &mut bytes);
            assert_ne!(bytes, plain, "{cipher:?}");
            let mut third = bytes[1024..1536].to_vec();
            cipher.decrypt(11, &mut third);
            assert_eq!(third, plain[1024..1536], "{cipher:?}");
            cipher.decrypt(9, &mut bytes);
            assert_eq!(bytes, plain, "{cipher:?}");
        }
    }

    #[test]
    fn the_tweak_of_xts_has_32_bits_and_that_of_cbc_64() {
        let [xts, _, cbc] = ciphers();
        for (cipher, again) in [(xts, true), (cbc, false)] {
            let (mut low, mut high) = ([1; 512], [1; 512]);
            cipher.encrypt(5, &mut low);
            cipher.encrypt(5 + (1 << 32), &mut high);
            assert_eq!(low == high, again, "{cipher:?}");
        }
    }

    #[test]
    fn keys_have_32_or_64_bytes() {
        for len in [0, 16, 31, 33, 48, 65] {
            assert!(Cipher::xts(&vec![0; len]).is_none(), "{len}");
        }
    }
}
