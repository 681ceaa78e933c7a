//! The client against a scripted daemon at the other end of a socket pair.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use super::*;
use crate::codec::Header;
use crate::permission::Access;
use crate::wire::HEADER_LEN;

/// The daemon's end. A script that gets stuck ends by these timeouts, which ends the connection and with it the test.
struct Daemon(UnixStream);

const STUCK: Duration = Duration::from_secs(30);

impl Daemon {
    fn recv(&mut self) -> Frame {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).expect("a header");
        let header = Header::from_bytes(header);
        let mut payload = vec![0; header.len as usize];
        self.0.read_exact(&mut payload).expect("a payload");
        Frame { header, payload }
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the client reads");
    }

    fn reply(&mut self, to: &Frame, payload: &[u8]) {
        let bytes = Header { len: payload.len().try_into().expect("short"), ..to.header }.to_bytes();
        self.raw(&[&bytes[..], payload].concat());
    }

    fn error(&mut self, to: &Frame, name: &[u8]) {
        let mut to = to.clone();
        to.header.kind = MessageType::Error.to_wire();
        self.reply(&to, name);
    }

    fn event(&mut self, path: &str, token: &str) {
        let bytes = event(path, token);
        self.raw(&bytes);
    }
}

fn event(path: &str, token: &str) -> Vec<u8> {
    let payload = payload::join_strings([path.as_bytes(), token.as_bytes()]);
    codec::encode(MessageType::WatchEvent, 0, 0, &payload).expect("short")
}

fn pair() -> (Client, Daemon) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    theirs.set_read_timeout(Some(STUCK)).expect("a timeout");
    theirs.set_write_timeout(Some(STUCK)).expect("a timeout");
    (Client::from_stream(ours), Daemon(theirs))
}

/// Runs `script` as the daemon of `test`; a script that panics fails the test.
fn with_daemon<T>(script: impl FnOnce(Daemon) + Send, test: impl FnOnce(Client) -> T) -> T {
    let (client, daemon) = pair();
    thread::scope(|scope| {
        let handle = scope.spawn(move || script(daemon));
        let outcome = test(client);
        handle.join().expect("the script ends as written");
        outcome
    })
}

#[test]
fn requests_have_the_payloads_of_the_protocol() {
    let script = |mut daemon: Daemon| {
        let expected: [(MessageType, &[u8]); 8] = [
            (MessageType::Read, b"/a\0"),
            (MessageType::Write, b"/a\0v\0w"),
            (MessageType::Mkdir, b"rel/b\0"),
            (MessageType::Rm, b"/a\0"),
            (MessageType::Directory, b"/\0"),
            (MessageType::SetPerms, b"/a\0n0\0r5\0"),
            (MessageType::Watch, b"/a\0tok\0"),
            (MessageType::Unwatch, b"/a\0tok\0"),
        ];
        for (number, (kind, payload)) in (1..).zip(expected) {
            let request = daemon.recv();
            assert_eq!(request.header.kind, kind.to_wire());
            assert_eq!(request.header.req_id, number);
            assert_eq!(request.payload, payload);
            daemon.reply(&request, if kind == MessageType::Read { b"\xffval" } else { b"" });
        }
    };
    with_daemon(script, |mut client| {
        assert_eq!(client.read(TxId::NONE, "/a").expect("reply"), b"\xffval");
        client.write(TxId::NONE, "/a", b"v\0w").expect("reply");
        client.mkdir(TxId::NONE, b"rel/b").expect("reply");
        client.rm(TxId::NONE, "/a").expect("reply");
        assert!(client.directory(TxId::NONE, "/").expect("reply").is_empty());
        let entries = [Permission::new(0, Access::None), Permission::new(5, Access::Read)];
        client.set_perms(TxId::NONE, "/a", &entries).expect("reply");
        client.watch("/a", "tok").expect("reply");
        client.unwatch("/a", "tok").expect("reply");
    });
}

#[test]
fn ten_thousand_events_before_a_reply_are_neither_lost_nor_a_deadlock() {
    let script = |mut daemon: Daemon| {
        let request = daemon.recv();
        for number in 0..10_000 {
            daemon.event(&format!("/n/{number}"), "t");
        }
        daemon.reply(&request, b"value");
    };
    with_daemon(script, |mut client| {
        assert_eq!(client.read(TxId::NONE, "/a").expect("the reply behind the burst"), b"value");
        for number in 0..10_000 {
            let event = client.next_event().expect("every event");
            assert_eq!(event.path, format!("/n/{number}").into_bytes());
        }
        assert_eq!(client.next_event(), None);
    });
}

