//! Malformed images and replies, made of good ones by chance: whatever they are, nothing panics, loops, or takes memory that no
//! image asks for. `make fuzz` gives each a minute.

#[path = "../../../qcow/tests/v1/support.rs"]
#[expect(dead_code, reason = "shared with the format's own tests, which use all of it")]
mod qcow;
#[path = "../../../qcow/tests/v2/support.rs"]
mod qcow2;
#[path = "../../../vhd/tests/core/support.rs"]
mod vhd_support;
#[path = "../../../vmdk/tests/sparse/support.rs"]
#[expect(dead_code, reason = "shared with the format's own tests, which use all of it")]
mod vmdk_support;

use format::blocking::with_source;
use format::testing::{Memory, Random, Subject, Turns, exercise, fuzz_for, mutate, stamps};
use format::{Format, Source};
use nbd::client::{Ask, Blocks, Export, Handshake, Session, Step};
use nbd::flags::{CommandFlags, TransmissionFlags};
use nbd::wire::{CHUNK_MAGIC, Command, Fixed, Request, SIMPLE_MAGIC};

const SECTORS: u64 = 600;

/// Images to begin with: empty, written, with a parent, and used after that.
fn images<S: Subject>(subject: &S) -> Vec<Memory> {
    let mut random = Random::new(1);
    let mut disk = Turns::create(subject, SECTORS);
    let mut images = vec![disk.image.storage().clone()];
    disk.write(
        vec![(0, stamps(0, 100, 1)), (333, stamps(333, 1, 2)), (500, stamps(500, 60, 3))],
        &mut random,
    );
    images.push(disk.image.storage().clone());
    if subject.has_parents() {
        let mut child = disk.snapshot(subject, 2);
        child.write(vec![(90, stamps(90, 20, 4)), (599, stamps(599, 1, 5))], &mut random);
        images.push(child.close().0);
    }
    images
}

/// Images that QEMU makes, where it is installed: what we only read, such as compressed clusters, is in these alone.
fn of_qemu(ways: &[(&str, &[&str])]) -> Vec<Memory> {
    let folder = tempfile::tempdir().unwrap();
    let (raw, image) = (folder.path().join("raw"), folder.path().join("image"));
    let data = [stamps(0, 200, 1), vec![0; 200 * 512], vec![7; 200 * 512]].concat();
    std::fs::write(&raw, data).unwrap();
    let make = |(kind, options): &(&str, &[&str])| {
        let mut program = std::process::Command::new("qemu-img");
        program.args(["convert", "-f", "raw", "-O", kind]).args(*options).args([&raw, &image]);
        match program.output() {
            Ok(output) => {
                let words = String::from_utf8_lossy(&output.stderr);
                // QEMU 7.2 and 10.0 say nothing and exit with 1 after they have made a good compressed qcow.
                let good = output.status.success() || (options.contains(&"-c") && words.is_empty());
                assert!(good, "{program:?}: {words}");
                Some(Memory::of(std::fs::read(&image).unwrap(), true))
            }
            Err(error) => {
                eprintln!("without images of QEMU: {error}");
                None
            }
        }
    };
    ways.iter().filter_map(make).collect()
}

