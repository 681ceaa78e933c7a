//! Image identifiers.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A 128-bit identifier, stored and printed in RFC 4122 byte order as libuuid does.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(transparent)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// The identifier of all zeros; as a parent's identifier it means "a raw file" (an extension of blktap).
    pub const NULL: Self = Self([0; 16]);

    /// Makes a version 4 (random) identifier of 16 random bytes.
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
        *version = (*version & 0x0f) | 0x40;
        *variant = (*variant & 0x3f) | 0x80;
        Self(bytes)
    }

    /// True for the identifier of all zeros.
    pub fn is_null(&self) -> bool {
        *self == Self::NULL
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_in_groups_of_8_4_4_4_12() {
        let uuid = Uuid(*b"\x3b\x92\x22\x53\xe8\x65\x4a\xff\x86\xd0\x4f\x44\x80\xac\x67\xb3");
        assert_eq!(uuid.to_string(), "3b922253-e865-4aff-86d0-4f4480ac67b3");
    }

    #[test]
    fn random_identifiers_carry_version_and_variant() {
        assert_eq!(Uuid::from_random([0xff; 16]).to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(Uuid::from_random([0; 16]).to_string(), "00000000-0000-4000-8000-000000000000");
        assert!(Uuid::NULL.is_null() && !Uuid::from_random([0; 16]).is_null());
    }
}
