//! Framing: headers and payloads in a stream of bytes, without any I/O.
//!
//! A message is 16 bytes of header and at most [`PAYLOAD_MAX`] bytes of payload. The header's numbers are in the byte
//! order of the machine that shares the connection with the daemon; every architecture Xen runs on is little-endian.

use crate::wire::{HEADER_LEN, MessageType, PAYLOAD_MAX};

/// The fixed part of a message (`struct xsd_sockmsg`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the message type; see [`MessageType::from_wire`].
    pub kind: u32,
    /// Chosen by the client and echoed in the reply; 0 in watch events.
    pub req_id: u32,
    /// The transaction, 0 for none.
    pub tx_id: u32,
    /// Bytes of payload that follow.
    pub len: u32,
}

impl Header {
    /// The 16 bytes on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields = [self.kind, self.req_id, self.tx_id, self.len];
        for (slot, field) in bytes.chunks_exact_mut(4).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The header in the 16 bytes on the wire. Every pattern is a header; [`decode`] judges the length.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Header {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Header {
            kind: u32::from_le_bytes([a, b, c, d]),
            req_id: u32::from_le_bytes([e, f, g, h]),
            tx_id: u32::from_le_bytes([i, j, k, l]),
            len: u32::from_le_bytes([m, n, o, p]),
        }
    }
}

/// A whole message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header; `header.len` is the length of `payload`.
    pub header: Header,
    /// Its payload, at most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// Why a stream of bytes, or a message in it, is not XenStore protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A header announces more payload than the protocol allows. The stream cannot be followed any further.
    #[error("a message announces {len} payload bytes, the protocol allows {PAYLOAD_MAX}")]
    Oversize {
        /// The announced length in bytes.
        len: u32,
    },
    /// A reply that answers no request of ours.
    #[error("a reply carries request id {got} while {expected} is awaited")]
    UnexpectedReply {
        /// The awaited request id.
        expected: u32,
        /// The one received.
        got: u32,
    },
    /// A reply with the right id and another type than its request.
    #[error("the reply to {expected} has message type {got}")]
    WrongType {
        /// The request's type.
        expected: MessageType,
        /// The number in the reply.
        got: u32,
    },
    /// A payload that does not have the form its type demands.
    #[error("the payload of a {kind} message is malformed: {reason}")]
    Payload {
        /// The message's type.
        kind: MessageType,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What the front of a byte buffer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole message, and how many bytes of the buffer it takes up.
    Frame {
        /// The message.
        frame: Frame,
        /// Its length in the buffer, header included.
        consumed: usize,
    },
    /// The beginning of a message.
    NeedMore,
}

/// Judges the front of `bytes`.
///
/// # Errors
///
/// [`ProtocolError::Oversize`] as soon as the header is complete and announces too much.
pub fn decode(bytes: &[u8]) -> Result<Decoded, ProtocolError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Ok(Decoded::NeedMore);
    };
    let header = Header::from_bytes(*header);
    let len = usize::try_from(header.len).unwrap_or(usize::MAX);
    if len > PAYLOAD_MAX {
        return Err(ProtocolError::Oversize { len: header.len });
    }
    Ok(match rest.get(..len) {
        Some(payload) => {
            Decoded::Frame { frame: Frame { header, payload: payload.to_vec() }, consumed: HEADER_LEN + len }
        }
        None => Decoded::NeedMore,
    })
}

/// Encodes a message, or tells by `None` that the payload is longer than [`PAYLOAD_MAX`].
#[must_use]
pub fn encode(kind: MessageType, req_id: u32, tx_id: u32, payload: &[u8]) -> Option<Vec<u8>> {
    if payload.len() > PAYLOAD_MAX {
        return None;
    }
    let len = u32::try_from(payload.len()).ok()?;
    let header = Header { kind: kind.to_wire(), req_id, tx_id, len };
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&header.to_bytes());
    bytes.extend_from_slice(payload);
    Some(bytes)
}

