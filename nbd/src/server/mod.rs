//! A server: [`Welcome`] until a client uses the export, then [`judge`] for each of its requests.
//!
//! With TLS a [`Guard`] comes first; TLS itself is for others.
//!
//! There is one export. Whatever name a client asks for, it gets that one, as with XenServer's tapdisk.

mod guard;
mod options;
mod request;
mod welcome;

pub use self::guard::Guard;
pub use self::options::Goodbye;
pub use self::request::{Job, Judged, chunk_header, error_reply, judge, simple_header};
pub use self::welcome::{Agreed, Welcome};
use crate::client::Blocks;
use crate::flags::TransmissionFlags;

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The name in a list of exports.
    pub name: &'static str,
    /// Bytes.
    pub size: u64,
    /// What it can do; [`TransmissionFlags::DF`] is added where it applies.
    pub flags: TransmissionFlags,
    /// The sizes of its blocks.
    pub blocks: Blocks,
}

/// The number of the metadata context `base:allocation`.
pub const CONTEXT: u32 = 1;
