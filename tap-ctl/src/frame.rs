//! How messages lie on the control socket: one JSON object a line, at most [`MAX_LINE`] bytes.
//!
//! Lines, because an administrator can then watch and speak the protocol with `socat`; a limit, because the peer decides
//! how much it sends.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line in bytes, newline included. The longest legal message, sixteen queues of sixteen ring pages with a
/// 4 KiB path, is below a fifth of it.
pub const MAX_LINE: usize = 64 * 1024;

/// A peer that does not keep to the protocol; the connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No newline within [`MAX_LINE`] bytes.
    #[error("a control message is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The line is no message.
    #[error("malformed control message: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// The bytes of one message.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(FrameError::TooLong);
    }
    Ok(line)
}

/// Collects what arrives until it holds a whole line.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes bytes as they came from the socket.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether everything that came has been taken.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole message, or `None` until more bytes arrive.
    #[expect(
        clippy::should_implement_trait,
        reason = "it is generic in the message, which an iterator cannot be"
    )]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        Ok(self.next_line()?.map(|line| serde_json::from_slice(&line)).transpose()?)
    }

    /// The bytes of the next message as they came, newline included, whatever they say; or `None` until more arrive.
    ///
    /// # Errors
    /// The line is too long. It stays, for [`Decoder::take`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let Some(end) = self.buffer.iter().position(|&b| b == b'\n') else {
            return if self.buffer.len() >= MAX_LINE { Err(FrameError::TooLong) } else { Ok(None) };
        };
        if end >= MAX_LINE {
            return Err(FrameError::TooLong);
        }
        Ok(Some(self.buffer.drain(..=end).collect()))
    }

    /// All bytes that came and were not taken.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Minor, Request};

    #[test]
    fn a_message_arriving_byte_by_byte_is_whole_at_its_newline() {
        let request = Request::Attach { minor: Minor(5) };
        let mut decoder = Decoder::default();
        let bytes = encode(&request).unwrap();
        for byte in &bytes[..bytes.len() - 1] {
            decoder.feed(&[*byte]);
            assert!(decoder.next::<Request>().unwrap().is_none());
        }
        assert!(!decoder.is_empty());
        decoder.feed(&bytes[bytes.len() - 1..]);
        assert_eq!(decoder.next::<Request>().unwrap(), Some(request));
        assert!(decoder.next::<Request>().unwrap().is_none() && decoder.is_empty());
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&vec![b'x'; MAX_LINE]);
        assert!(matches!(decoder.next::<Request>(), Err(FrameError::TooLong)));
        assert_eq!(decoder.take().len(), MAX_LINE);
        assert!(decoder.is_empty());
    }

    #[test]
    fn a_line_that_is_no_message_is_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(b"{\"request\":\"reboot\"}\n");
        assert!(matches!(decoder.next::<Request>(), Err(FrameError::Malformed(_))));
    }
}
