//! A client's handshake, as a state machine.
//!
//! ```text
//!  greeting ─> STRUCTURED_REPLY ─> SET_META_CONTEXT (if structured) ─> GO ─────────────────────> Export
//!     │                                                                └ not understood ─┐
//!     └ a server without fixed newstyle ───────────────────────────────> EXPORT_NAME ────┴─────> Export
//! ```

use zerocopy::{FromBytes, IntoBytes};

use super::{Blocks, Export};
use crate::flags::{HandshakeFlags, TransmissionFlags};
use crate::wire::{
    EXPORT_PADDING, ExportTail, Fixed, Greeting, InfoBlockSize, InfoExport, MAGIC, OLD_STYLE_MAGIC,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader, info,
};
use crate::{BASE_ALLOCATION, MAX_NAME, MAX_PAYLOAD};

/// The longest answer to an option that is taken, in bytes: a name and some.
const MAX_ANSWER: u32 = 8192;

/// Answers to all options together at most.
const MAX_ANSWERS: u32 = 100;

/// How much of a server's text for people is passed on, in bytes.
const MAX_TEXT: usize = 200;

/// Why there is no export to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer is no NBD server, or not one of a kind that is spoken here.
    #[error("{0}")]
    NotSpoken(&'static str),
    /// The server breaks the protocol.
    #[error("the NBD server breaks the protocol: {0}")]
    Malformed(&'static str),
    /// The server says no.
    #[error("the NBD server refuses export {name:?}: {why}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused {
        /// The export.
        name: String,
        /// Its error.
        why: &'static str,
        /// What it says to people.
        text: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// The header of an answer to this option.
    Header(OptionCode),
    /// Its data.
    Data {
        option: OptionCode,
        kind: u32,
        len: usize,
    },
    /// The answer to EXPORT_NAME.
    Tail,
    /// Over.
    Ended,
}

/// A handshake: send [`Handshake::output`], read [`Handshake::wants`] bytes, give them to [`Handshake::input`], and again.
#[derive(Debug)]
pub struct Handshake {
    name: String,
    state: State,
    out: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    allocation: Option<u32>,
    described: Option<(u64, TransmissionFlags)>,
    blocks: Blocks,
    answers: u32,
}

impl Handshake {
    /// A handshake for the export `name`, of which the first [`MAX_NAME`] bytes count.
    pub fn new(name: &str) -> Handshake {
        Handshake {
            name: name.get(..MAX_NAME).unwrap_or(name).to_owned(),
            state: State::Greeting,
            out: Vec::new(),
            no_zeroes: false,
            structured: false,
            allocation: None,
            described: None,
            blocks: Blocks::default(),
            answers: 0,
        }
    }

    /// What is to be sent now.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// How many bytes the next [`Handshake::input`] takes; at most 8 KiB.
    pub fn wants(&self) -> usize {
        match self.state {
            State::Greeting => Greeting::LEN,
            State::Header(_) => OptionReplyHeader::LEN,
            State::Data { len, .. } => len,
            State::Tail if self.no_zeroes => ExportTail::LEN,
            State::Tail => ExportTail::LEN.saturating_add(EXPORT_PADDING),
            State::Ended => 0,
        }
    }

    /// Takes as many bytes as were wanted; the export, once it is in use.
    ///
    /// # Errors
    /// The server refuses, or is none that can be spoken to.
    pub fn input(&mut self, bytes: &[u8]) -> Result<Option<Export>, HandshakeError> {
        if bytes.len() != self.wants() {
            return Err(HandshakeError::Malformed("the connection ended within the handshake"));
        }
        match self.state {
            State::Greeting => self.greeting(bytes)?,
            State::Header(option) => return self.header(option, bytes),
            State::Data { option, kind, .. } => return self.answer(option, kind, bytes),
            State::Tail => {
                let tail = ExportTail::take(bytes).ok_or(HandshakeError::Malformed("a short answer"))?;
                return self.finish(tail.size.get(), TransmissionFlags(tail.flags.get())).map(Some);
            }
            State::Ended => {}
        }
        Ok(None)
    }

    fn greeting(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let greeting = Greeting::take(bytes).ok_or(HandshakeError::Malformed("a short greeting"))?;
        if greeting.magic.get() != MAGIC {
            return Err(HandshakeError::NotSpoken("the peer is no NBD server"));
        }
        if greeting.option_magic.get() == OLD_STYLE_MAGIC {
            return Err(HandshakeError::NotSpoken(
                "the NBD server speaks the old style, which has no options",
            ));
        }
        if greeting.option_magic.get() != OPTION_MAGIC {
            return Err(HandshakeError::Malformed("an unknown greeting"));
        }
        let flags = HandshakeFlags(greeting.flags.get());
        let fixed = flags.has(HandshakeFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.has(HandshakeFlags::NO_ZEROES);
        let ours = HandshakeFlags::default()
            .with(HandshakeFlags::FIXED_NEWSTYLE, fixed)
            .with(HandshakeFlags::NO_ZEROES, self.no_zeroes);
        self.out.extend_from_slice(&u32::from(ours.0).to_be_bytes());
        if fixed {
            self.ask(OptionCode::StructuredReply)
        } else {
            self.ask(OptionCode::ExportName)
        }
        Ok(())
    }

    /// Sends an option and waits for its answer.
    fn ask(&mut self, option: OptionCode) {
        let data = self.data(option);
        let header = OptionHeader {
            magic: OPTION_MAGIC.into(),
            option: option.number().into(),
            len: u32::try_from(data.len()).unwrap_or(u32::MAX).into(),
        };
        self.out.extend_from_slice(header.as_bytes());
        self.out.extend_from_slice(&data);
        self.state = if option == OptionCode::ExportName { State::Tail } else { State::Header(option) };
    }

    fn data(&self, option: OptionCode) -> Vec<u8> {
        let text = |text: &str| {
            let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
            [&len.to_be_bytes(), text.as_bytes()].concat()
        };
        match option {
            OptionCode::ExportName => self.name.clone().into_bytes(),
            OptionCode::SetMetaContext => {
                [text(&self.name), 1_u32.to_be_bytes().to_vec(), text(BASE_ALLOCATION)].concat()
            }
            OptionCode::Go => {
                // One piece of information beside the one that is always sent.
                let wanted = [1_u16.to_be_bytes(), info::BLOCK_SIZE.to_be_bytes()].concat();
                [text(&self.name), wanted].concat()
            }
            _ => Vec::new(),
        }
    }

    fn header(&mut self, option: OptionCode, bytes: &[u8]) -> Result<Option<Export>, HandshakeError> {
        let header = OptionReplyHeader::take(bytes).ok_or(HandshakeError::Malformed("a short answer"))?;
        if header.magic.get() != OPTION_REPLY_MAGIC {
            return Err(HandshakeError::Malformed("an answer without its magic number"));
        }
        if header.option.get() != option.number() {
            return Err(HandshakeError::Malformed("an answer to an option that was not sent"));
        }
        self.answers = self.answers.saturating_add(1);
        if header.len.get() > MAX_ANSWER || self.answers > MAX_ANSWERS {
            return Err(HandshakeError::Malformed("too long or too many answers"));
        }
        let (kind, len) = (header.kind.get(), usize::try_from(header.len.get()).unwrap_or(usize::MAX));
        if len == 0 {
            return self.answer(option, kind, &[]);
        }
        self.state = State::Data { option, kind, len };
        Ok(None)
    }

    /// One whole answer.
    fn answer(
        &mut self,
        option: OptionCode,
        kind: u32,
        data: &[u8],
    ) -> Result<Option<Export>, HandshakeError> {
        self.state = State::Header(option);
        let reply = OptionReply::from_number(kind);
        let refused = kind & crate::wire::REFUSED != 0;
        if matches!(reply, Some(OptionReply::TlsRequired)) {
            return Err(self.refusal(reply, data));
        }
        match (option, reply) {
            (OptionCode::StructuredReply, Some(OptionReply::Ack)) => {
                self.structured = true;
                self.ask(OptionCode::SetMetaContext);
            }
            (OptionCode::StructuredReply, _) if refused => self.ask(OptionCode::Go),
            (OptionCode::SetMetaContext, Some(OptionReply::MetaContext)) => self.context(data)?,
            (OptionCode::SetMetaContext, Some(OptionReply::Ack)) => self.ask(OptionCode::Go),
            (OptionCode::SetMetaContext, _) if refused => {
                self.allocation = None;
                self.ask(OptionCode::Go);
            }
            (OptionCode::Go, Some(OptionReply::Info)) => self.information(data)?,
            (OptionCode::Go, Some(OptionReply::Ack)) => {
                let (size, flags) =
                    self.described.ok_or(HandshakeError::Malformed("an export without a size"))?;
                return self.finish(size, flags).map(Some);
            }
            (OptionCode::Go, Some(OptionReply::Unsupported)) => self.ask(OptionCode::ExportName),
            (OptionCode::Go, _) if refused => return Err(self.refusal(reply, data)),
            _ => return Err(HandshakeError::Malformed("an answer of an unexpected kind")),
        }
        Ok(None)
    }

    fn context(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let (number, name) =
            data.split_first_chunk::<4>().ok_or(HandshakeError::Malformed("a short metadata context"))?;
        if name != BASE_ALLOCATION.as_bytes() || self.allocation.is_some() {
            return Err(HandshakeError::Malformed("a metadata context that was not asked for"));
        }
        self.allocation = Some(u32::from_be_bytes(*number));
        Ok(())
    }

    fn information(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        const SHORT: HandshakeError = HandshakeError::Malformed("information of the wrong length");
        let (kind, _) = data.split_first_chunk::<2>().ok_or(SHORT)?;
        match u16::from_be_bytes(*kind) {
            info::EXPORT => {
                let told = InfoExport::read_from_bytes(data).map_err(|_| SHORT)?;
                self.described = Some((told.size.get(), TransmissionFlags(told.flags.get())));
            }
            info::BLOCK_SIZE => {
                let told = InfoBlockSize::read_from_bytes(data).map_err(|_| SHORT)?;
                self.blocks = blocks(&told)?;
            }
            // Texts, and what later versions of the protocol add.
            _ => {}
        }
        Ok(())
    }

    fn refusal(&self, reply: Option<OptionReply>, data: &[u8]) -> HandshakeError {
        let why = match reply {
            Some(OptionReply::Policy) => "not allowed",
            Some(OptionReply::TlsRequired) => "it demands TLS, which is not supported here",
            Some(OptionReply::Unknown) => "it has no such export",
            Some(OptionReply::Shutdown) => "it is shutting down",
            _ => "for a reason of its own",
        };
        let text = String::from_utf8_lossy(data.get(..MAX_TEXT).unwrap_or(data));
        let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        HandshakeError::Refused { name: self.name.clone(), why, text }
    }

    fn finish(&mut self, size: u64, flags: TransmissionFlags) -> Result<Export, HandshakeError> {
        if !flags.has(TransmissionFlags::HAS_FLAGS) {
            return Err(HandshakeError::Malformed("an export without flags"));
        }
        if i64::try_from(size).is_err() {
            return Err(HandshakeError::Malformed("an export of more than 2⁶³ bytes"));
        }
        self.state = State::Ended;
        let Handshake { structured, allocation, blocks, .. } = *self;
        Ok(Export { size, flags, structured, allocation, blocks })
    }
}

/// Judges the sizes of blocks.
fn blocks(told: &InfoBlockSize) -> Result<Blocks, HandshakeError> {
    let (minimum, preferred, maximum) = (told.minimum.get(), told.preferred.get(), told.maximum.get());
    let minimum_is_good = minimum.is_power_of_two() && minimum <= 1 << 16;
    let preferred_is_good = preferred.is_power_of_two() && preferred >= minimum;
    // A maximum of all ones stands for no limit, and need not be a multiple.
    let maximum_is_good =
        maximum >= minimum && (maximum == u32::MAX || maximum & minimum.wrapping_sub(1) == 0);
    if minimum_is_good && preferred_is_good && maximum_is_good {
        return Ok(Blocks { minimum, preferred, maximum: maximum.min(MAX_PAYLOAD) });
    }
    Err(HandshakeError::Malformed("impossible block sizes"))
}