#[test]
fn a_daemon_that_sends_events_before_it_reads_on_is_no_deadlock() {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    theirs.set_write_timeout(Some(STUCK)).expect("a timeout");
    theirs.set_read_timeout(Some(STUCK)).expect("a timeout");
    ours.set_nonblocking(true).expect("non-blocking");
    let ballast = codec::encode(MessageType::Control, 0, 0, &[0; 1000]).expect("short");
    // Whole messages until there is no room: the client's own request will find none.
    let mut filler = ours.try_clone().expect("a second handle");
    let mut partial = Vec::new();
    loop {
        match filler.write(&ballast) {
            Ok(count) if count == ballast.len() => {}
            Ok(count) => {
                partial = ballast[count..].to_vec();
                break;
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(partial.is_empty(), "this kernel tears small stream writes; choose another filler");
    let mut client = Client::from_stream(ours);
    let mut daemon = Daemon(theirs);
    thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..10_000 {
                daemon.event(&format!("/n/{number}"), "t");
            }
            loop {
                let request = daemon.recv();
                if request.header.kind == MessageType::Read.to_wire() {
                    return daemon.reply(&request, b"value");
                }
            }
        });
        assert_eq!(client.read(TxId::NONE, "/a").expect("a reply"), b"value");
    });
    assert_eq!(std::iter::from_fn(|| client.next_event()).count(), 10_000);
}

#[test]
fn torn_messages_are_put_together_byte_by_byte() {
    let script = |mut daemon: Daemon| {
        let request = daemon.recv();
        let payload = b"value";
        let header = Header { len: 5, ..request.header }.to_bytes();
        let stream = [event("/a", "1"), [&header[..], payload].concat(), event("/b", "2")].concat();
        for byte in stream {
            daemon.raw(&[byte]);
        }
    };
    let mut client = with_daemon(script, |mut client| {
        assert_eq!(client.read(TxId::NONE, "/a").expect("a reply"), b"value");
        client
    });
    // The script has ended, so everything is in the socket: what the request left is read now.
    while client.poll_events().is_ok_and(|count| count > 0) {}
    let tokens: Vec<_> = std::iter::from_fn(|| client.next_event()).map(|event| event.token).collect();
    assert_eq!(tokens, [b"1", b"2"]);
}

#[test]
fn events_right_behind_a_reply_are_queued_although_the_descriptor_stays_quiet() {
    let (mut client, mut daemon) = pair();
    thread::scope(|scope| {
        scope.spawn(|| {
            let request = daemon.recv();
            let header = Header { len: 2, ..request.header }.to_bytes();
            daemon.raw(&[&header[..], b"v\0", &event("/a", "1")].concat());
        });
        client.read(TxId::NONE, "/a").expect("a reply");
    });
    assert!(client.next_event().is_some(), "one write, so one read brought both");
    assert_eq!(client.poll_events().expect("still connected"), 0);
}

#[test]
fn events_during_a_transaction_wait_for_its_end() {
    let script = |mut daemon: Daemon| {
        let start = daemon.recv();
        assert_eq!(start.payload, b"\0");
        daemon.reply(&start, b"42\0");
        let read = daemon.recv();
        assert_eq!(read.header.tx_id, 42);
        daemon.event("/x", "t");
        daemon.reply(&read, b"1");
        let end = daemon.recv();
        assert_eq!((end.header.tx_id, &end.payload[..]), (42, &b"T\0"[..]));
        daemon.event("/y", "t");
        daemon.reply(&end, b"OK\0");
    };
    with_daemon(script, |mut client| {
        let value = client.transact(|client, tx| client.read(tx, "/a")).expect("committed");
        assert_eq!(value, b"1");
        let paths: Vec<_> = std::iter::from_fn(|| client.next_event()).map(|event| event.path).collect();
        assert_eq!(paths, [b"/x", b"/y"]);
    });
}

#[test]
fn a_transaction_that_lost_is_repeated_from_its_start() {
    let script = |mut daemon: Daemon| {
        for (id, outcome) in [(&b"1\0"[..], &b"EAGAIN\0"[..]), (b"2\0", b"")] {
            let start = daemon.recv();
            daemon.reply(&start, id);
            let write = daemon.recv();
            daemon.reply(&write, b"OK\0");
            let end = daemon.recv();
            match outcome {
                b"" => daemon.reply(&end, b"OK\0"),
                name => daemon.error(&end, name),
            }
        }
    };
    let mut runs = 0;
    with_daemon(script, |mut client| {
        let done: Result<(), Error> = client.transact(|client, tx| {
            runs += 1;
            client.write(tx, "/a", "1")
        });
        done.expect("the second try wins");
    });
    assert_eq!(runs, 2);
}

