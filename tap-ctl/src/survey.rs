//! The statistics of all disks at one time.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::client;
use crate::dir::ControlDir;
use crate::error::Error;
use crate::list::{self, Entry, Filter};
use crate::proto::{Minor, Reply, Request, Stats};

/// How long a tapdisk may take to answer. Statistics cost it no I/O.
const PATIENCE: Duration = Duration::from_secs(2);

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its tapdisk's process id.
    pub pid: i32,
    /// Its minor.
    pub minor: Minor,
    /// What it has done.
    pub stats: Stats,
}

/// All disks.
#[derive(Debug)]
pub struct Survey {
    /// When they were asked.
    pub taken: Instant,
    /// Those that have answered, in the order of `tap-ctl list`.
    pub disks: Vec<Disk>,
    /// What could not be asked.
    pub problems: Vec<Error>,
}

/// Asks all disks that pass `filter`. One that hangs takes two seconds and hides no other.
///
/// # Errors
///
/// [`Error::File`] when the runtime folder cannot be read.
pub fn survey(dir: &ControlDir, filter: &Filter) -> Result<Survey, Error> {
    let (entries, mut problems) = list::gather(dir, filter)?;
    let taken = Instant::now();
    let mut disks = Vec::new();
    for Entry { pid, minor, image, .. } in entries {
        let (Some(pid), Some(minor), Some(_)) = (pid, minor, image) else { continue };
        match client::call(dir, pid, &Request::Stats { minor }, Some(PATIENCE)) {
            Ok(Reply::Stats(stats)) => disks.push(Disk { pid, minor, stats: *stats }),
            Ok(_) => problems.push(Error::Unexpected { pid }),
            // Closed since it was listed.
            Err(Error::Refused { errno, .. }) if errno == Errno::ENODEV as i32 => {}
            Err(error) if error.is_dead() => {}
            Err(error) => problems.push(error),
        }
    }
    Ok(Survey { taken, disks, problems })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{ImageSpec, VbdEntry};
    use crate::testing::{FakeTapdisk, Script, some_stats};

    #[test]
    fn disks_that_are_open_are_asked_and_one_that_closes_meanwhile_is_no_problem() {
        let image: ImageSpec = "vhd:/a".parse().unwrap();
        let entry = |minor, image| VbdEntry { minor: Minor(minor), state: 0, image, rings: Vec::new() };
        let vbds = vec![entry(2, Some(image.clone())), entry(1, Some(image.clone())), entry(0, None)];
        let answer = move |request: &Request| match request {
            Request::List => Reply::List { vbds: vbds.clone() },
            Request::Stats { minor: Minor(2) } => Reply::Stats(Box::new(some_stats())),
            _ => Reply::Error { errno: 19, message: "it has no open image".into() },
        };
        let fake = FakeTapdisk::start(Script::Answer(Box::new(answer)));
        let found = survey(&fake.dir, &Filter::default()).unwrap();
        let disk = Disk { pid: fake.pid, minor: Minor(2), stats: some_stats() };
        assert_eq!((found.disks, found.problems.len()), (vec![disk], 0));
    }
}
