//! The daemon without its sockets: connections, watches, transactions, and what each request does to them.
//!
//! A request goes in with [`Daemon::handle`]; replies and events come out of each connection's queue. The order on a
//! connection is the real daemon's: events caused by a request precede its reply, only a new watch's first event
//! follows it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nix::errno::Errno;
use xenstore::Permission;
use xenstore::codec::{self, Frame};
use xenstore::path::{self, PathUse};
use xenstore::payload::{join_strings, split_strings};
use xenstore::value::parse_u16;
use xenstore::wire::{HEADER_LEN, MessageType, PAYLOAD_MAX, errno_name};

use super::ops::{self, Actor};
use super::tree::{Change, Nodes, Overlay, Transaction, Tree};
use super::{Cut, Quotas, What, When};

/// Names a connection for as long as the daemon lives.
pub(super) type ConnectionId = u64;

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    /// The domain it acts for.
    pub(super) domid: u16,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    /// Messages to send.
    pub(super) outgoing: VecDeque<Vec<u8>>,
    /// How many bytes of the first of them are sent already.
    pub(super) sent: usize,
    /// Requests that arrived while the daemon holds them back.
    held: VecDeque<Frame>,
    /// It ends once its messages are sent.
    pub(super) doomed: bool,
}

#[derive(Debug)]
struct Watch {
    /// Absolute, or a special name.
    path: String,
    /// Bytes to cut off the front of reported paths: the home path of a connection that used a relative one.
    prefix: usize,
    token: Vec<u8>,
}

/// Faults that tests ask for.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Whether requests are kept waiting.
    pub(super) hold: bool,
    /// Fail a client's WRITE after so many more that succeed, with this error.
    pub(super) fail_write: Option<(usize, Errno)>,
    /// Cut the connection on which a request arrives, after so many more.
    pub(super) cut: Option<(usize, Cut)>,
    /// What the last cut was; taken by whoever closes the doors for it.
    pub(super) done: Option<Cut>,
}

/// What a request leads to besides its reply.
#[derive(Debug, PartialEq, Eq)]
enum Done {
    /// A reply with this payload.
    Reply(Vec<u8>),
    /// As `Reply(OK)`, and the first event of the connection's newest watch behind it.
    Watching,
}

/// All state of the daemon.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) tree: Tree,
    pub(super) connections: BTreeMap<ConnectionId, Connection>,
    pub(super) introduced: BTreeSet<u16>,
    pub(super) quotas: Option<Quotas>,
    pub(super) faults: Faults,
    last_connection: ConnectionId,
    last_transaction: u32,
}

impl Daemon {
    pub(super) fn new() -> Daemon {
        let mut daemon = Daemon {
            tree: Tree::new(),
            connections: BTreeMap::new(),
            introduced: BTreeSet::from([0]),
            quotas: None,
            faults: Faults::default(),
            last_connection: 0,
            last_transaction: 0,
        };
        daemon.fill_tree();
        daemon
    }

    /// Replaces the tree with the one a host has after its boot: the nodes of domain 0 itself that
    /// `tools/helpers/xen-init-dom0.c` writes.
    pub(super) fn fill_tree(&mut self) {
        self.tree = Tree::new();
        for (path, value) in [("/local/domain/0/domid", "0"), ("/local/domain/0/name", "Domain-0")] {
            // Nothing can refuse this: domain 0 asks, and the paths are valid.
            let _ = ops::write(&mut self.tree, Actor::DOM0, path, value.as_bytes());
        }
    }

    pub(super) fn connect(&mut self, domid: u16) -> ConnectionId {
        self.last_connection += 1;
        let connection = Connection {
            domid,
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            outgoing: VecDeque::new(),
            sent: 0,
            held: VecDeque::new(),
            doomed: false,
        };
        self.connections.insert(self.last_connection, connection);
        self.last_connection
    }