#[test]
fn a_transaction_that_always_loses_ends_as_busy() {
    let script = |mut daemon: Daemon| {
        for _ in 0..TRIES {
            let start = daemon.recv();
            daemon.reply(&start, b"7\0");
            let end = daemon.recv();
            daemon.error(&end, b"EAGAIN\0");
        }
    };
    with_daemon(script, |mut client| {
        let outcome: Result<(), Error> = client.transact(|_, _| Ok(()));
        assert!(matches!(outcome, Err(Error::Busy { tries: TRIES, .. })), "{outcome:?}");
    });
}

#[test]
fn a_failing_transaction_is_dropped_and_keeps_its_cause() {
    let script = |mut daemon: Daemon| {
        let start = daemon.recv();
        daemon.reply(&start, b"7\0");
        let read = daemon.recv();
        daemon.error(&read, b"ENOENT\0");
        let end = daemon.recv();
        assert_eq!((end.header.tx_id, &end.payload[..]), (7, &b"F\0"[..]));
        daemon.reply(&end, b"OK\0");
    };
    with_daemon(script, |mut client| {
        let outcome = client.transact(|client, tx| client.read(tx, "/a"));
        assert!(outcome.expect_err("nothing there").is_not_found());
    });
}

#[test]
fn a_long_directory_is_collected_and_started_over_when_it_changes() {
    let script = |mut daemon: Daemon| {
        let request = daemon.recv();
        daemon.error(&request, b"E2BIG\0");
        let parts: [(&[u8], &[u8]); 4] = [
            (b"/d\x000\0", b"5\0a\0bb\0"),
            (b"/d\x005\0", b"6\0c\0\0"),
            (b"/d\x000\0", b"6\0a\0"),
            (b"/d\x002\0", b"6\0c\0\0"),
        ];
        for (asked, part) in parts {
            let request = daemon.recv();
            assert_eq!(request.header.kind, MessageType::DirectoryPart.to_wire());
            assert_eq!(request.payload, asked);
            daemon.reply(&request, part);
        }
    };
    with_daemon(script, |mut client| {
        let names = client.directory(TxId::NONE, "/d").expect("one state of it");
        assert_eq!(names, [b"a", b"c"]);
    });
}

