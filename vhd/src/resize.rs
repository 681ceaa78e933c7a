//! Growing the disk in place, while it is in use: as far as the allocation table has room, only metadata change.
//!
//! libvhd calls this a fast resize. The order of the steps is such that a stop at any moment leaves the old size or the new
//! one, and in each a valid image:
//!
//! 1. the table's new entries say "not allocated", for what lies there is nobody's; the batmap covers them with clear bits;
//! 2. then the footer at offset 0 has the new size: if it stops here, the footer at the end still has the old one, and that
//!    is taken;
//! 3. then the footer at the end.
//!
//! No block is prepared meanwhile, because that moves the end of a file.

use format::{MetaWrite, Step};
use zerocopy::IntoBytes;

use crate::bat::PER_SECTOR;
use crate::footer::RawFooter;
use crate::image::Dynamic;
use crate::{Error, MAX_DISK_SIZE, SECTOR_SIZE, Vhd, geometry};

/// A growth under way.
#[derive(Debug)]
pub(crate) struct Growth {
    footer: RawFooter,
    blocks: u32,
    footer_end: u64,
}

impl Vhd {
    /// The largest size in sectors that the image can grow to in place; for a fixed image the one it has.
    pub fn max_sectors(&self) -> u64 {
        let Some(dynamic) = &self.dynamic else { return self.sectors };
        let blocks = u64::from(dynamic.header.table_entries.get());
        let room = blocks.saturating_mul(dynamic.layout.block_sectors.into());
        room.min(MAX_DISK_SIZE / SECTOR_SIZE).max(self.sectors)
    }

    /// Begins to make the disk `sectors` sectors large. `None`: a commit or the preparation of a block is under way; wait for
    /// its end and call again, which must not be left out, for no further block is prepared from now on.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Poisoned`], and [`Error::Invalid`] for a size that is smaller or beyond
    /// [`Vhd::max_sectors`]. Nothing has begun then.
    pub fn begin_resize(&mut self, sectors: u64) -> Result<Option<Vec<Step>>, Error> {
        self.check_growth(sectors)?;
        let mut footer = self.footer.clone();
        footer.current_size = sectors.saturating_mul(SECTOR_SIZE).into();
        footer.geometry = geometry::for_sectors(sectors).into();
        footer.seal();
        let Some(dynamic) = &mut self.dynamic else {
            return Err(Error::invalid("size", "a fixed image cannot grow in place"));
        };
        let idle = dynamic.writes.alloc.hold();
        if !idle || !dynamic.writes.begin_alone() {
            return Ok(None);
        }
        let in_block = u64::from(dynamic.layout.block_sectors.max(1));
        let blocks = u32::try_from(sectors.div_ceil(in_block)).unwrap_or(u32::MAX);
        // Everything that the batmap will say is durable before it.
        let mut steps = vec![Step::Flush];
        steps.extend(dynamic.grow_table(blocks).map(Step::Write));
        steps.extend(dynamic.grow_batmap(footer.current_size.get()).into_iter().map(Step::Write));
        let footer_at = |offset| Step::Write(MetaWrite { offset, bytes: footer.as_bytes().to_vec() });
        let end = dynamic.writes.alloc.end_footer();
        steps.extend([Step::Flush, footer_at(0), Step::Flush, footer_at(end), Step::Flush]);
        dynamic.growth = Some(Growth { footer, blocks, footer_end: end.saturating_add(SECTOR_SIZE) });
        Ok(Some(steps))
    }

    fn check_growth(&self, sectors: u64) -> Result<(), Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        if self.is_poisoned() {
            return Err(Error::Poisoned);
        }
        let (now, most) = (self.sectors, self.max_sectors());
        if sectors < now {
            return Err(Error::invalid(
                "size",
                format!("{sectors} sectors are fewer than the disk has, {now}"),
            ));
        }
        if sectors > most {
            let reason = format!(
                "{sectors} sectors are more than the block allocation table has room for, {most}; an image made with \
                 'vhd-util create -S' has room to grow"
            );
            return Err(Error::invalid("size", reason));
        }
        Ok(())
    }

    /// All steps have been carried out: the disk has its new size.
    pub(crate) fn resize_done(&mut self) {
        let Some(dynamic) = &mut self.dynamic else { return };
        let Some(resize) = dynamic.growth.take() else { return };
        self.sectors = resize.footer.current_size.get() / SECTOR_SIZE;
        self.footer = resize.footer;
        dynamic.bat.set_entries(resize.blocks);
        dynamic.full.resize(usize::try_from(resize.blocks.div_ceil(8)).unwrap_or(0), 0);
        dynamic.writes.alloc.release_hold(resize.footer_end);
        dynamic.writes.end_alone(false);
    }

    /// A step has failed. Nobody knows what is on disk now, so the image takes no more writes.
    pub(crate) fn resize_failed(&mut self) {
        if let Some(dynamic) = &mut self.dynamic
            && let Some(resize) = dynamic.growth.take()
        {
            dynamic.writes.alloc.release_hold(resize.footer_end);
            dynamic.writes.end_alone(true);
        }
    }
}

