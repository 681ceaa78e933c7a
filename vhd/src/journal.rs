//! The undo journal of a resize, in the layout of XenServer's libvhd (`vhd/lib/libvhd-journal.c`): either program can undo
//! what the other has left.
//!
//! The journal has what the image held in all places that are about to change. Between "all of it is durable" and "the change
//! is durable" the image's footers carry the poison cookie, so that nobody uses it; writing everything back makes it what it
//! was. All numbers are big-endian, but for the one that libvhd forgets to turn round.

use format::SECTOR_SIZE;
use format::blocking::Storage;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::byteorder::little_endian;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::footer::{self, DiskType, FooterFault, RawFooter};
use crate::{Error, Uuid};

/// Length of the journal's header in bytes.
pub const HEADER_LEN: u64 = 512;
const COOKIE: [u8; 8] = *b"vjournal";
const ENTRY_COOKIE: u64 = 0xaaaa_1234_4321_aaaa;

/// The header of a journal as it lies on disk.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawJournal {
    cookie: [u8; 8],
    /// The image's.
    uuid: Uuid,
    /// Where the footer at the end of the image was.
    footer_offset: U64,
    data_entries: U32,
    metadata_entries: U32,
    data_offset: U64,
    metadata_offset: U64,
    /// First byte behind the last entry: libvhd writes it in the order of its machine, an x86.
    end: little_endian::U64,
    reserved: [u8; 448],
}

/// What stands before each part of the image in a journal.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    cookie: U64,
    kind: U32,
    /// Bytes of the part.
    size: U32,
    /// Where in the image it was.
    offset: U64,
    /// One's complement of the sum of all other bytes of entry and part.
    checksum: U32,
    reserved: [u8; 4],
}

impl RawEntry {
    fn expected_checksum(&self, part: &[u8]) -> u32 {
        let mut copy = self.clone();
        copy.checksum = 0.into();
        // The complement of a sum of two is what is missing from the complement of the other.
        let sums = [copy.as_bytes(), part].map(|bytes| !crate::checksum(bytes));
        !sums.into_iter().fold(0, u32::wrapping_add)
    }
}

/// What a part of the image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    EndFooter = 1,
    FooterCopy = 2,
    Header = 3,
    Locator = 4,
    Table = 5,
    BatmapHeader = 6,
    Batmap = 7,
    Data = 8,
}

impl Kind {
    fn from_raw(raw: u32) -> Option<Self> {
        use Kind::{Batmap, BatmapHeader, Data, EndFooter, FooterCopy, Header, Locator, Table};
        [EndFooter, FooterCopy, Header, Locator, Table, BatmapHeader, Batmap, Data]
            .into_iter()
            .find(|kind| *kind as u32 == raw)
    }
}

/// A journal in the making, in memory: it is about as long as what the image's metadata grow by. Metadata come first, then data.
#[derive(Debug)]
pub(crate) struct Builder {
    header: RawJournal,
    bytes: Vec<u8>,
}

impl Builder {
    /// A journal for the image with this identifier, whose footer at the end is at byte `footer_offset`.
    pub(crate) fn new(uuid: Uuid, footer_offset: u64) -> Self {
        let mut header = RawJournal::new_zeroed();
        header.cookie = COOKIE;
        header.uuid = uuid;
        header.footer_offset = footer_offset.into();
        header.metadata_offset = HEADER_LEN.into();
        Self { bytes: header.as_bytes().to_vec(), header }
    }

    /// Notes that the image has these bytes, whole sectors, at this offset.
    pub(crate) fn add(&mut self, kind: Kind, offset: u64, part: &[u8]) {
        let mut entry = RawEntry::new_zeroed();
        entry.cookie = ENTRY_COOKIE.into();
        entry.kind = (kind as u32).into();
        entry.size = u32::try_from(part.len()).unwrap_or(u32::MAX).into();
        entry.offset = offset.into();
        entry.checksum = entry.expected_checksum(part).into();
        self.bytes.extend_from_slice(entry.as_bytes());
        self.bytes.extend_from_slice(part);
        let end = self.bytes.len() as u64;
        if kind == Kind::Data {
            self.header.data_entries = self.header.data_entries.get().saturating_add(1).into();
        } else {
            self.header.metadata_entries = self.header.metadata_entries.get().saturating_add(1).into();
            // libvhd expects data right behind the metadata, even if there are none.
            self.header.data_offset = end.into();
        }
        self.header.end = end.into();
    }

