//! The one error type of the crate.

use std::io;

use crate::{BlockIndex, Sector, Uuid};

/// Why an image could not be opened, read, written or made.
///
/// The crate never knows the name of the file it works on; callers add it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The closure that reads the image failed.
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
    /// A file could not be written.
    #[error("cannot write the {what}: {source}")]
    Unwritten {
        /// Which one.
        what: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Told to stop here, as storage managers' tests do.
    #[error("Failing at {point}")]
    Stopped {
        /// The name of the place.
        point: &'static str,
    },
    /// The file cannot hold even a footer.
    #[error("{size} bytes are too few for a VHD, which has a footer of 512")]
    TooShort {
        /// Length of the file in bytes.
        size: u64,
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
        /// Its value in the image.
        value: u64,
        /// The largest accepted value.
        limit: u64,
    },
    /// The footer carries the mark of an unfinished journalled operation.
    #[error("an operation that was cut short has left a journal: run 'vhd-util revert' with it first")]
    JournalPending,
    /// The image is encrypted and no key can be given.
    #[error("the image is encrypted; without its key only ciphertext could be read")]
    Encrypted,
    /// A key was given to an image that is not encrypted.
    #[error("the image is not encrypted, but a key was given")]
    NotEncrypted,
    /// The image is encrypted with another key.
    #[error("the key is not the one that the image was encrypted with")]
    WrongKey,
    /// A block allocation table entry points somewhere it must not.
    #[error("block {block} is corrupt: {reason}; run 'vhd-util check'")]
    Corrupt {
        /// The block whose entry is wrong.
        block: BlockIndex,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No room for another block: the device is full or a block would pass 2 TiB.
    #[error("no space for another block behind byte {end}")]
    NoSpace {
        /// End of the data so far, in bytes.
        end: u64,
    },
    /// An earlier metadata write failed; the image takes no writes until it is opened again.
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
    /// The path of a new parent does not fit where the old one stands.
    #[error("the path of the parent does not fit into the {space} bytes of its locator")]
    NameTooLong {
        /// The room in bytes.
        space: usize,
    },
    /// A differencing image with no usable name of its parent.
    #[error("no parent locator holds a usable name")]
    NoParentName,
    /// The image found under the parent's name is another one than when the child was made.
    #[error("parent uuid changed: expected {expected}, found {found}")]
    ParentChanged {
        /// The uuid that the child's header names.
        expected: Uuid,
        /// The uuid of the image found.
        found: Uuid,
    },
    /// An image is its own ancestor.
    #[error("the chain of parents is a loop")]
    Loop,
    /// More layers than allowed.
    #[error("the chain of parents is deeper than {limit} images")]
    TooDeep {
        /// The largest accepted number of images.
        limit: u32,
    },
    /// A parent that the policy does not let an image name.
    #[error("parent {path} is not permitted: {reason}")]
    Forbidden {
        /// The path as resolved.
        path: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
}

impl Error {
    /// The positive errno that stands for this error in exit codes and replies.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } | Self::Unwritten { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            // What libvhd answers when the footer cannot be read in full.
            Self::TooShort { .. } | Self::Corrupt { .. } | Self::Poisoned => libc::EIO,
            Self::Invalid { .. }
            | Self::Stopped { .. }
            | Self::Encrypted
            | Self::NotEncrypted
            | Self::OutOfRange { .. }
            | Self::NoParentName
            | Self::ParentChanged { .. } => libc::EINVAL,
            Self::NameTooLong { .. } => libc::ENAMETOOLONG,
            Self::WrongKey => libc::ENOKEY,
            Self::TooBig { .. } => libc::EFBIG,
            Self::JournalPending => libc::EBUSY,
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
            Self::Loop | Self::TooDeep { .. } => libc::ELOOP,
            Self::Forbidden { .. } => libc::EPERM,
        }
    }

    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { what, reason: reason.into() }
    }
}
