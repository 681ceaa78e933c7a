//! Bit arrays as VHD stores them: bit 0 is the most significant bit of byte 0.

use std::ops::Range;

/// Value of one bit; bits beyond the slice are clear.
pub fn get(bits: &[u8], bit: u32) -> bool {
    let byte = bits.get(index(bit)).copied().unwrap_or(0);
    byte & mask(bit) != 0
}

/// Sets the bits of `range`; those beyond the slice are ignored.
pub fn set(bits: &mut [u8], range: Range<u32>) {
    let mut bit = range.start;
    while bit < range.end {
        let Some(byte) = bits.get_mut(index(bit)) else { return };
        if bit & 7 == 0 && range.end.saturating_sub(bit) >= 8 {
            *byte = 0xff;
            bit = bit.saturating_add(8);
        } else {
            *byte |= mask(bit);
            bit = bit.saturating_add(1);
        }
    }
}

/// Value of the bit `range.start`, and how many bits of `range` have that value before the first that has not.
pub fn run(bits: &[u8], range: Range<u32>) -> (bool, u32) {
    let value = get(bits, range.start);
    let whole = if value { 0xff } else { 0 };
    let mut bit = range.start;
    while bit < range.end {
        let byte = bits.get(index(bit)).copied().unwrap_or(0);
        if bit & 7 == 0 && byte == whole {
            bit = bit.saturating_add(8);
        } else if (byte & mask(bit) != 0) == value {
            bit = bit.saturating_add(1);
        } else {
            break;
        }
    }
    (value, bit.min(range.end).saturating_sub(range.start))
}

/// True if the first `count` bits are set.
pub fn all_set(bits: &[u8], count: u32) -> bool {
    run(bits, 0..count) == (true, count)
}

/// How many of the first `count` bits are set.
pub fn count(bits: &[u8], count: u32) -> u32 {
    let whole = bits.iter().take(index(count)).map(|byte| byte.count_ones()).fold(0, u32::saturating_add);
    (count & !7..count).filter(|&bit| get(bits, bit)).fold(whole, |sum, _| sum.saturating_add(1))
}

/// Clears in `bits` every bit that is set in `other`; returns whether there was one.
pub fn clear(bits: &mut [u8], other: &[u8]) -> bool {
    let mut changed = false;
    for (to, from) in bits.iter_mut().zip(other) {
        changed |= *to & from != 0;
        *to &= !from;
    }
    changed
}

/// Sets in `bits` every bit that is set in `other`.
pub fn merge(bits: &mut [u8], other: &[u8]) {
    for (to, from) in bits.iter_mut().zip(other) {
        *to |= from;
    }
}

fn index(bit: u32) -> usize {
    usize::try_from(bit >> 3).unwrap_or(usize::MAX)
}

fn mask(bit: u32) -> u8 {
    0x80 >> (bit & 7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_bit_is_the_most_significant() {
        let mut bits = [0; 2];
        set(&mut bits, 0..1);
        set(&mut bits, 9..11);
        assert_eq!(bits, [0x80, 0x60]);
    }

    #[test]
    fn nothing_happens_beyond_the_end() {
        let mut bits = [0; 1];
        set(&mut bits, 6..100);
        assert_eq!(bits, [3]);
        assert!(!get(&bits, 8) && !all_set(&bits, 9));
        assert_eq!(run(&[0xff], 0..16), (true, 8));
    }

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_booleans(
            ranges in prop::collection::vec((0_u32..200, 0_u32..60), 0..12), from in 0_u32..200, len in 1_u32..200
        ) {
            let mut model = vec![false; 400];
            let mut bits = [0; 50];
            for (start, len) in ranges {
                model[start as usize..(start + len) as usize].fill(true);
                set(&mut bits, start..start + len);
            }
            for bit in 0..400 {
                prop_assert_eq!(get(&bits, bit), model[bit as usize]);
            }
            let window = &model[from as usize..(from + len) as usize];
            let same = window.iter().take_while(|&&b| b == window[0]).count();
            prop_assert_eq!(run(&bits, from..from + len), (window[0], u32::try_from(same).unwrap()));
            let ones = model[..from as usize].iter().filter(|&&b| b).count();
            prop_assert_eq!(count(&bits, from), u32::try_from(ones).unwrap());
            prop_assert_eq!(all_set(&bits, from), ones == from as usize && from > 0);
        }
    }
}
