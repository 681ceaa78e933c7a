//! Several handles of one disk, each for a thread of its own.
//!
//! Only for images whose sectors are where the guest's are: without metadata in memory, and on a store that takes single
//! sectors, there is nothing that the threads would have to agree on but what [`Common`] holds.

use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::Disk;
use super::chain::Chain;
use super::file::FileShare;
use super::layer::Layer;
use super::null::Null;
use super::raw::Raw;
use crate::io::Io;

/// What all handles of a disk have in common.
#[derive(Debug)]
pub(super) struct Common {
    sectors: AtomicU64,
    failure: OnceLock<String>,
    heard: OnceLock<OnFailure>,
}

/// Who is told that the disk is about to be stopped for good.
pub struct OnFailure(pub Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for OnFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnFailure")
    }
}

impl Common {
    pub(super) fn new(sectors: u64) -> Arc<Common> {
        Arc::new(Common {
            sectors: AtomicU64::new(sectors),
            failure: OnceLock::new(),
            heard: OnceLock::new(),
        })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// A disk never shrinks, whatever order the handles measure it in.
    pub(super) fn grow(&self, sectors: u64) {
        self.sectors.fetch_max(sectors, Ordering::Relaxed);
    }

    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// The first one who wants to know it stays.
    pub(super) fn tell_failure(&self, whom: OnFailure) {
        let _ = self.heard.set(whom);
    }

    pub(super) fn fail(&self, why: String) {
        // Before any handle acts upon it.
        if let Some(heard) = self.heard.get() {
            (heard.0)();
        }
        // The first reason stays: those after it follow from it.
        let _ = self.failure.set(why);
    }
}

/// What a handle on another thread is made from.
#[derive(Debug)]
pub struct DiskShare {
    leaf: Leaf,
    common: Arc<Common>,
    readonly: bool,
}

#[derive(Debug)]
enum Leaf {
    Raw(FileShare),
    Null,
}

impl DiskShare {
    /// The handle, for the thread that `io` belongs to.
    pub fn open(self, io: Io) -> Disk {
        let leaf = match self.leaf {
            Leaf::Raw(share) => Layer::Raw(Raw { file: share.into() }),
            Leaf::Null => Layer::Null(Null),
        };
        Disk::new(Rc::new(Chain::new(leaf, Vec::new(), io)), None, self.readonly, self.common)
    }
}

impl Disk {
    /// For a second handle, on another thread; `None` for an image that only one thread can serve.
    ///
    /// The image is closed, and its lock given up, when the last handle is gone. Handles flush for each other; a failed
    /// flush stops them all. Growth that one finds, all have. [`Disk::make_readonly`] concerns its own handle only.
    pub fn share(&self) -> Option<DiskShare> {
        let leaf = match &self.chain.leaf {
            // What filters know is not shared.
            _ if self.filters.is_some() => return None,
            Layer::Raw(raw) if raw.file.granule() == 512 => Leaf::Raw(raw.file.share()),
            Layer::Null(Null) => Leaf::Null,
            _ => return None,
        };
        Some(DiskShare { leaf, common: self.common.clone(), readonly: self.readonly.get() })
    }
}
