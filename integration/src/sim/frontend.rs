//! A simulated block frontend: one guest with one disk.
//!
//! It does what Linux's `xen-blkfront` does: allocates rings, grants them, offers event channels, sends requests whose
//! data lies in granted pages, and waits for the answers. It checks each answer as Linux does, and hands it out with
//! the data. [`Frontend::ring`], [`Frontend::domain`] and [`Frontend::put_raw`] give tests the means to misbehave.
//!
//! Publishing the keys in XenStore is the caller's: [`Frontend::keys`] says which.

mod pages;
mod queue;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use blkif::abi::MAX_SEGMENTS;
use blkif::ids::{PAGE_SIZE, SECTOR_SIZE};
use blkif::{Abi, DomId, GrantRef, Port, RawRequest, RingOrder, Sector, Status, keys};
use evtchn::EventChannel;
use gntdev::Access;

use self::queue::Queue;
use super::domain::{Frame, SimDomain};
use super::events::SimEvents;
use super::front_ring::FrontRing;

pub use self::queue::write_segments;

/// Most pages of data that a simulated guest has: its grant table has room for as many.
const MAX_DATA_PAGES: u32 = 30_000;

/// [`SECTOR_SIZE`] for lengths in memory.
const SECTOR_BYTES: usize = 512;

/// Longest transfer of one direct request, in bytes.
pub const MAX_TRANSFER: usize = MAX_SEGMENTS * PAGE_SIZE;

/// What the guest's pages hold before a read, to show what the backend did not write.
pub const UNTOUCHED: u8 = 0xee;

/// How a frontend connects.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The guest.
    pub guest: DomId,
    /// The backend's domain.
    pub backend: DomId,
    /// Layout of the rings' entries.
    pub abi: Abi,
    /// Size of each ring.
    pub order: RingOrder,
    /// Where the rings' counters start; 0 unless the wrap at 2³² is the subject.
    pub start: u32,
    /// Number of rings, from 1 on.
    pub queues: usize,
    /// Whether pages are used again under the grants that the backend keeps mapped.
    pub persistent: bool,
    /// Most segments of an indirect request, up to 512; 0 for a frontend that does not know them.
    pub indirect: u16,
}

impl Shape {
    /// A guest with one ring of one page and no extras, served from domain 0.
    pub fn simple(guest: DomId) -> Shape {
        Shape {
            guest,
            backend: DomId(0),
            abi: Abi::X86_64,
            order: RingOrder::default(),
            start: 0,
            queues: 1,
            persistent: false,
            indirect: 0,
        }
    }

    /// Longest transfer of one request, in bytes.
    pub fn max_transfer(&self) -> usize {
        MAX_SEGMENTS.max(usize::from(self.indirect)) * PAGE_SIZE
    }

    /// Pages that a guest needs to fill its rings with the longest requests.
    fn pages(&self) -> u32 {
        let queues = u32::try_from(self.queues).unwrap_or(u32::MAX);
        let slots = queues.saturating_mul(self.abi.slots(self.order));
        let each = u32::from(self.indirect).max(11) + 1;
        (queues << self.order.get()) + slots.saturating_mul(each).min(MAX_DATA_PAGES) + 64
    }
}

/// A request to send. Data is a positive multiple of 512 bytes, at most [`Shape::max_transfer`].
#[derive(Clone, Copy, Debug)]
pub enum Io<'a> {
    /// Read so many bytes.
    Read(Sector, usize),
    /// Write these bytes.
    Write(Sector, &'a [u8]),
    /// Flush.
    Flush,
    /// Write with a barrier; may be empty, and is at most [`MAX_TRANSFER`] long.
    Barrier(Sector, &'a [u8]),
    /// Forget sectors.
    Discard {
        /// The first.
        sector: Sector,
        /// How many.
        count: u64,
        /// Nobody may be able to read them any more.
        secure: bool,
    },
}

impl Io<'_> {
    /// Bytes of data.
    fn len(&self) -> usize {
        match self {
            Io::Read(_, len) => *len,
            Io::Write(_, data) | Io::Barrier(_, data) => data.len(),
            Io::Flush | Io::Discard { .. } => 0,
        }
    }
}

