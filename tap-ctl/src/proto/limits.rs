//! How much a disk may do in a second.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The limits of a disk, for all its frontends together, reads and writes alike. 0 stands for no limit, and for a burst of
/// the usual size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Requests in a second.
    pub iops: u64,
    /// Bytes in a second.
    pub bps: u64,
    /// Requests that may be done at once after a time of rest; 0: those of a tenth of a second.
    pub burst_iops: u64,
    /// Bytes that may be moved at once after a time of rest; 0: those of a tenth of a second.
    pub burst_bps: u64,
}

impl Limits {
    /// Whether anything is limited.
    pub fn any(&self) -> bool {
        self.iops > 0 || self.bps > 0
    }

    /// These with what `change` names.
    pub fn changed(self, change: LimitChange) -> Limits {
        Limits {
            iops: change.iops.unwrap_or(self.iops),
            bps: change.bps.unwrap_or(self.bps),
            burst_iops: change.burst_iops.unwrap_or(self.burst_iops),
            burst_bps: change.burst_bps.unwrap_or(self.burst_bps),
        }
    }
}

/// As `--limit` takes it.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { iops, bps, burst_iops, burst_bps } = self;
        write!(f, "iops={iops},bps={bps},burst-iops={burst_iops},burst-bps={burst_bps}")
    }
}

/// A change of limits; `None`: as before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LimitChange {
    /// Of [`Limits::iops`].
    pub iops: Option<u64>,
    /// Of [`Limits::bps`].
    pub bps: Option<u64>,
    /// Of [`Limits::burst_iops`].
    pub burst_iops: Option<u64>,
    /// Of [`Limits::burst_bps`].
    pub burst_bps: Option<u64>,
}

impl LimitChange {
    /// Sets what `name` names, which is one of `iops`, `bps`, `burst-iops` and `burst-bps`, to the number in `text`.
    ///
    /// # Errors
    /// Another name, or no number.
    pub fn set(&mut self, name: &str, text: &str) -> Result<(), LimitError> {
        let field = match name {
            "iops" => &mut self.iops,
            "bps" => &mut self.bps,
            "burst-iops" => &mut self.burst_iops,
            "burst-bps" => &mut self.burst_bps,
            _ => return Err(LimitError::Name(name.to_owned())),
        };
        *field = Some(amount(text).ok_or_else(|| LimitError::Amount(text.to_owned()))?);
        Ok(())
    }
}

/// What cannot be read as a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// No limit is called so.
    #[error("{0:?} is no limit: write iops=N, bps=N, burst-iops=N or burst-bps=N, with commas between them")]
    Name(String),
    /// It is no number.
    #[error(
        "{0:?} is no amount in a second: write a number, alone or followed by K, M, G or T, or 0 for no limit"
    )]
    Amount(String),
}

impl FromStr for LimitChange {
    type Err = LimitError;

    /// `name=number`, with commas between several.
    fn from_str(text: &str) -> Result<LimitChange, LimitError> {
        let mut change = LimitChange::default();
        for part in text.split(',') {
            let (name, number) = part.split_once('=').ok_or_else(|| LimitError::Name(part.to_owned()))?;
            change.set(name, number)?;
        }
        Ok(change)
    }
}

/// A decimal number, alone or followed by K, M, G or T for a power of 1024.
fn amount(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'K') => (text.get(..at)?, 10),
        (at, 'M') => (text.get(..at)?, 20),
        (at, 'G') => (text.get(..at)?, 30),
        (at, 'T') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    // The standard parser also takes a leading plus sign.
    let number: u64 = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_are_shown() {
        let change: LimitChange = "iops=500,bps=10M,burst-bps=1K".parse().unwrap();
        let limits = Limits::default().changed(change);
        assert_eq!(limits, Limits { iops: 500, bps: 10 << 20, burst_iops: 0, burst_bps: 1024 });
        let again: LimitChange = limits.to_string().parse().unwrap();
        assert_eq!(Limits::default().changed(again), limits);
    }

    #[test]
    fn what_is_not_named_stays() {
        let limits = Limits { iops: 5, bps: 6, burst_iops: 7, burst_bps: 8 };
        let change: LimitChange = "iops=0".parse().unwrap();
        assert_eq!(limits.changed(change), Limits { iops: 0, ..limits });
        assert!(!Limits { burst_iops: 7, ..Limits::default() }.any() && limits.any());
    }

    #[test]
    fn nonsense_is_no_limit() {
        for text in
            ["", "iops", "iops=", "iops=-1", "iops=+1", "iops=1k", "reads=1", "iops=1,", "bps=99999999T"]
        {
            assert!(text.parse::<LimitChange>().is_err(), "{text:?}");
        }
    }
}
