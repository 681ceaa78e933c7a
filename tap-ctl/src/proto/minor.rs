//! How VBDs are named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Names one VBD on this host: the number N of the marker file `tapdisk-N`. 0 to 16383.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Minor(pub u16);

impl Minor {
    /// The highest minor.
    pub const MAX: Minor = Minor(16383);
}

/// A string that is no decimal number from 0 to 16383.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no minor: minors are numbers from 0 to {max}", max = Minor::MAX)]
pub struct MinorError(String);

impl FromStr for Minor {
    type Err = MinorError;

    fn from_str(text: &str) -> Result<Minor, MinorError> {
        // The standard parser also takes a leading plus sign.
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|&number| digits && number <= Minor::MAX.0);
        number.map(Minor).ok_or_else(|| MinorError(text.to_owned()))
    }
}

impl fmt::Display for Minor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minors_are_0_to_16383_and_nothing_else() {
        assert_eq!("0".parse(), Ok(Minor(0)));
        assert_eq!("16383".parse(), Ok(Minor::MAX));
        for text in ["", "16384", "-1", "+1", "1 ", "0x1", "70000"] {
            assert!(text.parse::<Minor>().is_err(), "{text:?}");
        }
    }
}
