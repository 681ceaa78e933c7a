//! A simulated block frontend: one guest with one disk.
//!
//! It does what Linux's `xen-blkfront` does: allocates a ring, grants it, offers an event channel, sends requests whose
//! data lies in granted pages, and waits for the answers. It checks each answer as Linux does, and hands it out with
//! the data. [`Frontend::ring`], [`Frontend::domain`] and [`Frontend::put_raw`] give tests the means to misbehave.
//!
//! Publishing the keys in XenStore is the caller's: [`Frontend::keys`] says which.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use blkif::abi::{MAX_SEGMENTS, op};
use blkif::encode::{Draft, DraftSegment};
use blkif::ids::{PAGE_SIZE, SECTOR_SIZE};
use blkif::{Abi, DomId, GrantRef, Port, RawRequest, Response, RingOrder, Sector, Status, keys};
use evtchn::EventChannel;
use gntdev::Access;

use super::domain::{Frame, SimDomain};
use super::events::SimEvents;
use super::front_ring::FrontRing;

/// Pages of the simulated guest: enough for the largest ring with 11 pages of data in each entry.
const GUEST_PAGES: u32 = 16 + 512 * 11 + 64;

/// [`SECTOR_SIZE`] for lengths in memory.
const SECTOR_BYTES: usize = 512;

/// Longest transfer of one request, in bytes.
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
    /// Layout of the ring's entries.
    pub abi: Abi,
    /// Size of the ring.
    pub order: RingOrder,
    /// Where the ring's counters start; 0 unless the wrap at 2³² is the subject.
    pub start: u32,
}

impl Shape {
    /// A guest with a ring of one page, served from domain 0.
    pub fn simple(guest: DomId) -> Shape {
        Shape { guest, backend: DomId(0), abi: Abi::X86_64, order: RingOrder::default(), start: 0 }
    }
}

