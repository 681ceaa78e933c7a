//! Version 1 against models, crashes, malformed images and QEMU's tools.

mod checks;
mod create;
mod malformed;
mod qemu;
mod support;
mod xen;
