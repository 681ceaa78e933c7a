//! A disk that an NBD server has.
//!
//! One connection serves the disk, from its one thread, or some where the server allows that and there is much to do ([`several`]).
//! Requests in flight on one that is lost are sent again: reading and writing the same bytes twice makes no difference.
//! When none is left, requests wait while a thread connects anew; what was acknowledged but not flushed is
//! sent again too ([`kept`]), so a server that dies takes nothing along that the guest was promised. After
//! [`Limits::reconnect`] without an answer, requests fail with EIO, at once from then on, until an attempt in the
//! background succeeds.
//!
//! A server that comes back with an export that is smaller, read-only or has larger blocks than before is not accepted: that
//! is another disk. One that breaks the protocol fails the requests in flight, and is connected anew for the next.

mod blocks;
mod connection;
mod dial;
mod kept;
mod several;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nbd::client::{Ask, Export};
use nbd::flags::{CommandFlags, TransmissionFlags};
use nbd::wire::{Command, extent};
use nbd::{Address, ErrorCode};
use nix::errno::Errno;
use tap_ctl::proto::Discard;

use self::connection::{Body, Broken, Connection};
use self::dial::{Attempts, Dialled, Plan, dial};
use self::kept::Kept;
use self::several::Several;
use super::OpenError;
use super::locks::BlockLocks;
use crate::buf::Buf;
use crate::io::Io;
use crate::socket::interruptible;
use crate::sync::{Group, WaitSet};

/// How long to wait for a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a connection and its handshake.
    pub connect: Duration,
    /// From the loss of a connection until requests fail.
    pub reconnect: Duration,
    /// Between attempts in the background after that.
    pub retry: Duration,
    /// After one of several connections was lost or could not be had, until another is asked for.
    pub more: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connect: Duration::from_secs(10),
            reconnect: Duration::from_secs(30),
            retry: Duration::from_secs(5),
            more: Duration::from_secs(60),
        }
    }
}

/// A disk that an NBD server has.
#[derive(Debug)]
pub struct Nbd {
    address: Address,
    /// For messages.
    name: PathBuf,
    limits: Limits,
    /// As it was when the disk was opened.
    export: Export,
    connections: Several,
    /// When the trouble began that has not ended with an answer.
    trouble: Cell<Option<Instant>>,
    /// Connections in a row that were lost without an answer.
    failures: Cell<u32>,
    /// A task waits for a new connection.
    connecting: Cell<bool>,
    /// Requests fail; the attempt in the background, and when the next one may begin.
    down: RefCell<Option<(Option<Attempts>, Instant)>>,
    changed: WaitSet,
    kept: Kept,
    flushes: Group,
    /// A write that was acknowledged could not be repeated.
    forgotten: Cell<bool>,
    locks: BlockLocks,
    bounce: Option<blocks::Bounce>,
}

impl Nbd {
    /// Connects, blocking. `spec` is what follows `nbd:` in the name of an image.
    pub fn open(spec: &str, readonly: bool, limits: Limits, io: &Io) -> Result<Nbd, OpenError> {
        let name = PathBuf::from(format!("nbd:{spec}"));
        let refuse = |errno, message: String| OpenError::new(&name, errno, message);
        let address: Address = spec.parse().map_err(|error| refuse(Errno::EINVAL, format!("{error}")))?;
        let dialled = dial(&address, limits.connect).map_err(|why| refuse(Errno::ECONNREFUSED, why))?;
        let export = dialled.export;
        if export.size < SECTOR_SIZE {
            return Err(OpenError::empty(&name));
        }
        if !readonly && export.flags.has(TransmissionFlags::READ_ONLY) {
            return Err(refuse(Errno::EROFS, "the server's export is read-only; attach it read-only".into()));
        }
        if !export.flags.has(TransmissionFlags::FLUSH) && !readonly {
            log::warn!("{}: the server does not know flushes; what it acknowledges must do", name.display());
        }
        let memory = || refuse(Errno::ENOMEM, "no memory for its buffers".into());
        let connection = Connection::new(dialled, io).ok_or_else(memory)?;
        let bounce = match export.blocks.minimum {
            0..=512 => None,
            larger => Some(blocks::Bounce::new(larger, io).ok_or_else(memory)?),
        };
        Ok(Nbd {
            address,
            name,
            limits,
            export,
            connections: Several::new(Rc::new(connection)),
            trouble: Cell::new(None),
            failures: Cell::new(0),
            connecting: Cell::new(false),
            down: RefCell::default(),
            changed: WaitSet::new(io.scheduler.clone()),
            kept: Kept::default(),
            flushes: Group::new(io.scheduler.clone()),
            forgotten: Cell::new(false),
            locks: BlockLocks::new(io.scheduler.clone()),
            bounce,
        })
    }

