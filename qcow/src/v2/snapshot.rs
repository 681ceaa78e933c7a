//! The table of internal snapshots: only as much of it as is needed to leave their clusters alone.

use format::Source;

use super::Error;
use super::geometry::{be32, be64};
use super::header::{Header, MAX_L1_BYTES, check_place};
use super::open::read;

/// Bytes of the fixed part of an entry.
const ENTRY: u64 = 40;
/// QEMU's limits.
const MAX_EXTRA: u64 = 1024;
const MAX_TABLE_BYTES: u64 = 64 << 20;

/// An internal snapshot: a disk of the past, whose tables share clusters with the present one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its identifier, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Byte offset of its L1 table.
    pub(super) l1_offset: u64,
    /// Entries of its L1 table.
    pub(super) l1_entries: u64,
}

/// The snapshots, and the length of their table in bytes.
///
/// A snapshot whose entry is damaged is left out if the image is only read; it is an error if the image is to be written,
/// because clusters that the snapshot uses would count as nobody's.
pub(super) fn read_table(
    source: &mut Source<'_>,
    header: &Header,
    writable: bool,
) -> Result<(Vec<Snapshot>, u64), Error> {
    let mut snapshots = Vec::new();
    let mut len = 0_u64;
    for number in 0..header.snapshots {
        match read_entry(source, header, header.snapshot_table.saturating_add(len)) {
            Ok((snapshot, entry)) => {
                len = len.saturating_add(entry);
                let place = check_snapshot(&snapshot, header, source.size);
                match place {
                    Err(error) if writable => return Err(error),
                    Err(error) => log::warn!("snapshot '{}' is ignored: {error}", snapshot.name),
                    Ok(()) => snapshots.push(snapshot),
                }
            }
            Err(error) if writable => return Err(error),
            Err(error) => {
                log::warn!("snapshots from the {number}th on are ignored: {error}");
                break;
            }
        }
        if len > MAX_TABLE_BYTES {
            return Err(Error::TooBig { what: "snapshot table size", value: len, limit: MAX_TABLE_BYTES });
        }
    }
    Ok((snapshots, len))
}

fn check_snapshot(snapshot: &Snapshot, header: &Header, file_len: u64) -> Result<(), Error> {
    let bytes = snapshot.l1_entries.saturating_mul(8);
    if bytes > MAX_L1_BYTES {
        return Err(Error::invalid("snapshot", format!("an L1 table of {bytes} bytes")));
    }
    check_place("snapshot's L1 table", snapshot.l1_offset, bytes, &header.geometry, file_len)
}

fn read_entry(source: &mut Source<'_>, header: &Header, offset: u64) -> Result<(Snapshot, u64), Error> {
    let fixed = read(source, "snapshot table", offset, ENTRY)?;
    let (id_len, name_len) = (be16(&fixed, 12), be16(&fixed, 14));
    let extra = u64::from(be32(&fixed, 36));
    let least = if header.geometry.version >= 3 { 16 } else { 0 };
    if extra > MAX_EXTRA || extra < least {
        return Err(Error::invalid("snapshot table", format!("an entry with {extra} bytes of extra data")));
    }
    let at = offset.saturating_add(ENTRY).saturating_add(extra);
    let id = read(source, "snapshot table", at, id_len.into())?;
    let name = read(source, "snapshot table", at.saturating_add(id_len.into()), name_len.into())?;
    let len = ENTRY.saturating_add(extra).saturating_add(id_len.into()).saturating_add(name_len.into());
    let snapshot = Snapshot {
        id: String::from_utf8_lossy(&id).into_owned(),
        name: String::from_utf8_lossy(&name).into_owned(),
        l1_offset: be64(&fixed, 0),
        l1_entries: be32(&fixed, 8).into(),
    };
    Ok((snapshot, len.next_multiple_of(8)))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()).map_or(0, |bytes| u16::from_be_bytes(*bytes))
}
