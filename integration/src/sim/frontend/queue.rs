//! One ring of a frontend: its event channel, its pages, and the requests in it.

use std::collections::HashMap;
use std::io;

use blkif::abi::{MAX_INDIRECT_PAGES, MAX_SEGMENTS, SEGMENT_SIZE, op};
use blkif::encode::{DiscardDraft, Draft, DraftSegment, IndirectDraft};
use blkif::ids::PAGE_SIZE;
use blkif::{GrantRef, Port, RawRequest, Response, Sector};
use gntdev::Access;

use super::pages::{Granted, Pages};
use super::{Completion, Io, SECTOR_BYTES, Shape, UNTOUCHED};
use crate::sim::domain::{Frame, SimDomain};
use crate::sim::front_ring::FrontRing;

/// A queue of a frontend.
#[derive(Debug)]
pub struct Queue {
    /// The ring.
    pub ring: FrontRing,
    /// The grants of the ring's pages, in order.
    pub refs: Vec<GrantRef>,
    /// The guest's event channel.
    pub port: Port,
    pages: Pages,
    in_flight: HashMap<u64, InFlight>,
    /// Ids of raw requests without an answer.
    raw: HashMap<u64, u32>,
}

#[derive(Debug)]
struct InFlight {
    op: u8,
    /// The data's.
    pages: Vec<Granted>,
    /// The page with the segments.
    indirect: Option<Granted>,
    /// Bytes to hand out; 0 unless it is a read.
    read: usize,
}

impl Queue {
    /// A ring without requests, granted to the backend.
    pub fn create(domain: &mut SimDomain, shape: &Shape, port: Port) -> Queue {
        let ring = FrontRing::create(domain, shape.abi, shape.order, shape.start);
        let frames: Vec<Frame> = ring.frames().collect();
        let grant = |frame| domain.grant(frame, shape.backend, Access::ReadWrite);
        let refs = frames.into_iter().map(grant).collect();
        let pages = Pages::new(shape.backend, shape.persistent);
        Queue { ring, refs, port, pages, in_flight: HashMap::new(), raw: HashMap::new() }
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.in_flight.len() + self.raw.values().map(|count| *count as usize).sum::<usize>()
    }

    /// Puts a request into the ring, as an indirect one if it has more segments than an entry.
    pub fn submit(&mut self, domain: &mut SimDomain, id: u64, io: Io<'_>) {
        let (op, sector, len, data) = match io {
            Io::Read(sector, len) => (op::READ, sector, len, &[][..]),
            Io::Write(sector, data) => (op::WRITE, sector, data.len(), data),
            Io::Flush => (op::FLUSH_DISKCACHE, Sector(0), 0, &[][..]),
            Io::Barrier(sector, data) => (op::WRITE_BARRIER, sector, data.len(), data),
            Io::Discard { sector, count, secure } => {
                let draft = DiscardDraft { flag: secure.into(), handle: 0, id, sector: sector.0, count };
                self.ring.put(domain, &draft.encode(self.ring.abi()));
                self.track(id, op::DISCARD, Vec::new(), None, 0);
                return;
            }
        };
        let access = if op == op::READ { Access::ReadWrite } else { Access::ReadOnly };
        let pages: Vec<_> = (0..len.div_ceil(PAGE_SIZE)).map(|_| self.pages.take(domain, access)).collect();
        let segments = fill(domain, &pages, len, data);
        let mut indirect = None;
        let entry = if segments.len() <= MAX_SEGMENTS {
            Draft::new(op, id, sector.0, &segments).encode(self.ring.abi())
        } else {
            let page = self.pages.take(domain, Access::ReadOnly);
            write_segments(domain, page.0, &segments);
            indirect = Some(page);
            let mut pages = [GrantRef::default(); MAX_INDIRECT_PAGES];
            pages[0] = page.1;
            let nr_segments = u16::try_from(segments.len()).expect("segments of one page");
            IndirectDraft { indirect_op: op, nr_segments, handle: 0, id, sector: sector.0, pages }
                .encode(self.ring.abi())
        };
        self.ring.put(domain, &entry);
        self.track(id, op, pages, indirect, if op == op::READ { len } else { 0 });
    }

    fn track(&mut self, id: u64, op: u8, pages: Vec<Granted>, indirect: Option<Granted>, read: usize) {
        self.in_flight.insert(id, InFlight { op, pages, indirect, read });
    }

    /// Puts an entry into the ring as it stands.
    pub fn put_raw(&mut self, domain: &SimDomain, id: u64, request: &RawRequest) {
        self.ring.put(domain, request);
        *self.raw.entry(id).or_default() += 1;
    }

    /// What an answer completes.
    pub fn complete(&mut self, domain: &mut SimDomain, response: Response) -> io::Result<Completion> {
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
            domain.read(*frame, 0, part);
        }
        for page in request.pages.into_iter().chain(request.indirect) {
            self.pages.give(domain, page)?;
        }
        Ok(Completion { id, op, status, data })
    }

    /// Ends the ring: its grants, and those of all pages, in flight or not. Nothing may be mapped any more.
    pub fn dissolve(mut self, domain: &mut SimDomain) -> io::Result<()> {
        for (_, request) in self.in_flight.drain() {
            for page in request.pages.into_iter().chain(request.indirect) {
                self.pages.give(domain, page)?;
            }
        }
        self.pages.dissolve(domain);
        for (frame, gref) in self.ring.frames().zip(self.refs) {
            domain.revoke(gref);
            domain.free(frame, 1);
        }
        Ok(())
    }
}

/// Puts what is to be written into the pages, or what shows later that nothing was read into them.
fn fill(domain: &SimDomain, pages: &[Granted], len: usize, data: &[u8]) -> Vec<DraftSegment> {
    let segment = |(i, (frame, gref)): (usize, &Granted)| {
        let bytes = (len - i * PAGE_SIZE).min(PAGE_SIZE);
        match data.get(i * PAGE_SIZE..i * PAGE_SIZE + bytes) {
            Some(data) => domain.write(*frame, 0, data),
            None => domain.write(*frame, 0, &[UNTOUCHED; PAGE_SIZE]),
        }
        let last = u8::try_from(bytes / SECTOR_BYTES - 1).expect("at most 8 sectors");
        DraftSegment { gref: *gref, first: 0, last }
    };
    pages.iter().enumerate().map(segment).collect()
}

/// Writes the segments of an indirect request into their page.
pub fn write_segments(domain: &SimDomain, page: Frame, segments: &[DraftSegment]) {
    for (i, segment) in segments.iter().enumerate() {
        domain.write(page, i * SEGMENT_SIZE, &segment.encode());
    }
}
