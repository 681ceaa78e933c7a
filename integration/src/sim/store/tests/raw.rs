//! Requests that the client has no method for, and bad ones, by the codec.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use xenstore::codec::{self, Decoder};
use xenstore::wire::MessageType;

use super::*;

fn ask(path: &Path, kind: MessageType, payload: &[u8]) -> (Option<MessageType>, Vec<u8>) {
    let mut stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let request = codec::encode(kind, 5, 0, payload).expect("short");
    stream.write_all(&request).expect("sent");
    let (mut decoder, mut buffer) = (Decoder::new(), [0; 512]);
    loop {
        if let Some(reply) = decoder.next_frame().expect("protocol") {
            assert_eq!(reply.header.req_id, 5);
            return (MessageType::from_wire(reply.header.kind), reply.payload);
        }
        let count = stream.read(&mut buffer).expect("a reply");
        assert!(count > 0, "the daemon closed the connection");
        decoder.extend(&buffer[..count]);
    }
}

#[test]
fn questions_about_domains_are_answered() {
    let world = World::new();
    let socket = world.store.socket();
    let path = (Some(MessageType::GetDomainPath), b"/local/domain/7\0".to_vec());
    assert_eq!(ask(&socket, MessageType::GetDomainPath, b"7\0"), path);
    let known = |answer: &[u8]| (Some(MessageType::IsDomainIntroduced), answer.to_vec());
    assert_eq!(ask(&socket, MessageType::IsDomainIntroduced, b"7\0"), known(b"F\0"));
    ask(&socket, MessageType::Introduce, b"7\x001\x001\0");
    assert_eq!(ask(&socket, MessageType::IsDomainIntroduced, b"7\0"), known(b"T\0"));
    let guest = world.store.listen_for(7);
    let refused = (Some(MessageType::Error), b"EACCES\0".to_vec());
    assert_eq!(ask(&guest, MessageType::IsDomainIntroduced, b"7\0"), refused);
    assert_eq!(ask(&guest, MessageType::Release, b"7\0"), refused);
}

#[test]
fn malformed_requests_are_refused_one_by_one() {
    let world = World::new();
    let socket = world.store.socket();
    let cases: [(MessageType, &[u8], &[u8]); 7] = [
        (MessageType::Read, b"/a", b"EINVAL\0"),
        (MessageType::Read, b"/a\0x\0", b"EINVAL\0"),
        (MessageType::Read, b"/a//b\0", b"EINVAL\0"),
        (MessageType::Watch, b"/a\0", b"EINVAL\0"),
        (MessageType::SetPerms, b"/\0q7\0", b"EINVAL\0"),
        (MessageType::Control, b"check\0", b"ENOSYS\0"),
        (MessageType::WatchEvent, b"/a\0t\0", b"ENOSYS\0"),
    ];
    for (kind, payload, name) in cases {
        let refused = (Some(MessageType::Error), name.to_vec());
        assert_eq!(ask(&socket, kind, payload), refused, "{kind} {payload:?}");
    }
}

#[test]
fn an_oversize_request_ends_the_connection() {
    let world = World::new();
    let mut stream = UnixStream::connect(world.store.socket()).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let header = codec::Header { kind: 2, req_id: 1, tx_id: 0, len: 4097 };
    stream.write_all(&header.to_bytes()).expect("sent");
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
}
