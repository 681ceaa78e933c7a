//! The names of logs.

use std::fmt;
use std::str::FromStr;

/// A UUID; all zeros: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

/// A string that is no UUID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no UUID: write 8, 4, 4, 4 and 12 hexadecimal digits with hyphens between")]
pub struct UuidError(String);

/// Where in the 16 bytes a hyphen precedes.
const HYPHENS: [usize; 4] = [4, 6, 8, 10];

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if HYPHENS.contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Uuid, UuidError> {
        parse(text.as_bytes()).ok_or_else(|| UuidError(text.to_owned()))
    }
}

fn parse(mut text: &[u8]) -> Option<Uuid> {
    let mut uuid = Uuid::default();
    for (at, byte) in uuid.0.iter_mut().enumerate() {
        if HYPHENS.contains(&at) {
            text = text.strip_prefix(b"-")?;
        }
        let ([high, low], rest) = text.split_first_chunk()?;
        *byte = (digit(*high)? << 4) | digit(*low)?;
        text = rest;
    }
    text.is_empty().then_some(uuid)
}

fn digit(byte: u8) -> Option<u8> {
    u8::try_from(char::from(byte).to_digit(16)?).ok()
}
