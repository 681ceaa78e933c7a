//! Room for new blocks: where they go and what the file needs before anything is put there.

use std::collections::BTreeMap;
use std::ops::Range;

use format::{MetaWrite, Step};
use zerocopy::IntoBytes;

use crate::bat::Layout;
use crate::footer::RawFooter;
use crate::{BlockIndex, Error, SECTOR_SIZE};

/// First byte that no block may reach, so that all sector numbers in a file fit into the table's 32 bits.
pub(crate) const MAX_FILE: u64 = u32::MAX as u64 * SECTOR_SIZE;

/// Places for blocks that are not in the table yet.
#[derive(Debug)]
pub(crate) struct Allocator {
    regular: bool,
    /// First byte that new blocks must not reach.
    limit: u64,
    /// First byte behind all blocks, those of the table and reserved ones.
    next: u64,
    /// Length of the file once all finished preparations count; of a device, always the same.
    file_len: u64,
    /// A regular file has bytes of an unclean end from here on, and nothing else.
    stale_from: Option<u64>,
    /// No preparation may begin.
    held: bool,
    reserved: BTreeMap<BlockIndex, Reservation>,
}

#[derive(Debug)]
struct Reservation {
    entry: u32,
    /// Where the gap before the block's bitmap begins.
    start: u64,
    state: Preparation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preparation {
    Needed,
    Running,
    Done,
}

/// What a writer of a block that is not in the table has to do.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Wait until a preparation has ended.
    Wait,
    /// Make the room ready, then write at the block of this entry.
    Prepare(u32, Room),
    /// Write at the block of this entry.
    Ready(u32),
}

/// The room of a new block, not ready yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Room {
    /// Byte range to be filled with zeros: the gap before the bitmap, where an old footer may be, and the bitmap.
    zero: Range<u64>,
    /// Byte range of the data. It must read as zeros: on a block device it has to be zeroed, in a file it is new.
    body: Range<u64>,
    /// In a file: the unclean end to cut off first.
    trim: Option<u64>,
    /// In a file: where to put a footer.
    footer: Option<u64>,
}

impl Room {
    /// How it is made ready.
    ///
    /// In a file the footer goes to the new end. Writing it grows the file in one step, far enough for every block; the end is
    /// never a guest's data, which could pass for a footer, and other programs find the image in order after a crash.
    pub(crate) fn steps(self, footer: &RawFooter) -> Vec<Step> {
        let mut steps = Vec::with_capacity(3);
        steps.extend(self.trim.map(Step::Truncate));
        steps.push(match self.footer {
            Some(offset) => Step::Write(MetaWrite { offset, bytes: footer.sealed().as_bytes().to_vec() }),
            // Whatever was on the device before must not show through.
            None => Step::Zero(self.body),
        });
        steps.push(Step::Zero(self.zero));
        steps
    }
}

impl Allocator {
    pub(crate) fn new(regular: bool, size: u64, end_of_data: u64, device_limit: u64) -> Self {
        // The footer at the end of a clean file is overwritten by the first new block's bitmap.
        let footer_end = end_of_data.saturating_add(SECTOR_SIZE);
        Self {
            regular,
            limit: if regular { MAX_FILE } else { device_limit.min(MAX_FILE) },
            next: end_of_data,
            file_len: size,
            stale_from: (regular && size > footer_end).then_some(end_of_data),
            held: false,
            reserved: BTreeMap::new(),
        }
    }

    /// Lets no preparation begin until [`Allocator::release_hold`]; returns whether none is under way.
    pub(crate) fn hold(&mut self) -> bool {
        self.held = true;
        self.reserved.values().all(|reservation| reservation.state != Preparation::Running)
    }

    /// Preparations may begin again. The storage ends at `end` at least by now.
    pub(crate) fn release_hold(&mut self, end: u64) {
        self.held = false;
        if self.regular {
            self.file_len = self.file_len.max(end);
        }
    }

    /// Byte offset for a footer at the end of the storage, while none is being prepared. A file that ends with data, or within
    /// the room of a block that is to be prepared again, gets longer by it.
    pub(crate) fn end_footer(&self) -> u64 {
        let last = self.file_len.saturating_sub(1) & !SECTOR_SIZE.saturating_sub(1);
        if self.regular { last.max(self.next) } else { last }
    }

