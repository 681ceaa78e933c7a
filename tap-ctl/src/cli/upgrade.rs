//! `tap-ctl upgrade`: tapdisks make room, and others of the program that is installed now go on with their disks.

use super::Config;
use crate::args::Target;
use crate::client::{Client, QUICK};
use crate::dir::ControlDir;
use crate::error::Error;
use crate::inflight::{Folder, Record};
use crate::list;
use crate::proto::{Minor, Reply, Request};
use crate::revive::revive;

/// A failure: what was tried, and why it failed.
type Failed = (String, Error);

/// Upgrades one tapdisk, or all that serve a disk; writes a line for each disk. One that fails does not hold up others; the
/// first failure is the command's, further ones are told as they come.
pub(super) fn upgrade(config: &Config, which: Option<i32>, output: &mut String) -> Result<(), Failed> {
    let dir = &config.dir;
    let pids = match which {
        Some(pid) => vec![pid],
        None => list::tapdisks(dir).map_err(|why| ("upgrade".to_owned(), why))?,
    };
    let mut failure = None;
    for pid in pids {
        match replace(config, pid, output) {
            Ok(()) => {}
            // A socket that somebody left behind.
            Err(error) if which.is_none() && error.is_dead() => {}
            Err(error) if failure.is_some() => log::warn!("upgrade tapdisk {pid}: {error}"),
            Err(error) => failure = Some((format!("upgrade tapdisk {pid}"), error)),
        }
    }
    failure.map_or(Ok(()), Err)
}

fn replace(config: &Config, pid: i32, output: &mut String) -> Result<(), Error> {
    let mut client = Client::connect(&config.dir, pid)?;
    let minors: Vec<Minor> = match client.call(&Request::List, Some(QUICK))? {
        Reply::List { vbds } => vbds.into_iter().map(|vbd| vbd.minor).collect(),
        _ => return Err(Error::Unexpected { pid }),
    };
    if minors.is_empty() {
        // Nobody waits for it: the next one that is spawned is of the new program.
        return Ok(());
    }
    // No limit: what is in flight takes as long as the storage does, and meanwhile guests are served.
    client.command(&Request::Leave, None)?;
    let mut failure = None;
    for minor in minors {
        match revive(&config.dir, &config.tapdisk, minor, pid) {
            Ok(next) => output.push_str(&format!("pid={} minor={minor}\n", next.pid)),
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
    failure.map_or(Ok(()), Err)
}

/// The disk that the caller knows under `target`: after a death or an upgrade another tapdisk serves it.
pub(super) fn successor(dir: &ControlDir, target: Target) -> Target {
    let is_gone = matches!(Client::connect(dir, target.pid), Err(error) if error.is_dead());
    // Read only then: a death in between would be missed.
    match is_gone.then(|| Folder::of(dir, target.minor).read()) {
        Some(Ok(Some(Record { pid, .. }))) => Target { pid, ..target },
        _ => target,
    }
}
