//! A misbehaving guest beside an honest one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use blkif::encode::{DiscardDraft, Draft, DraftSegment, IndirectDraft};
use blkif::{DomId, GrantRef, RawRequest, Sector, Status};
use gntdev::Access;
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::domain::Frame;
use integration::sim::frontend::{Frontend, Shape, write_segments};

use super::support::{guest, raw, rig};

/// Size of the hostile guest's disk, and of the honest one's.
pub const SECTORS: u64 = 2048;
pub const ERROR: i16 = Status::Error.wire();

/// A misbehaving guest (domain 1) beside an honest one (domain 2) on the same host.
pub struct Scene {
    pub rig: Rig,
    pub device: Device,
    pub hostile: Frontend,
    pub honest: Frontend,
}

impl Scene {
    pub fn new() -> Scene {
        Scene::with(Shape::simple(DomId(1)))
    }

    /// The hostile guest connects like this.
    pub fn with(shape: Shape) -> Scene {
        let rig = rig();
        let (_, params) = raw(&rig, "1.img", SECTORS as usize * 512);
        let (device, hostile) = guest(&rig, 1, &params, shape);
        let (_, params) = raw(&rig, "2.img", SECTORS as usize * 512);
        let (_, honest) = guest(&rig, 2, &params, Shape::simple(DomId(2)));
        Scene { rig, device, hostile, honest }
    }

    /// One scene for each way in which the backend reaches a guest's pages.
    pub fn each(mut act: impl FnMut(Scene)) {
        for persistent in [false, true] {
            act(Scene::with(Shape { persistent, indirect: 256, ..Shape::simple(DomId(1)) }));
        }
    }

    /// Sends one entry and gives the operation and the status of its answer, which must carry its id.
    pub fn send(&mut self, id: u64, entry: &RawRequest) -> (u8, i16) {
        self.hostile.put_raw(id, entry);
        self.hostile.kick().unwrap();
        let mut out = VecDeque::new();
        self.hostile.wait(&mut out, PATIENCE).unwrap();
        assert_eq!((out.len(), out[0].id), (1, id), "one answer, with the request's id");
        (out[0].op, out[0].status)
    }

    /// Sends one direct request and gives the status of its answer, which must carry id and operation.
    pub fn raw(&mut self, draft: &Draft) -> i16 {
        let (op, status) = self.send(draft.id, &draft.encode(self.hostile.shape().abi));
        assert_eq!(op, draft.op, "the answer's operation");
        status
    }

    /// The same for an indirect request, whose answer must carry the operation inside it.
    pub fn indirect(&mut self, draft: &IndirectDraft) -> i16 {
        let (op, status) = self.send(draft.id, &draft.encode(self.hostile.shape().abi));
        assert_eq!(op, draft.indirect_op, "the answer's operation");
        status
    }

    /// The same for a discard.
    pub fn discard(&mut self, draft: &DiscardDraft) -> i16 {
        let (op, status) = self.send(draft.id, &draft.encode(self.hostile.shape().abi));
        assert_eq!(op, blkif::abi::op::DISCARD, "the answer's operation");
        status
    }

    /// A page of the guest with a grant, and a segment that covers it.
    pub fn page(&mut self) -> DraftSegment {
        let (_, gref) = self.hostile.page(Access::ReadWrite);
        DraftSegment { gref, first: 0, last: 7 }
    }

    /// A page with these segments, for an indirect request.
    pub fn segments(&mut self, segments: &[DraftSegment]) -> (Frame, GrantRef) {
        let (frame, gref) = self.hostile.page(Access::ReadOnly);
        write_segments(self.hostile.domain(), frame, segments);
        (frame, gref)
    }

    /// Puts several entries at once; the statuses of their answers, in the order of the entries. The ids must differ.
    pub fn batch(&mut self, entries: &[(u64, RawRequest)]) -> Vec<i16> {
        for (id, entry) in entries {
            self.hostile.put_raw(*id, entry);
        }
        self.hostile.kick().unwrap();
        let mut out = VecDeque::new();
        while out.len() < entries.len() {
            self.hostile.wait(&mut out, PATIENCE).unwrap();
        }
        let status = |id| out.iter().find(|answer| answer.id == id).expect("each is answered").status;
        entries.iter().map(|(id, _)| status(*id)).collect()
    }

    /// The hostile guest's own disk still works.
    pub fn still_works(&mut self) {
        self.hostile.write(Sector(64), &[0x5a; 4096]).unwrap();
        assert!(self.hostile.read(Sector(64), 4096).unwrap() == [0x5a; 4096]);
        self.others_still_work();
    }

    /// The honest guest's does, whatever became of the hostile one's.
    pub fn others_still_work(&mut self) {
        self.honest.write(Sector(8), &[0xa5; 4096]).unwrap();
        assert!(self.honest.read(Sector(8), 4096).unwrap() == [0xa5; 4096]);
    }

    /// Runs `act` while another processor of the guest repeats `disturb`.
    pub fn while_disturbed(&mut self, disturb: impl Fn(u64) + Send + Sync, act: impl FnOnce(&mut Scene)) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Ended also when the test panics: the scope would wait for it for ever.
            let guard = Stop(&stop);
            scope.spawn(|| {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    disturb(round);
                    round += 1;
                }
            });
            act(self);
            drop(guard);
        });
    }
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A direct request.
pub fn draft(op: u8, sector: u64, segments: &[DraftSegment]) -> Draft {
    Draft::new(op, 77, sector, segments)
}

/// An indirect request whose segments are in the page `page`.
pub fn indirect(op: u8, sector: u64, count: u16, page: GrantRef) -> IndirectDraft {
    let mut draft =
        IndirectDraft { indirect_op: op, nr_segments: count, id: 78, sector, ..IndirectDraft::default() };
    draft.pages[0] = page;
    draft
}