    /// Writes the journal and makes it durable; its name is the caller's business.
    pub(crate) fn write<J: Storage>(mut self, journal: &mut J) -> Result<(), Error> {
        for (to, from) in self.bytes.iter_mut().zip(self.header.as_bytes()) {
            *to = *from;
        }
        let len = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(len, 0);
        journal.write_at(0, &self.bytes).and_then(|()| journal.sync()).map_err(unwritten)
    }
}

/// Ends a journal that is not needed any more, where it cannot be removed.
pub(crate) fn void<J: Storage>(journal: &mut J) -> Result<(), Error> {
    journal.zero(0..HEADER_LEN).and_then(|()| journal.sync()).map_err(unwritten)
}

fn unwritten(source: std::io::Error) -> Error {
    Error::Unwritten { what: "journal", source }
}

/// A journal that was read and found in order.
#[derive(Debug)]
pub struct Journal {
    uuid: Uuid,
    kind: DiskType,
    footer_offset: u64,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    kind: Kind,
    /// Byte offset in the image.
    offset: u64,
    bytes: Vec<u8>,
}

impl Part {
    /// First byte behind it in the image.
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.bytes.len() as u64)
    }
}

/// What an image is to a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The change was cut short: it is to be undone.
    Interrupted,
    /// The change has not begun or is complete: there is nothing to undo.
    Whole,
}

impl Journal {
    /// Reads and checks a journal.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] for all that is wrong with it.
    pub fn read<J: Storage>(journal: &J) -> Result<Self, Error> {
        let size = journal.size().map_err(|source| unread(0, source))?;
        let header: RawJournal = crate::from_prefix(&read(journal, 0, HEADER_LEN, size)?);
        let end = header.end.get();
        if header.cookie != COOKIE || end < HEADER_LEN || end > size {
            return Err(invalid("it has no journal's header"));
        }
        let len = usize::try_from(end).map_err(|_| invalid("it does not fit into memory"))?;
        let bytes = read(journal, 0, end.next_multiple_of(SECTOR_SIZE).min(size), size)?;
        let mut rest = bytes.get(size_of::<RawJournal>()..len).unwrap_or_default();
        let mut parts = Vec::new();
        while !rest.is_empty() {
            let part;
            (part, rest) = split_entry(rest)?;
            parts.push(part);
        }
        let counted =
            u64::from(header.data_entries.get()).saturating_add(header.metadata_entries.get().into());
        if counted != parts.len() as u64 {
            return Err(invalid("it has not as many entries as its header says"));
        }
        let footer_offset = header.footer_offset.get();
        let kind = check_parts(&parts, header.uuid, footer_offset)?;
        Ok(Self { uuid: header.uuid, kind, footer_offset, parts })
    }

    /// Compares the journal with the footers of an image.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Invalid`] if it is not this image's journal.
    pub fn state<I: Storage>(&self, image: &I) -> Result<State, Error> {
        let size = image.size().map_err(|source| unread(0, source))?;
        let last = size.checked_sub(footer::LEN as u64).ok_or(Error::TooShort { size })?;
        let footer_at = |offset| -> Result<RawFooter, Error> {
            Ok(RawFooter::from_slice(&read(image, offset, footer::LEN as u64, size)?))
        };
        let mut footers = vec![footer_at(last)?];
        // The beginning of a fixed image is its guest's.
        if self.kind != DiskType::Fixed {
            footers.push(footer_at(0)?);
        }
        let states = footers.iter().filter(|footer| footer.uuid == self.uuid).map(RawFooter::verify);
        let known = states.filter(|state| matches!(state, Ok(()) | Err(FooterFault::Poisoned)));
        match known.collect::<Vec<_>>()[..] {
            // While a fixed image grows its end may have no footer at all.
            [] if self.kind == DiskType::Fixed && footers.iter().all(|footer| footer.verify().is_err()) => {
                Ok(State::Interrupted)
            }
            [] => Err(invalid("it belongs to another image")),
            ref known if known.iter().all(Result::is_ok) => Ok(State::Whole),
            _ => Ok(State::Interrupted),
        }
    }

