//! Parent locators: the names under which a differencing image looks for its parent.
//!
//! Codes and encodings: VHD specification, "Parent Locator Entry". XenServer's libvhd and Microsoft count the space of
//! a locator in bytes although the specification says sectors.

use std::path::PathBuf;

use crate::Error;
use crate::header::RawLocator;

/// Longest name that is read, in bytes.
const MAX_NAME: u32 = 64 * 1024;

/// The kind of a locator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// `MacX`: a `file://` URL in UTF-8.
    MacX,
    /// `W2ku`: an absolute Windows path in UTF-16, low byte first.
    W2ku,
    /// `W2ru`: a relative Windows path in UTF-16, low byte first.
    W2ru,
}

impl Platform {
    /// The kind for a locator's code; `None` for an unused slot and for the kinds nobody writes any more.
    pub fn from_code(code: u32) -> Option<Self> {
        [Self::MacX, Self::W2ku, Self::W2ru].into_iter().find(|kind| kind.code() == code)
    }

    /// The code in a locator.
    pub fn code(self) -> u32 {
        u32::from_be_bytes(match self {
            Self::MacX => *b"MacX",
            Self::W2ku => *b"W2ku",
            Self::W2ru => *b"W2ru",
        })
    }
}

/// One name of the parent, as found in an image: nothing is known of its target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentName {
    /// The kind of locator that it stands in.
    pub platform: Platform,
    /// The name with `/` between its parts, without drive letter or `file://`.
    pub path: PathBuf,
}

/// Where a locator's name lies: byte offset and bytes of room, or `None` if the locator is unused, of an unknown kind
/// or contradicts itself.
pub fn extent(raw: &RawLocator) -> Option<(u64, u64)> {
    Platform::from_code(raw.code.get())?;
    let space = match raw.space.get() {
        0 => return None,
        sectors @ 1..512 => u64::from(sectors).saturating_mul(512),
        bytes if bytes.is_multiple_of(512) => u64::from(bytes),
        _ => return None,
    };
    let length = raw.length.get();
    (u64::from(length) <= space && length <= MAX_NAME && length > 0).then(|| (raw.offset.get(), space))
}

/// The name in the bytes of a locator of kind `platform`; `None` if it is not text, empty or names no file.
pub fn decode(platform: Platform, bytes: &[u8]) -> Option<String> {
    let text = match platform {
        Platform::MacX => {
            let text = std::str::from_utf8(bytes).ok()?;
            text.strip_prefix("file://").unwrap_or(text).to_owned()
        }
        Platform::W2ku | Platform::W2ru => {
            let (pairs, odd) = bytes.as_chunks::<2>();
            if !odd.is_empty() {
                return None;
            }
            let text =
                String::from_utf16(&pairs.iter().map(|&pair| u16::from_le_bytes(pair)).collect::<Vec<_>>())
                    .ok()?;
            let text = text.replace('\\', "/");
            match text.split_at_checked(2) {
                Some((drive, rest)) if is_drive(drive) => rest.to_owned(),
                _ => text,
            }
        }
    };
    (!text.is_empty() && !text.contains('\0')).then_some(text)
}

/// The bytes of a locator of kind `platform` that names `path`, a path with `/` between its parts.
pub fn encode(platform: Platform, path: &str) -> Vec<u8> {
    match platform {
        Platform::MacX => format!("file://{path}").into_bytes(),
        Platform::W2ku | Platform::W2ru => {
            path.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect()
        }
    }
}

/// Checks that a locator of `length` bytes of name fits into one of `space`.
pub(crate) fn checked_length(length: usize, space: u32) -> Result<u32, Error> {
    match u32::try_from(length) {
        Ok(length) if length <= space => Ok(length),
        _ => Err(Error::TooBig { what: "parent path length", value: length as u64, limit: space.into() }),
    }
}

/// Names in the order in which they are to be tried: slot order, but the relative Windows name before a different
/// absolute one, because folders are moved more often than rebuilt.
pub(crate) fn order(mut names: Vec<ParentName>) -> Vec<ParentName> {
    let position = |names: &[ParentName], platform| names.iter().position(|name| name.platform == platform);
    if let (Some(absolute), Some(relative)) =
        (position(&names, Platform::W2ku), position(&names, Platform::W2ru))
        && absolute < relative
    {
        names.swap(absolute, relative);
    }
    names
}

fn is_drive(text: &str) -> bool {
    matches!(text.as_bytes(), [letter, b':'] if letter.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(space: u32, length: u32) -> RawLocator {
        RawLocator {
            code: Platform::MacX.code().into(),
            space: space.into(),
            length: length.into(),
            reserved: 0.into(),
            offset: 3072.into(),
        }
    }

    #[test]
    fn space_is_sectors_below_512_and_bytes_from_there() {
        assert_eq!(extent(&raw(1, 17)), Some((3072, 512)));
        assert_eq!(extent(&raw(512, 17)), Some((3072, 512)));
        assert_eq!(extent(&raw(4096, 600)), Some((3072, 4096)));
    }

    #[test]
    fn m16_locators_that_contradict_themselves_are_skipped() {
        for (space, length) in
            [(0, 1), (513, 1), (u32::MAX, 1), (512, 513), (1, 513), (512, 0), (1 << 30, 1 << 20)]
        {
            assert_eq!(extent(&raw(space, length)), None, "{space} {length}");
        }
        let mut unknown = raw(512, 1);
        unknown.code = u32::from_be_bytes(*b"Wi2k").into();
        assert_eq!(extent(&unknown), None);
    }

    #[test]
    fn m18_names_that_are_no_text_are_skipped() {
        assert_eq!(decode(Platform::W2ku, b"a\0b"), None);
        assert_eq!(decode(Platform::W2ru, &[0x00, 0xd8]), None);
        assert_eq!(decode(Platform::W2ru, b"a\0\0\0b\0"), None);
        assert_eq!(decode(Platform::MacX, b"file://a\0b"), None);
        assert_eq!(decode(Platform::MacX, &[0xff]), None);
        assert_eq!(decode(Platform::MacX, b"file://"), None);
    }

    #[test]
    fn names_of_all_kinds_are_decoded() {
        assert_eq!(decode(Platform::MacX, b"file://./base.vhd").as_deref(), Some("./base.vhd"));
        let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
        assert_eq!(decode(Platform::W2ku, &wide("C:\\vm\\größe.vhd")).as_deref(), Some("/vm/größe.vhd"));
        assert_eq!(decode(Platform::W2ru, &wide(".\\a.vhd")).as_deref(), Some("./a.vhd"));
    }

    #[test]
    fn the_relative_windows_name_comes_first() {
        let name = |platform, path: &str| ParentName { platform, path: path.into() };
        let (mac, abs, rel) =
            (name(Platform::MacX, "m"), name(Platform::W2ku, "/a"), name(Platform::W2ru, "r"));
        assert_eq!(order(vec![mac.clone(), abs.clone(), rel.clone()]), [mac, rel, abs]);
    }

    proptest! {
        #[test]
        fn encoding_and_decoding_agree(name in "[a-zäß0-9. ]{1,20}(/[a-z中.]{1,9}){0,3}") {
            for platform in [Platform::MacX, Platform::W2ku, Platform::W2ru] {
                let bytes = encode(platform, &name);
                prop_assert_eq!(decode(platform, &bytes), Some(name.clone()));
            }
        }
    }
}
