//! Writing by way of memory of our own: with what lies around the data copied along, and encrypted.

use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use format::{Format, Write};
use nix::errno::Errno;

use super::Formatted;
use crate::buf::Buf;
use crate::image::bytes;
use crate::image::chain::Chain;
use crate::io::Io;

/// Where the bytes of a planned write come from, by their place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// The disk as it is.
    Present(Range<usize>),
    /// The data to be written.
    New(Range<usize>),
}

/// The part that the bytes from `at` up to `end` begin with. `new` is where the data lies.
fn part(at: usize, end: usize, new: &Range<usize>) -> Part {
    if at < new.start {
        Part::Present(at..end.min(new.start))
    } else if at < new.end {
        Part::New(at..end.min(new.end))
    } else {
        Part::Present(at..end)
    }
}

impl<F: Format> Formatted<F> {
    /// Carries out a planned write of `range` of `buf`.
    pub(super) async fn write_through_copy(
        &self,
        io: &Io,
        chain: &Chain,
        sector: Sector,
        write: &Write,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let first = sector.0.checked_sub(write.copy_before.into()).ok_or(Errno::EINVAL)?;
        let head = bytes(write.copy_before);
        let offset = write.offset.checked_sub(head as u64).ok_or(Errno::EINVAL)?;
        let new = head..head + range.len();
        let total = new.end + bytes(write.copy_after);
        let mut done = 0;
        while done < total {
            let mut bounce = io.pool.bounce(total - done)?;
            let len = bounce.len().min(total - done);
            let mut at = done;
            while at < done + len {
                at = match part(at, done + len, &new) {
                    Part::Present(part) => {
                        let here = Sector(self.first + first + part.start as u64 / SECTOR_SIZE);
                        chain.read(here, &bounce, part.start - done..part.end - done).await?;
                        part.end
                    }
                    Part::New(part) => {
                        let from = part.start - head + range.start;
                        if !buf.copy_to(from..from + part.len(), &bounce, part.start - done) {
                            return Err(Errno::EINVAL);
                        }
                        part.end
                    }
                };
            }
            if let Some(cipher) = self.core.borrow().cipher() {
                let sector = first + done as u64 / SECTOR_SIZE;
                cipher.encrypt(sector, &mut bounce.bytes_mut()[..len]);
            }
            io.write(&self.file, offset + done as u64, &bounce, 0..len).await?;
            done += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_around_the_data_is_copied_and_nothing_else() {
        let new = 512..1536;
        assert_eq!(part(0, 4096, &new), Part::Present(0..512));
        assert_eq!(part(0, 256, &new), Part::Present(0..256));
        assert_eq!(part(512, 1024, &new), Part::New(512..1024));
        assert_eq!(part(1024, 4096, &new), Part::New(1024..1536));
        assert_eq!(part(1536, 4096, &new), Part::Present(1536..4096));
        assert_eq!(part(0, 512, &(0..512)), Part::New(0..512));
    }
}
