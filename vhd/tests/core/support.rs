//! VHDs in memory, for the tests that all formats share and for some of our own.

use format::blocking::{Storage, with_source};
use format::testing::{Memory, Op, SECTOR, Subject, Turns};
use vhd::check::{self, CheckOptions, Verdict};
use vhd::header::DEFAULT_BLOCK_SIZE;
use vhd::key::Key;
use vhd::{DiskType, Error, NewImage, NewParent, OpenOptions, Uuid, Vhd, bitmap};

/// What kind of image to make.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Children are differencing images of their own accord.
    pub kind: DiskType,
    pub block_size: u32,
    /// Sectors that the disk can grow to; 0 for no more than it has.
    pub max_sectors: u64,
    pub regular: bool,
    pub encrypted: bool,
    /// Single sectors are noted where whole blocks would do.
    pub precise: bool,
    /// Nothing has ever stopped or failed: sectors that no bit marks are zeros.
    pub pristine: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            kind: DiskType::Dynamic,
            block_size: DEFAULT_BLOCK_SIZE,
            max_sectors: 0,
            regular: true,
            encrypted: false,
            precise: false,
            pristine: false,
        }
    }
}

impl Shape {
    /// A storage with a new image; a device is full of old data around it.
    pub fn image(&self, sectors: u64, number: u8, parent: Option<NewParent>) -> Memory {
        let image = NewImage {
            kind: if parent.is_some() { DiskType::Differencing } else { self.kind },
            size: sectors * 512,
            max_size: self.max_sectors * 512,
            block_size: self.block_size,
            uuid: Uuid([number; 16]),
            timestamp: 1,
            parent,
            key: self.key().map(|key| key.hash([number; 32])),
        };
        let blocks = (sectors.max(self.max_sectors) * 512).div_ceil(u64::from(self.block_size));
        let room = blocks * (u64::from(self.block_size) + 8192) + (1 << 16);
        let bytes = image.build((!self.regular).then_some(room)).unwrap();
        let filler = if self.regular || self.kind == DiskType::Fixed { 0 } else { 0xa5 };
        let mut store = Memory::of(vec![filler; usize::try_from(bytes.len).unwrap()], self.regular);
        for write in bytes.writes {
            store.apply(&Op::Write(write.offset, write.bytes));
        }
        store
    }

    fn key(&self) -> Option<Key> {
        self.encrypted.then(|| Key::new(vec![7; 32]).unwrap())
    }
}

/// Opens an image.
pub fn open(store: &Memory, options: &OpenOptions) -> Result<Vhd, Error> {
    with_source(store, |source| Vhd::open(source, options)).unwrap()
}

impl Subject for Shape {
    type Core = Vhd;

    fn create(&self, sectors: u64, number: u8, parent: Option<&Turns<Vhd>>) -> Memory {
        let parent = parent.map(|parent| NewParent {
            uuid: parent.image.core().uuid(),
            timestamp: 1,
            name: "p.vhd".into(),
            path: "./p.vhd".into(),
        });
        self.image(sectors, number, parent)
    }

    fn open(&self, storage: &Memory, writable: bool) -> Vhd {
        open(
            storage,
            &OpenOptions { writable, precise: self.precise, key: self.key(), ..OpenOptions::default() },
        )
        .unwrap()
    }

    fn check(&self, storage: &Memory, resting: bool) {
        let (size, regular) = (storage.size().unwrap(), storage.regular);
        let mut read = |offset: u64, buf: &mut [u8]| storage.read_at(offset, buf);
        let mut source = format::Source { size, regular, read: &mut read };
        let options =
            CheckOptions { ignore_footer: !resting, bitmaps: true, now: u32::MAX, ..CheckOptions::default() };
        match check::check(&mut source, &options).unwrap() {
            Verdict::Fixed => {}
            Verdict::Valid(vhd) => {
                if resting {
                    assert!(!vhd.was_unclean());
                }
                if self.pristine {
                    unmarked_are_zeros(&vhd, storage);
                }
            }
            // The two parts of the batmap may be of different ages; it is not used then. A growth that was cut short has
            // changed one of the footers.
            Verdict::Invalid(reason)
                if !resting
                    && (reason == "batmap is invalid: invalid checksum"
                        || reason == "primary and backup footers do not match") => {}
            Verdict::Invalid(reason) => panic!("{reason}"),
        }
    }

    fn grows_to(&self, sectors: u64) -> u64 {
        sectors.max(self.max_sectors)
    }
}

/// Sectors that no bit marks are zeros on disk.
fn unmarked_are_zeros(vhd: &Vhd, storage: &Memory) {
    let sectors = vhd.block_sectors();
    for block in 0..vhd.blocks() {
        let Some(entry) = vhd.block_entry(block) else { continue };
        let bits = entry as usize * SECTOR;
        let data = bits + (sectors.div_ceil(8) as usize).next_multiple_of(SECTOR);
        for sector in (0..sectors).filter(|&sector| !bitmap::get(&storage.bytes[bits..data], sector)) {
            let at = data + sector as usize * SECTOR;
            assert!(storage.bytes[at..at + SECTOR].iter().all(|&b| b == 0), "block {block} sector {sector}");
        }
    }
}
