//! The NBD protocol, for clients and servers, without I/O.
//!
//! The source of every number and rule here is the protocol's description, `doc/proto.md` of the NBD project. What is spoken
//! is the *fixed newstyle* handshake with structured replies and the metadata context `base:allocation`; the old
//! style and extended headers are not, and of TLS only what comes before it.
//!
//! | module | what |
//! |---|---|
//! | [`wire`] | structures and numbers as they are sent |
//! | [`flags`] | sets of flags |
//! | [`error`] | the errors that may be sent, and their errno |
//! | [`address`] | how a server and an export are named |
//! | [`client`] | a client's handshake, and its requests and replies |
//! | [`server`] | the same for a server |

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod address;
pub mod client;
pub mod error;
pub mod flags;
pub mod server;
pub mod wire;

pub use self::address::{Address, Place};
pub use self::error::ErrorCode;

/// The longest name of an export in bytes.
pub const MAX_NAME: usize = 4096;

/// The most payload of a request or reply, in bytes, that a peer takes which has not said otherwise.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The port of servers that name none.
pub const PORT: u16 = 10809;

/// The metadata context that tells holes and zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";
