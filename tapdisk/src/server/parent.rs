//! A parent that another disk of this host stands for (`tap-ctl open -e`): finding its NBD socket.
//!
//! Minors are unique on a host, so at most one tapdisk serves one; sockets of tapdisks that died may be left beside it, and
//! names by which clients know them that lead to a successor's.

use std::path::Path;

use nix::errno::Errno;
use tap_ctl::ControlDir;
use tap_ctl::proto::{ImageSpec, ImageType, Minor};

use crate::socket::connect_now;

/// The image that the disk of `minor` is to whoever reads it by its socket.
///
/// # Errors
/// ENOENT if nobody serves it, EINVAL if several do; with a sentence for people.
pub fn find(dir: &ControlDir, minor: Minor) -> Result<ImageSpec, (Errno, String)> {
    let names = std::fs::read_dir(dir.root()).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        (errno, format!("cannot look for the parent's socket in {}: {error}", dir.root().display()))
    })?;
    let mut found = names
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_symlink()))
        .map(|entry| entry.path())
        .filter(|path| dir.parse_vbd_path(path).is_some_and(|(_, served)| served == minor) && listens(path));
    match (found.next(), found.next()) {
        (Some(path), None) => match path.to_str() {
            Some(path) => Ok(ImageSpec { kind: ImageType::Nbd, path: path.to_owned() }),
            None => Err((Errno::EINVAL, format!("the socket {} has no name in UTF-8", path.display()))),
        },
        (Some(one), Some(other)) => {
            let text = format!("minor {minor} is served by two: {} and {}", one.display(), other.display());
            Err((Errno::EINVAL, text))
        }
        (None, _) => {
            let text = format!("no tapdisk serves minor {minor} by NBD in {}", dir.root().display());
            Err((Errno::ENOENT, text))
        }
    }
}

/// Whether somebody listens at a socket; never waits.
pub fn listens(path: &Path) -> bool {
    // EAGAIN: many wait there to be accepted.
    matches!(connect_now(path), Ok(_) | Err(Errno::EAGAIN))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_one_socket_that_somebody_listens_at_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path());
        assert_eq!(find(&dir, Minor(7)).unwrap_err().0, Errno::ENOENT);
        // Left behind.
        drop(UnixListener::bind(dir.vbd_path(10, Minor(7))).unwrap());
        let _another = UnixListener::bind(dir.vbd_path(11, Minor(77))).unwrap();
        assert_eq!(find(&dir, Minor(7)).unwrap_err().0, Errno::ENOENT);
        let _this = UnixListener::bind(dir.vbd_path(12, Minor(7))).unwrap();
        let found = find(&dir, Minor(7)).unwrap();
        assert_eq!(found.to_string(), format!("nbd:{}", dir.vbd_path(12, Minor(7)).display()));
        std::os::unix::fs::symlink("nbd12.7", dir.vbd_path(9, Minor(7))).unwrap();
        assert_eq!(find(&dir, Minor(7)).unwrap(), found);
        let _second = UnixListener::bind(dir.vbd_path(13, Minor(7))).unwrap();
        assert_eq!(find(&dir, Minor(7)).unwrap_err().0, Errno::EINVAL);
    }
}
