//! The answer to a request: its status and its bytes.

use zerocopy::little_endian::{I16, U32, U64};

use crate::abi::{MAX_RESPONSE_SIZE, WireResponse};

/// The outcome of a request (`BLKIF_RSP_*`). The protocol knows no finer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done, 0.
    Okay,
    /// Failed, −1.
    Error,
    /// The operation is not offered, −2. Frontends stop using it.
    NotSupported,
}

impl Status {
    /// The number on the wire.
    pub const fn wire(self) -> i16 {
        match self {
            Status::Okay => 0,
            Status::Error => -1,
            Status::NotSupported => -2,
        }
    }

    /// The status a number on the wire stands for.
    pub const fn from_wire(value: i16) -> Option<Status> {
        match value {
            0 => Some(Status::Okay),
            -1 => Some(Status::Error),
            -2 => Some(Status::NotSupported),
            _ => None,
        }
    }
}

/// A response as both ends see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request's id, verbatim.
    pub id: u64,
    /// The request's operation; for an indirect request the operation inside it.
    pub op: u8,
    /// The number on the wire; [`Status::wire`] from us, anything from a frontend's point of view.
    pub status: i16,
}

impl Response {
    /// The bytes in the longer layout. The 32-bit one is the first 12 of them.
    ///
    /// Padding is zero: the slot is the guest's to read, and must not show it this process's memory.
    pub fn encode(&self) -> [u8; MAX_RESPONSE_SIZE] {
        let wire = WireResponse {
            id: U64::new(self.id),
            operation: self.op,
            pad: 0,
            status: I16::new(self.status),
            tail: U32::ZERO,
        };
        zerocopy::transmute!(wire)
    }

    /// The response in the first 12 bytes of `bytes`, for a frontend; the tail may hold anything.
    pub fn decode(bytes: [u8; MAX_RESPONSE_SIZE]) -> Response {
        let wire: WireResponse = zerocopy::transmute!(bytes);
        Response { id: wire.id.get(), op: wire.operation, status: wire.status.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_one_of_the_header() {
        let bytes = Response { id: 0x1122_3344_5566_7788, op: 3, status: -2 }.encode();
        assert_eq!(bytes, [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 3, 0, 0xfe, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn decode_reverses_encode_and_ignores_padding() {
        let response = Response { id: u64::MAX, op: 255, status: i16::MIN };
        let mut bytes = response.encode();
        bytes[9] = 0xaa;
        bytes[12..].fill(0xbb);
        assert_eq!(Response::decode(bytes), response);
    }

    #[test]
    fn every_status_has_its_own_number() {
        for status in [Status::Okay, Status::Error, Status::NotSupported] {
            assert_eq!(Status::from_wire(status.wire()), Some(status));
        }
        assert_eq!(Status::from_wire(1), None);
    }
}
