//! What comes before TLS where nothing is told without it.

use super::options::{Goodbye, Options};
use crate::flags::HandshakeFlags;
use crate::wire::{OptionCode, OptionReply};

/// The part of a handshake before TLS: used as [`Welcome`](super::Welcome) is. It tells nothing of any export (NBD project,
/// `proto.md`, "TLS versions": FORCEDTLS).
#[derive(Debug)]
pub struct Guard(Options);

impl Default for Guard {
    fn default() -> Guard {
        Guard::new()
    }
}

impl Guard {
    /// A handshake that begins with a greeting.
    pub fn new() -> Guard {
        Guard(Options::new())
    }

    /// What is to be sent now.
    pub fn output(&mut self) -> Vec<u8> {
        self.0.output()
    }

    /// How many bytes the next [`Guard::input`] takes; at most 64 KiB.
    pub fn wants(&self) -> usize {
        self.0.wants()
    }

    /// Takes as many bytes as were wanted. The client's flags, once it begins with TLS after [`Guard::output`] is sent; within TLS
    /// the options go on, after no other greeting.
    ///
    /// # Errors
    /// The connection is to be closed, after sending what there is to send.
    pub fn input(&mut self, bytes: &[u8]) -> Result<Option<HandshakeFlags>, Goodbye> {
        let Some((number, data)) = self.0.input(bytes)? else { return Ok(None) };
        match OptionCode::from_number(number) {
            Some(OptionCode::StartTls) if data.is_empty() => {
                self.0.reply(number, OptionReply::Ack, &[]);
                return Ok(Some(self.0.flags()));
            }
            Some(OptionCode::StartTls) => {
                self.0.reply(number, OptionReply::Invalid, b"the option has no data")
            }
            // It cannot be refused in words.
            Some(OptionCode::ExportName) => return Err(Goodbye("the client does not want TLS")),
            _ => self.0.reply(number, OptionReply::TlsRequired, b"only with TLS"),
        }
        Ok(None)
    }
}
