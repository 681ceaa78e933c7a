//! The key of an encrypted image, from standard input.

use std::io::Read;

use nix::errno::Errno;

use crate::args::Opening;
use crate::error::Error;
use crate::proto::{ImageType, Key, OpenParams};

/// AES-XTS with two keys of 128 or of 256 bits.
const KEY_BYTES: [usize; 2] = [32, 64];
/// The pass phrase of a qcow image is the AES key itself, filled up with zeros (QEMU, `qcow_set_key` of 2.x).
const PASS_PHRASE_BYTES: usize = 16;

/// What to open, with its key.
pub(super) fn with_key(opening: &Opening, stdin: &mut dyn Read) -> Result<OpenParams, Error> {
    let mut params = (*opening.params).clone();
    if opening.encrypted {
        let mut bytes = Vec::new();
        let most = KEY_BYTES[1] as u64 + 1;
        stdin.take(most).read_to_end(&mut bytes).map_err(|source| Error::File {
            action: "read",
            path: "standard input".into(),
            source,
        })?;
        let key = judge(params.image.kind, bytes)
            .map_err(|message| Error::Refused { errno: Errno::EINVAL as i32, message })?;
        params.key = Some(key);
    }
    Ok(params)
}

/// Takes what was read for a key, if it can be one for such an image.
fn judge(kind: ImageType, mut bytes: Vec<u8>) -> Result<Key, String> {
    if matches!(kind.name(), "qcow" | "qcow2") {
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if bytes.is_empty() || bytes.len() > PASS_PHRASE_BYTES {
            return Err(format!(
                "the pass phrase on standard input must have 1 to {PASS_PHRASE_BYTES} bytes"
            ));
        }
    } else if !KEY_BYTES.contains(&bytes.len()) {
        let [short, long] = KEY_BYTES;
        return Err(format!("the key on standard input must have just {short} or {long} bytes"));
    }
    Ok(Key::new(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ImageSpec;

    fn read(bytes: &[u8]) -> Result<OpenParams, Error> {
        let image: ImageSpec = "vhd:/a".parse().unwrap();
        let opening = Opening { params: Box::new(OpenParams::new(image)), encrypted: true };
        with_key(&opening, &mut &bytes[..])
    }

    #[test]
    fn a_key_has_32_or_64_bytes_any_of_them() {
        for len in [32, 64] {
            assert_eq!(read(&vec![b'\n'; len]).unwrap().key, Some(Key::new(vec![b'\n'; len])));
        }
        for len in [0, 16, 31, 33, 63, 65, 100] {
            assert_eq!(read(&vec![7; len]).unwrap_err().errno(), 22, "{len}");
        }
    }

    #[test]
    fn without_the_option_nothing_is_read() {
        struct Untouched;
        impl Read for Untouched {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                panic!("nobody asked for a key")
            }
        }
        let params = OpenParams::new("vhd:/a".parse().unwrap());
        let opening = Opening { params: Box::new(params.clone()), encrypted: false };
        assert_eq!(with_key(&opening, &mut Untouched).unwrap(), params);
    }
}
