//! Discarding: giving back the room of sectors that the guest no longer needs.

use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::Discard;

use super::chain::Chain;
use super::file::ImageFile;
use super::layer::Layer;
use super::{Disk, store};
use crate::io::Io;

/// Bytes given to the kernel at a time: it can be long over one call, and the thread that waits serves others too. A power
/// of two, so that parts end where units do.
const MOST: u64 = 1 << 30;

/// The whole units in a byte range. Those that reach beyond it hold other data as well.
fn units(range: &Range<u64>, limits: &Discard) -> Range<u64> {
    let (unit, shift) = (u64::from(limits.granularity), u64::from(limits.alignment));
    // Counted from one unit before the first boundary, so that nothing is negative.
    let down = |at: u64| (at + unit - shift) / unit * unit;
    let up = |at: u64| down(at + unit - 1);
    let start = up(range.start) + shift;
    let end = down(range.end) + shift;
    start.saturating_sub(unit)..end.saturating_sub(unit)
}

/// The parts in which a range is discarded.
fn parts(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((at / MOST + 1) * MOST);
        let part = at..end;
        at = end;
        (!part.is_empty()).then_some(part)
    })
}

impl Disk {
    /// What can be discarded; `None` if nothing: the store or the format cannot, or the disk is read-only.
    pub fn discard_limits(&self) -> Option<Discard> {
        if self.readonly.get() { None } else { self.chain().discard_limits() }
    }

    /// Discards `count` sectors, which lie on the disk. Units of the store that they cover only in part stay as they are;
    /// of the others the content is undefined from now on, in a file zeros.
    ///
    /// With `secure` all of it is made unreadable, or nothing is done: EINVAL if it is not whole blocks of the store.
    pub async fn discard(&self, sector: Sector, count: u64, secure: bool) -> Result<(), Errno> {
        self.check_writable()?;
        self.discard_limits().filter(|limits| limits.secure || !secure).ok_or(Errno::EOPNOTSUPP)?;
        sector.0.checked_add(count).filter(|&end| end <= self.sectors()).ok_or(Errno::EINVAL)?;
        match &self.filters {
            None => self.chain.discard(sector, count, secure).await,
            Some(filters) => Box::pin(filters.discard(&self.chain, sector, count, secure)).await,
        }
    }
}

impl Chain {
    /// What can be discarded of the leaf.
    pub fn discard_limits(&self) -> Option<Discard> {
        match &self.leaf {
            Layer::Raw(raw) => raw.file.store().discard,
            // In units of the store's, which the format keeps the guest's sectors aligned with.
            Layer::Vhd(vhd) => not_secure(&vhd.file),
            Layer::Qcow(qcow) => not_secure(&qcow.file),
            Layer::Qcow2(qcow) => not_secure(&qcow.file),
            Layer::Vmdk(vmdk) => vmdk.sparse_file().and_then(not_secure),
            Layer::Nbd(nbd) => nbd.discard_limits(),
            Layer::Null(_) => None,
        }
    }

    /// Discards `count` sectors, see [`Disk::discard`].
    pub async fn discard(&self, sector: Sector, count: u64, secure: bool) -> Result<(), Errno> {
        let limits = self.discard_limits().ok_or(Errno::EOPNOTSUPP)?;
        let raw = match &self.leaf {
            Layer::Raw(raw) => raw,
            Layer::Vhd(vhd) => return vhd.discard(&self.io, sector, count).await,
            Layer::Qcow(qcow) => return qcow.discard(&self.io, sector, count).await,
            Layer::Qcow2(qcow) => return qcow.discard(&self.io, sector, count).await,
            Layer::Vmdk(vmdk) => return vmdk.discard(&self.io, sector, count).await,
            Layer::Nbd(nbd) => return nbd.discard(&self.io, sector, count).await,
            Layer::Null(_) => return Err(Errno::EOPNOTSUPP),
        };
        let end = sector.0.checked_add(count).ok_or(Errno::EINVAL)?;
        let range = sector.0 * SECTOR_SIZE..end * SECTOR_SIZE;
        let block = u64::from(raw.file.store().block_size);
        let range = match secure {
            false => units(&range, &limits),
            true if (range.start | range.end).is_multiple_of(block) => range,
            true => return Err(Errno::EINVAL),
        };
        for part in parts(range) {
            discard(&self.io, &raw.file, part, secure).await?;
        }
        Ok(())
    }
}

fn not_secure(file: &ImageFile) -> Option<Discard> {
    file.store().discard.map(|limits| Discard { secure: false, ..limits })
}

async fn discard(io: &Io, file: &ImageFile, range: Range<u64>, secure: bool) -> Result<(), Errno> {
    if file.is_regular() {
        return io.punch(file, range).await;
    }
    let kept = file.keep();
    io.reactor.blocking(move || store::discard(kept.file(), &range, secure).map(|()| 0)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(granularity: u32, alignment: u32) -> Discard {
        Discard { granularity, alignment, secure: false }
    }

    #[test]
    fn heads_and_tails_of_units_are_left_alone() {
        assert_eq!(units(&(512..12800), &limits(4096, 0)), 4096..12288);
        assert_eq!(units(&(0..12288), &limits(4096, 512)), 512..8704);
        assert!(units(&(512..4096), &limits(4096, 0)).is_empty());
    }

    proptest! {
        #[test]
        fn units_are_the_largest_whole_ones_inside(
            start in 0_u64..1 << 41, len in 0_u64..1 << 24, bits in 9_u32..=20, shift in 0_u32..1 << 20
        ) {
            let (unit, range) = (1_u64 << bits, start * 512..start * 512 + len);
            let limits = limits(1 << bits, shift % (1 << bits));
            let inside = units(&range, &limits);
            if inside.is_empty() {
                prop_assert!(len < 2 * unit);
            } else {
                prop_assert!(inside.start >= range.start && inside.end <= range.end);
                prop_assert!(inside.start - range.start < unit && range.end - inside.end < unit);
                let on_boundary = |at: u64| at % unit == u64::from(limits.alignment);
                prop_assert!(on_boundary(inside.start) && on_boundary(inside.end));
            }
        }

        #[test]
        fn parts_are_the_whole_range_in_order(start in 0_u64..8 << 30, len in 0_u64..8 << 30) {
            let mut at = start;
            for part in parts(start..start + len) {
                prop_assert!(part.start == at && part.end > at && part.end - part.start <= MOST);
                at = part.end;
            }
            prop_assert_eq!(at, start + len);
        }
    }
}
