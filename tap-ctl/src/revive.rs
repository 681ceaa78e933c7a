//! Having another tapdisk go on where one has died, or made room.
//!
//! Several may try at the same time: xenio, and whoever upgrades. The claim on the minor's marker decides who serves it, and
//! the record says who that is, so that all of them come to the same end.

use std::io;
use std::path::Path;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::dir::ControlDir;
use crate::error::Error;
use crate::inflight::{Folder, Record};
use crate::minors;
use crate::proto::Minor;
use crate::spawn::spawn;

/// After this time nobody tries any more.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a minor that its dead tapdisk has not let go of: the first time, and the longest.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// Between two tapdisks that could not go on.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Who serves a disk now.
#[derive(Debug)]
pub struct Revived {
    /// Its process id.
    pub pid: i32,
    /// Our child, if we started it.
    pub child: Option<Child>,
}

/// What is to be done next for a minor whose tapdisk is gone.
enum Next {
    /// Somebody serves it.
    Served(i32),
    /// The dead tapdisk still has it.
    Wait,
    /// Start another one.
    Start(Box<Record>),
}

/// Whether a disk has left something to go on with.
pub fn is_possible(dir: &ControlDir, minor: Minor) -> bool {
    matches!(Folder::of(dir, minor).read(), Ok(Some(record)) if !record.history.hopeless)
}

/// Sees to it that a disk is served whose tapdisk `dead` is gone, or going. Blocking: usually some milliseconds, at most
/// about a minute.
///
/// # Errors
///
/// [`Error::NotRevived`] if there is nothing to go on with; else why the last tapdisk that tried could not.
pub fn revive(dir: &ControlDir, program: &Path, minor: Minor, dead: i32) -> Result<Revived, Error> {
    let (start, mut pause) = (Instant::now(), LOOK.0);
    let mut failure = None;
    loop {
        let late = start.elapsed() >= PATIENCE;
        match next(dir, minor, dead) {
            Ok(Next::Served(pid)) => return Ok(Revived { pid, child: None }),
            Ok(Next::Wait) if late => return Err(failure.unwrap_or(Error::MinorInUse { minor })),
            Ok(Next::Wait) => {
                sleep(pause);
                pause = (pause * 2).min(LOOK.1);
            }
            Ok(Next::Start(record)) => match start_next(dir, program, minor, &record) {
                Ok(child) => {
                    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
                    return Ok(Revived { pid, child: Some(child) });
                }
                Err(error) if late => return Err(error),
                Err(error) => {
                    log::warn!("minor {minor}: {error}");
                    failure = Some(error);
                    sleep(TRY_AGAIN);
                }
            },
            // What a tapdisk said when it gave up tells more.
            Err(error) => return Err(failure.unwrap_or(error)),
        }
    }
}

fn next(dir: &ControlDir, minor: Minor, dead: i32) -> Result<Next, Error> {
    let record = || {
        let folder = Folder::of(dir, minor);
        let refused = |why: String| Error::NotRevived { minor, why };
        let failed = |error: io::Error| refused(format!("{}: {error}", folder.path().display()));
        folder.read().map_err(failed)?.ok_or_else(|| refused("it was closed, or its disk has failed".into()))
    };
    match minors::claim(dir, minor) {
        Ok(claim) => {
            // The next tapdisk is to have it.
            drop(claim);
            let record = record()?;
            if record.history.hopeless {
                let why =
                    "its tapdisks ended again and again without having answered anything; see their logs";
                return Err(Error::NotRevived { minor, why: why.into() });
            }
            Ok(Next::Start(Box::new(record)))
        }
        Err(Error::MinorInUse { .. }) => Ok(match record()? {
            Record { pid, .. } if pid != dead => Next::Served(pid),
            _ => Next::Wait,
        }),
        Err(error) => Err(error),
    }
}

fn start_next(dir: &ControlDir, program: &Path, minor: Minor, record: &Record) -> Result<Child, Error> {
    let minor = minor.to_string();
    let mut options = vec!["--take-over", &minor, "--engine", &record.engine];
    let cache = record.parent_cache.map(|bytes| bytes.to_string());
    if let Some(bytes) = &cache {
        options.extend(["--parent-cache", bytes]);
    }
    spawn(dir, program, &options)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::inflight::History;
    use crate::proto::{DiskInfo, OpenParams};

    fn stage() -> (tempfile::TempDir, ControlDir, Minor) {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path());
        let minor = minors::allocate(&dir).unwrap();
        (folder, dir, minor)
    }

    fn leave(dir: &ControlDir, minor: Minor, pid: i32, hopeless: bool) {
        let info = DiskInfo {
            sectors: 8,
            sector_size: 512,
            physical_sector_size: 512,
            readonly: false,
            discard: None,
        };
        let record = Record {
            pid,
            socket: dir.vbd_path(pid, minor),
            engine: "pool".into(),
            parent_cache: Some(4096),
            params: OpenParams::new("aio:/a".parse().unwrap()),
            info,
            paused: false,
            rings: Vec::new(),
            history: History { hopeless, ..History::default() },
        };
        let folder = Folder::of(dir, minor);
        folder.create().unwrap();
        folder.write(&record).unwrap();
    }

    #[test]
    fn who_left_nothing_or_was_given_up_is_not_followed() {
        let (_folder, dir, minor) = stage();
        let program = Path::new("/nonexistent");
        assert!(!is_possible(&dir, minor));
        assert!(matches!(revive(&dir, program, minor, 7), Err(Error::NotRevived { .. })));
        leave(&dir, minor, 7, true);
        assert!(!is_possible(&dir, minor));
        let error = revive(&dir, program, minor, 7).unwrap_err();
        assert!(error.to_string().contains("again and again"), "{error}");
        leave(&dir, minor, 7, false);
        assert!(is_possible(&dir, minor));
    }

    #[test]
    fn somebody_else_who_was_quicker_is_as_good() {
        let (_folder, dir, minor) = stage();
        leave(&dir, minor, 8, false);
        let _claim = minors::claim(&dir, minor).unwrap();
        let Revived { pid, child } = revive(&dir, Path::new("/nonexistent"), minor, 7).unwrap();
        assert_eq!((pid, child.is_none()), (8, true));
    }

    #[test]
    fn the_next_tapdisk_is_started_as_the_last_was() {
        use std::os::unix::fs::PermissionsExt;
        let (folder, dir, minor) = stage();
        leave(&dir, minor, 7, false);
        let program = folder.path().join("program");
        let root = folder.path().display();
        fs::write(&program, format!("#!/bin/sh\necho \"$*\" >{root}/args\necho {root}/ctl$$\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = revive(&dir, &program, minor, 7).unwrap().child.unwrap();
        child.wait().unwrap();
        let args = fs::read_to_string(folder.path().join("args")).unwrap();
        assert_eq!(args, "--take-over 0 --engine pool --parent-cache 4096\n");
    }
}
