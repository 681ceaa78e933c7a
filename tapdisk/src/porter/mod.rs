//! The porter: a process that does for a tapdisk what takes root's rights, and nothing that the tapdisk has no business with.
//!
//! Guests and images are judged in the tapdisk, so the tapdisk has a user of its own and no capability. What it still needs by name,
//! it asks of its porter, which keeps root's user id, speaks to nobody but its tapdisk and the administrator's tools, and reads neither rings
//! nor images:
//!
//! ```text
//!   tap-ctl, xenio ──control socket──► porter ──clients──► tapdisk
//!                                        ▲  ◄──errands──┘
//!                                        └── names in requests are remembered: they are what may be opened
//! ```
//!
//! - An [`Errand`] is one such thing; [`act`] does it.
//! - Whether it is the tapdisk's business says [`judge`]: the porter reads what the administrator asks of the tapdisk before the tapdisk does.
//! - [`channel`] is the way there and back, [`process`] the porter itself; its clients pass through `visitors`.
//!
//! A tapdisk that was not started by root, or whose host has no such user, has no porter: it does its errands itself, with the rights it was
//! started with. So do tests and tools.
//!
//! The functions of this module are the tapdisk's side. They block; what they do may be asked by any thread.

pub mod act;
pub mod channel;
pub mod judge;
pub mod parcel;
pub mod process;
mod visitors;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use blkif::DomId;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tap_ctl::ControlDir;
use tap_ctl::inflight::Record;
use tap_ctl::minors::Claim;
use tap_ctl::proto::{ImageSpec, Minor};

use self::channel::Channel;
use crate::image::holders::Holder;

/// The porter of this process.
static PORTER: OnceLock<Channel> = OnceLock::new();

/// From now on this process has a porter. Once, before anything is asked.
pub fn engage(channel: Channel) {
    // A second one is not engaged: there is one start.
    let _ = PORTER.set(channel);
}

/// Whether this process has a porter.
pub fn is_engaged() -> bool {
    PORTER.get().is_some()
}

/// A path, of any bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name(Vec<u8>);

impl Name {
    /// As a path.
    pub fn path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }
}

impl From<&Path> for Name {
    fn from(path: &Path) -> Name {
        Name(path.as_os_str().as_bytes().to_vec())
    }
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct How {
    /// For writing as well as for reading.
    pub write: bool,
    /// It is made, with this mode (less the umask); EEXIST if it is there already.
    pub create: Option<u32>,
    /// More flags of open(2). [`judge`] says which.
    pub flags: i32,
}

impl How {
    /// To read.
    pub const READ: How = How { write: false, create: None, flags: 0 };
    /// To read and write.
    pub const WRITE: How = How { write: true, create: None, flags: 0 };
}

/// What a tapdisk has done for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Errand {
    /// Open a file by its name. Gives its descriptor.
    Open {
        /// The name.
        path: Name,
        /// How.
        how: How,
    },
    /// Open the file once more whose descriptor comes along, whatever happened to its name. Gives the descriptor.
    Again {
        /// How.
        how: How,
    },
    /// Find the canonical path.
    Resolve {
        /// The name.
        path: Name,
    },
    /// Find out whether there is anything of that name, be it a link that leads nowhere.
    Exists {
        /// The name.
        path: Name,
    },
    /// Remove a file or a socket.
    Remove {
        /// The name.
        path: Name,
    },
    /// Give a file a second name, which nothing has.
    Link {
        /// The first.
        from: Name,
        /// The second.
        to: Name,
    },
    /// Make a folder for its owner only, with those above it, unless it is there.
    MakeFolder {
        /// The name.
        path: Name,
    },
    /// Remove a folder with nothing in it.
    RemoveFolder {
        /// The name.
        path: Name,
    },
    /// Listen at a socket, in place of one that a dead process may have left. Gives the descriptor, which does not block.
    Listen {
        /// The name.
        path: Name,
    },
    /// Have a socket found by another name in its folder too.
    Alias {
        /// Where it is.
        path: Name,
        /// The other name.
        alias: Name,
    },
    /// Connect to a socket. Gives the descriptor.
    Connect {
        /// The name.
        path: Name,
    },
    /// Find out who else has the file open whose descriptor comes along.
    Holder,
    /// Find the image that another disk of the host is to who reads it.
    Parent {
        /// The runtime folder.
        root: Name,
        /// The other disk.
        minor: Minor,
    },
    /// Take a minor into use. Gives the descriptor that holds it.
    Claim {
        /// The runtime folder.
        root: Name,
        /// The minor.
        minor: Minor,
    },
    /// Something with what is kept of a disk for who takes over.
    Keep {
        /// The runtime folder.
        root: Name,
        /// The minor.
        minor: Minor,
        /// What.
        what: Keep,
    },
    /// Remove the sockets of a dead tapdisk, unless another one of that number listens there.
    CleanUp {
        /// The runtime folder.
        root: Name,
        /// Its process id.
        dead: i32,
        /// Which disk it served.
        minor: Minor,
        /// Not this one.
        except: Name,
    },
    /// Open the grant device.
    Grants,
    /// Open an event channel device that reaches one domain only.
    Events {
        /// The domain.
        dom: u16,
    },
    /// From now on nothing is opened of what images name, until the administrator asks for something that takes it.
    Settled,
}

