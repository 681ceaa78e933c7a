//! Whether a sparse extent is in order.

use format::report::{Report, Used};
use format::{Format, Source};

use crate::sparse::{Entry, Sparse, words};
use crate::{Error, OpenOptions, SECTOR, open};

/// Reads all metadata and looks for what must not be. Compressed grains are not unpacked.
///
/// # Errors
/// What cannot be read or is not an extent at all.
pub fn check(source: Source<'_>) -> Result<Report, Error> {
    let Source { size, regular, read } = source;
    let image = open(Source { size, regular, read: &mut *read }, &OpenOptions::default())?;
    let source = &mut Source { size, regular, read };
    let (mut report, mut used) = (Report::default(), Used::default());
    for range in image.metadata().filter(|range| !range.is_empty()) {
        used.add(range.start, range.end, "metadata at a fixed place");
    }
    for table in 0..u32::try_from(image.header.directory_entries()).unwrap_or(u32::MAX) {
        match image.table_place(table) {
            Ok(None) => {}
            Ok(Some(place)) => check_table(source, &image, table, place, &mut used, &mut report)?,
            Err(error) => report.add(|| format!("entry {table} of the grain directory: {error}")),
        }
    }
    used.judge(size, &mut report);
    Ok(report)
}

fn check_table(
    source: &mut Source<'_>,
    image: &Sparse,
    table: u32,
    place: u64,
    used: &mut Used,
    report: &mut Report,
) -> Result<(), Error> {
    let len = image.header.table_bytes();
    let mut read = |offset| {
        let what = "grain table";
        source.bytes(offset, len).map(|bytes| words(&bytes)).map_err(|source| Error::Io {
            what,
            offset,
            source,
        })
    };
    used.add(place, place.saturating_add(len), "a grain table");
    let entries = read(place)?;
    check_twin(image, table, &entries, &mut read, used, report)?;
    let count = u64::from(image.header.table_entries);
    let first = u64::from(table).saturating_mul(count);
    for (grain, &entry) in (first..first.saturating_add(count)).zip(&entries) {
        let sectors = image.grain_sectors(grain);
        if sectors.start >= image.sectors() {
            break;
        }
        let Entry::Grain(place) = image.decode(entry) else { continue };
        let len = if image.header.compressed { 1 } else { sectors.end.saturating_sub(sectors.start) };
        let len = len.saturating_mul(SECTOR);
        let slot = if image.header.compressed { &mut report.packed } else { &mut report.units };
        *slot = slot.saturating_add(1);
        match image.misplaced(place, if image.header.compressed { 1 } else { len }) {
            Some(reason) => report.add(|| format!("grain {grain}: entry {entry:#x}: {reason}")),
            None => used.add(place, place.saturating_add(len), "a grain"),
        }
    }
    Ok(())
}

/// The redundant table should say the same. Where it does not, the first one counts.
fn check_twin(
    image: &Sparse,
    table: u32,
    entries: &[u32],
    read: &mut impl FnMut(u64) -> Result<Vec<u32>, Error>,
    used: &mut Used,
    report: &mut Report,
) -> Result<(), Error> {
    let Some(directory) = &image.redundant else { return Ok(()) };
    let place = u64::from(Sparse::entry(directory, table)).saturating_mul(SECTOR);
    if place == 0 {
        return Ok(());
    }
    let len = image.header.table_bytes();
    if let Some(reason) = image.misplaced(place, len) {
        report.add(|| format!("entry {table} of the redundant grain directory: {reason}"));
        return Ok(());
    }
    used.add(place, place.saturating_add(len), "a redundant grain table");
    if read(place)? != entries {
        log::info!("redundant grain table {table} differs; the first one counts");
    }
    Ok(())
}
