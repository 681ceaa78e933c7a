//! Sets of flags: a number on the wire, of which unknown bits are kept.

use std::fmt;
use std::ops::BitOr;

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident: $($(#[$doc:meta])* $flag:ident = $bit:literal;)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u16);

        impl $name {
            $($(#[$doc])* pub const $flag: $name = $name(1 << $bit);)*

            /// All that are known.
            pub const ALL: $name = $name($(1 << $bit)|*);

            /// Whether all of `others` are set.
            pub fn has(self, others: $name) -> bool {
                self.0 & others.0 == others.0
            }

            /// Those that are not among `others`.
            #[must_use]
            pub fn without(self, others: $name) -> $name {
                $name(self.0 & !others.0)
            }

            /// `others` too, if `set`.
            #[must_use]
            pub fn with(self, others: $name, set: bool) -> $name {
                if set { $name(self.0 | others.0) } else { self }
            }

            /// Whether none is set.
            pub fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl BitOr for $name {
            type Output = $name;

            fn bitor(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

flags! {
    /// What server (16 bits) and client (the low half of 32 bits) say of the handshake.
    HandshakeFlags:
    /// Any option may be sent, and each is answered.
    FIXED_NEWSTYLE = 0;
    /// No padding behind the answer to [`wire::OptionCode::ExportName`](crate::wire::OptionCode::ExportName).
    NO_ZEROES = 1;
}

flags! {
    /// What an export is and can do.
    TransmissionFlags:
    /// Always set.
    HAS_FLAGS = 0;
    /// Writes are refused.
    READ_ONLY = 1;
    /// FLUSH is understood.
    FLUSH = 2;
    /// The flag FUA is understood.
    FUA = 3;
    /// It seeks slowly.
    ROTATIONAL = 4;
    /// TRIM is understood.
    TRIM = 5;
    /// WRITE_ZEROES is understood.
    WRITE_ZEROES = 6;
    /// A read may ask to be answered in one piece.
    DF = 7;
    /// A flush on one connection covers the writes that were answered on any.
    MULTI_CONN = 8;
    /// CACHE is understood.
    CACHE = 10;
    /// The flag FAST_ZERO is understood.
    FAST_ZERO = 11;
}

flags! {
    /// How a request is to be carried out.
    CommandFlags:
    /// What is written is durable before the answer.
    FUA = 0;
    /// Zeros are to take room.
    NO_HOLE = 1;
    /// A read is to be answered in one piece.
    DF = 2;
    /// One extent is enough.
    REQ_ONE = 3;
    /// Fail if zeroing is no faster than writing.
    FAST_ZERO = 4;
}

flags! {
    /// Of a chunk of a structured reply.
    ChunkFlags:
    /// The last of its reply.
    DONE = 0;
}
