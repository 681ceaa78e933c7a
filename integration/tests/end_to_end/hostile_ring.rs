//! Cases 4 to 8 of the catalogue: the ring's counters.

use std::sync::atomic::Ordering;
use std::time::Instant;

use blkif::abi::{header, op};
use blkif::{Abi, DomId, RingOrder, Sector};
use integration::rig::PATIENCE;
use integration::sim::calls::{Call, Calls};
use integration::sim::frontend::{Frontend, Io, Shape};
use integration::sim::host::BACKEND;

use super::scene::{Scene, draft};
use super::support::*;

/// Waits until a word of the ring has a value.
fn wait_word(frontend: &mut Frontend, offset: usize, value: u32) {
    let start = Instant::now();
    let (ring, domain) = frontend.ring();
    while ring.word(domain, offset).load(Ordering::Acquire) != value {
        assert!(start.elapsed() < PATIENCE, "the ring's word at {offset} does not become {value}");
        std::thread::yield_now();
    }
}

#[test]
fn h4_a_guest_that_never_stops_producing_does_not_hold_up_others() {
    let mut scene = Scene::with(Shape { order: RingOrder::MAX, ..Shape::simple(DomId(1)) });
    let page = scene.page();
    let read = draft(op::READ, 0, &[page]).encode(Abi::X86_64);
    let (ring, _) = scene.hostile.ring();
    let slots = Abi::X86_64.slots(ring.order());
    // It produces a ring's worth as soon as the last one is answered, without ever looking at an answer.
    let mut produced = 0u32;
    let mut rounds = 0;
    while rounds < 200 {
        let (ring, domain) = scene.hostile.ring();
        let answered = ring.word(domain, header::RSP_PROD).load(Ordering::Acquire);
        assert!(produced.wrapping_sub(answered) <= slots, "more answers than requests");
        if answered == produced {
            for position in produced..produced + slots {
                ring.poke(domain, ring.entry_offset(position), read.as_bytes());
            }
            produced += slots;
            ring.word(domain, header::REQ_PROD).store(produced, Ordering::Release);
            scene.hostile.notify().unwrap();
            rounds += 1;
        }
        if rounds % 20 == 0 {
            scene.others_still_work();
        }
    }
    wait_word(&mut scene.hostile, header::RSP_PROD, produced);
    scene.rig.destroy(&scene.device);
    scene.others_still_work();
}

#[test]
fn h5_the_backends_own_counters_are_not_read_back() {
    let mut scene = Scene::new();
    let page = scene.page();
    let entry = draft(op::READ, 0, &[page]).encode(Abi::X86_64);
    let mut dice = Dice::new(5);
    for round in 0..300u32 {
        let (ring, domain) = scene.hostile.ring();
        ring.poke(domain, ring.entry_offset(round), entry.as_bytes());
        for offset in [header::RSP_PROD, header::REQ_EVENT] {
            let wild = match round % 3 {
                0 => round.wrapping_add(1 << 31),
                1 => 0,
                _ => dice.roll(1 << 32) as u32,
            };
            ring.word(domain, offset).store(wild, Ordering::Release);
        }
        ring.word(domain, header::REQ_PROD).store(round + 1, Ordering::Release);
        scene.hostile.notify().unwrap();
        // The answer stands where the private counter says, and the shared one says so too.
        wait_word(&mut scene.hostile, header::RSP_PROD, round + 1);
    }
    scene.rig.destroy(&scene.device);
    scene.others_still_work();
}

