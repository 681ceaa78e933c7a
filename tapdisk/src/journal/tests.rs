use blkif::GrantRef;
use blkif::abi::op;
use blkif::encode::{Draft, DraftSegment};
use proptest::prelude::*;

use super::*;

/// The one whose entries are no whole number of words.
const ABI: Abi = Abi::X86_32;
const SLOTS: u32 = 8;

fn request(id: u64) -> RawRequest {
    let segment = DraftSegment { gref: GrantRef(9), first: 0, last: 7 };
    Draft::new(op::WRITE, id, id * 8, &[segment; 11][..(id % 11) as usize + 1]).encode(ABI)
}

/// A ring and who serves it; every step that the guest or a successor could see is in `steps`.
struct Model {
    _folder: tempfile::TempDir,
    journal: Journal,
    steps: Vec<Step>,
    req_prod: u32,
    req_cons: u32,
    rsp_next: u32,
    in_flight: Vec<(u32, Entry)>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Store(usize, u64),
    /// The guest sees these answers from now on.
    RspProd(u32),
    /// The request was served.
    Executed(u32),
    /// The answer to a request was written at a position.
    Response(u32, u32),
}

#[derive(Clone, Copy, Debug)]
enum Doing {
    Produce,
    Take,
    Answer(usize),
    Push,
}

impl Model {
    fn new(start: u32) -> Model {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::create(&folder.path().join("ring"), ABI, SLOTS, start).unwrap();
        let mut model = Model {
            _folder: folder,
            journal,
            steps: Vec::new(),
            req_prod: start,
            req_cons: start,
            rsp_next: start,
            in_flight: Vec::new(),
        };
        model.note();
        model
    }

    fn note(&mut self) {
        self.steps
            .extend(self.journal.words.stores.take().into_iter().map(|(at, value)| Step::Store(at, value)));
    }

    fn do_it(&mut self, doing: Doing) {
        match doing {
            Doing::Produce if self.req_prod.wrapping_sub(self.journal.published) < SLOTS => {
                self.req_prod = self.req_prod.wrapping_add(1);
            }
            Doing::Take if self.req_cons != self.req_prod && self.journal.has_room() => {
                let index = self.req_cons;
                let entry = self.journal.take(index, &request(index.into())).unwrap();
                self.note();
                self.req_cons = index.wrapping_add(1);
                self.in_flight.push((index, entry));
            }
            Doing::Answer(which) if !self.in_flight.is_empty() => {
                let (index, entry) = self.in_flight.swap_remove(which % self.in_flight.len());
                self.steps.push(Step::Executed(index));
                self.journal.answer(entry, self.rsp_next);
                self.note();
                self.steps.push(Step::Response(self.rsp_next, index));
                self.rsp_next = self.rsp_next.wrapping_add(1);
            }
            Doing::Push if self.rsp_next != self.journal.published => {
                self.journal.publish(self.rsp_next);
                self.note();
                self.steps.push(Step::RspProd(self.rsp_next));
                self.journal.published();
                self.note();
            }
            _ => {}
        }
    }
}

/// What a successor would find after the first steps.
struct Found {
    words: Vec<u64>,
    rsp_prod: u32,
    taken: Vec<u32>,
    executed: Vec<u32>,
    /// Requests by the position of their answers.
    responses: Vec<(u32, u32)>,
}

fn check(found: &Found) {
    let unanswered = recover::decide(|at| found.words[at], ABI, SLOTS, found.rsp_prod).unwrap();
    let seen: Vec<u32> = found
        .responses
        .iter()
        .filter(|(position, _)| (found.rsp_prod.wrapping_sub(*position).cast_signed()) > 0)
        .map(|(_, index)| *index)
        .collect();
    let again: Vec<u32> = unanswered.iter().map(|one| one.index).collect();
    assert!(again.iter().all(|index| !seen.contains(index)), "executed after the guest saw its answer");
    let mut all: Vec<u32> = seen.iter().chain(&again).copied().collect();
    all.sort_unstable();
    let mut taken = found.taken.clone();
    taken.sort_unstable();
    assert_eq!(all, taken, "each request that was taken is answered or served again, once");
    assert!(seen.iter().all(|index| found.executed.contains(index)), "answered without having been executed");
    for one in &unanswered {
        assert_eq!(one.request, request(one.index.into()), "the copy is whole");
    }
    // Whatever comes next is taken from the ring, and from there only.
    let next = found.rsp_prod.wrapping_add(u32::try_from(unanswered.len()).unwrap());
    assert!(found.taken.iter().all(|index| next.wrapping_sub(*index).cast_signed() > 0));
    assert!(again.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]).cast_signed() > 0), "in their order");
}

