//! A server's handshake, as a state machine.

use zerocopy::IntoBytes;

use super::options::{Goodbye, Options};
use super::{CONTEXT, Offer};
use crate::flags::{HandshakeFlags, TransmissionFlags};
use crate::wire::{EXPORT_PADDING, ExportTail, InfoBlockSize, InfoExport, OptionCode, OptionReply, info};
use crate::{BASE_ALLOCATION, MAX_NAME};

/// What client and server have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies to reads come in chunks.
    pub structured: bool,
    /// The client may ask for the allocation.
    pub allocation: bool,
}

/// A handshake: send [`Welcome::output`], read [`Welcome::wants`] bytes, give them to [`Welcome::input`], and again.
#[derive(Debug)]
pub struct Welcome {
    offer: Offer,
    options: Options,
    structured: bool,
    /// The export for which the context was set.
    context: Option<Vec<u8>>,
}

impl Welcome {
    /// A handshake that begins with a greeting.
    pub fn new(offer: Offer) -> Welcome {
        Welcome { offer, options: Options::new(), structured: false, context: None }
    }

    /// What is to be sent now.
    pub fn output(&mut self) -> Vec<u8> {
        self.options.output()
    }

    /// How many bytes the next [`Welcome::input`] takes; at most 64 KiB.
    pub fn wants(&self) -> usize {
        self.options.wants()
    }

    /// Takes as many bytes as were wanted. What was agreed on, once the client uses the export.
    ///
    /// # Errors
    /// The connection is to be closed, after sending what there is to send.
    pub fn input(&mut self, bytes: &[u8]) -> Result<Option<Agreed>, Goodbye> {
        match self.options.input(bytes)? {
            Some((option, data)) => self.option(option, data),
            None => Ok(None),
        }
    }

    fn reply(&mut self, option: u32, kind: OptionReply, data: &[u8]) {
        self.options.reply(option, kind, data);
    }

    fn option(&mut self, number: u32, data: &[u8]) -> Result<Option<Agreed>, Goodbye> {
        match OptionCode::from_number(number) {
            Some(OptionCode::ExportName) => {
                let tail = ExportTail { size: self.offer.size.into(), flags: self.flags().0.into() };
                self.options.say(tail.as_bytes());
                if !self.options.flags().has(HandshakeFlags::NO_ZEROES) {
                    self.options.say(&[0; EXPORT_PADDING]);
                }
                return Ok(Some(self.agreed(data)));
            }
            Some(OptionCode::StructuredReply | OptionCode::List) if !data.is_empty() => {
                self.reply(number, OptionReply::Invalid, b"the option has no data");
            }
            Some(OptionCode::StructuredReply) => {
                self.structured = true;
                self.reply(number, OptionReply::Ack, &[]);
            }
            Some(OptionCode::List) => {
                let name = sized(self.offer.name.as_bytes());
                self.reply(number, OptionReply::Server, &name);
                self.reply(number, OptionReply::Ack, &[]);
            }
            Some(option @ (OptionCode::Info | OptionCode::Go)) => match parse_info(data) {
                None => self.reply(number, OptionReply::Invalid, b"the option is malformed"),
                Some((name, _)) if name.len() > MAX_NAME => {
                    self.reply(number, OptionReply::TooBig, b"the name is too long");
                }
                Some((name, wanted)) => {
                    self.describe(number, &wanted);
                    self.reply(number, OptionReply::Ack, &[]);
                    if option == OptionCode::Go {
                        return Ok(Some(self.agreed(name)));
                    }
                }
            },
            Some(option @ (OptionCode::ListMetaContext | OptionCode::SetMetaContext)) => {
                self.contexts(option, data);
            }
            _ => self.reply(number, OptionReply::Unsupported, b"the option is not supported"),
        }
        Ok(None)
    }

    fn flags(&self) -> TransmissionFlags {
        self.offer.flags.with(TransmissionFlags::DF, self.structured)
    }

    fn agreed(&self, name: &[u8]) -> Agreed {
        // A context that was set for another name is not set for this one.
        let allocation = self.context.as_ref().is_some_and(|set| set == name);
        Agreed { structured: self.structured, allocation }
    }

    fn describe(&mut self, number: u32, wanted: &[u16]) {
        let export = InfoExport {
            kind: info::EXPORT.into(),
            size: self.offer.size.into(),
            flags: self.flags().0.into(),
        };
        self.reply(number, OptionReply::Info, export.as_bytes());
        let blocks = self.offer.blocks;
        let sizes = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: blocks.minimum.into(),
            preferred: blocks.preferred.into(),
            maximum: blocks.maximum.into(),
        };
        // Whether it was asked for or not: who does not know it would ask for single bytes.
        self.reply(number, OptionReply::Info, sizes.as_bytes());
        for (kind, text) in [(info::NAME, self.offer.name), (info::DESCRIPTION, "a disk of a tapdisk")] {
            if wanted.contains(&kind) {
                let told = [&kind.to_be_bytes(), text.as_bytes()].concat();
                self.reply(number, OptionReply::Info, &told);
            }
        }
    }

    fn contexts(&mut self, option: OptionCode, data: &[u8]) {
        let number = option.number();
        let sets = option == OptionCode::SetMetaContext;
        if !self.structured {
            return self.reply(number, OptionReply::Invalid, b"structured replies come first");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return self.reply(number, OptionReply::Invalid, b"the option is malformed");
        };
        let asked = |query: &&[u8]| *query == BASE_ALLOCATION.as_bytes() || (!sets && *query == b"base:");
        let found = queries.iter().any(asked) || (!sets && queries.is_empty());
        if sets {
            self.context = found.then(|| name.to_vec());
        }
        if found {
            let id = if sets { CONTEXT } else { 0 };
            let told = [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat();
            self.reply(number, OptionReply::MetaContext, &told);
        }
        self.reply(number, OptionReply::Ack, &[]);
    }
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes(), bytes].concat()
}

/// The number that `bytes` begin with, and what follows.
fn take_u32(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((usize::try_from(u32::from_be_bytes(*number)).ok()?, rest))
}

/// The string that `bytes` begin with, behind its length, and what follows.
fn take_string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = take_u32(bytes)?;
    rest.split_at_checked(len)
}

/// The name, and the kinds of information asked for.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = take_string(data)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let kinds: Vec<u16> = rest.as_chunks::<2>().0.iter().map(|kind| u16::from_be_bytes(*kind)).collect();
    let whole = rest.len().is_multiple_of(2) && kinds.len() == usize::from(u16::from_be_bytes(*count));
    whole.then_some((name, kinds))
}

/// The name, and the queries.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = take_string(data)?;
    let (count, mut rest) = take_u32(rest)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, behind) = take_string(rest)?;
        queries.push(query);
        rest = behind;
    }
    rest.is_empty().then_some((name, queries))
}
