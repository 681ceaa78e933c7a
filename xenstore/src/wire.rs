//! Message types, limits and error names of the XenStore protocol.
//!
//! All numbers are those of `xen/include/public/io/xs_wire.h`; a test compares them with that header where it is
//! installed.

use nix::errno::Errno;

/// Bytes of the header in front of every message, in both directions.
pub const HEADER_LEN: usize = 16;

/// The most payload bytes of one message, in both directions (`XENSTORE_PAYLOAD_MAX`).
///
/// A client that sends more is disconnected by the daemon.
pub const PAYLOAD_MAX: usize = 4096;

/// The most bytes of an absolute path (`XENSTORE_ABS_PATH_MAX`).
pub const ABSOLUTE_PATH_MAX: usize = 3072;

/// The most bytes of a relative path (`XENSTORE_REL_PATH_MAX`).
pub const RELATIVE_PATH_MAX: usize = 2048;

/// Declares the message types once, so that the numbers, the names and the way back cannot disagree.
macro_rules! message_types {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $wire:literal;)*) => {
        /// What a message is: a request, its reply (same type), an error reply or a watch event.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum MessageType {
            $($(#[$doc])* $name = $value,)*
        }

        impl MessageType {
            /// Every type this crate knows, in the order of their numbers.
            pub const ALL: &[MessageType] = &[$(MessageType::$name,)*];

            /// The type with the number `raw`, or `None` for a number this crate does not know.
            #[must_use]
            pub fn from_wire(raw: u32) -> Option<MessageType> {
                match raw {
                    $($value => Some(MessageType::$name),)*
                    _ => None,
                }
            }

            /// The name in the protocol description, without the `XS_` of the header file.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(MessageType::$name => $wire,)*
                }
            }
        }
    };
}

message_types! {
    /// A daemon-specific control command.
    Control = 0, "CONTROL";
    /// Names of a node's children.
    Directory = 1, "DIRECTORY";
    /// A node's value.
    Read = 2, "READ";
    /// A node's permissions.
    GetPerms = 3, "GET_PERMS";
    /// Registers a watch.
    Watch = 4, "WATCH";
    /// Removes a watch.
    Unwatch = 5, "UNWATCH";
    /// Opens a transaction.
    TransactionStart = 6, "TRANSACTION_START";
    /// Commits or drops a transaction.
    TransactionEnd = 7, "TRANSACTION_END";
    /// Tells the daemon of a new domain.
    Introduce = 8, "INTRODUCE";
    /// Tells the daemon that a domain is gone.
    Release = 9, "RELEASE";
    /// A domain's home path.
    GetDomainPath = 10, "GET_DOMAIN_PATH";
    /// Stores a value, creating the node and its missing parents.
    Write = 11, "WRITE";
    /// Creates a node with an empty value, with its missing parents.
    Mkdir = 12, "MKDIR";
    /// Removes a node and everything below it.
    Rm = 13, "RM";
    /// Replaces a node's permissions.
    SetPerms = 14, "SET_PERMS";
    /// Daemon to client, unasked: a watched node changed.
    WatchEvent = 15, "WATCH_EVENT";
    /// Daemon to client: the request failed; the payload is an error name.
    Error = 16, "ERROR";
    /// Whether a domain is known to the daemon.
    IsDomainIntroduced = 17, "IS_DOMAIN_INTRODUCED";
    /// Lets a domain announce its shutdown again.
    Resume = 18, "RESUME";
    /// Gives a domain the rights of another one.
    SetTarget = 19, "SET_TARGET";
    /// Drops all watches and transactions of the caller.
    ResetWatches = 21, "RESET_WATCHES";
    /// A part of the names of a node's children, for directories above [`PAYLOAD_MAX`].
    DirectoryPart = 22, "DIRECTORY_PART";
}

impl MessageType {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }
}

impl std::fmt::Display for MessageType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The errors that have a name in the protocol (`xsd_errors`): on the wire an error is its name, never its number.
pub const ERRORS: &[(&str, Errno)] = &[
    ("EINVAL", Errno::EINVAL),
    ("EACCES", Errno::EACCES),
    ("EEXIST", Errno::EEXIST),
    ("EISDIR", Errno::EISDIR),
    ("ENOENT", Errno::ENOENT),
    ("ENOMEM", Errno::ENOMEM),
    ("ENOSPC", Errno::ENOSPC),
    ("EIO", Errno::EIO),
    ("ENOTEMPTY", Errno::ENOTEMPTY),
    ("ENOSYS", Errno::ENOSYS),
    ("EROFS", Errno::EROFS),
    ("EBUSY", Errno::EBUSY),
    ("EAGAIN", Errno::EAGAIN),
    ("EISCONN", Errno::EISCONN),
    ("E2BIG", Errno::E2BIG),
    ("EPERM", Errno::EPERM),
];

