//! The state of an open image, and where its sectors are.

use std::cell::RefCell;
use std::cmp::min;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use format::cipher::Cipher;
use format::{Load, Lookup, Source};

use crate::bat::{self, Bat, Extent, Layout};
use crate::batmap::{Batmap, RawBatmapHeader};
use crate::cache::BitmapCache;
use crate::footer::{DiskType, RawFooter};
use crate::header::RawHeader;
use crate::locator::ParentName;
use crate::resize::Growth;
use crate::write::Writes;
use crate::{BlockIndex, Error, KeyHash, OpenOptions, SECTOR_SIZE, Sector, Uuid, bitmap, open};

/// Bitmaps kept in memory: 2 MiB of them, which cover 8 GiB of partly written blocks. Full blocks need none.
const CACHED_BITMAPS: usize = 4096;

/// An open image.
///
/// What the disk holds changes only by `commit_done`: reserved blocks and sectors that are written but not
/// committed are invisible to [`Vhd::map`].
#[derive(Debug)]
pub struct Vhd {
    pub(crate) footer: RawFooter,
    pub(crate) kind: DiskType,
    pub(crate) sectors: u64,
    pub(crate) writable: bool,
    pub(crate) end: EndFooter,
    /// Byte offset of the footer of a fixed image.
    pub(crate) fixed_footer: u64,
    /// `None` for a fixed image.
    pub(crate) dynamic: Option<Dynamic>,
}

/// The footer at the end of an image when it was opened, compared with the one at offset 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndFooter {
    /// The two are alike, or the image is fixed and has one only.
    Alike,
    /// Both are good, but a change of them was cut short.
    Differs,
    /// The image was not closed after its last writer.
    Missing,
}

/// What a differencing image says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentRef {
    /// The parent's identifier. The parent is a raw file if it is null.
    pub uuid: Uuid,
    /// Where to look for the parent, in the order in which to try.
    pub names: Vec<ParentName>,
}

/// What fixed images have not: blocks.
#[derive(Debug)]
pub(crate) struct Dynamic {
    pub(crate) header: RawHeader,
    pub(crate) names: Vec<ParentName>,
    pub(crate) layout: Layout,
    pub(crate) bat: Bat,
    pub(crate) batmap: Option<Batmap>,
    /// Bitmaps of blocks that are on disk, with the bits that are on disk.
    pub(crate) cache: BitmapCache,
    /// Bitmaps asked for and not delivered yet, and how often. A read that failed stays here, at the cost of a bitmap that
    /// is not evicted.
    loads: RefCell<BTreeMap<BlockIndex, u32>>,
    /// One bit for each block whose bitmap was seen to be all ones.
    pub(crate) full: Vec<u8>,
    /// New blocks get all of their bits at once, see [`crate::write`].
    pub(crate) whole_blocks: bool,
    /// Number of blocks in the table.
    pub(crate) allocated: u32,
    /// First byte behind all blocks of the table.
    pub(crate) end_of_data: u64,
    /// First byte that the blocks of the table must not reach.
    limit: u64,
    pub(crate) writes: Writes,
    /// What the data of an encrypted image are encrypted with; `None` also if it was opened without its key.
    pub(crate) cipher: Option<Cipher>,
    /// The growth under way.
    pub(crate) growth: Option<Growth>,
}

/// What is known of a block.
pub(crate) enum BlockState<'a> {
    Absent,
    Full(Extent),
    Partial(Extent, &'a [u8]),
    Unread(Extent),
}

impl Vhd {
    /// Opens an image: reads and checks its metadata. Nothing is written, whatever the options.
    ///
    /// # Errors
    /// Every malformation that [`Error`] names. A writable open refuses damage in the allocation table that a read-only
    /// open reports only when the damaged block is used.
    pub fn open(mut source: Source<'_>, options: &OpenOptions) -> Result<Self, Error> {
        open::open(&mut source, options)
    }