/// Opens, reads and writes malformed images.
fn fuzz<F: Format>(
    images: &[Memory],
    rounds: u64,
    open: impl Fn(Source<'_>, bool) -> Option<F>,
    check: impl Fn(Source<'_>),
) {
    fuzz_for(rounds, |random| {
        let image = mutate(images, random);
        let writable = random.once_in(2);
        let before = image.bytes.clone();
        let opened = with_source(&image, |source| open(source, writable)).unwrap();
        let _ = with_source(&image, &check);
        assert!(image.bytes == before, "neither opening nor checking changes anything");
        if let Some(core) = opened {
            exercise(core, image, random);
        }
    });
}

#[test]
fn fuzz_vhd() {
    let mut all = Vec::new();
    for encrypted in [false, true] {
        let shape = vhd_support::Shape {
            block_size: 4096,
            max_sectors: 2 * SECTORS,
            encrypted,
            ..Default::default()
        };
        all.extend(images(&shape));
    }
    let open = |source: Source<'_>, writable| {
        let key = vhd::key::Key::new(vec![7; 32]).ok().filter(|_| source.size.is_multiple_of(3));
        vhd::Vhd::open(source, &vhd::OpenOptions { writable, key, ..Default::default() }).ok()
    };
    fuzz(&all, 4000, open, |mut source| {
        let options = vhd::check::CheckOptions { bitmaps: true, ..Default::default() };
        let _ = vhd::check::check(&mut source, &options);
    });
}

#[test]
fn fuzz_qcow() {
    let shapes = [
        qcow::Shape::new(12, 9),
        qcow::Shape { xen: Some(1), ..qcow::Shape::new(9, 6) },
        qcow::Shape { encrypted: true, ..qcow::Shape::new(9, 6) },
    ];
    let mut all = shapes.iter().flat_map(images).collect::<Vec<_>>();
    all.extend(of_qemu(&[("qcow", &["-c"])]));
    let open = |source: Source<'_>, writable| {
        let key = (source.size.is_multiple_of(3)).then_some(qcow::KEY);
        ::qcow::v1::open(source, &::qcow::v1::OpenOptions { writable, key, ..Default::default() }).ok()
    };
    fuzz(&all, 4000, open, |source| drop(::qcow::v1::check::check(source)));
}

#[test]
fn fuzz_qcow2() {
    let shapes =
        [(9, 16, 3), (12, 1, 3), (12, 64, 3), (9, 16, 2)].map(|(cluster_bits, refcount_bits, version)| {
            qcow2::Shape { version, cluster_bits, refcount_bits, ..Default::default() }
        });
    let mut all = shapes.iter().flat_map(images).collect::<Vec<_>>();
    all.extend(of_qemu(&[
        ("qcow2", &["-c", "-o", "cluster_size=4096"]),
        ("qcow2", &["-c", "-o", "cluster_size=4096,compression_type=zstd"]),
        ("qcow2", &["-o", "cluster_size=16k,extended_l2=on"]),
        ("qcow2", &["-o", "cluster_size=4096,lazy_refcounts=on"]),
    ]));
    let open = |source: Source<'_>, writable| {
        ::qcow::v2::open(source, &::qcow::v2::OpenOptions { writable, ..Default::default() }).ok()
    };
    fuzz(&all, 3000, open, |source| drop(::qcow::v2::check(source)));
}

#[test]
fn fuzz_vmdk() {
    let shapes = [(8, 512, true), (1, 512, false), (16, 512, false)].map(|(grain, entries, redundant)| {
        vmdk_support::Shape { grain, entries, redundant, tables: true, cache: 0 }
    });
    let mut all = shapes.iter().flat_map(images).collect::<Vec<_>>();
    all.extend(of_qemu(&[
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vmdk", &["-o", "subformat=monolithicSparse,zeroed_grain=on"]),
    ]));
    let open = |source: Source<'_>, writable| {
        vmdk::open(source, &vmdk::OpenOptions { writable, ..Default::default() }).ok()
    };
    fuzz(&all, 4000, open, |source| drop(vmdk::check::check(source)));
    fuzz_for(2000, |random| {
        let mut text = all[0].bytes[512..1536].to_vec();
        for _ in 0..random.below(20) {
            let at = random.below(text.len());
            text[at] = random.pick(b"\0\n\"\\ =9RWzx#\xff");
        }
        if let Ok(descriptor) = vmdk::descriptor::Descriptor::parse(&text) {
            let _ = descriptor.sectors();
        }
    });
}

