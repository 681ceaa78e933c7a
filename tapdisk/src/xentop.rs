//! What a frontend has done, where xentop looks for it.
//!
//! libxenstat (Xen 4.19 and later, `tools/libs/stat/xenstat_linux.c`) reads `kthread-pid` of each `vbd3` backend from XenStore
//! and then the file `/dev/shm/td3-PID/vbd-DOMID-VDEV`, in the layout of blktap's `drivers/tapdisk-metrics-stats.h`: a version
//! of 32 bits, which must be 1, 32 bits of nothing, and eleven counters of 64 bits in the machine's byte order.
//!
//! The file is mapped: telling costs a few additions and no system call, and happens when a thread is about to sleep, so that
//! what an idle disk shows is exact. The threads of a frontend's rings add to the same file.
//!
//! A file goes with the frontend's first ring, the folder with its last file. What a crashed tapdisk has left is taken away by
//! the next one that starts ([`sweep`]): until then nobody looks there, because no backend has that process id any more.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tap_ctl::proto::RingEntry;

use crate::words::Words;

/// Of `td_metrics_stats` in blktap.
const VERSION: u32 = 1;
/// The file has a page, in words.
const WORDS: usize = 512;
/// How a folder's name begins.
const PREFIX: &str = "td3-";

/// The counters of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// How often requests had to wait on the ring.
    pub waits: u64,
    /// Of reads.
    pub read: Moved,
    /// Of writes.
    pub write: Moved,
    /// Requests answered with an error.
    pub errors: u64,
}

/// The counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Requests taken.
    pub begun: u64,
    /// Requests answered.
    pub ended: u64,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Time that the requests took, in all, in microseconds.
    pub micros: u64,
}

impl Counters {
    /// In the order of the file; behind them a word of flags, of which none applies.
    fn words(self) -> [u64; 10] {
        let Counters { waits, read, write, errors } = self;
        let [r, w] = [read, write].map(|moved| [moved.begun, moved.ended, moved.sectors, moved.micros]);
        [waits, r[0], r[1], r[2], r[3], w[0], w[1], w[2], w[3], errors]
    }
}

/// One ring's access to the file of its frontend.
#[derive(Debug)]
pub struct Page {
    words: Words,
    told: Cell<Counters>,
    /// What to remove in the end; of the ring that made the file.
    owned: Option<PathBuf>,
}

impl Page {
    /// Makes the file of a frontend below `root`.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(root: &Path, entry: RingEntry) -> io::Result<Page> {
        let path = file(root, entry);
        let words = make(&path)?;
        // The version in the first half of a word, whatever the machine's byte order is.
        let mut first = [0; 8];
        first[..4].copy_from_slice(&VERSION.to_ne_bytes());
        words.store(0, u64::from_ne_bytes(first));
        Ok(Page { words, told: Cell::default(), owned: Some(path) })
    }

    /// Adds to the file that another ring of the frontend has made.
    ///
    /// # Errors
    /// What the system says.
    pub fn join(root: &Path, entry: RingEntry) -> io::Result<Page> {
        let words = Words::open(&file(root, entry), WORDS)?;
        Ok(Page { words, told: Cell::default(), owned: None })
    }

    /// Shows what the ring has counted so far.
    pub fn tell(&self, counters: Counters) {
        let told = self.told.replace(counters).words();
        for (index, (now, before)) in counters.words().into_iter().zip(told).enumerate() {
            if now != before {
                self.words.add(index + 1, now.wrapping_sub(before));
            }
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let Some(path) = &self.owned else { return };
        if let Err(error) = fs::remove_file(path) {
            log::debug!("cannot remove {}: {error}", path.display());
        }
        // Other frontends may still have files there.
        let _ = path.parent().map(fs::remove_dir);
    }
}

fn folder(root: &Path) -> PathBuf {
    root.join(format!("{PREFIX}{}", std::process::id()))
}

fn file(root: &Path, RingEntry { domid, vdev }: RingEntry) -> PathBuf {
    folder(root).join(format!("vbd-{domid}-{vdev}"))
}

/// Makes a file and its folder, which another thread may be removing with its last file.
fn make(path: &Path) -> io::Result<Words> {
    let mut tries = 0;
    loop {
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        match Words::create(path, WORDS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 10 => tries += 1,
            made => return made,
        }
    }
}

/// Removes what tapdisks have left that do not run any more, and what an earlier process of our id has left.
pub fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let Ok(pid) = pid.parse::<u32>() else { continue };
        let running = pid != std::process::id() && Path::new("/proc").join(pid.to_string()).exists();
        if !running && let Err(error) = fs::remove_dir_all(entry.path()) {
            log::debug!("cannot remove {}: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: RingEntry = RingEntry { domid: 7, vdev: 51712 };

    fn read(path: &Path) -> Vec<u64> {
        let bytes = fs::read(path).unwrap();
        assert_eq!(bytes.len(), 4096);
        bytes.chunks(8).take(12).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn counters(first: u64) -> Counters {
        let moved = |first| Moved { begun: first, ended: first + 1, sectors: first + 2, micros: first + 3 };
        Counters { waits: first, read: moved(first + 1), write: moved(first + 5), errors: first + 9 }
    }

    #[test]
    fn the_file_has_libxenstats_layout_and_sums_up_the_rings() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(format!("td3-{}/vbd-7-51712", std::process::id()));
        let first = Page::create(root.path(), ENTRY).unwrap();
        assert_eq!(fs::read(&path).unwrap()[..8], [1u32.to_ne_bytes(), [0; 4]].concat());
        first.tell(counters(100));
        assert_eq!(read(&path)[1..], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 0]);
        let second = Page::join(root.path(), ENTRY).unwrap();
        second.tell(counters(1000));
        first.tell(counters(200));
        assert_eq!(read(&path)[1..5], [1200, 1202, 1204, 1206]);
    }

    #[test]
    fn files_go_with_their_frontends_and_the_folder_with_the_last() {
        let root = tempfile::tempdir().unwrap();
        let (folder, other) = (folder(root.path()), RingEntry { domid: 8, vdev: 51712 });
        let first = Page::create(root.path(), ENTRY).unwrap();
        let second = Page::create(root.path(), other).unwrap();
        let joined = Page::join(root.path(), ENTRY).unwrap();
        drop(first);
        assert!(!folder.join("vbd-7-51712").exists() && folder.join("vbd-8-51712").exists());
        // A mapping outlives its name.
        joined.tell(counters(1));
        drop(joined);
        assert!(folder.exists());
        drop(second);
        assert!(!folder.exists());
    }

    #[test]
    fn what_the_dead_have_left_is_swept_and_the_living_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (own, parent) = (std::process::id(), nix::unistd::getppid());
        // Process ids end below 2^22.
        let names = [format!("td3-{own}"), "td3-5000000".into(), format!("td3-{parent}"), "td3-x".into()];
        for name in &names {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("vbd-1-2"), "old").unwrap();
        }
        sweep(root.path());
        assert_eq!(names.map(|name| root.path().join(name).exists()), [false, false, true, true]);
    }
}