impl Dynamic {
    /// Makes room for more entries in the table in memory; the sectors of it that change.
    fn grow_table(&mut self, blocks: u32) -> Option<MetaWrite> {
        let before = self.bat.entries();
        if blocks <= before {
            return None;
        }
        self.bat.make_room(blocks);
        let first = before / PER_SECTOR;
        let bytes = (first..blocks.div_ceil(PER_SECTOR)).flat_map(|sector| self.bat.sector(sector, &[]));
        let offset = u64::from(first).saturating_mul(SECTOR_SIZE).saturating_add(self.layout.table_offset);
        Some(MetaWrite { offset, bytes: bytes.collect() })
    }

    fn grow_batmap(&mut self, size: u64) -> Vec<MetaWrite> {
        let full = &self.full;
        let Some(batmap) = &mut self.batmap else { return Vec::new() };
        batmap.grow(size, |block| crate::bitmap::get(full, block));
        batmap.writes(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskType, NewImage, OpenOptions, Uuid};
    use format::{Lookup, Plan, Source, Write};

    /// An image of 8 blocks of 16 sectors with room for 200, more than one sector of the table.
    fn bytes(kind: DiskType) -> Vec<u8> {
        let image = NewImage {
            kind,
            size: 8 * 8192,
            max_size: 200 * 8192,
            block_size: 8192,
            uuid: Uuid([1; 16]),
            timestamp: 1,
            parent: None,
            key: None,
        };
        let bytes = image.build(None).unwrap();
        let mut file = vec![0; usize::try_from(bytes.len).unwrap()];
        for write in &bytes.writes {
            apply(&mut file, write);
        }
        file
    }

    fn apply(file: &mut Vec<u8>, write: &MetaWrite) {
        let at = usize::try_from(write.offset).unwrap();
        let end = at + write.bytes.len();
        file.resize(file.len().max(end), 0);
        file[at..end].copy_from_slice(&write.bytes);
    }

    fn open(file: &[u8]) -> Vhd {
        let mut read = |offset: u64, buf: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&file[at..at + buf.len()]);
            Ok(())
        };
        let source = Source { size: file.len() as u64, regular: true, read: &mut read };
        Vhd::open(source, &OpenOptions { writable: true, ..Default::default() }).unwrap()
    }

    #[test]
    fn the_disk_grows_as_far_as_the_table_has_room() {
        let mut file = bytes(DiskType::Dynamic);
        // What other programs leave behind the disk's own entries.
        file[1536 + 32..1536 + 800].fill(0);
        let mut vhd = open(&file);
        assert_eq!((vhd.sectors(), vhd.max_sectors()), (128, 3200));
        for sectors in [127, 3201, u64::MAX] {
            assert!(matches!(vhd.begin_resize(sectors), Err(Error::Invalid { .. })), "{sectors}");
        }
        let resize = vhd.begin_resize(3190).unwrap().unwrap();
        assert_eq!(vhd.sectors(), 128, "not before it is done");
        for step in &resize {
            if let Step::Write(write) = step {
                apply(&mut file, write);
            }
        }
        vhd.resize_done();
        for mut vhd in [vhd, open(&file)] {
            assert!(!vhd.was_unclean());
            assert_eq!((vhd.sectors(), vhd.blocks(), vhd.allocated_blocks()), (3190, 200, 0));
            assert_eq!(vhd.map(128, 3062).unwrap(), Lookup::Zero { count: 3062 });
            assert!(matches!(vhd.plan_write(3189, 1).unwrap(), Plan::Write(_)));
            assert_eq!(vhd.footer().current_size.get(), 3190 * 512);
        }
    }

    #[test]
    fn it_waits_for_commits_and_preparations_and_nothing_is_prepared_meanwhile() {
        let mut vhd = open(&bytes(DiskType::Dynamic));
        let plan = vhd.plan_write(0, 1).unwrap();
        assert!(matches!(plan, Plan::Write(Write { prepare: Some(_), .. })));
        assert!(vhd.begin_resize(256).unwrap().is_none(), "a block is being prepared");
        vhd.block_prepared(0);
        vhd.sectors_written(0, 1);
        vhd.begin_commit().unwrap();
        assert!(vhd.begin_resize(256).unwrap().is_none(), "a commit is under way");
        vhd.commit_done();
        vhd.begin_resize(256).unwrap().unwrap();
        assert!(matches!(vhd.plan_write(32, 1).unwrap(), Plan::Wait));
        assert!(matches!(vhd.plan_write(0, 2).unwrap(), Plan::Write(Write { prepare: None, .. })));
        vhd.sectors_written(0, 2);
        assert!(vhd.begin_commit().is_none());
        vhd.resize_done();
        assert!(vhd.begin_commit().is_some());
        assert!(matches!(vhd.plan_write(32, 1).unwrap(), Plan::Write(_)));
    }

    #[test]
    fn a_failed_step_stops_all_writing() {
        let mut vhd = open(&bytes(DiskType::Dynamic));
        vhd.begin_resize(256).unwrap().unwrap();
        vhd.resize_failed();
        assert_eq!(vhd.sectors(), 128);
        assert!(matches!(vhd.plan_write(0, 1), Err(Error::Poisoned)));
        assert!(matches!(vhd.begin_resize(256), Err(Error::Poisoned)));
    }

    #[test]
    fn fixed_images_stay_as_they_are() {
        let mut vhd = open(&bytes(DiskType::Fixed));
        assert_eq!(vhd.max_sectors(), 128);
        assert!(matches!(vhd.begin_resize(256), Err(Error::Invalid { .. })));
    }
}
