//! The XenStore wire codec and a blocking client.
//!
//! XenStore is the small tree of keys that the toolstack, the backends and the guests of a Xen host share. A
//! [`Client`] is one connection to its daemon: requests block for their reply, watch events that arrive meanwhile are
//! queued, and the connection can be polled ([`std::os::fd::AsFd`]) by an event loop.
//!
//! The parts, from the wire upwards:
//!
//! - [`wire`]: message types, limits and error names;
//! - [`codec`]: framing, without I/O: any byte pattern is a frame, a wish for more, or an error;
//! - [`payload`]: what stands inside the messages;
//! - [`path`]: which paths the daemon accepts, and how bytes are shown in messages;
//! - [`value`]: strict parsing of numbers that somebody else wrote;
//! - [`client`]: the connection.
//!
//! The codec and the payload parsers serve both ends, so that a simulated daemon speaks exactly this protocol.
//!
//! Protocol facts are from Xen's `xen/include/public/io/xs_wire.h` and `docs/misc/xenstore.txt`, and, where those two
//! are silent, from the behaviour of the daemon in `tools/xenstored`.

#![forbid(unsafe_code)]

pub mod client;
pub mod codec;
mod error;
pub mod path;
pub mod payload;
mod permission;
mod transport;
pub mod value;
pub mod wire;

pub use client::{Client, TxId, WatchEvent};
pub use error::{Error, Operation};
pub use permission::{Access, Permission};
