//! What stands inside messages: mostly strings that each end with a NUL.
//!
//! Builders do not check their arguments for NULs; [`crate::path::check`] does, before a builder sees them.

use crate::codec::ProtocolError;
use crate::permission::Permission;
use crate::wire::MessageType;

/// Joins `parts`, each followed by a NUL.
#[must_use]
pub fn join_strings<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut payload = Vec::new();
    for part in parts {
        payload.extend_from_slice(part);
        payload.push(0);
    }
    payload
}

/// The payload of WRITE: the path, a NUL, and the value's bytes as they are.
#[must_use]
pub fn write(path: &[u8], value: &[u8]) -> Vec<u8> {
    let mut payload = join_strings([path]);
    payload.extend_from_slice(value);
    payload
}

/// The payload of SET_PERMS: the path and the wire form of each entry.
#[must_use]
pub fn set_perms(path: &[u8], permissions: &[Permission]) -> Vec<u8> {
    let entries: Vec<Vec<u8>> = permissions.iter().map(|entry| entry.to_wire()).collect();
    join_strings(std::iter::once(path).chain(entries.iter().map(Vec::as_slice)))
}

/// Splits a payload of NUL-terminated strings; `None` if bytes follow the last NUL.
#[must_use]
pub fn split_strings(payload: &[u8]) -> Option<Vec<&[u8]>> {
    match payload.split_last() {
        None => Some(Vec::new()),
        Some((0, strings)) => Some(strings.split(|&byte| byte == 0).collect()),
        Some(_) => None,
    }
}

/// The one string of a payload, with or without its NUL (daemons differ in a few replies).
#[must_use]
pub fn single_string(payload: &[u8]) -> &[u8] {
    payload.strip_suffix(b"\0").unwrap_or(payload)
}

/// The path and the token of a WATCH_EVENT. Further strings are room for extensions and ignored.
///
/// # Errors
///
/// [`ProtocolError::Payload`] if there are fewer than two strings.
pub fn watch_event(payload: &[u8]) -> Result<(&[u8], &[u8]), ProtocolError> {
    let strings = split_strings(payload).unwrap_or_default();
    match strings.as_slice() {
        [path, token, ..] => Ok((path, token)),
        _ => Err(malformed(MessageType::WatchEvent, "it is not a path and a token")),
    }
}

/// The entries in a GET_PERMS reply; at least one, the owner's.
///
/// # Errors
///
/// [`ProtocolError::Payload`] for anything else.
pub fn permissions(payload: &[u8]) -> Result<Vec<Permission>, ProtocolError> {
    let strings = split_strings(payload).unwrap_or_default();
    let entries: Option<Vec<Permission>> = strings.into_iter().map(Permission::from_wire).collect();
    entries
        .filter(|entries| !entries.is_empty())
        .ok_or_else(|| malformed(MessageType::GetPerms, "it is not a list of permissions"))
}

/// A part of a long list of children.
#[derive(Debug, PartialEq, Eq)]
pub struct DirectoryPart<'a> {
    /// Changes whenever the list changes: parts with different ones do not belong together.
    pub generation: &'a [u8],
    /// Some of the names, each with its NUL. Its length is how far the next part's offset lies behind this one's.
    pub names: &'a [u8],
    /// Whether the list ends here.
    pub last: bool,
}

/// The payload of a DIRECTORY_PART reply.
///
/// An empty string after the names marks the end of the list (`send_directory_part` in `tools/xenstored/core.c`).
///
/// # Errors
///
/// [`ProtocolError::Payload`] without a generation, with a torn name, or with a part that neither has a name nor
/// ends the list: asking on would never end.
pub fn directory_part(payload: &[u8]) -> Result<DirectoryPart<'_>, ProtocolError> {
    let bad = |reason| malformed(MessageType::DirectoryPart, reason);
    let end = payload.iter().position(|&byte| byte == 0).ok_or_else(|| bad("it has no generation"))?;
    let (generation, rest) = payload.split_at(end);
    let rest = rest.get(1..).unwrap_or_default();
    let (names, last) = match rest {
        [0] => (&[][..], true),
        [names @ .., 0] if names.ends_with(b"\0") => (names, true),
        [.., 0] => (rest, false),
        [] => return Err(bad("it has no name and is not the last part")),
        _ => return Err(bad("a name is cut off")),
    };
    Ok(DirectoryPart { generation, names, last })
}

