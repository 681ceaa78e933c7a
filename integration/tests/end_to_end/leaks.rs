//! Case 40 through the whole control plane: connections and states that come and go leave nothing behind in xenio or tapdisk.
//!
//! `XENIO_SOAK=1` (`make soak`) makes it the full number of connections, which takes a minute.

use blkif::{DomId, Sector};
use integration::rig::{Device, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};
use xenstore::{Client, TxId};

use super::hostile_load::{files, resident, threads};
use super::support::*;

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Footprint {
    threads: usize,
    files: usize,
    maps: usize,
    /// MiB.
    resident: u64,
}

impl Footprint {
    fn of(pid: i32) -> Footprint {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
        Footprint { threads: threads(pid), files: files(pid), maps, resident: resident(pid) }
    }

    /// No more than before, but for what an allocator may keep.
    fn is_within(self, before: Footprint) -> bool {
        self.threads <= before.threads
            && self.files <= before.files
            && self.maps <= before.maps + 4
            && self.resident <= before.resident + 4
    }
}

/// Waits until a process that is at rest holds no more than before: threads that have given everything back may take a moment to
/// end.
fn comes_back_to(pid: i32, before: Footprint, what: &str) {
    let start = std::time::Instant::now();
    let mut now = Footprint::of(pid);
    while !now.is_within(before) {
        assert!(start.elapsed() < integration::rig::PATIENCE, "{what}: {now:?} after {before:?}");
        std::thread::yield_now();
        now = Footprint::of(pid);
    }
    eprintln!("{what}: {now:?} after {before:?}");
}

struct Guest {
    device: Device,
    frontend: Frontend,
}

impl Guest {
    fn leave_requests(&mut self, seed: u64) {
        for n in 0..self.frontend.free_slots().min(16) {
            let sector = Sector((u64::from(n) * 517 + seed * 31) % 4000);
            match n % 2 {
                0 => self.frontend.submit(Io::Write(sector, &[n as u8; 16 << 10])),
                _ => self.frontend.submit(Io::Read(sector, 16 << 10)),
            };
        }
        self.frontend.kick().unwrap();
    }
}

/// All guests at once close over their requests and connect again.
fn cycle(rig: &Rig, guests: &mut [Guest], round: u64) {
    for guest in &mut *guests {
        guest.leave_requests(round);
        rig.store.write(&format!("{}/state", guest.device.frontend), "6");
    }
    for guest in &mut *guests {
        rig.wait_value(&format!("{}/state", guest.device.backend), "6");
        // Nothing of the guest is mapped and no port bound, or this fails.
        guest.frontend.restart().unwrap();
        rig.store.write(&format!("{}/state", guest.device.frontend), "1");
    }
    for guest in &mut *guests {
        rig.wait_value(&format!("{}/state", guest.device.backend), "2");
        rig.announce(&guest.device, &guest.frontend.keys());
    }
    for guest in &mut *guests {
        rig.wait_value(&format!("{}/state", guest.device.backend), "4");
        rig.store.write(&format!("{}/state", guest.device.frontend), "4");
        assert!(guest.frontend.run(Io::Flush).unwrap().is_okay());
    }
}

#[test]
fn h40_connections_of_many_guests_over_their_requests_leave_nothing_behind() {
    let rounds = if std::env::var_os("XENIO_SOAK").is_some() { 100 } else { 20 };
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", 4 * MIB);
    let (device, frontend) =
        guest(&rig, 1, &params, Shape { persistent: true, indirect: 32, ..Shape::simple(DomId(1)) });
    let mut guests = vec![Guest { device, frontend }];
    for domid in 2..=10 {
        let (device, frontend) = also(&rig, &guests[0].device, domid);
        guests.push(Guest { device, frontend });
    }
    let (tapdisk, xenio) = (guests[0].device.pid, rig.xenio_pid());
    for round in 0..4 {
        cycle(&rig, &mut guests, round);
    }
    let before = (Footprint::of(tapdisk), Footprint::of(xenio));
    for round in 0..rounds {
        cycle(&rig, &mut guests, round);
    }
    let what = format!("{} connections", rounds * guests.len() as u64);
    comes_back_to(tapdisk, before.0, &format!("tapdisk after {what}"));
    comes_back_to(xenio, before.1, &format!("xenio after {what}"));
    for other in guests.drain(1..) {
        rig.ask_to_close(&other.device);
        rig.close_frontend(&other.device);
        rig.wait_value(&format!("{}/state", other.device.backend), "6");
        rig.store.rm(&other.device.backend);
    }
    rig.unplug(&guests[0].device);
    rig.assert_clean();
}

#[test]
fn h40_ten_thousand_changes_of_a_guests_state_over_its_requests_leave_nothing_behind() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", 4 * MIB);
    let (device, frontend) =
        guest(&rig, 1, &params, Shape { persistent: true, indirect: 32, ..Shape::simple(DomId(1)) });
    let mut guests = [Guest { device, frontend }];
    let (tapdisk, xenio) = (guests[0].device.pid, rig.xenio_pid());
    let mut store = Client::connect_to(&rig.store.listen_for(1)).unwrap();
    let state = format!("{}/state", guests[0].device.frontend);
    let mut toggle = |guests: &mut [Guest], count: u64| {
        for n in 0..count {
            let states = ["6", "3", "6", "1", "3", "5", "3", "4", "1", "6"];
            store.write(TxId::NONE, &state, states[n as usize % states.len()]).unwrap();
            if n % 100 == 0 {
                guests[0].leave_requests(n);
            }
            if n % 1000 == 999 {
                // What becomes of the ring meanwhile is up to chance; now it has to be served. The backend may still be at work
                // for an earlier state, and show 6 until it has done that; once it shows another one, a 6 is new.
                rig.store.write(&state, "1");
                let backend = format!("{}/state", guests[0].device.backend);
                let left = rig
                    .store
                    .wait_for(&backend, integration::rig::PATIENCE, |own| own.is_some_and(|own| own != b"6"));
                assert!(left, "the backend stays closed");
                cycle(&rig, guests, n);
            }
        }
    };
    toggle(&mut guests, 1000);
    let before = (Footprint::of(tapdisk), Footprint::of(xenio));
    toggle(&mut guests, 10_000);
    comes_back_to(tapdisk, before.0, "tapdisk after 10,000 changes of state");
    comes_back_to(xenio, before.1, "xenio after 10,000 changes of state");
    rig.unplug(&guests[0].device);
    rig.assert_clean();
}
