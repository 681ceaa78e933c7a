//! Closing an image after writes, so that other programs find it as they expect.

use format::{MetaWrite, Step};
use zerocopy::IntoBytes;

use crate::image::EndFooter;
use crate::{Error, KeyHash, SECTOR_SIZE, Vhd, bat};

impl Vhd {
    /// The steps of a clean close. All writes must have ended, with everything committed.
    ///
    /// The footer at offset 0 goes first, because it decides when the two differ. The batmap goes last, behind a flush: it
    /// may call only such blocks full whose bitmaps are durable. After a failed commit the image is left alone, for nobody
    /// knows which blocks its table names.
    pub fn close_steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let intact = self.writable && !self.is_poisoned();
        if intact {
            steps.push(Step::Flush);
            self.close_footers(&mut steps);
            self.close_batmap(&mut steps);
        }
        steps
    }

    fn close_footers(&self, steps: &mut Vec<Step>) {
        let Some(dynamic) = &self.dynamic else { return };
        if self.end != EndFooter::Alike || dynamic.writes.moved_end() {
            self.footer_steps(steps);
        }
    }

    /// Writes the footer to all its places, the deciding one first.
    pub(crate) fn footer_steps(&self, steps: &mut Vec<Step>) {
        let bytes = self.footer.sealed().as_bytes().to_vec();
        let write = |offset| Step::Write(MetaWrite { offset, bytes: bytes.clone() });
        match &self.dynamic {
            None => steps.push(write(self.fixed_footer)),
            Some(dynamic) => {
                steps.extend([write(0), Step::Flush]);
                match dynamic.writes.alloc.device_footer() {
                    Some(offset) => steps.push(write(offset)),
                    None => {
                        let offset = dynamic.end_of_data;
                        steps.extend([write(offset), Step::Truncate(offset.saturating_add(SECTOR_SIZE))]);
                    }
                }
            }
        }
        steps.push(Step::Flush);
    }

    pub(crate) fn close_batmap(&self, steps: &mut Vec<Step>) {
        let Some(batmap) = self.dynamic.as_ref().and_then(|dynamic| dynamic.batmap.as_ref()) else { return };
        let writes = batmap.writes(self.footer.current_size.get());
        if !writes.is_empty() {
            steps.extend(writes.into_iter().map(Step::Write));
            steps.push(Step::Flush);
        }
    }

    /// Sets the flag that hides the image from storage managers, and returns the steps that put it on disk.
    ///
    /// # Errors
    /// [`Error::ReadOnly`].
    pub fn set_hidden(&mut self, hidden: u8) -> Result<Vec<Step>, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.footer.hidden = hidden;
        let mut steps = Vec::new();
        self.footer_steps(&mut steps);
        Ok(steps)
    }

    /// Makes the image an encrypted one, and returns the steps that put that on disk. For use without key while there are no
    /// data.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], and [`Error::Invalid`] if the image has data or no batmap, in which the hash of the key lies.
    pub fn set_key_hash(&mut self, key: KeyHash) -> Result<Vec<Step>, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        if self.allocated_blocks() > 0 {
            return Err(Error::invalid(
                "image",
                "it has data already, which a key cannot be set for any more",
            ));
        }
        let batmap = self.dynamic.as_mut().and_then(|dynamic| dynamic.batmap.as_mut());
        batmap
            .ok_or_else(|| Error::invalid("image", "it has no batmap to hold a key's hash"))?
            .set_key_hash(key);
        let mut steps = Vec::new();
        self.close_batmap(&mut steps);
        Ok(steps)
    }

    /// The steps before some blocks may become partly written: the batmap calls them full no more.
    ///
    /// # Errors
    /// [`Error::ReadOnly`].
    pub fn partial_steps(&mut self, blocks: &[crate::BlockIndex]) -> Result<Vec<Step>, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        let mut steps = Vec::new();
        if let Some(batmap) = self.dynamic.as_mut().and_then(|dynamic| dynamic.batmap.as_mut()) {
            batmap.retain(|block| blocks.binary_search(&block).is_err());
        }
        self.close_batmap(&mut steps);
        Ok(steps)
    }

    /// The steps that drop all data of the image.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], and [`Error::Invalid`] for a fixed image.
    pub fn clear_steps(&mut self) -> Result<Vec<Step>, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        let Some(dynamic) = &mut self.dynamic else {
            return Err(Error::invalid("image", "a fixed image cannot be emptied"));
        };
        let mut steps = Vec::new();
        // Nothing may be called full that is not there any more.
        if let Some(batmap) = &mut dynamic.batmap {
            batmap.retain(|_| false);
            steps.extend(batmap.writes(self.footer.current_size.get()).into_iter().map(Step::Write));
            steps.push(Step::Flush);
        }
        let entries = dynamic.bat.entries();
        let bytes = bat::UNUSED.to_be_bytes().repeat(usize::try_from(entries).unwrap_or(0));
        let mut table = MetaWrite { offset: dynamic.layout.table_offset, bytes };
        let keep = dynamic.bat.padding();
        table.bytes.extend(keep);
        steps.extend([Step::Write(table), Step::Flush]);
        dynamic.end_of_data = dynamic.layout.end_of_headers;
        self.footer_steps(&mut steps);
        Ok(steps)
    }

    /// The steps that put the footer where the end of a file or device of `size` bytes will be; `now` is its length. Its
    /// length is then to be changed by other means, except that a shorter file becomes as long.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the data do not fit before it, or the device is smaller.
    pub fn phys_size_steps(&self, size: u64, now: u64, regular: bool) -> Result<Vec<Step>, Error> {
        let offset = size.checked_sub(SECTOR_SIZE).filter(|&offset| offset >= self.end_of_data());
        let fits = size.is_multiple_of(SECTOR_SIZE) && (regular || size <= now);
        let Some(offset) = offset.filter(|_| fits && self.dynamic.is_some()) else {
            let least = self.end_of_data().saturating_add(SECTOR_SIZE);
            return Err(Error::invalid("size", format!("{size} bytes are no end for an image of {least}")));
        };
        let bytes = self.footer.sealed().as_bytes().to_vec();
        Ok(vec![Step::Write(MetaWrite { offset, bytes }), Step::Flush])
    }

    /// Sets the storage managers' marker, and returns the steps that put it on disk.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], and [`Error::Invalid`] if the image has no batmap, in which the marker lies.
    pub fn set_marker(&mut self, marker: u8) -> Result<Vec<Step>, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        let batmap = self.dynamic.as_mut().and_then(|dynamic| dynamic.batmap.as_mut());
        let batmap = batmap.ok_or_else(|| Error::invalid("image", "it has no batmap to hold a marker"))?;
        batmap.set_marker(marker);
        let mut steps = Vec::new();
        self.close_batmap(&mut steps);
        Ok(steps)
    }
}
