//! Giving a disk up whose tapdisk does not close it, because its storage does not answer.
//!
//! The tapdisk is killed. What it has in flight cannot be taken back: the kernel ends it when the storage answers, and keeps
//! the image's lock until then, so nobody opens the image while an old write may still reach it.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{DYING, Failure, close_and_detach, take_away};
use crate::args::Target;
use crate::client::{self, Client, QUICK};
use crate::dir::ControlDir;
use crate::error::Error;
use crate::inflight::Folder;
use crate::proto::{Reply, Request};

/// How long a healthy disk is given to close, where the caller does not say.
const CLOSING: Duration = Duration::from_secs(5);

/// close, detach, free; and if that takes too long, the tapdisk is killed.
pub(super) fn destroy(dir: &ControlDir, target: Target, limit: Option<Duration>) -> Result<(), Failure> {
    take_away(dir, target, |target| match close_and_detach(dir, target, Some(limit.unwrap_or(CLOSING))) {
        Err(Error::Timeout { .. }) => end(dir, target),
        // EALREADY: somebody waits for the same.
        Err(Error::Refused { errno, .. }) if errno == Errno::EALREADY as i32 => end(dir, target),
        other => other,
    })
}

/// Kills the tapdisk. What it leaves of its disk is cleared away when the minor is freed.
fn end(dir: &ControlDir, target: Target) -> Result<(), Error> {
    let Target { pid, minor } = target;
    let mut witness = match Client::connect(dir, pid) {
        Err(error) if error.is_dead() => return Ok(()),
        other => other?,
    };
    // A tapdisk whose main thread hangs too can say nothing about other disks.
    if let Ok(Reply::List { vbds }) = client::call(dir, pid, &Request::List, Some(QUICK))
        && let Some(other) = vbds.iter().find(|vbd| vbd.minor != minor && vbd.image.is_some())
    {
        return Err(Error::ServesOthers { pid, other: other.minor });
    }
    if witness.peer_pid() != Some(pid) {
        return Err(Error::Impostor { pid });
    }
    // Else another tapdisk would go on with the disk.
    let left = Folder::of(dir, minor);
    left.forget().map_err(|source| Error::File {
        action: "remove the record in",
        path: left.path().into(),
        source,
    })?;
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => return Err(Error::Kill { pid, errno }),
    }
    // The connection ends when no thread of the process is left that could hold the image open.
    if !witness.ends_within(DYING) {
        return Err(Error::Undead { pid });
    }
    log::warn!("tapdisk {pid} was killed: it did not close minor {minor} in time");
    // The other sockets go with their minor.
    let path = dir.control_socket(pid);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::File { action: "remove", path, source });
        }
        _ => {}
    }
    Ok(())
}
