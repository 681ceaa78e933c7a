//! Sectors of a server whose smallest block is larger: by reading the whole block, and for a write changing it and writing it
//! back.
//!
//! Only the first and the last block of a transfer can be covered in part; they go through one buffer, in turns. A task
//! takes the lock on the blocks first and the buffer second, and with the buffer waits for the server only.

use std::cell::Cell;
use std::ops::Range;

use nix::errno::Errno;

use super::Nbd;
use crate::buf::Buf;
use crate::io::Io;
use crate::sync::WaitSet;

/// Room for one block.
#[derive(Debug)]
pub struct Bounce {
    block: Buf,
    taken: Cell<bool>,
    freed: WaitSet,
}

/// The room, until it is dropped.
struct Lent<'a>(&'a Bounce);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.taken.set(false);
        self.0.freed.wake_all();
    }
}

impl Bounce {
    /// For blocks of this many bytes, a power of two. `None` if there is no memory.
    pub fn new(block: u32, io: &Io) -> Option<Bounce> {
        let block = io.pool.data(block as usize)?;
        Some(Bounce { block, taken: Cell::new(false), freed: WaitSet::new(io.scheduler.clone()) })
    }

    async fn lend(&self) -> Lent<'_> {
        while self.taken.replace(true) {
            self.freed.wait().await;
        }
        Lent(self)
    }

    fn whole(&self) -> Range<usize> {
        0..self.block.len()
    }
}

/// A run of bytes that lies in one block, or is whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Bytes from the start of the block; 0 for whole blocks.
    skip: usize,
    len: usize,
    whole: bool,
}

/// The run that `left` bytes at `offset` begin with.
fn first(block: usize, offset: u64, left: usize) -> Run {
    let mask = block - 1;
    // Fits: it is less than a block.
    let skip = usize::try_from(offset & mask as u64).unwrap_or(0);
    if skip == 0 && left >= block {
        return Run { skip, len: left & !mask, whole: true };
    }
    Run { skip, len: left.min(block - skip), whole: false }
}

impl Nbd {
    pub(super) async fn read_blocks(
        &self,
        io: &Io,
        bounce: &Bounce,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let mut at = range.start;
        while at < range.end {
            let here = offset + (at - range.start) as u64;
            let run = first(bounce.block.len(), here, range.end - at);
            if run.whole {
                self.read_whole(io, here, buf, at..at + run.len).await?;
            } else {
                let lent = bounce.lend().await;
                let room = &lent.0.block;
                self.read_whole(io, here - run.skip as u64, room, bounce.whole()).await?;
                copy(room, run.skip..run.skip + run.len, buf, at)?;
            }
            at += run.len;
        }
        Ok(())
    }

    pub(super) async fn write_blocks(
        &self,
        io: &Io,
        bounce: &Bounce,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let mut at = range.start;
        while at < range.end {
            let here = offset + (at - range.start) as u64;
            let run = first(bounce.block.len(), here, range.end - at);
            let start = here - run.skip as u64;
            if run.whole {
                let _lock = self.locks.lock(start..start + run.len as u64, false).await;
                self.write_whole(io, start, buf, at..at + run.len).await?;
            } else {
                let _lock = self.locks.lock(start..start + bounce.block.len() as u64, true).await;
                let lent = bounce.lend().await;
                let room = &lent.0.block;
                self.read_whole(io, start, room, bounce.whole()).await?;
                copy(buf, at..at + run.len, room, run.skip)?;
                self.write_whole(io, start, room, bounce.whole()).await?;
            }
            at += run.len;
        }
        Ok(())
    }
}

fn copy(from: &Buf, range: Range<usize>, to: &Buf, at: usize) -> Result<(), Errno> {
    if from.copy_to(range, to, at) { Ok(()) } else { Err(Errno::EINVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_a_head_whole_blocks_and_a_tail() {
        let (mut at, mut left, mut runs) = (8192 - 512_u64, 512 + 8192 + 1024, Vec::new());
        while left > 0 {
            let run = first(4096, at, left);
            runs.push((run.skip, run.len, run.whole));
            at += run.len as u64;
            left -= run.len;
        }
        assert_eq!(runs, [(3584, 512, false), (0, 8192, true), (0, 1024, false)]);
        assert_eq!(first(4096, 512, 512), Run { skip: 512, len: 512, whole: false });
    }
}
