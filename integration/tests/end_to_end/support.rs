//! What the tests of this binary share: images, guests, and a storm of requests that is compared with a model.

use std::collections::{HashMap, VecDeque};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkif::{DomId, Sector, keys};
use format::blocking::with_source;
use integration::programs;
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Completion, Frontend, Io, MAX_TRANSFER, Shape};
use qcow::v2::{self, Backing};

pub const XVDA: u32 = 51712;
pub const MIB: usize = 1 << 20;

/// A host whose tapdisks use the engine that this test binary is about.
pub fn rig() -> Rig {
    let mut rig = Rig::start(programs!());
    if let Some(engine) = crate::ENGINE {
        rig.spawn_options = vec!["--engine".into(), engine.into()];
    }
    rig
}

/// An empty raw image and its parameters.
pub fn raw(rig: &Rig, name: &str, bytes: usize) -> (PathBuf, String) {
    let path = rig.path(name);
    std::fs::File::create(&path).unwrap().set_len(bytes as u64).unwrap();
    let params = format!("aio:{}", path.display());
    (path, params)
}

/// Waits until a dead tapdisk's last I/O has ended: the kernel keeps its lock so long.
pub fn wait_for_lock(path: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLKW(&lock)).unwrap();
}

/// Runs vhd-util.
pub fn vhd_util(args: &[&str]) -> String {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = vhd::util::run(args.iter().map(Into::into), &mut out, &mut err);
    assert_eq!(code, 0, "{args:?}: {}", String::from_utf8_lossy(&err));
    String::from_utf8_lossy(&out).into_owned()
}

/// An empty dynamic VHD and its parameters.
pub fn vhd(rig: &Rig, name: &str, mib: usize) -> (PathBuf, String) {
    let path = rig.path(name);
    vhd_util(&["create", "-n", path.to_str().unwrap(), "-s", &mib.to_string()]);
    let params = format!("vhd:{}", path.display());
    (path, params)
}

/// Writes a new image's parts into a new file.
pub fn put(path: &Path, len: u64, writes: &[format::MetaWrite]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    for write in writes {
        file.write_all_at(&write.bytes, write.offset).unwrap();
    }
}

/// An empty qcow2 image and its parameters.
pub fn qcow2(rig: &Rig, name: &str, mib: usize, backing: Option<(&str, &str)>) -> (PathBuf, String) {
    let path = rig.path(name);
    let backing = backing.map(|(name, format)| Backing { name: name.into(), format: Some(format.into()) });
    let new = v2::NewImage { backing, ..v2::NewImage::new((mib * MIB / 512) as u64) }.build().unwrap();
    put(&path, new.len, &new.writes);
    let params = format!("qcow2:{}", path.display());
    (path, params)
}

/// A qcow2 image whose metadata are in order; `leaks`: clusters may be lost, as after a crash.
pub fn check_qcow2(path: &Path, leaks: bool) {
    let file = std::fs::File::open(path).unwrap();
    let report = with_source(&file, v2::check).unwrap().unwrap();
    let fine = report.corruptions == 0 && (leaks || report.leaks == 0);
    assert!(fine, "{}: {:?}", path.display(), report.problems);
}

pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..=250).cycle().skip(usize::from(seed)).take(len).collect()
}

/// A guest with one disk, connected.
pub fn guest(rig: &Rig, domid: u16, params: &str, shape: Shape) -> (Device, Frontend) {
    rig.create_domain(domid);
    let device = rig.plug(domid, XVDA, params, "w").unwrap();
    let frontend = Frontend::create(&rig.host.xen(), Shape { guest: DomId(domid), ..shape }).unwrap();
    rig.connect(&device, &frontend);
    (device, frontend)
}

/// Another guest on the same disk, connected.
pub fn also(rig: &Rig, first: &Device, domid: u16) -> (Device, Frontend) {
    rig.create_domain(domid);
    let mut device = rig.write_device(domid, XVDA, "aio:/the/same", "w");
    rig.wait_value(&format!("{}/state", device.backend), "2");
    (device.pid, device.minor) = (first.pid, first.minor);
    let path = rig.host.control().vbd_path(device.pid, device.minor);
    rig.store.write(&format!("{}/physical-device-path", device.backend), path.to_str().unwrap());
    rig.store.write(&format!("{}/hotplug-status", device.backend), "connected");
    let frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(domid))).unwrap();
    rig.connect(&device, &frontend);
    (device, frontend)
}

/// A number that the backend has published.
pub fn published(rig: &Rig, device: &Device, key: &str) -> u64 {
    let value = rig.store.read(&format!("{}/{key}", device.backend)).unwrap_or_default();
    let text = String::from_utf8_lossy(&value).into_owned();
    text.parse().unwrap_or_else(|_| panic!("{key} is {text:?}"))
}

/// The most rings that this host offers to a guest: no more than it has processors.
pub fn most_queues(rig: &Rig) -> usize {
    rig.create_domain(999);
    let device = rig.write_device(999, XVDA, "aio:/nowhere", "w");
    rig.wait_value(&format!("{}/state", device.backend), "2");
    let queues = published(rig, &device, keys::MULTI_QUEUE_MAX_QUEUES);
    rig.store.rm(&device.frontend);
    rig.store.rm(&device.backend);
    usize::try_from(queues).unwrap()
}

