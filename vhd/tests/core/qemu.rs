//! Dynamic and fixed images exchanged with `qemu-img`, where it is installed. Never differencing ones: qemu opens them as
//! if they had no parent.

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use crate::support::{self, Shape};
use format::testing::{Memory, Random, SECTOR, Turns};
use vhd::{DiskType, OpenOptions};

/// The raw bytes that qemu converts an image in `from` into, or the image that it makes of raw bytes.
fn convert(folder: &Path, input: &[u8], args: &[&str]) -> Vec<u8> {
    let (from, to) = (folder.join("from"), folder.join("to"));
    std::fs::write(&from, input).unwrap();
    let output = Command::new("qemu-img").arg("convert").args(args).arg(&from).arg(&to).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(&to).unwrap()
}

fn missing() -> bool {
    let missing = Command::new("qemu-img").arg("--version").output().is_err();
    if missing {
        eprintln!("skipped: there is no qemu-img");
    }
    missing
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn qemu_reads_what_we_write_and_we_read_what_qemu_writes(
        writes in prop::collection::vec((0_u64..16000, 1_usize..300), 1..8), fixed: bool, seed: u64
    ) {
        if missing() {
            return Ok(());
        }
        let folder = tempfile::tempdir().unwrap();
        let kind = if fixed { DiskType::Fixed } else { DiskType::Dynamic };
        let shape = Shape { kind, ..Shape::default() };
        let mut random = Random::new(seed);
        let mut disk = Turns::create(&shape, 16384);
        for (i, (first, count)) in writes.into_iter().enumerate() {
            let value = u8::try_from(i + 1).unwrap();
            disk.write(vec![(first, vec![value; count * SECTOR])], &mut random);
        }
        let contents = disk.contents();
        let (store, _) = disk.close();
        let raw = convert(folder.path(), &store.bytes, &["-f", "vpc", "-O", "raw"]);
        prop_assert!(raw == contents);

        let option = if fixed { "subformat=fixed,force_size=on" } else { "subformat=dynamic,force_size=on" };
        let bytes = convert(folder.path(), &contents, &["-f", "raw", "-O", "vpc", "-o", option]);
        let store = Memory::of(bytes, true);
        let vhd = support::open(&store, &OpenOptions::default()).unwrap();
        prop_assert_eq!((vhd.kind(), vhd.was_unclean()), (kind, false));
        // Ours can go on where qemu has stopped, and the other way round.
        let mut disk = Turns::open(&shape, store, Vec::new());
        prop_assert!(disk.contents() == contents);
        let mut model = contents;
        model[5 * SECTOR..9 * SECTOR].fill(0xee);
        disk.write(vec![(5, vec![0xee; 4 * SECTOR])], &mut random);
        prop_assert!(disk.contents() == model);
        let (store, _) = disk.close();
        let raw = convert(folder.path(), &store.bytes, &["-f", "vpc", "-O", "raw"]);
        prop_assert!(raw == model);
    }
}
