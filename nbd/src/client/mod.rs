//! A client: [`Handshake`] until an export is in use, then [`Session`] for requests and replies.
//!
//! Nothing that a server sends makes either panic, and neither keeps more than a few KiB of it.

mod handshake;
mod reply;
mod session;

pub use self::handshake::{Handshake, HandshakeError};
pub use self::reply::Violation;
pub use self::session::{Ask, Outcome, Session, Slot, Step, disconnect};
use crate::flags::TransmissionFlags;

/// Bytes of a request without its payload.
pub const REQUEST_LEN: usize = size_of::<crate::wire::Request>();

/// An export that is in use, as the server has described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes; at most 2⁶³ − 1.
    pub size: u64,
    /// What it is and can do.
    pub flags: TransmissionFlags,
    /// Whether reads are answered in chunks.
    pub structured: bool,
    /// The number of the metadata context `base:allocation`, if the server has it.
    pub allocation: Option<u32>,
    /// The sizes of its blocks.
    pub blocks: Blocks,
}

/// The sizes of an export's blocks in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// A power of two to 64 KiB: positions and lengths are multiples of it.
    pub minimum: u32,
    /// A power of two.
    pub preferred: u32,
    /// The longest payload; at least `minimum`.
    pub maximum: u32,
}

impl Default for Blocks {
    /// What holds where a server says nothing.
    fn default() -> Blocks {
        Blocks { minimum: 1, preferred: 4096, maximum: crate::MAX_PAYLOAD }
    }
}
