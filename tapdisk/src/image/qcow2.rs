//! qcow2 images in a chain.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use format::FormatError;
use format::blocking::with_source;
use nix::errno::Errno;
use qcow::v2::{self, Error, Qcow2};
use tap_ctl::proto::ImageType;

use super::OpenError;
use super::file::ImageFile;
use super::formatted::Formatted;
use super::layer::Layer;
use super::open::{Backing, Opened, Opener};

impl Opener<'_> {
    /// Opens a qcow2 image. One whose reference counts may be wrong, because its last writer did not close it and had said that
    /// it would be so, is put right first if it is to be written.
    pub(super) fn open_qcow2(&mut self, file: ImageFile, writable: bool) -> Result<Opened, OpenError> {
        let refuse =
            |error: Error| OpenError::new(file.path(), Errno::from_raw(error.errno()), error.to_string());
        let core = match self.open_core(&file, writable)? {
            Err(Error::NeedsRepair) => {
                log::warn!("{}: was not closed; its reference counts are rebuilt", file.path().display());
                v2::repair(&mut file.writer()?).map_err(refuse)?;
                self.open_core(&file, writable)?
            }
            result => result,
        };
        let core = core.map_err(refuse)?;
        let backing = backing(&core, &file)?;
        Ok(Opened { layer: Layer::Qcow2(Box::new(Formatted::new(file, core, self.io))), backing })
    }

    fn open_core(&self, file: &ImageFile, writable: bool) -> Result<Result<Qcow2, Error>, OpenError> {
        let reader = file.reader()?;
        let open = |key: Option<Vec<u8>>| {
            let options = v2::OpenOptions { writable, key, ..v2::OpenOptions::default() };
            with_source(&reader, |source| v2::open(source, &options))
                .map_err(|error| OpenError::io(file.path(), "cannot measure", &error))
        };
        match open(self.params.key.as_ref().map(|key| key.bytes().to_vec()))? {
            // An encrypted disk may have grown from a plain one.
            Err(Error::NotEncrypted) if self.below => open(None),
            result => Ok(result),
        }
    }
}

/// What the header says of the file below. Without a format it counts as raw: whoever could write to a raw file could make any
/// other format of it.
fn backing(core: &Qcow2, file: &ImageFile) -> Result<Option<Backing>, OpenError> {
    let Some(backing) = core.backing() else { return Ok(None) };
    let name = OsString::from_vec(backing.name.clone()).into();
    let kind = match backing.format.as_deref() {
        None => return Ok(Some(Backing::Bare { name })),
        Some("raw" | "file" | "host_device") => ImageType::Aio,
        Some("qcow2") => ImageType::Qcow2,
        Some("qcow") => ImageType::Qcow,
        Some("vpc") => ImageType::Vhd,
        Some("vmdk") => ImageType::Vmdk,
        Some(other) => {
            let text = format!("its backing file has the format '{other}', which is not supported");
            return Err(OpenError::new(file.path(), Errno::ENOTSUP, text));
        }
    };
    Ok(Some(Backing::Named { name, kind }))
}
