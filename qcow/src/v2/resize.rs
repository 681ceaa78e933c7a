//! Growing the disk, while it is in use.
//!
//! If the L1 table has too few entries, a larger one is written to a new place. Size, number of entries and place lie in one
//! sector of the header: a stop at any moment leaves the old disk or the new one.

use format::{MetaWrite, SECTOR_SIZE, Step};

use super::Error;
use super::geometry::{down, index, put, up};
use super::header::{MAX_L1_BYTES, at};
use super::image::Qcow2;
use super::metadata;
use super::space::Found;

/// What the image becomes when the steps of a growth have been carried out.
#[derive(Debug)]
pub(super) struct Growth {
    sectors: u64,
    /// Byte offset and entries of a new L1 table.
    l1: Option<(u64, u64)>,
}

impl Qcow2 {
    /// Begins to make the disk so many sectors large.
    pub(super) fn resize_steps(&mut self, sectors: u64) -> Result<Option<Vec<Step>>, Error> {
        self.check_growth(sectors)?;
        let g = self.geometry;
        let size = sectors.saturating_mul(SECTOR_SIZE);
        let entries = g.l1_entries(size);
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        if writing.commit.is_some() || writing.space.running || writing.is_starting() {
            return Ok(None);
        }
        let mut steps = if writing.is_started() { Vec::new() } else { self.start_steps() };
        let mut growth = Growth { sectors, l1: None };
        let file_len = if self.regular { g.round_up(self.file_len) } else { self.file_len };
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        steps.extend(writing.space.failed_steps().iter().cloned());
        if entries > self.header.l1_entries {
            let clusters = down(g.round_up(entries.saturating_mul(8)), g.cluster_bits);
            let device = (!self.regular).then_some(file_len);
            let place = match writing.extend(&mut self.header, clusters, clusters, file_len, device)? {
                Found::Yes(more) => {
                    steps.extend(more.steps);
                    more.clusters
                }
                Found::Load(_) => {
                    return Err(Error::invalid(
                        "refcount table",
                        "it has blocks far behind the end of the image",
                    ));
                }
            };
            writing.pin_reserve();
            let offset = up(place.start, g.cluster_bits);
            let mut bytes = vec![0; index(up(clusters, g.cluster_bits))];
            for (at, entry) in self.l1.iter().enumerate() {
                put(&mut bytes, at.saturating_mul(8), &entry.to_be_bytes());
            }
            steps.push(Step::Write(MetaWrite { offset, bytes }));
            growth.l1 = Some((offset, entries));
        }
        let (offset, entries) = growth.l1.unwrap_or((self.header.l1_offset, self.header.l1_entries));
        let count = u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes();
        let fields: [(usize, &[u8]); 3] = [
            (at::SIZE, &size.to_be_bytes()),
            (at::L1_ENTRIES, &count),
            (at::L1_OFFSET, &offset.to_be_bytes()),
        ];
        self.header.sector = self.header.with(&fields);
        let header = MetaWrite { offset: 0, bytes: self.header.sector.to_vec() };
        steps.extend([Step::Flush, Step::Write(header), Step::Flush]);
        writing.resizing = Some(growth);
        Ok(Some(steps))
    }

    fn check_growth(&self, sectors: u64) -> Result<(), Error> {
        self.check_writable()?;
        if sectors < self.sectors {
            return Err(Error::invalid(
                "size",
                format!("{sectors} sectors are fewer than the disk has, {}", self.sectors),
            ));
        }
        if self.geometry.version < 3 && !self.snapshots.is_empty() {
            return Err(Error::unsupported(
                "snapshots of version 2, which do not tell the size of their disk",
            ));
        }
        let most = i64::MAX.unsigned_abs();
        let size = sectors.checked_mul(SECTOR_SIZE).filter(|&size| size <= most);
        let size =
            size.ok_or(Error::TooBig { what: "disk size in sectors", value: sectors, limit: most / 512 })?;
        let table = self.geometry.l1_entries(size).saturating_mul(8);
        if table > MAX_L1_BYTES {
            return Err(Error::TooBig { what: "L1 table size", value: table, limit: MAX_L1_BYTES });
        }
        Ok(())
    }

    /// The steps have been carried out, or (`done` false) one has failed.
    pub(super) fn end_resize(&mut self, done: bool) {
        let g = self.geometry;
        let Some(writing) = &mut self.writing else { return };
        let Some(growth) = writing.resizing.take() else { return };
        if !done {
            writing.poisoned = true;
            return;
        }
        self.sectors = growth.sectors;
        self.header.size = growth.sectors.saturating_mul(SECTOR_SIZE);
        if let Some((offset, entries)) = growth.l1 {
            let (old, old_len) = (self.header.l1_offset, self.header.l1_entries.saturating_mul(8));
            writing.metadata.remove_range(old, old_len, &g);
            writing.metadata.add_range(offset, entries.saturating_mul(8), &g);
            if old_len > 0 {
                let gone = metadata::clusters(old, old_len, &g);
                gone.clone().for_each(|cluster| writing.free_later(cluster));
                writing.refcounts.let_go(gone);
            }
            writing.refcounts.keep(metadata::clusters(offset, entries.saturating_mul(8), &g));
            self.l1.resize(index(entries), 0);
            self.header.l1_entries = entries;
            self.header.l1_offset = offset;
        }
        self.everything_prepared();
    }
}
