//! The tree of nodes, and transactions over it.
//!
//! Every node has a generation that changes with each write to it, its list of children included. A transaction
//! remembers the generation of each node it has seen, absent ones too, and can be committed only while all of them are
//! unchanged: the rule of `tools/xenstored/transaction.c`.

use std::collections::BTreeMap;

use nix::errno::Errno;
use xenstore::{Access, Permission};

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) value: Vec<u8>,
    /// The first entry is the owner's; never empty.
    pub(super) perms: Vec<Permission>,
    /// Names of the children in the order of their creation.
    pub(super) children: Vec<String>,
    /// Changes with every write; set by whoever stores the node.
    pub(super) generation: u64,
}

impl Node {
    pub(super) fn new(perms: Vec<Permission>) -> Node {
        Node { value: Vec::new(), perms, children: Vec::new(), generation: 0 }
    }

    pub(super) fn owner(&self) -> Option<u16> {
        self.perms.first().map(|entry| entry.domid)
    }
}

/// Where operations on nodes act: the tree itself, or a transaction.
pub(super) trait Nodes {
    /// A copy of the node at an absolute path.
    fn get(&mut self, path: &str) -> Option<Node>;
    /// Stores a node under a new generation.
    fn put(&mut self, path: &str, node: Node);
    /// Removes this one node.
    fn remove(&mut self, path: &str);
    /// How many nodes a domain owns.
    fn owned_by(&self, domid: u16) -> usize;
}

/// The committed state of the store.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    generation: u64,
}

/// The root and the names that can be watched without being nodes of the tree. Only domain 0 may use them at first.
const ALWAYS_THERE: [&str; 3] = ["/", "@introduceDomain", "@releaseDomain"];

impl Tree {
    pub(super) fn new() -> Tree {
        let mut tree = Tree { nodes: BTreeMap::new(), generation: 0 };
        for path in ALWAYS_THERE {
            tree.put(path, Node::new(vec![Permission::new(0, Access::None)]));
        }
        tree
    }

    pub(super) fn peek(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// All nodes, parents before their children.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// The paths of all nodes a domain owns, parents before their children.
    pub(super) fn paths_owned_by(&self, domid: u16) -> Vec<String> {
        let owned = self.nodes.iter().filter(|(_, node)| node.owner() == Some(domid));
        owned.map(|(path, _)| path.clone()).collect()
    }
}

impl Nodes for Tree {
    fn get(&mut self, path: &str) -> Option<Node> {
        self.nodes.get(path).cloned()
    }

    fn put(&mut self, path: &str, node: Node) {
        self.generation += 1;
        self.nodes.insert(path.to_owned(), Node { generation: self.generation, ..node });
    }

    fn remove(&mut self, path: &str) {
        self.nodes.remove(path);
    }

    fn owned_by(&self, domid: u16) -> usize {
        self.nodes.values().filter(|node| node.owner() == Some(domid)).count()
    }
}

/// A change that watches are told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) path: String,
    /// Only watches of exactly this path are told: it vanished along with a node above it, whose own change tells
    /// the watches further up.
    pub(super) exact: bool,
    /// The permissions of the node before and after: whoever may read it by one of them is told.
    pub(super) perms: Vec<Vec<Permission>>,
}

/// What a transaction knows of a node.
#[derive(Debug)]
struct Seen {
    /// The committed generation when the node was first looked at; `None` if there was no node.
    generation: Option<u64>,
    /// The node as the transaction sees it now.
    node: Option<Node>,
    modified: bool,
}

/// An open transaction: what it has seen and changed.
#[derive(Debug)]
pub(super) struct Transaction {
    seen: BTreeMap<String, Seen>,
    pub(super) changes: Vec<Change>,
    generation: u64,
}

/// Generations inside transactions count from here, so that they never equal a committed one.
const UNCOMMITTED: u64 = 1 << 63;

impl Transaction {
    pub(super) fn new() -> Transaction {
        Transaction { seen: BTreeMap::new(), changes: Vec::new(), generation: UNCOMMITTED }
    }

    /// Applies the transaction and gives what watches have to be told; `EAGAIN` if something it saw has changed.
    pub(super) fn commit(self, tree: &mut Tree) -> Result<Vec<Change>, Errno> {
        let current = |path: &str| tree.peek(path).map(|node| node.generation);
        if self.seen.iter().any(|(path, seen)| current(path) != seen.generation) {
            return Err(Errno::EAGAIN);
        }
        for (path, seen) in self.seen.into_iter().filter(|(_, seen)| seen.modified) {
            match seen.node {
                Some(node) => tree.put(&path, node),
                None => tree.remove(&path),
            }
        }
        Ok(self.changes)
    }
}

/// A transaction together with the tree below it.
#[derive(Debug)]
pub(super) struct Overlay<'a> {
    pub(super) tree: &'a Tree,
    pub(super) transaction: &'a mut Transaction,
}

impl Overlay<'_> {
    fn seen(&mut self, path: &str) -> &mut Seen {
        self.transaction.seen.entry(path.to_owned()).or_insert_with(|| {
            let node = self.tree.peek(path).cloned();
            Seen { generation: node.as_ref().map(|node| node.generation), node, modified: false }
        })
    }

    fn replace(&mut self, path: &str, node: Option<Node>) {
        let seen = self.seen(path);
        seen.node = node;
        seen.modified = true;
    }
}

impl Nodes for Overlay<'_> {
    fn get(&mut self, path: &str) -> Option<Node> {
        self.seen(path).node.clone()
    }

    fn put(&mut self, path: &str, node: Node) {
        self.transaction.generation += 1;
        let generation = self.transaction.generation;
        self.replace(path, Some(Node { generation, ..node }));
    }

    fn remove(&mut self, path: &str) {
        self.replace(path, None);
    }

    fn owned_by(&self, domid: u16) -> usize {
        let owned = |node: &Node| node.owner() == Some(domid);
        let seen = &self.transaction.seen;
        let untouched =
            self.tree.nodes.iter().filter(|(path, node)| !seen.contains_key(*path) && owned(node));
        untouched.count() + seen.values().filter(|seen| seen.node.as_ref().is_some_and(owned)).count()
    }
}
