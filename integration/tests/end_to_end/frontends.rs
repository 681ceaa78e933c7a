//! Every frontend's own way to connect, to use its disk, to close and to come back.
//!
//! The guest's half of XenStore is written over a connection of the guest's own domain, in transactions only where that
//! frontend uses one, and each wait is that frontend's: for exactly the backend states that it accepts.

mod bsd;
mod firmware;
mod linux;
mod windows;

use std::collections::VecDeque;

use blkif::encode::{Draft, DraftSegment};
use blkif::{DomId, Sector};
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Shape};
use xenstore::{Client, TxId};

use super::support::*;

/// Size of each guest's disk.
const DISK: usize = 4 * MIB;

/// A guest with one disk, and its own connection to XenStore.
struct Guest {
    device: Device,
    frontend: Frontend,
    store: Client,
    /// Distinguishes what is written by each check.
    seed: u8,
}

impl Guest {
    /// A guest that was just started: its disk is there, and no driver has touched it.
    fn start(rig: &Rig, shape: Shape) -> Guest {
        let mut guest = Guest::before_hotplug(rig, shape);
        guest.hotplug(rig);
        guest
    }

    /// The same before the hotplug script has run; the backend may not even have looked.
    fn before_hotplug(rig: &Rig, shape: Shape) -> Guest {
        let domid = shape.guest.0;
        rig.create_domain(domid);
        let params = raw(rig, &format!("{domid}.img"), DISK).1;
        Guest::on(rig, rig.write_device(domid, XVDA, &params, "w"), shape)
    }

    fn on(rig: &Rig, device: Device, shape: Shape) -> Guest {
        let store = Client::connect_to(&rig.store.listen_for(device.domid)).unwrap();
        let frontend = Frontend::create(&rig.host.xen(), shape).unwrap();
        Guest { device, frontend, store, seed: 0 }
    }

    fn hotplug(&mut self, rig: &Rig) {
        rig.wait_value(&format!("{}/state", self.device.backend), "2");
        let params = format!("aio:{}", rig.path(&format!("{}.img", self.device.domid)).display());
        rig.hotplug(&mut self.device, &params).unwrap();
    }

    // ---- XenStore as the guest sees it ----

    fn front(&self, key: &str) -> String {
        format!("{}/{key}", self.device.frontend)
    }

    /// Writes one key by itself.
    fn set(&mut self, key: &str, value: &str) {
        let path = self.front(key);
        self.store.write(TxId::NONE, path, value).unwrap();
    }

    /// Writes keys in one transaction.
    fn set_all(&mut self, values: &[(&str, &str)]) {
        let values: Vec<_> = values.iter().map(|(key, value)| (self.front(key), *value)).collect();
        let write =
            |store: &mut Client, tx| values.iter().try_for_each(|(path, value)| store.write(tx, path, value));
        self.store.transact(write).unwrap();
    }

    fn remove(&mut self, key: &str) {
        let path = self.front(key);
        self.store.rm(TxId::NONE, path).unwrap();
    }

    fn state(&mut self, state: &str) {
        self.set("state", state);
    }

    /// What the guest itself reads in the backend's directory.
    fn offered(&mut self, key: &str) -> Option<String> {
        let value = self.store.read(TxId::NONE, format!("{}/{key}", self.device.backend)).ok()?;
        Some(String::from_utf8(value).unwrap())
    }

    /// Waits until the backend's state is one of these.
    fn wait(&self, rig: &Rig, states: &[&str]) {
        let path = format!("{}/state", self.device.backend);
        let wanted = |value: &[u8]| states.iter().any(|state| state.as_bytes() == value);
        let reached = rig.store.wait_for(&path, PATIENCE, |value| value.is_some_and(wanted));
        assert!(reached, "never in {states:?}; xenio said:\n{}", rig.xenio_log());
    }

    /// The keys that Linux would write.
    fn ring_keys(&self) -> Vec<(String, String)> {
        self.frontend.keys()
    }

    /// The value of one of them.
    fn ring_key(&self, key: &str) -> String {
        let keys = self.ring_keys();
        keys.into_iter().find(|(name, _)| name == key).map(|(_, value)| value).unwrap()
    }

    // ---- the disk ----

    /// Bytes go to the disk and come back, those of the last check first.
    fn use_disk(&mut self) {
        if self.seed > 0 {
            self.check();
        }
        self.seed += 1;
        self.frontend.write(Sector(16), &pattern(self.seed, 96 << 10)).unwrap();
        self.check();
    }

    fn check(&mut self) {
        assert!(self.frontend.read(Sector(16), 96 << 10).unwrap() == pattern(self.seed, 96 << 10));
    }

    /// Requests that nobody waits for: the driver goes away over them.
    fn leave_requests(&mut self) {
        for n in 0..16 {
            let sector = Sector(1024 + n * 8);
            self.frontend.submit(integration::sim::frontend::Io::Write(sector, &[n as u8; 4096]));
        }
        self.frontend.kick().unwrap();
    }

    /// One entry as it stands; the status of its answer.
    fn send(&mut self, draft: &Draft) -> i16 {
        let abi = self.frontend.shape().abi;
        self.frontend.put_raw(draft.id, &draft.encode(abi));
        self.frontend.kick().unwrap();
        let mut out = VecDeque::new();
        self.frontend.wait(&mut out, PATIENCE).unwrap();
        assert_eq!((out.len(), out[0].id, out[0].op), (1, draft.id, draft.op));
        out[0].status
    }

    /// Takes the disk away with the guest's help, and looks whether anything is left.
    fn unplug(self, rig: &Rig) {
        rig.unplug(&self.device);
        let mut frontend = self.frontend;
        assert_eq!(frontend.domain().mapped_pages(), 0);
        assert!(!frontend.is_connected());
    }
}

fn simple(domid: u16) -> Shape {
    Shape::simple(DomId(domid))
}

/// An empty flush or barrier as it stands in the ring.
fn empty(op: u8, id: u64, sector: u64) -> Draft {
    Draft::new(op, id, sector, &[])
}

/// A request over segments that are all in order.
fn over(op: u8, id: u64, sector: u64, segments: &[DraftSegment]) -> Draft {
    Draft::new(op, id, sector, segments)
}
