//! The control protocol of tapdisk: what `tap-ctl`, `xenio` and the tapdisk itself say to each other.
//!
//! | module | holds |
//! |---|---|
//! | [`proto`] | the messages |
//! | [`frame`] | how messages lie on the socket |
//! | [`dir`] | the runtime folder: sockets, markers, minor numbers |

pub mod dir;
pub mod frame;
pub mod proto;

pub use dir::ControlDir;
pub use proto::{Minor, Reply, Request};