/// The error with the wire name `name` (without its NUL), or `None` for a name the protocol does not list.
#[must_use]
pub fn errno_from_name(name: &[u8]) -> Option<Errno> {
    ERRORS.iter().find(|(known, _)| known.as_bytes() == name).map(|&(_, errno)| errno)
}

/// The wire name of `errno`; like the daemon, `EINVAL` for an error that has no name in the protocol.
#[must_use]
pub fn errno_name(errno: Errno) -> &'static str {
    ERRORS.iter().find(|&&(_, known)| known == errno).map_or("EINVAL", |&(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_finds_its_way_back_from_its_number() {
        for &kind in MessageType::ALL {
            assert_eq!(MessageType::from_wire(kind.to_wire()), Some(kind));
        }
        assert_eq!(MessageType::from_wire(20), None, "RESTRICT was removed and left a hole");
        assert_eq!(MessageType::from_wire(0xffff), None);
    }

    #[test]
    fn every_error_name_finds_its_way_back() {
        for &(name, errno) in ERRORS {
            assert_eq!(errno_from_name(name.as_bytes()), Some(errno));
            assert_eq!(errno_name(errno), name);
        }
        assert_eq!(errno_from_name(b"EQUOTA"), None);
        assert_eq!(errno_from_name(b"ENOENT\0"), None);
        assert_eq!(errno_name(Errno::EPIPE), "EINVAL");
    }

    /// The installed header, if any: Debian's libxen-dev puts it here.
    fn installed_header() -> Option<String> {
        std::fs::read_to_string("/usr/include/xen/io/xs_wire.h").ok()
    }

    /// The enumerators of `enum xsd_sockmsg_type` with their numbers, computed as a C compiler would.
    fn enumerators(header: &str) -> Vec<(String, u32)> {
        let body = header.split_once("enum xsd_sockmsg_type").and_then(|(_, rest)| rest.split_once('}'));
        let body = body.expect("the enum is in the header").0;
        let body = body.split_once('{').expect("the enum has a body").1;
        let code: String = body.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
        let mut code = code;
        while let Some((before, after)) = code.clone().split_once("/*") {
            let rest = after.split_once("*/").expect("comments end").1;
            code = format!("{before}{rest}");
        }
        let mut known: Vec<(String, u32)> = Vec::new();
        let mut next = 0;
        for item in code.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) =
                item.split_once('=').map_or((item, None), |(n, v)| (n.trim(), Some(v.trim())));
            let number = value.map_or(next, |value| {
                let sum = value.split('+').map(str::trim).map(|term| {
                    known.iter().find(|(n, _)| n == term).map(|&(_, v)| v).unwrap_or_else(|| {
                        let hex = term.strip_prefix("0x").map(|digits| u32::from_str_radix(digits, 16));
                        hex.unwrap_or_else(|| term.parse()).expect("a number")
                    })
                });
                sum.sum()
            });
            known.push((name.to_owned(), number));
            next = number + 1;
        }
        known
    }

    fn define(header: &str, name: &str) -> usize {
        let line = header.lines().find(|line| line.starts_with(&format!("#define {name} ")));
        let value = line.and_then(|line| line.split_whitespace().nth(2));
        value.and_then(|value| value.parse().ok()).expect("the define is in the header")
    }

    #[test]
    fn numbers_and_names_agree_with_the_installed_header() {
        let Some(header) = installed_header() else {
            eprintln!("skipped: no xen/io/xs_wire.h on this machine (libxen-dev)");
            return;
        };
        let from_header = enumerators(&header);
        for &kind in MessageType::ALL {
            let name = format!("XS_{}", kind.name());
            let found = from_header.iter().find(|(known, _)| *known == name);
            assert_eq!(found.map(|&(_, v)| v), Some(kind.to_wire()), "{name}");
        }
        for (name, number) in from_header.iter().filter(|(name, _)| name != "XS_INVALID") {
            let ours = MessageType::from_wire(*number);
            // Later headers append types that this crate has no use for.
            let newer = *number > MessageType::DirectoryPart.to_wire();
            assert!(ours.is_some() || newer, "{name} = {number} is missing here");
        }
        assert_eq!(define(&header, "XENSTORE_PAYLOAD_MAX"), PAYLOAD_MAX);
        assert_eq!(define(&header, "XENSTORE_ABS_PATH_MAX"), ABSOLUTE_PATH_MAX);
        assert_eq!(define(&header, "XENSTORE_REL_PATH_MAX"), RELATIVE_PATH_MAX);
        for &(name, _) in ERRORS {
            assert!(header.contains(&format!("XSD_ERROR({name})")), "{name}");
        }
        assert_eq!(header.matches("    XSD_ERROR(").count(), ERRORS.len());
    }
}
