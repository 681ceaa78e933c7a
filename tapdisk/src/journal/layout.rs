//! Where what stands in a journal. Words have 64 bits and the host's byte order: a journal never leaves its host.
//!
//! | word | holds |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | layout of the entries, and number of slots |
//! | 2 | the ring's counter of responses: as it was, and as it was to be next |
//! | 8 + 16 n | entry n, first word: its state |
//! | 9 + 16 n | the position at which the request was taken |
//! | 10 + 16 n … | the request, as it stood on the ring |

use blkif::abi::MAX_ENTRY_SIZE;
use blkif::{Abi, RawRequest};

/// Says what this is, and the release of the layout.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"xeniojr1");
pub(super) const MAGIC_WORD: usize = 0;
pub(super) const SHAPE_WORD: usize = 1;
pub(super) const PUBLISHED_WORD: usize = 2;
/// A cache line for the head, two for each entry.
pub(super) const FIRST_ENTRY: usize = 8;
const ENTRY_WORDS: usize = 16;
const WORD: usize = size_of::<u64>();
const REQUEST_WORDS: usize = MAX_ENTRY_SIZE / WORD;

const _: () = assert!(MAX_ENTRY_SIZE.is_multiple_of(WORD) && 2 + REQUEST_WORDS <= ENTRY_WORDS);

const TAKEN: u64 = 1;
const ANSWERED: u64 = 2;

/// Words of a journal of a ring with so many slots.
pub(super) fn words(slots: u32) -> usize {
    FIRST_ENTRY + slots as usize * ENTRY_WORDS
}

/// What stands for a kind of ring.
pub(super) fn shape(abi: Abi, slots: u32) -> u64 {
    let layout = match abi {
        Abi::X86_64 => 64,
        Abi::X86_32 => 32,
    };
    layout << 32 | u64::from(slots)
}

/// The first word of an entry.
pub(super) fn entry(number: u16) -> usize {
    FIRST_ENTRY + usize::from(number) * ENTRY_WORDS
}

/// The position in the second word of an entry.
pub(super) fn index(word: u64) -> u32 {
    low(word)
}

/// The state of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Taken,
    /// The answer stands at this position of the ring.
    Answered(u32),
}

impl State {
    pub fn pack(self) -> u64 {
        match self {
            State::Free => 0,
            State::Taken => TAKEN << 32,
            State::Answered(position) => ANSWERED << 32 | u64::from(position),
        }
    }

    pub fn unpack(word: u64) -> State {
        match word >> 32 {
            TAKEN => State::Taken,
            ANSWERED => State::Answered(low(word)),
            _ => State::Free,
        }
    }
}

/// The ring's counter of responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// As it was, or still is.
    pub before: u32,
    /// As it is, or was to be next.
    pub after: u32,
}

impl Head {
    pub fn pack(self) -> u64 {
        u64::from(self.before) << 32 | u64::from(self.after)
    }

    pub fn unpack(word: u64) -> Head {
        Head { before: low(word >> 32), after: low(word) }
    }
}

fn low(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The words of a request.
pub(super) fn request_words(request: &RawRequest) -> impl Iterator<Item = u64> {
    let (words, _) = request.copy().as_chunks::<WORD>();
    words.iter().map(|bytes| u64::from_ne_bytes(*bytes))
}

/// The request in the entry whose first word is `at`.
pub(super) fn request(load: impl Fn(usize) -> u64, at: usize, abi: Abi) -> RawRequest {
    let mut bytes = [0; MAX_ENTRY_SIZE];
    let (words, _) = bytes.as_chunks_mut::<WORD>();
    for (number, word) in words.iter_mut().enumerate() {
        *word = load(at + 2 + number).to_ne_bytes();
    }
    RawRequest::new(bytes, abi)
}
