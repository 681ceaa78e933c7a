//! The VHD core as a [`Format`].

use format::cipher::Cipher;
use format::{DiscardPlan, Format, FormatError, Load, Lookup, Packed, Plan, Sector, Step};

use crate::{BlockIndex, Error, Vhd};

impl FormatError for Error {
    fn errno(&self) -> i32 {
        Error::errno(self)
    }
}

impl Format for Vhd {
    type Error = Error;

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        Vhd::place(self, sector, count)
    }

    fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        Vhd::overwrite(self, sector, count)
    }

    fn map(&self, sector: Sector, count: u32) -> Result<Lookup, Error> {
        Vhd::map(self, sector, count)
    }

    fn loaded(&mut self, load: &Load, bytes: &[u8]) -> Result<(), Error> {
        self.insert_bitmap(block(load.key), bytes)
    }

    fn load_failed(&mut self, load: &Load) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.load_ended(block(load.key));
        }
    }

    fn unpack(&self, _packed: &Packed, _bytes: &[u8], _into: &mut [u8]) -> Result<(), Error> {
        Err(Error::invalid("block", "a VHD has no compressed data"))
    }

    fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        Vhd::plan_write(self, sector, count)
    }

    fn prepared(&mut self, key: u64, done: bool) {
        match done {
            true => self.block_prepared(block(key)),
            false => self.prepare_failed(block(key)),
        }
    }

    fn written(&mut self, sector: Sector, count: u32, done: bool) {
        match done {
            true => self.sectors_written(sector, count),
            false => self.write_failed(sector, count),
        }
    }

    /// Data that the image has become a hole, which reads as zeros; the block keeps its place, as the format knows no free
    /// one. A sector that it has not stays as it is, zeros or the parent's.
    fn plan_discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        if self.is_poisoned() {
            return Err(Error::Poisoned);
        }
        // The zeros of a hole are no ciphertext of zeros.
        if self.key_hash().is_some() {
            return Ok(DiscardPlan::Skip { count });
        }
        Ok(match Vhd::map(self, sector, count)? {
            Lookup::Data { offset, count } => DiscardPlan::Punch { offset, count },
            Lookup::Zero { count } | Lookup::Parent { count } | Lookup::Packed { count, .. } => {
                DiscardPlan::Skip { count }
            }
            Lookup::Load(load) => DiscardPlan::Load(load),
        })
    }

    fn begin_commit(&mut self) -> Option<Vec<Step>> {
        Vhd::begin_commit(self)
    }

    fn commit_ended(&mut self, done: bool) {
        match done {
            true => self.commit_done(),
            false => self.commit_failed(),
        }
    }

    fn begin_resize(&mut self, sectors: u64) -> Result<Option<Vec<Step>>, Error> {
        Vhd::begin_resize(self, sectors)
    }

    fn resize_ended(&mut self, done: bool) {
        match done {
            true => self.resize_done(),
            false => self.resize_failed(),
        }
    }

    fn close_steps(&self) -> Vec<Step> {
        Vhd::close_steps(self)
    }

    fn is_poisoned(&self) -> bool {
        Vhd::is_poisoned(self)
    }

    fn cipher(&self) -> Option<&Cipher> {
        self.dynamic.as_ref()?.cipher.as_ref()
    }
}

/// The block that a key stands for.
fn block(key: u64) -> BlockIndex {
    // Keys are blocks that this core has given out.
    BlockIndex::try_from(key).unwrap_or(BlockIndex::MAX)
}
