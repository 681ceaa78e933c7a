//! Our layouts and numbers against the public C headers, as the machine's own C compiler sees them.
//!
//! The headers come with linux-libc-dev and libxen-dev. Where they or the compiler are missing, the tests say so and
//! pass: layouts do not depend on the machine the tests run on, so one that has them is enough.

use std::collections::HashMap;
use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;
use std::ptr::NonNull;

use blkif::abi::{self, MAX_SEGMENTS, op};
use blkif::encode::{Draft, DraftSegment};
use blkif::keys::info;
use blkif::{Abi, DomId, GrantRef, Response, RingOrder, Status, XenbusState};
use gntdev::{CopyDirection, CopySegment, CopyStatus};
use zerocopy::IntoBytes;

/// The lines of `headers/layout.c`, by name.
struct Headers(HashMap<String, String>);

impl Headers {
    fn read() -> Option<Headers> {
        let needed =
            ["/usr/include/xen/io/blkif.h", "/usr/include/xen/gntdev.h", "/usr/include/xen/evtchn.h"];
        if let Some(missing) = needed.iter().find(|path| !Path::new(path).exists()) {
            eprintln!("skipped: no {missing}; install libxen-dev and linux-libc-dev");
            return None;
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/headers/layout.c");
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("layout");
        let compiled = match Command::new("cc").arg("-o").arg(&program).arg(&source).output() {
            Ok(output) => output,
            Err(error) => {
                eprintln!("skipped: cannot run cc: {error}");
                return None;
            }
        };
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let output = Command::new(&program).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        Some(Headers(lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()))
    }

    #[track_caller]
    fn check(&self, name: &str, ours: impl ToString) {
        assert_eq!(self.0.get(name), Some(&ours.to_string()), "{name}: headers (left) and ours (right)");
    }

    #[track_caller]
    fn check_bytes(&self, name: &str, ours: &[u8]) {
        let hex = ours.iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        self.check(name, hex);
    }
}

#[test]
fn ring_entries_are_the_headers() {
    let Some(headers) = Headers::read() else { return };
    let mut draft = Draft {
        op: op::WRITE,
        nr_segments: 11,
        handle: 0x1234,
        id: 0x1122_3344_5566_7788,
        sector: 0x99aa_bbcc_ddee_ff00,
        ..Draft::default()
    };
    for (i, segment) in (0u8..).zip(&mut draft.segments) {
        *segment = DraftSegment { gref: GrantRef(0xa0b0_c0d0 + u32::from(i)), first: i % 8, last: 7 };
    }
    let response =
        Response { id: draft.id, op: op::FLUSH_DISKCACHE, status: Status::NotSupported.wire() }.encode();
    for (name, abi) in [("x86_64", Abi::X86_64), ("x86_32", Abi::X86_32)] {
        headers.check_bytes(&format!("request_{name}"), draft.encode(abi).as_bytes());
        headers.check_bytes(&format!("response_{name}"), &response[..abi.response_size()]);
        for order in RingOrder::all() {
            headers.check(&format!("slots_{name}_{}", order.get()), abi.slots(order));
        }
    }
    headers.check("ring_header", abi::HEADER_SIZE);
    headers.check("req_prod", abi::header::REQ_PROD);
    headers.check("req_event", abi::header::REQ_EVENT);
    headers.check("rsp_prod", abi::header::RSP_PROD);
    headers.check("rsp_event", abi::header::RSP_EVENT);
    headers.check("max_segments", MAX_SEGMENTS);
}

#[test]
fn numbers_of_the_block_protocol_are_the_headers() {
    let Some(headers) = Headers::read() else { return };
    headers.check("op_read", op::READ);
    headers.check("op_write", op::WRITE);
    headers.check("op_barrier", op::WRITE_BARRIER);
    headers.check("op_flush", op::FLUSH_DISKCACHE);
    headers.check("op_discard", op::DISCARD);
    headers.check("op_indirect", op::INDIRECT);
    headers.check("okay", Status::Okay.wire());
    headers.check("error", Status::Error.wire());
    headers.check("not_supported", Status::NotSupported.wire());
    headers.check("info_cdrom", info::CDROM);
    headers.check("info_removable", info::REMOVABLE);
    headers.check("info_readonly", info::READONLY);
    for (name, state) in [
        ("unknown", XenbusState::Unknown),
        ("initialising", XenbusState::Initialising),
        ("initwait", XenbusState::InitWait),
        ("initialised", XenbusState::Initialised),
        ("connected", XenbusState::Connected),
        ("closing", XenbusState::Closing),
        ("closed", XenbusState::Closed),
        ("reconfiguring", XenbusState::Reconfiguring),
        ("reconfigured", XenbusState::Reconfigured),
    ] {
        headers.check(&format!("state_{name}"), state.as_str());
    }
    for (name, abi) in [("x86_64", Abi::X86_64), ("x86_32", Abi::X86_32), ("arm", Abi::X86_64)] {
        let key = headers.0.get(&format!("protocol_{name}")).unwrap();
        assert_eq!(Abi::from_protocol_key(Some(key.as_bytes())), Ok(abi));
    }
}

#[test]
fn grant_device_is_the_headers() {
    let Some(headers) = Headers::read() else { return };
    headers.check("gntdev_map", gntdev::ioctl::MAP_GRANT_REF);
    headers.check("gntdev_unmap", gntdev::ioctl::UNMAP_GRANT_REF);
    headers.check("gntdev_copy", gntdev::ioctl::GRANT_COPY);
    headers.check("gntdev_map_index", offset_of!(gntdev::ioctl::MapHeader, index));
    headers.check("gntdev_map_refs", size_of::<gntdev::ioctl::MapHeader>());
    headers.check("gntdev_ref_domid", offset_of!(gntdev::ioctl::MapRef, domid));
    headers.check("gntdev_ref_ref", offset_of!(gntdev::ioctl::MapRef, gref));
    headers.check("gntdev_unmap_count", offset_of!(gntdev::ioctl::Unmap, count));
    headers.check("gntdev_copy_segments", offset_of!(gntdev::ioctl::GrantCopy, segments));
    let local = NonNull::without_provenance(0x7788.try_into().unwrap());
    for (name, direction) in
        [("copy_from_guest", CopyDirection::FromGuest), ("copy_to_guest", CopyDirection::ToGuest)]
    {
        let mut segment =
            CopySegment::new(direction, DomId(0x0506), GrantRef(0x1122_3344), 0x0a00, 512, local).unwrap();
        segment.set_status(CopyStatus(-3));
        headers.check_bytes(name, segment.as_bytes());
    }
}

#[test]
fn event_channel_device_is_the_headers() {
    let Some(headers) = Headers::read() else { return };
    headers.check("evtchn_bind", evtchn::ioctl::BIND_INTERDOMAIN);
    headers.check("evtchn_unbind", evtchn::ioctl::UNBIND);
    headers.check("evtchn_notify", evtchn::ioctl::NOTIFY);
    headers.check("evtchn_reset", evtchn::ioctl::RESET);
    headers.check("evtchn_restrict", evtchn::ioctl::RESTRICT_DOMID);
    headers.check("evtchn_bind_domain", offset_of!(evtchn::ioctl::Remote, domain));
    headers.check("evtchn_bind_port", offset_of!(evtchn::ioctl::Remote, port));
}
