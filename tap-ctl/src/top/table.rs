//! Rows as text of 80 columns.

use blkif::VdevId;

use super::{Row, Sort};

/// The width that everything fits into.
pub(super) const COLUMNS: usize = 80;

/// The lines of a table: a summary, the titles, a line for each disk.
pub(super) fn lines(rows: &[Row], problems: usize, sort: Sort, columns: usize) -> Vec<String> {
    let (mut iops, mut read, mut written) = (0.0, 0.0, 0.0);
    for row in rows {
        iops += row.iops();
        read += row.read_bytes;
        written += row.write_bytes;
    }
    let (iops, read, written) = (amount(iops), amount(read / 1e6), amount(written / 1e6));
    let many = if rows.len() == 1 { "" } else { "s" };
    let mut summary =
        format!("{} disk{many}, {iops} IOPS, {read} MB/s read, {written} MB/s written", rows.len());
    if problems > 0 {
        summary += &format!(", {problems} not answering");
    }
    let sorted = format!("by {}", sort.name());
    let summary = format!("{summary:<width$} {sorted}", width = COLUMNS - 1 - sorted.len());
    let titles = "  DOM DEV    READ/S WRIT/S  R MB/S W MB/S   P50   P99 QUE HIT% IMAGE".to_owned();
    let rows = rows.iter().map(|row| line(row, columns.max(COLUMNS)));
    [summary, titles].into_iter().chain(rows).map(|line| line.trim_end().to_owned()).collect()
}

fn line(row: &Row, columns: usize) -> String {
    let domain = row.frontend.map_or_else(|| "-".to_owned(), |frontend| frontend.domid.to_string());
    let device = match (row.frontend, row.others) {
        (None, _) => "-".to_owned(),
        (Some(frontend), 0) => device(VdevId(frontend.vdev)),
        (Some(frontend), others) => format!("{}+{others}", device(VdevId(frontend.vdev))),
    };
    let start = format!(
        "{domain:>5} {device:<6} {:>6} {:>6} {:>7} {:>6} {:>5} {:>5} {:>3} {:>4} ",
        amount(row.reads),
        amount(row.writes),
        amount(row.read_bytes / 1e6),
        amount(row.write_bytes / 1e6),
        time(row.median),
        time(row.slowest),
        row.outstanding.min(999),
        row.hits.map_or_else(|| "-".to_owned(), |hits| format!("{hits:.0}")),
    );
    let image = if row.paused { format!("(paused) {}", row.image) } else { row.image.clone() };
    let room = columns.saturating_sub(start.chars().count());
    start + &shortened(&image, room)
}

/// The end of a text says more than its beginning.
fn shortened(text: &str, room: usize) -> String {
    let visible = |character: char| if character.is_control() { '?' } else { character };
    let count = text.chars().count();
    if count <= room {
        return text.chars().map(visible).collect();
    }
    let left = room.saturating_sub(2);
    let end = text.chars().skip(count - left).map(visible);
    "..".chars().chain(end).take(room).collect()
}

/// Not more than six columns, three digits at least.
fn amount(amount: f64) -> String {
    let (scaled, unit) = match amount {
        _ if amount < 9999.5 => (amount, ""),
        _ if amount < 999_950.0 => (amount / 1e3, "k"),
        _ if amount < 999.95e6 => (amount / 1e6, "M"),
        _ => (amount / 1e9, "G"),
    };
    match scaled {
        _ if scaled == 0.0 => "0".to_owned(),
        _ if scaled < 9.995 && unit.is_empty() => format!("{scaled:.2}"),
        _ if scaled < 99.95 => format!("{scaled:.1}{unit}"),
        _ => format!("{scaled:.0}{unit}"),
    }
}

/// Microseconds in five columns.
fn time(micros: Option<u64>) -> String {
    match micros {
        None => "-".to_owned(),
        Some(micros @ ..1000) => format!("{micros}us"),
        Some(micros @ ..10_000) => format!("{}.{}ms", micros / 1000, micros % 1000 / 100),
        Some(micros @ ..1_000_000) => format!("{}ms", micros / 1000),
        Some(micros @ ..10_000_000) => format!("{}.{}s", micros / 1_000_000, micros % 1_000_000 / 100_000),
        Some(micros) => format!("{}s", micros / 1_000_000),
    }
}

/// A device as the guest's Linux names it (`docs/misc/vbd-interface.txt` of Xen); others by their number.
fn device(VdevId(vdev): VdevId) -> String {
    let (prefix, disk, part) = match vdev {
        _ if vdev >> 28 == 1 => ("xvd", vdev >> 8 & 0xf_ffff, vdev & 0xff),
        _ if vdev >> 8 == 202 => ("xvd", vdev >> 4 & 0xf, vdev & 0xf),
        _ if vdev >> 8 == 8 => ("sd", vdev >> 4 & 0xf, vdev & 0xf),
        _ if vdev >> 8 == 3 => ("hd", vdev >> 6 & 3, vdev & 0x3f),
        _ => return vdev.to_string(),
    };
    let mut letters = Vec::new();
    let mut left = disk;
    loop {
        letters.push(char::from(b'a' + u8::try_from(left % 26).unwrap_or(0)));
        match (left / 26).checked_sub(1) {
            Some(next) => left = next,
            None => break,
        }
    }
    let letters: String = letters.iter().rev().collect();
    let part = if part == 0 { String::new() } else { part.to_string() };
    format!("{prefix}{letters}{part}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_names_that_the_guest_gives_them() {
        for (vdev, name) in [
            (51712, "xvda"),
            (51713, "xvda1"),
            (51728, "xvdb"),
            (768, "hda"),
            (832, "hdb"),
            (2048, "sda"),
            (1 << 28 | 26 << 8, "xvdaa"),
            (1 << 28 | 27 << 8 | 3, "xvdab3"),
            (5, "5"),
        ] {
            assert_eq!(device(VdevId(vdev)), name);
        }
    }

    #[test]
    fn numbers_fit_their_columns_and_times_theirs() {
        for (number, text) in [
            (0.0, "0"),
            (0.004, "0.00"),
            (3.456, "3.46"),
            (9.999, "10.0"),
            (123.4, "123"),
            (9999.4, "9999"),
            (9999.9, "10.0k"),
            (123_456.0, "123k"),
            (999_999.0, "1.0M"),
            (12_345_678.0, "12.3M"),
            (5e9, "5.0G"),
        ] {
            assert_eq!(amount(number), text, "{number}");
        }
        for (micros, text) in [
            (0, "0us"),
            (999, "999us"),
            (1000, "1.0ms"),
            (9999, "9.9ms"),
            (123_456, "123ms"),
            (9_999_999, "9.9s"),
            (240_000_000, "240s"),
        ] {
            assert_eq!(time(Some(micros)), text);
        }
    }

    #[test]
    fn a_long_path_loses_its_beginning_and_control_characters_are_not_shown() {
        assert_eq!(shortened("vhd:/srv/long/name.vhd", 12), "..g/name.vhd");
        assert_eq!(shortened("vhd:/a\u{1b}[2J", 20), "vhd:/a?[2J");
        assert_eq!(shortened("abc", 0), "");
    }
}
