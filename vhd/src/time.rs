//! VHD time stamps: whole seconds since 2000-01-01T00:00:00Z in 32 bits.

/// 2000-01-01T00:00:00Z in Unix time.
const EPOCH: i64 = 946_684_800;
const DAY: i64 = 86_400;

/// The stamp for a Unix time in seconds; times outside the 136 years from 2000 on become the nearest bound.
pub fn from_unix(seconds: i64) -> u32 {
    u32::try_from(seconds.saturating_sub(EPOCH).max(0)).unwrap_or(u32::MAX)
}

/// The Unix time of a stamp, in seconds.
pub fn to_unix(stamp: u32) -> i64 {
    i64::from(stamp).saturating_add(EPOCH)
}

/// A stamp as `ctime(3)` writes it, in UTC and without the newline: `Sat Nov 21 04:14:29 2026`.
pub fn format(stamp: u32) -> String {
    const DAYS: [&str; 7] = ["Sat", "Sun", "Mon", "Tue", "Wed", "Thu", "Fri"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let stamp = i64::from(stamp);
    let (days, second) = (stamp.div_euclid(DAY), stamp.rem_euclid(DAY));
    let (year, month, day) = civil(days);
    // 2000-01-01 was a Saturday.
    let weekday = usize::try_from(days.rem_euclid(7)).ok().and_then(|i| DAYS.get(i)).unwrap_or(&"");
    let month = MONTHS.get(month).unwrap_or(&"");
    let (hour, minute) = (second.div_euclid(3600), second.rem_euclid(3600).div_euclid(60));
    format!("{weekday} {month} {day:2} {hour:02}:{minute:02}:{:02} {year}", second.rem_euclid(60))
}

/// Year, month (0 for January) and day of the month, `days` after 2000-01-01.
fn civil(mut days: i64) -> (i64, usize, i64) {
    let mut year = 2000_i64;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days = days.saturating_sub(length);
        year = year.saturating_add(1);
    }
    let february = if leap(year) { 29 } else { 28 };
    for (month, length) in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate() {
        if days < length {
            return (year, month, days.saturating_add(1));
        }
        days = days.saturating_sub(length);
    }
    (year, 11, 31)
}

fn leap(year: i64) -> bool {
    (year.rem_euclid(4) == 0 && year.rem_euclid(100) != 0) || year.rem_euclid(400) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_ctime() {
        assert_eq!(format(0), "Sat Jan  1 00:00:00 2000");
        assert_eq!(format(from_unix(1_795_234_469)), "Sat Nov 21 04:14:29 2026");
        assert_eq!(format(from_unix(951_782_400)), "Tue Feb 29 00:00:00 2000");
        assert_eq!(format(from_unix(4_107_542_399)), "Sun Feb 28 23:59:59 2100");
        assert_eq!(format(from_unix(4_107_542_400)), "Mon Mar  1 00:00:00 2100");
        assert_eq!(format(u32::MAX), "Tue Feb  7 06:28:15 2136");
    }

    #[test]
    fn times_outside_the_range_are_clamped() {
        assert_eq!(from_unix(0), 0);
        assert_eq!(from_unix(i64::MIN), 0);
        assert_eq!(from_unix(i64::MAX), u32::MAX);
        assert_eq!(to_unix(from_unix(1_795_234_469)), 1_795_234_469);
    }
}