/// An answered request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`Frontend::submit`] returned, or the id of a raw request.
    pub id: u64,
    /// The operation the backend put into the response.
    pub op: u8,
    /// The number on the wire.
    pub status: i16,
    /// What was read, for a read request; whatever the pages hold, also after an error.
    pub data: Vec<u8>,
}

impl Completion {
    /// Whether the request succeeded.
    pub fn is_okay(&self) -> bool {
        self.status == Status::Okay.wire()
    }
}

/// A guest's disk.
#[derive(Debug)]
pub struct Frontend {
    shape: Shape,
    domain: SimDomain,
    events: SimEvents,
    queues: Vec<Queue>,
    /// Rings from before the guest slept, which the backend may have mapped still.
    slept: Vec<Queue>,
    /// The queue for the next request.
    turn: usize,
    next_id: u64,
}

impl Frontend {
    /// Creates the guest in the simulated hypervisor's folder, with its rings granted and its ports waiting.
    pub fn create(dir: &Path, shape: Shape) -> io::Result<Frontend> {
        let domain = SimDomain::create(dir, shape.guest, shape.pages())?;
        let events = SimEvents::open(dir, shape.guest)?;
        let (queues, slept) = (Vec::new(), Vec::new());
        let mut frontend = Frontend { shape, domain, events, queues, slept, turn: 0, next_id: 1 };
        frontend.set_up()?;
        Ok(frontend)
    }

    fn set_up(&mut self) -> io::Result<()> {
        for _ in 0..self.shape.queues {
            let port = self.events.allocate(self.shape.backend)?;
            self.queues.push(Queue::create(&mut self.domain, &self.shape, port));
        }
        Ok(())
    }

    /// What a driver does that was unloaded and loaded again: gives up everything the backend had, and starts with new rings.
    /// Requests in flight are forgotten.
    ///
    /// # Errors
    ///
    /// The backend has something mapped.
    pub fn restart(&mut self) -> io::Result<()> {
        let mapped = self.domain.mapped_pages();
        if mapped > 0 {
            return Err(io::Error::other(format!("{mapped} pages are mapped after the backend has closed")));
        }
        for queue in self.queues.drain(..) {
            self.events.unbind(queue.port)?;
            queue.dissolve(&mut self.domain)?;
        }
        for queue in self.slept.drain(..) {
            queue.dissolve(&mut self.domain)?;
        }
        self.set_up()
    }

    /// What a driver does whose guest has slept and wakes on the same host: it does not ask the backend, and starts with
    /// new rings. Requests in flight are forgotten; a real driver sends them again.
    ///
    /// # Errors
    ///
    /// Those of the event channels.
    pub fn resume(&mut self) -> io::Result<()> {
        for queue in &self.queues {
            self.events.unbind(queue.port)?;
        }
        self.slept.append(&mut self.queues);
        self.set_up()
    }

    /// The keys for the frontend's XenStore directory, without `state`, as Linux writes them.
    pub fn keys(&self) -> Vec<(String, String)> {
        let mut list = vec![
            (keys::PROTOCOL.to_owned(), self.shape.abi.protocol_name().to_owned()),
            (keys::FEATURE_PERSISTENT.to_owned(), u8::from(self.shape.persistent).to_string()),
        ];
        if self.shape.order != RingOrder::default() {
            list.push((keys::RING_PAGE_ORDER.to_owned(), self.shape.order.get().to_string()));
        }
        if self.queues.len() > 1 {
            list.push((keys::MULTI_QUEUE_NUM_QUEUES.to_owned(), self.queues.len().to_string()));
        }
        for (i, queue) in self.queues.iter().enumerate() {
            let folder = if self.queues.len() > 1 { format!("queue-{i}/") } else { String::new() };
            list.push((format!("{folder}{}", keys::EVENT_CHANNEL), queue.port.to_string()));
            if let [only] = queue.refs[..] {
                list.push((format!("{folder}{}", keys::RING_REF), only.to_string()));
                continue;
            }
            for (n, gref) in queue.refs.iter().enumerate() {
                list.push((format!("{folder}{}{n}", keys::RING_REF), gref.to_string()));
            }
        }
        list
    }

