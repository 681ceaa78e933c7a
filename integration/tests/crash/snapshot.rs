//! A snapshot is taken while the guest writes: wherever the machine stops, the image before is whole until the new one is
//! there, and the two together are the disk from then on.

use std::cell::RefCell;
use std::rc::Rc;

use format::testing::{Allowed, Memory, Op, Parent, Random, Subject, Turns};
use vhd::DiskType;

use crate::guest::{ENGINES, Use, carry_out, contents, plug_new, rig};
use crate::{folder, qcow2_support, vhd_support};

/// Batches of requests before the snapshot, and after it.
const BATCHES: usize = 10;

fn snapshot_under_load<S: Subject<Core: 'static> + 'static>(
    engine: &str,
    (kind, parent, child): (&str, &S, &S),
    random: &mut Random,
) {
    let Some(folder) = folder() else { return };
    let rig = rig(engine);
    let (device, mut frontend, start) = plug_new(&rig, &folder, parent, (kind, "parent"));
    let mut before = Use::begin(Allowed::exactly(&contents(&mut frontend)), 0);
    before.go_on(&mut frontend, &folder, BATCHES, random);
    let meanwhile = before.next_jobs(&folder, random);
    let order = ["-a", &format!("{kind}:{}", folder.path("child").display())];
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let taken = std::thread::scope(|scope| {
        scope.spawn(|| carry_out(&mut frontend, &meanwhile));
        rig.tap_ctl(&[&["snapshot", "-p", &pid, "-m", &minor], &order[..]].concat())
    });
    assert_eq!(taken.code, 0, "{}", taken.err);
    let mut after = Use::begin(before.allowed.clone(), before.value);
    after.go_on(&mut frontend, &folder, BATCHES, random);
    rig.unplug(&device);

    let (log, mut made) = (folder.log("parent"), folder.log("child"));
    let named = folder.given("child");
    let written = made.split_off(made.partition_point(|(moment, _)| *moment <= named));
    let moment = |log: &[(usize, Op)]| (log.first().map(|(at, _)| *at), log.last().map(|(at, _)| *at));
    assert!(moment(&log).1 < moment(&made).0, "the image before is written no more");
    assert!(!written.is_empty(), "the guest goes on in the new one");
    for log in [&log, &made] {
        assert_eq!(log.last().map(|(_, op)| op), Some(&Op::Flush), "what has a name is complete and durable");
    }
    let apply = |mut file: Memory, log: &[(usize, Op)]| {
        log.iter().for_each(|(_, op)| file.apply(op));
        file.log.clear();
        file
    };
    let (whole, empty) = (apply(start.clone(), &log), apply(Memory::file(), &made));

    before.history(start, Vec::new(), log).replay(parent, 3, random);
    let below = Turns::open(parent, whole, Vec::new()).image;
    let below: Vec<Parent> = vec![Rc::new(RefCell::new(below))];
    after.history(empty, below, written).replay(child, 3, random);
}

#[test]
fn a_snapshot_of_a_vhd_under_load() {
    let parent = vhd_support::Shape { kind: DiskType::Dynamic, block_size: 1 << 16, ..Default::default() };
    let child = vhd_support::Shape::default();
    for engine in ENGINES {
        snapshot_under_load(engine, ("vhd", &parent, &child), &mut Random::new(7));
    }
}

#[test]
fn a_snapshot_of_a_qcow2_under_load() {
    let shape = qcow2_support::Shape { may_leak: true, ..Default::default() };
    for engine in ENGINES {
        snapshot_under_load(engine, ("qcow2", &shape, &shape), &mut Random::new(8));
    }
}