/// What is done with [`tap_ctl::inflight`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Read the record.
    Read,
    /// Make the folder anew.
    Begin,
    /// Write the record.
    Write(Box<Record>),
    /// Remove the record.
    Forget,
    /// Remove everything.
    End,
}

/// What comes back of an errand, beside a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Nothing more.
    Done,
    /// Whether it is so.
    Is(bool),
    /// A path.
    Path(Name),
    /// An image.
    Image(ImageSpec),
    /// Who it is.
    Holder(Holder),
    /// The record, if there is one.
    Record(Option<Box<Record>>),
}

/// Why an errand has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{words}")]
pub struct Failure {
    /// Positive errno.
    pub errno: i32,
    /// For people.
    pub words: String,
    /// The words say more than the number.
    pub telling: bool,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        let meant = || match error.kind() {
            io::ErrorKind::NotFound => libc::ENOENT,
            io::ErrorKind::PermissionDenied => libc::EACCES,
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
            _ => libc::EIO,
        };
        let number = error.raw_os_error();
        Failure { errno: number.unwrap_or_else(meant), words: error.to_string(), telling: number.is_none() }
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        io::Error::from(errno).into()
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> io::Error {
        let plain = io::Error::from_raw_os_error(failure.errno);
        if failure.telling { io::Error::new(plain.kind(), failure) } else { plain }
    }
}

/// What an errand has brought.
pub type Outcome = Result<(Answer, Option<OwnedFd>), Failure>;

fn ask(errand: Errand, with: Option<BorrowedFd<'_>>) -> Outcome {
    match PORTER.get() {
        Some(porter) => porter.ask(&errand, with),
        None => act::carry_out(&errand, with),
    }
}

fn descriptor(errand: Errand, with: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    ask(errand, with)?.1.ok_or_else(nonsense)
}

fn done(errand: Errand) -> io::Result<()> {
    ask(errand, None)?;
    Ok(())
}

fn nonsense() -> io::Error {
    io::Error::other("the process that opens files gave an answer that makes no sense")
}

/// Opens a file.
pub fn open(path: &Path, how: How) -> io::Result<File> {
    Ok(descriptor(Errand::Open { path: path.into(), how }, None)?.into())
}

/// Opens an open file once more, whatever happened to its name.
pub fn again(file: BorrowedFd<'_>, how: How) -> io::Result<File> {
    // Memory without a name is this process's own, and nobody else's business.
    if is_engaged()
        && let Ok(again) = act::again(file, how)
    {
        return Ok(again);
    }
    Ok(descriptor(Errand::Again { how }, Some(file))?.into())
}

