//! New images.

use format::{MetaWrite, SECTOR_SIZE};

use super::Error;
use super::entry::COPIED;
use super::geometry::{Geometry, exp, index, put, up};
use super::header::{Backing, EXT_BACKING_FORMAT, MAGIC, MAX_L1_BYTES, V2_LEN, V3_LEN};
use super::refcount::set_count;

/// An image to be made.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Version of the format: 2 (QEMU's "compat=0.10") or 3 ("compat=1.1").
    pub version: u32,
    /// Bytes of a cluster as the exponent of 2: 9 to 21.
    pub cluster_bits: u32,
    /// Bits of a reference count: a power of two up to 64, and 16 in version 2.
    pub refcount_bits: u32,
    /// The file below. Name its format, because others guess it otherwise.
    pub backing: Option<Backing>,
    /// All tables are there from the beginning, and every cluster has its place; only for images without a backing file.
    pub preallocate: bool,
}

impl NewImage {
    /// What QEMU makes by default: version 3, clusters of 64 KiB, reference counts of 16 bits.
    pub fn new(sectors: u64) -> Self {
        Self { sectors, version: 3, cluster_bits: 16, refcount_bits: 16, backing: None, preallocate: false }
    }

    /// The image.
    ///
    /// # Errors
    /// [`Error::Invalid`] and [`Error::TooBig`] for what the format cannot hold.
    pub fn build(&self) -> Result<NewBytes, Error> {
        let g = self.geometry()?;
        let size = self.sectors.checked_mul(SECTOR_SIZE).filter(|&size| size <= i64::MAX.unsigned_abs());
        let size = size.ok_or(Error::TooBig {
            what: "disk size in sectors",
            value: self.sectors,
            limit: i64::MAX.unsigned_abs() / SECTOR_SIZE,
        })?;
        let entries = g.l1_entries(size);
        if entries.saturating_mul(8) > MAX_L1_BYTES {
            return Err(Error::TooBig {
                what: "L1 table size",
                value: entries.saturating_mul(8),
                limit: MAX_L1_BYTES,
            });
        }
        if self.preallocate && self.backing.is_some() {
            return Err(Error::invalid("preallocation", "it would hide the backing file"));
        }
        let data = if self.preallocate { size.div_ceil(g.cluster()) } else { 0 };
        let plan = Plan::new(&g, entries, if self.preallocate { entries } else { 0 }, data);
        let mut writes = vec![MetaWrite { offset: 0, bytes: self.header(&g, size, entries, &plan)? }];
        writes.extend(plan.refcounts(&g));
        writes.extend(plan.l1(&g, entries));
        writes.extend(plan.l2(&g));
        Ok(NewBytes { len: up(plan.end(), g.cluster_bits), writes })
    }

    fn geometry(&self) -> Result<Geometry, Error> {
        if !matches!(self.version, 2 | 3) {
            return Err(Error::invalid("version", format!("{} instead of 2 or 3", self.version)));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(Error::invalid(
                "cluster size",
                format!("2^{} bytes instead of 2^9 to 2^21", self.cluster_bits),
            ));
        }
        let bits = self.refcount_bits;
        if !bits.is_power_of_two() || bits > 64 || (self.version < 3 && bits != 16) {
            let reason = format!("{bits} bits; it is a power of two up to 64, and 16 in version 2");
            return Err(Error::invalid("reference count size", reason));
        }
        let refcount_order = bits.trailing_zeros();
        Ok(Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order,
            extended: false,
            version: self.version,
        })
    }

    /// The first cluster as far as it is not zeros, in whole sectors.
    fn header(&self, g: &Geometry, size: u64, entries: u64, plan: &Plan) -> Result<Vec<u8>, Error> {
        let length = if self.version < 3 { V2_LEN } else { V3_LEN.saturating_add(8) };
        let mut bytes = vec![0; index(length)];
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
        put(&mut bytes, 0, &MAGIC.to_be_bytes());
        put(&mut bytes, 4, &self.version.to_be_bytes());
        put(&mut bytes, 20, &self.cluster_bits.to_be_bytes());
        put(&mut bytes, 24, &size.to_be_bytes());
        put(&mut bytes, 36, &small(entries));
        put(&mut bytes, 40, &up(plan.l1, g.cluster_bits).to_be_bytes());
        put(&mut bytes, 48, &up(plan.table, g.cluster_bits).to_be_bytes());
        put(&mut bytes, 56, &small(plan.blocks.saturating_sub(plan.table)));
        if self.version >= 3 {
            put(&mut bytes, 96, &g.refcount_order.to_be_bytes());
            put(&mut bytes, 100, &small(length));
        }
        if let Some(backing) = &self.backing {
            if let Some(format) = &backing.format {
                bytes.extend(EXT_BACKING_FORMAT.to_be_bytes());
                bytes.extend(small(format.len() as u64));
                bytes.extend(format.as_bytes());
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
            // The end of the extensions.
            bytes.extend([0; 8]);
            let at = bytes.len() as u64;
            let len = backing.name.len();
            bytes.extend(&backing.name);
            if !(1..=1023).contains(&len) || backing.name.contains(&0) || bytes.len() as u64 > g.cluster() {
                let reason =
                    "it has not 1 to 1023 bytes, none of them zero, or does not fit into the first cluster";
                return Err(Error::invalid("backing file name", reason));
            }
            put(&mut bytes, 8, &at.to_be_bytes());
            put(&mut bytes, 16, &small(len as u64));
        }
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(bytes)
    }
}

