//! The two ways of doing I/O, behind one set of methods: io_uring, and a few threads with blocking calls where the kernel
//! or a seccomp profile refuses io_uring.
//!
//! An enum and no trait: there will be no third, and the calls are on the path of every request.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::str::FromStr;
use std::time::Duration;

use super::pool::{Pool, Work, Workers};
use super::uring::{Transfer, Uring};
use super::{Fixed, KEY_HELPER, Target};
use crate::buf::Piece;

/// Which engine a disk gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel allows it, threads otherwise.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads.
    Pool,
}

/// The word is not `auto`, `uring` or `pool`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no I/O engine {0:?}: use auto, uring or pool")]
pub struct UnknownEngine(String);

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(word: &str) -> Result<EngineChoice, UnknownEngine> {
        match word {
            "auto" => Ok(EngineChoice::Auto),
            "uring" => Ok(EngineChoice::Uring),
            "pool" => Ok(EngineChoice::Pool),
            other => Err(UnknownEngine(other.to_owned())),
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Uring => "uring",
            EngineChoice::Pool => "pool",
        })
    }
}

/// The I/O engine of one thread.
#[expect(clippy::large_enum_variant, reason = "there is one for each thread, which is never moved")]
pub(super) enum Engine {
    /// io_uring, with a thread for what it has no operation for.
    Uring { ring: Uring, helper: Helper },
    /// Threads for everything.
    Pool(Pool),
}

/// The helper of an io_uring: started when first needed, which for most disks is never.
#[derive(Default)]
pub(super) struct Helper {
    workers: Option<Workers>,
    /// The ring has stopped watching the helper's bell.
    unwatched: bool,
}

impl Engine {
    /// Starts an engine for the calling thread.
    pub(super) fn new(choice: EngineChoice) -> io::Result<Engine> {
        let uring = |ring| Engine::Uring { ring, helper: Helper::default() };
        match choice {
            EngineChoice::Uring => Uring::new().map(uring),
            EngineChoice::Pool => Pool::new().map(Engine::Pool),
            EngineChoice::Auto => Uring::new().map(uring).or_else(|error| {
                log::warn!(
                    "the kernel refuses io_uring ({error}): I/O goes through threads, which costs more"
                );
                Pool::new().map(Engine::Pool)
            }),
        }
    }

    /// Registers memory, so that operations on it need not pin it each time; `None` where that cannot be had.
    pub(super) fn register(&mut self, base: NonNull<u8>, len: usize) -> Option<Fixed> {
        match self {
            Engine::Uring { ring, .. } => ring.register(base, len),
            Engine::Pool(_) => None,
        }
    }

    /// Gives registered memory up.
    pub(super) fn unregister(&mut self, fixed: Fixed) {
        if let Engine::Uring { ring, .. } = self {
            ring.unregister(fixed);
        }
    }

    /// Whether a completion's key says that memory has been released.
    pub(super) fn released(&mut self, key: u64) -> bool {
        match self {
            Engine::Uring { ring, .. } => ring.released(key),
            Engine::Pool(_) => false,
        }
    }

    /// Keeps a file at hand; `None` where that cannot be had.
    pub(super) fn register_file(&mut self, fd: RawFd) -> Option<u32> {
        match self {
            Engine::Uring { ring, .. } => ring.register_file(fd),
            Engine::Pool(_) => None,
        }
    }

    /// Lets go of such a file.
    pub(super) fn unregister_file(&mut self, place: u32) {
        if let Engine::Uring { ring, .. } = self {
            ring.unregister_file(place);
        }
    }

