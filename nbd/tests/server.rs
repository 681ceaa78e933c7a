//! A server's handshake and its judgement of requests, for clients that are good and malicious.

use nbd::client::{Blocks, Handshake};
use nbd::flags::{HandshakeFlags, TransmissionFlags};
use nbd::server::{Agreed, Guard, Job, Offer, Welcome, judge};
use nbd::wire::{
    Command, Fixed, OPTION_MAGIC, OptionHeader, OptionReply, OptionReplyHeader, REQUEST_MAGIC, Request,
};
use nbd::{ErrorCode, MAX_PAYLOAD};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const SIZE: u64 = 1 << 20;

fn offer(flags: TransmissionFlags) -> Offer {
    let blocks = Blocks { minimum: 512, preferred: 4096, maximum: MAX_PAYLOAD };
    Offer { name: "disk", size: SIZE, flags: flags | TransmissionFlags::HAS_FLAGS, blocks }
}

fn everything() -> TransmissionFlags {
    TransmissionFlags::ALL.without(TransmissionFlags::READ_ONLY | TransmissionFlags::DF)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let header = OptionHeader { magic: OPTION_MAGIC.into(), option: number.into(), len: len.into() };
    [header.as_bytes(), data].concat()
}

/// Feeds a client's bytes; whether the handshake went on to its end, and what the server said after its greeting.
fn hear(bytes: &[u8]) -> (Result<Option<Agreed>, String>, Vec<u8>) {
    let mut server = Welcome::new(offer(everything()));
    let (mut at, mut said) = (0, server.output().split_off(18));
    loop {
        let wants = server.wants();
        assert!(wants <= 64 << 10, "a server keeps little");
        let Some(next) = bytes.get(at..at + wants) else { return (Ok(None), said) };
        at += wants;
        let heard = server.input(next);
        said.extend(server.output());
        match heard {
            Ok(None) => {}
            Ok(agreed) => return (Ok(agreed), said),
            Err(goodbye) => return (Err(goodbye.to_string()), said),
        }
    }
}

/// The kinds of the answers, and the longest.
fn kinds(mut said: &[u8]) -> (Vec<u32>, u32) {
    let (mut kinds, mut longest) = (Vec::new(), 0);
    while let Some(header) = OptionReplyHeader::take(said) {
        kinds.push(header.kind.get());
        longest = longest.max(header.len.get());
        said = &said[OptionReplyHeader::LEN + header.len.get() as usize..];
    }
    (kinds, longest)
}

fn with(parts: &[Vec<u8>]) -> Vec<u8> {
    [3_u32.to_be_bytes().to_vec(), parts.concat()].concat()
}

fn go() -> Vec<u8> {
    option(7, &[0; 6])
}

#[test]
fn our_client_and_our_server_agree() {
    let (mut client, mut server) = (Handshake::new("any name"), Welcome::new(offer(everything())));
    let (mut to_client, mut to_server) = (server.output(), Vec::new());
    let (mut export, mut agreed) = (None, None);
    while export.is_none() {
        if to_client.len() >= client.wants() {
            let bytes: Vec<u8> = to_client.drain(..client.wants()).collect();
            export = client.input(&bytes).unwrap();
            to_server.extend(client.output());
        } else {
            let bytes: Vec<u8> = to_server.drain(..server.wants()).collect();
            agreed = server.input(&bytes).unwrap();
            to_client.extend(server.output());
        }
    }
    let export = export.unwrap();
    assert_eq!(agreed, Some(Agreed { structured: true, allocation: true }));
    assert_eq!((export.size, export.structured, export.allocation), (SIZE, true, Some(1)));
    assert!(export.flags.has(everything() | TransmissionFlags::DF));
    assert_eq!(export.blocks.minimum, 512);
}

#[test]
fn an_old_client_gets_the_export_with_its_padding_unless_it_says_otherwise() {
    for (flags, padding) in [(0_u32, 124), (1, 124), (2, 0), (3, 0)] {
        let bytes = [flags.to_be_bytes().to_vec(), option(1, b"name")].concat();
        let (agreed, said) = hear(&bytes);
        assert_eq!((agreed, said.len()), (Ok(Some(Agreed::default())), 10 + padding));
    }
}

