//! Where things are in XenStore.
//!
//! All paths of the backend's side are relative: the daemon takes them below our own domain's home, so the same paths
//! work in dom0 and in a driver domain. Watch events come back in the same form.

use std::fmt;

use blkif::{DomId, VdevId};
use xenstore::path::{PathError, PathUse, check};
use xenstore::value::{parse_u16, parse_u32};

/// Names a VBD: the last two components of its backend directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// The frontend's domain.
    pub domid: DomId,
    /// The frontend's virtual device.
    pub vdev: VdevId,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domid, self.vdev)
    }
}

/// What an event below the backend's root is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// The root itself: anything may have changed.
    Everything,
    /// A domain's directory: any of its devices may have come or gone.
    Domain(DomId),
    /// A device's directory, or a key in it that matters.
    Device(DeviceId),
    /// A device's `state`, which we write ourselves and the toolstack may write as well.
    State(DeviceId),
    /// Nothing that a decision depends on.
    Nothing,
}

/// Keys of a backend directory whose change calls for a decision. The others we write ourselves or never read.
const WATCHED_KEYS: [&str; 7] = [
    blkif::keys::FRONTEND,
    blkif::keys::FRONTEND_ID,
    blkif::keys::ONLINE,
    blkif::keys::HOTPLUG_STATUS,
    blkif::keys::PHYSICAL_DEVICE_PATH,
    blkif::keys::MODE,
    blkif::keys::DEVICE_TYPE,
];

/// The directories of one kind of backend, such as `vbd3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    root: String,
}

impl Paths {
    /// Those below `backend/<kind>`.
    ///
    /// # Errors
    ///
    /// When `kind` is no single component of a path.
    pub fn new(kind: &str) -> Result<Paths, PathError> {
        let root = format!("backend/{kind}");
        check(root.as_bytes(), PathUse::Node)?;
        if let Some(offset) = kind.find('/') {
            return Err(PathError::Character { byte: b'/', offset });
        }
        Ok(Paths { root })
    }

    /// The directory of all domains.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The directory of a domain's devices.
    pub fn domain(&self, domid: DomId) -> String {
        format!("{}/{domid}", self.root)
    }

    /// A device's directory.
    pub fn device(&self, id: DeviceId) -> String {
        format!("{}/{id}", self.root)
    }

    /// The directory of all devices' error messages.
    pub fn errors(&self) -> String {
        format!("error/{}", self.root)
    }

    /// The directory of a device's error message, as Linux names it (`error/<node name>`).
    pub fn error(&self, id: DeviceId) -> String {
        format!("{}/{id}", self.errors())
    }

    /// What an event with this path is about.
    pub fn touched(&self, path: &[u8]) -> Touched {
        let Some(rest) = path.strip_prefix(self.root.as_bytes()) else {
            return Touched::Nothing;
        };
        if rest.is_empty() {
            return Touched::Everything;
        }
        let Some(rest) = rest.strip_prefix(b"/") else {
            return Touched::Nothing;
        };
        let mut components = rest.split(|&byte| byte == b'/');
        let Some(domid) = components.next().and_then(domid) else {
            return Touched::Nothing;
        };
        let Some(vdev) = components.next() else {
            return Touched::Domain(domid);
        };
        let Some(vdev) = self::vdev(vdev) else {
            return Touched::Nothing;
        };
        let id = DeviceId { domid, vdev };
        let matters = |key: &[u8]| WATCHED_KEYS.iter().any(|watched| watched.as_bytes() == key);
        match (components.next(), components.next()) {
            (None, _) => Touched::Device(id),
            (Some(key), None) if key == blkif::keys::STATE.as_bytes() => Touched::State(id),
            (Some(key), None) if matters(key) => Touched::Device(id),
            _ => Touched::Nothing,
        }
    }
}

/// A directory's name as a domain id; only the one way to write the number that the toolstack uses.
pub fn domid(name: &[u8]) -> Option<DomId> {
    parse_u16(name).ok().filter(|number| number.to_string().as_bytes() == name).map(DomId)
}

/// A directory's name as a virtual device.
pub fn vdev(name: &[u8]) -> Option<VdevId> {
    parse_u32(name).ok().filter(|number| number.to_string().as_bytes() == name).map(VdevId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart() {
        let paths = Paths::new("vbd3").unwrap();
        let id = DeviceId { domid: DomId(5), vdev: VdevId(51712) };
        for (path, expected) in [
            ("backend/vbd3", Touched::Everything),
            ("backend/vbd3/5", Touched::Domain(DomId(5))),
            ("backend/vbd3/5/51712", Touched::Device(id)),
            ("backend/vbd3/5/51712/state", Touched::State(id)),
            ("backend/vbd3/5/51712/hotplug-status", Touched::Device(id)),
            ("backend/vbd3/5/51712/sectors", Touched::Nothing),
            ("backend/vbd3/5/51712/state/x", Touched::Nothing),
            ("backend/vbd3/05/51712/state", Touched::Nothing),
            ("backend/vbd3/x", Touched::Nothing),
            ("backend/vbd3/5/", Touched::Nothing),
            ("backend/vbd3/70000/1", Touched::Nothing),
            ("backend/vbd30/5/51712", Touched::Nothing),
            ("backend/vbd/5/51712", Touched::Nothing),
            ("", Touched::Nothing),
        ] {
            assert_eq!(paths.touched(path.as_bytes()), expected, "{path}");
        }
    }

    #[test]
    fn paths_are_those_of_the_toolstack_and_of_linux() {
        let paths = Paths::new("vbd3").unwrap();
        let id = DeviceId { domid: DomId(0), vdev: VdevId(51712) };
        assert_eq!(paths.device(id), "backend/vbd3/0/51712");
        assert_eq!(paths.error(id), "error/backend/vbd3/0/51712");
    }

    #[test]
    fn a_kind_is_one_component() {
        for kind in ["", "a/b", "/", "a b", "ä"] {
            assert!(Paths::new(kind).is_err(), "{kind:?}");
        }
    }
}
