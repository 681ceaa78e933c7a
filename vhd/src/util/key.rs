//! `vhd-util key`: the keys of encrypted images.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use format::blocking::carry_out;

use super::args::Args;
use super::disk::Disk;
use super::query::LOOK;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::key::HASH_LEN;
use crate::{DiskType, Key, KeyHash, OpenOptions, print};

pub(super) const OPTIONS: &str = "n:k:N:H:scCp";
pub(super) const USAGE: &str = "usage:\n-C -k KEYPATH [-N NONCE]: calculate keyhash for KEYPATH\n-s -n NAME <-k KEYPATH> | -H \
                                HASH> [-N NONCE]: set keyhash for NAME\n-c -n NAME <-k KEYPATH>: check keyhash for \
                                NAME\n-p -n NAME: print keyhash for NAME\n-h help";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let nonce = args.text('N').map(from_hex).transpose()?.unwrap_or([0; HASH_LEN]);
    if args.has('C') {
        let path = args.path('k').ok_or_else(wrong_usage)?;
        let hash = read_key(path, None, out)?.hash(nonce);
        writeln!(out, "{}", print::hex(&hash.hash))?;
        return Ok(());
    }
    let name = args.path('n').ok_or_else(wrong_usage)?;
    let source = (args.path('k'), args.text('H'));
    match (args.has('s'), args.has('c'), source) {
        (true, false, (Some(path), None)) => {
            let key = read_key(path, Some(name), out)?;
            set(name, key.hash(nonce))?;
        }
        (true, false, (None, Some(hash))) => set(name, KeyHash { nonce, hash: from_hex(hash)? })?,
        (false, true, (Some(path), None)) if !args.has('N') => check(name, path, out)?,
        (false, false, _) if args.has('p') => {}
        _ => return Err(wrong_usage()),
    }
    if args.has('p') { print_hash(name, out) } else { Ok(()) }
}

fn set(name: &Path, key: KeyHash) -> Result<(), Failure> {
    let mut disk = Disk::open(name, true).map_err(|error| open_failure(name, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(name, &error))?;
    let options = OpenOptions { writable: true, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = disk.vhd(&options).map_err(|error| open_failure(name, error.errno()))?;
    let refuse = |text: &str| Err(Failure::new(libc::EINVAL, text));
    if vhd.kind() == DiskType::Fixed {
        return refuse("a fixed image has no place for the hash of a key");
    }
    if vhd.allocated_blocks() > 0 {
        return refuse("the image has data already: a key can be set for an empty one only");
    }
    Ok(carry_out(&mut disk, &vhd.set_key_hash(key)?)?)
}

fn check(name: &Path, path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let stored = stored(name)?.ok_or_else(|| Failure::new(libc::EINVAL, "this vhd has no keyhash"))?;
    if read_key(path, Some(name), out)?.fits(&stored) {
        return Ok(());
    }
    Err(Failure::new(libc::EINVAL, "the key is not the one that the image was encrypted with"))
}

fn print_hash(name: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    match stored(name)? {
        Some(KeyHash { nonce, hash }) => writeln!(out, "{} {}", print::hex(&nonce), print::hex(&hash))?,
        None => writeln!(out, "none")?,
    }
    Ok(())
}

/// What an image says of its key.
fn stored(name: &Path) -> Result<Option<KeyHash>, Failure> {
    let disk = Disk::open(name, false).map_err(|error| open_failure(name, errno_of(&error)))?;
    let vhd = disk.vhd(&LOOK).map_err(|error| open_failure(name, error.errno()))?;
    Ok(vhd.key_hash())
}

fn open_failure(name: &Path, errno: i32) -> Failure {
    Failure::new(errno, format!("failed to open {}: -{errno}", name.display()))
}

/// Reads a file that holds a key and nothing else. `image` is whose key it is to be: its name must say so.
pub(super) fn read_key(path: &Path, image: Option<&Path>, out: &mut dyn Write) -> Result<Key, Failure> {
    let bits = match image {
        None => None,
        Some(image) => Some(named_bits(path, image).ok_or_else(|| {
            let text =
                format!("Invalid key name {}: it is to be NAME,aes-xts-plain,BITS.key", path.display());
            Failure::new(libc::EINVAL, text)
        })?),
    };
    let failure = |error: &std::io::Error| {
        let errno = errno_of(error);
        Failure::new(errno, format!("failed to open {}: {errno}", path.display()))
    };
    let file = File::open(path).map_err(|error| failure(&error))?;
    let mut bytes = Vec::new();
    // More than the longest key is noticed by its length.
    file.take(65).read_to_end(&mut bytes).map_err(|error| failure(&error))?;
    let len = bytes.len();
    if let Some(bits) = bits.filter(|bits| bits / 8 != len) {
        return Err(Failure::new(libc::EINVAL, format!("incorrect key size: {} != {len}", bits / 8)));
    }
    let key = Key::new(bytes)?;
    writeln!(out, "vhd_util_read_key: using keyfile {}, Size (bytes) {len}", path.display())?;
    Ok(key)
}

/// The bits that the name of a key file for `image` tells, `None` if it is no such name.
fn named_bits(path: &Path, image: &Path) -> Option<usize> {
    let image = image.file_name()?.to_string_lossy();
    let stem = image.split(".vhd").next()?;
    let name = path.file_name()?.to_string_lossy();
    match name.strip_prefix(stem)? {
        ",aes-xts-plain,512.key" => Some(512),
        ",aes-xts-plain,256.key" => Some(256),
        _ => None,
    }
}

/// 32 bytes of 64 hexadecimal digits.
fn from_hex(text: &OsStr) -> Result<[u8; HASH_LEN], Failure> {
    let wrong = || Failure::new(libc::EINVAL, "not 64 hexadecimal digits");
    let digits = text.as_encoded_bytes();
    let (pairs, odd) = digits.as_chunks::<2>();
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let mut bytes = [0; HASH_LEN];
    if pairs.len() != HASH_LEN || !odd.is_empty() {
        return Err(wrong());
    }
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        let value = digit(high).zip(digit(low)).map(|(high, low)| high << 4 | low);
        *byte = value.and_then(|value| u8::try_from(value).ok()).ok_or_else(wrong)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_are_named_after_their_image() {
        let bits = |path: &str| named_bits(Path::new(path), Path::new("/srv/a.b.vhd"));
        assert_eq!(bits("/keys/a.b,aes-xts-plain,512.key"), Some(512));
        assert_eq!(bits("a.b,aes-xts-plain,256.key"), Some(256));
        for wrong in ["a,aes-xts-plain,256.key", "a.b.key", "a.b,aes-xts-plain,512.key2", ""] {
            assert_eq!(bits(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn hexadecimal_digits_are_read() {
        assert_eq!(from_hex(OsStr::new(&"0aF1".repeat(16))).unwrap()[..4], [0x0a, 0xf1, 0x0a, 0xf1]);
        for wrong in ["", "00", &"0g".repeat(32), &"0".repeat(63), &"0".repeat(65)] {
            assert!(from_hex(OsStr::new(wrong)).is_err(), "{wrong}");
        }
    }
}
