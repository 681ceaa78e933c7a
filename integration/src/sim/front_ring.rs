//! The frontend's end of a ring in a simulated domain's memory.
//!
//! The notification protocol is the one of [`blkif::indices`], seen from the other side. Besides the honest operations
//! there are raw ones, for frontends that lie.

use std::sync::atomic::{AtomicU32, Ordering};

use blkif::abi::{HEADER_SIZE, MAX_RESPONSE_SIZE, header};
use blkif::indices::{arm, publish};
use blkif::{Abi, RawRequest, Response, RingOrder};

use super::domain::{Frame, SimDomain};

/// The frontend's counters of a ring that lies in consecutive pages of a domain.
#[derive(Clone, Copy, Debug)]
pub struct FrontRing {
    frame: Frame,
    abi: Abi,
    order: RingOrder,
    req_prod_pvt: u32,
    req_prod: u32,
    rsp_cons: u32,
}

impl FrontRing {
    /// Allocates and initialises a ring whose counters start at `start`; 0 for a frontend that starts afresh.
    pub fn create(domain: &mut SimDomain, abi: Abi, order: RingOrder, start: u32) -> FrontRing {
        let frame = domain.allocate(1 << order.get());
        let ring = FrontRing { frame, abi, order, req_prod_pvt: start, req_prod: start, rsp_cons: start };
        domain.write(frame, 0, &vec![0; order.bytes()]);
        for offset in [header::REQ_PROD, header::RSP_PROD] {
            ring.word(domain, offset).store(start, Ordering::Relaxed);
        }
        for offset in [header::REQ_EVENT, header::RSP_EVENT] {
            ring.word(domain, offset).store(start.wrapping_add(1), Ordering::Relaxed);
        }
        ring
    }

    /// The ring's pages, in order.
    pub fn frames(&self) -> impl Iterator<Item = Frame> + use<> {
        let (first, order) = (self.frame.0, self.order);
        (0..1 << order.get()).map(move |page| Frame(first + page))
    }

    /// The layout of the entries.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// The ring's size.
    pub fn order(&self) -> RingOrder {
        self.order
    }

    /// Requests that can be put before the ring is full.
    pub fn free_slots(&self) -> u32 {
        let unanswered = self.req_prod_pvt.wrapping_sub(self.rsp_cons);
        self.abi.slots(self.order).saturating_sub(unanswered)
    }

    /// Writes a request into the next entry. The backend sees it after [`FrontRing::push`].
    ///
    /// # Panics
    ///
    /// If the ring is full.
    pub fn put(&mut self, domain: &SimDomain, request: &RawRequest) {
        assert!(self.free_slots() > 0, "the ring is full");
        assert_eq!(request.abi(), self.abi);
        self.poke(domain, self.entry_offset(self.req_prod_pvt), request.as_bytes());
        self.req_prod_pvt = self.req_prod_pvt.wrapping_add(1);
    }

    /// Publishes the requests put since the last push. True: notify the backend.
    pub fn push(&mut self, domain: &SimDomain) -> bool {
        let old = self.req_prod;
        self.req_prod = self.req_prod_pvt;
        if old == self.req_prod {
            return false;
        }
        let (prod, event) = (self.word(domain, header::REQ_PROD), self.word(domain, header::REQ_EVENT));
        publish(prod, event, old, self.req_prod)
    }

    /// The next response, if the backend has published one.
    pub fn take(&mut self, domain: &SimDomain) -> Option<Response> {
        if self.word(domain, header::RSP_PROD).load(Ordering::Acquire) == self.rsp_cons {
            return None;
        }
        let mut bytes = [0; MAX_RESPONSE_SIZE];
        let len = self.abi.response_size();
        self.peek(domain, self.entry_offset(self.rsp_cons), &mut bytes[..len]);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Some(Response::decode(bytes))
    }

    /// Asks to be notified of the next response. True: one is there already.
    pub fn arm(&self, domain: &SimDomain) -> bool {
        let (prod, event) = (self.word(domain, header::RSP_PROD), self.word(domain, header::RSP_EVENT));
        arm(prod, event, self.rsp_cons) != self.rsp_cons
    }

    /// Byte offset in the ring of the entry at a free-running position.
    pub fn entry_offset(&self, position: u32) -> usize {
        let slot = position & (self.abi.slots(self.order) - 1);
        HEADER_SIZE + slot as usize * self.abi.entry_size()
    }

    /// The word at byte `offset` of the ring, such as one of [`blkif::abi::header`]; to be scribbled on at will.
    pub fn word<'a>(&self, domain: &'a SimDomain, offset: usize) -> &'a AtomicU32 {
        assert!(offset < self.order.bytes());
        domain.memory().word(domain.offset(self.frame) + offset)
    }

    /// Overwrites bytes of the ring.
    pub fn poke(&self, domain: &SimDomain, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.order.bytes());
        domain.write(self.frame, offset, bytes);
    }

    /// Reads bytes of the ring.
    pub fn peek(&self, domain: &SimDomain, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.order.bytes());
        domain.read(self.frame, offset, bytes);
    }
}

#[cfg(test)]
mod tests {
    use blkif::DomId;
    use blkif::encode::Draft;

    use super::*;

    #[test]
    fn response_that_comes_in_before_the_event_is_armed_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut domain = SimDomain::create(dir.path(), DomId(1), 4).unwrap();
        let mut ring = FrontRing::create(&mut domain, Abi::X86_64, RingOrder::default(), u32::MAX);
        ring.put(&domain, &Draft::new(0, 7, 0, &[]).encode(Abi::X86_64));
        assert!(ring.push(&domain));
        assert!(!ring.push(&domain), "nothing new");
        assert_eq!(ring.take(&domain), None);
        let response = Response { id: 7, op: 0, status: 0 };
        ring.poke(&domain, ring.entry_offset(u32::MAX), &response.encode());
        ring.word(&domain, header::RSP_PROD).store(0, Ordering::Release);
        assert!(ring.arm(&domain), "the response was there already");
        assert_eq!(ring.take(&domain), Some(response));
        assert!(!ring.arm(&domain));
        assert_eq!(ring.word(&domain, header::RSP_EVENT).load(Ordering::Relaxed), 1);
        assert_eq!(ring.free_slots(), 32);
    }
}