    /// The image, for messages.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Capacity, in whole blocks of the server.
    pub fn sectors(&self) -> u64 {
        let block = u64::from(self.export.blocks.minimum).max(SECTOR_SIZE);
        self.export.size / block * (block / SECTOR_SIZE)
    }

    /// Bytes of the server's smallest block, 512 at least.
    pub fn block_size(&self) -> u32 {
        self.export.blocks.minimum.max(512)
    }

    fn can(&self, what: TransmissionFlags) -> bool {
        self.export.flags.has(what)
    }

    /// What can be discarded.
    pub fn discard_limits(&self) -> Option<Discard> {
        let can = self.can(TransmissionFlags::TRIM) || self.can(TransmissionFlags::WRITE_ZEROES);
        let granularity = self.export.blocks.preferred.max(512);
        can.then_some(Discard { granularity, alignment: 0, secure: false })
    }

    /// Fills `range` of `buf`, whole sectors, from `sector` on.
    pub async fn read(&self, io: &Io, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let offset = self.inside(sector, range.len() as u64)?;
        match &self.bounce {
            Some(bounce) => self.read_blocks(io, bounce, offset, buf, range).await,
            None => self.read_whole(io, offset, buf, range).await,
        }
    }

    /// Writes `range` of `buf`, whole sectors, to `sector` and on.
    pub async fn write(&self, io: &Io, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let offset = self.inside(sector, range.len() as u64)?;
        match &self.bounce {
            Some(bounce) => self.write_blocks(io, bounce, offset, buf, range).await,
            None => self.write_whole(io, offset, buf, range).await,
        }
    }

    /// Byte position of sectors on the disk.
    fn inside(&self, sector: Sector, len: u64) -> Result<u64, Errno> {
        let start = sector.0.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
        let end = start.checked_add(len).filter(|&end| end <= self.sectors() * SECTOR_SIZE);
        end.map(|_| start).ok_or(Errno::EINVAL)
    }

    /// The longest payload that the server takes, in whole blocks.
    fn most(&self) -> usize {
        self.export.blocks.maximum as usize & !(self.block_size() as usize - 1)
    }

