//! The values of options.

use crate::proto::{ImageSpec, ImageType, Minor};
use crate::top::Sort;

/// The words that tapdisk takes for an I/O engine.
const ENGINES: [&str; 3] = ["auto", "uring", "pool"];

pub(super) fn pid(text: &str) -> Result<i32, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|&pid| digits && pid > 0);
    number.ok_or_else(|| format!("{text:?} is no process id"))
}

pub(super) fn seconds(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|&seconds: &u32| seconds > 0);
    number.map(u64::from).ok_or_else(|| format!("{text:?} is no number of seconds above 0"))
}

/// Bytes of a size in MiB, the unit of vhd-util.
pub(super) fn mebibytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|&number: &u64| digits && number > 0);
    let bytes = number.and_then(|number| number.checked_mul(1 << 20));
    bytes.ok_or_else(|| format!("{text:?} is no size in MiB"))
}

pub(super) fn engine(text: &str) -> Result<&'static str, String> {
    let known = ENGINES.into_iter().find(|name| *name == text);
    known.ok_or_else(|| format!("{text:?} is no I/O engine: write uring, pool or auto"))
}

/// The tapdisk works in another folder than its caller; an absolute path stays as it was given, because scripts
/// look it up again as the same text.
pub(super) fn absolute(path: String) -> String {
    if path.starts_with('/') {
        return path;
    }
    let joined =
        std::path::absolute(&path).ok().and_then(|joined| joined.into_os_string().into_string().ok());
    joined.unwrap_or(path)
}

/// An image with an absolute path, where it has one.
pub(super) fn absolute_image(mut image: ImageSpec) -> ImageSpec {
    let named = match image.kind {
        ImageType::Null | ImageType::Nbd => false,
        // What begins with a number is a size.
        ImageType::Ram => !image.path.starts_with(|first: char| first.is_ascii_digit()),
        _ => true,
    };
    if named {
        image.path = absolute(image.path);
    }
    image
}

/// What names an image of a type, which may be unknown, as [`absolute_image`] would have it.
pub(super) fn absolute_of(kind: Option<&str>, path: String) -> String {
    match kind.and_then(ImageType::from_name) {
        Some(kind) => absolute_image(ImageSpec { kind, path }).path,
        None => absolute(path),
    }
}

pub(super) fn image(text: &str) -> Result<ImageSpec, String> {
    text.parse().map_err(|error: crate::proto::ImageSpecError| error.to_string())
}

pub(super) fn minor(text: &str) -> Result<Minor, String> {
    text.parse().map_err(|error: crate::proto::MinorError| error.to_string())
}

/// Of requests. 0 is XenServer's word for the usual one.
pub(super) fn timeout(text: &str) -> Result<u32, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| digits);
    number.ok_or_else(|| format!("{text:?} is no number of seconds"))
}

/// Of tables.
pub(super) fn times(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|&times: &u32| times > 0 && !text.starts_with('+'));
    number.ok_or_else(|| format!("{text:?} is no number above 0"))
}

/// Of a table.
pub(super) fn sort(text: &str) -> Result<Sort, String> {
    Sort::named(text).ok_or_else(|| {
        let names = Sort::ALL.map(|(_, _, name)| name);
        format!("{text:?} is nothing to sort by: write one of {}", names.join(", "))
    })
}
