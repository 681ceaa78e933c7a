//! Checking an image as a whole, and putting its reference counts right.

use format::blocking::{Storage, with_source};
use format::{SECTOR_SIZE, Source};

use super::Error;
use super::geometry::{Geometry, down, exp, index, put, up};
use super::header::{Header, at};
use super::open::{read, read_entries, read_header};
use super::refcount::{count, set_count};
use super::scan::{Mark, Scan, Usage, scan};

/// Problems that are told in words; there may be more.
const MOST_WORDS: usize = 100;

/// What a check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters that count as used but are not, or that have more references counted than there are: wasted room, no danger.
    pub leaks: u64,
    /// What can lose data, in number.
    pub corruptions: u64,
    /// The first of both, in words.
    pub problems: Vec<String>,
    /// Clusters of the disk.
    pub clusters: u64,
    /// Clusters of the disk that have a place in the file.
    pub allocated: u64,
    /// Of these, compressed ones.
    pub compressed: u64,
    /// Byte offset behind all that is in use.
    pub end: u64,
}

impl Report {
    fn corruption(&mut self, words: String) {
        self.corruptions = self.corruptions.saturating_add(1);
        self.say(words);
    }

    fn say(&mut self, words: String) {
        if self.problems.len() < MOST_WORDS {
            self.problems.push(words);
        }
    }
}

/// Checks an image: every table, and every reference count against those who refer there.
///
/// # Errors
/// The image cannot be read, or is none.
pub fn check(mut source: Source<'_>) -> Result<Report, Error> {
    let source = &mut source;
    let header = read_header(source)?;
    let g = header.geometry;
    let mut scan = scan(source, &header)?;
    let entries = down(header.refcount_table_bytes(), 3);
    let table = read_entries(source, "refcount table", header.refcount_table, entries)?;
    scan.usage.add_range(header.refcount_table, header.refcount_table_bytes(), &g);
    let mut report = Report::default();
    let blocks =
        table.iter().map(|&block| usable_block(block, &g, source.size, &mut report)).collect::<Vec<_>>();
    blocks.iter().flatten().for_each(|&block| scan.usage.add_range(block, 1, &g));
    report.clusters = header.size.div_ceil(g.cluster());
    (report.allocated, report.compressed) = (scan.allocated, scan.compressed);
    report.end = up(scan.usage.end, g.cluster_bits);
    std::mem::take(&mut scan.problems).into_iter().for_each(|words| report.corruption(words));
    compare(source, &g, &blocks, &scan, &mut report)?;
    Ok(report)
}

fn usable_block(block: u64, g: &Geometry, file_len: u64, report: &mut Report) -> Option<u64> {
    if block == 0 {
        return None;
    }
    let good = super::geometry::rest(block, g.cluster_bits) == 0
        && block.checked_add(g.cluster()).is_some_and(|end| end <= file_len);
    if !good {
        report
            .corruption(format!("the refcount table names a block at {block:#x}, which is no place for one"));
    }
    good.then_some(block)
}

/// Compares the counts in the image with those that were found.
fn compare(
    source: &mut Source<'_>,
    g: &Geometry,
    blocks: &[Option<u64>],
    scan: &Scan,
    report: &mut Report,
) -> Result<(), Error> {
    let per_block = exp(g.block_bits());
    let last = down(scan.usage.end, g.block_bits());
    for number in 0..=last.max((blocks.len() as u64).saturating_sub(1)) {
        let first = number.saturating_mul(per_block);
        let bytes = match blocks.get(index(number)).copied().flatten() {
            Some(block) => read(source, "refcount block", block, g.cluster())?,
            None if number > last => continue,
            None => Vec::new(),
        };
        for at in 0..per_block {
            let cluster = first.saturating_add(at);
            let (counted, found) = (count(&bytes, at, g.refcount_order), scan.usage.get(cluster));
            if counted > found {
                report.leaks = report.leaks.saturating_add(1);
                report.say(format!("leaked cluster {cluster}: reference count {counted} instead of {found}"));
            } else if counted < found {
                report.corruption(format!("cluster {cluster}: reference count {counted} instead of {found}"));
            }
        }
    }
    for mark in &scan.marks {
        // Too many marks let two share what is written; too few only cost a copy, but nobody writes them so.
        if mark.wanted(scan.usage.get(mark.cluster)) != mark.entry {
            report.corruption(format!(
                "entry {:#x} at {:#x}: wrong mark of being unshared",
                mark.entry, mark.at
            ));
        }
    }
    Ok(())
}

