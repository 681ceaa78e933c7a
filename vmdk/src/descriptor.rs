//! The descriptor: the text that says what a disk is made of.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::Error;

/// Bytes of the longest descriptor in a file of its own, as in QEMU.
pub const MAX_LEN: u64 = 1 << 20;
/// Extents of a disk: 8 TiB in pieces of 2 GiB.
const MAX_EXTENTS: usize = 4096;
/// Bytes of the longest name of an extent.
const MAX_NAME: usize = 510;
/// The content identifier of no parent.
const NO_PARENT: u32 = u32::MAX;

/// What a disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One sparse extent with the descriptor in it.
    MonolithicSparse,
    /// One compressed extent, made to be read or sent in one go.
    StreamOptimized,
    /// Sparse extents of 2 GiB.
    TwoGbMaxExtentSparse,
    /// Flat extents: monolithicFlat, twoGbMaxExtentFlat and vmfs.
    Flat,
}

/// How an extent stores its part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As it is, from this sector of its file on.
    Flat {
        /// Sectors of the file before the first.
        offset: u64,
    },
    /// As [`crate::Sparse`].
    Sparse,
    /// Nowhere: it reads as zeros and cannot be written.
    Zero,
}

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Whether the descriptor lets it be written.
    pub writable: bool,
    /// Sectors.
    pub sectors: u64,
    /// How it is stored.
    pub storage: Storage,
    /// Its file, a plain name in the descriptor's own folder; empty for [`Storage::Zero`].
    pub name: String,
}

/// A checked descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Content identifier: changed by the first write after opening, so that children notice.
    pub cid: u32,
    /// What the disk is made of.
    pub kind: Kind,
    /// Its parts, in order; at least one.
    pub extents: Vec<Extent>,
}

impl Descriptor {
    /// Checks a descriptor. One that lies within an extent is followed by zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`], and [`Error::Unsupported`] for kinds of disks that the crate does not read.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, Error> {
        let text = text(bytes)?;
        let (mut cid, mut parent, mut kind, mut extents) = (None, NO_PARENT, None, Vec::new());
        for line in text.lines().map(str::trim) {
            if let Some(extent) = extent(line)? {
                extents.push(extent);
                if extents.len() > MAX_EXTENTS {
                    return Err(invalid(format!("more than {MAX_EXTENTS} extents")));
                }
                continue;
            }
            match pair(line) {
                Some((key, value)) if key.eq_ignore_ascii_case("CID") => cid = Some(hex(value)?),
                Some((key, value)) if key.eq_ignore_ascii_case("parentCID") => parent = hex(value)?,
                Some((key, value)) if key.eq_ignore_ascii_case("createType") => {
                    kind = Some(create_type(value)?)
                }
                _ => {}
            }
        }
        if parent != NO_PARENT {
            return Err(Error::Unsupported("children of other VMDKs".into()));
        }
        let kind = kind.ok_or_else(|| invalid("it has no createType"))?;
        let cid = cid.ok_or_else(|| invalid("it has no CID"))?;
        if extents.is_empty() {
            return Err(invalid("it has no extents"));
        }
        Ok(Descriptor { cid, kind, extents })
    }

    /// Sectors of the disk.
    ///
    /// # Errors
    /// [`Error::TooBig`].
    pub fn sectors(&self) -> Result<u64, Error> {
        let limit = u64::MAX >> 10;
        let sum = self.extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.sectors));
        sum.filter(|&sum| sum <= limit).ok_or(Error::TooBig {
            what: "number of sectors",
            value: sum.unwrap_or(u64::MAX),
            limit,
        })
    }
}

/// The text of a descriptor with another content identifier, for the first write after opening; `None` if it has none.
pub fn with_new_cid(text: &str) -> Option<String> {
    with_cid(text, new_cid())
}

/// A content identifier that nobody has, and that has no meaning.
pub(crate) fn new_cid() -> u32 {
    // The keys of a hasher are as random as a content identifier needs.
    let random = RandomState::new().build_hasher().finish() & 0x7fff_ffff;
    u32::try_from(random).unwrap_or(1).max(1)
}