/// The canonical path.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    match ask(Errand::Resolve { path: path.into() }, None)?.0 {
        Answer::Path(name) => Ok(name.path().to_owned()),
        _ => Err(nonsense()),
    }
}

/// Whether there is anything of that name.
pub fn exists(path: &Path) -> io::Result<bool> {
    match ask(Errand::Exists { path: path.into() }, None)?.0 {
        Answer::Is(so) => Ok(so),
        _ => Err(nonsense()),
    }
}

/// Removes a file or a socket.
pub fn remove(path: &Path) -> io::Result<()> {
    done(Errand::Remove { path: path.into() })
}

/// Gives a file a second name.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    done(Errand::Link { from: from.into(), to: to.into() })
}

/// Makes a folder for its owner only.
pub fn make_folder(path: &Path) -> io::Result<()> {
    done(Errand::MakeFolder { path: path.into() })
}

/// Removes a folder with nothing in it.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    done(Errand::RemoveFolder { path: path.into() })
}

/// Listens at a socket; does not block.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    Ok(descriptor(Errand::Listen { path: path.into() }, None)?.into())
}

/// Has a socket found by another name too.
pub fn alias(path: &Path, alias: &Path) -> io::Result<()> {
    done(Errand::Alias { path: path.into(), alias: alias.into() })
}

/// Connects to a socket.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    descriptor(Errand::Connect { path: path.into() }, None)
}

/// Who else has a file open.
pub fn holder(file: BorrowedFd<'_>) -> Holder {
    match ask(Errand::Holder, Some(file)) {
        Ok((Answer::Holder(holder), _)) => holder,
        _ => Holder::Unknown,
    }
}

/// The image that the disk of another minor is to who reads it.
///
/// # Errors
/// ENOENT if nobody serves it, EINVAL if several do; with a sentence for people.
pub fn parent(dir: &ControlDir, minor: Minor) -> Result<ImageSpec, (Errno, String)> {
    let outcome = ask(Errand::Parent { root: dir.root().into(), minor }, None);
    match outcome {
        Ok((Answer::Image(image), _)) => Ok(image),
        Ok(_) => Err((Errno::EIO, nonsense().to_string())),
        Err(failure) => Err((Errno::from_raw(failure.errno), failure.words)),
    }
}

/// Takes a minor into use.
pub fn claim(dir: &ControlDir, minor: Minor) -> io::Result<Claim> {
    Ok(Claim::over(descriptor(Errand::Claim { root: dir.root().into(), minor }, None)?))
}

/// Reads the record of a disk.
pub fn record(dir: &ControlDir, minor: Minor) -> io::Result<Option<Record>> {
    match ask(Errand::Keep { root: dir.root().into(), minor, what: Keep::Read }, None)?.0 {
        Answer::Record(record) => Ok(record.map(|record| *record)),
        _ => Err(nonsense()),
    }
}

/// Changes what is kept of a disk.
pub fn keep(dir: &ControlDir, minor: Minor, what: Keep) -> io::Result<()> {
    done(Errand::Keep { root: dir.root().into(), minor, what })
}

/// Removes the sockets of a dead tapdisk.
pub fn clean_up(dir: &ControlDir, dead: i32, minor: Minor, except: &Path) -> io::Result<()> {
    done(Errand::CleanUp { root: dir.root().into(), dead, minor, except: except.into() })
}

/// Opens the grant device.
pub fn grants() -> io::Result<OwnedFd> {
    descriptor(Errand::Grants, None)
}

/// Opens an event channel device that reaches one domain only.
pub fn events(dom: DomId) -> io::Result<OwnedFd> {
    descriptor(Errand::Events { dom: dom.0 }, None)
}

/// Says that what is open now is all that is to be open.
pub fn settled() {
    if is_engaged()
        && let Err(failure) = ask(Errand::Settled, None)
    {
        log::warn!("the process that opens files does not answer: {failure}");
    }
}
