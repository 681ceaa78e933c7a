//! One connection to the daemon.
//!
//! A request blocks until its reply is here. Watch events that arrive in between are queued and never handed out from
//! inside a request, so a caller that handles an event may make requests freely, and a burst of events of any size
//! can neither be lost nor keep a reply from being read.
//!
//! In an event loop: when [`Client::as_fd`] is readable call [`Client::poll_events`], then [`Client::next_event`] until
//! `None`. **Also drain `next_event` after requests made for any other reason**: a request reads everything that is on
//! the connection, and what it queued will not make the descriptor readable again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::codec::{self, Decoder, Frame, ProtocolError};
use crate::error::{Error, Operation};
use crate::path::{self, Escaped, PathUse};
use crate::payload;
use crate::permission::Permission;
use crate::transport::{Transfer, Transport};
use crate::value;
use crate::wire::{MessageType, PAYLOAD_MAX};

use nix::errno::Errno;

/// How often a transaction, or the reading of a long directory, is started over before giving up.
const TRIES: u32 = 100;

/// The most bytes of names collected for one directory. A domain's node quota keeps real ones far below.
const DIRECTORY_MAX: usize = 4 << 20;

/// After so many events [`Client::poll_events`] returns to its caller even if more are waiting.
const POLL_BATCH: usize = 1024;

/// Bytes read at once: four of the largest messages.
const READ_SIZE: usize = 16 << 10;

/// A transaction, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TxId(u32);

impl TxId {
    /// Outside of any transaction: the request takes effect at once.
    pub const NONE: TxId = TxId(0);
}

/// Something at or below a watched path changed, or just might have: events may be spurious, and several changes may
/// have become one event. Look at the current state, do not count events.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WatchEvent {
    /// What changed; relative if the watch was set with a relative path.
    pub path: Vec<u8>,
    /// The token the watch was set with.
    pub token: Vec<u8>,
}

/// A connection to the XenStore daemon; see the [module documentation](self).
#[derive(Debug)]
pub struct Client {
    transport: Transport,
    decoder: Decoder,
    events: VecDeque<WatchEvent>,
    last_req_id: u32,
    connected: bool,
}

impl Client {
    /// Connects to the place named by the environment variable `XENSTORED_PATH`; without it, to the daemon's socket
    /// `/run/xenstored/socket` or else the kernel's device `/dev/xen/xenbus`.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`].
    pub fn connect() -> Result<Client, Error> {
        Ok(Client::over(Transport::open_default()?))
    }

    /// Connects to the unix socket, or opens the character device, at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`].
    pub fn connect_to(path: &Path) -> Result<Client, Error> {
        Ok(Client::over(Transport::open(path)?))
    }

    /// Speaks over a connected socket, which is made non-blocking.
    ///
    /// A socket that cannot be made so yields a client whose every call answers [`Error::Disconnected`].
    #[must_use]
    pub fn from_stream(stream: UnixStream) -> Client {
        let usable = stream.set_nonblocking(true).is_ok();
        Client { connected: usable, ..Client::over(Transport::Socket(stream)) }
    }

    fn over(transport: Transport) -> Client {
        Client {
            transport,
            decoder: Decoder::new(),
            events: VecDeque::new(),
            last_req_id: 0,
            connected: true,
        }
    }

    /// Reads a node's value. It may be any bytes.
    ///
    /// # Errors
    ///
    /// `ENOENT` without the node, `EACCES` without the right to read it.
    pub fn read(&mut self, tx: TxId, path: impl AsRef<[u8]>) -> Result<Vec<u8>, Error> {
        let path = path.as_ref();
        check_path(path, PathUse::Node)?;
        self.request(MessageType::Read, tx, path, &payload::join_strings([path]))
    }

    /// Stores a node's value, at most [`PAYLOAD_MAX`] bytes together with path and NUL (on the kernel's device 16 bytes
    /// less). **Creates the node and all missing parents**: where the node's directory may have been removed by others,
    /// prove in the same transaction that it still exists.
    ///
    /// # Errors
    ///
    /// `EACCES` without the right to write, `ENOSPC` above a quota.
    pub fn write(&mut self, tx: TxId, path: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let path = path.as_ref();
        check_path(path, PathUse::Node)?;
        self.request(MessageType::Write, tx, path, &payload::write(path, value.as_ref())).map(drop)
    }

