//! Keys of encrypted images, an extension of XenServer's blktap (`drivers/block-crypto.c`, `vhd-util key`).
//!
//! Data sectors are encrypted with AES in XTS mode, by their number on the virtual disk; metadata are not. The batmap header
//! tells whether an image is encrypted: it has a nonce and the SHA-256 of nonce and key, so that a wrong key is noticed. Sectors
//! that an image does not have are zeros or the parent's, not ciphertext.

use std::fmt;

use format::cipher::Cipher;
use sha2::{Digest, Sha256};

use crate::Error;

/// Bytes of a nonce and of a hash.
pub const HASH_LEN: usize = 32;

/// A key of an image: 32 bytes for AES-128, 64 for AES-256; its second half is for the tweak.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Vec<u8>);

/// What an image says of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash {
    /// Bytes that are hashed before the key; XenServer leaves them zeros unless told otherwise.
    pub nonce: [u8; HASH_LEN],
    /// SHA-256 of nonce and key.
    pub hash: [u8; HASH_LEN],
}

impl Key {
    /// A key of 32 or 64 bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another length.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Error> {
        match bytes.len() {
            32 | 64 => Ok(Self(bytes)),
            other => Err(Error::invalid("key", format!("it has {other} bytes; a key has 32 or 64"))),
        }
    }

    /// What an image is to say of this key.
    pub fn hash(&self, nonce: [u8; HASH_LEN]) -> KeyHash {
        let hash = Sha256::new().chain_update(nonce).chain_update(&self.0).finalize();
        KeyHash { nonce, hash: hash.into() }
    }

    /// True if an image that says this was encrypted with this key.
    pub fn fits(&self, stored: &KeyHash) -> bool {
        self.hash(stored.nonce) == *stored
    }

    /// The cipher for the data.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a length that [`Key::new`] refuses.
    pub(crate) fn cipher(&self) -> Result<Cipher, Error> {
        Cipher::xts(&self.0).ok_or_else(|| Error::invalid("key", "its length fits no cipher"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        write!(f, "Key({} bytes)", self.0.len())
    }
}

/// The cipher for an image that says this of its key, opened with this key; `allow_locked` if it may be opened without, by who
/// does not look at its data.
///
/// # Errors
/// [`Error::Encrypted`], [`Error::WrongKey`] and [`Error::NotEncrypted`].
pub(crate) fn unlock(
    stored: Option<&KeyHash>,
    key: Option<&Key>,
    allow_locked: bool,
) -> Result<Option<Cipher>, Error> {
    match (stored, key) {
        (None, None) => Ok(None),
        (Some(_), None) if allow_locked => Ok(None),
        (Some(_), None) => Err(Error::Encrypted),
        (None, Some(_)) => Err(Error::NotEncrypted),
        (Some(stored), Some(key)) if !key.fits(stored) => Err(Error::WrongKey),
        (Some(_), Some(key)) => key.cipher().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_one_that_blktap_stores() {
        // tests/golden/key.vhd: 64 bytes of 'k', the nonce zeros.
        let stored = Key::new(vec![b'k'; 64]).unwrap().hash([0; HASH_LEN]);
        assert_eq!(
            crate::print::hex(&stored.hash),
            "4cc34c0ec674344b2341caa98ff4a0b103c70f944ef88d3f8fa77fa9fe630f50"
        );
    }

    #[test]
    fn only_the_right_key_unlocks() {
        let [right, wrong] = [1, 2].map(|byte| Key::new(vec![byte; 32]).unwrap());
        let stored = right.hash([9; HASH_LEN]);
        assert!(unlock(Some(&stored), Some(&right), false).unwrap().is_some());
        assert_eq!(unlock(Some(&stored), Some(&wrong), false).unwrap_err().errno(), libc::ENOKEY);
        assert_eq!(unlock(Some(&stored), None, false).unwrap_err().errno(), libc::EINVAL);
        assert_eq!(unlock(None, Some(&right), true).unwrap_err().errno(), libc::EINVAL);
        assert!(unlock(Some(&stored), None, true).unwrap().is_none());
        assert!(unlock(None, None, false).unwrap().is_none());
    }

    #[test]
    fn a_key_is_never_shown() {
        assert_eq!(format!("{:?}", Key::new(vec![b'k'; 32]).unwrap()), "Key(32 bytes)");
        assert!(Key::new(vec![0; 16]).is_err());
    }
}
