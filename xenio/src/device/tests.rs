use super::*;
use blkif::{DomId, VdevId};
use mio::Poll;
use tap_ctl::ControlDir;
use tap_ctl::proto::{ImageSpec, Polling, RingEntry};

use crate::features::Role;
use crate::tapdisk::Links;

const ID: DeviceId = DeviceId { domid: DomId(5), vdev: VdevId(51712) };

/// Tickets as the connections give them, without a tapdisk.
struct Tickets {
    links: Links,
    _folder: tempfile::TempDir,
    _listener: std::os::unix::net::UnixListener,
}

impl Tickets {
    fn new() -> Tickets {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path());
        let listener = std::os::unix::net::UnixListener::bind(dir.control_socket(7)).unwrap();
        let links = Links::new(Poll::new().unwrap().registry().try_clone().unwrap(), dir);
        Tickets { links, _folder: folder, _listener: listener }
    }

    fn next(&mut self) -> Ticket {
        self.links.send(7, &Request::List).unwrap()
    }
}

fn backend(phase: Phase) -> Backend {
    Backend {
        own: Own::Is(phase),
        online: true,
        hotplug: true,
        role: Role { writable: true, cdrom: false, discard: true },
        named: Named::Tapdisk(7, Minor(3)),
        frontend: Ok(b"/local/domain/5/device/vbd/51712".to_vec()),
    }
}

const CONNECTED: Frontend = Frontend::Is(XenbusState::Connected);

fn device(phase: Phase) -> Device {
    let mut device = Device::new(ID, 1, Instant::now());
    device.observe(&backend(phase), CONNECTED);
    device
}

fn entry(image: bool, rings: &[(u16, u32)]) -> Reply {
    let image: Option<ImageSpec> = image.then(|| "vhd:/a".parse().unwrap());
    let rings = rings.iter().map(|&(domid, vdev)| RingEntry { domid, vdev }).collect();
    Reply::List { vbds: vec![VbdEntry { minor: Minor(3), state: 0, image, rings }] }
}

fn error(errno: Errno) -> Reply {
    Reply::Error { errno: errno as i32, message: "words".into() }
}

fn params(port: u32) -> RingParams {
    let queues = vec![tap_ctl::proto::QueueParams { ring_refs: vec![8], port }];
    RingParams {
        domid: 5,
        vdev: 51712,
        protocol: "x86_64-abi".into(),
        queues,
        readonly: false,
        persistent: false,
        discard: false,
        polling: Polling::default(),
    }
}

fn tap_and_ring(device: &Device) -> (Tap, Ring) {
    let view = device.view(&backend(Phase::Connected), CONNECTED, false);
    (view.tap, view.ring)
}

#[test]
fn a_device_found_in_operation_may_have_a_ring_and_a_new_one_has_none() {
    for (phase, ring) in [
        (Phase::Initialising, Ring::Down),
        (Phase::InitWait, Ring::Unknown),
        (Phase::Connected, Ring::Unknown),
        (Phase::Closing, Ring::Unknown),
        (Phase::Closed, Ring::Down),
    ] {
        assert_eq!(tap_and_ring(&device(phase)), (Tap::New, ring), "{phase:?}");
    }
    let mut unnamed = Device::new(ID, 1, Instant::now());
    unnamed.observe(&Backend { named: Named::Nobody, ..backend(Phase::InitWait) }, CONNECTED);
    assert_eq!(tap_and_ring(&unnamed), (Tap::Unnamed, Ring::Down));
}

#[test]
fn the_tapdisks_list_tells_whether_an_unknown_ring_is_up() {
    let mut tickets = Tickets::new();
    for (rings, expected) in
        [(&[(5, 51712)][..], Ring::Up), (&[(6, 51712), (5, 51728)], Ring::Down), (&[], Ring::Down)]
    {
        let mut device = device(Phase::Connected);
        let ticket = tickets.next();
        device.sent(ticket, Pending::List);
        let follow = device.answered(ticket, entry(true, rings));
        assert_eq!(follow, Some((Request::DiskInfo { minor: Minor(3) }, Pending::DiskInfo)));
        assert_eq!(tap_and_ring(&device), (Tap::Asking, expected), "{rings:?}");
    }
}

#[test]
fn a_tapdisk_without_the_disk_is_lost() {
    let mut tickets = Tickets::new();
    for reply in [entry(false, &[]), Reply::List { vbds: Vec::new() }, error(Errno::EIO), Reply::Done] {
        let mut device = device(Phase::InitWait);
        let ticket = tickets.next();
        device.sent(ticket, Pending::List);
        assert_eq!(device.answered(ticket, reply.clone()), None);
        assert_eq!(tap_and_ring(&device), (Tap::Lost, Ring::Down), "{reply:?}");
    }
}

