//! What drivers see.

use format::cipher::Cipher;
use format::{DiscardPlan, Format, Load, Lookup, Packed, Plan, Sector, Step};

use super::{Error, Qcow2, unpack};

impl Format for Qcow2 {
    type Error = Error;

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        self.in_one_piece(sector, count, false)
    }

    fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        self.overwrite_at(sector, count)
    }

    fn map(&self, sector: Sector, count: u32) -> Result<Lookup, Error> {
        let answer = self.resolve(sector, count)?;
        if let Lookup::Load(load) = &answer {
            self.slices.load_began(load.key);
        }
        Ok(answer)
    }

    fn loaded(&mut self, load: &Load, bytes: &[u8]) -> Result<(), Error> {
        self.take_load(load, Some(bytes))
    }

    fn load_failed(&mut self, load: &Load) {
        // Nothing can be wrong with bytes that did not come.
        let _ = self.take_load(load, None);
    }

    fn unpack(&self, packed: &Packed, bytes: &[u8], into: &mut [u8]) -> Result<(), Error> {
        unpack::unpack(self.header.compression, packed, bytes, into)
    }

    fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.plan(sector, count)
    }

    fn prepared(&mut self, key: u64, done: bool) {
        self.preparation_ended(key, done);
    }

    fn written(&mut self, sector: Sector, count: u32, done: bool) {
        self.data_written(sector, count, done);
    }

    fn plan_discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        self.discard(sector, count)
    }

    fn begin_commit(&mut self) -> Option<Vec<Step>> {
        self.commit_steps()
    }

    fn commit_ended(&mut self, done: bool) {
        self.end_commit(done);
    }

    fn begin_resize(&mut self, sectors: u64) -> Result<Option<Vec<Step>>, Error> {
        self.resize_steps(sectors)
    }

    fn resize_ended(&mut self, done: bool) {
        self.end_resize(done);
    }

    fn close_steps(&self) -> Vec<Step> {
        self.resting_steps()
    }

    fn is_poisoned(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.poisoned)
    }

    fn cipher(&self) -> Option<&Cipher> {
        self.cipher.as_ref()
    }
}
