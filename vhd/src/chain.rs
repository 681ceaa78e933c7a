//! From an image to its parents: which paths to try, which of them to accept, and when to stop.
//!
//! Names inside an image come from whoever made the image. They are paths and nothing else, and a raw parent, of which
//! nothing proves that it is meant, must lie where the caller permits.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use crate::{Error, ParentRef, Uuid};

/// Most images of a chain, the leaf included. XenServer's storage manager makes none deeper than this.
pub const MAX_DEPTH: u32 = 30;

/// Paths at which the parent may be, in the order in which to try them: relative names are looked up in
/// `folder`, the canonical folder of the child.
///
/// # Errors
/// [`Error::NoParentName`] if no name is a plain path.
pub fn candidates(folder: &Path, parent: &ParentRef) -> Result<Vec<PathBuf>, Error> {
    let mut paths = Vec::<PathBuf>::new();
    for name in parent.names.iter().filter(|name| is_plain(&name.path)) {
        let path = folder.join(&name.path);
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    if paths.is_empty() { Err(Error::NoParentName) } else { Ok(paths) }
}

/// False for names that some programs take for something else than a path, like `json:{...}` or `nbd:host:port`.
pub fn is_plain(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    let scheme = text.split(|&byte| byte == b'/').next().unwrap_or(text);
    !text.is_empty() && !scheme.contains(&b':')
}

/// What a chain may reach.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Canonical folders in which raw parents may lie, at any depth; `None` for no limit.
    pub raw_roots: Option<Vec<PathBuf>>,
}

impl Policy {
    /// No limit: for tools run by an administrator on images of his own.
    pub fn trusting() -> Self {
        Self { raw_roots: None }
    }

    /// Raw parents only in the folder of the leaf, which is given by its canonical path.
    pub fn beside(leaf: &Path) -> Self {
        Self { raw_roots: Some(leaf.parent().map(Path::to_owned).into_iter().collect()) }
    }

    /// Checks a parent before it is opened. `path` is canonical: without links, `.` and `..`.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn permit(&self, path: &Path, is_raw: bool) -> Result<(), Error> {
        let forbidden = |reason| Err(Error::Forbidden { path: path.display().to_string(), reason });
        let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        if !path.is_absolute() || !path.components().all(plain) {
            return forbidden("its path is not canonical");
        }
        match &self.raw_roots {
            Some(roots) if is_raw && !roots.iter().any(|root| path.starts_with(root)) => {
                forbidden("raw parents must lie in the folder of the image")
            }
            _ => Ok(()),
        }
    }
}

/// The images of a chain seen so far.
#[derive(Debug, Default)]
pub struct Visited {
    files: HashSet<(u64, u64)>,
    uuids: HashSet<Uuid>,
}

impl Visited {
    /// Notes an image by device and inode number of its file, before anything is asked of it.
    ///
    /// # Errors
    /// [`Error::Loop`] if it is there already, [`Error::TooDeep`] if it is one too many.
    pub fn enter(&mut self, device: u64, inode: u64) -> Result<(), Error> {
        if !self.files.insert((device, inode)) {
            return Err(Error::Loop);
        }
        if self.files.len() > MAX_DEPTH as usize {
            return Err(Error::TooDeep { limit: MAX_DEPTH });
        }
        Ok(())
    }

    /// Notes the identifier of an image that was entered, if it is no raw file: a loop can also lead through copies.
    ///
    /// # Errors
    /// [`Error::Loop`] if it is there already.
    pub fn identify(&mut self, uuid: Uuid) -> Result<(), Error> {
        if self.uuids.insert(uuid) { Ok(()) } else { Err(Error::Loop) }
    }
}

/// Checks that the image found under a parent's name is the parent.
///
/// # Errors
/// [`Error::ParentChanged`].
pub fn check_identity(parent: &ParentRef, found: Uuid) -> Result<(), Error> {
    if parent.uuid == found { Ok(()) } else { Err(Error::ParentChanged { expected: parent.uuid, found }) }
}