#[test]
fn connecting_succeeds_fails_or_was_done_before() {
    let mut tickets = Tickets::new();
    for (reply, ring, problem) in [
        (Reply::Done, Ring::Up, false),
        (error(Errno::EALREADY), Ring::Up, false),
        (error(Errno::EINVAL), Ring::Down, true),
        (Reply::Pid { pid: 7 }, Ring::Down, true),
    ] {
        let mut device = device(Phase::InitWait);
        let ticket = tickets.next();
        device.sent(ticket, Pending::Connect(params(9)));
        assert_eq!(tap_and_ring(&device).1, Ring::Busy);
        device.answered(ticket, reply.clone());
        let view = device.view(&backend(Phase::InitWait), CONNECTED, false);
        assert_eq!((view.ring, view.problem, view.announced), (ring, problem, false), "{reply:?}");
    }
}

#[test]
fn every_answer_to_disconnect_means_down() {
    let mut tickets = Tickets::new();
    for reply in [Reply::Done, error(Errno::ENODEV), error(Errno::ENOENT), error(Errno::EIO)] {
        let mut device = device(Phase::Connected);
        let ticket = tickets.next();
        device.sent(ticket, Pending::Disconnect);
        device.answered(ticket, reply.clone());
        assert_eq!(tap_and_ring(&device).1, Ring::Down, "{reply:?}");
    }
}

#[test]
fn an_answer_to_an_earlier_life_is_ignored() {
    let mut tickets = Tickets::new();
    let mut device = device(Phase::InitWait);
    let (old, new) = (tickets.next(), tickets.next());
    device.sent(old, Pending::Disconnect);
    device.died(7, Problem::new(Errno::ENXIO, "ended"));
    device.answered(old, Reply::Done);
    assert_eq!(tap_and_ring(&device).0, Tap::Lost);
    device.sent(new, Pending::Connect(params(9)));
    device.answered(old, error(Errno::EIO));
    assert_eq!(tap_and_ring(&device).1, Ring::Busy);
}

#[test]
fn another_tapdisk_is_taken_only_after_the_ring_is_down() {
    let mut tickets = Tickets::new();
    let mut device = device(Phase::InitWait);
    let ticket = tickets.next();
    device.sent(ticket, Pending::Connect(params(9)));
    let other = Backend { named: Named::Tapdisk(8, Minor(0)), ..backend(Phase::InitWait) };
    device.observe(&other, CONNECTED);
    assert_eq!(device.vbd(), Some(Vbd { pid: 7, minor: Minor(3) }));
    device.answered(ticket, error(Errno::EINVAL));
    device.observe(&other, CONNECTED);
    assert_eq!(device.vbd(), Some(Vbd { pid: 8, minor: Minor(0) }));
    assert!(!device.view(&other, CONNECTED, false).problem, "the trouble was the other tapdisk's");
}

fn info(sectors: u64) -> DiskInfo {
    DiskInfo { sectors, sector_size: 512, physical_sector_size: 512, readonly: false, discard: None }
}

fn news(sectors: u64, failed: Option<&str>) -> News {
    News { minor: Minor(3), info: info(sectors), failed: failed.map(str::to_owned), degraded: None }
}

/// A device whose disk is known and published, with a ring in operation.
fn in_operation(tickets: &mut Tickets) -> Device {
    let mut device = device(Phase::Connected);
    let (list, size) = (tickets.next(), tickets.next());
    device.sent(list, Pending::List);
    device.answered(list, entry(true, &[(5, 51712)]));
    device.sent(size, Pending::DiskInfo);
    device.answered(size, Reply::DiskInfo(info(100)));
    device.published();
    device
}

#[test]
fn growth_is_news_and_anything_smaller_is_old() {
    let mut device = in_operation(&mut Tickets::new());
    let published = |device: &Device| device.view(&backend(Phase::Connected), CONNECTED, false).published;
    for sectors in [100, 99, 0] {
        assert!(!device.told(&news(sectors, None)));
        assert!(published(&device));
    }
    assert!(device.told(&news(101, None)));
    assert!(!published(&device));
    assert_eq!(device.disk(), Some(&info(101)));
}

#[test]
fn a_failed_disk_is_trouble_and_lost_while_the_ring_stays() {
    let mut device = in_operation(&mut Tickets::new());
    device.told(&news(100, Some("fdatasync failed")));
    let view = device.view(&backend(Phase::Connected), CONNECTED, false);
    assert_eq!((view.tap, view.ring, view.problem), (Tap::Lost, Ring::Up, true));
    assert_eq!(device.cause(&backend(Phase::Connected)), Problem::new(Errno::EIO, "fdatasync failed"));
    device.failed();
    // Told again, it is not reported again.
    device.told(&news(100, Some("fdatasync failed")));
    assert!(!device.view(&backend(Phase::Closing), CONNECTED, false).problem);
}

#[test]
fn a_failed_disk_that_was_opened_anew_is_asked_for_again() {
    let mut device = in_operation(&mut Tickets::new());
    device.told(&news(100, Some("fdatasync failed")));
    device.told(&news(50, None));
    assert_eq!(tap_and_ring(&device), (Tap::New, Ring::Up));
}