fn with_cid(text: &str, cid: u32) -> Option<String> {
    let is_cid = |line: &str| pair(line.trim()).is_some_and(|(key, _)| key.eq_ignore_ascii_case("CID"));
    let line = text.split_inclusive('\n').find(|line| is_cid(line))?;
    let end = line.trim_end_matches(['\r', '\n']).len();
    let new = format!("CID={cid:08x}{}", line.get(end..)?);
    Some(text.replacen(line, &new, 1))
}

/// The text of a descriptor, without the zeros that may follow it.
///
/// # Errors
/// [`Error::Invalid`] if it is none.
pub fn text(bytes: &[u8]) -> Result<&str, Error> {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last.saturating_add(1));
    let text = bytes.get(..end).unwrap_or_default();
    if text.contains(&0) {
        return Err(invalid("it contains a zero byte"));
    }
    let text = std::str::from_utf8(text).map_err(|_| invalid("it is not UTF-8"))?;
    if !text.trim_start().starts_with("# Disk DescriptorFile") {
        return Err(invalid("it does not begin with '# Disk DescriptorFile'"));
    }
    Ok(text)
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("descriptor", reason)
}

/// `key = "value"`, with or without blanks and quotes.
fn pair(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=').filter(|_| !line.starts_with('#'))?;
    Some((key.trim(), value.trim().trim_matches('"')))
}

fn hex(text: &str) -> Result<u32, Error> {
    u32::from_str_radix(text, 16).map_err(|_| invalid(format!("{text:?} is no content identifier")))
}

fn create_type(text: &str) -> Result<Kind, Error> {
    match text {
        "monolithicSparse" => Ok(Kind::MonolithicSparse),
        "streamOptimized" => Ok(Kind::StreamOptimized),
        "twoGbMaxExtentSparse" => Ok(Kind::TwoGbMaxExtentSparse),
        "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs" => Ok(Kind::Flat),
        _ => Err(Error::Unsupported(format!("VMDKs of type {text:?}"))),
    }
}

