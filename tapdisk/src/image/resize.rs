//! Growing a disk while it is in use. A disk never shrinks: the guest may have data everywhere.

use blkif::ids::SECTOR_SIZE;
use format::Format;
use nix::errno::Errno;

use super::Disk;
use super::file::ImageFile;
use super::filter::Filters;
use super::formatted::Formatted;
use super::layer::Layer;

/// What a size that was asked for comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// The disk has it, or can have it, without a change to the store.
    Take { sectors: u64 },
    /// A file is to be made this many bytes long first.
    Extend { bytes: u64 },
}

/// Decides on the growth of a raw image. `found`: the bytes of the store now; `sectors`: of the disk so far; `asked`: bytes,
/// `None` to go by the store.
fn decide(found: u64, sectors: u64, asked: Option<u64>, regular: bool) -> Result<Change, &'static str> {
    let bytes = match asked {
        None => found / SECTOR_SIZE * SECTOR_SIZE,
        Some(bytes) if bytes.is_multiple_of(SECTOR_SIZE) => bytes,
        Some(_) => return Err("the size is no multiple of 512 bytes"),
    };
    if bytes / SECTOR_SIZE < sectors {
        return Err("a disk in use never shrinks");
    }
    if bytes <= found {
        return Ok(Change::Take { sectors: bytes / SECTOR_SIZE });
    }
    match regular {
        true => Ok(Change::Extend { bytes }),
        false => Err("the block device is smaller: grow it first"),
    }
}

impl Disk {
    /// Takes over the size of the store, or grows the disk to `size` bytes; returns the capacity in sectors from then on. It
    /// is durable before the guest is told.
    ///
    /// # Errors
    ///
    /// EBUSY while another resize is under way. EINVAL for a size that is smaller, no multiple of 512, or more than the store or the format's table has room for; the
    /// reason is logged. EROFS if the disk is read-only and a size is asked for.
    pub async fn resize(&self, size: Option<u64>) -> Result<u64, Errno> {
        if size.is_some() {
            self.check_writable()?;
        }
        if self.resizing.replace(true) {
            return Err(Errno::EBUSY);
        }
        let result = match &self.filters {
            None => self.change_size(size).await,
            Some(filters) => Box::pin(self.change_size_below(filters, size)).await,
        };
        self.resizing.set(false);
        result.map(|()| self.sectors())
    }

    async fn change_size_below(&self, filters: &Filters, size: Option<u64>) -> Result<(), Errno> {
        if filters.has_second() && size.is_none_or(|size| size != self.sectors() * SECTOR_SIZE) {
            return Err(self.refuse_size(
                "it has a secondary image, which would be too small: do without it first (tap-ctl pause, unpause -2 null)",
            ));
        }
        self.change_size(size).await?;
        // The guest is not told before: it writes nothing yet to what is new.
        filters.grown(self.sectors()).await;
        Ok(())
    }

    async fn change_size(&self, size: Option<u64>) -> Result<(), Errno> {
        match &self.chain.leaf {
            Layer::Raw(raw) => self.resize_raw(&raw.file, size).await,
            // The size of these is their own.
            _ if size.is_none() => Ok(()),
            Layer::Vmdk(_) => Err(self.refuse_size("a VMDK keeps its size; convert it to another format")),
            Layer::Nbd(_) => Err(self.refuse_size("an NBD server has its size, grow it there")),
            Layer::Null(_) => self.own_size(size).map(|sectors| self.common.grow(sectors)),
            Layer::Vhd(vhd) => self.grow(vhd, size).await,
            Layer::Qcow(qcow) => self.grow(qcow, size).await,
            Layer::Qcow2(qcow) => self.grow(qcow, size).await,
        }
    }

    async fn grow<F: Format>(&self, image: &Formatted<F>, size: Option<u64>) -> Result<(), Errno> {
        let sectors = self.own_size(size)?;
        if sectors > self.sectors() {
            image.resize(&self.io, sectors).await?;
            self.common.grow(sectors);
        }
        Ok(())
    }

    /// The size asked for, of an image that sets its own.
    fn own_size(&self, size: Option<u64>) -> Result<u64, Errno> {
        match decide(u64::MAX, self.sectors(), size, true) {
            Ok(Change::Take { sectors }) => Ok(sectors),
            Ok(Change::Extend { bytes }) => Ok(bytes / SECTOR_SIZE),
            Err(reason) => Err(self.refuse_size(reason)),
        }
    }

    async fn resize_raw(&self, file: &ImageFile, size: Option<u64>) -> Result<(), Errno> {
        let change = decide(file.measure()?, self.sectors(), size, file.is_regular())
            .map_err(|reason| self.refuse_size(reason))?;
        let sectors = match change {
            Change::Take { sectors } => sectors,
            Change::Extend { bytes } => {
                let kept = file.keep();
                self.io.reactor.blocking(move || kept.file().set_len(bytes).map(|()| 0)).await?;
                self.io.fdatasync(file).await?;
                bytes / SECTOR_SIZE
            }
        };
        self.common.grow(sectors);
        Ok(())
    }

    fn refuse_size(&self, reason: &str) -> Errno {
        log::error!("{}: cannot be resized: {reason}", self.name());
        Errno::EINVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_takes_what_there_is_grows_a_file_and_never_shrinks() {
        assert_eq!(decide(4096, 8, None, true), Ok(Change::Take { sectors: 8 }));
        assert_eq!(decide(8191, 8, None, false), Ok(Change::Take { sectors: 15 }));
        assert_eq!(decide(8192, 8, Some(6144), false), Ok(Change::Take { sectors: 12 }));
        assert_eq!(decide(4096, 8, Some(8192), true), Ok(Change::Extend { bytes: 8192 }));
        for (found, asked, regular) in [
            (4096, Some(8192), false),
            (4096, Some(2048), true),
            (2048, None, false),
            (4096, Some(4097), true),
        ] {
            assert!(decide(found, 8, asked, regular).is_err(), "{found} {asked:?} {regular}");
        }
    }
}