/// A new image in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBytes {
    /// Length of the file.
    pub len: u64,
    /// What is in it; the rest reads as zeros.
    pub writes: Vec<MetaWrite>,
}

/// Where things lie, as numbers of clusters: the refcount table directly behind the header, then its blocks, the L1 table, the
/// L2 tables, and data.
struct Plan {
    table: u64,
    blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
    data_clusters: u64,
}

impl Plan {
    fn new(g: &Geometry, entries: u64, tables: u64, data_clusters: u64) -> Self {
        let l1_clusters = entries.saturating_mul(8).div_ceil(g.cluster()).max(1);
        let (mut blocks, mut table) = (1_u64, 1_u64);
        loop {
            let first_block = table.saturating_add(1);
            let l1 = first_block.saturating_add(blocks);
            let l2 = l1.saturating_add(l1_clusters);
            let data = l2.saturating_add(tables);
            let needed = data.saturating_add(data_clusters).div_ceil(exp(g.block_bits()));
            let room = table.saturating_mul(g.cluster()) / 8;
            if needed <= blocks && blocks <= room {
                return Self { table: 1, blocks: first_block, l1, l2, data, data_clusters };
            }
            blocks = blocks.max(needed);
            table = table.max(blocks.saturating_mul(8).div_ceil(g.cluster()));
        }
    }

    fn end(&self) -> u64 {
        self.data.saturating_add(self.data_clusters)
    }

    fn refcounts(&self, g: &Geometry) -> Vec<MetaWrite> {
        let per_block = exp(g.block_bits());
        let blocks = self.l1.saturating_sub(self.blocks);
        let table =
            (self.blocks..self.l1).flat_map(|block| up(block, g.cluster_bits).to_be_bytes()).collect();
        let mut writes = vec![whole_sectors(up(self.table, g.cluster_bits), table)];
        for block in 0..blocks {
            let first = block.saturating_mul(per_block);
            let used = self.end().saturating_sub(first).min(per_block);
            let mut bytes = vec![0; index(g.cluster())];
            for at in 0..used {
                set_count(&mut bytes, at, g.refcount_order, 1);
            }
            let offset = up(self.blocks.saturating_add(block), g.cluster_bits);
            writes.push(MetaWrite { offset, bytes });
        }
        writes
    }

    fn l1(&self, g: &Geometry, entries: u64) -> Option<MetaWrite> {
        let tables = self.data.saturating_sub(self.l2);
        let entry = |at: u64| match at < tables {
            true => up(self.l2.saturating_add(at), g.cluster_bits) | COPIED,
            false => 0,
        };
        let table = (0..entries).flat_map(|at| entry(at).to_be_bytes()).collect();
        (tables > 0).then(|| whole_sectors(up(self.l1, g.cluster_bits), table))
    }

    fn l2(&self, g: &Geometry) -> Vec<MetaWrite> {
        let per_table = exp(g.l2_bits());
        let entry = |at: u64| up(self.data.saturating_add(at), g.cluster_bits) | COPIED;
        let table = |number: u64| {
            let first = number.saturating_mul(per_table);
            let end = first.saturating_add(per_table).min(self.data_clusters);
            let bytes = (first..end).flat_map(|at| entry(at).to_be_bytes()).collect();
            whole_sectors(up(self.l2.saturating_add(number), g.cluster_bits), bytes)
        };
        (0..self.data.saturating_sub(self.l2)).map(table).collect()
    }
}

fn whole_sectors(offset: u64, mut bytes: Vec<u8>) -> MetaWrite {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    MetaWrite { offset, bytes }
}
