//! Doing errands, with the rights that this process has.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blkif::DomId;
use evtchn::EventChannel;
use evtchn::device::EvtchnDev;
use gntdev::device::GntDev;
use nix::errno::Errno;
use tap_ctl::ControlDir;
use tap_ctl::inflight::Folder;
use tap_ctl::minors;
use tap_ctl::proto::Minor;

use super::{Answer, Errand, Failure, How, Keep, Outcome};
use crate::image::holders;
use crate::server::parent;
use crate::socket::connect_now;
use crate::xen::restrict;

/// Does an errand. Blocking.
pub fn carry_out(errand: &Errand, with: Option<BorrowedFd<'_>>) -> Outcome {
    let dir = |root: &super::Name| ControlDir::at(root.path());
    match errand {
        Errand::Open { path, how } => brought(open(path.path(), *how)?),
        Errand::Again { how } => brought(again(with.ok_or(Errno::EBADF)?, *how)?),
        Errand::Resolve { path } => told(Answer::Path((&*path.path().canonicalize()?).into())),
        Errand::Exists { path } => told(Answer::Is(exists(path.path())?)),
        Errand::Remove { path } => done(fs::remove_file(path.path())),
        Errand::Link { from, to } => done(fs::hard_link(from.path(), to.path())),
        Errand::MakeFolder { path } => {
            done(DirBuilder::new().recursive(true).mode(0o700).create(path.path()))
        }
        Errand::RemoveFolder { path } => done(fs::remove_dir(path.path())),
        Errand::Listen { path } => brought(listen(path.path())?),
        Errand::Alias { path, alias } => done(also_at(path.path(), alias.path())),
        Errand::Connect { path } => brought(connect_now(path.path())?),
        Errand::Holder => {
            told(Answer::Holder(holders::holder(with.ok_or(Errno::EBADF)?, std::process::id())))
        }
        Errand::Parent { root, minor } => match parent::find(&dir(root), *minor) {
            Ok(image) => told(Answer::Image(image)),
            Err((errno, words)) => Err(Failure { errno: errno as i32, words, telling: true }),
        },
        Errand::Claim { root, minor } => match minors::claim(&dir(root), *minor) {
            Ok(claim) => Ok((Answer::Done, claim.into_marker())),
            Err(error) => {
                Err(Failure { errno: error.errno().into(), words: error.to_string(), telling: true })
            }
        },
        Errand::Keep { root, minor, what } => keep(&Folder::of(&dir(root), *minor), what),
        Errand::CleanUp { root, dead, minor, except } => {
            clean_up(&dir(root), *dead, *minor, except.path());
            told(Answer::Done)
        }
        Errand::Grants => brought(GntDev::device(Path::new(gntdev::device::PATH))?),
        Errand::Events { dom } => {
            let events = EvtchnDev::open()?;
            restrict(DomId(*dom), |dom| events.restrict(dom))?;
            brought(events)
        }
        Errand::Settled => told(Answer::Done),
    }
}

fn told(answer: Answer) -> Outcome {
    Ok((answer, None))
}

fn done(result: io::Result<()>) -> Outcome {
    result?;
    told(Answer::Done)
}

fn brought(what: impl Into<OwnedFd>) -> Outcome {
    Ok((Answer::Done, Some(what.into())))
}

/// Opens a file.
pub(super) fn open(path: &Path, how: How) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(how.write).create_new(how.create.is_some()).mode(how.create.unwrap_or(0));
    // Only the file's owner may leave its time of access alone, and whoever may do anything with files.
    match options.custom_flags(how.flags).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && how.flags & libc::O_NOATIME != 0 => {
            options.custom_flags(how.flags & !libc::O_NOATIME).open(path)
        }
        result => result,
    }
}

/// Opens an open file. Through /proc, so that it is the same file whatever happened to its name.
pub(super) fn again(file: BorrowedFd<'_>, how: How) -> io::Result<File> {
    open(&itself(file), How { create: None, ..how })
}

/// A name by which this process reaches an open file.
pub(super) fn itself(file: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd").join(file.as_raw_fd().to_string())
}

fn exists(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    remove_if_there(path)?;
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn also_at(path: &Path, alias: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    let draft = alias.with_extension("draft");
    remove_if_there(&draft)?;
    std::os::unix::fs::symlink(name, &draft)?;
    fs::rename(&draft, alias)
}

fn keep(folder: &Folder, what: &Keep) -> Outcome {
    match what {
        Keep::Read => told(Answer::Record(folder.read()?.map(Box::new))),
        // What a disk of that minor left long ago is removed first.
        Keep::Begin => done(folder.remove().and_then(|()| folder.create())),
        Keep::Write(record) => done(folder.write(record)),
        Keep::Forget => done(folder.forget()),
        Keep::End => done(folder.remove()),
    }
}

fn clean_up(dir: &ControlDir, dead: i32, minor: Minor, except: &Path) {
    for path in [dir.control_socket(dead), dir.vbd_path(dead, minor)] {
        if path != except && !listens_for_long(&path) {
            // Missing, most likely.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Whether somebody listens at a socket who is not just ending: the kernel may free a dead process's locks before its sockets.
fn listens_for_long(path: &Path) -> bool {
    for _ in 0..20 {
        if !parent::listens(path) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_is_opened_again_after_it_has_lost_its_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "x").unwrap();
        let first = open(file.path(), How::READ).unwrap();
        file.close().unwrap();
        let second = again(first.as_fd(), How::WRITE).unwrap();
        assert_eq!(second.metadata().unwrap().len(), 1);
        second.set_len(2).unwrap();
    }

    #[test]
    fn what_is_made_has_its_mode_and_nothing_is_made_in_the_place_of_another() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let how = How { create: Some(0o600), ..How::WRITE };
        assert_eq!(open(&path, how).unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(open(&path, how).unwrap_err().kind(), ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_socket_takes_the_place_of_a_dead_one_and_is_found_by_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let [path, alias] = ["nbd7.0", "nbd5.0"].map(|name| dir.path().join(name));
        drop(UnixListener::bind(&path).unwrap());
        drop(UnixListener::bind(&alias).unwrap());
        let _listener = listen(&path).unwrap();
        also_at(&path, &alias).unwrap();
        UnixStream::connect(&alias).unwrap();
    }

    #[test]
    fn words_that_say_more_than_the_number_come_through() {
        let plain: Failure = io::Error::from_raw_os_error(libc::ENOENT).into();
        assert_eq!(io::Error::from(plain).raw_os_error(), Some(libc::ENOENT));
        let telling: Failure = io::Error::new(ErrorKind::NotFound, "no device; is this Xen?").into();
        let error = io::Error::from(telling);
        assert_eq!(
            (error.kind(), error.to_string()),
            (ErrorKind::NotFound, "no device; is this Xen?".into())
        );
    }
}