/// A request to send. Data is a positive multiple of 512 bytes, at most [`MAX_TRANSFER`].
#[derive(Clone, Copy, Debug)]
pub enum Io<'a> {
    /// Read so many bytes.
    Read(Sector, usize),
    /// Write these bytes.
    Write(Sector, &'a [u8]),
    /// Flush.
    Flush,
    /// Write with a barrier; may be empty.
    Barrier(Sector, &'a [u8]),
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

#[derive(Debug)]
struct InFlight {
    op: u8,
    pages: Vec<(Frame, GrantRef)>,
    /// Bytes to hand out; 0 unless it is a read.
    read: usize,
}

/// A guest's disk.
#[derive(Debug)]
pub struct Frontend {
    shape: Shape,
    domain: SimDomain,
    events: SimEvents,
    port: Port,
    ring: FrontRing,
    ring_refs: Vec<GrantRef>,
    pool: Vec<(Frame, GrantRef)>,
    in_flight: HashMap<u64, InFlight>,
    /// Ids of raw requests without an answer.
    raw: HashMap<u64, u32>,
    next_id: u64,
}

impl Frontend {
    /// Creates the guest in the simulated hypervisor's folder, with its ring granted and its port waiting.
    pub fn create(dir: &Path, shape: Shape) -> io::Result<Frontend> {
        let mut domain = SimDomain::create(dir, shape.guest, GUEST_PAGES)?;
        let mut events = SimEvents::open(dir, shape.guest)?;
        let port = events.allocate(shape.backend)?;
        let ring = FrontRing::create(&mut domain, shape.abi, shape.order, shape.start);
        let frames: Vec<Frame> = ring.frames().collect();
        let ring_refs =
            frames.into_iter().map(|frame| domain.grant(frame, shape.backend, Access::ReadWrite)).collect();
        Ok(Frontend {
            shape,
            domain,
            events,
            port,
            ring,
            ring_refs,
            pool: Vec::new(),
            in_flight: HashMap::new(),
            raw: HashMap::new(),
            next_id: 1,
        })
    }

    /// The keys for the frontend's XenStore directory, without `state`, as Linux writes them.
    pub fn keys(&self) -> Vec<(String, String)> {
        let mut list = vec![
            (keys::EVENT_CHANNEL.to_owned(), self.port.to_string()),
            (keys::PROTOCOL.to_owned(), self.shape.abi.protocol_name().to_owned()),
        ];
        if let [only] = self.ring_refs[..] {
            list.push((keys::RING_REF.to_owned(), only.to_string()));
            return list;
        }
        list.push((keys::RING_PAGE_ORDER.to_owned(), self.shape.order.get().to_string()));
        for (i, gref) in self.ring_refs.iter().enumerate() {
            list.push((format!("{}{i}", keys::RING_REF), gref.to_string()));
        }
        list
    }

    /// The grant references of the ring's pages.
    pub fn ring_refs(&self) -> &[GrantRef] {
        &self.ring_refs
    }

    /// The guest's event channel port.
    pub fn port(&self) -> Port {
        self.port
    }

    /// How the frontend was created.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether a backend has bound the port.
    pub fn is_connected(&self) -> bool {
        self.events.is_connected(self.port)
    }

    /// The guest's memory and grants.
    pub fn domain(&mut self) -> &mut SimDomain {
        &mut self.domain
    }

    /// The ring, with the memory it lies in.
    pub fn ring(&mut self) -> (&mut FrontRing, &SimDomain) {
        (&mut self.ring, &self.domain)
    }

    /// Requests that can be sent before the ring is full.
    pub fn free_slots(&self) -> u32 {
        self.ring.free_slots()
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.in_flight.len() + self.raw.len()
    }

    /// Puts a request into the ring. The backend sees it after [`Frontend::kick`].
    ///
    /// # Panics
    ///
    /// If the ring is full or the length is not one a request can have.
    pub fn submit(&mut self, io: Io<'_>) -> u64 {
        let (op, sector, len, data) = match io {
            Io::Read(sector, len) => (op::READ, sector, len, &[][..]),
            Io::Write(sector, data) => (op::WRITE, sector, data.len(), data),
            Io::Flush => (op::FLUSH_DISKCACHE, Sector(0), 0, &[][..]),
            Io::Barrier(sector, data) => (op::WRITE_BARRIER, sector, data.len(), data),
        };
        assert!(len <= MAX_TRANSFER && len.is_multiple_of(SECTOR_BYTES), "a request of {len} bytes");
        let pages: Vec<_> = (0..len.div_ceil(PAGE_SIZE)).map(|_| self.take_page()).collect();
        let mut segments = Vec::with_capacity(pages.len());
        for (i, (frame, gref)) in pages.iter().enumerate() {
            let bytes = (len - i * PAGE_SIZE).min(PAGE_SIZE);
            match data.get(i * PAGE_SIZE..i * PAGE_SIZE + bytes) {
                Some(data) => self.domain.write(*frame, 0, data),
                None => self.domain.write(*frame, 0, &[UNTOUCHED; PAGE_SIZE]),
            }
            let last = u8::try_from(bytes / SECTOR_BYTES - 1).expect("at most 8 sectors");
            segments.push(DraftSegment { gref: *gref, first: 0, last });
        }
        let id = self.next_id;
        self.next_id += 1;
        self.ring.put(&self.domain, &Draft::new(op, id, sector.0, &segments).encode(self.shape.abi));
        let read = if op == op::READ { len } else { 0 };
        self.in_flight.insert(id, InFlight { op, pages, read });
        id
    }

    /// Puts an entry into the ring as it stands. Its answer, if one comes, is completed without data and unchecked.
    pub fn put_raw(&mut self, id: u64, request: &RawRequest) {
        self.ring.put(&self.domain, request);
        *self.raw.entry(id).or_default() += 1;
    }

    /// A page with a grant for the backend, for raw requests. It is never used for others.
    pub fn page(&mut self, access: Access) -> (Frame, GrantRef) {
        let frame = self.domain.allocate(1);
        (frame, self.domain.grant(frame, self.shape.backend, access))
    }

    /// Publishes what was put, and notifies the backend if it asked for it.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.push(&self.domain) { self.notify() } else { Ok(()) }
    }

    /// Notifies the backend, asked for or not.
    pub fn notify(&self) -> io::Result<()> {
        self.events.notify(self.port)
    }

    /// Takes the answers that are there, without waiting, and puts them behind `out`.
    ///
    /// # Errors
    ///
    /// An answer that Linux would disable the disk for: to no request, or with another operation.
    pub fn poll(&mut self, out: &mut VecDeque<Completion>) -> io::Result<()> {
        while let Some(response) = self.ring.take(&self.domain) {
            out.push_back(self.complete(response)?);
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
            if self.ring.arm(&self.domain) {
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
            let part = (len - data.len()).min(MAX_TRANSFER);
            data.extend(okay(self.run(Io::Read(at, part))?)?.data);
        }
        Ok(data)
    }

    /// Writes `data`, in as many requests as it takes, one after the other.
    pub fn write(&mut self, sector: Sector, data: &[u8]) -> io::Result<()> {
        let mut at = sector;
        for part in data.chunks(MAX_TRANSFER) {
            okay(self.run(Io::Write(at, part))?)?;
            at.0 += part.len() as u64 / SECTOR_SIZE;
        }
        Ok(())
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) -> io::Result<()> {
        okay(self.run(Io::Flush)?).map(drop)
    }

    fn complete(&mut self, response: Response) -> io::Result<Completion> {
        let Response { id, op, status } = response;
        if let Some(count) = self.raw.get_mut(&id) {
            *count -= 1;
            if *count == 0 {
                self.raw.remove(&id);
            }
            return Ok(Completion { id, op, status, data: Vec::new() });
        }
        let Some(request) = self.in_flight.remove(&id) else {
            return Err(io::Error::other(format!("an answer to no request: {response:?}")));
        };
        if op != request.op {
            return Err(io::Error::other(format!("an answer to operation {}: {response:?}", request.op)));
        }
        let mut data = vec![0; request.read];
        for (part, (frame, _)) in data.chunks_mut(PAGE_SIZE).zip(&request.pages) {
            self.domain.read(*frame, 0, part);
        }
        self.pool.extend(request.pages);
        Ok(Completion { id, op, status, data })
    }

    /// A page for data; its grant lives as long as the guest.
    fn take_page(&mut self) -> (Frame, GrantRef) {
        match self.pool.pop() {
            Some(page) => page,
            None => self.page(Access::ReadWrite),
        }
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
