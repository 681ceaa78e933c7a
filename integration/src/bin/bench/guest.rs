//! A guest that does nothing but keep its ring full: no map, no list, nothing allocated for a request.
//!
//! Each of its `depth` requests has pages of its own, granted once; a request that is answered is sent again with another sector.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use blkif::abi::{MAX_INDIRECT_PAGES, MAX_SEGMENTS, op};
use blkif::encode::{Draft, DraftSegment, IndirectDraft};
use blkif::ids::PAGE_SIZE;
use blkif::{Abi, DomId, GrantRef, Port, RawRequest, RingOrder, keys};
use evtchn::EventChannel;
use gntdev::Access;
use integration::sim::domain::SimDomain;
use integration::sim::events::SimEvents;
use integration::sim::front_ring::FrontRing;
use integration::sim::frontend::write_segments;

/// The guest's domain.
pub const GUEST: DomId = DomId(1);
const BACKEND: DomId = DomId(0);
const ABI: Abi = Abi::X86_64;
/// Requests between two looks at the clock.
const CLOCK_EVERY: u64 = 64;

/// How a guest learns of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It looks all the time, on a CPU of its own.
    Poll,
    /// It sleeps until it is notified, as Linux's frontend does.
    Events,
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Whether it writes.
    pub write: bool,
    /// Whether sectors follow each other or are drawn at random.
    pub random: bool,
    /// Bytes of a request, a multiple of 4096.
    pub block: usize,
    /// Requests in flight, at most 32.
    pub depth: usize,
    /// Whether it offers persistent grants.
    pub persistent: bool,
    /// How it learns of answers.
    pub wait: Wait,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Requests answered.
    pub requests: u64,
    /// In this time.
    pub time: Duration,
}

impl Outcome {
    /// Requests a second.
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let requests = self.requests as f64;
        requests / self.time.as_secs_f64()
    }
}

/// A request's entry but for its sector.
enum Template {
    Direct(Draft),
    Indirect(IndirectDraft),
}

impl Template {
    fn encode(&mut self, sector: u64) -> RawRequest {
        match self {
            Template::Direct(draft) => {
                draft.sector = sector;
                draft.encode(ABI)
            }
            Template::Indirect(draft) => {
                draft.sector = sector;
                draft.encode(ABI)
            }
        }
    }
}

/// Where the next request goes.
struct Sectors {
    random: bool,
    /// Sectors of a request.
    step: u64,
    /// Requests that fit on the disk.
    places: u64,
    state: u64,
}

impl Sectors {
    fn next(&mut self) -> u64 {
        if self.random {
            // Marsaglia's xorshift: cheap, and good enough to defeat read-ahead.
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        } else {
            self.state += 1;
        }
        self.state % self.places * self.step
    }
}

/// A guest with one ring of one page.
pub struct Guest {
    domain: SimDomain,
    events: SimEvents,
    port: Port,
    ring: FrontRing,
    ring_ref: GrantRef,
    load: Load,
    templates: Vec<Template>,
    sectors: Sectors,
}

impl Guest {
    /// Creates the guest in the simulated hypervisor's folder, for a disk of `capacity` bytes.
    pub fn create(dir: &Path, load: Load, capacity: u64) -> io::Result<Guest> {
        let segments = load.block / PAGE_SIZE;
        let pages = u32::try_from(load.depth * (segments + 1) + 2).map_err(io::Error::other)?;
        let mut domain = SimDomain::create(dir, GUEST, pages)?;
        let mut events = SimEvents::open(dir, GUEST)?;
        let port = events.allocate(BACKEND)?;
        let ring = FrontRing::create(&mut domain, ABI, RingOrder::default(), 0);
        let frame = ring.frames().next().ok_or(io::ErrorKind::InvalidData)?;
        let ring_ref = domain.grant(frame, BACKEND, Access::ReadWrite);
        let templates = (0..load.depth).map(|id| template(&mut domain, &load, id as u64)).collect();
        let block = load.block as u64;
        let sectors = Sectors {
            random: load.random,
            step: block / 512,
            places: capacity / block,
            state: 0x9e37_79b9_7f4a_7c15,
        };
        Ok(Guest { domain, events, port, ring, ring_ref, load, templates, sectors })
    }