#[test]
fn h6_whatever_event_index_the_guest_sets_it_gets_at_most_one_event_for_each_push() {
    let mut scene = Scene::new();
    let calls = Calls::open(&scene.rig.host.xen(), BACKEND).unwrap();
    let page = scene.page();
    let entry = draft(op::READ, 0, &[page]).encode(Abi::X86_64);
    let mut dice = Dice::new(6);
    let before = calls.so_far(Call::Notify);
    for round in 0..300u32 {
        let (ring, domain) = scene.hostile.ring();
        let event = match round % 5 {
            0 => round,
            1 => round.wrapping_sub(1000),
            2 => round.wrapping_add(1 << 31),
            3 => u32::MAX,
            _ => dice.roll(1 << 32) as u32,
        };
        ring.word(domain, header::RSP_EVENT).store(event, Ordering::Release);
        ring.poke(domain, ring.entry_offset(round), entry.as_bytes());
        ring.word(domain, header::REQ_PROD).store(round + 1, Ordering::Release);
        scene.hostile.notify().unwrap();
        wait_word(&mut scene.hostile, header::RSP_PROD, round + 1);
    }
    scene.others_still_work();
    let notified = calls.so_far(Call::Notify).wrapping_sub(before);
    // One for each push, one before each sleep at most, and those of the honest guest.
    assert!(notified <= 2 * 300 + 4, "{notified} notifications for 300 requests");
    scene.rig.destroy(&scene.device);
    scene.others_still_work();
}

/// Connects a guest whose ring says, before anything happened, that so many requests are waiting.
fn with_waiting(order: RingOrder, start: u32, waiting: u32) -> (Scene, integration::rig::Device, Frontend) {
    let scene = Scene::new();
    let (_, params) = raw(&scene.rig, "3.img", MIB);
    scene.rig.create_domain(3);
    let device = scene.rig.plug(3, XVDA, &params, "w").unwrap();
    let shape = Shape { order, start, ..Shape::simple(DomId(3)) };
    let mut frontend = Frontend::create(&scene.rig.host.xen(), shape).unwrap();
    let (ring, domain) = frontend.ring();
    ring.word(domain, header::REQ_PROD).store(start.wrapping_add(waiting), Ordering::Release);
    (scene, device, frontend)
}

#[test]
fn h7_a_ring_that_starts_inconsistent_is_refused() {
    for (order, start, waiting) in [(0, 0, 33), (0, 77, 1 << 31), (4, u32::MAX, 513), (2, 1 << 31, u32::MAX)]
    {
        let (mut scene, device, frontend) = with_waiting(RingOrder::new(order).unwrap(), start, waiting);
        scene.rig.announce(&device, &frontend.keys());
        scene.rig.wait_value(&format!("{}/state", device.backend), "5");
        assert!(!frontend.is_connected());
        scene.others_still_work();
    }
}

#[test]
fn h7_a_ring_with_requests_from_before_is_served_from_where_it_stands() {
    for (order, start, waiting) in [(0, 0, 32), (0, u32::MAX - 3, 7), (4, 1 << 31, 512)] {
        let (mut scene, device, mut frontend) = with_waiting(RingOrder::new(order).unwrap(), start, waiting);
        let (_, gref) = frontend.page(gntdev::Access::ReadWrite);
        let segment = blkif::encode::DraftSegment { gref, first: 0, last: 7 };
        let entry = draft(op::READ, 0, &[segment]).encode(Abi::X86_64);
        let (ring, domain) = frontend.ring();
        for n in 0..waiting {
            ring.poke(domain, ring.entry_offset(start.wrapping_add(n)), entry.as_bytes());
        }
        scene.rig.connect(&device, &frontend);
        wait_word(&mut frontend, header::RSP_PROD, start.wrapping_add(waiting));
        scene.rig.unplug(&device);
        scene.others_still_work();
    }
}

#[test]
fn h8_counters_that_wrap_change_nothing() {
    let rig = rig();
    let mut images = Vec::new();
    for (domid, start) in [(1, 0), (2, 0xffff_ffe0), (3, u32::MAX)] {
        for persistent in [false, true] {
            let (path, params) = raw(&rig, &format!("{domid}{persistent}.img"), 2 * MIB);
            let shape = Shape { start, persistent, indirect: 32, ..Shape::simple(DomId(domid)) };
            let (device, mut frontend) = guest(&rig, domid, &params, shape);
            let mut storm = Storm::new(vec![0; 2 * MIB], 8, false);
            storm.blow(&mut frontend, 400);
            frontend.run(Io::Read(Sector(0), 512)).unwrap();
            rig.unplug(&device);
            images.push(std::fs::read(path).unwrap());
            assert!(images.last() == Some(&storm.model));
        }
    }
    rig.assert_clean();
}
