//! What is the tapdisk's business.
//!
//! A tapdisk is believed nothing: a guest or an image may have taken it over. What it may have done follows from what the
//! administrator's tools ask of it, which the porter reads first:
//!
//! | a request | what the tapdisk may do from then on |
//! |---|---|
//! | attach | claim this minor, keep its record and journals, listen at its socket |
//! | open, unpause, snapshot | open the images and logs named there, to write only if they are not to be read only; connect to NBD servers named there |
//! | connect | the grant device, and event channels of this domain |
//!
//! **Names inside images** are followed only in a window: while such a request is carried out, or while a disk is taken over. Then
//! files may be opened for reading that lie where [`policy`](crate::image) lets parents lie, and anywhere those that begin or end as a VHD
//! does; in the folder of a VMDK its extents. Afterwards, only what was open may be opened again.
//!
//! Files are opened without being touched (`O_PATH`), judged by what they are, and then opened by that descriptor: between the
//! judgement and the use no name counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbd::address::{Address, Place};
use nix::errno::Errno;
use tap_ctl::inflight::{Folder, Record};
use tap_ctl::proto::{ImageSpec, ImageType, Minor, OpenParams, Secondary};
use tap_ctl::{ControlDir, Request};

use super::{Answer, Errand, Failure, How, Keep, Outcome, act};
use crate::image::holders::holder;
use crate::image::{policy, ram, snapshot, stack};

/// What a tapdisk may add to open(2).
const FLAGS: i32 = libc::O_DIRECT | libc::O_DIRECTORY | libc::O_DSYNC | libc::O_NOATIME | libc::O_NONBLOCK;

/// So many refusals are logged; a tapdisk that was taken over could go on for ever.
const LOGGED: u32 = 20;

/// What a file system object is, whatever its name.
type Id = (u64, u64);

/// Knows what the administrator has asked for.
#[derive(Debug)]
pub struct Judge {
    known: Mutex<Known>,
    refused: AtomicU32,
}

/// While it is there, names inside images may be followed.
#[derive(Debug)]
pub struct Window {
    judge: Arc<Judge>,
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut known = self.judge.known();
        known.windows = known.windows.saturating_sub(1);
    }
}

/// How a file may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Named {
    write: bool,
    kind: ImageType,
}

/// What was asked for.
#[derive(Debug)]
struct Known {
    dir: ControlDir,
    pid: i32,
    minors: BTreeSet<Minor>,
    /// By the names that were given.
    files: BTreeMap<PathBuf, Named>,
    /// Text files that name images.
    stacks: BTreeSet<PathBuf>,
    /// Images that are to be made, and whether they were.
    made: BTreeMap<PathBuf, bool>,
    /// Sockets of NBD servers.
    servers: BTreeSet<PathBuf>,
    /// Disks that stand for parents.
    parents: BTreeSet<Minor>,
    doms: BTreeSet<u16>,
    readonly: bool,
    /// What the tapdisk has got, and whether for writing.
    given: HashMap<Id, bool>,
    /// Where images lie that were given by their names, and whether extents to be written may lie there.
    folders: BTreeMap<PathBuf, bool>,
    windows: usize,
    /// It is taking a disk over.
    starting: bool,
}

/// What is known of a file that is to be opened.
#[derive(Debug)]
struct Facts {
    /// Its path without links.
    real: PathBuf,
    id: Id,
    /// It is a file, a folder or a block device: opening one does nothing else, which is not true of other devices and of pipes.
    plain: bool,
    /// It is one of those that were named.
    named: Option<Named>,
    /// It lies in a folder that the administrator has listed for parents.
    listed: bool,
    /// It is the folder of an image that is to be made.
    of_made: bool,
}

/// What comes of a file that is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Yes,
    /// If it looks like a VHD.
    IfVhd,
    No,
}

