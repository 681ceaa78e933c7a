//! The file system behind a [`Folder`](super::Folder): one folder of files in memory, served to the kernel (FUSE).
//!
//! A thread takes requests from the kernel in their order and hands the changes among them to another, which carries them out one
//! after another and answers. A flush is noted by the first, as soon as it comes: of what is still in flight then it makes
//! nothing durable, though the other thread may be about to do it. A device may be as mean as that.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use format::testing::{Memory, Op};
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

/// How long the kernel may believe what it was told of names and lengths: not at all, it shall ask.
const TTL: Duration = Duration::ZERO;

/// Files are never larger: a wild offset costs no memory.
const LARGEST: u64 = 1 << 30;

/// Every write reaches us at once and as it was asked for, and several of one file at the same time.
const DIRECT: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// Place of a file in [`State::files`]. It never changes.
pub type File = usize;

/// All files, and what was done to them in one order.
#[derive(Debug, Default)]
pub struct State {
    /// The files, those without a name too.
    pub files: Vec<Memory>,
    /// The names that there are.
    pub names: BTreeMap<OsString, File>,
    /// What was done to which file.
    pub log: Vec<(File, Op)>,
    /// Every name that was given, with the length of the log at that time.
    pub given: Vec<(OsString, File, usize)>,
}

impl State {
    /// Gives a name to a file.
    pub fn name(&mut self, name: &OsStr, file: File) {
        self.names.insert(name.to_owned(), file);
        self.given.push((name.to_owned(), file, self.log.len()));
    }

    /// A new file of this name.
    pub fn add(&mut self, name: &OsStr, file: Memory) -> File {
        self.files.push(file);
        self.name(name, self.files.len() - 1);
        self.files.len() - 1
    }

    fn file(&self, ino: INodeNo) -> Result<File, Errno> {
        let file = usize::try_from(ino.0 - 2).map_err(|_| Errno::EISDIR)?;
        if file < self.files.len() { Ok(file) } else { Err(Errno::ENOENT) }
    }

    fn find(&self, name: &OsStr) -> Result<File, Errno> {
        self.names.get(name).copied().ok_or(Errno::ENOENT)
    }

    /// Changes a file, if it does not become too large.
    fn change(&mut self, ino: INodeNo, op: Op) -> Result<File, Errno> {
        let file = self.file(ino)?;
        let end = match &op {
            Op::Write(offset, bytes) => offset.saturating_add(bytes.len() as u64),
            Op::Zero(range) => range.end,
            Op::SetLen(len) => *len,
            Op::Flush => 0,
        };
        if end > LARGEST {
            return Err(Errno::EFBIG);
        }
        self.files[file].apply(&op);
        self.log.push((file, op));
        Ok(file)
    }

    fn attributes(&self, file: File) -> FileAttr {
        let size = self.files[file].bytes.len() as u64;
        attributes(INodeNo(file as u64 + 2), FileType::RegularFile, size)
    }
}

fn attributes(ino: INodeNo, kind: FileType, size: u64) -> FileAttr {
    let time = SystemTime::now();
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: time,
        ctime: time,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// What a fallocate(2) makes zeros of a file of this length; it does nothing else that is known.
fn zeros(mode: i32, offset: u64, length: u64, len: u64) -> Option<Range<u64>> {
    let kept = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    let zeros = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
    let end = offset.saturating_add(length);
    // Behind the end there is nothing, if it stays where it is.
    let (start, end) = if kept { (offset.min(len), end.min(len)) } else { (offset, end) };
    zeros.then_some(start..end)
}

/// A change, and the answer to who asked for it.
type Change = Box<dyn FnOnce(&mut State) + Send>;

/// The server.
#[derive(Debug)]
pub struct Server {
    state: Arc<Mutex<State>>,
    changes: Sender<Change>,
}

impl Server {
    /// A server of these files.
    pub fn new(state: Arc<Mutex<State>>) -> Server {
        let (changes, to_do) = mpsc::channel::<Change>();
        let changed = Arc::clone(&state);
        // It ends with the server, which has the other end.
        thread::spawn(move || to_do.into_iter().for_each(|change| change(&mut lock(&changed))));
        Server { state, changes }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn later(&self, change: impl FnOnce(&mut State) + Send + 'static) {
        self.changes.send(Box::new(change)).expect("the thread lives as long as the server");
    }
}

/// A test that failed while it looked has changed nothing.
pub fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What io_uring asks for at the same time comes at the same time.
        let missing = |flags| io::Error::other(format!("the kernel's FUSE lacks {flags:?}"));
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).map_err(missing)
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        match state.find(name) {
            Ok(file) => reply.entry(&TTL, &state.attributes(file), Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino == INodeNo::ROOT {
            return reply.attr(&TTL, &attributes(ino, FileType::Directory, 0));
        }
        let state = self.state();
        match state.file(ino) {
            Ok(file) => reply.attr(&TTL, &state.attributes(file)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.later(move |state| {
            let file = match size {
                Some(size) => state.change(ino, Op::SetLen(size)),
                None => state.file(ino),
            };
            match file {
                Ok(file) => reply.attr(&TTL, &state.attributes(file)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.state();
        let file = state.add(name, Memory::file());
        reply.created(&TTL, &state.attributes(file), Generation(0), FileHandle(0), DIRECT);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), DIRECT);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        match state.file(ino) {
            Ok(file) => {
                let bytes = &state.files[file].bytes;
                let from = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
                let rest = &bytes[from..];
                reply.data(&rest[..rest.len().min(size as usize)]);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.later(move |state| {
            let len = u32::try_from(data.len()).expect("it came in a request");
            match state.change(ino, Op::Write(offset, data)) {
                Ok(_) => reply.written(len),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.later(move |state| {
            let len = state.file(ino).map_or(0, |file| state.files[file].bytes.len() as u64);
            let result = match zeros(mode, offset, length, len) {
                Some(range) if range.is_empty() => Ok(()),
                Some(range) => state.change(ino, Op::Zero(range)).map(drop),
                None => Err(Errno::EOPNOTSUPP),
            };
            answer(reply, result);
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.state().change(ino, Op::Flush).map(drop));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // It means that the file is closed.
        reply.ok();
    }

    fn link(&self, _: &Request, ino: INodeNo, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        match state.file(ino) {
            Ok(file) => {
                state.name(name, file);
                reply.entry(&TTL, &state.attributes(file), Generation(0));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        let result = match state.find(name) {
            Ok(_) if !flags.is_empty() => Err(Errno::EINVAL),
            Ok(file) => {
                state.names.remove(name);
                state.name(new, file);
                Ok(())
            }
            Err(errno) => Err(errno),
        };
        answer(reply, result);
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.state().names.remove(name).map(drop).ok_or(Errno::ENOENT));
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        for ((name, file), next) in self.state().names.iter().zip(1_u64..) {
            let ino = INodeNo(*file as u64 + 2);
            if next > offset && reply.add(ino, next, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = LARGEST / 4096;
        reply.statfs(blocks, blocks, blocks, 1000, 1000, 4096, 255, 4096);
    }
}
