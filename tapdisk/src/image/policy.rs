//! Which files a name inside an image may open.
//!
//! Whoever makes an image writes such names; a guest's owner may be allowed to bring images of his own. A parent that proves
//! that it is meant may lie anywhere: a VHD that carries the UUID its child asks for, which nobody's private file does. Any
//! other parent or extent, which any file would pass for, is opened only in the leaf's own folder, below it, or in a
//! folder that the administrator lists in `/etc/xenio/image-folders`, one absolute path a line, `#` for comments.

use std::path::{Path, PathBuf};

use vhd::chain::Policy;

use crate::confine::folders;

const LIST: &str = "/etc/xenio/image-folders";

/// What the chain below a leaf, which is given by its canonical path, may reach.
pub fn for_leaf(leaf: &Path) -> Policy {
    let mut policy = Policy::beside(leaf);
    if let Some(roots) = &mut policy.raw_roots {
        roots.extend(listed_folders());
    }
    policy
}

/// The folders in which any image's parents may lie.
pub fn listed_folders() -> Vec<PathBuf> {
    listed(Path::new(LIST))
}

/// The folders of a list, by their canonical paths. Without a list there are none.
fn listed(list: &Path) -> Vec<PathBuf> {
    let folders = folders::listed(list).unwrap_or_else(|error| {
        log::error!("{}: cannot be read: {error}; no folder of it is used", list.display());
        Vec::new()
    });
    folders.iter().filter_map(|folder| folder.canonicalize().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_absolute_and_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap();
        let list = folder.join("list");
        std::fs::write(&list, format!("# golden images\n{}\nrelative\n/no/such/folder\n", folder.display()))
            .unwrap();
        assert_eq!(listed(&list), std::slice::from_ref(&folder));
        assert!(listed(&folder.join("missing")).is_empty());
    }
}