/// The extent that a line describes: access, sectors, storage, `"name"`, offset.
fn extent(line: &str) -> Result<Option<Extent>, Error> {
    let (access, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let writable = match access {
        "RW" => true,
        "RDONLY" => false,
        "NOACCESS" => return Err(Error::Unsupported("extents without access".into())),
        _ => return Ok(None),
    };
    let wrong = || invalid(format!("{line:?} is no extent"));
    let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace).ok_or_else(wrong)?;
    let sectors = sectors.parse().ok().filter(|&sectors: &u64| sectors > 0).ok_or_else(wrong)?;
    let rest = rest.trim_start();
    let (storage, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    if storage == "ZERO" {
        return Ok(Some(Extent { writable, sectors, storage: Storage::Zero, name: String::new() }));
    }
    let (name, rest) =
        rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"')).ok_or_else(wrong)?;
    let offset = match rest.split_whitespace().next() {
        None => 0,
        Some(offset) => offset.parse().map_err(|_| wrong())?,
    };
    let storage = match storage {
        "FLAT" | "VMFS" => Storage::Flat { offset },
        "SPARSE" => Storage::Sparse,
        other => return Err(Error::Unsupported(format!("extents of type {other:?}"))),
    };
    check_name(name)?;
    Ok(Some(Extent { writable, sectors, storage, name: name.to_owned() }))
}

/// Refuses all but a plain name: an image must not make us open files elsewhere, or anything else than files.
fn check_name(name: &str) -> Result<(), Error> {
    let plain = !name.is_empty()
        && name.len() <= MAX_NAME
        && !matches!(name, "." | "..")
        && !name.contains(['/', '\\', ':'])
        && !name.chars().any(char::is_control);
    if plain { Ok(()) } else { Err(invalid(format!("the extent name {name:?} is no plain name of a file"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\n CID = 0000abcd \r\nparentCID=ffffffff\r\n\
        createType=\"twoGbMaxExtentSparse\"\r\n\r\n# Extent description\r\nRW 4194304 SPARSE \"a b-s001.vmdk\"\r\n\
        RDONLY 100   FLAT  \"f\"  7\r\nRW 5 ZERO\r\n\r\nddb.adapterType = \"ide\"\r\n";

    #[test]
    fn a_descriptor_with_line_ends_blanks_and_zeros_behind_it() {
        let descriptor = Descriptor::parse(&[TEXT.as_bytes(), &[0; 99]].concat()).unwrap();
        assert_eq!((descriptor.cid, descriptor.kind), (0xabcd, Kind::TwoGbMaxExtentSparse));
        let extent =
            |writable, sectors, storage, name: &str| Extent { writable, sectors, storage, name: name.into() };
        assert_eq!(
            descriptor.extents,
            [
                extent(true, 4_194_304, Storage::Sparse, "a b-s001.vmdk"),
                extent(false, 100, Storage::Flat { offset: 7 }, "f"),
                extent(true, 5, Storage::Zero, "")
            ]
        );
        assert_eq!(descriptor.sectors().unwrap(), 4_194_409);
    }

    #[test]
    fn another_content_identifier_changes_nothing_else() {
        let new = with_cid(TEXT, 0x1f).unwrap();
        assert_eq!(new, TEXT.replace(" CID = 0000abcd ", "CID=0000001f"));
        assert_eq!(with_cid("parentCID=ffffffff\n", 1), None);
    }

    fn errno(text: &str) -> i32 {
        use format::FormatError;
        Descriptor::parse(text.as_bytes()).unwrap_err().errno()
    }

    #[test]
    fn m71_malformed_descriptors() {
        let with = |from: &str, to: &str| {
            let text = TEXT.replace(from, to);
            assert_ne!(text, TEXT);
            text
        };
        let many = (0..=MAX_EXTENTS).map(|i| format!("RW 1 FLAT \"{i}\" 0\n")).collect::<String>();
        for text in [
            String::new(),
            with("# Disk", "Disk"),
            with("CID = 0000abcd", "CID = wxyz"),
            with(" CID = 0000abcd ", ""),
            with("createType", "kreateType"),
            with("4194304", "-1"),
            with("4194304", "0"),
            with("4194304", "99999999999999999999999"),
            with("\"a b-s001.vmdk\"", "\"a b"),
            with("\"a b-s001.vmdk\"", ""),
            with("a b-s001.vmdk", &"x".repeat(511)),
            with("\"f\"  7", "\"f\"  x"),
            with("version", "ver\0sion"),
            format!("{TEXT}{many}"),
            with("RW 4194304 SPARSE \"a b-s001.vmdk\"\r\nRDONLY 100   FLAT  \"f\"  7\r\nRW 5 ZERO", ""),
        ] {
            assert_eq!(errno(&text), libc::EINVAL, "{text}");
        }
    }

    #[test]
    fn m72_names_that_lead_elsewhere() {
        for name in ["/etc/shadow", "../x", "..", ".", "", "a/b", "json:{}", "nbd:x", "a\\b", "a\u{1}b"] {
            assert_eq!(errno(&TEXT.replace("a b-s001.vmdk", name)), libc::EINVAL, "{name:?}");
        }
    }

    #[test]
    fn kinds_that_are_not_supported() {
        for (from, to) in [
            ("twoGbMaxExtentSparse", "vmfsSparse"),
            ("twoGbMaxExtentSparse", "fullDevice"),
            ("parentCID=ffffffff", "parentCID=12345678"),
            ("SPARSE", "SESPARSE"),
            ("RDONLY", "NOACCESS"),
        ] {
            assert_eq!(errno(&TEXT.replacen(from, to, 1)), libc::ENOTSUP, "{to}");
        }
        let huge = TEXT.replace("4194304", &(u64::MAX >> 9).to_string());
        assert!(Descriptor::parse(huge.as_bytes()).unwrap().sectors().is_err());
    }
}
