//! Opening, and the checks that everything later relies on.

use std::fmt;

use format::Source;
use format::cache::Tables;
use format::cipher::Cipher;
use format::tail::Tail;

use super::directory::{Directory, Order};
use super::header::{Backing, Header, LEN, XEN_SPARSE};
use super::image::{Qcow, decode_table};
use super::write::Writes;
use super::{Error, SECTOR};

/// Bytes of tables in memory, unless something else is asked for. They cover 8 GiB of a disk with clusters of 4 KiB.
const CACHE: u64 = 16 << 20;

/// A file ends before this: an entry has one bit for something else, and a file offset is a signed number.
const LIMIT: u64 = i64::MAX as u64 & !0xffff;

/// How to open an image.
#[derive(Clone)]
pub struct OpenOptions<'a> {
    /// Clusters may be written and allocated. Asks more of the image than reading does.
    pub writable: bool,
    /// The key of an encrypted image: the first 16 bytes count.
    pub key: Option<&'a [u8]>,
    /// Bytes of tables to be kept in memory.
    pub cache: u64,
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        Self { writable: false, key: None, cache: CACHE }
    }
}

impl fmt::Debug for OpenOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("OpenOptions")
            .field("writable", &self.writable)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

/// Opens an image: reads and checks its header and directory. Nothing is written, whatever the options.
///
/// # Errors
/// Every malformation that [`Error`] names. A writable open refuses damage in the directory that a read-only open reports
/// only when the damaged part is used.
pub fn open(mut source: Source<'_>, options: &OpenOptions<'_>) -> Result<Qcow, Error> {
    let source = &mut source;
    let (header, backing, directory) = read(source)?;
    let cipher = cipher(&header, options.key)?;
    let table_bytes = header.geometry.table_bytes();
    let capacity = options.cache.checked_div(table_bytes).unwrap_or(0).max(2);
    let end = if source.regular && header.xen.is_none_or(|xen| xen.flags & XEN_SPARSE != 0) {
        source.size
    } else {
        // A device is as long as it is, and Xen's tools have made this file as long as it will ever need to be.
        header.end()
    };
    let limit = if source.regular { LIMIT } else { source.size };
    let tail = Tail::new(header.geometry.cluster_bytes(), end, limit, header.size);
    let writes = Writes::new(tail, header.geometry);
    let mut image = Qcow {
        sectors: header.size >> 9,
        header,
        backing,
        writable: options.writable,
        directory,
        tables: Tables::new(usize::try_from(capacity).unwrap_or(2)),
        limit: source.size,
        cipher,
        writes,
    };
    decide_order(&mut image)?;
    if options.writable {
        image.check_directory()?;
        image.writes.first_sector = first_sector(source, &image.header)?;
        image.avoid_metadata();
        if end != source.size {
            image.avoid_tables(source)?;
        }
    }
    Ok(image)
}

/// Reads and checks what is at fixed places.
pub(super) fn read(source: &mut Source<'_>) -> Result<(Header, Option<Backing>, Directory), Error> {
    let head = bytes(source, "header", 0, source.size.min(SECTOR))?;
    let header = Header::parse(&head, source.size)?;
    let backing = match header.name.end.saturating_sub(header.name.start) {
        0 => None,
        len => {
            let name = bytes(source, "backing file name", header.name.start, len)?;
            if name.contains(&0) {
                return Err(Error::invalid("backing file name", "it contains a zero byte"));
            }
            Some(Backing { name, mtime: header.mtime })
        }
    };
    let sectors = Directory::sectors_of(header.directory, header.directory_len());
    let end = sectors.end.min(source.size);
    let mut content = bytes(source, "L1 table", sectors.start, end.saturating_sub(sectors.start))?;
    content.resize(content.len().next_multiple_of(512), 0);
    let entries = u32::try_from(header.directory_len() >> 3).unwrap_or(u32::MAX);
    let directory = Directory::new(header.directory, entries, content);
    Ok((header, backing, directory))
}

pub(super) fn bytes(
    source: &mut Source<'_>,
    what: &'static str,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Error> {
    source.bytes(offset, len).map_err(|source| Error::Io { what, offset, source })
}

