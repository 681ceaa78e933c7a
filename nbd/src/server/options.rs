//! The options of a handshake, as a server hears and answers them; what each is answered with is for others to say.

use zerocopy::IntoBytes;

use crate::MAX_NAME;
use crate::flags::HandshakeFlags;
use crate::wire::{
    Fixed, Greeting, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode, OptionHeader, OptionReply,
    OptionReplyHeader,
};

/// The longest data of an option that is looked at, in bytes; longer ones are refused.
const MAX_DATA: u32 = 64 << 10;

/// The longest that is skipped to refuse it; longer ones end the connection.
const MAX_SKIPPED: u32 = 1 << 20;

/// Bytes skipped at a time.
const STEP: u32 = 16 << 10;

/// Options of one handshake at most.
const MAX_OPTIONS: u32 = 64;

/// Why there will be no transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Goodbye(pub &'static str);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flags,
    Header,
    Data {
        option: u32,
        len: u32,
    },
    /// The data of an option that is too long.
    Skip {
        option: u32,
        left: u32,
    },
}

/// Options as they come in, and their answers.
#[derive(Debug)]
pub(super) struct Options {
    state: State,
    out: Vec<u8>,
    flags: HandshakeFlags,
    count: u32,
}

impl Options {
    /// A handshake that begins with a greeting.
    pub(super) fn new() -> Options {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let greeting =
            Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: flags.0.into() };
        Options {
            state: State::Flags,
            out: greeting.as_bytes().to_vec(),
            flags: HandshakeFlags::default(),
            count: 0,
        }
    }

    /// What the client has said of the handshake.
    pub(super) fn flags(&self) -> HandshakeFlags {
        self.flags
    }

    /// What is to be sent now.
    pub(super) fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// How many bytes the next [`Options::input`] takes; at most 64 KiB.
    pub(super) fn wants(&self) -> usize {
        let bytes = match self.state {
            State::Flags => return 4,
            State::Header => return OptionHeader::LEN,
            State::Data { len, .. } => len,
            State::Skip { left, .. } => left.min(STEP),
        };
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Takes as many bytes as were wanted. An option and its data, once it is whole.
    ///
    /// # Errors
    /// The connection is to be closed, after sending what there is to send.
    pub(super) fn input<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<(u32, &'b [u8])>, Goodbye> {
        if bytes.len() != self.wants() {
            return Err(Goodbye("the client went away within the handshake"));
        }
        match self.state {
            State::Flags => self.client_flags(bytes)?,
            State::Header => {
                return self.header(bytes)?.map(|option| self.whole(option, &[])).transpose();
            }
            State::Data { option, .. } => {
                self.state = State::Header;
                return self.whole(option, bytes).map(Some);
            }
            State::Skip { option, left } => {
                let left = left.saturating_sub(STEP);
                self.state = State::Skip { option, left };
                if left == 0 {
                    self.state = State::Header;
                    self.reply(option, OptionReply::TooBig, b"the option is too long");
                }
            }
        }
        Ok(None)
    }

    fn client_flags(&mut self, bytes: &[u8]) -> Result<(), Goodbye> {
        let number = bytes.first_chunk::<4>().map_or(u32::MAX, |bytes| u32::from_be_bytes(*bytes));
        let flags = HandshakeFlags(u16::try_from(number).unwrap_or(u16::MAX));
        if !flags.without(HandshakeFlags::ALL).is_empty() {
            return Err(Goodbye("the client has flags that are not known"));
        }
        self.flags = flags;
        self.state = State::Header;
        Ok(())
    }

    /// An option that has no data is whole.
    fn header(&mut self, bytes: &[u8]) -> Result<Option<u32>, Goodbye> {
        let header = OptionHeader::take(bytes).ok_or(Goodbye("a short option"))?;
        let (option, len) = (header.option.get(), header.len.get());
        self.count = self.count.saturating_add(1);
        let export_name = option == OptionCode::ExportName.number();
        if header.magic.get() != OPTION_MAGIC {
            return Err(Goodbye("an option without its magic number"));
        }
        if self.count > MAX_OPTIONS {
            return Err(Goodbye("too many options"));
        }
        // This one cannot be refused in words, and a client without the fixed style understands no words.
        let name_is_long = export_name && usize::try_from(len).unwrap_or(usize::MAX) > MAX_NAME;
        let fixed = self.flags.has(HandshakeFlags::FIXED_NEWSTYLE);
        if name_is_long || len > MAX_SKIPPED || !(fixed || export_name) {
            return Err(Goodbye("an option that is too long, or was not to be sent"));
        }
        if len > MAX_DATA {
            self.state = State::Skip { option, left: len };
        } else if len > 0 {
            self.state = State::Data { option, len };
        } else {
            return Ok(Some(option));
        }
        Ok(None)
    }

    /// An option with its data, unless it ends the handshake.
    fn whole<'b>(&mut self, option: u32, data: &'b [u8]) -> Result<(u32, &'b [u8]), Goodbye> {
        if option == OptionCode::Abort.number() {
            self.reply(option, OptionReply::Ack, &[]);
            return Err(Goodbye("the client has ended the handshake"));
        }
        Ok((option, data))
    }

    /// Answers an option.
    pub(super) fn reply(&mut self, option: u32, kind: OptionReply, data: &[u8]) {
        let header = OptionReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.number().into(),
            len: u32::try_from(data.len()).unwrap_or(u32::MAX).into(),
        };
        self.say(header.as_bytes());
        self.say(data);
    }

    /// Says something that is no answer in that form.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
}
