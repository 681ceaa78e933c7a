//! The one error type of version 1.

use std::io;

use format::{FormatError, Sector};

/// Why an image could not be opened, read, written or made. The core never knows the name of the file it works on; callers
/// add it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the image failed.
    #[error("cannot read {what} at byte {offset}: {source}")]
    Io {
        /// The structure that was wanted.
        what: &'static str,
        /// Where it lies, in bytes.
        offset: u64,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A structure breaks a rule of the format.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// The structure at fault.
        what: &'static str,
        /// The rule that is broken.
        reason: String,
    },
    /// Valid, but larger than this implementation accepts.
    #[error("{what} of {value} exceeds the limit of {limit}")]
    TooBig {
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest accepted value.
        limit: u64,
    },
    /// Something that this implementation does not do.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The image is encrypted and there is no key.
    #[error("the image is encrypted and needs its key")]
    KeyMissing,
    /// There is a key for an image that is not encrypted.
    #[error("the image is not encrypted; open it without a key")]
    KeyUnneeded,
    /// An entry of a table points somewhere it must not, or a compressed cluster is damaged.
    #[error("the image is corrupt at sector {sector}: {reason}; check it with 'tap-img check'")]
    Corrupt {
        /// A sector that cannot be reached.
        sector: Sector,
        /// What is wrong.
        reason: &'static str,
    },
    /// A compressed cluster cannot be unpacked.
    #[error("the compressed cluster at byte {offset} is damaged: {reason}")]
    BadCluster {
        /// Where it lies, in bytes.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// No room for another cluster.
    #[error("no space for {len} bytes behind byte {end}")]
    NoSpace {
        /// End of the image so far, in bytes.
        end: u64,
        /// Bytes that were wanted.
        len: u64,
    },
    /// An earlier metadata write failed.
    #[error("an earlier metadata write failed; writes are refused until the image is opened again")]
    Poisoned,
    /// A write to an image that was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// Sectors beyond the end of the disk.
    #[error("{count} sectors at {sector} reach beyond the disk of {sectors} sectors")]
    OutOfRange {
        /// First sector asked for.
        sector: Sector,
        /// Number of sectors asked for.
        count: u32,
        /// Size of the disk.
        sectors: u64,
    },
}

impl Error {
    pub(super) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }
}

impl FormatError for Error {
    fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Invalid { .. } | Self::OutOfRange { .. } | Self::KeyUnneeded => libc::EINVAL,
            Self::TooBig { .. } => libc::EFBIG,
            Self::Unsupported(_) => libc::ENOTSUP,
            Self::KeyMissing => libc::ENOKEY,
            Self::Corrupt { .. } | Self::BadCluster { .. } | Self::Poisoned => libc::EIO,
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
        }
    }
}
