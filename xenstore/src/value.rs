//! Strict parsing of numbers in XenStore values.
//!
//! A guest chooses the bytes of its own keys, so a number is accepted only if the whole value is decimal digits:
//! no sign, no blank, no line end, no `0x`, nothing that overflows. Leading zeros are digits like any others (the
//! number stays decimal). A value that is refused is an error of the device it belongs to, nothing more.

/// Why a value is not the number that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The value has no byte.
    #[error("the value is empty, expected a decimal number")]
    Empty,
    /// The value has a byte that is not a decimal digit.
    #[error("byte 0x{byte:02x} at offset {offset} is not a decimal digit")]
    NotADigit {
        /// The offending byte.
        byte: u8,
        /// Where it stands, in bytes.
        offset: usize,
    },
    /// The number is larger than the expected kind of number can be.
    #[error("the number is larger than {max}")]
    TooLarge {
        /// The largest acceptable number.
        max: u64,
    },
}

/// Parses a decimal number of at most 64 bits.
///
/// # Errors
///
/// See [`ValueError`].
pub fn parse_u64(value: &[u8]) -> Result<u64, ValueError> {
    parse_bounded(value, u64::MAX)
}

/// Parses a decimal number of at most 32 bits.
///
/// # Errors
///
/// See [`ValueError`].
pub fn parse_u32(value: &[u8]) -> Result<u32, ValueError> {
    let max = u32::MAX.into();
    u32::try_from(parse_bounded(value, max)?).map_err(|_| ValueError::TooLarge { max })
}

/// Parses a decimal number of at most 16 bits, such as a domain id.
///
/// # Errors
///
/// See [`ValueError`].
pub fn parse_u16(value: &[u8]) -> Result<u16, ValueError> {
    let max = u16::MAX.into();
    u16::try_from(parse_bounded(value, max)?).map_err(|_| ValueError::TooLarge { max })
}

fn parse_bounded(value: &[u8], max: u64) -> Result<u64, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    if let Some((offset, &byte)) = value.iter().enumerate().find(|&(_, &byte)| !byte.is_ascii_digit()) {
        return Err(ValueError::NotADigit { byte, offset });
    }
    let sum = value
        .iter()
        .try_fold(0u64, |sum, &byte| sum.checked_mul(10)?.checked_add(u64::from(byte.wrapping_sub(b'0'))));
    sum.filter(|&number| number <= max).ok_or(ValueError::TooLarge { max })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_are_exact() {
        assert_eq!(parse_u64(b"18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse_u64(b"18446744073709551616"), Err(ValueError::TooLarge { max: u64::MAX }));
        assert_eq!(parse_u32(b"4294967295"), Ok(u32::MAX));
        assert_eq!(parse_u32(b"4294967296"), Err(ValueError::TooLarge { max: 4_294_967_295 }));
        assert_eq!(parse_u16(b"65535"), Ok(u16::MAX));
        assert_eq!(parse_u16(b"65536"), Err(ValueError::TooLarge { max: 65_535 }));
        assert_eq!(parse_u32(b"0"), Ok(0));
        assert_eq!(parse_u32(b"007"), Ok(7));
    }

    #[test]
    fn h43_hostile_numbers_are_errors_not_numbers() {
        for value in ["", "-1", "+1", " 8", "8 ", "8\n", "0x10", "1e3", "8\0", "٣", "1_000"] {
            assert!(parse_u64(value.as_bytes()).is_err(), "{value:?}");
        }
        assert!(parse_u64(&[b'9'; 3000]).is_err());
        assert!(parse_u64(&[0xff, 0xfe]).is_err());
    }

    proptest! {
        #[test]
        fn numbers_come_back(number: u64) {
            prop_assert_eq!(parse_u64(number.to_string().as_bytes()), Ok(number));
        }

        #[test]
        fn any_bytes_agree_with_a_digit_filter_in_front_of_the_standard_parser(
            value in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..24),
                prop::collection::vec(b'0'..=b'9', 0..24),
            ],
        ) {
            let model = std::str::from_utf8(&value)
                .ok()
                .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|text| text.parse::<u32>().ok());
            prop_assert_eq!(parse_u32(&value).ok(), model);
        }
    }
}