    /// The keys for the frontend's XenStore directory, without `state`.
    pub fn keys(&self) -> Vec<(String, String)> {
        vec![
            (keys::PROTOCOL.to_owned(), ABI.protocol_name().to_owned()),
            (keys::FEATURE_PERSISTENT.to_owned(), u8::from(self.load.persistent).to_string()),
            (keys::EVENT_CHANNEL.to_owned(), self.port.to_string()),
            (keys::RING_REF.to_owned(), self.ring_ref.to_string()),
        ]
    }

    /// Keeps the ring full for so long, then waits for the rest.
    pub fn run(&mut self, time: Duration) -> io::Result<Outcome> {
        for id in 0..self.templates.len() {
            self.send(id);
        }
        self.publish()?;
        let start = Instant::now();
        let (mut requests, mut look) = (0, CLOCK_EVERY);
        let taken = loop {
            requests += self.turn(true)?;
            if requests >= look {
                look = requests + CLOCK_EVERY;
                let taken = start.elapsed();
                if taken >= time {
                    break taken;
                }
            }
        };
        let outcome = Outcome { requests, time: taken };
        let mut left = self.templates.len() as u64;
        while left > 0 {
            left -= self.turn(false)?;
        }
        Ok(outcome)
    }

    /// Takes the answers that are there, at least one unless polling; sends each request `again`.
    fn turn(&mut self, again: bool) -> io::Result<u64> {
        let mut count = 0;
        while let Some(response) = self.ring.take(&self.domain) {
            if response.status != 0 {
                return Err(io::Error::other(format!("a request failed: {response:?}")));
            }
            if again {
                self.send(usize::try_from(response.id).map_err(io::Error::other)?);
            }
            count += 1;
        }
        if count > 0 {
            self.publish()?;
        } else if self.load.wait == Wait::Events && !self.ring.arm(&self.domain) {
            self.sleep()?;
        } else {
            std::hint::spin_loop();
        }
        Ok(count)
    }

    fn send(&mut self, id: usize) {
        let sector = self.sectors.next();
        let entry = self.templates[id].encode(sector);
        self.ring.put(&self.domain, &entry);
    }

    fn publish(&mut self) -> io::Result<()> {
        if self.ring.push(&self.domain) { self.events.notify(self.port) } else { Ok(()) }
    }

    fn sleep(&self) -> io::Result<()> {
        if !self.events.wait(Duration::from_secs(20))? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the backend does not answer"));
        }
        let mut ports = [Port(0); 4];
        while self.events.pending(&mut ports)? > 0 {}
        self.events.unmask(self.port)
    }
}

/// A request with pages of its own.
fn template(domain: &mut SimDomain, load: &Load, id: u64) -> Template {
    let mut page = || {
        let frame = domain.allocate(1);
        (frame, domain.grant(frame, BACKEND, Access::ReadWrite))
    };
    let pages: Vec<_> = (0..load.block / PAGE_SIZE).map(|_| page()).collect();
    let segments: Vec<_> =
        pages.iter().map(|(_, gref)| DraftSegment { gref: *gref, first: 0, last: 7 }).collect();
    let op = if load.write { op::WRITE } else { op::READ };
    if segments.len() <= MAX_SEGMENTS {
        return Template::Direct(Draft::new(op, id, 0, &segments));
    }
    let (frame, gref) = page();
    write_segments(domain, frame, &segments);
    let mut pages = [GrantRef::default(); MAX_INDIRECT_PAGES];
    pages[0] = gref;
    let nr_segments = u16::try_from(segments.len()).unwrap_or(u16::MAX);
    Template::Indirect(IndirectDraft { indirect_op: op, nr_segments, handle: 0, id, sector: 0, pages })
}
