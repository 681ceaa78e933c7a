//! A snapshot is taken while the guest writes: wherever the machine stops, the image before is whole until the new one is
//! there, and the two together are the disk from then on.

use std::cell::RefCell;
use std::rc::Rc;

use format::testing::{Allowed, Memory, Op, Parent, Random, Subject, Turns};
use vhd::DiskType;

use crate::guest::{Use, carry_out, contents, plug_new, rig};
use crate::recorder::changes_of;
use crate::{qcow2_support, skipped, vhd_support};

/// Batches of requests before the snapshot, and after it.
const BATCHES: usize = 10;

fn snapshot_under_load<S: Subject<Core: 'static> + 'static>(
    (kind, parent, child): (&str, S, S),
    random: &mut Random,
) {
    let rig = rig();
    let (path, new) = (rig.path(&format!("p.{kind}")), rig.path(&format!("child.{kind}")));
    let (device, mut frontend, recorder) = plug_new(&rig, &parent, kind, &path);
    let mut before = Use::begin(Allowed::exactly(&contents(&mut frontend)), 0);
    before.go_on(&mut frontend, &recorder, BATCHES, random);
    let meanwhile = before.next_jobs(&recorder, random);
    let order = ["-a", &format!("{kind}:{}", new.display())];
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let taken = std::thread::scope(|scope| {
        scope.spawn(|| carry_out(&mut frontend, &meanwhile));
        rig.tap_ctl(&[&["snapshot", "-p", &pid, "-m", &minor], &order[..]].concat())
    });
    assert_eq!(taken.code, 0, "{}", taken.err);
    let mut after = Use::begin(before.allowed.clone(), before.value);
    after.go_on(&mut frontend, &recorder, BATCHES, random);
    rig.unplug(&device);

    let trace = recorder.trace();
    let (start, log) = recorder.stop();
    let draft = rig.path(&format!(".child.{kind}.{}", device.pid));
    let (made, written) = (changes_of(&trace, &draft), changes_of(&trace, &new));
    let moment = |log: &[(u64, Op)]| (log.first().map(|(at, _)| *at), log.last().map(|(at, _)| *at));
    assert!(moment(&log).1 < moment(&made).0, "the image before is written no more");
    assert!(moment(&made).1 < moment(&written).0, "the new one is complete before it has its name");
    for log in [&log, &made] {
        assert_eq!(log.last().map(|(_, op)| op), Some(&Op::Flush), "and durable");
    }
    let apply = |mut file: Memory, log: &[(u64, Op)]| {
        log.iter().for_each(|(_, op)| file.apply(op));
        file.log.clear();
        file
    };
    let (whole, empty) = (apply(start.clone(), &log), apply(Memory::file(), &made));
    assert!(std::fs::read(&new).unwrap() == apply(empty.clone(), &written).bytes, "the trace tells all");

    before.history(start, Vec::new(), log).replay(&parent, 3, random);
    let below = Turns::open(&parent, whole, Vec::new()).image;
    let below: Vec<Parent> = vec![Rc::new(RefCell::new(below))];
    after.history(empty, below, written).replay(&child, 3, random);
}

#[test]
fn a_snapshot_of_a_vhd_under_load() {
    if skipped() {
        return;
    }
    let parent = vhd_support::Shape { kind: DiskType::Dynamic, block_size: 1 << 16, ..Default::default() };
    let child = vhd_support::Shape::default();
    snapshot_under_load(("vhd", parent, child), &mut Random::new(7));
}

#[test]
fn a_snapshot_of_a_qcow2_under_load() {
    if skipped() {
        return;
    }
    let shape = qcow2_support::Shape { may_leak: true, ..Default::default() };
    snapshot_under_load(("qcow2", shape, shape), &mut Random::new(8));
}
