//! What a frontend has done, where xentop looks for it.
//!
//! libxenstat (Xen 4.19 and later, `tools/libs/stat/xenstat_linux.c`) reads `kthread-pid` of each `vbd3` backend from XenStore
//! and then the file `/dev/shm/td3-PID/vbd-DOMID-VDEV`, in the layout of blktap's `drivers/tapdisk-metrics-stats.h`: a version
//! of 32 bits, which must be 1, 32 bits of nothing, and eleven counters of 64 bits in the machine's byte order.
//!
//! The file is mapped: telling costs a few additions and no system call, and happens when a thread is about to sleep, so that
//! what an idle disk shows is exact. The threads of a frontend's rings add to the same file.
//!
//! A file goes with the frontend's first ring, the folder with its last file. What a crashed tapdisk leaves is taken away by
//! xenio, which alone connects frontends.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};

use tap_ctl::proto::RingEntry;

use crate::porter;
use crate::words::Words;

/// Of `td_metrics_stats` in blktap.
const VERSION: u32 = 1;
/// The file has a page, in words.
const WORDS: usize = 512;

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
    /// Makes the file of a frontend in this process's `folder`.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(folder: &Path, entry: RingEntry) -> io::Result<Page> {
        let path = file(folder, entry);
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
    pub fn join(folder: &Path, entry: RingEntry) -> io::Result<Page> {
        let words = Words::open(&file(folder, entry), WORDS)?;
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
        if let Err(error) = porter::remove(path) {
            log::debug!("cannot remove {}: {error}", path.display());
        }
        // Other frontends may still have files there.
        let _ = path.parent().map(porter::remove_folder);
    }
}

fn file(folder: &Path, RingEntry { domid, vdev }: RingEntry) -> PathBuf {
    folder.join(format!("vbd-{domid}-{vdev}"))
}

/// Makes a file and its folder, which another thread may be removing with its last file.
fn make(path: &Path) -> io::Result<Words> {
    let mut tries = 0;
    loop {
        if let Some(folder) = path.parent() {
            porter::make_folder(folder)?;
        }
        match Words::create(path, WORDS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 10 => tries += 1,
            made => return made,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        let folder = root.path().join("td3-5");
        let path = folder.join("vbd-7-51712");
        let first = Page::create(&folder, ENTRY).unwrap();
        assert_eq!(fs::read(&path).unwrap()[..8], [1u32.to_ne_bytes(), [0; 4]].concat());
        first.tell(counters(100));
        assert_eq!(read(&path)[1..], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 0]);
        let second = Page::join(&folder, ENTRY).unwrap();
        second.tell(counters(1000));
        first.tell(counters(200));
        assert_eq!(read(&path)[1..5], [1200, 1202, 1204, 1206]);
    }

    #[test]
    fn files_go_with_their_frontends_and_the_folder_with_the_last() {
        let root = tempfile::tempdir().unwrap();
        let (folder, other) = (root.path().join("td3-5"), RingEntry { domid: 8, vdev: 51712 });
        let first = Page::create(&folder, ENTRY).unwrap();
        let second = Page::create(&folder, other).unwrap();
        let joined = Page::join(&folder, ENTRY).unwrap();
        drop(first);
        assert!(!folder.join("vbd-7-51712").exists() && folder.join("vbd-8-51712").exists());
        // A mapping outlives its name.
        joined.tell(counters(1));
        drop(joined);
        assert!(folder.exists());
        drop(second);
        assert!(!folder.exists());
    }
}
