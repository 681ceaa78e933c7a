//! What a tapdisk says of its disks.

use serde::{Deserialize, Serialize};

use super::{ImageSpec, Minor, RingEntry};

/// A VBD in [`super::Reply::List`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VbdEntry {
    /// Its minor.
    pub minor: Minor,
    /// State bits as XenServer's tapdisk shows them: 0 running or only attached, 2 closed, 0x14 being paused, 0x2a paused.
    pub state: u32,
    /// The open image.
    pub image: Option<ImageSpec>,
    /// The frontends being served.
    pub rings: Vec<RingEntry>,
}

/// What xenio publishes about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Capacity in units of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub sector_size: u32,
    /// Physical block size in bytes.
    pub physical_sector_size: u32,
    /// The image was opened read-only.
    pub readonly: bool,
    /// What a discard may be; `None`: the image cannot discard.
    #[serde(default)]
    pub discard: Option<Discard>,
}

/// What a disk can discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discard {
    /// Smallest unit, in bytes; a power of two from 512 on.
    pub granularity: u32,
    /// Offset of the first unit, in bytes.
    pub alignment: u32,
    /// Whether the old content can be made unreadable.
    pub secure: bool,
}
