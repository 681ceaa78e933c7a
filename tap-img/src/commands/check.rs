//! `tap-img check`.

use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use format::Source;
use format::blocking::with_source;
use serde::Serialize;
use tap_ctl::proto::ImageType;
use tap_img::source::format_name;
use vhd::check::{CheckOptions, Verdict};

use super::Args;

/// No check for the format; as `qemu-img check`.
const UNSUPPORTED: u8 = 63;

/// What was found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Found {
    filename: String,
    format: &'static str,
    /// What loses data.
    corruptions: u64,
    /// Units of the file that are lost, and nothing worse.
    leaks: u64,
    /// The first of both, in words.
    problems: Vec<String>,
}

pub fn run(args: Args) -> anyhow::Result<u8> {
    let name = &args.names[0];
    let kind = args.format()?;
    let found = match kind {
        ImageType::Vhd => check_vhd(name)?,
        ImageType::Qcow2 => read(name, |source| {
            let report = qcow::v2::check(source)?;
            Ok(Found {
                corruptions: report.corruptions,
                leaks: report.leaks,
                problems: report.problems,
                ..Found::default()
            })
        })?,
        ImageType::Qcow => read(name, |source| Ok(counted(qcow::v1::check::check(source)?)))?,
        ImageType::Vmdk => read(name, |source| Ok(counted(vmdk::check::check(source)?)))?,
        other => {
            if !args.quiet {
                println!("images of format {} have nothing to check", format_name(other));
            }
            return Ok(UNSUPPORTED);
        }
    };
    let found = Found { filename: name.clone(), format: format_name(kind), ..found };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else if !args.quiet {
        tell(&found);
    }
    Ok(match found {
        Found { corruptions: 1.., .. } => 2,
        Found { leaks: 1.., .. } => 3,
        _ => 0,
    })
}

fn tell(found: &Found) {
    for problem in &found.problems {
        println!("{problem}");
    }
    match (found.corruptions, found.leaks) {
        (0, 0) => println!("No errors were found on the image."),
        (0, leaks) => println!("{leaks} units of the file are lost, which does no harm."),
        (errors, _) => println!("{errors} errors were found on the image."),
    }
}

fn read<T>(name: &str, check: impl FnOnce(Source<'_>) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let file = File::open(name).with_context(|| name.to_owned())?;
    with_source(&file, check)?.with_context(|| name.to_owned())
}

fn counted(report: format::report::Report) -> Found {
    Found { corruptions: report.count, problems: report.problems, ..Found::default() }
}

fn check_vhd(name: &str) -> anyhow::Result<Found> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = vhd::time::from_unix(i64::try_from(now).unwrap_or(i64::MAX));
    let options = CheckOptions { bitmaps: true, now, ..CheckOptions::default() };
    read(name, |mut source| {
        Ok(match vhd::check::check(&mut source, &options)? {
            Verdict::Fixed | Verdict::Valid(_) => Found::default(),
            Verdict::Invalid(reason) => Found { corruptions: 1, problems: vec![reason], ..Found::default() },
        })
    })
}
