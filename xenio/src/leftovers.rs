//! Statistics that nobody updates any more.
//!
//! A tapdisk removes its own when a frontend is disconnected; one that has crashed cannot.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use tap_ctl::ControlDir;

/// Removes the statistics of tapdisks that do not run any more: to be called at the start, for those that ended while no xenio
/// was there to see it.
pub fn sweep(dir: &ControlDir) {
    let Ok(entries) = fs::read_dir(dir.all_statistics()) else { return };
    let pids =
        entries.flatten().filter_map(|entry| ControlDir::parse_statistics(entry.file_name().to_str()?));
    for pid in pids.filter(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
        remove(dir, pid);
    }
}

/// Removes the statistics of a tapdisk that has ended.
pub fn remove(dir: &ControlDir, pid: u32) {
    let folder = dir.statistics(pid);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            log::warn!("cannot remove {}: {error}", folder.display());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dead_have_left_is_swept_and_the_living_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(root.path());
        // Process ids end below 2^22.
        let pids = [std::process::id(), 5_000_000];
        let mut folders: Vec<_> = pids.iter().map(|pid| dir.statistics(*pid)).collect();
        folders.push(dir.all_statistics().join("td3-x"));
        folders.push(dir.all_statistics().join("td3-+5000000"));
        for folder in &folders {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join("vbd-1-2"), "old").unwrap();
        }
        sweep(&dir);
        let left: Vec<bool> = folders.iter().map(|folder| folder.exists()).collect();
        assert_eq!(left, [true, false, true, true]);
        remove(&dir, pids[0]);
        assert!(!folders[0].exists());
    }
}
