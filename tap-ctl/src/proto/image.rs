//! How images are named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The format of an image, as the part of `type:path` before the colon. Never guessed from content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// A raw file or block device.
    Aio,
    /// The same through the page cache, each write on the disk before it is answered: for stores that refuse O_DIRECT.
    Sync,
    /// A VHD with its chain of parents.
    Vhd,
    /// A qcow image, version 1.
    Qcow,
    /// A qcow2 image, version 2 or 3.
    Qcow2,
    /// A VMDK: its descriptor, or the file of a monolithic one.
    Vmdk,
    /// A disk that an NBD server has. What stands for the path is its address.
    Nbd,
    /// A disk in memory. What stands for the path is its size, or a file with what it holds at first.
    Ram,
    /// A text file that names the images of a chain, the leaf first, one `type:path` a line.
    #[serde(rename = "x-chain")]
    XChain,
    /// No file at all: reads give zeros, writes are forgotten. It costs nothing but the way to the image, for measuring
    /// just that. What stands for the path is its size in bytes, see [`null_size`].
    Null,
}

impl ImageType {
    /// The name in `type:path`.
    pub fn name(self) -> &'static str {
        match self {
            ImageType::Aio => "aio",
            ImageType::Sync => "sync",
            ImageType::Vhd => "vhd",
            ImageType::Qcow => "qcow",
            ImageType::Qcow2 => "qcow2",
            ImageType::Vmdk => "vmdk",
            ImageType::Nbd => "nbd",
            ImageType::Ram => "ram",
            ImageType::XChain => "x-chain",
            ImageType::Null => "null",
        }
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<ImageType> {
        ImageType::ALL.into_iter().find(|kind| kind.name() == name)
    }

    const ALL: [ImageType; 10] = [
        ImageType::Aio,
        ImageType::Sync,
        ImageType::Vhd,
        ImageType::Qcow,
        ImageType::Qcow2,
        ImageType::Vmdk,
        ImageType::Nbd,
        ImageType::Ram,
        ImageType::XChain,
        ImageType::Null,
    ];
}

/// An image as users name it: `type:path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The format.
    pub kind: ImageType,
    /// The path; any characters, `:` and blanks included. For [`ImageType::Null`] the size.
    pub path: String,
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.name(), self.path)
    }
}

/// Why a string is no [`ImageSpec`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageSpecError {
    /// There is no `:`.
    #[error("{0:?} is no image: write type:path, for example vhd:/srv/debian.vhd")]
    NoType(String),
    /// The type is not known.
    #[error(
        "unknown image type {0:?}: known are aio (raw), sync, vhd, qcow, qcow2, vmdk, nbd, ram, x-chain and null"
    )]
    UnknownType(String),
    /// Nothing follows the colon.
    #[error("the image {0:?} has an empty path")]
    EmptyPath(String),
    /// What follows `null:` is no size.
    #[error(
        "{0:?} is no size of a null image: write bytes, a multiple of 512, or a number with K, M, G or T"
    )]
    BadSize(String),
}

impl FromStr for ImageSpec {
    type Err = ImageSpecError;

    fn from_str(text: &str) -> Result<ImageSpec, ImageSpecError> {
        // An NBD URI with the scheme that names a socket stands for itself.
        if text.starts_with("nbd+unix://") {
            return Ok(ImageSpec { kind: ImageType::Nbd, path: text.to_owned() });
        }
        let (kind, path) = text.split_once(':').ok_or_else(|| ImageSpecError::NoType(text.to_owned()))?;
        let kind = ImageType::from_name(kind).ok_or_else(|| ImageSpecError::UnknownType(kind.to_owned()))?;
        if path.is_empty() {
            return Err(ImageSpecError::EmptyPath(text.to_owned()));
        }
        if kind == ImageType::Null && null_size(path).is_none() {
            return Err(ImageSpecError::BadSize(path.to_owned()));
        }
        Ok(ImageSpec { kind, path: path.to_owned() })
    }
}

/// The size of a null image, in bytes: a decimal number, alone or followed by K, M, G or T for a power of 1024. `None` if it
/// is none, 0, no multiple of 512, or more than 2⁶³ − 1.
pub fn null_size(text: &str) -> Option<u64> {
    let shift = match text.bytes().last()? {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { text.get(..text.len().checked_sub(1)?)? };
    // The standard parser also takes a leading plus sign.
    let number: u64 = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    let size = number.checked_mul(1 << shift)?;
    (size > 0 && size.is_multiple_of(512) && i64::try_from(size).is_ok()).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_spec_keeps_colons_and_blanks_of_the_path() {
        let spec: ImageSpec = "vhd:/srv/a b:c.vhd".parse().unwrap();
        assert_eq!(spec.path, "/srv/a b:c.vhd");
        assert_eq!(spec.to_string(), "vhd:/srv/a b:c.vhd");
    }

    #[test]
    fn image_spec_without_known_type_is_refused() {
        assert!(matches!("/srv/a.vhd".parse::<ImageSpec>(), Err(ImageSpecError::NoType(_))));
        assert!(matches!("raw:/srv/a".parse::<ImageSpec>(), Err(ImageSpecError::UnknownType(_))));
        assert!(matches!("vhd:".parse::<ImageSpec>(), Err(ImageSpecError::EmptyPath(_))));
    }

    #[test]
    fn an_nbd_uri_is_an_image() {
        for (text, path) in [
            ("nbd+unix:///disk?socket=/run/a", "nbd+unix:///disk?socket=/run/a"),
            ("nbd://host:1/disk", "//host:1/disk"),
            ("nbd:unix:/run/a:disk", "unix:/run/a:disk"),
        ] {
            let spec: ImageSpec = text.parse().unwrap();
            assert_eq!((spec.kind, &*spec.path), (ImageType::Nbd, path));
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }

    #[test]
    fn null_image_has_a_size_for_a_path() {
        let spec: ImageSpec = "null:64G".parse().unwrap();
        assert_eq!((spec.kind, null_size(&spec.path)), (ImageType::Null, Some(64 << 30)));
        assert_eq!(spec.to_string(), "null:64G");
        for (text, size) in [("512", 512), ("1K", 1024), ("3M", 3 << 20), ("1T", 1 << 40)] {
            assert_eq!(null_size(text), Some(size), "{text}");
        }
        for text in
            ["0", "K", "1k", "513", "-1", "+512", "1 K", "1KK", "99999999T", "9223372036854775808", "é"]
        {
            assert_eq!(null_size(text), None, "{text}");
            assert!(matches!(format!("null:{text}").parse::<ImageSpec>(), Err(ImageSpecError::BadSize(_))));
        }
    }
}
