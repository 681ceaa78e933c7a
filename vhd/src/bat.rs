//! The block allocation table: for every block the sector of its bitmap, which its data follow.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U32;

use crate::{BlockIndex, Error};

/// The entry of a block that is not allocated.
pub const UNUSED: u32 = u32::MAX;
/// Entries in one sector of the table.
pub const PER_SECTOR: u32 = 128;
/// Most entries that are read: 64 MiB of table, enough for 2 TiB in blocks of 128 KiB.
pub const MAX_ENTRIES: u32 = 16 << 20;

/// Where the parts of a dynamic image lie. Everything is checked against the file when it is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Sectors of a block's data, a power of two.
    pub(crate) block_sectors: u32,
    /// Sectors of a block's bitmap.
    pub(crate) bitmap_sectors: u32,
    /// Byte offset of the table.
    pub(crate) table_offset: u64,
    /// First byte that a block may use.
    pub(crate) end_of_headers: u64,
}

impl Layout {
    pub(crate) fn bitmap_bytes(&self) -> u32 {
        self.bitmap_sectors.saturating_mul(512)
    }

    /// Bytes of a block with its bitmap.
    pub(crate) fn footprint(&self) -> u64 {
        u64::from(self.bitmap_sectors).saturating_add(u64::from(self.block_sectors)).saturating_mul(512)
    }

    /// The block with its bitmap at the sector `entry`.
    pub(crate) fn extent(&self, entry: u32) -> Extent {
        let bitmap = u64::from(entry).saturating_mul(512);
        Extent {
            bitmap,
            data: bitmap.saturating_add(self.bitmap_bytes().into()),
            end: bitmap.saturating_add(self.footprint()),
        }
    }
}

/// Byte offsets of an allocated block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) bitmap: u64,
    pub(crate) data: u64,
    pub(crate) end: u64,
}

/// The table of an open image, as far as its disk reaches, filled up to a whole sector with what the disk has there:
/// those entries belong to nobody, and programs differ in what they put in, so they go back unchanged.
#[derive(Debug)]
pub(crate) struct Bat {
    table: Vec<U32>,
    entries: u32,
}

impl Bat {
    /// A table of `entries` entries at the beginning of `table`, which is whole sectors.
    pub(crate) fn new(table: Vec<U32>, entries: u32) -> Self {
        Self { table, entries }
    }

    /// The same table for a disk of fewer blocks.
    pub(crate) fn truncated(mut self, entries: u32) -> Self {
        self.entries = self.entries.min(entries);
        let keep = entries.next_multiple_of(PER_SECTOR);
        self.table.truncate(usize::try_from(keep).unwrap_or(usize::MAX));
        self
    }

    /// Makes all entries up to `entries` unused that are not the disk's. They become its own by [`Bat::set_entries`]; until
    /// then they are on their way to disk.
    pub(crate) fn make_room(&mut self, entries: u32) {
        let len = usize::try_from(entries.next_multiple_of(PER_SECTOR)).unwrap_or(usize::MAX);
        self.table.resize(self.table.len().max(len), UNUSED.into());
        for block in self.entries..entries {
            self.set(block, UNUSED);
        }
    }

    /// From now on the disk has this many blocks.
    pub(crate) fn set_entries(&mut self, entries: u32) {
        self.entries = entries;
    }

    /// The bytes behind the last entry that belong to nobody, up to the end of its sector.
    pub(crate) fn padding(&self) -> Vec<u8> {
        let first = usize::try_from(self.entries).unwrap_or(usize::MAX);
        self.table.get(first..).unwrap_or_default().as_bytes().to_vec()
    }

    /// The number of blocks of the disk.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// The entry of a block, `None` if it is not allocated (or beyond the disk).
    pub(crate) fn get(&self, block: BlockIndex) -> Option<u32> {
        if block >= self.entries {
            return None;
        }
        let entry = self.table.get(usize::try_from(block).ok()?)?.get();
        (entry != UNUSED).then_some(entry)
    }

    pub(crate) fn set(&mut self, block: BlockIndex, entry: u32) {
        if let Some(slot) = usize::try_from(block).ok().and_then(|at| self.table.get_mut(at)) {
            *slot = entry.into();
        }
    }

