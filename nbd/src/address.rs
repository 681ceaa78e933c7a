//! How a server and an export are named.
//!
//! | text | server | export |
//! |---|---|---|
//! | `unix:/path[:name]` | a socket | `name`, or the default one |
//! | `/path` | the same, as XenServer's tapdisk names it | the default one |
//! | `host:port[:name]`, `[ipv6]:port[:name]` | a TCP port | `name`, or the default one |
//! | `nbd+unix:///[name]?socket=/path` | a socket | `name` |
//! | `nbd://host[:port]/[name]`, `//host[:port]/[name]` | a TCP port | `name` |
//!
//! In the first form the path ends at its first colon. In URIs (`doc/uri.md` of the NBD project), `%XX` stands for a byte.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{MAX_NAME, PORT};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the socket with this absolute path.
    Unix(PathBuf),
    /// At a TCP port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

/// A server and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where the server listens.
    pub place: Place,
    /// The export; empty for the server's default one.
    pub export: String,
}

/// Why a text is no [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no NBD server: {why}; write unix:/path[:name], host:port[:name] or a URI such as nbd+unix:///name?socket=/path"
)]
pub struct AddressError {
    text: String,
    why: &'static str,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
            Place::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Place::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        if self.export.is_empty() { Ok(()) } else { write!(f, ":{}", self.export) }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let address = parse(text).and_then(check);
        address.map_err(|why| AddressError { text: text.to_owned(), why })
    }
}

type Parsed<T> = Result<T, &'static str>;

fn parse(text: &str) -> Parsed<Address> {
    if let Some(rest) = text.strip_prefix("nbd+unix://") {
        return unix_uri(rest);
    }
    if let Some(rest) = text.strip_prefix("nbd://").or_else(|| text.strip_prefix("//")) {
        return tcp_uri(rest);
    }
    if text.starts_with('/') {
        return Ok(Address { place: Place::Unix(text.into()), export: String::new() });
    }
    if let Some(rest) = text.strip_prefix("unix:") {
        let (path, export) = rest.split_once(':').unwrap_or((rest, ""));
        return Ok(Address { place: Place::Unix(path.into()), export: export.to_owned() });
    }
    if text.contains("://") {
        return Err("only the URI schemes nbd and nbd+unix are known (no TLS, no vsock)");
    }
    let (host, rest) = host(text)?;
    let rest = rest.strip_prefix(':').ok_or("the port is missing")?;
    let (number, export) = rest.split_once(':').unwrap_or((rest, ""));
    Ok(Address { place: Place::Tcp { host, port: port(number)? }, export: export.to_owned() })
}

fn check(address: Address) -> Parsed<Address> {
    match &address.place {
        Place::Unix(path) if !path.is_absolute() => Err("the path of a socket begins with a slash"),
        Place::Unix(path) if path.as_os_str().as_encoded_bytes().contains(&0) => {
            Err("a path has no zero byte")
        }
        Place::Tcp { host, .. } if host.is_empty() => Err("the host is missing"),
        _ if address.export.len() > MAX_NAME => Err("a name has at most 4096 bytes"),
        _ => Ok(address),
    }
}

/// The host that `text` begins with, without its brackets, and what follows.
fn host(text: &str) -> Parsed<(String, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("a bracket is not closed")?;
        return Ok((host.to_owned(), rest));
    }
    let end = text.find([':', '/']).unwrap_or(text.len());
    let (host, rest) = text.split_at_checked(end).ok_or("the host is malformed")?;
    Ok((host.to_owned(), rest))
}

fn port(text: &str) -> Parsed<u16> {
    // The standard parser also takes a leading plus sign.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&port| digits && port > 0).ok_or("a port is a number from 1 to 65535")
}

fn unix_uri(rest: &str) -> Parsed<Address> {
    let rest = rest.strip_prefix('/').ok_or("a nbd+unix URI has no host")?;
    let (name, query) = rest.split_once('?').ok_or("a nbd+unix URI ends with ?socket=/path")?;
    let socket = query.strip_prefix("socket=").ok_or("the only query parameter is socket")?;
    if socket.contains('&') {
        return Err("the only query parameter is socket");
    }
    Ok(Address { place: Place::Unix(decode(socket)?.into()), export: decode(name)? })
}

fn tcp_uri(rest: &str) -> Parsed<Address> {
    let (server, name) = rest.split_once('/').unwrap_or((rest, ""));
    if name.contains('?') || server.contains(['?', '@']) {
        return Err("a nbd URI has no user and no query");
    }
    let (host, after) = host(server)?;
    let port = match after.strip_prefix(':') {
        Some(number) => port(number)?,
        None if after.is_empty() => PORT,
        None => return Err("the port is malformed"),
    };
    Ok(Address { place: Place::Tcp { host, port }, export: decode(name)? })
}

/// Replaces `%XX`.
fn decode(text: &str) -> Parsed<String> {
    const WRONG: &str = "a percent sign is followed by two hexadecimal digits, and names are UTF-8";
    let mut bytes = Vec::with_capacity(text.len());
    let mut parts = text.split('%');
    bytes.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).ok_or(WRONG)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(WRONG);
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| WRONG)?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).map_err(|_| WRONG)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unix(path: &str, export: &str) -> Address {
        Address { place: Place::Unix(path.into()), export: export.into() }
    }

    fn tcp(host: &str, port: u16, export: &str) -> Address {
        Address { place: Place::Tcp { host: host.into(), port }, export: export.into() }
    }

    #[test]
    fn every_form_names_a_server_and_an_export() {
        for (text, address) in [
            ("unix:/run/a", unix("/run/a", "")),
            ("unix:/run/a:disk:1", unix("/run/a", "disk:1")),
            ("/run/with:colon", unix("/run/with:colon", "")),
            ("localhost:10810", tcp("localhost", 10810, "")),
            ("localhost:10810:/x:y", tcp("localhost", 10810, "/x:y")),
            ("[::1]:99:n", tcp("::1", 99, "n")),
            ("nbd+unix:///?socket=/run/a", unix("/run/a", "")),
            ("nbd+unix:///a%20b/c?socket=/run/%25", unix("/run/%", "a b/c")),
            ("nbd://h/n", tcp("h", 10809, "n")),
            ("nbd://h", tcp("h", 10809, "")),
            ("//[fe80::1]:7//n", tcp("fe80::1", 7, "/n")),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn what_names_no_server_is_refused_with_the_reason() {
        for text in [
            "",
            "x",
            "unix:",
            "unix:rel",
            "host:",
            "host:0",
            "host:65536",
            "host:+1",
            ":10",
            "[::1",
            "[::1]x:1",
            "nbds://h/",
            "nbd+vsock://1/",
            "nbd+unix://host/?socket=/a",
            "nbd+unix:///n",
            "nbd+unix:///?socket=rel",
            "nbd+unix:///?socket=/a&tls=1",
            "nbd://u@h/n",
            "nbd://h/n?x=1",
            "nbd://h/%4",
            "nbd://h/%ff",
            "nbd://h:/n",
            "nbd+unix:///?socket=/a%00b",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("unix:/path"), "{error}");
        }
        assert!(format!("unix:/a:{}", "n".repeat(4097)).parse::<Address>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(nbd(\\+unix)?://|unix:|//|\\[)?.{0,40}") {
            let _ = text.parse::<Address>();
        }

        #[test]
        fn what_is_printed_is_read_back(path in "/[a-z0-9./ ]{0,20}", export in "[a-z:/%]{0,12}") {
            let address = unix(&path, &export);
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
}
