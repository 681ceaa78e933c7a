//! A guest writes, discards and flushes through tapdisk.

use std::collections::VecDeque;
use std::process::Command;

use blkif::{DomId, Sector};
use format::testing::{Allowed, History, Job, Memory, Op, Parent, Random, Size, Subject, crash_states, jobs};
use integration::programs;
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};
use vhd::DiskType;

use crate::recorder::Folder;
use crate::{folder, qcow_support, qcow2_support, vhd_support, vmdk_support};

pub const SECTORS: u64 = 2048;
pub const XVDA: u32 = 51712;

/// `BLKIF_OP_DISCARD` of Xen's `io/blkif.h`.
const DISCARD: u8 = 5;

/// Batches of requests of a guest.
const BATCHES: usize = 24;

/// How a tapdisk does its I/O: both are recorded.
pub const ENGINES: [&str; 2] = ["uring", "pool"];

/// A host whose tapdisks use this engine.
pub fn rig(engine: &str) -> Rig {
    let mut rig = Rig::start(programs!());
    rig.spawn_options = vec!["--engine".into(), engine.into()];
    rig
}

/// A guest uses a new image, with either engine: it survives a stop at any moment. `kind` is what tapdisk calls the format.
/// What was done, for other checks.
fn survives<S: Subject>(subject: &S, kind: &str, random: &mut Random) -> Vec<History> {
    let one = |engine: &&str| survives_on(&rig(engine), subject, kind, random);
    ENGINES.iter().filter_map(one).collect()
}

fn survives_on<S: Subject>(rig: &Rig, subject: &S, kind: &str, random: &mut Random) -> Option<History> {
    let folder = folder()?;
    let (device, mut frontend, start) = plug_new(rig, &folder, subject, (kind, "image"));
    let mut guest = Use::begin(Allowed::exactly(&contents(&mut frontend)), 0);
    guest.go_on(&mut frontend, &folder, BATCHES, random);
    rig.unplug(&device);
    let history = guest.history(start, Vec::new(), folder.log("image"));
    history.replay(subject, 3, random);
    Some(history)
}

/// Makes an image, and gives it to a guest; what it was at first.
pub fn plug_new<S: Subject>(
    rig: &Rig,
    folder: &Folder,
    subject: &S,
    (kind, name): (&str, &str),
) -> (Device, Frontend, Memory) {
    let start = subject.create(SECTORS, 1, None);
    let path = folder.put(name, &start);
    rig.create_domain(1);
    let device = rig.plug(1, XVDA, &format!("{kind}:{}", path.display()), "w").unwrap();
    let frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.connect(&device, &frontend);
    (device, frontend, start)
}

/// What a guest has done so far.
pub struct Use {
    /// What the disk may hold now if the machine stops.
    pub allowed: Allowed,
    /// What it could hold from some moments of the recording on.
    pub moments: Vec<(usize, Allowed)>,
    /// The last value that was written.
    pub value: u8,
}

impl Use {
    /// The disk holds this; `value` was the last to be written.
    pub fn begin(allowed: Allowed, value: u8) -> Use {
        Use { allowed: allowed.clone(), moments: vec![(0, allowed)], value }
    }

    /// The guest sends so many batches of requests.
    pub fn go_on(&mut self, frontend: &mut Frontend, folder: &Folder, batches: usize, random: &mut Random) {
        for _ in 0..batches {
            if random.once_in(3) {
                frontend.flush().unwrap();
                self.allowed = Allowed::exactly(&contents(frontend));
            } else {
                let jobs = self.next_jobs(folder, random);
                carry_out(frontend, &jobs);
            }
            self.moments.push((folder.moment(), self.allowed.clone()));
        }
    }

    /// What the guest is going to do: from now on the new contents may appear.
    pub fn next_jobs(&mut self, folder: &Folder, random: &mut Random) -> Vec<Job> {
        let size = Size { sectors: SECTORS, longest: 80, ..Size::small() };
        let jobs = jobs(&size, SECTORS, &mut self.value, random);
        self.allowed.allow(&jobs);
        self.moments.push((folder.moment(), self.allowed.clone()));
        jobs
    }

