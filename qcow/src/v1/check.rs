//! Whether an image is in order.

use format::Source;
use format::report::{Report, Used};

use super::directory::Order;
use super::header::Geometry;
use super::image::{Entry, Qcow, decode_table};
use super::open::bytes;
use super::{Error, OpenOptions, open};

/// Reads all metadata and looks for what must not be. Compressed clusters are not unpacked. An encrypted image needs no key.
///
/// # Errors
/// What cannot be read or is not an image at all.
pub fn check(mut source: Source<'_>) -> Result<Report, Error> {
    let size = source.size;
    // Any key will do, for nothing is decrypted.
    let encrypted = super::open::read(&mut source)?.0.encrypted;
    let options = OpenOptions { key: encrypted.then_some(&[]), ..OpenOptions::default() };
    let again = Source { size, regular: source.regular, read: &mut *source.read };
    let image = open(again, &options)?;
    let mut report = Report::default();
    let mut used = Used::default();
    // QEMU lets the directory begin in the sector of the header.
    let directory = image.directory.range();
    used.add(0, image.header.end().min(directory.start), "the header");
    used.add(directory.start, directory.end, "the L1 table");
    if image.directory.order() == Order::Little {
        log::info!("the L1 table is little endian, as Xen 3.2 wrote it");
    }
    let len = image.header.geometry.table_bytes();
    for table in 0..u32::try_from(image.header.directory_len() >> 3).unwrap_or(u32::MAX) {
        match image.table_place(table) {
            Ok(None) => {}
            Ok(Some(place)) => {
                used.add(place, place.saturating_add(len), "an L2 table");
                let entries = decode_table(&bytes(&mut source, "L2 table", place, len)?);
                check_table(&image, table, &entries, &mut used, &mut report);
            }
            Err(error) => report.add(|| format!("L1 entry {table}: {error}")),
        }
    }
    used.judge(size, &mut report);
    Ok(report)
}

fn check_table(image: &Qcow, table: u32, entries: &[u64], used: &mut Used, report: &mut Report) {
    let geometry: Geometry = image.header.geometry;
    let first = u64::from(table) << geometry.l2_bits;
    for (cluster, &entry) in (first..).zip(entries) {
        let sectors = image.cluster_sectors(cluster);
        if sectors.is_empty() {
            break;
        }
        let (fault, place, end) = match Entry::decode(entry, geometry) {
            Entry::Absent => continue,
            Entry::Data(place) => {
                report.units = report.units.saturating_add(1);
                let len = sectors.end.saturating_sub(sectors.start).saturating_mul(super::SECTOR);
                (image.misplaced(place, len), place, place.saturating_add(len))
            }
            Entry::Packed { offset, len } => {
                report.packed = report.packed.saturating_add(1);
                let empty = (len == 0).then_some("a compressed cluster has no bytes");
                (image.outside(offset, len).or(empty), offset, offset.saturating_add(len))
            }
        };
        match fault {
            Some(reason) => report.add(|| format!("cluster {cluster}: entry {entry:#x}: {reason}")),
            None => used.add(place, end, "a cluster"),
        }
    }
}