    /// The parts in which bytes from `offset` on are moved: position and range.
    fn parts(&self, offset: u64, range: Range<usize>) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
        let (first, most) = (range.start, self.most().max(512));
        range
            .clone()
            .step_by(most)
            .map(move |at| (offset + (at - first) as u64, at..range.end.min(at + most)))
    }

    /// Reads whole blocks.
    async fn read_whole(&self, io: &Io, offset: u64, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        for (offset, part) in self.parts(offset, range) {
            let ask = ask(Command::Read, offset, part.len())?;
            self.request(io, &ask, &Body::Receive(buf, part)).await?;
        }
        Ok(())
    }

    /// Writes whole blocks.
    async fn write_whole(&self, io: &Io, offset: u64, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        // Without flushes there is no telling what is durable: nothing is kept, as nothing could ever be forgotten.
        let keep = self.can(TransmissionFlags::FLUSH);
        for (offset, part) in self.parts(offset, range) {
            let ask = ask(Command::Write, offset, part.len())?;
            if !keep {
                self.request(io, &ask, &Body::Send(buf, part, None)).await?;
                continue;
            }
            let copy = RefCell::new(Vec::with_capacity(part.len()));
            self.request(io, &ask, &Body::Send(buf, part, Some(&copy))).await?;
            self.kept.add(offset, copy.into_inner());
            if self.kept.is_full() {
                self.flush(io).await?;
            }
        }
        Ok(())
    }

    /// Gives up the content of `count` sectors, as far as they are whole blocks of the server's.
    pub async fn discard(&self, io: &Io, sector: Sector, count: u64) -> Result<(), Errno> {
        let len = count.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
        let start = self.inside(sector, len)?;
        let block = u64::from(self.block_size());
        let (mut at, end) = (start.next_multiple_of(block), (start + len) / block * block);
        let command = if self.can(TransmissionFlags::TRIM) { Command::Trim } else { Command::WriteZeroes };
        while at < end {
            // Without payload, so that the server's limit for one does not count; 1 GiB takes it a moment.
            let part = (end - at).min(1 << 30);
            let ask = ask(command, at, usize::try_from(part).map_err(|_| Errno::EINVAL)?)?;
            self.request(io, &ask, &Body::None).await?;
            at += part;
        }
        Ok(())
    }

    /// What the server says of the allocation of `count` sectors, the longest prefix with one answer: whether it reads as zeros,
    /// and how many sectors it is. Without that ability, and for less than a sector, it may hold data.
    pub async fn allocation(&self, io: &Io, sector: Sector, count: u32) -> Result<(bool, u32), Errno> {
        if self.export.allocation.is_none() {
            return Ok((false, count));
        }
        let count = count.min(1 << 21);
        let len = u64::from(count) * SECTOR_SIZE;
        let start = self.inside(sector, len)?;
        let block = u64::from(self.block_size());
        if !start.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Ok((false, count));
        }
        let mut ask = ask(Command::BlockStatus, start, usize::try_from(len).map_err(|_| Errno::EINVAL)?)?;
        ask.flags = CommandFlags::REQ_ONE;
        let extents = self.request(io, &ask, &Body::None).await?;
        let first = extents.first().ok_or(Errno::EIO)?;
        let zero = first.flags.get() & extent::ZERO != 0;
        match first.len.get() / 512 {
            0 => Ok((false, 1)),
            sectors => Ok((zero, sectors.min(count))),
        }
    }

    /// Makes everything durable that was acknowledged.
    pub async fn flush(&self, io: &Io) -> Result<(), Errno> {
        if !self.can(TransmissionFlags::FLUSH) {
            return Ok(());
        }
        self.flushes
            .run(async || {
                let mark = self.kept.mark();
                self.request(io, &ask(Command::Flush, 0, 0)?, &Body::None).await?;
                if self.forgotten.get() {
                    return Err(Errno::EIO);
                }
                self.kept.forget(mark);
                Ok(())
            })
            .await
    }

    /// Carries a request out, on as many connections as it takes.
    async fn request(&self, io: &Io, ask: &Ask, body: &Body<'_>) -> Result<Vec<nbd::wire::Extent>, Errno> {
        loop {
            let connection = self.connected(io).await?;
            let why = match connection.exchange(io, ask, body).await {
                Ok(Err(ErrorCode::Shutdown)) => shutting_down(),
                Ok(outcome) => {
                    self.trouble.set(None);
                    self.failures.set(0);
                    return outcome.map_err(|code| Errno::from_raw(code.errno()));
                }
                Err(broken) => broken,
            };
            self.lost(&connection, why.clone());
            if let Broken::Violation(_) = why {
                return Err(Errno::EIO);
            }
        }
    }

    /// A connection is of no use any more.
    fn lost(&self, connection: &Rc<Connection>, why: Broken) {
        let why = connection.give_up(why);
        match self.connections.remove(connection, self.limits.more) {
            // Each of its requests says so.
            None => return,
            Some(0) => log::warn!("{}: {why}; connecting anew, requests wait", self.name.display()),
            Some(left) => {
                log::warn!("{}: {why}; what it had in flight goes over {left} others", self.name.display());
                return;
            }
        }
        self.failures.set(if connection.has_answered() { 0 } else { self.failures.get().saturating_add(1) });
        // One that was fine for long, with nothing to do, begins new trouble.
        if self.trouble.get().is_none() || connection.begun.elapsed() > self.limits.reconnect {
            self.trouble.set(Some(Instant::now()));
        }
    }

    /// A connection for the next request, as soon as there is one.
    ///
    /// # Errors
    /// EIO: the server has been away for too long.
    async fn connected(&self, io: &Io) -> Result<Rc<Connection>, Errno> {
        loop {
            if let Some(connection) = self.connections.pick() {
                if let Some(why) = connection.broken() {
                    self.lost(&connection, why);
                } else if !self.widen(io, &connection).await {
                    return Ok(connection);
                }
                continue;
            }
            if self.connecting.get() {
                self.changed.wait().await;
                continue;
            }
            let dialled = match self.background()? {
                Some(dialled) => Ok(dialled),
                None => {
                    let _turn = Turn::new(&self.connecting, &self.changed);
                    self.reconnect(io).await
                }
            };
            let _turn = Turn::new(&self.connecting, &self.changed);
            match dialled {
                Ok(dialled) => self.take_up(dialled, io).await,
                Err(why) => self.go_down(&why),
            }
        }
    }

    /// While requests fail: a connection that was made in the background; `None` while they do not fail.
    fn background(&self) -> Result<Option<Dialled>, Errno> {
        let mut down = self.down.borrow_mut();
        let Some((attempts, next)) = &mut *down else { return Ok(None) };
        match attempts.as_ref().map(Attempts::outcome) {
            Some(Some(Ok(dialled))) => {
                *down = None;
                self.trouble.set(None);
                Ok(Some(dialled))
            }
            Some(Some(Err(why))) => {
                log::debug!("{}: {why}", self.name.display());
                *attempts = None;
                *next = Instant::now() + self.limits.retry;
                Err(Errno::EIO)
            }
            Some(None) => Err(Errno::EIO),
            None => {
                if *next <= Instant::now() {
                    *attempts = self.attempts(Instant::now(), 0).ok();
                }
                Err(Errno::EIO)
            }
        }
    }

    fn attempts(&self, until: Instant, failures: u32) -> std::io::Result<Attempts> {
        let plan = Plan { failures, until, timeout: self.limits.connect };
        let before = self.export;
        Attempts::start(self.address.clone(), plan, move |now| same_disk(&before, now))
    }

    /// Waits for a new connection until the time is over.
    async fn reconnect(&self, io: &Io) -> Result<Dialled, String> {
        let since = self.trouble.get().unwrap_or_else(Instant::now);
        let until = since + self.limits.reconnect;
        if until <= Instant::now() {
            return Err("the server accepts connections but gives no answers".into());
        }
        let attempts = self.attempts(until, self.failures.get()).map_err(|error| error.to_string())?;
        let byte = io.pool.meta().await;
        while let Some(piece) = byte.piece(0..1) {
            let rung = interruptible(&attempts.bell, io.reactor.receive(attempts.bell.as_fd(), piece));
            match rung.await {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                _ => break,
            }
        }
        attempts.outcome().unwrap_or_else(|| Err("the thread that connects has ended".into()))
    }

    /// From now on requests fail.
    fn go_down(&self, why: &str) {
        let time = self.limits.reconnect.as_secs_f32();
        log::error!(
            "{}: no connection for {time} s: {why}; requests fail until there is one",
            self.name.display()
        );
        *self.down.borrow_mut() = Some((None, Instant::now() + self.limits.retry));
    }

    /// Puts a new connection to use, after repeating what was acknowledged and not flushed.
    async fn take_up(&self, dialled: Dialled, io: &Io) {
        let Some(connection) = Connection::new(dialled, io) else {
            return self.go_down("no memory for its buffers");
        };
        let connection = Rc::new(connection);
        let repeated = self.repeat(&connection, io).await;
        self.connections.begin(connection.clone());
        match repeated {
            Ok(count) => log::info!("{}: connected anew, {count} writes repeated", self.name.display()),
            Err(why) => self.lost(&connection, why),
        }
    }

    async fn repeat(&self, connection: &Connection, io: &Io) -> Result<usize, Broken> {
        let mut last = None;
        while let Some(write) = self.kept.after(last.as_deref()) {
            let ask = Ask {
                command: Command::Write,
                flags: CommandFlags::default(),
                offset: write.offset,
                len: u32::try_from(write.bytes.len()).unwrap_or(u32::MAX),
            };
            if let Err(code) = connection.exchange(io, &ask, &Body::Bytes(&write.bytes)).await? {
                if code == ErrorCode::Shutdown {
                    return Err(shutting_down());
                }
                let name = self.name.display();
                log::error!("{name}: a write that was acknowledged before cannot be repeated: {code}");
                self.forgotten.set(true);
            }
            last = Some(write);
        }
        Ok(self.kept.len())
    }
}

