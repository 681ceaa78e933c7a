//! The stage: a store, a tapdisk, a xenio, and helpers that act as toolstack and guest do.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use integration::sim::store::SimStore;
use tap_ctl::ControlDir;
use tempfile::TempDir;
use xenio::features::Offer;
use xenio::{Config, RunError};
use xenstore::{Access, Client, Error, Permission, TxId};

use crate::fake_tapdisk::{FakeTapdisk, disk};

pub const PATIENCE: Duration = Duration::from_secs(10);
pub const PID: i32 = 4711;

/// A disk of a guest, as the toolstack sees it.
#[derive(Clone, Copy)]
pub struct Disk {
    pub domid: u16,
    pub vdev: u32,
}

pub const DISK: Disk = Disk { domid: 5, vdev: 51712 };

impl Disk {
    pub fn back(self, key: &str) -> String {
        format!("{}/{key}", self.backend())
    }

    pub fn backend(self) -> String {
        format!("/local/domain/0/backend/vbd3/{}/{}", self.domid, self.vdev)
    }

    pub fn front(self, key: &str) -> String {
        format!("{}/{key}", self.frontend())
    }

    pub fn frontend(self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.domid, self.vdev)
    }

    pub fn error(self) -> String {
        format!("/local/domain/0/error/backend/vbd3/{}/{}/error", self.domid, self.vdev)
    }
}

pub struct Rig {
    pub store: Arc<SimStore>,
    pub tapdisk: FakeTapdisk,
    pub dir: ControlDir,
    /// What the next xenio offers.
    pub offer: Offer,
    socket: PathBuf,
    running: Option<Running>,
    sentinels: AtomicU32,
    _folder: TempDir,
}

struct Running {
    stop: UnixStream,
    thread: JoinHandle<Result<(), RunError>>,
}

impl Rig {
    /// With xenio running and a tapdisk that has a disk open as minor 0.
    pub fn new() -> Rig {
        let mut rig = Rig::without_xenio();
        rig.start_xenio();
        rig
    }