    pub(crate) fn new(
        footer: RawFooter,
        kind: DiskType,
        writable: bool,
        end: EndFooter,
        fixed_footer: u64,
        dynamic: Option<Dynamic>,
    ) -> Self {
        let sectors = footer.current_size.get() / SECTOR_SIZE;
        Self { footer, kind, sectors, writable, end, fixed_footer, dynamic }
    }

    /// How the image stores its disk.
    pub fn kind(&self) -> DiskType {
        self.kind
    }

    /// Size of the virtual disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Sectors of a block; a fixed image has none and answers 0.
    pub fn block_sectors(&self) -> u32 {
        self.dynamic.as_ref().map_or(0, |dynamic| dynamic.layout.block_sectors)
    }

    /// The identifier of the image.
    pub fn uuid(&self) -> Uuid {
        self.footer.uuid
    }

    /// The footer that counts.
    pub fn footer(&self) -> &RawFooter {
        &self.footer
    }

    /// The dynamic header; `None` for a fixed image.
    pub fn header(&self) -> Option<&RawHeader> {
        self.dynamic.as_ref().map(|dynamic| &dynamic.header)
    }

    /// The batmap's header and map; `None` if the image has none.
    pub fn batmap(&self) -> Option<(&RawBatmapHeader, &[u8])> {
        let batmap = self.dynamic.as_ref()?.batmap.as_ref()?;
        Some((&batmap.header, batmap.map()))
    }

    /// What an encrypted image says of its key.
    pub fn key_hash(&self) -> Option<KeyHash> {
        self.batmap()?.0.key_hash()
    }

    /// The parent of a differencing image.
    pub fn parent(&self) -> Option<ParentRef> {
        let dynamic = self.dynamic.as_ref().filter(|_| self.kind == DiskType::Differencing)?;
        Some(ParentRef { uuid: dynamic.header.parent_uuid, names: dynamic.names.clone() })
    }

    /// True if the image was not closed after its last writer: the footer at its end is missing or not its own.
    pub fn was_unclean(&self) -> bool {
        self.end == EndFooter::Missing
    }

    /// First byte behind the data, where the footer of a file belongs, by the allocation table as it is on disk.
    pub fn end_of_data(&self) -> u64 {
        match &self.dynamic {
            Some(dynamic) => dynamic.end_of_data,
            None => self.footer.current_size.get(),
        }
    }

    /// First byte behind the metadata at the beginning; 0 for a fixed image.
    pub fn end_of_headers(&self) -> u64 {
        self.dynamic.as_ref().map_or(0, |dynamic| dynamic.layout.end_of_headers)
    }

    /// The sector at which the bitmap of `block` begins, `None` if the block is not allocated.
    pub fn block_entry(&self, block: BlockIndex) -> Option<u32> {
        self.dynamic.as_ref()?.bat.get(block)
    }

    /// Bytes of the bitmap of `block`, `None` if the block is not allocated.
    pub fn bitmap_range(&self, block: BlockIndex) -> Option<Range<u64>> {
        let dynamic = self.dynamic.as_ref()?;
        let extent = dynamic.layout.extent(dynamic.bat.get(block)?);
        Some(extent.bitmap..extent.data)
    }

    /// Number of blocks of the virtual disk.
    pub fn blocks(&self) -> u32 {
        self.dynamic.as_ref().map_or(0, |dynamic| dynamic.bat.entries())
    }

    /// Number of allocated blocks.
    pub fn allocated_blocks(&self) -> usize {
        self.dynamic.as_ref().map_or(0, |dynamic| dynamic.bat.iter().count())
    }

    /// Where the sectors are: the answer for the longest prefix of `count` sectors from `sector` that has one answer.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::Corrupt`] if the first sector's block lies outside the file.
    pub fn map(&self, sector: Sector, count: u32) -> Result<Lookup, Error> {
        self.check_range(sector, count)?;
        let Some(dynamic) = &self.dynamic else {
            return Ok(Lookup::Data { offset: sector.saturating_mul(SECTOR_SIZE), count });
        };
        let mut absent = 0_u32;
        while absent < count {
            let piece = dynamic.piece(sector.saturating_add(absent.into()), count.saturating_sub(absent));
            let state = match dynamic.state(piece.block) {
                Ok(state) => state,
                Err(_) if absent > 0 => break,
                Err(error) => return Err(error),
            };
            let (answer, run) = dynamic.look(state, &piece);
            match answer {
                None => absent = absent.saturating_add(run),
                Some(answer) if absent == 0 => {
                    if let Lookup::Load(_) = answer {
                        dynamic.load_began(piece.block);
                    }
                    return Ok(answer);
                }
                Some(_) => break,
            }
        }
        Ok(match self.kind {
            DiskType::Differencing => Lookup::Parent { count: absent },
            _ => Lookup::Zero { count: absent },
        })
    }