    /// Takes in a request, to be executed now or, while requests are held, later.
    pub(super) fn handle(&mut self, id: ConnectionId, request: Frame) {
        if self.faults.hold {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.held.push_back(request);
            }
        } else if let Some(cut) = self.faults.check_cut(&request) {
            self.cut(id, &request, cut);
        } else {
            self.execute(id, &request);
        }
    }

    /// Ends the connection around the execution of a request.
    fn cut(&mut self, id: ConnectionId, request: &Frame, cut: Cut) {
        if cut.when != When::Before {
            self.execute(id, request);
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.doomed = true;
        match (cut.when, connection.outgoing.back_mut()) {
            (When::InReply, Some(reply)) => reply.truncate(reply.len() / 2),
            _ => connection.outgoing.clear(),
        }
        self.faults.done = Some(cut);
    }

    /// How many requests are held back.
    pub(super) fn held(&self) -> usize {
        self.connections.values().map(|connection| connection.held.len()).sum()
    }

    /// Executes all requests that were held back.
    pub(super) fn release_held(&mut self) {
        self.faults.hold = false;
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for id in ids {
            while let Some(request) = self.connections.get_mut(&id).and_then(|c| c.held.pop_front()) {
                self.execute(id, &request);
            }
        }
    }

    /// Does what a toolstack in domain 0 does, outside of any connection.
    pub(super) fn as_dom0<T>(
        &mut self,
        act: impl FnOnce(&mut Tree) -> Result<(T, Vec<Change>), Errno>,
    ) -> Result<T, Errno> {
        let (value, changes) = act(&mut self.tree)?;
        self.fire(&changes);
        Ok(value)
    }

    /// Makes a domain known; tells watches of `@introduceDomain` if it was not.
    pub(super) fn introduce(&mut self, domid: u16) {
        if self.introduced.insert(domid) {
            self.fire_special("@introduceDomain");
        }
    }

    /// What the death of a domain does: its connections and the nodes it owned go, and watches of `@releaseDomain`
    /// are told. `ENOENT` for a domain that is not known.
    pub(super) fn release(&mut self, domid: u16) -> Result<(), Errno> {
        if domid == 0 || !self.introduced.remove(&domid) {
            return Err(Errno::ENOENT);
        }
        self.connections.retain(|_, connection| connection.domid != domid);
        for path in self.tree.paths_owned_by(domid) {
            // One that went with a node above it is no error.
            let changes = ops::rm(&mut self.tree, Actor::DOM0, &path).unwrap_or_default();
            self.fire(&changes);
        }
        self.fire_special("@releaseDomain");
        Ok(())
    }

    fn execute(&mut self, id: ConnectionId, request: &Frame) {
        let outcome = match MessageType::from_wire(request.header.kind) {
            Some(kind) => self.dispatch(id, kind, request).map(|done| (kind, done)),
            None => Err(Errno::ENOSYS),
        };
        let (kind, payload, first_event) = match outcome {
            Ok((_, Done::Reply(payload))) if payload.len() > PAYLOAD_MAX => error_reply(Errno::E2BIG),
            Ok((kind, Done::Reply(payload))) => (kind, payload, false),
            Ok((kind, Done::Watching)) => (kind, b"OK\0".to_vec(), true),
            Err(errno) => error_reply(errno),
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let reply = codec::encode(kind, request.header.req_id, request.header.tx_id, &payload);
        connection.outgoing.extend(reply);
        if let (true, Some(watch)) = (first_event, connection.watches.last()) {
            let event = watch.event(&watch.path);
            connection.queue_event(event);
        }
    }

    fn dispatch(&mut self, id: ConnectionId, kind: MessageType, request: &Frame) -> Result<Done, Errno> {
        let payload = request.payload.as_slice();
        let tx = request.header.tx_id;
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let privileged_only = matches!(
            kind,
            MessageType::Control
                | MessageType::Introduce
                | MessageType::Release
                | MessageType::IsDomainIntroduced
                | MessageType::Resume
                | MessageType::SetTarget
        );
        if privileged_only && connection.domid != 0 {
            return Err(Errno::EACCES);
        }
        let ignores_tx = matches!(kind, MessageType::Watch | MessageType::Unwatch);
        if tx != 0 && !ignores_tx && !connection.transactions.contains_key(&tx) {
            return Err(Errno::ENOENT);
        }
        match kind {
            MessageType::Watch => connection.watch(payload, self.quotas),
            MessageType::Unwatch => connection.unwatch(payload),
            MessageType::ResetWatches => {
                connection.watches.clear();
                connection.transactions.clear();
                ok()
            }
            MessageType::TransactionStart => self.start_transaction(id, tx),
            MessageType::TransactionEnd => self.end_transaction(id, tx, payload),
            MessageType::GetDomainPath => Ok(Done::Reply(join_strings([home(domid(payload)?).as_bytes()]))),
            MessageType::IsDomainIntroduced => {
                let known = self.introduced.contains(&domid(payload)?);
                Ok(Done::Reply(join_strings([if known { &b"T"[..] } else { b"F" }])))
            }
            MessageType::Introduce => {
                self.introduce(domid(payload)?);
                ok()
            }
            MessageType::Release => self.release(domid(payload)?).and_then(|()| ok()),
            MessageType::Control
            | MessageType::Resume
            | MessageType::SetTarget
            | MessageType::WatchEvent
            | MessageType::Error => Err(Errno::ENOSYS),
            _ => self.node_request(id, kind, tx, payload),
        }
    }

    fn start_transaction(&mut self, id: ConnectionId, tx: u32) -> Result<Done, Errno> {
        if tx != 0 {
            return Err(Errno::EBUSY);
        }
        let quotas = self.quotas;
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let limit = quotas.filter(|_| connection.domid != 0).map_or(usize::MAX, |quotas| quotas.transactions);
        if connection.transactions.len() >= limit {
            return Err(Errno::ENOSPC);
        }
        self.last_transaction += 1;
        connection.transactions.insert(self.last_transaction, Transaction::new());
        Ok(Done::Reply(join_strings([self.last_transaction.to_string().as_bytes()])))
    }

    fn end_transaction(&mut self, id: ConnectionId, tx: u32, payload: &[u8]) -> Result<Done, Errno> {
        let commit = match payload {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err(Errno::EINVAL),
        };
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let transaction = connection.transactions.remove(&tx).ok_or(Errno::ENOENT)?;
        if commit {
            let changes = transaction.commit(&mut self.tree)?;
            self.fire(&changes);
        }
        ok()
    }

    /// A request that names a node: on the tree, or on the transaction it belongs to.
    fn node_request(
        &mut self,
        id: ConnectionId,
        kind: MessageType,
        tx: u32,
        payload: &[u8],
    ) -> Result<Done, Errno> {
        let end = payload.iter().position(|&byte| byte == 0).ok_or(Errno::EINVAL)?;
        let (path, rest) = payload.split_at(end);
        let rest = rest.get(1..).unwrap_or_default();
        let connection = self.connections.get_mut(&id).ok_or(Errno::EIO)?;
        let special = matches!(kind, MessageType::GetPerms | MessageType::SetPerms);
        let needed = if special { PathUse::NodeOrSpecial } else { PathUse::Node };
        let path = connection.canonical(path, needed)?.0;
        let quotas = self.quotas.filter(|_| connection.domid != 0);
        let actor = Actor { domid: connection.domid, quotas };
        if kind == MessageType::Write {
            self.faults.check_write()?;
        }
        let (reply, changes) = match connection.transactions.get_mut(&tx) {
            Some(transaction) => {
                let overlay = &mut Overlay { tree: &self.tree, transaction };
                let (reply, changes) = on_node(overlay, actor, kind, &path, rest)?;
                transaction.changes.extend(changes);
                (reply, Vec::new())
            }
            None => on_node(&mut self.tree, actor, kind, &path, rest)?,
        };
        self.fire(&changes);
        Ok(Done::Reply(reply))
    }

    fn fire_special(&mut self, name: &str) {
        let perms = self.tree.peek(name).map(|node| node.perms.clone());
        let change = Change { path: name.to_owned(), exact: true, perms: Vec::from_iter(perms) };
        self.fire(&[change]);
    }

    /// Queues an event for each watch that a change matches, if its domain may know of the change.
    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            let above = ops::parent(&change.path).and_then(|path| self.tree.peek(path));
            let above = above.map(|node| node.perms.as_slice());
            let lists = || change.perms.iter().map(Vec::as_slice).chain(above);
            for connection in self.connections.values_mut() {
                if lists().any(|perms| ops::may_read(perms, connection.domid)) {
                    connection.fire(change);
                }
            }
        }
    }
}