    /// Queues a transfer. The caller keeps buffer and descriptor until the completion with `key` arrives.
    pub(super) fn transfer(
        &mut self,
        what: Transfer,
        file: Target,
        offset: u64,
        piece: Piece,
        key: u64,
    ) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.transfer(what, file, offset, piece, key),
            Engine::Pool(pool) => {
                pool.transfer(what, file.fd, offset, piece, key);
                Ok(())
            }
        }
    }

    /// Queues receiving (`Read`) or sending (`Write`) on a stream socket. As [`Engine::transfer`].
    pub(super) fn stream(&mut self, what: Transfer, fd: RawFd, piece: Piece, key: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.stream(what, fd, piece, key),
            Engine::Pool(pool) => {
                pool.stream(what, fd, piece, key);
                Ok(())
            }
        }
    }

    /// Queues an `fdatasync`.
    pub(super) fn fdatasync(&mut self, fd: RawFd, key: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.fdatasync(fd, key),
            Engine::Pool(pool) => {
                pool.fdatasync(fd, key);
                Ok(())
            }
        }
    }

    /// Queues a `fallocate`.
    pub(super) fn fallocate(
        &mut self,
        fd: RawFd,
        mode: i32,
        offset: u64,
        len: u64,
        key: u64,
    ) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.fallocate(fd, mode, offset, len, key),
            Engine::Pool(pool) => {
                pool.fallocate(fd, mode, offset, len, key);
                Ok(())
            }
        }
    }

    /// Has a thread do something rare that blocks and for which there is no operation.
    pub(super) fn blocking(&mut self, work: Work, key: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, helper } => helper.give(ring, work, key),
            Engine::Pool(pool) => {
                pool.blocking(work, key);
                Ok(())
            }
        }
    }

    /// Reports input on a descriptor from now on, until a completion comes without the "more" mark.
    pub(super) fn watch(&mut self, fd: RawFd, key: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.watch(fd, key),
            Engine::Pool(pool) => {
                pool.watch(fd, key);
                Ok(())
            }
        }
    }

    /// Whether a watch that is ended reports once more, without the "more" mark.
    pub(super) fn reports_last(&self) -> bool {
        matches!(self, Engine::Uring { .. })
    }

    /// Ends the watch with `key`; a completion with `done` may follow. The descriptor may be closed then.
    pub(super) fn unwatch(&mut self, key: u64, done: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.unwatch(key, done),
            Engine::Pool(pool) => {
                pool.unwatch(key);
                Ok(())
            }
        }
    }

    /// A completion with `key` after `after`.
    pub(super) fn timer(&mut self, after: Duration, key: u64) -> io::Result<()> {
        match self {
            Engine::Uring { ring, .. } => ring.timer(after, key),
            Engine::Pool(pool) => {
                pool.timer(after, key);
                Ok(())
            }
        }
    }

    /// Sets everything queued going and, with `wait`, sleeps until there is a completion.
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        match self {
            Engine::Uring { ring, helper } => {
                helper.watch(ring)?;
                ring.enter(wait)
            }
            Engine::Pool(pool) => pool.enter(wait),
        }
    }

    /// Whether something was queued since the last [`Engine::enter`].
    pub(super) fn has_queued(&mut self) -> bool {
        match self {
            Engine::Uring { ring, helper } => helper.unwatched || ring.has_queued(),
            Engine::Pool(pool) => pool.has_queued(),
        }
    }

    /// Whether [`Engine::enter`] without waiting would find something; costs no system call.
    pub(super) fn has_news(&mut self) -> bool {
        match self {
            Engine::Uring { ring, .. } => ring.has_news(),
            Engine::Pool(pool) => pool.has_news(),
        }
    }

    /// The next completion: key, result, and whether more will come for this key.
    pub(super) fn complete(&mut self) -> Option<(u64, i32, bool)> {
        match self {
            Engine::Uring { ring, helper } => loop {
                if let Some((key, result)) = helper.workers.as_mut().and_then(Workers::take) {
                    return Some((key, result, false));
                }
                let completion = ring.complete()?;
                if completion.0 != KEY_HELPER {
                    return Some(completion);
                }
                helper.rang(completion.2);
            },
            Engine::Pool(pool) => pool.complete(),
        }
    }
}

impl Helper {
    fn give(&mut self, ring: &mut Uring, work: Work, key: u64) -> io::Result<()> {
        let workers = match &mut self.workers {
            Some(workers) => workers,
            None => {
                let workers = Workers::new(1)?;
                ring.watch(workers.bell(), KEY_HELPER)?;
                self.workers.insert(workers)
            }
        };
        workers.blocking(work, key);
        workers.submit();
        Ok(())
    }

    fn rang(&mut self, more: bool) {
        if let Some(workers) = &mut self.workers {
            workers.quieten();
            workers.collect();
        }
        self.unwatched |= !more;
    }

    fn watch(&mut self, ring: &mut Uring) -> io::Result<()> {
        if let (true, Some(workers)) = (self.unwatched, &self.workers) {
            ring.watch(workers.bell(), KEY_HELPER)?;
            self.unwatched = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_named_by_a_word() {
        for choice in [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Pool] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("aio".parse::<EngineChoice>().unwrap_err().to_string().contains("auto, uring or pool"));
    }
}