/// Cuts a stream that arrives in arbitrary pieces into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were already given out.
    consumed: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Appends the next bytes of the stream.
    pub fn extend(&mut self, bytes: &[u8]) {
        // Moving the rest to the front here, not in `next_frame`, makes a burst of small frames cost one move per read.
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes arrive.
    ///
    /// # Errors
    ///
    /// As [`decode`]. The stream has lost its frame boundaries then, and every later call fails likewise.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, ProtocolError> {
        let pending = self.buffer.get(self.consumed..).unwrap_or_default();
        match decode(pending)? {
            Decoded::Frame { frame, consumed } => {
                self.consumed = self.consumed.saturating_add(consumed);
                Ok(Some(frame))
            }
            Decoded::NeedMore => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_read_request_has_the_bytes_of_the_wire_structure() {
        let bytes = encode(MessageType::Read, 0x0102_0304, 7, b"a\0").expect("short payload");
        assert_eq!(bytes, [2, 0, 0, 0, 4, 3, 2, 1, 7, 0, 0, 0, 2, 0, 0, 0, b'a', 0]);
    }

    #[test]
    fn the_longest_payload_passes_and_one_byte_more_does_not() {
        let longest = vec![b'x'; PAYLOAD_MAX];
        let bytes = encode(MessageType::Write, 1, 0, &longest).expect("exactly the limit");
        assert!(matches!(decode(&bytes), Ok(Decoded::Frame { frame, .. }) if frame.payload == longest));
        assert_eq!(encode(MessageType::Write, 1, 0, &vec![b'x'; PAYLOAD_MAX + 1]), None);
    }

    #[test]
    fn an_oversize_header_is_refused_before_its_payload_arrives_and_stays_refused() {
        let mut decoder = Decoder::new();
        decoder.extend(&Header { kind: 2, req_id: 1, tx_id: 0, len: 4097 }.to_bytes());
        assert_eq!(decoder.next_frame(), Err(ProtocolError::Oversize { len: 4097 }));
        decoder.extend(&[0; 5000]);
        assert_eq!(decoder.next_frame(), Err(ProtocolError::Oversize { len: 4097 }));
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let fields = (any::<u32>(), any::<u32>(), any::<u32>());
        let payload = prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 0..40),
            1 => prop::collection::vec(any::<u8>(), PAYLOAD_MAX - 2..=PAYLOAD_MAX),
        ];
        (fields, payload).prop_map(|((kind, req_id, tx_id), payload)| {
            let len = u32::try_from(payload.len()).expect("within the limit");
            Frame { header: Header { kind, req_id, tx_id, len }, payload }
        })
    }

    /// Arbitrary bytes, and bytes whose length field is near something interesting.
    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        let bytes = prop::collection::vec(any::<u8>(), 0..64);
        let len = prop_oneof![0u32..64, 4090u32..4100, any::<u32>()];
        (bytes, prop::option::of(len)).prop_map(|(mut bytes, len)| {
            if let (Some(len), Some(field)) = (len, bytes.get_mut(12..16)) {
                field.copy_from_slice(&len.to_le_bytes());
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting_of_the_stream(
            frames in prop::collection::vec(any_frame(), 0..12),
            cuts in prop::collection::vec(1usize..60, 1..40),
        ) {
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend_from_slice(&frame.header.to_bytes());
                stream.extend_from_slice(&frame.payload);
            }
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            let mut rest = stream.as_slice();
            for &cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, later) = rest.split_at(cut.min(rest.len()));
                decoder.extend(piece);
                while let Some(frame) = decoder.next_frame().expect("a valid stream") {
                    seen.push(frame);
                }
                rest = later;
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn any_bytes_are_a_frame_or_a_wish_for_more_or_an_error(bytes in any_bytes()) {
            let announced = bytes.get(12..16).map(|len| u32::from_le_bytes(len.try_into().expect("4 bytes")));
            match (decode(&bytes), announced) {
                (Ok(Decoded::Frame { frame, consumed }), Some(len)) => {
                    prop_assert_eq!(consumed, HEADER_LEN + len as usize);
                    prop_assert_eq!(&bytes[HEADER_LEN..consumed], &frame.payload[..]);
                }
                (Ok(Decoded::NeedMore), Some(len)) => prop_assert!(bytes.len() < HEADER_LEN + len as usize),
                (Ok(decoded), None) => prop_assert_eq!(decoded, Decoded::NeedMore),
                (Err(error), len) => {
                    prop_assert!(len.is_some_and(|len| len as usize > PAYLOAD_MAX));
                    prop_assert_eq!(Some(error), len.map(|len| ProtocolError::Oversize { len }));
                }
            }
        }

        #[test]
        fn headers_come_back_from_their_bytes(kind: u32, req_id: u32, tx_id: u32, len: u32) {
            let header = Header { kind, req_id, tx_id, len };
            prop_assert_eq!(Header::from_bytes(header.to_bytes()), header);
        }
    }
}
