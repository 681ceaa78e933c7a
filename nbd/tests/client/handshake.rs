//! The handshake with servers of every kind.

use nbd::client::{Blocks, Export, Handshake, HandshakeError};
use nbd::flags::TransmissionFlags;
use nbd::wire::{
    ExportTail, Fixed, Greeting, InfoBlockSize, InfoExport, MAGIC, OLD_STYLE_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader, info,
};
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn greeting(flags: u16) -> Vec<u8> {
    Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: flags.into() }
        .as_bytes()
        .to_vec()
}

fn reply(option: OptionCode, kind: OptionReply, data: &[u8]) -> Vec<u8> {
    let header = OptionReplyHeader {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.number().into(),
        kind: kind.number().into(),
        len: u32::try_from(data.len()).unwrap().into(),
    };
    [header.as_bytes(), data].concat()
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    InfoExport { kind: info::EXPORT.into(), size: size.into(), flags: flags.into() }.as_bytes().to_vec()
}

fn sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let told = InfoBlockSize {
        kind: info::BLOCK_SIZE.into(),
        minimum: minimum.into(),
        preferred: preferred.into(),
        maximum: maximum.into(),
    };
    told.as_bytes().to_vec()
}

/// Lets a client speak to a server that answers each option; the options it was sent, with their data, and the outcome.
fn talk(
    hello: Vec<u8>,
    mut answer: impl FnMut(OptionCode, &[u8]) -> Vec<u8>,
) -> (Vec<OptionCode>, Result<Export, HandshakeError>) {
    let mut client = Handshake::new("disk");
    let mut to_client = hello;
    let mut from_client = Vec::new();
    let mut options = Vec::new();
    let mut flags_seen = false;
    // A client that never comes to an end fails the test.
    for _ in 0..10_000 {
        let wants = client.wants();
        if to_client.len() >= wants {
            let bytes: Vec<u8> = to_client.drain(..wants).collect();
            match client.input(&bytes) {
                Ok(Some(export)) => return (options, Ok(export)),
                Ok(None) => {}
                Err(error) => return (options, Err(error)),
            }
        } else if from_client.is_empty() {
            return (options, client.input(&[]).map(|_| unreachable!()));
        }
        from_client.extend(client.output());
        if !flags_seen && from_client.len() >= 4 {
            from_client.drain(..4);
            flags_seen = true;
        }
        while let Some(header) = OptionHeader::take(&from_client) {
            let end = OptionHeader::LEN + usize::try_from(header.len.get()).unwrap();
            let option = OptionCode::from_number(header.option.get()).unwrap();
            options.push(option);
            to_client.extend(answer(option, &from_client[OptionHeader::LEN..end]));
            from_client.drain(..end);
        }
    }
    panic!("the handshake has no end");
}