/// A server that does no more is as good as gone, and the next one may be there soon.
fn shutting_down() -> Broken {
    Broken::Lost("the server is shutting down".into())
}

/// One task at a time sees to the connection.
struct Turn<'a> {
    mark: &'a Cell<bool>,
    changed: &'a WaitSet,
}

impl<'a> Turn<'a> {
    fn new(mark: &'a Cell<bool>, changed: &'a WaitSet) -> Turn<'a> {
        mark.set(true);
        Turn { mark, changed }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.mark.set(false);
        self.changed.wake_all();
    }
}

fn ask(command: Command, offset: u64, len: usize) -> Result<Ask, Errno> {
    let len = u32::try_from(len).map_err(|_| Errno::EINVAL)?;
    Ok(Ask { command, flags: CommandFlags::default(), offset, len })
}

/// Whether an export can take the place of one that was in use before.
fn same_disk(before: &Export, now: &Export) -> Result<(), String> {
    let lost = before.flags.without(now.flags).without(TransmissionFlags::ROTATIONAL);
    let needed = TransmissionFlags::FLUSH | TransmissionFlags::TRIM | TransmissionFlags::WRITE_ZEROES;
    if now.size < before.size {
        return Err(format!("the export has shrunk from {} to {} bytes", before.size, now.size));
    }
    if now.flags.without(before.flags).has(TransmissionFlags::READ_ONLY) {
        return Err("the export has become read-only".into());
    }
    if !TransmissionFlags(lost.0 & needed.0).is_empty() {
        return Err("the export can do less than before".into());
    }
    if now.blocks.minimum > before.blocks.minimum || now.blocks.maximum < before.blocks.maximum {
        return Err("the export has other block sizes than before".into());
    }
    if before.allocation.is_some() && now.allocation.is_none() {
        return Err("the export tells no allocation any more".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
