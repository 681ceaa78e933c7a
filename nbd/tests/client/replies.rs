//! Replies, of which a client must believe nothing.

use nbd::ErrorCode;
use nbd::client::{Ask, Blocks, Export, Outcome, Session, Slot, Step, Violation};
use nbd::flags::{CommandFlags, TransmissionFlags};
use nbd::wire::{
    CHUNK_MAGIC, Chunk, ChunkError, Command, Extent, Fixed, Hole, Request, SIMPLE_MAGIC, Simple, chunk,
};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const CONTEXT: u32 = 5;

fn session(structured: bool) -> Session {
    Session::new(&Export {
        size: 1 << 30,
        flags: TransmissionFlags::HAS_FLAGS,
        structured,
        allocation: Some(CONTEXT),
        blocks: Blocks::default(),
    })
}

fn ask(session: &mut Session, command: Command, offset: u64, len: u32) -> (Slot, u64) {
    let (slot, bytes) = session.begin(&Ask { command, flags: CommandFlags::default(), offset, len });
    let request = Request::take(&bytes).unwrap();
    assert_eq!((request.offset.get(), request.len.get()), (offset, len));
    (slot, request.cookie.get())
}

fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    let head = Simple { magic: SIMPLE_MAGIC.into(), error: error.into(), cookie: cookie.into() };
    [head.as_bytes(), data].concat()
}

fn piece(cookie: u64, done: bool, kind: u16, content: &[u8]) -> Vec<u8> {
    let head = Chunk {
        magic: CHUNK_MAGIC.into(),
        flags: u16::from(done).into(),
        kind: kind.into(),
        cookie: cookie.into(),
        len: u32::try_from(content.len()).unwrap().into(),
    };
    [head.as_bytes(), content].concat()
}

