//! Images of all shapes, in memory.

use format::blocking::with_source;
use format::testing::{Memory, Subject, Turns};
use qcow::v1::{self, Error, OpenOptions, Qcow, check};

pub const KEY: &[u8] = b"a secret";

/// What an image is like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub cluster_bits: u8,
    pub l2_bits: u8,
    /// With Xen's extended header, whose flags are these.
    pub xen: Option<u32>,
    pub encrypted: bool,
    /// Bytes of a block device that it lies on.
    pub device: Option<usize>,
    /// Tables in memory.
    pub tables: u64,
}

impl Shape {
    pub fn new(cluster_bits: u8, l2_bits: u8) -> Self {
        Self { cluster_bits, l2_bits, xen: None, encrypted: false, device: None, tables: 2 }
    }

    pub fn image(&self, sectors: u64, backing: Option<&[u8]>) -> Memory {
        let head = if self.xen.is_some() { 64 } else { 48 };
        let name = backing.unwrap_or_default();
        let align = if self.xen.is_some() { 4096 } else { 8 };
        let directory = (head + name.len()).next_multiple_of(align);
        let covers = 1_u64 << (self.cluster_bits + self.l2_bits);
        let entries = usize::try_from((sectors * 512).div_ceil(covers)).unwrap();
        let mut bytes = vec![0; directory + entries * 8];
        put(&mut bytes, 0, b"QFI\xfb\0\0\0\x01");
        if backing.is_some() {
            put(&mut bytes, 8, &(head as u64).to_be_bytes());
            put(&mut bytes, 16, &u32::try_from(name.len()).unwrap().to_be_bytes());
            put(&mut bytes, head, name);
        }
        put(&mut bytes, 24, &(sectors * 512).to_be_bytes());
        put(&mut bytes, 32, &[self.cluster_bits, self.l2_bits]);
        put(&mut bytes, 36, &u32::from(self.encrypted).to_be_bytes());
        put(&mut bytes, 40, &(directory as u64).to_be_bytes());
        if let Some(flags) = self.xen {
            put(&mut bytes, 48, b"XEN\xfb");
            put(&mut bytes, 56, &(1_u32 << self.l2_bits).to_be_bytes());
            put(&mut bytes, 60, &flags.to_be_bytes());
        }
        match self.device {
            None => Memory::of(bytes, true),
            Some(len) => {
                let mut device = Memory::device(len);
                put(&mut device.bytes, 0, &bytes);
                device
            }
        }
    }

    fn options(&self, writable: bool) -> OpenOptions<'static> {
        let table_bytes = 8_u64 << self.l2_bits;
        OpenOptions { writable, key: self.encrypted.then_some(KEY), cache: self.tables * table_bytes }
    }
}

impl Subject for Shape {
    type Core = Qcow;

    fn create(&self, sectors: u64, number: u8, parent: Option<&Turns<Qcow>>) -> Memory {
        let name = [b'a' + number; 9];
        self.image(sectors, parent.map(|_| &name[..]))
    }

    fn open(&self, storage: &Memory, writable: bool) -> Qcow {
        with_source(storage, |source| v1::open(source, &self.options(writable))).unwrap().unwrap()
    }

    fn check(&self, storage: &Memory, _resting: bool) {
        let report = with_source(storage, check::check).unwrap().unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }
}

pub fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

pub fn open(storage: &Memory, writable: bool) -> Result<Qcow, Error> {
    let options = OpenOptions { writable, ..OpenOptions::default() };
    with_source(storage, |source| v1::open(source, &options)).unwrap()
}
