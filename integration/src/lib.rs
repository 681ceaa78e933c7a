//! Simulated Xen, the real-Xen testbed, end-to-end tests and benches.

#![deny(unsafe_code)]

pub mod rig;
pub mod sim;
