//! What can go wrong with a qcow2 image.

use std::io;

use format::{FormatError, Sector};

/// Why an image could not be opened, read, written or made.
///
/// The crate never knows the name of the file it works on; callers add it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image could not be read.
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
    /// Larger than is accepted.
    #[error("{what} of {value} exceeds the limit of {limit}")]
    TooBig {
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest accepted value.
        limit: u64,
    },
    /// The image uses something that is not served.
    #[error("the image uses {feature}, which is not supported")]
    NotSupported {
        /// What it uses.
        feature: String,
    },
    /// The data lie in another file.
    #[error("the image keeps its data in another file; a file that an image names is never opened")]
    DataFile,
    /// The image is encrypted.
    #[error("the image is encrypted with AES; give its key")]
    NeedsKey,
    /// A key for an image without encryption: its data would be taken for what they are not.
    #[error("a key is given, but the image is not encrypted")]
    NotEncrypted,
    /// The dirty bit is set: reference counts may be wrong.
    #[error("the image was not closed properly and needs its reference counts rebuilt ('tap-img check -r')")]
    NeedsRepair,
    /// The corrupt bit is set.
    #[error("the image is marked corrupt; it can be read, but not written before it was repaired")]
    MarkedCorrupt,
    /// Metadata point where they must not.
    #[error("the image is corrupt: {what} ({value:#x}) {reason}; run 'tap-img check'")]
    Corrupt {
        /// The entry at fault.
        what: &'static str,
        /// Its value, or the place that it names.
        value: u64,
        /// The rule that is broken.
        reason: &'static str,
    },
    /// No room for another cluster.
    #[error("no space for another cluster behind byte {end}")]
    NoSpace {
        /// End of what is in use, in bytes.
        end: u64,
    },
    /// An earlier metadata write failed.
    #[error("an earlier metadata write failed; writes are refused until the image is opened again")]
    Poisoned,
    /// A write to an image that was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// Sectors beyond the end of the virtual disk.
    #[error("{count} sectors at {sector} reach beyond the disk of {sectors} sectors")]
    OutOfRange {
        /// First sector asked for.
        sector: Sector,
        /// Number of sectors asked for.
        count: u32,
        /// Size of the disk.
        sectors: u64,
    },
    /// A compressed cluster does not unpack to one cluster.
    #[error("the compressed cluster at byte {offset} is damaged: {reason}")]
    Packed {
        /// Where it lies.
        offset: u64,
        /// What the decoder found.
        reason: &'static str,
    },
}

impl Error {
    pub(super) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }

    pub(super) fn unsupported(feature: impl Into<String>) -> Self {
        Self::NotSupported { feature: feature.into() }
    }

    pub(super) fn corrupt(what: &'static str, value: u64, reason: &'static str) -> Self {
        Self::Corrupt { what, value, reason }
    }
}

impl FormatError for Error {
    fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Invalid { .. } | Self::OutOfRange { .. } | Self::NotEncrypted => libc::EINVAL,
            Self::TooBig { .. } => libc::EFBIG,
            Self::NotSupported { .. } => libc::ENOTSUP,
            Self::DataFile => libc::EPERM,
            Self::NeedsKey => libc::ENOKEY,
            Self::NeedsRepair => libc::EUCLEAN,
            Self::MarkedCorrupt => libc::EACCES,
            Self::Corrupt { .. } | Self::Poisoned | Self::Packed { .. } => libc::EIO,
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
        }
    }
}
