//! The runtime folder, by default `/run/blktap-control`, with the names XenServer's tools and libxl expect.
//!
//! | name | what |
//! |---|---|
//! | `ctl<pid>` | control socket of a tapdisk |
//! | `nbd<pid>.<minor>` | names a VBD in `physical-device-path` |
//! | `tapdisk/tapdisk-<minor>` | marker: the minor is allocated; locked (flock) while a tapdisk serves it |
//!
//! What frontends have done is not there but in `/dev/shm/td3-<pid>`, where xentop looks for it.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::proto::Minor;

/// How the name of a folder of statistics begins.
const STATISTICS: &str = "td3-";

/// Where sockets, markers and statistics are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlDir {
    root: PathBuf,
    statistics: PathBuf,
}

impl Default for ControlDir {
    fn default() -> ControlDir {
        ControlDir { root: "/run/blktap-control".into(), statistics: "/dev/shm".into() }
    }
}

impl ControlDir {
    /// A runtime folder elsewhere, with the statistics in its folder `shm`.
    pub fn at(root: impl Into<PathBuf>) -> ControlDir {
        let root = root.into();
        ControlDir { statistics: root.join("shm"), root }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The control socket of the tapdisk `pid`.
    pub fn control_socket(&self, pid: i32) -> PathBuf {
        self.root.join(format!("ctl{pid}"))
    }

    /// The folder of all tapdisks' folders of statistics.
    pub fn all_statistics(&self) -> &Path {
        &self.statistics
    }

    /// The folder of the statistics of the tapdisk `pid`.
    pub fn statistics(&self, pid: u32) -> PathBuf {
        self.statistics.join(format!("{STATISTICS}{pid}"))
    }

    /// Reads the name of a folder made by [`ControlDir::statistics`] back. `None` for any other name.
    pub fn parse_statistics(name: &str) -> Option<u32> {
        let pid = name.strip_prefix(STATISTICS)?;
        pid.bytes().all(|byte| byte.is_ascii_digit()).then(|| pid.parse().ok())?
    }

    /// The path that names a VBD to libxl and xenio (`physical-device-path`).
    pub fn vbd_path(&self, pid: i32, minor: Minor) -> PathBuf {
        self.root.join(format!("nbd{pid}.{minor}"))
    }

    /// Where a VBD with an open image is served by NBD, as a URI that qemu and libnbd take.
    pub fn nbd_uri(&self, pid: i32, minor: Minor) -> String {
        use std::os::unix::ffi::OsStrExt;
        let mut uri = String::from("nbd+unix:///?socket=");
        for &byte in self.vbd_path(pid, minor).as_os_str().as_bytes() {
            if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
                uri.push(char::from(byte));
            } else {
                uri.push_str(&format!("%{byte:02X}"));
            }
        }
        uri
    }

    /// Reads a path made by [`ControlDir::vbd_path`] back. `None` for any other text.
    pub fn parse_vbd_path(&self, path: &Path) -> Option<(i32, Minor)> {
        let name = path.strip_prefix(&self.root).ok()?.to_str()?;
        let (pid, minor) = name.strip_prefix("nbd")?.split_once('.')?;
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let pid: i32 = pid.parse().ok()?;
        (pid > 0).then_some((pid, minor.parse().ok()?))
    }

    /// Makes the folder and the one of the markers where they do not exist yet, mode 0755.
    ///
    /// # Errors
    ///
    /// What the system says, for example EACCES without privilege.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(self.markers())
    }

    /// The folder of the markers.
    pub fn markers(&self) -> PathBuf {
        self.root.join("tapdisk")
    }

    /// The marker of a minor.
    pub fn marker(&self, minor: Minor) -> PathBuf {
        self.markers().join(format!("tapdisk-{minor}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vbd_path_reads_back() {
        let dir = ControlDir::default();
        let path = dir.vbd_path(4711, Minor(3));
        assert_eq!(path, Path::new("/run/blktap-control/nbd4711.3"));
        assert_eq!(dir.parse_vbd_path(&path), Some((4711, Minor(3))));
    }

    #[test]
    fn a_uri_names_the_socket_whatever_the_folder_is_called() {
        assert_eq!(
            ControlDir::default().nbd_uri(4711, Minor(3)),
            "nbd+unix:///?socket=/run/blktap-control/nbd4711.3"
        );
        assert_eq!(ControlDir::at("/a b&").nbd_uri(1, Minor(0)), "nbd+unix:///?socket=/a%20b%26/nbd1.0");
    }

    #[test]
    fn other_paths_are_no_vbd_path() {
        let dir = ControlDir::default();
        for text in [
            "/run/blktap-control/nbd1.",
            "/run/blktap-control/nbd.1",
            "/run/blktap-control/nbd+1.2",
            "/run/blktap-control/nbd0.2",
            "/run/blktap-control/nbd1.+2",
            "/run/blktap-control/nbd1.16384",
            "/run/blktap-control/nbd1.2/x",
            "/tmp/nbd1.2",
            "nbd1.2",
            "",
        ] {
            assert_eq!(dir.parse_vbd_path(Path::new(text)), None, "{text}");
        }
    }
}
