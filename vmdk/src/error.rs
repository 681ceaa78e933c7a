//! The one error type of the crate.

use std::io;

use format::{FormatError, Sector};

/// Why an image could not be opened, read, written or made. The crate never knows the name of the file it works on; callers
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
    #[error("{0} are not supported; convert the image first")]
    Unsupported(String),
    /// A kind of image that can only be read was opened for writing.
    #[error("{0} can only be read; open it read-only or convert it")]
    OnlyRead(&'static str),
    /// An entry of a table points somewhere it must not.
    #[error("the image is corrupt at sector {sector}: {reason}; check it with 'tap-img check'")]
    Corrupt {
        /// A sector that cannot be reached.
        sector: Sector,
        /// What is wrong.
        reason: &'static str,
    },
    /// A compressed grain cannot be unpacked.
    #[error("the compressed grain at byte {offset} is damaged: {reason}")]
    BadGrain {
        /// Where it lies, in bytes.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// No room for another grain: an extent ends at 2 TiB.
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
    /// Sectors beyond the end of the extent.
    #[error("{count} sectors at {sector} reach beyond the extent of {sectors} sectors")]
    OutOfRange {
        /// First sector asked for.
        sector: Sector,
        /// Number of sectors asked for.
        count: u32,
        /// Size of the extent.
        sectors: u64,
    },
}

impl Error {
    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }
}

impl FormatError for Error {
    fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Invalid { .. } | Self::OutOfRange { .. } => libc::EINVAL,
            Self::TooBig { .. } => libc::EFBIG,
            Self::Unsupported(_) => libc::ENOTSUP,
            Self::OnlyRead(_) | Self::ReadOnly => libc::EROFS,
            Self::Corrupt { .. } | Self::BadGrain { .. } | Self::Poisoned => libc::EIO,
            Self::NoSpace { .. } => libc::ENOSPC,
        }
    }
}
