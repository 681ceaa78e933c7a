//! `vhd-util check`.

use std::cmp::Ordering;
use std::io::Write;
use std::path::Path;

use format::blocking::Storage;

use super::args::Args;
use super::create::now;
use super::disk::{Disk, open_parent};
use super::query::LOOK;
use super::read::headers;
use super::{Failure, errno_of, wrong_usage};
use crate::check::{self, CheckOptions, Verdict};
use crate::footer::RawFooter;
use crate::header::RawHeader;
use crate::{chain, print};

pub(super) const OPTIONS: &str = "n:iItpbBs";
pub(super) const USAGE: &str = "options: -n <file> [-i ignore missing primary footers] [-I ignore parent uuids] [-t \
                                ignore timestamps] [-B do not check BAT for 2TB limit] [-p check parents] [-b check \
                                bitmaps] [-s stats] [-h help]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let mut name = path.display().to_string();
    let mut next = path.to_owned();
    for _ in 0..chain::MAX_DEPTH {
        match check_one(args, &next, &name, out)? {
            Some(parent) if args.has('p') => {
                name = parent.clone();
                next = parent.into();
            }
            _ => return Ok(()),
        }
    }
    Err(crate::Error::TooDeep { limit: chain::MAX_DEPTH }.into())
}

/// Checks one image and returns the path of its parent if that is an image too.
fn check_one(args: &Args, path: &Path, name: &str, out: &mut dyn Write) -> Result<Option<String>, Failure> {
    let disk = Disk::open(path, false).map_err(|error| {
        let errno = errno_of(&error);
        Failure::new(errno, format!("cannot stat {name}: {errno}"))
    })?;
    let options = CheckOptions {
        ignore_footer: args.has('i'),
        ignore_timestamps: args.has('t'),
        bitmaps: args.has('b'),
        now: now(),
    };
    let vhd = match disk.with_source(|source| check::check(source, &options))? {
        Verdict::Fixed => return Ok(None),
        Verdict::Valid(vhd) => vhd,
        Verdict::Invalid(reason) => {
            writeln!(out, "{reason}")?;
            dump(&disk, name, out)?;
            return Err(Failure::silent(libc::EINVAL));
        }
    };
    if args.has('s') {
        let usage = disk.with_source(|source| check::usage(source, &vhd))?;
        writeln!(out, "{name}: {}", usage_text(usage))?;
    } else {
        writeln!(out, "{name} is valid")?;
    }
    let identity = vhd.parent().map(|parent| parent.uuid);
    let parent = match open_parent(&disk, &vhd, &LOOK) {
        Err(crate::Error::ParentChanged { .. }) if args.has('I') => return Ok(None),
        Err(_) if !args.has('p') => return Ok(None),
        other => other?,
    };
    let is_image = identity.is_some_and(|uuid| !uuid.is_null());
    Ok(parent.filter(|_| is_image).map(|parent| parent.disk.path.display().to_string()))
}

fn usage_text(usage: check::Usage) -> String {
    // Hundredths of a percent; a half goes to the even neighbour, as printf does it.
    let scaled = usage.written.saturating_mul(10_000);
    let (down, rest) = scaled
        .checked_div(usage.allocated)
        .map_or((0, 0), |down| (down, scaled.checked_rem(usage.allocated).unwrap_or(0)));
    let up = match rest.saturating_mul(2).cmp(&usage.allocated) {
        Ordering::Less => false,
        Ordering::Equal => usage.allocated > 0 && down % 2 == 1,
        Ordering::Greater => true,
    };
    let hundredths = down.saturating_add(u64::from(up));
    format!(
        "secs allocated: {:#x} secs written: {:#x} ({}.{:02}%)",
        usage.allocated,
        usage.written,
        hundredths / 100,
        hundredths % 100
    )
}

/// Prints what can be read of a damaged image.
fn dump(disk: &Disk, name: &str, out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "{name} appears invalid; dumping metadata")?;
    match disk.vhd(&LOOK) {
        Ok(vhd) => headers(disk, &vhd, out),
        Err(error) => {
            writeln!(out, "Failed to open {name}: -{}\n", error.errno())?;
            writeln!(out, "{name} appears invalid; dumping headers\n")?;
            let mut first = vec![0; 1536];
            if disk.read_at(0, &mut first).is_err() {
                first.fill(0);
            }
            let (footer, header) = first.split_at_checked(512).unwrap_or_default();
            out.write_all(print::footer(&RawFooter::from_slice(footer)).as_bytes())?;
            out.write_all(print::header(&RawHeader::from_slice(header)).as_bytes())?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_printed_with_two_decimals() {
        let text = |allocated, written| usage_text(check::Usage { allocated, written });
        assert_eq!(text(0, 0), "secs allocated: 0x0 secs written: 0x0 (0.00%)");
        assert_eq!(text(0x4000, 0x108a), "secs allocated: 0x4000 secs written: 0x108a (25.84%)");
        assert_eq!(text(0x2000, 0x900), "secs allocated: 0x2000 secs written: 0x900 (28.12%)");
        assert_eq!(text(3, 2), "secs allocated: 0x3 secs written: 0x2 (66.67%)");
    }
}
