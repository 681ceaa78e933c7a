//! Images of all shapes, in memory.

use format::blocking::with_source;
use format::testing::{Memory, Subject, Turns};
use qcow::v2::{self, Backing, NewImage, OpenOptions, Qcow2};

/// What an image is like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    /// Bytes of a block device that it lies on, full of old data.
    pub device: Option<usize>,
    /// Bytes of memory for L2 tables.
    pub cache: u64,
    pub preallocate: bool,
    /// Bytes that are reserved ahead.
    pub reserve: u64,
    /// A stop or a failure was in its history: clusters may be leaked.
    pub may_leak: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 12,
            refcount_bits: 16,
            device: None,
            cache: 0,
            preallocate: false,
            reserve: v2::DEFAULT_RESERVE,
            may_leak: false,
        }
    }
}

impl Shape {
    pub fn image(&self, sectors: u64, backing: Option<&str>) -> Memory {
        let image = NewImage {
            sectors,
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_bits: self.refcount_bits,
            backing: backing.map(|name| Backing { name: name.into(), format: Some("qcow2".into()) }),
            preallocate: self.preallocate && backing.is_none(),
        };
        let new = image.build().unwrap();
        let len = usize::try_from(new.len).unwrap();
        let mut storage = match self.device {
            None => Memory::of(vec![0; len], true),
            Some(size) => {
                let mut device = Memory::device(size);
                device.bytes.fill(0xa5);
                device.bytes[..len].fill(0);
                device
            }
        };
        for write in new.writes {
            put(&mut storage.bytes, usize::try_from(write.offset).unwrap(), &write.bytes);
        }
        storage
    }
}

impl Subject for Shape {
    type Core = Qcow2;

    fn create(&self, sectors: u64, number: u8, parent: Option<&Turns<Qcow2>>) -> Memory {
        self.image(sectors, parent.map(|_| format!("parent{number}")).as_deref())
    }

    fn open(&self, storage: &Memory, writable: bool) -> Qcow2 {
        let options =
            OpenOptions { writable, cache: self.cache, reserve: self.reserve, ..OpenOptions::default() };
        with_source(storage, |source| v2::open(source, &options)).unwrap().unwrap()
    }

    fn check(&self, storage: &Memory, resting: bool) {
        let report = with_source(storage, v2::check).unwrap().unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.problems);
        assert!(!resting || self.may_leak || report.leaks == 0, "{:?}", report.problems);
        if report.leaks > 0 {
            let mut repaired = storage.clone();
            let report = v2::repair(&mut repaired).unwrap();
            assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.problems);
        }
    }

    fn grows_to(&self, sectors: u64) -> u64 {
        sectors * 9
    }
}

pub fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}