#[test]
fn unknown_error_names_are_kept_and_the_connection_goes_on() {
    let script = |mut daemon: Daemon| {
        for name in [&b"EQUOTA\0"[..], b"", b"\xff\n"] {
            let request = daemon.recv();
            daemon.error(&request, name);
        }
        let request = daemon.recv();
        daemon.reply(&request, b"v");
    };
    with_daemon(script, |mut client| {
        for expected in ["EQUOTA", "", "\\xff\\n"] {
            match client.read(TxId::NONE, "/a") {
                Err(Error::UnknownErrno { name, .. }) => assert_eq!(name, expected),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(client.read(TxId::NONE, "/a").expect("the connection lives"), b"v");
    });
}

/// The first call on a broken connection tells what happened; all later calls say that it is gone.
fn assert_gone(client: &mut Client) {
    for _ in 0..2 {
        assert!(client.read(TxId::NONE, "/a").expect_err("gone").is_disconnected());
        assert!(client.poll_events().expect_err("gone").is_disconnected());
        let outcome: Result<(), Error> = client.transact(|_, _| Ok(()));
        assert!(outcome.expect_err("gone").is_disconnected());
    }
}

#[test]
fn oversize_and_foreign_replies_break_the_connection() {
    let oversize = Header { kind: 2, req_id: 1, tx_id: 0, len: 4097 }.to_bytes().to_vec();
    let foreign_id = codec::encode(MessageType::Read, 99, 0, b"v").expect("short");
    let foreign_type = codec::encode(MessageType::Write, 1, 0, b"OK\0").expect("short");
    let twice = codec::encode(MessageType::Read, 1, 0, b"v").expect("short").repeat(2);
    let bad_event = codec::encode(MessageType::WatchEvent, 0, 0, b"no token\0").expect("short");
    for bytes in [oversize, foreign_id, foreign_type, twice, bad_event] {
        let script = |mut daemon: Daemon| {
            daemon.recv();
            daemon.raw(&bytes);
        };
        with_daemon(script, |mut client| {
            let error = client.read(TxId::NONE, "/a").expect_err("not protocol");
            assert!(matches!(error, Error::Protocol(_)), "{error}");
            assert_gone(&mut client);
        });
    }
}

#[test]
fn a_connection_that_lost_its_order_is_not_used_again_although_the_daemon_lives() {
    let script = |mut daemon: Daemon| {
        daemon.recv();
        daemon.raw(&codec::encode(MessageType::Read, 99, 0, b"v").expect("short"));
        // The client must not send anything more: the next thing from it is its end.
        assert_eq!(daemon.0.read(&mut [0]).expect("the end"), 0);
    };
    with_daemon(script, |mut client| {
        assert!(matches!(client.read(TxId::NONE, "/a"), Err(Error::Protocol(_))));
        assert_gone(&mut client);
    });
}

#[test]
fn a_connection_that_ends_at_any_byte_of_a_reply_is_disconnected_for_good() {
    let reply = codec::encode(MessageType::Read, 1, 0, b"value").expect("short");
    for cut in 0..reply.len() {
        let script = |mut daemon: Daemon| {
            daemon.recv();
            daemon.raw(&reply[..cut]);
        };
        with_daemon(script, |mut client| {
            assert!(client.read(TxId::NONE, "/a").expect_err("gone").is_disconnected());
            assert_gone(&mut client);
        });
    }
}

#[test]
fn a_connection_that_ended_before_a_request_is_disconnected() {
    let (mut client, daemon) = pair();
    drop(daemon);
    assert!(client.write(TxId::NONE, "/a", "1").expect_err("gone").is_disconnected());
    assert_gone(&mut client);
}

#[test]
fn events_sent_before_the_end_of_the_connection_are_still_delivered() {
    let (mut client, mut daemon) = pair();
    daemon.event("/a", "t");
    drop(daemon);
    assert_eq!(client.poll_events().expect("the event comes first"), 1);
    assert!(client.poll_events().expect_err("now the end").is_disconnected());
    assert_eq!(client.next_event().map(|event| event.path), Some(b"/a".to_vec()));
    assert_eq!(client.next_event(), None);
}

#[test]
fn polling_stops_after_a_batch_and_does_not_block() {
    let (mut client, mut daemon) = pair();
    assert_eq!(client.poll_events().expect("nothing there"), 0);
    // In one write, so that all of it is in the socket before the first poll.
    let flood: Vec<u8> = (0..4000).flat_map(|number| event(&format!("/{number}"), "t")).collect();
    daemon.raw(&flood);
    let mut counts = Vec::new();
    loop {
        match client.poll_events().expect("connected") {
            0 => break,
            count => counts.push(count),
        }
    }
    // The last read of a batch may complete as many events as fit in its buffer.
    assert!(counts.iter().all(|&count| count < POLL_BATCH + READ_SIZE / HEADER_LEN), "{counts:?}");
    assert_eq!(counts.iter().sum::<usize>(), 4000);
}

#[test]
fn bad_arguments_are_refused_without_sending_anything() {
    let (mut client, mut daemon) = pair();
    assert!(matches!(client.read(TxId::NONE, "/a/"), Err(Error::InvalidPath { .. })));
    assert!(matches!(client.write(TxId::NONE, b"/a\0b", "x"), Err(Error::InvalidPath { .. })));
    assert!(matches!(client.rm(TxId::NONE, "@releaseDomain"), Err(Error::InvalidPath { .. })));
    assert!(matches!(client.watch("/a", b"to\0ken"), Err(Error::InvalidToken { .. })));
    let value = vec![b'x'; PAYLOAD_MAX - 2];
    match client.write(TxId::NONE, "/a", value) {
        Err(Error::TooLong { len: 4097, max: PAYLOAD_MAX, .. }) => {}
        other => panic!("{other:?}"),
    }
    daemon.0.set_nonblocking(true).expect("non-blocking");
    let read = daemon.0.read(&mut [0]).expect_err("nothing was sent");
    assert_eq!(read.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn request_ids_never_become_the_zero_of_watch_events() {
    let (mut client, _daemon) = pair();
    client.last_req_id = u32::MAX - 1;
    assert_eq!(client.next_req_id(), u32::MAX);
    assert_eq!(client.next_req_id(), 1);
}
