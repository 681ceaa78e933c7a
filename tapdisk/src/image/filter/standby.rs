//! Standby (`-2` with `-s`): a second image, empty, that takes the writes from the moment on when the first has no room left.
//!
//! The second image stands on top of the first: it is a child of it, or of its parent, as XenServer's tapdisk has it
//! (xapi-project/blktap, `drivers/tapdisk-vbd.c:tapdisk_vbd_complete_td_request`). What the guest reads is always the
//! second over the first. While the second shows nothing of its own, it is not even asked, and writes go to the first.
//!
//! - **Once anything is in the second, every write goes there**: what the first took after that might be hidden. So an image that
//!   holds something when the disk is opened has taken over in an earlier life, and goes on.
//! - **Taking over waits** for the writes that are on their way to the first: a copy of what lies around a guest's data, which
//!   some formats make, must not miss them. The write that found no room, and those that failed beside it, are then written to
//!   the second. No guest sees an error.
//! - **A flush covers both** until it has once covered what the first took last.

use std::cell::Cell;
use std::rc::Rc;

use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageSpec, OpenParams, StandbyStats};

use crate::image::OpenError;
use crate::image::chain::Chain;
use crate::image::open::open_on_top;
use crate::io::Io;
use crate::sync::{WaitSet, both};

/// Who takes the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first image.
    Waiting,
    /// Nobody: what is on its way to the first image ends.
    Draining,
    /// The second.
    Serving,
}

/// What a writer does with what came of its write to the first image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is the answer.
    Answer,
    /// The second image takes over, and gets this write too.
    TakeOver,
}

/// A second image that waits.
#[derive(Debug)]
pub struct Standby {
    image: ImageSpec,
    /// The second image over the first.
    chain: Chain,
    state: Cell<State>,
    /// Writers on their way to the first image.
    flying: Cell<u64>,
    changed: WaitSet,
    /// The first image may hold answered writes that are not durable.
    unsettled: Cell<bool>,
    /// Sectors that went to the second image.
    written: Cell<u64>,
}

/// A writer on its way to the first image.
struct Flight<'a>(&'a Standby);

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let left = self.0.flying.get() - 1;
        self.0.flying.set(left);
        if left == 0 {
            self.0.changed.wake_all();
        }
    }
}

/// `state`: at the time of the answer.
fn judge(state: State, result: Result<(), Errno>) -> Verdict {
    match (state, result) {
        (_, Ok(())) => Verdict::Answer,
        // A file can also be as long as its file system, or a limit of the process, allows.
        (_, Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) => Verdict::TakeOver,
        // Others had no room meanwhile, and an image whose metadata could not be written fails all that come after.
        (State::Draining | State::Serving, Err(_)) => Verdict::TakeOver,
        (State::Waiting, Err(_)) => Verdict::Answer,
    }
}

impl Standby {
    /// Opens the second image of the disk that `params` asks for, which `first` serves and which has so many sectors. Blocks.
    ///
    /// # Errors
    /// EINVAL for an image that is too small, or does not stand on the first one or on its parent; those of opening it.
    pub fn open(
        spec: &ImageSpec,
        params: &OpenParams,
        first: &Rc<Chain>,
        sectors: u64,
        io: &Io,
    ) -> Result<Standby, OpenError> {
        let refuse = |errno, text| OpenError::new(spec.path.as_ref(), errno, text);
        let layer = open_on_top(spec, params, first, io)?;
        if layer.sectors() < sectors {
            let text = format!(
                "has {} sectors of 512 bytes, too few to stand by for a disk of {sectors}",
                layer.sectors()
            );
            return Err(refuse(Errno::EINVAL, text));
        }
        let empty = layer
            .shows_parent_only()
            .map_err(|errno| refuse(errno, format!("cannot be looked through: {}", errno.desc())))?;
        let name = first.leaf.name().display();
        let state = if empty {
            log::info!("{spec}: stands by for {name}");
            State::Waiting
        } else {
            log::warn!("{spec}: has taken over from {name} before: it takes all writes");
            State::Serving
        };
        Ok(Standby {
            image: spec.clone(),
            chain: Chain::over(layer, first.clone()),
            state: Cell::new(state),
            flying: Cell::new(0),
            changed: WaitSet::new(io.scheduler.clone()),
            unsettled: Cell::new(true),
            written: Cell::new(0),
        })
    }

    /// The second image over the first, once it has taken over.
    pub fn successor(&self) -> Option<&Chain> {
        (self.state.get() == State::Serving).then_some(&self.chain)
    }

    /// What has become of the first image, if anything has.
    pub fn degradation(&self) -> Option<String> {
        self.successor().map(|_| format!("its image is full, and {} takes its writes", self.image))
    }

    /// Changes so many sectors by `change`, on whichever image takes writes.
    pub async fn change(
        &self,
        first: &Chain,
        sectors: u64,
        change: impl AsyncFn(&Chain) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        loop {
            match self.state.get() {
                State::Waiting => {
                    self.flying.set(self.flying.get() + 1);
                    let flight = Flight(self);
                    let result = change(first).await;
                    drop(flight);
                    match judge(self.state.get(), result) {
                        Verdict::Answer => return result,
                        Verdict::TakeOver => self.drain(first, result),
                    }
                }
                State::Draining if self.flying.get() == 0 => self.take_over(),
                State::Draining => self.changed.wait().await,
                State::Serving => {
                    self.written.set(self.written.get() + sectors);
                    return change(&self.chain).await;
                }
            }
        }
    }

    fn drain(&self, first: &Chain, result: Result<(), Errno>) {
        if self.state.get() == State::Waiting {
            let (why, first) = (result.err().map_or("", Errno::desc), first.leaf.name().display());
            log::error!("{first}: {why}; all writes go to the standby image {} from now on", self.image);
            self.state.set(State::Draining);
        }
    }

    fn take_over(&self) {
        self.state.set(State::Serving);
        self.changed.wake_all();
    }

    /// Makes what was written durable.
    pub async fn flush(&self, first: &Chain, io: &Io) -> Result<(), Errno> {
        if self.state.get() != State::Serving {
            return first.leaf.flush(io).await;
        }
        if !self.unsettled.get() {
            return self.chain.leaf.flush(io).await;
        }
        let (one, two) = both(first.leaf.flush(io), self.chain.leaf.flush(io)).await;
        self.unsettled.set(one.is_err());
        one.and(two)
    }

    /// Brings the second image into its resting state. Nothing may be in flight.
    pub async fn close(&self, io: &Io) {
        let mut result = self.chain.leaf.close(io).await;
        if result.is_ok() {
            result = self.chain.leaf.flush(io).await;
        }
        if let Err(errno) = result {
            log::error!("{}: closing failed: {errno}", self.image);
        }
    }

    /// What there is to tell.
    pub fn stats(&self) -> StandbyStats {
        StandbyStats {
            image: self.image.clone(),
            serving: self.state.get() == State::Serving,
            written: self.written.get() * SECTOR_SIZE,
        }
    }
}

#[cfg(test)]
mod tests;
