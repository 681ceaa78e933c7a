//! A simulated XenStore daemon: the real wire protocol on unix sockets, served by a thread of this process.
//!
//! It behaves as the C daemon of Xen (`tools/xenstored`) where a backend can tell: implicit parents, inherited
//! permissions, a watch's first event, events for everything below a removed node, relative paths, transactions that
//! lose only against changes of what they saw, lists of children in parts, quotas of guests. Tests play the toolstack
//! by calling [`SimStore`] directly, connect clients through its sockets, and ask for faults.
//!
//! When a call returns, the watch events it caused are in their receivers' sockets.

mod daemon;
mod ops;
mod server;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use xenstore::Permission;
use xenstore::path::PathUse;

use ops::Actor;
use server::{Shared, State};
use tree::{Change, Tree};

/// Limits for guests, per domain (transactions and watches: per connection). Domain 0 has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Nodes it may own; above it `ENOSPC`.
    pub nodes: usize,
    /// Watches it may have; above it `E2BIG`.
    pub watches: usize,
    /// Transactions it may have open; above it `ENOSPC`.
    pub transactions: usize,
    /// Bytes of a node's value; above it `ENOSPC`.
    pub node_bytes: usize,
    /// Entries of a node's permissions; above it `ENOSPC`.
    pub permissions: usize,
}

impl Default for Quotas {
    /// The C daemon's own defaults (`hard_quotas` in `tools/xenstored/domain.c`).
    fn default() -> Quotas {
        Quotas { nodes: 1000, watches: 128, transactions: 10, node_bytes: 2048, permissions: 5 }
    }
}

/// What a restarted daemon knows of the time before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeAfter {
    /// All nodes, as after a crash of a daemon that keeps its data base.
    Kept,
    /// Nothing but what a freshly booted host has.
    Fresh,
}

/// A connection that ends around a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Which requests count.
    pub what: What,
    /// When it ends.
    pub when: When,
    /// Whether nobody is let in afterwards until [`SimStore::resume`].
    pub stop: bool,
    /// Whether the next connection is cut as well, after so many more requests.
    pub every: Option<usize>,
}

/// Requests that are counted for a [`Cut`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// All.
    Requests,
    /// Those that change something: the tree, watches, or whether a transaction is open.
    Changes,
}

/// When a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The request is never executed.
    Before,
    /// It is executed; half of the reply comes through.
    InReply,
    /// It is executed; nothing of the reply comes through.
    After,
}

/// How waiting has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The condition holds.
    Reached,
    /// The daemon was stopped by a [`Cut`].
    Cut,
    /// Neither, for too long.
    TimedOut,
}

/// A running simulated daemon. Dropping it ends it and all its connections.
#[derive(Debug)]
pub struct SimStore {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    dir: PathBuf,
}

impl SimStore {
    /// Starts a daemon with its sockets in `dir`, which must exist. The tree is that of a host without guests.
    ///
    /// # Panics
    ///
    /// If the socket cannot be made, which is a fault of the test around it: `dir` is missing, or its path is longer
    /// than a socket's may be (about 100 bytes).
    #[must_use]
    pub fn start(dir: &Path) -> SimStore {
        let store = SimStore::try_start(dir);
        store.unwrap_or_else(|error| panic!("cannot start a XenStore in {}: {error}", dir.display()))
    }

    fn try_start(dir: &Path) -> io::Result<SimStore> {
        let shared = Arc::new(Shared::new()?);
        let served = Arc::clone(&shared);
        let thread = thread::Builder::new().name("sim-store".into()).spawn(move || served.serve())?;
        let store = SimStore { shared, thread: Some(thread), dir: dir.to_owned() };
        store.shared.with(|state| state.open_door(0, &store.socket()))?;
        Ok(store)
    }

    /// The socket of domain 0: what `XENSTORED_PATH` should name.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// Opens a socket whose clients act as domain `domid`, without domain 0's rights, and gives its path.
    ///
    /// # Panics
    ///
    /// If the socket cannot be made, for example because it exists already.
    #[must_use]
    pub fn listen_for(&self, domid: u16) -> PathBuf {
        let path = self.dir.join(format!("socket-{domid}"));
        let opened = self.shared.with(|state| state.open_door(domid, &path));
        opened.unwrap_or_else(|error| panic!("cannot listen at {}: {error}", path.display()));
        path
    }

