//! A look through a whole image while nothing serves it yet.

use std::os::unix::fs::FileExt;

use format::{Format, FormatError, Lookup};
use nix::errno::Errno;

use super::Formatted;

impl<F: Format> Formatted<F> {
    /// Whether every sector of the disk is the parent's. Blocks; as long as it takes to read the tables.
    ///
    /// # Errors
    /// EIO if they cannot be read, and what the format says of them.
    pub fn shows_parent_only(&self) -> Result<bool, Errno> {
        let reader = self.file.reader().map_err(|error| error.errno())?;
        let mut core = self.core.borrow_mut();
        let (mut sector, sectors) = (0, core.sectors());
        while sector < sectors {
            let count = u32::try_from(sectors - sector).unwrap_or(u32::MAX);
            match core.map(sector, count).map_err(|error| Errno::from_raw(error.errno()))? {
                Lookup::Parent { count: 0 } => return Err(Errno::EIO),
                Lookup::Parent { count } => sector += u64::from(count),
                Lookup::Load(load) => {
                    let mut bytes = vec![0; load.len as usize];
                    if reader.read_exact_at(&mut bytes, load.offset).is_err() {
                        core.load_failed(&load);
                        return Err(Errno::EIO);
                    }
                    core.loaded(&load, &bytes).map_err(|error| Errno::from_raw(error.errno()))?;
                }
                Lookup::Data { .. } | Lookup::Zero { .. } | Lookup::Packed { .. } => return Ok(false),
            }
        }
        Ok(true)
    }
}
