//! `tap-img check`.

use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use format::Source;
use format::blocking::Storage;
use serde::Serialize;
use tap_ctl::proto::ImageType;
use vhd::check::{CheckOptions, Verdict};

use super::Args;

/// No check for the format; as `qemu-img check`.
const UNSUPPORTED: u8 = 63;

/// What was found.
#[derive(Debug, Serialize)]
struct Found {
    filename: String,
    /// What is damaged; `None`: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

pub fn run(args: Args) -> anyhow::Result<u8> {
    let name = &args.names[0];
    let damage = match args.format()? {
        ImageType::Vhd => check_vhd(name)?,
        other => {
            if !args.quiet {
                println!("images of format {} have nothing to check", tap_img::source::format_name(other));
            }
            return Ok(UNSUPPORTED);
        }
    };
    let code = if damage.is_some() { 2 } else { 0 };
    let found = Found { filename: name.clone(), damage };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else if !args.quiet {
        println!("{}", found.damage.as_deref().unwrap_or("No errors were found on the image."));
    }
    Ok(code)
}

fn check_vhd(name: &str) -> anyhow::Result<Option<String>> {
    let file = File::open(name).with_context(|| name.to_owned())?;
    let mut read = |offset, buf: &mut [u8]| file.read_at(offset, buf);
    let mut source = Source { size: file.size()?, regular: file.is_regular()?, read: &mut read };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = vhd::time::from_unix(i64::try_from(now).unwrap_or(i64::MAX));
    let options = CheckOptions { bitmaps: true, now, ..CheckOptions::default() };
    match vhd::check::check(&mut source, &options).with_context(|| name.to_owned())? {
        Verdict::Fixed | Verdict::Valid(_) => Ok(None),
        Verdict::Invalid(reason) => Ok(Some(reason)),
    }
}
