//! The real programs on files that record what is done to them, by both engines: wherever the machine had stopped, whatever part of the
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

use recorder::Folder;

/// A folder that records; `None` where there can be none. On a CI host there must be one.
fn folder() -> Option<Folder> {
    let error = match Folder::mount() {
        Ok(folder) => return Some(folder),
        Err(error) => error,
    };
    assert!(std::env::var_os("CI").is_none(), "no test may be skipped here: FUSE: {error}");
    eprintln!("skipped: FUSE (only root can use it here): {error}");
    None
}
