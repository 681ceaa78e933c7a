//! Structures and numbers as they are sent; all integers are big-endian.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a server says first: the letters `NBDMAGIC`.
pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Begins every option: the letters `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// What stands in place of [`OPTION_MAGIC`] in the greeting of an old-style server.
pub const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Zeros behind [`ExportTail`], unless both sides have agreed to leave them out.
pub const EXPORT_PADDING: usize = 124;

/// A structure with a fixed length.
pub trait Fixed: FromBytes + KnownLayout + Immutable + Sized {
    /// Bytes on the wire.
    const LEN: usize = size_of::<Self>();

    /// The structure that `bytes` begin with; `None` if there are too few.
    fn take(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(taken, _)| taken)
    }
}

/// What a server says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// [`HandshakeFlags`](crate::flags::HandshakeFlags).
    pub flags: U16,
}

/// Before the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// [`OptionCode`].
    pub option: U32,
    /// Bytes of data.
    pub len: U32,
}

/// Before the data of an answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// [`OptionReply`].
    pub kind: U32,
    /// Bytes of data.
    pub len: U32,
}

/// The answer to EXPORT_NAME.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExportTail {
    /// Bytes of the export.
    pub size: U64,
    /// [`TransmissionFlags`](crate::flags::TransmissionFlags).
    pub flags: U16,
}

/// Information on an export: size and abilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoExport {
    /// [`info::EXPORT`].
    pub kind: U16,
    /// Bytes of the export.
    pub size: U64,
    /// [`TransmissionFlags`](crate::flags::TransmissionFlags).
    pub flags: U16,
}

/// Information on an export: the sizes of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`info::BLOCK_SIZE`].
    pub kind: U16,
    /// Positions and lengths are multiples of this.
    pub minimum: U32,
    /// Are best multiples of this.
    pub preferred: U32,
    /// The longest payload.
    pub maximum: U32,
}

/// A request; the payload of a write follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`CommandFlags`](crate::flags::CommandFlags).
    pub flags: U16,
    /// [`Command`].
    pub command: U16,
    /// Comes back with the reply.
    pub cookie: U64,
    /// Byte position.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// A simple reply; the payload of a read follows unless there is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Simple {
    /// [`SIMPLE_MAGIC`].
    pub magic: U32,
    /// 0, or an [`ErrorCode`](crate::ErrorCode).
    pub error: U32,
    /// Of the request.
    pub cookie: U64,
}

/// Before the content of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Chunk {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`ChunkFlags`](crate::flags::ChunkFlags).
    pub flags: U16,
    /// One of the numbers in [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: U64,
    /// Bytes of content.
    pub len: U32,
}

/// The content of a chunk that stands for zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Hole {
    /// Byte position on the disk.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// Before the text of a chunk that reports an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkError {
    /// An [`ErrorCode`](crate::ErrorCode).
    pub error: U32,
    /// Bytes of text.
    pub len: U16,
}

/// A run of bytes of which a metadata context says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: U32,
    /// For `base:allocation`: [`extent::HOLE`], [`extent::ZERO`].
    pub flags: U32,
}

impl Fixed for Greeting {}
impl Fixed for OptionHeader {}
impl Fixed for OptionReplyHeader {}
impl Fixed for ExportTail {}
impl Fixed for InfoExport {}
impl Fixed for InfoBlockSize {}
impl Fixed for Request {}
impl Fixed for Simple {}
impl Fixed for Chunk {}
impl Fixed for Hole {}
impl Fixed for ChunkError {}
impl Fixed for Extent {}

/// Kinds of information on an export.
pub mod info {
    /// Size and abilities; always sent.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// The sizes of its blocks.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Kinds of chunks. Those from 2¹⁵ on are errors.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data: the byte position, then the bytes.
    pub const DATA: u16 = 1;
    /// Zeros, see [`Hole`](super::Hole).
    pub const HOLE: u16 = 2;
    /// The number of a metadata context, then [`Extent`](super::Extent)s.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error, see [`ChunkError`](super::ChunkError).
    pub const ERROR: u16 = 1 << 15 | 1;
    /// An error at a byte position, which follows the text.
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

/// Flags of an [`Extent`] in the context `base:allocation`.
pub mod extent {
    /// Takes no room.
    pub const HOLE: u32 = 1;
    /// Reads as zeros.
    pub const ZERO: u32 = 2;
}

macro_rules! numbers {
    ($(#[$meta:meta])* $name:ident $kind:ty: $($(#[$doc:meta])* $item:ident = $number:expr,)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($kind)]
        pub enum $name {
            $($(#[$doc])* $item = $number,)*
        }

        impl $name {
            /// The number to send.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the numbers are small")]
            pub const fn number(self) -> $kind {
                self as isize as $kind
            }

            /// What a number means; `None` if it is not known.
            pub fn from_number(number: $kind) -> Option<$name> {
                $(if number == $name::$item.number() {
                    return Some($name::$item);
                })*
                None
            }
        }
    };
}

numbers! {
    /// What a client asks for in the handshake.
    OptionCode u32:
    /// Use this export; no answer but [`ExportTail`].
    ExportName = 1,
    /// End.
    Abort = 2,
    /// Name all exports.
    List = 3,
    /// Encrypt.
    StartTls = 5,
    /// Tell of an export.
    Info = 6,
    /// Use an export.
    Go = 7,
    /// Answer in chunks.
    StructuredReply = 8,
    /// Which metadata contexts are there?
    ListMetaContext = 9,
    /// Use metadata contexts.
    SetMetaContext = 10,
    /// Use 64-bit lengths.
    ExtendedHeaders = 11,
}

/// The bit of answers that refuse.
pub const REFUSED: u32 = 1 << 31;

numbers! {
    /// How an option is answered.
    OptionReply u32:
    /// Done; the last answer.
    Ack = 1,
    /// An export.
    Server = 2,
    /// Information on the export.
    Info = 3,
    /// A metadata context.
    MetaContext = 4,
    /// Not understood.
    Unsupported = 0x8000_0001,
    /// Not allowed.
    Policy = 0x8000_0002,
    /// Malformed.
    Invalid = 0x8000_0003,
    /// Not on this system.
    Platform = 0x8000_0004,
    /// Only with TLS.
    TlsRequired = 0x8000_0005,
    /// There is no such export.
    Unknown = 0x8000_0006,
    /// The server is shutting down.
    Shutdown = 0x8000_0007,
    /// The client must ask for the sizes of blocks.
    BlockSizeRequired = 0x8000_0008,
    /// Too long.
    TooBig = 0x8000_0009,
}

numbers! {
    /// What a request asks for.
    Command u16:
    /// Read.
    Read = 0,
    /// Write the payload.
    Write = 1,
    /// End the connection; has no reply.
    Disconnect = 2,
    /// Make durable what was written and answered.
    Flush = 3,
    /// The bytes are not needed any more.
    Trim = 4,
    /// The bytes will be read soon.
    Cache = 5,
    /// Write zeros.
    WriteZeroes = 6,
    /// What is allocated?
    BlockStatus = 7,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_protocol() {
        assert_eq!(MAGIC, 0x4e42_444d_4147_4943);
        assert_eq!(OPTION_MAGIC, 0x4948_4156_454f_5054);
        assert_eq!(OptionReply::TooBig.number(), REFUSED + 9);
        assert_eq!(OptionReply::from_number(REFUSED + 1), Some(OptionReply::Unsupported));
        for number in 0..=7 {
            assert_eq!(Command::from_number(number).map(Command::number), Some(number));
        }
        assert_eq!(Command::from_number(8), None);
        assert_eq!(OptionCode::from_number(4), None);
    }

    #[test]
    fn a_structure_is_read_from_the_front_of_enough_bytes_only() {
        let request = Request {
            magic: REQUEST_MAGIC.into(),
            flags: 1.into(),
            command: Command::Write.number().into(),
            cookie: 7.into(),
            offset: 512.into(),
            len: 4096.into(),
        };
        let mut bytes = request.as_bytes().to_vec();
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1]);
        bytes.push(9);
        assert_eq!(Request::take(&bytes), Some(request));
        assert_eq!(Request::take(&bytes[..27]), None);
    }
}
