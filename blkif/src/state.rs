//! The state of either end of a device, as its `state` key tells it.

use std::fmt;

/// `enum xenbus_state` of Xen's `xen/include/public/io/xenbus.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum XenbusState {
    /// 0: not known. Nobody writes it; a vanished directory is not this state but the absence of one.
    Unknown = 0,
    /// 1: the end exists and has done nothing yet.
    Initialising = 1,
    /// 2: the backend has published what it offers and waits for the frontend.
    InitWait = 2,
    /// 3: the frontend has published ring and event channel.
    Initialised = 3,
    /// 4: in operation.
    Connected = 4,
    /// 5: being taken down.
    Closing = 5,
    /// 6: down.
    Closed = 6,
    /// 7: PCI only.
    Reconfiguring = 7,
    /// 8: PCI only.
    Reconfigured = 8,
}

impl XenbusState {
    /// The state that the value of a `state` key names: exactly one digit from 0 to 8, and nothing else. The guest
    /// writes its own key, so anything may stand there.
    pub fn parse(value: &[u8]) -> Option<XenbusState> {
        match value {
            b"0" => Some(XenbusState::Unknown),
            b"1" => Some(XenbusState::Initialising),
            b"2" => Some(XenbusState::InitWait),
            b"3" => Some(XenbusState::Initialised),
            b"4" => Some(XenbusState::Connected),
            b"5" => Some(XenbusState::Closing),
            b"6" => Some(XenbusState::Closed),
            b"7" => Some(XenbusState::Reconfiguring),
            b"8" => Some(XenbusState::Reconfigured),
            _ => None,
        }
    }

    /// The value to write to a `state` key.
    pub const fn as_str(self) -> &'static str {
        match self {
            XenbusState::Unknown => "0",
            XenbusState::Initialising => "1",
            XenbusState::InitWait => "2",
            XenbusState::Initialised => "3",
            XenbusState::Connected => "4",
            XenbusState::Closing => "5",
            XenbusState::Closed => "6",
            XenbusState::Reconfiguring => "7",
            XenbusState::Reconfigured => "8",
        }
    }
}

/// Name and number, for messages: `Connected (4)`.
impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_parses_back_to_itself() {
        for digit in b'0'..=b'8' {
            let state = XenbusState::parse(&[digit]).unwrap();
            assert_eq!(state.as_str().as_bytes(), [digit]);
            assert_eq!(state as u8, digit - b'0');
        }
    }

    #[test]
    fn anything_else_is_no_state() {
        for value in
            [&b""[..], b"9", b"banana", b"99", b"04", b"4\n", b" 4", b"4\0", b"-1", b"+4", b"0x4", b"\xff"]
        {
            assert_eq!(XenbusState::parse(value), None, "{}", value.escape_ascii());
        }
    }
}