    /// Each ring: the grant references of its pages, and the guest's event channel.
    pub fn queues(&self) -> impl Iterator<Item = (&[GrantRef], Port)> {
        self.queues.iter().map(|queue| (&queue.refs[..], queue.port))
    }

    /// The grant references of the first ring's pages.
    pub fn ring_refs(&self) -> &[GrantRef] {
        &self.queues[0].refs
    }

    /// The first ring's event channel, on the guest's side.
    pub fn port(&self) -> Port {
        self.queues[0].port
    }

    /// How the frontend was created.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether a backend has bound every port.
    pub fn is_connected(&self) -> bool {
        self.queues.iter().all(|queue| self.events.is_connected(queue.port))
    }

    /// The guest's memory and grants.
    pub fn domain(&mut self) -> &mut SimDomain {
        &mut self.domain
    }

    /// The first ring, with the memory it lies in.
    pub fn ring(&mut self) -> (&mut FrontRing, &SimDomain) {
        (&mut self.queues[0].ring, &self.domain)
    }

    /// Pages that the backend has mapped now, beside those of the rings.
    pub fn mapped_data_pages(&self) -> u32 {
        let refs = self.queues.iter().flat_map(|queue| &queue.refs);
        self.domain.mapped_pages() - refs.map(|gref| self.domain.mappings(*gref)).sum::<u32>()
    }

    /// Requests that can be sent before all rings are full.
    pub fn free_slots(&self) -> u32 {
        self.queues.iter().map(|queue| queue.ring.free_slots()).sum()
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.queues.iter().map(Queue::outstanding).sum()
    }

    /// Puts a request into a ring, the rings taking turns. The backend sees it after [`Frontend::kick`].
    ///
    /// # Panics
    ///
    /// If all rings are full or the length is not one a request can have.
    pub fn submit(&mut self, io: Io<'_>) -> u64 {
        let limit = if matches!(io, Io::Barrier(..)) { MAX_TRANSFER } else { self.shape.max_transfer() };
        assert!(
            io.len() <= limit && io.len().is_multiple_of(SECTOR_BYTES),
            "a request of {} bytes",
            io.len()
        );
        let count = self.queues.len();
        let has_room = |queue: &usize| self.queues[*queue].ring.free_slots() > 0;
        let turn = (self.turn..self.turn + count).map(|turn| turn % count).find(has_room);
        let queue = turn.expect("all rings are full");
        self.turn = queue + 1;
        let id = self.next_id;
        self.next_id += 1;
        self.queues[queue].submit(&mut self.domain, id, io);
        id
    }

    /// Puts an entry into the first ring as it stands. Its answer, if one comes, is completed without data and unchecked.
    pub fn put_raw(&mut self, id: u64, request: &RawRequest) {
        self.put_raw_on(0, id, request);
    }

    /// The same for any ring.
    pub fn put_raw_on(&mut self, queue: usize, id: u64, request: &RawRequest) {
        self.queues[queue].put_raw(&self.domain, id, request);
    }

    /// A page with a grant for the backend, for raw requests. It is never used for others.
    pub fn page(&mut self, access: Access) -> (Frame, GrantRef) {
        let frame = self.domain.allocate(1);
        (frame, self.domain.grant(frame, self.shape.backend, access))
    }

