//! Extents of all shapes, in memory.

use format::blocking::{Blocking, Storage, nothing, with_source};
use format::testing::{Memory, Subject, Turns};
use format::{Format, FormatError};
use vmdk::{Error, NewImage, OpenOptions, Sparse, check};

/// What an extent is like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Sectors of a grain.
    pub grain: u64,
    /// Entries of a table.
    pub entries: u32,
    pub redundant: bool,
    /// The tables are there from the beginning.
    pub tables: bool,
    /// Tables in memory.
    pub cache: u64,
}

impl Shape {
    /// The extent, laid out as QEMU does: header, descriptor, redundant directory and tables, directory and tables.
    pub fn image(&self, sectors: u64) -> Memory {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\
             RW {sectors} SPARSE \"x.vmdk\"\n"
        );
        let tables = sectors.div_ceil(self.grain * u64::from(self.entries));
        let directory_len = (tables * 4).div_ceil(512);
        let table_len = u64::from(self.entries * 4).div_ceil(512);
        let mut next = 3;
        let mut take = |len| {
            next += len;
            next - len
        };
        let redundant = self.redundant.then(|| (take(directory_len), take(tables * table_len)));
        let directory = (take(directory_len), take(tables * table_len));
        let end = take(0);
        let mut bytes = vec![0; usize::try_from(end * 512).unwrap()];
        put(&mut bytes, 0, b"KDMV\x01\0\0\0");
        put(&mut bytes, 8, &[if self.redundant { 3 } else { 1 }]);
        put(&mut bytes, 12, &sectors.to_le_bytes());
        put(&mut bytes, 20, &self.grain.to_le_bytes());
        put(&mut bytes, 28, &1_u64.to_le_bytes());
        put(&mut bytes, 36, &2_u64.to_le_bytes());
        put(&mut bytes, 44, &self.entries.to_le_bytes());
        put(&mut bytes, 48, &redundant.map_or(0, |r| r.0).to_le_bytes());
        put(&mut bytes, 56, &directory.0.to_le_bytes());
        put(&mut bytes, 64, &end.to_le_bytes());
        put(&mut bytes, 73, b"\n \r\n");
        put(&mut bytes, 512, text.as_bytes());
        for (directory, first) in redundant.into_iter().chain([directory]).filter(|_| self.tables) {
            for table in 0..tables {
                let place = u32::try_from(first + table * table_len).unwrap();
                put(&mut bytes, usize::try_from(directory * 512 + table * 4).unwrap(), &place.to_le_bytes());
            }
        }
        Memory::of(bytes, true)
    }
}

impl Subject for Shape {
    type Core = Sparse;

    fn create(&self, sectors: u64, _number: u8, _parent: Option<&Turns<Sparse>>) -> Memory {
        self.image(sectors)
    }

    fn open(&self, storage: &Memory, writable: bool) -> Sparse {
        let options = OpenOptions { writable, cache: self.cache * 512 };
        with_source(storage, |source| vmdk::open(source, &options)).unwrap().unwrap()
    }

    fn check(&self, storage: &Memory, resting: bool) {
        let report = with_source(storage, check::check).unwrap().unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        let core = open(storage, false).unwrap();
        assert!(!resting || !core.header().unclean);
        assert!(core.descriptor().is_some());
    }

    fn has_parents(&self) -> bool {
        false
    }
}

pub fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

pub fn open(storage: &Memory, writable: bool) -> Result<Sparse, Error> {
    let options = OpenOptions { writable, ..OpenOptions::default() };
    with_source(storage, |source| vmdk::open(source, &options)).unwrap()
}

/// The errnos of opening for reading and for writing; 0 for success.
pub fn errnos(file: &Memory) -> (i32, i32) {
    let errno = |writable| open(file, writable).map_or_else(|error| error.errno(), |_| 0);
    (errno(false), errno(true))
}

/// The errno of reading a sector; 0 for success.
pub fn reading(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, false).unwrap(), file.clone());
    image.read(sector, &mut [0; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0)
}

/// The errno of writing a sector; 0 for success.
pub fn writing(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, true).unwrap(), file.clone());
    image.write(sector, &[1; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0)
}

/// All of the disk.
pub fn contents<F: Format, S: Storage>(image: &mut Blocking<F, S>) -> Vec<u8> {
    let mut bytes = vec![0x5a; usize::try_from(image.core().sectors()).unwrap() * 512];
    image.read(0, &mut bytes, &mut nothing).unwrap();
    bytes
}

pub fn made(sectors: u64) -> Memory {
    let new = NewImage { sectors, name: "x.vmdk".into() }.build().unwrap();
    let mut memory = Memory::file();
    memory.set_len(new.len).unwrap();
    for write in &new.writes {
        memory.write_at(write.offset, &write.bytes).unwrap();
    }
    memory
}
