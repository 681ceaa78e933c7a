//! qcow2 against models, crashes, malformed images and QEMU's tools.

mod checks;
mod malformed;
mod qemu;
mod support;
