//! The bytes of new images, laid out as XenServer's libvhd lays them out: footer copy, header, allocation table, batmap
//! header, batmap, parent locators, footer.

use zerocopy::IntoBytes;

use crate::batmap::{self, RawBatmapHeader};
use crate::footer::{self, DiskType, RawFooter};
use crate::header::{self, RawHeader, RawLocator};
use crate::locator::{self, Platform};
use crate::{Error, KeyHash, MAX_DISK_SIZE, SECTOR_SIZE, Uuid, bat};
use format::MetaWrite;

/// Offset of the dynamic header in bytes.
const HEADER_OFFSET: u64 = footer::LEN as u64;
/// Offset of the allocation table in bytes.
const TABLE_OFFSET: u64 = HEADER_OFFSET + header::LEN as u64;
/// Room for each parent locator in bytes.
const LOCATOR_SPACE: u32 = 512;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// How it stores its disk. A differencing image has a `parent`, the others have none.
    pub kind: DiskType,
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Size in bytes up to which the disk can later grow in place; no less than `size` is provided for.
    pub max_size: u64,
    /// Bytes of a block, a power of two from 4 KiB to 2 MiB; other programs expect [`header::DEFAULT_BLOCK_SIZE`].
    pub block_size: u32,
    /// Identity of the image.
    pub uuid: Uuid,
    /// Time of creation, see [`crate::time`].
    pub timestamp: u32,
    /// The parent of a differencing image.
    pub parent: Option<NewParent>,
    /// What an encrypted image says of its key.
    pub key: Option<KeyHash>,
}

/// How a new differencing image names its parent.
#[derive(Debug, Clone)]
pub struct NewParent {
    /// Identity of the parent; null for a raw file.
    pub uuid: Uuid,
    /// Time of the parent's last change, see [`crate::time`].
    pub timestamp: u32,
    /// Last part of the parent's path.
    pub name: String,
    /// Path of the parent relative to the folder of the child, with `/` between its parts: `./base.vhd`.
    pub path: String,
}

/// A new image as it goes to disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBytes {
    /// What to write into an empty file or anywhere on a device, in any order. Whatever else is in a file reads as zeros;
    /// on a device the data of a fixed image must be zeroed.
    pub writes: Vec<MetaWrite>,
    /// Length of the file in bytes.
    pub len: u64,
}

impl NewImage {
    /// Computes the image. `device` is the length of the block device in bytes if it goes onto one: the footer is then at
    /// the device's end.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::TooBig`] if no such image can exist, [`Error::NoSpace`] if the device is too small.
    pub fn build(&self, device: Option<u64>) -> Result<NewBytes, Error> {
        self.build_as(device, footer::TAP_VERSION)
    }

    /// The same for an image that QEMU may write to: QEMU puts its first block where others expect the batmap, so there is
    /// none, and the creator's version says so.
    ///
    /// # Errors
    /// As [`NewImage::build`], and [`Error::Invalid`] for an image with a parent or a key: QEMU knows neither.
    pub fn build_for_qemu(&self, device: Option<u64>) -> Result<NewBytes, Error> {
        if self.parent.is_some() || self.key.is_some() {
            return Err(Error::invalid("image", "QEMU knows neither parents nor keys of a VHD"));
        }
        self.build_as(device, footer::TAP_VERSION_WITHOUT_BATMAP)
    }

    fn build_as(&self, device: Option<u64>, version: u32) -> Result<NewBytes, Error> {
        self.check()?;
        let mut footer = RawFooter::new(self.kind, self.size, self.uuid, self.timestamp);
        footer.creator_version = version.into();
        footer.seal();
        let mut writes = Vec::new();
        let data_end = if self.kind == DiskType::Fixed {
            self.size
        } else {
            let head = self.head(&footer)?;
            let len = head.len() as u64;
            writes.push(MetaWrite { offset: 0, bytes: head });
            len
        };
        let len = data_end.saturating_add(SECTOR_SIZE);
        let (offset, len) = match device {
            None => (data_end, len),
            Some(size) if size >= len => (size.saturating_sub(SECTOR_SIZE), size),
            Some(_) => return Err(Error::NoSpace { end: len }),
        };
        writes.push(MetaWrite { offset, bytes: footer.as_bytes().to_vec() });
        Ok(NewBytes { writes, len })
    }

    fn check(&self) -> Result<(), Error> {
        let most = self.size.max(self.max_size);
        if most > MAX_DISK_SIZE {
            return Err(Error::TooBig { what: "disk size", value: most, limit: MAX_DISK_SIZE });
        }
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::invalid(
                "disk size",
                format!("{} is not a positive multiple of 512", self.size),
            ));
        }
        if self.parent.is_some() != (self.kind == DiskType::Differencing) {
            return Err(Error::invalid("parent", "differencing images have one, others have none"));
        }
        Ok(())
    }

    /// Everything before the data of a dynamic or differencing image.
    fn head(&self, footer: &RawFooter) -> Result<Vec<u8>, Error> {
        let block_size = self.block_size;
        let blocks = self.size.max(self.max_size).div_ceil(u64::from(block_size.max(1)));
        let entries = u32::try_from(blocks).ok().filter(|&entries| entries <= bat::MAX_ENTRIES).ok_or(
            Error::TooBig { what: "number of blocks", value: blocks, limit: bat::MAX_ENTRIES.into() },
        )?;
        let mut header = RawHeader::new(TABLE_OFFSET, entries, block_size);
        let mut table = bat::UNUSED.to_be_bytes().repeat(usize::try_from(entries).unwrap_or(0));
        table.resize(table.len().next_multiple_of(512), 0);

        if footer.creator_version.get() == footer::TAP_VERSION_WITHOUT_BATMAP {
            header.seal();
            header.verify()?;
            return Ok([footer.as_bytes(), header.as_bytes(), &table].concat());
        }
        let batmap_offset = TABLE_OFFSET.saturating_add(table.len() as u64);
        let map_offset = batmap_offset.saturating_add(batmap::LEN as u64);
        let map_sectors = batmap::sectors_for(entries);
        let mut batmap = RawBatmapHeader::new(map_offset, map_sectors);
        if let Some(key) = self.key {
            batmap.set_key_hash(key);
        }
        let map_len = u64::from(map_sectors).saturating_mul(SECTOR_SIZE);
        let locators = match &self.parent {
            Some(parent) => name_parent(&mut header, parent, map_offset.saturating_add(map_len))?,
            None => Vec::new(),
        };
        header.seal();
        header.verify()?;

        let mut head = footer.as_bytes().to_vec();
        head.extend_from_slice(header.as_bytes());
        head.extend_from_slice(&table);
        head.extend_from_slice(batmap.as_bytes());
        head.resize(head.len().saturating_add(usize::try_from(map_len).unwrap_or(0)), 0);
        head.extend_from_slice(&locators);
        Ok(head)
    }
}