/// A server that can do everything.
fn good(option: OptionCode, data: &[u8]) -> Vec<u8> {
    match option {
        OptionCode::StructuredReply => reply(option, OptionReply::Ack, &[]),
        OptionCode::SetMetaContext => {
            assert_eq!(data, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
            let context = [&[0, 0, 0, 9], "base:allocation".as_bytes()].concat();
            [reply(option, OptionReply::MetaContext, &context), reply(option, OptionReply::Ack, &[])].concat()
        }
        OptionCode::Go => {
            assert_eq!(data, b"\0\0\0\x04disk\0\x01\0\x03");
            [
                reply(option, OptionReply::Info, &export(1 << 30, 0x6d)),
                reply(option, OptionReply::Info, &sizes(512, 4096, 32 << 20)),
                reply(option, OptionReply::Info, b"\0\x02a disk"),
                reply(option, OptionReply::Ack, &[]),
            ]
            .concat()
        }
        OptionCode::ExportName => {
            assert_eq!(data, b"disk");
            ExportTail { size: 4096.into(), flags: 1.into() }.as_bytes().to_vec()
        }
        other => panic!("{other:?} is not needed"),
    }
}

#[test]
fn all_that_a_server_offers_is_agreed_on() {
    let (options, export) = talk(greeting(3), good);
    let blocks = Blocks { minimum: 512, preferred: 4096, maximum: 32 << 20 };
    let flags = TransmissionFlags(0x6d);
    assert_eq!(export, Ok(Export { size: 1 << 30, flags, structured: true, allocation: Some(9), blocks }));
    assert_eq!(options, [OptionCode::StructuredReply, OptionCode::SetMetaContext, OptionCode::Go]);
}

#[test]
fn a_server_without_chunks_or_go_is_used_by_the_name_of_the_export() {
    let refuse = |option, data: &[u8]| match option {
        OptionCode::ExportName => good(option, data),
        _ => reply(option, OptionReply::Unsupported, b"no"),
    };
    let (options, export) = talk(greeting(3), refuse);
    let export = export.unwrap();
    assert_eq!((export.size, export.structured, export.allocation), (4096, false, None));
    assert_eq!(export.blocks, Blocks::default());
    assert_eq!(options, [OptionCode::StructuredReply, OptionCode::Go, OptionCode::ExportName]);
}

#[test]
fn padding_is_expected_where_it_was_not_agreed_to_leave_it_out() {
    for hello in [greeting(0), greeting(1)] {
        let padded = |option, data: &[u8]| match option {
            OptionCode::ExportName => [good(option, data), vec![0; 124]].concat(),
            _ => reply(option, OptionReply::Unsupported, &[]),
        };
        assert_eq!(talk(hello, padded).1.unwrap().size, 4096);
    }
    let unfixed = talk(greeting(2), good);
    assert_eq!(
        unfixed.0,
        [OptionCode::ExportName],
        "a server without fixed newstyle answers no other option"
    );
}

#[test]
fn a_refusal_comes_with_the_servers_reason_but_no_more_than_a_line_of_it() {
    let text = format!("line\n{}", "x".repeat(5000));
    let unknown = |option, data: &[u8]| match option {
        OptionCode::Go => reply(option, OptionReply::Unknown, text.as_bytes()),
        _ => good(option, data),
    };
    let message = talk(greeting(3), unknown).1.unwrap_err().to_string();
    assert!(message.contains("no such export: line xxx") && message.len() < 300, "{message}");
    let tls = |option, _: &[u8]| reply(option, OptionReply::TlsRequired, &[]);
    assert!(talk(greeting(3), tls).1.unwrap_err().to_string().contains("TLS"));
}

#[test]
fn peers_of_another_kind_are_named() {
    let old = Greeting { magic: MAGIC.into(), option_magic: OLD_STYLE_MAGIC.into(), flags: 0.into() };
    assert!(talk(old.as_bytes().to_vec(), good).1.unwrap_err().to_string().contains("old style"));
    let ssh = b"SSH-2.0-OpenSSH_9.6\r\n".to_vec();
    assert!(talk(ssh, good).1.unwrap_err().to_string().contains("no NBD server"));
}

#[test]
fn m79_endless_and_oversized_answers_end_the_handshake() {
    let endless = |option, data: &[u8]| match option {
        OptionCode::Go => reply(option, OptionReply::Info, b"\0\x02x").repeat(1000),
        _ => good(option, data),
    };
    assert!(matches!(talk(greeting(3), endless).1, Err(HandshakeError::Malformed(_))));
    let long = |option, _: &[u8]| {
        let mut header = reply(option, OptionReply::Ack, &[]);
        header[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        header
    };
    assert!(matches!(talk(greeting(3), long).1, Err(HandshakeError::Malformed(_))));
}

#[test]
fn m84_answers_that_fit_nothing_end_the_handshake() {
    type Answer = fn(OptionCode) -> Vec<u8>;
    let answers: [(&str, Answer); 6] = [
        ("another option", |_| reply(OptionCode::List, OptionReply::Ack, &[])),
        ("no magic number", |option| vec![7; reply(option, OptionReply::Ack, &[]).len()]),
        ("a list of exports", |option| reply(option, OptionReply::Server, &[0; 8])),
        ("information too early", |option| reply(option, OptionReply::Info, &export(1, 1))),
        ("the end", |_| Vec::new()),
        ("half a header", |option| reply(option, OptionReply::Ack, &[])[..10].to_vec()),
    ];
    for (what, answer) in answers {
        let outcome = talk(greeting(3), |option, _| answer(option)).1;
        assert!(matches!(outcome, Err(HandshakeError::Malformed(_))), "{what}: {outcome:?}");
    }
}

#[test]
fn m84_impossible_exports_are_refused() {
    let told = |infos: Vec<Vec<u8>>| {
        talk(greeting(3), |option, data| match option {
            OptionCode::Go => {
                let mut bytes: Vec<u8> =
                    infos.iter().flat_map(|data| reply(option, OptionReply::Info, data)).collect();
                bytes.extend(reply(option, OptionReply::Ack, &[]));
                bytes
            }
            _ => good(option, data),
        })
        .1
    };
    assert!(told(vec![export(512, 1), sizes(1, 1, u32::MAX)]).is_ok());
    for infos in [
        vec![],
        vec![export(512, 0)],
        vec![export(1 << 63, 1)],
        vec![export(512, 1)[..11].to_vec()],
        vec![b"\0".to_vec()],
        vec![export(512, 1), sizes(0, 4096, 1 << 20)],
        vec![export(512, 1), sizes(3, 4096, 1 << 20)],
        vec![export(512, 1), sizes(1 << 17, 1 << 17, 1 << 20)],
        vec![export(512, 1), sizes(4096, 512, 1 << 20)],
        vec![export(512, 1), sizes(4096, 4096, 512)],
        vec![export(512, 1), sizes(512, 512, 1000)],
    ] {
        assert!(matches!(told(infos.clone()), Err(HandshakeError::Malformed(_))), "{infos:?}");
    }
}

proptest! {
    #[test]
    fn no_answer_makes_the_client_panic(
        flags in 0_u16..4, kinds in prop::collection::vec((0_u32..12, any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20)
    ) {
        let mut kinds = kinds.into_iter();
        let _ = talk(greeting(flags), |option, _| {
            let Some((kind, refused, data)) = kinds.next() else { return Vec::new() };
            let number = kind | if refused { 1 << 31 } else { 0 };
            let mut bytes = reply(option, OptionReply::Ack, &data);
            bytes[12..16].copy_from_slice(&number.to_be_bytes());
            bytes
        });
    }
}
