//! Opening a sparse extent, and the checks that everything later relies on.

use format::Source;
use format::cache::Tables;
use format::tail::Tail;

use crate::descriptor::{self, Descriptor};
use crate::header::{Header, LEN};
use crate::sparse::{Sparse, words};
use crate::write::Writes;
use crate::{Error, SECTOR};

/// Bytes of tables in memory, unless something else is asked for: they cover 256 GiB of a disk with usual grains.
const CACHE: u64 = 16 << 20;
/// First byte that no grain may reach, so that its sector fits into 32 bits.
const LIMIT: u64 = (u32::MAX as u64) << 9;
/// Bytes from the end of a stream to its footer: a marker, the footer, and the marker of the end.
const FOOTER: u64 = 3 * SECTOR;

/// How to open a sparse extent.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Grains may be written and allocated. Asks more of the image than reading does.
    pub writable: bool,
    /// Bytes of tables to be kept in memory.
    pub cache: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { writable: false, cache: CACHE }
    }
}

/// Opens a sparse extent: reads and checks its header, directories, and the descriptor if it has one. Nothing is written,
/// whatever the options.
///
/// # Errors
/// Every malformation that [`Error`] names; [`Error::OnlyRead`] for streams, and versions that QEMU does not write either. A
/// writable open refuses damage in the directory that a read-only open reports only when the damaged part is used.
pub fn open(mut source: Source<'_>, options: &OpenOptions) -> Result<Sparse, Error> {
    let source = &mut source;
    let first = bytes(source, "header", 0, LEN)?;
    let footer_at = source.size.checked_sub(FOOTER).and_then(|at| at.checked_add(SECTOR));
    let header = Header::parse(&first, || {
        let at = footer_at.ok_or_else(|| Error::invalid("footer", "the file is too short"))?;
        bytes(source, "footer", at, LEN)
    })?;
    if options.writable {
        check_writable(source, &header)?;
    }
    let range = header.descriptor.clone();
    let mut text = bytes(source, "descriptor", range.start, range.end.saturating_sub(range.start))?;
    if text.iter().all(|byte| *byte == 0) {
        // A part of an image in several files: QEMU leaves room for a descriptor there, and none in it (block/vmdk.c,
        // vmdk_init_extent).
        text.clear();
    }
    let descriptor = (!text.is_empty()).then(|| Descriptor::parse(&text)).transpose()?;
    let mut directory =
        |what, offset| bytes(source, what, offset, header.directory_bytes()).map(|b| words(&b));
    let primary = directory("grain directory", header.directory)?;
    let redundant = header.redundant.map(|offset| directory("redundant grain directory", offset));
    let redundant = redundant.transpose()?;
    let capacity = options.cache.checked_div(header.table_bytes()).unwrap_or(0).max(2);
    let size = header.capacity.saturating_mul(SECTOR);
    let tail = Tail::new(SECTOR, source.size, LIMIT, size);
    let mut image = Sparse {
        writes: Writes::new(tail, &header, first, text),
        header,
        descriptor,
        writable: options.writable,
        directory: primary,
        redundant,
        tables: Tables::new(usize::try_from(capacity).unwrap_or(2)),
        limit: source.size,
    };
    image.check_metadata()?;
    if options.writable {
        image.check_directories()?;
    }
    if image.header.unclean {
        log::warn!("the image was not closed by its last writer; some of its room may be lost");
    }
    Ok(image)
}

fn bytes(source: &mut Source<'_>, what: &'static str, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    if offset.checked_add(len).is_none_or(|end| end > source.size) {
        let reason =
            format!("its {len} bytes at {offset} reach beyond the end of the file at {}", source.size);
        return Err(Error::invalid(what, reason));
    }
    source.bytes(offset, len).map_err(|source| Error::Io { what, offset, source })
}

fn check_writable(source: &Source<'_>, header: &Header) -> Result<(), Error> {
    if header.compressed {
        return Err(Error::OnlyRead("streamOptimized VMDKs"));
    }
    if header.version > 2 {
        return Err(Error::OnlyRead("sparse VMDKs of version 3, which may have a log of changed blocks,"));
    }
    if !source.regular {
        // Nothing says where the data on a device end.
        return Err(Error::OnlyRead("sparse VMDKs on block devices"));
    }
    Ok(())
}

impl Sparse {
    /// Refuses fixed places that overlap.
    fn check_metadata(&self) -> Result<(), Error> {
        let mut ranges: Vec<_> = self.metadata().filter(|range| !range.is_empty()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let overlap = ranges.windows(2).any(|pair| matches!(pair, [a, b] if b.start < a.end));
        if overlap {
            return Err(Error::invalid(
                "header",
                "the header, the descriptor and the grain directories overlap",
            ));
        }
        Ok(())
    }

    /// Checks that no two tables overlap and that none is where it destroys something. One that lies beyond the end of the
    /// file makes its part of the disk unusable but does no harm; nothing is placed where it points.
    fn check_directories(&mut self) -> Result<(), Error> {
        let len = self.header.table_bytes();
        let entries = usize::try_from(self.header.directory_entries()).unwrap_or(usize::MAX);
        let both = self.directory.iter().take(entries).chain(self.redundant.iter().flatten().take(entries));
        let mut places: Vec<u64> = both.map(|&sector| u64::from(sector).saturating_mul(SECTOR)).collect();
        places.retain(|&place| place != 0);
        places.sort_unstable();
        let inside = |place: u64| place.saturating_add(len) <= self.limit;
        if let Some(place) = places.iter().find(|&&at| inside(at) && self.misplaced(at, len).is_some()) {
            let reason = format!("its entry for byte {place} is not a place for a table");
            return Err(Error::invalid("grain directory", reason));
        }
        let overlap = places.windows(2).find(|pair| matches!(pair, [a, b] if b.saturating_sub(*a) < len));
        if let Some(place) = overlap.and_then(<[u64]>::first) {
            let reason =
                format!("two grain tables overlap at byte {place}; check the image with 'tap-img check'");
            return Err(Error::invalid("grain directory", reason));
        }
        for place in places {
            self.writes.tail.avoid(place.saturating_add(len));
        }
        Ok(())
    }
}

impl Writes {
    fn new(tail: Tail, header: &Header, first_sector: Vec<u8>, text: Vec<u8>) -> Self {
        // A text that was parsed is one.
        let text = descriptor::text(&text).map(str::to_owned).ok();
        Self::with(tail, header, first_sector, text)
    }
}