#[test]
fn news_of_a_disk_that_is_not_known_yet_are_left_alone() {
    let mut device = device(Phase::InitWait);
    assert!(!device.told(&news(100, Some("fdatasync failed"))));
    assert_eq!(tap_and_ring(&device).0, Tap::New);
}

#[test]
fn only_the_death_of_its_own_tapdisk_concerns_a_device() {
    let mut device = device(Phase::InitWait);
    device.died(8, Problem::new(Errno::ENXIO, "ended"));
    assert_eq!(tap_and_ring(&device).0, Tap::New);
}

#[test]
fn a_failure_is_forgotten_when_the_frontend_closes_or_the_device_is_new() {
    for (phase, state, kept) in [
        (Phase::Closing, XenbusState::Initialised, true),
        (Phase::Closing, XenbusState::Initialising, true),
        (Phase::Closing, XenbusState::Closing, false),
        (Phase::Closed, XenbusState::Closed, false),
        (Phase::Initialising, XenbusState::Initialising, false),
    ] {
        let mut device = device(Phase::InitWait);
        device.failed();
        device.observe(&backend(phase), Frontend::Is(state));
        assert_eq!(
            device.view(&backend(phase), Frontend::Is(state), false).failed,
            kept,
            "{phase:?} {state}"
        );
    }
}

#[test]
fn an_answer_that_is_not_waited_for_any_more_is_asked_for_again() {
    let mut tickets = Tickets::new();
    let mut device = device(Phase::Connected);
    let (list, disconnect) = (tickets.next(), tickets.next());
    device.sent(list, Pending::List);
    device.sent(disconnect, Pending::Disconnect);
    assert_eq!(device.answered(list, entry(true, &[])), None);
    assert_eq!(device.answered(disconnect, Reply::Done), None);
    assert_eq!(tap_and_ring(&device), (Tap::New, Ring::Down));
}

#[test]
fn a_frontend_has_returned_when_it_was_in_operation_and_waits_again() {
    let waiting = Frontend::Is(XenbusState::Initialised);
    let mut tickets = Tickets::new();
    let mut device = device(Phase::InitWait);
    let see = |device: &mut Device, frontend| {
        device.observe(&backend(Phase::Connected), frontend);
        device.returned(frontend)
    };
    for _ in 0..2 {
        let ticket = tickets.next();
        device.sent(ticket, Pending::Connect(params(9)));
        device.answered(ticket, Reply::Done);
        assert!(!see(&mut device, waiting), "not told yet");
        device.announced();
        assert!(!see(&mut device, waiting), "it may be about to answer");
        assert!(!see(&mut device, CONNECTED));
        assert!(see(&mut device, waiting));
        let ticket = tickets.next();
        device.sent(ticket, Pending::Disconnect);
        assert!(!see(&mut device, waiting), "being disconnected");
        device.answered(ticket, Reply::Done);
        assert!(!see(&mut device, waiting), "disconnected");
    }
}

#[test]
fn a_device_whose_tapdisk_died_waits_for_the_next_and_asks_it() {
    for (ring, expected) in [(true, Ring::Unknown), (false, Ring::Down)] {
        let mut device = device(if ring { Phase::Connected } else { Phase::Initialising });
        let before = tap_and_ring(&device).1;
        assert_eq!(before, expected);
        device.waits_for_successor();
        let busy = if ring { Ring::Busy } else { Ring::Down };
        assert_eq!(tap_and_ring(&device), (Tap::Asking, busy));
        device.succeeded(8);
        assert_eq!(tap_and_ring(&device), (Tap::New, expected));
        let next = Vbd { pid: 8, minor: Minor(3) };
        assert_eq!(device.renamed(), Some((7, next)));
        // XenStore still names the dead one, which does not bring it back.
        device.observe(&backend(Phase::Connected), CONNECTED);
        assert_eq!(device.vbd(), Some(next));
        // Nor does a second death change who is named there.
        device.waits_for_successor();
        device.succeeded(9);
        assert_eq!(device.renamed(), Some((7, Vbd { pid: 9, minor: Minor(3) })));
        device.is_named();
        assert_eq!(device.renamed(), None);
        // It was not dead at all.
        device.waits_for_successor();
        device.succeeded(9);
        assert_eq!((tap_and_ring(&device), device.renamed()), ((Tap::New, expected), None));
    }
}

#[test]
fn a_disk_that_lost_its_mirror_is_told_of_and_noted_once() {
    let mut device = device(Phase::Connected);
    assert_eq!(device.to_note(), None, "nothing is known");
    let lost = News { degraded: Some("without".into()), ..news(100, None) };
    for (news, told, noted) in [
        // An earlier xenio may have noted something else.
        (&news(100, None), None, Some(None)),
        (&lost, Some("without"), Some(Some("without"))),
        (&lost, None, None),
        (&news(100, None), None, Some(None)),
    ] {
        assert_eq!(device.degrades(news), told);
        assert_eq!(device.to_note(), noted);
        device.noted();
    }
}
