//! Node permissions.

use crate::value::parse_u16;

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing; `n` on the wire.
    None,
    /// Read; `r` on the wire.
    Read,
    /// Write; `w` on the wire.
    Write,
    /// Read and write; `b` on the wire.
    ReadWrite,
}

impl Access {
    /// Whether reading is among it.
    #[must_use]
    pub fn may_read(self) -> bool {
        matches!(self, Access::Read | Access::ReadWrite)
    }

    /// Whether writing is among it.
    #[must_use]
    pub fn may_write(self) -> bool {
        matches!(self, Access::Write | Access::ReadWrite)
    }

    fn letter(self) -> char {
        match self {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::ReadWrite => 'b',
        }
    }

    fn from_letter(letter: u8) -> Option<Access> {
        match letter {
            b'n' => Some(Access::None),
            b'r' => Some(Access::Read),
            b'w' => Some(Access::Write),
            b'b' => Some(Access::ReadWrite),
            _ => None,
        }
    }
}

/// One entry of a node's permission list.
///
/// The first entry of the list is special: its domain *owns* the node and may do everything with it, and its access
/// is what every domain without an entry of its own gets. Domain 0 may always do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permission {
    /// The domain the entry is about.
    pub domid: u16,
    /// What it may do; in the first entry, what all others may do.
    pub access: Access,
}

impl Permission {
    /// An entry.
    #[must_use]
    pub fn new(domid: u16, access: Access) -> Permission {
        Permission { domid, access }
    }

    /// The wire form: a letter and a decimal domain id, such as `r5`.
    #[must_use]
    pub fn to_wire(self) -> Vec<u8> {
        format!("{}{}", self.access.letter(), self.domid).into_bytes()
    }

    /// The entry with the wire form `bytes` (without its NUL), or `None` if they are not one.
    #[must_use]
    pub fn from_wire(bytes: &[u8]) -> Option<Permission> {
        let (&letter, digits) = bytes.split_first()?;
        Some(Permission { domid: parse_u16(digits).ok()?, access: Access::from_letter(letter)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_come_back_from_the_wire(domid: u16, letter in prop::sample::select(b"nrwb".to_vec())) {
            let entry = Permission::new(domid, Access::from_letter(letter).expect("one of the four"));
            prop_assert_eq!(Permission::from_wire(&entry.to_wire()), Some(entry));
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for wire in ["", "r", "x5", "r-1", "r65536", "r 5", "5r", "r5 "] {
            assert_eq!(Permission::from_wire(wire.as_bytes()), None, "{wire:?}");
        }
    }

    #[test]
    fn letters_mean_what_the_protocol_says() {
        let both =
            [(b'n', (false, false)), (b'r', (true, false)), (b'w', (false, true)), (b'b', (true, true))];
        for (letter, expected) in both {
            let access = Access::from_letter(letter).expect("one of the four");
            assert_eq!((access.may_read(), access.may_write()), expected);
        }
    }
}
