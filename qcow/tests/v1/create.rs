//! New images.

use format::Format;
use format::blocking::{Storage, with_source};
use format::testing::Memory;
use qcow::v1::{Backing, Flavour, NewImage, check};

use crate::support::open;

pub fn made(image: &NewImage) -> Memory {
    let new = image.build().unwrap();
    let mut memory = Memory::file();
    memory.set_len(new.len).unwrap();
    for write in &new.writes {
        memory.write_at(write.offset, &write.bytes).unwrap();
    }
    memory
}

const PLAIN: NewImage = NewImage { sectors: 32768, flavour: Flavour::Qemu, backing: None, encrypted: false };

/// The first bytes of the images that `qcow-create 16 F`, `qcow-create -r 16 F` and `qcow-create 16 F PARENT` of Xen 4.2 make.
#[test]
fn xens_images_are_byte_for_byte_those_of_its_own_tool() {
    let head = |cluster, l2, alloc: [u8; 2], flags, backing: u8, name: u8, mtime: [u8; 4]| {
        let mut head = b"QFI\xfb\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        head.extend([backing, 0, 0, 0, name]);
        head.extend(mtime);
        head.extend([0, 0, 0, 0, 1, 0, 0, 0, cluster, l2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]);
        head.extend(b"XEN\xfb\x7d\x3c\x5d\x3b\0\0");
        head.extend(alloc);
        head.extend([0, 0, 0, flags]);
        head
    };
    let sparse = NewImage { flavour: Flavour::Xen { reserve: false }, ..PLAIN };
    let reserved = NewImage { flavour: Flavour::Xen { reserve: true }, ..PLAIN };
    let name = b"/srv/golden/src.raw";
    let backing = Backing { name: name.to_vec(), mtime: 0x6b01_1c80 };
    let child = NewImage { backing: Some(backing.clone()), ..sparse.clone() };
    for (image, expected, len) in [
        (sparse, head(12, 9, [2, 0], 3, 0, 0, [0; 4]), 8192),
        (reserved, head(12, 9, [2, 0], 2, 0, 0, [0; 4]), 16_789_504),
        (child, head(9, 12, [0, 1], 3, 64, 19, [0x6b, 0x01, 0x1c, 0x80]), 8192),
    ] {
        let file = made(&image);
        let rest = &file.bytes[64..];
        assert_eq!((&file.bytes[..64], file.bytes.len()), (&expected[..], len), "{image:?}");
        let text = image.backing.as_ref().map_or(&[][..], |_| name);
        assert!(rest.starts_with(text) && rest[text.len()..].iter().all(|b| *b == 0));
        let core = open(&file, true).unwrap();
        assert_eq!((core.sectors(), core.backing()), (32768, image.backing.as_ref()));
        let xen = core.header().xen.unwrap();
        assert_eq!((xen.checksum, xen.flags & 2), (0x7d3c_5d3b, 2));
    }
}

#[test]
fn new_images_open_and_pass_the_check() {
    for sectors in [1, 7, 4096, 1 << 32] {
        for backing in [None, Some(Backing { name: b"base.raw".to_vec(), mtime: 9 })] {
            let image = NewImage { sectors, backing: backing.clone(), ..PLAIN };
            let file = made(&image);
            let core = open(&file, true).unwrap();
            assert_eq!((core.sectors(), core.backing()), (sectors, backing.as_ref()));
            assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 0);
        }
    }
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    for sectors in [0, 1 << 60, u64::MAX] {
        assert!(NewImage { sectors, ..PLAIN }.build().is_err(), "{sectors}");
    }
    for name in [vec![], vec![b'x'; 1024], b"a\0b".to_vec()] {
        let image = NewImage { backing: Some(Backing { name, mtime: 0 }), ..PLAIN };
        assert!(image.build().is_err(), "{image:?}");
    }
}