    /// Writes everything back. The image stays unusable until all of it is durable; this can be cut short and begun again.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Unwritten`].
    pub fn undo<I: Storage>(&self, image: &mut I) -> Result<(), Error> {
        let is_footer = |part: &&Part| matches!(part.kind, Kind::EndFooter | Kind::FooterCopy);
        for part in self.parts.iter().filter(|part| !is_footer(part)) {
            image.write_at(part.offset, &part.bytes).map_err(unrestored)?;
        }
        image.sync().map_err(unrestored)?;
        // The image may have been stopped when only the footer at its end was still poisoned: so that is the last to be good.
        for kind in [Kind::FooterCopy, Kind::EndFooter] {
            for part in self.parts.iter().filter(|part| part.kind == kind) {
                image.write_at(part.offset, &part.bytes).map_err(unrestored)?;
            }
            image.sync().map_err(unrestored)?;
        }
        if image.is_regular().map_err(unrestored)? {
            image.set_len(self.footer_offset.saturating_add(footer::LEN as u64)).map_err(unrestored)?;
            image.sync().map_err(unrestored)?;
        }
        Ok(())
    }
}

fn unrestored(source: std::io::Error) -> Error {
    Error::Unwritten { what: "image", source }
}

fn unread(offset: u64, source: std::io::Error) -> Error {
    Error::Io { what: "journal or image", offset, source }
}

fn invalid(reason: &str) -> Error {
    Error::invalid("journal", reason)
}

/// Bytes of a storage of `size` bytes, so that no length in a journal takes more memory than it is long.
fn read<S: Storage>(storage: &S, offset: u64, len: u64, size: u64) -> Result<Vec<u8>, Error> {
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(invalid("it ends too early"));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| invalid("it does not fit into memory"))?];
    storage.read_at(offset, &mut bytes).map_err(|source| unread(offset, source))?;
    Ok(bytes)
}

/// The first entry of some, with its part, and the other entries.
fn split_entry(entries: &[u8]) -> Result<(Part, &[u8]), Error> {
    let early = || invalid("it ends within an entry");
    let (head, rest) = entries.split_at_checked(size_of::<RawEntry>()).ok_or_else(early)?;
    let entry: RawEntry = crate::from_prefix(head);
    let kind = Kind::from_raw(entry.kind.get()).filter(|_| entry.cookie.get() == ENTRY_COOKIE);
    let kind = kind.ok_or_else(|| invalid("an entry is of no known kind"))?;
    let size = entry.size.get();
    if size == 0 || !u64::from(size).is_multiple_of(SECTOR_SIZE) {
        return Err(invalid("the length of an entry is out of bounds"));
    }
    let (bytes, rest) = rest.split_at_checked(size as usize).ok_or_else(early)?;
    if entry.checksum.get() != entry.expected_checksum(bytes) {
        return Err(invalid("the checksum of an entry is wrong"));
    }
    Ok((Part { kind, offset: entry.offset.get(), bytes: bytes.to_vec() }, rest))
}

