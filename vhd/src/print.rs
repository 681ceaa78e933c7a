//! Metadata as text, in the form of `vhd-util read -p`, on which scripts rely.

use std::fmt::Write;

use crate::batmap::RawBatmapHeader;
use crate::footer::{FEATURE_RESERVED, FEATURE_TEMPORARY, RawFooter};
use crate::header::{RawHeader, RawLocator};
use crate::{geometry, time};

/// The summary of a footer.
pub fn footer(footer: &RawFooter) -> String {
    let features = footer.features.get();
    let flag = |bit, name| if features & bit != 0 { name } else { "" };
    let [format_major, format_minor] = halves(footer.version.get());
    let [creator_major, creator_minor] = halves(footer.creator_version.get());
    let (cylinders, heads, sectors) = geometry::split(footer.geometry.get());
    let mut text = title("VHD Footer Summary:");
    line(&mut text, "Cookie", ascii(&footer.cookie));
    line(
        &mut text,
        "Features",
        format!(
            "({features:#010x}) {}{}",
            flag(FEATURE_TEMPORARY, "<TEMP>"),
            flag(FEATURE_RESERVED, "<RESV>")
        ),
    );
    line(&mut text, "File format version", format!("Major: {format_major}, Minor: {format_minor}"));
    line(&mut text, "Data offset", footer.data_offset);
    line(&mut text, "Timestamp", time::format(footer.timestamp.get()));
    line(&mut text, "Creator Application", format!("'{}'", ascii(&footer.creator)));
    line(&mut text, "Creator version", format!("Major: {creator_major}, Minor: {creator_minor}"));
    let os = match &footer.creator_os {
        b"Wi2k" => "Windows",
        b"Mac " => "Macintosh",
        _ => "Unknown!",
    };
    line(&mut text, "Creator OS", os);
    line(&mut text, "Original disk size", bytes(footer.original_size.get()));
    line(&mut text, "Current disk size", bytes(footer.current_size.get()));
    line(&mut text, "Geometry", format!("Cyl: {cylinders}, Hds: {heads}, Sctrs: {sectors}"));
    line(&mut text, "", format!("= {}", bytes(geometry::bytes(footer.geometry.get()))));
    let kind = match footer.disk_type.get() {
        0 => "None",
        2 => "Fixed hard disk",
        3 => "Dynamic hard disk",
        4 => "Differencing hard disk",
        1 | 5 | 6 => "Reserved (deprecated)",
        _ => "Unknown type!",
    };
    line(&mut text, "Disk type", kind);
    line(&mut text, "Checksum", checksum(footer.checksum.get(), footer.expected_checksum()));
    line(&mut text, "UUID", footer.uuid);
    line(&mut text, "Saved state", if footer.saved == 0 { "No" } else { "Yes" });
    line(&mut text, "Hidden", footer.hidden);
    text.push('\n');
    text
}

/// The summary of a dynamic header.
pub fn header(header: &RawHeader) -> String {
    let mut text = title("VHD Header Summary:");
    let block_size = header.block_size.get();
    line(&mut text, "Cookie", ascii(&header.cookie));
    line(&mut text, "Data offset (unusd)", header.data_offset);
    line(&mut text, "Table offset", header.table_offset);
    line(&mut text, "Header version", format!("{:#010x}", header.version.get()));
    line(&mut text, "Max BAT size", header.table_entries);
    line(&mut text, "Block size", format!("{block_size} ({} MB)", block_size >> 20));
    line(&mut text, "Parent name", header.parent_name());
    line(&mut text, "Parent UUID", header.parent_uuid);
    line(&mut text, "Parent timestamp", time::format(header.parent_timestamp.get()));
    line(&mut text, "Checksum", checksum(header.checksum.get(), header.expected_checksum()));
    text.push('\n');
    text
}

/// The list of parent locators in use, each with the name that was decoded from it.
pub fn locators<'a>(locators: impl IntoIterator<Item = (usize, &'a RawLocator, Option<String>)>) -> String {
    let mut text = title("VHD Parent Locators:");
    for (slot, raw, name) in locators {
        let code = match &raw.code.get().to_be_bytes() {
            b"MacX" => "PLAT_CODE_MACX",
            b"W2ku" => "PLAT_CODE_W2KU",
            b"W2ru" => "PLAT_CODE_W2RU",
            b"Wi2r" => "PLAT_CODE_WI2R",
            b"Wi2k" => "PLAT_CODE_WI2K",
            b"Mac " => "PLAT_CODE_MAC",
            _ => "<unknown>",
        };
        line(&mut text, "locator:", slot);
        line(&mut text, "       code", code);
        line(&mut text, "       data_space", raw.space);
        line(&mut text, "       data_length", raw.length);
        line(&mut text, "       data_offset", raw.offset);
        line(&mut text, "       decoded name", name.as_deref().unwrap_or("<unreadable>"));
        text.push('\n');
    }
    text
}

/// The summary of a batmap header with the checksum that its map should have.
pub fn batmap(header: &RawBatmapHeader, expected_checksum: u32) -> String {
    let mut text = title("VHD Batmap Summary:");
    line(&mut text, "Batmap offset", header.offset);
    line(&mut text, "Batmap size (secs)", header.sectors);
    line(&mut text, "Batmap version", format!("{:#010x}", header.version.get()));
    if let Some(key) = header.key_hash() {
        line(&mut text, "Batmap keyhash nonce", hex(&key.nonce));
        line(&mut text, "Batmap keyhash hash", hex(&key.hash));
    }
    line(&mut text, "Checksum", checksum(header.checksum.get(), expected_checksum));
    text.push('\n');
    text
}

fn title(title: &str) -> String {
    format!("{title}\n{}\n", "-".repeat(title.len()))
}

fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{name:20}: {value}");
}

/// Text up to the first zero; bytes that are no text become U+FFFD.
fn ascii(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn bytes(bytes: u64) -> String {
    format!("{} MB ({bytes} Bytes)", bytes >> 20)
}

fn checksum(found: u32, expected: u32) -> String {
    format!("{found:#x}|{expected:#x} ({}!)", if found == expected { "Good" } else { "Bad" })
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn halves(version: u32) -> [u16; 2] {
    let [a, b, c, d] = version.to_be_bytes();
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}