/// The names in a DIRECTORY reply.
///
/// # Errors
///
/// [`ProtocolError::Payload`] if the last name is cut off or a name is empty.
pub fn directory(payload: &[u8]) -> Result<Vec<Vec<u8>>, ProtocolError> {
    let names =
        split_strings(payload).ok_or_else(|| malformed(MessageType::Directory, "a name is cut off"))?;
    if names.iter().any(|name| name.is_empty()) {
        return Err(malformed(MessageType::Directory, "a name is empty"));
    }
    Ok(names.into_iter().map(<[u8]>::to_vec).collect())
}

fn malformed(kind: MessageType, reason: &'static str) -> ProtocolError {
    ProtocolError::Payload { kind, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::permission::Access;
    use proptest::prelude::*;

    #[test]
    fn a_written_value_is_not_terminated() {
        assert_eq!(write(b"/a", b"1\0\xff"), b"/a\x001\0\xff");
        assert_eq!(write(b"/a", b""), b"/a\0");
    }

    #[test]
    fn permissions_go_out_and_come_in() {
        let list = [Permission::new(0, Access::None), Permission::new(5, Access::ReadWrite)];
        let payload = set_perms(b"/a", &list);
        assert_eq!(payload, b"/a\0n0\0b5\0");
        assert_eq!(permissions(&payload[3..]), Ok(list.to_vec()));
        for bad in [&b""[..], b"n0", b"n0\0x1\0", b"\0"] {
            assert!(permissions(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn watch_events_need_two_strings_and_tolerate_more() {
        assert_eq!(watch_event(b"p\0t\0"), Ok((&b"p"[..], &b"t"[..])));
        assert_eq!(watch_event(b"p\0\0"), Ok((&b"p"[..], &b""[..])));
        assert_eq!(watch_event(b"p\0t\0more\0"), Ok((&b"p"[..], &b"t"[..])));
        for bad in [&b""[..], b"p\0", b"p\0t", b"p"] {
            assert!(watch_event(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn directory_parts_know_their_end() {
        let part = |names, last| Ok(DirectoryPart { generation: b"17", names, last });
        assert_eq!(directory_part(b"17\0a\0bc\0"), part(b"a\0bc\0", false));
        assert_eq!(directory_part(b"17\0a\0bc\0\0"), part(b"a\0bc\0", true));
        assert_eq!(directory_part(b"17\0\0"), part(b"", true));
        for bad in [&b""[..], b"17", b"17\0", b"17\0ab"] {
            assert!(directory_part(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn directories_hold_whole_names_only() {
        assert_eq!(directory(b""), Ok(vec![]));
        assert_eq!(directory(b"a\0b\0"), Ok(vec![b"a".to_vec(), b"b".to_vec()]));
        assert!(directory(b"a\0b").is_err());
        assert!(directory(b"a\0\0").is_err());
    }

    proptest! {
        #[test]
        fn strings_come_back(parts in prop::collection::vec(prop::collection::vec(1u8.., 0..9), 0..9)) {
            let payload = join_strings(parts.iter().map(Vec::as_slice));
            let back = split_strings(&payload).expect("it ends with a NUL");
            prop_assert_eq!(back, parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }

        #[test]
        fn no_reply_payload_panics(payload in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..40)) {
            let _ = (directory(&payload), directory_part(&payload), permissions(&payload), watch_event(&payload));
        }
    }
}