#[test]
fn a_context_is_for_the_export_that_it_was_set_for() {
    let set = |name: &[u8], query: &[u8]| {
        let sized = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat();
        option(10, &[sized(name), 1_u32.to_be_bytes().to_vec(), sized(query)].concat())
    };
    let agreed = |parts: &[Vec<u8>]| hear(&with(parts)).0.unwrap().unwrap().allocation;
    assert!(agreed(&[option(8, &[]), set(b"", b"base:allocation"), go()]));
    assert!(!agreed(&[option(8, &[]), set(b"other", b"base:allocation"), go()]));
    assert!(!agreed(&[option(8, &[]), set(b"", b"base:"), go()]));
    assert!(!agreed(&[set(b"", b"base:allocation"), option(8, &[]), go()]), "before structured replies");
}

#[test]
fn m77_lengths_without_end_are_skipped_or_end_the_connection() {
    let header = |len: u32| {
        OptionHeader { magic: OPTION_MAGIC.into(), option: 6.into(), len: len.into() }.as_bytes().to_vec()
    };
    assert!(hear(&with(&[header(u32::MAX)])).0.is_err());
    let (agreed, said) = hear(&with(&[header(100_000), vec![0; 100_000], go()]));
    assert!(agreed.unwrap().is_some());
    assert_eq!(kinds(&said).0[0], OptionReply::TooBig.number());
    // A name longer than its option.
    let (agreed, said) = hear(&with(&[option(7, &[0xff; 6]), go()]));
    assert!(agreed.unwrap().is_some());
    assert_eq!(kinds(&said).0[0], OptionReply::Invalid.number());
}

#[test]
fn m78_a_long_name_is_refused_with_few_words() {
    let long = [&5000_u32.to_be_bytes()[..], &[b'x'; 5000], &[0; 2]].concat();
    let (agreed, said) = hear(&with(&[option(7, &long), go()]));
    assert!(agreed.unwrap().is_some());
    let (kinds, longest) = kinds(&said);
    assert_eq!(kinds[0], OptionReply::TooBig.number());
    assert!(longest < 64);
    assert!(hear(&with(&[option(1, &[b'x'; 4097])])).0.is_err());
}

#[test]
fn m79_options_come_to_an_end() {
    assert!(hear(&with(&[option(3, &[]).repeat(100)])).0.is_err());
    assert!(hear(&[0xff; 4]).0.is_err(), "unknown flags");
    assert!(hear(&with(&[vec![7; 16]])).0.is_err(), "no magic number");
    assert!(hear(&[0_u32.to_be_bytes().to_vec(), go()].concat()).0.is_err(), "not without the fixed style");
}

/// What a guard says to a client's bytes after its greeting, and whether it lets the client begin with TLS.
fn guarded(bytes: &[u8]) -> (Result<bool, String>, Vec<u8>) {
    let mut guard = Guard::new();
    let (mut at, mut said) = (0, guard.output().split_off(18));
    loop {
        let Some(next) = bytes.get(at..at + guard.wants()) else { return (Ok(false), said) };
        at += next.len();
        let heard = guard.input(next);
        said.extend(guard.output());
        match heard {
            Ok(None) => {}
            Ok(Some(flags)) => {
                assert_eq!((flags, at), (HandshakeFlags::ALL, bytes.len()));
                return (Ok(true), said);
            }
            Err(goodbye) => return (Err(goodbye.to_string()), said),
        }
    }
}

#[test]
fn a_guard_tells_nothing_before_tls() {
    let tls = option(5, &[]);
    let (begins, said) = guarded(&with(std::slice::from_ref(&tls)));
    assert_eq!((begins, kinds(&said)), (Ok(true), (vec![OptionReply::Ack.number()], 0)));
    // Whatever else is asked for, known or not, is answered the same.
    let asked = [3, 6, 7, 8, 9, 10, 11, 99].map(|number| option(number, &[0; 6]));
    let (begins, said) = guarded(&with(&[asked.concat(), option(5, b"x"), tls]));
    let mut expected = vec![OptionReply::TlsRequired.number(); 8];
    expected.extend([OptionReply::Invalid.number(), OptionReply::Ack.number()]);
    assert_eq!((begins, kinds(&said).0), (Ok(true), expected));
    assert!(guarded(&with(&[option(1, b"name")])).0.is_err(), "an old client's way to an export");
    assert!(guarded(&with(&[option(2, &[])])).0.is_err());
    assert!(guarded(&with(&[option(3, &[]).repeat(100)])).0.is_err());
}

#[test]
fn m80_m81_asking_twice_and_for_tls_changes_nothing() {
    let (agreed, said) = hear(&with(&[option(6, &[0; 6]).repeat(3), option(5, &[]), option(99, b"x"), go()]));
    assert!(agreed.unwrap().is_some());
    let unsupported = OptionReply::Unsupported.number();
    assert_eq!(kinds(&said).0, [3, 3, 1, 3, 3, 1, 3, 3, 1, unsupported, unsupported, 3, 3, 1]);
}

