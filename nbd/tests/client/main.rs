//! A client against servers that are good, odd and malicious.

mod handshake;
mod replies;