/// The path of `target` relative to `folder`, both canonical, as blktap writes it into a child: beginning with `./`.
pub fn relative(folder: &Path, target: &Path) -> PathBuf {
    let mut from = folder.components().peekable();
    let mut to = target.components().peekable();
    while from.peek().is_some() && from.peek() == to.peek() {
        from.next();
        to.next();
    }
    let mut path = PathBuf::from(".");
    path.extend(from.map(|_| Component::ParentDir));
    path.extend(to);
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParentName;
    use crate::locator::Platform;

    fn parent(names: &[&str]) -> ParentRef {
        let name = |name: &&str| ParentName { platform: Platform::MacX, path: name.into() };
        ParentRef { uuid: Uuid([1; 16]), names: names.iter().map(name).collect() }
    }

    #[test]
    fn names_are_tried_in_order_and_once() {
        let paths =
            candidates(Path::new("/srv"), &parent(&["./a.vhd", "a.vhd", "/b/c.vhd", "./a.vhd"])).unwrap();
        assert_eq!(paths, [Path::new("/srv/a.vhd"), Path::new("/b/c.vhd")]);
    }

    #[test]
    fn names_that_are_no_paths_are_skipped() {
        for name in ["json:{}", "nbd:host:1", "http://x/y", "fat:rw:/x", ""] {
            let result = candidates(Path::new("/srv"), &parent(&[name]));
            assert!(matches!(result, Err(Error::NoParentName)), "{name}");
        }
        assert!(candidates(Path::new("/srv"), &parent(&["./with:colon"])).is_ok());
    }

    #[test]
    fn m21_raw_parents_outside_the_folder_are_forbidden() {
        let policy = Policy::beside(Path::new("/srv/vm/leaf.vhd"));
        assert!(policy.permit(Path::new("/srv/vm/raw.img"), true).is_ok());
        for path in ["/etc/shadow", "/srv/vmx/raw.img", "/srv/vm/../x", "raw.img"] {
            let result = policy.permit(Path::new(path), true);
            assert_eq!(result.unwrap_err().errno(), libc::EPERM, "{path}");
        }
        assert!(policy.permit(Path::new("/srv/base/b.vhd"), false).is_ok());
        assert!(Policy::trusting().permit(Path::new("/etc/shadow"), true).is_ok());
    }

    #[test]
    fn m19_loops_and_deep_chains_end() {
        let mut visited = Visited::default();
        visited.enter(1, 1).unwrap();
        visited.identify(Uuid([1; 16])).unwrap();
        assert_eq!(visited.enter(1, 1).unwrap_err().errno(), libc::ELOOP);
        visited.enter(1, 2).unwrap();
        assert!(matches!(visited.identify(Uuid([1; 16])), Err(Error::Loop)));

        let mut deep = Visited::default();
        for i in 0..30_u8 {
            deep.enter(1, i.into()).unwrap();
        }
        assert!(matches!(deep.enter(1, 30), Err(Error::TooDeep { limit: 30 })));
    }

    #[test]
    fn m20_another_image_under_the_parents_name_is_noticed() {
        assert!(check_identity(&parent(&[]), Uuid([1; 16])).is_ok());
        let other = check_identity(&parent(&[]), Uuid([2; 16]));
        assert_eq!(other.unwrap_err().errno(), libc::EINVAL);
    }

    #[test]
    fn relative_paths_begin_with_a_dot() {
        let relative = |a: &str, b: &str| relative(Path::new(a), Path::new(b)).display().to_string();
        assert_eq!(relative("/srv", "/srv/base.vhd"), "./base.vhd");
        assert_eq!(relative("/srv/a/b", "/srv/c/d.vhd"), "./../../c/d.vhd");
        assert_eq!(relative("/", "/d.vhd"), "./d.vhd");
    }
}
