//! Room for what is new: always behind everything else, since nothing is ever freed.

use super::Error;

/// A file ends before this: an entry has one bit for something else, and a file offset is a signed number.
pub(super) const LIMIT: u64 = i64::MAX as u64 & !0xffff;

/// Places behind the end.
#[derive(Debug)]
pub(super) struct Allocator {
    /// Places are multiples of this.
    cluster: u64,
    /// First byte that nothing has and no entry names.
    next: u64,
    /// First byte that cannot be taken.
    limit: u64,
    /// First byte that will not be taken before the image is opened again.
    reach: u64,
}

impl Allocator {
    /// For an image whose last byte is before `end`, on storage that ends before `limit`, of a disk of `size` bytes.
    pub(super) fn new(cluster: u64, end: u64, limit: u64, size: u64) -> Self {
        // Each cluster of the disk and each table is placed once, and gaps are smaller than what they precede.
        let reach = end.saturating_add(size.saturating_mul(3)).saturating_add(64 << 20).min(limit);
        Self { cluster, next: end, limit, reach }
    }

    /// Takes `len` bytes at a multiple of `align`, at least a cluster's.
    pub(super) fn take(&mut self, len: u64, align: u64) -> Result<u64, Error> {
        let full = || Error::NoSpace { end: self.next, len };
        let place = self.next.checked_next_multiple_of(align.max(self.cluster)).ok_or_else(full)?;
        let end = place.checked_add(len).filter(|&end| end <= self.limit).ok_or_else(full)?;
        self.next = end;
        Ok(place)
    }

    /// Gives back what was not used after all. Only what was taken last can be taken again.
    pub(super) fn give_back(&mut self, place: u64, len: u64) {
        if place.checked_add(len) == Some(self.next) {
            self.next = place;
        }
    }

    /// Nothing is placed before `end`, where an entry points to. An entry that points so far away that nothing will ever be
    /// there does not count.
    pub(super) fn avoid(&mut self, end: u64) {
        if end <= self.reach {
            self.next = self.next.max(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_aligned_and_behind_the_end() {
        let mut alloc = Allocator::new(512, 1000, LIMIT, 1 << 20);
        assert_eq!(alloc.take(512, 512).unwrap(), 1024);
        assert_eq!(alloc.take(4096, 4096).unwrap(), 4096);
        alloc.give_back(1024, 512);
        assert_eq!(alloc.take(512, 0).unwrap(), 8192);
        alloc.give_back(8192, 512);
        assert_eq!(alloc.take(512, 0).unwrap(), 8192);
        alloc.avoid(100_000);
        alloc.avoid(1 << 40);
        alloc.avoid(u64::MAX);
        assert_eq!(alloc.take(512, 0).unwrap(), 100_352);
    }

    #[test]
    fn places_end_where_file_offsets_do() {
        let mut alloc = Allocator::new(65536, LIMIT - 65536, LIMIT, 1 << 20);
        assert_eq!(alloc.take(65536, 0).unwrap(), LIMIT - 65536);
        assert!(matches!(alloc.take(65536, 0), Err(Error::NoSpace { .. })));
    }
}