    /// All allocated blocks with their entries, in the order of the disk.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (BlockIndex, u32)> + '_ {
        (0..self.entries).filter_map(|block| Some((block, self.get(block)?)))
    }

    /// The bytes of one sector of the table, with `changes` (block, entry) applied.
    pub(crate) fn sector(&self, sector: u32, changes: &[(BlockIndex, u32)]) -> Vec<u8> {
        let first = sector.saturating_mul(PER_SECTOR);
        let start = usize::try_from(first).unwrap_or(usize::MAX);
        let mut copy = self.table.iter().skip(start).take(PER_SECTOR as usize).copied().collect::<Vec<_>>();
        for &(block, entry) in changes {
            let at = block.checked_sub(first).and_then(|at| usize::try_from(at).ok());
            if let Some(slot) = at.and_then(|at| copy.get_mut(at)) {
                *slot = entry.into();
            }
        }
        copy.as_bytes().to_vec()
    }
}

/// First byte behind all blocks, at least the end of the headers.
pub(crate) fn end_of_data(bat: &Bat, layout: &Layout) -> u64 {
    bat.iter().map(|(_, entry)| layout.extent(entry).end).fold(layout.end_of_headers, u64::max)
}

/// What is wrong with the place of one block, if anything. `limit` is the first byte that blocks must not reach.
pub(crate) fn misplaced(extent: Extent, layout: &Layout, limit: u64) -> Option<&'static str> {
    if extent.bitmap < layout.end_of_headers {
        Some("it lies in the headers")
    } else if extent.end > limit {
        Some("it reaches beyond the end of the file")
    } else {
        None
    }
}

/// Checks what every writer relies on: all blocks lie behind the headers, before `limit`, and apart from each other.
pub(crate) fn check_places(bat: &Bat, layout: &Layout, limit: u64) -> Result<(), Error> {
    let mut used = bat.iter().collect::<Vec<_>>();
    used.sort_unstable_by_key(|&(_, entry)| entry);
    for &(block, entry) in &used {
        if let Some(reason) = misplaced(layout.extent(entry), layout, limit) {
            return Err(Error::invalid("block allocation table", format!("block {block}: {reason}")));
        }
    }
    for pair in used.windows(2) {
        if let [(first, low), (second, high)] = *pair
            && layout.extent(low).end > u64::from(high).saturating_mul(512)
        {
            return Err(Error::invalid(
                "block allocation table",
                format!("blocks {first} and {second} overlap"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { block_sectors: 8, bitmap_sectors: 1, table_offset: 1536, end_of_headers: 4096 };

    fn bat(entries: &[u32]) -> Bat {
        let mut table = entries.iter().map(|&entry| entry.into()).collect::<Vec<_>>();
        table.resize(table.len().next_multiple_of(128), U32::ZERO);
        Bat::new(table, u32::try_from(entries.len()).unwrap())
    }

    #[test]
    fn padding_is_not_an_entry_and_is_kept() {
        let bat = bat(&[8, UNUSED]);
        assert_eq!((bat.get(0), bat.get(1), bat.get(2)), (Some(8), None, None));
        let sector = bat.sector(0, &[(1, 17)]);
        assert_eq!(&sector[..12], &[0, 0, 0, 8, 0, 0, 0, 17, 0, 0, 0, 0]);
        assert_eq!(sector.len(), 512);
    }

    #[test]
    fn places_are_checked() {
        assert!(check_places(&bat(&[17, UNUSED, 8]), &LAYOUT, 26 * 512).is_ok());
        assert!(check_places(&bat(&[8, 16]), &LAYOUT, 1 << 20).is_err());
        assert!(check_places(&bat(&[8, 8]), &LAYOUT, 1 << 20).is_err());
        assert!(check_places(&bat(&[7]), &LAYOUT, 1 << 20).is_err());
        assert!(check_places(&bat(&[17]), &LAYOUT, 26 * 512 - 1).is_err());
        assert!(check_places(&bat(&[UNUSED - 1]), &LAYOUT, u64::MAX).is_ok());
        assert_eq!(end_of_data(&bat(&[UNUSED, 8]), &LAYOUT), 17 * 512);
        assert_eq!(end_of_data(&bat(&[UNUSED]), &LAYOUT), 4096);
    }
}
