//! Reading what is not in the file as it is on the disk: compressed units and encrypted sectors.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use format::{Format, Lookup, Packed};
use nix::errno::Errno;

use super::Formatted;
use crate::buf::Buf;
use crate::image::bytes;
use crate::io::Io;

/// Unpacked units kept in memory, for the sectors that are read next. With the largest clusters, of 2 MiB, that is 8 MiB.
const KEPT_UNITS: usize = 4;

/// The units that were unpacked last, the latest last.
#[derive(Debug, Default)]
pub(super) struct Units(RefCell<Vec<(Packed, Rc<[u8]>)>>);

impl Units {
    fn get(&self, packed: &Packed) -> Option<Rc<[u8]>> {
        let mut units = self.0.borrow_mut();
        let index = units.iter().position(|(other, _)| other == packed)?;
        let unit = units.remove(index);
        let content = unit.1.clone();
        units.push(unit);
        Some(content)
    }

    fn keep(&self, packed: Packed, content: Rc<[u8]>) {
        let mut units = self.0.borrow_mut();
        if units.len() == KEPT_UNITS {
            units.remove(0);
        }
        units.push((packed, content));
    }
}

impl<F: Format> Formatted<F> {
    /// Reads the first of the sectors that belong into `range` of `buf`, of which [`Formatted::map`] has said that only the
    /// layer can read them. Returns how many bytes; 0 if they have moved meanwhile.
    pub async fn read(
        &self,
        io: &Io,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<usize, Errno> {
        let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        let _flight = io.flights.begin();
        let lookup = self.core.borrow().map(sector.0, count).map_err(|e| self.errno(&e))?;
        match lookup {
            Lookup::Data { offset, count } => {
                let part = range.start..range.start + bytes(count);
                self.read_sealed(io, sector, offset, buf, part).await?;
                Ok(bytes(count))
            }
            Lookup::Packed { packed, first, count } => {
                let unit = self.unit(io, packed).await?;
                let wanted = unit.get(bytes(first)..bytes(first) + bytes(count)).ok_or(Errno::EIO)?;
                if !buf.copy_from(range.start, wanted) {
                    return Err(Errno::EINVAL);
                }
                Ok(bytes(count))
            }
            Lookup::Load(load) => self.load(io, &load).await.map(|()| 0),
            Lookup::Zero { .. } | Lookup::Parent { .. } => Ok(0),
        }
    }

    async fn unit(&self, io: &Io, packed: Packed) -> Result<Rc<[u8]>, Errno> {
        if let Some(content) = self.units.get(&packed) {
            return Ok(content);
        }
        let there = self.file.measure()?.saturating_sub(packed.offset);
        let len = packed.len as usize;
        let mut raw = io
            .read_metadata(
                &self.file,
                packed.offset,
                usize::try_from(there).map_or(len, |there| there.min(len)),
            )
            .await?;
        raw.resize(len, 0);
        let mut content = vec![0; bytes(packed.sectors)];
        self.core.borrow().unpack(&packed, &raw, &mut content).map_err(|e| self.errno(&e))?;
        let content: Rc<[u8]> = content.into();
        self.units.keep(packed, content.clone());
        Ok(content)
    }

    /// Reads encrypted sectors by way of memory of our own: the guest never sees what is in the file.
    async fn read_sealed(
        &self,
        io: &Io,
        mut sector: Sector,
        mut offset: u64,
        buf: &Buf,
        mut range: Range<usize>,
    ) -> Result<(), Errno> {
        while !range.is_empty() {
            let mut bounce = io.pool.bounce(range.len())?;
            let len = bounce.len().min(range.len());
            io.read(&self.file, offset, &bounce, 0..len).await?;
            if let Some(cipher) = self.core.borrow().cipher() {
                cipher.decrypt(sector.0, &mut bounce.bytes_mut()[..len]);
            }
            if !bounce.copy_to(0..len, buf, range.start) {
                return Err(Errno::EINVAL);
            }
            sector.0 += len as u64 / SECTOR_SIZE;
            offset += len as u64;
            range.start += len;
        }
        Ok(())
    }
}