/// Enters the parent into a header and returns the locators' names as they lie at byte `offset`.
///
/// All three kinds hold the relative path, as blktap writes them, so that a chain can be moved as a whole.
fn name_parent(header: &mut RawHeader, parent: &NewParent, offset: u64) -> Result<Vec<u8>, Error> {
    header.parent_uuid = parent.uuid;
    header.parent_timestamp = parent.timestamp.into();
    header.set_parent_name(&parent.name)?;
    let mut names = Vec::new();
    for (slot, platform) in header.locators.iter_mut().zip([Platform::MacX, Platform::W2ku, Platform::W2ru]) {
        let name = locator::encode(platform, &parent.path);
        *slot = RawLocator {
            code: platform.code().into(),
            space: LOCATOR_SPACE.into(),
            length: locator::checked_length(name.len(), LOCATOR_SPACE)?.into(),
            reserved: 0.into(),
            offset: offset.saturating_add(names.len() as u64).into(),
        };
        let end = names.len().saturating_add(LOCATOR_SPACE as usize);
        names.extend_from_slice(&name);
        names.resize(end, 0);
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::DEFAULT_BLOCK_SIZE;
    use format::Source;

    use crate::{OpenOptions, Vhd};

    fn dynamic(size: u64) -> NewImage {
        NewImage {
            kind: DiskType::Dynamic,
            size,
            max_size: 0,
            block_size: DEFAULT_BLOCK_SIZE,
            uuid: Uuid([3; 16]),
            timestamp: 1,
            parent: None,
            key: None,
        }
    }

    fn open(bytes: &NewBytes, regular: bool) -> Result<Vhd, Error> {
        let mut file = vec![0; usize::try_from(bytes.len).unwrap()];
        for write in &bytes.writes {
            let at = usize::try_from(write.offset).unwrap();
            file[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        let mut read = |offset: u64, buf: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&file[at..at + buf.len()]);
            Ok(())
        };
        Vhd::open(
            Source { size: bytes.len, regular, read: &mut read },
            &OpenOptions { writable: true, ..Default::default() },
        )
    }

    #[test]
    fn the_smallest_dynamic_image_has_the_layout_of_libvhd() {
        let bytes = dynamic(64 << 20).build(None).unwrap();
        assert_eq!(bytes.len, 3584);
        let vhd = open(&bytes, true).unwrap();
        assert_eq!((vhd.sectors(), vhd.blocks(), vhd.end_of_data()), (131_072, 32, 3072));
        assert!(!vhd.was_unclean());
    }

    #[test]
    fn differencing_images_name_their_parent_three_times() {
        let parent =
            NewParent { uuid: Uuid([9; 16]), timestamp: 5, name: "p.vhd".into(), path: "./p.vhd".into() };
        let image = NewImage { kind: DiskType::Differencing, parent: Some(parent), ..dynamic(64 << 20) };
        let vhd = open(&image.build(None).unwrap(), true).unwrap();
        let parent = vhd.parent().unwrap();
        assert_eq!(parent.uuid, Uuid([9; 16]));
        assert_eq!(parent.names.iter().map(|n| n.path.to_str().unwrap()).collect::<Vec<_>>(), ["./p.vhd"; 3]);
        assert_eq!(vhd.end_of_headers(), 4608);
        assert_eq!(vhd.header().unwrap().parent_name(), "p.vhd");
    }

    #[test]
    fn devices_have_the_footer_at_their_end() {
        let bytes = dynamic(64 << 20).build(Some(1 << 20)).unwrap();
        assert_eq!(bytes.writes[1].offset, (1 << 20) - 512);
        assert!(!open(&bytes, false).unwrap().was_unclean());
        assert!(matches!(dynamic(64 << 20).build(Some(3000)), Err(Error::NoSpace { .. })));
    }

    #[test]
    fn what_cannot_exist_is_refused() {
        for size in [0, 511, MAX_DISK_SIZE + 512] {
            assert!(dynamic(size).build(None).is_err(), "{size}");
        }
        assert!(NewImage { block_size: 512, ..dynamic(1 << 20) }.build(None).is_err());
        assert!(NewImage { kind: DiskType::Differencing, ..dynamic(1 << 20) }.build(None).is_err());
    }

    #[test]
    fn the_largest_disk_can_be_made() {
        let bytes = dynamic(MAX_DISK_SIZE).build(None).unwrap();
        assert_eq!(open(&bytes, true).unwrap().sectors(), MAX_DISK_SIZE / 512);
    }
}
