//! Guests on encrypted images, whose keys `tap-ctl open -E` takes from its standard input.

use std::path::Path;

use blkif::DomId;
use integration::rig::Rig;
use integration::sim::frontend::Shape;
use qcow::v1::{self, Flavour};

use super::support::*;

const SIZE: usize = 8 * MIB;

/// What a guest writes, so that it is found in a file that has it in plain text.
const WORDS: &[u8] = b"words that nobody but the guest can read";

/// An empty image of which this is the key.
fn make(rig: &Rig, kind: &str, key: &[u8]) -> std::path::PathBuf {
    let path = rig.path(&format!("{}.{kind}", key.len()));
    if kind == "vhd" {
        let file = rig.path(&format!("{},aes-xts-plain,{}.key", key.len(), key.len() * 8));
        std::fs::write(&file, key).unwrap();
        let (image, file) = (path.to_str().unwrap(), file.to_str().unwrap());
        vhd_util(&["create", "-n", image, "-s", &(SIZE / MIB).to_string()]);
        vhd_util(&["key", "-s", "-n", image, "-k", file]);
    } else {
        let flavour = Flavour::Qemu;
        let sectors = (SIZE / 512) as u64;
        let new = v1::NewImage { sectors, flavour, backing: None, encrypted: true }.build().unwrap();
        put(&path, new.len, &new.writes);
    }
    path
}

/// Makes this what `tap-ctl` finds on its standard input.
fn give(rig: &mut Rig, key: &[u8]) {
    let path = rig.path("input");
    std::fs::write(&path, key).unwrap();
    rig.input = Some(path);
}

fn found(path: &Path) -> bool {
    std::fs::read(path).unwrap().windows(WORDS.len()).any(|window| window == WORDS)
}

#[test]
fn a_disk_is_opened_with_its_key_and_its_file_shows_nothing_of_it() {
    let mut rig = rig();
    let keys: [(&str, &[u8]); 3] = [("vhd", &[5; 32]), ("vhd", &[6; 64]), ("qcow", b"a pass phrase")];
    for (domid, (kind, key)) in (1..).zip(keys) {
        let path = make(&rig, kind, key);
        let params = format!("{kind}:{}", path.display());
        give(&mut rig, key);
        rig.open_options = vec!["-E".into()];
        let mut storm = Storm::new(vec![0; SIZE], 8, true);
        for round in [0, 10] {
            let guest_id = DomId(round + domid);
            let (device, mut frontend) = guest(&rig, guest_id.0, &params, Shape::simple(guest_id));
            storm.verify(&mut frontend);
            storm.blow(&mut frontend, 300);
            let mut sector = WORDS.to_vec();
            sector.resize(512, 0);
            frontend.write(blkif::Sector(5), &sector).unwrap();
            storm.model[5 * 512..6 * 512].copy_from_slice(&sector);
            storm.verify(&mut frontend);
            rig.unplug(&device);
        }
        assert!(!found(&path), "{kind}: it is in the file as it is");
    }
    rig.assert_clean();
}

#[test]
fn without_its_key_or_with_another_an_encrypted_disk_is_not_opened() {
    let mut rig = rig();
    let path = make(&rig, "vhd", &[5; 32]);
    let params = format!("vhd:{}", path.display());
    let before = std::fs::read(&path).unwrap();
    let missing = rig.tap_ctl(&["create", "-a", &params]);
    assert_eq!(missing.code, libc::EINVAL, "{}", missing.err);
    for (key, code) in [
        (&[4; 32][..], libc::ENOKEY),
        (&[5; 31], libc::EINVAL),
        (&[], libc::EINVAL),
        (&[5; 64], libc::ENOKEY),
    ] {
        give(&mut rig, key);
        let refused = rig.tap_ctl(&["create", "-a", &params, "-E"]);
        assert_eq!(refused.code, code, "{} bytes: {}", key.len(), refused.err);
    }
    assert!(std::fs::read(&path).unwrap() == before, "who is refused changes nothing");
    let (_, plain) = vhd(&rig, "plain.vhd", 8);
    give(&mut rig, &[5; 32]);
    let refused = rig.tap_ctl(&["create", "-a", &plain, "-E"]);
    assert_eq!(refused.code, libc::EINVAL, "a key for what needs none: {}", refused.err);
    rig.assert_clean();
}