    /// Lets a writer of `block` in, reserving a place at the first time.
    ///
    /// No data goes into a block before its preparation has ended: it would be lost to the zeros that a device's block is
    /// filled with, or to the truncation of a file's unclean end. In a file preparations run one at a time, because the
    /// growth for one block must not be undone by the slower growth for an earlier one.
    pub(crate) fn admit(&mut self, block: BlockIndex, layout: &Layout) -> Result<Admission, Error> {
        match self.reserved.get(&block).map(|reservation| (reservation.state, reservation.entry)) {
            Some((Preparation::Done, entry)) => return Ok(Admission::Ready(entry)),
            Some((Preparation::Running, _)) => return Ok(Admission::Wait),
            Some((Preparation::Needed, _)) | None => {}
        }
        if self.held {
            return Ok(Admission::Wait);
        }
        if self.regular && self.reserved.values().any(|other| other.state == Preparation::Running) {
            return Ok(Admission::Wait);
        }
        let (entry, start) = match self.reserved.get_mut(&block) {
            Some(reservation) => {
                reservation.state = Preparation::Running;
                (reservation.entry, reservation.start)
            }
            None => self.reserve(block, layout)?,
        };
        let extent = layout.extent(entry);
        Ok(Admission::Prepare(
            entry,
            Room {
                zero: start..extent.data,
                body: extent.data..extent.end,
                trim: self.stale_from,
                footer: self.regular.then(|| self.grown_to(extent.end).saturating_sub(SECTOR_SIZE)),
            },
        ))
    }

    /// Length of a file that reaches around a block that ends at `end`, with a footer behind it.
    fn grown_to(&self, end: u64) -> u64 {
        let len = end.saturating_add(SECTOR_SIZE);
        if self.stale_from.is_some() { len } else { self.file_len.max(len) }
    }

    fn reserve(&mut self, block: BlockIndex, layout: &Layout) -> Result<(u32, u64), Error> {
        let full = Error::NoSpace { end: self.next };
        let start = self.next;
        let (entry, end) = place(start, layout).filter(|&(_, end)| end <= self.limit).ok_or(full)?;
        self.next = end;
        self.reserved.insert(block, Reservation { entry, start, state: Preparation::Running });
        Ok((entry, start))
    }

    /// The preparation of `block` has been carried out.
    pub(crate) fn prepared(&mut self, block: BlockIndex, layout: &Layout) {
        if let Some(reservation) = self.reserved.get_mut(&block) {
            reservation.state = Preparation::Done;
            let end = layout.extent(reservation.entry).end;
            if !self.regular {
                return;
            }
            self.file_len = self.grown_to(end);
            self.stale_from = None;
        }
    }

    /// The preparation of `block` has failed; the next writer tries it again in the same place.
    pub(crate) fn prepare_failed(&mut self, block: BlockIndex) {
        if let Some(reservation) = self.reserved.get_mut(&block) {
            reservation.state = Preparation::Needed;
        }
    }

    /// The place of a block that may go into the table.
    pub(crate) fn prepared_entry(&self, block: BlockIndex) -> Option<u32> {
        let reservation = self.reserved.get(&block)?;
        (reservation.state == Preparation::Done).then_some(reservation.entry)
    }

    /// The block is in the table now.
    pub(crate) fn release(&mut self, block: BlockIndex) {
        self.reserved.remove(&block);
    }

    /// On a device, the byte offset of the footer at its end.
    pub(crate) fn device_footer(&self) -> Option<u64> {
        (!self.regular).then(|| self.file_len.saturating_sub(SECTOR_SIZE))
    }

    /// True if a place behind the table's blocks was ever given out.
    pub(crate) fn used(&self, end_of_data_at_open: u64) -> bool {
        self.next != end_of_data_at_open
    }
}