    /// Publishes what was put, and notifies the backend of each ring where it asked for it.
    pub fn kick(&mut self) -> io::Result<()> {
        for queue in &mut self.queues {
            if queue.ring.push(&self.domain) {
                self.events.notify(queue.port)?;
            }
        }
        Ok(())
    }

    /// Notifies the backend of every ring, asked for or not.
    pub fn notify(&self) -> io::Result<()> {
        self.queues.iter().try_for_each(|queue| self.events.notify(queue.port))
    }

    /// Takes the answers that are there, without waiting, and puts them behind `out`.
    ///
    /// # Errors
    ///
    /// An answer that Linux would disable the disk for: to no request, with another operation, or given while a page
    /// that must not be mapped any more still is.
    pub fn poll(&mut self, out: &mut VecDeque<Completion>) -> io::Result<()> {
        for queue in &mut self.queues {
            while let Some(response) = queue.ring.take(&self.domain) {
                out.push_back(queue.complete(&mut self.domain, response)?);
            }
        }
        Ok(())
    }

    /// Waits until at least one answer is there, at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`Frontend::poll`]; `TimedOut` if no answer came.
    pub fn wait(&mut self, out: &mut VecDeque<Completion>, timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        let before = out.len();
        loop {
            self.poll(out)?;
            if out.len() > before {
                return Ok(());
            }
            // Each ring must be armed, whichever has answers already.
            let answered = |queue: &Queue| queue.ring.arm(&self.domain);
            if self.queues.iter().map(answered).fold(false, |any, one| any | one) {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.events.wait(left)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the backend does not answer"));
            }
            self.drain_events()?;
        }
    }

    /// Sends one request and waits for its answer, which must be the next one.
    pub fn run(&mut self, io: Io<'_>) -> io::Result<Completion> {
        let id = self.submit(io);
        self.kick()?;
        let mut out = VecDeque::new();
        self.wait(&mut out, Duration::from_secs(30))?;
        match out.pop_front() {
            Some(completion) if completion.id == id => Ok(completion),
            other => Err(io::Error::other(format!("expected the answer to request {id}, got {other:?}"))),
        }
    }

    /// Reads `len` bytes, in as many requests as it takes, one after the other.
    pub fn read(&mut self, sector: Sector, len: usize) -> io::Result<Vec<u8>> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let at = Sector(sector.0 + data.len() as u64 / SECTOR_SIZE);
            let part = (len - data.len()).min(self.shape.max_transfer());
            data.extend(okay(self.run(Io::Read(at, part))?)?.data);
        }
        Ok(data)
    }

    /// Writes `data`, in as many requests as it takes, one after the other.
    pub fn write(&mut self, sector: Sector, data: &[u8]) -> io::Result<()> {
        let mut at = sector;
        for part in data.chunks(self.shape.max_transfer()) {
            okay(self.run(Io::Write(at, part))?)?;
            at.0 += part.len() as u64 / SECTOR_SIZE;
        }
        Ok(())
    }

    /// Forgets sectors.
    pub fn discard(&mut self, sector: Sector, count: u64) -> io::Result<()> {
        okay(self.run(Io::Discard { sector, count, secure: false })?).map(drop)
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) -> io::Result<()> {
        okay(self.run(Io::Flush)?).map(drop)
    }

    fn drain_events(&self) -> io::Result<()> {
        let mut ports = [Port(0); 4];
        loop {
            let count = self.events.pending(&mut ports)?;
            let Some(fired) = ports.get(..count).filter(|fired| !fired.is_empty()) else { return Ok(()) };
            for port in fired {
                self.events.unmask(*port)?;
            }
        }
    }
}

/// The completion of a request that succeeded.
fn okay(completion: Completion) -> io::Result<Completion> {
    if completion.is_okay() {
        Ok(completion)
    } else {
        Err(io::Error::other(format!("request {} got status {}", completion.id, completion.status)))
    }
}

#[cfg(test)]
mod tests;
