//! The image formats qcow (version 1) and qcow2 (versions 2 and 3), without I/O.

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

pub mod v1;
pub mod v2;
