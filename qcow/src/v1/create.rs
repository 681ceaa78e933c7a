//! New images.

use format::MetaWrite;
use zerocopy::IntoBytes;

use super::directory::checksum;
use super::header::{
    Backing, CRYPT_AES, Geometry, LEN, MAGIC, Raw, XEN_BIG_ENDIAN, XEN_LEN, XEN_PAGE, XEN_SPARSE, Xen,
    directory_len,
};
use super::{Error, SECTOR};

/// Whose habits a new image follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// The directory follows the header directly.
    Qemu,
    /// With Xen's extended header, and the directory at a page of its own. `reserve`: the file is made as long as it will
    /// ever need to be.
    Xen {
        /// Make the file as long as it will ever need to be.
        reserve: bool,
    },
}

/// An image to be made. The sizes of clusters and tables are those that QEMU and Xen both choose: clusters of 4 KiB, or of 512
/// bytes over a backing file, so that no write has to copy from it.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Whose habits to follow.
    pub flavour: Flavour,
    /// The file below.
    pub backing: Option<Backing>,
    /// Clusters are encrypted; whoever opens the image needs the key.
    pub encrypted: bool,
}

/// A new image in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBytes {
    /// Length of the file.
    pub len: u64,
    /// What is in it; the rest reads as zeros.
    pub writes: Vec<MetaWrite>,
}

impl NewImage {
    /// The image.
    ///
    /// # Errors
    /// [`Error::Invalid`] and [`Error::TooBig`] for what the format cannot hold.
    pub fn build(&self) -> Result<NewBytes, Error> {
        let size = self.sectors.checked_mul(SECTOR).filter(|&size| size > 0);
        let size = size
            .ok_or_else(|| Error::invalid("size", format!("a disk cannot have {} sectors", self.sectors)))?;
        let name = self.name()?;
        let geometry = match &self.backing {
            None => Geometry { cluster_bits: 12, l2_bits: 9 },
            Some(_) => Geometry { cluster_bits: 9, l2_bits: 12 },
        };
        let directory_len = directory_len(geometry, size)?;
        let (head, align) = match self.flavour {
            Flavour::Qemu => (LEN, 8),
            Flavour::Xen { .. } => (XEN_LEN, XEN_PAGE),
        };
        let directory = head.saturating_add(name.len() as u64).next_multiple_of(align);
        let raw = Raw {
            magic: MAGIC.into(),
            version: 1.into(),
            backing_offset: if name.is_empty() { 0 } else { head }.into(),
            backing_len: u32::try_from(name.len()).unwrap_or(0).into(),
            mtime: self.backing.as_ref().map_or(0, |backing| backing.mtime).into(),
            size: size.into(),
            cluster_bits: u8::try_from(geometry.cluster_bits).unwrap_or(0),
            l2_bits: u8::try_from(geometry.l2_bits).unwrap_or(0),
            padding: 0.into(),
            crypt: if self.encrypted { CRYPT_AES } else { 0 }.into(),
            directory: directory.into(),
        };
        let mut bytes = raw.as_bytes().to_vec();
        if let Flavour::Xen { reserve } = self.flavour {
            bytes.extend(self.xen(geometry, directory_len, reserve).raw().as_bytes());
        }
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let end = directory.saturating_add(directory_len);
        let len = match self.flavour {
            Flavour::Qemu => end.next_multiple_of(SECTOR),
            Flavour::Xen { reserve: false } => end.next_multiple_of(XEN_PAGE),
            Flavour::Xen { reserve: true } => {
                // What qcow-create reckons: 512 bytes for each table, which is less than tables take.
                let tables = directory_len.saturating_mul(512 / 8);
                end.next_multiple_of(XEN_PAGE).saturating_add(tables).saturating_add(size)
            }
        };
        Ok(NewBytes { len: len.max(bytes.len() as u64), writes: vec![MetaWrite { offset: 0, bytes }] })
    }

    fn name(&self) -> Result<&[u8], Error> {
        match &self.backing {
            None => Ok(&[]),
            Some(backing) if (1..=1023).contains(&backing.name.len()) && !backing.name.contains(&0) => {
                Ok(&backing.name)
            }
            Some(_) => {
                Err(Error::invalid("backing file name", "it has not 1 to 1023 bytes, none of them zero"))
            }
        }
    }

    fn xen(&self, geometry: Geometry, directory_len: u64, reserve: bool) -> Xen {
        let entries = usize::try_from(directory_len >> 3).unwrap_or(0);
        Xen {
            checksum: checksum(std::iter::repeat_n(0, entries)),
            min_cluster_alloc: if self.backing.is_some() { 1 } else { geometry.table_entries() },
            flags: XEN_BIG_ENDIAN | if reserve { 0 } else { XEN_SPARSE },
        }
    }
}