    /// Makes sure that a node exists; a new one, and missing parents, get empty values.
    ///
    /// # Errors
    ///
    /// As [`Client::write`].
    pub fn mkdir(&mut self, tx: TxId, path: impl AsRef<[u8]>) -> Result<(), Error> {
        let path = path.as_ref();
        check_path(path, PathUse::Node)?;
        self.request(MessageType::Mkdir, tx, path, &payload::join_strings([path])).map(drop)
    }

    /// Removes a node with everything below it.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the node's *parent* does not exist; an absent node is no error. `EACCES` without the right to write
    /// the node.
    pub fn rm(&mut self, tx: TxId, path: impl AsRef<[u8]>) -> Result<(), Error> {
        let path = path.as_ref();
        check_path(path, PathUse::Node)?;
        self.request(MessageType::Rm, tx, path, &payload::join_strings([path])).map(drop)
    }

    /// The names of a node's children, in the daemon's order.
    ///
    /// A list too long for one message is collected in parts; outside a transaction it is started over when it changes
    /// meanwhile, so that the result is one state of the directory.
    ///
    /// # Errors
    ///
    /// As [`Client::read`]; [`Error::Busy`] for a list that changes all the time, [`Error::TooLong`] above 4 MiB.
    pub fn directory(&mut self, tx: TxId, path: impl AsRef<[u8]>) -> Result<Vec<Vec<u8>>, Error> {
        let path = path.as_ref();
        check_path(path, PathUse::Node)?;
        match self.request(MessageType::Directory, tx, path, &payload::join_strings([path])) {
            Err(Error::Errno { errno: Errno::E2BIG, .. }) => self.long_directory(tx, path),
            reply => Ok(payload::directory(&reply?)?),
        }
    }

    fn long_directory(&mut self, tx: TxId, path: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        for _ in 0..TRIES {
            if let Some(names) = self.directory_parts(tx, path)? {
                return Ok(payload::directory(&names)?);
            }
        }
        Err(Error::Busy { operation: MessageType::DirectoryPart, tries: TRIES })
    }

    /// Collects the parts of one list, or `None` if the list changed in between.
    fn directory_parts(&mut self, tx: TxId, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let operation = MessageType::DirectoryPart;
        let mut names = Vec::new();
        let mut generation: Option<Vec<u8>> = None;
        loop {
            let offset = names.len().to_string();
            let request = payload::join_strings([path, offset.as_bytes()]);
            let reply = self.request(operation, tx, path, &request)?;
            let part = payload::directory_part(&reply)?;
            if *generation.get_or_insert_with(|| part.generation.to_vec()) != part.generation {
                return Ok(None);
            }
            names.extend_from_slice(part.names);
            if part.last {
                return Ok(Some(names));
            }
            if names.len() > DIRECTORY_MAX {
                return Err(too_long(operation, path, names.len(), DIRECTORY_MAX));
            }
        }
    }