/// Checks that the parts are those of the image with this identifier that had its end here; returns what kind of image.
fn check_parts(parts: &[Part], uuid: Uuid, footer_offset: u64) -> Result<DiskType, Error> {
    let end =
        footer_offset.checked_add(footer::LEN as u64).ok_or_else(|| invalid("the image's end is nowhere"))?;
    let mut kinds = Vec::new();
    for part in parts {
        if part.end().is_none_or(|place| place > end) || !part.offset.is_multiple_of(SECTOR_SIZE) {
            return Err(invalid("an entry lies outside the image"));
        }
        let expected = match part.kind {
            Kind::EndFooter => footer_offset,
            Kind::FooterCopy => 0,
            _ => continue,
        };
        let footer = RawFooter::from_slice(&part.bytes);
        let good = footer.verify().is_ok() && footer.uuid == uuid && part.bytes.len() == footer::LEN;
        let kind = DiskType::from_raw(footer.disk_type.get()).filter(|_| good && part.offset == expected);
        kinds.push((part.kind, kind.ok_or_else(|| invalid("a footer in it is not the image's"))?));
    }
    match kinds[..] {
        [(Kind::EndFooter, DiskType::Fixed)] => Ok(DiskType::Fixed),
        [(Kind::EndFooter, end), (Kind::FooterCopy, copy)] if end == copy && end != DiskType::Fixed => {
            Ok(end)
        }
        _ => Err(invalid("it has not the footers of one image")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use format::testing::Memory;

    const UUID: Uuid = Uuid([5; 16]);

    fn footer(kind: DiskType) -> RawFooter {
        RawFooter::new(kind, 1 << 20, UUID, 1)
    }

    /// A journal of a dynamic image of three sectors, of which the second is data.
    fn journal() -> Memory {
        let mut memory = Memory::file();
        let mut builder = Builder::new(UUID, 1024);
        let footer = footer(DiskType::Dynamic);
        builder.add(Kind::EndFooter, 1024, footer.as_bytes());
        builder.add(Kind::FooterCopy, 0, footer.as_bytes());
        builder.add(Kind::Data, 512, &[7; 512]);
        builder.write(&mut memory).unwrap();
        memory
    }

    fn poisoned() -> Vec<u8> {
        let mut footer = footer(DiskType::Dynamic);
        footer.cookie = footer::POISON;
        footer.sealed().as_bytes().to_vec()
    }

    #[test]
    fn the_layout_is_that_of_libvhd() {
        assert_eq!((size_of::<RawJournal>(), size_of::<RawEntry>()), (512, 32));
        let bytes = journal().bytes;
        assert_eq!(&bytes[..8], b"vjournal");
        assert_eq!(&bytes[24..32], &1024_u64.to_be_bytes());
        assert_eq!((&bytes[32..36], &bytes[36..40]), (&1_u32.to_be_bytes()[..], &2_u32.to_be_bytes()[..]));
        // Behind two entries of 32 + 512 bytes.
        assert_eq!(&bytes[40..48], &1600_u64.to_be_bytes());
        assert_eq!(&bytes[48..56], &512_u64.to_be_bytes());
        assert_eq!(&bytes[56..64], &2144_u64.to_le_bytes());
        assert_eq!(&bytes[512..520], &0xaaaa_1234_4321_aaaa_u64.to_be_bytes());
        let sum = bytes[512..512 + 24].iter().chain(&bytes[544..1056]).map(|&b| u32::from(b)).sum::<u32>();
        assert_eq!(&bytes[536..540], &(!sum).to_be_bytes());
    }

    #[test]
    fn everything_is_written_back() {
        let memory = journal();
        let journal = Journal::read(&memory).unwrap();
        let mut image = Memory::of([poisoned(), vec![1; 4096], poisoned()].concat(), true);
        assert_eq!(journal.state(&image).unwrap(), State::Interrupted);
        journal.undo(&mut image).unwrap();
        let good = footer(DiskType::Dynamic).as_bytes().to_vec();
        assert_eq!(image.bytes, [good.clone(), vec![7; 512], good].concat());
        assert_eq!(journal.state(&image).unwrap(), State::Whole);
    }

    fn errno<T>(result: Result<T, Error>) -> i32 {
        result.map_or_else(|error| error.errno(), |_| 0)
    }

    #[test]
    fn m28_a_journal_that_is_not_in_order_is_refused() {
        let good = journal();
        for byte in (0..2144).filter(|byte| !(64..512).contains(byte) && !(40..56).contains(byte)) {
            let mut bad = good.clone();
            bad.bytes[byte] ^= 0x40;
            assert_eq!(errno(Journal::read(&bad)), libc::EINVAL, "byte {byte}");
        }
        for sectors in 0..good.bytes.len() / 512 {
            let short = Memory::of(good.bytes[..sectors * 512].to_vec(), true);
            assert_eq!(errno(Journal::read(&short)), libc::EINVAL, "{sectors} sectors");
        }
        let outside = |offset| {
            let mut memory = Memory::file();
            let mut builder = Builder::new(UUID, 1024);
            builder.add(Kind::EndFooter, 1024, footer(DiskType::Fixed).as_bytes());
            builder.add(Kind::Data, offset, &[7; 512]);
            builder.write(&mut memory).unwrap();
            Journal::read(&memory)
        };
        assert!(outside(1024).is_ok());
        for offset in [1536, 100, u64::MAX - 511, 1 << 60] {
            assert_eq!(errno(outside(offset)), libc::EINVAL, "{offset}");
        }
        // Of another image.
        let mut other = footer(DiskType::Dynamic);
        other.uuid = Uuid([6; 16]);
        let image =
            Memory::of([other.sealed().as_bytes(), &[0; 512], other.sealed().as_bytes()].concat(), true);
        assert_eq!(errno(Journal::read(&good).unwrap().state(&image)), libc::EINVAL);
    }
}