    /// The whole of it, by what was recorded of the image.
    pub fn history(self, start: Memory, parents: Vec<Parent>, log: Vec<(usize, Op)>) -> History {
        let index = |moment| log.partition_point(|(at, _)| *at <= moment);
        let allowed = self.moments.into_iter().map(|(moment, allowed)| (index(moment), allowed)).collect();
        History { start, parents, log: log.into_iter().map(|(_, op)| op).collect(), allowed }
    }
}

/// All at once, as far as a request takes them.
pub fn carry_out(frontend: &mut Frontend, jobs: &[Job]) {
    let most = frontend.shape().max_transfer();
    let mut sent = 0;
    for job in jobs {
        match job {
            Job::Write { sector, data } => {
                for (piece, at) in data.chunks(most).zip((*sector..).step_by(most / 512)) {
                    if frontend.free_slots() == 0 {
                        settle(frontend, std::mem::take(&mut sent));
                    }
                    frontend.submit(Io::Write(Sector(at), piece));
                    sent += 1;
                }
            }
            Job::Discard { sector, count } => {
                if frontend.free_slots() == 0 {
                    settle(frontend, std::mem::take(&mut sent));
                }
                frontend.submit(Io::Discard { sector: Sector(*sector), count: *count, secure: false });
                sent += 1;
            }
        }
    }
    settle(frontend, sent);
}

/// Waits for so many answers.
fn settle(frontend: &mut Frontend, count: usize) {
    frontend.kick().unwrap();
    let mut answers = VecDeque::new();
    while answers.len() < count {
        frontend.wait(&mut answers, PATIENCE).unwrap();
    }
    // A format or a file system may not discard at all.
    let fine = |op, okay| okay || op == DISCARD;
    assert!(answers.iter().all(|answer| fine(answer.op, answer.is_okay())), "{answers:?}");
}

pub fn contents(frontend: &mut Frontend) -> Vec<u8> {
    let most = frontend.shape().max_transfer();
    let starts = (0..SECTORS).step_by(most / 512);
    let read = |at| {
        let len = most.min(usize::try_from(SECTORS - at).unwrap() * 512);
        frontend.read(Sector(at), len).unwrap()
    };
    starts.flat_map(read).collect()
}

#[test]
fn a_guest_on_a_vhd() {
    let mut random = Random::new(1);
    let shape = vhd_support::Shape { kind: DiskType::Dynamic, block_size: 1 << 16, ..Default::default() };
    survives(&shape, "vhd", &mut random);
}

#[test]
fn a_guest_on_an_encrypted_vhd() {
    let mut random = Random::new(6);
    let shape = vhd_support::Shape { block_size: 1 << 16, encrypted: true, ..Default::default() };
    for engine in ENGINES {
        let mut rig = rig(engine);
        let key = rig.path("key");
        std::fs::write(&key, [7; 32]).unwrap();
        (rig.input, rig.open_options) = (Some(key), vec!["-E".into()]);
        survives_on(&rig, &shape, "vhd", &mut random);
    }
}

#[test]
fn a_guest_on_a_qcow() {
    let mut random = Random::new(2);
    let shape = qcow_support::Shape::new(12, 9);
    survives(&shape, "qcow", &mut random);
}

#[test]
fn a_guest_on_a_qcow2() {
    let mut random = Random::new(3);
    let shape = qcow2_support::Shape { may_leak: true, ..Default::default() };
    for history in survives(&shape, "qcow2", &mut random) {
        satisfies_qemu(&history, &mut random);
    }
}

/// QEMU finds every state in order, save that it may have leaks.
fn satisfies_qemu(history: &History, random: &mut Random) {
    let file = tempfile::NamedTempFile::new().unwrap();
    crash_states(&history.start, &history.log, 2, random, |done, state, _| {
        if done % 7 == 0 {
            std::fs::write(file.path(), &state.bytes).unwrap();
            let mut check = Command::new("qemu-img");
            check.args(["check", "-q", "-f", "qcow2"]).arg(file.path());
            let output = check.output().unwrap();
            // 3: leaks only.
            assert!(matches!(output.status.code(), Some(0 | 3)), "after {done} operations: {output:?}");
        }
    });
}

#[test]
fn a_guest_on_a_vmdk() {
    let mut random = Random::new(4);
    let shape = vmdk_support::Shape { grain: 8, entries: 512, redundant: true, tables: true, cache: 0 };
    survives(&shape, "vmdk", &mut random);
}
