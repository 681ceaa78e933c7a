//! Closing an image after writes, so that other programs find it as they expect.

use zerocopy::IntoBytes;

use crate::write::MetaWrite;
use crate::{DiskType, SECTOR_SIZE, Vhd};

/// What remains to be done when a writable image is closed, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseWrites {
    /// The steps; a step begins when the one before it has ended, and a failed step ends the closing.
    pub steps: Vec<CloseStep>,
}

/// One step of closing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseStep {
    /// Write these bytes.
    Write(MetaWrite),
    /// Set the length of the file.
    Truncate(u64),
    /// Make everything so far durable.
    Flush,
}

impl Vhd {
    /// The steps of a clean close. All writes must have ended, with everything committed.
    ///
    /// The footer at offset 0 goes first, because it decides when the two differ. The batmap goes last, behind a flush: it
    /// may call only such blocks full whose bitmaps are durable. After a failed commit the image is left alone, for nobody
    /// knows which blocks its table names.
    pub fn close_writes(&self) -> CloseWrites {
        let mut steps = Vec::new();
        let intact = self.writable && !self.is_poisoned();
        if intact {
            steps.push(CloseStep::Flush);
            self.close_footers(&mut steps);
            self.close_batmap(&mut steps);
        }
        CloseWrites { steps }
    }

    fn close_footers(&self, steps: &mut Vec<CloseStep>) {
        let Some(dynamic) = self.dynamic.as_ref().filter(|d| self.unclean || d.writes.moved_end()) else {
            return;
        };
        debug_assert_ne!(self.kind, DiskType::Fixed);
        let mut footer = self.footer.clone();
        footer.seal();
        let bytes = footer.as_bytes().to_vec();
        steps.push(CloseStep::Write(MetaWrite { offset: 0, bytes: bytes.clone() }));
        steps.push(CloseStep::Flush);
        match dynamic.writes.alloc.device_footer() {
            Some(offset) => steps.push(CloseStep::Write(MetaWrite { offset, bytes })),
            None => {
                let offset = dynamic.end_of_data;
                steps.push(CloseStep::Write(MetaWrite { offset, bytes }));
                steps.push(CloseStep::Truncate(offset.saturating_add(SECTOR_SIZE)));
            }
        }
        steps.push(CloseStep::Flush);
    }

    fn close_batmap(&self, steps: &mut Vec<CloseStep>) {
        let Some(batmap) = self.dynamic.as_ref().and_then(|dynamic| dynamic.batmap.as_ref()) else { return };
        let Some((header, map)) = batmap.to_write(self.footer.current_size.get()) else { return };
        let map = MetaWrite { offset: header.offset.get(), bytes: map.to_vec() };
        let header = MetaWrite { offset: batmap.offset, bytes: header.as_bytes().to_vec() };
        steps.extend([CloseStep::Write(map), CloseStep::Write(header), CloseStep::Flush]);
    }
}
