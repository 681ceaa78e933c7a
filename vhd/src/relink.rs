//! Giving a differencing image another parent.
//!
//! The names of a parent stand in several places, and the header spans two sectors: no order of writing them holds on its own.
//! So an undo journal ([`crate::journal`]) is made first and the image poisoned meanwhile, as for a resize. On a block device
//! there is no lasting place for a journal: there the names go first and the header, whose checksum shows a tear, last.

use format::blocking::Storage;
use format::{MetaWrite, SECTOR_SIZE};
use zerocopy::IntoBytes;

use crate::enlarge::{poisoned, read, sync, write};
use crate::header::{self, RawHeader};
use crate::journal::{Builder, Kind};
use crate::{DiskType, Error, NewParent, Vhd, locator};

/// Where storage managers' tests stop a change of the parent; the names are those of blktap's environment variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Nothing has been changed.
    Begin,
    /// The locators' names are the new ones, the header is the old one.
    Locator,
    /// Everything is done.
    End,
}

impl Point {
    /// The name of the environment variable.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Begin => "VHD_UTIL_TEST_FAIL_REPARENT_BEGIN",
            Self::Locator => "VHD_UTIL_TEST_FAIL_REPARENT_LOCATOR",
            Self::End => "VHD_UTIL_TEST_FAIL_REPARENT_END",
        }
    }
}

/// Told where the work is; an error ends it there.
pub type AtPoint<'a> = dyn FnMut(Point) -> Result<(), Error> + 'a;

/// What is to be written.
struct Plan {
    header: RawHeader,
    names: Vec<MetaWrite>,
}

/// Decides the new header and names. Pure.
fn plan(vhd: &Vhd, parent: &NewParent) -> Result<Plan, Error> {
    let header = vhd.header().filter(|_| vhd.kind() == DiskType::Differencing);
    let header = header.ok_or_else(|| Error::invalid("image", "only a differencing image has a parent"))?;
    let mut header = header.clone();
    header.parent_uuid = parent.uuid;
    header.parent_timestamp = parent.timestamp.into();
    header.set_parent_name(&parent.name)?;
    let mut names = Vec::new();
    for raw in &mut header.locators {
        let Some((offset, space)) = locator::extent(raw) else { continue };
        let Some(platform) = locator::Platform::from_code(raw.code.get()) else { continue };
        let mut bytes = locator::encode(platform, &parent.path);
        let space = usize::try_from(space).unwrap_or(0);
        if bytes.len() > space {
            return Err(Error::NameTooLong { space });
        }
        raw.length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).into();
        bytes.resize(space, 0);
        names.push(MetaWrite { offset, bytes });
    }
    if names.is_empty() {
        return Err(Error::NoParentName);
    }
    header.seal();
    Ok(Plan { header, names })
}

/// Makes `parent` the parent of an image that was opened from `image` for writing and that nobody else uses. The journal is
/// left to be removed; without one a stop in between can leave an image that has to be relinked again.
///
/// # Errors
/// [`Error::Invalid`] for an image that has no parent, [`Error::NameTooLong`]: nothing has been touched then. Those of the
/// storages. What `at` says.
pub fn relink<I: Storage, J: Storage>(
    vhd: &Vhd,
    image: &mut I,
    journal: Option<&mut J>,
    parent: &NewParent,
    at: &mut AtPoint<'_>,
) -> Result<(), Error> {
    let plan = plan(vhd, parent)?;
    at(Point::Begin)?;
    let footers = match journal {
        None => Vec::new(),
        Some(journal) => {
            let footers = footers(image)?;
            save(vhd, &plan, image, &footers)?.write(journal)?;
            for (offset, footer) in &footers {
                write(image, *offset, &poisoned(footer))?;
            }
            sync(image)?;
            footers
        }
    };
    for name in &plan.names {
        write(image, name.offset, &name.bytes)?;
    }
    sync(image)?;
    at(Point::Locator)?;
    write(image, vhd.footer.data_offset.get(), plan.header.as_bytes())?;
    sync(image)?;
    // The footer at offset 0, which decides, is the first.
    for (offset, footer) in footers.iter().rev() {
        write(image, *offset, footer.as_bytes())?;
        sync(image)?;
    }
    at(Point::End)
}

/// The footers of a tidy image with their places: the one at the end, the one at offset 0.
fn footers<I: Storage>(image: &I) -> Result<Vec<(u64, crate::footer::RawFooter)>, Error> {
    let size = image.size().map_err(|source| Error::Io { what: "image", offset: 0, source })?;
    let end = size.checked_sub(SECTOR_SIZE).ok_or(Error::TooShort { size })?;
    let footer = |offset: u64| -> Result<_, Error> {
        let bytes = read(image, offset, offset.saturating_add(SECTOR_SIZE))?;
        Ok((offset, crate::footer::RawFooter::from_slice(&bytes)))
    };
    Ok(vec![footer(end)?, footer(0)?])
}

/// What the image holds in all places that will change.
fn save<I: Storage>(
    vhd: &Vhd,
    plan: &Plan,
    image: &I,
    footers: &[(u64, crate::footer::RawFooter)],
) -> Result<Builder, Error> {
    let end = footers.first().map_or(0, |&(offset, _)| offset);
    let mut journal = Builder::new(vhd.uuid(), end);
    for ((offset, footer), kind) in footers.iter().zip([Kind::EndFooter, Kind::FooterCopy]) {
        journal.add(kind, *offset, footer.as_bytes());
    }
    let header = vhd.footer.data_offset.get();
    journal.add(Kind::Header, header, &read(image, header, header.saturating_add(header::LEN as u64))?);
    for name in &plan.names {
        let behind = name.offset.saturating_add(name.bytes.len() as u64);
        journal.add(Kind::Locator, name.offset, &read(image, name.offset, behind)?);
    }
    Ok(journal)
}