    pub fn without_xenio() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(SimStore::start(folder.path()));
        let dir = ControlDir::at(folder.path().join("ctl"));
        let tapdisk = FakeTapdisk::start(&dir, PID);
        tapdisk.open(0, disk());
        let socket = store.socket();
        let offer = Offer { max_queues: 4 };
        Rig {
            store,
            tapdisk,
            dir,
            offer,
            socket,
            running: None,
            sentinels: AtomicU32::new(0),
            _folder: folder,
        }
    }

    pub fn start_xenio(&mut self) {
        let (stop, stopped) = UnixStream::pair().unwrap();
        let config = Config {
            kind: "vbd3".into(),
            control_dir: self.dir.clone(),
            tapdisk: "/nonexistent".into(),
            store: Some(self.socket.clone()),
            offer: self.offer,
        };
        let thread = thread::spawn(move || xenio::run(&config, stopped.as_fd()));
        self.running = Some(Running { stop, thread });
    }

    pub fn stop_xenio(&mut self) {
        if let Some(Running { stop, thread }) = self.running.take() {
            drop(stop);
            thread.join().expect("xenio must not panic").expect("xenio must end well");
        }
    }

    /// Lets the next xenio run in a driver domain: without domain 0's rights, below its own home.
    pub fn move_to_domain(&mut self, domid: u16) {
        self.socket = self.store.listen_for(domid);
    }

    /// A connection as domain 0.
    pub fn client(&self) -> Client {
        Client::connect_to(&self.store.socket()).unwrap()
    }

    // ---- the toolstack ----

    /// Adds a disk as libxl does: all keys of both directories in one step.
    pub fn add(&self, disk: Disk) {
        self.add_with(disk, &[]);
    }

    /// The same with other keys added to the backend's directory, or replaced in it.
    pub fn add_with(&self, disk: Disk, changes: &[(&str, &str)]) {
        let (domid, vdev) = (disk.domid.to_string(), disk.vdev.to_string());
        let mut values = vec![
            (disk.back("frontend"), disk.frontend()),
            (disk.back("params"), "vhd:/srv/x.vhd".to_owned()),
            (disk.back("frontend-id"), domid),
            (disk.back("online"), "1".to_owned()),
            (disk.back("state"), "1".to_owned()),
            (disk.back("dev"), "xvda".to_owned()),
            (disk.back("type"), "vbd3".to_owned()),
            (disk.back("mode"), "w".to_owned()),
            (disk.back("device-type"), "disk".to_owned()),
            (disk.front("backend"), disk.backend()),
            (disk.front("backend-id"), "0".to_owned()),
            (disk.front("state"), "1".to_owned()),
            (disk.front("virtual-device"), vdev),
        ];
        values.extend(changes.iter().map(|(key, value)| (disk.back(key), (*value).to_owned())));
        let values: Vec<(&str, &str)> =
            values.iter().map(|(path, value)| (path.as_str(), value.as_str())).collect();
        self.store.write_all(&values);
    }

    /// What the hotplug script writes at its end.
    pub fn hotplug(&self, disk: Disk) {
        let path = self.dir.vbd_path(PID, tap_ctl::Minor(0));
        self.store.write(&disk.back("physical-device-path"), path.to_str().unwrap());
        self.store.write(&disk.back("hotplug-status"), "connected");
    }

    /// libxl's request to remove a disk; `force`: without asking the guest.
    pub fn request_removal(&self, disk: Disk, force: bool) {
        let mut client = self.client();
        let done: Result<(), Error> = client.transact(|client, tx| {
            if force {
                client.rm(tx, disk.frontend())?;
            }
            client.write(tx, disk.back("online"), "0")?;
            if client.read(tx, disk.back("state"))? != b"6" {
                client.write(tx, disk.back("state"), "5")?;
            }
            Ok(())
        });
        done.unwrap();
    }

    // ---- the guest ----

    pub fn guest(&self, disk: Disk, key: &str, value: &str) {
        self.store.write(&disk.front(key), value);
    }

    /// Publishes a one-page ring and goes to state 3.
    pub fn offer_ring(&self, disk: Disk) {
        for (key, value) in [("ring-ref", "8"), ("event-channel", "9"), ("protocol", "x86_64-abi")] {
            self.guest(disk, key, value);
        }
        self.guest(disk, "state", "3");
    }

    // ---- what can be seen ----

    pub fn value(&self, path: &str) -> Option<String> {
        self.store.read(path).map(|value| String::from_utf8(value).unwrap())
    }

    pub fn wait(&self, path: &str, expected: &str) {
        let seen = self.store.wait_for(path, PATIENCE, |value| value == Some(expected.as_bytes()));
        assert!(seen, "{path} is {:?}, expected {expected}", self.value(path));
    }

    pub fn wait_gone(&self, path: &str) {
        assert!(self.store.wait_for(path, PATIENCE, |value| value.is_none()), "{path} stays");
    }

    pub fn wait_state(&self, disk: Disk, state: &str) {
        self.wait(&disk.back("state"), state);
    }

    pub fn wait_error(&self, disk: Disk, words: &str) {
        let seen = self.store.wait_for(&disk.error(), PATIENCE, |value| {
            value.is_some_and(|value| String::from_utf8_lossy(value).contains(words))
        });
        assert!(seen, "{:?} lacks {words:?}", self.value(&disk.error()));
    }

    /// Returns after xenio has looked at everything that happened before: it serves a device added only now.
    pub fn settle(&self) {
        let number = self.sentinels.fetch_add(1, Ordering::Relaxed);
        // The highest domain of all: devices are looked at in order.
        let sentinel = Disk { domid: 32_000, vdev: number };
        self.add(sentinel);
        self.wait_state(sentinel, "2");
    }

    /// A disk up to the given state, with a healthy guest.
    pub fn connected(&self, disk: Disk) {
        self.add(disk);
        self.wait_state(disk, "2");
        self.hotplug(disk);
        self.offer_ring(disk);
        self.wait_state(disk, "4");
        self.guest(disk, "state", "4");
    }

    /// Whether a key is readable for the guest and owned by domain `owner`.
    pub fn is_published(&self, path: &str, owner: u16, reader: u16) -> bool {
        let expected = [Permission::new(owner, Access::None), Permission::new(reader, Access::Read)];
        self.store.perms(path).as_deref() == Some(&expected)
    }

    /// Every change below the disk's backend directory from now on, as `watch` sees it.
    pub fn spy(&self, disk: Disk) -> Spy {
        let mut client = self.client();
        client.watch(disk.backend(), "spy").unwrap();
        let mut spy = Spy { client };
        spy.changes();
        spy
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop_xenio();
        }
    }
}

pub struct Spy {
    client: Client,
}

impl Spy {
    /// Paths that changed since the last call. All changes that the store has executed are included.
    pub fn changes(&mut self) -> Vec<String> {
        // Events are in our socket before the change's author has its reply: one request of ours fetches them all.
        self.client.directory(TxId::NONE, "/").unwrap();
        std::iter::from_fn(|| self.client.next_event())
            .map(|event| String::from_utf8(event.path).unwrap())
            .collect()
    }
}
