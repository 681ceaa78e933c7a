//! `tap-img map`: which sectors hold data, and in which image.

use std::fmt::Write;

use blkif::Sector;
use serde::Serialize;
use tapdisk::image::{Disk, Holds};

use super::{Args, work};

/// A run of bytes that is alike; the names are those of `qemu-img map --output=json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Entry {
    start: u64,
    length: u64,
    /// The image: 0 is the one asked for, 1 its parent.
    depth: usize,
    /// An image has it.
    present: bool,
    /// It reads as zeros.
    zero: bool,
    data: bool,
    /// Byte offset in the image's file, if it is there as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Entry {
    /// Joined with what follows it, if both are one run.
    fn joined(&mut self, next: &Entry) -> bool {
        let end = |entry: &Entry| entry.offset.map(|offset| offset + entry.length);
        let alike = (self.depth, self.present, self.zero, self.data)
            == (next.depth, next.present, next.zero, next.data);
        let joins = alike && self.start + self.length == next.start && end(self) == next.offset;
        if joins {
            self.length += next.length;
        }
        joins
    }
}

pub fn run(args: Args) -> anyhow::Result<u8> {
    let (image, json) = (args.image()?, args.json);
    let text = work(async move |io| {
        let disk = image.open(&io, false)?;
        let entries = entries(&disk).await?;
        Ok(if json { to_json(&entries)? } else { to_text(&entries, &files(&disk)) })
    })?;
    print!("{text}");
    Ok(0)
}

async fn entries(disk: &Disk) -> anyhow::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut at = 0;
    while at < disk.sectors() {
        let most = u32::try_from(disk.sectors() - at).unwrap_or(u32::MAX);
        let run = disk.survey(Sector(at), most).await?;
        let (data, offset) = match run.holds {
            Holds::Data { offset } => (true, offset),
            Holds::Zeros | Holds::Nothing => (false, None),
        };
        let entry = Entry {
            start: at * 512,
            length: u64::from(run.count) * 512,
            depth: run.depth,
            present: run.holds != Holds::Nothing,
            zero: !data,
            data,
            offset,
        };
        if !entries.last_mut().is_some_and(|last| last.joined(&entry)) {
            entries.push(entry);
        }
        at += u64::from(run.count);
    }
    Ok(entries)
}

fn files(disk: &Disk) -> Vec<String> {
    let name = |path: Option<&std::path::Path>| path.map_or("-".into(), |path| path.display().to_string());
    disk.files().into_iter().map(name).collect()
}

fn to_json(entries: &[Entry]) -> anyhow::Result<String> {
    let lines = entries.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(format!("[{}]\n", lines.join(",\n")))
}

fn to_text(entries: &[Entry], files: &[String]) -> String {
    let mut text = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
    for Entry { start, length, depth, offset, .. } in entries.iter().filter(|entry| entry.data) {
        let place = offset.map_or("-".into(), |offset| format!("{offset:#x}"));
        let file = files.get(*depth).map_or("-", String::as_str);
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "{:<16}{:<16}{place:<16}{file}", format!("{start:#x}"), format!("{length:#x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, offset: Option<u64>) -> Entry {
        Entry { start, length: 512, depth: 0, present: true, zero: false, data: true, offset }
    }

    #[test]
    fn runs_join_where_both_disk_and_file_go_on() {
        let mut first = entry(0, Some(4096));
        assert!(!first.clone().joined(&entry(512, Some(9000))));
        assert!(!first.clone().joined(&entry(512, None)));
        assert!(!first.clone().joined(&Entry { depth: 1, ..entry(512, Some(4608)) }));
        assert!(first.joined(&entry(512, Some(4608))));
        assert_eq!(first.length, 1024);
    }

    #[test]
    fn the_output_is_qemus() {
        let entries = [entry(0, Some(4096)), Entry { zero: true, data: false, ..entry(512, None) }];
        let json = to_json(&entries).unwrap();
        assert!(json.starts_with(r#"[{"start":0,"length":512,"depth":0,"present":true,"zero":false,"data":true,"offset":4096},"#), "{json}");
        let text = to_text(&entries, &["a".into()]);
        assert_eq!(text.lines().nth(1), Some("0x0             0x200           0x1000          a"));
        assert_eq!(text.lines().count(), 2, "zeros are left out");
    }
}