    /// The value of a node.
    #[must_use]
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.look(path, |node| node.value.clone())
    }

    /// The names of a node's children, in the order of their creation.
    #[must_use]
    pub fn list(&self, path: &str) -> Option<Vec<String>> {
        self.look(path, |node| node.children.clone())
    }

    /// The permissions of a node.
    #[must_use]
    pub fn perms(&self, path: &str) -> Option<Vec<Permission>> {
        self.look(path, |node| node.perms.clone())
    }

    /// Whether a node exists.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        self.look(path, |_| ()).is_some()
    }

    /// Writes a value as domain 0, creating what is missing.
    ///
    /// # Panics
    ///
    /// As all calls that act as domain 0: if `path` is not a valid absolute path.
    pub fn write(&self, path: &str, value: impl AsRef<[u8]>) {
        self.act(path, |tree| ops::write(tree, Actor::DOM0, path, value.as_ref()));
    }

    /// Writes values as domain 0 in one step: no client sees some of them without the others.
    ///
    /// # Panics
    ///
    /// As [`SimStore::write`].
    pub fn write_all(&self, values: &[(&str, &str)]) {
        let done = self.shared.with(|state| {
            state.daemon.as_dom0(|tree| {
                let mut changes = Vec::new();
                for (path, value) in values {
                    check(path);
                    changes.extend(ops::write(tree, Actor::DOM0, path, value.as_bytes())?);
                }
                Ok(((), changes))
            })
        });
        done.unwrap_or_else(|errno| panic!("domain 0 cannot write {values:?}: {errno}"));
    }

    /// Creates a node as domain 0.
    ///
    /// # Panics
    ///
    /// As [`SimStore::write`].
    pub fn mkdir(&self, path: &str) {
        self.act(path, |tree| ops::mkdir(tree, Actor::DOM0, path));
    }

    /// Removes a node and all below it as domain 0; tells whether it was there.
    ///
    /// # Panics
    ///
    /// As [`SimStore::write`].
    pub fn rm(&self, path: &str) -> bool {
        let existed = self.exists(path);
        if existed {
            self.act(path, |tree| ops::rm(tree, Actor::DOM0, path));
        }
        existed
    }

    /// Replaces a node's permissions as domain 0.
    ///
    /// # Panics
    ///
    /// As [`SimStore::write`], and if the node does not exist or `perms` is empty.
    pub fn set_perms(&self, path: &str, perms: &[Permission]) {
        self.act(path, |tree| ops::set_perms(tree, Actor::DOM0, path, perms.to_vec()));
    }

    /// Waits until `condition` holds for a node's value (`None`: no such node), but no longer than `timeout`; tells
    /// whether it does.
    #[must_use]
    pub fn wait_for(
        &self,
        path: &str,
        timeout: Duration,
        mut condition: impl FnMut(Option<&[u8]>) -> bool,
    ) -> bool {
        self.shared
            .wait(timeout, |state| condition(state.daemon.tree.peek(path).map(|node| node.value.as_slice())))
    }

    /// The same, ending also when the daemon was stopped by a cut.
    pub fn wait_for_or_cut(
        &self,
        path: &str,
        timeout: Duration,
        mut condition: impl FnMut(Option<&[u8]>) -> bool,
    ) -> Waited {
        let mut outcome = Waited::TimedOut;
        let ended = self.shared.wait(timeout, |state| {
            let value = state.daemon.tree.peek(path).map(|node| node.value.as_slice());
            outcome = if state.is_cut { Waited::Cut } else { Waited::Reached };
            state.is_cut || condition(value)
        });
        if ended { outcome } else { Waited::TimedOut }
    }

    /// Cuts a connection at the `nth` request that counts from now on (1: the next one).
    pub fn cut_at(&self, nth: usize, cut: Cut) {
        self.shared.with(|state| state.daemon.faults.cut = Some((nth.saturating_sub(1), cut)));
    }

    /// Whether a cut that was asked for is still to come.
    #[must_use]
    pub fn is_uncut(&self) -> bool {
        self.shared.look(|state| state.daemon.faults.cut.is_some())
    }

    /// Stops the daemon as a cut does.
    pub fn cut(&self) {
        self.shared.with(State::stop_after_cut);
    }

    /// Whether the daemon was stopped by a cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.shared.look(|state| state.is_cut)
    }

    /// All nodes below a path with their values and permissions, in the order of their paths.
    #[must_use]
    pub fn dump(&self, path: &str) -> Vec<String> {
        let below = format!("{path}/");
        self.shared.look(|state| {
            let nodes =
                state.daemon.tree.iter().filter(|(name, _)| *name == path || name.starts_with(&below));
            nodes
                .map(|(name, node)| format!("{name} = {} {:?}", node.value.escape_ascii(), node.perms))
                .collect()
        })
    }

    /// Makes a domain known, as the toolstack does for a new one: `@introduceDomain`.
    pub fn introduce(&self, domid: u16) {
        self.shared.with(|state| state.daemon.introduce(domid));
    }

    /// Ends a domain: its connections and all nodes it owns go, then `@releaseDomain`. Tells whether it was known.
    pub fn release(&self, domid: u16) -> bool {
        self.shared.with(|state| state.daemon.release(domid)).is_ok()
    }

    /// Switches the limits for guests on or off; at the start they are off.
    pub fn set_quotas(&self, quotas: Option<Quotas>) {
        self.shared.with(|state| state.daemon.quotas = quotas);
    }

    /// Ends all connections at once, as a crash would; new ones are accepted.
    pub fn drop_connections(&self) {
        self.shared.with(State::drop_connections);
    }

    /// Stops answering: requests are taken in and neither executed nor replied to. Events still go out.
    pub fn hold_requests(&self) {
        self.shared.with(|state| state.daemon.faults.hold = true);
    }

    /// Waits until `count` requests are held back, but no longer than `timeout`; tells whether they are.
    #[must_use]
    pub fn wait_held(&self, count: usize, timeout: Duration) -> bool {
        self.shared.wait(timeout, |state| state.daemon.held() >= count)
    }

    /// Executes and answers what was held back, and holds no more.
    pub fn release_requests(&self) {
        self.shared.with(|state| state.daemon.release_held());
    }

    /// Lets the `nth` WRITE from now on that any client sends (1: the next one) fail with `errno`, once.
    pub fn fail_write(&self, nth: usize, errno: Errno) {
        self.shared.with(|state| state.daemon.faults.fail_write = Some((nth.saturating_sub(1), errno)));
    }

    /// Stops the daemon: all connections end, and connecting fails until [`SimStore::resume`].
    pub fn stop(&self) {
        self.shared.with(State::close_doors);
    }

    /// Starts a stopped daemon again at the same sockets. Watches and transactions are forgotten in any case.
    ///
    /// # Panics
    ///
    /// If a socket cannot be made again.
    pub fn resume(&self, tree: TreeAfter) {
        let reopened = self.shared.with(|state| {
            if tree == TreeAfter::Fresh {
                state.daemon.fill_tree();
            }
            state.reopen_doors()
        });
        reopened
            .unwrap_or_else(|error| panic!("cannot restart the XenStore in {}: {error}", self.dir.display()));
    }

    /// [`SimStore::stop`] and [`SimStore::resume`].
    ///
    /// # Panics
    ///
    /// As [`SimStore::resume`].
    pub fn restart(&self, tree: TreeAfter) {
        self.stop();
        self.resume(tree);
    }

    fn look<T>(&self, path: &str, show: impl FnOnce(&tree::Node) -> T) -> Option<T> {
        self.shared.look(|state| state.daemon.tree.peek(path).map(show))
    }

    fn act(&self, path: &str, act: impl FnOnce(&mut Tree) -> Result<Vec<Change>, Errno>) {
        check(path);
        let done =
            self.shared.with(|state| state.daemon.as_dom0(|tree| act(tree).map(|changes| ((), changes))));
        done.unwrap_or_else(|errno| panic!("domain 0 cannot change {path}: {errno}"));
    }
}

impl Drop for SimStore {
    fn drop(&mut self) {
        self.shared.quit();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported where it happened; panicking while dropping would hide it.
            let _ = thread.join();
        }
        self.shared.with(State::close_doors);
    }
}

fn check(path: &str) {
    let valid = xenstore::path::check(path.as_bytes(), PathUse::NodeOrSpecial);
    assert!(valid.is_ok() && path.starts_with(['/', '@']), "{path:?} is not an absolute XenStore path");
}

#[cfg(test)]
mod tests;
