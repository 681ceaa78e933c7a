//! Well-behaved guests, and the turns of a disk's life.

use std::process::Command;

use blkif::{Abi, DomId, RingOrder, Sector, Status};
use integration::sim::frontend::{Completion, Frontend, Io, MAX_TRANSFER, Shape};
use proptest::prelude::*;

use super::support::*;

const XVDB: u32 = 51728;

#[test]
fn every_abi_and_ring_size_moves_the_same_bytes() {
    let rig = rig();
    let mut domid = 0;
    for abi in [Abi::X86_64, Abi::X86_32] {
        for order in RingOrder::all() {
            domid += 1;
            let (path, params) = raw(&rig, &format!("{domid}.img"), 4 * MIB);
            let shape = Shape { abi, order, ..Shape::simple(DomId(domid)) };
            let (device, mut frontend) = guest(&rig, domid, &params, shape);
            let data = pattern(7, 3 * MIB / 2 + 512);
            frontend.write(Sector(5), &data).unwrap();
            frontend.flush().unwrap();
            assert!(frontend.read(Sector(5), data.len()).unwrap() == data, "{abi:?} {order:?}");
            rig.unplug(&device);
            assert!(std::fs::read(path).unwrap()[5 * 512..][..data.len()] == data);
        }
    }
    rig.assert_clean();
}

#[test]
fn a_full_ring_of_requests_is_answered_each_once() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", 64 * MIB);
    let shape = Shape { order: RingOrder::MAX, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    let slots = frontend.free_slots();
    for round in 0..4u64 {
        // More data than the backend's budget: some of it has to wait on the ring.
        let ids: Vec<u64> = (0..slots)
            .map(|n| {
                frontend.submit(Io::Write(Sector(u64::from(n) * 88 + round), &pattern(n as u8, MAX_TRANSFER)))
            })
            .collect();
        frontend.kick().unwrap();
        let mut answered: Vec<u64> = answers(&mut frontend, ids.len())
            .iter()
            .inspect(|c| assert!(c.is_okay(), "{c:?}"))
            .map(|c| c.id)
            .collect();
        answered.sort_unstable();
        assert_eq!(answered, ids);
    }
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn flushes_and_barriers_are_answered_in_any_mix() {
    let rig = rig();
    let (_, params) = vhd(&rig, "a.vhd", 16);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    for round in 0..10u64 {
        for slot in 0..8 {
            frontend.submit(Io::Write(Sector(round * 512 + slot * 8), &pattern(slot as u8, 4096)));
        }
        frontend.submit(Io::Flush);
        frontend.submit(Io::Barrier(Sector(round * 512), &pattern(99, 4096)));
        frontend.submit(Io::Barrier(Sector(u64::MAX), &[]));
        frontend.submit(Io::Flush);
        frontend.submit(Io::Read(Sector(round * 512), 4096));
        frontend.kick().unwrap();
        let answers = answers(&mut frontend, 13);
        assert!(answers.iter().all(Completion::is_okay), "{answers:?}");
        let read = answers.iter().find(|c| !c.data.is_empty()).unwrap();
        assert!(read.data == pattern(99, 4096), "the read came after the barrier");
    }
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_guest_on_a_snapshot_leaves_its_parents_alone_and_an_independent_reader_agrees() {
    let rig = rig();
    let (base, params) = vhd(&rig, "base.vhd", 8);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, 3 * MIB)).unwrap();
    rig.unplug(&device);
    let before = std::fs::read(&base).unwrap();

    let leaf = rig.path("leaf.vhd");
    vhd_util(&["snapshot", "-n", leaf.to_str().unwrap(), "-p", base.to_str().unwrap()]);
    let (device, mut frontend) = guest(&rig, 2, &format!("vhd:{}", leaf.display()), Shape::simple(DomId(2)));
    frontend.write(Sector(100), &pattern(9, 512)).unwrap();
    frontend.write(Sector(10_000), &pattern(9, MIB)).unwrap();
    let seen = frontend.read(Sector(0), 8 * MIB).unwrap();
    rig.unplug(&device);
    assert!(std::fs::read(&base).unwrap() == before, "the parent's bytes");
    assert!(seen[..512 * 100] == pattern(1, 3 * MIB)[..512 * 100]);
    assert!(seen[512 * 100..][..512] == pattern(9, 512));
    for image in [&base, &leaf] {
        assert!(vhd_util(&["check", "-n", image.to_str().unwrap()]).contains("is valid"));
    }
    // qemu reads dynamic images; it would take a differencing one for an empty disk.
    let flat = rig.path("flat.raw");
    let convert =
        Command::new("qemu-img").args(["convert", "-f", "vpc", "-O", "raw"]).args([&base, &flat]).status();
    if let Ok(status) = convert {
        assert!(status.success());
        assert!(std::fs::read(flat).unwrap()[..3 * MIB] == pattern(1, 3 * MIB));
    }
    rig.assert_clean();
}