/// The next `count` answers.
pub fn answers(frontend: &mut Frontend, count: usize) -> Vec<Completion> {
    let mut out = VecDeque::new();
    while out.len() < count {
        frontend.wait(&mut out, PATIENCE).unwrap();
    }
    out.into()
}

/// Numbers that look drawn at random, the same in each run: Marsaglia's xorshift.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to `below` - 1.
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

/// Parts of the disk that requests of a storm keep to, one at a time each, so that it is known what a read must give.
const LANES: u64 = 24;

/// A disk's bytes as they should be, and the requests on their way to make it so.
pub struct Storm {
    pub model: Vec<u8>,
    dice: Dice,
    discards: bool,
    waiting: HashMap<u64, (u64, Step)>,
    idle: Vec<u64>,
}

enum Step {
    Read {
        sector: u64,
        sectors: u64,
    },
    Write {
        sector: u64,
        data: Vec<u8>,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
    /// Reads what became of a discard: of each sector, what was there before, or zeros.
    Look {
        sector: u64,
        sectors: u64,
    },
    Flush,
}

impl Storm {
    /// Over a disk with these bytes.
    pub fn new(model: Vec<u8>, seed: u64, discards: bool) -> Storm {
        let idle = (0..LANES).collect();
        Storm { model, dice: Dice::new(seed), discards, waiting: HashMap::new(), idle }
    }

    fn bytes(&mut self, sector: u64, sectors: u64) -> &mut [u8] {
        &mut self.model[sector as usize * 512..(sector + sectors) as usize * 512]
    }

    /// A request somewhere in a lane.
    fn step(&mut self, lane: u64, longest: u64) -> Step {
        let room = self.model.len() as u64 / 512 / LANES;
        let sectors = 1 + self.dice.roll(longest.min(room));
        let sector = lane * room + self.dice.roll(room - sectors + 1);
        match self.dice.roll(20) {
            0 => Step::Flush,
            1 if self.discards => Step::Discard { sector, sectors },
            1..=10 => Step::Read { sector, sectors },
            _ => {
                let seed = self.dice.roll(251) as u8;
                Step::Write { sector, data: pattern(seed, sectors as usize * 512) }
            }
        }
    }

    fn submit(&mut self, frontend: &mut Frontend, lane: u64, step: Step) {
        let read = |sector, sectors: u64| Io::Read(Sector(sector), sectors as usize * 512);
        let id = frontend.submit(match &step {
            Step::Read { sector, sectors } | Step::Look { sector, sectors } => read(*sector, *sectors),
            Step::Write { sector, data } if data.len() <= MAX_TRANSFER && data[0] % 16 == 0 => {
                Io::Barrier(Sector(*sector), data)
            }
            Step::Write { sector, data } => Io::Write(Sector(*sector), data),
            Step::Discard { sector, sectors } => {
                Io::Discard { sector: Sector(*sector), count: *sectors, secure: sector % 2 == 0 }
            }
            Step::Flush => Io::Flush,
        });
        self.waiting.insert(id, (lane, step));
    }

    /// Sends `count` requests, many at once; every answer is checked, and all are waited for.
    pub fn blow(&mut self, frontend: &mut Frontend, count: u64) {
        let longest = frontend.shape().max_transfer() as u64 / 512;
        let mut left = count;
        let mut out = VecDeque::new();
        while left > 0 || !self.waiting.is_empty() {
            while left > 0 && frontend.free_slots() > 0 {
                let Some(lane) = self.idle.pop() else { break };
                let step = self.step(lane, longest);
                self.submit(frontend, lane, step);
                left -= 1;
            }
            frontend.kick().unwrap();
            frontend.wait(&mut out, PATIENCE).unwrap();
            for completion in out.drain(..) {
                self.check(frontend, &completion);
            }
        }
    }

    fn check(&mut self, frontend: &mut Frontend, completion: &Completion) {
        let (lane, step) = self.waiting.remove(&completion.id).expect("an answer to a request of the storm");
        assert!(completion.is_okay(), "{}", completion.status);
        match step {
            Step::Flush => {}
            Step::Write { sector, data } => {
                self.bytes(sector, data.len() as u64 / 512).copy_from_slice(&data);
            }
            Step::Read { sector, sectors } => {
                assert!(self.bytes(sector, sectors) == completion.data, "{sectors} sectors at {sector}");
            }
            // In the same lane, so that nothing comes between.
            Step::Discard { sector, sectors } => {
                return self.submit(frontend, lane, Step::Look { sector, sectors });
            }
            Step::Look { sector, sectors } => {
                let before = self.bytes(sector, sectors);
                for (was, is) in before.chunks_mut(512).zip(completion.data.chunks(512)) {
                    assert!(was == is || is.iter().all(|byte| *byte == 0), "{sectors} discarded at {sector}");
                    was.copy_from_slice(is);
                }
            }
        }
        self.idle.push(lane);
    }

    /// The whole disk, read back, is what it should be.
    pub fn verify(&self, frontend: &mut Frontend) {
        assert!(frontend.read(Sector(0), self.model.len()).unwrap() == self.model);
    }
}