/// Puts the reference counts right, and with them the marks of being unshared: counts all references, writes new counts to a
/// new place behind everything else, and lets the header name that by one write of one sector, which also takes the marks
/// "dirty" and "corrupt" away. A stop at any moment leaves an image that can be repaired again. Returns what a check says
/// afterwards.
///
/// # Errors
/// The image cannot be read or written; tables are damaged in a way that counting cannot mend.
pub fn repair<S: Storage>(storage: &mut S) -> Result<Report, Error> {
    let failed = |source| Error::Io { what: "the image for repair", offset: 0, source };
    let found = with_source(storage, |mut source| {
        let header = read_header(&mut source)?;
        let scan = scan(&mut source, &header)?;
        let entries = down(header.refcount_table_bytes(), 3);
        let table = read_entries(&mut source, "refcount table", header.refcount_table, entries)?;
        Ok((header, scan, table, (!source.regular).then_some(source.size)))
    });
    let (header, scan, table, device) = found.map_err(failed)??;
    if let Some(words) = scan.problems.first() {
        return Err(Error::invalid("table", format!("{words}, which cannot be repaired")));
    }
    let plan = Rebuilt::new(&header, scan.usage, &table, device)?;
    plan.write(storage, &header, &scan.marks).map_err(failed)?;
    with_source(storage, check).map_err(failed)?
}

/// New refcount structures, as numbers of clusters: blocks, then the table.
struct Rebuilt {
    usage: Usage,
    blocks: u64,
    block_count: u64,
    table: u64,
    table_clusters: u64,
}

impl Rebuilt {
    fn new(header: &Header, mut usage: Usage, old: &[u64], device: Option<u64>) -> Result<Self, Error> {
        let g = &header.geometry;
        // Behind the old structures too: they count until the header names the new ones.
        let table_end = header.refcount_table.saturating_add(header.refcount_table_bytes());
        let old_end =
            old.iter().copied().filter(|&block| block < super::geometry::MAX_OFFSET).max().unwrap_or(0);
        let old_end = down(g.round_up(table_end.max(old_end.saturating_add(1))), g.cluster_bits);
        let blocks = usage.end.max(old_end);
        let (mut block_count, mut table_clusters) = (1_u64, 1_u64);
        loop {
            let end = blocks.saturating_add(block_count).saturating_add(table_clusters);
            let needed = end.div_ceil(exp(g.block_bits()));
            let room = up(table_clusters, g.cluster_bits) / 8;
            if needed <= block_count && block_count <= room {
                break;
            }
            block_count = block_count.max(needed);
            table_clusters = table_clusters.max(block_count.saturating_mul(8).div_ceil(g.cluster()));
        }
        let table = blocks.saturating_add(block_count);
        let end = up(table.saturating_add(table_clusters), g.cluster_bits);
        if device.is_some_and(|len| end > len) {
            return Err(Error::NoSpace { end: up(blocks, g.cluster_bits) });
        }
        (blocks..table.saturating_add(table_clusters)).for_each(|cluster| usage.add(cluster));
        Ok(Self { usage, blocks, block_count, table, table_clusters })
    }

    fn write<S: Storage>(&self, storage: &mut S, header: &Header, marks: &[Mark]) -> std::io::Result<()> {
        let g = &header.geometry;
        let per_block = exp(g.block_bits());
        let mut table = vec![0; index(up(self.table_clusters, g.cluster_bits))];
        for number in 0..self.block_count {
            let mut bytes = vec![0; index(g.cluster())];
            for at in 0..per_block {
                let count = self.usage.get(number.saturating_mul(per_block).saturating_add(at));
                if count > g.max_refcount() {
                    return Err(std::io::Error::from_raw_os_error(libc::EOVERFLOW));
                }
                set_count(&mut bytes, at, g.refcount_order, count);
            }
            let offset = up(self.blocks.saturating_add(number), g.cluster_bits);
            storage.write_at(offset, &bytes)?;
            put(&mut table, index(up(number, 3)), &offset.to_be_bytes());
        }
        let offset = up(self.table, g.cluster_bits);
        storage.write_at(offset, &table)?;
        for mark in marks {
            let wanted = mark.wanted(self.usage.get(mark.cluster));
            if wanted != mark.entry {
                write_entry(storage, mark.at, wanted)?;
            }
        }
        storage.sync()?;
        let clusters = u32::try_from(self.table_clusters).unwrap_or(u32::MAX).to_be_bytes();
        let mut sector = header
            .with(&[(at::REFCOUNT_TABLE, &offset.to_be_bytes()), (at::REFCOUNT_TABLE_CLUSTERS, &clusters)]);
        if g.version >= 3 {
            put(&mut sector, at::INCOMPATIBLE, &header.repaired().to_be_bytes());
        }
        storage.write_at(0, &sector)?;
        storage.sync()
    }
}

/// Writes one entry of a table by writing its sector.
fn write_entry<S: Storage>(storage: &mut S, at: u64, entry: u64) -> std::io::Result<()> {
    let within = at % SECTOR_SIZE;
    let sector = at.saturating_sub(within);
    let mut bytes = [0; 512];
    storage.read_at(sector, &mut bytes)?;
    put(&mut bytes, index(within), &entry.to_be_bytes());
    storage.write_at(sector, &bytes)
}