fn request(flags: u16, command: u16, offset: u64, len: u32) -> Request {
    Request {
        magic: REQUEST_MAGIC.into(),
        flags: flags.into(),
        command: command.into(),
        cookie: 9.into(),
        offset: offset.into(),
        len: len.into(),
    }
}

#[test]
fn m82_m83_requests_are_answered_with_the_errors_of_the_protocol() {
    let everything = offer(everything());
    let (structured, plain) = (Agreed { structured: true, allocation: true }, Agreed::default());
    let job = |request| judge(&request, &everything, structured).unwrap().job;
    for (what, request, error) in [
        ("overflow", request(0, 0, u64::MAX - 511, 1024), ErrorCode::Inval),
        ("read beyond", request(0, 0, SIZE - 512, 1024), ErrorCode::Inval),
        ("write beyond", request(0, 1, SIZE, 512), ErrorCode::NoSpc),
        ("zeros beyond", request(0, 6, SIZE, 512), ErrorCode::NoSpc),
        ("no length", request(0, 0, 0, 0), ErrorCode::Inval),
        ("askew", request(0, 0, 1, 512), ErrorCode::Inval),
        ("a part of a sector", request(0, 1, 0, 100), ErrorCode::Inval),
        ("unknown flag", request(1 << 9, 0, 0, 512), ErrorCode::Inval),
        ("flag of another command", request(4, 1, 0, 512), ErrorCode::Inval),
        ("fast zeros are not offered", request(16, 6, 0, 512), ErrorCode::Inval),
        ("unknown command", request(0, 8, 0, 512), ErrorCode::Inval),
    ] {
        assert_eq!(job(request), Err(error), "{what}");
    }
    let without_end = judge(&request(0, 1, 0, u32::MAX), &everything, plain).unwrap();
    assert_eq!(without_end.payload, u32::MAX, "what is refused is taken out of the stream all the same");
    assert!(without_end.job.is_err());
    assert_eq!(judge(&request(0, 7, 0, 512), &everything, plain).unwrap().job, Err(ErrorCode::Inval));
    assert_eq!(job(request(8, 7, 0, 512)), Ok(Job::Status { offset: 0, len: 512, one: true }));
    assert_eq!(job(request(1, 1, 512, 512)), Ok(Job::Write { offset: 512, len: 512, fua: true }));
    let readonly = offer(TransmissionFlags::READ_ONLY);
    for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
        let judged = judge(&request(0, command.number(), 0, 512), &readonly, plain).unwrap();
        assert!(judged.job.is_err());
    }
    let judged = judge(&request(0, 1, 0, 512), &readonly, plain).unwrap();
    assert_eq!((judged.job, judged.payload), (Err(ErrorCode::Perm), 512));
    let mut alien = request(0, 0, 0, 512);
    alien.magic = 0.into();
    assert_eq!(judge(&alien, &everything, plain), None);
}

proptest! {
    #[test]
    fn no_client_makes_the_server_panic(
        flags in 0_u32..5, options in prop::collection::vec((0_u32..13, prop::collection::vec(any::<u8>(), 0..40)), 0..20),
        torn in 0_usize..50
    ) {
        let options = options.into_iter().map(|(number, data)| option(number, &data));
        let mut bytes = [vec![flags.to_be_bytes().to_vec()], options.collect()].concat().concat();
        bytes.truncate(bytes.len().saturating_sub(torn));
        let _ = hear(&bytes);
    }

    /// What is to be done lies on the disk, in whole sectors.
    #[test]
    fn jobs_lie_on_the_disk(
        flags in 0_u16..32, command in 0_u16..10, offset in any::<u64>(), len in any::<u32>(), near in any::<bool>()
    ) {
        let (offset, len) = if near { (offset % (2 * SIZE) / 512 * 512, len % (1 << 21) / 512 * 512) } else { (offset, len) };
        let agreed = Agreed { structured: true, allocation: true };
        let judged = judge(&request(flags, command, offset, len), &offer(everything()), agreed).unwrap();
        if let Ok(
            Job::Read { offset, len, .. } | Job::Write { offset, len, .. } | Job::Trim { offset, len, .. }
            | Job::Zero { offset, len, .. } | Job::Status { offset, len, .. },
        ) = judged.job
        {
            prop_assert!(len > 0 && offset + u64::from(len) <= SIZE);
            prop_assert!((offset | u64::from(len)).is_multiple_of(512));
        }
    }
}
