//! A guest writes, discards and flushes through tapdisk.

use std::collections::VecDeque;
use std::process::Command;

use blkif::{DomId, Sector};
use format::testing::{Allowed, History, Job, Random, Size, Subject, crash_states, jobs};
use integration::programs;
use integration::rig::{PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};
use vhd::DiskType;

use crate::recorder::Recorder;
use crate::{qcow_support, qcow2_support, skipped, vhd_support, vmdk_support};

const SECTORS: u64 = 2048;
const XVDA: u32 = 51712;

/// `BLKIF_OP_DISCARD` of Xen's `io/blkif.h`.
const DISCARD: u8 = 5;

/// Batches of requests of a guest.
const BATCHES: usize = 24;

/// Records a guest's use of a new image. `kind` is what tapdisk calls the format.
fn record<S: Subject>(subject: &S, kind: &str, random: &mut Random) -> History {
    let mut rig = Rig::start(programs!());
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    let start = subject.create(SECTORS, 1, None);
    let path = rig.path(kind);
    std::fs::write(&path, &start.bytes).unwrap();
    rig.create_domain(1);
    let device = rig.plug(1, XVDA, &format!("{kind}:{}", path.display()), "w").unwrap();
    let recorder = Recorder::attach(&path, start, device.pid);
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.connect(&device, &frontend);

    let size = Size { sectors: SECTORS, longest: 80, ..Size::small() };
    let mut allowed = Allowed::exactly(&contents(&mut frontend));
    let mut moments = vec![(0, allowed.clone())];
    let mut value = 0;
    for _ in 0..BATCHES {
        if random.once_in(3) {
            frontend.flush().unwrap();
            allowed = Allowed::exactly(&contents(&mut frontend));
        } else {
            let jobs = jobs(&size, SECTORS, &mut value, random);
            // From now on the new contents may appear.
            allowed.allow(&jobs);
            moments.push((recorder.moment(), allowed.clone()));
            carry_out(&mut frontend, &jobs);
        }
        moments.push((recorder.moment(), allowed.clone()));
    }
    rig.ask_to_close(&device);
    rig.close_frontend(&device);
    rig.finish_removal(&device);
    let (start, log) = recorder.stop();
    let index = |moment| log.partition_point(|(at, _)| *at <= moment);
    let allowed = moments.into_iter().map(|(moment, allowed)| (index(moment), allowed)).collect();
    History { start, parents: Vec::new(), log: log.into_iter().map(|(_, op)| op).collect(), allowed }
}

/// All at once, as far as a request takes them.
fn carry_out(frontend: &mut Frontend, jobs: &[Job]) {
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

fn contents(frontend: &mut Frontend) -> Vec<u8> {
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
    if skipped() {
        return;
    }
    let mut random = Random::new(1);
    let shape = vhd_support::Shape { kind: DiskType::Dynamic, block_size: 1 << 16, ..Default::default() };
    let history = record(&shape, "vhd", &mut random);
    history.replay(&shape, 3, &mut random);
}

#[test]
fn a_guest_on_a_qcow() {
    if skipped() {
        return;
    }
    let mut random = Random::new(2);
    let shape = qcow_support::Shape::new(12, 9);
    let history = record(&shape, "qcow", &mut random);
    history.replay(&shape, 3, &mut random);
}

#[test]
fn a_guest_on_a_qcow2() {
    if skipped() {
        return;
    }
    let mut random = Random::new(3);
    let shape = qcow2_support::Shape { may_leak: true, ..Default::default() };
    let history = record(&shape, "qcow2", &mut random);
    history.replay(&shape, 3, &mut random);
    // QEMU is of the same opinion.
    let file = tempfile::NamedTempFile::new().unwrap();
    crash_states(&history.start, &history.log, 2, &mut random, |done, state, _| {
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
    if skipped() {
        return;
    }
    let mut random = Random::new(4);
    let shape = vmdk_support::Shape { grain: 8, entries: 512, redundant: true, tables: true, cache: 0 };
    let history = record(&shape, "vmdk", &mut random);
    history.replay(&shape, 3, &mut random);
}