fn cipher(header: &Header, key: Option<&[u8]>) -> Result<Option<Cipher>, Error> {
    match (header.encrypted, key) {
        (true, Some(key)) => Ok(Some(Cipher::cbc(key))),
        (true, None) => Err(Error::KeyMissing),
        (false, Some(_)) => Err(Error::KeyUnneeded),
        (false, None) => Ok(None),
    }
}

/// Decides how the entries of the directory are to be read, where Xen's extension does not say that they are big endian.
///
/// Xen's tools put all entries of such an image into the other order, and only then the flag. So the flag of an image that
/// they did not finish lies; but hardly any entry is a place in the file in both orders.
fn decide_order(image: &mut Qcow) -> Result<(), Error> {
    if image.header.xen.is_none_or(|xen| xen.big_endian()) {
        return Ok(());
    }
    let len = image.header.geometry.table_bytes();
    let fits = |order| {
        let entries = (0..).map_while(|table| {
            (u64::from(table) < image.header.directory_len() >> 3)
                .then(|| image.directory.get_as(order, table))
        });
        entries.filter(|&place| place != 0).all(|place| image.misplaced(place, len).is_none())
    };
    let order = if fits(Order::Little) {
        Order::Little
    } else if fits(Order::Big) {
        Order::Big
    } else if image.writable {
        return Err(Error::invalid("L1 table", "its entries make sense in neither byte order"));
    } else {
        Order::Little
    };
    image.directory.set_order(order);
    Ok(())
}

/// The first sector of an image with Xen's extension, which changes with it.
fn first_sector(source: &mut Source<'_>, header: &Header) -> Result<Option<Vec<u8>>, Error> {
    if header.xen.is_none() {
        return Ok(None);
    }
    // The directory is at 4096 or behind, so the file has this sector.
    bytes(source, "header", 0, SECTOR.max(LEN)).map(Some)
}

impl Qcow {
    /// Nothing new is placed before the directory's end or that of a table.
    fn avoid_metadata(&mut self) {
        let len = self.header.geometry.table_bytes();
        self.writes.tail.avoid(self.directory.range().end);
        let places: Vec<u64> = self.directory.iter().filter(|&place| place != 0).collect();
        for end in places.into_iter().filter_map(|place| place.checked_add(len)) {
            self.writes.tail.avoid(end);
        }
    }

    /// Nothing new is placed before the end of any cluster. Reads all tables.
    fn avoid_tables(&mut self, source: &mut Source<'_>) -> Result<(), Error> {
        let len = self.header.geometry.table_bytes();
        let there = |&place: &u64| place != 0 && self.misplaced(place, len).is_none();
        let places: Vec<u64> = self.directory.iter().filter(there).collect();
        for place in places {
            let table = decode_table(&bytes(source, "L2 table", place, len)?);
            self.avoid_all(&table);
        }
        Ok(())
    }

    /// Checks that no two tables overlap and that none is where it destroys something. One that lies beyond the end of the
    /// file, as QEMU leaves it when it is killed, makes its part of the disk unusable but does no harm.
    fn check_directory(&self) -> Result<(), Error> {
        let len = self.header.geometry.table_bytes();
        let mut places: Vec<u64> = self.directory.iter().filter(|&place| place != 0).collect();
        let inside = |place: u64| place.checked_add(len).is_some_and(|end| end <= self.limit);
        let bad = places.iter().find(|&&place| inside(place) && self.misplaced(place, len).is_some());
        if let Some(place) = bad {
            let reason = format!("the entry {place:#x} is not a place for a table");
            return Err(Error::invalid("L1 table", reason));
        }
        places.sort_unstable();
        let overlap = places.windows(2).find(|pair| match pair {
            [a, b] => b.saturating_sub(*a) < len,
            _ => false,
        });
        if let Some(place) = overlap.and_then(<[u64]>::first) {
            let reason = format!("two tables overlap at byte {place}; check the image with 'tap-img check'");
            return Err(Error::invalid("L1 table", reason));
        }
        Ok(())
    }
}
