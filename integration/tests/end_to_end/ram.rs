//! Disks in memory, synchronous ones, and chains that a text file names.

use blkif::{DomId, Sector};
use integration::sim::frontend::Shape;

use super::support::*;

const SIZE: usize = 8 * MIB;

#[test]
fn a_disk_in_memory_begins_with_its_image_and_never_writes_it() {
    let rig = rig();
    let (path, _) = raw(&rig, "a.img", SIZE);
    std::fs::write(&path, pattern(7, SIZE)).unwrap();
    let queues = most_queues(&rig);
    for (n, params, content) in [
        (1, format!("ram:{}", path.display()), pattern(7, SIZE)),
        (2, format!("ram:{SIZE}"), vec![0; SIZE]),
        (3, format!("sync:{}", path.display()), pattern(7, SIZE)),
    ] {
        let shape = Shape { queues, ..Shape::simple(DomId(n)) };
        let (device, mut frontend) = guest(&rig, n, &params, shape);
        let mut storm = Storm::new(content, u64::from(n), true);
        storm.blow(&mut frontend, 400);
        storm.verify(&mut frontend);
        rig.unplug(&device);
        let seen = std::fs::read(&path).unwrap();
        assert!(seen == if n == 3 { storm.model } else { pattern(7, SIZE) });
    }
    rig.assert_clean();
}

#[test]
fn a_chain_is_made_of_what_its_file_names() {
    let rig = rig();
    let (base, _) = raw(&rig, "base.img", SIZE);
    std::fs::write(&base, pattern(7, SIZE)).unwrap();
    let (parent, child) = (rig.path("parent.vhd"), rig.path("child.vhd"));
    vhd_util(&["create", "-n", parent.to_str().unwrap(), "-s", &(SIZE / MIB).to_string()]);
    vhd_util(&["snapshot", "-n", child.to_str().unwrap(), "-p", parent.to_str().unwrap()]);
    std::fs::write(
        rig.path("chain"),
        "# the child, on a base that it does not know\nvhd:child.vhd\naio:base.img ro\n",
    )
    .unwrap();
    let params = format!("x-chain:{}", rig.path("chain").display());
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    assert!(frontend.read(Sector(0), SIZE).unwrap() == pattern(7, SIZE));
    let mut storm = Storm::new(pattern(7, SIZE), 1, false);
    storm.blow(&mut frontend, 400);
    storm.verify(&mut frontend);
    rig.unplug(&device);
    assert!(std::fs::read(&base).unwrap() == pattern(7, SIZE));
    rig.assert_clean();
}
