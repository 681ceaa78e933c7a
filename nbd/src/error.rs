//! The errors that may be sent. On the wire they are small positive numbers, whatever the numbers of the system are.

use std::fmt;

/// An error as a server reports it; the numbers are part of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// Not permitted: a write to a read-only export.
    Perm = 1,
    /// Input or output failed.
    Io = 5,
    /// No memory.
    NoMem = 12,
    /// The request is invalid.
    Inval = 22,
    /// No space, or a write beyond the end.
    NoSpc = 28,
    /// A reply in one piece would be too large.
    Overflow = 75,
    /// What was asked for cannot be had.
    NotSup = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

impl ErrorCode {
    /// The error of a number that was received. Numbers that the protocol does not have count as [`ErrorCode::Inval`], as it asks for;
    /// 0 is no error.
    pub fn from_wire(number: u32) -> Option<ErrorCode> {
        Some(match number {
            0 => return None,
            1 => ErrorCode::Perm,
            5 => ErrorCode::Io,
            12 => ErrorCode::NoMem,
            28 => ErrorCode::NoSpc,
            75 => ErrorCode::Overflow,
            95 => ErrorCode::NotSup,
            108 => ErrorCode::Shutdown,
            _ => ErrorCode::Inval,
        })
    }

    /// The error that stands for an errno of this system.
    pub fn from_errno(errno: i32) -> ErrorCode {
        match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => ErrorCode::Perm,
            libc::ENOMEM => ErrorCode::NoMem,
            libc::EINVAL => ErrorCode::Inval,
            libc::ENOSPC | libc::EFBIG | libc::EDQUOT => ErrorCode::NoSpc,
            libc::EOVERFLOW => ErrorCode::Overflow,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorCode::NotSup,
            libc::ESHUTDOWN => ErrorCode::Shutdown,
            _ => ErrorCode::Io,
        }
    }

    /// The number to send.
    pub fn to_wire(self) -> u32 {
        self as u32
    }

    /// The errno of this system.
    pub fn errno(self) -> i32 {
        match self {
            ErrorCode::Perm => libc::EPERM,
            ErrorCode::Io => libc::EIO,
            ErrorCode::NoMem => libc::ENOMEM,
            ErrorCode::Inval => libc::EINVAL,
            ErrorCode::NoSpc => libc::ENOSPC,
            ErrorCode::Overflow => libc::EOVERFLOW,
            ErrorCode::NotSup => libc::EOPNOTSUPP,
            ErrorCode::Shutdown => libc::ESHUTDOWN,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorCode::Perm => "not permitted",
            ErrorCode::Io => "input/output error",
            ErrorCode::NoMem => "out of memory",
            ErrorCode::Inval => "invalid request",
            ErrorCode::NoSpc => "no space left",
            ErrorCode::Overflow => "reply too large",
            ErrorCode::NotSup => "not supported",
            ErrorCode::Shutdown => "the server is shutting down",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_a_positive_number_that_comes_back_as_itself() {
        for number in 1..200 {
            let code = ErrorCode::from_wire(number).unwrap();
            assert!(code.errno() > 0);
            if code != ErrorCode::Inval || number == 22 {
                assert_eq!(code.to_wire(), number);
                assert_eq!(ErrorCode::from_errno(code.errno()), code);
            }
        }
        assert_eq!(ErrorCode::from_wire(0), None);
        assert_eq!(ErrorCode::from_wire(u32::MAX), Some(ErrorCode::Inval));
    }

    #[test]
    fn an_errno_without_a_number_is_an_io_error_and_never_negative() {
        for errno in [libc::EBUSY, libc::ESTALE, -libc::EIO, 0, i32::MIN] {
            assert_eq!(ErrorCode::from_errno(errno), ErrorCode::Io);
        }
        assert_eq!(ErrorCode::from_errno(libc::EROFS), ErrorCode::Perm);
    }
}
