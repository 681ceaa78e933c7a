//! Judging a request, and the beginnings of replies.

use zerocopy::IntoBytes;

use super::{Agreed, Offer};
use crate::error::ErrorCode;
use crate::flags::{ChunkFlags, CommandFlags, TransmissionFlags};
use crate::wire::{
    CHUNK_MAGIC, Chunk, ChunkError, Command, REQUEST_MAGIC, Request, SIMPLE_MAGIC, Simple, chunk,
};

/// What is to be done. Positions and lengths lie on the disk and are multiples of the smallest block; lengths are not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Read; `whole`: in one chunk.
    Read {
        /// Byte position.
        offset: u64,
        /// Bytes.
        len: u32,
        /// In one chunk.
        whole: bool,
    },
    /// Write the payload.
    Write {
        /// Byte position.
        offset: u64,
        /// Bytes.
        len: u32,
        /// It is durable before the reply.
        fua: bool,
    },
    /// Make durable what was answered.
    Flush,
    /// The bytes are not needed.
    Trim {
        /// Byte position.
        offset: u64,
        /// Bytes.
        len: u32,
        /// It is durable before the reply.
        fua: bool,
    },
    /// Write zeros.
    Zero {
        /// Byte position.
        offset: u64,
        /// Bytes.
        len: u32,
        /// They are durable before the reply.
        fua: bool,
        /// They take room.
        provision: bool,
    },
    /// The bytes will be read soon.
    Cache,
    /// Tell what is allocated.
    Status {
        /// Byte position.
        offset: u64,
        /// Bytes.
        len: u32,
        /// One extent.
        one: bool,
    },
    /// The client goes away.
    Disconnect,
}

/// A judged request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Bytes of payload behind it in the stream, whatever becomes of it.
    pub payload: u32,
    /// What to do, or the error to answer.
    pub job: Result<Job, ErrorCode>,
}

/// Judges a request. `None`: the client does not speak the protocol, close the connection.
pub fn judge(request: &Request, offer: &Offer, agreed: Agreed) -> Option<Judged> {
    if request.magic.get() != REQUEST_MAGIC {
        return None;
    }
    let command = Command::from_number(request.command.get());
    let payload = if command == Some(Command::Write) { request.len.get() } else { 0 };
    let job = command.ok_or(ErrorCode::Inval).and_then(|command| decide(command, request, offer, agreed));
    Some(Judged { payload, job })
}

fn decide(command: Command, request: &Request, offer: &Offer, agreed: Agreed) -> Result<Job, ErrorCode> {
    let (offset, len) = (request.offset.get(), request.len.get());
    let flags = CommandFlags(request.flags.get());
    let fua = flags.has(CommandFlags::FUA);
    let (known, needed) = match command {
        Command::Read => (CommandFlags::DF, TransmissionFlags::default()),
        Command::Write | Command::Disconnect => (CommandFlags::default(), TransmissionFlags::default()),
        Command::Flush => (CommandFlags::default(), TransmissionFlags::FLUSH),
        Command::Trim => (CommandFlags::default(), TransmissionFlags::TRIM),
        Command::Cache => (CommandFlags::default(), TransmissionFlags::CACHE),
        Command::WriteZeroes => (CommandFlags::NO_HOLE, TransmissionFlags::WRITE_ZEROES),
        Command::BlockStatus => (CommandFlags::REQ_ONE, TransmissionFlags::default()),
    };
    let can_fua = offer.flags.has(TransmissionFlags::FUA);
    if !flags.without(known.with(CommandFlags::FUA, can_fua)).is_empty() || !offer.flags.has(needed) {
        return Err(ErrorCode::Inval);
    }
    match command {
        Command::Disconnect => return Ok(Job::Disconnect),
        Command::Flush => return Ok(Job::Flush),
        _ => {}
    }
    let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
    if writes && offer.flags.has(TransmissionFlags::READ_ONLY) {
        return Err(ErrorCode::Perm);
    }
    let block = offer.blocks.minimum.max(1);
    if len == 0 || !len.is_multiple_of(block) || !offset.is_multiple_of(u64::from(block)) {
        return Err(ErrorCode::Inval);
    }
    if offset.checked_add(u64::from(len)).is_none_or(|end| end > offer.size) {
        return Err(if writes { ErrorCode::NoSpc } else { ErrorCode::Inval });
    }
    let moves = matches!(command, Command::Read | Command::Write);
    if moves && len > offer.blocks.maximum {
        return Err(ErrorCode::Inval);
    }
    match command {
        Command::Read => Ok(Job::Read { offset, len, whole: flags.has(CommandFlags::DF) }),
        Command::Write => Ok(Job::Write { offset, len, fua }),
        Command::Trim => Ok(Job::Trim { offset, len, fua }),
        Command::WriteZeroes => {
            Ok(Job::Zero { offset, len, fua, provision: flags.has(CommandFlags::NO_HOLE) })
        }
        Command::BlockStatus if !agreed.allocation => Err(ErrorCode::Inval),
        Command::BlockStatus => Ok(Job::Status { offset, len, one: flags.has(CommandFlags::REQ_ONE) }),
        Command::Cache | Command::Flush | Command::Disconnect => Ok(Job::Cache),
    }
}

/// The beginning of a simple reply.
pub fn simple_header(cookie: u64, error: Option<ErrorCode>) -> Vec<u8> {
    let error = error.map_or(0, ErrorCode::to_wire);
    Simple { magic: SIMPLE_MAGIC.into(), error: error.into(), cookie: cookie.into() }.as_bytes().to_vec()
}

/// The beginning of a chunk whose content begins with `first` and has `more` bytes behind it.
pub fn chunk_header(cookie: u64, kind: u16, done: bool, first: &[u8], more: u32) -> Vec<u8> {
    let header = Chunk {
        magic: CHUNK_MAGIC.into(),
        flags: ChunkFlags::default().with(ChunkFlags::DONE, done).0.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        len: u32::try_from(first.len()).unwrap_or(u32::MAX).saturating_add(more).into(),
    };
    [header.as_bytes(), first].concat()
}

/// A whole reply that reports an error, and no payload. `chunked`: to a request whose replies come in chunks.
pub fn error_reply(cookie: u64, error: ErrorCode, chunked: bool) -> Vec<u8> {
    if !chunked {
        return simple_header(cookie, Some(error));
    }
    let content = ChunkError { error: error.to_wire().into(), len: 0.into() };
    chunk_header(cookie, chunk::ERROR, true, content.as_bytes(), 0)
}
