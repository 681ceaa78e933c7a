//! Opening images for a tool.

use tap_ctl::proto::{ImageSpec, ImageType, Key, OpenParams};
use tapdisk::image::{Disk, OpenError};
use tapdisk::io::Io;

/// The format of this name: one of tapdisk's, or what QEMU calls it (`raw`, `vpc`).
pub fn format_named(name: &str) -> Option<ImageType> {
    match name {
        "raw" => Some(ImageType::Aio),
        "vpc" => Some(ImageType::Vhd),
        other => ImageType::from_name(other),
    }
}

/// What a format is called in the output.
pub fn format_name(kind: ImageType) -> &'static str {
    if kind == ImageType::Aio { "raw" } else { kind.name() }
}

/// An image to be opened.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its format and where it is.
    pub spec: ImageSpec,
    /// Through the page cache, where the file may be already.
    pub cached: bool,
    /// The key or pass phrase of an encrypted one.
    pub key: Option<Key>,
}

impl Image {
    /// An image that is not encrypted, past the page cache.
    pub fn new(kind: ImageType, path: &str) -> Image {
        Image { spec: ImageSpec { kind, path: path.to_owned() }, cached: false, key: None }
    }

    /// Opens it with its chain; to write too, if `writable`.
    ///
    /// # Errors
    /// Those of [`tapdisk::image::open`].
    pub fn open(&self, io: &Io, writable: bool) -> Result<Disk, OpenError> {
        let params = OpenParams {
            readonly: !writable,
            buffered: self.cached,
            key: self.key.clone(),
            ..OpenParams::new(self.spec.clone())
        };
        tapdisk::image::open(&params, io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_go_by_both_names() {
        assert_eq!(format_named("raw"), Some(ImageType::Aio));
        assert_eq!(format_named("vpc"), format_named("vhd"));
        assert_eq!(format_named("qcow2"), Some(ImageType::Qcow2));
        assert_eq!(format_named("VHD"), None);
        assert_eq!(format_name(ImageType::Aio), "raw");
    }
}