#[test]
fn fuzz_nbd_replies() {
    fuzz_for(20_000, |random| {
        let structured = random.once_in(2);
        let export = Export {
            size: 1 << 30,
            flags: TransmissionFlags::HAS_FLAGS,
            structured,
            allocation: Some(5),
            blocks: Blocks::default(),
        };
        let mut session = Session::new(&export);
        let mut cookies = Vec::new();
        let mut lens = Vec::new();
        for _ in 0..1 + random.below(4) {
            let command = random.pick(&[Command::Read, Command::Write, Command::Flush, Command::BlockStatus]);
            let len = 512 * u32::try_from(1 + random.below(64)).unwrap();
            let ask = Ask { command, flags: CommandFlags::default(), offset: 512 * random.up_to(999), len };
            cookies.push(Request::take(&session.begin(&ask).1).unwrap().cookie.get());
            lens.push(len);
        }
        let stream = replies(&cookies, random);
        let (mut at, mut there) = (0, 0);
        while let Ok((used, step)) = session.next(&stream[at..there]) {
            assert!(used <= there - at);
            at += used;
            match step {
                Step::Need(count) => {
                    assert!(count > there - at, "it asks for what it has");
                    assert!(count <= (64 << 10) + 64, "it asks for {count} bytes");
                    if at + count > stream.len() {
                        break;
                    }
                    there = at + count;
                }
                Step::Data { slot, at: place, len } => {
                    let whole = lens[usize::try_from(slot.0).unwrap()];
                    assert!(len > 0 && place.checked_add(len).is_some_and(|end| end <= whole));
                    at = (at + len as usize).min(stream.len());
                    there = there.max(at);
                }
                Step::Zero { slot, at: place, len } => {
                    let whole = lens[usize::try_from(slot.0).unwrap()];
                    assert!(len > 0 && place.checked_add(len).is_some_and(|end| end <= whole));
                }
                Step::Skip(count) => {
                    at = (at + count).min(stream.len());
                    there = there.max(at);
                }
                Step::Done(slot, _) => session.release(slot),
            }
        }
    });
}

/// Something like replies to these requests.
fn replies(cookies: &[u64], random: &mut Random) -> Vec<u8> {
    let mut stream = Vec::new();
    for _ in 0..random.below(12) {
        let cookie = if random.once_in(20) { random.number() } else { random.pick(cookies) };
        if random.once_in(3) {
            stream.extend(SIMPLE_MAGIC.to_be_bytes());
            stream.extend(random.pick(&[0_u32, 0, 5, 22, u32::MAX]).to_be_bytes());
            stream.extend(cookie.to_be_bytes());
        } else {
            let kind = random.pick(&[0_u16, 1, 2, 5, 0x8001, 0x8002, 0x7777]);
            let len = random.pick(&[0_u32, 4, 8, 12, 20, 520, 1032, u32::MAX]);
            stream.extend(CHUNK_MAGIC.to_be_bytes());
            stream.extend(random.pick(&[0_u16, 1, 1, 0xfffe]).to_be_bytes());
            stream.extend(kind.to_be_bytes());
            stream.extend(cookie.to_be_bytes());
            stream.extend(len.to_be_bytes());
            let mut content = vec![0; len.min(2000) as usize];
            if random.once_in(2) {
                random.fill(&mut content);
            }
            let offset = (512 * random.up_to(1010)).to_be_bytes();
            let known = content.len().min(8);
            content[..known].copy_from_slice(&offset[..known]);
            stream.extend(content);
        }
        if random.once_in(10) {
            let at = random.below(stream.len());
            stream[at] ^= 1 << random.below(8);
        }
    }
    stream.extend([0; 64]);
    stream
}

#[test]
fn fuzz_nbd_handshake() {
    fuzz_for(20_000, |random| {
        let mut handshake = Handshake::new("name");
        for _ in 0..40 {
            let _ = handshake.output();
            let count = handshake.wants();
            assert!(count <= 1 << 20, "it wants {count} bytes");
            let mut bytes = vec![0; count];
            if random.once_in(3) {
                random.fill(&mut bytes);
            }
            // What gets far enough to be understood.
            for (magic, at) in [
                (&b"NBDMAGICIHAVEOPT\0\x03"[..], 0),
                (&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], 0),
                (&[0, 0, 0, random.pick(&[6, 7, 8, 10])][..], 8),
                (&[random.pick(&[0, 0, 0x80]), 0, 0, random.pick(&[1, 2, 3, 4])][..], 12),
                (&[0, 0, 0, random.pick(&[0, 4, 12, 14, 20])][..], 16),
            ] {
                if !random.once_in(8) && at + magic.len() <= bytes.len() {
                    bytes[at..at + magic.len()].copy_from_slice(magic);
                }
            }
            if !matches!(handshake.input(&bytes), Ok(None)) {
                break;
            }
        }
    });
}