    /// Byte offset of `count` sectors if they lie in this file, one after another, and all that is known without reading.
    /// What [`Vhd::map`] says of most reads of an image that is in use, at a lower price.
    pub fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        let end = sector.checked_add(count.into())?;
        if count == 0 || end > self.sectors {
            return None;
        }
        let Some(dynamic) = &self.dynamic else { return Some(sector.saturating_mul(SECTOR_SIZE)) };
        let piece = dynamic.piece(sector, count);
        let extent = match dynamic.state(piece.block).ok()? {
            BlockState::Full(extent) => extent,
            BlockState::Partial(extent, bits) if bitmap::run(bits, piece.bits()) == (true, count) => extent,
            BlockState::Partial(..) | BlockState::Absent | BlockState::Unread(_) => return None,
        };
        (piece.count == count).then(|| data_offset(extent, &piece))
    }

    /// Takes the bitmap that a [`Load`] asked for.
    ///
    /// Several reads of one bitmap may be under way at a time. The first to arrive counts: while others are missing the
    /// bitmap stays in memory, so that they, who may have read before a commit, cannot bring back old bits.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are not as many as were asked for or the block is not allocated.
    pub(crate) fn insert_bitmap(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<(), Error> {
        let Some(dynamic) = &mut self.dynamic else {
            return Err(Error::invalid("bitmap", "a fixed image has none"));
        };
        if u32::try_from(bytes.len()) != Ok(dynamic.layout.bitmap_bytes()) || dynamic.bat.get(block).is_none()
        {
            return Err(Error::invalid(
                "bitmap",
                format!("{} bytes for block {block} do not fit", bytes.len()),
            ));
        }
        if !dynamic.is_full(block) && dynamic.cache.get(block).is_none() {
            dynamic.learn(block, bytes);
        }
        dynamic.load_ended(block);
        Ok(())
    }

    pub(crate) fn check_range(&self, sector: Sector, count: u32) -> Result<(), Error> {
        match sector.checked_add(count.into()) {
            Some(end) if end <= self.sectors && count > 0 => Ok(()),
            _ => Err(Error::OutOfRange { sector, count, sectors: self.sectors }),
        }
    }
}

