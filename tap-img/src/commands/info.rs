//! `tap-img info`.

use std::os::unix::fs::MetadataExt;

use serde::Serialize;
use tap_img::source::format_name;

use super::{Args, work};

/// What is told of an image; the names are those of `qemu-img info --output=json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: String,
    format: &'static str,
    /// Bytes of the disk.
    virtual_size: u64,
    /// Bytes that the file takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    /// The files of its parents, the nearest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parents: Vec<String>,
}

pub fn run(args: Args) -> anyhow::Result<u8> {
    let (image, json) = (args.image()?, args.json);
    let info = work(async move |io| {
        let disk = image.open(&io, false)?;
        let mut files = disk.files().into_iter();
        let own = files.next().flatten();
        Ok(Info {
            filename: image.spec.path.clone(),
            format: format_name(image.spec.kind),
            virtual_size: disk.sectors() * 512,
            actual_size: own.and_then(|path| Some(path.metadata().ok()?.blocks() * 512)),
            parents: files.flatten().map(|path| path.display().to_string()).collect(),
        })
    })?;
    if json {
        println!("{}", serde_json::to_string_pretty(&info)?);
        return Ok(0);
    }
    println!("image: {}\nfile format: {}", info.filename, info.format);
    println!("virtual size: {} ({} bytes)", human(info.virtual_size), info.virtual_size);
    if let Some(size) = info.actual_size {
        println!("disk size: {}", human(size));
    }
    for parent in info.parents {
        println!("backing file: {parent}");
    }
    Ok(0)
}

/// A size with its first digits.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let hundredths = (u128::from(bytes) * 100) >> (10 * unit);
    match hundredths % 100 {
        0 => format!("{} {}", hundredths / 100, UNITS[unit]),
        rest => format!("{}.{rest:02} {}", hundredths / 100, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_their_unit() {
        let sizes = [0, 512, 1024, 1536, 5 << 30, u64::MAX].map(human);
        assert_eq!(sizes, ["0 B", "512 B", "1 KiB", "1.50 KiB", "5 GiB", "15.99 EiB"]);
    }
}
