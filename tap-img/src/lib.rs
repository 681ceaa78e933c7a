//! Copying and creating images of every format that tapdisk serves, through tapdisk's own images: many requests in flight,
//! past the page cache, and nothing moved that is zeros.
//!
//! | module | concern |
//! |---|---|
//! | [`copy`] | all of one disk to another; comparing two |
//! | [`create`] | new images |
//! | [`source`] | opening images for a tool, by names that say their format |
//! | [`progress`] | how far it is, on a terminal |
//! | [`xen`] | what the qcow tools of Xen's blktap share |
//!
//! A tool's whole work is one task on [`tapdisk::alone::run`].

#![forbid(unsafe_code)]

pub mod copy;
pub mod create;
pub mod progress;
pub mod source;
pub mod xen;

/// Bytes of buffers that [`copy::copy`] and [`copy::compare`] need, for [`tapdisk::alone::run`].
pub const BUFFERS: usize = 2 * copy::WORKERS * tapdisk::buf::MAX_DATA;
