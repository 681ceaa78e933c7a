//! The NBD server of a disk, at `nbd<pid>.<minor>` in the runtime folder.
//!
//! ```text
//!  control server (main thread)              a thread for each handshake          the disk's thread
//!  accepts, never waits              ──────> at most 10 s, at most 8 at a time ──> 16 tasks for each connection
//! ```
//!
//! Requests go to the same [`Disk`](crate::image::Disk) as those of the guests, so a flush on any connection covers all that
//! was answered on any other, and on the rings. A paused disk makes clients wait. Each connection has memory of its own: one
//! that never takes its replies stops itself only.

pub mod door;
mod serve;
mod stream;

use std::os::fd::OwnedFd;

use nbd::client::Blocks;
use nbd::flags::TransmissionFlags;
use nbd::server::{Agreed, Offer};
use tap_ctl::proto::DiskInfo;

pub(crate) use self::serve::{Clients, Source};

/// The name of the export, as XenServer's tapdisk has it. Any other name means the same.
const NAME: &str = "tapdisk_client";

/// A client whose handshake is over.
#[derive(Debug)]
pub struct Client {
    /// Its connection, in blocking mode, without deadlines.
    pub socket: OwnedFd,
    /// What it was offered.
    pub offer: Offer,
    /// What was agreed on.
    pub agreed: Agreed,
}

/// What a disk is to its NBD clients.
fn offer(info: &DiskInfo) -> Offer {
    let writable = TransmissionFlags::FUA | TransmissionFlags::WRITE_ZEROES | TransmissionFlags::FLUSH;
    let always = TransmissionFlags::HAS_FLAGS | TransmissionFlags::MULTI_CONN | TransmissionFlags::CACHE;
    Offer {
        name: NAME,
        size: info.sectors.saturating_mul(512),
        flags: always
            .with(writable, !info.readonly)
            .with(TransmissionFlags::TRIM, !info.readonly && info.discard.is_some())
            .with(TransmissionFlags::READ_ONLY, info.readonly),
        blocks: Blocks { minimum: 512, preferred: 4096, maximum: nbd::MAX_PAYLOAD },
    }
}
