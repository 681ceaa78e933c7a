//! Room for what is new in files in which nothing is ever freed: behind everything else.

/// Places behind the end. All numbers are bytes.
#[derive(Debug)]
pub struct Tail {
    /// Places are multiples of this.
    align: u64,
    /// First byte that nothing has and no entry names.
    next: u64,
    /// First byte that cannot be taken.
    limit: u64,
    /// First byte that will not be taken before the image is opened again.
    reach: u64,
}

impl Tail {
    /// For an image whose last byte is before `end`, in storage that ends before `limit`, of a disk of `size` bytes.
    pub fn new(align: u64, end: u64, limit: u64, size: u64) -> Self {
        // Each unit of the disk and each table is placed once, and gaps are smaller than what they precede.
        let reach = end.saturating_add(size.saturating_mul(3)).saturating_add(64 << 20).min(limit);
        Self { align, next: end, limit, reach }
    }

    /// Where everything ends so far.
    pub fn end(&self) -> u64 {
        self.next
    }

    /// Takes `len` bytes at a multiple of `align`, if that is more than what places are multiples of anyway. `None`: no
    /// space.
    pub fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let place = self.next.checked_next_multiple_of(align.max(self.align))?;
        self.next = place.checked_add(len).filter(|&end| end <= self.limit)?;
        Some(place)
    }

    /// Gives back what was not used after all. Only what was taken last can be taken again.
    pub fn give_back(&mut self, place: std::ops::Range<u64>) {
        if place.end == self.next {
            self.next = place.start;
        }
    }

    /// Nothing is placed before `end`, where an entry points to. An entry that points so far away that nothing will ever be
    /// there does not count.
    pub fn avoid(&mut self, end: u64) {
        if end <= self.reach {
            self.next = self.next.max(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1 << 40;

    #[test]
    fn places_are_aligned_and_behind_the_end() {
        let mut tail = Tail::new(512, 1000, LIMIT, 1 << 20);
        assert_eq!(tail.take(512, 512).unwrap(), 1024);
        assert_eq!(tail.take(4096, 4096).unwrap(), 4096);
        tail.give_back(1024..1536);
        assert_eq!(tail.take(512, 0).unwrap(), 8192);
        tail.give_back(8192..8704);
        assert_eq!(tail.take(512, 0).unwrap(), 8192);
        tail.avoid(100_000);
        tail.avoid(1 << 39);
        tail.avoid(u64::MAX);
        assert_eq!(tail.take(512, 0).unwrap(), 100_352);
    }

    #[test]
    fn places_end_at_the_limit() {
        let mut tail = Tail::new(65536, LIMIT - 65536, LIMIT, 1 << 20);
        assert_eq!(tail.take(65536, 0).unwrap(), LIMIT - 65536);
        assert!(tail.take(65536, 0).is_none());
    }
}