fn data(cookie: u64, done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    piece(cookie, done, chunk::DATA, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(cookie: u64, done: bool, offset: u64, len: u32) -> Vec<u8> {
    piece(cookie, done, chunk::HOLE, Hole { offset: offset.into(), len: len.into() }.as_bytes())
}

fn failure(cookie: u64, done: bool, kind: u16, error: u32, rest: &[u8]) -> Vec<u8> {
    let head = ChunkError { error: error.into(), len: 2.into() };
    piece(cookie, done, kind, &[head.as_bytes(), rest].concat())
}

fn status(cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut content = context.to_be_bytes().to_vec();
    for &(len, flags) in extents {
        content.extend(Extent { len: len.into(), flags: flags.into() }.as_bytes());
    }
    piece(cookie, true, chunk::BLOCK_STATUS, &content)
}

/// Feeds a stream, `at_once` bytes at a time; fills `memory` as asked and returns the outcomes.
fn run(
    session: &mut Session,
    stream: &[u8],
    at_once: usize,
    memory: &mut [u8],
) -> Result<Vec<(Slot, Outcome)>, Violation> {
    let (mut at, mut there, mut outcomes) = (0, 0, Vec::new());
    loop {
        let (used, step) = session.next(&stream[at..there])?;
        at += used;
        match step {
            Step::Need(count) => {
                assert!(count > there - at, "it is all there");
                if there == stream.len() {
                    return Ok(outcomes);
                }
                there = stream.len().min(there + at_once);
            }
            Step::Data { at: to, len, .. } => {
                let (to, len) = (to as usize, len as usize);
                let Some(bytes) = stream.get(at..at + len) else { return Ok(outcomes) };
                memory[to..to + len].copy_from_slice(bytes);
                at += len;
                there = there.max(at);
            }
            Step::Zero { at, len, .. } => memory[at as usize..(at + len) as usize].fill(0),
            Step::Skip(len) => {
                at += len;
                there = there.max(at);
            }
            Step::Done(slot, outcome) => {
                session.release(slot);
                outcomes.push((slot, outcome));
            }
        }
    }
}

#[test]
fn replies_come_in_any_order_and_in_any_pieces() {
    for at_once in [1, 7, 1000] {
        let mut session = session(true);
        let (read, r) = ask(&mut session, Command::Read, 1000, 8);
        let (write, w) = ask(&mut session, Command::Write, 0, 512);
        let (map, m) = ask(&mut session, Command::BlockStatus, 0, 1024);
        let (bad, b) = ask(&mut session, Command::Read, 0, 8);
        let stream = [
            data(r, false, 1004, b"efgh"),
            simple(w, 28, &[]),
            failure(b, false, chunk::ERROR_OFFSET, 5, b"no\0\0\0\0\0\0\0\0"),
            status(m, CONTEXT, &[(512, 3), (1 << 30, 0)]),
            hole(r, true, 1000, 4),
            piece(b, true, chunk::NONE, &[]),
        ]
        .concat();
        let mut memory = [1; 8];
        let outcomes = run(&mut session, &stream, at_once, &mut memory).unwrap();
        let extents =
            vec![Extent { len: 512.into(), flags: 3.into() }, Extent { len: 512.into(), flags: 0.into() }];
        assert_eq!(
            outcomes,
            [
                (write, Err(ErrorCode::NoSpc)),
                (map, Ok(extents)),
                (read, Ok(vec![])),
                (bad, Err(ErrorCode::Io)),
            ]
        );
        assert_eq!(&memory, b"\0\0\0\0efgh");
        assert_eq!(session.in_flight(), 0);
    }
}

#[test]
fn simple_replies_bring_the_data_of_a_read_behind_them() {
    let mut session = session(false);
    let (first, a) = ask(&mut session, Command::Read, 0, 4);
    let (second, b) = ask(&mut session, Command::Read, 4, 4);
    let stream = [simple(b, 5, &[]), simple(a, 0, b"abcd")].concat();
    let mut memory = [0; 4];
    let outcomes = run(&mut session, &stream, 3, &mut memory).unwrap();
    assert_eq!(outcomes, [(second, Err(ErrorCode::Io)), (first, Ok(vec![]))]);
    assert_eq!(&memory, b"abcd");
}

#[test]
fn m84_a_reply_with_an_unknown_cookie_is_a_violation() {
    let mut session = session(true);
    let (_, first) = ask(&mut session, Command::Flush, 0, 0);
    run(&mut session, &simple(first, 0, &[]), 99, &mut []).unwrap();
    let (_, second) = ask(&mut session, Command::Flush, 0, 0);
    assert_ne!(first, second, "a late reply would be taken for the one that is awaited");
    for cookie in [first, 0, u64::MAX, second + 1, second ^ 1 << 63] {
        assert!(run(&mut session, &simple(cookie, 0, &[]), 99, &mut []).is_err(), "{cookie:#x}");
    }
    run(&mut session, &simple(second, 0, &[]), 99, &mut []).unwrap();
    assert!(run(&mut session, &simple(second, 0, &[]), 99, &mut []).is_err(), "a second reply");
}

/// What a server sends for a read of 8 bytes at 1000 (structured), and is a violation.
#[test]
fn m84_chunks_outside_twice_empty_or_missing_are_violations() {
    type Stream = fn(u64) -> Vec<u8>;
    let streams: [(&str, Stream); 14] = [
        ("before", |c| data(c, true, 999, b"abcdefgh")),
        ("behind", |c| data(c, true, 1001, b"abcdefgh")),
        ("far behind", |c| hole(c, true, u64::MAX, 8)),
        ("too long", |c| hole(c, true, 1000, u32::MAX)),
        ("empty data", |c| data(c, true, 1000, b"")),
        ("empty hole", |c| hole(c, true, 1000, 0)),
        ("twice", |c| [hole(c, false, 1000, 5), data(c, true, 1004, b"abcd")].concat()),
        ("missing", |c| data(c, true, 1000, b"abcdefg")),
        ("nothing at all", |c| piece(c, true, chunk::NONE, &[])),
        ("an empty chunk that is not the last", |c| piece(c, false, chunk::NONE, &[])),
        ("simple", |c| simple(c, 0, b"abcdefgh")),
        ("simple error", |c| simple(c, 5, &[])),
        ("a block status", |c| status(c, CONTEXT, &[(8, 0)])),
        ("an unknown kind", |c| piece(c, true, 77, &[0; 16])),
    ];
    for (what, stream) in streams {
        let mut session = session(true);
        let (_, cookie) = ask(&mut session, Command::Read, 1000, 8);
        assert!(run(&mut session, &stream(cookie), 99, &mut [0; 8]).is_err(), "{what}");
    }
}

#[test]
fn m84_extents_without_length_or_behind_the_end_are_violations() {
    for (what, context, extents) in [
        ("none", CONTEXT, &[][..]),
        ("without length", CONTEXT, &[(512, 0), (0, 0)]),
        ("behind the end", CONTEXT, &[(1024, 0), (512, 0)]),
        ("another context", 6, &[(1024, 0)]),
    ] {
        let mut session = session(true);
        let (_, cookie) = ask(&mut session, Command::BlockStatus, 0, 1024);
        assert!(run(&mut session, &status(cookie, context, extents), 99, &mut []).is_err(), "{what}");
    }
    let mut session = session(true);
    let (_, cookie) = ask(&mut session, Command::BlockStatus, 0, 1024);
    let many = vec![(1, 0); 10_000];
    assert!(run(&mut session, &status(cookie, CONTEXT, &many), 99, &mut []).is_err(), "too many");
}

#[test]
fn m84_endless_chunks_are_a_violation() {
    let mut session = session(true);
    let (_, cookie) = ask(&mut session, Command::Read, 0, 8);
    let errors = failure(cookie, false, chunk::ERROR, 5, b"no").repeat(100);
    assert!(run(&mut session, &errors, 4096, &mut [0; 8]).is_err());
    let mut session = self::session(true);
    let (_, cookie) = ask(&mut session, Command::Read, 0, 1 << 20);
    let scattered: Vec<u8> = (0..5000).flat_map(|i| hole(cookie, false, i * 2, 1)).collect();
    assert!(run(&mut session, &scattered, 4096, &mut vec![0; 1 << 20]).is_err());
}

#[test]
fn m84_malformed_errors_and_streams_are_violations() {
    let mut session = session(true);
    let (_, c) = ask(&mut session, Command::Read, 0, 8);
    for stream in [
        failure(c, true, chunk::ERROR, 0, b"no"),
        failure(c, true, chunk::ERROR, 5, b"n"),
        failure(c, true, chunk::ERROR_OFFSET, 5, b"no"),
        piece(c, true, chunk::ERROR, &[0; 5]),
        piece(c, true, chunk::ERROR, &[1; 70_000]),
        piece(c, true, chunk::HOLE, &[0; 11]),
        b"HTTP/1.1 400 Bad Request".to_vec(),
    ] {
        let mut session = self::session(true);
        ask(&mut session, Command::Read, 0, 8);
        assert!(run(&mut session, &stream, 99, &mut [0; 8]).is_err(), "{stream:x?}");
    }
    let mut unstructured = self::session(false);
    let (_, c) = ask(&mut unstructured, Command::Read, 0, 8);
    assert!(run(&mut unstructured, &hole(c, true, 0, 8), 99, &mut [0; 8]).is_err());
}

#[test]
fn m85_an_error_beside_a_hole_is_an_error_and_never_zeros() {
    for stream in [
        |c| [hole(c, false, 0, 8), failure(c, true, chunk::ERROR, 5, b"no")].concat(),
        |c| [failure(c, false, chunk::ERROR, 5, b"no"), hole(c, true, 0, 8)].concat(),
    ] {
        let mut session = session(true);
        let (slot, cookie) = ask(&mut session, Command::Read, 0, 8);
        let outcomes = run(&mut session, &stream(cookie), 99, &mut [0; 8]).unwrap();
        assert_eq!(outcomes, [(slot, Err(ErrorCode::Io))]);
    }
}

proptest! {
    /// A good server cuts its replies as it likes.
    #[test]
    fn any_cut_of_a_read_gives_its_bytes(
        content in prop::collection::vec(any::<u8>(), 1..300), cuts in prop::collection::vec(1_usize..40, 1..30),
        order in any::<bool>(), at_once in 1_usize..100
    ) {
        let mut session = session(true);
        let (slot, cookie) = ask(&mut session, Command::Read, 4096, u32::try_from(content.len()).unwrap());
        let (mut at, mut cuts, mut parts) = (0, cuts.into_iter().cycle(), Vec::new());
        while at < content.len() {
            let end = content.len().min(at + cuts.next().unwrap());
            parts.push(data(cookie, false, 4096 + at as u64, &content[at..end]));
            at = end;
        }
        if order {
            parts.reverse();
        }
        parts.push(piece(cookie, true, chunk::NONE, &[]));
        let mut memory = vec![0; content.len()];
        let outcomes = run(&mut session, &parts.concat(), at_once, &mut memory).unwrap();
        prop_assert_eq!(outcomes, [(slot, Ok(vec![]))]);
        prop_assert_eq!(memory, content);
    }

    #[test]
    fn no_stream_makes_the_client_panic(
        structured in any::<bool>(), chunks in prop::collection::vec(
            (any::<bool>(), 0_u64..5, any::<bool>(), prop::sample::select(vec![0_u16, 1, 2, 5, 6, 0x8001, 0x8002, 0xffff]),
             prop::collection::vec(any::<u8>(), 0..30)), 0..20),
        torn in 0_usize..50
    ) {
        let mut session = session(structured);
        for command in [Command::Read, Command::Write, Command::BlockStatus, Command::Flush] {
            ask(&mut session, command, 0, 64);
        }
        let mut stream = Vec::new();
        for (chunked, slot, done, kind, content) in chunks {
            let cookie = 1 << 32 | slot;
            stream.extend(if chunked { piece(cookie, done, kind, &content) } else { simple(cookie, u32::from(kind), &content) });
        }
        stream.truncate(stream.len().saturating_sub(torn));
        let _ = run(&mut session, &stream, 13, &mut [0; 64]);
    }
}
