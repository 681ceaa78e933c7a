//! The operations on nodes, with permissions and quotas as the real daemon applies them (`tools/xenstored/core.c`).
//!
//! All work on any [`Nodes`], so that they are the same inside and outside of a transaction. Paths are absolute and
//! valid. Operations that change something return what watches have to be told.

use nix::errno::Errno;
use xenstore::Permission;

use super::Quotas;
use super::tree::{Change, Node, Nodes};

/// Who is asking.
#[derive(Clone, Copy, Debug)]
pub(super) struct Actor {
    pub(super) domid: u16,
    /// The limits for it; none for domain 0.
    pub(super) quotas: Option<Quotas>,
}

impl Actor {
    pub(super) const DOM0: Actor = Actor { domid: 0, quotas: None };
}

/// A right that an operation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Read,
    Write,
    Own,
}

pub(super) fn may_read(perms: &[Permission], domid: u16) -> bool {
    allowed(perms, domid, Need::Read)
}

fn allowed(perms: &[Permission], domid: u16, need: Need) -> bool {
    let Some((owner, others)) = perms.split_first() else {
        return domid == 0;
    };
    if domid == 0 || owner.domid == domid {
        return true;
    }
    let access = others.iter().find(|entry| entry.domid == domid).map_or(owner.access, |entry| entry.access);
    match need {
        Need::Read => access.may_read(),
        Need::Write => access.may_write(),
        Need::Own => false,
    }
}

/// The path of the node above, and the last name; `None` for the root and for special names.
fn split(path: &str) -> Option<(&str, &str)> {
    match path.rsplit_once('/')? {
        (_, "") => None,
        ("", name) => Some(("/", name)),
        (parent, name) => Some((parent, name)),
    }
}

pub(super) fn parent(path: &str) -> Option<&str> {
    split(path).map(|(parent, _)| parent)
}

fn child(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

/// The node, if `actor` has the needed right. Whoever lacks the right on the nearest node above, too, is not even told
/// whether the node exists.
fn find(nodes: &mut impl Nodes, actor: Actor, path: &str, need: Need) -> Result<Node, Errno> {
    match nodes.get(path) {
        Some(node) if allowed(&node.perms, actor.domid, need) => return Ok(node),
        Some(_) => return Err(Errno::EACCES),
        None => {}
    }
    let mut above = parent(path);
    while let Some(path) = above {
        if let Some(node) = nodes.get(path) {
            let permitted = allowed(&node.perms, actor.domid, need);
            return Err(if permitted { Errno::ENOENT } else { Errno::EACCES });
        }
        above = parent(path);
    }
    Err(Errno::ENOENT)
}

pub(super) fn read(nodes: &mut impl Nodes, actor: Actor, path: &str) -> Result<Node, Errno> {
    find(nodes, actor, path, Need::Read)
}

pub(super) fn write(
    nodes: &mut impl Nodes,
    actor: Actor,
    path: &str,
    value: &[u8],
) -> Result<Vec<Change>, Errno> {
    if actor.quotas.is_some_and(|quotas| value.len() > quotas.node_bytes) {
        return Err(Errno::ENOSPC);
    }
    let mut node = match find(nodes, actor, path, Need::Write) {
        Err(Errno::ENOENT) => create(nodes, actor, path)?,
        found => found?,
    };
    node.value = value.to_vec();
    let change = Change { path: path.to_owned(), exact: false, perms: vec![node.perms.clone()] };
    nodes.put(path, node);
    Ok(vec![change])
}

pub(super) fn mkdir(nodes: &mut impl Nodes, actor: Actor, path: &str) -> Result<Vec<Change>, Errno> {
    match find(nodes, actor, path, Need::Write) {
        Err(Errno::ENOENT) => {
            let node = create(nodes, actor, path)?;
            Ok(vec![Change { path: path.to_owned(), exact: false, perms: vec![node.perms] }])
        }
        found => found.map(|_| Vec::new()),
    }
}

/// Creates an empty node and its missing parents. They inherit the permissions of the nearest node above; a guest owns
/// what it creates.
fn create(nodes: &mut impl Nodes, actor: Actor, path: &str) -> Result<Node, Errno> {
    let mut missing = Vec::new();
    let mut cursor = path;
    let mut above = loop {
        let (parent, name) = split(cursor).ok_or(Errno::EINVAL)?;
        missing.push((parent, name));
        if let Some(node) = nodes.get(parent) {
            break node;
        }
        cursor = parent;
    };
    let owned = nodes.owned_by(actor.domid).saturating_add(missing.len());
    if actor.quotas.is_some_and(|quotas| owned > quotas.nodes) {
        return Err(Errno::ENOSPC);
    }
    for (parent, name) in missing.into_iter().rev() {
        let mut node = Node::new(above.perms.clone());
        if let (Some(owner), true) = (node.perms.first_mut(), actor.domid != 0) {
            owner.domid = actor.domid;
        }
        above.children.push(name.to_owned());
        nodes.put(parent, above);
        nodes.put(&child(parent, name), node.clone());
        above = node;
    }
    Ok(above)
}

pub(super) fn rm(nodes: &mut impl Nodes, actor: Actor, path: &str) -> Result<Vec<Change>, Errno> {
    match find(nodes, actor, path, Need::Write) {
        Err(Errno::ENOENT) => {
            let has_parent = parent(path).is_some_and(|parent| nodes.get(parent).is_some());
            return if has_parent { Ok(Vec::new()) } else { Err(Errno::ENOENT) };
        }
        found => found?,
    };
    let (above, name) = split(path).ok_or(Errno::EINVAL)?;
    let mut changes = Vec::new();
    for (path, node) in subtree(nodes, path).into_iter().rev() {
        nodes.remove(&path);
        changes.push(Change { path, exact: true, perms: vec![node.perms] });
    }
    // The topmost comes last, and is the one that watches above it are told of.
    if let Some(top) = changes.last_mut() {
        top.exact = false;
    }
    if let Some(mut node) = nodes.get(above) {
        node.children.retain(|child| child != name);
        nodes.put(above, node);
    }
    Ok(changes)
}

/// A node and all below it, each before its children.
fn subtree(nodes: &mut impl Nodes, path: &str) -> Vec<(String, Node)> {
    let mut found = Vec::new();
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        if let Some(node) = nodes.get(&path) {
            waiting.extend(node.children.iter().map(|name| child(&path, name)));
            found.push((path, node));
        }
    }
    found
}

pub(super) fn set_perms(
    nodes: &mut impl Nodes,
    actor: Actor,
    path: &str,
    perms: Vec<Permission>,
) -> Result<Vec<Change>, Errno> {
    let owner = perms.first().ok_or(Errno::EINVAL)?.domid;
    if actor.quotas.is_some_and(|quotas| perms.len() > quotas.permissions) {
        return Err(Errno::ENOSPC);
    }
    let mut node = find(nodes, actor, path, Need::Own)?;
    if actor.domid != 0 && node.owner() != Some(owner) {
        return Err(Errno::EPERM);
    }
    let before = std::mem::replace(&mut node.perms, perms.clone());
    nodes.put(path, node);
    Ok(vec![Change { path: path.to_owned(), exact: false, perms: vec![before, perms] }])
}