    /// A node's permissions; the first entry is the owner's.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn get_perms(&mut self, tx: TxId, path: impl AsRef<[u8]>) -> Result<Vec<Permission>, Error> {
        let path = path.as_ref();
        check_path(path, PathUse::NodeOrSpecial)?;
        let reply = self.request(MessageType::GetPerms, tx, path, &payload::join_strings([path]))?;
        Ok(payload::permissions(&reply)?)
    }

    /// Replaces a node's permissions; the first entry names the owner.
    ///
    /// # Errors
    ///
    /// `EACCES` if the caller is not the owner, `EINVAL` without an entry.
    pub fn set_perms(
        &mut self,
        tx: TxId,
        path: impl AsRef<[u8]>,
        permissions: &[Permission],
    ) -> Result<(), Error> {
        let path = path.as_ref();
        check_path(path, PathUse::NodeOrSpecial)?;
        let request = payload::set_perms(path, permissions);
        self.request(MessageType::SetPerms, tx, path, &request).map(drop)
    }

    /// Watches a node and everything below it, or a special name such as `@releaseDomain`.
    ///
    /// One event for `path` itself comes right away, whether it exists or not.
    ///
    /// # Errors
    ///
    /// `EEXIST` if there already is a watch with this path and token, `E2BIG` above a quota; [`Error::InvalidToken`].
    pub fn watch(&mut self, path: impl AsRef<[u8]>, token: impl AsRef<[u8]>) -> Result<(), Error> {
        self.change_watch(MessageType::Watch, path.as_ref(), token.as_ref())
    }

    /// Ends a watch. Events of it that were queued before stay in the queue.
    ///
    /// # Errors
    ///
    /// `ENOENT` without such a watch.
    pub fn unwatch(&mut self, path: impl AsRef<[u8]>, token: impl AsRef<[u8]>) -> Result<(), Error> {
        self.change_watch(MessageType::Unwatch, path.as_ref(), token.as_ref())
    }

    fn change_watch(&mut self, operation: Operation, path: &[u8], token: &[u8]) -> Result<(), Error> {
        check_path(path, PathUse::NodeOrSpecial)?;
        if token.contains(&0) {
            return Err(Error::InvalidToken { token: Escaped(token).to_string() });
        }
        self.request(operation, TxId::NONE, path, &payload::join_strings([path, token])).map(drop)
    }

    /// Runs `f` in a transaction: all its changes take effect together or not at all, and only if nothing that it read
    /// was changed by others meanwhile.
    ///
    /// `f` is called again, up to 100 times, when the daemon found such a change; it must compute everything anew from
    /// what it reads. When `f` fails the transaction is dropped and its error returned. Keep `f` short: an open
    /// transaction holds up a live update of the daemon.
    ///
    /// # Errors
    ///
    /// `f`'s own; [`Error::Busy`] after the last try.
    pub fn transact<T, E: From<Error>>(
        &mut self,
        mut f: impl FnMut(&mut Client, TxId) -> Result<T, E>,
    ) -> Result<T, E> {
        for _ in 0..TRIES {
            let tx = self.start_transaction()?;
            match f(self, tx) {
                Ok(value) => match self.end_transaction(tx, b"T") {
                    Ok(()) => return Ok(value),
                    Err(error) if error.is_again() => {}
                    Err(error) => return Err(error.into()),
                },
                Err(error) => {
                    // The cause is what the caller has to know; a daemon that cannot even drop the transaction has
                    // lost the connection, which the next request tells.
                    let _ = self.end_transaction(tx, b"F");
                    return Err(error);
                }
            }
        }
        Err(Error::Busy { operation: MessageType::TransactionEnd, tries: TRIES }.into())
    }

    fn start_transaction(&mut self) -> Result<TxId, Error> {
        let operation = MessageType::TransactionStart;
        let reply = self.request(operation, TxId::NONE, b"", &payload::join_strings([&b""[..]]))?;
        match value::parse_u32(payload::single_string(&reply)) {
            Ok(id) if id != 0 => Ok(TxId(id)),
            _ => {
                let reason = "it is not the number of a transaction";
                Err(ProtocolError::Payload { kind: operation, reason }.into())
            }
        }
    }

    fn end_transaction(&mut self, tx: TxId, verdict: &[u8]) -> Result<(), Error> {
        self.request(MessageType::TransactionEnd, tx, b"", &payload::join_strings([verdict])).map(drop)
    }

    /// Reads what is on the connection, without blocking, and tells how many events that queued.
    ///
    /// It stops early after a large batch, so that a flood of events cannot keep the caller from everything else: a
    /// caller whose event loop is edge-triggered calls again until the answer is 0.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`] when the connection has ended; events queued before stay available.
    pub fn poll_events(&mut self) -> Result<usize, Error> {
        self.check_connected()?;
        let before = self.events.len();
        let mut outcome = Ok(());
        while outcome.is_ok() && self.events.len().saturating_sub(before) < POLL_BATCH {
            match self.read_available(None) {
                Ok(Progress::WouldBlock) => break,
                Ok(_) => {}
                Err(error) => outcome = self.fail(error),
            }
        }
        match self.events.len().saturating_sub(before) {
            0 => outcome.map(|()| 0),
            // The end of the connection is told by the next call: first come the events that it brought.
            queued => Ok(queued),
        }
    }

    /// Takes the oldest queued event. Never reads from the connection.
    pub fn next_event(&mut self) -> Option<WatchEvent> {
        self.events.pop_front()
    }

    /// Sends one request and waits for its reply's payload.
    fn request(
        &mut self,
        operation: Operation,
        tx: TxId,
        path: &[u8],
        payload: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.check_connected()?;
        let req_id = self.next_req_id();
        let message = codec::encode(operation, req_id, tx.0, payload)
            .ok_or_else(|| too_long(operation, path, payload.len(), PAYLOAD_MAX))?;
        let reply = self.exchange(&message, req_id, operation).or_else(|error| self.fail(error))?;
        if reply.header.kind == MessageType::Error.to_wire() {
            return Err(Error::refused(operation, path, payload::single_string(&reply.payload)));
        }
        Ok(reply.payload)
    }

    fn exchange(&mut self, message: &[u8], req_id: u32, operation: Operation) -> Result<Frame, Error> {
        self.send(message)?;
        let reply = loop {
            match self.read_available(Some(req_id))? {
                Progress::Reply(reply) => break reply,
                Progress::Events => {}
                Progress::WouldBlock => self.transport.wait_readable()?,
            }
        };
        let got = reply.header.kind;
        if got == operation.to_wire() || got == MessageType::Error.to_wire() {
            Ok(reply)
        } else {
            Err(ProtocolError::WrongType { expected: operation, got }.into())
        }
    }

    /// Writes a whole message. While there is no room it takes in events: a daemon that waits for us to read before
    /// it reads on would otherwise wait for ever.
    fn send(&mut self, message: &[u8]) -> Result<(), Error> {
        let mut rest = message;
        while !rest.is_empty() {
            match self.transport.write(rest)? {
                Transfer::Bytes(count) => rest = rest.get(count..).unwrap_or_default(),
                Transfer::WouldBlock => {
                    self.transport.wait_readable_or_writable()?;
                    self.read_available(None)?;
                }
            }
        }
        Ok(())
    }

    /// Reads once and sorts everything that is complete: events into the queue, the reply to `awaited` to the caller.
    ///
    /// Nothing complete stays behind in the decoder, because no readiness of the descriptor would announce it.
    fn read_available(&mut self, awaited: Option<u32>) -> Result<Progress, Error> {
        let mut buffer = [0; READ_SIZE];
        let count = match self.transport.read(&mut buffer)? {
            Transfer::Bytes(count) => count,
            Transfer::WouldBlock => return Ok(Progress::WouldBlock),
        };
        self.decoder.extend(buffer.get(..count).unwrap_or_default());
        let mut awaited = awaited;
        let mut progress = Progress::Events;
        while let Some(frame) = self.decoder.next_frame()? {
            let header = frame.header;
            if header.kind == MessageType::WatchEvent.to_wire() {
                let (path, token) = payload::watch_event(&frame.payload)?;
                self.events.push_back(WatchEvent { path: path.to_vec(), token: token.to_vec() });
            } else if awaited == Some(header.req_id) {
                awaited = None;
                progress = Progress::Reply(frame);
            } else {
                let expected = awaited.unwrap_or(0);
                return Err(ProtocolError::UnexpectedReply { expected, got: header.req_id }.into());
            }
        }
        Ok(progress)
    }

    fn next_req_id(&mut self) -> u32 {
        // 0 is what watch events carry.
        self.last_req_id = self.last_req_id.checked_add(1).unwrap_or(1);
        self.last_req_id
    }

    fn check_connected(&self) -> Result<(), Error> {
        if self.connected { Ok(()) } else { Err(Error::Disconnected) }
    }

    /// Gives the connection up: after `error` the position in the stream is not known any more.
    fn fail<T>(&mut self, error: Error) -> Result<T, Error> {
        log::debug!("giving up the XenStore connection: {error}");
        self.connected = false;
        Err(error)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

/// What one read brought.
enum Progress {
    /// The awaited reply, and perhaps events.
    Reply(Frame),
    /// Events, or a part of a message.
    Events,
    /// Nothing was there.
    WouldBlock,
}

fn check_path(path: &[u8], needed: PathUse) -> Result<(), Error> {
    path::check(path, needed).map_err(|reason| Error::InvalidPath { path: Escaped(path).to_string(), reason })
}

fn too_long(operation: Operation, path: &[u8], len: usize, max: usize) -> Error {
    Error::TooLong { operation, path: Escaped(path).to_string(), len, max }
}

#[cfg(test)]
mod tests;
