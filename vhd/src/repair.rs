//! Putting right what can be put right without losing data: footers, the end of the file, a damaged batmap.

use format::{Source, Step};

use crate::footer::{self, RawFooter};
use crate::{Error, OpenOptions, Uuid, Vhd, bat, open};

/// What a repair does.
#[derive(Debug)]
pub struct Repair {
    /// The steps.
    pub steps: Vec<Step>,
    /// Blocks that reached beyond the end of the file. What they had there is lost; it reads as zeros from now on.
    pub lost_blocks: usize,
}

/// Decides how to repair an image, of which nothing is believed but the copy of the footer at offset 0 if `from_copy`. An
/// image without an identifier gets `uuid`.
///
/// # Errors
/// An image that cannot be opened even by tools that trust it, and blocks that overlap each other or the headers: no repair
/// can know whose data they hold.
pub fn repair(source: &mut Source<'_>, from_copy: bool, uuid: Uuid) -> Result<Repair, Error> {
    let options = OpenOptions { trust_end: !from_copy, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = open::open(source, &options)?;
    if from_copy {
        if vhd.dynamic.is_none() {
            return Err(Error::invalid("image", "a fixed image has no backup of its footer"));
        }
        let copy = open::bytes(source, "footer copy", 0, footer::LEN as u64)?;
        vhd.footer = RawFooter::from_slice(&copy);
    }
    if vhd.footer.uuid.is_null() {
        vhd.footer.uuid = uuid;
    }
    let mut lost_blocks = 0;
    if let Some(dynamic) = &vhd.dynamic {
        bat::check_places(&dynamic.bat, &dynamic.layout, u64::MAX)?;
        let limit = open::data_limit(source);
        let beyond = |&(_, entry): &(u32, u32)| dynamic.layout.extent(entry).end > limit;
        lost_blocks = dynamic.bat.iter().filter(beyond).count();
        if lost_blocks > 0 && !source.regular {
            return Err(Error::invalid("image", "its blocks reach beyond the end of the device"));
        }
    }
    Ok(Repair { steps: steps(&vhd), lost_blocks })
}

fn steps(vhd: &Vhd) -> Vec<Step> {
    let mut steps = vec![Step::Flush];
    vhd.footer_steps(&mut steps);
    vhd.close_batmap(&mut steps);
    steps
}
