//! New images of one sparse extent.

use format::MetaWrite;
use zerocopy::IntoBytes;

use crate::descriptor::new_cid;
use crate::header::{CHECK_BYTES, FLAG_CHECK_BYTES, FLAG_REDUNDANT, MAGIC, Raw};
use crate::{Error, SECTOR};

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Entries of a table.
const ENTRIES: u64 = 512;
/// Sectors of a table.
const TABLE: u64 = 4;
/// The descriptor's place and size in sectors, as QEMU has them.
const DESCRIPTOR: u64 = 1;
const DESCRIPTOR_LEN: u64 = 20;
/// Sectors of the largest disk: all grains must be found by 32 bits.
const MAX_SECTORS: u64 = 0xff00_0000;

/// A monolithicSparse image to be made.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// The name of the file that it will lie in, without folders: the descriptor names it.
    pub name: String,
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
    /// The image. All its tables are there, as VMware wants it, and take room only when they are used.
    ///
    /// # Errors
    /// [`Error::TooBig`], and [`Error::Invalid`] for a name that cannot stand in a descriptor.
    pub fn build(&self) -> Result<NewBytes, Error> {
        if self.sectors > MAX_SECTORS {
            return Err(Error::TooBig { what: "number of sectors", value: self.sectors, limit: MAX_SECTORS });
        }
        let text = self.text();
        crate::descriptor::Descriptor::parse(text.as_bytes())?;
        let tables = self.sectors.div_ceil(GRAIN * ENTRIES);
        let directory_len = tables.saturating_mul(4).div_ceil(SECTOR);
        let tables_len = tables.saturating_mul(TABLE);
        let redundant = DESCRIPTOR + DESCRIPTOR_LEN;
        let redundant_tables = redundant.saturating_add(directory_len);
        let directory = redundant_tables.saturating_add(tables_len);
        let first_table = directory.saturating_add(directory_len);
        let overhead = first_table.saturating_add(tables_len).next_multiple_of(GRAIN);
        let raw = Raw {
            magic: MAGIC,
            version: 1.into(),
            flags: (FLAG_CHECK_BYTES | FLAG_REDUNDANT).into(),
            capacity: self.sectors.into(),
            grain: GRAIN.into(),
            descriptor: DESCRIPTOR.into(),
            descriptor_len: DESCRIPTOR_LEN.into(),
            table_entries: u32::try_from(ENTRIES).unwrap_or(0).into(),
            redundant: redundant.into(),
            directory: directory.into(),
            overhead: overhead.into(),
            unclean: 0,
            check_bytes: CHECK_BYTES,
            compression: 0.into(),
            padding: [0; 433],
        };
        let mut head = raw.as_bytes().to_vec();
        head.extend(text.as_bytes());
        head.resize(head.len().next_multiple_of(512), 0);
        let entries = |first: u64| {
            let places = (0..tables).map(|table| first.saturating_add(table.saturating_mul(TABLE)));
            let mut bytes: Vec<u8> =
                places.flat_map(|at| u32::try_from(at).unwrap_or(0).to_le_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            bytes
        };
        let at = |sector: u64, bytes| MetaWrite { offset: sector.saturating_mul(SECTOR), bytes };
        let writes =
            vec![at(0, head), at(redundant, entries(redundant_tables)), at(directory, entries(first_table))];
        Ok(NewBytes { len: overhead.saturating_mul(SECTOR), writes })
    }

    fn text(&self) -> String {
        let cylinders = self.sectors / (16 * 63);
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
             # Extent description\nRW {} SPARSE \"{}\"\n\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"16\"\n\
             ddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n",
            new_cid(),
            self.sectors,
            self.name
        )
    }
}