fn stop_after_every_step(model: &Model, start: u32) {
    let mut found = Found {
        words: vec![0; layout::words(SLOTS)],
        rsp_prod: start,
        taken: Vec::new(),
        executed: Vec::new(),
        responses: Vec::new(),
    };
    let mut begun = false;
    for step in &model.steps {
        match *step {
            Step::Store(at, value) => {
                let was_taken = at >= layout::FIRST_ENTRY
                    && (at - layout::FIRST_ENTRY).is_multiple_of(16)
                    && State::unpack(value) == State::Taken;
                found.words[at] = value;
                if was_taken {
                    found.taken.push(layout::index(found.words[at + 1]));
                }
                begun |= at == layout::MAGIC_WORD;
            }
            Step::RspProd(value) => found.rsp_prod = value,
            Step::Executed(index) => found.executed.push(index),
            Step::Response(position, index) => found.responses.push((position, index)),
        }
        if begun {
            check(&found);
        }
    }
}

fn doings() -> impl Strategy<Value = Vec<Doing>> {
    let one = prop_oneof![
        3 => Just(Doing::Produce),
        3 => Just(Doing::Take),
        3 => (0usize..8).prop_map(Doing::Answer),
        1 => Just(Doing::Push),
    ];
    prop::collection::vec(one, 1..120)
}

proptest! {
    #[test]
    fn whatever_store_is_the_last_each_request_is_answered_once_and_not_executed_after_that(
        start in prop_oneof![Just(0u32), Just(u32::MAX - 5), any::<u32>()],
        doings in doings(),
    ) {
        let mut model = Model::new(start);
        for doing in doings {
            model.do_it(doing);
        }
        stop_after_every_step(&model, start);
    }

    #[test]
    fn a_successor_that_dies_while_it_takes_over_leaves_the_same_to_the_next(doings in doings()) {
        let mut model = Model::new(7);
        for doing in doings {
            model.do_it(doing);
        }
        let path = model.journal.path.clone();
        let published = model.journal.published;
        let words: Vec<u64> = (0..layout::words(SLOTS)).map(|at| model.journal.words.load(at)).collect();
        let before = recover::decide(|at| words[at], ABI, SLOTS, published).unwrap();
        let (successor, replayed) = Journal::resume(&path, ABI, SLOTS, published).unwrap().unwrap();
        let expected: Vec<RawRequest> = before.iter().map(|one| one.request).collect();
        let replayed: Vec<RawRequest> = replayed.iter().map(|(_, request)| *request).collect();
        prop_assert_eq!(replayed, expected);
        prop_assert_eq!(successor.free.len() + before.len(), SLOTS as usize);
        let mut words = words;
        for (at, value) in successor.words.stores.take() {
            words[at] = value;
            prop_assert_eq!(&recover::decide(|at| words[at], ABI, SLOTS, published).unwrap(), &before);
        }
    }

    #[test]
    fn whatever_a_guest_makes_of_the_counter_the_outcome_is_a_list_or_a_refusal(
        doings in doings(),
        rsp_prod in any::<u32>(),
        near in -20i32..20,
    ) {
        let mut model = Model::new(0);
        for doing in doings {
            model.do_it(doing);
        }
        let load = |at: usize| model.journal.words.load(at);
        for counter in [rsp_prod, model.journal.published.wrapping_add_signed(near)] {
            if let Ok(unanswered) = recover::decide(load, ABI, SLOTS, counter) {
                prop_assert!(unanswered.len() <= SLOTS as usize);
            }
        }
    }
}

#[test]
fn a_counter_that_was_never_to_be_there_is_refused() {
    let mut model = Model::new(100);
    for doing in [Doing::Produce, Doing::Take, Doing::Answer(0), Doing::Push] {
        model.do_it(doing);
    }
    let decide = |counter| recover::decide(|at| model.journal.words.load(at), ABI, SLOTS, counter);
    assert_eq!(decide(101), Ok(Vec::new()));
    assert_eq!(decide(100), Ok(Vec::new()));
    assert_eq!(decide(102), Err(Disagreement::Counter { found: 102, before: 100, after: 101 }));
}

#[test]
fn a_journal_of_another_ring_is_refused_and_a_missing_one_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ring");
    assert!(Journal::resume(&path, ABI, SLOTS, 0).unwrap().is_none());
    let journal = Journal::create(&path, Abi::X86_64, SLOTS, 5).unwrap();
    assert!(matches!(
        Journal::resume(&path, ABI, SLOTS, 5),
        Err(ResumeError::Disagreement(Disagreement::Foreign))
    ));
    assert!(matches!(Journal::resume(&path, ABI, 16, 5), Err(ResumeError::File { .. })));
    assert_eq!(responses(&path), Some(5));
    journal.remove();
    assert!(!path.exists());
    assert_eq!(responses(&path), None);
}

#[test]
fn answers_that_are_not_published_keep_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(&folder.path().join("ring"), ABI, 2, 0).unwrap();
    let first = journal.take(0, &request(0)).unwrap();
    journal.take(1, &request(1)).unwrap();
    journal.answer(first, 0);
    assert!(!journal.has_room());
    assert_eq!(journal.take(2, &request(2)), None);
    journal.publish(1);
    journal.published();
    assert!(journal.has_room());
}
