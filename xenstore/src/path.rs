//! Which paths the daemon accepts, and how bytes from elsewhere are shown to people.
//!
//! A path that the daemon would refuse, or that would end a string early by a NUL, is refused here, before it is
//! sent: such a path was usually pieced together from a value that somebody else wrote. The rules are those of
//! `docs/misc/xenstore.txt` and of `canonicalize` in `tools/xenstored/core.c`.

use std::fmt;

use crate::wire::{ABSOLUTE_PATH_MAX, RELATIVE_PATH_MAX};

/// Why a path is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The path has no byte.
    #[error("it is empty")]
    Empty,
    /// The path is longer than the protocol allows.
    #[error("it has {len} bytes, the limit is {max}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes for a path of its kind (absolute or relative).
        max: usize,
    },
    /// The path has a byte outside `A-Z a-z 0-9 - / _ @`.
    #[error("byte 0x{byte:02x} at offset {offset} is not allowed in a path")]
    Character {
        /// The offending byte.
        byte: u8,
        /// Where it stands, in bytes.
        offset: usize,
    },
    /// The path ends in a slash and is not the root.
    #[error("it ends with a slash")]
    TrailingSlash,
    /// Two slashes follow each other.
    #[error("it has two slashes in a row")]
    DoubleSlash,
    /// The path is `@something` where only nodes of the tree make sense.
    #[error("a special name cannot be used here")]
    Special,
}

/// What a path is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathUse {
    /// To name a node of the tree.
    Node,
    /// To be watched, or to have permissions: special names such as `@releaseDomain` count as well.
    NodeOrSpecial,
}

/// Checks `path` for the given use.
///
/// # Errors
///
/// The first rule that the path breaks.
pub fn check(path: &[u8], needed: PathUse) -> Result<(), PathError> {
    let first = *path.first().ok_or(PathError::Empty)?;
    let max = if first == b'/' || first == b'@' { ABSOLUTE_PATH_MAX } else { RELATIVE_PATH_MAX };
    if path.len() > max {
        return Err(PathError::TooLong { len: path.len(), max });
    }
    if let Some((offset, &byte)) = path.iter().enumerate().find(|&(_, &byte)| !is_allowed(byte)) {
        return Err(PathError::Character { byte, offset });
    }
    if first == b'@' && needed == PathUse::Node {
        return Err(PathError::Special);
    }
    if path != b"/" && path.ends_with(b"/") {
        return Err(PathError::TrailingSlash);
    }
    if path.windows(2).any(|pair| pair == b"//") {
        return Err(PathError::DoubleSlash);
    }
    Ok(())
}

fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_' | b'@')
}

/// Shows bytes in a message: printable ASCII as it is, everything else escaped, long ones cut.
///
/// A guest can put terminal control sequences and line breaks into its keys; none of them may reach a log raw.
#[derive(Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

/// How many bytes [`Escaped`] shows.
const SHOWN: usize = 256;

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.get(..SHOWN).unwrap_or(self.0);
        write!(f, "{}", shown.escape_ascii())?;
        match self.0.len().saturating_sub(shown.len()) {
            0 => Ok(()),
            more => write!(f, "... ({more} more bytes)"),
        }
    }
}

impl fmt::Debug for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn usual_paths_pass() {
        for path in ["/", "/local/domain/0/backend/vbd3/1/51712", "backend/vbd3", "a", "/x_-@1"] {
            assert_eq!(check(path.as_bytes(), PathUse::Node), Ok(()), "{path}");
        }
    }

    #[test]
    fn special_names_pass_for_watches_only() {
        assert_eq!(check(b"@releaseDomain", PathUse::NodeOrSpecial), Ok(()));
        assert_eq!(check(b"@releaseDomain/7", PathUse::NodeOrSpecial), Ok(()));
        assert_eq!(check(b"@releaseDomain", PathUse::Node), Err(PathError::Special));
    }

    #[test]
    fn each_rule_refuses_its_own_violation() {
        let cases: [(&[u8], PathError); 8] = [
            (b"", PathError::Empty),
            (b"/a/", PathError::TrailingSlash),
            (b"a/", PathError::TrailingSlash),
            (b"/a//b", PathError::DoubleSlash),
            (b"//", PathError::TrailingSlash),
            (b"/a\0b", PathError::Character { byte: 0, offset: 2 }),
            (b"/a b", PathError::Character { byte: b' ', offset: 2 }),
            (b"/\xff", PathError::Character { byte: 0xff, offset: 1 }),
        ];
        for (path, error) in cases {
            assert_eq!(check(path, PathUse::Node), Err(error), "{:?}", Escaped(path));
        }
    }

    #[test]
    fn the_limits_are_exact_for_absolute_and_relative_paths() {
        let long = |first: char, len: usize| format!("{first}{}", "x".repeat(len - 1)).into_bytes();
        assert_eq!(check(&long('/', 3072), PathUse::Node), Ok(()));
        assert_eq!(check(&long('/', 3073), PathUse::Node), Err(PathError::TooLong { len: 3073, max: 3072 }));
        assert_eq!(check(&long('x', 2048), PathUse::Node), Ok(()));
        assert_eq!(check(&long('x', 2049), PathUse::Node), Err(PathError::TooLong { len: 2049, max: 2048 }));
    }

    #[test]
    fn control_bytes_are_escaped_and_long_ones_cut() {
        assert_eq!(Escaped(b"a\n\x1b[31m\xff").to_string(), "a\\n\\x1b[31m\\xff");
        let long = Escaped(&[b'x'; 300]).to_string();
        assert!(long.ends_with("... (44 more bytes)"), "{long}");
    }

    proptest! {
        #[test]
        fn escaped_bytes_are_one_line_of_printable_ascii(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Escaped(&bytes).to_string().bytes().all(|b| (0x20..0x7f).contains(&b)));
        }

        #[test]
        fn an_accepted_path_never_holds_a_nul(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            if check(&bytes, PathUse::NodeOrSpecial).is_ok() {
                prop_assert!(!bytes.contains(&0));
            }
        }
    }
}