impl Faults {
    /// Whether this request is the one to cut at.
    fn check_cut(&mut self, request: &Frame) -> Option<Cut> {
        let (left, cut) = self.cut.as_mut()?;
        let changes = [
            MessageType::Write,
            MessageType::SetPerms,
            MessageType::Rm,
            MessageType::Watch,
            MessageType::Unwatch,
            MessageType::TransactionEnd,
        ];
        if cut.what == What::Changes && !changes.iter().any(|kind| kind.to_wire() == request.header.kind) {
            return None;
        }
        if *left > 0 {
            *left -= 1;
            return None;
        }
        let cut = *cut;
        match cut.every {
            Some(distance) => *left = distance,
            None => self.cut = None,
        }
        Some(cut)
    }

    fn check_write(&mut self) -> Result<(), Errno> {
        match self.fail_write.take() {
            Some((0, errno)) => Err(errno),
            Some((more, errno)) => {
                self.fail_write = Some((more - 1, errno));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Connection {
    /// The absolute form of a path, and how many bytes it was lengthened by.
    fn canonical(&self, path: &[u8], needed: PathUse) -> Result<(String, usize), Errno> {
        let text = std::str::from_utf8(path).map_err(|_| Errno::EINVAL)?;
        let (absolute, prefix) = match text.as_bytes().first() {
            Some(b'/' | b'@') => (text.to_owned(), 0),
            _ => {
                let home = home(self.domid);
                (format!("{home}/{text}"), home.len() + 1)
            }
        };
        path::check(absolute.as_bytes(), needed).map_err(|_| Errno::EINVAL)?;
        Ok((absolute, prefix))
    }

    fn watch(&mut self, payload: &[u8], quotas: Option<Quotas>) -> Result<Done, Errno> {
        let (path, prefix, token) = self.watch_arguments(payload)?;
        if self.watches.iter().any(|watch| watch.is(&path, token)) {
            return Err(Errno::EEXIST);
        }
        let limit = quotas.filter(|_| self.domid != 0).map_or(usize::MAX, |quotas| quotas.watches);
        if self.watches.len() >= limit {
            return Err(Errno::E2BIG);
        }
        self.watches.push(Watch { path, prefix, token: token.to_vec() });
        Ok(Done::Watching)
    }

    fn unwatch(&mut self, payload: &[u8]) -> Result<Done, Errno> {
        let (path, _, token) = self.watch_arguments(payload)?;
        let found = self.watches.iter().position(|watch| watch.is(&path, token)).ok_or(Errno::ENOENT)?;
        self.watches.remove(found);
        ok()
    }

    fn watch_arguments<'a>(&self, payload: &'a [u8]) -> Result<(String, usize, &'a [u8]), Errno> {
        match split_strings(payload).as_deref() {
            Some(&[path, token]) => {
                let (path, prefix) = self.canonical(path, PathUse::NodeOrSpecial)?;
                Ok((path, prefix, token))
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn fire(&mut self, change: &Change) {
        let matching = self.watches.iter().filter(|watch| watch.matches(change));
        let events: Vec<_> = matching.map(|watch| watch.event(&change.path)).collect();
        for event in events {
            self.queue_event(event);
        }
    }

    /// Queues an event unless the same one is still waiting to be sent. Special events are never merged.
    fn queue_event(&mut self, event: Option<Vec<u8>>) {
        let Some(event) = event else { return };
        let special = event.get(HEADER_LEN) == Some(&b'@');
        let mut unsent = self.outgoing.iter().skip(usize::from(self.sent > 0));
        if special || !unsent.any(|waiting| *waiting == event) {
            self.outgoing.push_back(event);
        }
    }
}

impl Watch {
    fn is(&self, path: &str, token: &[u8]) -> bool {
        self.path == path && self.token == token
    }

    fn matches(&self, change: &Change) -> bool {
        let below = || change.path.strip_prefix(&self.path).is_some_and(|rest| rest.starts_with('/'));
        change.path == self.path || (!change.exact && (self.path == "/" || below()))
    }

    /// The message for a change of `path`; none if it would be too long.
    fn event(&self, path: &str) -> Option<Vec<u8>> {
        let shown = path.get(self.prefix..).unwrap_or_default();
        codec::encode(MessageType::WatchEvent, 0, 0, &join_strings([shown.as_bytes(), &self.token]))
    }
}

/// The part of a request on a node that is the same inside and outside of a transaction: the reply, and the changes.
fn on_node(
    nodes: &mut impl Nodes,
    actor: Actor,
    kind: MessageType,
    path: &str,
    rest: &[u8],
) -> Result<(Vec<u8>, Vec<Change>), Errno> {
    let takes_more = matches!(kind, MessageType::Write | MessageType::SetPerms | MessageType::DirectoryPart);
    if !takes_more && !rest.is_empty() {
        return Err(Errno::EINVAL);
    }
    let changed = |changes| (b"OK\0".to_vec(), changes);
    let shown = |reply| (reply, Vec::new());
    match kind {
        MessageType::Read => ops::read(nodes, actor, path).map(|node| shown(node.value)),
        MessageType::Directory => ops::read(nodes, actor, path)
            .map(|node| shown(join_strings(node.children.iter().map(String::as_bytes)))),
        MessageType::DirectoryPart => {
            let node = ops::read(nodes, actor, path)?;
            let names = join_strings(node.children.iter().map(String::as_bytes));
            directory_part(node.generation, &names, rest).map(shown)
        }
        MessageType::GetPerms => {
            let entries = ops::read(nodes, actor, path)?.perms;
            let entries: Vec<Vec<u8>> = entries.into_iter().map(Permission::to_wire).collect();
            Ok(shown(join_strings(entries.iter().map(Vec::as_slice))))
        }
        MessageType::Write => ops::write(nodes, actor, path, rest).map(changed),
        MessageType::Mkdir => ops::mkdir(nodes, actor, path).map(changed),
        MessageType::Rm => ops::rm(nodes, actor, path).map(changed),
        MessageType::SetPerms => {
            let entries = split_strings(rest).ok_or(Errno::EINVAL)?;
            let entries: Option<Vec<_>> = entries.into_iter().map(Permission::from_wire).collect();
            ops::set_perms(nodes, actor, path, entries.ok_or(Errno::EINVAL)?).map(changed)
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// As many whole names from the asked offset on as fit, behind the generation; an empty name marks the end.
fn directory_part(generation: u64, names: &[u8], offset: &[u8]) -> Result<Vec<u8>, Errno> {
    let offset = std::str::from_utf8(xenstore::payload::single_string(offset)).map_err(|_| Errno::EINVAL)?;
    let offset: usize = offset.parse().map_err(|_| Errno::EINVAL)?;
    let mut reply = join_strings([generation.to_string().as_bytes()]);
    let rest = names.get(offset..).unwrap_or_default();
    let room = PAYLOAD_MAX - reply.len() - 1;
    let whole = match rest.get(..room) {
        Some(front) => front.iter().rposition(|&byte| byte == 0).map_or(0, |end| end + 1),
        None => rest.len(),
    };
    reply.extend_from_slice(rest.get(..whole).unwrap_or_default());
    if whole == rest.len() {
        reply.push(0);
    }
    Ok(reply)
}

fn ok() -> Result<Done, Errno> {
    Ok(Done::Reply(b"OK\0".to_vec()))
}

fn error_reply(errno: Errno) -> (MessageType, Vec<u8>, bool) {
    (MessageType::Error, join_strings([errno_name(errno).as_bytes()]), false)
}

/// The domain id that is the first string of a payload.
fn domid(payload: &[u8]) -> Result<u16, Errno> {
    let strings = split_strings(payload).ok_or(Errno::EINVAL)?;
    strings.first().and_then(|id| parse_u16(id).ok()).ok_or(Errno::EINVAL)
}

/// What relative paths of a domain are relative to. The real daemon uses domain 0's home for its unix socket as well.
fn home(domid: u16) -> String {
    format!("/local/domain/{domid}")
}
