//! The real programs on files that record what is done to them: wherever the machine had stopped, whatever part of the
//! writes since the last flush had reached the disk, and in whatever order, nothing that was flushed is lost, everything else
//! is old or new, and the image is in order.

mod guest;
mod recorder;
mod snapshot;
mod tools;

#[path = "../../../qcow/tests/v2/support.rs"]
mod qcow2_support;
/// What the formats' own tests check images by.
#[path = "../../../qcow/tests/v1/support.rs"]
#[expect(dead_code, reason = "shared with the format's own tests, which use all of it")]
mod qcow_support;
#[path = "../../../vhd/tests/core/support.rs"]
mod vhd_support;
#[path = "../../../vmdk/tests/sparse/support.rs"]
#[expect(dead_code, reason = "shared with the format's own tests, which use all of it")]
mod vmdk_support;

/// Whether a test cannot run here. On a CI host it must.
fn skipped() -> bool {
    let Some(reason) = recorder::missing() else { return false };
    assert!(std::env::var_os("CI").is_none(), "no test may be skipped here: {reason}");
    eprintln!("skipped: {reason}");
    true
}