impl Judge {
    /// For the tapdisk `pid`, which nothing was asked of yet.
    pub fn new(dir: ControlDir, pid: i32) -> Judge {
        Judge { known: Mutex::new(Known::new(dir, pid)), refused: AtomicU32::new(0) }
    }

    /// Notes what a request names, before the tapdisk gets it. The window is to be kept until the tapdisk has answered; `None`: the
    /// request opens nothing. May block on a store that hangs.
    pub fn learn(self: &Arc<Judge>, request: &Request) -> Option<Window> {
        let mut known = self.known();
        if !known.learn(request) {
            return None;
        }
        known.windows += 1;
        drop(known);
        self.read_stacks();
        Some(Window { judge: self.clone() })
    }

    /// The tapdisk was started to go on with this disk: notes what its record names. Names inside images may be followed until
    /// [`Errand::Settled`].
    pub fn take_over(&self, minor: Minor) {
        let mut known = self.known();
        known.minors.insert(minor);
        known.starting = true;
        // What is wrong with it the tapdisk will say.
        if let Ok(Some(record)) = Folder::of(&known.dir, minor).read() {
            known.open(&record.params);
            known.doms.extend(record.rings.iter().map(|ring| ring.domid));
        }
        drop(known);
        self.read_stacks();
    }

    /// Does an errand if it is the tapdisk's business. Blocking; any thread may call it.
    pub fn carry_out(&self, errand: &Errand, with: Option<BorrowedFd<'_>>) -> Outcome {
        match errand {
            // What is its own is judged by its name: no image's store is asked for that.
            Errand::Open { path, how } if how.create.is_none() && !self.known().is_own(path.path()) => {
                self.open(path.path(), *how)
            }
            Errand::Again { how } => {
                let file = File::from(with.ok_or(Errno::EBADF)?.try_clone_to_owned().map_err(Failure::from)?);
                let given = self.known().given.get(&identity(&file)?).copied();
                match given {
                    Some(write) if (write || !how.write) && how.flags & !FLAGS == 0 => {
                        act::carry_out(errand, with)
                    }
                    _ => self.refuse(errand),
                }
            }
            Errand::Holder => {
                let pid = self.known().pid.unsigned_abs();
                Ok((Answer::Holder(holder(with.ok_or(Errno::EBADF)?, pid)), None))
            }
            _ => {
                let draft = self.draft_of(errand);
                if !self.known().permits(errand, draft.as_deref()) {
                    return self.refuse(errand);
                }
                let outcome = act::carry_out(errand, with)?;
                self.note(errand, &outcome.0);
                Ok(outcome)
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, errand: &Errand) -> Outcome {
        let before = self.refused.fetch_add(1, Ordering::Relaxed);
        if before < LOGGED {
            log::warn!("refused to the tapdisk, because nobody asked it for that: {errand:?}");
        } else if before == LOGGED {
            log::warn!("more was refused to the tapdisk; that is not logged any more");
        }
        Err(Errno::EACCES.into())
    }

    /// Whoever writes such a file may name any image, as on the command line.
    fn read_stacks(&self) {
        let stacks: Vec<PathBuf> = self.known().stacks.iter().cloned().collect();
        for path in stacks {
            // What is wrong with it the tapdisk will say.
            if let Ok(stack) = stack::read(&path) {
                let mut known = self.known();
                let write = !known.readonly;
                known.image(&stack.leaf, write);
                for image in &stack.below {
                    known.image(image, false);
                }
            }
        }
    }

    /// Nothing of this is done under the lock, as the store may hang.
    fn open(&self, path: &Path, how: How) -> Outcome {
        let errand = Errand::Open { path: path.into(), how };
        if how.flags & !FLAGS != 0 {
            return self.refuse(&errand);
        }
        let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        let (real, id) = (std::fs::read_link(act::itself(place.as_fd()))?, identity(&place)?);
        let kind = place.metadata()?.file_type();
        let plain = kind.is_file() || kind.is_dir() || kind.is_block_device();
        let (files, made) = {
            let known = self.known();
            (known.files.clone(), known.made.keys().cloned().collect::<Vec<_>>())
        };
        let named = files.get(path).copied().or_else(|| {
            files.iter().find_map(|(name, named)| (name.canonicalize().ok()? == real).then_some(*named))
        });
        let listed = policy::listed_folders().iter().any(|folder| real.starts_with(folder));
        let of_made = made.iter().any(|image| folder_of(image).as_deref() == Some(&*real));
        let facts = Facts { real, id, plain, named, listed, of_made };
        let verdict = self.known().judge(how, &facts);
        let file = match verdict {
            Verdict::No => return self.refuse(&errand),
            Verdict::Yes | Verdict::IfVhd => act::open(&act::itself(place.as_fd()), how)?,
        };
        if verdict == Verdict::IfVhd && !looks_like_vhd(&file) {
            return self.refuse(&errand);
        }
        self.known().give(&facts, how);
        Ok((Answer::Done, Some(file.into())))
    }

    /// The draft of an image to be made that an errand is about.
    fn draft_of(&self, errand: &Errand) -> Option<PathBuf> {
        let path = match errand {
            Errand::Open { path, .. } | Errand::Remove { path } => path,
            Errand::Link { from, .. } => from,
            _ => return None,
        };
        let (made, pid) = {
            let known = self.known();
            (known.made.keys().cloned().collect::<Vec<_>>(), known.pid)
        };
        made.into_iter().find(|image| is_draft(path.path(), image, pid))
    }

    fn note(&self, errand: &Errand, answer: &Answer) {
        let mut known = self.known();
        match (errand, answer) {
            (Errand::Link { to, .. }, _) => drop(known.made.insert(to.path().to_owned(), true)),
            (Errand::Parent { .. }, Answer::Image(image)) => known.image(image, false),
            (Errand::Settled, _) => known.starting = false,
            _ => {}
        }
    }
}

impl Known {
    fn new(dir: ControlDir, pid: i32) -> Known {
        Known {
            dir,
            pid,
            minors: BTreeSet::new(),
            files: BTreeMap::new(),
            stacks: BTreeSet::new(),
            made: BTreeMap::new(),
            servers: BTreeSet::new(),
            parents: BTreeSet::new(),
            doms: BTreeSet::new(),
            readonly: false,
            given: HashMap::new(),
            folders: BTreeMap::new(),
            windows: 0,
            starting: false,
        }
    }

    /// Notes what a request names; whether it may open something.
    fn learn(&mut self, request: &Request) -> bool {
        match request {
            Request::Attach { minor } => {
                self.minors.insert(*minor);
                false
            }
            Request::Connect { ring, .. } => {
                self.doms.insert(ring.domid);
                false
            }
            Request::Open { params, .. } => {
                self.open(params);
                true
            }
            Request::Unpause { change, .. } => {
                let write = !self.readonly;
                change.image.iter().for_each(|image| self.image(image, write));
                if let Some(Secondary::Image(image)) = &change.secondary {
                    self.image(image, write);
                }
                change.log.iter().for_each(|log| self.file(log, true, ImageType::Aio));
                true
            }
            Request::Snapshot { image, .. } => {
                self.made.insert(PathBuf::from(&image.path), false);
                self.image(image, true);
                true
            }
            _ => false,
        }
    }

    fn open(&mut self, params: &OpenParams) {
        self.readonly = params.readonly;
        let write = !params.readonly;
        self.image(&params.image, write);
        params.secondary.iter().for_each(|image| self.image(image, write));
        params.log.iter().for_each(|log| self.file(log, true, ImageType::Aio));
        self.parents.extend(params.shared_parent);
    }

    fn image(&mut self, image: &ImageSpec, write: bool) {
        match image.kind {
            ImageType::Null => {}
            ImageType::Nbd => {
                if let Ok(Address { place: Place::Unix(path), .. }) = image.path.parse() {
                    self.servers.insert(path);
                }
            }
            ImageType::Ram => {
                if let Some(path) = ram::source(&image.path) {
                    self.file(path, false, ImageType::Aio);
                }
            }
            ImageType::XChain => {
                self.stacks.insert(PathBuf::from(&image.path));
                self.file(&image.path, false, ImageType::XChain);
            }
            kind => self.file(&image.path, write, kind),
        }
    }

    fn file(&mut self, path: impl Into<PathBuf>, write: bool, kind: ImageType) {
        let named = self.files.entry(path.into()).or_insert(Named { write, kind });
        *named = Named { write: named.write || write, kind };
    }

    /// Names inside images may be followed.
    fn is_window(&self) -> bool {
        self.windows > 0 || self.starting
    }

    /// Whether a file that is there, and is not its own, may be opened.
    fn judge(&self, how: How, facts: &Facts) -> Verdict {
        let yes = |so: bool| if so { Verdict::Yes } else { Verdict::No };
        if let Some(named) = facts.named {
            return yes(named.write || !how.write);
        }
        if let Some(write) = self.given.get(&facts.id) {
            return yes(*write || !how.write);
        }
        if !self.is_window() || !facts.plain {
            return Verdict::No;
        }
        if how.write {
            // An extent of a VMDK lies right beside it.
            return yes(facts.real.parent().and_then(|folder| self.folders.get(folder)) == Some(&true));
        }
        match facts.of_made
            || facts.listed
            || self.folders.keys().any(|folder| facts.real.starts_with(folder))
        {
            true => Verdict::Yes,
            false => Verdict::IfVhd,
        }
    }

    /// Notes a file that the tapdisk gets.
    fn give(&mut self, facts: &Facts, how: How) {
        let write = self.given.entry(facts.id).or_insert(how.write);
        *write |= how.write;
        let names_others = |named: &Named| {
            matches!(named.kind, ImageType::Vhd | ImageType::Qcow | ImageType::Qcow2 | ImageType::Vmdk)
        };
        if let (Some(named), Some(folder)) = (facts.named.filter(names_others), facts.real.parent()) {
            let extents = self.folders.entry(folder.to_owned()).or_insert(false);
            *extents |= named.write && named.kind == ImageType::Vmdk;
        }
    }

    /// Whether any other errand may be done; `draft`: the image to be made whose draft it is about.
    fn permits(&self, errand: &Errand, draft: Option<&Path>) -> bool {
        let draft = draft.filter(|_| self.is_window());
        match errand {
            // These are judged elsewhere.
            Errand::Again { .. } | Errand::Holder => false,
            Errand::Open { path, how } => {
                how.flags & !FLAGS == 0 && (draft.is_some() || self.is_own(path.path()))
            }
            Errand::Resolve { path } => self.is_window() || self.files.contains_key(path.path()),
            Errand::Exists { path } => self.made.contains_key(path.path()),
            Errand::Remove { path } => {
                let path = path.path();
                let unmade = self.is_window() && self.made.get(path) == Some(&true);
                draft.is_some()
                    || unmade
                    || self.is_own(path)
                    || path == self.dir.control_socket(self.pid)
                    || self.is_door(path)
            }
            Errand::Link { to, .. } => draft == Some(to.path()),
            Errand::MakeFolder { path } | Errand::RemoveFolder { path } => path.path() == self.statistics(),
            Errand::Listen { path } => self.is_door(path.path()) && self.is_ours(path.path()),
            Errand::Alias { path, alias } => {
                let minor = |path: &Path| self.dir.parse_vbd_path(path).map(|(_, minor)| minor);
                self.is_door(path.path())
                    && self.is_ours(path.path())
                    && minor(path.path()) == minor(alias.path())
            }
            Errand::Connect { path } => self.servers.contains(path.path()),
            Errand::Settled => true,
            Errand::Parent { root, minor } => root.path() == self.dir.root() && self.parents.contains(minor),
            Errand::Claim { root, minor } | Errand::CleanUp { root, minor, .. } => {
                self.has(root.path(), *minor)
            }
            Errand::Keep { root, minor, what } => {
                self.has(root.path(), *minor)
                    && match what {
                        Keep::Write(record) => self.is_true(*minor, record),
                        Keep::Read | Keep::Begin | Keep::Forget | Keep::End => true,
                    }
            }
            Errand::Grants => !self.doms.is_empty(),
            Errand::Events { dom } => self.doms.contains(dom),
        }
    }

    fn has(&self, root: &Path, minor: Minor) -> bool {
        root == self.dir.root() && self.minors.contains(&minor)
    }

    /// A journal or a page of statistics.
    fn is_own(&self, path: &Path) -> bool {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
        else {
            return false;
        };
        let journal = || self.minors.iter().any(|minor| folder == Folder::of(&self.dir, *minor).path());
        (name.starts_with("ring-") && journal()) || (name.starts_with("vbd-") && folder == self.statistics())
    }

    fn statistics(&self) -> PathBuf {
        self.dir.statistics(self.pid.unsigned_abs())
    }

    /// Where clients of one of the minors come in, or came in when another tapdisk served it.
    fn is_door(&self, path: &Path) -> bool {
        self.dir.parse_vbd_path(path).is_some_and(|(_, minor)| self.minors.contains(&minor))
    }

    fn is_ours(&self, path: &Path) -> bool {
        self.dir.parse_vbd_path(path).is_some_and(|(pid, _)| pid == self.pid)
    }

    /// Whether a record says nothing but what was asked for. Who takes over believes it.
    fn is_true(&self, minor: Minor, record: &Record) -> bool {
        let params = &record.params;
        let mut asked = Known::new(self.dir.clone(), self.pid);
        asked.open(params);
        let files = asked
            .files
            .iter()
            .all(|(path, named)| self.files.get(path).is_some_and(|known| known.write || !named.write));
        files
            && asked.stacks.is_subset(&self.stacks)
            && asked.servers.is_subset(&self.servers)
            && asked.parents.is_subset(&self.parents)
            && record.pid == self.pid
            && self.dir.parse_vbd_path(&record.socket).is_some_and(|(_, served)| served == minor)
            && record.rings.iter().all(|ring| self.doms.contains(&ring.domid))
    }
}

/// The folder of an image that is to be made, without links.
fn folder_of(image: &Path) -> Option<PathBuf> {
    snapshot::folder_of(image).canonicalize().ok()
}

/// Whether a path is what an image is called until it is whole. The store is asked only for one that has the name.
fn is_draft(path: &Path, image: &Path, pid: i32) -> bool {
    let name = image.file_name().map(|name| snapshot::draft_name(name, pid.unsigned_abs()));
    let named = name.is_some_and(|name| path.file_name() == Some(name.as_ref()));
    named && folder_of(image).as_deref() == path.parent()
}

fn identity(file: &File) -> Result<Id, Failure> {
    let metadata = file.metadata()?;
    Ok(match metadata.file_type().is_block_device() {
        true => (u64::MAX, metadata.rdev()),
        false => (metadata.dev(), metadata.ino()),
    })
}

/// Whether it begins or ends as a VHD does. Which one it is, and whether it is the one that is meant, the tapdisk finds out.
fn looks_like_vhd(file: &File) -> bool {
    let has_cookie = |offset: u64| {
        let mut cookie = [0; 8];
        file.read_exact_at(&mut cookie, offset).is_ok() && &cookie == b"conectix"
    };
    let footer = || file.metadata().ok()?.len().checked_sub(512);
    has_cookie(0) || footer().is_some_and(has_cookie)
}

#[cfg(test)]
mod tests;
