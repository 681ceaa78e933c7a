//! Room for new blocks: where they go and what the file needs before anything is put there.
//!
//! A file grows by many blocks at a time, and the growth is durable before any of them is used. So a block has nothing to wait
//! for when it gets its place: the room is there and reads as zeros, also after a loss of power. (A file that is longer than
//! what was written to it has a hole, or extents that the file system knows as unwritten; what other files have left there does not
//! show.) On a block device each block is filled with zeros by itself.

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
    /// In a regular file all room behind the blocks that are in use reads as zeros up to here, durably.
    ready_to: u64,
    /// Length that the file is growing to.
    growing_to: u64,
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

/// Room that is not ready yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Room {
    /// The file must grow.
    File {
        /// The unclean end to cut off first.
        trim: Option<u64>,
        /// Where the footer goes: directly before the new end.
        footer: u64,
        /// Where the old footer is.
        old_footer: Range<u64>,
    },
    /// The block, and the gap before it, has what was on the device before.
    Device(Range<u64>),
}

impl Room {
    /// How it is made ready.
    ///
    /// In a file the footer goes to the new end. Writing it grows the file in one step; the end is never a guest's data, which
    /// could pass for a footer, and other programs find the image in order after a crash.
    pub(crate) fn steps(self, footer: &RawFooter) -> Vec<Step> {
        match self {
            Self::Device(range) => vec![Step::Zero(range)],
            Self::File { trim, footer: offset, old_footer } => {
                let mut steps = Vec::with_capacity(4);
                steps.extend(trim.map(Step::Truncate));
                steps.push(Step::Write(MetaWrite { offset, bytes: footer.sealed().as_bytes().to_vec() }));
                if !old_footer.is_empty() {
                    steps.push(Step::Zero(old_footer));
                }
                steps.push(Step::Flush);
                steps
            }
        }
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
            ready_to: end_of_data,
            growing_to: size,
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

    /// Lets a writer of `block` in, reserving a place at the first time. If the file has to grow for it, it grows by so many
    /// more blocks.
    ///
    /// No data goes into a block before its room is ready: it would be lost to the zeros that a device's block is filled
    /// with, or to the truncation of a file's unclean end. A file grows for one block at a time, because the growth for one must
    /// not be undone by the slower growth for an earlier one.
    pub(crate) fn admit(
        &mut self,
        block: BlockIndex,
        layout: &Layout,
        more: u32,
    ) -> Result<Admission, Error> {
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
        let end = layout.extent(entry).end;
        if !self.regular {
            return Ok(Admission::Prepare(entry, Room::Device(start..end)));
        }
        if end <= self.ready_to {
            self.set_state(block, Preparation::Done);
            return Ok(Admission::Ready(entry));
        }
        self.growing_to = self.grown_to(end, layout, more);
        let old_footer = match self.stale_from {
            Some(_) => 0..0,
            None => self.ready_to..self.file_len.next_multiple_of(SECTOR_SIZE).max(self.ready_to),
        };
        let footer = self.growing_to.saturating_sub(SECTOR_SIZE);
        Ok(Admission::Prepare(entry, Room::File { trim: self.stale_from, footer, old_footer }))
    }

    /// Length of a file that reaches around a block that ends at `end` and so many more, with a footer behind them.
    fn grown_to(&self, end: u64, layout: &Layout, more: u32) -> u64 {
        let each = layout.footprint().next_multiple_of(4096);
        let wanted = end.saturating_add(each.saturating_mul(more.into()));
        let len = wanted.min(self.limit).max(end).saturating_add(SECTOR_SIZE);
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

    fn set_state(&mut self, block: BlockIndex, state: Preparation) {
        if let Some(reservation) = self.reserved.get_mut(&block) {
            reservation.state = state;
        }
    }

    /// The preparation of `block` has been carried out.
    pub(crate) fn prepared(&mut self, block: BlockIndex) {
        self.set_state(block, Preparation::Done);
        if self.regular {
            self.file_len = self.growing_to;
            self.ready_to = self.growing_to.saturating_sub(SECTOR_SIZE);
            self.stale_from = None;
        }
    }

    /// The preparation of `block` has failed; the next writer tries it again in the same place.
    pub(crate) fn prepare_failed(&mut self, block: BlockIndex) {
        self.set_state(block, Preparation::Needed);
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

    /// Whether this is a file, where new room reads as zeros without being written.
    pub(crate) fn is_file(&self) -> bool {
        self.regular
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

    /// Admits a block for which the file is to grow by no more than needed.
    fn admit(alloc: &mut Allocator, block: BlockIndex) -> Result<Admission, Error> {
        alloc.admit(block, &LAYOUT, 0)
    }

    fn file(room: Room) -> (Option<u64>, u64, Range<u64>) {
        match room {
            Room::File { trim, footer, old_footer } => (trim, footer, old_footer),
            Room::Device(_) => panic!("a device"),
        }
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
        let first = prepare(admit(&mut alloc, 5).unwrap());
        assert_eq!(file(first.clone()), (None, 8192, 3072..3584));
        let footer = RawFooter::from_slice(&[]);
        assert!(matches!(first.steps(&footer)[..], [Step::Write(_), Step::Zero(_), Step::Flush]));
        let mut device = Allocator::new(false, 16384, 3072, 16384 - 512);
        let room = prepare(admit(&mut device, 5).unwrap());
        assert_eq!(room.steps(&footer), [Step::Zero(3072..8192)]);
    }

    #[test]
    fn a_file_grows_by_many_blocks_which_need_no_preparation_then() {
        let mut alloc = Allocator::new(true, 3584, 3072, 3584);
        let first = prepare(alloc.admit(0, &LAYOUT, 3).unwrap());
        // Each takes 8192 bytes with the gap before it.
        assert_eq!(file(first), (None, 8192 + 3 * 8192, 3072..3584));
        assert!(matches!(alloc.admit(1, &LAYOUT, 3).unwrap(), Admission::Wait));
        alloc.prepared(0);
        for (block, entry) in [(1, 23), (2, 39), (3, 55)] {
            match alloc.admit(block, &LAYOUT, 3).unwrap() {
                Admission::Ready(found) => assert_eq!(found, entry),
                other => panic!("{other:?}"),
            }
        }
        let next = prepare(alloc.admit(4, &LAYOUT, 0).unwrap());
        assert_eq!(file(next), (None, 40960, 32768..33280));
    }

    #[test]
    fn files_grow_for_one_block_at_a_time_and_devices_prepare_several() {
        for (regular, other_waits) in [(true, true), (false, false)] {
            let mut alloc = Allocator::new(regular, 3584, 3072, 1 << 20);
            prepare(admit(&mut alloc, 0).unwrap());
            assert!(matches!(admit(&mut alloc, 0).unwrap(), Admission::Wait));
            assert_eq!(matches!(admit(&mut alloc, 1).unwrap(), Admission::Wait), other_waits);
            alloc.prepared(0);
            assert!(matches!(admit(&mut alloc, 0).unwrap(), Admission::Ready(7)));
        }
    }

    #[test]
    fn an_unclean_end_is_cut_off_by_the_first_preparation_that_succeeds() {
        let mut alloc = Allocator::new(true, 1 << 20, 3072, 1 << 20);
        assert_eq!(file(prepare(admit(&mut alloc, 0).unwrap())), (Some(3072), 8192, 0..0));
        alloc.prepare_failed(0);
        let second = prepare(admit(&mut alloc, 1).unwrap());
        assert_eq!(file(second), (Some(3072), 16384, 0..0));
        alloc.prepared(1);
        // The block that failed keeps its place, in a file that is long enough by now.
        assert!(matches!(admit(&mut alloc, 0).unwrap(), Admission::Ready(7)));
    }

    #[test]
    fn while_it_is_held_nothing_is_prepared() {
        let mut alloc = Allocator::new(true, 3584, 3072, 3584);
        prepare(admit(&mut alloc, 0).unwrap());
        assert!(!alloc.hold(), "one is under way");
        alloc.prepared(0);
        assert!(alloc.hold());
        assert!(matches!(admit(&mut alloc, 0).unwrap(), Admission::Ready(7)));
        assert!(matches!(admit(&mut alloc, 1).unwrap(), Admission::Wait));
        alloc.release_hold(0);
        prepare(admit(&mut alloc, 1).unwrap());
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
        prepare(admit(&mut failed, 0).unwrap());
        failed.prepare_failed(0);
        assert_eq!(failed.end_footer(), 8192, "behind the block that will be tried again");
    }

    #[test]
    fn data_at_the_end_of_a_file_without_footer_are_not_zeroed() {
        let mut alloc = Allocator::new(true, 8192, 8192, 0);
        assert_eq!(file(prepare(admit(&mut alloc, 0).unwrap())), (None, 16384, 8192..8192));
    }

    #[test]
    fn full_devices_and_files_of_2_tib_have_no_space() {
        let mut device = Allocator::new(false, 16384, 3072, 16384 - 512);
        prepare(admit(&mut device, 0).unwrap());
        assert!(matches!(admit(&mut device, 1), Err(Error::NoSpace { end: 8192 })));
        let mut file = Allocator::new(true, MAX_FILE, MAX_FILE - 4096, 0);
        assert!(matches!(admit(&mut file, 0), Err(Error::NoSpace { .. })));
    }
}
