//! Malformed images, made of good ones by chance.

use std::time::{Duration, Instant};

use super::{Memory, Random, SECTOR, stamps};
use crate::Format;
use crate::blocking::{Blocking, nothing};

/// A malformed image that keeps us busy for so long is a fault of ours. Only looked at when fuzzing for a time.
const PATIENCE: Duration = Duration::from_secs(20);

/// Calls `round` with one generator after another: `rounds` times, or, if the environment variable `FUZZ_SECONDS` is set, for
/// so long and with other seeds each time. A seed with which it panics, or takes longer than 20 seconds, is named; `SEED=n`
/// runs only that one.
pub fn fuzz_for(rounds: u64, mut round: impl FnMut(&mut Random)) {
    let timed = std::env::var("FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let Some(seconds) = timed else { return super::seeds(rounds, round) };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() << 32;
    let first = seed;
    while Instant::now() < end {
        let begun = Instant::now();
        super::random::named(seed, &mut round);
        assert!(begun.elapsed() < PATIENCE, "SEED={seed} took {:?}", begun.elapsed());
        seed += 1;
    }
    eprintln!("{} rounds", seed - first);
}

/// Changes some bytes of some images into one that is malformed somewhere.
pub fn mutate(seeds: &[Memory], random: &mut Random) -> Memory {
    let mut image = seeds[random.below(seeds.len())].clone();
    image.log.clear();
    // A wild offset must not take all memory.
    image.room = 64 << 20;
    for _ in 0..=random.below(6) {
        if image.bytes.is_empty() {
            break;
        }
        change(&mut image.bytes, seeds, random);
    }
    image
}

fn change(bytes: &mut Vec<u8>, seeds: &[Memory], random: &mut Random) {
    // Headers first: what is behind them is mostly data.
    let reach = random.pick(&[80, 512, 4096, 1 << 16, usize::MAX]).min(bytes.len());
    let at = random.below(reach);
    match random.below(8) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        2 | 3 => {
            let number = number(bytes.len() as u64, random);
            let width = random.pick(&[2, 4, 8]);
            let big = number.to_be_bytes();
            let little = number.to_le_bytes();
            let text = if random.once_in(2) { &big[8 - width..] } else { &little[..width] };
            put(bytes, at / width * width, text);
        }
        4 => {
            // Another table's entry, or a part of another image.
            let other = &seeds[random.below(seeds.len())].bytes;
            let from = random.below(other.len().min(1 << 16)) / 8 * 8;
            let len = random.pick(&[8, 64, 512]).min(other.len() - from);
            put(bytes, at / 8 * 8, &other[from..from + len]);
        }
        5 => {
            let mut noise = vec![0; random.pick(&[4, 16, 512])];
            random.fill(&mut noise);
            put(bytes, at, &noise);
        }
        6 => bytes.truncate(random.below(bytes.len()) + 1),
        _ => bytes.extend(std::iter::repeat_n(0, random.below(1 << 16))),
    }
}

/// A number that is interesting as an offset, a count or a shift.
fn number(len: u64, random: &mut Random) -> u64 {
    let base =
        random.pick(&[0, 1, 512, 4096, 1 << 16, 1 << 31, 1 << 32, 1 << 55, 1 << 62, 1 << 63, len, len / 512]);
    let base = if random.once_in(4) { u64::MAX } else { base };
    base.wrapping_add(random.up_to(3)).wrapping_sub(1)
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    let len = what.len().min(bytes.len() - at);
    bytes[at..at + len].copy_from_slice(&what[..len]);
}

/// Uses an image that may be malformed in every way; it may refuse anything, but not panic, nor do what no image asks for.
pub fn exercise<F: Format>(core: F, storage: Memory, random: &mut Random) {
    let mut image = Blocking::new(core, storage);
    for _ in 0..8 {
        let sectors = image.core().sectors();
        let first = random.pick(&[0, sectors / 2, sectors.saturating_sub(9), random.clone().up_to(sectors)]);
        let count = 1 + random.up_to(100).min(sectors.saturating_sub(first));
        // Errors are what malformed images are for.
        let _ = match random.below(7) {
            0..=2 => image.read(first, &mut vec![0; usize::try_from(count).unwrap() * SECTOR], &mut nothing),
            3 | 4 => image.write(first, &stamps(first, count.min(1 << 20), 1), &mut nothing),
            5 => image.discard(first, count),
            _ if random.once_in(4) => image.resize(sectors.saturating_add(random.up_to(1000))),
            _ => image.flush(),
        };
    }
    let _ = image.close();
}