#[test]
fn a_guest_that_is_destroyed_in_the_middle_of_its_work_leaves_nothing_behind() {
    let rig = rig();
    for domid in 1..=10 {
        let (_, params) = vhd(&rig, &format!("{domid}.vhd"), 64);
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        for n in 0..32 {
            frontend.submit(Io::Write(Sector(n * 4000), &pattern(n as u8, MAX_TRANSFER)));
        }
        frontend.kick().unwrap();
        rig.destroy(&device);
        drop(frontend);
        rig.assert_clean();
    }
}

#[test]
fn a_second_disk_comes_and_goes_while_the_first_is_busy() {
    let rig = rig();
    let (_, first) = raw(&rig, "a.img", 4 * MIB);
    let (_, second) = vhd(&rig, "b.vhd", 4);
    let (device, mut frontend) = guest(&rig, 1, &first, Shape::simple(DomId(1)));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn({
            let (stop, frontend) = (&stop, &mut frontend);
            move || {
                let mut rounds = 0u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    frontend.write(Sector(8), &pattern(rounds as u8, 8192)).unwrap();
                    assert!(frontend.read(Sector(8), 8192).unwrap() == pattern(rounds as u8, 8192));
                    rounds += 1;
                }
                rounds
            }
        });
        for _ in 0..3 {
            // Another guest of the simulation: one folder of memory is one domain with one disk here.
            let other = rig.plug(2, XVDB, &second, "w").unwrap();
            let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(2))).unwrap();
            rig.connect(&other, &frontend);
            frontend.write(Sector(1), &pattern(5, 4096)).unwrap();
            rig.unplug(&other);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(busy.join().unwrap() > 0);
    });
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn xenio_killed_and_started_again_is_not_noticed() {
    let mut rig = rig();
    let (_, params) = vhd(&rig, "a.vhd", 16);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, MIB)).unwrap();
    rig.kill_xenio();
    frontend.write(Sector(4096), &pattern(2, MIB)).unwrap();
    rig.start_xenio();
    frontend.write(Sector(8192), &pattern(3, MIB)).unwrap();
    let (_, second) = raw(&rig, "b.img", MIB);
    let (other, mut other_frontend) = guest(&rig, 2, &second, Shape::simple(DomId(2)));
    other_frontend.write(Sector(0), &pattern(4, 4096)).unwrap();
    for (sector, seed) in [(0, 1), (4096, 2), (8192, 3)] {
        assert!(frontend.read(Sector(sector), MIB).unwrap() == pattern(seed, MIB));
    }
    rig.unplug(&other);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_killed_tapdisk_loses_no_acknowledged_write_and_leaves_a_valid_image() {
    let rig = rig();
    let (path, params) = vhd(&rig, "a.vhd", 64);
    for round in 0..8u16 {
        let (device, mut frontend) = guest(&rig, round + 1, &params, Shape::simple(DomId(round + 1)));
        let place = |n: u64| Sector(n * 4000 + u64::from(round) * 300);
        for n in 0..32 {
            frontend.submit(Io::Write(place(n), &pattern(n as u8 + 1, MAX_TRANSFER)));
        }
        frontend.kick().unwrap();
        let acknowledged = answers(&mut frontend, 1 + usize::from(round) * 3);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(device.pid), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        rig.destroy(&device);
        wait_for_lock(&path);
        assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"), "round {round}");

        let (device, mut reader) = guest(&rig, 100 + round, &params, Shape::simple(DomId(100 + round)));
        for Completion { id, status, .. } in acknowledged {
            assert_eq!(status, 0);
            let data = reader.read(place(id - 1), MAX_TRANSFER).unwrap();
            assert!(data == pattern(id as u8, MAX_TRANSFER), "write {id} of round {round}");
        }
        rig.unplug(&device);
    }
}

#[test]
fn dom0_is_a_guest_like_any_other() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    // Its memory is its own in the simulation too: the backend's side is reached through grants all the same.
    let (device, mut frontend) = guest(&rig, 0, &params, Shape::simple(DomId(0)));
    frontend.write(Sector(3), &pattern(1, 4096)).unwrap();
    assert!(frontend.read(Sector(3), 4096).unwrap() == pattern(1, 4096));
    rig.unplug(&device);
    rig.assert_clean();
}