/// The entry of a block placed at or behind byte `start`, and the first byte behind it. The data begin at a multiple of
/// 4096 bytes, as blktap and Hyper-V place them, which wastes a gap before the bitmap.
pub(crate) fn place(start: u64, layout: &Layout) -> Option<(u32, u64)> {
    let bitmap_sectors = u64::from(layout.bitmap_sectors);
    let data = start.div_ceil(SECTOR_SIZE).checked_add(bitmap_sectors)?.checked_next_multiple_of(8)?;
    let entry = u32::try_from(data.checked_sub(bitmap_sectors)?).ok()?;
    let end = data.checked_add(layout.block_sectors.into())?.checked_mul(SECTOR_SIZE)?;
    Some((entry, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { block_sectors: 8, bitmap_sectors: 1, table_offset: 1536, end_of_headers: 3072 };

    fn prepare(admission: Admission) -> Room {
        match admission {
            Admission::Prepare(_, room) => room,
            other => panic!("{other:?}"),
        }
    }

    fn footer_at(room: &Room) -> u64 {
        room.footer.unwrap()
    }

    #[test]
    fn blocks_are_placed_with_their_data_at_a_page() {
        assert_eq!(place(3072, &LAYOUT), Some((7, 8192)));
        assert_eq!(place(4608, &LAYOUT), Some((15, 12288)));
        assert_eq!(place(u64::MAX, &LAYOUT), None);
    }

    #[test]
    fn the_old_footer_is_zeroed_and_the_file_grows() {
        let mut alloc = Allocator::new(true, 3584, 3072, 3584);
        let first = prepare(alloc.admit(5, &LAYOUT).unwrap());
        assert_eq!((first.trim, footer_at(&first)), (None, 8192));
        assert_eq!((first.zero, first.body), (3072..4096, 4096..8192));
    }

    #[test]
    fn files_prepare_one_block_at_a_time_and_devices_several() {
        for (regular, other_waits) in [(true, true), (false, false)] {
            let mut alloc = Allocator::new(regular, 1 << 20, 3072, 1 << 20);
            prepare(alloc.admit(0, &LAYOUT).unwrap());
            assert!(matches!(alloc.admit(0, &LAYOUT).unwrap(), Admission::Wait));
            assert_eq!(matches!(alloc.admit(1, &LAYOUT).unwrap(), Admission::Wait), other_waits);
            alloc.prepared(0, &LAYOUT);
            assert!(matches!(alloc.admit(0, &LAYOUT).unwrap(), Admission::Ready(7)));
        }
    }

    #[test]
    fn an_unclean_end_is_cut_off_by_the_first_preparation_that_succeeds() {
        let mut alloc = Allocator::new(true, 1 << 20, 3072, 1 << 20);
        assert_eq!(prepare(alloc.admit(0, &LAYOUT).unwrap()).trim, Some(3072));
        alloc.prepare_failed(0);
        let second = prepare(alloc.admit(1, &LAYOUT).unwrap());
        assert_eq!((second.trim, footer_at(&second)), (Some(3072), 16384));
        alloc.prepared(1, &LAYOUT);
        // The block that failed keeps its place, in a file that is long enough by now.
        let retry = prepare(alloc.admit(0, &LAYOUT).unwrap());
        assert_eq!((retry.trim, footer_at(&retry), retry.body), (None, 16384, 4096..8192));
    }

    #[test]
    fn while_it_is_held_nothing_is_prepared() {
        let mut alloc = Allocator::new(true, 3584, 3072, 3584);
        prepare(alloc.admit(0, &LAYOUT).unwrap());
        assert!(!alloc.hold(), "one is under way");
        alloc.prepared(0, &LAYOUT);
        assert!(alloc.hold());
        assert!(matches!(alloc.admit(0, &LAYOUT).unwrap(), Admission::Ready(7)));
        assert!(matches!(alloc.admit(1, &LAYOUT).unwrap(), Admission::Wait));
        alloc.release_hold(0);
        prepare(alloc.admit(1, &LAYOUT).unwrap());
    }

    #[test]
    fn the_footer_at_the_end_is_found_and_never_among_data() {
        // Clean, early Virtual PC's short footer, a gap before the footer, a device.
        for (size, regular, offset) in
            [(3584, true, 3072), (3583, true, 3072), (8192, true, 7680), (8192, false, 7680)]
        {
            assert_eq!(Allocator::new(regular, size, 3072, size).end_footer(), offset);
        }
        assert_eq!(Allocator::new(true, 8192, 8192, 0).end_footer(), 8192, "no footer, only data");
        let mut failed = Allocator::new(true, 3584, 3072, 3584);
        prepare(failed.admit(0, &LAYOUT).unwrap());
        failed.prepare_failed(0);
        assert_eq!(failed.end_footer(), 8192, "behind the block that will be tried again");
    }

    #[test]
    fn full_devices_and_files_of_2_tib_have_no_space() {
        let mut device = Allocator::new(false, 16384, 3072, 16384 - 512);
        prepare(device.admit(0, &LAYOUT).unwrap());
        assert!(matches!(device.admit(1, &LAYOUT), Err(Error::NoSpace { end: 8192 })));
        let mut file = Allocator::new(true, MAX_FILE, MAX_FILE - 4096, 0);
        assert!(matches!(file.admit(0, &LAYOUT), Err(Error::NoSpace { .. })));
    }
}
