//! The format's core against images in memory: random use, stops at any moment, malformed images.

mod crash;
mod malformed;
mod model;
mod qemu;
mod support;
mod tools;