/// A stub domain serves its guest's emulated disk from the same image: two rings on one disk.
#[test]
fn two_frontends_share_one_disk() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (device, mut one) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let (second, mut two) = also(&rig, &device, 2);
    one.write(Sector(0), &pattern(1, 4096)).unwrap();
    assert!(two.read(Sector(0), 4096).unwrap() == pattern(1, 4096));
    two.write(Sector(0), &pattern(2, 4096)).unwrap();
    assert!(one.read(Sector(0), 4096).unwrap() == pattern(2, 4096));
    rig.ask_to_close(&second);
    rig.close_frontend(&second);
    rig.wait_value(&format!("{}/state", second.backend), "6");
    rig.store.rm(&second.backend);
    assert!(one.read(Sector(0), 4096).unwrap() == pattern(2, 4096), "the other ring goes on");
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_read_only_disk_refuses_a_forged_write_and_stays_as_it_was() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", MIB);
    std::fs::write(&path, pattern(3, MIB)).unwrap();
    rig.create_domain(1);
    let device = rig.plug(1, XVDA, &params, "r").unwrap();
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.connect(&device, &frontend);
    assert_eq!(rig.store.read(&format!("{}/info", device.backend)).unwrap(), b"4", "VDISK_READONLY");
    assert_eq!(frontend.run(Io::Write(Sector(0), &pattern(9, 4096))).unwrap().status, Status::Error.wire());
    assert_eq!(frontend.run(Io::Barrier(Sector(0), &pattern(9, 4096))).unwrap().status, Status::Error.wire());
    assert!(frontend.run(Io::Flush).unwrap().is_okay());
    assert!(frontend.read(Sector(0), MIB).unwrap() == pattern(3, MIB));
    // The second barrier: the descriptor that tapdisk holds does not write.
    let descriptors = std::fs::read_dir(format!("/proc/{}/fdinfo", device.pid)).unwrap();
    for entry in descriptors.flatten() {
        let number = entry.file_name();
        let target = std::fs::read_link(format!("/proc/{}/fd/{}", device.pid, number.to_str().unwrap()));
        if target.is_ok_and(|target| target == path) {
            let info = std::fs::read_to_string(entry.path()).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            assert_eq!(i32::from_str_radix(flags, 8).unwrap() & libc::O_ACCMODE, libc::O_RDONLY);
        }
    }
    rig.unplug(&device);
    assert!(std::fs::read(&path).unwrap() == pattern(3, MIB));
    rig.assert_clean();
}

#[test]
fn a_disk_that_cannot_be_opened_leaves_no_tapdisk() {
    let rig = rig();
    rig.create_domain(1);
    let missing = rig.path("missing.vhd");
    let error = rig.plug(1, XVDA, &format!("vhd:{}", missing.display()), "w").unwrap_err();
    assert!(error.contains(missing.to_str().unwrap()), "{error}");
    rig.assert_clean();
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: usize, seed: u8 },
    Read { sector: u64, sectors: usize },
    Flush,
    Reconnect,
}

const DISK: usize = 8 * MIB;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..(DISK as u64 / 512 - 88), 1usize..=88, any::<u8>());
    let step = prop_oneof![
        6 => place().prop_map(|(sector, sectors, seed)| Step::Write { sector, sectors, seed }),
        6 => place().prop_map(|(sector, sectors, _)| Step::Read { sector, sectors }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn a_guests_disk_behaves_like_a_vector_of_bytes(steps in steps(), order in 0..=4u32) {
        let rig = rig();
        let (path, params) = vhd(&rig, "a.vhd", DISK / MIB);
        let shape = Shape { order: RingOrder::new(order).unwrap(), ..Shape::simple(DomId(1)) };
        let (mut device, mut frontend) = guest(&rig, 1, &params, shape);
        let mut model = vec![0; DISK];
        let span = |sector: u64, sectors: usize| sector as usize * 512..(sector as usize + sectors) * 512;
        for step in steps {
            match step {
                Step::Write { sector, sectors, seed } => {
                    let data = pattern(seed, sectors * 512);
                    frontend.write(Sector(sector), &data).unwrap();
                    model[span(sector, sectors)].copy_from_slice(&data);
                }
                Step::Read { sector, sectors } => {
                    assert!(frontend.read(Sector(sector), sectors * 512).unwrap() == model[span(sector, sectors)]);
                }
                Step::Flush => frontend.flush().unwrap(),
                Step::Reconnect => {
                    rig.unplug(&device);
                    drop(frontend);
                    (device, frontend) = guest(&rig, 1, &params, shape);
                }
            }
        }
        assert!(frontend.read(Sector(0), DISK).unwrap() == model);
        rig.unplug(&device);
        assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"));
        rig.assert_clean();
    }
}