/// A run of sectors within one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) block: BlockIndex,
    /// First sector, counted from the block's beginning.
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Piece {
    pub(crate) fn bits(&self) -> std::ops::Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl Dynamic {
    #[expect(clippy::too_many_arguments, reason = "the parts that opening has found, each used once")]
    pub(crate) fn new(
        header: RawHeader,
        names: Vec<ParentName>,
        layout: Layout,
        bat: Bat,
        batmap: Option<Batmap>,
        end_of_data: u64,
        limit: u64,
        source: &Source<'_>,
    ) -> Self {
        let full = vec![0; usize::try_from(bat.entries().div_ceil(8)).unwrap_or(0)];
        let allocated = u32::try_from(bat.iter().count()).unwrap_or(u32::MAX);
        let cache = BitmapCache::new(CACHED_BITMAPS);
        let writes = Writes::new(source.regular, source.size, end_of_data, limit);
        Self {
            header,
            names,
            layout,
            bat,
            batmap,
            cache,
            loads: RefCell::default(),
            full,
            whole_blocks: false,
            allocated,
            end_of_data,
            limit,
            writes,
            cipher: None,
            growth: None,
        }
    }

    /// The part of `count` sectors from `sector` that lies in one block.
    pub(crate) fn piece(&self, sector: Sector, count: u32) -> Piece {
        // A power of two, as opening has checked.
        let in_block = u64::from(self.layout.block_sectors);
        let block = sector >> in_block.trailing_zeros().min(63);
        // Both fit: the disk has at most 2^32 sectors, a block at most 4096.
        let first = u32::try_from(sector & in_block.saturating_sub(1)).unwrap_or(0);
        Piece {
            block: BlockIndex::try_from(block).unwrap_or(BlockIndex::MAX),
            first,
            count: min(count, self.layout.block_sectors.saturating_sub(first)),
        }
    }

    /// What is known of a block.
    pub(crate) fn state(&self, block: BlockIndex) -> Result<BlockState<'_>, Error> {
        let Some(entry) = self.bat.get(block) else { return Ok(BlockState::Absent) };
        let extent = self.layout.extent(entry);
        if let Some(reason) = bat::misplaced(extent, &self.layout, self.limit) {
            return Err(Error::Corrupt { block, reason });
        }
        Ok(if self.is_full(block) {
            BlockState::Full(extent)
        } else if let Some(bits) = self.cache.get(block) {
            BlockState::Partial(extent, bits)
        } else {
            BlockState::Unread(extent)
        })
    }

    /// The answer for the first sectors of a piece, `None` if they are not in this file; and how many they are.
    fn look(&self, state: BlockState<'_>, piece: &Piece) -> (Option<Lookup>, u32) {
        let data = |extent: Extent, count| Some(Lookup::Data { offset: data_offset(extent, piece), count });
        match state {
            BlockState::Absent => (None, piece.count),
            BlockState::Full(extent) => (data(extent, piece.count), piece.count),
            BlockState::Partial(extent, bits) => match bitmap::run(bits, piece.bits()) {
                (true, count) => (data(extent, count), count),
                (false, count) => (None, count),
            },
            BlockState::Unread(extent) => {
                (Some(Lookup::Load(self.bitmap_load(piece.block, extent))), piece.count)
            }
        }
    }

    /// What to read to know the bitmap of a block.
    pub(crate) fn bitmap_load(&self, block: BlockIndex, extent: Extent) -> Load {
        Load { key: block.into(), offset: extent.bitmap, len: self.layout.bitmap_bytes() }
    }

    pub(crate) fn is_full(&self, block: BlockIndex) -> bool {
        bitmap::get(&self.full, block)
    }

    /// Notes the bitmap of an allocated block as it is on disk.
    pub(crate) fn learn(&mut self, block: BlockIndex, bits: &[u8]) {
        if bitmap::all_set(bits, self.layout.block_sectors) {
            bitmap::set(&mut self.full, block..block.saturating_add(1));
            self.cache.remove(block);
            if let Some(batmap) = &mut self.batmap {
                batmap.set(block);
            }
        } else {
            let (writes, loads) = (&self.writes, self.loads.borrow());
            self.cache.insert(block, bits, |block| writes.touches(block) || loads.contains_key(&block));
        }
    }

    pub(crate) fn load_began(&self, block: BlockIndex) {
        let mut loads = self.loads.borrow_mut();
        let count = loads.entry(block).or_default();
        *count = count.saturating_add(1);
    }

    pub(crate) fn load_ended(&mut self, block: BlockIndex) {
        if let Entry::Occupied(mut load) = self.loads.get_mut().entry(block) {
            *load.get_mut() = load.get().saturating_sub(1);
            if *load.get() == 0 {
                load.remove();
            }
        }
    }

    /// Makes a new block part of the table in memory.
    pub(crate) fn publish(&mut self, block: BlockIndex, entry: u32) {
        let end = self.layout.extent(entry).end;
        self.bat.set(block, entry);
        self.allocated = self.allocated.saturating_add(1);
        self.end_of_data = self.end_of_data.max(end);
        self.limit = self.limit.max(end);
    }
}

/// Byte offset of a piece's first sector.
pub(crate) fn data_offset(extent: Extent, piece: &Piece) -> u64 {
    extent.data.saturating_add(u64::from(piece.first).saturating_mul(SECTOR_SIZE))
}
