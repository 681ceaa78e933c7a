//! qcow images, version 1, in a chain.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

use format::{FormatError, Source};
use nix::errno::Errno;
use qcow::v1::{self, Error, Qcow};

use super::OpenError;
use super::file::ImageFile;
use super::formatted::Formatted;
use super::layer::Layer;
use super::open::{Backing, Opened, Opener};

/// How all versions begin.
const MAGIC: &[u8; 4] = b"QFI\xfb";

impl Opener<'_> {
    pub(super) fn open_qcow(&mut self, file: ImageFile, writable: bool) -> Result<Opened, OpenError> {
        let reader = file.reader()?;
        let mut read = |offset: u64, bytes: &mut [u8]| reader.read_exact_at(bytes, offset);
        let (size, regular) = (file.len(), file.is_regular());
        let mut open = |key| {
            let options = v1::OpenOptions { writable, key, ..v1::OpenOptions::default() };
            v1::open(Source { size, regular, read: &mut read }, &options)
        };
        let core = match open(self.params.key.as_ref().map(|key| key.bytes())) {
            // An encrypted disk may have grown from a plain one.
            Err(Error::KeyUnneeded) if self.below => open(None),
            result => result,
        };
        let core = core.map_err(|error| {
            OpenError::new(file.path(), Errno::from_raw(error.errno()), error.to_string())
        })?;
        let backing = backing(&core);
        Ok(Opened { layer: Layer::Qcow(Box::new(Formatted::new(file, core, self.io))), backing })
    }
}

fn backing(core: &Qcow) -> Option<Backing> {
    let name = OsString::from_vec(core.backing()?.name.clone()).into();
    Some(Backing::Bare { name })
}

/// Refuses a backing file of which the child says no format if it is an image itself: as the raw one that it counts as, it
/// would be read, but as something else than was meant.
pub(super) fn check_bare(file: &ImageFile) -> Result<(), OpenError> {
    let mut magic = [0; 4];
    let read = file.reader()?.read_exact_at(&mut magic, 0);
    if read.is_ok() && magic == *MAGIC {
        let text = "is itself a qcow image, but its child does not say so, and formats are not guessed; a child of version 1 \
                    cannot: convert it to qcow2; a qcow2 child can: 'qemu-img rebase -u -F FORMAT -b NAME CHILD'";
        return Err(OpenError::new(file.path(), Errno::EINVAL, text));
    }
    Ok(())
}
