//! Linux's xen-blkfront (drivers/block/xen-blkfront.c, drivers/xen/xenbus/xenbus_probe_frontend.c).

use blkif::{Abi, RingOrder};
use integration::rig::Rig;
use integration::sim::frontend::{Frontend, Io, Shape};

use super::*;

impl Guest {
    /// `talk_to_blkback`: waits for InitWait, all keys in one transaction, then state 3, and 4 once the backend is there.
    fn linux_connect(&mut self, rig: &Rig) {
        self.wait(rig, &["2"]);
        self.linux_offer();
        self.wait(rig, &["4"]);
        for key in ["sectors", "sector-size", "info"] {
            assert!(self.offered(key).is_some(), "{key}");
        }
        self.state("4");
    }

    fn linux_offer(&mut self) {
        let keys = self.ring_keys();
        self.set_all(&keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect::<Vec<_>>());
        self.state("3");
    }

    /// `xenbus_reset_state`: what a new kernel finds in operation is taken through 5, 6 and 1, each answer awaited.
    pub fn linux_reset(&mut self, rig: &Rig) {
        for (state, answer) in [("5", "5"), ("6", "6"), ("1", "2")] {
            self.state(state);
            self.wait(rig, &[answer]);
        }
        self.frontend.restart().unwrap();
    }

    pub fn linux(&mut self, rig: &Rig) {
        self.linux_connect(rig);
        self.use_disk();
        self.frontend.flush().unwrap();
    }
}

#[test]
fn linux_of_every_age_connects_is_unloaded_over_its_requests_and_loaded_again() {
    let rig = rig();
    let rings = most_queues(&rig);
    let order = |order| RingOrder::new(order).unwrap();
    let ages = [
        // Before 3.8: neither persistent grants nor indirect segments.
        simple(1),
        Shape { abi: Abi::X86_32, ..simple(2) },
        // 3.11: both.
        Shape { persistent: true, indirect: 32, ..simple(3) },
        // 4.4: several rings of several pages.
        Shape { persistent: true, indirect: 32, order: order(2), queues: rings, ..simple(4) },
        // With feature_persistent=0 and max_indirect_segments=256.
        Shape { indirect: 256, order: order(4), queues: rings, ..simple(5) },
    ];
    for shape in ages {
        let mut guest = Guest::start(&rig, shape);
        for _ in 0..3 {
            guest.linux(&rig);
            // `blkfront_closing` writes 6 with requests in flight.
            guest.leave_requests();
            guest.state("5");
            guest.state("6");
            guest.wait(&rig, &["6"]);
            guest.frontend.restart().unwrap();
            guest.state("1");
        }
        guest.linux(&rig);
        guest.unplug(&rig);
    }
    rig.assert_clean();
}

#[test]
fn a_linux_without_a_protocol_key_is_a_32_bit_one() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { abi: Abi::X86_32, ..simple(1) });
    let (ring, port) = (guest.ring_key("ring-ref"), guest.ring_key("event-channel"));
    guest.set_all(&[("ring-ref", &ring), ("event-channel", &port)]);
    guest.state("3");
    guest.wait(&rig, &["4"]);
    guest.state("4");
    guest.use_disk();
    guest.unplug(&rig);
    rig.assert_clean();
}

#[test]
fn a_new_kernel_takes_the_disk_over_from_the_one_that_crashed() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { persistent: true, indirect: 32, ..simple(1) });
    for _ in 0..3 {
        guest.linux(&rig);
        guest.leave_requests();
        guest.linux_reset(&rig);
    }
    guest.linux(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}

/// `blkfront_resume`: new rings, the requests in flight once more, and state 3, without a look at the backend.
#[test]
fn a_guest_that_wakes_where_it_slept_goes_on_with_new_rings() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { persistent: true, indirect: 32, ..simple(1) });
    guest.linux(&rig);
    for round in 1..=3u8 {
        guest.leave_requests();
        guest.frontend.resume().unwrap();
        assert!(!guest.frontend.is_connected());
        guest.linux_offer();
        let data = [round; 4096];
        guest.frontend.submit(Io::Write(Sector(2048), &data));
        guest.frontend.kick().unwrap();
        let answer = answers(&mut guest.frontend, 1).remove(0);
        assert!(answer.is_okay(), "{answer:?}");
        guest.state("4");
        assert!(guest.frontend.read(Sector(2048), 4096).unwrap() == data);
        guest.use_disk();
    }
    // The backend never left Connected, and the first rings are not mapped any more.
    guest.linux_reset(&rig);
    guest.linux(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}

#[test]
fn a_restored_guest_connects_to_a_new_backend_without_waiting_for_it() {
    let rig = rig();
    let mut saved = Guest::start(&rig, simple(1));
    saved.linux(&rig);
    saved.leave_requests();
    // The source is suspended and destroyed without a word to its frontend.
    rig.destroy(&saved.device);
    let params = format!("aio:{}", rig.path("1.img").display());
    drop(saved);
    rig.create_domain(2);
    let device = rig.write_device(2, XVDA, &params, "w");
    let mut restored = Guest::on(&rig, device, simple(2));
    restored.seed = 1;
    restored.linux_offer();
    rig.wait_value(&format!("{}/state", restored.device.backend), "2");
    rig.hotplug(&mut restored.device, &params).unwrap();
    restored.wait(&rig, &["4"]);
    restored.state("4");
    restored.use_disk();
    restored.unplug(&rig);
    rig.assert_clean();
}

/// The guest's own driver and its device model's in a stub domain: two VBDs on one disk, until the latter gives up.
#[test]
fn a_stub_domain_shares_the_disk_until_the_guests_driver_takes_over() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { persistent: true, ..simple(1) });
    let (stub, mut model) = also(&rig, &guest.device, 2);
    model.write(Sector(16), &pattern(1, 96 << 10)).unwrap();
    guest.seed = 1;
    guest.linux(&rig);
    assert!(model.read(Sector(16), 96 << 10).unwrap() == pattern(2, 96 << 10), "what the driver wrote");
    for (state, answer) in [("5", "5"), ("6", "6"), ("1", "2")] {
        rig.store.write(&format!("{}/state", stub.frontend), state);
        rig.wait_value(&format!("{}/state", stub.backend), answer);
    }
    assert_eq!(model.domain().mapped_pages(), 0);
    guest.use_disk();
    rig.ask_to_close(&stub);
    rig.wait_value(&format!("{}/state", stub.backend), "6");
    rig.store.rm(&stub.backend);
    guest.use_disk();
    guest.unplug(&rig);
    rig.assert_clean();
}

#[test]
fn a_cd_rom_is_told_as_one_and_takes_no_writes() {
    let rig = rig();
    rig.create_domain(1);
    let (path, params) = raw(&rig, "a.iso", DISK);
    std::fs::write(&path, pattern(7, DISK)).unwrap();
    let device =
        rig.plug_with(1, XVDA, &params, "r", &[("device-type", "cdrom"), ("removable", "1")]).unwrap();
    let mut frontend = Frontend::create(&rig.host.xen(), simple(1)).unwrap();
    rig.connect(&device, &frontend);
    // VDISK_CDROM and VDISK_READONLY; discard is not offered on what cannot be written.
    assert_eq!((published(&rig, &device, "info"), published(&rig, &device, "feature-discard")), (5, 0));
    assert!(frontend.read(Sector(0), DISK).unwrap() == pattern(7, DISK));
    assert!(!frontend.run(Io::Write(Sector(0), &[0; 512])).unwrap().is_okay());
    rig.unplug(&device);
    assert!(std::fs::read(path).unwrap() == pattern(7, DISK));
    rig.assert_clean();
}
